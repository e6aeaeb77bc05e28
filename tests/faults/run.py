"""The fault suite: processes read and write while everything that they stand on is broken, then the
history is checked.

    python -m tests.faults.run --seconds 60 --seed 7
    python -m tests.faults.run --seconds 300 --total-reads 10000000 --state docs/faults.json   #
    goes on where it stopped python -m tests.faults.run --state docs/faults.json --summary
    docs/faults.md

The seed decides which faults happen in which order, how long they last and whom they meet, and what
each client asks; not how the operating system schedules it all. Progress goes to standard error;
the last line of standard output is one JSON object:
the totals, of the state when there is one, and the last seed.

Exit status, by the totals: 1 when a promise was broken in any run, also one that had to be given
up, or the cache did not serve again; otherwise 2 when the suite could not run, and 0.
"""

import argparse
import asyncio
import contextlib
import json
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from respcache.core.serving_lease import LEASE_S
from respcache.testing.history import Recorder, now
from respcache.testing.servers import ServerFailed

from .faults import FAULTS, Fault, Scene
from .outsiders import Outsiders
from .results import Result, add, judge, kept, line, ran, summary
from .sabotage import SABOTAGES
from .stage import HISTORY, Plan, Stage, stage

RECOVER_S = 15 * LEASE_S
"""Within which the cache serves again after a fault: so long that only a cache that stays away
fails, not a busy machine."""
SAY_EVERY_S = 5.0
MAX_SHOWN = 10
MAX_ABORTED = 3
"""Runs one after the other that could not run, before a series of runs is given up."""

PROGRAM = "python -m tests.faults.run"

PAUSES: dict[str, tuple[float, float]] = {
    "store": (4.0, 7.0),
    "keys": (4.0, 8.0),
    "processes": (8.0, 12.0),
    "links": (4.0, 8.0),
    "database": (9.0, 15.0),
}
"""Seconds between faults of a lane. The lane of the store also waits until the cache serves again:
otherwise it never would."""

Tell = Callable[[Stage, Counter[str], float], None]


# -- one run ---------------------------------------------------------------------------------------


async def play(
    folder: Path,
    *,
    seed: str,
    seconds: float,
    kinds: Sequence[str] = tuple(FAULTS),
    plan: Plan | None = None,
    hasty: bool = False,
    tell: Tell | None = None,
) -> Result:
    """Run for some seconds with faults of these kinds, then check, also when the run had to be
    given up (``Result.aborted``).

    ``hasty`` leaves less time between faults, for runs that are short.
    """
    found = Result(seed)
    courses = [_Course(lane, kinds, seed, 0.3 if hasty else 1.0) for lane in PAUSES]
    try:
        async with stage(folder, plan or Plan(), seed=seed) as made:
            await _perform(made, found, courses, seconds=seconds, tell=tell)
    # of our own machinery; what the cache did until then counts all the same
    except Exception as error:
        found.aborted = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    found.report = await asyncio.to_thread(judge, folder / HISTORY)
    return found


async def _perform(
    made: Stage, found: Result, courses: "Sequence[_Course]", *, seconds: float, tell: Tell | None
) -> None:
    """Let clients and faults happen on a stage, and note what there is to find but the history.
    Raises when it cannot go on."""
    found.alarms = made.alarms
    with Recorder(made.history) as recorder:
        outsiders = Outsiders(made, recorder, Random(f"{found.seed}/outsiders"))
        behind = [
            asyncio.create_task(work())
            for work in (outsiders.observe, outsiders.write, outsiders.trade)
        ]
        lanes: list[asyncio.Task[None]] = []
        started = now()

        def over() -> bool:
            return (
                now() - started >= seconds
                or bool(made.broken)
                or any(task.done() for task in behind)
            )

        try:
            await made.start_processes()
            started = now()
            lanes += [
                asyncio.create_task(
                    _lane(made, outsiders, course, over, found.faults, found.recovery_s)
                )
                for course in courses
            ]
            while not over():
                await asyncio.sleep(0.2)
                if tell is not None:
                    tell(made, found.faults, now() - started)
            await asyncio.gather(*lanes)
            if not made.broken and await made.hits_again(most_s=RECOVER_S) is None:
                found.unrecovered = (
                    f"nothing was served from the cache within {RECOVER_S} s after the last fault"
                )
            await asyncio.gather(*(worker.end() for worker in made.workers.values()))
        finally:
            found.seconds = now() - started
            for task in (*lanes, *behind):
                task.cancel()
            ended = await asyncio.gather(*lanes, *behind, return_exceptions=True)
            made.alarms |= made.server_alarms()
        made.broken += [repr(error) for error in ended if isinstance(error, Exception)]
    if made.broken:
        raise ServerFailed("\n".join(made.broken))
    found.failed = made.unexcused()
    found.excused = len(made.problems) - len(found.failed)


@dataclass(frozen=True)
class _Course:
    """What happens in a lane: which kinds, in which order, with pauses so many times as long as
    usual."""

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
    among = [
        fault
        for fault in FAULTS.values()
        if fault.lane == course.lane and fault.kind in course.kinds
    ]
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


