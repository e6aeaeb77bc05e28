"""Read your writes at level ``bounded``: two processes on one Valkey, of which the reader hears
nothing of the writer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest
import redis
from fastapi import FastAPI

from respcache import (
    Cache,
    Claim,
    Denied,
    RedisStore,
    RequestHead,
    Scope,
    cache_list,
    invalidate_cache,
)
from respcache.core.keys import generation_key
from respcache.resp.connection import Command
from respcache.testing.servers import EmbeddedValkey

pytestmark = pytest.mark.anyio
TENANT, OTHER = "red", "blue"
BOUND_S = 60.0
"""Longer than any test takes: a view ends for no other reason than those that are tested."""


class Tenants:
    """Everybody is of the tenant that they name."""

    tables: tuple[str, ...] = ()
    stands_for = frozenset[Any]()
    headers = ("x-tenant",)

    def claim(self, head: RequestHead) -> Claim:
        """Believe it."""
        name = head.header("x-tenant")
        if name not in (TENANT, OTHER):
            raise Denied("nobody")
        return Claim(name, name)

    async def scope(self, claim: Claim) -> Scope:
        """All rows of that tenant."""
        return Scope(str(claim.key), b"")

    def permits(self, scope: Scope, rule: Any) -> bool:
        """No rules."""
        return rule is None


class Process:
    """A process that shows and writes a number per tenant, which all processes share."""

    def __init__(self, url: str, numbers: dict[str, int]) -> None:
        self.url = url
        self.store = RedisStore(url, deadline_s=5.0)
        self.cache = Cache(self.store, secret=b"k" * 32, resolver=Tenants(), verify_share=0)
        app = FastAPI()

        @app.get("/number")
        @cache_list("numbers", level="bounded", bound_s=BOUND_S)
        async def number() -> dict[str, int]:
            return numbers

        @app.post("/number")
        @invalidate_cache("numbers")
        async def write(tenant: str) -> None:
            numbers[tenant] += 1

        transport = httpx2.ASGITransport(self.cache.wrap(app))
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://test")

    async def read(self, token: str | None = None, tenant: str = TENANT) -> tuple[int, str]:
        """Return the tenant's number and whether it came from the cache."""
        headers = {"x-tenant": tenant} | ({} if token is None else {"x-cache-token": token})
        answer = await self.http.get("/number", headers=headers)
        assert answer.status_code == 200
        return answer.json()[tenant], "hit" if "; hit" in answer.headers["cache-status"] else "miss"

    async def write(self, tenant: str = TENANT) -> str:
        """Write; return the token of the answer."""
        answer = await self.http.post(
            "/number", params={"tenant": tenant}, headers={"x-tenant": tenant}
        )
        assert (answer.status_code, "x-cache-invalidation" in answer.headers) == (200, False)
        token: str = answer.headers["x-cache-token"]
        return token

    async def hold(self, tenant: str = TENANT) -> None:
        """Have the answer, its plan and a view of the present in memory."""
        await self.read("validate", tenant)
        async with asyncio.timeout(20):
            while (await self.read(tenant=tenant))[1] != "hit" or self.cache.runtime.views.recent(
                generation_key(tenant), frozenset({"*", "M:numbers"}), since=0.0
            ) is None:
                await asyncio.sleep(0.01)

    def count(self) -> list[Command]:
        """Begin to note what is sent."""
        sent: list[Command] = []
        link = self.store._link  # private: what is sent is what is tested
        request = link.request

        def noted(*commands: Command) -> Any:
            sent.extend(commands)
            return request(*commands)

        link.request = noted  # type: ignore[method-assign]
        return sent


@pytest.fixture
async def two(make_valkey: Callable[..., EmbeddedValkey]) -> AsyncIterator[tuple[Process, Process]]:
    """A writer, and a reader that may not listen on any channel: the server refuses it."""
    valkey = make_valkey()
    with redis.Redis.from_url(valkey.url) as client:
        client.execute_command(
            "ACL", "SETUSER", "deaf", "on", ">pw", "~*", "+@all", "resetchannels"
        )
    numbers = {TENANT: 0, OTHER: 0}
    writer, reader = (
        Process(valkey.url, numbers),
        Process(f"redis://deaf:pw@127.0.0.1:{valkey.port}/0", numbers),
    )
    async with AsyncExitStack() as stack:
        for process in (writer, reader):
            await process.cache.connect()
            stack.push_async_callback(process.cache.close)
            stack.push_async_callback(process.http.aclose)
        yield writer, reader


async def test_a_client_sees_its_own_write_in_a_process_that_heard_nothing_of_it(
    two: tuple[Process, Process],
) -> None:
    """Without its token it is shown what was before, as the level allows; with it, never."""
    writer, reader = two
    await reader.hold()
    for version in range(1, 4):
        token = await writer.write()
        assert await reader.read() == (version - 1, "hit")
        assert await reader.read(token) == (version, "miss")
        await reader.hold()


async def test_a_token_costs_a_round_trip_until_a_view_has_reached_it(
    two: tuple[Process, Process],
) -> None:
    """From then on it may be sent for ever, whatever others write meanwhile."""
    writer, reader = two
    await reader.hold()
    token = await writer.write()
    await reader.read(token)
    await reader.hold()
    sent = reader.count()
    for _ in range(3):
        await writer.write()
        assert await reader.read(token) == (1, "hit")
    assert sent == []


@pytest.mark.parametrize(
    "token", ["validate", "garbage", "0123456789abcdef.0", f"{'9' * 18}.1", "x" * 60_000, ""]
)
async def test_whatever_a_client_sends_costs_one_view_at_most(
    two: tuple[Process, Process], token: str
) -> None:
    """It is no error, and never shows more than a request without it may be shown."""
    writer, reader = two
    for version in range(2):
        await reader.hold()
        sent = reader.count()
        assert await reader.read(token) == (version, "hit")
        assert [command[0] for command in sent] == ["HMGET"]
        await writer.write()
        assert await reader.read(token) == (version + 1, "miss")


async def test_the_token_of_another_tenant_proves_nothing(two: tuple[Process, Process]) -> None:
    """Its sequence is another generation's; whoever writes to both sends both, or the last, and
    sees both writes."""
    writer, reader = two
    for tenant in (TENANT, OTHER):
        await reader.hold(tenant)
    ours = await writer.write(TENANT)
    theirs = await writer.write(OTHER)
    assert ours != theirs
    assert await reader.read(theirs) == (1, "miss")
    assert await reader.read(f"{ours}, {theirs}", OTHER) == (1, "miss")


async def test_a_write_to_a_generation_that_was_lost_is_seen(
    two: tuple[Process, Process],
) -> None:
    """Nothing could be bumped, and the reader's view is of a life that has ended."""
    writer, reader = two
    await reader.hold()
    with redis.Redis.from_url(writer.url) as client:
        client.delete(generation_key(TENANT))
    token = await writer.write()
    assert token == "validate"
    assert await reader.read() == (0, "hit")
    assert await reader.read(token) == (1, "miss")
