"""Cached against uncached, side by side in one run: ``GET /api/accounts`` with 50 rows of the demo data.

Starts its own servers, one worker with the cache and one without (RESPCACHE_ENABLED=0), and sends rounds to them in turn, so
that whatever else the machine does meets both. Prints a table and, last, one JSON line. CPU is that of the worker process.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from crm.auth import development_token
from crm.demo import seed_if_empty
from crm.embedded import EmbeddedPostgres, EmbeddedValkey, free_port
from crm.migrations import upgrade

PATH = "/api/accounts?limit=50"
SECRET = "a secret of the benchmark alone, 40 chars"  # noqa: S105
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Lane:
    """One worker and what was measured of it."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    latencies_ms: dict[int, list[float]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    cpu_s: dict[int, float] = field(default_factory=dict)

    def cpu(self) -> float:
        """CPU seconds of the worker so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def figures(self, connections: int) -> dict[str, float]:
        """Return the figures at a number of connections."""
        latencies = self.latencies_ms[connections]
        return {
            "p50_ms": round(statistics.median(latencies), 3),
            "p99_ms": round(statistics.quantiles(latencies, n=100)[98], 3),
            "rps": round(len(latencies) / self.seconds[connections], 1),
            "cpu_ms": round(1000 * self.cpu_s[connections] / len(latencies), 3),
        }


async def load(lane: Lane, token: str, *, connections: int, requests: int) -> None:
    """Send requests over kept connections, one at a time each."""
    head = f"GET {PATH} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    latencies = lane.latencies_ms.setdefault(connections, [])
    before_cpu, started = lane.cpu(), time.perf_counter()
    await asyncio.gather(*(one_connection(lane.port, head, requests // connections, latencies) for _ in range(connections)))
    lane.seconds[connections] = lane.seconds.get(connections, 0) + time.perf_counter() - started
    lane.cpu_s[connections] = lane.cpu_s.get(connections, 0) + lane.cpu() - before_cpu


async def one_connection(port: int, head: bytes, requests: int, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    for _ in range(requests):
        started = time.perf_counter()
        writer.write(head)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"not answered: {answer[:200]!r}")
        length = int(answer.lower().partition(b"content-length: ")[2].split(b"\r", 1)[0])
        await reader.readexactly(length)
        latencies.append((time.perf_counter() - started) * 1000)
    writer.close()


@contextlib.contextmanager
def servers() -> Iterator[tuple[list[Lane], EmbeddedValkey, str]]:
    """Start Valkey, PostgreSQL with demo data, and the two workers."""
    with tempfile.TemporaryDirectory(prefix="respcache-bench-") as folder, contextlib.ExitStack() as stack:
        valkey = EmbeddedValkey(Path(folder) / "valkey").start()
        stack.callback(valkey.stop)
        postgres = EmbeddedPostgres(Path(folder) / "postgres", password="bench", durable=False).start()
        stack.callback(postgres.remove)
        url = postgres.url("postgres")
        upgrade(url)
        asyncio.run(seed_if_empty(url))
        token = asyncio.run(development_token(url, SECRET, tenant="acme", role="admin"))
        given = {
            "DATABASE_URL": url,
            "REDIS_CACHE_URL": valkey.url,
            "JWT_SECRET": SECRET,
            "RESPCACHE_KEY": SECRET,
            "LOG_LEVEL": "error",
        }
        lanes = []
        for name, enabled in (("uncached", "0"), ("cached", "1")):
            port = free_port()
            environment = {**os.environ, **given, "PORT": str(port), "RESPCACHE_ENABLED": enabled}
            process = subprocess.Popen([sys.executable, "-m", "crm", "serve"], env=environment)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            lanes.append(Lane(name, port, process))
        for lane in lanes:
            asyncio.run(answering(lane.port))
        yield lanes, valkey, token


async def answering(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise SystemExit("a worker did not start")


async def measure(lanes: list[Lane], token: str, *, rounds: int, requests: int, counts: tuple[int, ...]) -> None:
    for lane in lanes:
        await load(lane, token, connections=1, requests=20)  # connections, plans and the entry itself
        lane.latencies_ms, lane.seconds, lane.cpu_s = {}, {}, {}
    for number in range(rounds):
        for connections in counts:
            for lane in lanes:
                await load(lane, token, connections=connections, requests=requests)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)


def commands_per_hit(lane: Lane, valkey: EmbeddedValkey, token: str, *, hits: int) -> dict[str, float]:
    """Count the commands that Valkey ran while the worker served hits, less the ones that count them."""
    with redis.Redis.from_url(valkey.url) as client:
        client.config_resetstat()
        asyncio.run(load(lane, token, connections=1, requests=hits))
        stats: dict[str, Any] = client.info("commandstats")
    names = ("cmdstat_get", "cmdstat_hmget", "cmdstat_set", "cmdstat_eval", "cmdstat_evalsha", "cmdstat_hget")
    return {name.removeprefix("cmdstat_"): round(stats[name]["calls"] / hits, 3) for name in names if name in stats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=480, help="a lane, a round and a number of connections")
    options = parser.parse_args()
    counts = (1, 16)
    with servers() as (lanes, valkey, token):
        asyncio.run(measure(lanes, token, rounds=options.rounds, requests=options.requests, counts=counts))
        commands = commands_per_hit(lanes[1], valkey, token, hits=500)
    result: dict[str, Any] = {lane.name: {f"c{n}": lane.figures(n) for n in counts} for lane in lanes}
    result["valkey_commands_per_hit"] = commands
    print(f"{'lane':<10}{'connections':>12}{'p50 ms':>9}{'p99 ms':>9}{'requests/s':>12}{'CPU ms':>9}")
    for lane in lanes:
        for n in counts:
            row = lane.figures(n)
            print(f"{lane.name:<10}{n:>12}{row['p50_ms']:>9}{row['p99_ms']:>9}{row['rps']:>12}{row['cpu_ms']:>9}")
    print(f"Valkey commands per hit: {commands}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
