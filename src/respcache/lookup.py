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
from respcache.core.encoding import Coding
from respcache.core.entry import Entry
from respcache.core.errors import Denied, StoreError
from respcache.core.fence import Fence
from respcache.core.generations import Certificate, Generation, Verdict
from respcache.core.identity import Claim, Head, Scope
from respcache.core.policy import Policy
from respcache.core.tokens import Token, reached
from respcache.fill.leases import Target
from respcache.identities import Identities, Known
from respcache.near.held import Held, Variant
from respcache.near.s3fifo import MAX_FREQUENCY, S3Fifo
from respcache.near.views import Views
from respcache.ops.stats import Stats
from respcache.plans import Aim, Grant, Plan
from respcache.routing import Route
from respcache.stores.base import Reading, Store
from respcache.switches import Switches
from respcache.writes.invalidator import Invalidator
from respcache.writes.rounds import Rounds

log = logging.getLogger("respcache")

MAX_ATTEMPTS = 6
"""Round trips that one look may take while generations are being made or the scope keeps
changing."""

Near = S3Fifo[str, Held]
Candidate = tuple[Held, Fence | None, Generation | None]
"""Held in memory; the fence that must vouch for the view; and the view, or None where one must be
read first."""


@dataclass(frozen=True, slots=True)
class Bypass:
    """The cache is left alone for this request, and why."""

    reason: str
    tenant: str | None = None


@dataclass(slots=True)
class Look:
    """What was found: a valid entry, or none and the capture under which a fill may be stored."""

    aim: Aim
    view: Generation
    certificate: Certificate
    held: Held | None
    outdated: bool

    @property
    def entry(self) -> Entry | None:
        """The valid entry, if there is one."""
        return None if self.held is None else self.held.entry

    @property
    def target(self) -> Target:
        """What it is stored under."""
        return self.aim.target

    @property
    def scope(self) -> Scope | None:
        """Who asked, where that was a request."""
        return None if self.aim.known is None else self.aim.known.scope


class _Fenced(Exception):
    """No fence vouches for what the store says now."""


