"""The runtime: what a cache with a store consists of. Without a store there is none."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from respcache.core import keys, tokens
from respcache.core.errors import ConfigurationError
from respcache.core.identity import Resolver
from respcache.core.policy import MAX_TTL_S
from respcache.read.fills import Filler
from respcache.read.guards import Guards
from respcache.read.lookup import Lookup
from respcache.read.memory import NearCache
from respcache.read.plans import PlanCache
from respcache.read.proofs import Proofs
from respcache.read.scopes import ScopeCache
from respcache.read.values import Values
from respcache.read.verifier import Verifier
from respcache.read.views import ViewReader
from respcache.routing.registry import RESERVED, Registry
from respcache.routing.table import Route
from respcache.stores.base import Store
from respcache.telemetry.findings import Findings
from respcache.telemetry.stats import Counters
from respcache.telemetry.tracing import Tracing
from respcache.writes.hooks import WriteHooks
from respcache.writes.invalidator import Invalidator
from respcache.writes.relay import Outbox, OutboxRelay
from respcache.writes.switches import Switches

GENERATION_TTL_MS = int((MAX_TTL_S + 3600) * 1000)
"""Longer than the longest entry and its fill. A generation that expires first only costs misses."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a cache, as described at ``Cache``."""

    schema_version: str
    enabled: bool
    strict_reads: bool
    verify_share: float
    near_bytes: int


class Runtime:
    """The parts of a cache that need a store, connected to each other. One per cache.

    It has more than 15 attributes, because each names one part and no part is conditional but
    ``relay`` (without an outbox) and ``verifier`` (without a share).
    """

    def __init__(
        self,
        store: Store,
        *,
        digester: keys.Digester,
        resolver: Resolver,
        outbox: Outbox | None,
        options: Options,
        registry: Registry,
        counters: Counters,
        findings: Findings,
        clock: Callable[[], float],
    ) -> None:
        ttl_ms = GENERATION_TTL_MS
        self.store = store
        self.options = options
        self.registry = registry
        self.findings = findings
        self.clock = clock
        # writes
        self.switches = Switches(store)
        self.relay: OutboxRelay | None = None
        if outbox is not None:
            self.relay = OutboxRelay(store, outbox, generation_ttl_ms=ttl_ms, clock=clock)
        self.invalidator = Invalidator(
            store, generation_ttl_ms=ttl_ms, stats=counters, relay=self.relay
        )
        self.writes = WriteHooks(self.invalidator, registry, counters)
        # reads
        self.near = NearCache(options.near_bytes, clock=clock)
        self.views = ViewReader(store, clock=clock)
        self.scopes = ScopeCache(resolver)
        self.guards = Guards(
            enabled=options.enabled,
            switches=self.switches,
            invalidator=self.invalidator,
            relay=self.relay,
            scopes=self.scopes,
        )
        self.proofs = Proofs(self.near, self.views, self.guards, clock=clock)
        self.lookup = Lookup(
            store,
            digester=digester,
            scopes=self.scopes,
            guards=self.guards,
            near=self.near,
            proofs=self.proofs,
            clock=clock,
            counters=counters,
            generation_ttl_ms=ttl_ms,
        )
        self.filler = Filler(store, self.near, generation_ttl_ms=ttl_ms)
        self.values = Values(self.lookup, self.proofs, self.filler, counters=counters, clock=clock)
        self.verifier: Verifier | None = None
        if options.verify_share != 0:
            self.verifier = Verifier(
                share=options.verify_share,
                resolver=resolver,
                lookup=self.lookup,
                relay=self.relay,
                counters=counters,
                invalidate=lambda tags: self.writes.bump_now(tags, why="verifier"),
                enabled=lambda: self.guards.enabled,
            )
        self._plan_caches: list[PlanCache] = []
        store.listen(self._on_pushed, self.views.expire_all)

    async def connect(self) -> None:
        """Connect to the store, or begin to try. Does not raise if the store is unavailable."""
        self.invalidator.start()
        await self.store.connect()
        if self.relay is not None:
            await self.relay.start()
            self.report_uncovered()
        await self.switches.start()
        if self.verifier is not None:
            self.verifier.start()

    async def close(self) -> None:
        """Drain unconfirmed invalidations for a bounded time, then disconnect."""
        await self.switches.close()
        if self.verifier is not None:
            await self.verifier.close()
        await self.invalidator.close()
        if self.relay is not None:
            await self.relay.close()
        await self.store.close()

    def forget(self) -> None:
        """Drop plans, scopes and entries that this process keeps in memory."""
        for plan_cache in self._plan_caches:
            plan_cache.clear()
        self.scopes.clear()
        self.near.clear()

    def trace(self, tracing: Tracing) -> None:
        """Report fills, invalidations and outages of the store to a tracer."""
        self.invalidator.tracing = self.values.tracing = tracing
        if self.relay is not None:
            self.relay.tracing = tracing
        watch = getattr(self.store, "watch", None)  # a store in memory has no outages
        if watch is not None:
            watch(tracing.store)

    def add_plan_cache(self, routes: Sequence[Route]) -> PlanCache | None:
        """Create the plan cache for these routes if the resolver names the headers that it reads.

        Raises ``ConfigurationError`` for names that cannot be used.
        """
        resolver = self.scopes.resolver
        headers: Collection[str] | None = getattr(resolver, "headers", None)
        if headers is None or not self.options.enabled:
            return None
        name = f"{type(resolver).__name__}.headers"
        if isinstance(headers, str) or not all(isinstance(header, str) for header in headers):
            raise ConfigurationError(f"{name} is {headers!r}: make it a tuple of names")
        if tokens.HEADER.decode() in map(str.lower, headers):
            raise ConfigurationError(f"{name} names {tokens.HEADER.decode()}: {RESERVED}")
        key_headers: set[bytes] = set()
        for route in routes:
            key_headers |= route.key_headers
            if any(parameter.place == "cookie" for parameter in route.parameters):
                key_headers.add(b"cookie")
        claim_headers = (header.lower().encode("latin-1") for header in headers)
        plan_cache = PlanCache(claim_headers, key_headers, clock=self.clock)
        self._plan_caches.append(plan_cache)
        return plan_cache

    def report_uncovered(self) -> None:
        """Warn of tables that cached reads depend on and that leave no rows in the outbox."""
        relay, registry = self.relay, self.registry
        if relay is None or not relay.counters.cycles:
            return
        uncovered = sorted({*registry.tables, *self.scopes.resolver.tables} - relay.tables)
        if uncovered:
            self.findings.warn_once(
                f"not cached: reads of {', '.join(uncovered)}, which no sound triggers watch "
                "(create them with op.watch_table or triggers.create_triggers)"
            )

    def _on_pushed(self, key: str) -> None:
        """Drop what was bumped, or deleted by an operator: a generation or an entry."""
        if keys.read_entry_key(key) is None:
            self.views.expire(key)
        else:
            self.near.discard(key)
