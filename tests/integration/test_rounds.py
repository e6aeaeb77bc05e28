"""Outbox, rounds and fence on a real PostgreSQL and a real Valkey: no invalidation is lost, and no
read is old meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any
from uuid import UUID

import asyncpg
import httpx2
import pytest
import redis
from fastapi import FastAPI
from sqlalchemy import String, make_url, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from respcache import Cache, RedisStore, SingleTenant, cache_list
from respcache.core.errors import OutboxError, StoreUnavailable
from respcache.core.keys import EPOCH_KEY, generation_key
from respcache.core.serving_lease import DRIFT, MAX_ROWS, MAX_TENANTS
from respcache.stores.base import Bumped
from respcache.testing.servers import EmbeddedValkey
from respcache.writes import triggers
from respcache.writes.postgres import PostgresOutbox
from respcache.writes.relay import BACKLOG_S, OutboxRelay, boottime
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

    def __init__(
        self,
        database_url: str,
        valkey_url: str,
        *,
        lease_s: float = 2.0,
        retention_s: float = 600.0,
    ) -> None:
        self.engine = create_async_engine(database_url)
        self.outbox = PostgresOutbox(self.engine, lease_s=lease_s, retention_s=retention_s)
        self.store = RedisStore(valkey_url, deadline_s=0.5)
        self.late_s = 0.0
        self.cache = Cache(
            self.store,
            secret=b"k" * 32,
            resolver=SingleTenant(TENANT),
            outbox=self.outbox,
            clock=lambda: boottime() + self.late_s,
        )
        self.watching = watch(self.engine, self.cache, metadata=Base.metadata)
        app = FastAPI()

        @app.get("/things")
        @cache_list("things", tables=["things"])
        async def list_things() -> list[str]:
            async with AsyncSession(self.engine) as session:
                return list(
                    await session.scalars(text(READ).execution_options(respcache_reads=("things",)))
                )

        @app.post("/rename")
        async def rename(to: str) -> str:
            async with AsyncSession(self.engine) as session, session.begin():
                await session.execute(update(Thing).values(name=to))
            return "done"

        @app.post("/run")
        async def run(sql: str, autocommit: bool = False) -> str:
            engine = (
                self.engine.execution_options(isolation_level="AUTOCOMMIT")
                if autocommit
                else self.engine
            )
            async with engine.connect() as connection:
                await connection.execute(text(sql))
                await connection.commit()
            return "done"

        self.app = self.cache.wrap(app)
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    @property
    def relay(self) -> OutboxRelay:
        assert self.cache.runtime.relay is not None
        return self.cache.runtime.relay

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
        running = self.relay._running  # private: stops it without closing the outbox
        assert running is not None
        running.cancel()

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
    await connection.execute(
        "CREATE TABLE things (id int PRIMARY KEY, tenant_id text NOT NULL, name text NOT NULL)"
    )
    await connection.execute(
        f"INSERT INTO things VALUES (1, '{TENANT}', 'old'), (2, '{TENANT}', 'old'), (9, 'other', "
        f"'old')"
    )
    statements: list[str] = []
    triggers.create_outbox(statements.append)
    triggers.create_triggers(statements.append, [triggers.Watched("things")])
    for statement in statements:
        await connection.execute(statement)
    yield connection
    await connection.close()


@pytest.fixture
async def one(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> AsyncIterator[Process]:
    """One process whose cache serves."""
    process = Process(empty_database_url, valkey_url)
    async with running(process):
        await process.warm()
        yield process


# -- writes that nobody tells of -------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        RENAME,
        "WITH changed AS (UPDATE things SET name = 'new' RETURNING 1) SELECT count(*) FROM changed",
        "MERGE INTO things USING (VALUES (1)) AS v (id) ON things.id = v.id WHEN MATCHED THEN "
        "UPDATE SET name = 'new'",
        "DO $$ BEGIN UPDATE things SET name = 'new'; END $$",
    ],
)
async def test_a_write_by_psql_is_never_missed_for_longer_than_a_lease(
    one: Process, psql: asyncpg.Connection, write: str
) -> None:
    """No hook sees it: its row in the outbox does, and a read that begins a lease later shows
    it."""
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
    await one.relay.safe(one.relay.clock())
    assert await one.names() == ["old", "old", "copied"]


async def test_truncate_makes_everything_invalid(one: Process, psql: asyncpg.Connection) -> None:
    """Nobody knows whose rows there were: a new epoch."""
    before = one.relay.counters.epochs
    await psql.execute("TRUNCATE things")
    await one.relay.safe(one.relay.clock())
    assert await one.names() == []
    assert one.relay.counters.epochs == before + 1
    await one.warm()


async def test_a_transaction_that_commits_after_a_younger_one_is_not_missed(
    one: Process, psql: asyncpg.Connection
) -> None:
    """The older one has the smaller number and is invisible to the snapshot that saw the younger
    one."""
    url = one.engine.url.render_as_string(hide_password=False).replace("+asyncpg", "")
    other = await asyncpg.connect(url)
    try:
        older = other.transaction()
        await older.start()
        await other.execute("UPDATE things SET name = 'older' WHERE id = 1")
        await psql.execute("UPDATE things SET name = 'younger' WHERE id = 2")
        await one.relay.safe(one.relay.clock())
        assert await one.names() == ["old", "younger"]
        await one.warm()
        await older.commit()
        await one.relay.safe(one.relay.clock())
        assert await one.names() == ["older", "younger"]
    finally:
        await other.close()


# -- writes of the application ---------------------------------------------------------------------


async def test_a_writer_bumps_the_rows_that_its_transaction_left(one: Process) -> None:
    """It reads them back before its COMMIT; no round is needed, nobody waits, no tenant has to be
    declared."""
    await one.stop_rounds()
    answer = await one.http.post("/rename", params={"to": "new"})
    assert (answer.status_code, "x-cache-invalidation" in answer.headers) == (200, False)
    assert one.cache.counters.acknowledgements_delayed == 0
    assert one.relay.alive, "the fence ended before the test did"
    assert await one.names() == ["new", "new"]
    assert one.cache.counters.of(TENANT, "things").invalidations == 1


async def test_the_answer_of_a_write_names_what_its_bump_has_reached(
    one: Process, valkey_url: str
) -> None:
    """Of one tenant, by the writer itself; where that is not known, a view must be read first; of
    no rows, nothing."""

    async def token(sql: str, **options: bool) -> str | None:
        answer = await one.http.post("/run", params={"sql": sql, **options})
        assert answer.status_code == 200
        return answer.headers.get("x-cache-token")

    mine = f"{RENAME} WHERE tenant_id = '{TENANT}'"
    for _ in range(2):
        given = await token(mine)
        with redis.Redis.from_url(valkey_url, decode_responses=True) as client:
            assert given == ".".join(client.hmget(generation_key(TENANT), "n", "s"))
    assert await token(RENAME) == await token(mine, autocommit=True) == "validate"
    assert await token(f"{mine} AND id = 0") is None


@pytest.mark.parametrize("autocommit", [False, True])
async def test_text_that_nobody_understands_needs_no_declaration(
    one: Process, autocommit: bool
) -> None:
    """The database says what it changed; in AUTOCOMMIT, where there is no moment to ask, a round
    finds out."""
    adopted(one, float("-inf"))  # no other process has lived in an epoch before this one
    sql = "DO $$ BEGIN EXECUTE 'UPDATE things SET name = ''new'''; END $$"
    answer = await one.http.post("/run", params={"sql": sql, "autocommit": autocommit})
    assert (answer.status_code, "x-cache-invalidation" in answer.headers) == (200, False)
    assert await one.names() == ["new", "new"]


async def test_a_transaction_that_changed_nothing_delays_nobody(one: Process) -> None:
    """An UPDATE without rows leaves none in the outbox either."""
    answer = await one.http.post(
        "/run", params={"sql": "UPDATE things SET name = 'new' WHERE id = 999"}
    )
    assert answer.status_code == 200
    assert one.cache.counters.acknowledgements_delayed == 0
    assert "; hit" in await one.said()


async def test_a_commit_that_raised_after_it_was_carried_out_is_found_by_a_round(
    one: Process,
) -> None:
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


async def test_many_processes_bump_a_row_once(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """The generation remembers the rows that it was told of, so that what was read anew meanwhile
    stays valid."""
    processes = [Process(empty_database_url, valkey_url) for _ in range(3)]
    async with running(*processes):
        await processes[0].warm()
        await psql.execute(RENAME)
        for process in processes:
            await process.relay.safe(process.relay.clock())
        with redis.Redis.from_url(valkey_url) as client:
            assert client.hget(generation_key(TENANT), "s") == b"1"


async def test_another_tenants_write_invalidates_nothing(
    one: Process, psql: asyncpg.Connection
) -> None:
    """The row names its tenant."""
    await psql.execute("UPDATE things SET name = 'new' WHERE tenant_id = 'other'")
    await one.relay.safe(one.relay.clock())
    assert "; hit" in await one.said()


async def test_a_round_in_a_new_epoch_does_not_vouch_for_the_fences_of_the_former_one(
    one: Process,
) -> None:
    """It bumped nothing that is older than the epoch; another process may still serve in the epoch
    before."""
    adopted(one, one.relay.clock())
    answer = await one.http.post("/run", params={"sql": RENAME, "autocommit": True})
    assert answer.headers["x-cache-invalidation"] == "pending; safe"


# -- the store is away -----------------------------------------------------------------------------


async def test_a_write_during_an_outage_is_answered_when_no_fence_is_alive(
    psql: asyncpg.Connection, empty_database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """At its onset the answer waits and says so; the other process, which still has the server,
    shows the write."""
    valkey = make_valkey()
    writer, reader = (Process(empty_database_url, valkey.url, lease_s=0.6) for _ in range(2))
    async with running(writer, reader):
        await writer.warm()
        await reader.warm()
        await writer.store.close()  # a partition: this process alone has lost the server
        answer = await writer.http.post("/rename", params={"to": "new"})
        assert (answer.status_code, answer.headers["x-cache-invalidation"]) == (
            200,
            "pending; safe",
        )
        assert await reader.names() == ["new", "new"]
        await reader.warm()
        assert await reader.names() == ["new", "new"]
        assert await writer.said() == "respcache; fwd=bypass; detail=no-lease"


async def test_in_a_long_outage_writes_do_not_wait(
    psql: asyncpg.Connection, empty_database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Nobody renews ``until``; when it has passed there is nothing to wait for, however long a
    lease is."""
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
        assert (answer.status_code, answer.headers["x-cache-invalidation"]) == (
            200,
            "pending; safe",
        )


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
        assert process.cache.stats()["lease"]["problem"]
        await until(lambda: asyncio.sleep(0, process.relay.counters.pending_rows > 0))
        assert process.relay.counters.pending_s > 0
        valkey.thaw()
        while "; hit" not in await process.said():
            assert await process.names() == ["new", "new"]
        assert await process.names() == ["new", "new"]
        assert process.relay.counters.pending_rows == 0


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
        await until(lambda: asyncio.sleep(0, second.relay.alive))
        assert "; hit" not in await second.said()