class Lookup:
    """Looks things up for requests and for values."""

    def __init__(
        self,
        store: Store,
        *,
        digester: keys.Digester,
        identities: Identities,
        invalidator: Invalidator,
        switches: Switches,
        rounds: Rounds | None,
        near: Near | None,
        views: Views,
        clock: Callable[[], float],
        stats: Stats,
        ttl_ms: int,
    ) -> None:
        self._store = store
        self._digester = digester
        self._identities = identities
        self._invalidator = invalidator
        self._switches = switches
        self._vetoes = invalidator.vetoes
        self._rounds = rounds
        self._near = near
        self._views = views
        self._clock = clock
        self._stats = stats
        self._generation_ttl_ms = ttl_ms

    async def hit(self, aim: Aim, *, sent: Token | None = None) -> Held | None:
        """Return what this process's memory answers, if that can be proven, else None. At most one
        round trip, for a view.

        For values, and for requests whose bytes are new here. The wrapper and ``turbo`` take the
        same steps by themselves. ``sent``: the token that the request brings.
        """
        now = self._clock()
        if sent is not None:
            aim = self.heed(aim, sent, now)
        candidate = self.candidate(aim, now)
        if candidate is None:
            return None
        held, fence, view = candidate
        if view is None:
            try:
                view = await self.read_view(aim)
            except StoreError:
                return held if self.lasts(aim) else None
            if self._switches.off and self._switches.closed(aim.tenant, aim.policy.module):
                return None
        return held if self.proves(aim, held, fence, view, self._clock()) else None

    def heed(self, aim: Aim, sent: Token, now: float) -> Aim:
        """Return the aim for a request that brings this token: a strict one, unless the view that
        may be used has reached it."""
        if not aim.view_s:
            return aim
        view = self._views.recent(aim.target.generation_key, aim.tags, since=now - aim.view_s)
        return aim if view is not None and reached(sent, view) else aim.strict()

    def candidate(self, aim: Aim, now: float) -> Candidate | None:
        """Return what this process holds in memory for a request that comes now, and what is needed
        to prove it."""
        near, varies_by, rounds = self._near, aim.policy.varies_by, self._rounds
        if near is None or not aim.tags:
            return None
        if (self._switches.off or self._vetoes) and self._left_alone(aim):
            return None
        held = near.get(aim.target.entry_key)
        if held is None:
            return None
        if now >= held.expires_at:
            near.discard(aim.target.entry_key)
            return None
        if varies_by is not None and not self._varies_as_before(aim):
            return None
        fence = None
        if rounds is not None and not aim.lasts:
            # before the view is asked for: one granted later knows of writes that the view does not
            fence = rounds.fence
            if now >= fence.until or not (aim.covered_by is rounds.tables or self._cover(aim)):
                return None
        view = (
            self._views.recent(aim.target.generation_key, aim.tags, since=now - aim.view_s)
            if aim.view_s
            else None
        )
        return held, fence, view

    def _left_alone(self, aim: Aim) -> bool:
        vetoed = self._invalidator.vetoed
        return (
            self._switches.closed(aim.tenant, aim.policy.module)
            or vetoed(aim.tenant)
            or vetoed(aim.home)
        )

    def lasts(self, aim: Aim) -> bool:
        """Whether what is held may be used although no view is to be had: not when it was heard to
        be out of date."""
        return aim.lasts and not self._views.bumped(aim.target.generation_key)

    def _varies_as_before(self, aim: Aim) -> bool:
        varies_by, known = aim.policy.varies_by, aim.known
        try:
            return (
                varies_by is not None and known is not None and varies_by(known.scope) == aim.varied
            )
        except Exception:  # the long way meets it too, and says so
            return False

    def read_view(self, aim: Aim) -> "asyncio.Future[Generation]":
        """Read a view that is younger than this call. Raises ``StoreUnavailable``, the future
        ``StoreError``."""
        return self._views.read(aim.target.generation_key, aim.tags)

    def wait_for_view(self, aim: Aim, done: Callable[[Generation | StoreError], None]) -> None:
        """Have ``done``, which must not raise, called with what ``read_view`` returns or raises
        later."""
        self._views.wait(aim.target.generation_key, aim.tags, done)

    def proves(
        self, aim: Aim, held: Held, fence: Fence | None, view: Generation, now: float
    ) -> bool:
        """Whether the fence still vouches for this view, and entry and scope are valid in it.

        They need not be judged again in a view that they were judged in.
        """
        if fence is not None and not fence.allows(view.server, now):
            return False
        if held.proven is not view:
            if view.judge(held.entry.certificate, aim.target.tags) is not Verdict.VALID:
                self._drop(aim.target.entry_key, held)
                # if it was an old one: what is made next must not be judged by it
                self._views.expire(aim.target.generation_key)
                return False
            held.proven = view
        if aim.known is not None and aim.proven is not view:
            if not self._identities.judge(aim.known, view):
                return False
            aim.proven = view
        return True

    def granted(self, aim: Aim, now: float) -> Grant | None:
        """Return the last proof of this hit if nothing that it rests on has changed, but for the
        view at level ``strict``: that has to be read, and be the one of the proof."""
        grant = aim.grant
        if grant is None or now >= grant.until or self._vetoes or self._switches.off:
            return None
        slot, fence = grant.slot, grant.fence
        if slot is None or slot.value is not grant.held:
            return None
        if fence is not None and self._rounds is not None:
            rounds = self._rounds
            if fence is not rounds.fence or grant.tables is not rounds.tables:
                return None
        if aim.view_s and grant.group.view is not grant.view:
            return None
        if slot.frequency < MAX_FREQUENCY:
            slot.frequency += 1
        return grant

    def prove(
        self,
        plan: Plan,
        aim: Aim,
        held: Held,
        fence: Fence | None,
        view: Generation | None,
        now: float,
    ) -> Grant | None:
        """Prove a hit with what ``candidate`` found and the view that was read for it, and have
        that remembered.

        ``view`` is None where none was to be had and the entry lasts without.
        """
        if view is not None and not self.proves(aim, held, fence, view, now):
            return None
        variant = held.variants.get(plan.coding) or self.variant(aim, held, plan.coding)
        if variant is None or self._near is None:
            return None
        group = self._views.group(aim.target.generation_key)
        grant = Grant(held, variant, view, self._near.slot(aim.target.entry_key), group, fence)
        grant.tables = aim.covered_by
        if aim.view_s:
            grant.until = min(grant.until, group.asked_at + aim.view_s)
        # what it varies by is asked for anew for every request
        if view is not None and aim.policy.varies_by is None:
            aim.grant = grant
        return grant

    def _drop(self, entry_key: str, held: Held) -> None:
        near = self._near
        if near is not None and near.peek(entry_key) is held:
            near.discard(entry_key)

    async def request(self, plan: Plan, head: Head, *, sent: Token | None = None) -> Look | Bypass:
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
        except _Fenced:
            return Bypass("fence")
        except StoreError as error:
            self._stats.errors += 1
            log.debug("[Cache] Store failed: %s", error)
            return Bypass("store")
        except Exception:
            log.warning(
                "the resolver failed; the application answers without the cache", exc_info=True
            )
            return Bypass("identity")

    async def value(self, aim: Aim) -> Look | Bypass:
        """Look for a value of a tenant. One round trip when the tenant's generation exists."""
        tenant, target = aim.tenant, aim.target
        if self._switches.closed(tenant, aim.policy.module):
            return Bypass("off", tenant)
        if not self._covered(aim.policy):
            return Bypass("no-trigger", tenant)
        try:
            for _ in range(MAX_ATTEMPTS):
                if self._invalidator.vetoed(tenant):
                    return Bypass("pending-invalidation", tenant)
                reading = await self._read(target.entry_key, aim.wanted)
                if await self._made(tenant, reading.generations[0]):
                    return self._judge(aim, reading)
        except _Fenced:
            return Bypass("fence", tenant)
        except StoreError:
            self._stats.errors += 1
            return Bypass("store", tenant)
        return Bypass("unstable", tenant)

    async def review(self, look: Look, policy: Policy) -> tuple[Generation, Generation] | None:
        """Read the generations of a hit anew, its tenant's and its scope's. None unless it would be
        served in this view too.

        One round trip.
        """
        aim, entry, target, tags = look.aim, look.entry, look.target, self._identities.tags
        assert aim.known is not None
        assert entry is not None
        if not self._covered(policy) or self._left_alone(aim):
            return None
        try:
            reading = await self._read(
                None, [(target.generation_key, target.tags), (keys.generation_key(aim.home), tags)]
            )
        except (StoreError, _Fenced):
            return None
        view, home = reading.generations
        valid = view.judge(
            entry.certificate, target.tags
        ) is Verdict.VALID and self._identities.judge(aim.known, home)
        return (view, home) if valid else None

    def target_for(
        self,
        route: Route,
        policy: Policy,
        *,
        scope: Scope,
        parameters: Sequence[tuple[str, str, str]],
    ) -> Target:
        """Name everything that the answer to a request of this caller is stored under, now. The
        scope must name a tenant."""
        assert scope.tenant is not None
        also = [] if policy.varies_by is None else [("varies", "", policy.varies_by(scope))]
        return self.target(
            policy,
            tenant=scope.tenant,
            route=route.template,
            fingerprint=scope.fingerprint,
            parameters=[*parameters, *also],
        )

    def target(
        self,
        policy: Policy,
        *,
        tenant: str,
        route: str,
        fingerprint: bytes,
        parameters: Sequence[tuple[str, str, str]],
    ) -> Target:
        """Name everything that a response is stored under. ``route`` is the template of its
        path."""
        digest = self._digester.digest(
            tenant=tenant,
            route=route,
            tables=policy.tables,
            fingerprint=fingerprint,
            parameters=parameters,
        )
        return Target(
            entry_key=keys.entry_key(tenant, policy.module, policy.kind, digest),
            lease_key=keys.lease_key(tenant, policy.module, policy.kind, digest),
            digest=digest,
            tags=policy.tags,
            generation_key=keys.generation_key(tenant),
            pace=route,
        )

    async def _request(self, plan: Plan, claim: Claim, sent: Token | None) -> Look | Bypass:
        identities, policy = self._identities, plan.policy
        if not self._covered(policy):
            return Bypass("no-trigger")
        for _ in range(MAX_ATTEMPTS):
            known = plan.known
            if known is None:
                home = (
                    await self._read(None, [(keys.generation_key(claim.home), identities.tags)])
                ).generations[0]
                plan.known = await self._identify(claim, home)
                continue
            scope = known.scope
            if scope.tenant is None:
                return Bypass("no-tenant")
            if not identities.resolver.permits(scope, policy.rule):
                return Bypass("denied", scope.tenant)
            if self._switches.closed(scope.tenant, policy.module):
                return Bypass("off", scope.tenant)
            if self._invalidator.vetoed(scope.tenant) or self._invalidator.vetoed(claim.home):
                return Bypass("pending-invalidation", scope.tenant)
            tried, aim = plan.aim, self._aim(plan, known, claim)
            target = aim.target
            if aim is not tried:  # the bytes of the request are new here, its answer need not be
                held = await self.hit(aim, sent=sent)
                if held is not None and held.proven is not None:
                    return Look(aim, held.proven, held.entry.certificate, held, outdated=False)
            reading = await self._read(target.entry_key, aim.wanted)
            view, home = reading.generations[0], reading.generations[-1]
            if aim.proven is not home and not identities.judge(known, home):
                # others may have read it anew under the same claim
                latest = identities.recall(claim)
                plan.known = latest if latest is not known else await self._identify(claim, home)
            elif await self._made(scope.tenant, view):
                aim.proven = home
                return self._judge(aim, reading)
        return Bypass("unstable")

    def _aim(self, plan: Plan, known: Known, claim: Claim) -> Aim:
        """Name everything that the answer is stored under and judged by, unless the plan knows it
        already."""
        scope, policy, aim = known.scope, plan.policy, plan.aim
        varied = None if policy.varies_by is None else policy.varies_by(scope)
        if aim is None or aim.known is not known or aim.varied != varied:
            assert scope.tenant is not None
            target = self.target_for(
                plan.route, policy, scope=scope, parameters=plan.form.parameters
            )
            mine, alone = self._identities.tags, claim.home == scope.tenant
            aim = plan.aim = Aim(
                scope.tenant,
                target,
                policy,
                figures=self._stats.at(scope.tenant, policy.module, plan.route.template),
                known=known,
                home=claim.home,
                wanted=[(target.generation_key, (*target.tags, *mine))]
                if alone
                else [
                    (target.generation_key, target.tags),
                    (keys.generation_key(claim.home), mine),
                ],
                varied=varied,
                view_s=policy.view_s(anonymous=not self._identities.resolver.tables),
            )
        return aim

    def _cover(self, aim: Aim) -> bool:
        """Whether the tables are covered; if so, that is remembered until the next round has
        looked."""
        assert self._rounds is not None
        tables = self._rounds.tables
        if not self._covered(aim.policy):
            return False
        aim.covered_by = tables
        return True

    def _covered(self, policy: Policy) -> bool:
        """Whether no write to what the answer depends on, or what decides who may see it, can be
        missed."""
        rounds = self._rounds
        return rounds is None or (
            rounds.covers(policy.tables) and rounds.covers(self._identities.resolver.tables)
        )

    async def _read(
        self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]
    ) -> Reading:
        """Read from the store. Raises ``_Fenced`` unless the fence held before vouches for what
        came back."""
        rounds = self._rounds
        if rounds is None:
            return await self._store.read(entry, wanted)
        # before the request is sent: one granted later knows of writes that the reply does not
        fence = rounds.fence
        if rounds.clock() >= fence.until:
            raise _Fenced
        reading = await self._store.read(entry, wanted)
        if not fence.allows(reading.generations[0].server, rounds.clock()):
            raise _Fenced
        return reading

    async def _identify(self, claim: Claim, home: Generation) -> Known | None:
        """Read the scope under a capture from this view of its home; None when that generation had
        to be made first."""
        certificate = home.certificate()
        if certificate is None:
            await self._open(claim.home)
            return None
        return await self._identities.read(claim, view=home, certificate=certificate)

    async def _made(self, tenant: str, view: Generation) -> bool:
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

    def _judge(self, aim: Aim, reading: Reading) -> Look:
        view, target = reading.generations[0], aim.target
        certificate = view.certificate()
        assert certificate is not None
        entry = None if reading.entry is None else entries.decode(reading.entry)
        held = None
        if (
            entry is not None
            and entry.digest == target.digest
            and view.judge(entry.certificate, target.tags) is Verdict.VALID
        ):
            held = self.hold(target, entry, remaining_ms=reading.remaining_ms, proven=view)
        return Look(aim, view, certificate, held, reading.entry is not None and held is None)

    def hold(
        self, target: Target, entry: Entry, *, remaining_ms: int, proven: Generation | None = None
    ) -> Held:
        """Keep an entry in memory, if there is one for that; ``proven``: the view that it is known
        to be valid in."""
        near = self._near
        held = Held(
            entry,
            expires_at=self._clock() + remaining_ms / 1000,
            proven=proven,
            lasting=near is not None,
        )
        if near is not None:
            near.put(target.entry_key, held, size_bytes=held.size_bytes)
        return held

    def pack(self, target: Target, held: Held, body: bytes) -> None:
        """Keep the compressed form of what is held, too. A hit that was proven with the plain one
        meanwhile is proven anew."""
        held.pack(body)
        near = self._near
        if near is not None and near.peek(target.entry_key) is held:
            near.renew(target.entry_key)
            near.resize(target.entry_key, held.size_bytes)

    def variant(self, aim: Aim, held: Held, coding: Coding) -> Variant | None:
        """Make a form of what is held that it does not have yet; None, and it is dropped, where its
        bytes are damaged."""
        if self._near is None:
            return held.make(coding, max_bytes=aim.policy.max_body_bytes)
        before = held.size_bytes
        made = held.make(coding, max_bytes=aim.policy.max_body_bytes)
        if made is None:
            self._drop(aim.target.entry_key, held)
        elif held.size_bytes != before:
            self._resize(aim.target, held)
        return made

    def _resize(self, target: Target, held: Held) -> None:
        near = self._near
        if near is not None and near.peek(target.entry_key) is held:
            near.resize(target.entry_key, held.size_bytes)


def as_parameters(values: Mapping[str, object]) -> tuple[tuple[str, str, str], ...]:
    """Bring the key of a value into canonical form: sorted by name, each value by its ``repr``."""
    return tuple(("value", name, repr(values[name])) for name in sorted(values))
