"""Writes are seen at the engine: what each way of writing tells the cache, and when. On a real
PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import (
    ForeignKey,
    UniqueConstraint,
    Uuid,
    column,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy import table as raw_table
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    joinedload,
    mapped_column,
    relationship,
)

from respcache import Cache, ConfigurationError, MemoryStore, SingleTenant, UndeclaredWrite
from respcache.context import Exchange, ReadSet, current
from respcache.core.keys import SHARED
from respcache.writes.sqlalchemy import Watch, watch

pytestmark = pytest.mark.anyio
A, B = uuid4(), uuid4()


class Base(DeclarativeBase):
    pass


class Tenant(Base):
    __tablename__ = "tenants"
    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True, default=uuid4)
    name: Mapped[str]


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[UUID | None] = mapped_column(Uuid)
    name: Mapped[str] = mapped_column(default="x")
    __table_args__ = (UniqueConstraint("tenant_id", "name", "id", name="one_of_each"),)
    contacts: Mapped[list["Contact"]] = relationship(back_populates="account", passive_deletes=True)


class Contact(Base):
    __tablename__ = "contacts"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[UUID] = mapped_column(Uuid)
    account_id: Mapped[int | None] = mapped_column(ForeignKey("accounts.id", ondelete="SET NULL"))
    account: Mapped[Account | None] = relationship(back_populates="contacts")


class Rate(Base):
    __tablename__ = "rates"
    id: Mapped[int] = mapped_column(primary_key=True)


class Told(Cache):
    """A cache that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("public"))
        self.told: list[dict[str, set[str]]] = []
        self.when_told: Callable[[], None] = lambda: None
        self._reported = self.writes.changed
        self.writes.changed = self._changed  # type: ignore[method-assign]

    def _changed(self, tables: Any) -> None:
        self.told.append({tenant: set(names) for tenant, names in tables.items()})
        self.when_told()
        self._reported(tables)


@pytest.fixture
async def cache() -> AsyncIterator[Told]:
    told = Told()
    await told.connect()
    yield told
    await told.close()


@pytest.fixture
async def engine(empty_database_url: str, cache: Told) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(empty_database_url)
    async with made.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(
            insert(Account), [{"id": 1, "tenant_id": A}, {"id": 2, "tenant_id": B}]
        )
        await connection.execute(insert(Contact), [{"id": 1, "tenant_id": A, "account_id": 1}])
    await made.dispose()
    # watched from its very first connection, as in an application
    made = create_async_engine(empty_database_url)
    watching = begin_watching(made, cache)
    yield made
    watching.close()
    await made.dispose()


def begin_watching(engine: Any, cache: Cache) -> Watch:
    return watch(
        engine, cache, metadata=Base.metadata, tenant_is={"tenants": "id"}, shared=("tenants",)
    )


# -- what is seen ----------------------------------------------------------------------------------


async def orm_insert(session: AsyncSession) -> None:
    session.add(Account(id=3, tenant_id=A))
    await session.flush()


async def orm_update(session: AsyncSession) -> None:
    account = await session.get_one(Account, 1)
    account.name = "y"
    await session.flush()


async def orm_update_of_an_expired_object(session: AsyncSession) -> None:
    account = await session.get_one(Account, 1)
    session.expire(account)
    account.name = "y"
    await session.flush()


async def core_insert(session: AsyncSession) -> None:
    await session.execute(insert(Account).values(id=3, tenant_id=A))


async def core_insert_of_many(session: AsyncSession) -> None:
    await session.execute(
        insert(Account.__table__).values([{"id": 3, "tenant_id": A}, {"id": 4, "tenant_id": A}])
    )


async def bulk_insert(session: AsyncSession) -> None:
    await session.execute(insert(Account), [{"id": 10 + i, "tenant_id": A} for i in range(50)])


async def insert_returning(session: AsyncSession) -> None:
    await session.scalars(
        insert(Account).returning(Account.id), [{"id": 10 + i, "tenant_id": A} for i in range(5)]
    )


UNIQUE = ["tenant_id", "name", "id"]


async def upsert(session: AsyncSession) -> None:
    values = pg_insert(Account).values(id=1, tenant_id=A, name="x")
    await session.execute(values.on_conflict_do_update(index_elements=UNIQUE, set_={"name": "z"}))


