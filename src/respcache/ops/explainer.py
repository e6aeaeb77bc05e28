"""Why a request would be a hit, a miss or a bypass now: the steps of ``asgi.py`` and ``lookup.py``,
which change nothing here."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from respcache.core import encoding, keys, tokens
from respcache.core import entry as entries
from respcache.core.encoding import Coding
from respcache.core.errors import Denied, NotFound, OperationError, StoreError
from respcache.core.generations import Certificate, Verdict
from respcache.core.identity import Claim, Head, Scope
from respcache.core.policy import Canonical, Level, Policy, canonical
from respcache.identities import Known
from respcache.near.held import Held
from respcache.ops.access import Access
from respcache.ops.explain import Asked, Caller, Explanation, FenceFacts, MemoryFacts
from respcache.ops.facts import (
    entry_facts,
    generation_facts,
    judged,
    key_parts,
    policy_facts,
    short_server,
)
from respcache.ops.stats import Figures, Times
from respcache.plans import ALWAYS, Aim, Plan
from respcache.routing import Route
from respcache.stores.base import Reading

if TYPE_CHECKING:
    from respcache.asgi import Wrapper
    from respcache.cache import Cache

READS = ("GET", "HEAD")
UNTOLD = "why is told to those who reach all tenants"


async def explain(cache: "Cache", wrapper: "Wrapper", asked: Asked, access: Access) -> Explanation:
    """Explain a request. Two round trips to the store at most, and the resolver's statements where
    the scope is not remembered.

    Raises ``NotFound`` where the request is of a tenant that is not within reach, and
    ``InvalidOperation``.
    """
    case = _Case(cache, wrapper, asked.scope(), access)
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


class _Fenced(Exception):
    """No fence vouches for what the store says now."""


class _Case:
    """One request on its way through ``asgi.py`` and ``lookup.py``, seen from the side. Everything
    found out is in ``facts``.

    Where it looks into ``Lookup`` it takes the same steps, and nothing else.
    """

    def __init__(
        self, cache: "Cache", wrapper: "Wrapper", scope: dict[str, Any], access: Access
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._cache = cache
        self._wrapper = wrapper
        self._scope = scope
        self._sent = tokens.sent(scope["headers"])
        self._access = access
        self._readings: dict[tuple[str, ...], Reading] = {}

    async def run(self) -> None:
        """Go the way of the request; ends with ``_End``."""
        cache, memo = self._cache, self._wrapper.memo
        route, policy, path = self._match()
        self.facts["route"], self.facts["policy"] = route.template, policy_facts(policy)
        self._note_fence()
        form = canonical(
            Head(self._scope, path), path, declared=route.parameters, passed=route.passed
        )
        self.facts["parameters"], self.facts["left_out"] = (
            key_parts(form.parameters),
            self._left_out(route, form),
        )
        plan = (
            memo.peek(memo.without_token(memo.key(self._scope)), cache.clock())
            if memo is not None and cache.enabled
            else None
        )
        self.facts["memory"] = MemoryFacts(plan=plan is not None)
        if plan is not None and plan.aim is not None:
            self._check(plan.aim.tenant)
            held = await self._in_memory(plan.aim)
            if held is not None and plan.claim is not None and plan.aim.known is not None:
                self._note_caller(plan.claim, plan.aim.known.scope, remembered=True)
                await self._end_in_memory(plan.aim, held)
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
        head = Head(self._scope, path) if memo is None else memo.narrowed(self._scope, path)
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
        except _Fenced:
            problem = "" if cache.rounds is None else self._told(cache.rounds.problem)
            why = (
                f"this process cannot prove that it has seen every write "
                f"({problem or 'the server is another one by now'})"
            )
            raise _End("bypass", "fence", why) from None
        except StoreError as error:
            raise _End(
                "bypass", "store", f"the cache's server cannot be asked: {self._told(str(error))}"
            ) from None
        except Exception as error:  # its text may hold rows
            raise _End(
                "bypass", "identity", f"the resolver failed with {type(error).__name__}"
            ) from None

    def _match(self) -> tuple[Route, Policy, Any]:
        found = self._wrapper.prepare().match(self._scope)
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
        self, plan: Plan | None, head: Head, route: Route, policy: Policy, form: Canonical
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
                home = (
                    await self._read(None, [(keys.generation_key(claim.home), identities.tags)])
                ).generations[0]
                known = Known(
                    await resolver.scope(claim), home.certificate() or Certificate(b"", 0)
                )
            scope = known.scope
            self._check(scope.tenant)
            self._note_caller(claim, scope, remembered=remembered)
            self._decide(claim, scope, policy)
            aim = self._aim(claim, known, route, policy, form)
            held = await self._in_memory(aim)
            if held is not None:
                await self._end_in_memory(aim, held)
            reading = await self._read(aim.target.entry_key, aim.wanted)
            if not remembered or identities.judge(known, reading.generations[-1]):
                break
            known, remembered = None, False
        await self._describe(aim)
        self._judge(aim, reading)

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
        if lookup._switches.closed(tenant, policy.module):
            raise _End("bypass", "off", f"tenant {tenant} is switched off")
        if lookup._invalidator.vetoed(tenant) or lookup._invalidator.vetoed(claim.home):
            raise _End(
                "bypass",
                "pending-invalidation",
                "an invalidation of the tenant by this process is not confirmed yet",
            )

    def _aim(
        self, claim: Claim, known: Known, route: Route, policy: Policy, form: Canonical
    ) -> Aim:
        """What ``Lookup`` aims at, without counters."""
        lookup, scope = self._cache._lookup, known.scope
        assert scope.tenant is not None
        target = lookup.target_for(route, policy, scope=scope, parameters=form.parameters)
        mine, alone = lookup._identities.tags, claim.home == scope.tenant
        wanted: list[tuple[str, Any]] = [(target.generation_key, (*target.tags, *mine))]
        if not alone:
            wanted = [(target.generation_key, target.tags), (keys.generation_key(claim.home), mine)]
        return Aim(
            scope.tenant,
            target,
            policy,
            figures=Figures(policy.module, route.template, Times()),
            known=known,
            home=claim.home,
            wanted=wanted,
            varied=None if policy.varies_by is None else policy.varies_by(scope),
            view_s=policy.view_s(anonymous=not self._cache.resolver.tables),
        )

    async def _in_memory(self, aim: Aim) -> Held | None:
        """The short way: ``Lookup.candidate`` and ``proves``, which leave everything as it is."""
        lookup, rounds, now = self._cache._lookup, self._cache.rounds, self._cache.clock()
        if self._sent is not None:
            aim = lookup.heed(aim, self._sent, now)
        held = None if self._cache.near is None else self._cache.near.peek(aim.target.entry_key)
        if held is None or not aim.tags or lookup._left_alone(aim) or now >= held.expires_at:
            return None
        if aim.policy.varies_by is not None and not lookup._varies_as_before(aim):
            return None
        fence = None
        if rounds is not None and not aim.lasts:
            fence = rounds.fence
            if now >= fence.until or not lookup._covered(aim.policy):
                return None
        view = (
            lookup._views.recent(aim.target.generation_key, aim.tags, since=now - aim.view_s)
            if aim.view_s
            else None
        )
        if view is None:
            try:
                view = (await self._ask(aim.target.entry_key, aim.wanted)).generations[0]
            except StoreError:
                return held if lookup.lasts(aim) else None
        if fence is not None and not fence.allows(view.server, self._cache.clock()):
            return None
        valid = view.judge(held.entry.certificate, aim.target.tags) is Verdict.VALID
        return (
            held
            if valid and (aim.known is None or lookup._identities.judge(aim.known, view))
            else None
        )

    async def _end_in_memory(self, aim: Aim, held: Held) -> None:
        """Describe a hit from memory, and end."""
        await self._describe(aim)
        why = f"its answer is in memory, and {_PROVEN[aim.policy.level]}"
        raise _End("hit", "memory", why)

    def _judge(self, aim: Aim, reading: Reading) -> None:
        """What becomes of a request that the store was asked for: ``Lookup._judge``."""
        view, target = reading.generations[0], aim.target
        if reading.entry is None:
            raise _End(
                "miss",
                "absent",
                "nothing is stored for it: it was not asked for yet, or its time to live is over",
            )
        entry = entries.decode(reading.entry)
        if entry is None:
            raise _End("miss", "unreadable", "what is stored is none of this release's entries")
        verdict, why, _ = judged(entry, view, tuple(target.tags), target.digest)
        if verdict != Verdict.VALID:
            raise _End("miss", verdict, why)
        coding = encoding.accepted(Head(self._scope).joined("accept-encoding"))
        as_stored = coding is entry.coding or entry.coding is Coding.identity
        if (
            not as_stored
            and encoding.decompress(entry.body, max_bytes=aim.policy.max_body_bytes) is None
        ):
            raise _End("miss", "damaged", "the stored body cannot be decompressed")
        raise _End("hit", "store", why)

    # -- asking ------------------------------------------------------------------------------------

    async def _read(
        self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]
    ) -> Reading:
        """Read as ``Lookup`` does, under the fence."""
        rounds = self._cache.rounds
        if rounds is None:
            return await self._ask(entry, wanted)
        fence = rounds.fence
        if rounds.clock() >= fence.until:
            raise _Fenced
        reading = await self._ask(entry, wanted)
        if not fence.allows(reading.generations[0].server, rounds.clock()):
            raise _Fenced
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

    async def _describe(self, aim: Aim) -> None:
        """Note everything that is known of what the request leads to."""
        target, now = aim.target, self._cache.clock()
        self.facts["key"], self.facts["lease_key"], self.facts["tags"] = (
            target.entry_key,
            target.lease_key,
            tuple(target.tags),
        )
        if aim.varied is not None:
            self.facts["parameters"] = [
                *self.facts["parameters"],
                *key_parts([("varies", "", aim.varied)]),
            ]
        held = None if self._cache.near is None else self._cache.near.peek(target.entry_key)
        self.facts["memory"] = MemoryFacts(
            plan=self.facts["memory"].plan,
            held=held is not None,
            size_bytes=0 if held is None else held.size_bytes,
            ttl_left_s=0.0 if held is None else round(max(0.0, held.expires_at - now), 3),
        )
        try:
            reading = await self._ask(target.entry_key, aim.wanted)
        except StoreError:
            return
        view, home = reading.generations[0], reading.generations[-1]
        bumps = {tag: view.bumps[tag] for tag in target.tags if tag in view.bumps}
        self.facts["generation"] = generation_facts(target.generation_key, view, bumps)
        if len(reading.generations) > 1 and self._access.tenant is None:
            self.facts["home"] = generation_facts(keys.generation_key(aim.home), home, home.bumps)
        entry = None if reading.entry is None else entries.decode(reading.entry)
        if entry is not None and reading.entry is not None:
            self.facts["entry"] = entry_facts(
                entry,
                size_bytes=len(reading.entry),
                ttl_left_s=reading.remaining_ms / 1000,
                view=view,
                tags=target.tags,
                digest=target.digest,
            )

    def _told(self, said: str) -> str:
        """Return what servers say, which names hosts, to those who reach all tenants."""
        return UNTOLD if said and self._access.tenant is not None else said

    def _uncovered(self, policy: Policy) -> str:
        rounds = self._cache.rounds
        assert rounds is not None
        return ", ".join(sorted({*policy.tables, *self._cache.resolver.tables} - rounds.tables))

    def _note_fence(self) -> None:
        rounds = self._cache.rounds
        if rounds is not None:
            age_s = rounds.age_s
            self.facts["fence"] = FenceFacts(
                alive=rounds.alive,
                left_s=round(max(0.0, rounds.fence.until - rounds.clock()), 3),
                age_s=None if age_s is None else round(age_s, 3),
                server=short_server(rounds.fence.server),
                problem=self._told(rounds.problem),
            )

    def _note_caller(self, claim: Claim, scope: Scope, *, remembered: bool) -> None:
        role = getattr(scope, "role", None)
        self.facts["caller"] = Caller(
            tenant=scope.tenant,
            home=claim.home,
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
