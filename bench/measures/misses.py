"""The overhead of a miss: fresh keys with respcache, and the same handler without it, in turns.

It is measured for the benchmark's handler, which costs only its serialization, so that the overhead
is clearly visible; and for the CRM's list from PostgreSQL, a realistic handler. CPU time is read
after the stores that follow a response have ended.
"""

import contextlib
import functools
import itertools
import json
import random
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import handler
from lanes import BY_NAME, Lane
from machine import Processes, Served

from measures.hits import ShowStep, middle, patiently, quartiles
from respcache.ops.bench.load import LoadRequest, drive, percentile
from respcache.ops.bench.processes import settle

PLAIN = Lane("plain", "lanes.plain:make", "the handler in FastAPI without any cache", caches=False)
WARM_UP = 20
MISS = b"fwd=uri-miss"


def measure(
    on: Processes, *, rounds: int, requests: int, seed: int, crm: bool, show_step: ShowStep
) -> dict[str, Any]:
    """Return the overhead of a miss, in percent of the uncached handler's CPU time and latency."""
    result = {}
    with contextlib.ExitStack() as stack:
        stack.callback(on.stop_lanes)
        show_step("misses: the benchmark's handler")
        plain, strict = on.serve_all([(PLAIN, 1), (BY_NAME["strict"], 1)])
        numbers = itertools.count(handler.PAGES * 1000)
        size = {"rounds": rounds, "requests": requests, "seed": seed}
        result["handler"] = _compare(plain, strict, lambda: _item(next(numbers)), **size)
        if crm:
            show_step("misses: the CRM's list")
            uncached, cached = on.crm()
            one = uncached.asks[0]
            numbers = itertools.count(1)
            result["crm"] = _compare(uncached, cached, lambda: _list(one, next(numbers)), **size)
    return result


def _compare(
    plain: Served,
    ours: Served,
    make: Callable[[], LoadRequest],
    *,
    rounds: int,
    requests: int,
    seed: int,
) -> dict[str, Any]:
    cpu: dict[str, list[float]] = {"plain": [], "ours": []}
    latency: dict[str, list[float]] = {"plain": [], "ours": []}
    sides, chance = [("plain", plain), ("ours", ours)], random.Random(seed)
    for _, served in sides:
        drive(served.port, [make() for _ in range(WARM_UP)], connections=1, requests=WARM_UP)
    for _ in range(rounds):
        for name, served in chance.sample(sides, 2):
            mark = MISS if name == "ours" else b""
            patiently(
                functools.partial(
                    _batch,
                    served,
                    make,
                    requests=requests,
                    mark=mark,
                    cpu=cpu[name],
                    latency=latency[name],
                )
            )
    over = {
        name: [
            100 * (mine / floor - 1)
            for mine, floor in zip(values["ours"], values["plain"], strict=True)
        ]
        for name, values in (("cpu", cpu), ("latency", latency))
    }
    return {
        "uncached_cpu_us": middle(cpu["plain"], 1),
        "miss_cpu_us": middle(cpu["ours"], 1),
        "uncached_p50_us": middle(latency["plain"], 1),
        "miss_p50_us": middle(latency["ours"], 1),
        "cpu_overhead_percent": middle(over["cpu"], 1),
        "cpu_overhead_percent_iqr": quartiles(over["cpu"], 1),
        "latency_overhead_percent": middle(over["latency"], 1),
        "latency_overhead_percent_iqr": quartiles(over["latency"], 1),
    }


def _batch(
    served: Served,
    make: Callable[[], LoadRequest],
    *,
    requests: int,
    mark: bytes,
    cpu: list[float],
    latency: list[float],
) -> None:
    fresh = [make() for _ in range(requests)]
    settle()
    before = served.cpu_ns()
    sample = drive(served.port, fresh, connections=1, requests=requests, hit=mark)
    settle()
    cpu.append((served.cpu_ns() - before) / 1000 / requests)
    latency.append(percentile(sample.latencies_ns, 50) / 1000)


def _item(number: int) -> LoadRequest:
    return LoadRequest(handler.request(number), handler.body(number))


def _list(one: LoadRequest, number: int) -> LoadRequest:
    """Return a request for the same rows, with a new filter that all of them match."""
    only = quote(
        json.dumps({"$or": [{"employee_count": {"$gte": -number}}, {"employee_count": None}]})
    )
    return LoadRequest(
        one.request.replace(b"limit=50", f"limit=50&filter={only}".encode(), 1),
        one.body,
        one.length,
    )
