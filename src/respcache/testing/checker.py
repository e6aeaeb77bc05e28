"""Decides whether a history is one of a cache that keeps its word: O(n log n), reads are streamed,
never held.

A read that began at ``start``, ended at ``end``, has the slack ``slack_s`` (0 unless it was
recorded with one: a query that may be answered from a view of that age) and returned version v of a
register violates

* I1, freshness, when a later version was acknowledged before ``start - slack_s``;
* I3, the bound, when a later version was committed at or before ``start - slack_s - bound_s``,
  acknowledged or not;
* I4, the session's own view, when a write of the same session that was acknowledged before
  ``start`` made a later version; or when a read of that session that ended before ``start``
  returned one, unless this read has a slack: it may be answered from an older view than the one
  before it;
* I5, isolation, when the body is not what was asked for (``told != asked``);
* invention, when v could not be there yet:
    - v, or a version before it, was made by a write that began only after ``end``; or
    - no known write of v or a later version had begun by ``end``, and v is further above the
      highest known version below it than there were attempts of unknown outcome by then (each makes
      one version at most; how many of them explain gaps elsewhere is not counted, so leftover
      attempts only make this more lenient).

"Before" is strict where equal times would accuse: two moments with the same reading of the clock
may be in either order.

How: all writes to a register are sorted by version once. Then "a later version was acknowledged
before ``start``" is one comparison with the earliest acknowledgement among all later versions;
likewise for commits and beginnings. So each value that a read returned costs one binary search.
What a session saw is kept as the steps at which it rose. Memory: some 100 bytes for each write, and
for each version that each session saw of each register; nothing for a read.
"""

import argparse
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

from respcache.testing.history import Event, History, Read, Write, load
from respcache.testing.proofs import Proof, Violation, ViolationKind, find_proofs

MAX_WORDS = 100
"""Distinct words of ``Read.how`` that are counted apart; all others are counted together."""

OTHER_WORDS = "(others)"


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. ``str()`` is a summary of a few lines.

    ``writes`` counts distinct versions of registers, ``attempts`` writes whose version nobody
    knows. ``violations`` counts reads, for each kind once however many registers a read had wrong;
    kinds without any are absent. ``violating_reads`` counts each of these reads once, whatever it
    violated, so it is at most ``reads``. ``lost_invalidations`` counts the distinct versions that
    some read did not return although they were committed ``bound_s`` (and its slack) before it
    began: the writes that the cache has not heard of, for any reason. ``worst_staleness_s`` is the
    longest that a returned version had been superseded (a later one committed, acknowledged or not)
    when the read began, less its slack, violation or not. ``lenient_reads`` counts those that had a
    slack: what the others prove, they do not. ``late_reads`` are those of them that used it: they
    returned less than was acknowledged before they began.
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
        """Whether something was read, and no read violated anything: a history without reads proves
        nothing."""
        return self.reads > 0 and not self.violations

    def excerpt(self, kind: ViolationKind | None = None) -> str:
        """Put the shortest proof of a violation into words: fewest operations, then the shortest
        time. Empty when there is none.

        Of all violations that were found, or of one kind.
        """
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
    """Judge every read of a history that can be iterated again and again: a list, or what ``load``
    returns.

    ``bound_s`` is how long after its COMMIT a write may stay unseen although nobody acknowledged it
    (I3), in seconds; a read with a slack has that, too. Raises ``ValueError`` for a bound or a
    slack below 0.
    """
    if isinstance(history, Iterator):
        raise TypeError("a history is iterated several times: give a list, or what load() returns")
    if not bound_s >= 0:
        raise ValueError("bound_s is a number of seconds, 0 or more")
    book = _Book(history)
    judge = _Judge(book, bound_s=bound_s)
    for event in history:
        if isinstance(event, Read):
            judge.read(event)
    return Report(
        reads=judge.reads,
        lenient_reads=judge.lenient,
        late_reads=judge.late,
        writes=book.writes,
        attempts=book.attempts,
        how=dict(judge.how),
        violations={kind: judge.counts[kind] for kind in ViolationKind if judge.counts[kind]},
        violating_reads=judge.accused,
        lost_invalidations=sum(judge.lost(register) for register in judge.missed),
        worst_staleness_s=judge.worst_staleness_s,
        torn=history.torn if isinstance(history, History) else 0,
        proofs=find_proofs(history, judge.best.values()),
    )


