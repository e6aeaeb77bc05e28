"""The fault suite in short: seeded, with every kind of part broken once. ``make test-long`` runs a
minute with every fault, ``make faults`` as long as you like."""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from crm.app import create_app
from crm.settings import Settings
from respcache.testing.servers import EmbeddedPostgres
from respcache.testing.staleness import ViolationKind
from respcache.writes.postgres import PostgresOutbox

from ..conftest import END_OTHERS, administer
from . import ways
from .faults import FAULTS
from .proxy import Links, State
from .registers import KEPT_IN_S, SECRET, queries
from .results import add, summary
from .run import play
from .sabotage import SABOTAGES
from .stage import ROOT, Plan
from .worker import ALONE_S

pytestmark = pytest.mark.anyio
SHORT = (
    "store-restarted-old",
    "flushall",
    "generations-deleted",
    "clients-killed",
    "killed-after-commit",
    "killed-in-round",
    "store-link-cut",
    "store-link-black-hole",
    "database-link-cut",
    "postgres-stopped-at-once",
)


WAYS = ("hit", "hit below ASGI", "bounded hit", "bounded hit below ASGI", "ttl hit", "bypass")
MOST_RUNS = 5
"""Runs with one seed after the other, until what must happen has happened: one is enough unless the
machine is busy."""


def made(folder: Path) -> Path:
    """Make a folder, and return it."""
    folder.mkdir()
    return folder


async def keep_all_promises(folder: Path, *, seconds: float, kinds: Sequence[str]) -> None:
    """Run until hits of all kinds were served and faults happened; check every run."""
    state: dict[str, Any] = {}
    for seed in range(7, 7 + MOST_RUNS):
        result = await play(
            made(folder / str(seed)), seed=str(seed), seconds=seconds, kinds=kinds, hasty=True
        )
        print(f"\n{result.report}\n{dict(result.faults)}")
        assert result.aborted == ""
        assert result.report.violations == {}, result.report.excerpt()
        assert result.report.lost_invalidations == 0
        assert result.failed == []
        assert result.ok, (result.failures, result.alarms)
        add(state, result)
        hits = sum(count for way, count in state["how"].items() if "hit" in way)
        faults = sum(count > 0 for count in state["faults"].values())
        if set(WAYS) <= state["how"].keys() and hits > 200 and state["writes"] > 50 and faults > 4:
            break
    else:
        pytest.fail(f"too little happened in {MOST_RUNS} runs: {state}")
    assert f"{state['reads']:,} reads" in summary(state, command="")


async def test_no_promise_is_broken_while_parts_are(tmp_path: Path) -> None:
    """No stale read, no lost invalidation, no request failed that the database could have served;
    and the cache did serve."""
    await keep_all_promises(tmp_path, seconds=10.0, kinds=SHORT)


@pytest.mark.long
async def test_no_promise_is_broken_while_everything_else_is(tmp_path: Path) -> None:
    """The same for a minute, with every fault."""
    await keep_all_promises(tmp_path, seconds=60.0, kinds=tuple(FAULTS))


