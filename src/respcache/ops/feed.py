"""The feed of invalidations: what was invalidated, its cause, and how long it took. It is a capped
stream on the cache server.

Each process adds what it has bumped: for its own writes, and for rows that its relay cycle found in
the outbox. Every process finds the rows of every write there, so these are held back until the
process that wrote them has reported them; then they are added by the first process whose rows are
still unreported. No write waits for the feed: an event is appended to a list, and the list is sent
at most twice a second. Events that do not fit into the list, or cannot be sent, are counted in the
next event. While the server is unavailable, readers get the last events of their own process.
"""

import asyncio
import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from respcache.cache import Cache
from respcache.context import cause, current
from respcache.core.errors import InvalidOperation, StoreError
from respcache.core.generations import FLOOR, module_tag, table_tag
from respcache.core.keys import FED_KEY, FEED_KEY
from respcache.core.serving_lease import Outcome
from respcache.ops.stats.publisher import StatsPublisher
from respcache.writes.relay import Rows

log = logging.getLogger("respcache")

PERIOD_S = 0.5
MAX_AT_ONCE = 20
"""Events that a process sends in a period."""

HOLD_BACK_S = 1.5
"""How long rows from the outbox are held back: three periods, in which their writer reports them.
"""

MAX_HELD_BACK = 100
MAX_IDS = 100
"""Row ids that are kept for one event, to recognize it."""

REPORTED_S = 300
"""How long row ids are kept."""

BEGINNING = "0-0"
MAX_KEPT = 5_000
"""Approximate number of events in the stream."""

MAX_READ = 1_000
"""Events that one request reads."""

MAX_REMEMBERED = 200
TTL_S = 24 * 3600
MAX_NAMED = 20
"""Tables, and modules, that an event names."""

OUTBOX = "outbox"
SCRIPT = "script"

MAX_NUMBER = 2**64 - 1
_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One invalidation of one tenant."""

    id: str
    """Increases along the feed. ``feed(after=id)`` continues from here."""
    at: datetime
    tenant: str
    """``~shared`` for data that belongs to no tenant; ``~all`` for all tenants (TRUNCATE)."""
    modules: tuple[str, ...] = ()
    """Modules whose responses may have been invalidated."""
    tables: tuple[str, ...] = ()
    everything: bool = False
    """Whether all responses of the tenant were invalidated."""
    cause: str
    """``PUT /api/leads/{id}``; ``outbox``: a write by psql, another service, or a process that
    ended before it could bump; ``purge by <name>``; ``verifier``; ``script``: outside of a request.
    """
    outcome: str
    """``confirmed``, ``pending; safe`` or ``pending`` (``core.serving_lease.Outcome``)."""
    seconds: float
    """From the COMMIT to the outcome; for ``outbox`` from the time of the oldest row."""
    process: str
    """Host and process id of the process that bumped. Empty, as is the next, for the admin of one
    tenant."""
    skipped: int = 0
    """Invalidations of this process since its last event that are not in the feed, because there
    were too many."""


class Feed(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the feed, the oldest event first."""

    events: list[Event]
    last: str
    """Pass it as ``after`` to continue."""
    processes: str
    """``all``; or ``this`` if the server is unavailable or none is configured."""

    def of_one_tenant(self) -> "Feed":
        """Remove what concerns all tenants: processes, and counts of skipped invalidations."""
        return msgspec.structs.replace(
            self,
            events=[msgspec.structs.replace(event, process="", skipped=0) for event in self.events],
        )


class _Noted(NamedTuple):
    """An invalidation from which an event is created when it is sent. ``by`` is its cause; None
    means the request."""

    tenant: str
    tags: Collection[str]
    rows: Collection[str]
    outcome: Outcome
    seconds: float
    at: float
    by: str | None
    request: Mapping[str, Any] | None


