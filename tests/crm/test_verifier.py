"""The continuous audit of the running CRM, on a real PostgreSQL and a real Valkey: it finds what is
wrong, and nothing else."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from respcache.read import verifier as verifiers
from respcache.read.verifier import DEFAULT_SHARE, Verifier
from respcache.stores.base import Bumped

from .conftest import MODULES, NEW, SINGULAR, Crm

pytestmark = pytest.mark.anyio
FOUND_WITHIN = 150
"""Audits: at the default share, what is wrong must be found in so many of them, however long a busy
machine takes."""
RENAME = "UPDATE accounts SET name = $2 WHERE tenant_id = $1"
FORGET = "DELETE FROM respcache_outbox WHERE xid = pg_current_xact_id_if_assigned()"
READERS = ("ann", "abe", "gus", "max", "nora", "suzy")


@pytest.fixture
async def psql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that no cache knows of."""
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    yield connection
    await connection.close()


def audit_of(crm: Crm) -> Verifier:
    assert crm.cache.runtime.verifier is not None
    return crm.cache.runtime.verifier


@asynccontextmanager
async def endlessly(*steps: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
    """Repeat each of these while the block runs; what one of them raises ends the test."""

    async def repeat(step: Callable[[], Awaitable[Any]]) -> None:
        while True:
            await step()
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(repeat(step)) for step in steps]
    try:
        yield
        for task in tasks:
            assert not task.done(), task.exception()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def reader(
    crm: Crm, name: str, paths: Sequence[str], *, pause_s: float = 0.0
) -> Callable[[], Awaitable[Any]]:
    """Read as somebody, now this and now that."""

    async def read() -> None:
        answer = await crm.as_user(name).get(random.choice(paths))
        assert answer.status_code in (200, 404)
        await asyncio.sleep(pause_s)

    return read


def writer(
    crm: Crm, name: str, modules: Sequence[str], *, pause_s: float, keep: bool = False
) -> Callable[[], Awaitable[Any]]:
    """Write as somebody: make rows, and delete them again unless they are to be kept."""

    async def write() -> None:
        http, module = crm.as_user(name), random.choice(modules)
        made = await http.post(f"/api/{module}", json=NEW[module])
        assert made.status_code == 201
        await asyncio.sleep(pause_s)
        if keep:
            return
        row = made.json()["data"][SINGULAR[module]]
        await http.delete(f"/api/{module}/{row['id']}")
        await asyncio.sleep(pause_s)

    return write


async def shown(crm: Crm, name: str, text: str) -> str:
    """Return the accounts that somebody sees, once a text is among them."""
    async with asyncio.timeout(60):
        while text not in (seen := (await crm.as_user(name).get("/api/accounts")).text):
            await asyncio.sleep(0.05)
    return seen


async def found(crm: Crm) -> float:
    """Wait for a finding; return how long that took."""
    verifier, began = audit_of(crm), time.monotonic()
    most = verifier.found.verifications + FOUND_WITHIN
    while not verifier.found.mismatches and verifier.found.verifications < most:
        await asyncio.sleep(0.02)
    assert verifier.found.mismatches, (verifier.to_dict(), crm.cache.stats())
    return time.monotonic() - began


