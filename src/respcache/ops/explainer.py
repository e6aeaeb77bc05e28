"""Explains what would become of a request now: hit, miss or bypass, and why.

It gathers the same facts as a real request from the same parts, calls the same
``core.decision.decide``, and changes nothing.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

from respcache.cache import Cache
from respcache.core import encoding, keys, tokens
from respcache.core import entry as entries
from respcache.core.decision import (
    HIT,
    Bypass,
    Caller,
    Candidate,
    Decision,
    Miss,
    Need,
    admit,
    check_lease,
    decide,
)
from respcache.core.encoding import ContentCoding
from respcache.core.entry import Entry
from respcache.core.errors import Denied, NotFound, OperationError, StoreError
from respcache.core.generations import Certificate
from respcache.core.identity import Claim, RequestHead, Scope
from respcache.core.policy import Canonical, Level, Policy, canonical
from respcache.middleware import READS, CacheMiddleware
from respcache.ops import explain as shapes
from respcache.ops.access import Access
from respcache.ops.facts import (
    entry_facts,
    generation_facts,
    judged,
    key_parts,
    policy_facts,
    short_server,
)
from respcache.read.lookup import StoreRead
from respcache.read.memory import MemoryEntry
from respcache.read.plans import ALWAYS, Plan, ScopedPlan
from respcache.read.scopes import CachedScope
from respcache.routing.table import Route
from respcache.runtime import Runtime

HIDDEN = "only operators of all tenants see why"


async def explain(
    cache: Cache,
    middleware: CacheMiddleware,
    request: shapes.ExplainedRequest,
    *,
    access: Access,
) -> shapes.Explanation:
    """Explain a request.

    At most two round trips to the store, and the resolver's statements if the scope is not cached.
    Raises ``NotFound`` if the request belongs to a tenant outside ``access``, and
    ``InvalidOperation``.
    """
    explainer = _Explainer(cache, middleware, request.scope(), access=access)
    result = await explainer.run()
    runtime = cache.runtime
    switches = () if runtime is None else runtime.switches.off
    return shapes.Explanation(
        outcome=result.outcome,
        reason=result.reason,
        why=result.why,
        method=request.method.upper(),
        path=request.path,
        switches=tuple(sorted(name for name in switches if _visible(name, access))),
        **explainer.facts,
    )


@dataclass(frozen=True, slots=True)
class _Result:
    outcome: str
    reason: str
    why: str


class _Explainer:
    """One request. Everything that was found out is in ``facts``."""

    def __init__(
        self,
        cache: Cache,
        middleware: CacheMiddleware,
        asgi_scope: dict[str, Any],
        *,
        access: Access,
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._access = access
        self._cache = cache
        self._middleware = middleware
        self._asgi_scope = asgi_scope
        self._token = tokens.client_token(asgi_scope["headers"])
        self._reads: dict[str, StoreRead] = {}

    async def run(self) -> _Result:
        """Return what would become of the request."""
        cache, runtime = self._cache, self._cache.runtime
        found, method = (
            self._middleware.prepare().match(self._asgi_scope),
            self._asgi_scope["method"],
        )
        if found is None or found[0].policy is None or method not in READS:
            why = "the matching route is not cached"
            if method not in READS:
                why = f"{method} is never answered from the cache"
            return _Result("bypass", "not-cached", why)
        (route, path), policy = found, found[0].policy
        self.facts["route"], self.facts["policy"] = route.template, policy_facts(policy)
        self._note_lease()
        head = RequestHead(self._asgi_scope, path)
        form = canonical(head, path, declared=route.parameters, passed=route.passed)
        self.facts["parameters"] = key_parts(form.parameters)
        self.facts["left_out"] = self._left_out(route, form)
        self.facts["memory"] = shapes.MemoryFacts(plan=False)
        if runtime is None:
            return _Result("bypass", "no-store", "the application runs without a cache server")
        coding = encoding.accepted(head.joined("accept-encoding"))
        plan = self._cached_plan()
        self.facts["memory"] = shapes.MemoryFacts(plan=plan is not None)
        if plan is None:
            plan = Plan(route, policy, path, form=form, coding=coding)
        elif plan.scoped is not None:
            result = await self._repeated(runtime, plan, plan.scoped)
            if result is not None:
                return result
        if runtime.guards.is_off(policy.module):
            off = f"module {policy.module} is" if cache.enabled else "the cache is"
            return _Result("bypass", "off", f"{off} switched off")
        try:
            return await self._look_up(runtime, plan, path)
        except OperationError:
            raise
        except Denied:
            why = "the caller is unknown, or may not see this: the application responds"
            return _Result("bypass", "denied", why)
        except StoreError as error:
            why = f"the cache server is unavailable: {self._shown(str(error))}"
            return _Result("bypass", "store", why)
        except Exception as error:  # not its message, which may contain rows
            return _Result("bypass", "identity", f"the resolver failed: {type(error).__name__}")

    def _cached_plan(self) -> Plan | None:
        plan_cache = self._middleware.plan_cache
        if plan_cache is None or not self._cache.enabled:
            return None
        key = plan_cache.without_token(plan_cache.key(self._asgi_scope))
        return plan_cache.peek(key, self._cache.clock())

    async def _repeated(self, runtime: Runtime, plan: Plan, scoped: ScopedPlan) -> _Result | None:
        """Explain a request whose plan is cached, if it is a hit from memory."""
        self._check_tenant(scoped.tenant)
        hit = await self._in_memory(runtime, scoped)
        if hit is None or plan.claim is None or scoped.cached_scope is None:
            return None
        self._note_caller(plan.claim, scoped.cached_scope.scope, remembered=True)
        await self._describe(runtime, scoped)
        return hit

    async def _look_up(self, runtime: Runtime, plan: Plan, path: Mapping[str, str]) -> _Result:
        """Explain what ``Lookup.fetch`` would return."""
        policy, resolver, plan_cache = (
            plan.policy,
            self._cache.resolver,
            self._middleware.plan_cache,
        )
        claim, cached = plan.claim, plan.cached_scope
        if claim is None:
            head = RequestHead(self._asgi_scope, path)
            if plan_cache is not None:
                head = plan_cache.resolver_head(self._asgi_scope, path)
            claim = resolver.claim(head)
            cached = runtime.scopes.peek(claim)
        if not runtime.guards.covers(policy):
            return self._bypassed(Bypass("no-trigger"), policy)
        remembered = cached is not None
        while True:
            bypass = None
            if cached is None:
                bypass = check_lease(runtime.guards.lease, None, self._cache.clock())
            if cached is None and bypass is None:
                owner = keys.generation_key(claim.owner_tenant)
                read = await self._read(runtime, None, [(owner, runtime.scopes.tags)])
                bypass = check_lease(read.lease, read.view, self._cache.clock())
                scope = await resolver.scope(claim)
                certificate = read.view.certificate() or Certificate(b"", 0)
                cached = CachedScope(scope, certificate)
            if bypass is not None or cached is None:
                return self._bypassed(bypass or Bypass("no-lease"), policy)
            if cached.scope.tenant is not None:
                keys.check_tenant(cached.scope.tenant)
            self._check_tenant(cached.scope.tenant)
            self._note_caller(claim, cached.scope, remembered=remembered)
            caller = runtime.guards.caller(policy, claim, cached)
            if not remembered:  # it was read just now
                caller = replace(caller, certificate=None)
            bypass = admit(caller)
            if bypass is not None:
                return self._bypassed(bypass, policy)
            scoped = runtime.lookup.scope_plan(plan, claim, cached, counted=False)
            hit = await self._in_memory(runtime, scoped)
            if hit is not None:
                await self._describe(runtime, scoped)
                return hit
            result = await self._from_store(runtime, scoped, caller)
            if result is not None:
                await self._describe(runtime, scoped)
                return result
            cached, remembered = None, False

    async def _in_memory(self, runtime: Runtime, scoped: ScopedPlan) -> _Result | None:
        """Explain a hit from memory; None if it would not be one."""
        proofs, now = runtime.proofs, self._cache.clock()
        scoped = proofs.require_token(scoped, self._token, now)
        memory_entry = runtime.near.peek(scoped.cache_key.entry_key)
        found = None if memory_entry is None else proofs.examine(scoped, memory_entry, now)
        if found is None:
            return None
        view = found.view
        if view is None:
            with suppress(StoreError):
                view = (await self._read_scoped(runtime, scoped)).view
        if proofs.decide(scoped, found, view=view, now=self._cache.clock()) is not HIT:
            return None
        why = f"its response is in memory, and {_PROVEN[scoped.policy.level]}"
        return _Result("hit", "memory", why)

    async def _from_store(
        self, runtime: Runtime, scoped: ScopedPlan, caller: Caller
    ) -> _Result | None:
        """Explain the decision on what the store holds; None if the scope must be read again."""
        bypass = check_lease(runtime.guards.lease, None, self._cache.clock())
        if bypass is not None:
            return self._bypassed(bypass, scoped.policy)
        read = await self._read_scoped(runtime, scoped)
        data = read.reading.entry
        entry = None if data is None else entries.decode(data)
        decision: Decision = decide(
            Candidate(scoped.cache_key, entry, present=data is not None),
            caller,
            read.lease,
            view=read.view,
            owner_view=read.owner_view,
            now=self._cache.clock(),
        )
        if isinstance(decision, Bypass):
            return self._bypassed(decision, scoped.policy)
        if decision is Need.SCOPE:
            return None
        if data is None:
            why = "nothing is stored for it: it was not requested yet, or its entry has expired"
            return _Result("miss", "absent", why)
        if entry is None:
            return _Result("miss", "unreadable", "the stored bytes are no entry of this release")
        verdict, why, _ = judged(
            entry, read.view, tuple(scoped.cache_key.tags), digest=scoped.cache_key.digest
        )
        if isinstance(decision, Miss | Need):
            return _Result("miss", verdict, why)
        return (
            _Result("hit", "store", why)
            if self._readable(scoped, entry)
            else _Result("miss", "damaged", "the stored body cannot be decompressed")
        )

    def _readable(self, scoped: ScopedPlan, entry: Entry) -> bool:
        memory_entry = MemoryEntry(entry, expires_at=0.0)
        max_bytes = scoped.policy.max_body_bytes
        if scoped.coding is entry.coding or entry.coding is ContentCoding.identity:
            return True
        return memory_entry.represent(scoped.coding, max_bytes=max_bytes) is not None

    def _bypassed(self, bypass: Bypass, policy: Policy) -> _Result:
        relay = None if self._cache.runtime is None else self._cache.runtime.relay
        problem = "" if relay is None else self._shown(relay.counters.problem)
        uncovered: set[str] = set()
        if relay is not None:
            uncovered = {*policy.tables, *self._cache.resolver.tables} - relay.tables
        why = {
            "denied": "the caller's role may not use this route: the application responds",
            "no-lease": "this process cannot prove that it has seen every write "
            f"({problem or 'it is connected to another server now'})",
            "no-tenant": "the caller belongs to no tenant, and names none",
            "no-trigger": f"writes to {', '.join(sorted(uncovered))} need not leave a row in the "
            "outbox",
            "off": f"tenant {bypass.tenant} is switched off",
            "pending-invalidation": "an invalidation of the tenant by this process is not "
            "confirmed "
            "yet",
        }
        return _Result("bypass", bypass.reason, why[bypass.reason])

    # -- reading -----------------------------------------------------------------------------------

    async def _read_scoped(self, runtime: Runtime, scoped: ScopedPlan) -> StoreRead:
        return await self._read(runtime, scoped.cache_key.entry_key, scoped.generations)

    async def _read(self, runtime: Runtime, entry_key: str | None, generations: Any) -> StoreRead:
        """Read from the store, once per entry. Raises ``StoreError``."""
        name = entry_key or ""
        if entry_key is None or name not in self._reads:
            lease = runtime.guards.lease
            reading = await runtime.store.read(entry_key, generations)
            self._reads[name] = StoreRead(reading, lease)
        return self._reads[name]

    # -- facts -------------------------------------------------------------------------------------

    def _check_tenant(self, tenant: str | None) -> None:
        if self._access.tenant not in (None, tenant):
            raise NotFound("the request is not one of your tenant")

    async def _describe(self, runtime: Runtime, scoped: ScopedPlan) -> None:
        """Note everything that is known about the key, the generation and the entry."""
        cache_key, facts = scoped.cache_key, self.facts
        facts["key"], facts["lock_key"] = cache_key.entry_key, cache_key.lock_key
        facts["tags"] = tuple(cache_key.tags)
        if scoped.vary_value is not None:
            varies = key_parts([("varies", "", scoped.vary_value)])
            facts["parameters"] = [*facts["parameters"], *varies]
        kept, now = runtime.near.peek(cache_key.entry_key), self._cache.clock()
        facts["memory"] = shapes.MemoryFacts(
            plan=facts["memory"].plan,
            held=kept is not None,
            size_bytes=0 if kept is None else kept.size_bytes,
            ttl_left_s=0.0 if kept is None else round(max(0.0, kept.expires_at - now), 3),
        )
        try:
            read = await self._read_scoped(runtime, scoped)
        except StoreError:
            return
        view, owner_view, reading = read.view, read.owner_view, read.reading
        bumps = {tag: view.bumps[tag] for tag in cache_key.tags if tag in view.bumps}
        facts["generation"] = generation_facts(cache_key.generation_key, view, bumps)
        if owner_view is not view and self._access.tenant is None:
            owner = keys.generation_key(scoped.owner_tenant)
            facts["owner_generation"] = generation_facts(owner, owner_view, owner_view.bumps)
        entry = None if reading.entry is None else entries.decode(reading.entry)
        if entry is not None and reading.entry is not None:
            facts["entry"] = entry_facts(
                entry,
                size_bytes=len(reading.entry),
                ttl_left_s=reading.remaining_ms / 1000,
                view=view,
                tags=cache_key.tags,
                digest=cache_key.digest,
            )

    def _shown(self, message: str) -> str:
        """Return a server's message, which may name hosts, for operators of all tenants only."""
        return HIDDEN if message and self._access.tenant is not None else message

    def _note_lease(self) -> None:
        runtime = self._cache.runtime
        relay = None if runtime is None else runtime.relay
        if relay is not None:
            age_s, left_s = relay.age_s, relay.lease.until - relay.clock()
            self.facts["lease"] = shapes.LeaseFacts(
                alive=relay.alive,
                left_s=round(max(0.0, left_s), 3),
                age_s=None if age_s is None else round(age_s, 3),
                server=short_server(relay.lease.server),
                problem=self._shown(relay.counters.problem),
            )

    def _note_caller(self, claim: Claim, scope: Scope, *, remembered: bool) -> None:
        role = getattr(scope, "role", None)
        self.facts["caller"] = shapes.CallerFacts(
            tenant=scope.tenant,
            owner_tenant=claim.owner_tenant,
            role=None if role is None else str(role),
            fingerprint=hashlib.blake2b(scope.fingerprint, digest_size=4).hexdigest(),
            tables=tuple(self._cache.resolver.tables),
            remembered=remembered,
        )

    def _left_out(self, route: Route, form: Canonical) -> list[str]:
        """Return the parts of the request that are not in the key, each with the reason."""
        declared = {p.name: p for p in route.parameters if p.place == "query"}
        used = {(name, value) for place, name, value in form.parameters if place == "query"}
        found = []
        query = self._asgi_scope["query_string"].decode("latin-1")
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name in route.passed:
                found.append(f"query {name}: identifies the caller")
            elif name not in declared:
                found.append(f"query {name}: not declared")
            elif (name, value) not in used:
                default = value == declared[name].default
                found.append(f"query {name}: {'the default' if default else 'given again'}")
        claimed = getattr(self._cache.resolver, "headers", None) or ()
        for header, _ in self._asgi_scope["headers"]:
            if header not in route.key_headers:
                name = header.decode("latin-1")
                reason = _HEADERS.get(header, "not declared")
                if name in claimed:
                    reason = "identifies the caller"
                found.append(f"header {name}: {reason}")
        return list(dict.fromkeys(found))


_HEADERS = {
    **dict.fromkeys(ALWAYS, "only chooses the coding"),
    tokens.HEADER: "requires the writes that it names",
}
_PROVEN = {
    Level.STRICT: "nothing that it depends on was written",
    Level.BOUNDED: "within the route's bound, this process knows of no write to what it depends on",
    Level.TTL: "no process has reported that it is outdated",
}


def _visible(switch: str, access: Access) -> bool:
    """Whether a switch concerns the tenants within reach."""
    if access.tenant is None or switch == keys.tenant_switch(access.tenant):
        return True
    return not switch.startswith(keys.tenant_switch(""))
