"""The outbox and its triggers on a real PostgreSQL: what each kind of write leaves behind, and that
both can be removed."""

import json
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest

from respcache.core.keys import EVERYBODY, SHARED
from respcache.writes import triggers
from respcache.writes.triggers import OUTBOX, Watched

pytestmark = pytest.mark.anyio

TABLES = """
    CREATE TABLE tenants (id text PRIMARY KEY, name text);
    CREATE TABLE accounts (id int PRIMARY KEY,
        tenant_id text REFERENCES tenants ON DELETE CASCADE, name text);
    CREATE TABLE notes (id int PRIMARY KEY, tenant_id text,
        account_id int REFERENCES accounts ON DELETE CASCADE);
    CREATE TABLE flags (name text PRIMARY KEY);
    INSERT INTO tenants VALUES ('a', 'A'), ('b', 'B');
    INSERT INTO accounts SELECT number, CASE WHEN number % 2 = 0 THEN 'a' ELSE 'b' END, 'x'
        FROM generate_series(1, 10) number;
    INSERT INTO notes SELECT number, CASE WHEN number % 2 = 0 THEN 'a' ELSE 'b' END, number
        FROM generate_series(1, 10) number;
"""
WATCHED = [
    Watched("tenants", tenant_column="id", shared=True),
    Watched("accounts"),
    Watched("notes"),
    Watched("flags", tenant_column=None),
]


