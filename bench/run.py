"""Measure all lanes in one run: bare ASGI, the uncached CRM, respcache at each level, its peers.

``make bench`` and ``make bench QUICK=1`` run this program. It measures hits at 1, 16 and 64
connections (throughput, latency, CPU of the servers and of Valkey), then invalidation, stampede,
misses, memory and workers. It prints tables and, as the last line, JSON. A full run also writes
bench/RESULTS.md and docs/pictures/bench-*.png. Lanes with wrong responses are refused, lanes that
cannot run here are skipped; the output names both.
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
"""After this time a quick run begins no further round of hits, so that it ends in time on a busy
machine."""

MEASURES = ("hits", "invalidation", "stampede", "misses", "memory", "workers")

_stopping: list[int] = []


def main() -> None:
    """Measure, print, and write the results."""
    options = _options()
    # caches in this process may miss a deadline of 50 ms: that is not worth a warning
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
    with _progress(_steps(lanes, options)) as show_step:
        found = _measure(lanes, cores, options, refused=result["refused"], show_step=show_step)
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
    lanes: list[Lane],
    cores: Cores,
    options: argparse.Namespace,
    *,
    refused: dict[str, str],
    show_step: hits.ShowStep,
) -> dict[str, Any]:
    until = time.monotonic() + QUICK_HITS_S if options.quick else math.inf
    effort = hits.Effort(options.rounds, options.seconds, options.requests, options.seed, until)
    seed, found = options.seed, {}
    with processes(cores) as on:
        if "hits" in options.only:
            results, wrong = hits.measure(on, lanes, effort, show_step=show_step)
            refused.update(wrong)
            found.update(results, against_best_peer=report.against_peers(results))
        quick = options.quick
        sizes = (10**3, 10**4, 10**5) if quick else (10**3, 10**4, 10**5, 10**6)
        further: dict[str, Callable[[], Any]] = {
            "invalidation": lambda: asyncio.run(
                invalidation.measure(
                    on, sizes=sizes, rounds=3 if quick else 7, seed=seed, show_step=show_step
                )
            ),
            "stampede": lambda: stampede.measure(
                on,
                [lane for lane in lanes if lane.name not in refused],
                rounds=2 if quick else 5,
                show_step=show_step,
            ),
            "misses": lambda: misses.measure(
                on,
                rounds=6 if quick else 20,
                requests=25 if quick else 100,
                seed=seed,
                crm=any(lane.name == hits.CRM for lane in lanes),
                show_step=show_step,
            ),
            "memory": lambda: asyncio.run(
                memory.measure(
                    on, requests=2_000 if quick else 12_000, seed=seed, show_step=show_step
                )
            ),
            "workers": lambda: workers.measure(on, effort, show_step),
        }
        for name, measure in further.items():
            if name in options.only:
                try:
                    found[name] = measure()
                except Exception as error:  # keep the other results
                    refused[name] = f"{type(error).__name__}: {error}"
    return found


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    import plots

    pictures = plots.draw(result, options.into / "docs" / "pictures")
    extra = [
        *(["QUICK=1"] if options.quick else []),
        *([f"ARGS={options.given}"] if options.given else []),
    ]
    before, after = result["load_average"]
    notes = [
        f"It took {result['minutes']} minutes with seed {options.seed}. The machine's load "
        f"average was {before} before the run, and {after} when it ended."
    ]
    if options.quick:
        notes.append("**A quick run: few and short rounds. Expect more noise than in a full run.**")
    path = options.into / "bench" / "RESULTS.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        report.markdown(
            result, command=shlex.join(["make", "bench", *extra]), notes=notes, pictures=pictures
        )
    )


def _choose(given: str | None) -> tuple[list[Lane], dict[str, str]]:
    """Return the lanes to measure, the bare one first, and why others are skipped."""
    try:
        wanted = list(LANES) if given is None else [named(name) for name in given.split(",")]
    except KeyError as unknown:
        raise SystemExit(
            f"there is no lane {unknown}: use {', '.join(BY_NAME)}, or module:factory"
        ) from None
    reasons = {lane.name: lane.missing() for lane in wanted}
    lanes = [BARE, *(lane for lane in wanted if reasons[lane.name] is None and lane != BARE)]
    return lanes, {name: why for name, why in reasons.items() if why is not None}


def _steps(lanes: Sequence[Lane], options: argparse.Namespace) -> int:
    """Return the number of steps of the progress bar."""
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
def _progress(steps: int) -> Iterator[hits.ShowStep]:
    """Show the progress on standard error.

    It is drawn between measurements only, because it runs on the load generator's core.
    """
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

        def show_step(what: str) -> None:
            nonlocal part
            if _stopping:
                raise KeyboardInterrupt
            bar.update(task, description=what, advance=1, refresh=True)
            before, part = part, what.split()[0].rstrip(":")
            if not console.is_terminal and part != before:
                console.print(
                    f"{time.monotonic() - begun:5.0f} s  {what}", highlight=False, soft_wrap=True
                )

        yield show_step


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="at most 5 minutes; does not write RESULTS.md"
    )
    parser.add_argument("--lanes", help=f"some of {','.join(BY_NAME)}, or your own module:factory")
    parser.add_argument("--only", default=",".join(MEASURES), help=f"some of {','.join(MEASURES)}")
    parser.add_argument("--rounds", type=int, help="rounds; each lane runs once per round")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="per lane, round and number of connections")
    length.add_argument("--requests", type=int, help="instead of seconds: requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write RESULTS.md and the pictures also after a quick or partial run",
    )
    parser.add_argument("--into", type=Path, help="write them below this folder")
    options = parser.parse_args()
    options.given = shlex.join(word for word in sys.argv[1:] if word not in ("--quick", "--json"))
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
    """Raise, so that all processes are ended in order.

    Python ignores the exception while it forks a process; then the next step raises it.
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
