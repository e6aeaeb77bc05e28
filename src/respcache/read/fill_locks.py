"""One fill per key across processes: the holder of the key's lock fills, the others wait.

The lock carries its holder's certificate, and the same rule as for flights decides which callers
may wait for it. The wait is capped by the usual duration of fills of this route, so callers of a
process that died are served soon. A lock only saves work and protects nothing: losing one costs a
second fill, never a stale read.
"""

import asyncio
import secrets

from respcache.core import entry as entries
from respcache.core.entry import Entry
from respcache.core.errors import StoreError
from respcache.core.generations import Certificate, GenerationView, Verdict
from respcache.core.keys import CacheKey
from respcache.stores.base import FillLock, Store

LOCK_MS = 10_000
FIRST_POLL_S = 0.004
MOST_POLL_S = 0.05
LEAST_WAIT_S = 0.1
UNKNOWN_FILL_S = 0.5
PATIENCE = 4.0
"""A caller waits this many usual fill durations for another process, then fills the key itself."""


class FillLocks:
    """Acquires locks, or waits for the entries of their holders. Bound to one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._usual_s: dict[str, float] = {}

    def learn(self, route: str, seconds: float) -> None:
        """Update the moving average of this route's fill durations."""
        known = self._usual_s.get(route)
        self._usual_s[route] = seconds if known is None else known * 0.8 + seconds * 0.2

    async def acquire(
        self, cache_key: CacheKey, certificate: Certificate, *, view: GenerationView
    ) -> str | Entry:
        """Return a lock token if this process must fill, or the entry that another process stored.

        One round trip if the lock is free. If the store is unavailable the caller fills, and the
        token has no effect.
        """
        own = FillLock(secrets.token_hex(8), certificate)
        try:
            return await self._acquire(cache_key, own, view)
        except StoreError:
            return own.token

    def release(self, cache_key: CacheKey, token: str) -> None:
        """Release the lock, after the entry was put."""
        self._store.release(cache_key.lock_key, token)

    async def _acquire(
        self, cache_key: CacheKey, own: FillLock, view: GenerationView
    ) -> str | Entry:
        current = await self._take(cache_key, own)
        if current.token == own.token:
            return own.token
        loop = asyncio.get_running_loop()
        usual = self._usual_s.get(cache_key.route, UNKNOWN_FILL_S)
        deadline = loop.time() + min(max(PATIENCE * usual, LEAST_WAIT_S), LOCK_MS / 1000)
        delay = FIRST_POLL_S
        while (
            loop.time() < deadline
            and view.judge(current.certificate, cache_key.tags) is Verdict.VALID
        ):
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, MOST_POLL_S)
            current = await self._take(cache_key, own)
            # after the lock: its holder puts the entry before it releases the lock
            found = await self._filled(cache_key, view)
            if found is not None:
                if current.token == own.token:
                    self.release(cache_key, own.token)
                return found
            if current.token == own.token:
                return own.token
        await self._take(cache_key, own, replacing=current.token)
        return own.token

    async def _take(
        self, cache_key: CacheKey, own: FillLock, *, replacing: str | None = None
    ) -> FillLock:
        return await self._store.lock(cache_key.lock_key, own, ttl_ms=LOCK_MS, replacing=replacing)

    async def _filled(self, cache_key: CacheKey, view: GenerationView) -> Entry | None:
        """Return an entry that is valid in the caller's own view.

        It may have been invalidated since, so frequent writes do not starve waiting callers.
        """
        data = (await self._store.read(cache_key.entry_key, ())).entry
        entry = None if data is None else entries.decode(data)
        if entry is None or entry.digest != cache_key.digest:
            return None
        return entry if view.judge(entry.certificate, cache_key.tags) is Verdict.VALID else None
