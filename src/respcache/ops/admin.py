"""Everything that operators and tenant admins can see and do, for the dashboard, its API and the
command line.

Every method takes an ``Access`` and enforces it: another tenant's data is ``NotFound``, actions
require the role operator, and data of all tenants requires access to all of them. Every action is
recorded in the audit log before it is done. Methods return structs that serialize to JSON as they
are (``msgspec.json.encode``, ``msgspec.to_builtins``).

Every method may raise ``AccessRefused``, ``NotFound`` and ``InvalidOperation``; those that query
the cache server also raise ``StoreUnavailable``. Docstrings name further exceptions.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, get_args

import msgspec

from respcache.cache import Cache
from respcache.context import cause
from respcache.core.errors import ConfigurationError, InvalidOperation, NotFound, StoreError
from respcache.core.keys import EntryKey, check_module, read_entry_key
from respcache.ops import search
from respcache.ops.access import Access
from respcache.ops.audit_log import AuditEvent, AuditLog, LoggingAuditLog
from respcache.ops.configuration import Setting, settings_of
from respcache.ops.explain import ExplainedRequest, Explanation
from respcache.ops.explainer import explain
from respcache.ops.feed import Feed, Reporter
from respcache.ops.keyspace import Keyspace, MemoryKeys, ServerKeys
from respcache.ops.search import Inspection, KeyPage, KeySample, StoredBody
from respcache.ops.stats.publisher import MAX_MINUTES, Order, StatsPublisher
from respcache.ops.stats.rows import (
    Overview,
    StatsRow,
    SwitchStates,
    module_rows,
    policies_of,
    route_rows,
    stats_row,
)
from respcache.stores.memory import MemoryStore
from respcache.telemetry.stats import OTHER

MAX_ROWS = 1_000
"""Rows that one call returns."""


OTHERS_UNAVAILABLE = "the statistics of other workers are not available at the moment"
MAX_SWITCHES = 1_000
"""Tenants and modules that can be switched off at the same time."""


class Purge(msgspec.Struct, frozen=True, kw_only=True):
    """What a purge did; for a dry run, what it would do."""

    tenant: str
    module: str | None
    key: str | None
    dry_run: bool
    entries: int | None = None
    """For a dry run or a key: the number of stored entries, valid or not, among the scanned keys.
    """
    complete: bool = False
    """Whether all keys of the server were scanned, so that ``entries`` is exact."""
    scanned: int = 0
    confirmed: bool | None = None
    """Whether the entries are invalid in all processes. If False, the purge is being retried
    (``Cache.invalidate_tenant_cache``)."""


class Admin:
    """Inspects and controls one cache.

    ``publisher`` defaults to that of the cache, or to one for the statistics of this process.
    ``audit_log`` defaults to a ``LoggingAuditLog``. ``configuration`` also returns ``settings``,
    which are the application's own. The class has 17 methods, one for each operation of the
    dashboard's API, so that access control stays in one place.
    """

    def __init__(
        self,
        cache: Cache,
        publisher: StatsPublisher | None = None,
        audit_log: AuditLog | None = None,
        *,
        settings: Sequence[Setting] = (),
    ) -> None:
        self._cache = cache
        self._publisher = publisher or _publisher_of(cache)
        self._audit_log: AuditLog = LoggingAuditLog() if audit_log is None else audit_log
        self._settings = tuple(settings)
        self._feed = Reporter(cache, self._publisher)
        cache.report(self._feed)

    # -- statistics --------------------------------------------------------------------------------

    async def overview(self, access: Access, *, minutes: int = 60) -> Overview:
        """Return the state of the cache, for all tenants or for the one within reach.

        The series covers the last ``minutes``.
        """
        if not 1 <= minutes <= MAX_MINUTES:
            raise InvalidOperation(f"minutes {minutes!r} must be from 1 to {MAX_MINUTES}")
        cache, publisher, tenant = self._cache, self._publisher, access.within(None)
        fleet = await publisher.fleet()
        common: dict[str, Any] = {
            "at": datetime.now(UTC),
            "source": "this process" if fleet.alone else "all processes",
            "problem": fleet.problem
            if tenant is None
            else OTHERS_UNAVAILABLE
            if fleet.problem
            else "",
            "tenant": tenant,
            "available": cache.store is not None and cache.store.available,
            "switches": await self.switches(access),
            "findings": [finding for finding in fleet.findings if tenant in (None, finding.tenant)],
            "pending_tenants": [one for one in cache.pending_tenants if tenant in (None, one)],
        }
        if tenant is not None:
            totals = stats_row(tenant, (await publisher.tenant(tenant)).totals)
            hidden: dict[str, Any] = {
                "hit_times": None,
                "miss_times": None,
                "series": [],
                "processes": [],
                "server": None,
            }
            return Overview(totals=totals, **hidden, **common)
        return Overview(
            totals=stats_row("total", fleet.totals, times=fleet.times),
            hit_times=fleet.times.hits,
            miss_times=fleet.times.misses,
            series=(await publisher.series(minutes)).points,
            processes=fleet.processes,
            server=fleet.server,
            **common,
        )

    async def tenants(
        self, access: Access, *, order: Order = "requests", offset: int = 0, limit: int = 100
    ) -> list[StatsRow]:
        """Return tenants, the largest first; for the admin of one tenant, that tenant only.

        Requests without a tenant are not included.
        """
        if access.tenant is not None:
            return [await self.tenant(access, access.tenant)]
        if order not in get_args(Order) or offset < 0:
            raise InvalidOperation(
                f"order {order!r} must be one of {', '.join(get_args(Order))}, and offset "
                f"{offset!r} not below 0"
            )
        found = await self._publisher.tenants(order=order, offset=offset, limit=_bounded(limit))
        return [stats_row(one.tenant, one.totals) for one in found.tenants if one.tenant != OTHER]

    async def tenant(self, access: Access, tenant: str) -> StatsRow:
        """Return the statistics of a tenant."""
        name = access.within(tenant)
        assert name is not None
        found = await self._publisher.tenant(name)
        if name != access.tenant and not found.totals.requests and not found.totals.invalidations:
            raise NotFound(f"no tenant {name!r}")
        return stats_row(name, found.totals)

    async def modules(self, access: Access, *, tenant: str | None = None) -> list[StatsRow]:
        """Return the statistics of the modules, for one tenant or for all."""
        one = access.within(tenant)
        return module_rows(
            (
                await self._publisher.fleet() if one is None else await self._publisher.tenant(one)
            ).modules
        )

    async def routes(self, access: Access, *, tenant: str | None = None) -> list[StatsRow]:
        """Return the statistics of the routes, for one tenant or for all."""
        one, middleware = access.within(tenant), self._cache.middleware
        policies = {} if middleware is None else policies_of(middleware.prepare().routes)
        return route_rows(
            (
                await self._publisher.fleet() if one is None else await self._publisher.tenant(one)
            ).routes,
            policies,
        )

    def module_names(self) -> list[str]:
        """Return the modules that this application caches. They are not confidential."""
        return sorted(self._cache.registry.modules)

    # -- stored responses --------------------------------------------------------------------------

    async def keys(
        self,
        access: Access,
        *,
        tenant: str | None = None,
        module: str | None = None,
        cursor: str = "",
        limit: int = 100,
    ) -> KeyPage:
        """Search stored responses. Scans a bounded number of keys; the page says how many."""
        one = access.within(tenant)
        return await search.find(
            self._space(), tenant=one, module=_module(module), cursor=cursor, limit=_bounded(limit)
        )

    async def sample(
        self, access: Access, *, tenant: str | None = None, module: str | None = None
    ) -> KeySample:
        """Return a sample of stored responses: the largest, the costliest, times to live."""
        return await search.sample(
            self._space(), tenant=access.within(tenant), module=_module(module)
        )

    async def inspect(self, access: Access, key: str) -> Inspection:
        """Return the details of one stored response, without its body."""
        return await search.inspect(self._cache, key, _named(access, key))

    async def reveal(self, access: Access, key: str) -> StoredBody:
        """Return the body of a stored response, and record that. Raises ``AuditLogUnavailable``."""
        access.demand_operator("revealing a body")
        named = _named(access, key)
        body = await search.body_of(self._cache, key, named)
        await self._record(access, "reveal", named.tenant, key=key)
        return body

    async def explain(
        self,
        access: Access,
        *,
        method: str = "GET",
        path: str,
        query: str = "",
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    ) -> Explanation:
        """Return how this process would handle a request now, and why. Changes nothing.

        ``path`` may include the query.
        """
        middleware = self._cache.middleware
        if middleware is None:
            raise InvalidOperation("cache.wrap() was not called in this process")
        given = tuple(headers.items()) if isinstance(headers, Mapping) else tuple(headers)
        return await explain(
            self._cache, middleware, ExplainedRequest(method, path, query, given), access=access
        )

    # -- events ------------------------------------------------------------------------------------

    async def feed(
        self, access: Access, *, after: str = "", tenant: str | None = None, limit: int = 100
    ) -> Feed:
        """Return at most ``limit`` invalidations after an event; without one, the last ones."""
        found = await self._feed.read(
            tenant=access.within(tenant), after=after, limit=_bounded(limit)
        )
        return found if access.tenant is None else found.of_one_tenant()

    async def audit_log(
        self,
        access: Access,
        *,
        tenant: str | None = None,
        limit: int = 100,
        before: int | None = None,
    ) -> list[AuditEvent]:
        """Return actions, the newest first; for the admin of one tenant, those on that tenant.

        Raises ``AuditLogUnavailable``.
        """
        return await self._audit_log.latest(
            tenant=access.within(tenant), limit=_bounded(limit), before=before
        )

    # -- actions -----------------------------------------------------------------------------------

    async def purge(
        self,
        access: Access,
        *,
        tenant: str | None = None,
        module: str | None = None,
        key: str | None = None,
        dry_run: bool = False,
    ) -> Purge:
        """Invalidate a tenant or one module of it, or delete one key. A dry run only counts, and
        viewers may request it.

        Purging a tenant or a module is one write, whatever the number of entries, and affects all
        processes. A key is deleted from the server, and all processes are notified to drop it; one
        that misses the notification may continue to serve its entry, which is not stale.
        Raises ``AuditLogUnavailable``.
        """
        if not dry_run:
            access.demand_operator("a purge")
        owner = self._owner(access, tenant=tenant, module=module, key=key)
        if module is not None:
            self._check_module(module)
        made = Purge(tenant=owner, module=module, key=key, dry_run=dry_run)
        if dry_run:
            return await self._count(made)
        await self._record(access, "purge", owner, module=module, key=key)
        if key is not None:
            try:
                deleted = await self._space().delete(key)
            except StoreError as error:
                await self._record(access, "failed", owner, key=key, problem=type(error).__name__)
                raise
            if self._cache.runtime is not None:
                self._cache.runtime.near.discard(key)
            return msgspec.structs.replace(made, entries=deleted, complete=True, confirmed=True)
        token = cause.set(f"purge by {access.name}")
        try:
            if module is None:
                confirmed = await self._cache.invalidate_all_tenant(owner)
            else:
                confirmed = await self._cache.invalidate_tenant_cache(owner, module)
        finally:
            cause.reset(token)
        return msgspec.structs.replace(made, confirmed=confirmed)

    async def switch(
        self, access: Access, *, off: bool, tenant: str | None = None, module: str | None = None
    ) -> SwitchStates:
        """Stop or resume caching for a tenant, for a module of all tenants, or for everything.

        All processes follow within a second. The admin of one tenant can switch that tenant only.
        Invalidations continue. Raises ``AuditLogUnavailable``.
        """
        access.demand_operator("a switch")
        if tenant is not None and module is not None:
            raise InvalidOperation("name a tenant or a module, not both")
        if tenant is None:
            access.demand_everything("a switch for a module, or for everything,")
        owner = None if tenant is None else access.within(tenant)
        if module is not None:
            self._check_module(module)
        runtime = self._cache.runtime
        switches = None if runtime is None else runtime.switches
        if (
            off
            and (tenant or module)
            and switches is not None
            and len(switches.off) >= MAX_SWITCHES
        ):
            raise InvalidOperation(
                f"{MAX_SWITCHES} tenants and modules are switched off already: switch one of them "
                f"on first, or switch everything off"
            )
        await self._record(access, "switch", owner, off=off, module=module)
        turn = self._cache.disable if off else self._cache.enable
        propagated = await turn(tenant_id=owner, module=module)
        return msgspec.structs.replace(await self.switches(access), propagated=propagated)

    async def switches(self, access: Access) -> SwitchStates:
        """Return what is switched off."""
        enabled, runtime = self._cache.enabled, self._cache.runtime
        switches = None if runtime is None else runtime.switches
        if switches is None:
            return SwitchStates(enabled=enabled, everything=False, tenants=[], modules=[])
        tenants = [tenant for tenant in sorted(switches.tenants) if access.tenant in (None, tenant)]
        return SwitchStates(
            enabled=enabled,
            everything=switches.everything,
            tenants=tenants,
            modules=sorted(switches.modules),
        )

    async def configuration(self, access: Access) -> list[Setting]:
        """Return the effective configuration and its sources. Requires access to all tenants."""
        access.demand_everything("the configuration")
        return [*settings_of(self._cache), *self._settings]

    # -- helpers -----------------------------------------------------------------------------------

    def _owner(
        self, access: Access, *, tenant: str | None, module: str | None, key: str | None
    ) -> str:
        """Return the tenant whose data is purged."""
        if key is not None:
            if module is not None:
                raise InvalidOperation("name a key, or a tenant and a module")
            named = _named(access, key)
            if tenant not in (None, named.tenant):
                raise NotFound(f"no key {key!r} of tenant {tenant!r}")
            return named.tenant
        owner = access.within(tenant)
        if owner is None:
            raise InvalidOperation("name a tenant: all tenants cannot be purged at once")
        return owner

    async def _count(self, purge: Purge) -> Purge:
        """Count the entries that a purge would invalidate."""
        space = self._space()
        if purge.key is not None:
            return msgspec.structs.replace(
                purge, entries=len(await space.stored([purge.key])), complete=True, scanned=1
            )
        found = await search.count(space, tenant=purge.tenant, module=purge.module)
        return msgspec.structs.replace(
            purge, entries=found.entries, complete=found.complete, scanned=found.scanned
        )

    def _space(self) -> Keyspace:
        store = self._cache.store
        return (
            MemoryKeys(store.server)
            if isinstance(store, MemoryStore)
            else ServerKeys(self._publisher)
        )

    def _check_module(self, module: str) -> None:
        if (
            module not in self._cache.registry.modules
            and module not in self._cache.counters.modules()
        ):
            raise NotFound(
                f"no module {module!r}; known are "
                f"{', '.join(sorted(self._cache.registry.modules)) or 'none'}"
            )

    async def _record(
        self, access: Access, action: str, tenant: str | None, **details: Any
    ) -> None:
        given = {name: value for name, value in details.items() if value is not None}
        await self._audit_log.append(
            AuditEvent(
                action=action, name=access.name, role=access.role, tenant=tenant, details=given
            )
        )


def _publisher_of(cache: Cache) -> StatsPublisher:
    """Return the cache's publisher; if it has none, attach one for this process's statistics."""
    if isinstance(cache.publisher, StatsPublisher):
        return cache.publisher
    publisher = cache.publisher = StatsPublisher()
    publisher.attach(cache)
    return publisher


def _named(access: Access, key: str) -> EntryKey:
    """Parse a key. Raises ``NotFound`` unless it is within reach."""
    named = read_entry_key(key)
    if named is None or access.tenant not in (None, named.tenant):
        raise NotFound(f"no key {key[:300]!r}")
    return named


def _module(module: str | None) -> str | None:
    try:
        return None if module is None else check_module(module)
    except ConfigurationError:
        raise NotFound(f"no module {module!r}") from None


def _bounded(limit: int) -> int:
    if not 1 <= limit <= MAX_ROWS:
        raise InvalidOperation(f"limit {limit!r} must be from 1 to {MAX_ROWS}")
    return limit
