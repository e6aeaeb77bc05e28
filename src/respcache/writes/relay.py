"""The outbox relay: how this process proves, again and again, that it has seen every committed
write. ``core/serving_lease.py`` gives the reasons.

When nothing was written, a relay cycle costs one round trip to the cache server and one to the
database. Writes of other processes cost one bump per tenant more. No request waits for a cycle,
except a write whose bump was not confirmed.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from respcache.writes.coverage import TableCoverage

log = logging.getLogger("respcache")

SAVE_CURSOR_S = 30.0
"""How old the cursor in the stored epoch may become. A process that starts replays what came after
it."""

RETRY_SHARE = 0.25
"""After a failed cycle the next one follows after this share of the usual pause."""

PRUNE_S = 5.0
LOST_AUTHORITY_S = 30.0
"""A server that has lost the authority is not claimed again for this long, so that two servers
cannot alternate."""

MAX_STEPS = 6
"""How often a cycle is repeated after it changed its own premises (a new epoch, a claim,
``until``)."""

BACKLOG_S = 0.5
"""How often waiting rows are counted while the cache server is unavailable."""

Rows = Sequence[tuple[str, str, str]]
"""Rows of the outbox: (tenant, tag, id)."""

OnInvalidated = Callable[[Rows, Outcome, float], None]
"""Called with the bumped rows (id "" where a row has none), the outcome, and the seconds since the
COMMIT."""


class Outbox(Protocol):
    """What the relay needs of a database. Every call is bounded in time or raises
    ``OutboxError``."""

    lease_s: float
    own_rows: str
    """SQL that yields one value: the rows that the running transaction has left, as JSON arrays
    [tenant, tag, id] separated by commas."""

    async def page(self, after: Cursor | None) -> OutboxPage:
        """Read, in one snapshot, the rows that the cursor has not seen (none for None) and the
        fence row."""
        ...

    async def backlog(self, after: Cursor) -> tuple[int, float]:
        """Return the number of rows that the cursor has not seen, capped just above what a cycle
        replays, and the age of the oldest in seconds."""
        ...

    async def claim(self, identity: str, *, instead_of: str | None) -> None:
        """Make a server the authority if ``instead_of`` still is."""
        ...

    async def record(self, identity: str) -> None:
        """Move ``until`` to more than a lease ahead, if this server is the effective
        authority."""
        ...

    async def remaining_s(self) -> float:
        """Return for how long any serving lease can still be alive."""
        ...

    async def note(self, pairs: Iterable[tuple[str, str]]) -> Rows:
        """Insert and commit rows for (tenant, tag); return them with their ids."""
        ...

    async def prune(self) -> int:
        """Delete some rows that no process needs, and rows that came with another database's dump;
        return how many."""
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...


boottime: Callable[[], float] = partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)
"""A clock in seconds that continues while the machine is suspended, where the system has one."""


@dataclass(slots=True)
class RelayCounters:
    """What the relay has done since the process started, and what is wrong now."""

    cycles: int = 0
    """Cycles that granted a serving lease."""
    failed: int = 0
    epochs: int = 0
    """Epochs that this process began."""
    pending_rows: int = 0
    pending_s: float = 0.0
    """Age of the oldest pending row."""
    problem: str = "no relay cycle has been completed yet"
    """Why the last cycle failed; empty after a success."""


class _Waiters:
    """Callers that wait for a cycle that begins after a given moment."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        """Set when a cycle should begin at once."""
        self._since: dict[asyncio.Future[None], float] = {}

    @contextlib.contextmanager
    def wait(self, since: float) -> Iterator[asyncio.Future[None]]:
        """Yield a future that is done after a cycle that began at or after ``since``."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._since[future] = since
        try:
            yield future
        finally:
            self._since.pop(future, None)

    def release(self, began: float, *, safe: bool) -> None:
        """Report a completed cycle; ``safe``: no serving lease of an earlier epoch is alive."""
        for future, since in self._since.items():
            if began < since:
                self.wanted.set()
            elif safe and not future.done():
                future.set_result(None)


