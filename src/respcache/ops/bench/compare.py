"""An application measured with its cache, without it, and beside a bare ASGI application that sends
the same bytes.

The lanes take turns, in random order, in each round at each number of connections, so that whatever
else the machine does meets all of them. Every answer is compared, unless it differs from one time
to the next by itself.
"""

import contextlib
import http.client
import os
import random
import socket
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from respcache.core.errors import ConfigurationError
from respcache.ops.bench.load import Ask, WrongAnswer, drive, percentile
from respcache.ops.bench.processes import (
    READY,
    Cores,
    Failed,
    Prepared,
    cpu_ns,
    describe,
    end,
    family,
    pin,
    settle,
    tied_to_us,
)

MARK = b"respcache; hit"
"""In the head of a hit (``Cache-Status``), in lower case."""

LOG_LINES = 15
DEADLINE_S = 30.0
UNPREPARED = ("connection", "date", "keep-alive", "server", "transfer-encoding")
"""Headers that a server adds itself."""

Tell = Callable[[str, int, int], None]
"""Is told what is being done, and how many of how many stretches are over."""


@dataclass(frozen=True)
class Address:
    """Where a lane answers. ``pids``: of its processes, where they are known; then its CPU time is
    measured."""

    host: str
    port: int
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Effort:
    """How long it takes: rounds, and the seconds of one lane in one round at one number of
    connections."""

    rounds: int
    seconds: float
    connections: tuple[int, ...]

    def stretches(self, lanes: int) -> int:
        """Count the stretches of load."""
        return self.rounds * len(self.connections) * lanes


@dataclass
class Cell:
    """What the rounds of a lane at one number of connections showed."""

    rps: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    hits: int = 0
    latencies_ns: "array[int]" = field(default_factory=lambda: array("q"))

    def counters(self) -> dict[str, Any]:
        """Return medians over the rounds, percentiles over all requests. ``cpu_us``: of the server,
        a request; None: unknown."""
        requests = len(self.latencies_ns)
        return {
            "rps": round(percentile(self.rps, 50), 1),
            "p50_ms": round(percentile(self.latencies_ns, 50) / 1e6, 3),
            "p99_ms": round(percentile(self.latencies_ns, 99) / 1e6, 3),
            "cpu_us": round(percentile(self.cpu_us, 50), 1) if self.cpu_us else None,
            "hit_share": round(self.hits / requests, 4),
            "requests": requests,
            "generator_busy": round(percentile(self.busy, 50), 2),
        }


