"""A database with transactions, snapshots and an outbox, and the outbox as a process sees it.

The semantics are those of the statements in ``writes/postgres.py`` and of the triggers in
``writes/triggers.py``: numbers of transactions are given at the first write, commits come in any
order, a snapshot names which have ended, each statement sees one snapshot, and what it computes by
the clock may be computed later than the snapshot was taken. Registers stand for rows of the
application's tables: one per tenant and table. Their values are *stamps*, numbers that are never
used twice.
"""

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from respcache.core.epochs import Cursor
from respcache.core.errors import OutboxError
from respcache.core.generations import table_tag
from respcache.core.keys import EVERYBODY
from respcache.core.serving_lease import DRIFT, MAX_ROWS, OutboxPage
from respcache.writes.relay import Rows
from tests.simulation.loop import Host
from tests.simulation.oracle import Oracle, Register
from tests.simulation.world import World

T = TypeVar("T")

NAME = "database"
LOCK_POLL_S = 0.002
LOCK_POLLS = 100
DEADLINE_S = 0.5
FIRST_XID = 700
YEARS_S = 1_000_000.0


class DatabaseGone(Exception):
    """A statement of the application failed: whether it was carried out is not known."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the outbox."""

    xid: int
    tenant: str
    tag: str
    id: str
    at: float


@dataclass(frozen=True, slots=True)
class FenceRow:
    """The one row of the fence table."""

    authority: str | None = None
    effective_at: float = 0.0
    until: float = 0.0
    horizon: int = 0
    horizon_at: float = 0.0
    pruned: int = 0


@dataclass(frozen=True, slots=True)
class Logged:
    """What a commit left in the log: what is needed to lose it."""

    at: float
    xid: int
    writes: tuple[tuple[Register, int], ...] = ()
    fence_before: FenceRow | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Which transactions have ended: all before ``xmin``, none from ``xmax`` on, and in between all
    but the running."""

    xmin: int
    xmax: int
    running: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.running))}"

    @classmethod
    def parse(cls, text: str) -> "Snapshot":
        """Read what ``str`` made."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), tuple(map(int, running.split(","))) if running else ())

    def sees(self, xid: int) -> bool:
        """Whether what this transaction wrote is visible."""
        return xid < self.xmin or (xid < self.xmax and xid not in self.running)


