"""The cache: the one object that an application holds. This is the public API."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from respcache.context import App, current
from respcache.core import keys
from respcache.core.generations import FLOOR, module_tag
from respcache.core.identity import Resolver
from respcache.core.policy import DEFAULT_BOUND_S, DEFAULT_TTL_S, Level, Policy
from respcache.middleware import CacheMiddleware
from respcache.plugins import InvalidationFeed, Publisher
from respcache.read.memory import DEFAULT_NEAR_BYTES
from respcache.read.verifier import DEFAULT_SHARE, VerifierExchange, check_share
from respcache.routing.registry import Registry
from respcache.routing.table import Route
from respcache.runtime import Options, Runtime
from respcache.stores.base import Store
from respcache.telemetry.findings import Findings
from respcache.telemetry.stats import Counters
from respcache.telemetry.tracing import Tracing
from respcache.writes.hooks import WriteHooks
from respcache.writes.relay import Outbox, Rows, boottime

T = TypeVar("T")


class Cache:
    """A response cache for one application.

    ``store`` None means no cache at all: every request passes through, and nothing is invalidated.
    ``secret`` keys the digests and must be the same in all processes. ``schema_version`` is part of
    every key: change it when the shape of responses changes. ``outbox``
    (``respcache.writes.postgres.PostgresOutbox``) is a table in the application's database that
    makes sure that no invalidation is lost; without one, an invalidation that is not confirmed is
    lost if the writing process ends. ``enabled=False`` serves nothing from the cache, but still
    sends invalidations for the processes that do. ``strict_reads`` makes a read of an undeclared
    table an error, for tests. A share ``verify_share`` of all hits is executed again in the
    background and compared (``respcache.read.verifier``); 0 verifies none. ``near_bytes`` bounds
    the memory for entries in each process; 0 keeps none. ``publisher``
    (``respcache.ops.stats.publisher.StatsPublisher``) publishes this process's statistics and reads
    those of all processes.

    Its parts are attributes. ``runtime`` holds those that need a store, and is None without one. It
    has one public method more than the 15 that we allow: splitting the one object that users hold
    would cost them more than that.
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
        publisher: Publisher | None = None,
        clock: Callable[[], float] = boottime,
    ) -> None:
        if verify_share != 0:
            check_share(verify_share)
        digester = keys.Digester(secret, schema_version=schema_version)
        self.store = store
        self.options = Options(schema_version, enabled, strict_reads, verify_share, near_bytes)
        self.clock = clock
        self.resolver = resolver
        self.counters = Counters()
        self.findings = Findings()
        self.tracing = Tracing()
        self.registry = Registry(resolver)
        self.runtime: Runtime | None = None
        if store is not None:
            self.runtime = Runtime(
                store,
                digester=digester,
                resolver=resolver,
                outbox=outbox,
                options=self.options,
                registry=self.registry,
                counters=self.counters,
                findings=self.findings,
                clock=clock,
            )
        self.writes = (
            WriteHooks(None, self.registry, self.counters)
            if self.runtime is None
            else self.runtime.writes
        )
        self.publisher = publisher
        self.feed: InvalidationFeed | None = None
        self.middleware: CacheMiddleware | None = None
        self._connected = False
        if publisher is not None:
            publisher.attach(self)

    def __repr__(self) -> str:
        return f"Cache(enabled={self.enabled}, store={type(self.store).__name__})"

    # -- lifetime ----------------------------------------------------------------------------------

    def wrap(self, app: App, routes: Sequence[Route] | None = None) -> CacheMiddleware:
        """Return the application behind the cache. Make it the outermost layer.

        The routes of FastAPI and Starlette applications are found at start-up; pass ``routes`` for
        any other application. The cache becomes available as ``app.state.cache``.
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
        """Connect to the store, or begin to try. Does not raise if the store is unavailable.

        Later calls do nothing.
        """
        if self.runtime is None or self._connected:
            return
        self._connected = True
        await self.runtime.connect()
        if self.publisher is not None:
            self.publisher.start()

    async def close(self) -> None:
        """Drain unconfirmed invalidations for a bounded time, then disconnect."""
        if self.runtime is None or not self._connected:
            return
        self._connected = False
        if self.feed is not None:
            await self.feed.close()
        if self.publisher is not None:
            await self.publisher.close()
        await self.runtime.close()
        self.tracing.store(None)

    # -- switches ----------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether this process reads from the cache at all."""
        return self.runtime is not None and self.runtime.guards.enabled

    async def disable(self, *, tenant_id: str | None = None, module: str | None = None) -> bool:
        """Stop serving from the cache: everything, or one tenant, or one module.

        Takes effect here at once and in every process within a second. Invalidations are still
        sent. Return whether the store was reached; if not, it receives the switch as soon as it is
        available. Raises ``ValueError`` for an invalid tenant id or module, and for both at once.
        """
        return await self._switch(tenant_id, module, off=True)

    async def enable(self, *, tenant_id: str | None = None, module: str | None = None) -> bool:
        """Undo one ``disable``. Return whether the store was reached."""
        return await self._switch(tenant_id, module, off=False)

    # -- invalidation ------------------------------------------------------------------------------

    async def invalidate_tenant_cache(self, tenant_id: str, module: str) -> bool:
        """Invalidate everything that is cached for a tenant's module, in all processes.

        One write, whatever the number of keys. Return whether it is confirmed for all processes.
        If not, and there is an outbox, no process serves what it invalidates, unless the database
        was unavailable, too. In that case, and without an outbox, it is retried. Meanwhile this
        process bypasses the tenant, and other processes may serve old data until the retry succeeds
        (if this process ends first: until the entries expire). Raises ``ValueError`` for an invalid
        tenant id or module.
        """
        tags = [module_tag(keys.check_module(module))]
        return await self.writes.bump_now({keys.check_tenant(tenant_id): tags})

    async def invalidate_all_tenant(self, tenant_id: str) -> bool:
        """Invalidate everything that is cached for a tenant. Like ``invalidate_tenant_cache``."""
        return await self.writes.bump_now({keys.check_tenant(tenant_id): [FLOOR]})

    def committed(self, rows: Rows | None) -> None:
        """Report a COMMIT that left these outbox rows (tenant, tag, id), or unknown ones (None).

        Call it with None, from any thread, after the COMMIT of writes that no database hook sees,
        such as COPY below SQLAlchemy. The response of the current request then waits for their
        invalidation. Needs an outbox.
        """
        self.writes.committed(rows)

    async def settled(self, *, timeout_s: float = 5.0) -> None:
        """Wait until every write of this process so far may be acknowledged.

        For scripts, imports, background tasks and websockets. Raises ``InvalidationPending`` after
        ``timeout_s`` seconds.
        """
        if self.runtime is not None:
            await self.runtime.invalidator.settled(timeout_s=timeout_s)

    @property
    def pending_tenants(self) -> tuple[str, ...]:
        """The tenants that this process bypasses until an invalidation is confirmed."""
        return () if self.runtime is None else tuple(self.runtime.invalidator.blocked_tenants)

    def forget(self) -> None:
        """Drop verified credentials, scopes and entries from the memory of this process.

        Costs round trips. For credentials that are revoked by other means than a row of the
        resolver's tables: they are rejected from the next request on, instead of after up to a
        minute.
        """
        if self.runtime is not None:
            self.runtime.forget()

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
        """Return the cached value, or compute it (once for all callers and processes) and cache it.

        The value must survive MessagePack: ``None``, numbers, text, bytes, lists, dicts. ``tables``
        are those that ``make`` reads; the rules are the same as for responses. A value is computed
        but not cached if ``make`` raises (for its caller only), writes or reads an undeclared
        table, and while the store is unavailable. A response that contains a value without
        ``tables`` is cached in the same module only, because the invalidation of the value's module
        does not reach other modules. It takes four positional parameters, because all four are
        needed in every call.
        """
        ttl_s = DEFAULT_TTL_S[kind] if ttl_s is None else ttl_s
        level = Level.of(level, module)
        policy = Policy(module, kind, ttl_s, tables=tuple(tables), level=level, bound_s=bound_s)
        tenant = keys.check_tenant(tenant_id)
        outer = current.get()
        if outer is not None and outer.reads is not None:
            outer.reads.tables.update(tables)
            outer.reads.modules.update(() if tables else (module,))
            # another tenant's generation does not cover a response that contains this value
            outer.reads.undeclared_sql |= outer.reads.tenant != tenant
        if self.runtime is None or not self.enabled or isinstance(outer, VerifierExchange):
            return await make()
        if outer is not None:
            await outer.settle()  # the request must see its own writes
        return await self.runtime.values.get(tenant, policy, key, make=make)

    # -- observation -------------------------------------------------------------------------------

    def stats(self, tenant: str | None = None) -> dict[str, Any]:
        """Return this process's statistics by module and route, of one tenant or of all.

        Durations of routes are included only for all tenants. Costs no round trip.
        """
        runtime, counters = self.runtime, self.counters
        relay = None if runtime is None else runtime.relay
        verifier = None if runtime is None else runtime.verifier
        return {
            "enabled": self.enabled,
            "available": runtime is not None and runtime.store.available,
            **counters.to_dict(tenant),
            "pending_tenants": len(self.pending_tenants),
            "lease": None if relay is None else relay.to_dict(),
            "verifier": None if verifier is None else verifier.to_dict(tenant),
        }

    def trace(self, tracing: Tracing) -> None:
        """Report fills, invalidations and outages of the store to a tracer from here on."""
        self.tracing = tracing
        if self.runtime is not None:
            self.runtime.trace(tracing)

    def report(self, feed: InvalidationFeed) -> None:
        """Report the invalidations of this process to a feed from here on."""
        self.feed = feed
        if self.runtime is not None:
            self.runtime.invalidator.on_invalidated = feed.note
            if self.runtime.relay is not None:
                self.runtime.relay.on_bumped = feed.found

    async def _switch(self, tenant_id: str | None, module: str | None, *, off: bool) -> bool:
        if tenant_id is not None and module is not None:
            raise ValueError("pass tenant_id or module, not both")
        name = keys.EVERYTHING
        if tenant_id is not None:
            name = keys.tenant_switch(keys.check_tenant(tenant_id))
        if module is not None:
            name = keys.module_switch(keys.check_module(module))
        return self.runtime is not None and await self.runtime.switches.set(name, off=off)
