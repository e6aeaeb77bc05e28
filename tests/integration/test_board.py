"""The figures of all processes on a real Valkey: they add up, come and go with their processes, and
never get in the way."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import redis

from respcache import Cache, ConfigurationError, MemoryStore, RedisStore, SingleTenant
from respcache.core import keys
from respcache.ops.stats import publisher as module
from respcache.ops.stats import shapes
from respcache.ops.stats.publisher import StatsPublisher
from respcache.ops.stats.report import CHUNK, summary_of
from respcache.ops.stats.shapes import BUCKET_S
from respcache.read.verifier import Mismatch
from respcache.telemetry.stats import OTHER
from respcache.testing.servers import EmbeddedValkey, free_port

pytestmark = pytest.mark.anyio
SECRET = b"k" * 32


class Worker:
    """A cache with a board that publishes only when it is told to."""

    def __init__(self, url: str | None, **options: Any) -> None:
        self.publisher = StatsPublisher(url, **options)
        self.cache = Cache(
            MemoryStore(), secret=SECRET, resolver=SingleTenant("public"), publisher=self.publisher
        )

    def count(
        self,
        tenant: str | None,
        *,
        hits: int = 0,
        misses: int = 0,
        route: str = "/things",
        module: str = "things",
    ) -> None:
        """Have some requests."""
        counters = self.cache.counters.at(tenant, module, route)
        counters.hits += hits
        counters.misses += misses


class ClockOf:
    """The clocks of a process at another time of the day."""

    thread_time = staticmethod(time.thread_time)

    def __init__(self, at: float) -> None:
        self._at = at

    def time(self) -> float:
        """Return that time."""
        return self._at


@asynccontextmanager
async def workers(*urls: str | None, **options: Any) -> AsyncIterator[list[Worker]]:
    made = [Worker(url, **options) for url in urls]
    try:
        yield made
    finally:
        for worker in made:
            await worker.publisher.close()


@pytest.fixture
def client(valkey_url: str) -> Any:
    with redis.Redis.from_url(valkey_url) as made:
        yield made


# -- adding up -------------------------------------------------------------------------------------


async def test_figures_of_processes_add_up(valkey_url: str) -> None:
    """By process, route, module and tenant, whoever is asked: one of them, or who only reads."""
    reader = StatsPublisher(valkey_url)
    async with workers(valkey_url, valkey_url) as (one, two):
        one.count("acme", hits=5, misses=1)
        two.count("acme", hits=2, misses=1)
        two.count("globex", misses=3, route="/others", module="others")
        two.cache.counters.at("acme", "things").invalidations += 4
        two.cache.counters.at("acme", "things", "/things").times.misses.observe(0.2)
        for worker in (one, two):
            assert await worker.publisher.publish()
        for publisher in (one.publisher, two.publisher, reader):
            found = await publisher.fleet()
            assert (found.alone, found.problem) == (False, "")
            assert {process.id for process in found.processes} == {
                one.publisher.id,
                two.publisher.id,
            }
            assert (found.totals.hits, found.totals.misses, found.totals.invalidations) == (7, 5, 4)
            assert {route.route: route.totals.hits for route in found.routes} == {
                "/things": 7,
                "/others": 0,
            }
            assert {one.module: one.totals.misses for one in found.modules} == {
                "things": 2,
                "others": 3,
            }
            assert found.times.misses.count == 1
            assert found.server is not None
            assert (
                found.server.memory_bytes > 0,
                found.server.version > "",
                found.server.keys > 0,
            ) == (True, True, True)
            acme = await publisher.tenant("acme")
            assert (
                acme.totals.hits,
                acme.totals.misses,
                acme.totals.invalidations,
                acme.alone,
            ) == (7, 2, 4, False)
            points = (await publisher.series(2)).points
            assert len(points) == 12
            assert (sum(point.hits for point in points), sum(point.misses for point in points)) == (
                7,
                5,
            )
    await reader.close()


async def test_a_tenants_figures_are_found_by_whoever_asks_for_that_tenant(valkey_url: str) -> None:
    """And nobody else's with them."""
    async with workers(valkey_url, valkey_url) as (one, two):
        one.count("acme", hits=5)
        one.count("globex", hits=50, route="/secret", module="secrets")
        one.count(None, hits=500)
        await one.publisher.publish()
        acme = await two.publisher.tenant("acme")
        assert (acme.tenant, acme.totals.hits) == ("acme", 5)
        assert [(route.route, route.totals.hits, route.times) for route in acme.routes] == [
            ("/things", 5, None)
        ]
        assert [(found.module, found.totals.hits, found.times) for found in acme.modules] == [
            ("things", 5, None)
        ]
        nobody = await two.publisher.tenant("initech")
        assert (nobody.totals.requests, nobody.routes, nobody.modules) == (0, [], [])
        assert (await two.publisher.tenant(OTHER)).totals.hits == 500


