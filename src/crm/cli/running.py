"""The system that runs on a data folder: its state file, and the servers that a command uses."""

import json
from pathlib import Path
from typing import TypedDict

from crm.settings import Settings
from respcache.testing.servers import write_private

STATE_FILE = "running.json"


class CommandFailed(Exception):
    """A command cannot do what was asked; the message says why and what to do."""


class RunningSystem(TypedDict):
    """The content of the state file. The addresses contain passwords."""

    database_url: str
    cache_url: str | None
    port: int
    pid: int


def write_state(folder: Path, state: RunningSystem) -> Path:
    """Write the state file with mode 0600; return its path."""
    path = folder / STATE_FILE
    write_private(path, json.dumps(state))
    return path


def read_state(folder: Path) -> RunningSystem | None:
    """Return the state of the system that runs on a data folder; None if there is no such file."""
    try:
        state: RunningSystem = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return None
    return state


def database_url(settings: Settings) -> str:
    """Return DATABASE_URL, or the database of the running system. Raises ``CommandFailed``."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return _running(settings)["database_url"]


def database_cache_url(settings: Settings) -> str | None:
    """Return the cache server that belongs to ``database_url``. Raises ``CommandFailed``."""
    if settings.redis_cache_url is not None or settings.database_url is not None:
        return cache_url(settings)
    return _running(settings)["cache_url"]


def cache_url(settings: Settings) -> str | None:
    """Return REDIS_CACHE_URL, password included: an address, ``none`` or None."""
    return None if settings.redis_cache_url is None else settings.redis_cache_url.get_secret_value()


def _running(settings: Settings) -> RunningSystem:
    state = read_state(settings.data_dir)
    if state is None:
        raise CommandFailed(
            f"no system runs on {settings.data_dir}: start one with `make run`, or set "
            f"DATABASE_URL or DATA_DIR"
        )
    return state
