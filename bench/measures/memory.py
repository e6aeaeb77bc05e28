"""The size of an entry in Valkey, and the hit ratio at equal memory, against plain JSON text.

Both sides get the same sequence of keys (Zipf, fixed seed) and servers of equal size with LRU
eviction. respcache is the whole application, called in this process, with the near cache off: the
comparison is about the store.
"""

import itertools
import random
from bisect import bisect
from typing import Any

import handler
import redis.asyncio
from lanes import ours
from machine import Processes

from measures.hits import ShowStep

KEYS = 2000
EXPONENT = 0.9
MEMORY = "16mb"
SAMPLED = 100


async def measure(
    on: Processes, *, requests: int, seed: int, show_step: ShowStep
) -> dict[str, Any]:
    """Return the bytes per entry and the hit ratio of both sides."""
    sequence = zipf(requests, seed)
    result: dict[str, Any] = {
        "keys": KEYS,
        "requests": requests,
        "memory": MEMORY,
        "body_bytes": handler.BODY_BYTES,
    }
    try:
        for name, side in (("respcache", _ours), ("plain JSON", _plain)):
            show_step(f"memory: {name}")
            server = on.store(
                maxmemory=MEMORY, maxmemory_policy="allkeys-lru", maxmemory_samples="10"
            )
            async with redis.asyncio.from_url(server.url) as client:
                hits = await side(server.url, client, sequence)
                result[name] = {
                    "bytes_per_entry": await _entry_bytes(client),
                    "hit_ratio": round(hits / requests, 4),
                }
    finally:
        on.stop_lanes()
    return result


def zipf(count: int, seed: int) -> list[int]:
    """Return page numbers: the n-th most popular has the weight 1 / n ** EXPONENT."""
    chance = random.Random(seed)
    bounds = list(itertools.accumulate(1 / rank**EXPONENT for rank in range(1, KEYS + 1)))
    return [bisect(bounds, chance.random() * bounds[-1]) for _ in range(count)]


async def _plain(url: str, client: "redis.asyncio.Redis", sequence: list[int]) -> int:
    hits = 0
    for number in sequence:
        if await client.get(f"items:acme:{number}") is None:
            await client.set(f"items:acme:{number}", handler.body(number), ex=handler.TTL_S)
        else:
            hits += 1
    return hits


async def _ours(url: str, client: "redis.asyncio.Redis", sequence: list[int]) -> int:
    cache = ours.make_cache(url, near_bytes=0)
    app = ours.wrapped(cache, "strict")
    await cache.connect()
    try:
        if not any([await _is_hit(app, KEYS + 1) for _ in range(4)]):
            raise RuntimeError("nothing is served from the cache")
        return sum([await _is_hit(app, number) for number in sequence])
    finally:
        await cache.close()


async def _is_hit(app: Any, number: int) -> bool:
    """Call the application as a server would; return whether the response was a hit."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": handler.PATH,
        "raw_path": handler.PATH.encode(),
        "root_path": "",
        "query_string": f"page={number}".encode(),
        "headers": [(b"host", b"bench"), (b"authorization", handler.AUTHORIZATION.encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert sent[0]["status"] == 200, sent[0]
    assert b"".join(message.get("body", b"") for message in sent[1:]) == handler.body(number)
    return any(name == b"cache-status" and b"; hit" in value for name, value in sent[0]["headers"])


async def _entry_bytes(client: "redis.asyncio.Redis") -> int:
    """Return the mean size of an entry, allocator included (MEMORY USAGE)."""
    keys = list(
        itertools.islice(
            [key async for key in client.scan_iter(count=1000) if b":~" not in key], SAMPLED
        )
    )
    sizes = [await client.memory_usage(key, samples=0) or 0 for key in keys]
    return round(sum(sizes) / len(sizes))
