"""What the demo's traffic knows of the records that it wrote itself, and which responses are older
than that.

A record is a register of ``respcache.testing.staleness``: its version is in a field, and its
deletion counts as the last version, ``DELETED``. A read must show at least the version that a
response to a write had confirmed before the read was sent. So ``expected`` is called before a read
is sent, and the response is judged by it. Writes of others at the same time (with curl, for
example) are never judged.

One visitor writes a record at a time. Records have no owner, so all visitors of their tenant see
them. Whether a list must show a record is certain only on its first page, newest first: it must,
unless all rows of a full page are newer.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any

from respcache.testing.staleness import Minimum

VERSION = "demo_version"
"""The field with a record's version: one of the free fields that every record may have."""

DELETED = inf
"""The version of a deleted record."""

ABSENT = -1
"""The version that a read shows if it misses a record that was never deleted."""

MOST_KEPT = 12
"""Records of a module that are kept. Beyond that, something is deleted instead of created."""

MOST_GONE = 30
"""Deleted records of a module that are remembered."""

Row = Mapping[str, Any]


@dataclass(eq=False)
class Mine:
    """A record that the traffic wrote. ``made`` is its place in a list, newest first."""

    module: str
    id: str
    made: tuple[str, str]
    sent: int = 0
    """The version that was sent last."""
    known: float = 0
    """The version that a response confirmed last."""
    ending: bool = False
    """Its deletion or conversion was sent."""
    busy: bool = False
    """A write is in progress."""

    @property
    def free(self) -> bool:
        """Whether it can be written."""
        return not (self.busy or self.ending)


Expected = Sequence[tuple[Mine, Minimum]]
"""Records, and what a read that is sent now must show of them at least."""


@dataclass
class ExpectedRows:
    """The records of one tenant."""

    kept: dict[str, dict[str, Mine]] = field(default_factory=dict)
    gone: dict[str, deque[Mine]] = field(default_factory=dict)

    def add(self, module: str, row: Row) -> None:
        """Remember a record that a response reports as created."""
        version = row.get(VERSION, 0)
        mine = Mine(module, row["id"], (row["created_at"], row["id"]), version, version)
        self.kept.setdefault(module, {})[mine.id] = mine

    def take(self, module: str, chance: Random) -> Mine | None:
        """Reserve a record for a write, if there is one. ``written``, ``ended`` or ``forget`` must
        follow."""
        free = [mine for mine in self.kept.get(module, {}).values() if mine.free]
        if not free:
            return None
        mine = chance.choice(free)
        mine.busy = True
        return mine

    def full(self, module: str) -> bool:
        """Return whether enough records of a module are kept."""
        return len(self.kept.get(module, {})) >= MOST_KEPT

    def find(self, module: str, record: str) -> Mine | None:
        """Return a record, also a deleted one."""
        mine = self.kept.get(module, {}).get(record)
        return mine or next((one for one in self.gone.get(module, ()) if one.id == record), None)

    def written(self, mine: Mine) -> None:
        """Record that the version sent last was confirmed."""
        mine.known, mine.busy = mine.sent, False

    def ended(self, mine: Mine) -> None:
        """Record that a record's deletion was confirmed."""
        mine.known, mine.busy = DELETED, False
        self.forget(mine)
        self.gone.setdefault(mine.module, deque(maxlen=MOST_GONE)).append(mine)

    def forget(self, mine: Mine) -> None:
        """Stop judging by this record: the outcome of its last write is unknown."""
        self.kept[mine.module].pop(mine.id, None)

    def expected(self, *modules: str) -> Expected:
        """Return what is known now, before a read is sent."""
        return [
            (mine, minimum(mine))
            for module in modules
            for mine in (*self.kept.get(module, {}).values(), *self.gone.get(module, ()))
        ]


def minimum(mine: Mine) -> Minimum:
    """Return what a read that is sent now must show of a record."""
    return Minimum(acknowledged=mine.known)


def stale_rows(
    expected: Expected, rows: Sequence[Row], *, first: int | None = None
) -> Iterator[str]:
    """Yield which rows are older than what was known when they were requested.

    ``first``: the rows are a first page of this length, newest first, so missing rows are judged
    too.
    """
    shown = {row["id"]: row for row in rows}
    edge = (
        ("", "") if first is None or len(rows) < first else (rows[-1]["created_at"], rows[-1]["id"])
    )
    for mine, least in expected:
        row = shown.get(mine.id)
        if row is not None or (first is not None and mine.made > edge):
            yield from stale_record(mine, least, row=row)


def stale_record(mine: Mine, least: Minimum, *, row: Row | None) -> Iterator[str]:
    """Yield whether a record (None: not found, or not in a list that must show it) is older than
    what was known when it was requested."""
    if row is not None:
        returned = row.get(VERSION, 0)
    else:
        returned = DELETED if mine.ending else ABSENT
    if not least.violated_by(returned):
        return
    if row is None:
        yield f"{mine.module} {mine.id} is missing"
    elif least.acknowledged == DELETED:
        yield f"{mine.module} {mine.id} is shown although it is deleted"
    else:
        yield f"{mine.module} {mine.id} is shown in version {returned}, not {least.acknowledged}"