@pytest.mark.parametrize(
    ("rule", "writers", "seconds", "violated", "way"),
    [
        pytest.param("no-replay", 0, 5.0, ViolationKind.BOUND, "hit", marks=pytest.mark.long),
        ("no-certificate", 1, 5.0, ViolationKind.FRESHNESS, "hit"),
        pytest.param(
            *("no-view-below", 1, 5.0, ViolationKind.FRESHNESS, "hit below ASGI"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("no-bound", 4, 3 * ALONE_S, ViolationKind.FRESHNESS, "bounded hit"),
            marks=pytest.mark.long,
        ),
    ],
)
async def test_a_missing_rule_is_noticed(
    tmp_path: Path, rule: str, writers: int, seconds: float, violated: ViolationKind, way: str
) -> None:
    """Those for which no fault is needed: what psql writes is not seen within the lease; what was
    acknowledged is not seen."""
    plan = Plan(names=("server",), writers=writers, sabotage=rule)
    for seed in range(7, 7 + MOST_RUNS):
        result = await play(
            made(tmp_path / str(seed)), seed=str(seed), seconds=seconds, kinds=(), plan=plan
        )
        print(f"\n{result.report}")
        assert result.aborted == ""
        if violated in result.report.violations:
            break
    assert not result.ok
    assert violated in result.report.violations
    assert way in result.report.proofs[violated].violation.read.how


@pytest.mark.parametrize(
    "names", [("one", "two", "server"), ("one", "two", "three", "four", "server"), ("server",)]
)
def test_each_run_answers_hits_both_above_and_below_asgi(names: tuple[str, ...]) -> None:
    """Whatever its seed: of the workers one half each, the server now so, now so."""
    chosen = [Plan(names=names).below(str(seed)) for seed in range(20)]
    assert {len(below - {"server"}) for below in chosen} == {len(names) // 2}
    assert set().union(*chosen) == set(names)
    assert len(names) == 1 or any("server" not in below for below in chosen)


@pytest.mark.parametrize("names", [("one", "two", "server"), ("one", "two", "three", "server")])
def test_each_run_has_processes_that_are_told_of_bumps_and_others_that_are_not(
    names: tuple[str, ...],
) -> None:
    """Each of them is now so, now so: the bound holds without being told."""
    chosen = [Plan(names=names).deaf(str(seed)) for seed in range(20)]
    assert all(0 < len(deaf) < len(names) for deaf in chosen)
    assert set().union(*chosen) == set(names)
    assert set.intersection(*chosen) == set()


async def test_reads_are_judged_by_the_level_of_their_route(database_url: str) -> None:
    """A read that is spared something is one of a route that may be late, and the other way
    round."""
    settings = Settings(
        database_url=database_url, redis_cache_url="none", jwt_secret=SECRET, respcache_key=SECRET
    )
    table = ways.application(settings).prepare()
    for query in queries():
        path, headers = query.path.partition("?")[0], {ways.MADE_IN: b"0.5"}
        found = table.match({"method": "GET", "path": path, "root_path": ""})
        policy = None if found is None else found[0].policy
        if path == ways.VALUE:
            assert (policy, query.slack_s(headers)) == (None, ways.VALUE_TTL_S + 0.5 + KEPT_IN_S)
        else:
            assert policy is not None, path
            assert (policy.level, query.slack_s(headers)) == (
                query.level,
                policy.max_view_age_s(anonymous=False),
            ), path


def test_every_rule_that_can_be_taken_out_is_named_with_what_noticed_it() -> None:
    """The table in docs/proofs.md: those above are tests, the others are run by hand."""
    text = (ROOT / "docs" / "proofs.md").read_text()
    assert set(re.findall(r"^\| `(?:.* )?--sabotage ([a-z-]+)[ `]", text, re.MULTILINE)) == set(
        SABOTAGES
    )


async def test_connections_that_died_in_the_pool_fail_no_request(
    database_url: str, postgres_server: EmbeddedPostgres
) -> None:
    """The database is back before anybody has noticed that it was away: the first request after
    that is served."""
    app = create_app(
        Settings(
            database_url=database_url,
            redis_cache_url="none",
            jwt_secret=SECRET,
            respcache_key=SECRET,
        )
    )
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://faults") as http:
        await asyncio.gather(*(http.get("/api/system/health") for _ in range(5)))
        await asyncio.to_thread(administer, postgres_server, END_OTHERS, database="migrated")
        for _ in range(10):
            await asyncio.sleep(0)  # the loop reads that the sockets were closed
        assert (await http.get("/api/system/health")).status_code == 200
    await app.app.state.reading.dispose()


async def test_rounds_that_connect_first_leave_the_engine_usable(
    database_url: str, postgres_server: EmbeddedPostgres
) -> None:
    """They have a copy of its pool; over a slow link, requests arrive before the first connection
    is set up."""
    with Links() as links:
        link = links.add(postgres_server.port)
        link.set(State.DELAYED, delay_s=0.02)
        engine = create_async_engine(
            database_url.replace(f":{postgres_server.port}/", f":{link.port}/")
        )
        outbox = PostgresOutbox(engine, deadline_s=30.0)
        reading = engine.execution_options(isolation_level="AUTOCOMMIT")

        async def read() -> int:
            async with reading.connect() as connection:
                return int(await connection.scalar(text("SELECT 1")))

        async with asyncio.TaskGroup() as group:
            page = group.create_task(outbox.page(None))
            reads = []
            for _ in range(12):
                reads.append(group.create_task(read()))
                await asyncio.sleep(0.02)  # so that some come at each step of setting up
        assert page.result().cursor.snapshot
        assert [one.result() for one in reads] == [1] * 12
        await outbox.close()
        await engine.dispose()


def test_every_fault_says_what_happens() -> None:
    """The table of the summary is made of docstrings."""
    assert all(fault.what for fault in FAULTS.values())
