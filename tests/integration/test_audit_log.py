"""The trail in a real database: rows are added and never changed, by nobody; and what cannot be
written down is not done."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from respcache import Cache, ConfigurationError, MemoryStore, SingleTenant
from respcache.core.errors import AuditLogUnavailable
from respcache.ops.access import Access, Role
from respcache.ops.admin import Admin
from respcache.ops.audit_log import (
    AUDIT_LOG,
    MAX_REMEMBERED,
    AuditEvent,
    AuditLog,
    LoggingAuditLog,
    create_audit_log,
    drop_audit_log,
)
from respcache.ops.postgres_audit_log import PostgresAuditLog
from respcache.testing.servers import EmbeddedPostgres

pytestmark = pytest.mark.anyio
ROOT = Access(name="root", role=Role.OPERATOR)
ROWS = f"SELECT string_agg({AUDIT_LOG}::text, ' ' ORDER BY id) FROM {AUDIT_LOG}"  # noqa: S608


def statements(*, schema: str = "public") -> list[str]:
    found: list[str] = []
    create_audit_log(found.append, schema=schema)
    return found


@pytest.fixture
async def psql(empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(empty_database_url.replace("+asyncpg", ""))
    for statement in statements():
        await connection.execute(statement)
    yield connection
    await connection.close()


@pytest.fixture
async def engine(empty_database_url: str) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(empty_database_url)
    yield made
    await made.dispose()


@pytest.fixture
async def kept(psql: asyncpg.Connection, engine: AsyncEngine) -> AsyncIterator[PostgresAuditLog]:
    made = PostgresAuditLog(engine)
    yield made
    await made.close()


def act(number: int, tenant: str | None = None) -> AuditEvent:
    return AuditEvent(
        action="purge",
        name=f"somebody {number}",
        role="operator",
        tenant=tenant,
        details={"number": number, "ü": ["'", None]},
    )


async def test_acts_come_back_as_they_were_with_number_and_time(kept: PostgresAuditLog) -> None:
    """The newest first."""
    for number in range(3):
        await kept.append(act(number))
    found = await kept.latest(tenant=None, limit=10, before=None)
    assert [one.details for one in found] == [act(number).details for number in (2, 1, 0)]
    assert [one.id for one in found] == sorted((one.id for one in found), reverse=True)
    assert all(one.at is not None and one.at.tzinfo is not None for one in found)
    assert (found[0].action, found[0].name, found[0].role, found[0].tenant) == (
        "purge",
        "somebody 2",
        "operator",
        None,
    )


@pytest.mark.parametrize("where", ["database", "log"])
async def test_a_part_of_the_trail(where: str, kept: PostgresAuditLog) -> None:
    """Of one tenant, so many, before an act: the same in the database and in the log."""
    audit_log: AuditLog = kept if where == "database" else LoggingAuditLog()
    for number in range(6):
        await audit_log.append(act(number, tenant=("acme", "globex", None)[number % 3]))
    everything = await audit_log.latest(tenant=None, limit=10, before=None)
    assert [one.details["number"] for one in everything] == [5, 4, 3, 2, 1, 0]
    assert [
        one.details["number"]
        for one in await audit_log.latest(tenant="acme", limit=10, before=None)
    ] == [3, 0]
    assert [
        one.details["number"]
        for one in await audit_log.latest(tenant=None, limit=2, before=everything[1].id)
    ] == [3, 2]
    assert [
        one.details["number"]
        for one in await audit_log.latest(tenant="globex", limit=1, before=everything[1].id)
    ] == [1]


@pytest.mark.parametrize("role", ["origin", "replica"])
@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE {AUDIT_LOG} SET name = 'nobody'",  # noqa: S608
        f"DELETE FROM {AUDIT_LOG}",  # noqa: S608
        f"DELETE FROM {AUDIT_LOG} WHERE id < 0",  # noqa: S608
        f"TRUNCATE {AUDIT_LOG}",
        f"TRUNCATE {AUDIT_LOG} RESTART IDENTITY CASCADE",
        f"INSERT INTO {AUDIT_LOG} (id, act, name, role, details) VALUES (1, 'x', 'x', 'x', '{{}}')",  # noqa: S608
        f"WITH gone AS (DELETE FROM {AUDIT_LOG} RETURNING *) "  # noqa: S608
        f"INSERT INTO {AUDIT_LOG} (act, name, role, details) "
        "SELECT act, 'nobody', role, details FROM gone",
    ],
)
async def test_what_is_written_stays_as_it_is(
    kept: PostgresAuditLog, psql: asyncpg.Connection, statement: str, role: str
) -> None:
    """Also for its owner, a superuser, and for a session in which ordinary triggers do not fire."""
    await kept.append(act(1))
    before = await psql.fetchval(ROWS)
    await psql.execute(f"SET session_replication_role = {role}")
    with pytest.raises(
        asyncpg.PostgresError,
        match=r"append only: (UPDATE|DELETE|TRUNCATE) is refused|non-DEFAULT value",
    ):
        await psql.execute(statement)
    assert await psql.fetchval(ROWS) == before


async def test_it_is_made_in_any_schema_and_goes_away_as_a_whole(
    psql: asyncpg.Connection, engine: AsyncEngine
) -> None:
    """Nothing of it is left."""
    await psql.execute("CREATE SCHEMA other")
    for statement in statements(schema="other"):
        await psql.execute(statement)
    kept = PostgresAuditLog(engine, schema="other")
    await kept.append(act(1))
    assert len(await kept.latest(tenant=None, limit=10, before=None)) == 1
    assert await psql.fetchval(ROWS) is None
    await kept.close()
    found: list[str] = []
    drop_audit_log(found.append, schema="other")
    for statement in found:
        await psql.execute(statement)
    left = (
        "SELECT count(*) FROM pg_class WHERE relname LIKE 'respcache%' AND relnamespace = "
        "'other'::regnamespace"
    )
    assert await psql.fetchval(left) == 0
    assert (
        await psql.fetchval(
            "SELECT count(*) FROM pg_proc WHERE pronamespace = 'other'::regnamespace"
        )
        == 0
    )
    with pytest.raises(ConfigurationError, match=r"a\.b"):
        PostgresAuditLog(engine, schema="a.b")


async def test_the_rights_in_the_reference_are_enough_and_change_nothing(
    psql: asyncpg.Connection, empty_database_url: str
) -> None:
    """INSERT and SELECT."""
    await psql.execute("DROP ROLE IF EXISTS trailer; CREATE ROLE trailer LOGIN PASSWORD 'trailer'")
    await psql.execute("GRANT USAGE ON SCHEMA public TO trailer")
    await psql.execute(f"GRANT INSERT, SELECT ON {AUDIT_LOG} TO trailer")
    url = empty_database_url.partition("@")
    engine = create_async_engine(f"postgresql+asyncpg://trailer:trailer@{url[2]}")
    kept = PostgresAuditLog(engine)
    await kept.append(act(1))
    assert len(await kept.latest(tenant=None, limit=10, before=None)) == 1
    await kept.close()
    await engine.dispose()
    await psql.execute("DROP OWNED BY trailer; DROP ROLE trailer")


async def test_a_table_that_is_locked_is_not_waited_for(
    psql: asyncpg.Connection, engine: AsyncEngine
) -> None:
    """Longer than the deadline, which is named."""
    kept = PostgresAuditLog(engine, deadline_s=0.2)
    await kept.latest(tenant=None, limit=1, before=None)
    async with psql.transaction():
        await psql.execute(f"LOCK TABLE {AUDIT_LOG}")
        with pytest.raises(
            AuditLogUnavailable, match=r"the audit log: the database did not answer within 0\.2 s"
        ):
            await kept.append(act(1))
    await kept.close()


async def test_the_log_keeps_a_bounded_number_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    """And writes all of them, one line of JSON each."""
    caplog.set_level("INFO", "respcache.audit_log")
    audit_log = LoggingAuditLog()
    for number in range(MAX_REMEMBERED + 5):
        await audit_log.append(act(number))
    assert len(await audit_log.latest(tenant=None, limit=10_000, before=None)) == MAX_REMEMBERED
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == MAX_REMEMBERED + 5
    assert '"name":"somebody 7"' in lines[7]


# -- what cannot be written down -------------------------------------------------------------------


async def acts_of(admin: Admin, key: str) -> list[Any]:
    """Try every act; return what each came to."""
    found = []
    for attempt in (
        admin.purge(ROOT, tenant="t"),
        admin.purge(ROOT, tenant="t", module="numbers"),
        admin.purge(ROOT, key=key),
        admin.switch(ROOT, off=True),
        admin.switch(ROOT, off=True, tenant="t"),
        admin.switch(ROOT, off=True, module="numbers"),
        admin.reveal(ROOT, key),
    ):
        try:
            found.append(type(await attempt))
        except AuditLogUnavailable as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("accident", ["stopped", "no table", "no right"])
async def test_an_act_that_cannot_be_trailed_is_not_done(tmp_path: Path, accident: str) -> None:
    """The database is away, or not migrated, or refuses."""
    server = EmbeddedPostgres(
        tmp_path / "postgres", password="only-for-tests", durable=False
    ).start()
    engine = create_async_engine(server.url("postgres"))
    cache = Cache(MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("t"), verify_share=0)
    made = 0

    async def make() -> int:
        nonlocal made
        made += 1
        return made

    try:
        connection = await asyncpg.connect(server.url("postgres").replace("+asyncpg", ""))
        if accident != "no table":
            for statement in statements():
                await connection.execute(statement)
        if accident == "no right":
            refuse = (
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE "
                "EXCEPTION 'no right'; END$$"
            )
            await connection.execute(refuse)
            await connection.execute(
                f"CREATE TRIGGER refuse BEFORE INSERT ON {AUDIT_LOG} EXECUTE FUNCTION refuse()"
            )
        await connection.close()
        audit_log = PostgresAuditLog(engine)
        admin = Admin(cache, audit_log=audit_log)
        await cache.connect()
        await cache.get_or_set("t", "numbers", {}, make)
        await cache.get_or_set("t", "numbers", {}, make)
        (facts,) = (await admin.keys(ROOT, tenant="t")).keys
        if accident == "stopped":
            server.stop()
        said = await acts_of(admin, facts.key)
        assert all(isinstance(one, str) and "audit log" in one for one in said), said
        assert cache.runtime.switches is not None
        assert cache.runtime.switches.off == frozenset()
        assert await cache.get_or_set("t", "numbers", {}, make) == 1
        assert [one.key for one in (await admin.keys(ROOT, tenant="t")).keys] == [facts.key]
        if accident != "no right":
            with pytest.raises(AuditLogUnavailable):
                await admin.audit_log(ROOT)
        await cache.close()
        await audit_log.close()
    finally:
        await engine.dispose()
        server.remove()
