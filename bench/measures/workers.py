"""One worker and two, at 64 connections: does a second process double the throughput?"""

import contextlib
import functools
import random
from collections.abc import Sequence
from typing import Any

from lanes import BARE, BY_NAME, Lane
from machine import Processes, Served

from measures.hits import Effort, ShowStep, asks, middle, patiently, warm
from respcache.ops.bench.load import LoadRequest, drive
from respcache.ops.bench.processes import cpu_ns

CONNECTIONS = 64
COUNTS = (1, 2)
LANES: tuple[Lane, ...] = (BARE, BY_NAME["strict"])


def measure(on: Processes, effort: Effort, show_step: ShowStep) -> dict[str, Any]:
    """Return throughput and CPU time per request, by lane and number of workers."""
    pages, chance = asks(), random.Random(effort.seed)
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(on.stop_lanes)
        served = [(one, count) for one in LANES for count in COUNTS]
        running = [
            (one, count) for one, (_, count) in zip(on.serve_all(served), served, strict=True)
        ]
        for one, count in running:
            show_step(f"workers: warming {one.lane.name}, {count}")
            warm(one, pages, connections=8 * count)
        for number in range(effort.rounds):
            for one, count in chance.sample(running, len(running)):
                show_step(
                    f"workers: round {number + 1} of {effort.rounds}, {one.lane.name}, {count}"
                )
                results = found.setdefault((one.lane.name, count), [])
                patiently(functools.partial(_stretch, one, effort, pages, results=results))
    return {
        name: {
            f"w{count}": {
                "rps": middle([rps for rps, _, _ in found[name, count]], 1),
                "cpu_us": middle([cpu for _, cpu, _ in found[name, count]], 2),
                "busier_share": middle([share for _, _, share in found[name, count]], 2),
            }
            for count in COUNTS
        }
        for name in dict.fromkeys(name for name, _ in found)
    }


def _stretch(
    one: Served,
    effort: Effort,
    pages: Sequence[LoadRequest],
    *,
    results: list[tuple[float, float, float]],
) -> None:
    before = [cpu_ns([pid]) for pid in one.pids]
    sample = drive(
        one.port,
        pages,
        connections=CONNECTIONS,
        seconds=effort.seconds,
        requests=effort.requests,
        hit=one.lane.hit,
    )
    spent = [cpu_ns([pid]) - was for pid, was in zip(one.pids, before, strict=True)]
    results.append((sample.rps, sum(spent) / 1000 / sample.requests, max(spent) / sum(spent)))