# -- the command line ------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    command = shlex.join([*PROGRAM.split(), *arguments])
    console = Console(stderr=True)
    state: dict[str, Any] = (
        json.loads(options.state.read_text()) if options.state and options.state.exists() else {}
    )
    if options.total_reads and not options.state:
        console.print("--total-reads needs --state FILE, to go on where it stopped")
        return 2
    if options.sabotage and options.state:
        console.print("--sabotage breaks promises on purpose: that is not for a --state")
        return 2
    if options.summary:
        if not state:
            console.print("there is no state to sum up: give --state FILE")
            return 2
        options.summary.write_text(summary(state, command=command))
        return 0
    # ends like Ctrl-C: everything is stopped and removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run_all(options, state, command, console)
    except KeyboardInterrupt:
        console.print("stopped; runs that were completed are in the state")
        return 2
    except Exception:  # also a history that is none: no verdict, so no status of one
        console.print_exception()
        return 2


def _run_all(
    options: argparse.Namespace, state: dict[str, Any], command: str, console: Console
) -> int:
    """Run once, or with one seed after the other until there are enough reads; print the last
    line."""
    seed, aborted = int(options.seed), 0
    while not (options.total_reads and state.get("reads", 0) >= options.total_reads):
        while ran(state, str(seed)):
            seed += 1
        result = _run(options, str(seed), console)
        add(state, result, command=command)
        if options.state:
            _write(options.state, state)
        aborted = aborted + 1 if result.aborted else 0
        if not options.total_reads or not result.ok or aborted == MAX_ABORTED:
            break
    print(json.dumps(line(state) | {"seed": str(seed)}))
    if not kept(state):
        return 1
    return 2 if aborted == (MAX_ABORTED if options.total_reads else 1) else 0


def _run(options: argparse.Namespace, seed: str, console: Console) -> Result:
    """Run once and show what was found. The folder is kept when there is something to look at.

    Raises ``KeyboardInterrupt`` for a run that the user ended, unless a promise was broken until
    then; its seed is free again.
    """
    folder = Path(tempfile.mkdtemp(prefix="respcache-faults-", dir=options.folder))
    keep = True
    try:
        with _told(console, seed, options.seconds) as tell:
            kinds, plan = tuple(options.only or FAULTS), Plan(sabotage=options.sabotage)
            result = asyncio.run(
                play(folder, seed=seed, seconds=options.seconds, kinds=kinds, plan=plan, tell=tell)
            )
    except KeyboardInterrupt:
        result = Result(seed, report=judge(folder / HISTORY), aborted="stopped by the user")
        if result.ok:
            keep = options.keep
            raise
    else:
        keep = options.keep or not result.ok or bool(result.aborted)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    _show(console, result)
    if keep:
        console.print(f"the history is kept: {folder / HISTORY}", markup=False)
    return result


@contextlib.contextmanager
def _told(console: Console, seed: str, seconds: float) -> Any:
    """Show how a run goes: a bar on a terminal, a line now and then elsewhere."""
    columns = (
        TextColumn("seed {task.fields[seed]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=seconds, seed=seed, said="starting")
        last = -SAY_EVERY_S

        def tell(made: Stage, faults: Counter[str], elapsed_s: float) -> None:
            nonlocal last
            said = (
                f"{made.total('reads')} reads, {made.total('hits')} hits, {made.total('writes')} "
                f"writes, {faults.total()} faults"
            )
            progress.update(task, completed=min(elapsed_s, seconds), said=said)
            if not console.is_terminal and elapsed_s - last >= SAY_EVERY_S:
                last = elapsed_s
                console.print(f"seed {seed}  {elapsed_s:5.0f} s  {said}")

        yield tell


def _show(console: Console, result: Result) -> None:
    table = Table(
        "fault", "times", "served again after", title=f"seed {result.seed}: {result.seconds:.0f} s"
    )
    for kind in FAULTS:
        took_s = result.recovery_s.get(kind, [])
        table.add_row(kind, str(result.faults[kind]), ", ".join(f"{one:.1f} s" for one in took_s))
    console.print(table)
    console.print(str(result.report), markup=False, highlight=False)
    for kind in result.report.violations:
        console.print(result.report.excerpt(kind), markup=False, highlight=False)
    console.print(
        f"{len(result.failed)} requests failed without a reason, {result.excused} with one"
    )
    for problem in result.failed[:MAX_SHOWN]:
        console.print(
            f"{problem.process}: {problem.start:.3f} .. {problem.end:.3f}: {problem.what}",
            markup=False,
            highlight=False,
        )
    for alarm in result.alarms:
        console.print(f"the verifier found: {alarm}", markup=False, highlight=False)
    for failure in result.failures:
        console.print(failure, markup=False)
    if result.aborted:
        console.print(
            f"aborted, and checked as far as it went: {result.aborted}",
            markup=False,
            highlight=False,
        )


def _write(path: Path, state: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(state, indent=1) + "\n")
    unfinished.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only",
        action="append",
        choices=sorted(FAULTS),
        help="only this kind of fault; may be repeated",
    )
    parser.add_argument(
        "--sabotage",
        choices=sorted(SABOTAGES),
        help="take a rule out of the workers: the suite must notice",
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="add up totals here")
    parser.add_argument(
        "--total-reads",
        type=int,
        metavar="N",
        help="run with one seed after the other until this many reads",
    )
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FILE",
        help="write the totals of --state as Markdown, run nothing",
    )
    parser.add_argument(
        "--folder", type=Path, help="where histories and servers live while it runs"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the history also when nothing was found"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