async def test_tenants_come_in_the_order_that_is_asked_for(valkey_url: str) -> None:
    """A part of them, and how many there are."""
    async with workers(valkey_url, valkey_url) as (one, two):
        for number in range(60):
            one.count(f"t{number:02}", hits=number)
            two.count(f"t{number:02}", misses=60)
        for worker in (one, two):
            await worker.publisher.publish()
        found = await one.publisher.tenants(limit=2)
        assert ([row.tenant for row in found.tenants], found.count, found.alone) == (
            ["t59", "t58"],
            60,
            False,
        )
        assert [
            row.tenant
            for row in (await two.publisher.tenants(order="hit_ratio", offset=1, limit=2)).tenants
        ] == ["t58", "t57"]
        assert [
            row.tenant for row in (await two.publisher.tenants(order="tenant", limit=2)).tenants
        ] == ["t00", "t01"]


async def test_a_process_says_how_it_is(valkey_url: str) -> None:
    """Its memory, its breaker, its age, and what its audit has found."""
    finding = Mismatch(
        "2026-01-01",
        "stale",
        "acme",
        "things",
        "/things",
        "key",
        1,
        {"sequence": 1},
        {},
        {},
        "a",
        "b",
    )
    store = RedisStore(f"redis://127.0.0.1:{free_port()}")
    publisher, reader = StatsPublisher(valkey_url), StatsPublisher(valkey_url)
    cache = Cache(
        store,
        secret=SECRET,
        resolver=SingleTenant("public"),
        publisher=publisher,
        near_bytes=1_000_000,
    )
    assert cache.runtime.verifier is not None
    cache.runtime.verifier.found.mismatches.append(finding)
    await publisher.publish()
    found = await reader.fleet()
    (process,) = found.processes
    assert (process.id, process.available, process.enabled, process.near_limit_bytes) == (
        publisher.id,
        False,
        True,
        1_000_000,
    )
    assert process.commands == store.counters()
    assert 0 <= process.age_s < 30
    assert (process.lease, process.verifier is not None and process.verifier.stale) == (None, 0)
    assert found.findings == [finding]
    assert msgspec.json.decode(msgspec.json.encode(found))["totals"]["hits"] == 0
    await publisher.close()
    await reader.close()


# -- coming and going ------------------------------------------------------------------------------


async def test_a_process_that_ends_is_gone_at_once_and_one_that_died_after_30_seconds(
    valkey_url: str, client: Any
) -> None:
    """The time to live of its figures tells how long it has been silent."""
    async with workers(valkey_url) as (one,):
        two, dead = Worker(valkey_url), Worker(valkey_url)
        for worker in (one, two, dead):
            worker.count("acme", hits=1)
            await worker.publisher.publish()
        assert len((await one.publisher.fleet()).processes) == 3
        await two.publisher.close()
        assert {process.id for process in (await one.publisher.fleet()).processes} == {
            one.publisher.id,
            dead.publisher.id,
        }
        assert (
            client.exists(
                keys.counters_key(two.publisher.id),
                keys.tenants_key(two.publisher.id),
                keys.routes_key(two.publisher.id),
            )
            == 0
        )
        key = keys.counters_key(dead.publisher.id)
        client.pexpire(key, 31_000)  # as if it had been silent for 29 seconds
        found = {process.id: process.age_s for process in (await one.publisher.fleet()).processes}
        assert found[dead.publisher.id] == pytest.approx(29, abs=1)
        client.pexpire(key, 30_000)
        assert {process.id for process in (await one.publisher.fleet()).processes} == {
            one.publisher.id
        }
        assert (await one.publisher.tenant("acme")).totals.hits == 1
        assert [row.totals.hits for row in (await one.publisher.tenants()).tenants] == [1]
        client.delete(key)
        one.publisher.publications = module.PRUNE_EVERY
        await one.publisher.publish()
        assert {name.decode() for name in client.smembers(keys.PROCESSES_KEY)} == {one.publisher.id}
        await dead.publisher.publish()
        assert len((await one.publisher.fleet()).processes) == 2
        await dead.publisher.close()


