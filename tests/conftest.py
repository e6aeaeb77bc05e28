"""Fixtures for all tests: real servers on free ports of 127.0.0.1, stopped whatever happens."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from respcache.testing.servers import EmbeddedPostgres, EmbeddedValkey
from tests import needs


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """End every run with what was skipped, why, and the command that enables it."""
    if lines := list(needs.skipped(terminalreporter.stats.get("skipped", []))):
        terminalreporter.section("skipped")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The library speaks asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One Valkey for the tests that do not break it."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def valkey_url(valkey_server: EmbeddedValkey) -> str:
    """The address of an empty Valkey."""
    with redis.Redis.from_url(valkey_server.url) as client:
        client.flushall()
        client.script_flush()
    return valkey_server.url


@pytest.fixture
def make_valkey(tmp_path: Path) -> Iterator[Callable[..., EmbeddedValkey]]:
    """Start a Valkey that the test may break."""
    servers: list[EmbeddedValkey] = []

    def make(**settings: str) -> EmbeddedValkey:
        server = EmbeddedValkey(
            tmp_path / f"valkey{len(servers)}",
            settings={k.replace("_", "-"): v for k, v in settings.items()},
        )
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One PostgreSQL for all tests; they have databases of their own."""
    server = EmbeddedPostgres(
        tmp_path_factory.mktemp("pg") / "postgres", password="only-for-tests", durable=False
    )
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.fixture(scope="session")
def migrated_database(postgres_server: EmbeddedPostgres) -> str:
    """A migrated database, used again and again: making one takes longer than most tests."""
    from crm.migrations import upgrade

    administer(postgres_server, "CREATE DATABASE migrated")
    upgrade(postgres_server.url("migrated"))
    return "migrated"


@pytest.fixture(scope="session")
def bare_database(postgres_server: EmbeddedPostgres) -> str:
    """A database for tables of a test's own."""
    administer(postgres_server, "CREATE DATABASE bare")
    return "bare"


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, migrated_database: str) -> str:
    """A migrated database without rows; its tables are not the test's to change."""
    administer(postgres_server, END_OTHERS, EMPTY_TABLES, database=migrated_database)
    return postgres_server.url(migrated_database)


@pytest.fixture
def empty_database_url(postgres_server: EmbeddedPostgres, bare_database: str) -> str:
    """A database without tables."""
    administer(
        postgres_server,
        END_OTHERS,
        "DROP SCHEMA public CASCADE; CREATE SCHEMA public",
        database=bare_database,
    )
    return postgres_server.url(bare_database)


END_OTHERS = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
EMPTY_TABLES = """
    DO $$
    DECLARE name text;
    BEGIN
        SET LOCAL session_replication_role = replica; -- no foreign keys, no triggers
        FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public'
                    AND tablename NOT IN (
                        'alembic_version', 'respcache_fence', 'respcache_trail'
                    ) LOOP
            EXECUTE format('DELETE FROM %I', name);
        END LOOP;
        ALTER TABLE respcache_trail DISABLE TRIGGER append_only;
        DELETE FROM respcache_trail;
        ALTER TABLE respcache_trail ENABLE ALWAYS TRIGGER append_only;
    END $$
"""


def administer(server: EmbeddedPostgres, *statements: str, database: str = "postgres") -> None:
    """Run statements on the server, from outside any test's event loop."""

    async def run() -> None:
        connection = await asyncpg.connect(server.url(database).replace("+asyncpg", ""))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())
