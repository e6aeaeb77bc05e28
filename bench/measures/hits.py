"""Hits: all lanes in turn, in rounds, at 1, 16 and 64 connections.

Every ratio is taken within one round.
"""

import contextlib
import functools
import math
import random
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import handler
from lanes import BARE, Lane
from machine import Processes, Served

from respcache.core.encoding import compress
from respcache.ops.bench.load import (
    LoadRequest,
    LoadSample,
    WrongOutcome,
    WrongResponse,
    drive,
    percentile,
)
from respcache.ops.bench.processes import Failed, cpu_ns, settle

CONNECTIONS = (1, 16, 64)
MAX_LANES = 12
CRM = "uncached"
BUSY = 0.93
"""From this load on, the core of load generator and Valkey is the bottleneck: the throughput is a
lower bound."""

MAX_REPEATS = 3
REPEAT_PAUSE_S = 0.5

ShowStep = Callable[[str], None]


@dataclass
class Cell:
    """The results of a lane at one number of connections, one value per round."""

    rps: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    valkey_us: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    repeated: int = 0
    latencies_ns: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass(frozen=True)
class Effort:
    """The size of a run: rounds, and seconds or requests per lane, round and number of connections.

    No round begins after ``until`` (``time.monotonic``).
    """

    rounds: int
    seconds: float | None
    requests: int | None
    seed: int
    until: float = math.inf


