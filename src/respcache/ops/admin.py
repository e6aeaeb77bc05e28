"""Admin: everything that operators and tenant admins see and do, in one place, for dashboard, API and command line.

Every method takes the ``Access`` of who asks and enforces it itself: another tenant's data is ``NotFound``, acts need the role
operator, what concerns all tenants needs an access to all. Every act is written down in the trail before it is done. What
comes back are structs that serialise to JSON as they are (``msgspec.json.encode``, ``msgspec.to_builtins``).

Besides what each method names, all raise ``AccessRefused``, ``NotFound`` and ``InvalidOperation``, and those that ask the cache's
server ``StoreUnavailable``.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from respcache.core.errors import InvalidOperation, NotFound
from respcache.ops.access import Access
from respcache.ops.explain import Explanation
from respcache.ops.feed import Feed
from respcache.ops.search import Body, Inspection, KeyPage, Sample
from respcache.ops.stats import BOUNDS_S, OTHER, Histogram, Times, Totals
from respcache.ops.trail import Act, LogTrail, Trail

if TYPE_CHECKING:
    from respcache.cache import Cache

MAX_ROWS = 1_000
"""Rows of one answer."""


MAX_SWITCHES = 1_000
"""Tenants and modules that can be off at the same time."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One value of the configuration and where it comes from."""

    name: str
    value: str
    """``set`` or ``not set`` of secrets."""
    source: str
    """``default``, ``argument``, or what the application says: the name of an environment variable, a file."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a tenant, a module or a route."""

    name: str
    module: str | None = None
    """Of a route."""
    kind: str | None = None
    """Of a route, with the next two."""
    level: str | None = None
    ttl_s: float | None = None
    hits: int
    misses: int
    requests: int
    """Hits, misses and bypasses."""
    hit_ratio: float | None
    collapsed: int
    bypasses: dict[str, int]
    stores: int
    stores_refused: dict[str, int]
    invalidations: int
    bytes_served: int
    bytes_stored: int
    hit_p50_s: float | None = None
    """This and what follows: of modules and routes, for those who reach all tenants; else None."""
    hit_p95_s: float | None = None
    miss_p50_s: float | None = None
    miss_p95_s: float | None = None
    fill_s: float | None = None
    """What the fills took together."""
    saved_s: float | None = None
    """What hits would have taken had they been fills: an estimate."""


class Switches(msgspec.Struct, frozen=True, kw_only=True):
    """What is switched off. To a tenant's admin: as far as it concerns the tenant."""

    enabled: bool
    """This process looks into the cache at all."""
    everything: bool
    tenants: list[str]
    modules: list[str]
    told: bool = True
    """The store was reached: all processes follow within a second. If not, it is told as soon as it is."""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the cache at a glance."""

    at: datetime
    figures_of: str
    """``all processes``, or ``this process`` where the server is away or is none."""
    available: bool
    switches: Switches
    totals: Row
    hit_times: Histogram | None
    """By the bounds ``bounds_s``; None, as the next, for a tenant's admin: they are kept of all tenants together."""
    miss_times: Histogram | None
    bounds_s: tuple[float, ...] = BOUNDS_S
    pending_tenants: list[str]
    """Vetoed in this process: their last invalidation is not confirmed."""
    audit: dict[str, Any] | None
    fence: dict[str, Any] | None


class Purge(msgspec.Struct, frozen=True, kw_only=True):
    """What a purge did, or of a dry run: would do."""

    tenant: str
    module: str | None
    key: str | None
    dry_run: bool
    entries: int | None
    """Stored entries that it concerns, as far as they were counted; None: not counted."""
    complete: bool
    """All keys of the server were looked at, so ``entries`` is all of them."""
    looked_at: int
    confirmed: bool | None
    """Everything that it concerns is invalid everywhere. False: it is being retried (``Cache.invalidate_tenant_cache``)."""


