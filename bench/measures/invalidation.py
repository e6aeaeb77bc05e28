"""Invalidating a tenant's entries among 1,000 to 1,000,000 keys.

Compared are respcache, SCAN and DEL, a set of keys per tag, and cashews. Keys have the form of
respcache's and values of one byte: the cost is in finding and removing them, and larger values only
add to it. Two cases: the tenant has 100 of the keys, or all of them (up to 100,000). Latency is the
caller's, in Python, on an idle server. Commands are those that Valkey ran, also inside scripts.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import cashews
import redis.asyncio
from lanes import ours
from machine import Processes

from measures.hits import ShowStep, middle
from respcache import Cache

FEW = 100
PREFIX = "tenant:acme:items:list:"
OTHERS = "tenant:other:items:list:"
TAG = "_tag:tenant:acme"  # as cashews names it
BATCH = 1000
FILL_STEP = 1000
"""Keys created by one script: few enough that no client times out meanwhile."""
PAUSE_S = 0.05
OURS = "respcache"
SAMPLES = 5
MAX_OWN = 100_000
"""The limit for keys of one tenant: beyond it cashews takes minutes."""
FILL = """
for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do
    redis.call('SET', KEYS[1] .. i, 'x', 'EX', 3600)
    if ARGV[3] ~= '' then redis.call('SADD', ARGV[3], KEYS[1] .. i) end
end
"""
Client = redis.asyncio.Redis
Way = Callable[[], Awaitable[Any]]


async def measure(
    on: Processes, *, sizes: tuple[int, ...], rounds: int, seed: int, show_step: ShowStep
) -> dict[str, Any]:
    """Return median milliseconds and commands of each way, by case and number of keys."""
    server = on.store(maxmemory="2gb", maxmemory_policy="noeviction")
    cache = ours.make_cache(server.url)
    tags = cashews.Cache()
    tags.setup(server.url)

    @tags(ttl="1h", key="tenant:{tenant}:items:list:{number}", tags=["tenant:{tenant}"])
    async def unused(tenant: str, number: int) -> None: ...

    await cache.connect()
    try:
        async with redis.asyncio.from_url(server.url) as client:
            ways: dict[str, Way] = {
                OURS: lambda: cache.invalidate_tenant_cache("acme", "items"),
                "SCAN + DEL": lambda: _scan_and_delete(client),
                "tag set (SMEMBERS, UNLINK)": lambda: _tag_set(client),
                "cashews delete_tags": lambda: tags.delete_tags("tenant:acme"),
            }
            result: dict[str, Any] = {}
            for case, share in ((f"{FEW}", FEW), ("all", 0)):
                for size in sizes:
                    if share or size <= MAX_OWN:
                        show_step(f"invalidation: {share or size:,} of {size:,} keys")
                        result.setdefault(case, {})[str(size)] = await _case(
                            client, cache, ways, size=size, share=share, rounds=rounds, seed=seed
                        )
            return result
    finally:
        await cache.close()
        await tags.close()
        on.stop_lanes()


async def _case(
    client: Client,
    cache: Cache,
    ways: dict[str, Way],
    *,
    size: int,
    share: int,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    own = share or size
    await client.flushall()
    await _fill(client, OTHERS, size - own, tag="")
    took: dict[str, list[float]] = {name: [] for name in ways}
    commands: dict[str, dict[str, int]] = {}
    chance = random.Random(seed)
    for way in ways.values():  # load scripts, open connections
        await way()
    for _ in range(rounds if own <= FEW else 1 if size > 10_000 else min(rounds, 3)):
        for name in chance.sample(sorted(ways), len(ways)):
            if name == OURS:
                await _repeat(cache, ways[name], took[name])
                await _value(cache, [])
                await client.config_resetstat()
                await ways[name]()
            else:
                await _fill(client, PREFIX, own, tag=TAG if "tag" in name else "")
                await asyncio.sleep(PAUSE_S)
                await client.config_resetstat()
                started = time.perf_counter()
                await ways[name]()
                took[name].append(1000 * (time.perf_counter() - started))
            commands[name] = await _commands(client)
            if name != OURS and await client.exists(f"{PREFIX}1", f"{PREFIX}{own}"):
                raise RuntimeError(f"{name} left keys behind")
    return {name: {"ms": middle(took[name], 3), "commands": commands[name]} for name in ways}


async def _repeat(cache: Cache, way: Way, took: list[float]) -> None:
    """Take several samples of respcache: a value is cached, invalidated, and must be made again.

    An invalidation that was not confirmed within its deadline (on a busy machine) does not count.
    """
    for _ in range(SAMPLES):
        made: list[int] = []
        await _value(cache, made)
        await asyncio.sleep(PAUSE_S / 5)
        started = time.perf_counter()
        confirmed = await way()
        ms = 1000 * (time.perf_counter() - started)
        made.clear()
        await _value(cache, made)
        if not made:
            raise RuntimeError("an invalidated value was served")
        if confirmed:
            took.append(ms)
    if not took:
        raise RuntimeError("no invalidation was confirmed within its deadline")


async def _value(cache: Cache, made: list[int]) -> None:
    """Read a value of the tenant's list; ``made`` gets an item if the value was not cached."""

    async def make() -> int:
        made.append(1)
        return 1

    await cache.get_or_set("acme", "items", {"page": 1}, make, kind="list")


async def _scan_and_delete(client: Client) -> None:
    """Delete by pattern, with one DEL per batch of SCAN (one DEL per key is even slower)."""
    cursor = 0
    while True:
        cursor, keys = await client.scan(cursor, match=f"{PREFIX}*", count=100)
        if keys:
            await client.delete(*keys)
        if not cursor:
            return


async def _tag_set(client: Client) -> None:
    """Read the names of the keys with the tag, and remove them in batches."""
    names = list(await client.smembers(TAG))
    for at in range(0, len(names), BATCH):
        await client.unlink(*names[at : at + BATCH])
    await client.unlink(TAG)


async def _fill(client: Client, prefix: str, count: int, *, tag: str) -> None:
    for first in range(1, count + 1, FILL_STEP):
        await client.eval(FILL, 1, prefix, first, min(count, first + FILL_STEP - 1), tag)


async def _commands(client: Client) -> dict[str, int]:
    found = await client.info("commandstats")
    # GET reads the switches, once a second
    ignored = ("config", "info", "ping", "client", "get")
    calls = {
        name.removeprefix("cmdstat_").partition("|")[0].upper(): int(entry["calls"])
        for name, entry in found.items()
    }
    return {name: count for name, count in sorted(calls.items()) if name.lower() not in ignored}
