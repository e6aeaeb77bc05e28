"""Sends the bumps of committed writes, reports their outcome, and repeats those that failed.

Each bump runs in a task of its own: a request that is cancelled after its COMMIT does not cancel
the bump.

With an outbox (``OutboxRelay``), an unconfirmed bump need not be remembered: its rows are in the
database, and nothing is served from the cache before a relay cycle has found them. The response to
the write waits for that, or until no serving lease is alive. There is one exception: an
invalidation by hand that could not leave its rows because the database is unavailable, and was not
confirmed by the server that the serving lease names. No other process knows of it.

For that case, and without an outbox, a tenant whose bump was not confirmed is *blocked*: this
process neither serves nor stores responses of that tenant until the floor of its generation has
been raised (with an outbox: until a row demands that). It retries until it succeeds. Other
processes may serve that tenant's old entries until then.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any

from respcache.core.errors import InvalidationPending, OutboxError, StoreError
from respcache.core.generations import FLOOR, collapse
from respcache.core.keys import EVERYBODY
from respcache.core.serving_lease import Ack, DueBump, Outcome, by_tenant, too_many
from respcache.core.tokens import ConsistencyToken, both
from respcache.stores.base import Bumped, Store
from respcache.telemetry.stats import Counters
from respcache.telemetry.tracing import Tracing
from respcache.writes.bumps import BumpSender
from respcache.writes.relay import OnInvalidated, OutboxRelay, Rows

log = logging.getLogger("respcache")

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0

Changes = Mapping[str, Collection[str]]
"""Tags by tenant."""


class Invalidator:
    """Bumps generations after commits. One per cache, bound to the event loop in which ``start``
    was called."""

    def __init__(
        self,
        store: Store,
        *,
        generation_ttl_ms: int,
        stats: Counters,
        relay: OutboxRelay | None = None,
    ) -> None:
        self._store = store
        self._bumps = (
            BumpSender(store, generation_ttl_ms=generation_ttl_ms) if relay is None else relay.bumps
        )
        self._stats = stats
        self._relay = relay
        self.tracing = Tracing()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Future[Ack]] = set()
        self._lock = threading.Lock()
        self._in_flight = 0
        # tenant -> number of failures; bounded by the tenants that wrote during an outage
        self._blocked: dict[str, int] = {}
        self.blocked_tenants: Collection[str] = self._blocked
        """The tenants whose last invalidation is not confirmed; a live view."""
        self._retrying: asyncio.Task[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self.on_invalidated: OnInvalidated | None = None
        """Called with the outcome of each invalidation."""

    def is_blocked(self, tenant: str) -> bool:
        """Return whether this process must not use the cache for the tenant."""
        return tenant in self._blocked

    def start(self) -> None:
        """Bind to the running event loop, and retry the bumps that came before this call."""
        self._loop = asyncio.get_running_loop()
        if self._blocked:
            self._retry()

    def bump(self, changes: Changes) -> asyncio.Future[Ack] | None:
        """Begin to bump, from any thread; return the future of the outcome, to be awaited in the
        cache's loop. One round trip for all tenants.

        With an outbox, rows are inserted there first. Returns None without a running cache: the
        tenants then stay blocked until there is one.
        """
        tags = {tenant: collapse(names) for tenant, names in changes.items() if names}
        if not self._started():
            with self._lock:
                for tenant in tags:
                    self._blocked[tenant] = self._blocked.get(tenant, 0) + 1
            return None
        if self._relay is None:
            return self._begin(
                lambda: self._reporting(_without_ids(tags), self._send(tags)), tenants=len(tags)
            )
        relay = self._relay
        return self._begin(lambda: self._note(relay, tags), tenants=len(tags))

    def committed(self, rows: Rows | None) -> asyncio.Future[Ack] | None:
        """Begin to bump what a transaction left in the outbox. Call it, from any thread, after
        COMMIT has returned.

        ``rows`` is None if they are unknown (COMMIT raised, or AUTOCOMMIT): a relay cycle has to
        find them. Returns None without a running cache: the rows are in the outbox.
        """
        relay = self._relay
        assert relay is not None
        since = relay.clock()
        if not self._started():
            return None
        tenants = None if rows is None else len({tenant for tenant, _, _ in rows})
        return self._begin(
            lambda: self._reporting(rows or (), self._apply(relay, rows, since)), tenants=tenants
        )

    async def settled(self, *, timeout_s: float) -> None:
        """Return when every write so far may be acknowledged. Raises ``InvalidationPending`` after
        ``timeout_s``."""
        if self._in_flight == 0 and not self._blocked:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            raise InvalidationPending(
                f"not confirmed after {timeout_s} s for {len(self._blocked)} tenant(s)"
            ) from None

    async def close(self, *, timeout_s: float = 1.0) -> None:
        """Wait for open invalidations for at most ``timeout_s``, log what is still unconfirmed,
        and stop."""
        try:
            if self._loop is not None:
                await self.settled(timeout_s=timeout_s)
        except InvalidationPending as error:
            if self._blocked:
                log.error(
                    "closing with unconfirmed invalidations (%s): other processes may serve old "
                    "data until it expires",
                    error,
                )
        tasks: list[asyncio.Future[Any]] = [
            *self._tasks,
            *([self._retrying] if self._retrying else []),
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop = None

    # -- tasks -------------------------------------------------------------------------------------

    def _started(self) -> bool:
        return self._loop is not None and not self._loop.is_closed()

    def _begin(
        self, send: Callable[[], Awaitable[Ack]], *, tenants: int | None
    ) -> asyncio.Future[Ack]:
        loop = self._loop
        assert loop is not None
        with self._lock:
            self._in_flight += 1
        counted = self._counted(send, tenants)
        if _running_loop() is loop:
            task: asyncio.Future[Ack] = asyncio.ensure_future(counted)
        else:
            task = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(counted, loop), loop=loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reporting(self, rows: Rows, sending: Awaitable[Ack]) -> Ack:
        """Report the outcome of an invalidation and its duration to ``on_invalidated``."""
        began = time.monotonic()
        ack = await sending
        if self.on_invalidated is not None and rows:
            try:
                self.on_invalidated(rows, ack.outcome, time.monotonic() - began)
            except Exception:
                log.exception("an invalidation could not be reported")
        return ack

    async def _counted(self, send: Callable[[], Awaitable[Ack]], tenants: int | None) -> Ack:
        try:
            with self.tracing.invalidation(tenants=tenants, cause="write") as trace:
                ack = await send()
                trace(ack.outcome)
            return ack
        finally:
            with self._lock:
                self._in_flight -= 1
            self._release_waiters()

    # -- with an outbox ----------------------------------------------------------------------------

    async def _note(self, relay: OutboxRelay, tags: Mapping[str, tuple[str, ...]]) -> Ack:
        """Insert rows for bumps that no transaction left rows for, so that they are as durable as
        others; then apply them."""
        since = relay.clock()
        try:
            rows = await relay.outbox.note(
                [(tenant, tag) for tenant, names in tags.items() for tag in names]
            )
        except OutboxError as error:
            log.warning("an invalidation cannot be written to the outbox (%s)", error)
            return await self._reporting(
                _without_ids(tags), self._bump_without_rows(relay, tags, since)
            )
        return await self._reporting(rows, self._apply(relay, rows, relay.clock()))

    async def _bump_without_rows(
        self, relay: OutboxRelay, tags: Mapping[str, tuple[str, ...]], since: float
    ) -> Ack:
        """Bump what no relay cycle will ever find. Only the server that serving leases name can
        confirm it."""
        bumped = await self._bump_all({tenant: DueBump(names) for tenant, names in tags.items()})
        if not self._vouched(relay, bumped):
            await relay.safe(since)  # meanwhile a cycle may learn which server it is
            if not self._vouched(relay, bumped):
                self._block(tags)
                return Ack(Outcome.PENDING)
        return Ack(Outcome.CONFIRMED, _token(bumped))

    async def _apply(self, relay: OutboxRelay, rows: Rows | None, since: float) -> Ack:
        """Bump, and return when the write may be acknowledged. ``since`` is a moment after its
        COMMIT."""
        if (
            rows is not None
            and not too_many(rows)
            and not any(tenant == EVERYBODY for tenant, _, _ in rows)
        ):
            bumped = await self._bump_all(by_tenant(rows))
            servers = {None if one is None else one.server for one in bumped.values()}
            if len(servers) == 1 and (server := servers.pop()) is not None:
                relay.applied(rows, server)
            if self._vouched(relay, bumped):
                return Ack(Outcome.CONFIRMED, _token(bumped))
            self._stats.unconfirmed_invalidations += list(bumped.values()).count(None)
        self._stats.acknowledgements_delayed += 1
        return Ack(await relay.safe(since))

    def _vouched(self, relay: OutboxRelay, bumped: Mapping[str, Bumped | None]) -> bool:
        """Return whether the server that our serving lease names confirmed all of these bumps,
        while that lease is alive."""
        lease, now = relay.lease, relay.clock()
        return all(one is not None and lease.allows(one.server, now) for one in bumped.values())

    # -- without one -------------------------------------------------------------------------------

    async def _send(self, tags: Mapping[str, tuple[str, ...]]) -> Ack:
        failed: Iterable[str] = tags
        try:
            bumped = await self._bump_all(
                {tenant: DueBump(names) for tenant, names in tags.items()}
            )
            failed = [tenant for tenant, one in bumped.items() if one is None]
        finally:
            if failed:
                self._block(failed)
        return Ack(Outcome.PENDING) if failed else Ack(Outcome.CONFIRMED, _token(bumped))

    async def _bump_all(self, due: Mapping[str, DueBump]) -> dict[str, Bumped | None]:
        """Bump; return the result for each tenant, or None where it is not confirmed."""
        found: dict[str, Bumped | None] = {}
        for tenant, one in (await self._bumps.send(due)).items():
            if isinstance(one, StoreError):
                if self._relay is None and tenant not in self._blocked:
                    log.warning(
                        "invalidation of tenant %s is not confirmed (%s); its requests bypass the "
                        "cache until it is",
                        tenant,
                        one,
                    )
                found[tenant] = None
            else:
                found[tenant] = one
        return found

    def _block(self, tenants: Iterable[str]) -> None:
        """Block these tenants, and begin to retry."""
        for tenant in tenants:
            self._blocked[tenant] = self._blocked.get(tenant, 0) + 1
            self._stats.unconfirmed_invalidations += 1
        self._retry()

    async def _demand_floor(self, tenant: str) -> bool:
        """Invalidate everything of a tenant for all processes; return whether that succeeded."""
        if self._relay is None:
            return (await self._bump_all({tenant: DueBump((FLOOR,))}))[tenant] is not None
        try:
            rows = await self._relay.outbox.note([(tenant, FLOOR)])
        except OutboxError:
            return False
        await self._apply(self._relay, rows, self._relay.clock())
        return True

    def _retry(self) -> None:
        if self._loop is not None and (self._retrying is None or self._retrying.done()):
            self._retrying = asyncio.ensure_future(self._retry_until_confirmed())

    async def _retry_until_confirmed(self) -> None:
        delay = RETRY_FIRST_S
        while self._blocked:
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, RETRY_MOST_S)
            for tenant, failures in tuple(self._blocked.items()):
                if self._relay is None and not self._store.available:
                    break
                if not await self._demand_floor(tenant):
                    continue  # one key that the server refuses must not delay the other tenants
                delay = RETRY_FIRST_S
                # another write may have failed during this bump
                if self._blocked.get(tenant) == failures:
                    del self._blocked[tenant]
                    log.info("invalidation of tenant %s is confirmed", tenant)
        self._release_waiters()

    def _release_waiters(self) -> None:
        if self._in_flight == 0 and not self._blocked:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()


def _token(bumped: Mapping[str, Bumped | None]) -> ConsistencyToken | None:
    """Return what a generation view must have reached to include all of these bumps."""
    token: ConsistencyToken | None = None
    for one in bumped.values():
        token = both(token, () if one is None or one.reached is None else (one.reached,))
    return token


def _without_ids(tags: Mapping[str, Iterable[str]]) -> Rows:
    return [(tenant, tag, "") for tenant, names in tags.items() for tag in names]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
