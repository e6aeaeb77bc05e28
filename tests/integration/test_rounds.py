"""Outbox, rounds and fence on a real PostgreSQL and a real Valkey: no invalidation is lost, and no read is old meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import httpx2
import pytest
import redis
from fastapi import FastAPI
from sqlalchemy import String, text, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from crm.embedded import EmbeddedValkey
from respcache import Cache, RedisStore, SingleTenant, cache_list
from respcache.core.errors import OutboxError
from respcache.core.fence import DRIFT, MAX_ROWS
from respcache.core.keys import EPOCH_KEY, generation_key
from respcache.writes import triggers
from respcache.writes.postgres import PostgresOutbox
from respcache.writes.rounds import Rounds, boottime
from respcache.writes.sqlalchemy import watch

pytestmark = pytest.mark.anyio
TENANT = "public"
READ = f"SELECT name FROM things WHERE tenant_id = '{TENANT}' ORDER BY id"
RENAME = "UPDATE things SET name = 'new'"


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(20), default=TENANT)
    name: Mapped[str] = mapped_column(default="old")


class Process:
    """One process of an application: its engine, its cache, its rounds."""

    def __init__(self, database_url: str, valkey_url: str, *, lease_s: float = 2.0, retention_s: float = 600.0) -> None:
        self.engine = create_async_engine(database_url)
        self.outbox = PostgresOutbox(self.engine, lease_s=lease_s, retention_s=retention_s)
        self.store = RedisStore(valkey_url, deadline_s=0.5)
        self.cache = Cache(self.store, secret=b"k" * 32, resolver=SingleTenant(TENANT), outbox=self.outbox)
        self.watching = watch(self.engine, self.cache, metadata=Base.metadata)
        app = FastAPI()

        @app.get("/things")
        @cache_list("things", tables=["things"])
        async def list_things() -> list[str]:
            async with AsyncSession(self.engine) as session:
                return list(await session.scalars(text(READ).execution_options(respcache_reads=("things",))))

        @app.post("/rename")
        async def rename(to: str) -> str:
            async with AsyncSession(self.engine) as session, session.begin():
                await session.execute(update(Thing).values(name=to))
            return "done"

        @app.post("/run")
        async def run(sql: str, autocommit: bool = False) -> str:
            engine = self.engine.execution_options(isolation_level="AUTOCOMMIT") if autocommit else self.engine
            async with engine.connect() as connection:
                await connection.execute(text(sql))
                await connection.commit()
            return "done"

        self.app = self.cache.wrap(app)
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    @property
    def rounds(self) -> Rounds:
        assert self.cache.rounds is not None
        return self.cache.rounds

    async def names(self) -> list[str]:
        names: list[str] = (await self.http.get("/things")).json()
        return names

    async def said(self) -> str:
        """Return what an answer says of the cache."""
        return (await self.http.get("/things")).headers["cache-status"]

    async def warm(self) -> None:
        """Wait until the cache serves."""
        await until(lambda: self._is("; hit"))

    async def cold(self, why: str) -> None:
        """Wait until it does not, for this reason."""
        await until(lambda: self._is(f"fwd=bypass; detail={why}"))

    async def stop_rounds(self) -> None:
        """Leave everything to the writers from here on; the fence is still alive."""
        assert self.rounds._running is not None
        self.rounds._running.cancel()

    async def _is(self, what: str) -> bool:
        return what in await self.said()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(*processes: Process) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for process in processes:
            stack.push_async_callback(process.engine.dispose)
            await process.cache.connect()
            stack.push_async_callback(process.cache.close)
            process.app.prepare()
        yield
        for process in processes:
            process.watching.close()
            await process.http.aclose()


@pytest.fixture
async def psql(empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that no cache knows of, to a database with rows, outbox and triggers."""
    connection = await asyncpg.connect(empty_database_url.replace("+asyncpg", ""))
    await connection.execute("CREATE TABLE things (id int PRIMARY KEY, tenant_id text NOT NULL, name text NOT NULL)")
    await connection.execute(f"INSERT INTO things VALUES (1, '{TENANT}', 'old'), (2, '{TENANT}', 'old'), (9, 'other', 'old')")
    statements: list[str] = []
    triggers.create_outbox(statements.append)
    triggers.create_triggers(statements.append, [triggers.Watched("things")])
    for statement in statements:
        await connection.execute(statement)
    yield connection
    await connection.close()


