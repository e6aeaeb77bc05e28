"""Measures an application with its cache, without it, and beside a bare ASGI application that sends
the same bytes.

The lanes take turns in random order, in each round and for each number of connections, so that
other load on the machine affects all of them. Every response is compared, unless responses vary by
themselves.
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
from respcache.ops.bench.load import LoadRequest, WrongResponse, drive, percentile
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
"""In the headers of a hit (``Cache-Status``), in lower case."""

LOG_LINES = 15
DEADLINE_S = 30.0
UNPREPARED = ("connection", "date", "keep-alive", "server", "transfer-encoding")
"""Headers that a server adds by itself."""

OnProgress = Callable[[str, int, int], None]
"""Called with the current step, the number of finished periods of load, and the total."""


@dataclass(frozen=True)
class Address:
    """The address of a lane's server. CPU time is measured if the ids of its processes are
    known."""

    host: str
    port: int
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Effort:
    """The duration of a benchmark. ``seconds`` is that of one lane in one round at one number of
    connections."""

    rounds: int
    seconds: float
    connections: tuple[int, ...]

    def periods(self, lanes: int) -> int:
        """Return the number of periods of load."""
        return self.rounds * len(self.connections) * lanes


@dataclass
class Cell:
    """The measurements of one lane at one number of connections."""

    rps: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    hits: int = 0
    latencies_ns: "array[int]" = field(default_factory=lambda: array("q"))

    def counters(self) -> dict[str, Any]:
        """Return medians over the rounds, and percentiles over all requests.

        ``cpu_us`` is the server's CPU time per request; None if unknown.
        """
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
    """A GET request: path and query, and headers."""

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
    """Starts servers, measures them, and ends them. Use it as a context manager."""

    def __init__(self, requests: Sequence[Request], *, cores: Cores | None = None) -> None:
        self.notes: list[str] = []
        self._requests = requests
        self._cores = cores or Cores.found()
        self._stack = contextlib.ExitStack()
        self._lanes: dict[str, Address] = {}
        self._live = False  # other clients may write during the measurement

    def __enter__(self) -> "Bench":
        self._folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="respcache-bench-"))
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add_application(self, target: str) -> None:
        """Start ``module:app`` twice, with and without its cache. Raises ``Failed``."""
        started = [(lane, *self._launch(lane, target)) for lane in ("with", "without")]
        for lane, port, process in started:
            self._lanes[lane] = self._ready(lane, port, process)

    def add_running(self, lane: str, address: Address) -> None:
        """Measure a running server. Its responses are not compared, because they may change."""
        self._live = True
        pids = {one for pid in address.pids for one in family(pid)}
        self._lanes[lane] = Address(address.host, address.port, tuple(sorted(pids)))

    def run(self, effort: Effort, on_progress: OnProgress) -> dict[str, Any]:
        """Measure; return measurements by lane and number of connections.

        Raises ``Failed``, ``WrongResponse`` and ``OSError``.
        """
        on_progress("checking the responses", 0, 1)
        asks = self._asks()
        lanes = list(self._lanes)
        cells = {(lane, count): Cell() for lane in lanes for count in effort.connections}
        total, finished = effort.periods(len(lanes)), 0
        chance = random.Random(1)
        for lane in lanes:
            on_progress(f"warming up: {lane}", finished, total)
            drive(
                self._lanes[lane].port,
                asks[lane],
                host=self._lanes[lane].host,
                connections=1,
                requests=max(32, len(asks[lane])),
            )
        for number in range(effort.rounds):
            for count in effort.connections:
                for lane in chance.sample(lanes, len(lanes)):
                    on_progress(
                        f"round {number + 1} of {effort.rounds}: {lane}, {count} connections",
                        finished,
                        total,
                    )
                    self._period(
                        cells[lane, count],
                        lane,
                        asks[lane],
                        connections=count,
                        seconds=effort.seconds,
                    )
                    finished += 1
        on_progress("done", finished, total)
        result = {
            lane: {f"c{count}": cells[lane, count].counters() for count in effort.connections}
            for lane in lanes
        }
        for counters in result.values():
            for count in effort.connections:
                _compare(counters[f"c{count}"], result["bare"][f"c{count}"])
        return result

    def machine(self) -> str:
        """Describe the machine and the assignment of cores."""
        if self._live:
            return f"{describe(self._cores)}; running servers were not moved to other cores"
        return (
            f"{describe(self._cores)}; servers on core {self._cores.servers()[0]}, load on core "
            f"{self._cores.generator()[0]}"
        )

    def _period(
        self,
        cell: Cell,
        lane: str,
        asks: Sequence[LoadRequest],
        *,
        connections: int,
        seconds: float,
    ) -> None:
        address = self._lanes[lane]
        before = cpu_ns(address.pids)
        hit = b"" if lane == "bare" else MARK  # it repeats recorded headers
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

    def _asks(self) -> dict[str, list[LoadRequest]]:
        """Send each request twice to each lane, compare the responses, and start the bare lane with
        them."""
        seen = {
            lane: [[_fetch(at, request) for _ in range(2)] for request in self._requests]
            for lane, at in self._lanes.items()
        }
        exact = []
        for number, request in enumerate(self._requests):
            bodies = {body for responses in seen.values() for _, body in responses[number]}
            exact.append(len(bodies) == 1 and not self._live)
            if len(bodies) > 1 and not self._live:
                self.notes.append(
                    f"{request.target}: its response varies, so responses are not compared"
                )
        first = [responses[1] for responses in seen["with"]]
        self._start_bare(
            [
                Prepared(one.target, *response)
                for one, response in zip(self._requests, first, strict=True)
            ]
        )
        asks = {}
        for lane, at in self._lanes.items():
            found = first if lane == "bare" else [responses[1] for responses in seen[lane]]
            asks[lane] = [
                LoadRequest(request.encode(at.host), body, exact=same or lane == "bare")
                for request, (_, body), same in zip(self._requests, found, exact, strict=True)
            ]
        return asks

    def _start_bare(self, responses: list[Prepared]) -> None:
        path = self._folder / "responses"
        path.write_bytes(msgspec.msgpack.encode(responses))
        self._lanes["bare"] = self._ready("bare", *self._launch("bare", str(path)))

    def _launch(self, lane: str, target: str) -> "tuple[int, subprocess.Popen[bytes]]":
        with socket.socket() as listening, (self._folder / f"{lane}.log").open("wb") as log:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1024)
            listening.set_inheritable(True)
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "respcache.ops.bench.serve",
                    lane,
                    target,
                    str(listening.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=(listening.fileno(),),
                start_new_session=True,  # only this process gets Ctrl-C, and it ends the others
                preexec_fn=tied_to_us(self._cores.available),
            )
            self._stack.callback(end, process)
            return listening.getsockname()[1], process

    def _ready(self, lane: str, port: int, process: "subprocess.Popen[bytes]") -> Address:
        assert process.stdout is not None
        if READY not in iter(process.stdout.readline, b""):
            log = (self._folder / f"{lane}.log").read_text(errors="replace").splitlines()
            raise Failed("\n".join([f"the lane {lane!r} did not start:", *log[-LOG_LINES:]]))
        pin(process.pid, self._cores.servers())
        return Address("127.0.0.1", port, (process.pid,))


@contextlib.contextmanager
def on_generator_core(cores: Cores) -> Iterator[None]:
    """Run this process, the load generator, on a core of its own, if the machine has two."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores.generator())
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios with the cache to without it: of requests per second, and of inverse CPU
    time per request."""
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
    """Add the ratios to bare ASGI: of requests per second, and of inverse CPU time."""
    counters["rps_ratio"] = round(counters["rps"] / bare["rps"], 3)
    counters["cpu_ratio"] = (
        round(bare["cpu_us"] / counters["cpu_us"], 3)
        if counters["cpu_us"] and bare["cpu_us"]
        else None
    )


def _fetch(address: Address, request: Request) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Send a request; return headers and body. Raises ``WrongResponse`` if it cannot be
    measured."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=DEADLINE_S)
    try:
        connection.putrequest("GET", request.target, skip_accept_encoding=True)
        for name, value in request.headers:
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        body = response.read()
        headers = response.getheaders()
    except http.client.HTTPException as error:
        raise WrongResponse(f"{request.target}: {type(error).__name__}: {error}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise WrongResponse(
            f"{request.target} got status {response.status}: {body[:200].decode(errors='replace')}"
        )
    if response.getheader("content-length") is None:
        raise WrongResponse(
            f"{request.target}: the response has no content length, and streamed responses are "
            f"not cached"
        )
    kept = [
        (name.lower().encode(), value.encode("latin-1"))
        for name, value in headers
        if name.lower() not in UNPREPARED
    ]
    return kept, body


def parse_connections(text: str) -> tuple[int, ...]:
    """Parse ``1,16,64``. Raises ``ConfigurationError``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 1000 for part in parts):
        raise ConfigurationError(
            f"--connections {text!r} must be numbers from 1 to 1000, separated by commas"
        )
    return tuple(dict.fromkeys(map(int, parts)))


def check_pids(pids: Iterable[int]) -> tuple[int, ...]:
    """Return process ids whose CPU time can be read. Raises ``ConfigurationError``."""
    for pid in pids:
        if not Path(f"/proc/{pid}/task").is_dir():
            raise ConfigurationError(
                f"no process {pid}: --pid and --without-pid must be processes on this machine"
            )
    return tuple(pids)
