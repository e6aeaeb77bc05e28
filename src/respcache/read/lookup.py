"""One look into the cache: identity, key, and the one round trip that fetches entry and generation
together.

The order is the guarantee: credentials are verified, the scope is known and the route's role rule
has said yes before a key exists. A scope or an entry is used only after it was judged in a view
that was read after the request began (or is as old as the route's bound allows), and while the
fence holds that was held before that view was asked for (``core/fence.py``).

``hit`` is the short way, for what this process holds in memory; whatever it cannot prove goes the
long way, ``request``.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from respcache.core import entry as entries
from respcache.core import keys
from respcache.core.encoding import ContentCoding
from respcache.core.entry import Entry
from respcache.core.errors import Denied, StoreError
from respcache.core.generations import Certificate, GenerationView, Verdict
from respcache.core.identity import Claim, RequestHead, Scope
from respcache.core.policy import Policy
from respcache.core.serving_lease import ServingLease
from respcache.core.tokens import ConsistencyToken, reached
from respcache.read.fill_locks import CacheKey
from respcache.read.memory import MemoryEntry, Representation
from respcache.read.plans import HitProof, Plan, ScopedPlan
from respcache.read.s3fifo import MAX_FREQUENCY, S3Fifo
from respcache.read.scopes import CachedScope, ScopeCache
from respcache.read.views import ViewReader
from respcache.routing.table import Route
from respcache.stores.base import Reading, Store
from respcache.telemetry.stats import Counters
from respcache.writes.invalidator import Invalidator
from respcache.writes.relay import OutboxRelay
from respcache.writes.switches import Switches

log = logging.getLogger("respcache")

MAX_ATTEMPTS = 6
"""Round trips that one look may take while generations are being made or the scope keeps
changing."""

Near = S3Fifo[str, MemoryEntry]
Candidate = tuple[MemoryEntry, ServingLease | None, GenerationView | None]
"""Held in memory; the fence that must vouch for the view; and the view, or None where one must be
read first."""


@dataclass(frozen=True, slots=True)
class Bypass:
    """The cache is left alone for this request, and why."""

    reason: str
    tenant: str | None = None


@dataclass(slots=True)
class LookupResult:
    """What was found: a valid entry, or none and the capture under which a fill may be stored."""

    scoped: ScopedPlan
    view: GenerationView
    certificate: Certificate
    held: MemoryEntry | None
    outdated: bool

    @property
    def entry(self) -> Entry | None:
        """The valid entry, if there is one."""
        return None if self.held is None else self.held.entry

    @property
    def cache_key(self) -> CacheKey:
        """What it is stored under."""
        return self.scoped.cache_key

    @property
    def scope(self) -> Scope | None:
        """Who asked, where that was a request."""
        return None if self.scoped.known is None else self.scoped.known.scope


class _NoLease(Exception):
    """No fence vouches for what the store says now."""


class Lookup:
    """Looks things up for requests and for values."""

    def __init__(
        self,
        store: Store,
        *,
        digester: keys.Digester,
        identities: ScopeCache,
        invalidator: Invalidator,
        switches: Switches,
        relay: OutboxRelay | None,
        near: Near | None,
        views: ViewReader,
        clock: Callable[[], float],
        stats: Counters,
        ttl_ms: int,
    ) -> None:
        self._store = store
        self._digester = digester
        self._identities = identities
        self._invalidator = invalidator
        self._switches = switches
        self._blocked_tenants = invalidator.blocked_tenants
        self._relay = relay
        self._near = near
        self._views = views
        self._clock = clock
        self._stats = stats
        self._generation_ttl_ms = ttl_ms

    async def hit(
        self, scoped: ScopedPlan, *, sent: ConsistencyToken | None = None
    ) -> MemoryEntry | None:
        """Return what this process's memory answers, if that can be proven, else None. At most one
        round trip, for a view.

        For values, and for requests whose bytes are new here. The wrapper and ``turbo`` take the
        same steps by themselves. ``sent``: the token that the request brings.
        """
        now = self._clock()
        if sent is not None:
            scoped = self.require_token(scoped, sent, now)
        candidate = self.candidate(scoped, now)
        if candidate is None:
            return None
        held, lease, view = candidate
        if view is None:
            try:
                view = await self.read_view(scoped)
            except StoreError:
                return held if self.needs_no_view(scoped) else None
            if self._switches.off and self._switches.is_off(scoped.tenant, scoped.policy.module):
                return None
        return held if self.proves(scoped, held, lease, view, self._clock()) else None

    def require_token(self, scoped: ScopedPlan, sent: ConsistencyToken, now: float) -> ScopedPlan:
        """Return the aim for a request that brings this token: a strict one, unless the view that
        may be used has reached it."""
        if not scoped.max_view_age_s:
            return scoped
        view = self._views.recent(
            scoped.cache_key.generation_key, scoped.tags, since=now - scoped.max_view_age_s
        )
        return scoped if view is not None and reached(sent, view) else scoped.strict()

    def candidate(self, scoped: ScopedPlan, now: float) -> Candidate | None:
        """Return what this process holds in memory for a request that comes now, and what is needed
        to prove it."""
        near, varies_by, relay = self._near, scoped.policy.varies_by, self._relay
        if near is None or not scoped.tags:
            return None
        if (self._switches.off or self._blocked_tenants) and self._left_alone(scoped):
            return None
        held = near.get(scoped.cache_key.entry_key)
        if held is None:
            return None
        if now >= held.expires_at:
            near.discard(scoped.cache_key.entry_key)
            return None
        if varies_by is not None and not self._varies_as_before(scoped):
            return None
        lease = None
        if relay is not None and not scoped.needs_no_view:
            # before the view is asked for: one granted later knows of writes that the view does not
            lease = relay.lease
            if now >= lease.until or not (scoped.covered_by is relay.tables or self._cover(scoped)):
                return None
        view = (
            self._views.recent(
                scoped.cache_key.generation_key, scoped.tags, since=now - scoped.max_view_age_s
            )
            if scoped.max_view_age_s
            else None
        )
        return held, lease, view

    def _left_alone(self, scoped: ScopedPlan) -> bool:
        is_blocked = self._invalidator.is_blocked
        return (
            self._switches.is_off(scoped.tenant, scoped.policy.module)
            or is_blocked(scoped.tenant)
            or is_blocked(scoped.owner_tenant)
        )

    def needs_no_view(self, scoped: ScopedPlan) -> bool:
        """Whether what is held may be used although no view is to be had: not when it was heard to
        be out of date."""
        return scoped.needs_no_view and not self._views.bumped(scoped.cache_key.generation_key)

    def _varies_as_before(self, scoped: ScopedPlan) -> bool:
        varies_by, known = scoped.policy.varies_by, scoped.known
        try:
            return (
                varies_by is not None
                and known is not None
                and varies_by(known.scope) == scoped.vary_value
            )
        except Exception:  # the long way meets it too, and says so
            return False

    def read_view(self, scoped: ScopedPlan) -> "asyncio.Future[GenerationView]":
        """Read a view that is younger than this call. Raises ``StoreUnavailable``, the future
        ``StoreError``."""
        return self._views.read(scoped.cache_key.generation_key, scoped.tags)

    def wait_for_view(
        self, scoped: ScopedPlan, done: Callable[[GenerationView | StoreError], None]
    ) -> None:
        """Have ``done``, which must not raise, called with what ``read_view`` returns or raises
        later."""
        self._views.wait(scoped.cache_key.generation_key, scoped.tags, done)

    def proves(
        self,
        scoped: ScopedPlan,
        held: MemoryEntry,
        lease: ServingLease | None,
        view: GenerationView,
        now: float,
    ) -> bool:
        """Whether the fence still vouches for this view, and entry and scope are valid in it.

        They need not be judged again in a view that they were judged in.
        """
        if lease is not None and not lease.allows(view.server, now):
            return False
        if held.proven is not view:
            if view.judge(held.entry.certificate, scoped.cache_key.tags) is not Verdict.VALID:
                self._drop(scoped.cache_key.entry_key, held)
                # if it was an old one: what is made next must not be judged by it
                self._views.expire(scoped.cache_key.generation_key)
                return False
            held.proven = view
        if scoped.known is not None and scoped.proven is not view:
            if not self._identities.judge(scoped.known, view):
                return False
            scoped.proven = view
        return True

    def still_proven(self, scoped: ScopedPlan, now: float) -> HitProof | None:
        """Return the last proof of this hit if nothing that it rests on has changed, but for the
        view at level ``strict``: that has to be read, and be the one of the proof."""
        proof = scoped.proof
        if proof is None or now >= proof.until or self._blocked_tenants or self._switches.off:
            return None
        slot, lease = proof.slot, proof.lease
        if slot is None or slot.value is not proof.held:
            return None
        if lease is not None and self._relay is not None:
            relay = self._relay
            if lease is not relay.lease or proof.tables is not relay.tables:
                return None
        if scoped.max_view_age_s and proof.group.view is not proof.view:
            return None
        if slot.frequency < MAX_FREQUENCY:
            slot.frequency += 1
        return proof

    def prove(
        self,
        plan: Plan,
        scoped: ScopedPlan,
        held: MemoryEntry,
        lease: ServingLease | None,
        view: GenerationView | None,
        now: float,
    ) -> HitProof | None:
        """Prove a hit with what ``candidate`` found and the view that was read for it, and have
        that remembered.

        ``view`` is None where none was to be had and the entry lasts without.
        """
        if view is not None and not self.proves(scoped, held, lease, view, now):
            return None
        representation = held.representations.get(plan.coding) or self.representation(
            scoped, held, plan.coding
        )
        if representation is None or self._near is None:
            return None
        group = self._views.group(scoped.cache_key.generation_key)
        proof = HitProof(
            held, representation, view, self._near.slot(scoped.cache_key.entry_key), group, lease
        )
        proof.tables = scoped.covered_by
        if scoped.max_view_age_s:
            proof.until = min(proof.until, group.asked_at + scoped.max_view_age_s)
        # what it varies by is asked for anew for every request
        if view is not None and scoped.policy.varies_by is None:
            scoped.proof = proof
        return proof

    def _drop(self, entry_key: str, held: MemoryEntry) -> None:
        near = self._near
        if near is not None and near.peek(entry_key) is held:
            near.discard(entry_key)

    async def request(
        self, plan: Plan, head: RequestHead, *, sent: ConsistencyToken | None = None
    ) -> LookupResult | Bypass:
        """Look for the answer to a request, which brings the token ``sent``.

        One round trip when its scope and its tenant's generation are known.
        """
        try:
            if plan.claim is None:
                plan.claim = self._identities.resolver.claim(head)
                plan.known = self._identities.recall(plan.claim)
            return await self._request(plan, plan.claim, sent)
        except Denied:
            return Bypass("denied")
        except _NoLease:
            return Bypass("no-lease")
        except StoreError as error:
            self._stats.errors += 1
            log.debug("[Cache] Store failed: %s", error)
            return Bypass("store")
        except Exception:
            log.warning(
                "the resolver failed; the application answers without the cache", exc_info=True
            )
            return Bypass("identity")

    async def value(self, scoped: ScopedPlan) -> LookupResult | Bypass:
        """Look for a value of a tenant. One round trip when the tenant's generation exists."""
        tenant, cache_key = scoped.tenant, scoped.cache_key
        if self._switches.is_off(tenant, scoped.policy.module):
            return Bypass("off", tenant)
        if not self._covered(scoped.policy):
            return Bypass("no-trigger", tenant)
        try:
            for _ in range(MAX_ATTEMPTS):
                if self._invalidator.is_blocked(tenant):
                    return Bypass("pending-invalidation", tenant)
                reading = await self._read(cache_key.entry_key, scoped.wanted)
                if await self._made(tenant, reading.generations[0]):
                    return self._judge(scoped, reading)
        except _NoLease:
            return Bypass("no-lease", tenant)
        except StoreError:
            self._stats.errors += 1
            return Bypass("store", tenant)
        return Bypass("unstable", tenant)

    async def review(
        self, look: LookupResult, policy: Policy
    ) -> tuple[GenerationView, GenerationView] | None:
        """Read the generations of a hit anew, its tenant's and its scope's. None unless it would be
        served in this view too.

        One round trip.
        """
        scoped, entry, cache_key, tags = (
            look.scoped,
            look.entry,
            look.cache_key,
            self._identities.tags,
        )
        assert scoped.known is not None
        assert entry is not None
        if not self._covered(policy) or self._left_alone(scoped):
            return None
        try:
            reading = await self._read(
                None,
                [
                    (cache_key.generation_key, cache_key.tags),
                    (keys.generation_key(scoped.owner_tenant), tags),
                ],
            )
        except (StoreError, _NoLease):
            return None
        view, owner_tenant = reading.generations
        valid = view.judge(
            entry.certificate, cache_key.tags
        ) is Verdict.VALID and self._identities.judge(scoped.known, owner_tenant)
        return (view, owner_tenant) if valid else None

    def key_for(
        self,
        route: Route,
        policy: Policy,
        *,
        scope: Scope,
        parameters: Sequence[tuple[str, str, str]],
    ) -> CacheKey:
        """Name everything that the answer to a request of this caller is stored under, now. The
        scope must name a tenant."""
        assert scope.tenant is not None
        also = [] if policy.varies_by is None else [("varies", "", policy.varies_by(scope))]
        return self.cache_key(
            policy,
            tenant=scope.tenant,
            route=route.template,
            fingerprint=scope.fingerprint,
            parameters=[*parameters, *also],
        )

    def cache_key(
        self,
        policy: Policy,
        *,
        tenant: str,
        route: str,
        fingerprint: bytes,
        parameters: Sequence[tuple[str, str, str]],
    ) -> CacheKey:
        """Name everything that a response is stored under. ``route`` is the template of its
        path."""
        digest = self._digester.digest(
            tenant=tenant,
            route=route,
            tables=policy.tables,
            fingerprint=fingerprint,
            parameters=parameters,
        )
        return CacheKey(
            entry_key=keys.entry_key(tenant, policy.module, policy.kind, digest),
            lock_key=keys.lock_key(tenant, policy.module, policy.kind, digest),
            digest=digest,
            tags=policy.tags,
            generation_key=keys.generation_key(tenant),
            route=route,
        )

    async def _request(
        self, plan: Plan, claim: Claim, sent: ConsistencyToken | None
    ) -> LookupResult | Bypass:
        identities, policy = self._identities, plan.policy
        if not self._covered(policy):
            return Bypass("no-trigger")
        for _ in range(MAX_ATTEMPTS):
            known = plan.known
            if known is None:
                owner_tenant = (
                    await self._read(
                        None, [(keys.generation_key(claim.owner_tenant), identities.tags)]
                    )
                ).generations[0]
                plan.known = await self._identify(claim, owner_tenant)
                continue
            scope = known.scope
            if scope.tenant is None:
                return Bypass("no-tenant")
            if not identities.resolver.permits(scope, policy.rule):
                return Bypass("denied", scope.tenant)
            if self._switches.is_off(scope.tenant, policy.module):
                return Bypass("off", scope.tenant)
            if self._invalidator.is_blocked(scope.tenant) or self._invalidator.is_blocked(
                claim.owner_tenant
            ):
                return Bypass("pending-invalidation", scope.tenant)
            tried, scoped = plan.scoped, self._scoped(plan, known, claim)
            cache_key = scoped.cache_key
            if scoped is not tried:  # the bytes of the request are new here, its answer need not be
                held = await self.hit(scoped, sent=sent)
                if held is not None and held.proven is not None:
                    return LookupResult(
                        scoped, held.proven, held.entry.certificate, held, outdated=False
                    )
            reading = await self._read(cache_key.entry_key, scoped.wanted)
            view, owner_tenant = reading.generations[0], reading.generations[-1]
            if scoped.proven is not owner_tenant and not identities.judge(known, owner_tenant):
                # others may have read it anew under the same claim
                latest = identities.recall(claim)
                plan.known = (
                    latest if latest is not known else await self._identify(claim, owner_tenant)
                )
            elif await self._made(scope.tenant, view):
                scoped.proven = owner_tenant
                return self._judge(scoped, reading)
        return Bypass("unstable")

    def _scoped(self, plan: Plan, known: CachedScope, claim: Claim) -> ScopedPlan:
        """Name everything that the answer is stored under and judged by, unless the plan knows it
        already."""
        scope, policy, scoped = known.scope, plan.policy, plan.scoped
        vary_value = None if policy.varies_by is None else policy.varies_by(scope)
        if scoped is None or scoped.known is not known or scoped.vary_value != vary_value:
            assert scope.tenant is not None
            cache_key = self.key_for(
                plan.route, policy, scope=scope, parameters=plan.form.parameters
            )
            mine, alone = self._identities.tags, claim.owner_tenant == scope.tenant
            scoped = plan.scoped = ScopedPlan(
                scope.tenant,
                cache_key,
                policy,
                counters=self._stats.at(scope.tenant, policy.module, plan.route.template),
                known=known,
                owner_tenant=claim.owner_tenant,
                wanted=[(cache_key.generation_key, (*cache_key.tags, *mine))]
                if alone
                else [
                    (cache_key.generation_key, cache_key.tags),
                    (keys.generation_key(claim.owner_tenant), mine),
                ],
                vary_value=vary_value,
                max_view_age_s=policy.max_view_age_s(
                    anonymous=not self._identities.resolver.tables
                ),
            )
        return scoped

    def _cover(self, scoped: ScopedPlan) -> bool:
        """Whether the tables are covered; if so, that is remembered until the next round has
        looked."""
        assert self._relay is not None
        tables = self._relay.tables
        if not self._covered(scoped.policy):
            return False
        scoped.covered_by = tables
        return True

    def _covered(self, policy: Policy) -> bool:
        """Whether no write to what the answer depends on, or what decides who may see it, can be
        missed."""
        relay = self._relay
        return relay is None or (
            relay.covers(policy.tables) and relay.covers(self._identities.resolver.tables)
        )

    async def _read(
        self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]
    ) -> Reading:
        """Read from the store. Raises ``_NoLease`` unless the fence held before vouches for what
        came back."""
        relay = self._relay
        if relay is None:
            return await self._store.read(entry, wanted)
        # before the request is sent: one granted later knows of writes that the reply does not
        lease = relay.lease
        if relay.clock() >= lease.until:
            raise _NoLease
        reading = await self._store.read(entry, wanted)
        if not lease.allows(reading.generations[0].server, relay.clock()):
            raise _NoLease
        return reading

    async def _identify(self, claim: Claim, owner_tenant: GenerationView) -> CachedScope | None:
        """Read the scope under a capture from this view of its home; None when that generation had
        to be made first."""
        certificate = owner_tenant.certificate()
        if certificate is None:
            await self._open(claim.owner_tenant)
            return None
        return await self._identities.read(claim, view=owner_tenant, certificate=certificate)

    async def _made(self, tenant: str, view: GenerationView) -> bool:
        """Whether the view is of a usable generation; if not, make one, to be read in the next
        attempt.

        What ``open`` returns cannot stand for that reading: it names no bumps.
        """
        if view.certificate() is not None:
            return True
        await self._open(tenant)
        return False

    async def _open(self, tenant: str) -> None:
        nonce = secrets.token_hex(8).encode("ascii")
        await self._store.open(
            keys.generation_key(tenant), nonce=nonce, ttl_ms=self._generation_ttl_ms
        )

    def _judge(self, scoped: ScopedPlan, reading: Reading) -> LookupResult:
        view, cache_key = reading.generations[0], scoped.cache_key
        certificate = view.certificate()
        assert certificate is not None
        entry = None if reading.entry is None else entries.decode(reading.entry)
        held = None
        if (
            entry is not None
            and entry.digest == cache_key.digest
            and view.judge(entry.certificate, cache_key.tags) is Verdict.VALID
        ):
            held = self.hold(cache_key, entry, remaining_ms=reading.remaining_ms, proven=view)
        return LookupResult(
            scoped, view, certificate, held, reading.entry is not None and held is None
        )

    def hold(
        self,
        cache_key: CacheKey,
        entry: Entry,
        *,
        remaining_ms: int,
        proven: GenerationView | None = None,
    ) -> MemoryEntry:
        """Keep an entry in memory, if there is one for that; ``proven``: the view that it is known
        to be valid in."""
        near = self._near
        held = MemoryEntry(
            entry,
            expires_at=self._clock() + remaining_ms / 1000,
            proven=proven,
            lasting=near is not None,
        )
        if near is not None:
            near.put(cache_key.entry_key, held, size_bytes=held.size_bytes)
        return held

    def pack(self, cache_key: CacheKey, held: MemoryEntry, body: bytes) -> None:
        """Keep the compressed form of what is held, too. A hit that was proven with the plain one
        meanwhile is proven anew."""
        held.pack(body)
        near = self._near
        if near is not None and near.peek(cache_key.entry_key) is held:
            near.renew(cache_key.entry_key)
            near.resize(cache_key.entry_key, held.size_bytes)

    def representation(
        self, scoped: ScopedPlan, held: MemoryEntry, coding: ContentCoding
    ) -> Representation | None:
        """Make a form of what is held that it does not have yet; None, and it is dropped, where its
        bytes are damaged."""
        if self._near is None:
            return held.make(coding, max_bytes=scoped.policy.max_body_bytes)
        before = held.size_bytes
        made = held.make(coding, max_bytes=scoped.policy.max_body_bytes)
        if made is None:
            self._drop(scoped.cache_key.entry_key, held)
        elif held.size_bytes != before:
            self._resize(scoped.cache_key, held)
        return made

    def _resize(self, cache_key: CacheKey, held: MemoryEntry) -> None:
        near = self._near
        if near is not None and near.peek(cache_key.entry_key) is held:
            near.resize(cache_key.entry_key, held.size_bytes)


def as_parameters(values: Mapping[str, object]) -> tuple[tuple[str, str, str], ...]:
    """Bring the key of a value into canonical form: sorted by name, each value by its ``repr``."""
    return tuple(("value", name, repr(values[name])) for name in sorted(values))