class Database:
    """The server. Transactions are begun by ``Transaction``; everything here happens at one
    moment."""

    def __init__(
        self, world: World, oracle: Oracle, registers: Iterable[Register], *, ids: random.Random
    ) -> None:
        self.world = world
        self.oracle = oracle
        self.tables = frozenset(table for _, table in registers)
        self.deferred = False
        """Whether triggers may write in COMMIT."""
        self.values: dict[Register, int] = {
            register: oracle.begin(register) for register in registers
        }
        self.outbox: list[Row] = []
        self.lease = FenceRow(effective_at=YEARS_S, until=YEARS_S, horizon_at=YEARS_S)
        self.log: list[Logged] = []
        self.running: set[int] = set()
        self.locks: dict[Register, Transaction] = {}
        self.next_xid = FIRST_XID
        self.latest = FIRST_XID - 1
        """The highest transaction that has ended."""
        self.life = 0
        self.up = True
        self.thinks_until = 0.0
        self.longest_thought_s = 0.0
        self._ids = ids

    @property
    def now(self) -> float:
        """Return what the database's clock shows."""
        return YEARS_S + self.world.loop.time()

    @property
    def incarnation(self) -> str:
        """Name this life of the database."""
        return f"life{self.life}"

    def begin_xid(self) -> int:
        """Give a transaction its number."""
        xid, self.next_xid = self.next_xid, self.next_xid + 1
        self.running.add(xid)
        return xid

    def end_xid(self, xid: int) -> None:
        """Have a transaction end, for every snapshot from now on."""
        self.running.discard(xid)
        self.latest = max(self.latest, xid)

    def snapshot(self) -> Snapshot:
        """Take a snapshot."""
        xmax = self.latest + 1
        running = tuple(sorted(xid for xid in self.running if xid < xmax))
        return Snapshot(running[0] if running else xmax, xmax, running)

    def change_fence(self, lease: FenceRow) -> None:
        """Commit a change of the fence row in a transaction of its own."""
        xid = self.begin_xid()
        self.log.append(Logged(self.now, xid, fence_before=self.lease))
        self.lease = lease
        self.end_xid(xid)

    def durable(self, logged: Logged) -> bool:
        """Whether a crash cannot lose this: a change of the fence row, which takes with it
        everything before."""
        return logged.fence_before is not None

    def new_id(self, xid: int) -> str:
        """Make the id of a row of the outbox."""
        return f"{self._ids.getrandbits(64):016x}"

    def unseen(self, after: Cursor) -> list[Row]:
        """Find the rows that a cursor has not seen."""
        seen = Snapshot.parse(after.snapshot)
        return [row for row in self.outbox if not seen.sees(row.xid)]

    def restart(self, *, pause_s: float, lose: int, newest_s: float) -> None:
        """Crash, come back after a pause as another life, without some of the last commits that
        nobody has made durable."""
        self.up = False
        self.life += 1
        lost: list[Logged] = []
        while (
            self.log
            and len(lost) < lose
            and self.log[-1].at > self.now - newest_s
            and not self.durable(self.log[-1])
        ):
            lost.append(self.log.pop())
            self.lease = lost[-1].fence_before or self.lease
        xids = {one.xid for one in lost}
        self.outbox = [row for row in self.outbox if row.xid not in xids]
        if lost:
            self.world.counts["commits lost"] += len(lost)
            self.world.note(NAME, "loses commits", sorted(xids))
        self.oracle.lose([write for one in lost for write in one.writes])
        self.values = {register: self.oracle.present(register) for register in self.values}
        self.running.clear()
        self.locks.clear()
        if xids:  # numbers of which nothing is left are given again
            self.next_xid = max([FIRST_XID - 1, *(one.xid for one in self.log)]) + 1
        self.latest = self.next_xid - 1
        self.world.after(pause_s, self._come_up)

    def _come_up(self) -> None:
        self.up = True

    async def ask(
        self,
        host: Host,
        statement: Callable[[], T],
        *,
        deadline_s: float,
        error: type[Exception],
        life: int | None = None,
        finish: Callable[[T], T] | None = None,
    ) -> T:
        """Run a statement for a host, bounded in time. ``finish`` is what it computes a while after
        its snapshot was taken.

        With ``life``, the statement belongs to a transaction of that life of the database.
        """
        world, pair, loop = self.world, (host.name, NAME), self.world.loop
        future: asyncio.Future[T] = loop.create_future()

        def fail(why: str) -> None:
            if not future.done():
                future.set_exception(error(why))

        def answer(found: T) -> None:
            if not future.done():
                future.set_result(found)

        def finished(found: T, began: int) -> None:
            if self.life != began or not self.up:
                world.send(pair, lambda: fail("the connection ended"))
                return
            told = found if finish is None else finish(found)
            world.send(pair, lambda: answer(told))

        def arrive() -> None:
            if not self.up or (life is not None and life != self.life):
                world.send(pair, lambda: fail("the database is not there"))
                return
            try:
                found = statement()
            except DatabaseGone as gone:
                why = str(gone)
                world.send(pair, lambda: fail(why))
                return
            world.after(self._thought_s(), finished, found, self.life)

        world.send(pair, lambda: world.after(self._thought_s(), arrive))
        loop.happen(deadline_s / host.rate, fail, f"no answer within {deadline_s} s", host=host)
        return await future

    def _thought_s(self) -> float:
        if self.world.loop.time() < self.thinks_until:
            return self.world.rng.random() * self.longest_thought_s
        return self.world.rng.random() * 0.001


