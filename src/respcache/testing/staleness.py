"""The one rule that decides whether a read was stale.

A *register* is a row whose version grows with every write. A read that begins at ``start``, with
the slack ``slack_s``, must return at least

* I1, freshness: every version that was acknowledged before ``start - slack_s``;
* I4, the session's own view: every version that its session had written, or seen, before ``start``;
* I3, the bound: every version that was committed at or before ``start - slack_s - bound_s``,
  whether it was acknowledged or not.

``Minimum`` is these three versions, and the only place where they are compared with what a read
returned. Three judges collect the evidence in their own way and use it: ``checker`` (recorded
histories), ``tests/simulation/oracle.py`` (a simulated database that can lose commits) and
``crm/demo/expected.py`` (records and lists over HTTP). docs/decisions/0006 gives the reasons.
"""

from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from enum import StrEnum
from math import inf


class ViolationKind(StrEnum):
    """What a read can violate. ``checker`` defines invention and isolation."""

    FRESHNESS = "I1"
    BOUND = "I3"
    SESSION = "I4"
    ISOLATION = "I5"
    INVENTION = "invention"


@dataclass(frozen=True, slots=True)
class Minimum:
    """The lowest versions of a register that one read may return."""

    acknowledged: float = 0
    session: float = 0
    committed: float = 0

    def violated_by(self, returned: float) -> tuple[ViolationKind, ...]:
        """Return what a read that returned this version violates, the strictest rule first."""
        if returned >= max(self.acknowledged, self.session, self.committed):
            return ()
        rules = (
            (ViolationKind.FRESHNESS, self.acknowledged),
            (ViolationKind.SESSION, self.session),
            (ViolationKind.BOUND, self.committed),
        )
        return tuple(kind for kind, least in rules if returned < least)

    def limited(self, version: float) -> "Minimum":
        """Return the same minimum after the database has lost everything above a version."""
        return Minimum(
            min(self.acknowledged, version),
            min(self.session, version),
            min(self.committed, version),
        )


class Steps:
    """The moments at which the highest version of a register rose, in one respect: acknowledged,
    committed, or seen by a session.

    Adding in the order of time appends. Other additions are sorted in whenever the list has
    doubled, and by ``settle``, which must precede ``before`` and ``until``.
    """

    __slots__ = ("_limit", "_sorted", "_times", "_versions")

    def __init__(self) -> None:
        self._times, self._versions = array("d"), array("q")
        self._sorted = True
        self._limit = 64

    def add(self, time: float, version: int) -> None:
        """Record that a version was reached at a moment."""
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
        """Sort, and keep only the versions that are higher than all before them."""
        if self._sorted:
            return
        steps = sorted(zip(self._times, self._versions, strict=True))
        self._times, self._versions, self._sorted = array("d"), array("q"), True
        for time, version in steps:
            if not self._versions or version > self._versions[-1]:
                self._times.append(time)
                self._versions.append(version)

    def before(self, time: float) -> tuple[float, int]:
        """Return the last step before a moment: its time and version; version 0 if there is
        none."""
        at = bisect_left(self._times, time) - 1
        return (self._times[at], self._versions[at]) if at >= 0 else (time, 0)

    def until(self, time: float) -> int:
        """Return the highest version that was reached at or before a moment; 0 if there is none."""
        at = bisect_right(self._times, time) - 1
        return self._versions[at] if at >= 0 else 0

    def limit(self, version: int) -> None:
        """Lower all versions above this one to it, because the database has lost them."""
        at = bisect_right(self._versions, version)
        if at < len(self._versions):
            time = self._times[at]
            del self._times[at:], self._versions[at:]
            self.add(time, version)


class RegisterHistory:
    """When the versions of a register were acknowledged, and when they were committed."""

    __slots__ = ("acknowledged", "committed")

    def __init__(self) -> None:
        self.acknowledged, self.committed = Steps(), Steps()

    def add(self, version: int, *, committed: float, acknowledged: float) -> None:
        """Record a write; a time is infinite if the event did not happen."""
        if committed < inf:
            self.committed.add(committed, version)
        if acknowledged < inf:
            self.acknowledged.add(acknowledged, version)

    def settle(self) -> None:
        """Prepare for ``minimum``."""
        self.acknowledged.settle()
        self.committed.settle()

    def minimum(self, start: float, *, slack_s: float, bound_s: float, session: int = 0) -> Minimum:
        """Return what a read must return at least; ``session`` is the version that its session
        knew."""
        fresh = start - slack_s
        return Minimum(
            acknowledged=self.acknowledged.before(fresh)[1],
            session=session,
            committed=self.committed.until(fresh - bound_s),
        )
