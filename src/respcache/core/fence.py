"""The fence, sans I/O: why no invalidation is ever lost, whatever happens between COMMIT and bump.

``generations.py`` needs one thing from the outside: the bump of a committed write must not be lost. A process can die
between COMMIT and bump, the store can be away, psql knows nothing of bumps. So every write leaves a row in the *outbox*, a
table of the same database, in the same transaction (triggers write it), and every process runs *rounds* (the rules are
here and the store can do what they ask of it; what runs them is not built yet, so nothing promises this today):

    a. learn the identity of the server that it is connected to, and the *epoch* that is stored there
    b. m0 := now
    c. in ONE statement, so in one snapshot of the database: the rows that its cursor has not seen, and the fence row
    d. bump what these rows name; any failure ends the round
    e. cursor := that snapshot;  fence := m0 + L

and it serves from the cache only while ``now < fence``, by the deadline that it held *before* it asked the store. A writer
answers when its bumps are confirmed and its own fence still stands; otherwise no fence that misses its row can be alive L
after its COMMIT, so it waits until then at most, and usually less (below). It never fails.

Why a read that begins after a write was acknowledged never sees the state before it, even if its bump was lost. The reader
serves at t < f = m0 + L, from a generation that it read after its request began. If the write's COMMIT is in the round's
snapshot, its row was bumped before f was granted, on the server that the fence names, in the epoch that it names; if not,
COMMIT came after m0 > t - L, and a writer that had not bumped waited until COMMIT + L > t. Nor is a read ever older than L:
the same argument for writes that nobody acknowledged (psql, a writer that died).

Why each part is there:

  * the *snapshot cursor*: a transaction with the smaller number may commit later; "number > last" would miss it.
  * the *epoch*: a random token in the store (``respcache:~inc``), part of every generation's ``r``. It is made anew when it
    is missing, when the server's identity, the database's incarnation or the set of triggers is another one, and when the
    rows that a cursor misses were pruned. First the snapshot is taken, then the epoch stored: whatever is captured under the
    epoch was captured after that snapshot, so rows older than it need not be replayed. A new epoch is the invalidation of
    everything, in one write.
  * the *authority*: the identity of the one server that may be served, in the fence row. In a split brain both halves have
    a server that answers; only one is the authority. A new one becomes effective when no fence granted under the old one
    can be alive.
  * ``until``: no fence anywhere lives longer than this, by the database's clock. A round sees to it that ``until`` is far
    enough *before* it takes its snapshot. A writer that cannot bump waits for ``until``: in a long outage of the store
    nobody renews it, so writes are not delayed at all.
  * m0 before the snapshot, and the deadline held before the generation was read: a process that is stopped for seconds in
    between must not serve by what it learns after.
  * rows are told apart by their own id (``rows`` of a bump), never by their transaction, which may have several; and an id
    is given to the store only after COMMIT has returned: after a COMMIT whose outcome is unknown, the bump may come first.

Only durations are compared between hosts, so clocks need no agreement; their rates must (``DRIFT``). The database's own clock
must not step forward by L or more while the store is away.

Model-checked as fence.pml (with GRANT); the mutants LATEFENCE, ACKALWAYS, NOWAIT, NOEFF, LATEM0, NOFENCE and NORECORD of that
model are the rules above, each left out once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

LEASE_S = 2.0
"""L: a process serves for at most this long after the moment that its last round vouches for. Also how old a read may be of
a write that nobody acknowledged."""

PERIOD_S = 0.4
"""P: a round begins this long after the last one, jittered."""

DRIFT = 1.01
"""Clocks of two hosts run equally fast up to this factor."""

EVERYBODY = "~all"
"""Stands for the tenant of an outbox row that concerns all of them (TRUNCATE)."""


@dataclass(frozen=True, slots=True)
class Fence:
    """Until when (this process's clock, seconds) what this server life holds may be served."""

    server: str
    until: float

    def allows(self, server: str, now: float) -> bool:
        """Whether something that came from ``server`` may be served now."""
        return now < self.until and server == self.server


@dataclass(frozen=True, slots=True)
class Cursor:
    """What has been read of the outbox: everything that a snapshot of the database sees (``xmin:xmax:xip,...``)."""

    snapshot: str
    taken_at: float
    """Seconds, by the database's clock."""

    @property
    def xmin(self) -> int:
        """Every transaction before this one had ended."""
        return int(self.snapshot.partition(":")[0])


@dataclass(frozen=True, slots=True)
class Epoch:
    """A life of the whole cache: on one server life, for one incarnation of the database, from one snapshot on."""

    token: str
    identity: str
    incarnation: str
    cursor: Cursor

    @property
    def server(self) -> str:
        """What a generation of this epoch records as its ``r``."""
        return f"{self.token}:{self.identity}"

    def encode(self) -> str:
        """Return the record that the store keeps: fields separated by blanks, token and identity first."""
        return f"{self.token} {self.identity} {self.incarnation} {self.cursor.taken_at!r} {self.cursor.snapshot}"


def decode_epoch(record: str) -> Epoch | None:
    """Read a record back, or return None for anything that is none (a foreign value under our key)."""
    parts = record.split(" ")
    try:
        token, identity, incarnation, taken_at, snapshot = parts
        cursor = Cursor(snapshot, float(taken_at))
        return Epoch(token, identity, incarnation, cursor) if cursor.xmin >= 0 else None
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Due:
    """What the outbox demands for one tenant: tags to bump, and the ids of the rows that name them (empty: too many)."""

    tags: tuple[str, ...]
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """What one statement of the database told: everything in it belongs to one snapshot."""

    cursor: Cursor
    incarnation: str
    """Names the database, its timeline and start, the outbox and every trigger as it is now."""
    due: Mapping[str, Due] = field(default_factory=dict)
    overflow: bool = False
    """More is due than a page holds."""
    pruned: int = 0
    """Rows of transactions before this one may have been deleted."""
    authority: str | None = None
    effective: bool = False
    recorded: bool = False
    """``until`` is at least a lease ahead."""
    tables: frozenset[str] = frozenset()
    """The tables whose writes leave rows."""


class Step(StrEnum):
    """What a round has to do after the rows of its page were bumped."""

    CLAIM = "claim"
    WAIT = "wait"
    RECORD = "record"
    GRANT = "grant"


def outdated(epoch: Epoch, cursor: Cursor, page: Page) -> str | None:
    """Say why the epoch must be made anew, given the page that was read from ``cursor`` on; None when it holds."""
    if page.incarnation != epoch.incarnation:
        return "the database or its triggers are not the same any more"
    if page.pruned > cursor.xmin:
        return "rows that were not read have been pruned"
    if page.overflow:
        return "more has changed than can be replayed"
    if EVERYBODY in page.due:
        return "a table was emptied"
    return None


def next_step(page: Page, identity: str) -> Step:
    """Decide what a round that is connected to the server ``identity`` does next."""
    if page.authority != identity:
        return Step.CLAIM
    if not page.effective:
        return Step.WAIT
    return Step.GRANT if page.recorded else Step.RECORD
