"""Protocols that are in use elsewhere give stale reads without any fault, and the checker finds
them. With -s it shows how."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import asyncpg
import pytest

from respcache.testing.checker import check
from respcache.testing.history import Recorder, load
from respcache.testing.servers import EmbeddedValkey
from respcache.testing.staleness import ViolationKind

from .rivals import (
    TABLE,
    Aiocache,
    CacheAside,
    Cashews,
    Database,
    Driver,
    Make,
    TimeWindow,
    Uncached,
    read_once,
    write_once,
)

# in the libraries
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
]
CONTROL_ROUNDS = 5


@pytest.fixture
async def databases(empty_database_url: str) -> AsyncIterator[list[Database]]:
    """The database as two processes see it."""
    url = empty_database_url.replace("+asyncpg", "")
    async with AsyncExitStack() as stack:
        pools = [
            await stack.enter_async_context(asyncpg.create_pool(url, min_size=4, max_size=10))
            for _ in range(2)
        ]
        await pools[0].execute(TABLE)
        yield [Database(pool, Random(number)) for number, pool in enumerate(pools)]


@pytest.fixture
async def drive(
    databases: list[Database], valkey_url: str, tmp_path: Path
) -> AsyncIterator[Callable[[Make], Driver]]:
    """Make two processes of a protocol, and their driver."""
    made: dict[str, Uncached] = {}

    def make(rival: Make) -> Driver:
        made.update(
            {
                f"process-{number}": rival(database, valkey_url)
                for number, database in enumerate(databases, 1)
            }
        )
        return Driver(made, tmp_path, Random(0))

    yield make
    for rival in made.values():
        await rival.close()


@pytest.mark.parametrize("rival", [CacheAside, TimeWindow, Cashews, Aiocache])
async def test_a_fill_that_a_write_overtakes_is_served_after_its_acknowledgement(
    drive: Callable[[Make], Driver], rival: Make
) -> None:
    """No fault is needed: a read sees the old state, a write commits, deletes and is acknowledged,
    and then the read stores."""
    report = await drive(rival).until_flagged()
    print(f"\n{rival.__name__}\n{report}")
    # the latter on a very slow machine
    assert report.violations.keys() in (
        {ViolationKind.FRESHNESS},
        {ViolationKind.FRESHNESS, ViolationKind.BOUND},
    )
    assert report.how["shared"] > 0
    assert "<-- I1" in report.excerpt(ViolationKind.FRESHNESS)


async def test_what_always_asks_the_database_is_not_flagged(
    drive: Callable[[Make], Driver],
) -> None:
    """The control: the same driver, clients and servers, and no cache."""
    driver = drive(Uncached)
    for _ in range(CONTROL_ROUNDS):
        report = await driver.round()
        assert report.ok, report.excerpt()
        assert report.reads > 100
        assert report.how.keys() == {"fill"}


@pytest.mark.parametrize("rival", [CacheAside, TimeWindow])
async def test_an_invalidation_during_an_outage_is_lost(
    databases: list[Database],
    make_valkey: Callable[..., EmbeddedValkey],
    tmp_path: Path,
    rival: Make,
) -> None:
    """The server does not answer while a write deletes; afterwards it still has the old state: one
    lost invalidation."""
    valkey, path = make_valkey(), tmp_path / "events"
    process = rival(databases[0], valkey.url)
    await databases[0].add(["t"])
    with Recorder(path) as recorder:
        await read_once(process, "process-1", "t", "list", recorder)
        valkey.freeze()
        await write_once(process, "process-1", "t", "1", recorder)
        valkey.thaw()
        await read_once(process, "process-1", "t", "list", recorder)
    await process.close()
    report = check(load([path]), bound_s=0.0)
    print(f"\n{rival.__name__}\n{report}")
    assert report.how == {"fill": 1, "shared": 1}
    assert report.violations == {ViolationKind.FRESHNESS: 1, ViolationKind.BOUND: 1}
    assert report.lost_invalidations == 1
