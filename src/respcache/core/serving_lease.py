"""The serving lease, sans I/O: why no invalidation is ever lost between COMMIT and bump.

``generations.py`` has one requirement: the bump of a committed write must not be lost. But a
process can die between COMMIT and bump, the cache server can be unavailable, and psql sends no
bumps. So every write leaves rows in the *outbox*, a table of the same database, in the same
transaction (triggers write them), and every process runs *relay cycles*:

    a. m0 := now
    b. read the identity of the server that it is connected to, and the *epoch* that is stored there
    c. in ONE statement, so in one snapshot of the database, read the rows that its cursor has not
       seen, and the fence row (the one row of ``respcache_fence``)
    d. bump what these rows name; any failure ends the cycle
    e. cursor := that snapshot;  lease := m0 + L, if the fence row names this server as the
       authority

A process serves from the cache only while ``now < lease``, by the deadline that it had *before* it
read from the cache server. A writer acknowledges when its bumps are confirmed and its own lease is
still alive. Otherwise it waits until no lease that misses its rows can be alive, L after its COMMIT
at most. It never fails.

Why a read that begins after a write was acknowledged never returns the state before it, even if the
bump was lost. The reader serves at t < f = m0 + L, from a generation that it read after its request
began. If the write's COMMIT is in the cycle's snapshot, its rows were bumped before f was granted,
on the server that the lease names, in the epoch that it names. If not, COMMIT came after m0 > t -
L, and a writer that had not bumped waited until COMMIT + L > t. Nor is a read ever older than L:
the same argument holds for writes that were never acknowledged (psql, a writer that died).

Why each part is there:

  * the *snapshot cursor*: a transaction with the smaller number may commit later; "number > last"
    would miss it.
  * the *epoch*: a random token on the cache server (``respcache:~inc``), part of every generation's
    ``r``. A new one begins when it is missing; when the server's identity, the database's
    incarnation or the set of triggers has changed; and when the rows that a cursor misses were
    pruned or are too many. First the snapshot is taken, then the epoch is stored: whatever is
    captured under the epoch was captured after that snapshot, so older rows need no replay. A new
    epoch invalidates everything, in one write.
  * the *authority*: the identity of the one server from which data may be served, in the fence row.
    In a split brain both halves have a server that replies; only one is the authority.
  * ``until``: no lease anywhere lives longer than this, by the database's clock. A cycle ensures
    that ``until`` is at least L ahead *before* it takes its snapshot, and only under its own
    authority. So a writer that cannot bump may acknowledge when ``until`` has passed: in a long
    outage of the cache server no process renews it, and writes are not delayed at all. And a new
    authority becomes effective at the ``until`` that it found: by then no lease of the old one is
    alive.
  * m0 before the snapshot, and the deadline taken before the generation is read: a process that is
    stopped for seconds in between must not serve by what it learns after.
  * rows are identified by an id of their own, never by their transaction, which may have several.
    An id is sent to the cache server only after COMMIT has returned: when the outcome of a COMMIT
    is unknown, the bump may come first.

Only durations are compared between hosts, so clocks need not agree; their rates must (``DRIFT``).
The database's own clock must not step forward by L or more while the cache server is unavailable.

Model-checked as models/serving_lease.pml, and together with generations as models/composed.pml;
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
"""L: a process serves for at most this long after the beginning of its last completed cycle. Also
the maximum age of a read that misses an unacknowledged write. Equal in all processes on one
database."""

PERIOD_S = 0.4
"""P: a cycle begins this long after the last one, jittered."""

DRIFT = 1.01
"""The clocks of two hosts run equally fast up to this factor."""

MAX_ROWS = 20_000
"""Rows of the outbox that a cycle replays. If there are more, a new epoch replaces them."""

MAX_TENANTS = 2_000
"""Tenants that a cycle or a writer bumps. If there are more, a new epoch replaces the bumps: one
write instead of thousands."""


@dataclass(frozen=True, slots=True)
class ServingLease:
    """The right to serve what this server life stores, until a moment of this process's clock
    (seconds)."""

    server: str = ""
    until: float = float("-inf")

    def allows(self, server: str, now: float) -> bool:
        """Return whether data from ``server`` may be served now."""
        return now < self.until and server == self.server


class Outcome(StrEnum):
    """What is known of a committed write's invalidation when its response is sent, from best to
    worst."""

    CONFIRMED = "confirmed"
    SAFE = "pending; safe"
    """Not applied yet, but nothing is served from the cache until it is."""
    PENDING = "pending"
    """Without an outbox: other processes may serve old data until it is applied."""


@dataclass(frozen=True, slots=True)
class Ack:
    """What the response to a committed write reports: the outcome of its invalidation, and the
    client's consistency token (``core/tokens.py``; None: nothing was bumped)."""

    outcome: Outcome
    token: ConsistencyToken | None = ()


@dataclass(frozen=True, slots=True)
class DueBump:
    """The bump that the outbox requires for one tenant: its tags, and the ids of the rows that name
    them (empty if there are too many)."""

    tags: tuple[str, ...]
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OutboxPage:
    """The result of one statement in the database, so of one snapshot."""

    cursor: Cursor
    incarnation: str
    """Identifies the database's life, the outbox and every trigger in their present state."""
    rows: Sequence[tuple[str, str, str]] = ()
    """(tenant, tag, id) of the rows that the given cursor has not seen."""
    oldest_s: float = 0.0
    """The age of the oldest of these rows."""
    pruned: int = 0
    """Rows of transactions before this one may have been deleted."""
    foreign: bool = False
    """The tables contain transaction numbers that this database has not assigned yet: they came
    with the dump of another database."""
    authority: str | None = None
    effective: bool = False
    recorded: bool = False
    """``until`` is at least a lease ahead."""
    expiring: bool = False
    """``until`` is less than one and a half leases ahead."""
    tables: frozenset[str] = field(default_factory=frozenset)
    """The tables whose writes leave rows."""
    unsound: frozenset[str] = field(default_factory=frozenset)
    """The tables whose triggers miss some writes."""
    functions: frozenset[str] = field(default_factory=frozenset)
    """Names of functions that may write when a SELECT calls them."""
    deferred: bool = False
    """Triggers of the application may write at COMMIT, after the transaction's rows were read."""

    @property
    def pruned_ahead(self) -> bool:
        """Whether ``pruned`` itself is such a foreign number. By it, every cursor would have missed
        rows, for ever."""
        return self.pruned > self.cursor.xmax


class RelayStep(StrEnum):
    """What a cycle has to do after the rows of its page are bumped."""

    CLAIM = "claim"
    WAIT = "wait"
    RECORD = "record"
    GRANT = "grant"


def by_tenant(rows: Sequence[tuple[str, str, str]]) -> Mapping[str, DueBump]:
    """Group rows (tenant, tag, id) into one bump per tenant."""
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
    """Return whether these rows (tenant, tag, id) concern more than ``MAX_TENANTS`` tenants."""
    return len({tenant for tenant, _, _ in rows}) > MAX_TENANTS


def outdated(epoch: Epoch, cursor: Cursor, page: OutboxPage) -> str | None:
    """Return why a new epoch is needed, given the page that was read from ``cursor`` on; None if
    none is."""
    if page.incarnation != epoch.incarnation:
        return "the database or its triggers have changed"
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
    """Decide what a cycle that is connected to the server ``identity`` does next."""
    if page.authority != identity:
        return RelayStep.CLAIM
    if not page.effective:
        return RelayStep.WAIT
    return RelayStep.GRANT if page.recorded else RelayStep.RECORD