async def upsert_of_everything(session: AsyncSession) -> None:
    values = pg_insert(Account).values(id=1, tenant_id=A, name="x")
    everything = {"tenant_id": values.excluded.tenant_id, "name": values.excluded.name}
    await session.execute(values.on_conflict_do_update(index_elements=UNIQUE, set_=everything))


async def insert_unless_there(session: AsyncSession) -> None:
    await session.execute(
        pg_insert(Account).values(id=1, tenant_id=A).on_conflict_do_nothing(index_elements=["id"])
    )


async def declared_upsert_by_key(session: AsyncSession) -> None:
    values = (
        pg_insert(Account)
        .values(id=1, tenant_id=A)
        .on_conflict_do_update(index_elements=["id"], set_={"name": "z"})
    )
    await session.execute(values, execution_options={"respcache_tenant": A})


async def bulk_update(session: AsyncSession) -> None:
    await session.execute(
        update(Account).where(Account.tenant_id == A, Account.id < 9).values(name="z")
    )


async def bulk_update_of_in(session: AsyncSession) -> None:
    await session.execute(update(Account).where(Account.tenant_id.in_([A])).values(name="z"))


async def bulk_save(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.bulk_save_objects([Account(id=3, tenant_id=A)]))


async def declared_text(session: AsyncSession) -> None:
    options = {"respcache_writes": ("accounts",), "respcache_tenant": A}
    await session.execute(
        text("UPDATE accounts SET name = 'q' WHERE id = 1"), execution_options=options
    )


async def declared_bulk_by_key(session: AsyncSession) -> None:
    await session.connection(execution_options={"respcache_tenant": A})
    await session.execute(update(Account), [{"id": 1, "name": "q"}])


ACCOUNT_WRITES = [
    orm_insert,
    orm_update,
    orm_update_of_an_expired_object,
    core_insert,
    core_insert_of_many,
    bulk_insert,
    insert_returning,
    upsert,
    upsert_of_everything,
    insert_unless_there,
    declared_upsert_by_key,
    bulk_update,
    bulk_update_of_in,
    bulk_save,
    declared_text,
    declared_bulk_by_key,
]


@pytest.mark.parametrize("write", ACCOUNT_WRITES, ids=lambda write: write.__name__)
async def test_every_way_of_writing_tells_table_and_tenant(
    engine: AsyncEngine, cache: Told, write: Any
) -> None:
    """Once, after the commit, for exactly the tenant whose rows changed."""
    async with AsyncSession(engine) as session:
        await write(session)
        assert cache.told == []
        await session.commit()
    assert cache.told == [{str(A): {"accounts"}}]


@pytest.mark.parametrize("repeat", range(2))
async def test_parameters_of_a_cached_statement_are_read_each_time(
    engine: AsyncEngine, cache: Told, repeat: int
) -> None:
    """The compiled statement is the same object; the tenant is not."""
    for tenant in (A, B, A):
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(
                update(Account).where(Account.tenant_id == tenant).values(name="z")
            )
    assert cache.told == [{str(t): {"accounts"}} for t in (A, B, A)]


async def test_a_row_that_moves_invalidates_both_tenants(engine: AsyncEngine, cache: Told) -> None:
    """The old owner loses it, the new one gains it: by the ORM and in bulk."""
    async with AsyncSession(engine) as session, session.begin():
        (await session.get_one(Account, 1)).tenant_id = B
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(
            update(Account).where(Account.tenant_id == B, Account.id == 1).values(tenant_id=A)
        )
    assert [set(told) for told in cache.told] == [{str(A), str(B)}] * 2


async def test_deleting_names_the_tables_that_the_database_changes_by_itself(
    engine: AsyncEngine, cache: Told
) -> None:
    """ON DELETE SET NULL changes contacts without a statement of ours."""
    async with AsyncSession(engine) as session, session.begin():
        await session.delete(await session.get_one(Account, 1))
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(delete(Account).where(Account.tenant_id == B))
    assert cache.told == [{str(A): {"accounts", "contacts"}}, {str(B): {"accounts", "contacts"}}]