class Reporter:
    """Adds the invalidations of this process to the feed, and reads it. For one event loop."""

    def __init__(self, cache: Cache, publisher: StatsPublisher) -> None:
        self._cache = cache
        self._publisher = publisher
        self._process = f"{socket.gethostname()}:{os.getpid()}"
        self._waiting: list[_Noted] = []
        self._held_back: deque[_Noted] = deque(maxlen=MAX_HELD_BACK)
        self._last: deque[Event] = deque(maxlen=MAX_REMEMBERED)
        self._skipped = 0
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None

    def note(self, rows: Rows, outcome: Outcome, seconds: float, *, by: str | None = None) -> None:
        """Note bumped rows (tenant, tag, row id or ``""``). Does not block.

        Their cause is ``by``, else the context variable ``cause``, else the current request.
        """
        by, exchange = by or cause.get(), current.get()
        request = None if exchange is None else exchange.request
        for tenant, (tags, ids) in _by_tenant(rows).items():
            if len(self._waiting) >= MAX_AT_ONCE:
                self._skipped += 1
            else:
                self._waiting.append(
                    _Noted(tenant, tags, ids, outcome, seconds, time.time(), by, request)
                )
        self._arm()

    def found(self, rows: Rows, outcome: Outcome, seconds: float) -> None:
        """Note rows that a relay cycle found in the outbox and bumped. Does not block."""
        now = time.time()
        self._held_back.extend(
            _Noted(tenant, tags, ids, outcome, seconds, now, OUTBOX, None)
            for tenant, (tags, ids) in _by_tenant(rows).items()
        )
        self._arm()

    async def read(self, *, tenant: str | None, after: str, limit: int) -> Feed:
        """Return the events after an event id, or the last events if it is empty. One round trip.

        Raises ``InvalidOperation`` for a malformed id.
        """
        if after and (_ID.fullmatch(after) is None or max(_order(after)) > MAX_NUMBER):
            raise InvalidOperation(
                f"after {after[:40]!r} must be the id of an event, or the 'last' of a feed"
            )

        async def query(client: Any) -> Any:
            if after:
                return await client.xrange(FEED_KEY, min=f"({after}", count=MAX_READ)
            return (await client.xrevrange(FEED_KEY, count=MAX_READ))[::-1]

        try:
            found = [
                _decode(name.decode(), fields.get(b"e", b""))
                for name, fields in await self._publisher.ask(query)
            ]
            processes = "all"
        except StoreError:
            self._keep(self._waiting)
            found = [event for event in self._last if not after or _order(event.id) > _order(after)]
            processes = "this"
        wanted = [event for event in found if event is not None and tenant in (None, event.tenant)]
        chosen = wanted[:limit] if after else wanted[-limit:]
        if len(chosen) < len(wanted) and after:
            last = chosen[-1].id
        else:
            last = next(
                (event.id for event in reversed(found) if event is not None), after or BEGINNING
            )
        return Feed(events=chosen, last=last, processes=processes)

    async def close(self) -> None:
        """Send the waiting events; give up at the publisher's deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sending is not None:
            await asyncio.gather(self._sending, return_exceptions=True)
        await self._send()

    def _arm(self) -> None:
        if self._timer is None and self._sending is None:
            self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._sending = asyncio.ensure_future(self._send())
        self._sending.add_done_callback(self._ended)

    def _ended(self, sent: "asyncio.Task[None]") -> None:
        self._sending = None
        if not sent.cancelled() and sent.exception() is not None:
            log.error("invalidations could not be reported", exc_info=sent.exception())
        if self._waiting or self._held_back:
            self._arm()

    async def _send(self) -> None:
        """Send noted invalidations, and those from the outbox that no process has reported. Two
        round trips."""
        own, self._waiting = self._waiting, []
        found = [self._held_back.popleft() for _ in range(self._ripe())]
        if not own and not found:
            return
        if self._publisher.client is None:
            self._keep([*own, *found])
            return
        unsent = len(own)
        try:
            is_new = await self._publisher.ask(_mark_reported([*own, *found]))
            fresh = [one for one, new in zip(found, is_new[len(own) :], strict=True) if new]
            events = self._keep([*own, *fresh])
            unsent = sum(1 + event.skipped for event in events)
            await self._publisher.ask(_add_to_stream(events))
        except StoreError:
            self._skipped += unsent

    def _ripe(self) -> int:
        """Count the invalidations that have been held back for long enough."""
        until = time.time() - HOLD_BACK_S
        return sum(noted.at <= until for noted in self._held_back)

    def _keep(self, noted: list[_Noted]) -> list[Event]:
        """Create and remember events; add the count of skipped ones to the last."""
        events = [self._event(one) for one in noted]
        noted.clear()
        if events:
            events[-1] = msgspec.structs.replace(events[-1], skipped=self._skipped)
            self._skipped = 0
        self._last.extend(events)
        return events

    def _event(self, noted: _Noted) -> Event:
        self._number += 1
        tables = sorted(
            tag.removeprefix(table_tag("")) for tag in noted.tags if tag.startswith(table_tag(""))
        )
        modules = {
            tag.removeprefix(module_tag("")) for tag in noted.tags if tag.startswith(module_tag(""))
        }
        modules.update(self._cache.registry.readers(tables))
        return Event(
            id=f"{int(noted.at * 1000)}-{self._number}",
            at=datetime.fromtimestamp(noted.at, UTC),
            tenant=noted.tenant,
            modules=tuple(sorted(modules)[:MAX_NAMED]),
            tables=tuple(tables[:MAX_NAMED]),
            everything=FLOOR in noted.tags,
            cause=noted.by or self._described(noted.request),
            outcome=str(noted.outcome),
            seconds=round(noted.seconds, 6),
            process=self._process,
        )

    def _described(self, request: Mapping[str, Any] | None) -> str:
        """Name a request by its route, because its path may contain personal data."""
        if request is None:
            return SCRIPT
        middleware = self._cache.middleware
        template = None if middleware is None else middleware.prepare().template(request)
        return f"{request['method']} {template or '(unknown route)'}"


def _by_tenant(rows: Rows) -> dict[str, tuple[list[str], list[str]]]:
    """Group rows by tenant, ordered by name; return tags and row ids."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for tenant, tag, row in rows:
        tags, ids = found.setdefault(tenant, ([], []))
        if tag not in tags:
            tags.append(tag)
        if row and len(ids) < MAX_IDS:
            ids.append(row)
    return dict(sorted(found.items()))


