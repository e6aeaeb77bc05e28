"""The feed: what is being invalidated just now, by whom, and how long it took. A capped stream on
the cache's server.

Each process adds what it has bumped: writes of its own, and what a round found in the outbox. Every
process finds the rows of every write there, so these are held back until whoever wrote has
reported, and added only by the first whose rows nobody has reported yet. No write waits for any of
it: an event is put into a list and sent with others, twice a second at most. What is too much for
the list, or cannot be sent, is counted in the next event. While the server is away, the last events
of this process are shown.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from respcache.context import cause, current
from respcache.core.errors import InvalidOperation, StoreError
from respcache.core.generations import FLOOR, module_tag, table_tag
from respcache.core.keys import FED_KEY, FEED_KEY
from respcache.core.serving_lease import Outcome
from respcache.writes.relay import Rows

if TYPE_CHECKING:
    from respcache.cache import Cache
    from respcache.ops.publisher import StatsPublisher

log = logging.getLogger("respcache")

PERIOD_S = 0.5
MAX_AT_ONCE = 20
"""Events that a process sends in a period."""

HELD_S = 1.5
"""For so long what a round found is held back: three periods, in which whoever wrote it reports."""

MAX_HELD = 100
MAX_IDS = 100
"""Rows of one event by which it is known again."""

FED_S = 300
"""For so long the rows of an event are known."""

BEGINNING = "0-0"
MAX_KEPT = 5_000
"""Events in the stream, about."""

MAX_READ = 1_000
"""Events that one request goes through."""

MAX_REMEMBERED = 200
TTL_S = 24 * 3600
MAX_NAMED = 20
"""Tables and modules that an event names."""

OUTBOX = "outbox"
SCRIPT = "script"

MAX_NUMBER = 2**64 - 1
_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One invalidation of one tenant."""

    id: str
    """Of the feed; rises. ``feed(after=id)`` goes on from here."""
    at: datetime
    tenant: str
    """``~shared``: of data that belongs to none; ``~all``: of everybody's (TRUNCATE)."""
    modules: tuple[str, ...] = ()
    """Whose answers can have been made cold."""
    tables: tuple[str, ...] = ()
    everything: bool = False
    """All of the tenant."""
    cause: str
    """``PUT /api/leads/{id}``; ``outbox``: what psql or another service wrote, or a process that
    ended before it could bump; ``purge by <name>``; ``audit``; ``script``: outside of a request."""
    outcome: str
    """``confirmed``, ``pending; safe`` or ``pending`` (``core.fence.Outcome``)."""
    seconds: float
    """From the COMMIT, or of the outbox from when the oldest row was written, to the outcome."""
    process: str
    """Host and process id of who sent the bump. This and what follows is told to those who reach
    all tenants."""
    skipped: int = 0
    """Further invalidations of this process that are not in the feed, since its last event: there
    were too many."""


