"""Every lane in one run: bare ASGI, the uncached CRM, ours in each level, and the peers. ``make
bench``, ``make bench QUICK=1``.

Hits at 1, 16 and 64 connections (throughput, latency, CPU of the servers, Valkey's CPU), then
invalidation, stampede, misses, memory and workers. Prints tables and, last, one JSON line; writes
bench/RESULTS.md and docs/pictures/bench-*.png, which a quick run leaves alone unless told. What
answers wrongly or fails is refused, what cannot run here is skipped, and both are said.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report
from lanes import BARE, BY_NAME, LANES, Lane, named
from machine import processes, versions
from measures import hits, invalidation, memory, misses, stampede, workers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from respcache.ops.bench.processes import Cores, Failed, describe

ROOT = Path(__file__).parent.parent
QUICK_HITS_S = 120
"""After so long a quick run begins no further round of hits: on a busy machine it has fewer, and
still ends in time."""
MEASURES = ("hits", "invalidation", "stampede", "misses", "memory", "workers")

_stopping: list[int] = []


def main() -> None:
    """Measure, print, write."""
    options = _options()
    # what is measured in this process too may be away for 50 ms
    logging.getLogger("respcache").setLevel(logging.ERROR)
    lanes, skipped = _choose(options.lanes)
    cores = Cores.found()
    begun, load = time.monotonic(), os.getloadavg()[0]
    result: dict[str, Any] = {
        "machine": describe(cores),
        "versions": versions(),
        "cores": str(cores),
        "skipped": skipped,
        "refused": {},
    }
    with _progress(_steps(lanes, options)) as tell:
        found = _measure(result["refused"], lanes, cores, options, tell)
    result.update(found)
    result["load_average"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    result["minutes"] = round((time.monotonic() - begun) / 60, 1)
    if options.into is not None:
        _write(result, options)
    if not options.json:
        print(report.plain(result))
        for name, why in {**result["skipped"], **result["refused"]}.items():
            print(f"not measured: {name} ({why})")
    print(json.dumps(result))


def _measure(
    refused: dict[str, str],
    lanes: list[Lane],
    cores: Cores,
    options: argparse.Namespace,
    tell: hits.Tell,
) -> dict[str, Any]:
    until = time.monotonic() + QUICK_HITS_S if options.quick else math.inf
    effort = hits.Effort(options.rounds, options.seconds, options.requests, options.seed, until)
    seed, found = options.seed, {}
    with processes(cores) as on:
        if "hits" in options.only:
            figures, wrong = hits.measure(on, lanes, effort, tell)
            refused.update(wrong)
            found.update(figures, against_best_peer=report.against_peers(figures))
        quick = options.quick
        sizes = (10**3, 10**4, 10**5) if quick else (10**3, 10**4, 10**5, 10**6)
        further: dict[str, Callable[[], Any]] = {
            "invalidation": lambda: asyncio.run(
                invalidation.measure(
                    on, sizes=sizes, rounds=3 if quick else 7, seed=seed, tell=tell
                )
            ),
            "stampede": lambda: stampede.measure(
                on,
                [lane for lane in lanes if lane.name not in refused],
                rounds=2 if quick else 5,
                tell=tell,
            ),
            "misses": lambda: misses.measure(
                on,
                rounds=6 if quick else 20,
                requests=25 if quick else 100,
                seed=seed,
                crm=any(lane.name == hits.CRM for lane in lanes),
                tell=tell,
            ),
            "memory": lambda: asyncio.run(
                memory.measure(on, requests=2_000 if quick else 12_000, seed=seed, tell=tell)
            ),
            "workers": lambda: workers.measure(on, effort, tell),
        }
        for name, measure in further.items():
            if name in options.only:
                try:
                    found[name] = measure()
                except Exception as error:  # what the others showed is not thrown away
                    refused[name] = f"{type(error).__name__}: {error}"
    return found


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    import plots

    pictures = plots.draw(result, options.into / "docs" / "pictures")
    extra = [
        *(["QUICK=1"] if options.quick else []),
        *([f"ARGS={options.said}"] if options.said else []),
    ]
    before, after = result["load_average"]
    notes = [
        f"It took {result['minutes']} minutes with seed {options.seed}. The machine's load "
        f"average was {before} before anything "
        f"of ours ran, and {after} when it ended."
    ]
    if options.quick:
        notes.append("**A quick run: few and short rounds. Expect more noise than in a full one.**")
    path = options.into / "bench" / "RESULTS.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        report.markdown(
            result, command=shlex.join(["make", "bench", *extra]), notes=notes, pictures=pictures
        )
    )


def _choose(given: str | None) -> tuple[list[Lane], dict[str, str]]:
    """Return the lanes to be measured, the bare one first, and why others are not."""
    try:
        wanted = list(LANES) if given is None else [named(name) for name in given.split(",")]
    except KeyError as unknown:
        raise SystemExit(
            f"no lane {unknown}: choose from {', '.join(BY_NAME)}, or give module:factory"
        ) from None
    reasons = {lane.name: lane.missing() for lane in wanted}
    lanes = [BARE, *(lane for lane in wanted if reasons[lane.name] is None and lane != BARE)]
    return lanes, {name: why for name, why in reasons.items() if why is not None}


def _steps(lanes: Sequence[Lane], options: argparse.Namespace) -> int:
    """Count what is told of while it is measured."""
    in_hits = len(lanes) + len(hits.groups(lanes)) - 1
    steps = {
        "hits": len(hits.groups(lanes)) + in_hits * (1 + options.rounds * len(hits.CONNECTIONS)),
        "invalidation": 6 if options.quick else 7,
        "stampede": sum(1 for lane in lanes if lane.cold),
        "misses": 2 if any(lane.name == hits.CRM for lane in lanes) else 1,
        "memory": 2,
        "workers": len(workers.LANES) * len(workers.COUNTS) * (1 + options.rounds),
    }
    return sum(steps[name] for name in options.only)


@contextmanager
def _progress(steps: int) -> Iterator[hits.Tell]:
    """Show on standard error how far it is. Drawn between measurements only: it would run on the
    generator's core."""
    console, begun = Console(stderr=True), time.monotonic()
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(
        *columns,
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("starting", total=steps)

        part = ""

        def tell(what: str) -> None:
            nonlocal part
            if _stopping:
                raise KeyboardInterrupt
            bar.update(task, description=what, advance=1, refresh=True)
            before, part = part, what.split()[0].rstrip(":")
            if not console.is_terminal and part != before:
                console.print(
                    f"{time.monotonic() - begun:5.0f} s  {what}", highlight=False, soft_wrap=True
                )

        yield tell


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="within 5 minutes; RESULTS.md is left alone"
    )
    parser.add_argument(
        "--lanes", help=f"some of {','.join(BY_NAME)}, or module:factory of your own"
    )
    parser.add_argument("--only", default=",".join(MEASURES), help=f"some of {','.join(MEASURES)}")
    parser.add_argument("--rounds", type=int, help="how often each lane has its turn")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, help="of a lane, a round and a number of connections"
    )
    length.add_argument("--requests", type=int, help="the same, as a number of requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write RESULTS.md and the pictures after a quick or partial run too",
    )
    parser.add_argument("--into", type=Path, help="write them below this folder instead")
    options = parser.parse_args()
    options.said = shlex.join(word for word in sys.argv[1:] if word not in ("--quick", "--json"))
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(MEASURES):
        parser.error(f"--only: {', '.join(unknown)}")
    options.rounds = options.rounds or (3 if options.quick else 9)
    if options.requests is None and options.seconds is None:
        options.seconds = 0.3 if options.quick else 1.0
    whole = options.lanes is None and options.only == list(MEASURES) and not options.quick
    if options.into is None and (options.write or whole):
        options.into = ROOT
    return options


def _stop(number: int, frame: object) -> None:
    """End by an exception, so that everything that was started is ended too.

    Python swallows it where it comes while a process is forked: then the next ``tell`` raises it
    again.
    """
    _stopping.append(number)
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Failed as error:
        sys.exit(str(error))