@pytest.mark.long
async def test_a_writer_that_takes_its_rows_out_of_the_outbox_is_found(
    crm: Crm, psql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """No hook, no round and no trigger can see it. At default settings, under load; and the users
    are helped."""
    acme = crm.tenants["acme"].id
    accounts = [crm.account("acme", f"Acorn {number}") for number in range(5)]
    await crm.save(*accounts)
    lists = [f"/api/{module}" for module in MODULES]
    paths = [
        *lists,
        *(f"/api/accounts/{account.id}" for account in accounts),
        "/api/reports/dashboard-bundle",
    ]
    busy = [
        *(reader(crm, name, paths) for name in READERS),
        writer(crm, "abe", ["tasks", "activities"], pause_s=0.1),
        writer(crm, "gus", MODULES, pause_s=0.1),
    ]
    assert audit_of(crm).share == DEFAULT_SHARE
    async with endlessly(*busy):
        await asyncio.sleep(2)
        assert audit_of(crm).found.stale == 0
        async with psql.transaction():
            await psql.execute(RENAME, acme, "Evaded")
            await psql.execute(FORGET)
        seconds = await found(crm)
        print(f"found after {seconds:.1f} s")
        finding = audit_of(crm).found.mismatches[0]
        assert (finding.kind, finding.tenant) == ("stale", str(acme))
        assert finding.certificate["nonce"] == finding.confirmed["nonce"]
        assert finding.certificate["sequence"] >= finding.confirmed["bumps"].get("T:accounts", 0)
        assert "the verifier found a stale response" in caplog.text
        for name in ("ann", "abe"):
            names = await shown(crm, name, "Evaded")
            assert "Acorn" not in names
    assert crm.cache.stats()["stale_served"] >= 1


async def test_a_library_whose_bumps_do_nothing_is_found(crm: Crm) -> None:
    """The writer's and the rounds' alike, while everybody writes. At default settings."""
    store, relay = crm.cache.store, crm.cache.runtime.relay
    assert store is not None
    assert relay is not None
    await crm.save(*(crm.account("acme", f"Acorn {number}") for number in range(5)))

    async def do_nothing(*_: Any, **__: Any) -> Bumped:
        return Bumped(relay.lease.server)

    busy = [
        *(reader(crm, name, ["/api/accounts", "/api/leads", "/api/tasks"]) for name in READERS),
        writer(crm, "abe", ["accounts", "tasks"], pause_s=0.05, keep=True),
        writer(crm, "gus", ["accounts", "leads"], pause_s=0.05, keep=True),
    ]
    async with endlessly(*busy):
        await asyncio.sleep(2)
        assert audit_of(crm).found.stale == 0
        store.bump = do_nothing  # type: ignore[method-assign]
        seconds = await found(crm)
    print(f"found after {seconds:.1f} s")
    assert audit_of(crm).found.mismatches[0].kind == "stale"


@pytest.mark.long
async def test_a_change_of_rows_seen_that_nobody_is_told_of_is_a_leak(
    crm: Crm, psql: asyncpg.Connection
) -> None:
    """He is moved to another team past everything, and still shown the rows of his former one."""
    await crm.save(crm.account("globex", "North's", assigned_to=crm.users["nora"].id))
    async with endlessly(reader(crm, "nils", ["/api/accounts"])):
        await asyncio.sleep(1)
        async with psql.transaction():
            await psql.execute(
                "UPDATE employees SET team_id = $2 WHERE id = $1",
                crm.users["nils"].id,
                crm.teams["south"].id,
            )
            await psql.execute(FORGET)
        seconds = await found(crm)
        finding = audit_of(crm).found.mismatches[0]
        assert (finding.kind, finding.found) == ("leak", "other rows")
        async with asyncio.timeout(60):
            while "North's" in (await crm.as_user("nils").get("/api/accounts")).text:
                await asyncio.sleep(0.05)
    print(f"found after {seconds:.1f} s")


async def test_after_a_round_what_was_committed_before_is_bumped(
    crm: Crm, psql: asyncpg.Connection
) -> None:
    """That is what a suspicion waits for."""
    assert crm.cache.runtime.relay is not None
    await crm.save(crm.account("acme", "Acorn"))
    abe = crm.as_user("abe")
    for _ in range(2):
        answer = await abe.get("/api/accounts")
    assert "; hit" in answer.headers["cache-status"]
    await psql.execute(RENAME, crm.tenants["acme"].id, "Oak")
    await crm.cache.runtime.relay.caught_up()
    answer = await abe.get("/api/accounts")
    assert "Oak" in answer.text
    assert "fwd=stale" in answer.headers["cache-status"]


@pytest.mark.long
async def test_there_are_no_false_alarms(
    crm: Crm, psql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody reads, writes and is moved between teams; psql writes too. As many verifiers as
    there can be, none finds a thing."""
    monkeypatch.setattr(verifiers, "LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(verifiers, "MOST_SHARE_OF_TIME", 0.999)
    verifier = audit_of(crm)
    await crm.save(
        *(
            crm.account(tenant, f"Acorn {number}")
            for tenant in ("acme", "globex")
            for number in range(3)
        )
    )

    async def verify_the_next_hit() -> None:
        verifier.countdown = 1

    async def move() -> None:
        team = random.choice([crm.teams["north"], crm.teams["south"]])
        await psql.execute(
            "UPDATE employees SET team_id = $2 WHERE id = $1", crm.users["nils"].id, team.id
        )
        await psql.execute(
            RENAME, crm.tenants[random.choice(["acme", "globex"])].id, f"Renamed {random.random()}"
        )
        await asyncio.sleep(0.3)

    paths = [
        "/api/accounts",
        "/api/leads",
        "/api/activities",
        "/api/reports/dashboard-bundle",
        "/api/opportunities/stats",
    ]
    busy = [
        *(reader(crm, name, paths, pause_s=0.05) for name in (*READERS, "nils")),
        *(
            writer(crm, name, ["accounts", "leads", "activities"], pause_s=0.05)
            for name in ("abe", "gus")
        ),
        move,
        verify_the_next_hit,
    ]
    async with endlessly(*busy), asyncio.timeout(300):
        while verifier.found.verifications < 100 or verifier.found.equal <= 20:
            await asyncio.sleep(0.1)
    counters = verifier.to_dict()
    assert counters["equal"] > 20
    assert counters["inconclusive"].keys() == {"overtaken"}
    assert (
        counters["mismatches"],
        counters["stale"],
        counters["leaks"],
        counters["nondeterministic"],
    ) == ([], 0, 0, 0)
    assert counters["excluded_routes"] == []
