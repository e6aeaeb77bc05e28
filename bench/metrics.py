"""What metrics cost: a hit with and without them in one run, and a scrape of 26 routes, 5,000
tenants and 4 processes.

Hits: three servers of level strict on one core in turn, round after round, each ratio within its
round: without metrics; with a board that publishes every two seconds; and the same while it is
scraped once a second. CPU is that of the server, its scrapes included.

Scrapes: figures of four processes on a real Valkey, read and written by one of them in this
process, while a heartbeat says how much of the event loop's time they took at a stretch.

Prints tables and, last, one JSON line.
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
    """Scrape again and again in the background; yield the sizes of what came."""
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
    """Return of each lane requests a second, CPU a hit and latencies, and ratios to the one
    without."""
    targets = ("lanes.ours:strict", "lanes.exported:scraped", "lanes.exported:scraped")
    served = on.serve_all(
        [(Lane(name, target, "", hit=MARK), 1) for name, target in zip(LANES, targets, strict=True)]
    )
    asks = [LoadRequest(handler.request(page), handler.body(page)) for page in range(handler.PAGES)]
    for one in served:
        drive(one.port, asks, connections=1, requests=3 * len(asks))  # filled, recognised, warm
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
                note(counters[name], one, asks, connections=connections, seconds=seconds)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return {name: summary(counters[name], counters[LANES[0]]) for name in LANES}


def note(
    counters: dict[str, list[float]],
    one: Served,
    asks: list[LoadRequest],
    *,
    connections: int,
    seconds: float,
) -> None:
    """Drive one lane for one round."""
    before = cpu_ns(one.pids)
    sample = drive(one.port, asks, connections=connections, seconds=seconds, hit=MARK)
    counters["cpu_us"].append((cpu_ns(one.pids) - before) / 1000 / sample.requests)
    counters["rps"].append(sample.rps)
    counters["p50_ms"].append(sample.percentile_ms(50))
    counters["p99_ms"].append(sample.percentile_ms(99))


def summary(mine: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the rounds, and of the ratios within them."""
    found = {name: round(statistics.median(values), 3) for name, values in mine.items()}
    for name in ("rps", "cpu_us"):
        ratios = [value / other for value, other in zip(mine[name], base[name], strict=True)]
        found[f"{name}_ratio"] = round(statistics.median(ratios), 4)
    return found


# -- scrapes ---------------------------------------------------------------------------------------


def crowd(cache: Cache, *, tenants: int) -> None:
    """Have a cache count something of every tenant and route, as far as they are kept apart."""
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
    """Return what a scrape takes without tenants and with the 20 largest."""
    boards = []
    for _ in range(WORKERS):
        publisher = StatsPublisher(url)
        crowd(
            Cache(
                MemoryStore(),
                secret=b"k" * 32,
                resolver=SingleTenant("public"),
                publisher=publisher,
            ),
            tenants=tenants,
        )
        for _ in range(1 + tenants // 1000):  # a publication says 1,000 tenants anew
            await publisher.publish()
        boards.append(publisher)
    found = {}
    for name, k in (("without tenants", 0), ("with the 20 largest", 20)):
        endpoint = Endpoint(boards[0], token=TOKEN, tenants=k)
        took_ms, held_ms, cpu_ms, size = [], [], [], 0
        for _ in range(count):
            began, cpu = time.perf_counter(), time.thread_time()
            size = await scrape(endpoint)
            took_ms.append(1000 * (time.perf_counter() - began))
            cpu_ms.append(1000 * (time.thread_time() - cpu))
            # in a scrape of its own: it spins while there is nothing to do
            heart = asyncio.create_task(heartbeat())
            await scrape(endpoint)
            heart.cancel()
            held_ms.append(1000 * await heart)
        found[name] = {
            "took_ms": round(statistics.median(took_ms), 1),
            "cpu_ms": round(statistics.median(cpu_ms), 1),
            "longest_hold_ms": round(statistics.median(held_ms), 2),
            "kib": round(size / 1024),
        }
    for publisher in boards:
        await publisher.close()
    return found


async def heartbeat() -> float:
    """Return, when cancelled, the most CPU time between two turns of the event loop: what else the
    machine does is left out."""
    longest, last = 0.0, time.thread_time()
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, last = max(longest, now - last), now
    return longest


async def scrape(endpoint: Endpoint) -> int:
    """Ask once; return the size of the page."""
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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="a lane and a round")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--scrapes", type=int, default=15)
    parser.add_argument("--tenants", type=int, default=TENANTS)
    parser.add_argument("--quick", action="store_true", help="the least that says anything")
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
        f"{'hits':<24}{'requests/s':>12}{'CPU us':>9}{'p50 ms':>9}{'p99 ms':>9}{'rps ratio':>11}{'CPU ratio':>11}"
    )
    for name, row in found.items():
        print(
            f"{name:<24}{row['rps']:>12,.0f}{row['cpu_us']:>9.1f}{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}"
            f"{row['rps_ratio']:>11.3f}{row['cpu_us_ratio']:>11.3f}"
        )
    print(f"\na scrape of {WORKERS} processes, {ROUTES} routes, {options.tenants:,} tenants")
    for name, row in page.items():
        said = f"CPU {row['cpu_ms']} ms  longest hold {row['longest_hold_ms']} ms  {row['kib']} KiB"
        print(f"{name:<24}{row['took_ms']:>9} ms  {said}")
    print(json.dumps({"hits": found, "scrapes": page}))


if __name__ == "__main__":
    main()
