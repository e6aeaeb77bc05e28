"""Decides whether a history is possible for a cache that keeps its promises. O(n log n); reads are
streamed, not kept in memory.

``staleness.Minimum`` decides whether a read was stale (I1, I3, I4). A read that began at ``start``,
ended at ``end``, has the slack ``slack_s`` (0 unless recorded with one: the route's permitted age)
and returned version v of a register violates

* I1, freshness, if a later version was acknowledged before ``start - slack_s``;
* I3, the bound, if a later version was committed at or before ``start - slack_s - bound_s``,
  acknowledged or not;
* I4, the session's own view, if a write of the same session that was acknowledged before ``start``
  made a later version. Or if a read of that session that ended before ``start`` returned one,
  unless this read has a slack: then it may be answered from an older view than the one before it;
* I5, isolation, if the body is not what was asked for (``received != asked``);
* invention, if v could not exist yet:
    - v, or a version before it, was made by a write that began only after ``end``; or
    - no known write of v or a later version had begun by ``end``, and v is further above the
      highest known version below it than there were attempts of unknown outcome by then. (Each
      makes one version at most. How many of them explain gaps elsewhere is not counted, so leftover
      attempts only make this more lenient.)

"Before" is strict where equal times would accuse: two moments with the same clock reading may be in
either order.

How: the writes to a register are sorted by version once, and the steps at which its highest
acknowledged and committed versions rose are kept; so are those of each session. A returned version
costs one binary search if it is the newest, a few more if it is not. Memory: some 100 bytes for
each write, and for each version that each session saw of each register; nothing for a read.
"""

import argparse
import sys
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

from respcache.testing.history import Event, History, Read, Write, load
from respcache.testing.proofs import Proof, Violation, find_proofs
from respcache.testing.staleness import RegisterHistory, Steps, ViolationKind

MAX_WORDS = 100
"""Distinct values of ``Read.how`` with a counter of their own. All others share one."""

