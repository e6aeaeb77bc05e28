"""One fill per key in this process: callers of the same key wait for the first one's result.

A caller joins only a flight whose certificate is valid in its own view of the generation, which it
read after its own request began; otherwise it starts a newer flight in its place. Joining any
flight would serve a caller that began after a write was acknowledged with a read from before it
(the JOINANY mutant of the model).
"""

import asyncio
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from respcache.core.generations import Certificate, GenerationView, Verdict

T = TypeVar("T")


class Flight(Generic[T]):
    """A fill under way. It lands exactly once, with a result or with None when there is nothing to
    share."""

    __slots__ = ("_flights", "_key", "_result", "certificate")

    def __init__(self, flights: "Flights[T]", key: Hashable, certificate: Certificate) -> None:
        self.certificate = certificate
        self._flights = flights
        self._key = key
        self._result: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()

    def complete(self, result: T | None) -> None:
        """Give the result to whoever waits, and make room. Landing again does nothing."""
        self._flights._forget(self._key, self)
        if not self._result.done():
            self._result.set_result(result)

    async def wait(self) -> T | None:
        """Wait for the landing. Cancelling one waiter disturbs neither the flight nor the
        others."""
        return await asyncio.shield(self._result)


class Flights(Generic[T]):
    """The fills under way in this process, by key. Bounded by the number of requests in the
    process."""

    def __init__(self) -> None:
        self._flying: dict[Hashable, Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flying)

    def join(self, key: Hashable, *, view: GenerationView, tags: Sequence[str]) -> Flight[T] | None:
        """Return the flight of this key if its result will be valid for a caller with this view,
        else None."""
        flight = self._flying.get(key)
        if flight is None or view.judge(flight.certificate, tags) is not Verdict.VALID:
            return None
        return flight

    def begin(self, key: Hashable, certificate: Certificate) -> Flight[T]:
        """Start a flight; it takes the place of an older one that nobody may join any more."""
        flight = self._flying[key] = Flight(self, key, certificate)
        return flight

    def _forget(self, key: Hashable, flight: Flight[T]) -> None:
        if self._flying.get(key) is flight:
            del self._flying[key]