@pytest.fixture
async def one(psql: asyncpg.Connection, empty_database_url: str, valkey_url: str) -> AsyncIterator[Process]:
    """One process whose cache serves."""
    process = Process(empty_database_url, valkey_url)
    async with running(process):
        await process.warm()
        yield process


# -- writes that nobody tells of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        RENAME,
        "WITH changed AS (UPDATE things SET name = 'new' RETURNING 1) SELECT count(*) FROM changed",
        "MERGE INTO things USING (VALUES (1)) AS v (id) ON things.id = v.id WHEN MATCHED THEN UPDATE SET name = 'new'",
        "DO $$ BEGIN UPDATE things SET name = 'new'; END $$",
    ],
)
async def test_a_write_by_psql_is_never_missed_for_longer_than_a_lease(
    one: Process, psql: asyncpg.Connection, write: str
) -> None:
    """No hook sees it: its row in the outbox does, and a read that begins a lease later shows it."""
    await psql.execute(write)
    committed = time.monotonic()
    async with asyncio.timeout(30):
        while (began := time.monotonic()) < committed + one.outbox.lease_s * DRIFT:
            if (await one.names())[0] == "new":
                break
    assert began < committed + one.outbox.lease_s * DRIFT or (await one.names())[0] == "new"
    await one.warm()
    assert (await one.names())[0] == "new"


async def test_copy_by_another_service_is_seen(one: Process, psql: asyncpg.Connection) -> None:
    """It is a statement like any other to a trigger."""
    await psql.copy_records_to_table("things", records=[(3, TENANT, "copied")])
    await one.rounds.safe(one.rounds.clock())
    assert await one.names() == ["old", "old", "copied"]


async def test_truncate_makes_everything_invalid(one: Process, psql: asyncpg.Connection) -> None:
    """Nobody knows whose rows there were: a new epoch."""
    before = one.rounds.epochs
    await psql.execute("TRUNCATE things")
    await one.rounds.safe(one.rounds.clock())
    assert await one.names() == []
    assert one.rounds.epochs == before + 1
    await one.warm()


async def test_a_transaction_that_commits_after_a_younger_one_is_not_missed(one: Process, psql: asyncpg.Connection) -> None:
    """The older one has the smaller number and is invisible to the snapshot that saw the younger one."""
    url = one.engine.url.render_as_string(hide_password=False).replace("+asyncpg", "")
    other = await asyncpg.connect(url)
    try:
        older = other.transaction()
        await older.start()
        await other.execute("UPDATE things SET name = 'older' WHERE id = 1")
        await psql.execute("UPDATE things SET name = 'younger' WHERE id = 2")
        await one.rounds.safe(one.rounds.clock())
        assert await one.names() == ["old", "younger"]
        await one.warm()
        await older.commit()
        await one.rounds.safe(one.rounds.clock())
        assert await one.names() == ["older", "younger"]
    finally:
        await other.close()


# -- writes of the application -------------------------------------------------------------------------------------------


async def test_a_writer_bumps_the_rows_that_its_transaction_left(one: Process) -> None:
    """It reads them back before its COMMIT; no round is needed, nobody waits, no tenant has to be declared."""
    await one.stop_rounds()
    answer = await one.http.post("/rename", params={"to": "new"})
    assert (answer.status_code, "x-cache-invalidation" in answer.headers) == (200, False)
    assert one.cache.figures.acknowledgements_delayed == 0
    assert one.rounds.alive, "the fence ended before the test did"
    assert await one.names() == ["new", "new"]
    assert one.cache.figures.of(TENANT, "things").invalidations == 1


@pytest.mark.parametrize("autocommit", [False, True])
async def test_text_that_nobody_understands_needs_no_declaration(one: Process, autocommit: bool) -> None:
    """The database says what it changed; in AUTOCOMMIT, where there is no moment to ask, a round finds out."""
    one.rounds._adopted_at = float("-inf")  # no other process has lived in an epoch before this one
    sql = "DO $$ BEGIN EXECUTE 'UPDATE things SET name = ''new'''; END $$"
    answer = await one.http.post("/run", params={"sql": sql, "autocommit": autocommit})
    assert (answer.status_code, "x-cache-invalidation" in answer.headers) == (200, False)
    assert await one.names() == ["new", "new"]