class Transaction:
    """A transaction of the application. Its statements run for a host; each of them may fail with
    ``DatabaseGone``."""

    def __init__(self, database: Database, host: Host) -> None:
        self.database = database
        self.host = host
        self.writes: dict[Register, int] = {}
        self.rows: dict[tuple[str, str], str] = {}
        self.emptied: set[str] = set()
        self._life = database.life
        self._xid: int | None = None
        self._ended = False

    async def update(self, *registers: Register) -> None:
        """Change rows, once nobody else's open transaction has changed them."""
        for register in sorted(registers):
            for _ in range(LOCK_POLLS):
                if await self._run(lambda register=register: self._write(register)):
                    break
                await asyncio.sleep(LOCK_POLL_S)
            else:
                raise DatabaseGone("waited too long for a lock")

    async def truncate(self, table: str) -> None:
        """Empty a table: all registers of it change, and there is one row for everybody."""
        self.emptied.add(table_tag(table))
        await self.update(*(register for register in self.database.values if register[1] == table))

    async def own_rows(self) -> Rows:
        """Read the rows that this transaction has left in the outbox so far."""
        return await self._run(
            lambda: [(tenant, tag, id_) for (tenant, tag), id_ in self.rows.items()]
        )

    async def commit(self, *, deferred: Register | None = None, lands_after_s: float = 0.0) -> None:
        """Commit. ``deferred`` is what a trigger changes in COMMIT. With a time, COMMIT comes later
        than anybody waits."""
        if lands_after_s:
            self.database.world.after(lands_after_s, self._complete)
            raise DatabaseGone("the connection broke in COMMIT")
        await self._run(lambda: self._carry_out(deferred))

    def abandon(self) -> None:
        """Let the database find out that nobody is there any more, and roll back."""
        self.database.world.after(self.database.world.rng.random() * 1.5, self._end)

    async def _run(self, statement: Callable[[], T]) -> T:
        def checked() -> T:
            if self._ended:
                raise DatabaseGone("the transaction has ended")
            return statement()

        return await self.database.ask(
            self.host, checked, deadline_s=DEADLINE_S, error=DatabaseGone, life=self._life
        )

    def _write(self, register: Register) -> bool:
        database = self.database
        if self._xid is None:
            self._xid = database.begin_xid()
        if database.locks.setdefault(register, self) is not self:
            return False
        self.writes[register] = database.oracle.new_stamp()
        tenant, tag = register[0], table_tag(register[1])
        key = (EVERYBODY if tag in self.emptied else tenant, tag)
        if key not in self.rows:
            self.rows[key] = database.new_id(self._xid)
        return True

    def _complete(self) -> None:
        if not self._ended and self.database.up and self.database.life == self._life:
            self._carry_out(None)

    def _carry_out(self, deferred: Register | None) -> None:
        if deferred is not None:
            self._write(deferred)
        database, xid = self.database, self._xid
        assert xid is not None
        now = database.now
        for register, stamp in self.writes.items():
            database.values[register] = stamp
            database.oracle.commit(register, stamp)
        database.outbox += [
            Row(xid, tenant, tag, id_, now) for (tenant, tag), id_ in self.rows.items()
        ]
        database.log.append(Logged(now, xid, tuple(self.writes.items())))
        database.world.note(self.host.name, "COMMIT", xid, dict(self.writes))
        self._end()

    def _end(self) -> None:
        """End, with whatever was committed."""
        database = self.database
        if self._ended or database.life != self._life:
            return
        self._ended = True
        if self._xid is not None:
            database.end_xid(self._xid)
        for register in [one for one, holder in database.locks.items() if holder is self]:
            del database.locks[register]


async def read_register(database: Database, host: Host, register: Register) -> int:
    """Read a row in a statement of its own: what was committed last. Raises ``DatabaseGone``."""
    return await database.ask(
        host, lambda: database.values[register], deadline_s=DEADLINE_S, error=DatabaseGone
    )