# -- the fence -------------------------------------------------------------------------------------


async def test_without_rounds_nothing_is_served_after_a_lease(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """The database does not answer the rounds: the fence ends by itself, and comes back with
    them."""
    process = Process(empty_database_url, valkey_url, lease_s=0.6)
    async with running(process):
        await process.warm()
        lock = psql.transaction()
        await lock.start()
        await psql.execute(f"LOCK TABLE {triggers.FENCE} IN ACCESS EXCLUSIVE MODE")
        await process.cold("no-lease")
        await lock.rollback()
        await process.warm()


def interpose(one: Process, where: str, then: Callable[[], Awaitable[None]]) -> None:
    """Have something happen between the answer of the store and whoever asked it, for an entry
    there or a view for one here."""
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
async def test_a_fence_that_ends_while_the_store_is_asked_does_not_serve(
    one: Process, where: str
) -> None:
    """What counts is the fence held before, at the moment of the reply."""
    one.relay.lease = type(one.relay.lease)(one.relay.lease.server, one.relay.clock() + 3600)
    await one.stop_rounds()

    async def end() -> None:
        one.late_s = 1e9

    interpose(one, where, end)
    assert await one.said() == "respcache; fwd=bypass; detail=no-lease"


def adopted(process: Process, at: float) -> None:
    """Let the process have adopted its epoch at this moment."""
    process.relay._adopted_at = at  # private: no event of the outside causes just this


def prune_nothing(process: Process) -> None:
    """Let the process believe that it has just pruned the outbox."""
    process.relay._pruned_at = process.relay.clock() + 3600  # private: the test prunes by itself


@pytest.mark.parametrize(("lost", "why"), [("lease", "no-lease"), ("tables", "no-trigger")])
async def test_a_proof_ends_with_the_fence_and_the_tables_that_it_rests_on(
    one: Process, lost: str, why: str
) -> None:
    """The view is still the one of the proof, and the fence of the proof would have lasted."""
    await one.stop_rounds()
    relay, still_proven = one.relay, one.relay.lease
    relay.lease = type(still_proven)(still_proven.server, relay.clock() + 3600)
    assert all(["; hit" in await one.said() for _ in range(2)])
    (scoped,) = (plan.scoped for plan in one.app.plan_cache.plans())
    assert (
        one.cache.runtime.proofs.still_proven(scoped, one.cache.clock()) is scoped.proof is not None
    )
    if lost == "lease":
        relay.lease = type(still_proven)()
    else:
        relay.coverage.replace(frozenset(), now=relay.clock(), lease_s=2.0)
    assert await one.said() == f"respcache; fwd=bypass; detail={why}"


@pytest.mark.parametrize("where", ["store", "memory"])
async def test_a_fence_granted_while_the_store_is_asked_does_not_count(
    one: Process, where: str
) -> None:
    """It knows of writes that the reply does not."""
    await one.stop_rounds()
    still_proven = one.relay.lease
    one.relay.lease = type(still_proven)(still_proven.server, one.relay.clock() + 0.2)

    async def proof() -> None:
        while one.relay.alive:
            await asyncio.sleep(0.01)
        one.relay.lease = type(still_proven)(still_proven.server, one.relay.clock() + 3600)

    interpose(one, where, proof)
    if where == "store":
        assert await one.said() == "respcache; fwd=bypass; detail=no-lease"
    else:
        (plan,) = one.app.plan_cache.plans()
        assert await one.cache.runtime.proofs.hit(plan.scoped, one.cache.clock()) is None


async def test_only_the_authority_is_served(
    psql: asyncpg.Connection,
    empty_database_url: str,
    valkey_url: str,
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """Two servers answer, as in a split brain: the second is served when no fence of the first is
    alive, the first no more."""
    first = Process(empty_database_url, valkey_url, lease_s=0.6)
    second = Process(empty_database_url, make_valkey().url, lease_s=0.6)
    async with running(first):
        await first.warm()
        async with running(second):
            assert await second.said() == "respcache; fwd=bypass; detail=no-lease"
            await second.warm()
            assert await first.said() == "respcache; fwd=bypass; detail=no-lease"
            answer = await first.http.post("/rename", params={"to": "new"})
            assert answer.status_code == 200
            assert await second.names() == ["new", "new"]
            assert first.relay.counters.problem == "another server has become the authority"


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


# -- epochs ----------------------------------------------------------------------------------------


async def test_a_second_process_joins_the_epoch(
    one: Process, empty_database_url: str, valkey_url: str
) -> None:
    """It begins where the record's cursor stands, and what is cached stays valid."""
    second = Process(empty_database_url, valkey_url)
    async with running(second):
        assert second.relay.counters.epochs == 0
        assert "; hit" in await second.said()


async def test_a_lost_epoch_is_made_anew(one: Process, valkey_url: str) -> None:
    """By one process; everything cached before is invalid."""
    with redis.Redis.from_url(valkey_url) as client:
        client.delete(EPOCH_KEY)
    before = one.relay.counters.epochs
    await one.relay.safe(one.relay.clock())
    assert one.relay.counters.epochs == before + 1
    assert "; hit" not in await one.said()
    await one.warm()


async def test_more_rows_than_can_be_replayed_are_a_new_epoch(
    one: Process, psql: asyncpg.Connection
) -> None:
    """A full outbox costs one write to the store, whatever is in it."""
    before = one.relay.counters.epochs
    await psql.execute(
        f"INSERT INTO {triggers.OUTBOX} (tenant, tag) SELECT 't' || number, 'T:things' FROM "
        f"generate_series(1, $1::int) number",
        MAX_ROWS + 1,
    )
    await one.relay.safe(one.relay.clock())
    assert one.relay.counters.epochs == before + 1
    await one.warm()


async def test_a_cursor_from_before_the_horizon_is_a_new_epoch(
    one: Process, psql: asyncpg.Connection
) -> None:
    """Rows that it has not seen may have been deleted."""
    before = one.relay.counters.epochs
    await psql.execute(
        f"UPDATE {triggers.FENCE} SET pruned = (pg_current_xact_id()::text::bigint + 1)::text::xid8"
    )
    await one.relay.safe(one.relay.clock())
    assert one.relay.counters.epochs > before


async def test_rows_are_deleted_once_everybody_may_have_read_them(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """Not before the second move of the horizon after they were written."""
    process = Process(empty_database_url, valkey_url, retention_s=0)
    async with running(process):
        await process.warm()
        await psql.execute(RENAME)
        await process.relay.safe(process.relay.clock())
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
    before = one.relay.counters.epochs
    statements: list[str] = [f"DROP TABLE {triggers.OUTBOX}, {triggers.FENCE}, things"]
    statements += [
        "CREATE TABLE things (id int PRIMARY KEY, tenant_id text NOT NULL, name text NOT NULL)"
    ]
    statements += [f"INSERT INTO things VALUES (1, '{TENANT}', 'restored')"]
    triggers.create_outbox(statements.append)
    triggers.create_triggers(statements.append, [triggers.Watched("things")])
    async with psql.transaction():
        for statement in statements:
            await psql.execute(statement)
    await until(lambda: asyncio.sleep(0, one.relay.counters.epochs > before))
    await one.warm()
    assert await one.names() == ["restored"]


# -- triggers --------------------------------------------------------------------------------------


async def test_a_read_of_a_table_without_trigger_is_not_cached_and_start_up_says_so(
    psql: asyncpg.Connection,
    empty_database_url: str,
    valkey_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its invalidations could be lost."""
    await psql.execute("DROP TRIGGER respcache_delete ON things")
    process = Process(empty_database_url, valkey_url)
    async with running(process):
        assert await process.said() == "respcache; fwd=bypass; detail=no-trigger"
        assert await process.said() == "respcache; fwd=bypass; detail=no-trigger"
    assert "not cached: reads of things" in caplog.text


async def test_a_trigger_that_was_away_for_a_while_is_noticed(
    one: Process, psql: asyncpg.Connection
) -> None:
    """Disabled: not cached. Enabled again: nothing from before is served, since writes left no rows
    meanwhile."""
    await psql.execute("ALTER TABLE things DISABLE TRIGGER respcache_update")
    await one.cold("no-trigger")
    await psql.execute(RENAME)
    await psql.execute("ALTER TABLE things ENABLE ALWAYS TRIGGER respcache_update")
    await one.warm()
    assert await one.names() == ["new", "new"]


async def test_a_trigger_disabled_within_one_transaction_is_noticed(
    one: Process, psql: asyncpg.Connection
) -> None:
    """No round sees it disabled; the trigger's life tells."""
    before = one.relay.counters.epochs
    async with psql.transaction():
        await psql.execute("ALTER TABLE things DISABLE TRIGGER respcache_update")
        await psql.execute(RENAME)
        await psql.execute("ALTER TABLE things ENABLE ALWAYS TRIGGER respcache_update")
    await one.relay.safe(one.relay.clock())
    assert one.relay.counters.epochs == before + 1
    assert await one.names() == ["new", "new"]


# -- bad surroundings ------------------------------------------------------------------------------


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
        assert triggers.OUTBOX in process.cache.stats()["lease"]["problem"]
        statements: list[str] = []
        await psql.execute(f"DROP TABLE {triggers.FENCE}")
        triggers.create_outbox(statements.append)
        triggers.create_triggers(statements.append, [triggers.Watched("things")])
        for statement in statements:
            await psql.execute(statement)
        await process.warm()


async def test_a_fence_without_its_row_is_named(
    psql: asyncpg.Connection, empty_database_url: str
) -> None:
    """A restore that left data out, an overzealous clean-up: the message has the statement that
    mends it."""
    outbox = PostgresOutbox(create_async_engine(empty_database_url))
    await psql.execute(f"DELETE FROM {triggers.FENCE}")
    with pytest.raises(OutboxError, match=f"INSERT INTO {triggers.FENCE}"):
        await outbox.page(None)
    await outbox.close()


# -- what administrators do ------------------------------------------------------------------------


async def present_xid(psql: asyncpg.Connection) -> int:
    return int(await psql.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))


async def come_to(psql: asyncpg.Connection, xid: int) -> None:
    """Have transactions end until the next number is this one."""
    while await present_xid(psql) < xid:
        await psql.execute("SELECT pg_current_xact_id()")


async def test_rows_that_came_with_a_dump_swallow_no_write(
    one: Process, psql: asyncpg.Connection
) -> None:
    """A transaction gets the number of such a row, whose id the generation knows already: the write
    counts all the same."""
    await one.stop_rounds()
    xid = await present_xid(psql) + 20
    numbers = f"generate_series({xid}, {xid + 3}) AS number"
    await psql.execute(
        f"INSERT INTO {triggers.OUTBOX} (xid, tenant, tag) SELECT number::text::xid8, '{TENANT}', "
        f"'T:things' FROM {numbers}"
    )
    rows = await psql.fetch(f"SELECT id FROM {triggers.OUTBOX} WHERE xid >= '{xid}'")
    await one.store.bump(
        generation_key(TENANT), tags=["T:x"], ttl_ms=60_000, rows=[row["id"] for row in rows]
    )
    await one.names()
    assert "; hit" in await one.said()
    await come_to(psql, xid)
    answer = await one.http.post("/rename", params={"to": "new"})
    assert "x-cache-invalidation" not in answer.headers
    assert await one.names() == ["new", "new"]
    assert not {row["id"] for row in rows} & {
        row["id"]
        for row in await psql.fetch(f"SELECT id FROM {triggers.OUTBOX} WHERE xid = '{xid}'")
    }


async def test_rows_that_came_with_a_dump_are_not_replayed_and_go(
    one: Process, psql: asyncpg.Connection
) -> None:
    """They are nobody's writes; the cache stays warm."""
    xid, before = await present_xid(psql) + 10_000, one.relay.counters.epochs
    rows = (
        f"SELECT number::text::xid8, '{TENANT}', 'T:things' FROM generate_series({xid}, "
        f"{xid + 9}) AS number"
    )
    await psql.execute(f"INSERT INTO {triggers.OUTBOX} (xid, tenant, tag) {rows}")
    # the round that meets them does not leave them to the housekeeping
    prune_nothing(one)
    for _ in range(2):
        await one.relay.caught_up()
    assert await psql.fetchval(f"SELECT count(*) FROM {triggers.OUTBOX} WHERE xid >= '{xid}'") == 0
    assert one.relay.counters.epochs == before
    assert "; hit" in await one.said()


async def test_a_row_that_a_transaction_has_made_its_own_is_not_deleted_as_foreign(
    psql: asyncpg.Connection, empty_database_url: str
) -> None:
    """It got the number of a row from a dump after that was found, and commits while it is being
    deleted."""
    outbox = PostgresOutbox(create_async_engine(empty_database_url))
    other = await asyncpg.connect(empty_database_url.replace("+asyncpg", ""))
    xid = await present_xid(psql) + 1
    await psql.execute(
        f"INSERT INTO {triggers.OUTBOX} (xid, tenant, tag) VALUES ('{xid}', '{TENANT}', 'T:things')"
    )
    transaction = other.transaction()
    await transaction.start()
    await other.execute(RENAME)
    assert int(await other.fetchval("SELECT pg_current_xact_id()::text")) == xid
    await outbox.prune()
    await transaction.commit()
    assert (
        await psql.fetchval(
            f"SELECT count(*) FROM {triggers.OUTBOX} WHERE xid = '{xid}' AND tenant = '{TENANT}'"
        )
        == 1
    )
    await other.close()
    await outbox.close()


@pytest.mark.long
@pytest.mark.parametrize("column", ["pruned", "horizon"])
async def test_the_horizon_of_another_database_ends_one_epoch_at_most(
    one: Process, psql: asyncpg.Connection, column: str
) -> None:
    """It lies in the future: by it every cursor would have missed something, for ever."""
    # the round that meets it does not leave it to the housekeeping
    prune_nothing(one)
    before = one.relay.counters.epochs
    ahead = await present_xid(psql) + 1_000_000
    await psql.execute(f"UPDATE {triggers.FENCE} SET {column} = '{ahead}'")
    if column == "horizon":  # it becomes the other when it is moved
        await psql.execute(
            f"UPDATE {triggers.FENCE} SET horizon_at = clock_timestamp() - interval '1 day'"
        )
        await one.outbox.prune()
    await until(lambda: _is_past(psql))
    await one.warm()
    for _ in range(3):
        await one.relay.caught_up()
    assert one.relay.counters.epochs <= before + 1


async def _is_past(psql: asyncpg.Connection) -> bool:
    found = (
        f"SELECT greatest(pruned, horizon) <= pg_snapshot_xmax(pg_current_snapshot()) FROM "
        f"{triggers.FENCE}"
    )
    return bool(await psql.fetchval(found))


async def test_a_horizon_from_the_future_deletes_nothing(
    psql: asyncpg.Connection, empty_database_url: str
) -> None:
    """And is replaced by one that every cursor from before is told of."""
    outbox = PostgresOutbox(create_async_engine(empty_database_url))
    await psql.execute(RENAME)
    cursor = (await outbox.page(None)).cursor
    ahead = await present_xid(psql) + 1_000_000
    await psql.execute(f"UPDATE {triggers.FENCE} SET pruned = '{ahead}', horizon = '{ahead}'")
    page = await outbox.page(None)
    assert (page.foreign, page.pruned_ahead) == (True, True)
    await psql.execute(f"INSERT INTO {triggers.OUTBOX} (tenant, tag) VALUES ('late', 'T:things')")
    # what a process does that has just moved the horizon
    # private: without moving the horizon itself
    connections, delete = outbox._connections, outbox._delete
    async with connections.connected() as connection:
        await connection.execute(delete, {"limit": 10})
    assert await psql.fetchval(f"SELECT count(*) FROM {triggers.OUTBOX} WHERE tenant = 'late'") == 1
    await outbox.prune()
    page = await outbox.page(None)
    assert (page.foreign, page.pruned_ahead) == (False, False)
    assert page.pruned > cursor.xmin
    await outbox.close()


@pytest.mark.parametrize("table", [triggers.OUTBOX, triggers.FENCE])
async def test_row_level_security_on_our_tables_is_named(
    psql: asyncpg.Connection, empty_database_url: str, table: str
) -> None:
    """A platform that switches it on everywhere would hide every row from an application that does
    not own them."""
    await psql.execute("DROP ROLE IF EXISTS respcache_app")
    await psql.execute(
        "CREATE ROLE respcache_app LOGIN PASSWORD 'only-for-tests'; GRANT USAGE ON SCHEMA public "
        "TO respcache_app"
    )
    url = make_url(empty_database_url).set(username="respcache_app", password="only-for-tests")
    outbox = PostgresOutbox(create_async_engine(url))
    try:
        await psql.execute(f"GRANT SELECT ON {triggers.OUTBOX}, {triggers.FENCE} TO respcache_app")
        assert (await outbox.page(None)).tables == {"things"}
        await psql.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        with pytest.raises(
            OutboxError, match=rf"ALTER TABLE \S*{table} DISABLE ROW LEVEL SECURITY"
        ):
            await outbox.page(None)
    finally:
        await outbox.close()
        await psql.execute("DROP OWNED BY respcache_app; DROP ROLE respcache_app")


async def test_tables_that_exchange_their_names_are_noticed(
    one: Process, psql: asyncpg.Connection
) -> None:
    """The new one's triggers write the tag of its former name: what reads it is not cached until it
    is watched by its own."""
    statements: list[str] = []
    triggers.create_triggers(statements.append, [triggers.Watched("things_new")])
    async with psql.transaction():
        await psql.execute("CREATE TABLE things_new (LIKE things INCLUDING ALL)")
        await psql.execute("INSERT INTO things_new SELECT id, tenant_id, 'swapped' FROM things")
        for statement in statements:
            await psql.execute(statement)
        await psql.execute(
            "ALTER TABLE things RENAME TO things_old; ALTER TABLE things_new RENAME TO things"
        )
    await one.cold("no-trigger")
    assert (await one.names())[0] == "swapped"
    statements = []
    triggers.drop_triggers(statements.append, ["things_old"])
    triggers.create_triggers(statements.append, [triggers.Watched("things")])
    for statement in statements:
        await psql.execute(statement)
    await one.warm()
    await psql.execute("UPDATE things SET name = 'later'")
    await one.relay.safe(one.relay.clock())
    assert (await one.names())[0] == "later"


async def test_a_table_that_was_renamed_to_and_fro_is_a_new_epoch(
    one: Process, psql: asyncpg.Connection
) -> None:
    """Meanwhile another one may have had its name, and been read."""
    before = one.relay.counters.epochs
    async with psql.transaction():
        await psql.execute("ALTER TABLE things RENAME TO other; ALTER TABLE other RENAME TO things")
    await one.relay.safe(one.relay.clock())
    assert one.relay.counters.epochs == before + 1


async def test_ordinary_triggers_are_not_enough(
    one: Process, psql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """``ENABLE TRIGGER ALL`` and restores leave such: they are silent under a replication role. The
    log says how to mend it."""
    await psql.execute(
        "ALTER TABLE things DISABLE TRIGGER ALL; ALTER TABLE things ENABLE TRIGGER ALL"
    )
    await one.cold("no-trigger")
    assert "reads of things" in caplog.text
    assert "watch_table" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ("DROP TABLE things_b", ["a"]),
        ("ALTER TABLE things DETACH PARTITION things_b", ["a"]),
        (
            "ALTER TABLE things ATTACH PARTITION things_c FOR VALUES FROM (20) TO (30)",
            ["a", "b", "c"],
        ),
        ("TRUNCATE things_b", ["a"]),
        ("ALTER TABLE things ALTER COLUMN name TYPE text USING upper(name)", ["A", "B"]),
    ],
)
async def test_ddl_that_changes_what_is_read_is_a_new_epoch(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str, change: str, rows: list[str]
) -> None:
    """No trigger fires for it."""
    await psql.execute(f"""
        DROP TABLE things;
        CREATE TABLE things (id int, tenant_id text NOT NULL, name text NOT NULL)
            PARTITION BY RANGE (id);
        CREATE TABLE things_a PARTITION OF things FOR VALUES FROM (0) TO (10);
        CREATE TABLE things_b PARTITION OF things FOR VALUES FROM (10) TO (20);
        CREATE TABLE things_c (id int, tenant_id text NOT NULL, name text NOT NULL);
        INSERT INTO things VALUES (1, '{TENANT}', 'a'), (11, '{TENANT}', 'b');
        INSERT INTO things_c VALUES (21, '{TENANT}', 'c')""")
    statements: list[str] = []
    triggers.create_triggers(statements.append, [triggers.Watched("things")])
    for statement in statements:
        await psql.execute(statement)
    process = Process(empty_database_url, valkey_url)
    async with running(process):
        await process.warm()
        await psql.execute(change)
        await process.relay.safe(process.relay.clock())
        assert await process.names() == rows
        await process.warm()


async def test_what_changes_nothing_that_is_read_keeps_the_epoch(
    one: Process, psql: asyncpg.Connection
) -> None:
    """Maintenance, and tables that nobody watches."""
    before = one.relay.counters.epochs
    await psql.execute("VACUUM things")
    await psql.execute("ANALYZE things")
    await psql.execute(
        "CREATE TABLE others (id int); ALTER TABLE others ADD COLUMN name text; DROP TABLE others"
    )
    await one.relay.safe(one.relay.clock())
    assert one.relay.counters.epochs == before


@pytest.mark.parametrize(
    "kinship",
    [
        "CREATE TABLE kin () INHERITS (things)",
        "CREATE TABLE kin (LIKE things); ALTER TABLE things INHERIT kin",
        "CREATE TABLE kin (LIKE things) PARTITION BY RANGE (id); ALTER TABLE kin ATTACH PARTITION "
        "things DEFAULT",
    ],
)
async def test_a_table_that_is_written_to_by_another_name_is_not_cached(
    one: Process, psql: asyncpg.Connection, kinship: str
) -> None:
    """Statements on a parent or on a child that inherits fire no trigger of this one."""
    await psql.execute(kinship)
    await one.cold("no-trigger")


async def test_a_transaction_asks_what_it_has_left_in_any_role(
    one: Process, psql: asyncpg.Connection
) -> None:
    """A role per tenant has no right on the outbox and needs none."""
    await psql.execute("DROP ROLE IF EXISTS respcache_tenant; CREATE ROLE respcache_tenant")
    await psql.execute(
        "GRANT USAGE ON SCHEMA public TO respcache_tenant; GRANT SELECT, UPDATE ON things TO "
        "respcache_tenant"
    )
    await one.warm()
    await one.stop_rounds()
    try:
        async with AsyncSession(one.engine) as session, session.begin():
            await session.execute(text("SET LOCAL ROLE respcache_tenant"))
            await session.execute(update(Thing).values(name="new"))
        await one.cache.settled()
        assert await one.names() == ["new", "new"]
        assert one.cache.counters.acknowledgements_delayed == 0
    finally:
        await psql.execute("DROP OWNED BY respcache_tenant; DROP ROLE respcache_tenant")


async def remove(psql: asyncpg.Connection) -> None:
    statements: list[str] = []
    triggers.drop_triggers(statements.append, ["things"])
    triggers.drop_outbox(statements.append)
    async with psql.transaction():
        for statement in statements:
            await psql.execute(statement)


async def test_an_outbox_that_is_removed_fails_no_write(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """Under a running application: before it notices and after; writes wait until no fence can be
    alive, then not at all."""
    process = Process(empty_database_url, valkey_url, lease_s=0.6)
    async with running(process):
        await process.warm()
        await remove(psql)
        for name in ("a", "b", "c"):
            assert (await process.http.post("/rename", params={"to": name})).status_code == 200
            assert await process.names() == [name, name]
        await until(lambda: asyncio.sleep(0, not process.relay.anything_may_be_cached()))
        before = process.cache.counters.acknowledgements_delayed
        answer = await process.http.post("/rename", params={"to": "new"})
        assert (answer.status_code, "x-cache-invalidation" in answer.headers) == (200, False)
        assert process.cache.counters.acknowledgements_delayed == before


async def test_without_an_outbox_nobody_waits_for_long(
    empty_database_url: str, valkey_url: str
) -> None:
    """Deployed before the migration: nobody can hold a fence, which is certain a lease after the
    first look."""
    connection = await asyncpg.connect(empty_database_url.replace("+asyncpg", ""))
    await connection.execute(
        "CREATE TABLE things (id int PRIMARY KEY, tenant_id text NOT NULL, name text NOT NULL)"
    )
    process = Process(empty_database_url, valkey_url, lease_s=0.6)
    async with running(process):
        await until(lambda: asyncio.sleep(0, not process.relay.anything_may_be_cached()))
        process.outbox.lease_s = 3600  # what a wait would now be
        process.relay.coverage.missing_since = process.relay.clock() - 4000
        for autocommit in (False, True):
            async with asyncio.timeout(10):
                answer = await process.http.post(
                    "/run", params={"sql": RENAME, "autocommit": autocommit}
                )
            assert answer.status_code == 200
    await connection.close()


async def test_a_write_to_a_table_that_was_just_unwatched_waits_for_the_others(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """It left nothing, but the other process may still serve what it has read. A table that nobody
    watched delays nobody."""
    await psql.execute("CREATE TABLE unwatched (id int); INSERT INTO unwatched VALUES (1)")
    writer, reader = (Process(empty_database_url, valkey_url, lease_s=1.0) for _ in range(2))
    async with running(writer, reader):
        await writer.warm()
        await reader.warm()
        await until(lambda: asyncio.sleep(0, not writer.relay.may_be_cached("unwatched")))
        await writer.http.post("/run", params={"sql": "UPDATE unwatched SET id = 2"})
        assert writer.cache.counters.acknowledgements_delayed == 0
        statements: list[str] = []
        triggers.drop_triggers(statements.append, ["things"])
        for statement in statements:
            await psql.execute(statement)
        await writer.http.post("/rename", params={"to": "new"})
        assert writer.cache.counters.acknowledgements_delayed == 1
        assert await reader.names() == ["new", "new"]
        await until(lambda: asyncio.sleep(0, "things" not in writer.relay.tables))
        writer.relay.coverage.covered_until["things"] += 60  # however slowly this test runs
        await writer.http.post("/rename", params={"to": "newer"})
        assert writer.cache.counters.acknowledgements_delayed == 2


async def test_a_table_of_any_name_counts_as_watched(
    psql: asyncpg.Connection, empty_database_url: str
) -> None:
    """Quotes in it, or too long for the name of its function."""
    names = ["things", 'it\'s a "table"', "ü" * 25, "x" * 63]
    statements: list[str] = []
    triggers.create_triggers(statements.append, [triggers.Watched(name) for name in names])
    for name in names[1:]:
        await psql.execute(f"CREATE TABLE {triggers.quoted(name)} (tenant_id text)")
    for statement in statements:
        await psql.execute(statement)
    outbox = PostgresOutbox(create_async_engine(empty_database_url))
    page = await outbox.page(None)
    assert (page.tables, page.unsound) == (set(names), set())
    await outbox.close()


# -- writes that no statement shows ----------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        r"WITH a AS (SELECT E'it\'s') UPDATE things SET name = 'new'",
        "WITH a AS (SELECT $$it's$$) UPDATE things SET name = 'new'",
        "SELECT rename('new')",
        "SELECT id FROM public.\"rename\" ('new') AS id",
    ],
)
async def test_the_answer_of_a_hidden_write_waits_too(
    one: Process, psql: asyncpg.Connection, sql: str
) -> None:
    """A verb that stands in what we take for a literal, or a function that writes: the transaction
    is asked."""
    await psql.execute("""
        CREATE FUNCTION rename(x text) RETURNS int LANGUAGE plpgsql
            AS $$ BEGIN UPDATE things SET name = x; RETURN 1; END $$""")
    await until(lambda: asyncio.sleep(0, "rename" in one.relay.coverage.functions))
    await one.warm()
    await one.stop_rounds()
    answer = await one.http.post("/run", params={"sql": sql})
    assert answer.status_code == 200
    assert await one.names() == ["new", "new"]
    assert one.cache.counters.of(TENANT, "things").invalidations == 1


async def test_a_read_that_only_looks_like_a_write_stays_a_read(one: Process) -> None:
    """It is asked, and has left nothing: no answer waits, and it is cached."""
    await one.stop_rounds()
    made = 0

    async def make() -> list[str]:
        nonlocal made
        made += 1
        async with AsyncSession(one.engine) as session, session.begin():
            statement = text("SELECT name || 'UPDATE things SET x' FROM things").execution_options(
                respcache_reads=("things",)
            )
            return list(await session.scalars(statement))

    for _ in range(2):
        await one.cache.get_or_set(TENANT, "things", {"q": 1}, make, tables=["things"])
    assert made == 1
    assert one.cache.counters.acknowledgements_delayed == 0


async def test_a_statement_may_say_that_it_writes(one: Process, psql: asyncpg.Connection) -> None:
    """What no look at its text can tell, as a view that calls a function."""
    await psql.execute("""
        CREATE FUNCTION rename(x text) RETURNS int LANGUAGE plpgsql
            AS $$ BEGIN UPDATE things SET name = x; RETURN 1; END $$;
        CREATE VIEW renamed AS SELECT rename('new')""")
    await one.warm()
    await one.stop_rounds()
    async with AsyncSession(one.engine) as session, session.begin():
        await session.execute(
            text("SELECT * FROM renamed").execution_options(respcache_writes=("things",))
        )
    await one.cache.settled()
    assert await one.names() == ["new", "new"]
    assert one.cache.counters.acknowledgements_delayed == 0


@pytest.mark.parametrize(
    "failing", ["UPDATE things SET id = 1", "INSERT INTO things VALUES (1, 'public', 'twice')"]
)
async def test_a_statement_that_failed_in_a_savepoint_delays_nobody(
    one: Process, failing: str
) -> None:
    """It is known to have left nothing."""
    async with AsyncSession(one.engine) as session, session.begin():
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await session.execute(text(failing))
    await one.cache.settled()
    assert one.cache.counters.acknowledgements_delayed == 0
    assert "; hit" in await one.said()


async def test_what_deferred_triggers_write_is_waited_for(
    one: Process, psql: asyncpg.Connection
) -> None:
    """They write in COMMIT, after the transaction was asked: a round has to find it."""
    await psql.execute("""
        CREATE TABLE orders (id int PRIMARY KEY);
        CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN UPDATE things SET name = 'deferred ' || NEW.id; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER later AFTER INSERT ON orders
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION later()""")
    await until(lambda: asyncio.sleep(0, one.relay.coverage.deferred))
    for number in range(5):
        await one.warm()
        assert (
            await one.http.post("/run", params={"sql": f"INSERT INTO orders VALUES ({number})"})
        ).status_code == 200
        assert await one.names() == [f"deferred {number}"] * 2


@pytest.mark.parametrize("sql", [RENAME, "SELECT rename('new')"])
async def test_a_transaction_that_left_too_much_to_tell_leaves_it_to_a_round(
    one: Process, psql: asyncpg.Connection, sql: str
) -> None:
    """The setting that tells is bounded."""
    await psql.execute("""
        INSERT INTO things SELECT n, 'tenant number ' || n, 'old' FROM generate_series(100, 3000) n;
        CREATE FUNCTION rename(x text) RETURNS int LANGUAGE plpgsql
            AS $$ BEGIN UPDATE things SET name = x; RETURN 1; END $$""")
    await until(lambda: asyncio.sleep(0, "rename" in one.relay.coverage.functions))
    await one.warm()
    async with one.engine.begin() as connection:
        await connection.execute(text(sql))
        assert (
            await connection.execute(text(one.outbox.own_rows))
        ).scalar_one() == triggers.TOO_MANY
    await one.cache.settled()
    assert await one.names() == ["new", "new"]
    assert one.cache.counters.acknowledgements_delayed == 1


@pytest.mark.long
@pytest.mark.parametrize("forged", ["", "nonsense", '["a"]', "[1, 2, 3]"])
async def test_a_setting_that_somebody_else_has_changed_is_not_believed(
    one: Process, forged: str
) -> None:
    """Then a round has to find out."""
    async with one.engine.begin() as connection:
        await connection.execute(text(RENAME))
        await connection.execute(
            text(f"SELECT set_config('{triggers.setting()}', :forged, true)"), {"forged": forged}
        )
    await one.cache.settled()
    assert await one.names() == ["new", "new"]


async def test_a_tenant_that_is_spelt_otherwise_than_in_the_rows_is_not_cached(
    psql: asyncpg.Connection,
    empty_database_url: str,
    valkey_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No write would ever invalidate it: a trigger says column::text."""

    class Rows(DeclarativeBase):
        pass

    class Row(Rows):
        __tablename__ = "rows"
        id: Mapped[int] = mapped_column(primary_key=True)
        tenant_id: Mapped[UUID]

    spelt = UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")
    engine = create_async_engine(empty_database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Rows.metadata.create_all)
    app = FastAPI()

    @app.get("/rows")
    @cache_list("rows", tables=["rows"])
    async def list_rows() -> list[int]:
        async with AsyncSession(engine) as session:
            return list(await session.scalars(select(Row.id)))

    for tenant, stored in ((str(spelt).upper(), False), (str(spelt), True), (spelt.hex, False)):
        cache = Cache(RedisStore(valkey_url), secret=b"k" * 32, resolver=SingleTenant(tenant))
        watching = watch(engine, cache, metadata=Rows.metadata)
        await cache.connect()
        transport = httpx2.ASGITransport(cache.wrap(app))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            said = [(await client.get("/rows")).headers["cache-status"] for _ in range(2)]
        assert ("; hit" in said[1]) is stored
        watching.close()
        await cache.close()
    assert "correct Scope.tenant" in caplog.text
    await engine.dispose()


# -- what it costs ---------------------------------------------------------------------------------


async def test_the_backlog_of_an_outage_is_counted_now_and_then(
    psql: asyncpg.Connection, empty_database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Not read again and again."""
    valkey = make_valkey()
    process = Process(empty_database_url, valkey.url)
    asked: list[float] = []
    async with running(process):
        await process.warm()
        backlog, page = process.outbox.backlog, process.outbox.page

        async def counted(*given: Any) -> Any:
            asked.append(process.relay.clock())
            return await backlog(*given)

        async def no_rows(after: Any) -> Any:
            assert after is None, "rows were read"
            return await page(after)

        valkey.kill()
        await until(lambda: asyncio.sleep(0, not process.store.available))
        process.outbox.backlog, process.outbox.page = counted, no_rows  # type: ignore[method-assign]
        await psql.execute(
            f"INSERT INTO {triggers.OUTBOX} (tenant, tag) SELECT 't' || n, 'T:things' FROM "
            f"generate_series(1, 100) n"
        )
        failed = process.relay.counters.failed
        await until(lambda: asyncio.sleep(0, process.relay.counters.pending_rows == 100))
        await until(lambda: asyncio.sleep(0, process.relay.counters.failed > failed + 6))
        assert all(later - earlier >= BACKLOG_S * 0.95 for earlier, later in pairwise(asked))


async def test_ids_of_rows_that_a_round_was_faster_with_do_not_pile_up(one: Process) -> None:
    """The oldest give way."""
    server = one.relay.lease.server
    await one.stop_rounds()
    for number in range(3):
        one.relay.applied(
            [(TENANT, "T:x", f"{number}-{row}") for row in range(MAX_ROWS // 2)], server
        )
    applied = one.relay._applied  # private: nothing else shows that it is bounded
    assert len(applied) == MAX_ROWS
    assert "2-0" in applied
    assert "0-0" not in applied


async def test_a_write_for_thousands_of_tenants_is_a_new_epoch(
    one: Process, psql: asyncpg.Connection
) -> None:
    """One command to the store instead of one a tenant, for the writer and for every round."""
    before = one.relay.counters.epochs
    await psql.execute(
        f"INSERT INTO {triggers.OUTBOX} (tenant, tag) SELECT 't' || number, 'T:things' FROM "
        f"generate_series(1, $1::int) number",
        MAX_TENANTS + 1,
    )
    await one.relay.safe(one.relay.clock())
    assert one.relay.counters.epochs == before + 1


async def test_a_writer_does_not_bump_thousands_of_tenants_one_by_one(one: Process) -> None:
    """A round makes an epoch of it."""
    await one.stop_rounds()
    one.store.bump = None  # type: ignore[method-assign,assignment]
    one.cache.committed(
        [(f"t{number}", "T:things", str(number)) for number in range(MAX_TENANTS + 1)]
    )
    await one.cache.settled()
    assert one.cache.counters.acknowledgements_delayed == 1


# -- by hand ---------------------------------------------------------------------------------------


async def test_an_invalidation_by_hand_under_the_number_of_a_row_from_a_dump_leaves_its_own(
    psql: asyncpg.Connection, empty_database_url: str
) -> None:
    """With an id of its own too."""
    outbox = PostgresOutbox(create_async_engine(empty_database_url))
    xid = await present_xid(psql) + 1
    await psql.execute(
        f"INSERT INTO {triggers.OUTBOX} (xid, tenant, tag, id) VALUES ('{xid}', 'a', '*', "
        f"'foreign')"
    )
    ((tenant, tag, row),) = await outbox.note([("a", "*")])
    assert (tenant, tag) == ("a", "*")
    assert row != "foreign"
    assert await psql.fetchval(f"SELECT id FROM {triggers.OUTBOX} WHERE xid = '{xid}'") == row
    await outbox.close()


async def test_an_invalidation_by_hand_that_reaches_nobody_is_not_confirmed_and_not_forgotten(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> None:
    """Neither database nor store: this process bypasses the tenant, and leaves the row as soon as
    it can."""
    first, second = (Process(empty_database_url, valkey_url, lease_s=0.6) for _ in range(2))
    async with running(first, second):
        await first.warm()
        await second.warm()
        note, bump = first.outbox.note, first.store.bump

        async def away(*given: Any, **options: Any) -> Any:
            raise OutboxError("away")

        async def gone(*given: Any, **options: Any) -> Any:
            raise StoreUnavailable("away")

        first.outbox.note, first.store.bump = away, gone  # type: ignore[method-assign]
        assert await first.cache.invalidate_all_tenant(TENANT) is False
        assert await first.said() == "respcache; fwd=bypass; detail=pending-invalidation"
        assert "; hit" in await second.said()
        first.outbox.note = note  # type: ignore[method-assign]
        await first.cache.settled()
        await second.relay.safe(second.relay.clock())
        assert "; hit" not in await second.said()
        first.store.bump = bump  # type: ignore[method-assign]
        await first.warm()


async def test_an_invalidation_by_hand_without_rows_is_confirmed_by_the_server_of_the_fence_only(
    one: Process,
) -> None:
    """Another one that answers does not count."""

    async def away(*given: Any, **options: Any) -> Any:
        raise OutboxError("away")

    async def elsewhere(*given: Any, **options: Any) -> Bumped:
        return Bumped("another server")

    bump = one.store.bump
    one.outbox.note = away  # type: ignore[method-assign]
    assert await one.cache.invalidate_all_tenant(TENANT) is True
    assert "; hit" not in await one.said()
    one.store.bump = elsewhere  # type: ignore[method-assign]
    assert await one.cache.invalidate_all_tenant(TENANT) is False
    one.store.bump = bump  # type: ignore[method-assign]
