"""What can happen to the server: never old data, never a failed request, and hits come back. On a
Valkey that tests may break."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest
import redis
from fastapi import FastAPI

from respcache import Cache, RedisStore, SingleTenant, cache_list, invalidate_cache
from respcache.core.generations import Certificate
from respcache.core.keys import generation_key
from respcache.stores.base import FillLock
from respcache.testing.servers import EmbeddedValkey

pytestmark = pytest.mark.anyio
TENANT = "public"
Make = Callable[..., EmbeddedValkey]


class World:
    """One process with a value that requests read and write."""

    def __init__(self, url: str) -> None:
        self.value = 0
        self.calls = 0
        self.pause_s = 0.0
        self.store = RedisStore(url, deadline_s=0.2)
        self.cache = Cache(self.store, secret=b"k" * 32, resolver=SingleTenant(TENANT))
        app = FastAPI()

        @app.get("/value")
        @cache_list("values")
        async def read() -> int:
            self.calls += 1
            seen = self.value
            await asyncio.sleep(self.pause_s)
            return seen

        @app.post("/value")
        @invalidate_cache("values")
        async def write() -> int:
            self.value += 1
            return self.value

        self.http = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(self.cache.wrap(app)), base_url="http://test"
        )

    async def get(self) -> tuple[int, str]:
        answer = await self.http.get("/value")
        assert answer.status_code == 200
        return answer.json(), answer.headers["cache-status"]

    async def entry(self, client: redis.Redis) -> str:
        """Return the key of the entry, when it is stored and the lease of its fill given back."""
        await asyncio.sleep(0)  # what is stored is stored when the answer is on its way
        await self.store.info()
        (key,) = client.keys("*:values:*")
        return key.decode()

    async def hits_again(self) -> None:
        """Wait until the cache serves again."""
        async with asyncio.timeout(60):
            while "; hit" not in (await self.get())[1]:
                await asyncio.sleep(0.02)

    async def away(self) -> None:
        """Wait until the store has noticed that its server is gone."""
        async with asyncio.timeout(60):
            while self.store.available:
                await self.get()
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(*urls: str) -> AsyncIterator[list[World]]:
    worlds = [World(url) for url in urls]
    for world in worlds:
        await world.cache.connect()
    try:
        yield worlds
    finally:
        for world in worlds:
            await world.http.aclose()
            await world.cache.close()


async def test_losing_any_single_key_brings_no_old_data_back(make_valkey: Make) -> None:
    """Entry, generation, lease or switch: each is deleted once, around a write that bumps and one
    whose bump is lost."""
    valkey = make_valkey()
    async with running(valkey.url) as [world]:
        await world.get()
        with redis.Redis.from_url(valkey.url) as client:
            keys = client.keys("*")
            assert len(keys) == 2
            for key in keys:
                client.delete(key)
                assert (await world.get())[0] == world.value
                await world.hits_again()
                await world.http.post("/value")
                client.delete(key)
                assert (await world.get())[0] == world.value
                await world.hits_again()


@pytest.mark.parametrize("accident", ["flushall", "script_flush"])
async def test_flushing_is_safe(make_valkey: Make, accident: str) -> None:
    """An operator's FLUSHALL or SCRIPT FLUSH costs misses at most."""
    valkey = make_valkey()
    async with running(valkey.url) as [world]:
        await world.get()
        with redis.Redis.from_url(valkey.url) as client:
            getattr(client, accident)()
        confirmed = await world.http.post("/value")
        assert "x-cache-invalidation" not in confirmed.headers
        assert (await world.get())[0] == 1
        await world.hits_again()


async def test_a_restart_with_an_old_dump_serves_nothing_of_it(make_valkey: Make) -> None:
    """The dump holds an entry and a generation that agree with each other, from before an
    acknowledged write."""
    valkey = make_valkey(dbfilename="old.rdb")
    async with running(valkey.url) as [world]:
        await world.get()
        with redis.Redis.from_url(valkey.url) as client:
            client.save()
        confirmed = await world.http.post("/value")
        assert "x-cache-invalidation" not in confirmed.headers
        valkey.kill()
        await world.away()
        valkey.start()
        async with asyncio.timeout(60):
            while not world.store.available:
                assert (await world.get())[0] == 1
                await asyncio.sleep(0.01)
        with redis.Redis.from_url(valkey.url) as client:
            assert client.exists(generation_key(TENANT)), "the dump was not loaded"
        assert (await world.get())[0] == 1
        await world.hits_again()
        assert (await world.get())[0] == 1


async def test_a_restart_without_data_costs_misses_only(make_valkey: Make) -> None:
    """The next life begins empty."""
    valkey = make_valkey()
    async with running(valkey.url) as [world]:
        await world.get()
        valkey.kill()
        await world.away()
        pending = await world.http.post("/value")
        assert pending.headers["x-cache-invalidation"] == "pending"
        valkey.start()
        await world.hits_again()
        await world.cache.settled(timeout_s=20)
        assert (await world.get())[0] == 1