class SimulatedOutbox:
    """The outbox as one process sees it (``respcache.writes.relay.Outbox``)."""

    own_rows = ""

    def __init__(
        self,
        database: Database,
        host: Host,
        *,
        lease_s: float,
        deadline_s: float,
        retention_s: float,
        recovered: Callable[[], None],
    ) -> None:
        self.database = database
        self.host = host
        self.lease_s = lease_s
        self._deadline_s = deadline_s
        self._retention_s = retention_s
        self._recovered = recovered
        self._failed = False

    async def page(self, after: Cursor | None) -> OutboxPage:
        """See ``Outbox.page``; ``_PAGE`` in ``writes/postgres.py``."""
        database = self.database
        lease: list[FenceRow] = []

        def at_snapshot() -> OutboxPage:
            lease.append(database.lease)
            rows = [] if after is None else database.unseen(after)[: MAX_ROWS + 1]
            return OutboxPage(
                cursor=Cursor(str(database.snapshot()), database.now),
                incarnation=database.incarnation,
                rows=[(row.tenant, row.tag, row.id) for row in rows],
                oldest_s=max((database.now - row.at for row in rows), default=0.0),
                pruned=database.lease.pruned,
                authority=database.lease.authority,
                tables=database.tables,
                deferred=database.deferred,
            )

        def by_the_clock(page: OutboxPage) -> OutboxPage:
            row, now, lease_s = lease[0], database.now, self.lease_s * DRIFT
            return replace(
                page,
                effective=row.effective_at <= now,
                recorded=row.until >= now + lease_s,
                expiring=row.until < now + 1.5 * lease_s,
            )

        failed, self._failed = self._failed, True
        found: OutboxPage = await self._ask(at_snapshot, by_the_clock)
        self._failed = False
        if failed:
            self._recovered()
        return found

    async def backlog(self, after: Cursor) -> tuple[int, float]:
        """See ``Outbox.backlog``; ``_BACKLOG``."""
        database = self.database

        def count() -> tuple[int, float]:
            rows = database.unseen(after)[: MAX_ROWS + 1]
            return len(rows), max((database.now - row.at for row in rows), default=0.0)

        return await self._ask(count)  # type: ignore[no-any-return]

    async def claim(self, identity: str, *, instead_of: str | None) -> None:
        """See ``Outbox.claim``; ``_CLAIM``."""
        database = self.database

        def claim() -> None:
            if database.lease.authority == instead_of:
                effective_at = self.effective_at(database.lease)
                database.change_fence(
                    replace(database.lease, authority=identity, effective_at=effective_at)
                )
                database.world.note(
                    self.host.name, "claims authority for", identity[:4], "effective", effective_at
                )

        await self._ask(claim)

    def effective_at(self, lease: FenceRow) -> float:
        """Tell when an authority that is claimed now becomes effective."""
        return lease.until

    async def record(self, identity: str) -> None:
        """See ``Outbox.record``; ``_RECORD``."""
        database = self.database

        def record() -> None:
            lease = database.lease
            if lease.authority == identity and lease.effective_at <= database.now:
                until = max(lease.until, database.now + 2 * self.lease_s * DRIFT)
                database.change_fence(replace(lease, until=until))
                database.world.note(self.host.name, "records until", until)

        await self._ask(record)

    async def remaining_s(self) -> float:
        """See ``Outbox.remaining_s``: the row of a snapshot, and the clock a while later."""
        database = self.database
        return await self._ask(lambda: database.lease.until, lambda until: until - database.now)

    async def note(self, pairs: Iterable[tuple[str, str]]) -> Rows:
        """See ``Outbox.note``."""
        database, wanted = self.database, list(pairs)

        def note() -> Rows:
            rows = []
            for tenant, tag in wanted:
                xid = database.begin_xid()
                rows.append(Row(xid, tenant, tag, database.new_id(xid), database.now))
                database.log.append(Logged(database.now, xid))
                database.end_xid(xid)
            database.outbox += rows
            return [(row.tenant, row.tag, row.id) for row in rows]

        return await self._ask(note)

    async def prune(self) -> int:
        """See ``Outbox.prune``; ``_MOVE_HORIZON``, then ``_DELETE``."""
        database = self.database

        def move_horizon() -> int:
            lease, now = database.lease, database.now
            if lease.horizon_at < now - self._retention_s:
                horizon = database.snapshot().xmin
                database.change_fence(
                    replace(lease, pruned=lease.horizon, horizon=horizon, horizon_at=now)
                )
            return 0

        def delete() -> int:
            kept = [row for row in database.outbox if row.xid >= database.lease.pruned]
            deleted, database.outbox = len(database.outbox) - len(kept), kept
            database.world.counts["rows pruned"] += deleted
            return deleted

        await self._ask(move_horizon)
        return await self._ask(delete)

    async def close(self) -> None:
        """See ``Outbox.close``."""

    async def _ask(
        self, statement: Callable[[], Any], finish: Callable[[Any], Any] | None = None
    ) -> Any:
        return await self.database.ask(
            self.host, statement, deadline_s=self._deadline_s, error=OutboxError, finish=finish
        )
