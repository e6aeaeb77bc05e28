"""The fence, sans I/O: why no invalidation is ever lost, whatever happens between COMMIT and bump.

``generations.py`` needs one thing from the outside: the bump of a committed write must not be lost.
A process can die between COMMIT and bump, the store can be away, psql knows nothing of bumps. So
every write leaves rows in the *outbox*, a table of the same database, in the same transaction
(triggers write them), and every process runs *rounds*:

    a. m0 := now
    b. learn the identity of the server that it is connected to, and the *epoch* that is stored
       there
    c. in ONE statement, so in one snapshot of the database: the rows that its cursor has not seen,
       and the fence row
    d. bump what these rows name; any failure ends the round
    e. cursor := that snapshot;  fence := m0 + L, if the fence row names this server as the
       authority

and it serves from the cache only while ``now < fence``, by the deadline that it held *before* it
asked the store. A writer answers when its bumps are confirmed and its own fence still stands;
otherwise it waits until no fence that misses its rows can be alive, L after its COMMIT at most. It
never fails.

Why a read that begins after a write was acknowledged never sees the state before it, even if its
bump was lost. The reader serves at t < f = m0 + L, from a generation that it read after its request
began. If the write's COMMIT is in the round's snapshot, its rows were bumped before f was granted,
on the server that the fence names, in the epoch that it names; if not, COMMIT came after m0 > t -
L, and a writer that had not bumped waited until COMMIT + L > t. Nor is a read ever older than L:
the same argument for writes that nobody acknowledged (psql, a writer that died).

Why each part is there:

  * the *snapshot cursor*: a transaction with the smaller number may commit later; "number > last"
    would miss it.
  * the *epoch*: a random token in the store (``respcache:~inc``), part of every generation's ``r``.
    It is made anew when it is missing, when the server's identity, the database's incarnation or
    the set of triggers is another one, and when the rows that a cursor misses were pruned or are
    too many. First the snapshot is taken, then the epoch stored: whatever is captured under the
    epoch was captured after that snapshot, so older rows need not be replayed. A new epoch is the
    invalidation of everything, in one write.
  * the *authority*: the identity of the one server that may be served, in the fence row. In a split
    brain both halves have a server that answers; only one is the authority.
  * ``until``: no fence anywhere lives longer than this, by the database's clock. A round sees to it
    that ``until`` is at least L ahead *before* it takes its snapshot, and only under its own
    authority. So a writer that cannot bump may answer when ``until`` has passed: in a long outage
    of the store nobody renews it, and writes are not delayed at all. And a new authority becomes
    effective at the ``until`` that it found: then no fence of the old one is alive.
  * m0 before the snapshot, and the deadline held before the generation was read: a process that is
    stopped for seconds in between must not serve by what it learns after.
  * rows are told apart by their own id, never by their transaction, which may have several; and an
    id is given to the store only after COMMIT has returned: after a COMMIT whose outcome is
    unknown, the bump may come first.

Only durations are compared between hosts, so clocks need no agreement; their rates must
(``DRIFT``). The database's own clock must not step forward by L or more while the store is away.

Model-checked as models/fence.pml, and together with generations as models/composed.pml;
tests/simulation runs the code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from respcache.core.epochs import Cursor, Epoch
from respcache.core.generations import RING_ROWS, collapse
from respcache.core.keys import EVERYBODY
from respcache.core.tokens import ConsistencyToken

LEASE_S = 2.0
"""L: a process serves for at most this long after the moment that its last round vouches for. Also
how old a read may be of a write that nobody acknowledged. The same in all processes on one
database."""

PERIOD_S = 0.4
"""P: a round begins this long after the last one, jittered."""

DRIFT = 1.01
"""Clocks of two hosts run equally fast up to this factor."""

MAX_ROWS = 20_000
"""Rows of the outbox that a round replays; when there are more, a new epoch takes their place."""

MAX_TENANTS = 2_000
"""Tenants that a round bumps, or a writer; when there are more, a new epoch takes their place: one
write instead of so many."""


@dataclass(frozen=True, slots=True)
class ServingLease:
    """Until when (this process's clock, seconds) what this server life holds may be served."""

    server: str = ""
    until: float = float("-inf")

    def allows(self, server: str, now: float) -> bool:
        """Whether something that came from ``server`` may be served now."""
        return now < self.until and server == self.server


class Outcome(StrEnum):
    """What became of the invalidation of a committed write, when its answer may leave; the worst
    comes last."""

    CONFIRMED = "confirmed"
    SAFE = "pending; safe"
    """Not applied yet, but nothing is served from the cache before it is."""
    PENDING = "pending"
    """Without an outbox: other processes may serve old data until it is applied."""


@dataclass(frozen=True, slots=True)
class Ack:
    """What the answer of a committed write may say: what became of its invalidation, and what its
    client must see from now on (``core/tokens.py``; None: nothing was bumped)."""

    outcome: Outcome
    token: ConsistencyToken | None = ()


@dataclass(frozen=True, slots=True)
class DueBump:
    """What the outbox demands for one tenant: tags to bump, and the ids of the rows that name them
    (none: too many to tell)."""

    tags: tuple[str, ...]
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OutboxPage:
    """What one statement of the database told: everything in it belongs to one snapshot."""

    cursor: Cursor
    incarnation: str
    """Names the database's life, the outbox and every trigger as they are now."""
    rows: Sequence[tuple[str, str, str]] = ()
    """(tenant, tag, id) of what the asking cursor has not seen."""
    oldest_s: float = 0.0
    """How old the oldest of these rows is."""
    pruned: int = 0
    """Rows of transactions before this one may have been deleted."""
    foreign: bool = False
    """Numbers stand there that no transaction of this database has had yet: they came with the dump
    of another one."""
    authority: str | None = None
    effective: bool = False
    recorded: bool = False
    """``until`` is at least a lease ahead."""
    expiring: bool = False
    """It will soon not be: less than one and a half leases are left."""
    tables: frozenset[str] = field(default_factory=frozenset)
    """The tables whose writes leave rows."""
    unsound: frozenset[str] = field(default_factory=frozenset)
    """The tables that have triggers of ours which do not, or not for every write."""
    functions: frozenset[str] = field(default_factory=frozenset)
    """Names of functions that may write when they are selected."""
    deferred: bool = False
    """Triggers of the application may write at COMMIT, after the moment at which a transaction is
    asked what it has left."""

    @property
    def pruned_ahead(self) -> bool:
        """Whether ``pruned`` itself is one of the foreign numbers: by it, every cursor has missed
        something, for ever."""
        return self.pruned > self.cursor.xmax


class RelayStep(StrEnum):
    """What a round has to do when the rows of its page are bumped."""

    CLAIM = "claim"
    WAIT = "wait"
    RECORD = "record"
    GRANT = "grant"


def by_tenant(rows: Sequence[tuple[str, str, str]]) -> Mapping[str, DueBump]:
    """Sort rows (tenant, tag, id) into what is due for each tenant. Costs no more bumps than there
    are tenants."""
    tags: dict[str, dict[str, None]] = {}
    ids: dict[str, list[str]] = {}
    for tenant, tag, row in rows:
        tags.setdefault(tenant, {})[tag] = None
        ids.setdefault(tenant, []).append(row)
    return {
        tenant: DueBump(
            collapse(names), tuple(ids[tenant]) if len(ids[tenant]) <= RING_ROWS else ()
        )
        for tenant, names in tags.items()
    }


def too_many(rows: Sequence[tuple[str, str, str]]) -> bool:
    """Whether these rows (tenant, tag, id) concern more tenants than are bumped one by one."""
    return len({tenant for tenant, _, _ in rows}) > MAX_TENANTS


def outdated(epoch: Epoch, cursor: Cursor, page: OutboxPage) -> str | None:
    """Say why the epoch must be made anew, given the page that was read from ``cursor`` on; None
    when it holds."""
    if page.incarnation != epoch.incarnation:
        return "the database or its triggers are not the same any more"
    if page.pruned > cursor.xmin:
        return "rows that were not read have been pruned"
    if page.cursor.xmin < cursor.xmin:
        return "the database has gone back in time"
    if len(page.rows) > MAX_ROWS or (len(page.rows) > MAX_TENANTS and too_many(page.rows)):
        return "more has changed than can be replayed"
    if any(tenant == EVERYBODY for tenant, _, _ in page.rows):
        return "a table was emptied"
    return None


def next_step(page: OutboxPage, identity: str) -> RelayStep:
    """Decide what a round that is connected to the server ``identity`` does next."""
    if page.authority != identity:
        return RelayStep.CLAIM
    if not page.effective:
        return RelayStep.WAIT
    return RelayStep.GRANT if page.recorded else RelayStep.RECORD
