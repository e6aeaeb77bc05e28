"""Sends the bumps of committed writes, says which are confirmed, and never forgets the others.

A bump runs in a task of its own: a request that is cancelled after its COMMIT cannot take it along. A tenant whose bump
was not confirmed is *vetoed*: this process neither serves nor stores anything of that tenant until the floor of its
generation has been raised, which is tried until it succeeds. Other processes may serve that tenant's old entries until
then (docs/decisions/0003 is how that will end).
"""

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Collection, Mapping
from typing import Any

from respcache.core.errors import InvalidationPending, StoreError
from respcache.core.generations import FLOOR, collapse
from respcache.core.keys import generation_key
from respcache.ops.stats import Stats
from respcache.stores.base import Store

log = logging.getLogger("respcache")

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0

Changes = Mapping[str, Collection[str]]
"""Tags by tenant."""


class Invalidator:
    """Bumps generations after commits. One per cache, bound to the event loop in which ``start`` was called."""

    def __init__(self, store: Store, *, generation_ttl_ms: int, stats: Stats) -> None:
        self._store = store
        self._ttl_ms = generation_ttl_ms
        self._stats = stats
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Future[bool]] = set()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._pending: dict[str, int] = {}  # tenant -> how often it failed; bounded by the tenants that wrote in an outage
        self._retrying: asyncio.Task[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def pending(self) -> tuple[str, ...]:
        """The vetoed tenants: their last invalidation is not confirmed yet."""
        return tuple(self._pending)

    def vetoed(self, tenant: str) -> bool:
        """Whether this process must leave the cache alone for the tenant."""
        return tenant in self._pending

    def start(self) -> None:
        """Take the running event loop. Bumps that came earlier are retried from here."""
        self._loop = asyncio.get_running_loop()
        if self._pending:
            self._retry()

    def bump(self, changes: Changes) -> Awaitable[bool] | None:
        """Begin to bump, from any thread; await the result in the cache's loop: whether the store confirmed all of it.

        One round trip, all tenants at once. To be called after COMMIT returned. None without a running cache: the
        tenants then stay vetoed until there is one.
        """
        tags = {tenant: collapse(names) for tenant, names in changes.items() if names}
        loop = self._loop
        if loop is None or loop.is_closed():
            with self._lock:
                for tenant in tags:
                    self._pending[tenant] = self._pending.get(tenant, 0) + 1
            return None
        with self._lock:
            self._in_flight += 1
        if _running_loop() is loop:
            task: asyncio.Future[bool] = asyncio.ensure_future(self._send(tags))
        else:
            task = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._send(tags), loop), loop=loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settled(self, *, timeout_s: float) -> None:
        """Return when every bump so far is confirmed. Raises ``InvalidationPending`` when that takes longer."""
        if self._in_flight == 0 and not self._pending:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            raise InvalidationPending(f"not confirmed after {timeout_s} s for {len(self._pending)} tenant(s)") from None

    async def close(self, *, timeout_s: float = 1.0) -> None:
        """Drain for a bounded time, then stop; what is still unconfirmed is logged."""
        try:
            if self._loop is not None:
                await self.settled(timeout_s=timeout_s)
        except InvalidationPending as error:
            log.error("closing with unconfirmed invalidations (%s): other processes may serve old data until it expires", error)
        tasks: list[asyncio.Future[Any]] = [*self._tasks, *([self._retrying] if self._retrying else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop = None

    async def _send(self, tags: Mapping[str, tuple[str, ...]]) -> bool:
        failed = list(tags)
        try:
            results = await asyncio.gather(*(self._bump_one(tenant, names) for tenant, names in tags.items()))
            failed = [tenant for tenant, confirmed in zip(tags, results, strict=True) if not confirmed]
        finally:
            for tenant in failed:
                self._pending[tenant] = self._pending.get(tenant, 0) + 1
            with self._lock:
                self._in_flight -= 1
            self._stats.unconfirmed_invalidations += len(failed)
            if failed:
                self._retry()
            else:
                self._tell_waiters()
        return not failed

    async def _bump_one(self, tenant: str, tags: tuple[str, ...]) -> bool:
        try:
            await self._store.bump(generation_key(tenant), tags=tags, ttl_ms=self._ttl_ms)
        except StoreError as error:
            if tenant not in self._pending:
                log.warning("invalidation of tenant %s is not confirmed (%s); bypassing it until it is", tenant, error)
            return False
        return True

    def _retry(self) -> None:
        if self._loop is not None and (self._retrying is None or self._retrying.done()):
            self._retrying = asyncio.ensure_future(self._retry_until_confirmed())

    async def _retry_until_confirmed(self) -> None:
        delay = RETRY_FIRST_S
        while self._pending:
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, RETRY_MOST_S)
            for tenant, failures in tuple(self._pending.items()):
                if not self._store.available:
                    break
                if not await self._bump_one(tenant, (FLOOR,)):
                    continue  # one key that the server refuses must not hold up the other tenants
                delay = RETRY_FIRST_S
                if self._pending.get(tenant) == failures:  # another write may have failed while this bump was on its way
                    del self._pending[tenant]
                    log.info("invalidation of tenant %s is confirmed", tenant)
        self._tell_waiters()

    def _tell_waiters(self) -> None:
        if self._in_flight == 0 and not self._pending:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
