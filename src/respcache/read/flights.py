"""One fill per key in this process: callers of the same key wait for the first one's result.

A caller joins only a flight whose certificate is valid in the caller's own view of the generation,
which was read after the caller's request began. Otherwise it starts a newer flight that replaces
the older one. Joining any flight would give a caller that began after an acknowledged write a read
from before that write (the JOINANY mutant of the model).
"""

import asyncio
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from respcache.core.generations import Certificate, GenerationView, Verdict

T = TypeVar("T")


class Flight(Generic[T]):
    """A fill in progress. It completes exactly once, with a result or with None."""

    __slots__ = ("_flights", "_key", "_result", "certificate")

    def __init__(self, flights: "Flights[T]", key: Hashable, certificate: Certificate) -> None:
        self.certificate = certificate
        self._flights = flights
        self._key = key
        self._result: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()

    def complete(self, result: T | None) -> None:
        """Give all waiters the result. Completing again does nothing."""
        self._flights._forget(self._key, self)
        if not self._result.done():
            self._result.set_result(result)

    async def wait(self) -> T | None:
        """Return the result, or None if there is none to share. Cancelling a waiter cancels neither
        the flight nor other waiters."""
        return await asyncio.shield(self._result)


class Flights(Generic[T]):
    """The flights of this process, by key. The number of its requests bounds their number."""

    def __init__(self) -> None:
        self._flying: dict[Hashable, Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flying)

    def join(self, key: Hashable, *, view: GenerationView, tags: Sequence[str]) -> Flight[T] | None:
        """Return the key's flight if its result will be valid in this view, else None."""
        flight = self._flying.get(key)
        if flight is None or view.judge(flight.certificate, tags) is not Verdict.VALID:
            return None
        return flight

    def begin(self, key: Hashable, certificate: Certificate) -> Flight[T]:
        """Start a flight. It replaces an older one, which later callers may not join."""
        flight = self._flying[key] = Flight(self, key, certificate)
        return flight

    def _forget(self, key: Hashable, flight: Flight[T]) -> None:
        if self._flying.get(key) is flight:
            del self._flying[key]
