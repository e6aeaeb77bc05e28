"""The lookup: identity, key, and the one round trip that reads entry and generation together.

The order is the guarantee. Credentials are verified, the scope is known and the route's role rule
has allowed the caller before a key exists. ``core.decision.decide`` then judges scope and entry in
a view that was read after the request began, under the serving lease that was held before that.

This is the slow path. ``proofs.py`` is the fast path, for entries in memory.
"""

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from respcache.core import entry as entries
from respcache.core import keys
from respcache.core.decision import (
    HIT,
    Bypass,
    Caller,
    Candidate,
    Decision,
    Hit,
    Miss,
    Need,
    admit,
    check_lease,
    decide,
)
from respcache.core.errors import Denied, StoreError
from respcache.core.generations import Certificate, GenerationView
from respcache.core.identity import Claim, RequestHead, Scope
from respcache.core.keys import CacheKey
from respcache.core.policy import Policy
from respcache.core.serving_lease import ServingLease
from respcache.core.tokens import ConsistencyToken
from respcache.read.guards import Guards
from respcache.read.memory import MemoryEntry, NearCache
from respcache.read.plans import Generations, HitProof, Plan, ScopedPlan
from respcache.read.proofs import Proofs
from respcache.read.scopes import CachedScope, ScopeCache
from respcache.routing.table import Route
from respcache.stores.base import Reading, Store
from respcache.telemetry.stats import Counters

log = logging.getLogger("respcache")

MAX_ATTEMPTS = 6
"""Attempts of one lookup while generations are being created or the scope keeps changing."""

Parameters = Sequence[tuple[str, str, str]]
"""The canonical ``(place, name, value)`` triples of a request."""


@dataclass(slots=True)
class LookupResult:
    """What a lookup found: a hit with its entry, or a miss with the certificate for its fill.

    ``view`` is the one that decided; only a hit from memory at level ``ttl`` may have none. A fill
    may be stored only under ``certificate``, which was captured from the view.
    """

    scoped: ScopedPlan
    decision: Hit | Miss
    view: GenerationView | None
    certificate: Certificate
    memory_entry: MemoryEntry | None = None

    @property
    def scope(self) -> Scope | None:
        """The caller's scope; None for values."""
        cached = self.scoped.cached_scope
        return None if cached is None else cached.scope


@dataclass(slots=True)  # not frozen: one is made for each lookup
class StoreRead:
    """One read of the store: the reply, and the serving lease that was held before it was sent."""

    reading: Reading
    lease: ServingLease | None

    @property
    def view(self) -> GenerationView:
        """The view of the tenant's generation."""
        return self.reading.generations[0]

    @property
    def owner_view(self) -> GenerationView:
        """The view of the owner tenant's generation; often the same one."""
        return self.reading.generations[-1]