async def test_rows_without_a_tenant_and_shared_tables_change_shared_data(
    engine: AsyncEngine, cache: Told
) -> None:
    """The home of callers without a tenant."""
    tenant = Tenant(id=uuid4(), name="new")
    key = str(tenant.id)
    async with AsyncSession(engine) as session, session.begin():
        session.add(tenant)
    async with AsyncSession(engine) as session, session.begin():
        session.add(Account(id=5, tenant_id=None))
        await session.execute(insert(Rate).values(id=1))
    assert cache.told[0].keys() == {key, SHARED}
    assert cache.told[1] == {SHARED: {"accounts", "rates"}}


async def test_core_connections_are_seen(engine: AsyncEngine, cache: Told) -> None:
    """No session is needed."""
    async with engine.begin() as connection:
        await connection.execute(
            update(Account.__table__).where(Account.__table__.c.tenant_id == A).values(name="c")
        )
        assert cache.told == []
    assert cache.told == [{str(A): {"accounts"}}]


async def test_autocommit_is_told_at_once_and_survives_a_rollback(
    engine: AsyncEngine, cache: Told
) -> None:
    """Each statement is its own transaction there."""
    async with engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(update(Account).where(Account.tenant_id == A).values(name="c"))
        assert cache.told == [{str(A): {"accounts"}}]
        await connection.rollback()


async def test_an_autocommit_statement_that_raises_is_told(
    engine: AsyncEngine, cache: Told
) -> None:
    """It may have been carried out before the connection broke."""
    async with engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        raw.terminate()
        with pytest.raises(DBAPIError):
            await connection.execute(update(Account).where(Account.tenant_id == A).values(name="c"))
    assert cache.told == [{str(A): {"accounts"}}]


async def test_a_tenant_that_the_database_computes_is_refused_in_a_flush(
    engine: AsyncEngine, cache: Told
) -> None:
    """Nobody here can know whose the row becomes."""
    async with AsyncSession(engine) as session:
        account = await session.get_one(Account, 1)
        account.tenant_id = func.gen_random_uuid()  # type: ignore[assignment]
        with pytest.raises(UndeclaredWrite):
            await session.flush()
    assert cache.told == []


def test_a_plain_engine_is_watched_too(empty_database_url: str) -> None:
    """Sync engines, as used from threads."""
    cache = Told()
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    watching = begin_watching(engine, cache)
    with Session(engine) as session, session.begin():
        session.add(Account(id=1, tenant_id=A))
    watching.close()
    with Session(engine) as session, session.begin():
        session.add(Account(id=2, tenant_id=A))
    assert cache.told == [{str(A): {"accounts"}}]
    assert cache.pending_tenants == (str(A),)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        text("UPDATE accounts SET name = 'q'"),
        text("  /* hint */ delete from accounts"),
        text("WITH gone AS (DELETE FROM accounts RETURNING id) SELECT count(*) FROM gone"),
        text("TRUNCATE accounts"),
        text("DO $$ BEGIN END $$"),
        text("COMMIT"),
        update(Account).values(name="all tenants"),
        update(Account).where(Account.tenant_id != A).values(name="others"),
        delete(Account).where(Account.id == 1),
        delete(Account).where((Account.tenant_id == A) | (Account.id == 2)),
        insert(Account).from_select(["id"], select(Account.id + 100)),
        pg_insert(Account)
        .values(id=2, tenant_id=A)
        .on_conflict_do_update(index_elements=["id"], set_={"name": "q"}),
        pg_insert(Account)
        .values(id=2, tenant_id=A)
        .on_conflict_do_update(constraint="one_of_each", set_={"name": "q"}),
        pg_insert(Account)
        .values(id=1, tenant_id=A)
        .on_conflict_do_update(index_elements=UNIQUE, set_={"tenant_id": B}),
        update(Account).where(Account.tenant_id == A).values(tenant_id=func.gen_random_uuid()),
        select(
            update(Account)
            .where(Account.tenant_id == A)
            .values(name="x")
            .returning(Account.id)
            .cte()
            .c.id
        ),
    ],
    ids=str,
)
async def test_a_change_that_cannot_be_told_is_refused_before_it_runs(
    engine: AsyncEngine, cache: Told, statement: Any
) -> None:
    """The error comes before the statement, and the connection stays usable."""
    async with AsyncSession(engine) as session:
        with pytest.raises(UndeclaredWrite):
            await session.execute(statement)
        assert await session.scalar(select(func.count()).select_from(Account)) == 2
        names = set(await session.scalars(select(Account.name)))
        await session.commit()
    assert names == {"x"}
    assert cache.told == []


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "  select 'delete from accounts'",
        "SELECT * FROM accounts FOR UPDATE",
        "SHOW search_path",
    ],
)
async def test_reading_text_is_not_refused(engine: AsyncEngine, cache: Told, sql: str) -> None:
    """Words in literals and row locks are no changes."""
    async with AsyncSession(engine) as session:
        await session.execute(text(sql))
        await session.commit()
    assert cache.told == []