class Admin:
    """Looks at and steers one cache. ``trail`` None: a ``LogTrail``; ``settings``: the application's, for ``configuration``."""

    def __init__(
        self, cache: "Cache", board: Any = None, trail: Trail | None = None, *, settings: Sequence[Setting] = ()
    ) -> None:
        self._cache = cache
        self._board = board
        self._trail: Trail = LogTrail() if trail is None else trail
        self._settings = tuple(settings)

    # -- figures -------------------------------------------------------------------------------------------------------

    async def overview(self, access: Access) -> Overview:
        """Return the state at a glance: of one tenant, or of all."""
        cache, tenant = self._cache, access.within(None)
        total, times = Totals(), Times() if tenant is None else None
        for figures in cache.figures.figures(tenant):
            total.add(figures)
        if times is not None:
            for route in cache.figures.routes():
                times.add(cache.figures.times(route))
        pending = [one for one in cache.pending_tenants if tenant in (None, one)]
        return Overview(
            at=datetime.now(UTC),
            figures_of="this process",
            available=cache.store is not None and cache.store.available,
            switches=await self.switches(access),
            totals=_row("total", total, times=times),
            hit_times=None if times is None else times.hits,
            miss_times=None if times is None else times.misses,
            pending_tenants=pending,
            audit=None if cache.audit is None else cache.audit.to_dict(tenant),
            fence=None if cache.rounds is None else cache.rounds.to_dict(),
        )

    async def tenants(self, access: Access, *, limit: int = 100) -> list[Row]:
        """Return the tenants with the most requests: of a tenant's admin, the own one."""
        return [await self.tenant(access, name) for name in self._tenants(access)][: _bounded(limit)]

    async def tenant(self, access: Access, tenant: str) -> Row:
        """Return the figures of a tenant."""
        name = access.within(tenant)
        assert name is not None
        if name != access.tenant and name not in self._cache.figures.tenants():
            raise NotFound(f"no tenant {name!r}")
        total = Totals()
        for figures in self._cache.figures.figures(name):
            total.add(figures)
        return _row(name, total)

    async def modules(self, access: Access, *, tenant: str | None = None) -> list[Row]:
        """Return the modules: of one tenant, or of all."""
        one, stats = access.within(tenant), self._cache.figures
        times: dict[str, Times] = {}
        if one is None:
            for route, (module, _) in stats.routes().items():
                times.setdefault(module, Times()).add(stats.times(route))
        return [_row(name, figures, times=times.get(name)) for name, figures in sorted(stats.modules(one).items())]

    async def routes(self, access: Access, *, tenant: str | None = None) -> list[Row]:
        """Return the routes: of one tenant, or of all."""
        one, stats = access.within(tenant), self._cache.figures
        return [
            _row(name, figures, module=module, times=stats.times(name) if one is None else None)
            for name, (module, figures) in sorted(stats.routes(one).items())
        ]

    # -- what is stored ------------------------------------------------------------------------------------------------

    async def keys(
        self, access: Access, *, tenant: str | None = None, module: str | None = None, cursor: str = "", limit: int = 100
    ) -> KeyPage:
        """Search the stored answers of a tenant. Looks at a bounded number of keys; the answer says of how many."""
        raise InvalidOperation("the search of keys is not built yet")

    async def sample(self, access: Access, *, tenant: str | None = None, module: str | None = None) -> Sample:
        """Look at a bounded number of keys: the largest, the costliest, when they end."""
        raise InvalidOperation("the sample of keys is not built yet")

    async def inspect(self, access: Access, key: str) -> Inspection:
        """Look at one stored answer, without its body."""
        raise InvalidOperation("the inspection of keys is not built yet")

    async def reveal(self, access: Access, key: str) -> Body:
        """Return the body of a stored answer. An act: it is trailed. Raises ``NotTrailed``."""
        raise InvalidOperation("revealing bodies is not built yet")

    async def explain(
        self,
        access: Access,
        *,
        method: str = "GET",
        path: str,
        query: str = "",
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    ) -> Explanation:
        """Say what would become of a request now, in this process, and why. Changes nothing. ``path`` may carry the query."""
        raise InvalidOperation("explain is not built yet")

    # -- what happens --------------------------------------------------------------------------------------------------

    async def feed(self, access: Access, *, after: str = "", tenant: str | None = None, limit: int = 100) -> Feed:
        """Return what was invalidated after an event (``""``: the last ones), at most ``limit``. Returns at once."""
        access.within(tenant)
        return Feed(events=[], last=after, processes="this")

    async def trail(self, access: Access, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> list[Act]:
        """Return acts, the newest first; of a tenant's admin, those that concern the tenant. Raises ``NotTrailed``."""
        return await self._trail.latest(tenant=access.within(tenant), limit=_bounded(limit), before=before)

    # -- acts ----------------------------------------------------------------------------------------------------------

    async def purge(
        self,
        access: Access,
        *,
        tenant: str | None = None,
        module: str | None = None,
        key: str | None = None,
        dry_run: bool = False,
    ) -> Purge:
        """Invalidate all of a tenant, one module of it, or delete one key. A dry run only counts.

        Of tenant and module it is one write, whatever the number of entries. Raises ``NotTrailed``.
        """
        if not dry_run:
            access.demand_operator("a purge")
        owner = self._owner(access, tenant, key)
        if module is not None:
            self._known_module(module)
        if key is not None:
            raise InvalidOperation("the purge of a key is not built yet")
        confirmed: bool | None = None
        if not dry_run:
            await self._write_down(access, "purge", owner, module=module, key=key)
            if module is None:
                confirmed = await self._cache.invalidate_all_tenant(owner)
            else:
                confirmed = await self._cache.invalidate_tenant_cache(owner, module)
        return Purge(
            tenant=owner, module=module, key=key, dry_run=dry_run, entries=None, complete=False, looked_at=0, confirmed=confirmed
        )

    async def switch(self, access: Access, *, off: bool, tenant: str | None = None, module: str | None = None) -> Switches:
        """Stop or resume serving: of a tenant, of a module (of all tenants), or of everything, in every process within a second.

        A tenant's admin switches the own tenant only. Invalidations are sent all the while. Raises ``NotTrailed``.
        """
        access.demand_operator("a switch")
        if tenant is not None and module is not None:
            raise InvalidOperation("name a tenant or a module, not both: a switch is of one of them")
        if tenant is None:
            access.demand_everything("a switch of a module, or of everything,")
        owner = None if tenant is None else self._owner(access, tenant, None)
        if module is not None:
            self._known_module(module)
        switches = self._cache.switches
        if off and switches is not None and len(switches.off) >= MAX_SWITCHES:
            raise InvalidOperation(f"{MAX_SWITCHES} switches are off: turn one on first, or everything off")
        await self._write_down(access, "switch", owner, off=off, module=module)
        turn = self._cache.disable if off else self._cache.enable
        told = await turn(tenant_id=owner, module=module)
        return msgspec.structs.replace(await self.switches(access), told=told)

    async def switches(self, access: Access) -> Switches:
        """Return what is switched off."""
        enabled, switches = self._cache.enabled, self._cache.switches
        if switches is None:
            return Switches(enabled=enabled, everything=False, tenants=[], modules=[])
        tenants = [tenant for tenant in sorted(switches.tenants) if access.tenant in (None, tenant)]
        return Switches(enabled=enabled, everything=switches.everything, tenants=tenants, modules=sorted(switches.modules))

    async def configuration(self, access: Access) -> list[Setting]:
        """Return the values that are in force, and where each comes from. For those who reach all tenants."""
        access.demand_everything("the configuration")
        return list(self._settings)

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _tenants(self, access: Access) -> list[str]:
        if access.tenant is not None:
            return [access.tenant]
        modules = self._cache.figures.modules
        names = [name for name in self._cache.figures.tenants() if name != OTHER]
        return sorted(names, key=lambda name: -sum(one.hits + one.misses for one in modules(name).values()))

    def _owner(self, access: Access, tenant: str | None, key: str | None) -> str:
        owner = access.within(tenant)
        if owner is None:
            raise InvalidOperation("name a tenant")
        return owner

    def _known_module(self, module: str) -> None:
        if module not in self._cache.modules and module not in self._cache.figures.modules():
            raise NotFound(f"no module {module!r}; known are {', '.join(sorted(self._cache.modules)) or 'none'}")

    async def _write_down(self, access: Access, act: str, tenant: str | None, **details: Any) -> None:
        given = {name: value for name, value in details.items() if value is not None}
        await self._trail.append(Act(act=act, name=access.name, role=access.role, tenant=tenant, details=given))


def _bounded(limit: int) -> int:
    if not 1 <= limit <= MAX_ROWS:
        raise InvalidOperation(f"limit {limit!r} must be from 1 to {MAX_ROWS}")
    return limit


def _row(name: str, figures: Totals, *, module: str | None = None, times: Times | None = None) -> Row:
    said = figures.to_dict()
    if times is not None:
        said |= {
            "hit_p50_s": times.hits.quantile(0.5),
            "hit_p95_s": times.hits.quantile(0.95),
            "miss_p50_s": times.misses.quantile(0.5),
            "miss_p95_s": times.misses.quantile(0.95),
            "fill_s": times.fill_s,
            "saved_s": times.saved_s,
        }
    return Row(name=name, module=module, requests=figures.requests, **said)