@dataclass(frozen=True)
class Request:
    """What is asked: path and query, and headers."""

    target: str
    headers: tuple[tuple[str, str], ...]

    def encode(self, host: str) -> bytes:
        """Return the bytes to send."""
        lines = [
            f"GET {self.target} HTTP/1.1",
            f"Host: {host}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Bench:
    """Starts what is ours, measures, and ends it. Use as a context manager."""

    def __init__(self, requests: Sequence[Request], *, cores: Cores | None = None) -> None:
        self.notes: list[str] = []
        self._requests = requests
        self._cores = cores or Cores.found()
        self._stack = contextlib.ExitStack()
        self._lanes: dict[str, Address] = {}
        self._live = False  # others may write while it is measured

    def __enter__(self) -> "Bench":
        self._folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="respcache-bench-"))
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add_application(self, target: str) -> None:
        """Start ``module:app`` twice, with and without its cache. Raises ``Failed``."""
        started = [(way, *self._launch(way, target)) for way in ("with", "without")]
        for way, port, process in started:
            self._lanes[way] = self._ready(way, port, process)

    def add_running(self, way: str, address: Address) -> None:
        """Measure a server that runs already. Its answers are not compared: somebody may write."""
        self._live = True
        pids = {one for pid in address.pids for one in family(pid)}
        self._lanes[way] = Address(address.host, address.port, tuple(sorted(pids)))

    def run(self, effort: Effort, tell: Tell) -> dict[str, Any]:
        """Measure, and return figures by lane and number of connections. Raises ``Failed``,
        ``WrongAnswer`` and ``OSError``."""
        tell("looking at the answers", 0, 1)
        asks = self._asks()
        lanes = list(self._lanes)
        cells = {(way, count): Cell() for way in lanes for count in effort.connections}
        total, over = effort.stretches(len(lanes)), 0
        chance = random.Random(1)
        for way in lanes:
            tell(f"warming up: {way}", over, total)
            drive(
                self._lanes[way].port,
                asks[way],
                host=self._lanes[way].host,
                connections=1,
                requests=max(32, len(asks[way])),
            )
        for number in range(effort.rounds):
            for count in effort.connections:
                for way in chance.sample(lanes, len(lanes)):
                    tell(
                        f"round {number + 1} of {effort.rounds}: {way}, {count} connections",
                        over,
                        total,
                    )
                    self._stretch(cells[way, count], way, asks[way], count, effort.seconds)
                    over += 1
        tell("done", over, total)
        result = {
            way: {f"c{count}": cells[way, count].counters() for count in effort.connections}
            for way in lanes
        }
        for counters in result.values():
            for count in effort.connections:
                _compare(counters[f"c{count}"], result["bare"][f"c{count}"])
        return result

    def machine(self) -> str:
        """Name the machine and who runs where."""
        if self._live:
            return f"{describe(self._cores)}; what ran already was not moved"
        return (
            f"{describe(self._cores)}; servers on core {self._cores.servers()[0]}, load on core "
            f"{self._cores.generator()[0]}"
        )

    def _stretch(
        self, cell: Cell, way: str, asks: Sequence[Ask], connections: int, seconds: float
    ) -> None:
        address = self._lanes[way]
        before = cpu_ns(address.pids)
        hit = b"" if way == "bare" else MARK  # it repeats a head of ours, as it came
        sample = drive(
            address.port,
            asks,
            host=address.host,
            connections=connections,
            seconds=seconds,
            hit=hit,
            strict=False,
        )
        settle()
        cell.rps.append(sample.rps)
        cell.busy.append(sample.busy)
        cell.hits += sample.hits
        cell.latencies_ns.extend(sample.latencies_ns)
        if address.pids:
            cell.cpu_us.append((cpu_ns(address.pids) - before) / 1000 / sample.requests)

    def _asks(self) -> dict[str, list[Ask]]:
        """Ask everything twice everywhere, see what the answers have in common, and start the bare
        lane with them."""
        seen = {
            way: [[_fetch(at, request) for _ in range(2)] for request in self._requests]
            for way, at in self._lanes.items()
        }
        exact = []
        for number, request in enumerate(self._requests):
            bodies = {body for answers in seen.values() for _, body in answers[number]}
            exact.append(len(bodies) == 1 and not self._live)
            if len(bodies) > 1 and not self._live:
                self.notes.append(
                    f"{request.target}: its answer differs from one time to the next, so answers "
                    f"are not compared"
                )
        first = [answers[1] for answers in seen["with"]]
        self._start_bare(
            [
                Prepared(one.target, *answer)
                for one, answer in zip(self._requests, first, strict=True)
            ]
        )
        asks = {}
        for way, at in self._lanes.items():
            found = first if way == "bare" else [answers[1] for answers in seen[way]]
            asks[way] = [
                Ask(request.encode(at.host), body, exact=same or way == "bare")
                for request, (_, body), same in zip(self._requests, found, exact, strict=True)
            ]
        return asks

    def _start_bare(self, answers: list[Prepared]) -> None:
        path = self._folder / "answers"
        path.write_bytes(msgspec.msgpack.encode(answers))
        self._lanes["bare"] = self._ready("bare", *self._launch("bare", str(path)))

    def _launch(self, way: str, target: str) -> "tuple[int, subprocess.Popen[bytes]]":
        with socket.socket() as listening, (self._folder / f"{way}.log").open("wb") as log:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1024)
            listening.set_inheritable(True)
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "respcache.ops.bench.serve",
                    way,
                    target,
                    str(listening.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=(listening.fileno(),),
                start_new_session=True,  # Ctrl-C reaches us alone, and we end them in order
                preexec_fn=tied_to_us(self._cores.available),
            )
            self._stack.callback(end, process)
            return listening.getsockname()[1], process

    def _ready(self, way: str, port: int, process: "subprocess.Popen[bytes]") -> Address:
        assert process.stdout is not None
        if READY not in iter(process.stdout.readline, b""):
            said = (
                (self._folder / f"{way}.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
            )
            raise Failed("\n".join([f"the application, {way}, did not start:", *said]))
        pin(process.pid, self._cores.servers())
        return Address("127.0.0.1", port, (process.pid,))


@contextlib.contextmanager
def beside(cores: Cores) -> Iterator[None]:
    """Have this process, which asks, run on a core of its own for so long, where there are two."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores.generator())
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Return how many times as many requests a second, and which part of the CPU: with the cache
    against without it."""
    found = {}
    for count, counters in result["with"].items():
        other = result.get("without", {}).get(count)
        if other is not None:
            known = counters["cpu_us"] and other["cpu_us"]
            found[count] = {
                "rps": round(counters["rps"] / other["rps"], 2),
                "cpu": round(other["cpu_us"] / counters["cpu_us"], 2) if known else None,
            }
    return found


def _compare(counters: dict[str, Any], bare: dict[str, Any]) -> None:
    """Add how it stands against bare ASGI: the share of its requests a second, and its CPU over
    ours."""
    counters["rps_ratio"] = round(counters["rps"] / bare["rps"], 3)
    counters["cpu_ratio"] = (
        round(bare["cpu_us"] / counters["cpu_us"], 3)
        if counters["cpu_us"] and bare["cpu_us"]
        else None
    )


def _fetch(address: Address, request: Request) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Ask once; return the headers and the body as they came. Raises ``WrongAnswer`` unless it is
    an answer to be measured."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=DEADLINE_S)
    try:
        connection.putrequest("GET", request.target, skip_accept_encoding=True)
        for name, value in request.headers:
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        headers = answer.getheaders()
    except http.client.HTTPException as error:
        raise WrongAnswer(f"{request.target}: {type(error).__name__}: {error}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise WrongAnswer(
            f"{request.target} was answered with {answer.status}: "
            f"{body[:200].decode(errors='replace')}"
        )
    if answer.getheader("content-length") is None:
        raise WrongAnswer(
            f"{request.target} is answered without a content length: what is streamed is not cached"
        )
    kept = [
        (name.lower().encode(), value.encode("latin-1"))
        for name, value in headers
        if name.lower() not in UNPREPARED
    ]
    return kept, body


def parse_connections(text: str) -> tuple[int, ...]:
    """Read ``1,16,64``. Raises ``ConfigurationError``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 1000 for part in parts):
        raise ConfigurationError(
            f"--connections {text!r} must be numbers from 1 to 1000 between commas"
        )
    return tuple(dict.fromkeys(map(int, parts)))


def check_pids(pids: Iterable[int]) -> tuple[int, ...]:
    """Return process ids whose CPU time can be read. Raises ``ConfigurationError``."""
    for pid in pids:
        if not Path(f"/proc/{pid}/task").is_dir():
            raise ConfigurationError(
                f"no process {pid}: --pid and --without-pid are ids of processes on this machine"
            )
    return tuple(pids)
