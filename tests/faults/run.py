"""The fault suite: processes read and write while everything that they stand on is broken, then the history is checked.

    python -m tests.faults.run --seconds 60 --seed 7
    python -m tests.faults.run --seconds 300 --total-reads 10000000 --state docs/faults.json   # goes on where it stopped
    python -m tests.faults.run --state docs/faults.json --summary docs/faults.md

The seed decides which faults happen in which order, how long they last and whom they meet, and what each client asks; not how
the operating system schedules it all. Progress goes to standard error; the last line of standard output is one JSON object.
Exit status: 0, 1 when a promise was broken, 2 when the suite could not run.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from crm.embedded import ServerFailed
from respcache.core.fence import DRIFT, LEASE_S
from respcache.testing.checker import Report, check
from respcache.testing.history import Recorder, load, now

from .faults import FAULTS, Fault, Scene
from .outsiders import Outsiders
from .sabotage import SABOTAGES
from .stage import Plan, Problem, Stage, stage

BOUND_S = LEASE_S * DRIFT + 0.1
"""How long a write that nobody acknowledged may stay unseen: the lease, and the slack between a COMMIT and who notes it."""

RECOVER_S = 3 * LEASE_S + 2.0
SAY_EVERY_S = 5.0
MAX_SHOWN = 10
MAX_ABORTED = 3
"""Runs one after the other that could not run, before a series of runs is given up."""

PAUSES: dict[str, tuple[float, float]] = {
    "store": (4.0, 7.0), "keys": (4.0, 8.0), "processes": (8.0, 12.0), "links": (4.0, 8.0), "database": (9.0, 15.0),
}  # fmt: skip
"""Seconds between faults of a lane. The lane of the store also waits until the cache serves again: otherwise it never would."""


@dataclass
class Result:
    """What a run found."""

    seed: str
    seconds: float
    report: Report
    faults: Counter[str]
    failed: list[Problem]
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    excused: int = 0
    alarms: set[str] = field(default_factory=set)

    @property
    def stale_reads(self) -> int:
        """Count the reads that broke a promise, whichever."""
        return sum(self.report.violations.values())

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not (self.stale_reads or self.report.lost_invalidations or self.failed or self.alarms)

    def line(self) -> dict[str, Any]:
        """Return what the last line says."""
        return {
            "reads": self.report.reads,
            "writes": self.report.writes,
            "faults": self.faults.total(),
            "stale_reads": self.stale_reads,
            "lost_invalidations": self.report.lost_invalidations,
            "failed_requests": len(self.failed),
            "seed": self.seed,
        }


# -- one run -----------------------------------------------------------------------------------------------------------


async def play(
    folder: Path,
    *,
    seed: str,
    seconds: float,
    kinds: Sequence[str] = tuple(FAULTS),
    plan: Plan | None = None,
    hasty: bool = False,
    tell: Callable[[Stage, Counter[str], float], None] | None = None,
) -> Result:
    """Run for some seconds with faults of these kinds, then check. Raises ``ServerFailed`` when it cannot run.

    ``hasty`` leaves less time between faults, for runs that are short.
    """
    faults: Counter[str] = Counter()
    recovery_s: dict[str, list[float]] = {}
    async with stage(folder, plan or Plan(), seed=seed) as made:
        with Recorder(made.history) as recorder:
            outsiders = Outsiders(made, recorder, Random(f"{seed}/outsiders"))
            behind = [asyncio.create_task(work()) for work in (outsiders.observe, outsiders.write, outsiders.trade)]
            await asyncio.gather(*(worker.start() for worker in made.workers.values()))
            started = now()

            def over() -> bool:
                return now() - started >= seconds or bool(made.broken) or any(task.done() for task in behind)

            courses = [_Course(lane, kinds, seed, 0.3 if hasty else 1.0) for lane in PAUSES]
            lanes = [asyncio.create_task(_lane(made, outsiders, course, over, faults, recovery_s)) for course in courses]
            try:
                while not over():
                    await asyncio.sleep(0.2)
                    if tell is not None:
                        tell(made, faults, now() - started)
                await asyncio.gather(*lanes)
                if not made.broken and await made.hits_again(most_s=RECOVER_S) is None:
                    made.broken.append(f"nothing was served from the cache within {RECOVER_S} s after the last fault")
                await asyncio.gather(*(worker.end() for worker in made.workers.values()))
            finally:
                for task in (*lanes, *behind):
                    task.cancel()
                ended = await asyncio.gather(*lanes, *behind, return_exceptions=True)
            made.broken += [repr(error) for error in ended if isinstance(error, Exception)]
        if made.broken:
            raise ServerFailed("\n".join(made.broken))
        took_s = now() - started
        failed = made.unexcused()
        excused = len(made.problems) - len(failed)
    report = await asyncio.to_thread(check, load([made.history]), bound_s=BOUND_S)
    return Result(seed, took_s, report, faults, failed, recovery_s, excused, made.alarms)


@dataclass(frozen=True)
class _Course:
    """What happens in a lane: which kinds, in which order, with pauses so many times as long as usual."""

    lane: str
    kinds: Sequence[str]
    seed: str
    patience: float


async def _lane(
    made: Stage,
    outsiders: Outsiders,
    course: _Course,
    over: Callable[[], bool],
    faults: Counter[str],
    recovery_s: dict[str, list[float]],
) -> None:
    """Let the faults of a lane happen, each once before any happens again."""
    randomness = Random(f"{course.seed}/{course.lane}")
    among = [fault for fault in FAULTS.values() if fault.lane == course.lane and fault.kind in course.kinds]
    coming: list[Fault] = []
    while among:
        if not coming:
            coming = randomness.sample(among, len(among))
        fault, its_own = coming.pop(), Random(randomness.random())
        pause_s = randomness.uniform(*PAUSES[course.lane]) * course.patience
        await _until(now() + pause_s, over)
        if course.lane == "store":
            await made.hits_again(most_s=RECOVER_S)
        if over():
            return
        happened = await fault.happen(Scene(made, outsiders, its_own))
        faults[fault.kind] += happened
        if course.lane == "store" and happened:
            took_s = await made.hits_again(most_s=RECOVER_S)
            if took_s is not None:
                recovery_s.setdefault(fault.kind, []).append(took_s)


async def _until(moment: float, over: Callable[[], bool]) -> None:
    while now() < moment and not over():
        await asyncio.sleep(0.05)


# -- many runs ---------------------------------------------------------------------------------------------------------


def add(state: dict[str, Any], result: Result) -> None:
    """Add a run to the totals."""
    line = result.line()
    for name in ("reads", "writes", "stale_reads", "lost_invalidations", "failed_requests"):
        state[name] = state.get(name, 0) + line[name]
    state["seconds"] = round(state.get("seconds", 0) + result.seconds, 1)
    state["worst_staleness_s"] = round(max(state.get("worst_staleness_s", 0), result.report.worst_staleness_s), 3)
    state["how"] = dict(Counter(state.get("how", {})) + Counter(result.report.how))
    state["faults"] = dict(Counter(state.get("faults", {})) + result.faults)
    state.setdefault("seeds", []).append(result.seed)


def summary(state: dict[str, Any]) -> str:
    """Put the totals into Markdown."""
    reads, how = state["reads"], state["how"]
    served = how.get("hit", 0) + how.get("shared", 0)
    lines = [
        "# Reads under faults",
        "",
        f"{reads:,} reads and {state['writes']:,} writes in {len(state['seeds'])} runs ({state['seconds'] / 3600:.1f} hours), "
        f"{sum(state['faults'].values()):,} faults:",
        "",
        "| what | count |",
        "|---|---|",
        f"| stale, foreign or invented reads | {state['stale_reads']} |",
        f"| lost invalidations | {state['lost_invalidations']} |",
        f"| requests that failed although the database could be reached | {state['failed_requests']} |",
        f"| reads served from the cache | {served:,} ({served / max(1, reads):.0%}) |",
        f"| longest that an unacknowledged write was not seen | {state['worst_staleness_s']:.3f} s (allowed: {BOUND_S:.2f} s) |",
        "",
        "Made by `python -m tests.faults.run --total-reads N --state FILE`; a run is repeated with its seed. "
        f"Seeds {state['seeds'][0]} to {state['seeds'][-1]}.",
        "",
        "| fault | what happens | times |",
        "|---|---|---|",
    ]
    lines += [f"| {fault.kind} | {fault.what} | {state['faults'].get(fault.kind, 0):,} |" for fault in FAULTS.values()]
    return "\n".join([*lines, ""])


# -- the command line --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; return the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    state: dict[str, Any] = json.loads(options.state.read_text()) if options.state and options.state.exists() else {}
    if options.total_reads and not options.state:
        console.print("--total-reads needs --state FILE, to go on where it stopped")
        return 2
    if options.summary:
        if not state:
            console.print("there is no state to sum up: give --state FILE")
            return 2
        options.summary.write_text(summary(state))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: everything is stopped and removed
    try:
        return _run_all(options, state, console)
    except KeyboardInterrupt:
        console.print("stopped; runs that were completed are in the state")
        return 2


def _run_all(options: argparse.Namespace, state: dict[str, Any], console: Console) -> int:
    """Run once, or with one seed after the other until there are enough reads; print the last line."""
    seed, line, ok, aborted = int(options.seed), None, True, 0
    while ok and (line is None or (options.total_reads and state["reads"] < options.total_reads)):
        while str(seed) in state.get("seeds", []):
            seed += 1
        result = _run(options, str(seed), console)
        if result is None:
            aborted += 1
            if not options.total_reads or aborted == MAX_ABORTED:
                return 2
            seed += 1
            continue
        ok, line, aborted = result.ok, result.line(), 0
        if options.state:
            add(state, result)
            _write(options.state, state)
            line = {name: state.get(name, value) for name, value in line.items()} | {"faults": sum(state["faults"].values())}
    print(json.dumps(line))
    return 0 if ok else 1


def _run(options: argparse.Namespace, seed: str, console: Console) -> Result | None:
    """Run once and show what was found; None when it could not run. The folder is kept when there is something to look at."""
    folder = Path(tempfile.mkdtemp(prefix="respcache-faults-", dir=options.folder))
    kinds = tuple(options.only or FAULTS)
    plan = Plan(sabotage=options.sabotage)
    keep = options.keep
    try:
        with _told(console, seed, options.seconds) as tell:
            result = asyncio.run(play(folder, seed=seed, seconds=options.seconds, kinds=kinds, plan=plan, tell=tell))
        keep |= not result.ok
        _show(console, result, folder)
    except Exception as error:  # of our own machinery: a series of runs goes on with the next seed
        keep = True
        if not isinstance(error, ServerFailed):
            console.print_exception()
        console.print(f"the suite could not run ({folder}): {type(error).__name__}: {error}", markup=False)
        return None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return result


@contextlib.contextmanager
def _told(console: Console, seed: str, seconds: float) -> Any:
    """Show how a run goes: a bar on a terminal, a line now and then elsewhere."""
    columns = (TextColumn("seed {task.fields[seed]}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=seconds, seed=seed, said="starting")
        last = -SAY_EVERY_S

        def tell(made: Stage, faults: Counter[str], elapsed_s: float) -> None:
            nonlocal last
            said = (
                f"{made.total('reads')} reads, {made.total('hit')} hits, {made.total('writes')} writes, {faults.total()} faults"
            )
            progress.update(task, completed=min(elapsed_s, seconds), said=said)
            if not console.is_terminal and elapsed_s - last >= SAY_EVERY_S:
                last = elapsed_s
                console.print(f"seed {seed}  {elapsed_s:5.0f} s  {said}")

        yield tell


def _show(console: Console, result: Result, folder: Path) -> None:
    table = Table("fault", "times", "served again after", title=f"seed {result.seed}: {result.seconds:.0f} s")
    for kind in FAULTS:
        took_s = result.recovery_s.get(kind, [])
        table.add_row(kind, str(result.faults[kind]), ", ".join(f"{one:.1f} s" for one in took_s))
    console.print(table)
    console.print(str(result.report), markup=False, highlight=False)
    for kind in result.report.violations:
        console.print(result.report.excerpt(kind), markup=False, highlight=False)
    console.print(f"{len(result.failed)} requests failed without a reason, {result.excused} with one")
    for problem in result.failed[:MAX_SHOWN]:
        console.print(
            f"{problem.process}: {problem.start:.3f} .. {problem.end:.3f}: {problem.what}", markup=False, highlight=False
        )
    for alarm in result.alarms:
        console.print(f"the audit found: {alarm}", markup=False, highlight=False)
    if not result.ok:
        console.print(f"the history is kept: {folder / 'history'}", markup=False)


def _write(path: Path, state: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(state, indent=1) + "\n")
    unfinished.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=sorted(FAULTS), help="only this kind of fault; may be repeated")
    parser.add_argument("--sabotage", choices=sorted(SABOTAGES), help="take a rule out of the workers: the suite must notice")
    parser.add_argument("--state", type=Path, metavar="FILE", help="add up totals here")
    parser.add_argument("--total-reads", type=int, metavar="N", help="run with one seed after the other until this many reads")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the totals of --state as Markdown, run nothing")
    parser.add_argument("--folder", type=Path, help="where histories and servers live while it runs")
    parser.add_argument("--keep", action="store_true", help="keep the history also when nothing was found")
    return parser


if __name__ == "__main__":
    sys.exit(main())
