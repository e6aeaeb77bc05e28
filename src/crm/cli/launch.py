"""What ``run`` and ``demo`` share: one system per data folder, on servers started for it.

The system gets the newest schema, demo data if the database is empty, and a free port.
"""

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import SecretStr

from crm.cli.running import CommandFailed, cache_url, write_state
from crm.demo.seed import TENANTS, DemoTenant, seed_if_empty
from crm.migrations import upgrade
from crm.settings import Settings, stored_secret
from respcache.resp.url import ServerURL
from respcache.testing.servers import (
    VALKEY_PORT,
    EmbeddedPostgres,
    EmbeddedValkey,
    free_port,
    start_on_free_port,
)

DATABASE = "crm"


@dataclass(frozen=True)
class Launched:
    """The servers of an application, ready for use.

    ``settings`` name the servers; ``valkey`` is the Valkey if it was started here; ``data`` is a
    line that describes the data.
    """

    settings: Settings
    valkey: EmbeddedValkey | None
    data: str

    @property
    def database_url(self) -> str:
        """The address of the database, password included."""
        assert self.settings.database_url is not None
        return self.settings.database_url.get_secret_value()

    @property
    def cache_url(self) -> str | None:
        """The address of the cache server, password included; ``none`` for no cache at all."""
        return cache_url(self.settings)


@contextlib.contextmanager
def launched(
    settings: Settings,
    port: int,
    *,
    tenants: Mapping[str, DemoTenant] = TENANTS,
    fresh: bool = False,
    valkey: Mapping[str, str] | None = None,
    valkey_port: int = VALKEY_PORT,
) -> Iterator[Launched]:
    """Start the servers that no URL names; migrate the database; seed it if it is empty.

    On exit stop what was started. ``fresh`` first deletes the data of earlier runs. ``valkey`` are
    settings of the Valkey, ``valkey_port`` its preferred port. A state file in the data folder
    lets other commands find the system. Raises ``CommandFailed`` and ``ServerFailed``.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(settings.data_dir), contextlib.ExitStack() as stack:
        settings, server = _with_valkey(
            settings, stack, fresh=fresh, options=valkey, port=valkey_port
        )
        settings = _with_postgres(settings, stack, fresh=fresh)
        system = Launched(settings, server, "no demo data in production")
        upgrade(system.database_url)
        if settings.environment == "development":
            found = asyncio.run(seed_if_empty(system.database_url, tenants))
            system = replace(system, data=found)
        state = write_state(
            settings.data_dir,
            {
                "database_url": system.database_url,
                "port": port,
                "pid": os.getpid(),
                "cache_url": system.cache_url,
            },
        )
        stack.callback(state.unlink, missing_ok=True)
        yield system


def port_to_serve(settings: Settings) -> int:
    """Return a free port: PORT, or another one (printed) if the default port is in use.

    Raises ``CommandFailed`` if PORT was set and is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if "port" in settings.model_fields_set:
                raise CommandFailed(
                    f"port {settings.port} cannot be used ({error.strerror}): set another with "
                    f"PORT=..."
                ) from None
            port = free_port()
            print(f"port {settings.port} is in use: serving on {port} (choose one with PORT=...)")
            return port
    return settings.port


def _with_valkey(
    settings: Settings,
    stack: contextlib.ExitStack,
    *,
    fresh: bool,
    options: Mapping[str, str] | None,
    port: int,
) -> tuple[Settings, EmbeddedValkey | None]:
    """Start a Valkey unless REDIS_CACHE_URL is set."""
    if settings.redis_cache_url is not None:
        if not settings.without_cache:
            ServerURL.parse(settings.redis_cache_url.get_secret_value())
        return settings, None
    directory = settings.data_dir.resolve() / "valkey"
    password = stored_secret(settings.data_dir, "VALKEY_PASSWORD")
    if fresh:
        (directory / "dump.rdb").unlink(missing_ok=True)
    valkey = start_on_free_port(
        partial(EmbeddedValkey, directory, password=password, settings=options), port
    )
    stack.callback(valkey.stop)
    if valkey.port != port:
        print(f"port {port} is in use: Valkey listens on {valkey.port}")
    return settings.model_copy(update={"redis_cache_url": SecretStr(valkey.url)}), valkey


def _with_postgres(settings: Settings, stack: contextlib.ExitStack, *, fresh: bool) -> Settings:
    """Start a PostgreSQL unless DATABASE_URL is set."""
    if settings.database_url is not None:
        return settings
    directory = settings.data_dir.resolve() / "postgres"
    password = stored_secret(settings.data_dir, "POSTGRES_PASSWORD")
    postgres = start_on_free_port(partial(EmbeddedPostgres, directory, password=password))
    stack.callback(postgres.stop)
    asyncio.run(_create_database(postgres.url("postgres").replace("+asyncpg", ""), fresh=fresh))
    return settings.model_copy(update={"database_url": SecretStr(postgres.url(DATABASE))})


async def _create_database(url: str, *, fresh: bool) -> None:
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        if fresh:
            await connection.execute(f'DROP DATABASE IF EXISTS "{DATABASE}" WITH (FORCE)')
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
            await connection.execute(f'CREATE DATABASE "{DATABASE}"')
    finally:
        await connection.close()


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lock the data folder. Raises ``CommandFailed`` if another system uses it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CommandFailed(
                f"a system already runs on {folder}: stop it, or choose another folder with "
                f"DATA_DIR=..."
            ) from None
        yield
