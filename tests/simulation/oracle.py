"""What must be true of every read, checked as soon as it ends.

* I1, freshness: a read that begins after a write was acknowledged returns it, or something later.
* I3, bound: a read that begins at t returns everything that was committed a lease before t, whoever
  acknowledged it.
* I4, own writes: a read that brings the token of its client's last write returns whatever that
  client has written.
* at level ``bounded``: I1 and I3, for what was acknowledged or committed the bound earlier than
  that; and everything that the same process has acknowledged.
* no invention: what is returned was committed before the read ended, in that register. What the
  database has lost counts as what survived of the register at that moment, and is not returned any
  more a lease later.
* I5, isolation: an answer is for the very tenant and query that were asked for.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from respcache.core.serving_lease import DRIFT

Register = tuple[str, str]
"""A row of the application: tenant and table."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A read that must not be."""

    rule: str
    text: str
    register: Register | None = None

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a read must return at least, fixed when it begins: positions in the histories of the
    registers."""

    began: float
    acknowledged: Mapping[Register, int]
    overdue: Mapping[Register, int]
    own: Mapping[Register, int]
    slack_s: float = 0.0


class Oracle:
    """Knows what was committed and acknowledged, and when."""

    def __init__(self, *, lease_s: float) -> None:
        self.bound_s = lease_s * DRIFT
        self.violations: list[Violation] = []
        self._stamps: dict[Register, list[int]] = {}
        self._times: dict[Register, list[float]] = {}
        # when, by whom, position
        self._acknowledged: dict[Register, list[tuple[float, str, int]]] = {}
        self._positions: dict[Register, dict[int, int]] = {}
        self._lost: dict[int, float] = {}
        self._losses: list[tuple[float, dict[Register, int]]] = []
        self._last = 0

    def begin(self, register: Register) -> int:
        """Make a register; returns the stamp that stands in it."""
        stamp = self.new_stamp()
        self._stamps[register], self._times[register] = [stamp], [float("-inf")]
        self._positions[register] = {stamp: 0}
        self._acknowledged[register] = [(float("-inf"), "", 0)]
        return stamp

    def new_stamp(self) -> int:
        """Return a stamp that was never used."""
        self._last += 1
        return self._last

    def commit(self, register: Register, stamp: int) -> None:
        """Note that this stamp stands in the register from now on."""
        self._positions[register][stamp] = len(self._stamps[register])
        self._stamps[register].append(stamp)
        self._times[register].append(_now())

    def acknowledge(self, register: Register, stamp: int, *, by: str) -> None:
        """Note that a process has acknowledged a write."""
        if stamp not in self._lost:
            self._acknowledged[register].append((_now(), by, self._positions[register][stamp]))

    def present(self, register: Register) -> int:
        """Return what stands in the register."""
        return self._stamps[register][-1]

    def lose(self, writes: Sequence[tuple[Register, int]]) -> None:
        """Note that the database has lost its last commits."""
        for register, stamp in writes:
            del self._stamps[register][self._positions[register][stamp] :]
            del self._times[register][len(self._stamps[register]) :]
            self._lost[stamp] = _now()
        for register in self._stamps:
            survived = len(self._stamps[register]) - 1
            self._acknowledged[register] = [
                (when, by, min(position, survived))
                for when, by, position in self._acknowledged[register]
            ]
            for stamp, position in self._positions[register].items():
                if position > survived:
                    self._positions[register][stamp] = survived
        self._losses.append(
            (_now(), {register: len(stamps) - 1 for register, stamps in self._stamps.items()})
        )

    def demand(
        self,
        registers: Sequence[Register],
        *,
        by: str = "",
        own: Mapping[Register, int] | None = None,
        slack_s: float = 0.0,
    ) -> Demand:
        """Say what a read that begins now in this process must return at least; others' writes may
        be missed for the slack, but not the stamps of its ``own``."""
        now = _now()
        overdue = {
            one: bisect_right(self._times[one], now - self.bound_s - slack_s) - 1
            for one in registers
        }
        acknowledged = {
            one: max(
                position
                for when, who, position in self._acknowledged[one]
                if when <= now - slack_s or who == by
            )
            for one in registers
        }
        mine = {
            one: self._positions[one][stamp]
            for one, stamp in (own or {}).items()
            if one in acknowledged
        }
        return Demand(now, acknowledged, overdue, mine, slack_s)

    def judge(self, demand: Demand, found: Mapping[Register, int]) -> Violation | None:
        """Judge what a read that ends now returned."""
        for register in demand.acknowledged:
            stamp = found[register]
            position = self._positions[register].get(stamp)
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
            survived = [
                positions[register] for time, positions in self._losses if time >= demand.began
            ]
            if position < (least := min([demand.acknowledged[register], *survived])):
                due = self._stamps[register][least]
                return self._accuse(
                    "I1", f"{register} = {stamp}, and {due} was acknowledged before", register
                )
            if position < (least := min([demand.own.get(register, 0), *survived])):
                due = self._stamps[register][least]
                return self._accuse(
                    "I4", f"{register} = {stamp}, and the client has written {due} before", register
                )
            if position < (least := min([demand.overdue[register], *survived])):
                due, since = self._stamps[register][least], self._times[register][least]
                return self._accuse(
                    "I3", f"{register} = {stamp}, and {due} was committed at {since:.4f}", register
                )
        return None

    def accuse_isolation(self, asked: object, told: object) -> Violation:
        """Note that an answer is somebody else's."""
        return self._accuse("I5", f"asked for {asked}, was given {told}", None)

    def _accuse(self, rule: str, text: str, register: Register | None) -> Violation:
        violation = Violation(rule, text, register)
        self.violations.append(violation)
        return violation


def _now() -> float:
    return asyncio.get_running_loop().time()