class _Register:
    """The writes to one register by version, and for each version the extremes of all before it and
    of all from it on.

    Positions are those of ``versions``; the one behind the last stands for "no such write" and has
    infinite times.
    """

    def __init__(self) -> None:
        self.versions = array("q")
        self.started, self.committed, self.acked = array("d"), array("d"), array("d")
        self.attempts: list[float] = []
        self.unresolved: set[tuple[str, float]] = set()

    def add(self, write: Write) -> None:
        """Take in an event, in any order of versions."""
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
        """Sort, make one write of the events of a version, and find the extremes."""
        self.attempts = sorted(started for _, started in self.unresolved)
        self._merge(sorted(range(len(self.versions)), key=self.versions.__getitem__))
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


class _Seen:
    """What one session saw and wrote, or wrote alone, of one register: the steps at which the
    highest version rose.

    A step that comes in the order of time is only appended. Others are put to the end, and sorted
    in whenever so many came that the list doubled, or when it is settled: it must be before it is
    asked.
    """

    __slots__ = ("_limit", "_sorted", "_times", "_versions")

    def __init__(self) -> None:
        self._times, self._versions = array("d"), array("q")
        self._sorted = True
        self._limit = 64

    def add(self, time: float, version: int) -> None:
        """Note that a version was seen at a moment."""
        if self._times:
            later = time >= self._times[-1]
            if later and version <= self._versions[-1]:
                return
            self._sorted = self._sorted and later
        self._times.append(time)
        self._versions.append(version)
        if len(self._times) > self._limit:
            self.settle()
            self._limit = 2 * len(self._times) + 64

    def settle(self) -> None:
        """Keep what is higher than everything before it."""
        if self._sorted:
            return
        steps = sorted(zip(self._times, self._versions, strict=True))
        self._times, self._versions, self._sorted = array("d"), array("q"), True
        for time, version in steps:
            if not self._versions or version > self._versions[-1]:
                self._times.append(time)
                self._versions.append(version)

    def before(self, time: float) -> tuple[float, int]:
        """Return the last step before a moment: when it was, and the version."""
        at = bisect_left(self._times, time) - 1
        return (self._times[at], self._versions[at]) if at >= 0 else (time, 0)


class _Book:
    """What must be known before the first read can be judged: all writes, what each session knew,
    and what of it it wrote."""

    def __init__(self, history: Iterable[Event]) -> None:
        self.registers: dict[str, _Register] = {}
        self.known: dict[tuple[str, str], _Seen] = {}
        self.wrote: dict[tuple[str, str], _Seen] = {}
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

    def _write(self, event: Write) -> None:
        table = self.registers.get(event.register)
        if table is None:
            table = self.registers[event.register] = _Register()
        table.add(event)
        if event.session is not None and event.acked is not None and event.version is not None:
            for of in (self.known, self.wrote):
                self._of(of, event.session, event.register).add(event.acked, event.version)

    def _of(self, sessions: dict[tuple[str, str], _Seen], session: str, register: str) -> _Seen:
        seen = sessions.get((session, register))
        if seen is None:
            seen = sessions[session, register] = _Seen()
        return seen