async def test_a_transaction_that_changed_nothing_delays_nobody(one: Process) -> None:
    """An UPDATE without rows leaves none in the outbox either."""
    answer = await one.http.post("/run", params={"sql": "UPDATE things SET name = 'new' WHERE id = 999"})
    assert answer.status_code == 200
    assert one.cache.figures.acknowledgements_delayed == 0
    assert "; hit" in await one.said()


async def test_a_commit_that_raised_after_it_was_carried_out_is_found_by_a_round(one: Process) -> None:
    """Its outcome is unknown to the application, which answers 500; the row is there."""
    dialect = one.engine.sync_engine.dialect
    commit = dialect.do_commit

    def commit_and_break(connection: Any) -> None:
        commit(connection)
        raise ConnectionError("cut off after the COMMIT")

    dialect.do_commit = commit_and_break  # type: ignore[method-assign]
    try:
        assert (await one.http.post("/rename", params={"to": "new"})).status_code == 500
    finally:
        dialect.do_commit = commit  # type: ignore[method-assign]
    assert await one.names() == ["new", "new"]


async def test_many_processes_bump_a_row_once(psql: asyncpg.Connection, empty_database_url: str, valkey_url: str) -> None:
    """The generation remembers the rows that it was told of, so that what was read anew meanwhile stays valid."""
    processes = [Process(empty_database_url, valkey_url) for _ in range(3)]
    async with running(*processes):
        await processes[0].warm()
        await psql.execute(RENAME)
        for process in processes:
            await process.rounds.safe(process.rounds.clock())
        with redis.Redis.from_url(valkey_url) as client:
            assert client.hget(generation_key(TENANT), "s") == b"1"


async def test_another_tenants_write_invalidates_nothing(one: Process, psql: asyncpg.Connection) -> None:
    """The row names its tenant."""
    await psql.execute("UPDATE things SET name = 'new' WHERE tenant_id = 'other'")
    await one.rounds.safe(one.rounds.clock())
    assert "; hit" in await one.said()


async def test_a_round_in_a_new_epoch_does_not_vouch_for_the_fences_of_the_former_one(one: Process) -> None:
    """It bumped nothing that is older than the epoch; another process may still serve in the epoch before."""
    one.rounds._adopted_at = one.rounds.clock()
    answer = await one.http.post("/run", params={"sql": RENAME, "autocommit": True})
    assert answer.headers["x-cache-invalidation"] == "pending; safe"


# -- the store is away ---------------------------------------------------------------------------------------------------