class Feed(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the feed, the oldest first."""

    events: list[Event]
    last: str
    """Give it as ``after`` to go on."""
    processes: str
    """``all``, or ``this`` where the server is away or is none."""

    def of_one_tenant(self) -> "Feed":
        """Leave out what is of all tenants: workers, and how much more was invalidated, whoever's
        it was."""
        return msgspec.structs.replace(
            self,
            events=[msgspec.structs.replace(event, process="", skipped=0) for event in self.events],
        )


class _Noted(NamedTuple):
    """What is known when something was invalidated; an event is made of it when it is sent. ``by``
    None: the request's work."""

    tenant: str
    tags: Collection[str]
    rows: Collection[str]
    outcome: Outcome
    seconds: float
    at: float
    by: str | None
    request: Mapping[str, Any] | None


class Reporter:
    """Reports what this process invalidates, and reads what all do. For one event loop."""

    def __init__(self, cache: "Cache", publisher: "StatsPublisher") -> None:
        self._cache = cache
        self._publisher = publisher
        self._process = f"{socket.gethostname()}:{os.getpid()}"
        self._waiting: list[_Noted] = []
        self._held: deque[_Noted] = deque(maxlen=MAX_HELD)
        self._last: deque[Event] = deque(maxlen=MAX_REMEMBERED)
        self._skipped = 0
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None

    def note(self, rows: Rows, outcome: Outcome, seconds: float, *, by: str | None = None) -> None:
        """Note what was bumped (tenant, tag, id of the row or nothing). Does no waiting.

        It was caused by ``by``, or else by what this runs for.
        """
        by, exchange = by or cause.get(), current.get()
        request = None if exchange is None else exchange.asgi_scope
        for tenant, (tags, ids) in _by_tenant(rows).items():
            if len(self._waiting) >= MAX_AT_ONCE:
                self._skipped += 1
            else:
                self._waiting.append(
                    _Noted(tenant, tags, ids, outcome, seconds, time.time(), by, request)
                )
        self._arm()

    def found(self, rows: Rows, outcome: Outcome, seconds: float) -> None:
        """Note what a round has found in the outbox and bumped."""
        now = time.time()
        self._held.extend(
            _Noted(tenant, tags, ids, outcome, seconds, now, OUTBOX, None)
            for tenant, (tags, ids) in _by_tenant(rows).items()
        )
        self._arm()

    async def read(self, *, tenant: str | None, after: str, limit: int) -> Feed:
        """Return what came after an event, or the last events. One round trip. Raises
        ``InvalidOperation``."""
        if after and (_ID.fullmatch(after) is None or max(_order(after)) > MAX_NUMBER):
            raise InvalidOperation(
                f"after {after[:40]!r} must be the id of an event, or the 'last' of a feed"
            )

        async def ask(client: Any) -> Any:
            if after:
                return await client.xrange(FEED_KEY, min=f"({after}", count=MAX_READ)
            return (await client.xrevrange(FEED_KEY, count=MAX_READ))[::-1]

        try:
            found = [
                _decode(name.decode(), fields.get(b"e", b""))
                for name, fields in await self._publisher.ask(ask)
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
        """Send what waits, if that is quick."""
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
        if self._waiting or self._held:
            self._arm()

    async def _send(self) -> None:
        """Send what was noted, and of what was found that which nobody else has reported. Two round
        trips."""
        own, self._waiting = self._waiting, []
        found = [self._held.popleft() for _ in range(self._ripe())]
        if not own and not found:
            return
        if self._publisher.client is None:
            self._keep([*own, *found])
            return
        untold = len(own)
        try:
            new = await self._publisher.ask(_marking([*own, *found]))
            fresh = [one for one, is_new in zip(found, new[len(own) :], strict=True) if is_new]
            events = self._keep([*own, *fresh])
            untold = sum(1 + event.skipped for event in events)
            await self._publisher.ask(_adding(events))
        except StoreError:
            self._skipped += untold

    def _ripe(self) -> int:
        """Say how much of what was found has been held for long enough."""
        until = time.time() - HELD_S
        return sum(noted.at <= until for noted in self._held)

    def _keep(self, noted: list[_Noted]) -> list[Event]:
        """Make events of what was noted; the last one says what was too much."""
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
        """Name a request by its route: its path may hold what is nobody's to read."""
        if request is None:
            return SCRIPT
        middleware = self._cache.middleware
        template = None if middleware is None else middleware.prepare().template(request)
        return f"{request['method']} {template or '(a route that is not known)'}"


def _by_tenant(rows: Rows) -> dict[str, tuple[list[str], list[str]]]:
    """Sort rows by tenant, in the order of their names: tags and ids."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for tenant, tag, row in rows:
        tags, ids = found.setdefault(tenant, ([], []))
        if tag not in tags:
            tags.append(tag)
        if row and len(ids) < MAX_IDS:
            ids.append(row)
    return dict(sorted(found.items()))


def _marking(noted: Sequence[_Noted]) -> Callable[[Any], Awaitable[list[bool]]]:
    """Mark rows as reported; tell of each whether something of it was not yet, or has no rows."""

    async def ask(client: Any) -> list[bool]:
        seconds, _ = await client.time()
        pipeline = client.pipeline(transaction=False)
        marked = [position for position, one in enumerate(noted) if one.rows]
        for position in marked:
            pipeline.zadd(FED_KEY, dict.fromkeys(noted[position].rows, seconds))
        pipeline.zremrangebyscore(FED_KEY, 0, seconds - FED_S)
        pipeline.expire(FED_KEY, FED_S)
        replies = await pipeline.execute()
        new = dict(zip(marked, replies, strict=False))
        return [bool(new.get(position, True)) for position in range(len(noted))]

    return ask


def _adding(events: Sequence[Event]) -> Callable[[Any], Awaitable[None]]:
    async def ask(client: Any) -> None:
        pipeline = client.pipeline(transaction=False)
        for event in events:
            pipeline.xadd(
                FEED_KEY, {"e": msgspec.json.encode(event)}, maxlen=MAX_KEPT, approximate=True
            )
        pipeline.expire(FEED_KEY, TTL_S)
        await pipeline.execute()

    return ask


def _decode(name: str, data: bytes) -> Event | None:
    """Read an event back, or return None for what another release wrote."""
    try:
        return msgspec.structs.replace(msgspec.json.decode(data, type=Event), id=name)
    except msgspec.MsgspecError:
        return None


def _order(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("-"))
