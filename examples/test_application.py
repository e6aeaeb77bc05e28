"""How to test an application together with its cache, on a Valkey that the tests start.

Run: pytest examples/test_application.py
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import httpx2
import pytest
from fastapi import FastAPI

from respcache import Cache, RedisStore, SingleTenant, cache_list, invalidate_cache
from respcache.testing.checker import check
from respcache.testing.history import Event, Read, Write, now
from respcache.testing.servers import EmbeddedValkey

pytestmark = pytest.mark.anyio


def make_application(cache: Cache) -> FastAPI:
    """Return the application under test: copies sold by title, a version that grows by one."""
    api = FastAPI()
    sold = {"Emma": 0}

    @api.get("/books")
    @cache_list("books")
    async def list_books() -> dict[str, int]:
        return dict(sold)

    @api.post("/books/{title}/sales")
    @invalidate_cache("books")
    async def sell(title: str) -> int:
        sold[title] += 1
        return sold[title]

    return api


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One server for all tests of the session."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
async def client(valkey: EmbeddedValkey) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the application, with a cache and data of its own."""
    cache = Cache(
        # a busy machine that runs tests needs more than the default deadline of 50 ms
        RedisStore(valkey.url, deadline_s=5.0),
        secret=b"only for tests, 16 bytes or more",
        resolver=SingleTenant(uuid4().hex),  # a tenant of its own, so no test needs to clean up
        strict_reads=True,
    )
    await cache.connect()
    transport = httpx2.ASGITransport(cache.wrap(make_application(cache)))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await cache.close()


async def test_the_second_read_is_a_hit(client: httpx2.AsyncClient) -> None:
    await client.get("/books")
    assert "; hit" in (await client.get("/books")).headers["cache-status"]


async def test_a_write_invalidates_the_list(client: httpx2.AsyncClient) -> None:
    await client.get("/books")
    await client.post("/books/Emma/sales")
    response = await client.get("/books")
    assert response.json() == {"Emma": 1}
    assert "; hit" not in response.headers["cache-status"]


async def test_no_read_is_stale(client: httpx2.AsyncClient) -> None:
    history: list[Event] = []

    async def keep_reading() -> None:
        for _ in range(50):
            start = now()
            response = await client.get("/books")
            how = response.headers["cache-status"].partition("; ")[2]
            values = {"Emma": response.json()["Emma"]}
            history.append(Read(start, now(), values, "reader", "books", "books", None, how))

    async def keep_selling() -> None:
        for _ in range(20):
            started = now()
            response = await client.post("/books/Emma/sales")
            history.append(Write("Emma", response.json(), started, None, now(), "writer"))
            await asyncio.sleep(0.001)

    await asyncio.gather(keep_reading(), keep_reading(), keep_selling())
    report = check(history, bound_s=0)
    assert report.ok, report
