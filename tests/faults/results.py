"""What a run found, and what all runs found together: the figures that decide the exit status, and
the page made of them.

The totals are one JSON object, the *state*; whoever goes on with it adds to it:

* ``reads``, ``writes``, ``late_reads`` (less than the newest, as their level allows),
  ``stale_reads`` (less than that), ``lost_invalidations``, ``failed_requests``, ``alarms``,
  ``seconds``: sums; ``how`` and ``faults``: sums by word; ``worst_staleness_s``: the most, less
  what the level of the read allows;
* words of ``how``: ``hit``, ``hit below ASGI``, ``shared``, ``fill``, ``bypass``; with ``bounded``
  or ``ttl`` before it for reads of that level;
* ``seeds``: of the runs that were completed; ``aborted``: of those that were not, with the reason;
  what was recorded until then was checked and is in the sums, but for failed requests: whatever
  ended the run may have failed them;
* ``failed_runs``: seeds of runs in which something else than a single read was wrong, with what it
  was;
* ``commands``: command lines as they were typed, with the seeds that they ran.

States written before all of these were kept have no ``alarms``, ``aborted``, ``failed_runs`` and
``commands``: that is nothing of each. (Then a run with an alarm ended the series without a trace,
and an aborted one was left out.) They can be added to. What was read before there were levels was
strict, and above ASGI.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from respcache import Level
from respcache.core.serving_lease import DRIFT, LEASE_S
from respcache.testing.checker import Report, check
from respcache.testing.history import load

from . import ways
from .faults import FAULTS
from .stage import Problem

BOUND_S = LEASE_S * DRIFT + 0.1
"""How long a write that nobody acknowledged may stay unseen: the lease, and the slack between a
COMMIT and who notes it."""

SUMS = (
    "reads",
    "writes",
    "late_reads",
    "stale_reads",
    "lost_invalidations",
    "failed_requests",
    "alarms",
)
PROMISES = ("stale_reads", "lost_invalidations", "failed_requests", "alarms", "failed_runs")
"""What of the totals must be nothing."""

PURPOSE = (
    "For readers who want evidence that no read is stale when servers and processes fail under "
    "load. [Proofs](proofs.md) names the other checks."
)
WAYS = (
    f"Most routes are read at level `strict`, two at `bounded` with a bound of {ways.BOUND_S:.0f} "
    f"s, and values at `ttl` with {ways.VALUE_TTL_S:.0f} s. In turn, each tenant is read only at "
    "`bounded` and `ttl` for a while. About half of the processes answer hits below ASGI, and "
    "about half receive no bumps of other processes; the seed decides. Runs with seeds below 200 "
    "preceded the levels: they were strict, and all hits above ASGI."
)

MAX_REASON = 200
NO_COMMAND = (
    "The command was not recorded at that time, nor were alarms and aborted runs (the missing "
    "seeds)."
)


def judge(history: Path) -> Report:
    """Check what was recorded, which may be nothing at all. Raises ``ValueError`` when it is no
    history."""
    return check(load([history] if history.exists() else []), bound_s=BOUND_S)


@dataclass
class Result:
    """What a run found. ``aborted`` says why it was given up, ``unrecovered`` that the cache did
    not serve again at its end."""

    seed: str
    seconds: float = 0.0
    report: Report = field(default_factory=lambda: check([], bound_s=BOUND_S))
    faults: Counter[str] = field(default_factory=Counter)
    failed: list[Problem] = field(default_factory=list)
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    excused: int = 0
    alarms: set[str] = field(default_factory=set)
    unrecovered: str = ""
    aborted: str = ""

    @property
    def failures(self) -> list[str]:
        """What was wrong with the run as a whole. One that was given up is not expected to have
        come far."""
        if self.aborted:
            return []
        found = [self.unrecovered] if self.unrecovered else []
        if not self.report.reads:
            return [*found, "nothing was read"]
        return (
            found
            if _count(self.report.how, "hit")
            else [*found, "nothing was served from the cache"]
        )

    @property
    def ok(self) -> bool:
        """Whether every promise was kept, as far as it went."""
        return kept(add({}, self))


def add(state: dict[str, Any], result: Result, *, command: str | None = None) -> dict[str, Any]:
    """Add a run to the totals, and return them."""
    report = result.report
    broken = (
        report.violating_reads,
        report.lost_invalidations,
        len(result.failed),
        len(result.alarms),
    )
    for name, count in zip(
        SUMS, (report.reads, report.writes, report.late_reads, *broken), strict=True
    ):
        state[name] = state.get(name, 0) + count
    state["seconds"] = round(state.get("seconds", 0) + result.seconds, 1)
    state["worst_staleness_s"] = round(
        max(state.get("worst_staleness_s", 0), report.worst_staleness_s), 3
    )
    state["how"] = dict(Counter(state.get("how", {})) + Counter(report.how))
    state["faults"] = dict(Counter(state.get("faults", {})) + result.faults)
    seeds, aborted, failed = (
        state.setdefault("seeds", []),
        state.setdefault("aborted", {}),
        state.setdefault("failed_runs", {}),
    )
    if result.aborted:
        aborted[result.seed] = result.aborted.strip().partition("\n")[0][:MAX_REASON]
    else:
        seeds.append(result.seed)
    if result.failures:
        failed[result.seed] = "; ".join(result.failures)
    if command is not None:
        state.setdefault("commands", {}).setdefault(command, []).append(result.seed)
    return state


def ran(state: dict[str, Any], seed: str) -> bool:
    """Whether a run with this seed is in the totals."""
    return seed in state.get("seeds", ()) or seed in state.get("aborted", ())


def kept(state: dict[str, Any]) -> bool:
    """Whether every promise was kept in all runs together."""
    return not any(state.get(name) for name in PROMISES)


def line(state: dict[str, Any]) -> dict[str, int]:
    """Return the totals in numbers."""
    return {
        **{name: state.get(name, 0) for name in SUMS},
        "faults": sum(state.get("faults", {}).values()),
        **{name: len(state.get(name, ())) for name in ("failed_runs", "aborted")},
    }


def summary(state: dict[str, Any], *, command: str) -> str:
    """Put the totals into Markdown; ``command`` is the one that does."""
    counters, how, seeds, aborted = (
        line(state),
        state["how"],
        state["seeds"],
        state.get("aborted", {}),
    )
    reads, served = counters["reads"], _count(how, "hit") + _count(how, "shared")
    lines = [
        "# Reads under faults",
        "",
        *_wrapped(PURPOSE),
        "",
        f"{reads:,} reads and {counters['writes']:,} writes in {len(seeds) + len(aborted)} runs of "
        f"together {state['seconds']:,.0f} seconds, {counters['faults']:,} faults:",
        "",
        "| what | count |",
        "|---|---|",
        f"| stale, foreign or invented reads | {counters['stale_reads']} |",
        f"| lost invalidations | {counters['lost_invalidations']} |",
        f"| requests that failed although the database could be reached | "
        f"{counters['failed_requests']} |",
        f"| wrong responses found by the cache's own verifier | {counters['alarms']} |",
        "| runs without reads or hits, or at whose end the cache did not serve again"
        f"{_reasons(state, 'failed_runs')} | {counters['failed_runs']} |",
        f"| aborted runs, whose histories were checked{_reasons(state, 'aborted')} | "
        f"{counters['aborted']} |",
        f"| reads served from the cache | {served:,} ({served / max(1, reads):.0%}) |",
        *(
            f"| hits among the reads at level `{level}` | {_count(how, 'hit', level=level):,} of "
            f"{_count(how, level=level):,} |"
            for level in Level
        ),
        f"| hits answered below ASGI (`respcache.integrations.uvicorn`) | "
        f"{_count(how, 'below ASGI'):,} |",
        f"| reads that missed an acknowledged write as level `bounded` or `ttl` allows | "
        f"{counters['late_reads']:,} |",
        f"| longest time for which an unacknowledged write was not visible | "
        f"{state['worst_staleness_s']:.3f} s (allowed: {BOUND_S:.2f} s) |",
        "",
        *_wrapped(WAYS),
        "",
        "This page is generated by",
        "",
        "```",
        command,
        "```",
        "",
        *_wrapped(
            "The figures are the sums of the runs below. To repeat a run, use its command with its "
            "`--seed`, without `--total-reads` and `--state`."
        ),
        "",
        *(
            part
            for started, seeds in _commands(state)
            for part in (f"Seeds {_ranges(seeds)}:", "", "```", started, "```", "")
        ),
        "| fault | what happens | times |",
        "|---|---|---|",
    ]
    lines += [
        f"| {fault.kind} | {fault.what} | {state['faults'].get(fault.kind, 0):,} |"
        for fault in FAULTS.values()
    ]
    return "\n".join([*lines, ""])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def _count(how: Mapping[str, int], part: str = "", *, level: Level | None = None) -> int:
    """Count the reads of which this was said, of a level or of all."""
    return sum(
        count for word, count in how.items() if part in word and level in (None, _level(word))
    )


def _level(word: str) -> Level:
    first = word.partition(" ")[0]
    return Level(first) if first in tuple(Level) else Level.STRICT


def _reasons(state: dict[str, Any], name: str) -> str:
    """Return which runs these were and why, for a cell of a table."""
    found = "; ".join(f"seed {seed}: {reason}" for seed, reason in state.get(name, {}).items())
    return f" ({found.replace('|', '/')})" if found else ""


def _commands(state: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the commands and their seeds; first the seeds of whose command nothing is known."""
    commands = state.get("commands", {})
    told = {seed for seeds in commands.values() for seed in seeds}
    untold = [seed for seed in state["seeds"] if seed not in told]
    known = list(commands.items())
    return [(NO_COMMAND, untold), *known] if untold else known


def _ranges(seeds: Iterable[str]) -> str:
    """Name numbers, those that follow each other by the first and the last."""
    found = []
    for _, group in groupby(enumerate(sorted(map(int, seeds))), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        found.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}")
    return ", ".join(found)
