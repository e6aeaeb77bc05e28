"""Why a request would be a hit, a miss or a bypass now: the steps of ``asgi.py`` and ``lookup.py``,
which change nothing here."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from respcache.core import encoding, keys, tokens
from respcache.core import entry as entries
from respcache.core.encoding import ContentCoding
from respcache.core.errors import Denied, NotFound, OperationError, StoreError
from respcache.core.generations import Certificate, Verdict
from respcache.core.identity import Claim, RequestHead, Scope
from respcache.core.policy import Canonical, Level, Policy, canonical
from respcache.ops.access import Access
from respcache.ops.explain import Caller, ExplainedRequest, Explanation, LeaseFacts, MemoryFacts
from respcache.ops.facts import (
    entry_facts,
    generation_facts,
    judged,
    key_parts,
    policy_facts,
    short_server,
)
from respcache.read.memory import MemoryEntry
from respcache.read.plans import ALWAYS, Plan, ScopedPlan
from respcache.read.scopes import CachedScope
from respcache.routing.table import Route
from respcache.stores.base import Reading
from respcache.telemetry.stats import RouteCounters, RouteTimes

if TYPE_CHECKING:
    from respcache.cache import Cache
    from respcache.middleware import CacheMiddleware

READS = ("GET", "HEAD")
UNTOLD = "why is told to those who reach all tenants"


async def explain(
    cache: "Cache", middleware: "CacheMiddleware", asked: ExplainedRequest, access: Access
) -> Explanation:
    """Explain a request. Two round trips to the store at most, and the resolver's statements where
    the scope is not remembered.

    Raises ``NotFound`` where the request is of a tenant that is not within reach, and
    ``InvalidOperation``.
    """
    case = _Case(cache, middleware, asked.scope(), access)
    try:
        await case.run()
    except _End as end:
        switches = () if cache.switches is None else cache.switches.off
        visible = tuple(sorted(name for name in switches if _within(name, access)))
        return Explanation(
            outcome=end.outcome,
            reason=end.reason,
            why=end.why,
            method=asked.method.upper(),
            path=asked.path,
            switches=visible,
            **case.facts,
        )
    raise AssertionError("a case has an end")


class _End(Exception):
    def __init__(self, outcome: str, reason: str, why: str) -> None:
        super().__init__(outcome, reason, why)
        self.outcome, self.reason, self.why = outcome, reason, why


class _NoLease(Exception):
    """No fence vouches for what the store says now."""


class _Case:
    """One request on its way through ``asgi.py`` and ``lookup.py``, seen from the side. Everything
    found out is in ``facts``.

    Where it looks into ``Lookup`` it takes the same steps, and nothing else.
    """

    def __init__(
        self, cache: "Cache", middleware: "CacheMiddleware", scope: dict[str, Any], access: Access
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._cache = cache
        self._middleware = middleware
        self._scope = scope
        self._sent = tokens.sent(scope["headers"])
        self._access = access
        self._readings: dict[tuple[str, ...], Reading] = {}

    async def run(self) -> None:
        """Go the way of the request; ends with ``_End``."""
        cache, plan_cache = self._cache, self._middleware.plan_cache
        route, policy, path = self._match()
        self.facts["route"], self.facts["policy"] = route.template, policy_facts(policy)
        self._note_fence()
        form = canonical(
            RequestHead(self._scope, path), path, declared=route.parameters, passed=route.passed
        )
        self.facts["parameters"], self.facts["left_out"] = (
            key_parts(form.parameters),
            self._left_out(route, form),
        )
        plan = (
            plan_cache.peek(plan_cache.without_token(plan_cache.key(self._scope)), cache.clock())
            if plan_cache is not None and cache.enabled
            else None
        )
        self.facts["memory"] = MemoryFacts(plan=plan is not None)
        if plan is not None and plan.scoped is not None:
            self._check(plan.scoped.tenant)
            held = await self._in_memory(plan.scoped)
            if held is not None and plan.claim is not None and plan.scoped.known is not None:
                self._note_caller(plan.claim, plan.scoped.known.scope, remembered=True)
                await self._end_in_memory(plan.scoped, held)
        if cache.store is None:
            raise _End("bypass", "no-store", "the application runs without a server for its cache")
        if not cache.enabled or (
            cache.switches is not None and policy.module in cache.switches.modules
        ):
            raise _End(
                "bypass",
                "off",
                "the cache is switched off"
                if not cache.enabled
                else f"module {policy.module} is off",
            )
        head = (
            RequestHead(self._scope, path)
            if plan_cache is None
            else plan_cache.narrowed(self._scope, path)
        )
        try:
            await self._look(plan, head, route, policy, form)
        except (_End, OperationError):
            raise
        except Denied:
            raise _End(
                "bypass",
                "denied",
                "the caller is not known, or may not see this: the application answers",
            ) from None
        except _NoLease:
            problem = "" if cache.relay is None else self._told(cache.relay.problem)
            why = (
                f"this process cannot prove that it has seen every write "
                f"({problem or 'the server is another one by now'})"
            )
            raise _End("bypass", "no-lease", why) from None
        except StoreError as error:
            raise _End(
                "bypass", "store", f"the cache's server cannot be asked: {self._told(str(error))}"
            ) from None
        except Exception as error:  # its text may hold rows
            raise _End(
                "bypass", "identity", f"the resolver failed with {type(error).__name__}"
            ) from None

    def _match(self) -> tuple[Route, Policy, Any]:
        found = self._middleware.prepare().match(self._scope)
        method = self._scope["method"]
        if found is None or found[0].policy is None or method not in READS:
            why = (
                "the route that matches is not cached"
                if method in READS
                else f"{method} is never answered from the cache"
            )
            raise _End("bypass", "not-cached", why)
        return found[0], found[0].policy, found[1]

    async def _look(
        self, plan: Plan | None, head: RequestHead, route: Route, policy: Policy, form: Canonical
    ) -> None:
        """The long way: ``Lookup.request``."""
        lookup, identities, resolver = (
            self._cache._lookup,
            self._cache._lookup._identities,
            self._cache.resolver,
        )
        claim, known = (None, None) if plan is None else (plan.claim, plan.known)
        if claim is None:
            claim = resolver.claim(head)
            known = identities.peek(claim)
        if not lookup._covered(policy):
            raise _End(
                "bypass",
                "no-trigger",
                f"writes to {self._uncovered(policy)} need not leave a row in the outbox",
            )
        remembered = known is not None
        while True:
            if known is None:
                owner_tenant = (
                    await self._read(
                        None, [(keys.generation_key(claim.owner_tenant), identities.tags)]
                    )
                ).generations[0]
                known = CachedScope(
                    await resolver.scope(claim), owner_tenant.certificate() or Certificate(b"", 0)
                )
            scope = known.scope
            self._check(scope.tenant)
            self._note_caller(claim, scope, remembered=remembered)
            self._decide(claim, scope, policy)
            scoped = self._scoped(claim, known, route, policy, form)
            held = await self._in_memory(scoped)
            if held is not None:
                await self._end_in_memory(scoped, held)
            reading = await self._read(scoped.cache_key.entry_key, scoped.wanted)
            if not remembered or identities.judge(known, reading.generations[-1]):
                break
            known, remembered = None, False
        await self._describe(scoped)
        self._judge(scoped, reading)

    def _decide(self, claim: Claim, scope: Scope, policy: Policy) -> None:
        """What is decided by the scope alone, before a key exists."""
        lookup, tenant = self._cache._lookup, scope.tenant
        if tenant is None:
            raise _End("bypass", "no-tenant", "the caller belongs to no tenant, and names none")
        keys.check_tenant(tenant)
        if not self._cache.resolver.permits(scope, policy.rule):
            raise _End(
                "bypass",
                "denied",
                "the caller's role may not use this route: the application answers",
            )
        if lookup._switches.is_off(tenant, policy.module):
            raise _End("bypass", "off", f"tenant {tenant} is switched off")
        if lookup._invalidator.is_blocked(tenant) or lookup._invalidator.is_blocked(
            claim.owner_tenant
        ):
            raise _End(
                "bypass",
                "pending-invalidation",
                "an invalidation of the tenant by this process is not confirmed yet",
            )

    def _scoped(
        self, claim: Claim, known: CachedScope, route: Route, policy: Policy, form: Canonical
    ) -> ScopedPlan:
        """What ``Lookup`` aims at, without counters."""
        lookup, scope = self._cache._lookup, known.scope
        assert scope.tenant is not None
        cache_key = lookup.key_for(route, policy, scope=scope, parameters=form.parameters)
        mine, alone = lookup._identities.tags, claim.owner_tenant == scope.tenant
        wanted: list[tuple[str, Any]] = [(cache_key.generation_key, (*cache_key.tags, *mine))]
        if not alone:
            wanted = [
                (cache_key.generation_key, cache_key.tags),
                (keys.generation_key(claim.owner_tenant), mine),
            ]
        return ScopedPlan(
            scope.tenant,
            cache_key,
            policy,
            counters=RouteCounters(policy.module, route.template, RouteTimes()),
            known=known,
            owner_tenant=claim.owner_tenant,
            wanted=wanted,
            vary_value=None if policy.varies_by is None else policy.varies_by(scope),
            max_view_age_s=policy.max_view_age_s(anonymous=not self._cache.resolver.tables),
        )

    async def _in_memory(self, scoped: ScopedPlan) -> MemoryEntry | None:
        """The short way: ``Lookup.candidate`` and ``proves``, which leave everything as it is."""
        lookup, relay, now = self._cache._lookup, self._cache.relay, self._cache.clock()
        if self._sent is not None:
            scoped = lookup.require_token(scoped, self._sent, now)
        held = (
            None if self._cache.near is None else self._cache.near.peek(scoped.cache_key.entry_key)
        )
        if held is None or not scoped.tags or lookup._left_alone(scoped) or now >= held.expires_at:
            return None
        if scoped.policy.varies_by is not None and not lookup._varies_as_before(scoped):
            return None
        lease = None
        if relay is not None and not scoped.needs_no_view:
            lease = relay.lease
            if now >= lease.until or not lookup._covered(scoped.policy):
                return None
        view = (
            lookup._views.recent(
                scoped.cache_key.generation_key, scoped.tags, since=now - scoped.max_view_age_s
            )
            if scoped.max_view_age_s
            else None
        )
        if view is None:
            try:
                view = (await self._ask(scoped.cache_key.entry_key, scoped.wanted)).generations[0]
            except StoreError:
                return held if lookup.needs_no_view(scoped) else None
        if lease is not None and not lease.allows(view.server, self._cache.clock()):
            return None
        valid = view.judge(held.entry.certificate, scoped.cache_key.tags) is Verdict.VALID
        return (
            held
            if valid and (scoped.known is None or lookup._identities.judge(scoped.known, view))
            else None
        )

    async def _end_in_memory(self, scoped: ScopedPlan, held: MemoryEntry) -> None:
        """Describe a hit from memory, and end."""
        await self._describe(scoped)
        why = f"its answer is in memory, and {_PROVEN[scoped.policy.level]}"
        raise _End("hit", "memory", why)

    def _judge(self, scoped: ScopedPlan, reading: Reading) -> None:
        """What becomes of a request that the store was asked for: ``Lookup._judge``."""
        view, cache_key = reading.generations[0], scoped.cache_key
        if reading.entry is None:
            raise _End(
                "miss",
                "absent",
                "nothing is stored for it: it was not asked for yet, or its time to live is over",
            )
        entry = entries.decode(reading.entry)
        if entry is None:
            raise _End("miss", "unreadable", "what is stored is none of this release's entries")
        verdict, why, _ = judged(entry, view, tuple(cache_key.tags), cache_key.digest)
        if verdict != Verdict.VALID:
            raise _End("miss", verdict, why)
        coding = encoding.accepted(RequestHead(self._scope).joined("accept-encoding"))
        as_stored = coding is entry.coding or entry.coding is ContentCoding.identity
        if (
            not as_stored
            and encoding.decompress(entry.body, max_bytes=scoped.policy.max_body_bytes) is None
        ):
            raise _End("miss", "damaged", "the stored body cannot be decompressed")
        raise _End("hit", "store", why)

    # -- asking ------------------------------------------------------------------------------------

    async def _read(
        self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]
    ) -> Reading:
        """Read as ``Lookup`` does, under the fence."""
        relay = self._cache.relay
        if relay is None:
            return await self._ask(entry, wanted)
        lease = relay.lease
        if relay.clock() >= lease.until:
            raise _NoLease
        reading = await self._ask(entry, wanted)
        if not lease.allows(reading.generations[0].server, relay.clock()):
            raise _NoLease
        return reading

    async def _ask(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """Ask the store, once for each entry. Raises ``StoreError``."""
        store = self._cache.store
        assert store is not None
        asked = (entry or "", *(generation for generation, _ in wanted))
        if entry is None or asked not in self._readings:
            self._readings[asked] = await store.read(entry, wanted)
        return self._readings[asked]

    # -- saying ------------------------------------------------------------------------------------

    def _check(self, tenant: str | None) -> None:
        if self._access.tenant not in (None, tenant):
            raise NotFound("the request is not one of your tenant")

    async def _describe(self, scoped: ScopedPlan) -> None:
        """Note everything that is known of what the request leads to."""
        cache_key, now = scoped.cache_key, self._cache.clock()
        self.facts["key"], self.facts["lock_key"], self.facts["tags"] = (
            cache_key.entry_key,
            cache_key.lock_key,
            tuple(cache_key.tags),
        )
        if scoped.vary_value is not None:
            self.facts["parameters"] = [
                *self.facts["parameters"],
                *key_parts([("varies", "", scoped.vary_value)]),
            ]
        held = None if self._cache.near is None else self._cache.near.peek(cache_key.entry_key)
        self.facts["memory"] = MemoryFacts(
            plan=self.facts["memory"].plan,
            held=held is not None,
            size_bytes=0 if held is None else held.size_bytes,
            ttl_left_s=0.0 if held is None else round(max(0.0, held.expires_at - now), 3),
        )
        try:
            reading = await self._ask(cache_key.entry_key, scoped.wanted)
        except StoreError:
            return
        view, owner_tenant = reading.generations[0], reading.generations[-1]
        bumps = {tag: view.bumps[tag] for tag in cache_key.tags if tag in view.bumps}
        self.facts["generation"] = generation_facts(cache_key.generation_key, view, bumps)
        if len(reading.generations) > 1 and self._access.tenant is None:
            self.facts["home"] = generation_facts(
                keys.generation_key(scoped.owner_tenant), owner_tenant, owner_tenant.bumps
            )
        entry = None if reading.entry is None else entries.decode(reading.entry)
        if entry is not None and reading.entry is not None:
            self.facts["entry"] = entry_facts(
                entry,
                size_bytes=len(reading.entry),
                ttl_left_s=reading.remaining_ms / 1000,
                view=view,
                tags=cache_key.tags,
                digest=cache_key.digest,
            )

    def _told(self, said: str) -> str:
        """Return what servers say, which names hosts, to those who reach all tenants."""
        return UNTOLD if said and self._access.tenant is not None else said

    def _uncovered(self, policy: Policy) -> str:
        relay = self._cache.relay
        assert relay is not None
        return ", ".join(sorted({*policy.tables, *self._cache.resolver.tables} - relay.tables))

    def _note_fence(self) -> None:
        relay = self._cache.relay
        if relay is not None:
            age_s = relay.age_s
            self.facts["lease"] = LeaseFacts(
                alive=relay.alive,
                left_s=round(max(0.0, relay.lease.until - relay.clock()), 3),
                age_s=None if age_s is None else round(age_s, 3),
                server=short_server(relay.lease.server),
                problem=self._told(relay.problem),
            )

    def _note_caller(self, claim: Claim, scope: Scope, *, remembered: bool) -> None:
        role = getattr(scope, "role", None)
        self.facts["caller"] = Caller(
            tenant=scope.tenant,
            owner_tenant=claim.owner_tenant,
            role=None if role is None else str(role),
            fingerprint=hashlib.blake2b(scope.fingerprint, digest_size=4).hexdigest(),
            tables=tuple(self._cache.resolver.tables),
            remembered=remembered,
        )

    def _left_out(self, route: Route, form: Canonical) -> list[str]:
        """Say what the request has and the key has not."""
        declared = {
            parameter.name: parameter
            for parameter in route.parameters
            if parameter.place == "query"
        }
        used = {(name, value) for place, name, value in form.parameters if place == "query"}
        found = []
        for name, value in parse_qsl(
            self._scope["query_string"].decode("latin-1"), keep_blank_values=True
        ):
            if name in route.passed:
                found.append(f"query {name}: says who asks")
            elif name not in declared:
                found.append(f"query {name}: not declared")
            elif (name, value) not in used:
                default = value == declared[name].default
                found.append(f"query {name}: {'the default' if default else 'given again'}")
        claimed = getattr(self._cache.resolver, "headers", None) or ()
        for header, _ in self._scope["headers"]:
            name = header.decode("latin-1")
            if header in route.key_headers:
                continue
            said = "says who asks" if name in claimed else _HEADERS.get(header, "not declared")
            found.append(f"header {name}: {said}")
        return list(dict.fromkeys(found))


_HEADERS = {
    **dict.fromkeys(ALWAYS, "chooses the form only"),
    tokens.HEADER: "demands the writes that it names",
}
_PROVEN = {
    Level.STRICT: "nothing that it depends on was written",
    Level.BOUNDED: "nothing that it depends on was written within what the route's bound lets "
    "this process know",
    Level.TTL: "nobody has said that it is out of date",
}


def _within(switch: str, access: Access) -> bool:
    """Whether a switch concerns what is within reach."""
    return (
        access.tenant is None
        or switch == keys.tenant_switch(access.tenant)
        or not switch.startswith(keys.tenant_switch(""))
    )
