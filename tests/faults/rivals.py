"""What others do to keep a cache fresh, and a driver that shows what comes of it.

Each protocol is an adapter with ``read`` and ``write``: a plain cache-aside as in the original of
this project, the same with a time window, and two libraries used as their documentation says. They
run on a real Valkey and a real PostgreSQL. The driver has concurrent clients read and write tenants
that nobody used before, in rounds, and records a history of each round.
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote, urlsplit

import aiocache
import asyncpg
import cashews
import redis.asyncio
from aiocache.serializers import JsonSerializer

from respcache.testing.checker import Report, check
from respcache.testing.history import Read, Recorder, Write, load, now
from respcache.testing.staleness import ViolationKind

TABLE = (
    "CREATE TABLE registers (tenant text, name text, version bigint NOT NULL DEFAULT 0, PRIMARY "
    "KEY (tenant, name))"
)
NAMES = ("1", "2")
QUERIES = {"list": NAMES, "one": NAMES[:1]}
TTL_S = 180
WINDOW_S = 10
BOUND_S = 2.5

TENANTS = 20
READERS = 4
READS = 8
WRITES = 2
MAX_ROUNDS = 200
DEADLINE_S = 60

Body = dict[str, Any]
_filled: ContextVar[list[str]] = ContextVar("filled")


class Database:
    """The registers. Answers take a while to be made after they were read, as handlers do: mostly
    0-3 ms, now and then 30."""

    def __init__(self, pool: asyncpg.Pool, randomness: Random) -> None:
        self._pool = pool
        self._randomness = randomness

    async def read(self, tenant: str, query: str) -> Body:
        """Answer a query: what it was, and the versions of the registers that it covers."""
        _filled.get([]).append(query)
        names = list(QUERIES[query])
        rows = await self._pool.fetch(
            "SELECT name, version FROM registers WHERE tenant = $1 AND name = ANY($2)",
            tenant,
            names,
        )
        await asyncio.sleep(
            0.03 if self._randomness.random() < 0.05 else self._randomness.uniform(0, 0.003)
        )
        return {
            "asked": f"{tenant} {query}",
            "values": {f"{tenant}/{row['name']}": row["version"] for row in rows},
        }

    async def write(self, tenant: str, name: str) -> int:
        """Change a register; it is committed when this returns."""
        statement = (
            "UPDATE registers SET version = version + 1 WHERE tenant = $1 AND name = $2 RETURNING "
            "version"
        )
        return int(await self._pool.fetchval(statement, tenant, name))

    async def add(self, tenants: Sequence[str]) -> None:
        """Make tenants with their registers."""
        rows = [(tenant, name) for tenant in tenants for name in NAMES]
        await self._pool.executemany("INSERT INTO registers VALUES ($1, $2)", rows)


class Uncached:
    """No cache at all: the control, and what the others have in common. One object is one client
    process."""

    def __init__(self, database: Database, url: str) -> None:
        self.database = database

    async def read(self, tenant: str, query: str) -> Body:
        """Answer a query."""
        return await self.database.read(tenant, query)

    async def write(self, tenant: str, name: str) -> tuple[int, float]:
        """Change a register and invalidate; whoever awaited it is acknowledged. Return the version,
        and when it was committed."""
        version = await self.database.write(tenant, name)
        committed = now()
        await self.invalidate(tenant)
        return version, committed

    async def invalidate(self, tenant: str) -> None:
        """Let everything of a tenant be forgotten."""

    async def close(self) -> None:
        """Give connections back."""


class CacheAside(Uncached):
    """The original's protocol: GET, on a miss SETEX 180; a write is followed by SCAN and DEL.
    Errors are passed over."""

    def __init__(self, database: Database, url: str) -> None:
        super().__init__(database, url)
        self.client = redis.asyncio.Redis.from_url(url, socket_timeout=0.5)

    async def read(self, tenant: str, query: str) -> Body:
        """Look it up, or make it and store it."""
        digest = hashlib.md5(query.encode(), usedforsecurity=False).hexdigest()
        key = f"tenant:{tenant}:accounts:list:{digest[:8]}"
        with contextlib.suppress(redis.RedisError):
            stored = await self.client.get(key)
            if stored is not None:
                body: Body = json.loads(stored)
                return body
        body = await super().read(tenant, query)
        with contextlib.suppress(redis.RedisError):
            await self.store(tenant, key, json.dumps(body))
        return body

    async def store(self, tenant: str, key: str, text: str) -> None:
        """Store an answer."""
        await self.client.execute_command("SETEX", key, TTL_S, text)

    async def invalidate(self, tenant: str) -> None:
        """Delete by pattern."""
        with contextlib.suppress(redis.RedisError):
            async for key in self.client.scan_iter(match=f"tenant:{tenant}:accounts:*", count=100):
                await self.client.delete(key)

    async def close(self) -> None:
        await self.client.aclose()


class TimeWindow(CacheAside):
    """The original's later repair: for 10 s after a write nothing may be stored. EXISTS and SETEX
    are two commands."""

    async def store(self, tenant: str, key: str, text: str) -> None:
        """Store an answer unless there was a write a short time ago."""
        if not await self.client.exists(f"cold:{tenant}:accounts"):
            await super().store(tenant, key, text)

    async def invalidate(self, tenant: str) -> None:
        """Delete, then open the window."""
        await super().invalidate(tenant)
        with contextlib.suppress(redis.RedisError):
            await self.client.execute_command("SETEX", f"cold:{tenant}:accounts", WINDOW_S, 1)


class Cashews(Uncached):
    """cashews 7: a decorator with tags, and ``delete_tags`` after the write (its README, "Cache
    invalidation")."""

    def __init__(self, database: Database, url: str) -> None:
        super().__init__(database, url)
        self.cache = cashews.Cache()
        self.cache.setup(url)

        @self.cache(ttl="3m", key="accounts:{tenant}:{query}", tags=["accounts:{tenant}"])
        async def accounts(tenant: str, query: str) -> Body:
            return await database.read(tenant, query)

        self._accounts = accounts

    async def read(self, tenant: str, query: str) -> Body:
        """Call the decorated function."""
        body: Body = await self._accounts(tenant, query)
        return body

    async def invalidate(self, tenant: str) -> None:
        """Delete what bears the tag."""
        await self.cache.delete_tags(f"accounts:{tenant}")

    async def close(self) -> None:
        await self.cache.close()


class Aiocache(Uncached):
    """aiocache 0.12: the ``cached`` decorator, and ``delete`` of the keys after the write (its
    README)."""

    def __init__(self, database: Database, url: str) -> None:
        super().__init__(database, url)
        server = urlsplit(url)

        @aiocache.cached(
            ttl=TTL_S,
            cache=aiocache.Cache.REDIS,
            key_builder=lambda function, tenant, query: f"{tenant}:{query}",
            namespace="accounts",
            serializer=JsonSerializer(),
            endpoint=server.hostname,
            port=server.port,
            password=unquote(server.password or ""),
        )
        async def accounts(tenant: str, query: str) -> Body:
            return await database.read(tenant, query)

        self._accounts = accounts

    async def read(self, tenant: str, query: str) -> Body:
        """Call the decorated function."""
        body: Body = await self._accounts(tenant, query)
        return body

    async def invalidate(self, tenant: str) -> None:
        """Delete every key that the tenant can have."""
        for query in QUERIES:
            await self._accounts.cache.delete(f"{tenant}:{query}")

    async def close(self) -> None:
        await self._accounts.cache.close()


Make = Callable[[Database, str], Uncached]


class Driver:
    """Concurrent clients of two processes' worth of a protocol. Randomness is given; what the
    servers make of it is real."""

    def __init__(self, processes: dict[str, Uncached], directory: Path, randomness: Random) -> None:
        self._processes = processes
        self._directory = directory
        self._randomness = randomness
        self._relay = 0

    async def until_flagged(self) -> Report:
        """Run rounds until a read was staler than an acknowledged write; return the report of that
        round."""
        async with asyncio.timeout(DEADLINE_S):
            while self._relay < MAX_ROUNDS:
                report = await self.round()
                if ViolationKind.FRESHNESS in report.violations:
                    return report
        return report

    async def round(self) -> Report:
        """Have clients read and write new tenants, all at once, and judge what they recorded."""
        self._relay += 1
        tenants = [f"t{self._relay}-{number}" for number in range(TENANTS)]
        await next(iter(self._processes.values())).database.add(tenants)
        path = self._directory / f"round-{self._relay}"
        with Recorder(path) as recorder:
            async with asyncio.TaskGroup() as clients:
                for tenant in tenants:
                    for name, number in zip(
                        [*self._processes] * READERS, range(READERS), strict=False
                    ):
                        clients.create_task(
                            self._reader(name, tenant, list(QUERIES)[number // 2 % 2], recorder)
                        )
                    clients.create_task(
                        self._writer(self._randomness.choice([*self._processes]), tenant, recorder)
                    )
        return check(load([path]), bound_s=BOUND_S)

    async def _reader(self, process: str, tenant: str, query: str, recorder: Recorder) -> None:
        for _ in range(READS):
            await asyncio.sleep(self._randomness.uniform(0, 0.01))
            await read_once(self._processes[process], process, tenant, query, recorder)

    async def _writer(self, process: str, tenant: str, recorder: Recorder) -> None:
        for _ in range(WRITES):
            await asyncio.sleep(self._randomness.uniform(0, 0.03))
            await write_once(
                self._processes[process], process, tenant, self._randomness.choice(NAMES), recorder
            )


async def read_once(
    rival: Uncached, process: str, tenant: str, query: str, recorder: Recorder
) -> None:
    """Read and record: a ``fill`` asked the database, ``shared`` got what another read had
    brought."""
    filled: list[str] = []
    _filled.set(filled)
    start = now()
    body = await rival.read(tenant, query)
    how = "fill" if filled else "shared"
    recorder.append(
        Read(start, now(), body["values"], process, f"{tenant} {query}", body["asked"], how=how)
    )


async def write_once(
    rival: Uncached, process: str, tenant: str, name: str, recorder: Recorder
) -> None:
    """Write, be acknowledged, and record."""
    started = now()
    version, committed = await rival.write(tenant, name)
    recorder.append(Write(f"{tenant}/{name}", version, started, committed, now(), process))