@pytest.mark.long
async def test_a_first_replica_changes_the_identity_and_hits_come_back(make_valkey: Make) -> None:
    """A live connection learns the new identity; nothing old is served meanwhile."""
    valkey = make_valkey()
    async with running(valkey.url) as [world]:
        await world.get()
        with redis.Redis.from_url(valkey.url) as client:
            before = client.info("replication")["master_replid"]
        make_valkey(replicaof=f"127.0.0.1 {valkey.port}", masterauth=valkey.password)
        with redis.Redis.from_url(valkey.url) as client:
            async with asyncio.timeout(60):
                while client.info("replication")["master_replid"] == before:
                    await asyncio.sleep(0.01)
        await world.http.post("/value")
        assert (await world.get())[0] == 1
        await world.hits_again()
        await world.http.post("/value")
        assert (await world.get())[0] == 2
        await world.hits_again()


@pytest.mark.parametrize("accident", ["kill", "freeze"])
async def test_killing_and_freezing_under_load_fails_no_request(
    make_valkey: Make, accident: str
) -> None:
    """Every request is answered, with the present value; afterwards hits come back."""
    valkey = make_valkey()
    async with running(valkey.url) as [world]:
        done = asyncio.Event()
        answers = 0

        async def client() -> None:
            nonlocal answers
            while not done.is_set():
                least = world.value
                assert (await world.get())[0] >= least
                answers += 1

        clients = [asyncio.create_task(client()) for _ in range(8)]
        await world.hits_again()
        getattr(valkey, accident)()
        await world.away()
        pending = await world.http.post("/value")
        assert pending.status_code == 200
        seen, wanted = answers, answers + 200
        async with asyncio.timeout(60):
            while answers < wanted:
                await asyncio.sleep(0)
        if accident == "kill":
            valkey.start()
        else:
            valkey.thaw()
        await world.hits_again()
        done.set()
        await asyncio.gather(*clients)
        assert answers > seen
        assert (await world.get())[0] == 1


async def test_two_processes_fill_a_cold_key_once(valkey_url: str) -> None:
    """Two hundred callers in two processes (two caches, two connections), one handler call in
    all."""
    async with running(valkey_url, valkey_url) as worlds:
        for world in worlds:
            world.pause_s = 0.1
        answers = await asyncio.gather(*(world.get() for world in worlds for _ in range(100)))
        assert {value for value, _ in answers} == {0}
        assert sum(world.calls for world in worlds) == 1


async def test_the_followers_of_a_dead_process_are_served(valkey_url: str) -> None:
    """Its lease stays behind; waiting for it is capped, and the key is filled and stored by who
    waited."""
    async with running(valkey_url) as [world]:
        await world.get()
        with redis.Redis.from_url(valkey_url) as client:
            entry = await world.entry(client)
            view = (await world.store.read(None, [(generation_key(TENANT), ["*"])])).generations[0]
            certificate = view.certificate()
            assert certificate is not None
            client.delete(entry)
            world.cache.forget()
            lock = entry.replace(":values:", ":~fill:values:")
            await world.store.lock(lock, FillLock("dead", certificate), ttl_ms=3_600_000)
            async with asyncio.timeout(60):  # without the cap, it would be an hour
                assert "stored" in (await world.get())[1]
            assert "; hit" in (await world.get())[1]
            assert world.calls == 2


MOST_OF_A_FILL = 10
"""Commands of one fill: look, lease, taking it over, put, release. Waiting for somebody else's
takes dozens."""


async def test_a_lease_from_before_a_write_is_not_waited_for(valkey_url: str) -> None:
    """Its holder captured before the write that the caller must see: it is taken over at once."""
    async with running(valkey_url) as [world]:
        await world.get()
        with redis.Redis.from_url(valkey_url) as client:
            entry = await world.entry(client)
            view = (await world.store.read(None, [(generation_key(TENANT), ["*"])])).generations[0]
            assert view.nonce is not None
            old = FillLock("slow", Certificate(view.nonce, view.sequence))
            await world.http.post("/value")
            await world.store.lock(entry.replace(":values:", ":~fill:values:"), old, ttl_ms=60_000)
            calls, commands = world.calls, world.store.counters()["commands"]
            assert (await world.get())[0] == 1
            assert world.calls == calls + 1
            assert world.store.counters()["commands"] - commands <= MOST_OF_A_FILL, (
                "it asked again and again"
            )


async def test_an_entry_under_the_wrong_key_is_not_served(valkey_url: str) -> None:
    """The digest in the entry is compared on every hit, not only the key."""
    async with running(valkey_url) as [world]:
        await world.get()
        with redis.Redis.from_url(valkey_url) as client:
            entry = await world.entry(client)
            stored = client.get(entry)
            assert stored is not None
            client.set(entry, stored[:28] + bytes(16) + stored[44:])
            world.cache.forget()
        assert "; hit" not in (await world.get())[1]


async def test_every_key_has_a_time_to_live(valkey_url: str) -> None:
    """Nothing that the cache writes can stay for ever."""
    async with running(valkey_url) as [world]:
        await world.get()
        await world.http.post("/value")
        await world.get()
        with redis.Redis.from_url(valkey_url) as client:
            lives = {key: client.pttl(key) for key in client.keys("*")}
        assert lives
        assert all(life > 0 for life in lives.values()), lives
