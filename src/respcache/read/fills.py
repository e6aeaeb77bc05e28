"""How a miss is filled once: a flight in the process, a lock across processes, then the handler.

``begin_or_join`` assigns a caller one of three roles. It is served by another caller's fill (an
``Entry``), it fills (a ``Fill``, which it must complete in any case), or it is alone (``None``):
the fill that it waited for had nothing to share, so it runs its own handler and shares nothing. If
a handler fails, the handlers of all callers therefore run side by side, not one after another.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from respcache.core import encoding
from respcache.core import entry as entries
from respcache.core.encoding import ContentCoding
from respcache.core.entry import Entry
from respcache.core.generations import Certificate, GenerationView, Verdict
from respcache.core.keys import CacheKey
from respcache.read.fill_locks import FillLocks
from respcache.read.flights import Flight, Flights
from respcache.read.memory import MemoryEntry, NearCache
from respcache.stores.base import Store


class Fill:
    """The right and the duty to fill one key. Only the first ``complete`` has an effect."""

    __slots__ = ("_completed", "_finish", "certificate")

    def __init__(self, certificate: Certificate, finish: Callable[[Entry | None], None]) -> None:
        self.certificate = certificate
        self._finish = finish
        self._completed = False

    def complete(self, entry: Entry | None) -> None:
        """Store and share the entry; None tells waiting callers that there is none. No waiting."""
        if not self._completed:
            self._completed = True
            self._finish(entry)


class Filler:
    """Decides which caller fills a key."""

    def __init__(self, store: Store, near: NearCache, *, generation_ttl_ms: int) -> None:
        self._store = store
        self._near = near
        self._generation_ttl_ms = generation_ttl_ms
        self._flights: Flights[Entry] = Flights()
        self._locks = FillLocks(store)

    @property
    def flights(self) -> int:
        """The number of fills in progress in this process."""
        return len(self._flights)

    async def begin_or_join(
        self, cache_key: CacheKey, *, view: GenerationView, certificate: Certificate
    ) -> Entry | Fill | None:
        """Join the key's fill or begin one.

        ``certificate`` was captured from ``view``, before any handler ran. Joining a fill of this
        process costs no round trip, beginning one costs one.
        """
        flight = self._flights.join(cache_key.entry_key, view=view, tags=cache_key.tags)
        if flight is not None:
            entry = await flight.wait()
            if entry is None or view.judge(entry.certificate, cache_key.tags) is not Verdict.VALID:
                return None
            return entry
        flight = self._flights.begin(cache_key.entry_key, certificate)
        try:
            token = await self._locks.acquire(cache_key, certificate, view=view)
        except BaseException:
            flight.complete(None)
            raise
        if isinstance(token, Entry):
            flight.complete(token)
            return token
        return Fill(certificate, self._finish(cache_key, flight, token))

    def _finish(
        self, cache_key: CacheKey, flight: Flight[Entry], token: str
    ) -> Callable[[Entry | None], None]:
        started = asyncio.get_running_loop().time()

        def finish(entry: Entry | None) -> None:
            loop = asyncio.get_running_loop()
            self._locks.learn(cache_key.route, loop.time() - started)
            flight.complete(entry)
            if entry is None:
                self._locks.release(cache_key, token)
            else:
                kept = self._near.keep(cache_key, entry, remaining_ms=entry.ttl_ms)
                # the response leaves first: compressing and storing it can wait
                loop.call_soon(self._put, cache_key, kept, token)

        return finish

    def _put(self, cache_key: CacheKey, memory_entry: MemoryEntry, token: str) -> None:
        """Compress and store an entry, then release the lock."""
        entry = memory_entry.entry
        compressed = encoding.compress(entry.body) if entry.negotiable else None
        if compressed is not None:
            self._near.add_compressed(cache_key, memory_entry, compressed)
            entry = replace(entry, body=compressed, coding=ContentCoding.zstd)
        self._store.put(
            cache_key.entry_key,
            entries.encode(entry),
            ttl_ms=entry.ttl_ms,
            generation=cache_key.generation_key,
            generation_ttl_ms=self._generation_ttl_ms,
        )
        self._locks.release(cache_key, token)
