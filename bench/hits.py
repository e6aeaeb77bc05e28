"""Compare the cached with the uncached CRM: ``GET /api/accounts`` with 50 rows of demo data.

Rounds alternate between a worker with the cache and one without (RESPCACHE_ENABLED=0), so that
other load on the machine affects both. The program prints a table and, as the last line, JSON. CPU
is that of the worker process.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import redis
from stand import Client, Stand, Worker, stand

PATH = "/api/accounts?limit=50"


@dataclass
class WorkerResults:
    """A worker and its results, by number of connections."""

    worker: Worker
    latencies_ms: dict[int, list[float]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    cpu_s: dict[int, float] = field(default_factory=dict)

    def summary(self, connections: int) -> dict[str, float]:
        """Return the results at a number of connections."""
        latencies = self.latencies_ms[connections]
        return {
            "p50_ms": round(statistics.median(latencies), 3),
            "p99_ms": round(statistics.quantiles(latencies, n=100)[98], 3),
            "rps": round(len(latencies) / self.seconds[connections], 1),
            "cpu_ms": round(1000 * self.cpu_s[connections] / len(latencies), 3),
        }


async def load(lane: WorkerResults, request: bytes, *, connections: int, requests: int) -> None:
    """Send requests over persistent connections, one at a time on each."""
    latencies = lane.latencies_ms.setdefault(connections, [])

    async def one_connection() -> None:
        async with Client(lane.worker.port) as client:
            for _ in range(requests // connections):
                took_ms, head, _ = await client.send(request)
                if not head.startswith(b"HTTP/1.1 200"):
                    raise SystemExit(f"not a 200: {head[:200]!r}")
                latencies.append(took_ms)

    before_cpu, started = lane.worker.cpu(), time.perf_counter()
    await asyncio.gather(*(one_connection() for _ in range(connections)))
    lane.seconds[connections] = lane.seconds.get(connections, 0) + time.perf_counter() - started
    lane.cpu_s[connections] = lane.cpu_s.get(connections, 0) + lane.worker.cpu() - before_cpu


async def measure(
    lanes: list[WorkerResults],
    request: bytes,
    *,
    rounds: int,
    requests: int,
    counts: tuple[int, ...],
) -> None:
    """Warm up, then measure the workers in turn."""
    for lane in lanes:
        # opens connections, fills plans and the entry
        await load(WorkerResults(lane.worker), request, connections=1, requests=20)
    for number in range(rounds):
        for connections in counts:
            for lane in lanes:
                await load(lane, request, connections=connections, requests=requests)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)


def commands_per_hit(on: Stand, *, hits: int) -> dict[str, float]:
    """Return the number of Valkey's commands per hit."""
    with redis.Redis.from_url(on.valkey.url) as client:
        client.config_resetstat()
        asyncio.run(load(WorkerResults(on.cached), on.get(PATH), connections=1, requests=hits))
        stats: dict[str, Any] = client.info("commandstats")
    names = (
        "cmdstat_get",
        "cmdstat_hmget",
        "cmdstat_set",
        "cmdstat_eval",
        "cmdstat_evalsha",
        "cmdstat_hget",
    )
    return {
        name.removeprefix("cmdstat_"): round(stats[name]["calls"] / hits, 3)
        for name in names
        if name in stats
    }


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--requests", type=int, default=480, help="per worker, round and number of connections"
    )
    options = parser.parse_args()
    counts = (1, 16)
    with stand() as on:
        lanes = [WorkerResults(on.uncached), WorkerResults(on.cached)]
        asyncio.run(
            measure(
                lanes, on.get(PATH), rounds=options.rounds, requests=options.requests, counts=counts
            )
        )
        commands = commands_per_hit(on, hits=500)
    result: dict[str, Any] = {
        lane.worker.name: {f"c{n}": lane.summary(n) for n in counts} for lane in lanes
    }
    result["valkey_commands_per_hit"] = commands
    print(
        f"{'worker':<10}{'connections':>12}{'p50 ms':>9}{'p99 ms':>9}{'requests/s':>12}"
        f"{'CPU ms':>9}"
    )
    for lane in lanes:
        for n in counts:
            row = lane.summary(n)
            print(
                f"{lane.worker.name:<10}{n:>12}{row['p50_ms']:>9}{row['p99_ms']:>9}"
                f"{row['rps']:>12}{row['cpu_ms']:>9}"
            )
    print(f"Valkey commands per hit: {commands}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
