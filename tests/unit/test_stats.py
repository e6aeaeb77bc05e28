"""What is counted and timed: by tenant and route, within a bound, whichever way a request goes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from hypothesis import given
from hypothesis import strategies as st
from starlette.background import BackgroundTask

from respcache import Cache, MemoryStore, SingleTenant, cache_list
from respcache.core.errors import StoreError
from respcache.core.generations import GenerationView
from respcache.stores.base import Reading
from respcache.telemetry import stats as module
from respcache.telemetry.stats import (
    BOUNDS_S,
    OTHER,
    SAMPLED,
    Counters,
    Histogram,
    RouteCounters,
    RouteTimes,
)

SECRET = b"k" * 32


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return seconds."""
        return self.now


# -- histograms ------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 12), min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_in_the_bucket_of_the_real_one(taken: list[float], share: float) -> None:
    """As near as the buckets are; beyond the last bound, the bound."""
    histogram = Histogram()
    for seconds in taken:
        histogram.observe(seconds)
    rank = max(0, -int(-share * len(taken) // 1) - 1)
    real = sorted(taken)[rank]
    found = histogram.quantile(share)
    assert found is not None
    low = max((0.0, *(bound for bound in BOUNDS_S if bound < real)))
    high = min((BOUNDS_S[-1], *(bound for bound in BOUNDS_S if bound >= real)))
    assert min(low, BOUNDS_S[-1]) <= found <= max(high, low)
    assert histogram.count == len(taken)
    assert histogram.mean_s == pytest.approx(sum(taken) / len(taken))


def test_bounds_belong_to_their_bucket_and_nothing_is_lost_beyond_the_last() -> None:
    """As in Prometheus: less or equal."""
    histogram = Histogram()
    for seconds in (*BOUNDS_S, 0.0, 1e9):
        histogram.observe(seconds)
    assert histogram.counts == [2, *[1] * (len(BOUNDS_S) - 1), 1]
    assert (BOUNDS_S[0], BOUNDS_S[-1]) == (25e-6, 10.0)
    assert Histogram().quantile(0.5) is None
    assert Histogram().mean_s is None


# -- which counters there are ----------------------------------------------------------------------


def test_figures_are_kept_by_tenant_and_route_and_added_up_by_module() -> None:
    """Writes have no route and count for the module alone."""
    stats = Counters()
    stats.at("acme", "books", "/books").hits += 3
    stats.at("acme", "books", "/books/{id}").hits += 4
    stats.at("acme", "books").invalidations += 5
    stats.at("globex", "books", "/books").hits += 6
    stats.at(None, "books", "/books").bypass("denied")
    assert stats.at("acme", "books", "/books") is stats.at("acme", "books", "/books")
    assert {route: found.hits for route, (_, found) in stats.routes("acme").items()} == {
        "/books": 3,
        "/books/{id}": 4,
    }
    assert (stats.of("acme", "books").hits, stats.of("acme", "books").invalidations) == (7, 5)
    assert {route: found.hits for route, (_, found) in stats.routes().items()} == {
        "/books": 9,
        "/books/{id}": 4,
    }
    everything = stats.modules()["books"]
    assert (everything.hits, everything.invalidations, everything.bypasses) == (
        13,
        5,
        {"denied": 1},
    )
    assert stats.of(None, "books").bypassed == 1
    assert sorted(stats.tenants()) == ["acme", "globex", OTHER]


def test_beyond_the_bound_tenants_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, and those that were there before keep their own."""
    monkeypatch.setattr(module, "MAX_COUNTERS", 10)
    stats = Counters()
    for _ in range(2):
        for number in range(100):
            stats.at(f"t{number}", "books", f"/{number % 3}").hits += 1
    assert len(stats.counters()) <= 10 + 3
    assert stats.modules()["books"].hits == 200
    assert stats.of("t0", "books").hits == 2
    assert stats.of("t99", "books").hits == 0
    assert stats.of(None, "books").hits == 180


def test_what_belongs_to_no_tenant_is_in_no_tenants_figures() -> None:
    """No tenant can have its name."""
    from respcache.core.keys import check_tenant

    stats = Counters()
    stats.at(None, "books", "/books").bypass("denied")
    assert stats.of("other", "books").bypassed == 0
    with pytest.raises(ValueError, match="~other"):
        check_tenant(OTHER)


def test_one_hit_in_64_is_a_sample_however_few_each_tenant_has() -> None:
    """Of 6,400 tenants with one hit each about a hundred are sampled: not none, and not all."""
    stats = Counters()
    sampled = sum(
        stats.at(f"t{number}", "books", "/books").phase == 1 & module.SAMPLE_MASK
        for number in range(6400)
    )
    assert 40 < sampled < 200
    counters = RouteCounters("books", "/books", RouteTimes(), phase=17)
    assert (
        sum(hits & module.SAMPLE_MASK == counters.phase for hits in range(1, SAMPLED * 10 + 1))
        == 10
    )


# -- what a request counts -------------------------------------------------------------------------


class Slow(MemoryStore):
    """Answers every reading after so many seconds of the test's clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.takes_s = 0.0

    async def read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """Take a while."""
        self.clock.now += self.takes_s
        return await super().read(entry, wanted)

    def view(
        self,
        generation: str,
        tags: Sequence[str],
        done: Callable[[GenerationView | StoreError], None],
    ) -> None:
        """Take a while."""
        self.clock.now += self.takes_s
        super().view(generation, tags, done)


class World:
    """An application whose handler takes as long as the test says, by a clock of its own."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.takes_s = 0.0
        self.answer: Callable[[], Response] = lambda: JSONResponse(["a book"])
        self.entered, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()
        app = FastAPI()

        @app.get("/books/{shelf}")
        @cache_list("books", tables=["books"])
        async def books(shelf: str) -> Response:
            self.entered.set()
            await self.go.wait()
            self.clock.now += self.takes_s
            return self.answer()

        self.store = Slow(self.clock)
        self.cache = Cache(
            self.store,
            secret=SECRET,
            resolver=SingleTenant("acme"),
            clock=self.clock,
            verify_share=0,
            **options,
        )
        self.wrapped = self.cache.wrap(app)
        self.http: httpx2.AsyncClient

    @property
    def times(self) -> RouteTimes:
        return self.cache.counters.times("/books/{shelf}")

    @property
    def counters(self) -> RouteCounters:
        return self.cache.counters.at("acme", "books", "/books/{shelf}")

    async def get(self, shelf: str = "a") -> str:
        answer = await self.http.get(f"/books/{shelf}")
        await asyncio.sleep(0)
        return answer.headers.get("cache-status", "")


@asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    await world.cache.connect()
    transport = httpx2.ASGITransport(app=world.wrapped, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        world.http = http
        yield world
    await world.cache.close()


@pytest.mark.anyio
@pytest.mark.parametrize("near_bytes", [0, 2**20], ids=["from the store", "from memory"])
async def test_one_hit_in_64_is_timed_and_tells_what_was_saved(near_bytes: int) -> None:
    """Whichever way it comes. What was saved: 64 times what the fill had taken."""
    async with running(World(near_bytes=near_bytes)) as world:
        world.takes_s = 0.04
        await world.get()
        world.store.takes_s = 0.002
        for _ in range(3 * SAMPLED):
            assert "; hit" in await world.get()
    assert world.counters.hits == 3 * SAMPLED
    assert (world.times.hits.count, world.times.hits.seconds) == (3, pytest.approx(0.006))
    assert world.times.fill_s == pytest.approx(0.04)
    assert world.times.saved_s == pytest.approx(3 * SAMPLED * 0.04)
    said = world.cache.stats()["routes"]["/books/{shelf}"]
    assert (said["hits"], said["misses"]) == (3 * SAMPLED, 1)


@pytest.mark.anyio
async def test_every_miss_is_timed_to_the_head_of_its_answer() -> None:
    """The handler's time, not that of what it does when it has answered."""
    async with running(World()) as world:

        async def later() -> None:
            world.clock.now += 9

        world.answer = lambda: JSONResponse([], background=BackgroundTask(later))
        for number, seconds in enumerate((0.0, 0.2, 3.0)):
            world.takes_s = seconds
            await world.get(str(number))
        assert world.times.misses.count == 3
        assert world.times.misses.seconds == pytest.approx(3.2)
        world.answer = lambda: JSONResponse([], status_code=500)
        assert "detail=status" in await world.get("not stored")
        assert world.times.misses.count == 4
    stored = world.cache.stats()["routes"]["/books/{shelf}"]
    assert (stored["misses"], stored["stores"], stored["stores_refused"], stored["module"]) == (
        4,
        3,
        {"status": 1},
        "books",
    )
    assert stored["miss_p95_ms"] > 1000


@pytest.mark.anyio
async def test_waiting_for_the_fill_of_another_is_a_miss_that_is_timed() -> None:
    """Once for each who asked."""
    async with running(World()) as world:
        world.go.clear()
        callers = [asyncio.create_task(world.get()) for _ in range(5)]
        while world.counters.misses < 5:
            await asyncio.sleep(0)
        world.clock.now += 2
        world.go.set()
        said = [await caller for caller in callers]
    assert sum("collapsed" in one for one in said) == 4
    assert (world.times.misses.count, world.times.misses.seconds) == (5, pytest.approx(10.0))


@pytest.mark.anyio
async def test_a_miss_without_an_answer_is_counted_and_not_timed() -> None:
    """The handler raises: there is no time to its answer."""
    async with running(World()) as world:

        def fail() -> Response:
            raise asyncio.CancelledError

        world.answer = fail
        with pytest.raises(asyncio.CancelledError):
            await world.get()
    assert (world.counters.misses, world.times.misses.count) == (1, 0)


@pytest.mark.anyio
async def test_values_have_a_route_of_their_own() -> None:
    """Hits, misses and times under ``value:`` and the module."""
    async with running(World()) as world:

        async def make() -> int:
            world.clock.now += 1
            return 7

        def get() -> Awaitable[int]:
            return world.cache.get_or_set("acme", "plans", {"id": 1}, make)

        for _ in range(SAMPLED + 1):
            assert await get() == 7
    times, (name, totals) = (
        world.cache.counters.times("value:plans"),
        world.cache.counters.routes("acme")["value:plans"],
    )
    assert (name, totals.hits, totals.misses, totals.stores) == ("plans", SAMPLED, 1, 1)
    assert (times.hits.count, times.misses.count, times.misses.seconds) == (1, 1, 1.0)


@pytest.mark.anyio
async def test_a_bypass_counts_for_its_route() -> None:
    """Of the tenant, where it is known."""
    async with running(World()) as world:
        await world.cache.disable()
        await world.get()
    assert {name: found.bypasses for name, (_, found) in world.cache.counters.routes().items()} == {
        "/books/{shelf}": {"off": 1}
    }