async def test_a_write_during_an_outage_is_answered_when_no_fence_is_alive(
    psql: asyncpg.Connection, empty_database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """At its onset the answer waits and says so; the other process, which still has the server, shows the write."""
    valkey = make_valkey()
    writer, reader = (Process(empty_database_url, valkey.url, lease_s=0.6) for _ in range(2))
    async with running(writer, reader):
        await writer.warm()
        await reader.warm()
        await writer.store.close()  # a partition: this process alone has lost the server
        answer = await writer.http.post("/rename", params={"to": "new"})
        assert (answer.status_code, answer.headers["x-cache-invalidation"]) == (200, "pending; safe")
        assert await reader.names() == ["new", "new"]
        await reader.warm()
        assert await reader.names() == ["new", "new"]
        assert await writer.said() == "respcache; fwd=bypass; detail=fence"


async def test_in_a_long_outage_writes_do_not_wait(
    psql: asyncpg.Connection, empty_database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Nobody renews ``until``; when it has passed there is nothing to wait for, however long a lease is."""
    valkey = make_valkey()
    process = Process(empty_database_url, valkey.url, lease_s=3600)
    async with running(process):
        await process.warm()
        valkey.kill()
        await until(lambda: asyncio.sleep(0, not process.store.available))
        waiting = asyncio.create_task(process.http.post("/rename", params={"to": "first"}))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done, "it did not wait for the fences that are alive"
        waiting.cancel()
        await psql.execute(f"UPDATE {triggers.FENCE} SET until = clock_timestamp()")
        answer = await process.http.post("/rename", params={"to": "new"})
        assert (answer.status_code, answer.headers["x-cache-invalidation"]) == (200, "pending; safe")


async def test_what_was_written_in_an_outage_is_bumped_before_anything_is_served(
    psql: asyncpg.Connection, empty_database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """The frozen server comes back with all it had: its old entries are valid again for nobody."""
    valkey = make_valkey()
    process = Process(empty_database_url, valkey.url, lease_s=0.6)
    async with running(process):
        await process.warm()
        valkey.freeze()
        answer = await process.http.post("/rename", params={"to": "new"})
        assert answer.headers["x-cache-invalidation"] == "pending; safe"
        assert process.cache.stats()["fence"]["problem"]
        await until(lambda: asyncio.sleep(0, process.rounds.pending_rows > 0))
        assert process.rounds.pending_s > 0
        valkey.thaw()
        while "; hit" not in await process.said():
            assert await process.names() == ["new", "new"]
        assert await process.names() == ["new", "new"]
        assert process.rounds.pending_rows == 0


async def test_an_invalidation_by_hand_survives_outage_and_process(
    psql: asyncpg.Connection, empty_database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """It leaves a row, which the next process finds."""
    valkey = make_valkey()
    first, second = (Process(empty_database_url, valkey.url, lease_s=0.6) for _ in range(2))
    async with running(first):
        await first.warm()
        await first.store.close()
        assert await first.cache.invalidate_tenant_cache(TENANT, "things") is False
    async with running(second):
        await until(lambda: asyncio.sleep(0, second.rounds.alive))
        assert "; hit" not in await second.said()


# -- the fence ------------------------------------------------------------------------------------------------------------


async def test_without_rounds_nothing_is_served_after_a_lease(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """The database does not answer the rounds: the fence ends by itself, and comes back with them."""
    process = Process(empty_database_url, valkey_url, lease_s=0.6)
    async with running(process):
        await process.warm()
        lock = psql.transaction()
        await lock.start()
        await psql.execute(f"LOCK TABLE {triggers.FENCE} IN ACCESS EXCLUSIVE MODE")
        await process.cold("fence")
        await lock.rollback()
        await process.warm()


def interpose(one: Process, where: str, then: Callable[[], Awaitable[None]]) -> None:
    """Have something happen between the answer of the store and whoever asked it, for an entry there or a view for one here."""
    read, view, tasks = one.store.read, one.store.view, []

    async def slow_read(*given: Any) -> Any:
        reading = await read(*given)
        await then()
        return reading

    def slow_view(generation: str, tags: Any, done: Callable[[Any], None]) -> None:
        async def late(result: Any) -> None:
            await then()
            done(result)

        view(generation, tags, lambda result: tasks.append(asyncio.create_task(late(result))))

    if where == "store":
        one.cache.forget()
        one.store.read = slow_read  # type: ignore[method-assign]
    else:
        one.store.view = slow_view  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["store", "memory"])
async def test_a_fence_that_ends_while_the_store_is_asked_does_not_serve(one: Process, where: str) -> None:
    """What counts is the fence held before, at the moment of the reply."""
    one.rounds.fence = type(one.rounds.fence)(one.rounds.fence.server, one.rounds.clock() + 3600)
    await one.stop_rounds()
    late = 0.0
    one.rounds.clock = one.cache.clock = one.cache._lookup._clock = lambda: boottime() + late

    async def end() -> None:
        nonlocal late
        late = 1e9

    interpose(one, where, end)
    assert await one.said() == "respcache; fwd=bypass; detail=fence"


@pytest.mark.parametrize("where", ["store", "memory"])
async def test_a_fence_granted_while_the_store_is_asked_does_not_count(one: Process, where: str) -> None:
    """It knows of writes that the reply does not."""
    await one.stop_rounds()
    granted = one.rounds.fence
    one.rounds.fence = type(granted)(granted.server, one.rounds.clock() + 0.2)

    async def grant() -> None:
        while one.rounds.alive:
            await asyncio.sleep(0.01)
        one.rounds.fence = type(granted)(granted.server, one.rounds.clock() + 3600)

    interpose(one, where, grant)
    if where == "store":
        assert await one.said() == "respcache; fwd=bypass; detail=fence"
    else:
        (plan,) = (slot.value for slot in one.app.memo._plans._slots.values())
        assert await one.cache.hit(plan.aim) is None
        assert await one.cache.hit(plan.aim) is not None


async def test_only_the_authority_is_served(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Two servers answer, as in a split brain: the second is served when no fence of the first is alive, the first no more."""
    first = Process(empty_database_url, valkey_url, lease_s=0.6)
    second = Process(empty_database_url, make_valkey().url, lease_s=0.6)
    async with running(first):
        await first.warm()
        async with running(second):
            assert await second.said() == "respcache; fwd=bypass; detail=fence"
            await second.warm()
            assert await first.said() == "respcache; fwd=bypass; detail=fence"
            answer = await first.http.post("/rename", params={"to": "new"})
            assert answer.status_code == 200
            assert await second.names() == ["new", "new"]
            assert first.rounds.problem == "another server has become the authority"


async def test_a_claim_is_effective_when_the_fences_of_the_former_authority_have_ended(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """Not before ``until``; and only the authority moves ``until``, once it is effective."""
    outbox = PostgresOutbox(create_async_engine(empty_database_url), lease_s=100)
    await outbox.claim("a", instead_of=None)
    page = await outbox.page(None)
    assert (page.authority, page.effective, page.recorded) == ("a", True, False)
    await outbox.record("a")
    assert (await outbox.page(None)).recorded
    assert 190 < await outbox.remaining_s() <= 200
    await outbox.claim("b", instead_of="x")
    assert (await outbox.page(None)).authority == "a"
    await outbox.claim("b", instead_of="a")
    page = await outbox.page(None)
    assert (page.authority, page.effective) == ("b", False)
    before = await outbox.remaining_s()
    for identity in ("a", "b"):
        await outbox.record(identity)
    assert await outbox.remaining_s() <= before
    await outbox.close()


# -- epochs ---------------------------------------------------------------------------------------------------------------


async def test_a_second_process_joins_the_epoch(one: Process, empty_database_url: str, valkey_url: str) -> None:
    """It begins where the record's cursor stands, and what is cached stays valid."""
    second = Process(empty_database_url, valkey_url)
    async with running(second):
        assert second.rounds._epoch == one.rounds._epoch
        assert second.rounds.epochs == 0
        assert "; hit" in await second.said()


async def test_a_lost_epoch_is_made_anew(one: Process, valkey_url: str) -> None:
    """By one process; everything cached before is invalid."""
    with redis.Redis.from_url(valkey_url) as client:
        client.delete(EPOCH_KEY)
    before = one.rounds.epochs
    await one.rounds.safe(one.rounds.clock())
    assert one.rounds.epochs == before + 1
    assert "; hit" not in await one.said()
    await one.warm()


async def test_more_rows_than_can_be_replayed_are_a_new_epoch(one: Process, psql: asyncpg.Connection) -> None:
    """A full outbox costs one write to the store, whatever is in it."""
    before = one.rounds.epochs
    await psql.execute(
        f"INSERT INTO {triggers.OUTBOX} (tenant, tag) SELECT 't' || number, 'T:things' FROM generate_series(1, $1::int) number",
        MAX_ROWS + 1,
    )
    await one.rounds.safe(one.rounds.clock())
    assert one.rounds.epochs == before + 1
    await one.warm()


async def test_a_cursor_from_before_the_horizon_is_a_new_epoch(one: Process, psql: asyncpg.Connection) -> None:
    """Rows that it has not seen may have been deleted."""
    before = one.rounds.epochs
    await psql.execute(f"UPDATE {triggers.FENCE} SET pruned = (pg_current_xact_id()::text::bigint + 1)::text::xid8")
    await one.rounds.safe(one.rounds.clock())
    assert one.rounds.epochs > before


async def test_rows_are_deleted_once_everybody_may_have_read_them(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """Not before the second move of the horizon after they were written."""
    process = Process(empty_database_url, valkey_url, retention_s=0)
    async with running(process):
        await process.warm()
        await psql.execute(RENAME)
        await process.rounds.safe(process.rounds.clock())
        await process.stop_rounds()
        count = f"SELECT count(*) FROM {triggers.OUTBOX}"
        await psql.execute(RENAME)
        assert await psql.fetchval(count) >= 2
        await process.outbox.prune()
        assert await psql.fetchval(count) >= 2
        await process.outbox.prune()
        assert await psql.fetchval(count) == 0


async def test_a_restored_dump_is_a_new_epoch(one: Process, psql: asyncpg.Connection) -> None:
    """Its outbox is another one, whatever is in it, and its rows are from another time."""
    before = one.rounds.epochs
    statements: list[str] = [f"DROP TABLE {triggers.OUTBOX}, {triggers.FENCE}, things"]
    statements += ["CREATE TABLE things (id int PRIMARY KEY, tenant_id text NOT NULL, name text NOT NULL)"]
    statements += [f"INSERT INTO things VALUES (1, '{TENANT}', 'restored')"]
    triggers.create_outbox(statements.append)
    triggers.create_triggers(statements.append, [triggers.Watched("things")])
    async with psql.transaction():
        for statement in statements:
            await psql.execute(statement)
    await until(lambda: asyncio.sleep(0, one.rounds.epochs > before))
    await one.warm()
    assert await one.names() == ["restored"]


# -- triggers --------------------------------------------------------------------------------------------------------------


async def test_a_read_of_a_table_without_trigger_is_not_cached_and_start_up_says_so(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its invalidations could be lost."""
    await psql.execute("DROP TRIGGER respcache_delete ON things")
    process = Process(empty_database_url, valkey_url)
    async with running(process):
        assert await process.said() == "respcache; fwd=bypass; detail=no-trigger"
        assert await process.said() == "respcache; fwd=bypass; detail=no-trigger"
    assert "not cached: reads of things" in caplog.text


async def test_a_trigger_that_was_away_for_a_while_is_noticed(one: Process, psql: asyncpg.Connection) -> None:
    """Disabled: not cached. Enabled again: nothing from before is served, since writes left no rows meanwhile."""
    await psql.execute("ALTER TABLE things DISABLE TRIGGER respcache_update")
    await one.cold("no-trigger")
    await psql.execute(RENAME)
    await psql.execute("ALTER TABLE things ENABLE ALWAYS TRIGGER respcache_update")
    await one.warm()
    assert await one.names() == ["new", "new"]


async def test_a_trigger_disabled_within_one_transaction_is_noticed(one: Process, psql: asyncpg.Connection) -> None:
    """No round sees it disabled; the trigger's life tells."""
    before = one.rounds.epochs
    async with psql.transaction():
        await psql.execute("ALTER TABLE things DISABLE TRIGGER respcache_update")
        await psql.execute(RENAME)
        await psql.execute("ALTER TABLE things ENABLE ALWAYS TRIGGER respcache_update")
    await one.rounds.safe(one.rounds.clock())
    assert one.rounds.epochs == before + 1
    assert await one.names() == ["new", "new"]


# -- bad surroundings --------------------------------------------------------------------------------------------------------


async def test_a_database_without_outbox_is_served_without_the_cache(
    empty_database_url: str, valkey_url: str, psql: asyncpg.Connection
) -> None:
    """Reads and writes go on, the problem is named, and caching begins when it is mended."""
    await psql.execute("DROP FUNCTION respcache_note_things CASCADE")
    await psql.execute(f"DROP TABLE {triggers.OUTBOX}")
    process = Process(empty_database_url, valkey_url, lease_s=0.6)
    async with running(process):
        assert "fwd=bypass" in await process.said()
        assert (await process.http.post("/rename", params={"to": "new"})).status_code == 200
        assert await process.names() == ["new", "new"]
        assert triggers.OUTBOX in process.cache.stats()["fence"]["problem"]
        statements: list[str] = []
        await psql.execute(f"DROP TABLE {triggers.FENCE}")
        triggers.create_outbox(statements.append)
        triggers.create_triggers(statements.append, [triggers.Watched("things")])
        for statement in statements:
            await psql.execute(statement)
        await process.warm()


async def test_a_fence_without_its_row_is_named(psql: asyncpg.Connection, empty_database_url: str) -> None:
    """A restore that left data out, an overzealous clean-up: the message has the statement that mends it."""
    outbox = PostgresOutbox(create_async_engine(empty_database_url))
    await psql.execute(f"DELETE FROM {triggers.FENCE}")
    with pytest.raises(OutboxError, match=f"INSERT INTO {triggers.FENCE}"):
        await outbox.page(None)
    await outbox.close()
