"""What the demo's traffic knows of the records that it wrote, and which responses are stale.

A record is a register of ``respcache.testing.staleness``: a metadata field contains its version,
and its deletion counts as the last version, ``DELETED``. A read must show at least the version that
the response to a write had confirmed before the read was sent. So a read takes the expectations
before it is sent, and its response is compared with them. Writes of others (yours, with curl) are
never checked.

A record has one writer at a time and is assigned to no employee, so its whole tenant sees it. A
list must show a record only on its first page (newest first), and only if not all rows of a full
page are newer.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any, NamedTuple

from respcache.testing.staleness import Minimum

VERSION = "demo_version"
"""The metadata field that contains the version."""

DELETED = inf
"""The version of a deleted record."""

ABSENT = -1
"""The version that a read shows if it misses a record that was not deleted."""

MAX_RECORDS = 12
"""Records kept per module; at this number a record is deleted instead of created."""

MAX_DELETED = 30
"""Deleted records remembered per module."""

Row = Mapping[str, Any]


@dataclass(eq=False)
class WrittenRecord:
    """A record that the traffic created. ``position`` orders a list, newest last.

    ``sent`` and ``confirmed`` are the last versions sent and confirmed; ``ending`` says that its
    deletion or conversion was sent, ``busy`` that a write is in progress.
    """

    module: str
    id: str
    position: tuple[str, str]
    sent: int = 0
    confirmed: float = 0
    ending: bool = False
    busy: bool = False

    @property
    def free(self) -> bool:
        """Whether it can be written."""
        return not (self.busy or self.ending)


class Expectation(NamedTuple):
    """The least that the response to a read must show of a record."""

    record: WrittenRecord
    minimum: Minimum


@dataclass
class ExpectedRows:
    """The records that the traffic wrote in one tenant, by module."""

    records: dict[str, dict[str, WrittenRecord]] = field(default_factory=dict)
    deleted: dict[str, deque[WrittenRecord]] = field(default_factory=dict)

    def add(self, module: str, row: Row) -> None:
        """Add a record from the response that confirmed its creation."""
        version = row.get(VERSION, 0)
        position = (row["created_at"], row["id"])
        record = WrittenRecord(module, row["id"], position, sent=version, confirmed=version)
        self.records.setdefault(module, {})[record.id] = record

    def take(self, module: str, chance: Random) -> WrittenRecord | None:
        """Reserve a free record for a write; None if there is none.

        Call ``confirm``, ``confirm_deletion`` or ``discard`` afterwards.
        """
        free = [record for record in self.records.get(module, {}).values() if record.free]
        if not free:
            return None
        record = chance.choice(free)
        record.busy = True
        return record

    def full(self, module: str) -> bool:
        """Whether a module has ``MAX_RECORDS``."""
        return len(self.records.get(module, {})) >= MAX_RECORDS

    def find(self, module: str, key: str) -> WrittenRecord | None:
        """Return a record by its id, also a deleted one."""
        record = self.records.get(module, {}).get(key)
        deleted = self.deleted.get(module, ())
        return record or next((other for other in deleted if other.id == key), None)

    def confirm(self, record: WrittenRecord) -> None:
        """Note that the version sent last was confirmed."""
        record.confirmed, record.busy = record.sent, False

    def confirm_deletion(self, record: WrittenRecord) -> None:
        """Note that the deletion or conversion of a record was confirmed."""
        record.confirmed, record.busy = DELETED, False
        self.discard(record)
        deleted = self.deleted.setdefault(record.module, deque(maxlen=MAX_DELETED))
        deleted.append(record)

    def discard(self, record: WrittenRecord) -> None:
        """Stop checking a record: the result of a failed write is unknown."""
        self.records[record.module].pop(record.id, None)

    def expectations(self, module: str) -> list[Expectation]:
        """Return what a read of a module must show. Call it before the read is sent."""
        records = (*self.records.get(module, {}).values(), *self.deleted.get(module, ()))
        return [expect(record) for record in records]


def expect(record: WrittenRecord) -> Expectation:
    """Return the expectation of a record for a read that is sent now."""
    return Expectation(record, Minimum(acknowledged=record.confirmed))


def stale_rows(
    expected: Sequence[Expectation], rows: Sequence[Row], *, first: int | None = None
) -> Iterator[str]:
    """Yield a description of each row that is older than expected.

    ``first`` says that the rows are a first page of this size, newest first. Then missing records
    are reported too.
    """
    shown = {row["id"]: row for row in rows}
    edge = ("", "")
    if first is not None and len(rows) >= first:
        edge = (rows[-1]["created_at"], rows[-1]["id"])
    for expectation in expected:
        row = shown.get(expectation.record.id)
        if row is not None or (first is not None and expectation.record.position > edge):
            yield from stale_record(expectation, row)


def stale_record(expectation: Expectation, row: Row | None) -> Iterator[str]:
    """Yield a description if a row is older than expected.

    None: it was not found, or is not in a list that must show it.
    """
    record, minimum = expectation
    absent = DELETED if record.ending else ABSENT
    version = absent if row is None else row.get(VERSION, 0)
    if not minimum.violated_by(version):
        return
    name = f"{record.module} {record.id}"
    if row is None:
        yield f"{name} is missing"
    elif minimum.acknowledged == DELETED:
        yield f"{name} is shown although it was deleted"
    else:
        yield f"{name} is shown in version {version}, not {minimum.acknowledged}"