def groups(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Split lanes into groups of at most ``MAX_LANES``, each with the bare lane."""
    others = [lane for lane in lanes if lane != BARE]
    count = -(-len(others) // (MAX_LANES - 1)) or 1
    size = -(-len(others) // count)
    return [[BARE, *others[i * size : (i + 1) * size]] for i in range(count)]


def measure(
    on: Processes, lanes: Sequence[Lane], effort: Effort, *, show_step: ShowStep
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the results of each lane, and the reasons for those that were refused."""
    result: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for group in groups(lanes):
        with _started(on, group, refused, show_step=show_step) as served:
            cells = _rounds(on, served, effort, refused=refused, show_step=show_step)
        for one in served:
            if one.lane.name not in refused:
                results = {
                    f"c{n}": _results(cells[one.lane.name, n], cells[BARE.name, n])
                    for n in CONNECTIONS
                }
                result.setdefault(one.lane.name, results)  # the bare lane of the first group
    return result, refused


def asks(path: str = handler.PATH, *, coding: str = "") -> list[LoadRequest]:
    """Return the requests of the key space, with the expected responses."""
    if not coding:
        return [
            LoadRequest(handler.request(number, path), handler.body(number))
            for number in range(handler.PAGES)
        ]
    wanted = f"\r\nAccept-Encoding: {coding}\r\n\r\n".encode()
    requests = (
        handler.request(number, path).removesuffix(b"\r\n\r\n") + wanted
        for number in range(handler.PAGES)
    )
    return [
        LoadRequest(request, compress(handler.body(number)))
        for number, request in enumerate(requests)
    ]


def warm(served: Served, pages: Sequence[LoadRequest], *, connections: int = 1) -> None:
    """Fill every key, then read each once more; each connection requests all pages in order.

    Raises ``WrongResponse``.
    """
    requests = max(16, connections * len(pages) if served.lane.caches else 0)
    # a miss is sent plain: bodies are compressed when they are stored
    plain = asks() if served.lane.coding else pages
    drive(served.port, plain, connections=connections, requests=requests)
    settle()

    def again() -> None:
        drive(served.port, pages, connections=connections, requests=requests, hit=served.lane.hit)

    patiently(again)


def patiently(stretch: Callable[[], None]) -> int:
    """Run a stretch of load; repeat it up to ``MAX_REPEATS`` times if a response was no hit.

    Return the number of repeats. On a busy machine a cache with deadlines bypasses a server that
    does not reply in time.
    """
    for repeats in range(MAX_REPEATS):
        try:
            stretch()
        except WrongOutcome:
            time.sleep(REPEAT_PAUSE_S)
        else:
            return repeats
    stretch()
    return MAX_REPEATS


@contextlib.contextmanager
def _started(
    on: Processes, group: Sequence[Lane], refused: dict[str, str], *, show_step: ShowStep
) -> Iterator[list[Served]]:
    with contextlib.ExitStack() as stack:
        stack.callback(on.stop_lanes)
        show_step("starting " + ", ".join(lane.name for lane in group))
        served: list[Served] = [on.crm()[0]] if any(lane.name == CRM for lane in group) else []
        own = [lane for lane in group if lane.name != CRM]
        for lane, one in zip(own, on.serve([(lane, 1) for lane in own]), strict=True):
            if isinstance(one, Served):
                served.append(one)
            elif lane == BARE:
                raise one
            else:
                refused[lane.name] = str(one)
        yield served


def _rounds(
    on: Processes,
    served: Sequence[Served],
    effort: Effort,
    *,
    refused: dict[str, str],
    show_step: ShowStep,
) -> dict[tuple[str, int], Cell]:
    cells = {(one.lane.name, n): Cell() for one in served for n in CONNECTIONS}
    pages = {one.lane.name: one.asks or asks(coding=one.lane.coding) for one in served}
    chance = random.Random(effort.seed)
    for one in served:
        with _refusing(one, refused):
            show_step(f"warming {one.lane.name}")
            warm(one, pages[one.lane.name])
    for number in range(effort.rounds):
        if number and time.monotonic() > effort.until:
            break
        for connections in CONNECTIONS:
            for one in chance.sample(served, len(served)):
                show_step(
                    f"round {number + 1} of {effort.rounds}: {one.lane.name}, {connections} "
                    f"connections"
                )
                if one.lane.name not in refused:
                    with _refusing(one, refused):
                        cell = cells[one.lane.name, connections]
                        stretch = functools.partial(
                            _stretch,
                            on,
                            one,
                            cell,
                            pages=pages[one.lane.name],
                            connections=connections,
                            effort=effort,
                        )
                        cell.repeated += patiently(stretch)
    return cells


@contextlib.contextmanager
def _refusing(one: Served, refused: dict[str, str]) -> Iterator[None]:
    """Refuse a lane with wrong responses. Raise if it is the bare lane, the base of all ratios."""
    try:
        yield
    except (WrongResponse, Failed, OSError) as error:
        if one.lane == BARE:
            raise
        refused[one.lane.name] = str(error)


def _stretch(
    on: Processes,
    one: Served,
    cell: Cell,
    *,
    pages: Sequence[LoadRequest],
    connections: int,
    effort: Effort,
) -> None:
    fills = one.fills() if one.counts_fills else 0
    store = on.valkey.process
    assert store is not None
    before, store_before = one.cpu_ns(), cpu_ns([store.pid])
    sample: LoadSample = drive(
        one.port,
        pages,
        connections=connections,
        seconds=effort.seconds,
        requests=effort.requests,
        hit=one.lane.hit,
    )
    cpu, store_cpu = one.cpu_ns() - before, cpu_ns([store.pid]) - store_before
    if one.counts_fills and one.fills() != fills:
        raise WrongResponse(
            f"the handler ran {one.fills() - fills} times although all requests should be hits"
        )
    cell.rps.append(sample.rps)
    cell.cpu_us.append(cpu / 1000 / sample.requests)
    cell.valkey_us.append(store_cpu / 1000 / sample.requests)
    cell.busy.append(min(1.0, sample.busy + store_cpu / 1e9 / sample.seconds))
    cell.latencies_ns.extend(sample.latencies_ns)


def _results(cell: Cell, bare: Cell) -> dict[str, Any]:
    rps_ratios = [mine / floor for mine, floor in zip(cell.rps, bare.rps, strict=True)]
    cpu_ratios = [floor / mine for mine, floor in zip(cell.cpu_us, bare.cpu_us, strict=True)]
    return {
        "rps_ratio": middle(rps_ratios),
        "cpu_ratio": middle(cpu_ratios),
        "rps_ratio_iqr": quartiles(rps_ratios),
        "cpu_ratio_iqr": quartiles(cpu_ratios),
        "rps": middle(cell.rps, 1),
        "cpu_us": middle(cell.cpu_us, 2),
        "valkey_us": middle(cell.valkey_us, 2),
        "p50_ms": round(percentile(cell.latencies_ns, 50) / 1e6, 3),
        "p99_ms": round(percentile(cell.latencies_ns, 99) / 1e6, 3),
        "asking_core_busy": middle(cell.busy, 2),
        "rounds": len(cell.rps),
        "requests": len(cell.latencies_ns),
        "repeated": cell.repeated,
    }


def middle(values: Sequence[float], digits: int = 4) -> float:
    """Return the median, rounded."""
    return round(percentile(values, 50), digits)


def quartiles(values: Sequence[float], digits: int = 4) -> list[float]:
    """Return the first and the third quartile, rounded."""
    return [round(percentile(values, 25), digits), round(percentile(values, 75), digits)]
