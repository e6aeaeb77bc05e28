"""The stores under test, with access to their servers that bypasses the store."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import redis

from respcache.ops.acl import DATA_PLANE
from respcache.stores.memory import MemoryStore
from respcache.stores.redis import RedisStore
from respcache.testing.servers import EmbeddedValkey

LONG_S = 5.0
"""A deadline for tests that are not about deadlines, on a busy machine."""


class MemorySubject:
    """A store in memory, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.store = MemoryStore(clock=lambda: self.now)

    def keys(self) -> set[str]:
        return {key for key, (_, expires) in self.store.server.values.items() if expires > self.now}

    def ttl_ms(self, key: str) -> float:
        return (self.store.server.values[key][1] - self.now) * 1000

    def delete(self, key: str) -> None:
        self.store.delete(key)

    def delete_field(self, key: str, field: str) -> None:
        self.store.server.values[key][0].pop(field)

    def overwrite_field(self, key: str, field: str) -> None:
        self.store.server.values[key][0][field] = b"x"

    def clear(self) -> None:
        self.store.server.values.clear()

    async def expire(self, key: str) -> None:
        self.now = self.store.server.values[key][1]

    async def restart(self, *, keep_data: bool) -> None:
        self.store.restart(keep_data=keep_data)


class ValkeySubject:
    """A store on a real server, which a second client changes."""

    def __init__(
        self, url: str, server: EmbeddedValkey | None = None, *, store_url: str | None = None
    ) -> None:
        self.store = RedisStore(store_url or url, deadline_s=LONG_S, connect_deadline_s=LONG_S)
        self.server = server
        self.client = redis.Redis.from_url(url, decode_responses=True)

    def keys(self) -> set[str]:
        return set(self.client.keys("*"))

    def ttl_ms(self, key: str) -> float:
        left = self.client.pttl(key)
        return float("inf") if left == -1 else left

    def delete(self, key: str) -> None:
        self.client.delete(key)

    def delete_field(self, key: str, field: str) -> None:
        self.client.hdel(key, field)

    def overwrite_field(self, key: str, field: str) -> None:
        self.client.hset(key, field, "x")

    def clear(self) -> None:
        self.client.flushall()

    async def expire(self, key: str) -> None:
        await until(lambda: not self.client.exists(key))

    async def restart(self, *, keep_data: bool) -> None:
        assert self.server is not None
        if not keep_data:
            self.client.flushall()
        self.client.save()
        self.server.kill()
        await until(lambda: not self.store.available)
        self.server.start()
        await until(lambda: self.store.available)


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


def restricted(url: str) -> str:
    """Create the application's user by the rule that ``respcache acl`` prints; return its URL."""
    with redis.Redis.from_url(url) as client:
        client.execute_command(*DATA_PLANE.rule(password="only-for-tests").split())
    return re.sub(r"//.*@", f"//{DATA_PLANE.name}:only-for-tests@", url)
