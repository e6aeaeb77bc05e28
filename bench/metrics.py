"""The cost of metrics: of a hit, and of a scrape of 26 routes, 5,000 tenants and 4 processes.

Hits: three servers of level ``strict`` on one core, in interleaved rounds, with ratios within each
round: without metrics; with a publisher (every two seconds); and with a publisher and a scrape per
second. CPU is that of the server, with its scrapes.

Scrapes: the statistics of four processes on a real Valkey, read and formatted by one of them in
this process. A heartbeat measures how long a scrape blocks the event loop.

The program prints tables and, as the last line, JSON.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import handler
from lanes import MARK, Lane
from lanes.exported import PATH, TOKEN
from machine import Processes, Served, get, processes

from respcache import Cache, MemoryStore, SingleTenant
from respcache.integrations.prometheus import Endpoint
from respcache.ops.bench.load import LoadRequest, drive
from respcache.ops.bench.processes import Cores, cpu_ns, describe
from respcache.ops.stats.publisher import StatsPublisher

ROUTES, TENANTS, WORKERS = 26, 5_000, 4
LANES = ("without", "exported", "scraped every second")
SCRAPE = f"GET {PATH} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()


# -- hits ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scraping(port: int, every_s: float) -> Iterator[list[int]]:
    """Scrape periodically in a thread; yield the sizes of the responses."""
    sizes: list[int] = []
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(every_s):
            sizes.append(len(get(port, SCRAPE)))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def hits(on: Processes, *, rounds: int, seconds: float, connections: int) -> dict[str, Any]:
    """Return throughput, CPU per hit, latencies, and ratios to the lane without metrics."""
    targets = ("lanes.ours:strict", "lanes.exported:scraped", "lanes.exported:scraped")
    served = on.serve_all(
        [(Lane(name, target, "", hit=MARK), 1) for name, target in zip(LANES, targets, strict=True)]
    )
    asks = [LoadRequest(handler.request(page), handler.body(page)) for page in range(handler.PAGES)]
    for one in served:
        drive(one.port, asks, connections=1, requests=3 * len(asks))  # fill, recognize, warm up
    counters: dict[str, dict[str, list[float]]] = {
        name: {"rps": [], "cpu_us": [], "p50_ms": [], "p99_ms": []} for name in LANES
    }
    for number in range(rounds):
        for name, one in zip(
            LANES[number % 3 :] + LANES[: number % 3],
            served[number % 3 :] + served[: number % 3],
            strict=True,
        ):
            with scraping(one.port, 1.0) if name == LANES[2] else contextlib.nullcontext():
                measure_round(counters[name], one, asks, connections=connections, seconds=seconds)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return {name: summary(counters[name], counters[LANES[0]]) for name in LANES}


def measure_round(
    counters: dict[str, list[float]],
    one: Served,
    asks: list[LoadRequest],
    *,
    connections: int,
    seconds: float,
) -> None:
    """Run one lane for one round and add its results."""
    before = cpu_ns(one.pids)
    sample = drive(one.port, asks, connections=connections, seconds=seconds, hit=MARK)
    counters["cpu_us"].append((cpu_ns(one.pids) - before) / 1000 / sample.requests)
    counters["rps"].append(sample.rps)
    counters["p50_ms"].append(sample.percentile_ms(50))
    counters["p99_ms"].append(sample.percentile_ms(99))


def summary(own: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, float]:
    """Return medians of the rounds, and of the ratios within them."""
    found = {name: round(statistics.median(values), 3) for name, values in own.items()}
    for name in ("rps", "cpu_us"):
        ratios = [value / other for value, other in zip(own[name], base[name], strict=True)]
        found[f"{name}_ratio"] = round(statistics.median(ratios), 4)
    return found


# -- scrapes ---------------------------------------------------------------------------------------


def fill_counters(cache: Cache, *, tenants: int) -> None:
    """Count requests of every tenant and route."""
    for number in range(tenants):
        for route in range(ROUTES):
            counters = cache.counters.at(
                f"tenant-{number}",
                f"module-{route % 10}",
                f"/api/module-{route % 10}/{{item}}/part-{route}",
            )
            counters.hits += number + 1
            counters.misses += 1
            if number == 0:
                counters.bypass("store")
                counters.bypass("denied")
                for power in range(20):
                    counters.times.hits.observe(2.0**-power)
                    counters.times.misses.observe(2.0**-power)


async def scrapes(url: str, *, count: int, tenants: int) -> dict[str, Any]:
    """Return the cost of a scrape without tenants and with the 20 largest."""
    publishers = []
    for _ in range(WORKERS):
        publisher = StatsPublisher(url)
        fill_counters(
            Cache(
                MemoryStore(),
                secret=b"k" * 32,
                resolver=SingleTenant("public"),
                publisher=publisher,
            ),
            tenants=tenants,
        )
        for _ in range(1 + tenants // 1000):  # a publication updates 1,000 tenants
            await publisher.publish()
        publishers.append(publisher)
    found = {}
    for name, k in (("without tenants", 0), ("with the 20 largest", 20)):
        endpoint = Endpoint(publishers[0], token=TOKEN, tenants=k)
        took_ms, blocked_ms, cpu_ms, size = [], [], [], 0
        for _ in range(count):
            began, cpu = time.perf_counter(), time.thread_time()
            size = await scrape(endpoint)
            took_ms.append(1000 * (time.perf_counter() - began))
            cpu_ms.append(1000 * (time.thread_time() - cpu))
            # in a separate scrape, because the heartbeat itself uses the CPU
            heart = asyncio.create_task(heartbeat())
            await scrape(endpoint)
            heart.cancel()
            blocked_ms.append(1000 * await heart)
        found[name] = {
            "took_ms": round(statistics.median(took_ms), 1),
            "cpu_ms": round(statistics.median(cpu_ms), 1),
            "longest_block_ms": round(statistics.median(blocked_ms), 2),
            "kib": round(size / 1024),
        }
    for publisher in publishers:
        await publisher.close()
    return found


async def heartbeat() -> float:
    """Return, when cancelled, the largest CPU time between two turns of the event loop.

    CPU time does not include what other processes do.
    """
    longest, last = 0.0, time.thread_time()
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, last = max(longest, now - last), now
    return longest


async def scrape(endpoint: Endpoint) -> int:
    """Scrape once; return the size of the response."""
    sizes = []

    async def send(message: dict[str, Any]) -> None:
        sizes.append(len(message.get("body", b"")))

    await endpoint(
        {
            "type": "http",
            "method": "GET",
            "headers": [(b"authorization", f"Bearer {TOKEN}".encode())],
        },
        None,
        send,
    )
    return sum(sizes)


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="per lane and round")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--scrapes", type=int, default=15)
    parser.add_argument("--tenants", type=int, default=TENANTS)
    parser.add_argument("--quick", action="store_true", help="few and short rounds")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.scrapes = 3, 1.5, 5
    cores = Cores.found()
    with processes(cores) as on:
        found = hits(
            on, rounds=options.rounds, seconds=options.seconds, connections=options.connections
        )
        on.stop_lanes()
        page = asyncio.run(scrapes(on.valkey.url, count=options.scrapes, tenants=options.tenants))
    print(f"{describe(cores)}; {options.connections} connections\n")
    print(
        f"{'hits':<24}{'requests/s':>12}{'CPU us':>9}{'p50 ms':>9}{'p99 ms':>9}"
        f"{'rps ratio':>11}{'CPU ratio':>11}"
    )
    for name, row in found.items():
        print(
            f"{name:<24}{row['rps']:>12,.0f}{row['cpu_us']:>9.1f}{row['p50_ms']:>9.2f}"
            f"{row['p99_ms']:>9.2f}{row['rps_ratio']:>11.3f}{row['cpu_us_ratio']:>11.3f}"
        )
    print(f"\na scrape of {WORKERS} processes, {ROUTES} routes, {options.tenants:,} tenants")
    for name, row in page.items():
        text = (
            f"CPU {row['cpu_ms']} ms  longest block {row['longest_block_ms']} ms  {row['kib']} KiB"
        )
        print(f"{name:<24}{row['took_ms']:>9} ms  {text}")
    print(json.dumps({"hits": found, "scrapes": page}))


if __name__ == "__main__":
    main()
