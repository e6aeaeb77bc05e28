"""One fill per key across processes: the process that holds the key's lease fills, the others wait
for its entry.

The lease carries the certificate of its holder, and the same rule as for flights decides who may
wait for it. Waiting is capped by what fills of this route usually take, so that the callers of a
process that died are served soon; a lease only saves work, it protects nothing: losing one costs a
second fill, never a stale read.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from respcache.core import entry as entries
from respcache.core.entry import Entry
from respcache.core.errors import StoreError
from respcache.core.generations import Certificate, GenerationView, Verdict
from respcache.stores.base import FillLock, Store

LOCK_MS = 10_000
FIRST_POLL_S = 0.004
MOST_POLL_S = 0.05
LEAST_WAIT_S = 0.1
UNKNOWN_FILL_S = 0.5
PATIENCE = 4.0
"""How many usual fill times a caller waits for another process before it fills the key itself."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What is to be filled: its keys, the digest that its entry must carry, the tags it depends on,
    and who it is for."""

    entry_key: str
    lock_key: str
    digest: bytes
    tags: Sequence[str]
    generation_key: str
    route: str
    """Fills with the same pace take about equally long: the route's template."""


class FillLocks:
    """Takes leases, or waits for the entries of those who hold them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._usual_s: dict[str, float] = {}

    def learn(self, route: str, seconds: float) -> None:
        """Remember how long a fill took (moving average)."""
        known = self._usual_s.get(route)
        self._usual_s[route] = seconds if known is None else known * 0.8 + seconds * 0.2

    async def acquire(
        self, cache_key: CacheKey, certificate: Certificate, *, view: GenerationView
    ) -> str | Entry:
        """Return a token when this process is to fill, or the entry that another process filled
        meanwhile.

        One round trip when the lease is free. Without a store the caller fills: the token is then
        worth nothing.
        """
        mine = FillLock(secrets.token_hex(8), certificate)
        try:
            return await self._acquire(cache_key, mine, view)
        except StoreError:
            return mine.token

    def release(self, cache_key: CacheKey, token: str) -> None:
        """Give the lease back, after the entry was put."""
        self._store.release(cache_key.lock_key, token)

    async def _acquire(
        self, cache_key: CacheKey, mine: FillLock, view: GenerationView
    ) -> str | Entry:
        held = await self._take(cache_key, mine)
        if held.token == mine.token:
            return mine.token
        loop = asyncio.get_running_loop()
        usual = self._usual_s.get(cache_key.route, UNKNOWN_FILL_S)
        deadline = loop.time() + min(max(PATIENCE * usual, LEAST_WAIT_S), LOCK_MS / 1000)
        delay = FIRST_POLL_S
        while (
            loop.time() < deadline and view.judge(held.certificate, cache_key.tags) is Verdict.VALID
        ):
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, MOST_POLL_S)
            held = await self._take(cache_key, mine)
            # after the lease: its holder puts before it releases
            found = await self._filled(cache_key, view)
            if found is not None:
                if held.token == mine.token:
                    self.release(cache_key, mine.token)
                return found
            if held.token == mine.token:
                return mine.token
        await self._take(cache_key, mine, replacing=held.token)
        return mine.token

    async def _take(
        self, cache_key: CacheKey, mine: FillLock, *, replacing: str | None = None
    ) -> FillLock:
        return await self._store.lock(cache_key.lock_key, mine, ttl_ms=LOCK_MS, replacing=replacing)

    async def _filled(self, cache_key: CacheKey, view: GenerationView) -> Entry | None:
        """Look for an entry that covers the caller's own view, even if it was invalidated since: no
        starvation by writes."""
        data = (await self._store.read(cache_key.entry_key, ())).entry
        entry = None if data is None else entries.decode(data)
        if entry is None or entry.digest != cache_key.digest:
            return None
        return entry if view.judge(entry.certificate, cache_key.tags) is Verdict.VALID else None
