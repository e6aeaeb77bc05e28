"""What ``run`` and ``demo`` have in common: one system per folder, on servers started for it, with
demo data, at a free port."""

import asyncio
import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from crm.settings import Settings, stored_secret
from respcache.resp.url import ServerURL
from respcache.testing.servers import (
    VALKEY_PORT,
    EmbeddedPostgres,
    EmbeddedValkey,
    free_port,
    start_on_free_port,
    write_private,
)  # fmt: skip

if TYPE_CHECKING:
    from crm.demo.seed import Sized

STATE_FILE = "running.json"
DATABASE = "crm"


class CommandFailed(Exception):
    """A command cannot do what it was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Launched:
    """What an application can be started on: settings that name its servers, the Valkey if it was
    started here, and a line that says which data there are."""

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
        """The address of the cache's server, password included; ``none`` for no cache at all."""
        return cache_url(self.settings)


@contextlib.contextmanager
def launched(
    settings: Settings,
    port: int,
    *,
    tenants: "Mapping[str, Sized] | None" = None,
    fresh: bool = False,
    valkey: Mapping[str, str] | None = None,
    valkey_port: int = VALKEY_PORT,
) -> Iterator[Launched]:
    """Start what no URL names, bring the database up to date, fill it if it is empty; stop what was
    started in the end.

    ``tenants``: those of the demo data, where not the usual ones. ``fresh`` begins without what an
    earlier run left in the folder. ``valkey``: settings of the Valkey, ``valkey_port``: where it
    listens if it can. Other commands find the system by a file in the data folder.
    """
    from crm.demo.seed import TENANTS, seed_if_empty
    from crm.migrations import upgrade

    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(settings.data_dir), contextlib.ExitStack() as stack:
        settings, server = _with_valkey(
            settings, stack, fresh=fresh, options=valkey, port=valkey_port
        )
        settings = _with_postgres(settings, stack, fresh=fresh)
        system = Launched(settings, server, "")
        upgrade(system.database_url)
        said = "no demo data in production"
        if settings.environment == "development":
            said = asyncio.run(seed_if_empty(system.database_url, tenants or TENANTS))
        state = settings.data_dir / STATE_FILE
        told = {
            "database_url": system.database_url,
            "port": port,
            "pid": os.getpid(),
            "cache_url": system.cache_url,
        }
        write_private(state, json.dumps(told))
        stack.callback(state.unlink, missing_ok=True)
        yield replace(system, data=said)


def port_to_serve(settings: Settings) -> int:
    """Return the port to serve on: the given one or an error, the default one or another that is
    said."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if "port" in settings.model_fields_set:
                raise CommandFailed(
                    f"port {settings.port} cannot be had ({error.strerror}): give another with "
                    f"PORT=..."
                ) from None
            port = free_port()
            print(f"port {settings.port} is taken: serving on {port} (choose one with PORT=...)")
            return port
    return settings.port


def cache_url(settings: Settings) -> str | None:
    """Return the address of the cache's server that settings name."""
    return None if settings.redis_cache_url is None else settings.redis_cache_url.get_secret_value()


def _with_valkey(
    settings: Settings,
    stack: contextlib.ExitStack,
    *,
    fresh: bool,
    options: Mapping[str, str] | None,
    port: int,
) -> tuple[Settings, EmbeddedValkey | None]:
    """Start a Valkey where no URL names one."""
    if settings.redis_cache_url is not None:
        if not settings.without_cache:
            ServerURL.parse(settings.redis_cache_url.get_secret_value())
        return settings, None
    directory, password = (
        settings.data_dir.resolve() / "valkey",
        stored_secret(settings.data_dir, "VALKEY_PASSWORD"),
    )
    if fresh:
        (directory / "dump.rdb").unlink(missing_ok=True)
    valkey = start_on_free_port(
        partial(EmbeddedValkey, directory, password=password, settings=options), port
    )
    stack.callback(valkey.stop)
    if valkey.port != port:
        print(f"port {port} is taken: Valkey listens on {valkey.port}")
    return settings.model_copy(update={"redis_cache_url": SecretStr(valkey.url)}), valkey


def _with_postgres(settings: Settings, stack: contextlib.ExitStack, *, fresh: bool) -> Settings:
    """Start a PostgreSQL where no URL names one."""
    if settings.database_url is not None:
        return settings
    directory, password = (
        settings.data_dir.resolve() / "postgres",
        stored_secret(settings.data_dir, "POSTGRES_PASSWORD"),
    )
    postgres = start_on_free_port(partial(EmbeddedPostgres, directory, password=password))
    stack.callback(postgres.stop)
    asyncio.run(_make_database(postgres.url("postgres").replace("+asyncpg", ""), fresh=fresh))
    return settings.model_copy(update={"database_url": SecretStr(postgres.url(DATABASE))})


async def _make_database(url: str, *, fresh: bool) -> None:
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
    """Refuse a second system on one data folder."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CommandFailed(
                f"a system already runs on {folder}: stop it, or give another folder with "
                f"DATA_DIR=..."
            ) from None
        yield
