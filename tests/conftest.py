"""Fixtures for all tests: real servers on free ports of 127.0.0.1, stopped whatever happens."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import redis

from crm.embedded import EmbeddedPostgres, EmbeddedValkey


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
            tmp_path / f"valkey{len(servers)}", settings={k.replace("_", "-"): v for k, v in settings.items()}
        )
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One PostgreSQL for all tests; they have databases of their own."""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("pg") / "postgres", password="only-for-tests", durable=False)
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.fixture(scope="session")
def template_database(postgres_server: EmbeddedPostgres) -> str:
    """A migrated database without rows, to be copied."""
    from crm.migrations import upgrade

    administer(postgres_server, 'CREATE DATABASE "template_crm"')
    upgrade(postgres_server.url("template_crm"))
    return "template_crm"


@pytest.fixture
def database_url(postgres_server: EmbeddedPostgres, template_database: str) -> Iterator[str]:
    """A migrated database without rows."""
    yield from temporary_database(postgres_server, f'TEMPLATE "{template_database}"')


@pytest.fixture
def empty_database_url(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """A database without tables."""
    yield from temporary_database(postgres_server, "")


def temporary_database(server: EmbeddedPostgres, options: str) -> Iterator[str]:
    name = f"test_{uuid4().hex}"
    administer(server, f'CREATE DATABASE "{name}" {options}')
    try:
        yield server.url(name)
    finally:
        administer(server, f'DROP DATABASE "{name}" WITH (FORCE)')


def administer(server: EmbeddedPostgres, statement: str) -> None:
    """Run one statement on the server, from outside any test's event loop."""

    async def run() -> Any:
        connection = await asyncpg.connect(server.url("postgres").replace("+asyncpg", ""))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())
