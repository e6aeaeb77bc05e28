"""Rounds: how this process proves, again and again, that it has seen every committed write.
``core/fence.py`` says why.

A round costs one round trip to the store and one to the database when nothing was written; what was
written by others costs one bump per tenant more. Nothing in a request waits for a round, but a
writer whose bump was not confirmed.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from respcache.core.epochs import Cursor, Epoch
from respcache.core.errors import OutboxError, OutboxMissing, StoreError, StoreUnavailable
from respcache.core.serving_lease import (
    DRIFT,
    MAX_ROWS,
    PERIOD_S,
    DueBump,
    OutboxPage,
    Outcome,
    RelayStep,
    ServingLease,
    by_tenant,
    next_step,
    outdated,
)
from respcache.stores.base import Store
from respcache.telemetry.tracing import Tracing
from respcache.writes.bumps import BumpSender

log = logging.getLogger("respcache")

SAVE_CURSOR_S = 30.0
"""How old the cursor in the epoch's record may become: a process that starts replays what came
after it."""

SOONER = 0.25
"""A round that failed is repeated after this share of the usual pause."""

PRUNE_S = 5.0
LOST_AUTHORITY_S = 30.0
"""A server that was the authority and is it no more is not claimed again for this long: two servers
must not alternate."""

MAX_STEPS = 6
"""Repetitions of a round that has changed what it is decided by (a new epoch, a claim, ``until``)
before it gives up."""

BACKLOG_S = 0.5
"""How often the rows that wait are counted while the store is away."""

Rows = Sequence[tuple[str, str, str]]
"""Rows of the outbox: (tenant, tag, id)."""


class Outbox(Protocol):
    """What rounds ask of a database. Every call is bounded in time or raises ``OutboxError``."""

    lease_s: float
    own_rows: str
    """SQL that yields one value: what a transaction has left, as JSON arrays [tenant, tag, id]
    between commas."""

    async def page(self, after: Cursor | None) -> OutboxPage:
        """Read, in one snapshot, the rows that the cursor has not seen (none for None) and the
        fence row."""
        ...

    async def backlog(self, after: Cursor) -> tuple[int, float]:
        """Count the rows that the cursor has not seen, up to more than a round replays; tell how
        old the oldest is."""
        ...

    async def claim(self, identity: str, *, instead_of: str | None) -> None:
        """Make a server the authority, if that is still the other one."""
        ...

    async def record(self, identity: str) -> None:
        """See to it that ``until`` is more than a lease ahead, as long as this server is the
        authority and effective."""
        ...

    async def remaining_s(self) -> float:
        """Tell for how long any fence can still be alive."""
        ...

    async def note(self, pairs: Iterable[tuple[str, str]]) -> Rows:
        """Leave rows for (tenant, tag), committed when this returns. Returns them with their
        ids."""
        ...

    async def prune(self) -> int:
        """Delete some rows that nobody needs, and what came with the dump of another database;
        return how many."""
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...


boottime: Callable[[], float] = partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)
"""Seconds that run on while the machine is suspended, where the system has such a clock."""


class OutboxRelay:
    """The rounds of one process. ``fence`` and ``tables`` are read on the way of every request.

    ``functions`` and ``deferred`` are of the last page too: what may write without a statement that
    says so.
    """

    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        *,
        generation_ttl_ms: int,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = boottime,
        jitter: Callable[[], float] = random.random,
        token: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self.clock = clock
        self.outbox = outbox
        self.lease = ServingLease()
        self.bumps = BumpSender(store, generation_ttl_ms=generation_ttl_ms)
        self.tables: frozenset[str] = frozenset()
        self.functions: frozenset[str] = frozenset()
        self.deferred = True  # as long as nobody has looked
        self.completed = 0
        self.failed = 0
        self.epochs = 0
        self.pending_rows = 0
        self.pending_s = 0.0
        self.problem = "no round has been completed yet"
        self.tracing = Tracing()
        self.told: Callable[[Rows, Outcome, float], None] | None = None
        """Hears what rounds found and bumped, and how long ago the oldest of it was written."""
        self._store = store
        self._ttl_ms = generation_ttl_ms
        self._period_s = period_s
        self._jitter = jitter
        self._token = token
        self._epoch: Epoch | None = None
        self._adopted_at = float("-inf")
        self._cursor: Cursor | None = None
        self._vouched = float("-inf")  # m0 of the last round that was completed
        # ids of rows that were bumped here and no round has met yet
        self._applied: OrderedDict[str, None] = OrderedDict()
        self._lost: tuple[str, float] = ("", float("-inf"))
        self._pruned_at = float("-inf")
        self._counted_at = float("-inf")
        # since when this process knows which tables are covered
        self._known_since: float | None = None
        self._missing_since: float | None = None  # since when there has been no outbox
        # tables that were covered: until when others may think so
        self._covered_until: dict[str, float] = {}
        self._unsound: frozenset[str] = frozenset()
        # writers: each for a round that begins after its moment
        self._waiting: dict[asyncio.Future[None], float] = {}
        self._hint = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether this process may serve from the cache now."""
        return self.clock() < self.lease.until

    @property
    def age_s(self) -> float | None:
        """Tell how long ago the moment is up to which this process has seen every write; None
        before the first round."""
        return self.clock() - self._vouched if self.completed else None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of the stats endpoint: the fence, what waits in the outbox, and what
        went wrong last."""
        age_s = self.age_s
        return {
            "alive": self.alive,
            "age_s": None if age_s is None else round(age_s, 3),
            "lease_s": self.outbox.lease_s,
            "rounds": self.completed,
            "rounds_failed": self.failed,
            "epochs_begun": self.epochs,
            "pending_rows": self.pending_rows,
            "pending_s": round(self.pending_s, 3),
            "problem": self.problem,
            "tables": sorted(self.tables),
            "unsound_tables": sorted(self._unsound),
        }

    def covers(self, tables: Iterable[str]) -> bool:
        """Whether writes to all of these tables leave rows."""
        return self.tables.issuperset(tables)

    def believed(self, table: str) -> bool:
        """Whether some process may still believe that writes to this table leave rows, and serve
        what was read from it.

        Not before a lease has gone by since this process learnt that they do not: then everybody
        has, or has no fence.
        """
        if table in self.tables or self._known_since is None:
            return True
        return self.clock() < self._covered_until.get(table, self._known_since + self._lease_s)

    def believed_any(self) -> bool:
        """Whether this may be so for any table at all."""
        if self.tables or self._known_since is None:
            return True
        return self.clock() < max(
            (self._known_since + self._lease_s, *self._covered_until.values())
        )

    async def start(self) -> None:
        """Run the first round, then go on in the background. Never raises because something is
        away."""
        await self._once()
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop. The fence is given up at once."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        self.lease = ServingLease()
        await self.outbox.close()

    def applied(self, rows: Rows, server: str) -> None:
        """Note that these rows were bumped on this server life: the next round need not do it
        again."""
        if self._epoch is not None and server == self._epoch.server:
            self._applied.update((row, None) for _, _, row in rows)
            # the oldest were met by a round that was faster than this call
            while len(self._applied) > MAX_ROWS:
                self._applied.popitem(last=False)

    async def safe(self, since: float) -> Outcome:
        """Return when no process can serve what was valid before ``since`` (a moment of ``clock``
        after a COMMIT).

        That is when a round that began later has been completed here in an epoch that is older than
        a lease (it has bumped the rows of that commit, or every fence that misses them has ended),
        or when no such fence can be alive: after a lease at most, and at once when the store has
        been away for longer.
        """
        caught_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[caught_up] = since
        self._hint.set()
        try:
            async with asyncio.timeout(
                max(0.0, since + self.outbox.lease_s * DRIFT - self.clock())
            ):
                remaining_s = await self._remaining_s()
                await asyncio.wait({caught_up}, timeout=remaining_s * DRIFT)
        except TimeoutError:
            pass
        finally:
            self._waiting.pop(caught_up, None)
        return Outcome.CONFIRMED if caught_up.done() else Outcome.SAFE

    async def caught_up(self) -> None:
        """Return when a round has been completed that began after this call: what is committed now
        has been bumped.

        Without end while there is none.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = self.clock()
        try:
            await future
        finally:
            self._waiting.pop(future, None)

    async def _remaining_s(self) -> float:
        try:
            return max(0.0, await self.outbox.remaining_s())
        except OutboxMissing:  # nobody has completed a round since the first that found it missing
            return (
                self._lease_s
                if self._missing_since is None
                else max(0.0, self._missing_since + self._lease_s - self.clock())
            )
        except OutboxError:
            return self.outbox.lease_s

    @property
    def _lease_s(self) -> float:
        """How long, by this clock, fences of other hosts may outlive what ended here."""
        return self.outbox.lease_s * DRIFT

    async def _run(self) -> None:
        while True:
            pause_s = (
                self._period_s * (0.8 + 0.4 * self._jitter()) * (SOONER if self.problem else 1)
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hint.wait(), pause_s)
            self._hint.clear()
            await self._once()
            await self._housekeeping()

    async def _once(self) -> None:
        """Run a round, and again when it has changed what it is decided by. Keeps what went wrong
        in ``problem``."""
        try:
            for _ in range(MAX_STEPS):
                if await self._round():
                    return
            raise OutboxError(self.problem)
        except (StoreError, OutboxError) as error:
            self.failed += 1
            if self.problem != str(error) and self.completed:
                log.info("round not completed: %s", error)
            self.problem = str(error)
        except Exception as error:
            self.failed += 1
            self.problem = f"{type(error).__name__}: {error}"
            log.exception(
                "a round failed in an unforeseen way; nothing is served from the cache until one "
                "succeeds"
            )

    async def _round(self) -> bool:
        """Take one step. Returns whether a fence was granted; False: try again at once. Raises when
        that is of no use."""
        m0 = self.clock()
        try:
            record, identity = await self._store.epoch()
        except StoreError:
            await self._look_at_backlog()
            raise
        epoch = record if record is not None and record.identity == identity else None
        if epoch is not None:
            self._adopt(epoch)
        page = await self._read(None if epoch is None else self._cursor)
        if page.foreign:
            await self.outbox.prune()
            if page.pruned_ahead:
                self.problem = "numbers of another database were cleared away"
                return False
        if epoch is None or self._cursor is None:
            reason: str | None = "there is none on this server"
        else:
            reason = outdated(epoch, self._cursor, page)
        if reason is not None:
            if not await self._renew(epoch, identity, page, reason):
                self.problem = "another process has made an epoch"
                return False
        else:
            found = [row for row in page.rows if row[2] not in self._applied]
            await self._bump(by_tenant(found))
            if found and self.told is not None:
                self.told(found, Outcome.CONFIRMED, page.oldest_s + self.clock() - m0)
            self._cursor = page.cursor
            for _, _, row in page.rows:
                self._applied.pop(row, None)
        self.pending_rows, self.pending_s = 0, 0.0
        return await self._step(page, identity, m0, record)

    async def _read(self, after: Cursor | None) -> OutboxPage:
        """Read a page, and keep what it says of tables and functions."""
        try:
            page = await self.outbox.page(after)
        except OutboxMissing:
            if self._missing_since is None:
                self._missing_since = self.clock()
            self._cover(frozenset())
            raise
        self._missing_since = None
        self._cover(page.tables)
        self.functions, self.deferred = page.functions, page.deferred
        self.pending_rows, self.pending_s = len(page.rows), page.oldest_s
        if page.unsound - self._unsound:
            log.warning(
                "not cached: reads of %s, whose triggers do not fire always, write the tag of "
                "another table, or miss what is"
                " written to a parent or child; watch_table (respcache.writes.alembic) mends all "
                "but the last",
                ", ".join(sorted(page.unsound)),
            )
        self._unsound = page.unsound
        return page

    def _cover(self, tables: frozenset[str]) -> None:
        now = self.clock()
        if self._known_since is None:
            self._known_since = now
        until = now + self._lease_s
        self._covered_until.update((table, until) for table in self.tables - tables)
        self._covered_until = {
            table: end for table, end in self._covered_until.items() if end > now
        }
        self.tables = tables

    async def _step(self, page: OutboxPage, identity: str, m0: float, record: Epoch | None) -> bool:
        step = next_step(page, identity)
        if step is RelayStep.CLAIM:
            await self._claim(page, identity)
            self.problem = "the authority was claimed"
            return False
        if step is RelayStep.WAIT:
            raise OutboxError(
                "this server is the authority, but fences of the former one may be alive"
            )
        if step is RelayStep.RECORD:
            await self.outbox.record(identity)
            self.problem = "until was recorded"
            return False
        self._grant(m0)
        if page.expiring:  # in good time, so that no later round has to be repeated for it
            await self.outbox.record(identity)
        if record is not None and page.cursor.taken_at - record.cursor.taken_at > SAVE_CURSOR_S:
            await self._save_cursor()
        return True

    def _grant(self, m0: float) -> None:
        assert self._epoch is not None
        server = self._epoch.server
        until = m0 + self.outbox.lease_s
        if self.lease.server != server or until > self.lease.until:
            self.lease = ServingLease(server, until)
        self._vouched = max(self._vouched, m0)
        self.completed += 1
        self.problem = ""
        # rows that are older than the epoch were not bumped: fences of the former epoch, of other
        # processes, must have ended
        alone = self.clock() >= self._adopted_at + self.outbox.lease_s * DRIFT
        for future, since in self._waiting.items():
            if m0 < since:
                self._hint.set()
            elif alone and not future.done():
                future.set_result(None)

    def _adopt(self, epoch: Epoch) -> None:
        """Live in this epoch from now on, having seen what its cursor has seen."""
        if self._epoch is None or (self._epoch.token, self._epoch.identity) != (
            epoch.token,
            epoch.identity,
        ):
            self._epoch, self._cursor = epoch, epoch.cursor
            self._adopted_at = self.clock()
            self._applied.clear()
            self._store.adopt(epoch.token)

    async def _renew(self, old: Epoch | None, identity: str, page: OutboxPage, reason: str) -> bool:
        """Begin a new epoch from this page's snapshot, unless another process was faster."""
        mine = Epoch(self._token(), identity, page.incarnation, page.cursor)
        held, named = await self._store.epoch(
            mine, replacing="" if old is None else old.token, ttl_ms=self._ttl_ms
        )
        if held != mine or named != identity:
            return False
        log.log(
            logging.INFO if old is None else logging.WARNING,
            "a new epoch begins, everything cached is invalid: %s",
            reason,
        )
        self.epochs += 1
        self._adopt(mine)
        return True

    async def _bump(self, due: Mapping[str, DueBump]) -> None:
        """Bump what is due. Raises unless all of it was confirmed by this very server life, in this
        epoch."""
        assert self._epoch is not None
        if not due:
            return
        with self.tracing.invalidation(tenants=len(due), cause="outbox") as trace:
            for found in (await self.bumps.send(due)).values():
                if isinstance(found, StoreError):
                    raise found
                if found.server != self._epoch.server:
                    raise StoreUnavailable("the server has changed in the middle of a round")
            trace(Outcome.CONFIRMED)

    async def _claim(self, page: OutboxPage, identity: str) -> None:
        now = self.clock()
        if (
            page.authority is not None
            and self.lease.server.endswith(f":{identity}")
            and self._lost[0] != identity
        ):
            self._lost = (identity, now)
        if self._lost[0] == identity and now - self._lost[1] < LOST_AUTHORITY_S:
            raise OutboxError("another server has become the authority")
        self._lost = ("", now)
        await self.outbox.claim(identity, instead_of=page.authority)

    async def _save_cursor(self) -> None:
        assert self._epoch is not None
        assert self._cursor is not None
        epoch = Epoch(
            self._epoch.token, self._epoch.identity, self._epoch.incarnation, self._cursor
        )
        await self._store.epoch(epoch, replacing=epoch.token, ttl_ms=self._ttl_ms)

    async def _look_at_backlog(self) -> None:
        """Count what waits while the store is away, for those who look at it, and learn what has
        become of the triggers."""
        now = self.clock()
        if now - self._counted_at < BACKLOG_S:
            return
        self._counted_at = now
        await self._read(None)
        if self._cursor is not None:
            self.pending_rows, self.pending_s = await self.outbox.backlog(self._cursor)

    async def _housekeeping(self) -> None:
        now = self.clock()
        if now - self._pruned_at < PRUNE_S * (0.8 + 0.4 * self._jitter()):
            return
        self._pruned_at = now
        try:
            await self.outbox.prune()
        except OutboxError as error:
            log.info("old rows of the outbox could not be deleted: %s", error)