class Lookup:
    """Looks responses and values up."""

    def __init__(
        self,
        store: Store,
        *,
        digester: keys.Digester,
        scopes: ScopeCache,
        guards: Guards,
        near: NearCache,
        proofs: Proofs,
        clock: Callable[[], float],
        counters: Counters,
        generation_ttl_ms: int,
    ) -> None:
        self._store = store
        self._digester = digester
        self._scopes = scopes
        self._guards = guards
        self._near = near
        self._proofs = proofs
        self._clock = clock
        self._counters = counters
        self._generation_ttl_ms = generation_ttl_ms

    async def fetch(
        self, plan: Plan, head: RequestHead, token: ConsistencyToken | None
    ) -> LookupResult | Bypass:
        """Look up the response to a request that brings this token.

        One round trip if its scope is cached and its tenant's generation exists.
        """
        if self._guards.is_off(plan.policy.module):
            return Bypass("off")
        try:
            if plan.claim is None:
                plan.claim = self._scopes.resolver.claim(head)
                plan.cached_scope = self._scopes.get(plan.claim)
            return await self._fetch(plan, plan.claim, token)
        except Denied:
            return Bypass("denied")
        except StoreError as error:
            self._counters.errors += 1
            log.debug("[Cache] Store failed: %s", error)
            return Bypass("store")
        except Exception:
            log.warning("the lookup failed; the request bypasses the cache", exc_info=True)
            return Bypass("identity")

    async def fetch_value(self, scoped: ScopedPlan) -> LookupResult | Bypass:
        """Look up a value of a tenant. One round trip if the tenant's generation exists."""
        try:
            for _ in range(MAX_ATTEMPTS):
                caller = self._guards.caller_of(scoped)
                bypass = Bypass("off", scoped.tenant) if caller.is_off else admit(caller)
                if bypass is not None:
                    return bypass
                read = await self.read(scoped.cache_key.entry_key, scoped.generations)
                found = read if isinstance(read, Bypass) else self._decide(scoped, caller, read)
                if not isinstance(found, Need):
                    return found
                await self._create_generation(scoped.tenant)
        except StoreError:
            self._counters.errors += 1
            return Bypass("store", scoped.tenant)
        return Bypass("unstable", scoped.tenant)

    async def recheck(self, result: LookupResult) -> tuple[GenerationView, GenerationView] | None:
        """Read the generations of a hit again: its tenant's, and its owner tenant's.

        None unless the entry would be a hit in these views, too. One round trip.
        """
        scoped, cached = result.scoped, result.memory_entry
        assert cached is not None
        owner = keys.generation_key(scoped.owner_tenant)
        wanted = [scoped.generations[0], (owner, self._scopes.tags)]
        caller = self._guards.caller_of(scoped)
        if admit(caller) is not None:
            return None
        try:
            read = await self.read(None, wanted)
        except StoreError:
            return None
        if isinstance(read, Bypass):
            return None
        decision = decide(
            Candidate(scoped.cache_key, cached.entry),
            caller,
            read.lease,
            view=read.view,
            owner_view=read.owner_view,
            now=self._clock(),
        )
        return (read.view, read.owner_view) if decision is HIT else None

    def key_for(
        self, route: Route, policy: Policy, *, scope: Scope, parameters: Parameters
    ) -> CacheKey:
        """Return the key of the response to this caller now. The scope must name a tenant."""
        assert scope.tenant is not None
        varies = [] if policy.varies_by is None else [("varies", "", policy.varies_by(scope))]
        return self.key(
            policy,
            tenant=scope.tenant,
            route=route.template,
            fingerprint=scope.fingerprint,
            parameters=[*parameters, *varies],
        )

    def key(
        self, policy: Policy, *, tenant: str, route: str, fingerprint: bytes, parameters: Parameters
    ) -> CacheKey:
        """Return the key of a response or value. ``route`` is the template of its path."""
        digest = self._digester.digest(
            tenant=tenant,
            route=route,
            tables=policy.tables,
            fingerprint=fingerprint,
            parameters=parameters,
        )
        return CacheKey(
            entry_key=keys.entry_key(tenant, policy.module, policy.kind, digest=digest),
            lock_key=keys.lock_key(tenant, policy.module, policy.kind, digest=digest),
            digest=digest,
            tags=policy.tags,
            generation_key=keys.generation_key(tenant),
            route=route,
        )

    def scope_plan(
        self, plan: Plan, claim: Claim, cached: CachedScope, *, counted: bool = True
    ) -> ScopedPlan:
        """Return the plan bound to this scope. It names everything that the response is stored
        under and judged by. ``counted=False``: its counters are not the live ones."""
        scope, policy = cached.scope, plan.policy
        assert scope.tenant is not None
        vary_value = None if policy.varies_by is None else policy.varies_by(scope)
        scoped = plan.scoped
        if scoped is not None and scoped.cached_scope is cached and scoped.vary_value == vary_value:
            return scoped
        cache_key = self.key_for(plan.route, policy, scope=scope, parameters=plan.form.parameters)
        generation, tags = cache_key.generation_key, cache_key.tags
        generations: Generations = [(generation, (*tags, *self._scopes.tags))]
        if claim.owner_tenant != scope.tenant:
            owner = keys.generation_key(claim.owner_tenant)
            generations = [(generation, tags), (owner, self._scopes.tags)]
        counters = self._counters if counted else Counters()
        return ScopedPlan(
            scope.tenant,
            cache_key,
            policy,
            counters=counters.at(scope.tenant, policy.module, plan.route.template),
            cached_scope=cached,
            owner_tenant=claim.owner_tenant,
            generations=generations,
            vary_value=vary_value,
            max_view_age_s=policy.max_view_age_s(anonymous=not self._scopes.resolver.tables),
            coding=plan.coding,
        )

    async def read(self, entry_key: str | None, generations: Generations) -> StoreRead | Bypass:
        """Read an entry (or none) and views under the serving lease. One round trip.

        A bypass means that the lease has ended. Raises ``StoreError``.
        """
        lease = self._guards.lease
        bypass = check_lease(lease, None, self._clock())
        if bypass is not None:
            return bypass
        return StoreRead(await self._store.read(entry_key, generations), lease)

    async def _fetch(
        self, plan: Plan, claim: Claim, token: ConsistencyToken | None
    ) -> LookupResult | Bypass:
        policy = plan.policy
        if not self._guards.covers(policy):
            return Bypass("no-trigger")
        for _ in range(MAX_ATTEMPTS):
            cached = plan.cached_scope
            if cached is None:
                read = await self.read(
                    None, [(keys.generation_key(claim.owner_tenant), self._scopes.tags)]
                )
                if isinstance(read, Bypass):
                    return read
                bypass = check_lease(read.lease, read.view, self._clock())
                if bypass is not None:
                    return bypass
                plan.cached_scope = await self._read_scope(claim, read.view)
                continue
            caller = self._guards.caller(policy, claim, cached)
            bypass = admit(caller)
            if bypass is not None:
                return bypass
            before, scoped = plan.scoped, self.scope_plan(plan, claim, cached)
            plan.scoped = scoped
            if scoped is not before:  # the request's bytes are new here, its response need not be
                hit = await self._from_memory(scoped, token)
                if hit is not None:
                    return hit
            read = await self.read(scoped.cache_key.entry_key, scoped.generations)
            found = read if isinstance(read, Bypass) else self._decide(scoped, caller, read)
            if not isinstance(found, Need):
                return found
            assert isinstance(read, StoreRead)
            if found is Need.GENERATION:
                await self._create_generation(scoped.tenant)
                continue
            latest = self._scopes.get(claim)  # another request may have read the scope since
            plan.cached_scope = (
                latest if latest is not cached else await self._read_scope(claim, read.owner_view)
            )
        return Bypass("unstable")

    def _decide(
        self, scoped: ScopedPlan, caller: Caller, read: StoreRead
    ) -> LookupResult | Bypass | Need:
        data = read.reading.entry
        entry = None if data is None else entries.decode(data)
        decision: Decision = decide(
            Candidate(scoped.cache_key, entry, present=data is not None),
            caller,
            read.lease,
            view=read.view,
            owner_view=read.owner_view,
            now=self._clock(),
        )
        if not isinstance(decision, (Hit, Miss)):
            return decision
        certificate = read.view.certificate()
        assert certificate is not None
        result = LookupResult(scoped, decision, read.view, certificate)
        if decision is HIT and entry is not None:
            remaining_ms = read.reading.remaining_ms
            result.memory_entry = self._near.keep(
                scoped.cache_key, entry, remaining_ms=remaining_ms
            )
        return result

    async def _from_memory(
        self, scoped: ScopedPlan, token: ConsistencyToken | None
    ) -> LookupResult | None:
        now = self._clock()
        proof = await self._proofs.hit(self._proofs.require_token(scoped, token, now), now)
        return None if proof is None else result_of(scoped, proof)

    async def _read_scope(self, claim: Claim, owner_view: GenerationView) -> CachedScope | None:
        """Read the caller's scope under a certificate from this view of the owner's generation.

        None if that generation had to be created first.
        """
        certificate = owner_view.certificate()
        if certificate is None:
            await self._create_generation(claim.owner_tenant)
            return None
        return await self._scopes.read(claim, view=owner_view, certificate=certificate)

    async def _create_generation(self, tenant: str) -> None:
        """Create a tenant's generation. It is read in the next attempt, because the reply to this
        command names no bumps."""
        nonce = secrets.token_hex(8).encode("ascii")
        await self._store.open(
            keys.generation_key(tenant), nonce=nonce, ttl_ms=self._generation_ttl_ms
        )


def result_of(scoped: ScopedPlan, proof: HitProof) -> LookupResult:
    """Return the proof of a hit as a lookup result."""
    certificate = proof.memory_entry.entry.certificate
    return LookupResult(scoped, HIT, proof.view, certificate, proof.memory_entry)


def as_parameters(values: Mapping[str, object]) -> Parameters:
    """Return the canonical form of a value's key: sorted by name, each value by its ``repr``."""
    return tuple(("value", name, repr(values[name])) for name in sorted(values))