async def test_tables_that_can_never_be_invalidated_are_refused_at_start_up(
    engine: AsyncEngine, cache: Told
) -> None:
    """A misspelt table and one without tenants."""
    for table in ("acounts", "rates"):
        cache.registry.tables = {table}
        with pytest.raises(ConfigurationError, match=table):
            cache.registry.register([])


# -- when it is told -------------------------------------------------------------------------------


async def test_a_bump_follows_the_commit_and_never_a_savepoint(
    engine: AsyncEngine, cache: Told
) -> None:
    """Released savepoints are not commits; savepoints rolled back may be told, they only cost a
    miss."""
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            session.add(Account(id=3, tenant_id=A))
        assert cache.told == []
        await session.commit()
    assert cache.told == [{str(A): {"accounts"}}]


async def test_a_session_that_joined_a_transaction_does_not_tell_before_its_owner_commits(
    engine: AsyncEngine, cache: Told
) -> None:
    """The session's commit is nobody's COMMIT."""
    async with engine.connect() as connection:
        transaction = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Account(id=3, tenant_id=A))
            await session.commit()
        assert cache.told == []
        await transaction.commit()
    assert cache.told == [{str(A): {"accounts"}}]


async def test_a_rollback_tells_nothing(engine: AsyncEngine, cache: Told) -> None:
    """Nor does the next transaction on the same connection tell it."""
    async with AsyncSession(engine) as session:
        session.add(Account(id=3, tenant_id=A))
        await session.flush()
        await session.rollback()
        await session.execute(update(Account).where(Account.tenant_id == B).values(name="b"))
        await session.commit()
    assert cache.told == [{str(B): {"accounts"}}]


def accounts_seen_elsewhere(url: str) -> int:
    """Count the accounts that another connection sees now; blocks the caller, as the moment
    counts."""

    async def count() -> int:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            found: int = await connection.fetchval("SELECT count(*) FROM accounts")
            return found
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, count()).result()


async def test_told_only_after_commit_has_returned(
    engine: AsyncEngine, cache: Told, empty_database_url: str
) -> None:
    """When the cache hears of a change, another connection sees it already. SQLAlchemy's own commit
    event comes before that."""
    seen: list[int] = []
    event.listen(
        engine.sync_engine,
        "commit",
        lambda connection: seen.append(accounts_seen_elsewhere(empty_database_url)),
    )
    cache.when_told = lambda: seen.append(accounts_seen_elsewhere(empty_database_url))
    async with AsyncSession(engine) as session, session.begin():
        session.add(Account(id=3, tenant_id=A))
    assert seen == [2, 3]


async def test_a_commit_that_raises_after_it_was_sent_is_told(
    engine: AsyncEngine, cache: Told
) -> None:
    """Its outcome is unknown: the connection dies between COMMIT and its answer."""
    async with AsyncSession(engine) as session:
        session.add(Account(id=3, tenant_id=A))
        await session.flush()
        connection = await session.connection()
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        raw.terminate()
        with pytest.raises(Exception, match=r"closed|connection"):
            await session.commit()
    assert cache.told == [{str(A): {"accounts"}}]


async def test_a_cancelled_request_cannot_take_its_bump_along(
    engine: AsyncEngine, cache: Told
) -> None:
    """Once COMMIT returned the bump runs by itself."""
    committed = asyncio.Event()

    async def handler() -> None:
        async with AsyncSession(engine) as session, session.begin():
            session.add(Account(id=3, tenant_id=A))
        committed.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(handler())
    await committed.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await cache.settled()
    assert cache.told == [{str(A): {"accounts"}}]


# -- what a fill reads -----------------------------------------------------------------------------


