"""The keys of the cache's server, as far as operators look at them: the only place that walks keys,
with a bound.

Entries are read and deleted here by key; what one looks at is in no figure of the cache.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

from respcache.core.entry import HEAD_BYTES
from respcache.core.keys import BUMPS_CHANNEL
from respcache.ops.publisher import StatsPublisher
from respcache.stores.memory import MemoryServer

FIRST_BATCH = 100
MOST_BATCH = 1_000
"""Keys that one command goes through: well under a millisecond of the server."""


@dataclass(frozen=True, slots=True)
class Walk:
    """A part of a walk over the keys: what matched, where it goes on (empty: it is over), how many
    it went through, about."""

    keys: list[str]
    cursor: str
    looked_at: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A key's first ``HEAD_BYTES``, its size, and how long it will live."""

    key: str
    head: bytes
    size_bytes: int
    ttl_left_s: float


class Keyspace(Protocol):
    """What is asked of the keys. Everything raises ``StoreUnavailable``."""

    async def walk(self, pattern: str, *, cursor: str, enough: int, most: int) -> Walk:
        """Go on from a cursor (empty: begin) until about ``enough`` keys match a glob, or ``most``
        were gone through."""
        ...

    async def stored(self, keys: Sequence[str]) -> list[Stored]:
        """Look at these keys, but for those that are gone. One round trip."""
        ...

    async def total(self) -> int:
        """Count all keys. One round trip."""
        ...

    async def delete(self, key: str) -> int:
        """Delete a key and tell all processes; return how many there were. One round trip."""
        ...


class ServerKeys:
    """The keys of a Valkey or Redis server, asked by the board's client."""

    def __init__(self, publisher: StatsPublisher) -> None:
        self._publisher = publisher

    async def walk(self, pattern: str, *, cursor: str, enough: int, most: int) -> Walk:
        """See ``Keyspace.walk``: SCAN, in batches that grow while little is found."""
        at, batch, looked_at = int(cursor or 0), FIRST_BATCH, 0
        found: dict[str, None] = {}
        while True:
            at, names = await self._publisher.ask(_scanning(at, pattern, batch))
            found.update((name.decode("utf-8", "replace"), None) for name in names)
            looked_at += batch
            if at == 0 or len(found) >= enough or looked_at >= most:
                return Walk(list(found), str(at) if at else "", looked_at)
            batch = min(MOST_BATCH, 2 * batch)

    async def stored(self, keys: Sequence[str]) -> list[Stored]:
        """See ``Keyspace.stored``: GETRANGE, STRLEN and PTTL."""

        async def ask(client: Any) -> Any:
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.getrange(key, 0, HEAD_BYTES - 1)
                pipeline.strlen(key)
                pipeline.pttl(key)
            return await pipeline.execute(raise_on_error=False)

        replies = await self._publisher.ask(ask)
        found = zip(keys, replies[::3], replies[1::3], replies[2::3], strict=True)
        return [
            Stored(key, head, size, max(0, ttl) / 1000)
            for key, head, size, ttl in found
            if isinstance(head, bytes) and size
        ]

    async def total(self) -> int:
        """See ``Keyspace.total``: DBSIZE."""

        async def ask(client: Any) -> int:
            return int(await client.dbsize())

        return await self._publisher.ask(ask)

    async def delete(self, key: str) -> int:
        """See ``Keyspace.delete``: DEL and PUBLISH."""

        async def ask(client: Any) -> int:
            pipeline = client.pipeline(transaction=True)
            pipeline.delete(key)
            pipeline.publish(BUMPS_CHANNEL, key)
            return int((await pipeline.execute())[0])

        return await self._publisher.ask(ask)


class MemoryKeys:
    """The keys of a server in memory."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server

    async def walk(self, pattern: str, *, cursor: str, enough: int, most: int) -> Walk:
        """See ``Keyspace.walk``. There are few."""
        return Walk(
            [key for key in self._server.values if fnmatchcase(key, pattern)],
            "",
            len(self._server.values),
        )

    async def stored(self, keys: Sequence[str]) -> list[Stored]:
        """See ``Keyspace.stored``."""
        found = []
        for key in keys:
            data, ttl_left_s = self._server.peek(key)
            if isinstance(data, bytes):
                found.append(Stored(key, data[:HEAD_BYTES], len(data), ttl_left_s))
        return found

    async def total(self) -> int:
        """See ``Keyspace.total``."""
        return len(self._server.values)

    async def delete(self, key: str) -> int:
        """See ``Keyspace.delete``."""
        there = key in self._server.values
        self._server.delete(key)
        self._server.publish(key)
        return int(there)


def _scanning(
    cursor: int, pattern: str, count: int
) -> Callable[[Any], Awaitable[tuple[int, list[bytes]]]]:
    async def ask(client: Any) -> tuple[int, list[bytes]]:
        at, names = await client.scan(cursor, match=pattern, count=count)
        return int(at), names

    return ask
