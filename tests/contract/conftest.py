"""The stores under test, and what the tests may do to them behind their backs."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import pytest
import redis

from respcache.ops.acl import DATA_PLANE
from respcache.stores.base import Store
from respcache.stores.memory import MemoryStore
from respcache.stores.redis import RedisStore
from respcache.testing.servers import EmbeddedValkey

LONG_S = 5.0
"""A deadline for tests that are not about deadlines, on a busy machine."""


class Subject(Protocol):
    """A store and the powers of fate over it."""

    store: Store

    def keys(self) -> set[str]:
        """List what is stored."""
        ...

    def ttl_ms(self, key: str) -> float:
        """Say how long a key will live; infinity when for ever."""
        ...

    def lose(self, key: str) -> None:
        """Lose a key, as by eviction."""
        ...

    def lose_field(self, key: str, field: str) -> None:
        """Lose a part of a generation, as by a foreign hand."""
        ...

    def spoil(self, key: str, field: str) -> None:
        """Have a foreign hand write over a part of a generation."""
        ...

    def lose_all(self) -> None:
        """Lose everything, as by FLUSHALL."""
        ...

    async def expire(self, key: str) -> None:
        """Return when the time to live of a key is over."""
        ...

    async def restart(self, *, keep_data: bool) -> None:
        """Become another server life; return when the store is connected to it."""
        ...


class MemorySubject:
    """The store in memory, with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.store = MemoryStore(clock=lambda: self.now)

    def keys(self) -> set[str]:
        return {key for key, (_, expires) in self.store.server.values.items() if expires > self.now}

    def ttl_ms(self, key: str) -> float:
        return (self.store.server.values[key][1] - self.now) * 1000

    def lose(self, key: str) -> None:
        self.store.delete(key)

    def lose_field(self, key: str, field: str) -> None:
        self.store.server.values[key][0].pop(field)

    def spoil(self, key: str, field: str) -> None:
        self.store.server.values[key][0][field] = b"x"

    def lose_all(self) -> None:
        self.store.server.values.clear()

    async def expire(self, key: str) -> None:
        self.now = self.store.server.values[key][1]

    async def restart(self, *, keep_data: bool) -> None:
        self.store.restart(keep_data=keep_data)


class ValkeySubject:
    """The store on a real server, which a second client manipulates."""

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

    def lose(self, key: str) -> None:
        self.client.delete(key)

    def lose_field(self, key: str, field: str) -> None:
        self.client.hdel(key, field)

    def spoil(self, key: str, field: str) -> None:
        self.client.hset(key, field, "x")

    def lose_all(self) -> None:
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


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


@pytest.fixture(params=["memory", "valkey", "valkey, as the user of `respcache acl`"])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """An empty, connected store of each kind."""
    made: MemorySubject | ValkeySubject
    if request.param == "memory":
        made = MemorySubject()
    else:
        url = request.getfixturevalue("valkey_url")
        made = ValkeySubject(url, store_url=None if request.param == "valkey" else restricted(url))
    await made.store.connect()
    yield made
    await made.store.close()


def restricted(url: str) -> str:
    """Make the user of the application, by the rule that is printed for it; return its address."""
    with redis.Redis.from_url(url) as client:
        client.execute_command(*DATA_PLANE.rule(password="only-for-tests").split())
    return re.sub(r"//.*@", f"//{DATA_PLANE.name}:only-for-tests@", url)


@pytest.fixture(params=["memory", "valkey"])
async def mortal(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """An empty, connected store of each kind, whose server may be restarted."""
    made: MemorySubject | ValkeySubject
    if request.param == "memory":
        made = MemorySubject()
    else:
        server = request.getfixturevalue("make_valkey")()
        made = ValkeySubject(server.url, server)
    await made.store.connect()
    yield made
    await made.store.close()


@pytest.fixture
def store(subject: Subject) -> Store:
    """The store of the subject."""
    return subject.store
