"""Cache: the one object that an application holds. It ties the parts together and owns their
lifetime."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from respcache.context import cause, current
from respcache.core import keys, tokens
from respcache.core.entry import Entry
from respcache.core.errors import ConfigurationError
from respcache.core.generations import FLOOR, module_tag, table_tag
from respcache.core.identity import RequestHead, Resolver
from respcache.core.policy import DEFAULT_BOUND_S, DEFAULT_TTL_S, MAX_TTL_S, Level, Policy
from respcache.core.serving_lease import Ack, Outcome
from respcache.core.tokens import ConsistencyToken, both
from respcache.middleware import App, CacheMiddleware
from respcache.read.fills import Fill, Filler
from respcache.read.lookup import Bypass, Lookup, LookupResult, Near
from respcache.read.plans import Plan, PlanCache, ScopedPlan
from respcache.read.s3fifo import S3Fifo
from respcache.read.scopes import ScopeCache
from respcache.read.values import Values
from respcache.read.verifier import DEFAULT_SHARE, Verifier, VerifierExchange, check_share
from respcache.read.views import ViewReader
from respcache.routing.table import Route
from respcache.stores.base import Store
from respcache.telemetry.stats import Counters
from respcache.telemetry.tracing import Tracing
from respcache.writes.invalidator import Invalidator
from respcache.writes.relay import Outbox, OutboxRelay, Rows, boottime
from respcache.writes.switches import Switches

if TYPE_CHECKING:
    from respcache.ops.feed import Reporter
    from respcache.ops.publisher import StatsPublisher

log = logging.getLogger("respcache")

GENERATION_TTL_MS = int((MAX_TTL_S + 3600) * 1000)
"""Longer than the longest entry and its fill: a generation that ends first only makes its tenant
cold."""

DEFAULT_NEAR_BYTES = 64 * 1024 * 1024

OUR_OWN = "no answer may depend on it, as requests are recognised without it; take another name"

T = TypeVar("T")


class TableCheck(Protocol):
    """Raises ``ConfigurationError`` for tables on which a cached read may not depend."""

    def __call__(self, tables: Iterable[str], /, *, by_tenant: bool) -> None: ...


class Cache:
    """A response cache for one application.

    ``store`` None means no cache at all: everything is passed through and no invalidation is sent.
    ``secret`` keys the digests and must be the same in all processes. ``schema_version`` is part of
    every key: change it when the shape of answers changes. ``outbox``
    (``respcache.writes.postgres.PostgresOutbox``) is the table in the application's database that
    makes invalidations impossible to lose; without one, they end with the writing process.
    ``enabled=False`` serves nothing from the cache but still sends invalidations, for the processes
    that do. ``strict_reads`` turns an undeclared table into an error: for tests. ``audit_share`` of
    all hits are made anew in the background and compared (``respcache.read.verifier``), 0: none.
    ``near_bytes`` bounds what each process keeps of its entries in memory, 0: nothing. ``board``
    (``respcache.ops.publisher.Board``) is where its figures are published and those of all processes
    are read.
    """

    def __init__(
        self,
        store: Store | None,
        *,
        secret: bytes,
        resolver: Resolver,
        outbox: Outbox | None = None,
        schema_version: str = "1",
        enabled: bool = True,
        strict_reads: bool = False,
        verify_share: float = DEFAULT_SHARE,
        near_bytes: int = DEFAULT_NEAR_BYTES,
        publisher: "StatsPublisher | None" = None,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self.store = store
        self.clock = clock
        self.resolver = resolver
        self.counters = Counters()
        self.tracing = Tracing()
        self.strict_reads = strict_reads
        self.schema_version = schema_version
        self.near_bytes = near_bytes
        self.verify_share = verify_share
        self.publisher = publisher
        self.modules: set[str] = set()
        self.tables: set[str] = set()
        # of each table: the modules whose answers depend on it
        self._readers: dict[str, set[str]] = {}
        self.configured = enabled
        self._said: set[str] = set()
        self._memos: list[PlanCache] = []
        self._checks: list[TableCheck] = []
        self.middleware: CacheMiddleware | None = None
        self.feed: Reporter | None = None
        self._connected = False
        digester = keys.Digester(secret, schema_version=schema_version)
        self.relay: OutboxRelay | None = None
        self.verifier: Verifier | None = None
        self.near: Near | None = None
        self._identities: ScopeCache | None = None
        self.switches: Switches | None = None
        if publisher is not None:
            publisher.attach(self)
        if verify_share != 0:
            check_share(verify_share)
        if store is not None:
            self.switches = Switches(store)
            if outbox is not None:
                self.relay = OutboxRelay(
                    store, outbox, generation_ttl_ms=GENERATION_TTL_MS, clock=clock
                )
            self._invalidator = Invalidator(
                store, generation_ttl_ms=GENERATION_TTL_MS, stats=self.counters, relay=self.relay
            )
            self.near = S3Fifo(near_bytes) if near_bytes > 0 else None
            self._views = ViewReader(store, clock=clock)
            store.listen(self._heard, self._views.expire_all)
            self._identities = ScopeCache(resolver)
            self._lookup = Lookup(
                store,
                digester=digester,
                identities=self._identities,
                invalidator=self._invalidator,
                switches=self.switches,
                relay=self.relay,
                near=self.near,
                views=self._views,
                clock=clock,
                stats=self.counters,
                ttl_ms=GENERATION_TTL_MS,
            )
            # what the way of a hit calls, without a step in between
            self.still_proven, self.candidate, self.prove = (
                self._lookup.still_proven,
                self._lookup.candidate,
                self._lookup.prove,
            )
            self.wait_for_view = self._lookup.wait_for_view
            self.read_view, self.representation, self.needs_no_view = (
                self._lookup.read_view,
                self._lookup.representation,
                self._lookup.needs_no_view,
            )
            self.require_token = self._lookup.require_token
            self._filler = Filler(store, generation_ttl_ms=GENERATION_TTL_MS, memory=self._lookup)
            self._values = Values(self._lookup, self._filler, stats=self.counters, clock=clock)
            if verify_share != 0:
                self.verifier = Verifier(
                    share=verify_share,
                    resolver=resolver,
                    lookup=self._lookup,
                    relay=self.relay,
                    stats=self.counters,
                    invalidate=lambda tags: self._bump_now(tags, why="verifier"),
                    enabled=lambda: self.enabled,
                )

    def __repr__(self) -> str:
        return f"Cache(enabled={self.enabled}, store={type(self.store).__name__})"

    # -- lifetime ----------------------------------------------------------------------------------

    def wrap(self, app: App, routes: Sequence[Route] | None = None) -> CacheMiddleware:
        """Return the application with the cache around it. Make it the outermost layer.

        The routes of FastAPI and Starlette applications are found at start-up; give ``routes`` for
        any other. The cache becomes reachable as ``app.state.cache``.
        """

        def describe() -> list[Route]:
            if routes is not None:
                return list(routes)
            from respcache.routing.fastapi import describe_routes

            return describe_routes(app, self.resolver)

        state = getattr(app, "state", None)
        if state is not None:
            state.cache = self
        self.middleware = CacheMiddleware(self, app, describe)
        return self.middleware

    async def connect(self) -> None:
        """Connect to the store, or begin to try. Never raises because the store is away. Repeating
        it does nothing."""
        if self.store is None or self.switches is None or self._connected:
            return
        self._connected = True
        self._invalidator.start()
        await self.store.connect()
        if self.relay is not None:
            await self.relay.start()
            self._say_uncovered()
        await self.switches.start()
        if self.verifier is not None:
            self.verifier.start()
        if self.publisher is not None:
            self.publisher.start()

    async def close(self) -> None:
        """Drain unconfirmed invalidations for a bounded time, then disconnect."""
        if self.store is None or self.switches is None or not self._connected:
            return
        self._connected = False
        if self.feed is not None:
            await self.feed.close()
        if self.publisher is not None:
            await self.publisher.close()
        await self.switches.close()
        if self.verifier is not None:
            await self.verifier.close()
        await self._invalidator.close()
        if self.relay is not None:
            await self.relay.close()
        await self.store.close()
        self.tracing.store(None)

    # -- switches ----------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether this process looks into the cache at all."""
        return self.configured and self.switches is not None and not self.switches.everything

    def serves(self, scoped: ScopedPlan) -> bool:
        """Whether this process looks into the cache for this tenant and module."""
        switches = self.switches
        return switches is not None and not (
            switches.off and switches.is_off(scoped.tenant, scoped.policy.module)
        )

    async def disable(self, *, tenant_id: str | None = None, module: str | None = None) -> bool:
        """Stop serving from the cache, here at once and in every process within a second: anything,
        or a tenant or a module.

        Invalidations are still sent. Returns whether the store was reached; if not, it is told as
        soon as it is. Raises ``ValueError`` for a tenant id or a module that cannot be, and for
        both at once.
        """
        return await self._switch(tenant_id, module, off=True)

    async def enable(self, *, tenant_id: str | None = None, module: str | None = None) -> bool:
        """Undo one ``disable``. Returns whether the store was reached."""
        return await self._switch(tenant_id, module, off=False)

    # -- invalidation ------------------------------------------------------------------------------

    async def invalidate_tenant_cache(self, tenant_id: str, module: str) -> bool:
        """Invalidate everything that a tenant's module has cached, everywhere. One write, whatever
        the number of keys.

        Returns whether it holds everywhere. If not: with an outbox, nothing that it invalidates is
        served any more by any process, unless the database could not be reached either. Then, and
        without an outbox, it is retried, this process bypasses the tenant meanwhile, and other
        processes may serve what they had until the retry succeeds (if this process ends first:
        until its time to live). Raises ``ValueError`` for a tenant id or a module that cannot be.
        """
        return await self._bump_now(
            {keys.check_tenant(tenant_id): [module_tag(keys.check_module(module))]}
        )

    async def invalidate_all_tenant(self, tenant_id: str) -> bool:
        """Invalidate everything that a tenant has cached, everywhere. One write. Returns as
        ``invalidate_tenant_cache``."""
        return await self._bump_now({keys.check_tenant(tenant_id): [FLOOR]})

    async def settled(self, *, timeout_s: float = 5.0) -> None:
        """Wait until every invalidation of this process is confirmed: for scripts, imports,
        background tasks, websockets.

        Raises ``InvalidationPending`` after ``timeout_s`` seconds.
        """
        if self.store is not None:
            await self._invalidator.settled(timeout_s=timeout_s)

    @property
    def pending_tenants(self) -> tuple[str, ...]:
        """Tenants that this process bypasses because their last invalidation is not confirmed
        yet."""
        return () if self.store is None else self._invalidator.pending

    def forget(self) -> None:
        """Drop what this process remembers: verified credentials, scopes, entries in memory. Costs
        round trips, never an answer.

        For credentials that are revoked by other means than a row of the resolver's tables; without
        it they are verified again within a minute.
        """
        for plan_cache in self._memos:
            plan_cache.forget()
        if self._identities is not None:
            self._identities.forget()
        if self.near is not None:
            self.near.clear()

    def changed(self, tables: Mapping[str, set[str]]) -> None:
        """Say that a committed transaction changed these tables of these tenants. Called by the
        database hooks, any thread."""
        self._bump(
            {tenant: {table_tag(name) for name in names} for tenant, names in tables.items()}
        )
        self._count_changes(tables)

    def committed(self, rows: Rows | None) -> None:
        """Say that a transaction was committed which left these rows (tenant, tag, id) in the
        outbox, or unknown ones (None).

        Called by the database hooks, any thread; with None also by applications, after the COMMIT
        of what no hook sees (COPY below SQLAlchemy).
        """
        self._await(self._invalidator.committed(rows))
        tables: dict[str, set[str]] = {}
        for tenant, tag, _ in rows or ():
            tables.setdefault(tenant, set()).add(tag.removeprefix(table_tag("")))
        self._count_changes(tables)

    def bump_modules(self, tenant: str, modules: Sequence[str]) -> None:
        """Begin to invalidate modules of a tenant on behalf of the current request, whose answer
        waits for it."""
        self._bump({tenant: {module_tag(module) for module in modules}})
        for module in modules:
            self.counters.at(tenant, module).invalidations += 1

    # -- values ------------------------------------------------------------------------------------

    async def get_or_set(
        self,
        tenant_id: str,
        module: str,
        key: Mapping[str, Any],
        make: Callable[[], Awaitable[T]],
        *,
        tables: Sequence[str] = (),
        kind: str = "detail",
        ttl_s: float | None = None,
        level: Level | str = Level.STRICT,
        bound_s: float = DEFAULT_BOUND_S,
    ) -> T:
        """Return the cached value, or make it (once for all callers and processes) and cache it.

        The value must survive MessagePack: ``None``, numbers, text, bytes, lists, dicts. ``tables``
        are those that ``make`` reads; the same rules hold as for responses. Made but not cached:
        when ``make`` raises (for its caller only), writes, or reads an undeclared table, and
        whenever the store is away. What is made of a value without ``tables`` is cached in the same
        module only: an invalidation of its module would not reach others.
        """
        ttl_s = DEFAULT_TTL_S[kind] if ttl_s is None else ttl_s
        policy = Policy(
            module, kind, ttl_s, tuple(tables), level=Level.of(level, module), bound_s=bound_s
        )
        tenant = keys.check_tenant(tenant_id)
        outer = current.get()
        if outer is not None and outer.reads is not None:
            outer.reads.tables.update(tables)
            outer.reads.modules.update(() if tables else (module,))
            # another tenant's generation does not cover what is made of this
            outer.reads.undeclared_sql |= outer.reads.tenant != tenant
        if self.store is None or not self.enabled or isinstance(outer, VerifierExchange):
            return await make()
        if outer is not None:
            await outer.settle()  # what this request has written itself is seen
        return await self._values.get(tenant, policy, key, make)

    # -- looking at it -----------------------------------------------------------------------------

    def stats(self, tenant: str | None = None) -> dict[str, Any]:
        """Return this process's figures: totals per module and route, of one tenant or of all.
        Costs no round trip.

        Times are said of the routes only where it is all tenants.
        """
        modules, routes = self.counters.modules(tenant), self.counters.routes(tenant)
        return {
            "enabled": self.enabled,
            "available": self.store is not None and self.store.available,
            "modules": {name: counters.to_dict() for name, counters in sorted(modules.items())},
            "routes": {
                name: {
                    "module": module,
                    **counters.to_dict(),
                    **(self.counters.times(name).to_dict() if tenant is None else {}),
                }
                for name, (module, counters) in sorted(routes.items())
            },
            "hits": sum(counters.hits for counters in modules.values()),
            "misses": sum(counters.misses for counters in modules.values()),
            "bypasses": sum(counters.bypassed for counters in modules.values()),
            "stores": sum(counters.stores for counters in modules.values()),
            "stores_refused": sum(counters.refused for counters in modules.values()),
            "invalidations": sum(counters.invalidations for counters in modules.values()),
            "bytes_served": sum(counters.bytes_served for counters in modules.values()),
            "bytes_stored": sum(counters.bytes_stored for counters in modules.values()),
            "stale_served": self.counters.stale_served,
            "errors": self.counters.errors,
            "unconfirmed_invalidations": self.counters.unconfirmed_invalidations,
            "acknowledgements_delayed": self.counters.acknowledgements_delayed,
            "pending_tenants": len(self.pending_tenants),
            "lease": None if self.relay is None else self.relay.to_dict(),
            "verifier": None if self.verifier is None else self.verifier.to_dict(tenant),
        }

    # -- for the parts of the library --------------------------------------------------------------

    def register(self, routes: Sequence[Route]) -> None:
        """Note what the routes cache and have it checked. Called at start-up. Raises
        ``ConfigurationError``."""
        for route in routes:
            if route.policy is not None:
                if tokens.HEADER in route.key_headers:
                    raise ConfigurationError(
                        f"GET {route.template} declares the header {tokens.HEADER.decode()}: "
                        f"{OUR_OWN}"
                    )
                self.modules.add(route.policy.module)
                self.tables.update(route.policy.tables)
                for table in route.policy.tables:
                    self._readers.setdefault(table, set()).add(route.policy.module)
            if route.invalidation is not None:
                self.modules.update(route.invalidation.modules)
        for check in self._checks:
            check(self.tables, by_tenant=True)
            check(self.resolver.tables, by_tenant=False)
        self._say_uncovered()

    def trace(self, tracing: Tracing) -> None:
        """Tell a tracer of fills, invalidations and outages of the store from here on
        (``respcache.integrations.otel``)."""
        self.tracing = tracing
        if self.store is not None:
            self._invalidator.tracing = self._values.tracing = tracing
            if self.relay is not None:
                self.relay.tracing = tracing
            getattr(self.store, "watch", _unwatched)(tracing.store)

    def report(self, feed: "Reporter") -> None:
        """Have what this process invalidates reported."""
        self.feed = feed
        if self.store is not None:
            self._invalidator.told = feed.note
        if self.relay is not None:
            self.relay.told = feed.found

    def readers(self, tables: Iterable[str]) -> set[str]:
        """Return the modules whose answers depend on any of these tables."""
        return set().union(*(self._readers.get(name, ()) for name in tables))

    def add_check(self, check: TableCheck) -> None:
        """Have declared tables checked at start-up, by who knows the database."""
        self._checks.append(check)

    def plan_cache(self, routes: Sequence[Route]) -> PlanCache | None:
        """Make the memo of the plans for these routes, if the resolver says which headers it looks
        at."""
        headers: Collection[str] | None = getattr(self.resolver, "headers", None)
        if headers is None or self.store is None or not self.configured:
            return None
        if isinstance(headers, str) or not all(isinstance(name, str) for name in headers):
            raise ConfigurationError(
                f"{type(self.resolver).__name__}.headers is {headers!r}: make it a tuple of names"
            )
        if tokens.HEADER.decode() in map(str.lower, headers):
            raise ConfigurationError(
                f"{type(self.resolver).__name__}.headers names {tokens.HEADER.decode()}: {OUR_OWN}"
            )
        others: set[bytes] = set()
        for route in routes:
            others |= route.key_headers
            if any(parameter.place == "cookie" for parameter in route.parameters):
                others.add(b"cookie")
        plan_cache = PlanCache(
            (name.lower().encode("latin-1") for name in headers), others, clock=self.clock
        )
        self._memos.append(plan_cache)
        return plan_cache

    async def look(
        self, plan: Plan, head: RequestHead, *, sent: ConsistencyToken | None
    ) -> LookupResult | Bypass:
        """Look for the answer to a request that brings this token, or say why not."""
        if self.store is None:
            return Bypass("no-store")
        if not self.enabled or (
            self.switches is not None and plan.policy.module in self.switches.modules
        ):
            return Bypass("off")
        return await self._lookup.request(plan, head, sent=sent)

    async def enter(self, look: LookupResult) -> Entry | Fill | None:
        """Take part in the fill that follows a miss."""
        return await self._filler.enter(
            look.cache_key, view=look.view, certificate=look.certificate
        )

    def first_time(self, message: str) -> bool:
        """Whether this was not said before by this process."""
        if message in self._said:
            return False
        self._said.add(message)
        return True

    def _heard(self, key: str) -> None:
        """Drop what was bumped, or deleted by hand: the key of a generation, or of an entry."""
        if keys.read_entry_key(key) is None:
            self._views.expire(key)
        elif self.near is not None:
            self.near.discard(key)

    def _bump(self, tags: Mapping[str, set[str]]) -> None:
        if self.store is not None:
            self._await(self._invalidator.bump(tags))

    def _await(self, sent: asyncio.Future[Ack] | None) -> None:
        """Have the answer of the current request wait for this; None: nothing could be sent."""
        exchange = current.get()
        if exchange is not None:
            if sent is None:
                exchange.note(Ack(Outcome.PENDING))
            else:
                exchange.bumps.append(sent)

    async def _bump_now(self, tags: Mapping[str, list[str]], *, why: str | None = None) -> bool:
        if self.store is None:
            return True
        why_token = cause.set(why or cause.get())
        try:
            sent, exchange = self._invalidator.bump(tags), current.get()
        finally:
            cause.reset(why_token)
        ack = Ack(Outcome.PENDING) if sent is None else await asyncio.shield(sent)
        if exchange is not None:  # whether it holds everywhere is for the caller to say
            exchange.token = both(exchange.token, ack.token)
        return ack.outcome is Outcome.CONFIRMED

    def _count_changes(self, tables: Mapping[str, Collection[str]]) -> None:
        for tenant, names in tables.items():
            for module in self.readers(names):
                self.counters.at(tenant, module).invalidations += 1

    def _say_uncovered(self) -> None:
        """Say which tables of cached reads leave no rows in the outbox: what reads them is not
        cached."""
        if self.relay is None or not self.relay.completed:
            return
        missing = sorted({*self.tables, *self.resolver.tables} - self.relay.tables)
        message = (
            f"not cached: reads of {', '.join(missing)}, which no sound triggers watch "
            "(op.watch_table, or triggers.create_triggers, mends it)"
        )
        if missing and self.first_time(message):
            log.warning("%s", message)

    async def _switch(self, tenant_id: str | None, module: str | None, *, off: bool) -> bool:
        if tenant_id is not None and module is not None:
            raise ValueError("a switch is of a tenant or of a module, not of both")
        name = keys.EVERYTHING
        if tenant_id is not None:
            name = keys.tenant_switch(keys.check_tenant(tenant_id))
        if module is not None:
            name = keys.module_switch(keys.check_module(module))
        return self.switches is not None and await self.switches.turn(name, off=off)


def _unwatched(changed: Callable[[Exception | None], None]) -> None:
    """Of a store that is never away."""
