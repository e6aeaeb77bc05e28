"""Access to the keys of the cache server: the only module that scans keys, with a bound.

Operations of this module do not change the cache's counters.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

from respcache.core.entry import HEAD_BYTES
from respcache.core.keys import BUMPS_CHANNEL
from respcache.ops.stats.publisher import StatsPublisher
from respcache.stores.memory import MemoryServer

FIRST_BATCH = 100
MAX_BATCH = 1_000
"""Keys that one command examines: well under a millisecond of the server's time."""


@dataclass(frozen=True, slots=True)
class KeyScan:
    """The result of a scan: matching keys, the cursor (empty at the end), and the approximate
    number of keys that were examined."""

    keys: list[str]
    cursor: str
    scanned: int


@dataclass(frozen=True, slots=True)
class StoredKey:
    """The first ``HEAD_BYTES`` of a value, its size, and its remaining time to live."""

    key: str
    head: bytes
    size_bytes: int
    ttl_left_s: float


class Keyspace(Protocol):
    """Operations on keys. Each raises ``StoreUnavailable``."""

    async def find(self, pattern: str, *, cursor: str, enough: int, most: int) -> KeyScan:
        """Find keys that match a glob, from a cursor on (empty for the beginning).

        Stops after about ``enough`` matches or ``most`` examined keys.
        """
        ...

    async def stored(self, keys: Sequence[str]) -> list[StoredKey]:
        """Read these keys; missing ones are left out. One round trip."""
        ...

    async def count(self) -> int:
        """Count all keys. One round trip."""
        ...

    async def delete(self, key: str) -> int:
        """Delete a key and notify all processes; return how many keys existed. One round trip."""
        ...


class ServerKeys:
    """The keys of a Valkey or Redis server, over the connection of the ``StatsPublisher``."""

    def __init__(self, publisher: StatsPublisher) -> None:
        self._publisher = publisher

    async def find(self, pattern: str, *, cursor: str, enough: int, most: int) -> KeyScan:
        """See ``Keyspace.find``: SCAN, in batches that grow while few keys match."""
        at, batch, scanned = int(cursor or 0), FIRST_BATCH, 0
        found: dict[str, None] = {}
        while True:
            at, names = await self._publisher.ask(_scan_step(at, pattern, batch))
            found.update((name.decode("utf-8", "replace"), None) for name in names)
            scanned += batch
            if at == 0 or len(found) >= enough or scanned >= most:
                return KeyScan(list(found), str(at) if at else "", scanned)
            batch = min(MAX_BATCH, 2 * batch)

    async def stored(self, keys: Sequence[str]) -> list[StoredKey]:
        """See ``Keyspace.stored``: GETRANGE, STRLEN and PTTL."""

        async def query(client: Any) -> Any:
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.getrange(key, 0, HEAD_BYTES - 1)
                pipeline.strlen(key)
                pipeline.pttl(key)
            return await pipeline.execute(raise_on_error=False)

        replies = await self._publisher.ask(query)
        found = zip(keys, replies[::3], replies[1::3], replies[2::3], strict=True)
        return [
            StoredKey(key, head, size, max(0, ttl) / 1000)
            for key, head, size, ttl in found
            if isinstance(head, bytes) and size
        ]

    async def count(self) -> int:
        """See ``Keyspace.count``: DBSIZE."""

        async def query(client: Any) -> int:
            return int(await client.dbsize())

        return await self._publisher.ask(query)

    async def delete(self, key: str) -> int:
        """See ``Keyspace.delete``: DEL and PUBLISH."""

        async def query(client: Any) -> int:
            pipeline = client.pipeline(transaction=True)
            pipeline.delete(key)
            pipeline.publish(BUMPS_CHANNEL, key)
            return int((await pipeline.execute())[0])

        return await self._publisher.ask(query)


class MemoryKeys:
    """The keys of a server in memory, as tests use it."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server

    async def find(self, pattern: str, *, cursor: str, enough: int, most: int) -> KeyScan:
        """See ``Keyspace.find``. Examines all keys."""
        return KeyScan(
            [key for key in self._server.values if fnmatchcase(key, pattern)],
            "",
            len(self._server.values),
        )

    async def stored(self, keys: Sequence[str]) -> list[StoredKey]:
        """See ``Keyspace.stored``."""
        found = []
        for key in keys:
            data, ttl_left_s = self._server.peek(key)
            if isinstance(data, bytes):
                found.append(StoredKey(key, data[:HEAD_BYTES], len(data), ttl_left_s))
        return found

    async def count(self) -> int:
        """See ``Keyspace.count``."""
        return len(self._server.values)

    async def delete(self, key: str) -> int:
        """See ``Keyspace.delete``."""
        there = key in self._server.values
        self._server.delete(key)
        self._server.publish(key)
        return int(there)


def _scan_step(
    cursor: int, pattern: str, count: int
) -> Callable[[Any], Awaitable[tuple[int, list[bytes]]]]:
    async def query(client: Any) -> tuple[int, list[bytes]]:
        at, names = await client.scan(cursor, match=pattern, count=count)
        return int(at), names

    return query
