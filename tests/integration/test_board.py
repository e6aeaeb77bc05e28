"""The figures of all processes on a real Valkey: they add up, come and go with their processes, and never get in the way."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from respcache import Cache, MemoryStore, SingleTenant
from respcache.ops.board import Board

pytestmark = pytest.mark.anyio
SECRET = b"k" * 32


@asynccontextmanager
async def process(url: str | None, **options: Any) -> AsyncIterator[Cache]:
    """Run a cache with a board that publishes only when it is told to."""
    board = Board(url, **options)
    cache = Cache(MemoryStore(), secret=SECRET, resolver=SingleTenant("public"), board=board)
    try:
        yield cache
    finally:
        await board.close()


def board_of(cache: Cache) -> Board:
    assert cache.board is not None
    return cache.board


def count(cache: Cache, tenant: str, *, hits: int = 0, misses: int = 0, route: str = "/things", module: str = "things") -> None:
    figures = cache.figures.at(tenant, module, route)
    figures.hits += hits
    figures.misses += misses


async def test_figures_of_processes_add_up(valkey_url: str) -> None:
    """By process, route, module and tenant, whoever of them is asked."""
    async with process(valkey_url) as one, process(valkey_url) as two:
        count(one, "acme", hits=5, misses=1)
        count(two, "acme", hits=2, misses=1)
        count(two, "globex", misses=3, route="/others", module="others")
        two.figures.at("acme", "things").invalidations += 4
        for cache in (one, two):
            assert await board_of(cache).publish()
        for cache in (one, two):
            fleet = await board_of(cache).fleet()
            assert (fleet.alone, fleet.problem) == (False, "")
            assert {found.id for found in fleet.processes} == {board_of(one).id, board_of(two).id}
            assert (fleet.totals.hits, fleet.totals.misses, fleet.totals.invalidations) == (7, 5, 4)
            assert {found.route: found.totals.hits for found in fleet.routes} == {"/things": 7, "/others": 0}
            assert {found.module: found.totals.misses for found in fleet.modules} == {"things": 2, "others": 3}
            assert fleet.server is not None
            assert fleet.server.memory_bytes > 0
            acme = await board_of(cache).tenant("acme")
            assert (acme.totals.hits, acme.totals.misses, acme.totals.invalidations) == (7, 2, 4)
            tenants = await board_of(cache).tenants()
            assert [(found.tenant, found.totals.requests) for found in tenants.tenants] == [("acme", 9), ("globex", 3)]
            points = (await board_of(cache).series(1)).points
            assert sum(point.hits for point in points) == 7
            assert len(points) == 6
