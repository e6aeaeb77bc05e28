"""Compare respcache's RESP client with redis-py's asyncio client: GETs of a small value.

A number of callers send commands concurrently, each one after the other. Rounds alternate between
the clients, so that other load on the machine affects both. CPU is that of this process. Commands
per write are counted in separate rounds. The program prints a table and, as the last line, JSON.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import uvloop
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

from respcache.resp.connection import Connection
from respcache.resp.link import Link
from respcache.resp.url import ServerURL
from respcache.testing.servers import EmbeddedValkey

CALLERS = (1, 16, 64)
DEADLINE_S = 10.0
VALUE = b"x" * 100

Command = Callable[[], Awaitable[Any]]


async def load(command: Command, *, callers: int, commands: int) -> float:
    """Send commands; return the CPU seconds of this process per command."""

    async def one_caller() -> None:
        for _ in range(commands // callers):
            await command()

    before = time.process_time()
    await asyncio.gather(*(one_caller() for _ in range(callers)))
    return (time.process_time() - before) / (commands // callers * callers)


async def commands_per_write(command: Command, *, callers: int, commands: int) -> float:
    """Return the commands per write to the socket, of whichever client sends them."""
    writes = 0
    send, write_out = AbstractConnection.send_packed_command, Connection._write_out

    async def counted_send(self: Any, *args: Any, **options: Any) -> None:
        nonlocal writes
        writes += 1
        await send(self, *args, **options)

    def counted_write_out(self: Connection) -> None:
        nonlocal writes
        writes += bool(self._next.packed)
        write_out(self)

    with patch.object(AbstractConnection, "send_packed_command", counted_send):
        with patch.object(Connection, "_write_out", counted_write_out):
            await load(command, callers=callers, commands=commands)
    return commands // callers * callers / writes


async def measure(
    url: str, *, rounds: int, commands: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Warm up, measure both in turn, and count writes."""
    link, client = Link(ServerURL.parse(url), deadline_s=DEADLINE_S), Redis.from_url(url)
    await link.connect()
    await client.set("key", VALUE)
    lanes: dict[str, Command] = {
        "respcache": lambda: link.execute(("GET", "key")),
        "redis-py": lambda: client.get("key"),
    }
    cpu_s: dict[tuple[str, int], list[float]] = {
        (lane, callers): [] for lane in lanes for callers in CALLERS
    }
    for command in lanes.values():
        await load(command, callers=max(CALLERS), commands=10 * max(CALLERS))
    for number in range(rounds):
        for lane, callers in cpu_s:
            cpu_s[lane, callers].append(await load(lanes[lane], callers=callers, commands=commands))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    result: dict[str, dict[str, dict[str, float]]] = {lane: {} for lane in lanes}
    for (lane, callers), samples in cpu_s.items():
        result[lane][f"c{callers}"] = {
            "cpu_us": round(1e6 * statistics.median(samples), 2),
            "commands_per_write": round(
                await commands_per_write(lanes[lane], callers=callers, commands=commands), 1
            ),
        }
    await link.close()
    await client.aclose()
    return result


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--commands", type=int, default=4096, help="per client, round and number of callers"
    )
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedValkey(Path(directory)).start()
        try:
            with asyncio.Runner(
                loop_factory=uvloop.new_event_loop if options.loop == "uvloop" else None
            ) as runner:
                result = runner.run(
                    measure(server.url, rounds=options.rounds, commands=options.commands)
                )
        finally:
            server.stop()
    ratios = {
        f"c{n}": round(
            result["respcache"][f"c{n}"]["cpu_us"] / result["redis-py"][f"c{n}"]["cpu_us"], 3
        )
        for n in CALLERS
    }
    print(
        f"{'callers':<9}{'client':<11}{'CPU us/command':>15}{'commands/write':>16}{'CPU ratio':>11}"
    )
    for n in CALLERS:
        for lane, rows in result.items():
            row, ratio = rows[f"c{n}"], ratios[f"c{n}"] if lane == "respcache" else 1.0
            print(f"{n:<9}{lane:<11}{row['cpu_us']:>15}{row['commands_per_write']:>16}{ratio:>11}")
    print(json.dumps({"loop": options.loop, **result, "cpu_ratio": ratios}))


if __name__ == "__main__":
    main()