async def test_figures_come_back_with_the_server(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """While it is away each process has its own, and says so; when it is back and empty, all of
    them are published again."""
    server = make_valkey()
    async with workers(server.url, server.url) as (one, two):
        for worker in (one, two):
            worker.count("acme", hits=5)
            worker.count("globex", hits=1)
            assert await worker.publisher.publish()
        server.kill()
        one.count("acme", hits=100)
        assert not await one.publisher.publish()
        found = await one.publisher.fleet()
        assert (found.alone, found.server, [process.id for process in found.processes]) == (
            True,
            None,
            [one.publisher.id],
        )
        assert server.url.rpartition("@")[2].partition("/")[0] in found.problem
        assert found.totals.hits == 106
        acme, tenants, series = (
            await one.publisher.tenant("acme"),
            await one.publisher.tenants(),
            await one.publisher.series(),
        )
        assert (acme.totals.hits, acme.alone, tenants.alone, series.alone) == (
            105,
            True,
            True,
            True,
        )
        assert [(row.tenant, row.totals.hits) for row in tenants.tenants] == [
            ("acme", 105),
            ("globex", 1),
        ]
        assert sum(point.hits for point in series.points) == 106
        server.start()
        for worker in (one, two):
            assert await worker.publisher.publish()
        found = await two.publisher.fleet()
        assert (found.alone, found.totals.hits, len(found.processes)) == (False, 112, 2)
        assert (await two.publisher.tenant("globex")).totals.hits == 2
        assert [row.totals.hits for row in (await two.publisher.tenants()).tenants] == [110, 2]
        assert sum(point.hits for point in (await two.publisher.series()).points) == 100, (
            "what the server had not been told"
        )


async def test_what_happens_during_an_outage_is_in_the_series_when_it_happened(
    make_valkey: Callable[..., EmbeddedValkey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all processes, once the server is back: no gap, and no peak after it. What was sent is not
    sent again."""
    server, began = make_valkey(), int(time.time())
    async with workers(server.url, server.url, deadline_s=0.1) as (one, two):
        one.count("acme", hits=5)
        assert await one.publisher.publish()
        server.freeze()
        for worker, ago_s, hits in ((one, 60, 10), (two, 120, 20)):
            with monkeypatch.context() as patch:
                patch.setattr(module, "time", ClockOf(began - ago_s))
                worker.count("acme", hits=hits)
                assert not await worker.publisher.publish()
        server.thaw()
        for worker in (one, two) * 2:
            assert await worker.publisher.publish()
        found = {
            point.at: point.hits for point in (await two.publisher.series()).points if point.hits
        }
        assert {
            ago_s: found.pop((began - ago_s) // BUCKET_S * BUCKET_S) for ago_s in (60, 120)
        } == {60: 10, 120: 20}
        assert list(found.values()) == [5]


async def test_while_the_server_is_away_figures_are_noted_as_often_as_ever(
    make_valkey: Callable[..., EmbeddedValkey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a busy process, or what happened would seem to have happened much later."""
    for name, value in {
        "PERIOD_S": 0.01,
        "MAX_PERIOD_S": 1000.0,
        "MAX_CPU_SHARE": 1e-6,
    }.items():
        monkeypatch.setattr(module, name, value)
    server = make_valkey()
    async with workers(server.url, deadline_s=0.05) as (one,):
        server.freeze()
        one.publisher.start()
        for number in range(3):
            one.count("acme", hits=1)
            async with asyncio.timeout(60):
                while sum(point.hits for point in (await one.publisher.series()).points) <= number:
                    sum(range(10_000))


async def test_a_frozen_server_holds_up_nobody_but_who_asks(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """For a deadline. Afterwards everything is as before."""
    server = make_valkey()
    async with workers(server.url, deadline_s=0.1) as (one,):
        one.count("acme", hits=1)
        waits = one.publisher.client.get_connection_kwargs()
        assert (waits["socket_timeout"], waits["socket_connect_timeout"]) == (0.1, 0.1)
        assert await one.publisher.publish()
        server.freeze()
        assert not await one.publisher.publish()
        assert one.publisher.problem
        assert (await one.publisher.fleet()).alone
        server.thaw()
        assert await one.publisher.publish()
        assert one.publisher.problem == ""
        assert not (await one.publisher.fleet()).alone


async def test_a_cache_publishes_by_itself_and_stops_when_it_is_closed(
    valkey_url: str, client: Any
) -> None:
    """Nothing to be called; nothing is left behind."""
    publisher = StatsPublisher(valkey_url)
    cache = Cache(
        MemoryStore(), secret=SECRET, resolver=SingleTenant("public"), publisher=publisher
    )
    cache.counters.at("acme", "things", "/things").hits += 3
    await cache.connect()
    while not client.exists(keys.counters_key(publisher.id)) or not client.exists(
        keys.routes_key(publisher.id)
    ):
        await asyncio.sleep(0.01)
    await cache.close()
    left = {key.decode() for key in client.scan_iter("respcache:*")}
    assert all(key.startswith("respcache:~series:") for key in left), left


async def test_a_cache_with_a_board_starts_and_ends_without_the_server() -> None:
    """And with a board that was given none."""
    for url in (f"redis://:secret@127.0.0.1:{free_port()}", None):
        publisher = StatsPublisher(url)
        cache = Cache(
            MemoryStore(), secret=SECRET, resolver=SingleTenant("public"), publisher=publisher
        )
        cache.counters.at("acme", "things", "/things").hits += 3
        await cache.connect()
        found = await publisher.fleet()
        assert (found.alone, found.totals.hits, (await publisher.tenants()).tenants[0].tenant) == (
            True,
            3,
            "acme",
        )
        assert "secret" not in f"{found.problem} {publisher!r}"
        assert found.problem
        await cache.close()


# -- what is sent ----------------------------------------------------------------------------------


async def test_only_tenants_that_changed_are_said_anew(valkey_url: str, client: Any) -> None:
    """Whatever of theirs it is that changed."""
    async with workers(valkey_url) as (one,):
        changes: dict[str, Callable[[Any], object]] = {
            "hit": lambda counters: setattr(counters, "hits", counters.hits + 1),
            "miss": lambda counters: setattr(counters, "misses", counters.misses + 1),
            "collapse": lambda counters: setattr(counters, "collapsed", counters.collapsed + 1),
            "store": lambda counters: counters.store(size_bytes=0, seconds=0.0),
            "bypass": lambda counters: counters.bypass("off"),
            "refusal": lambda counters: counters.refuse("vary"),
            "invalidation": lambda counters: setattr(
                counters, "invalidations", counters.invalidations + 1
            ),
        }
        for tenant in (*changes, "quiet"):
            one.count(tenant, hits=1, misses=1)
        await one.publisher.publish()
        there = [keys.tenants_key(one.publisher.id), keys.routes_key(one.publisher.id)]
        assert all(client.hlen(key) == len(changes) + 1 for key in there)
        for key in there:
            client.hdel(key, *changes, "quiet")
            client.hset(key, "keeps", "the key")
        for tenant, change in changes.items():
            change(one.cache.counters.at(tenant, "things", "/things"))
        await one.publisher.publish()
        for key in there:
            assert {name.decode() for name in client.hkeys(key)} == {*changes, "keeps"}


async def test_of_many_changed_tenants_those_that_wait_longest_come_first(
    valkey_url: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No publication says more than its bound, and nobody is left out for ever."""
    monkeypatch.setattr(module, "MAX_CHANGED", 40)
    async with workers(valkey_url) as (one,):
        said = set[bytes]()
        for turn in range(3):
            for number in range(100):
                one.count(f"t{number}", hits=1)
            client.delete(keys.tenants_key(one.publisher.id)) if turn == 0 else client.hset(
                keys.tenants_key(one.publisher.id), "x", "y"
            )
            await one.publisher.publish()
            now = set(client.hkeys(keys.tenants_key(one.publisher.id)))
            assert len(now - said - {b"x"}) in (40, 20)
            said |= now
        assert len(said - {b"x"}) == 100
        assert (await one.publisher.tenants()).count == 100


async def test_what_another_release_publishes_is_left_out(valkey_url: str, client: Any) -> None:
    """Or what is damaged; everybody else is still there."""
    async with workers(valkey_url, valkey_url) as (one, two):
        two.count("acme", hits=1)
        for data in (msgspec.msgpack.encode((shapes.VERSION + 1, {})), b"\xff", b""):
            await two.publisher.publish()
            client.set(keys.counters_key(two.publisher.id), data, ex=60)
            client.hset(keys.tenants_key(two.publisher.id), "acme", data)
            client.hset(keys.routes_key(two.publisher.id), "acme", data)
            one.count("acme", hits=1)
            await one.publisher.publish()
            found = await one.publisher.fleet()
            assert ([process.id for process in found.processes], found.alone) == (
                [one.publisher.id],
                False,
            )
            own = one.cache.counters.of("acme", "things").hits
            assert (await one.publisher.tenant("acme")).totals.hits == own
            assert [row.totals.hits for row in (await one.publisher.tenants()).tenants] == [own]


async def test_every_key_has_a_time_to_live(valkey_url: str, client: Any) -> None:
    """Whatever process is killed, at whatever moment."""
    async with workers(valkey_url) as (one,):
        one.count("acme", hits=1)
        await one.publisher.publish()
        found = {key.decode(): client.ttl(key) for key in client.scan_iter("*")}
        assert len(found) == 5
        assert all(0 < ttl <= (4200 if ":~series:" in key else 60) for key, ttl in found.items()), (
            found
        )


async def test_the_series_of_a_process_alone_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody can ask for any more is dropped."""
    async with workers(None) as (one,):
        start = time.time()
        for at in (start - 2 * module.SERIES_TTL_S, start):
            monkeypatch.setattr(module, "time", ClockOf(at))
            one.count("acme", hits=1)
            await one.publisher.publish()
        # private: what can no longer be asked for shows nowhere else
        assert list(one.publisher._own) == [int(start) // BUCKET_S]


def test_who_has_much_to_publish_publishes_less_often() -> None:
    """Yet often enough to be known to live."""
    # private: no test can choose how much CPU time a publication takes
    assert [module._pause_s(spent_s) for spent_s in (0.001, 0.05, 60.0)] == [2.0, 5.0, 10.0]
    assert module.MAX_PERIOD_S * 1.1 < module.DEAD_AFTER_S


async def test_the_process_is_left_its_time(valkey_url: str) -> None:
    """With many tenants the event loop gets its turn between two portions of them."""
    async with workers(valkey_url) as (one,):
        for number in range(1_000):
            one.count(f"t{number}", hits=1)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        running = asyncio.create_task(others())
        await summary_of(one.cache.counters)
        assert turns >= 1_000 / CHUNK
        turns = 0
        await one.publisher.publish()
        running.cancel()
        assert turns >= 2 * 1_000 / CHUNK
        assert (await one.publisher.tenants()).count == 1_000


# -- how it is set up ------------------------------------------------------------------------------


async def test_a_server_that_refuses_info_still_gives_figures(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """What a user may not ask is left out."""
    server = make_valkey()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command(
            "ACL", "SETUSER", "board", "on", ">word", "~respcache:*", "+@all", "-info"
        )
    place = server.url.rpartition("@")[2]
    async with workers(f"redis://board:word@{place}") as (one,):
        one.count("acme", hits=1)
        assert await one.publisher.publish()
        found = await one.publisher.fleet()
        assert (found.server, found.alone, found.totals.hits) == (None, False, 1)


async def test_a_server_that_refuses_everything_is_a_problem_and_no_more(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """A wrong password, a user without the keys."""
    server = make_valkey()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "other", "on", ">word", "~other:*", "+@all")
    place = server.url.rpartition("@")[2]
    for user in ("other:word", "other:wrong"):
        async with workers(f"redis://{user}@{place}") as (one,):
            one.count("acme", hits=1)
            assert not await one.publisher.publish()
            found = await one.publisher.fleet()
            assert (found.alone, found.totals.hits, bool(found.problem)) == (True, 1, True)
            assert "wrong" not in found.problem.replace("WRONGPASS", "")


async def test_a_board_is_set_up_with_care(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache each; an address that can be read; redis-py where it is needed; a time that is
    kept."""
    worker = Worker(None)
    with pytest.raises(ConfigurationError, match="one Cache"):
        Cache(
            MemoryStore(),
            secret=SECRET,
            resolver=SingleTenant("public"),
            publisher=worker.publisher,
        )
    with pytest.raises(ConfigurationError, match="redis://"):
        StatsPublisher("http://127.0.0.1")
    for minutes in (0, 61):
        with pytest.raises(ValueError, match="1 to 60"):
            await worker.publisher.series(minutes)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigurationError, match=r"respcache\[dashboard\]"):
        StatsPublisher("redis://127.0.0.1")
    StatsPublisher(None)


async def test_a_publication_that_swallows_its_cancellation_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ``asyncio.wait_for`` of Python 3.11 does when both happen in one tick: once, then it would
    go on for ever."""
    begun = asyncio.Event()

    async def publish(self: StatsPublisher) -> bool:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return True
        return False

    monkeypatch.setattr(StatsPublisher, "publish", publish)
    worker = Worker(None)
    worker.publisher.start()
    await begun.wait()
    async with asyncio.timeout(60):
        await worker.publisher.close()
