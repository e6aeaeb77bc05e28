"""200 concurrent requests for a cold key, to two processes with one Valkey.

Measured are the calls of the handler and the failed requests.
"""

import asyncio
import contextlib
import itertools
import statistics
from typing import Any

import handler
from lanes import Lane
from machine import Processes, Served
from stand import Client

from measures.hits import ShowStep
from respcache.ops.bench.processes import Failed

CALLERS = 200
PROCESSES = 2
PATIENCE_S = 30.0

_numbers = itertools.count(handler.PAGES * 2000)


def measure(
    on: Processes, lanes: list[Lane], *, rounds: int, show_step: ShowStep
) -> dict[str, Any]:
    """Return fetches per round, failed requests, and the median of the slowest response.

    One result for each way to fill a key.
    """
    result: dict[str, Any] = {}
    for lane in (lane for lane in lanes if lane.cold):
        with contextlib.ExitStack() as stack:
            stack.callback(on.stop_lanes)
            show_step(f"stampede: {lane.name}")
            served = on.serve_all([(lane, 1)] * PROCESSES)
            for label, path in lane.cold.items():
                found = [asyncio.run(_stampede(served, path)) for _ in range(rounds)]
                result[label] = {
                    "fetches": [fetches for fetches, _, _ in found],
                    "failed": sum(failed for _, failed, _ in found),
                    "slowest_ms": round(statistics.median(slowest for _, _, slowest in found), 0),
                }
    return result


async def _stampede(served: list[Served], path: str) -> tuple[int, int, float]:
    """Open all connections, then send all requests at once."""
    number = next(_numbers)
    request, body = handler.request(number, path), handler.body(number)
    before = [one.fills() for one in served]
    start = asyncio.Event()

    async def call(port: int) -> float:
        async with asyncio.timeout(PATIENCE_S), Client(port) as client:
            connected.release()
            await start.wait()
            took_ms, head, received = await client.send(request)
        if not head.startswith(b"HTTP/1.1 200") or received != body:
            raise Failed(repr(head[:100]))
        return took_ms

    connected = asyncio.Semaphore(0)
    tasks = [
        asyncio.create_task(call(served[number % PROCESSES].port)) for number in range(CALLERS)
    ]
    for _ in tasks:
        await connected.acquire()
    start.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(handler.SLOW_S + 0.1)  # count fills without a waiting caller too
    fetches = sum(one.fills() - was for one, was in zip(served, before, strict=True))
    taken = [result for result in results if isinstance(result, float)]
    return fetches, CALLERS - len(taken), max(taken, default=0.0)
