"""Judges every simulated read as soon as it ends.

``respcache.testing.staleness.Minimum`` decides whether a read was stale; this module collects the
evidence, which a simulated database can change: it can lose its last commits. Versions are
positions in the history of a register.

* I1, freshness: a read that begins after a write was acknowledged returns it, or a later one.
* I3, bound: a read that begins at t returns everything that was committed a lease before t.
* I4, own writes: a read with the token of its client's last write returns what that client wrote.
* At level ``bounded``, I1 and I3 hold for what was acknowledged or committed the bound earlier, and
  I1 for everything that the same process has acknowledged.
* No invention: what is returned was committed before the read ended, in that register. A commit
  that the database has lost counts as what survived of the register at that moment, and is no
  longer returned a lease later.
* I5, isolation: a response is for the tenant and query that were requested.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, nextafter

from respcache.core.serving_lease import DRIFT
from respcache.testing.staleness import Minimum, RegisterHistory, Steps, ViolationKind

Register = tuple[str, str]
"""A row of the application: tenant and table."""

REASONS = {
    ViolationKind.FRESHNESS: "was acknowledged before",
    ViolationKind.SESSION: "was written by the client before",
    ViolationKind.BOUND: "was committed a lease before",
}


@dataclass(frozen=True, slots=True)
class Violation:
    """A read that breaks a rule."""

    rule: str
    text: str
    register: Register | None = None

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a read must return at least, fixed when it begins."""

    began: float
    minimums: Mapping[Register, Minimum]
    slack_s: float = 0.0


class _History(RegisterHistory):
    """A register: its stamps in the order of commits, and who acknowledged which position."""

    __slots__ = ("acknowledged_by", "positions", "stamps")

    def __init__(self, stamp: int) -> None:
        super().__init__()
        self.stamps = [stamp]
        self.positions = {stamp: 0}
        self.acknowledged_by: dict[str, Steps] = {}

    def lose(self, survived: int) -> None:
        """Treat everything after a position as that position."""
        for steps in (self.acknowledged, self.committed, *self.acknowledged_by.values()):
            steps.limit(survived)
        for stamp, position in self.positions.items():
            self.positions[stamp] = min(position, survived)


class Oracle:
    """Records what was committed and acknowledged, and when."""

    def __init__(self, *, lease_s: float) -> None:
        self.bound_s = lease_s * DRIFT
        self.violations: list[Violation] = []
        self._registers: dict[Register, _History] = {}
        self._lost: dict[int, float] = {}
        self._losses: list[tuple[float, dict[Register, int]]] = []
        self._last = 0

    def begin(self, register: Register) -> int:
        """Create a register; return its first stamp."""
        stamp = self.new_stamp()
        self._registers[register] = _History(stamp)
        return stamp

    def new_stamp(self) -> int:
        """Return a stamp that was never used."""
        self._last += 1
        return self._last

    def commit(self, register: Register, stamp: int) -> None:
        """Record that the register contains this stamp from now on."""
        history = self._registers[register]
        history.positions[stamp] = len(history.stamps)
        history.add(len(history.stamps), committed=_now(), acknowledged=inf)
        history.stamps.append(stamp)

    def acknowledge(self, register: Register, stamp: int, *, by: str) -> None:
        """Record that a process has acknowledged a write."""
        if stamp not in self._lost:
            history = self._registers[register]
            position = history.positions[stamp]
            history.acknowledged.add(_now(), position)
            history.acknowledged_by.setdefault(by, Steps()).add(_now(), position)

    def present(self, register: Register) -> int:
        """Return the stamp that the register contains."""
        return self._registers[register].stamps[-1]

    def lose(self, writes: Sequence[tuple[Register, int]]) -> None:
        """Record that the database has lost its last commits."""
        for register, stamp in writes:
            history = self._registers[register]
            del history.stamps[history.positions[stamp] :]
            self._lost[stamp] = _now()
        for history in self._registers.values():
            history.lose(len(history.stamps) - 1)
        self._losses.append(
            (_now(), {one: len(history.stamps) - 1 for one, history in self._registers.items()})
        )

    def demand(
        self,
        registers: Sequence[Register],
        *,
        by: str = "",
        own: Mapping[Register, int] | None = None,
        slack_s: float = 0.0,
    ) -> Demand:
        """Return what a read that begins now in this process must return at least.

        It may miss other processes' writes within the slack, but not the stamps of its ``own``."""
        now = _now()
        minimums = {}
        for register in registers:
            history = self._registers[register]
            stamp = (own or {}).get(register)
            # everything recorded happened before this call, also at the same simulated moment
            least = history.minimum(
                nextafter(now, inf),
                slack_s=slack_s,
                bound_s=self.bound_s,
                session=0 if stamp is None else history.positions[stamp],
            )
            here = history.acknowledged_by.get(by, Steps()).until(now)
            minimums[register] = Minimum(
                max(least.acknowledged, here), least.session, least.committed
            )
        return Demand(now, minimums, slack_s)

    def judge(self, demand: Demand, found: Mapping[Register, int]) -> Violation | None:
        """Judge what a read that ends now returned."""
        for register, minimum in demand.minimums.items():
            history, stamp = self._registers[register], found[register]
            position = history.positions.get(stamp)
            if position is None:
                return self._accuse(
                    "invention", f"{register} = {stamp} was never committed", register
                )
            lost_at = self._lost.get(stamp)
            if lost_at is not None and demand.began > lost_at + self.bound_s + demand.slack_s:
                return self._accuse(
                    "I3",
                    f"{register} = {stamp} was lost by the database at {lost_at:.4f}",
                    register,
                )
            for time, survived in self._losses:
                if time >= demand.began:
                    minimum = minimum.limited(survived[register])
            for kind in minimum.violated_by(position):
                least = {
                    ViolationKind.FRESHNESS: minimum.acknowledged,
                    ViolationKind.SESSION: minimum.session,
                    ViolationKind.BOUND: minimum.committed,
                }[kind]
                due = history.stamps[int(least)]
                return self._accuse(
                    kind, f"{register} = {stamp}, and {due} {REASONS[kind]}", register
                )
        return None

    def accuse_isolation(self, asked: object, received: object) -> Violation:
        """Record that a response was made for another request."""
        return self._accuse("I5", f"asked for {asked}, received {received}", None)

    def _accuse(self, rule: str, text: str, register: Register | None) -> Violation:
        violation = Violation(rule, text, register)
        self.violations.append(violation)
        return violation


def _now() -> float:
    return asyncio.get_running_loop().time()