class _Judge:
    """Looks at one read after the other, and keeps for each kind the violation whose proof is the
    shortest."""

    def __init__(self, book: _Book, *, bound_s: float) -> None:
        self._registers, self._known, self._wrote, self._bound_s = (
            book.registers,
            book.known,
            book.wrote,
            bound_s,
        )
        self._unwritten = _Register()
        self._unwritten.settle()
        self._last_accused: dict[ViolationKind | None, Read] = {}  # None: of any kind
        self.reads = self.lenient = self.late = self.accused = 0
        self.how: Counter[str] = Counter()
        self.counts: Counter[ViolationKind] = Counter()
        self.best: dict[ViolationKind, Violation] = {}
        self.missed: dict[str, array[float]] = {}
        self.worst_staleness_s = 0.0

    def read(self, read: Read) -> None:
        """Judge one read."""
        self.reads += 1
        self.lenient += read.slack_s > 0
        if not read.slack_s >= 0:
            raise ValueError(
                f"slack_s {read.slack_s!r} of a read of {read.asked} must be a number of seconds, "
                f"0 or more"
            )
        must_know, late = read.start - read.slack_s, False
        self.how[
            read.how if read.how in self.how or len(self.how) < MAX_WORDS else OTHER_WORDS
        ] += 1
        if read.told != read.asked:
            self._accuse(Violation(ViolationKind.ISOLATION, read, 1, read.end - read.start))
        for register, version in read.values.items():
            table = self._registers.get(register, self._unwritten)
            at = bisect_right(table.versions, version)  # the position behind the returned version
            late |= table.acked[table.first_acked[at]] < read.start
            if table.acked[table.first_acked[at]] < must_know:
                self._stale(ViolationKind.FRESHNESS, read, register, at, due=table.first_acked[at])
            if table.committed[table.first_committed[at]] <= must_know:
                self._age(read, register, at)
            if at and table.started[table.last_started[at - 1]] > read.end:
                self._too_early(read, register, at)
            elif not at or table.versions[at - 1] != version:
                self._unknown(read, register, at)
            if read.session is not None:
                self._own_view(read, read.session, register)
        self.late += late and read.slack_s > 0

    def lost(self, register: str) -> int:
        """Count the writes to a register that some read should have returned by I3 and did not."""
        table, missed, latest, count = self._registers[register], self.missed[register], -inf, 0
        for at in range(len(table.versions)):
            latest = max(latest, missed[at])
            count += table.committed[at] <= latest
        return count

    def _stale(self, kind: ViolationKind, read: Read, register: str, at: int, *, due: int) -> None:
        table = self._registers[register]
        known = bool(at) and table.versions[at - 1] == read.values[register]
        begin = min(table.started[due], table.started[at - 1] if known else inf, read.start)
        since = table.acked[due] if kind is ViolationKind.FRESHNESS else table.committed[due]
        committed, version = table.committed[due], table.versions[due]
        self._accuse(
            Violation(kind, read, 2 + known, read.end - begin, register, version, since, committed)
        )

    def _age(self, read: Read, register: str, at: int) -> None:
        """A later version was committed before: note how long ago, and whether that is beyond the
        bound."""
        table = self._registers[register]
        first = table.first_committed[at]
        must_know = read.start - read.slack_s
        self.worst_staleness_s = max(self.worst_staleness_s, must_know - table.committed[first])
        must_show = must_know - self._bound_s
        if table.committed[first] <= must_show:
            if register not in self.missed:
                self.missed[register] = array("d", [-inf]) * len(table.started)
            missed = self.missed[register]
            missed[at] = max(missed[at], must_show)
            self._stale(ViolationKind.BOUND, read, register, at, due=first)

    def _too_early(self, read: Read, register: str, at: int) -> None:
        table = self._registers[register]
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
        """Nobody recorded a write of this version: something later was begun, or enough attempts of
        unknown outcome were."""
        table = self._registers.get(register, self._unwritten)
        above = read.values[register] - (table.versions[at - 1] if at else 0)
        begun = table.started[table.first_started[at]] <= read.end
        if not begun and above > bisect_right(table.attempts, read.end):
            self._accuse(
                Violation(ViolationKind.INVENTION, read, 1, read.end - read.start, register)
            )

    def _own_view(self, read: Read, session: str, register: str) -> None:
        seen = (self._wrote if read.slack_s else self._known).get((session, register))
        since, due = (read.start, 0) if seen is None else seen.before(read.start)
        if due > read.values[register]:
            self._accuse(
                Violation(ViolationKind.SESSION, read, 2, read.end - since, register, due, since)
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
    """For each position, where the earliest time from there on is."""
    first = array("q", range(len(times)))
    for at in range(len(times) - 2, -1, -1):
        if times[first[at + 1]] < times[at]:
            first[at] = first[at + 1]
    return first


def _last_until(times: "array[float]") -> "array[int]":
    """For each position, where the latest time up to and with it is."""
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
        help="seconds that an unacknowledged write may stay unseen",
    )
    options = parser.parse_args()
    try:
        report = check(load(options.files), bound_s=options.bound)
    # no such file, a line that is no event: that is no verdict on any cache
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