async def reads_of(
    engine: AsyncEngine, statement: Any, *, began_before: bool = False, level: str | None = None
) -> ReadSet:
    record = Exchange()
    token = current.set(record)
    try:
        made = engine.execution_options(isolation_level=level) if level else engine
        async with AsyncSession(made) as session:
            if began_before:
                await session.connection()
            record.reads = ReadSet()
            await session.execute(statement)
        return record.reads
    finally:
        current.reset(token)


other = aliased(Account)
READS: list[tuple[Any, set[str]]] = [
    (select(Account.id), {"accounts"}),
    (select(func.count()).select_from(Contact), {"contacts"}),
    (select(Contact).options(joinedload(Contact.account)), {"accounts", "contacts"}),
    (select(Contact.id).join(other, other.id == Contact.account_id), {"accounts", "contacts"}),
    (
        select(Account.id).where(Account.id.in_(select(Contact.account_id))),
        {"accounts", "contacts"},
    ),
    (select(Account.id).union(select(Contact.id)), {"accounts", "contacts"}),
    (select(select(Contact.id).cte("recent").c.id), {"contacts"}),
    (text("SELECT a.id FROM accounts a, contacts c"), {"accounts", "contacts"}),
    (
        text("SELECT a.id, a.name FROM accounts a, unnest(ARRAY[1, 2]) AS u ORDER BY a.id, u"),
        {"accounts"},
    ),
    (
        text("SELECT 1 FROM accounts a JOIN contacts c USING (id, tenant_id) GROUP BY a.id, c.id"),
        {"accounts", "contacts"},
    ),
    (select(func.extract("year", func.now())), set()),
]


def named(value: Any) -> str:
    """Name a parameter the same way in every process."""
    return ",".join(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(("statement", "tables"), READS, ids=named)
async def test_the_tables_that_a_fill_selects_from_are_seen(
    engine: AsyncEngine, statement: Any, tables: set[str]
) -> None:
    """In joins, eager loads, subqueries, unions, common table expressions and text."""
    reads = await reads_of(engine, statement)
    assert reads.tables == tables
    assert not reads.undeclared_sql
    assert not reads.old_snapshot


async def test_a_name_that_is_no_known_table_makes_a_read_undeclared(engine: AsyncEngine) -> None:
    """A view or a raw table cannot be invalidated, unless the statement says what stands behind
    it."""
    for unknown in (
        text("SELECT count(*) FROM pg_class"),
        text("SELECT 1 FROM accounts a, (SELECT 1 AS x) AS b, pg_class c"),
        text("SELECT 1 FROM accounts a JOIN contacts c ON a.id IN (c.id, 3), ONLY pg_class"),
        select(Account.id).join(raw_table("pg_class", column("oid")), column("oid") == Account.id),
        select(Account.id).where(
            Account.id.in_(select(raw_table("pg_class", column("oid")).c.oid))
        ),
    ):
        assert (await reads_of(engine, unknown)).undeclared_sql, unknown
    statement = text("SELECT count(*) FROM pg_class")
    declared = await reads_of(engine, statement.execution_options(respcache_reads=("accounts",)))
    assert (declared.tables, declared.undeclared_sql) == ({"accounts"}, False)


async def test_a_snapshot_older_than_the_capture_is_not_stored(engine: AsyncEngine) -> None:
    """A session begun before the capture reads the past under REPEATABLE READ; under READ COMMITTED
    it does not."""
    assert (
        await reads_of(engine, select(Account.id), began_before=True, level="REPEATABLE READ")
    ).old_snapshot
    assert not (await reads_of(engine, select(Account.id), level="REPEATABLE READ")).old_snapshot
    assert not (await reads_of(engine, select(Account.id), began_before=True)).old_snapshot


async def test_objects_loaded_before_the_capture_are_not_stored(engine: AsyncEngine) -> None:
    """The identity map gives them out again as they were, with or without a statement."""
    record = Exchange()
    token = current.set(record)
    try:
        async with AsyncSession(engine) as session:
            held = await session.get(Account, 1)
            record.reads = ReadSet()
            await session.execute(select(Account))
            assert record.reads.old_snapshot
            inner = record.nested("t")
            assert inner.reads is not None
            assert inner.reads.old_snapshot
            assert held is not None
    finally:
        current.reset(token)