OTHER_WORDS = "(others)"


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a check. ``str()`` is a summary of a few lines.

    * ``writes`` counts distinct versions of registers; ``attempts``, writes of unknown version.
    * ``violations`` counts reads by kind, each read once per kind. Kinds without violations are
      absent. ``violating_reads`` counts each of these reads once.
    * ``lost_invalidations`` counts the distinct versions that some read missed although they were
      committed ``bound_s`` (and the read's slack) before it began: the writes whose invalidation
      did not reach the cache.
    * ``worst_staleness_s`` is the longest time for which a returned version had been superseded
      (a later one committed, acknowledged or not) when the read began, less its slack; also where
      that is allowed.
    * ``lenient_reads`` counts the reads with a slack, which prove less; ``late_reads``, those of
      them that used it: they returned less than was acknowledged before they began.
    """

    reads: int
    lenient_reads: int
    late_reads: int
    writes: int
    attempts: int
    how: dict[str, int]
    violations: dict[ViolationKind, int]
    violating_reads: int
    lost_invalidations: int
    worst_staleness_s: float
    torn: int
    proofs: dict[ViolationKind, Proof]

    @property
    def ok(self) -> bool:
        """Whether the history has reads, and none of them violates anything."""
        return self.reads > 0 and not self.violations

    def excerpt(self, kind: ViolationKind | None = None) -> str:
        """Return the shortest proof (fewest operations, then shortest time) of all violations, or
        of one kind, in words; empty without violations."""
        among = [proof for each, proof in self.proofs.items() if kind in (None, each)]
        return str(min(among, key=lambda proof: _size(proof.violation))) if among else ""

    def __str__(self) -> str:
        how = ", ".join(f"{word or '-'} {count}" for word, count in sorted(self.how.items()))
        found = (
            ", ".join(f"{kind}: {count} reads" for kind, count in self.violations.items()) or "none"
        )
        found += f" ({self.violating_reads} distinct reads)" if len(self.violations) > 1 else ""
        slack = (
            f", {self.lenient_reads} of them with a slack, which {self.late_reads} used"
            if self.lenient_reads
            else ""
        )
        lines = [
            f"{self.reads} reads ({how}){slack}",
            f"{self.writes} writes, {self.attempts} of unknown outcome, {self.torn} torn lines",
            f"violations: {found}",
            f"lost invalidations: {self.lost_invalidations}; worst staleness: "
            f"{self.worst_staleness_s:.3f} s",
            self.excerpt(),
        ]
        return "\n".join(lines).rstrip()


def check(history: Iterable[Event], *, bound_s: float) -> Report:
    """Judge every read of a history that can be iterated several times: a list, or the result of
    ``load``.

    ``bound_s`` is for how many seconds after its COMMIT an unacknowledged write may stay unseen
    (I3), in addition to a read's slack. Raises ``ValueError`` for a bound or a slack below 0.
    """
    if isinstance(history, Iterator):
        raise TypeError("a history is iterated several times: pass a list, or the result of load()")
    if not bound_s >= 0:
        raise ValueError("bound_s must be a number of seconds, 0 or more")
    evidence = _Evidence(history)
    judge = _Judge(evidence, bound_s=bound_s)
    for event in history:
        if isinstance(event, Read):
            judge.read(event)
    return Report(
        reads=judge.reads,
        lenient_reads=judge.lenient,
        late_reads=judge.late,
        writes=evidence.writes,
        attempts=evidence.attempts,
        how=dict(judge.how),
        violations={kind: judge.counts[kind] for kind in ViolationKind if judge.counts[kind]},
        violating_reads=judge.accused,
        lost_invalidations=sum(judge.lost(register) for register in judge.missed),
        worst_staleness_s=judge.worst_staleness_s,
        torn=history.torn if isinstance(history, History) else 0,
        proofs=find_proofs(history, judge.best.values()),
    )


class _Register:
    """The writes to one register by version, and for each version the extremes of all before it
    and of all from it on.

    Positions are those of ``versions``. The one behind the last stands for "no such write" and has
    infinite times. ``history`` decides; the extremes find the writes that prove it.
    """

    def __init__(self) -> None:
        self.versions = array("q")
        self.started, self.committed, self.acked = array("d"), array("d"), array("d")
        self.attempts: list[float] = []
        self.unresolved: set[tuple[str, float]] = set()
        self.history = RegisterHistory()

    def add(self, write: Write) -> None:
        """Add an event, in any order of versions."""
        attempt = write.process, write.started
        if write.version is None:
            self.unresolved.add(attempt)
            return
        self.unresolved.discard(attempt)
        acked = inf if write.acked is None else write.acked
        self.versions.append(write.version)
        self.started.append(write.started)
        self.committed.append(acked if write.committed is None else min(acked, write.committed))
        self.acked.append(acked)

    def settle(self) -> None:
        """Sort, merge the events of each version into one write, and compute the extremes."""
        self.attempts = sorted(started for _, started in self.unresolved)
        self._merge(sorted(range(len(self.versions)), key=self.versions.__getitem__))
        for at, version in enumerate(self.versions):
            self.history.add(version, committed=self.committed[at], acknowledged=self.acked[at])
        self.history.settle()
        for times in (self.started, self.committed, self.acked):
            times.append(inf)
        self.first_started = _first_from(self.started)
        self.first_committed = _first_from(self.committed)
        self.first_acked = _first_from(self.acked)
        self.last_started = _last_until(self.started)

    def _merge(self, order: list[int]) -> None:
        versions, columns = array("q"), (array("d"), array("d"), array("d"))
        for at in order:
            times = self.started[at], self.committed[at], self.acked[at]
            if versions and versions[-1] == self.versions[at]:
                for column, time in zip(columns, times, strict=True):
                    column[-1] = min(column[-1], time)
            else:
                versions.append(self.versions[at])
                for column, time in zip(columns, times, strict=True):
                    column.append(time)
        self.versions = versions
        self.started, self.committed, self.acked = columns


class _Evidence:
    """What must be known before the first read is judged: all writes, what each session knew, and
    what each session wrote."""

    def __init__(self, history: Iterable[Event]) -> None:
        self.registers: dict[str, _Register] = {}
        self.known: dict[tuple[str, str], Steps] = {}
        self.wrote: dict[tuple[str, str], Steps] = {}
        for event in history:
            if isinstance(event, Write):
                self._write(event)
            elif event.session is not None:
                for register, version in event.values.items():
                    self._of(self.known, event.session, register).add(event.end, version)
        for table in self.registers.values():
            table.settle()
        for seen in (*self.known.values(), *self.wrote.values()):
            seen.settle()
        self.writes = sum(len(table.versions) for table in self.registers.values())
        self.attempts = sum(len(table.attempts) for table in self.registers.values())

    def known_before(self, read: Read, register: str) -> tuple[float, int]:
        """Return the version of a register that the read's session must see, and since when."""
        if read.session is None:
            return read.start, 0
        seen = (self.wrote if read.slack_s else self.known).get((read.session, register))
        return (read.start, 0) if seen is None else seen.before(read.start)

    def _write(self, event: Write) -> None:
        table = self.registers.get(event.register)
        if table is None:
            table = self.registers[event.register] = _Register()
        table.add(event)
        if event.session is not None and event.acked is not None and event.version is not None:
            for of in (self.known, self.wrote):
                self._of(of, event.session, event.register).add(event.acked, event.version)

    def _of(self, sessions: dict[tuple[str, str], Steps], session: str, register: str) -> Steps:
        seen = sessions.get((session, register))
        if seen is None:
            seen = sessions[session, register] = Steps()
        return seen


class _Judge:
    """Judges one read after the other, and keeps the violation with the shortest proof of each
    kind."""

    def __init__(self, evidence: _Evidence, *, bound_s: float) -> None:
        self.counts: Counter[ViolationKind] = Counter()
        self.best: dict[ViolationKind, Violation] = {}
        self.missed: dict[str, array[float]] = {}
        self.how: Counter[str] = Counter()
        self.reads = self.lenient = self.late = self.accused = 0
        self.worst_staleness_s = 0.0
        self._evidence = evidence
        self._bound_s = bound_s
        self._unwritten = _Register()
        self._unwritten.settle()
        self._last_accused: dict[ViolationKind | None, Read] = {}  # None: of any kind

    def read(self, read: Read) -> None:
        """Judge one read."""
        self.reads += 1
        self.lenient += read.slack_s > 0
        if not read.slack_s >= 0:
            raise ValueError(
                f"slack_s {read.slack_s!r} of a read of {read.asked} must be a number of seconds, "
                f"0 or more"
            )
        late = False
        self.how[
            read.how if read.how in self.how or len(self.how) < MAX_WORDS else OTHER_WORDS
        ] += 1
        if read.received != read.asked:
            self._accuse(Violation(ViolationKind.ISOLATION, read, 1, read.end - read.start))
        for register, version in read.values.items():
            table = self._evidence.registers.get(register, self._unwritten)
            at = bisect_right(table.versions, version)  # the position behind the returned version
            since, known = self._evidence.known_before(read, register)
            # a read of the newest version cannot be stale
            if at < len(table.versions) or known > version:
                late |= table.history.acknowledged.before(read.start)[1] > version
                self._compare(read, register, at=at, known=(since, known))
            if at and table.started[table.last_started[at - 1]] > read.end:
                self._too_early(read, register, at)
            elif not at or table.versions[at - 1] != version:
                self._unknown(read, register, at)
        self.late += late and read.slack_s > 0

    def lost(self, register: str) -> int:
        """Return the number of writes to a register that some read had to return by I3, and did
        not."""
        table, missed = self._evidence.registers[register], self.missed[register]
        latest, count = -inf, 0
        for at in range(len(table.versions)):
            latest = max(latest, missed[at])
            count += table.committed[at] <= latest
        return count

    def _compare(self, read: Read, register: str, *, at: int, known: tuple[float, int]) -> None:
        """Compare what was returned with the minimum; ``at`` is the position behind it, ``known``
        what its session knew, and since when."""
        table = self._evidence.registers.get(register, self._unwritten)
        minimum = table.history.minimum(
            read.start, slack_s=read.slack_s, bound_s=self._bound_s, session=known[1]
        )
        must_know = read.start - read.slack_s
        earliest = table.first_committed[at]
        if table.committed[earliest] <= must_know:
            self.worst_staleness_s = max(
                self.worst_staleness_s, must_know - table.committed[earliest]
            )
        for kind in minimum.violated_by(read.values[register]):
            if kind is ViolationKind.SESSION:
                span = read.end - known[0]
                self._accuse(Violation(kind, read, 2, span, register, known[1], known[0]))
            elif kind is ViolationKind.FRESHNESS:
                self._stale(kind, read, register, at=at, due=table.first_acked[at])
            else:
                missed = self.missed.get(register)
                if missed is None:
                    missed = self.missed[register] = array("d", [-inf]) * len(table.started)
                missed[at] = max(missed[at], must_know - self._bound_s)
                self._stale(kind, read, register, at=at, due=earliest)

    def _stale(self, kind: ViolationKind, read: Read, register: str, *, at: int, due: int) -> None:
        table = self._evidence.registers[register]
        known = bool(at) and table.versions[at - 1] == read.values[register]
        begin = min(table.started[due], table.started[at - 1] if known else inf, read.start)
        since = table.acked[due] if kind is ViolationKind.FRESHNESS else table.committed[due]
        committed, version = table.committed[due], table.versions[due]
        self._accuse(
            Violation(kind, read, 2 + known, read.end - begin, register, version, since, committed)
        )

    def _too_early(self, read: Read, register: str, at: int) -> None:
        table = self._evidence.registers[register]
        late = table.last_started[at - 1]
        span = table.started[late] - read.start
        self._accuse(
            Violation(
                ViolationKind.INVENTION,
                read,
                2,
                span,
                register,
                table.versions[late],
                table.started[late],
            )
        )

    def _unknown(self, read: Read, register: str, at: int) -> None:
        """Judge a version without a recorded write: a later write, or enough attempts of unknown
        outcome, must have begun."""
        table = self._evidence.registers.get(register, self._unwritten)
        above = read.values[register] - (table.versions[at - 1] if at else 0)
        begun = table.started[table.first_started[at]] <= read.end
        if not begun and above > bisect_right(table.attempts, read.end):
            self._accuse(
                Violation(ViolationKind.INVENTION, read, 1, read.end - read.start, register)
            )

    def _accuse(self, found: Violation) -> None:
        if self._last_accused.get(None) is not found.read:
            self._last_accused[None] = found.read
            self.accused += 1
        if self._last_accused.get(found.kind) is not found.read:
            self._last_accused[found.kind] = found.read
            self.counts[found.kind] += 1
        best = self.best.get(found.kind)
        if best is None or _size(found) < _size(best):
            self.best[found.kind] = found


def _size(found: Violation) -> tuple[int, float]:
    return found.operations, found.span


def _first_from(times: "array[float]") -> "array[int]":
    """Return, for each position, where the earliest time from there on is."""
    first = array("q", range(len(times)))
    for at in range(len(times) - 2, -1, -1):
        if times[first[at + 1]] < times[at]:
            first[at] = first[at + 1]
    return first


def _last_until(times: "array[float]") -> "array[int]":
    """Return, for each position, where the latest time up to and including it is."""
    last = array("q", range(len(times)))
    for at in range(1, len(times)):
        if times[last[at - 1]] > times[at]:
            last[at] = last[at - 1]
    return last


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m respcache.testing.checker",
        description="Check recorded histories. Exit status: 0, 1 for violations, 2 when there is "
        "nothing to check or no history.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument(
        "--bound",
        type=float,
        required=True,
        metavar="S",
        help="seconds for which an unacknowledged write may stay unseen",
    )
    options = parser.parse_args()
    try:
        report = check(load(options.files), bound_s=options.bound)
    # a missing file, or a line that is no event, is not a violation
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report)
    if not report.reads:
        print("nothing to check: no reads were recorded", file=sys.stderr)
        return 2
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(_main())