class OutboxRelay:
    """The relay of one process. ``lease`` and ``tables`` are read on every request.

    It has more than 15 attributes: ``_epoch``, ``_adopted_at``, ``_cursor`` and ``_applied`` are
    the state of the protocol, and are read and changed only together, by the methods below.
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
        self.counters = RelayCounters()
        self.coverage = TableCoverage()
        self.tracing = Tracing()
        self.on_bumped: OnInvalidated | None = None
        """Called with the rows that a cycle found and bumped."""
        self._store = store
        self._ttl_ms = generation_ttl_ms
        self._period_s = period_s
        self._jitter = jitter
        self._token = token
        self._epoch: Epoch | None = None
        self._adopted_at = float("-inf")
        self._cursor: Cursor | None = None
        # ids of rows that were bumped here and that no cycle has met yet
        self._applied: OrderedDict[str, None] = OrderedDict()
        self._vouched_at = float("-inf")  # m0 of the last completed cycle
        self._lost_authority: tuple[str, float] = ("", float("-inf"))
        self._pruned_at = float("-inf")
        self._counted_at = float("-inf")
        self._waiters = _Waiters()
        self._running: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether this process may serve from the cache now."""
        return self.clock() < self.lease.until

    @property
    def age_s(self) -> float | None:
        """How long ago the moment is up to which this process has seen every write; None before
        the first completed cycle."""
        return self.clock() - self._vouched_at if self.counters.cycles else None

    @property
    def tables(self) -> frozenset[str]:
        """The tables whose writes leave rows."""
        return self.coverage.tables

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics of the relay: the serving lease, pending rows, the last
        problem."""
        age_s, counters = self.age_s, self.counters
        return {
            "alive": self.alive,
            "age_s": None if age_s is None else round(age_s, 3),
            "lease_s": self.outbox.lease_s,
            "cycles": counters.cycles,
            "cycles_failed": counters.failed,
            "epochs_begun": counters.epochs,
            "pending_rows": counters.pending_rows,
            "pending_s": round(counters.pending_s, 3),
            "problem": counters.problem,
            "tables": sorted(self.tables),
            "unsound_tables": sorted(self.coverage.unsound),
        }

    def covers(self, tables: Iterable[str]) -> bool:
        """Return whether writes to all of these tables leave rows."""
        return self.coverage.covers(tables)

    def may_be_cached(self, table: str) -> bool:
        """See ``TableCoverage.may_be_cached``."""
        return self.coverage.may_be_cached(table, now=self.clock(), lease_s=self._lease_s)

    def anything_may_be_cached(self) -> bool:
        """See ``TableCoverage.anything_may_be_cached``."""
        return self.coverage.anything_may_be_cached(now=self.clock(), lease_s=self._lease_s)

    async def start(self) -> None:
        """Run the first cycle, then continue in the background. An unavailable server raises
        nothing."""
        await self._once()
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop, and give up the serving lease at once."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        self.lease = ServingLease()
        await self.outbox.close()

    def applied(self, rows: Rows, server: str) -> None:
        """Record that these rows were bumped on this server life, so that the next cycle need not
        bump them again."""
        if self._epoch is not None and server == self._epoch.server:
            self._applied.update((row, None) for _, _, row in rows)
            # the oldest were met by a cycle that was faster than this call
            while len(self._applied) > MAX_ROWS:
                self._applied.popitem(last=False)

    async def safe(self, since: float) -> Outcome:
        """Return when no process can serve data from before ``since``, a moment of ``clock`` after
        a COMMIT.

        That is the case when a cycle that began later has been completed here in an epoch older
        than a lease: it bumped the rows of that commit, or every serving lease that misses them
        has ended. Or when no such lease can be alive: a lease after the COMMIT at most, and at once
        when the cache server has been unavailable for longer.
        """
        with self._waiters.wait(since) as caught_up:
            self._waiters.wanted.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    max(0.0, since + self.outbox.lease_s * DRIFT - self.clock())
                ):
                    remaining_s = await self._remaining_s()
                    await asyncio.wait({caught_up}, timeout=remaining_s * DRIFT)
            return Outcome.CONFIRMED if caught_up.done() else Outcome.SAFE

    async def caught_up(self) -> None:
        """Return when a cycle that began after this call has been completed: everything committed
        by now has been bumped. Waits without limit until that happens."""
        with self._waiters.wait(self.clock()) as future:
            await future

    async def _remaining_s(self) -> float:
        try:
            return max(0.0, await self.outbox.remaining_s())
        except OutboxMissing:
            # since the first cycle that found it missing, no process has completed one
            missing_since = self.coverage.missing_since
            return (
                self._lease_s
                if missing_since is None
                else max(0.0, missing_since + self._lease_s - self.clock())
            )
        except OutboxError:
            return self.outbox.lease_s

    @property
    def _lease_s(self) -> float:
        """How long, by this clock, serving leases of other hosts may outlive what ended here."""
        return self.outbox.lease_s * DRIFT

    async def _run(self) -> None:
        while True:
            pause_s = self._period_s * (0.8 + 0.4 * self._jitter())
            if self.counters.problem:
                pause_s *= RETRY_SHARE
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._waiters.wanted.wait(), pause_s)
            self._waiters.wanted.clear()
            await self._once()
            await self._prune()

    async def _once(self) -> None:
        """Run a cycle, and repeat it while it changes its own premises. Failures are kept in
        ``counters.problem``."""
        counters = self.counters
        try:
            for _ in range(MAX_STEPS):
                if await self._cycle():
                    return
            raise OutboxError(counters.problem)
        except (StoreError, OutboxError) as error:
            counters.failed += 1
            if counters.problem != str(error) and counters.cycles:
                log.info("relay cycle not completed: %s", error)
            counters.problem = str(error)
        except Exception as error:
            counters.failed += 1
            counters.problem = f"{type(error).__name__}: {error}"
            log.exception(
                "a relay cycle failed unexpectedly; nothing is served from the cache until one "
                "succeeds"
            )

    async def _cycle(self) -> bool:
        """Try a cycle once. Return whether it granted a serving lease; False: repeat at once.
        Raises when repeating is of no use."""
        m0 = self.clock()
        try:
            record, identity = await self._store.epoch()
        except StoreError:
            await self._count_backlog()
            raise
        epoch = record if record is not None and record.identity == identity else None
        if epoch is not None:
            self._adopt(epoch)
        page = await self._read(None if epoch is None else self._cursor)
        if page.foreign:
            await self.outbox.prune()
            if page.pruned_ahead:
                self.counters.problem = "numbers of another database were deleted"
                return False
        if epoch is None or self._cursor is None:
            reason: str | None = "there is none on this server"
        else:
            reason = outdated(epoch, self._cursor, page)
        if reason is not None:
            if not await self._renew(epoch, identity, page, reason=reason):
                self.counters.problem = "another process has begun an epoch"
                return False
        else:
            found = [row for row in page.rows if row[2] not in self._applied]
            await self._bump(by_tenant(found))
            if found and self.on_bumped is not None:
                self.on_bumped(found, Outcome.CONFIRMED, page.oldest_s + self.clock() - m0)
            self._cursor = page.cursor
            for _, _, row in page.rows:
                self._applied.pop(row, None)
        self.counters.pending_rows, self.counters.pending_s = 0, 0.0
        return await self._step(page, identity, m0=m0, record=record)

    async def _read(self, after: Cursor | None) -> OutboxPage:
        """Read a page, and update coverage and pending rows from it."""
        try:
            page = await self.outbox.page(after)
        except OutboxMissing:
            self.coverage.lose(now=self.clock(), lease_s=self._lease_s)
            raise
        self.coverage.update(page, now=self.clock(), lease_s=self._lease_s)
        self.counters.pending_rows, self.counters.pending_s = len(page.rows), page.oldest_s
        return page

    async def _step(
        self, page: OutboxPage, identity: str, *, m0: float, record: Epoch | None
    ) -> bool:
        step = next_step(page, identity)
        if step is RelayStep.CLAIM:
            await self._claim(page, identity)
            self.counters.problem = "the authority was claimed"
            return False
        if step is RelayStep.WAIT:
            raise OutboxError(
                "this server is the authority, but serving leases of the former one may be alive"
            )
        if step is RelayStep.RECORD:
            await self.outbox.record(identity)
            self.counters.problem = "until was recorded"
            return False
        self._grant(m0)
        if page.expiring:  # early enough that no later cycle has to be repeated for it
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
        self._vouched_at = max(self._vouched_at, m0)
        self.counters.cycles += 1
        self.counters.problem = ""
        # rows older than the epoch were not bumped: other processes' leases of the former epoch
        # must have ended
        self._waiters.release(m0, safe=self.clock() >= self._adopted_at + self._lease_s)

    def _adopt(self, epoch: Epoch) -> None:
        """Use this epoch from now on, beginning at its cursor."""
        if self._epoch is None or (self._epoch.token, self._epoch.identity) != (
            epoch.token,
            epoch.identity,
        ):
            self._epoch, self._cursor = epoch, epoch.cursor
            self._adopted_at = self.clock()
            self._applied.clear()
            self._store.adopt(epoch.token)

    async def _renew(
        self, old: Epoch | None, identity: str, page: OutboxPage, *, reason: str
    ) -> bool:
        """Begin a new epoch from this page's snapshot; return False if another process was
        faster."""
        proposed = Epoch(self._token(), identity, page.incarnation, page.cursor)
        stored, named = await self._store.epoch(
            proposed, replacing="" if old is None else old.token, ttl_ms=self._ttl_ms
        )
        if stored != proposed or named != identity:
            return False
        log.log(
            logging.INFO if old is None else logging.WARNING,
            "a new epoch begins, everything cached is invalid: %s",
            reason,
        )
        self.counters.epochs += 1
        self._adopt(proposed)
        return True

    async def _bump(self, due: Mapping[str, DueBump]) -> None:
        """Bump what is due. Raises ``StoreError`` unless this very server life, in this epoch,
        confirmed all of it."""
        assert self._epoch is not None
        if not due:
            return
        with self.tracing.invalidation(tenants=len(due), cause="outbox") as trace:
            for found in (await self.bumps.send(due)).values():
                if isinstance(found, StoreError):
                    raise found
                if found.server != self._epoch.server:
                    raise StoreUnavailable("the server changed during a relay cycle")
            trace(Outcome.CONFIRMED)

    async def _claim(self, page: OutboxPage, identity: str) -> None:
        now = self.clock()
        if (
            page.authority is not None
            and self.lease.server.endswith(f":{identity}")
            and self._lost_authority[0] != identity
        ):
            self._lost_authority = (identity, now)
        lost, lost_at = self._lost_authority
        if lost == identity and now - lost_at < LOST_AUTHORITY_S:
            raise OutboxError("another server has become the authority")
        self._lost_authority = ("", now)
        await self.outbox.claim(identity, instead_of=page.authority)

    async def _save_cursor(self) -> None:
        assert self._epoch is not None
        assert self._cursor is not None
        epoch = Epoch(
            self._epoch.token, self._epoch.identity, self._epoch.incarnation, self._cursor
        )
        await self._store.epoch(epoch, replacing=epoch.token, ttl_ms=self._ttl_ms)

    async def _count_backlog(self) -> None:
        """While the cache server is unavailable, count the pending rows for the statistics, and
        update the coverage of tables."""
        now = self.clock()
        if now - self._counted_at < BACKLOG_S:
            return
        self._counted_at = now
        await self._read(None)
        if self._cursor is not None:
            self.counters.pending_rows, self.counters.pending_s = await self.outbox.backlog(
                self._cursor
            )

    async def _prune(self) -> None:
        """Delete old rows of the outbox, every ``PRUNE_S`` or so."""
        now = self.clock()
        if now - self._pruned_at < PRUNE_S * (0.8 + 0.4 * self._jitter()):
            return
        self._pruned_at = now
        try:
            await self.outbox.prune()
        except OutboxError as error:
            log.info("old rows of the outbox could not be deleted: %s", error)
