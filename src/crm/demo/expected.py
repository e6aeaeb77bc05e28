"""What the demo's traffic knows of the records that it wrote itself, and which answers are older
than that.

Of each record: the version that was sent last, and the version that a write's answer confirmed
last. Whoever asks after that answer must see this version or a later one, of a deleted record
nothing. So a read looks before it is sent (``look``) and is judged by what was known then. What
others write at the same time (you, with curl) is never judged.

A record is written by one at a time, and belongs to nobody, so that all of its tenant see it.
Whether a list must show a record is certain on its first page, newest first: it must, unless all
rows of a full page are newer.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

VERSION = "demo_version"
"""The field that holds it: one of the free ones that every record may have."""

MOST_KEPT = 12
"""Records of a module that are kept: beyond them something is deleted instead of created."""

MOST_GONE = 30
"""Deleted records of a module that are remembered."""

Row = Mapping[str, Any]


@dataclass(eq=False)
class Mine:
    """A record that we wrote. ``made``: its place in a list, newest first."""

    module: str
    id: str
    made: tuple[str, str]
    sent: int = 0
    known: int = 0
    ending: bool = False
    """Its deletion or conversion was sent."""
    gone: bool = False
    """And was answered."""
    busy: bool = False
    """A write is under way."""

    @property
    def free(self) -> bool:
        """Whether it can be written."""
        return not (self.busy or self.ending)


LookupResult = Sequence[tuple[Mine, int, bool]]
"""Records with what was known of them at a moment: version, and whether they were gone."""


@dataclass
class ExpectedRows:
    """Of one tenant."""

    kept: dict[str, dict[str, Mine]] = field(default_factory=dict)
    gone: dict[str, deque[Mine]] = field(default_factory=dict)

    def add(self, module: str, row: Row) -> None:
        """Remember a record that an answer says was made."""
        version = row.get(VERSION, 0)
        mine = Mine(module, row["id"], (row["created_at"], row["id"]), version, version)
        self.kept.setdefault(module, {})[mine.id] = mine

    def take(self, module: str, chance: Random) -> Mine | None:
        """Reserve a record for a write, if there is one: ``written``, ``ended`` or ``forget`` must
        follow."""
        free = [mine for mine in self.kept.get(module, {}).values() if mine.free]
        if not free:
            return None
        mine = chance.choice(free)
        mine.busy = True
        return mine

    def full(self, module: str) -> bool:
        """Whether enough records of a module are kept."""
        return len(self.kept.get(module, {})) >= MOST_KEPT

    def find(self, module: str, record: str) -> Mine | None:
        """Return what is known of a record, also of one that is gone."""
        mine = self.kept.get(module, {}).get(record)
        return mine or next((one for one in self.gone.get(module, ()) if one.id == record), None)

    def written(self, mine: Mine) -> None:
        """Note that the version sent last was confirmed."""
        mine.known, mine.busy = mine.sent, False

    def ended(self, mine: Mine) -> None:
        """Note that a record is gone, and that this was confirmed."""
        mine.gone, mine.busy = True, False
        self.forget(mine)
        self.gone.setdefault(mine.module, deque(maxlen=MOST_GONE)).append(mine)

    def forget(self, mine: Mine) -> None:
        """Judge by this record no more: nobody knows what became of a write that failed."""
        self.kept[mine.module].pop(mine.id, None)

    def look(self, *modules: str) -> LookupResult:
        """Note what is known now, before a read is sent."""
        found = [
            mine
            for module in modules
            for mine in (*self.kept.get(module, {}).values(), *self.gone.get(module, ()))
        ]
        return [(mine, mine.known, mine.gone) for mine in found]


def stale_rows(
    look: LookupResult, rows: Sequence[Row], *, first: int | None = None
) -> Iterator[str]:
    """Say which rows are older than what was known when they were asked for.

    ``first``: the rows are a first page of so many, newest first, so those that are missing are
    judged too.
    """
    shown = {row["id"]: row for row in rows}
    edge = (
        ("", "") if first is None or len(rows) < first else (rows[-1]["created_at"], rows[-1]["id"])
    )
    for mine, known, gone in look:
        row = shown.get(mine.id)
        if row is not None:
            yield from stale_record(mine, known, gone=gone, row=row)
        elif first is not None and not mine.ending and mine.made > edge:
            yield f"{mine.module} {mine.id} is missing"


def stale_record(mine: Mine, known: int, *, gone: bool, row: Row | None) -> Iterator[str]:
    """Say whether a record, None for *not found*, is older than what was known when it was asked
    for."""
    if row is None:
        if not mine.ending:
            yield f"{mine.module} {mine.id} is not found"
    elif gone:
        yield f"{mine.module} {mine.id} is shown although it is gone"
    elif row.get(VERSION, 0) < known:
        yield f"{mine.module} {mine.id} is shown in version {row.get(VERSION, 0)}, not {known}"