def _mark_reported(noted: Sequence[_Noted]) -> Callable[[Any], Awaitable[list[bool]]]:
    """Return a query that marks rows as reported.

    For each invalidation it returns whether one of its rows was unreported, or it has no rows.
    """

    async def query(client: Any) -> list[bool]:
        seconds, _ = await client.time()
        pipeline = client.pipeline(transaction=False)
        marked = [position for position, one in enumerate(noted) if one.rows]
        for position in marked:
            pipeline.zadd(FED_KEY, dict.fromkeys(noted[position].rows, seconds))
        pipeline.zremrangebyscore(FED_KEY, 0, seconds - REPORTED_S)
        pipeline.expire(FED_KEY, REPORTED_S)
        replies = await pipeline.execute()
        new = dict(zip(marked, replies, strict=False))
        return [bool(new.get(position, True)) for position in range(len(noted))]

    return query


def _add_to_stream(events: Sequence[Event]) -> Callable[[Any], Awaitable[None]]:
    async def query(client: Any) -> None:
        pipeline = client.pipeline(transaction=False)
        for event in events:
            pipeline.xadd(
                FEED_KEY, {"e": msgspec.json.encode(event)}, maxlen=MAX_KEPT, approximate=True
            )
        pipeline.expire(FEED_KEY, TTL_S)
        await pipeline.execute()

    return query


def _decode(name: str, data: bytes) -> Event | None:
    """Return an event; None if another release wrote it in another form."""
    try:
        return msgspec.structs.replace(msgspec.json.decode(data, type=Event), id=name)
    except msgspec.MsgspecError:
        return None


def _order(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("-"))