@pytest.fixture
async def bare(empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A database with tables and rows, and no outbox."""
    connection = await asyncpg.connect(empty_database_url.replace("+asyncpg", ""))
    await connection.execute(TABLES)
    yield connection
    await connection.close()


@pytest.fixture
async def database(bare: asyncpg.Connection) -> asyncpg.Connection:
    """The same with an outbox, which is empty."""
    await run(bare, install)
    return bare


async def run(connection: asyncpg.Connection, script: Callable[[triggers.Execute], None]) -> None:
    statements: list[str] = []
    script(statements.append)
    async with connection.transaction():
        for statement in statements:
            await connection.execute(statement)


def install(execute: triggers.Execute) -> None:
    triggers.create_outbox(execute)
    triggers.create_triggers(execute, WATCHED)


def remove(execute: triggers.Execute) -> None:
    triggers.drop_triggers(execute, [watched.table for watched in WATCHED])
    triggers.drop_outbox(execute)


async def left(connection: asyncpg.Connection) -> list[tuple[str, str]]:
    """Return (tenant, tag) of every row of the outbox, and empty it."""
    rows = await connection.fetch(f"DELETE FROM {OUTBOX} RETURNING tenant, tag")
    return sorted((row["tenant"], row["tag"]) for row in rows)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        ("INSERT INTO accounts VALUES (11, 'a', 'new')", [("a", "T:accounts")]),
        ("UPDATE accounts SET name = 'y' WHERE id = 2", [("a", "T:accounts")]),
        ("UPDATE accounts SET name = 'y'", [("a", "T:accounts"), ("b", "T:accounts")]),
        (
            "UPDATE accounts SET tenant_id = 'b' WHERE id = 2",
            [("a", "T:accounts"), ("b", "T:accounts")],
        ),
        ("UPDATE accounts SET name = 'y' WHERE id = 99", []),
        ("DELETE FROM notes WHERE id = 1", [("b", "T:notes")]),
        ("DELETE FROM accounts WHERE id = 1", [("b", "T:accounts"), ("b", "T:notes")]),
        (
            "DELETE FROM tenants WHERE id = 'a'",
            [("a", "T:accounts"), ("a", "T:notes"), ("a", "T:tenants"), (SHARED, "T:tenants")],
        ),
        ("INSERT INTO accounts VALUES (11, NULL, 'of nobody')", [(SHARED, "T:accounts")]),
        ("INSERT INTO flags VALUES ('dark')", [(SHARED, "T:flags")]),
        ("TRUNCATE notes", [(EVERYBODY, "T:notes")]),
        (
            "INSERT INTO accounts VALUES (2, 'b', 'u') ON CONFLICT (id) DO UPDATE SET name = 'u'",
            [("a", "T:accounts")],
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
async def test_every_kind_of_write_leaves_the_tenants_whose_rows_it_changed(
    database: asyncpg.Connection, write: str, expected: list[tuple[str, str]]
) -> None:
    """Old and new tenant, cascades, rows of nobody, and nothing for what changed nothing."""
    await database.execute(write)
    assert await left(database) == sorted(expected)


async def test_copy_leaves_rows_too(database: asyncpg.Connection) -> None:
    """No hook of an application sees it; the trigger does."""
    await database.copy_records_to_table("accounts", records=[(11, "a", "x"), (12, "b", "x")])
    assert await left(database) == [("a", "T:accounts"), ("b", "T:accounts")]


async def test_a_transaction_leaves_one_row_a_tenant_and_table(
    database: asyncpg.Connection,
) -> None:
    """However many rows and statements it has, in savepoints too; another transaction leaves its
    own."""
    async with database.transaction():
        await database.execute(
            "INSERT INTO accounts SELECT n, 'a', 'x' FROM generate_series(1000, 6000) n"
        )
        async with database.transaction():
            await database.execute("UPDATE accounts SET name = 'y' WHERE tenant_id = 'a'")
    await database.execute("UPDATE accounts SET name = 'z' WHERE id = 2")
    rows = await database.fetch(f"SELECT xid, tenant, tag, id FROM {OUTBOX}")
    assert [(row["tenant"], row["tag"]) for row in rows] == [("a", "T:accounts")] * 2
    assert len({row["xid"] for row in rows}) == 2
    assert len({row["id"] for row in rows}) == 2
    assert all(len(row["id"]) == 16 for row in rows)


async def test_what_is_rolled_back_leaves_nothing(database: asyncpg.Connection) -> None:
    """A whole transaction, or a savepoint of it."""
    async with database.transaction():
        savepoint = database.transaction()
        await savepoint.start()
        await database.execute("UPDATE accounts SET name = 'y'")
        await savepoint.rollback()
        await database.execute("DELETE FROM notes WHERE id = 2")
    assert await left(database) == [("a", "T:notes")]


async def test_who_may_only_write_to_a_table_needs_no_right_on_the_outbox(
    database: asyncpg.Connection,
) -> None:
    """The functions run with the rights of their owner, whatever the writer's search path is."""
    await database.execute("DROP ROLE IF EXISTS respcache_clerk; CREATE ROLE respcache_clerk")
    try:
        await database.execute(
            "GRANT USAGE ON SCHEMA public TO respcache_clerk; GRANT SELECT, UPDATE ON accounts TO "
            "respcache_clerk"
        )
        await database.execute("SET ROLE respcache_clerk; SET search_path = pg_temp, pg_catalog")
        # what the function says is not what he can redefine
        await database.execute("CREATE DOMAIN pg_temp.text AS integer")
        await database.execute("UPDATE public.accounts SET name = 'y' WHERE id = 2")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await database.execute(f"DELETE FROM public.{OUTBOX}")
        await database.execute("RESET ROLE; RESET search_path")
        assert await left(database) == [("a", "T:accounts")]
    finally:
        await database.execute(
            "RESET ROLE; DROP OWNED BY respcache_clerk; DROP ROLE respcache_clerk"
        )


async def test_the_triggers_fire_also_for_a_replication_role(database: asyncpg.Connection) -> None:
    """Restores and tools that load data write under it, and ordinary triggers would stay silent."""
    await database.execute("SET session_replication_role = replica")
    await database.execute("UPDATE accounts SET name = 'y' WHERE id = 2")
    await database.execute("RESET session_replication_role")
    assert await left(database) == [("a", "T:accounts")]


async def test_outbox_and_triggers_are_added_and_removed_without_a_trace(
    bare: asyncpg.Connection,
) -> None:
    """To and fro, twice, with the rows of the tables untouched."""

    async def named() -> list[str]:
        rows = await bare.fetch("""
            SELECT relname::text AS name FROM pg_class WHERE relname LIKE 'respcache%'
            UNION ALL SELECT tgname FROM pg_trigger WHERE tgname LIKE 'respcache%'
            UNION ALL SELECT proname FROM pg_proc WHERE proname LIKE 'respcache%'""")
        return [row["name"] for row in rows]

    accounts = await bare.fetch("SELECT * FROM accounts ORDER BY id")
    for _ in range(2):
        await run(bare, install)
        assert {OUTBOX, "respcache_note_accounts", "respcache_truncate"} <= set(await named())
        await bare.execute("UPDATE accounts SET name = name")
        assert len(await left(bare)) == 2
        await run(bare, remove)
        assert await named() == []
        await bare.execute("UPDATE accounts SET name = name")
    assert await bare.fetch("SELECT * FROM accounts ORDER BY id") == accounts


async def test_creating_triggers_again_takes_the_new_tenant_column(
    database: asyncpg.Connection,
) -> None:
    """A later migration may change its mind, and names are quoted."""
    await database.execute(
        'ALTER TABLE accounts ADD COLUMN "the ""owner""" text; UPDATE accounts SET "the '
        '""owner""" = \'own\''
    )
    await left(database)
    await run(
        database,
        lambda execute: triggers.create_triggers(
            execute, [Watched("accounts", tenant_column='the "owner"')]
        ),
    )
    await database.execute("UPDATE accounts SET name = 'y' WHERE id = 2")
    assert await left(database) == [("own", "T:accounts")]


@pytest.mark.parametrize(
    ("one", "other"),
    [('it\'s a "table"', "plain"), ("x" * 60 + "_1", "x" * 60 + "_2")],
    ids=["quoted", "long"],
)
async def test_any_name_of_a_table_leaves_its_own_tag(
    database: asyncpg.Connection, one: str, other: str
) -> None:
    """Quotes in it, or so long that the name of its function would be cut off to that of another
    table."""
    names = [one, other]
    for name in names:
        await database.execute(f"CREATE TABLE {triggers.quoted(name)} (tenant_id text)")
    await run(database, lambda execute: triggers.create_triggers(execute, map(Watched, names)))
    for name in names:
        await database.execute(f"INSERT INTO {triggers.quoted(name)} VALUES ('a')")
        assert await left(database) == [("a", f"T:{name}")]
    await run(database, lambda execute: triggers.drop_triggers(execute, names))
    await database.execute(f"INSERT INTO {triggers.quoted(one)} VALUES ('a')")
    assert await left(database) == []


async def test_a_row_from_a_dump_under_the_number_of_a_transaction_gets_an_id_of_its_own(
    database: asyncpg.Connection,
) -> None:
    """Once: the second statement meets its own row. So does one after a savepoint at most once
    more."""
    xid = int(await database.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text")) + 1
    await database.execute(
        f"INSERT INTO {OUTBOX} (xid, tenant, tag, id) VALUES ('{xid}', 'a', 'T:accounts', "
        f"'foreign')"
    )
    async with database.transaction():
        ids = []
        for _ in range(3):
            await database.execute("UPDATE accounts SET name = 'y' WHERE id = 2")
            ids.append(
                await database.fetchval(f"SELECT id FROM {OUTBOX} WHERE xid = pg_current_xact_id()")
            )
    assert await database.fetchval(f"SELECT xid::text FROM {OUTBOX}") == str(xid)
    assert ids[0] != "foreign"
    assert ids == [ids[0]] * 3


async def test_the_setting_says_what_the_transaction_has_left(database: asyncpg.Connection) -> None:
    """As it is in the table at COMMIT: with savepoints rolled back, and nothing of the transaction
    before."""
    ask = f"SELECT current_setting('{triggers.setting()}', true)"
    for _ in range(2):
        async with database.transaction():
            await database.execute("UPDATE accounts SET name = 'y'")
            savepoint = database.transaction()
            await savepoint.start()
            await database.execute("DELETE FROM notes")
            await savepoint.rollback()
            await database.execute("UPDATE accounts SET name = 'z'")
            async with database.transaction():
                await database.execute("INSERT INTO flags VALUES ('dark') ON CONFLICT DO NOTHING")
            told = [tuple(row) for row in json.loads(f"[{await database.fetchval(ask)}]")]
            rows = await database.fetch(
                f"SELECT tenant, tag, id FROM {OUTBOX} WHERE xid = pg_current_xact_id()"
            )
            assert sorted(told) == sorted(tuple(row) for row in rows)
            assert {(tenant, tag) for tenant, tag, _ in told} >= {
                ("a", "T:accounts"),
                ("b", "T:accounts"),
            }
        assert not await database.fetchval(ask)
        await database.execute("DELETE FROM flags")


async def test_columns_may_be_called_like_the_variables_of_the_function(
    database: asyncpg.Connection,
) -> None:
    """In the function, a name is a column first."""
    await database.execute(
        "CREATE TABLE odd (respcache_new text, respcache_all text, tenant text, tag text)"
    )
    await run(
        database,
        lambda execute: triggers.create_triggers(
            execute, [Watched("odd", tenant_column="respcache_new")]
        ),
    )
    await database.execute("INSERT INTO odd VALUES ('a', 'b', 'c', 'd')")
    assert await left(database) == [("a", "T:odd")]


async def test_a_renamed_table_is_unwatched_by_its_present_name(
    database: asyncpg.Connection,
) -> None:
    """Its triggers run the function of the former name; that of another table of this name
    stays."""
    await database.execute(
        "ALTER TABLE accounts RENAME TO accounts_old; CREATE TABLE accounts (tenant_id text)"
    )
    await run(database, lambda execute: triggers.create_triggers(execute, [Watched("accounts")]))
    await run(database, lambda execute: triggers.drop_triggers(execute, ["accounts_old"]))
    await database.execute("UPDATE accounts_old SET name = 'y'; INSERT INTO accounts VALUES ('a')")
    assert await left(database) == [("a", "T:accounts")]


async def test_an_older_server_is_refused_by_name(
    bare: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``CREATE OR REPLACE TRIGGER`` would be a syntax error there."""
    monkeypatch.setattr(triggers, "MIN_SERVER_VERSION", 990_000)
    with pytest.raises(
        asyncpg.RaiseError, match=r"respcache needs PostgreSQL 99 or newer, this is \d+"
    ):
        await run(bare, install)
