"""How a miss is filled once: first a flight in the process, then a lease across processes, then the
handler.

``enter`` tells a caller which of three it is: served by somebody else's fill (an ``Entry``), the
one who fills (a ``Fill``, which must land, whatever happens), or alone (``None``: the fill it
waited for had nothing to share, so it runs its own handler without sharing; that way a failing
handler runs side by side for all callers instead of one after the other).
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from respcache.core import encoding
from respcache.core import entry as entries
from respcache.core.encoding import ContentCoding
from respcache.core.entry import Entry
from respcache.core.generations import Certificate, GenerationView, Verdict
from respcache.read.fill_locks import CacheKey, FillLocks
from respcache.read.flights import Flight, Flights
from respcache.read.memory import MemoryEntry
from respcache.stores.base import Store


class EntryMemory(Protocol):
    """Where this process keeps entries."""

    def hold(
        self,
        cache_key: CacheKey,
        entry: Entry,
        /,
        *,
        remaining_ms: int,
        proven: GenerationView | None,
    ) -> MemoryEntry:
        """Keep an entry."""
        ...

    def pack(self, cache_key: CacheKey, held: MemoryEntry, body: bytes, /) -> None:
        """Keep its compressed form, too."""
        ...


class Fill:
    """The right and the duty to fill one key. ``land`` it exactly once in effect; landing again
    does nothing."""

    __slots__ = ("_finish", "_landed", "certificate")

    def __init__(self, certificate: Certificate, finish: Callable[[Entry | None], None]) -> None:
        self.certificate = certificate
        self._finish = finish
        self._landed = False

    def complete(self, entry: Entry | None) -> None:
        """Store and share the entry, or with None tell the others that there is none. Does no
        waiting."""
        if not self._landed:
            self._landed = True
            self._finish(entry)


class Filler:
    """Decides who fills."""

    def __init__(self, store: Store, *, generation_ttl_ms: int, memory: EntryMemory) -> None:
        self._store = store
        self._memory = memory
        self._generation_ttl_ms = generation_ttl_ms
        self._flights: Flights[Entry] = Flights()
        self._leases = FillLocks(store)

    async def enter(
        self, cache_key: CacheKey, *, view: GenerationView, certificate: Certificate
    ) -> Entry | Fill | None:
        """Join the fill of the key or become its leader. ``certificate`` was captured from
        ``view``, before any handler.

        Costs nothing but waiting for a joiner in this process, one round trip for a leader.
        """
        flight = self._flights.join(cache_key.entry_key, view=view, tags=cache_key.tags)
        if flight is not None:
            entry = await flight.wait()
            valid = (
                entry is not None and view.judge(entry.certificate, cache_key.tags) is Verdict.VALID
            )
            return entry if valid else None
        flight = self._flights.begin(cache_key.entry_key, certificate)
        try:
            token = await self._leases.acquire(cache_key, certificate, view=view)
        except BaseException:
            flight.complete(None)
            raise
        if isinstance(token, Entry):
            flight.complete(token)
            return token
        return Fill(certificate, self._finish(cache_key, flight, token, view))

    def _finish(
        self, cache_key: CacheKey, flight: Flight[Entry], token: str, view: GenerationView
    ) -> Callable[[Entry | None], None]:
        started = asyncio.get_running_loop().time()

        def finish(entry: Entry | None) -> None:
            loop = asyncio.get_running_loop()
            self._leases.learn(cache_key.route, loop.time() - started)
            flight.complete(entry)
            if entry is None:
                self._leases.release(cache_key, token)
            else:
                held = self._memory.hold(cache_key, entry, remaining_ms=entry.ttl_ms, proven=view)
                loop.call_soon(self._put, cache_key, held, token)  # when the answer is on its way

        return finish

    def _put(self, cache_key: CacheKey, held: MemoryEntry, token: str) -> None:
        """Compress and store an entry, then give the lease back."""
        entry = held.entry
        packed = encoding.compress(entry.body) if entry.negotiable else None
        if packed is not None:
            self._memory.pack(cache_key, held, packed)
            entry = replace(entry, body=packed, coding=ContentCoding.zstd)
        self._store.put(
            cache_key.entry_key,
            entries.encode(entry),
            ttl_ms=entry.ttl_ms,
            generation=cache_key.generation_key,
            generation_ttl_ms=self._generation_ttl_ms,
        )
        self._leases.release(cache_key, token)
