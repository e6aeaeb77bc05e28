"""One look into the cache: identity, key, and the one round trip that fetches entry and generation together.

The order is the guarantee: credentials are verified, the scope is known and the route's role rule has said yes before a
key exists. A scope or an entry is used only after it was judged in a view that was read after the request began, and while
the fence holds that was held before that view was asked for (``core/fence.py``).
"""

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from respcache.core import entry as entries
from respcache.core import keys
from respcache.core.entry import Entry
from respcache.core.errors import Denied, StoreError
from respcache.core.generations import Certificate, Generation, Verdict
from respcache.core.identity import Claim, Head, Scope
from respcache.core.policy import Policy
from respcache.fill.leases import Target
from respcache.identities import Identities, Known
from respcache.ops.stats import Stats
from respcache.routing import Route
from respcache.stores.base import Reading, Store
from respcache.writes.invalidator import Invalidator
from respcache.writes.rounds import Rounds

log = logging.getLogger("respcache")

MAX_ATTEMPTS = 6
"""Round trips that one look may take while generations are being made or the scope keeps changing."""


@dataclass(frozen=True, slots=True)
class Bypass:
    """The cache is left alone for this request, and why."""

    reason: str
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What was found: a valid entry, or none and the capture under which a fill may be stored."""

    target: Target
    view: Generation
    certificate: Certificate
    entry: Entry | None
    outdated: bool
    tenant: str
    known: Known | None = None
    home: str = ""

    @property
    def scope(self) -> Scope | None:
        """Who asked, where that was a request."""
        return None if self.known is None else self.known.scope


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
        rounds: Rounds | None,
        stats: Stats,
        ttl_ms: int,
    ) -> None:
        self._store = store
        self._digester = digester
        self._identities = identities
        self._invalidator = invalidator
        self._rounds = rounds
        self._stats = stats
        self._generation_ttl_ms = ttl_ms

    async def request(
        self, route: Route, policy: Policy, *, head: Head, parameters: Sequence[tuple[str, str, str]]
    ) -> Look | Bypass:
        """Look for the answer to a request. One round trip when its scope and its tenant's generation are known."""
        try:
            return await self._request(route, policy, self._identities.resolver.claim(head), parameters)
        except Denied:
            return Bypass("denied")
        except _Fenced:
            return Bypass("fence")
        except StoreError as error:
            self._stats.errors += 1
            log.debug("[Cache] Store failed: %s", error)
            return Bypass("store")
        except Exception:
            log.warning("the resolver failed; the application answers without the cache", exc_info=True)
            return Bypass("identity")

    async def value(self, target: Target, policy: Policy, *, tenant: str) -> Look | Bypass:
        """Look for a value of a tenant. One round trip when the tenant's generation exists."""
        if not self._covered(policy):
            return Bypass("no-trigger", tenant)
        try:
            for _ in range(MAX_ATTEMPTS):
                if self._invalidator.vetoed(tenant):
                    return Bypass("pending-invalidation", tenant)
                reading = await self._read(target.entry_key, [(target.generation_key, target.tags)])
                if await self._made(tenant, reading.generations[0]):
                    return self._judge(target, reading.entry, reading.generations[0], tenant, None)
        except _Fenced:
            return Bypass("fence", tenant)
        except StoreError:
            self._stats.errors += 1
            return Bypass("store", tenant)
        return Bypass("unstable", tenant)

    async def review(self, look: Look, policy: Policy) -> tuple[Generation, Generation] | None:
        """Read the generations of a hit anew, its tenant's and its scope's. None unless it would be served in this view too.

        One round trip.
        """
        known, entry, target, tags = look.known, look.entry, look.target, self._identities.tags
        assert known is not None
        assert entry is not None
        if not self._covered(policy) or self._invalidator.vetoed(look.tenant) or self._invalidator.vetoed(look.home):
            return None
        try:
            reading = await self._read(None, [(target.generation_key, target.tags), (keys.generation_key(look.home), tags)])
        except (StoreError, _Fenced):
            return None
        view, home = reading.generations
        valid = view.judge(entry.certificate, target.tags) is Verdict.VALID and self._identities.judge(known, home)
        return (view, home) if valid else None

    def target_for(self, route: Route, policy: Policy, *, scope: Scope, parameters: Sequence[tuple[str, str, str]]) -> Target:
        """Name everything that the answer to a request of this caller is stored under, now. The scope must name a tenant."""
        assert scope.tenant is not None
        also = [] if policy.varies_by is None else [("varies", "", policy.varies_by(scope))]
        return self.target(
            policy, tenant=scope.tenant, route=route.template, fingerprint=scope.fingerprint, parameters=[*parameters, *also]
        )

    def target(
        self, policy: Policy, *, tenant: str, route: str, fingerprint: bytes, parameters: Sequence[tuple[str, str, str]]
    ) -> Target:
        """Name everything that a response is stored under. ``route`` is the template of its path."""
        digest = self._digester.digest(
            tenant=tenant, route=route, tables=policy.tables, fingerprint=fingerprint, parameters=parameters
        )
        return Target(
            entry_key=keys.entry_key(tenant, policy.module, policy.kind, digest),
            lease_key=keys.lease_key(tenant, policy.module, policy.kind, digest),
            digest=digest,
            tags=policy.tags,
            generation_key=keys.generation_key(tenant),
            pace=route,
        )

    async def _request(
        self, route: Route, policy: Policy, claim: Claim, parameters: Sequence[tuple[str, str, str]]
    ) -> Look | Bypass:
        identities, home_key = self._identities, keys.generation_key(claim.home)
        if not self._covered(policy):
            return Bypass("no-trigger")
        known = identities.recall(claim)
        for _ in range(MAX_ATTEMPTS):
            if known is None:
                home = (await self._read(None, [(home_key, identities.tags)])).generations[0]
                known = await self._identify(claim, home)
                continue
            scope = known.scope
            if scope.tenant is None:
                return Bypass("no-tenant")
            if not identities.resolver.permits(scope, policy.rule):
                return Bypass("denied", scope.tenant)
            if self._invalidator.vetoed(scope.tenant) or self._invalidator.vetoed(claim.home):
                return Bypass("pending-invalidation", scope.tenant)
            target = self.target_for(route, policy, scope=scope, parameters=parameters)
            if claim.home == scope.tenant:
                reading = await self._read(target.entry_key, [(home_key, (*target.tags, *identities.tags))])
            else:
                wanted = [(target.generation_key, target.tags), (home_key, identities.tags)]
                reading = await self._read(target.entry_key, wanted)
            view, home = reading.generations[0], reading.generations[-1]
            if not identities.judge(known, home):
                known = await self._identify(claim, home)
            elif await self._made(scope.tenant, view):
                return self._judge(target, reading.entry, view, scope.tenant, known, claim.home)
        return Bypass("unstable")

    def _covered(self, policy: Policy) -> bool:
        """Whether no write to what the answer depends on, or what decides who may see it, can be missed."""
        rounds = self._rounds
        return rounds is None or (rounds.covers(policy.tables) and rounds.covers(self._identities.resolver.tables))

    async def _read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """Read from the store. Raises ``_Fenced`` unless the fence held before vouches for what came back."""
        rounds = self._rounds
        if rounds is None:
            return await self._store.read(entry, wanted)
        fence = rounds.fence  # before the request is sent: one granted later knows of writes that the reply does not
        if not fence.allows(fence.server, rounds.clock()):
            raise _Fenced
        reading = await self._store.read(entry, wanted)
        if not fence.allows(reading.generations[0].server, rounds.clock()):
            raise _Fenced
        return reading

    async def _identify(self, claim: Claim, home: Generation) -> Known | None:
        """Read the scope under a capture from this view of its home; None when that generation had to be made first."""
        certificate = home.certificate()
        if certificate is None:
            await self._open(claim.home)
            return None
        return await self._identities.read(claim, view=home, certificate=certificate)

    async def _made(self, tenant: str, view: Generation) -> bool:
        """Whether the view is of a usable generation; if not, make one, to be read in the next attempt.

        What ``open`` returns cannot stand for that reading: it names no bumps.
        """
        if view.certificate() is not None:
            return True
        await self._open(tenant)
        return False

    async def _open(self, tenant: str) -> None:
        nonce = secrets.token_hex(8).encode("ascii")
        await self._store.open(keys.generation_key(tenant), nonce=nonce, ttl_ms=self._generation_ttl_ms)

    def _judge(
        self, target: Target, data: bytes | None, view: Generation, tenant: str, known: Known | None, home: str = ""
    ) -> Look:
        certificate = view.certificate()
        assert certificate is not None
        entry = None if data is None else entries.decode(data)
        valid = (
            entry is not None and entry.digest == target.digest and view.judge(entry.certificate, target.tags) is Verdict.VALID
        )
        return Look(target, view, certificate, entry if valid else None, data is not None and not valid, tenant, known, home)


def as_parameters(values: Mapping[str, object]) -> tuple[tuple[str, str, str], ...]:
    """Bring the key of a value into canonical form: sorted by name, each value by its ``repr``."""
    return tuple(("value", name, repr(values[name])) for name in sorted(values))
