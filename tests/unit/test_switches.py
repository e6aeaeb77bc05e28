"""Switches of everything, a tenant or a module: on every way of a hit, in every process, and never
of invalidations."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request, Response

from respcache import Cache, Claim, MemoryStore, RequestHead, Scope, cache_list
from respcache.stores.memory import MemoryServer

pytestmark = pytest.mark.anyio
SECRET = b"k" * 32
MODULES = ("things", "places")


class ByHeader:
    """The tenant is what a header says."""

    tables: tuple[str, ...] = ()
    stands_for = frozenset[Any]()
    headers = ("x-tenant",)

    def claim(self, head: RequestHead) -> Claim:
        """Believe it."""
        tenant = head.header("x-tenant") or ""
        return Claim(tenant, tenant)

    async def scope(self, claim: Claim) -> Scope:
        """Everybody sees all of their tenant."""
        return Scope(claim.owner_tenant, b"")

    def permits(self, scope: Scope, rule: Any) -> bool:
        """No rules."""
        return rule is None


class Process:
    """One process of an application with two modules, each cached at two levels."""

    def __init__(self, server: MemoryServer) -> None:
        self.cache = Cache(MemoryStore(server), secret=SECRET, resolver=ByHeader(), verify_share=0)
        self.version = 0
        app = FastAPI()
        for module in MODULES:
            for level in ("strict", "ttl"):
                app.get(f"/{module}/{level}")(
                    cache_list(module, level=level)(self._handler(module, level))
                )
        self.wrapped = self.cache.wrap(app)

    def _handler(self, module: str, level: str) -> Callable[..., Any]:
        async def answer(request: Request) -> Response:
            return Response(f"{self.version}")

        answer.__name__ = f"{module}_{level}"
        return answer

    async def get(self, path: str, tenant: str) -> str:
        """Ask; return what the cache said, in a word."""
        said = (await self.http.get(path, headers={"x-tenant": tenant})).headers["cache-status"]
        return "hit" if "; hit" in said else said.partition("detail=")[2] or "miss"

    async def value(self, tenant: str, module: str) -> str:
        """Take a value."""
        made = False

        async def make() -> int:
            nonlocal made
            made = True
            return 1

        await self.cache.get_or_set(tenant, module, {"key": 1}, make)
        return "made" if made else "hit"


@asynccontextmanager
async def processes(count: int) -> AsyncIterator[list[Process]]:
    server = MemoryServer()
    made = [Process(server) for _ in range(count)]
    for process in made:
        await process.cache.connect()
        transport = httpx2.ASGITransport(app=process.wrapped)
        process.http = httpx2.AsyncClient(transport=transport, base_url="http://test")
    yield made
    for process in made:
        await process.http.aclose()
        await process.cache.close()


async def warm(*made: Process) -> None:
    """Have everything stored, held, and recognised."""
    for process in made:
        for tenant in ("a", "b"):
            for module in MODULES:
                for level in ("strict", "ttl"):
                    for _ in range(3):
                        await process.get(f"/{module}/{level}", tenant)
                        await asyncio.sleep(0)
                await process.value(tenant, module)


@pytest.mark.parametrize("level", ["strict", "ttl"])
@pytest.mark.parametrize(
    ("switch", "off"),
    [
        ({"tenant_id": "a"}, {("a", "things"), ("a", "places")}),
        ({"module": "things"}, {("a", "things"), ("b", "things")}),
        ({}, {("a", "things"), ("b", "things"), ("a", "places"), ("b", "places")}),
    ],
    ids=["tenant", "module", "everything"],
)
async def test_what_is_off_is_bypassed_and_nothing_else(
    switch: dict[str, str], off: set[tuple[str, str]], level: str
) -> None:
    """From memory, which no round trip would tell, from the store, and of values; and it is back
    when it is on again."""
    async with processes(2) as (here, there):
        await warm(here, there)
        assert await here.cache.disable(**switch)
        await there.cache.runtime.switches.sync()
        for process in (here, there):
            for forgetful in (False, True):
                for tenant in ("a", "b"):
                    for module in MODULES:
                        if forgetful:
                            process.cache.forget()
                        is_off = (tenant, module) in off
                        assert await process.get(f"/{module}/{level}", tenant) == (
                            "off" if is_off else "hit"
                        )
                        assert await process.value(tenant, module) == ("made" if is_off else "hit")
        assert await here.cache.enable(**switch)
        await there.cache.runtime.switches.sync()
        for process in (here, there):
            assert [await process.get(f"/{module}/{level}", tenant) for tenant, module in off] == [
                "hit"
            ] * len(off)


async def test_bypasses_of_a_switch_are_counted_for_the_tenant() -> None:
    """Requests and values."""
    async with processes(1) as (here,):
        await here.cache.disable(tenant_id="a")
        await here.get("/things/strict", "a")
        await here.value("a", "things")
        assert here.cache.counters.of("a", "things").bypasses == {"off": 2}


@pytest.mark.parametrize(
    "switch", [{"tenant_id": "a"}, {"module": "things"}], ids=["tenant", "module"]
)
async def test_what_was_written_while_it_was_off_is_seen_when_it_is_on_again(
    switch: dict[str, str],
) -> None:
    """Invalidations are sent all the while."""
    async with processes(2) as (here, there):
        await warm(here, there)
        await here.cache.disable(**switch)
        here.version = there.version = 1
        assert await here.cache.invalidate_tenant_cache("a", "things")
        await here.cache.enable(**switch)
        for process in (here, there):
            answer = await process.http.get("/things/strict", headers={"x-tenant": "a"})
            assert answer.text == "1"


async def test_other_processes_notice_within_a_second_by_themselves() -> None:
    """Nobody tells them but the store."""
    async with processes(2) as (here, there):
        await warm(there)
        await here.cache.disable(tenant_id="a")
        async with asyncio.timeout(60):
            while await there.get("/things/strict", "a") != "off":
                await asyncio.sleep(0.01)
        assert await there.get("/things/strict", "b") == "hit"


async def test_a_process_that_starts_follows_at_once() -> None:
    """It looks before it answers anything."""
    async with processes(1) as (here,):
        await here.cache.disable(tenant_id="a")
        late = Process(here.cache.store.server)
        await late.cache.connect()
        assert late.cache.runtime.switches.off == {"tenant:a"}
        await late.cache.close()


async def test_decisions_made_while_the_store_is_away_are_told_later_and_each_by_itself() -> None:
    """They hold here at once, and undo nothing that others decided meanwhile."""
    async with processes(2) as (here, there):
        store = here.cache.store
        await here.cache.disable(tenant_id="a")
        await store.close()
        assert not await here.cache.enable(tenant_id="a")
        assert not await here.cache.disable(module="things")
        assert await there.cache.disable(tenant_id="b")
        assert here.cache.runtime.switches.off == {"module:things"}
        await store.connect()
        await here.cache.runtime.switches.sync()
        await there.cache.runtime.switches.sync()
        assert (
            here.cache.runtime.switches.off
            == there.cache.runtime.switches.off
            == {"module:things", "tenant:b"}
        )


@pytest.mark.parametrize(
    "switch",
    [{"tenant_id": "a b"}, {"module": "1"}, {"tenant_id": "a", "module": "things"}],
    ids=["tenant", "module", "both"],
)
async def test_a_switch_that_cannot_be_is_refused(switch: dict[str, str]) -> None:
    """With a ValueError or a ConfigurationError, before anything is changed."""
    async with processes(1) as (here,):
        with pytest.raises(Exception, match=r"tenant|module"):
            await here.cache.disable(**switch)
        assert here.cache.runtime.switches.off == frozenset()
