"""The cost of an outage of the cache server: requests while Valkey is frozen, killed, restarted.

The same requests (two lists; every tenth request changes an account) go to the worker without a
cache at the same time. Its response times are the best that the cached worker can reach during an
outage. The program prints, for each phase, the number of requests, of failures, and the response
times; and as the last line JSON.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field

from stand import Client, Stand, stand

PACE_S = 0.04
CONNECTIONS = 8
PHASE_S = 3.0
BEGINNING_S = 0.5
"""The length of the phase 'at first', in which the outage is detected."""
WRITE_EVERY = 10


@dataclass
class Phase:
    """The results of the requests that one worker got in one phase."""

    latencies_ms: list[float] = field(default_factory=list)
    failed: int = 0
    pending: int = 0
    hits: int = 0

    def summary(self) -> dict[str, float | int]:
        """Return counts and percentiles."""
        latencies = sorted(self.latencies_ms)
        return {
            "requests": len(latencies) + self.failed,
            "failed": self.failed,
            "hits": self.hits,
            "pending": self.pending,
            "p50_ms": round(statistics.median(latencies), 1),
            "p95_ms": round(statistics.quantiles(latencies, n=20)[18], 1),
            "max_ms": round(latencies[-1], 1),
        }


class Load:
    """Sends requests at a steady rate to both workers."""

    def __init__(self, on: Stand, account: str) -> None:
        self.phase = ""
        self.phases: dict[tuple[str, str], Phase] = defaultdict(Phase)
        self._on = on
        self._account = account
        self._sent = 0

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            for worker in (self._on.uncached, self._on.cached):
                requests: asyncio.Queue[bytes] = asyncio.Queue()
                group.create_task(self._pace(requests))
                for _ in range(CONNECTIONS):
                    group.create_task(self._serve(worker.name, worker.port, requests))

    async def _pace(self, requests: "asyncio.Queue[bytes]") -> None:
        for number in range(10**9):
            if number % WRITE_EVERY == 0:
                body = json.dumps({"employee_count": number}).encode()
                requests.put_nowait(self._on.put(f"/api/accounts/{self._account}", body))
            else:
                requests.put_nowait(
                    self._on.get(f"/api/accounts?limit=50&offset={number % 2 * 50}")
                )
            await asyncio.sleep(PACE_S)

    async def _serve(self, name: str, port: int, requests: "asyncio.Queue[bytes]") -> None:
        async with Client(port) as client:
            while True:
                request = await requests.get()
                phase = self.phases[name, self.phase]
                took_ms, head, _ = await client.send(request)
                if head.startswith(b"HTTP/1.1 200"):
                    phase.latencies_ms.append(took_ms)
                else:
                    phase.failed += 1
                phase.hits += b"respcache; hit" in head
                phase.pending += b"x-cache-invalidation: pending" in head


async def measure(on: Stand, *, rounds: int) -> Load:
    """Freeze, thaw, kill and restart Valkey under load."""
    async with Client(on.uncached.port) as client:
        _, _, body = await client.send(on.get("/api/accounts?limit=1"))
    load = Load(on, json.loads(body)["data"]["accounts"][0]["id"])
    running = asyncio.create_task(load.run())

    async def pass_time(name: str, seconds: float) -> None:
        load.phase = name
        await asyncio.sleep(seconds)

    load.phase = "warm-up"
    await asyncio.sleep(1)
    for number in range(rounds):
        for failure, begin, end in (
            ("frozen", on.valkey.freeze, on.valkey.thaw),
            ("killed", on.valkey.kill, on.valkey.start),
        ):
            await pass_time("up", PHASE_S)
            begin()
            await pass_time(f"{failure}, at first", BEGINNING_S)
            await pass_time(f"{failure}, later", PHASE_S)
            await asyncio.to_thread(end)
            await pass_time("back", PHASE_S)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return load


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with stand() as on:
        load = asyncio.run(measure(on, rounds=options.rounds))
    load.phases = {key: phase for key, phase in load.phases.items() if key[1] != "warm-up"}
    columns = ("requests", "failed", "hits", "pending", "p50_ms", "p95_ms", "max_ms")
    print(f"{'phase':<20}{'worker':<10}" + "".join(f"{name:>10}" for name in columns))
    for phase in dict.fromkeys(phase for _, phase in load.phases):
        for worker in ("uncached", "cached"):
            row = load.phases[worker, phase].summary()
            print(f"{phase:<20}{worker:<10}" + "".join(f"{row[name]:>10}" for name in columns))
    print(
        json.dumps(
            {
                f"{worker}, {phase}": found.summary()
                for (worker, phase), found in load.phases.items()
            }
        )
    )


if __name__ == "__main__":
    main()
