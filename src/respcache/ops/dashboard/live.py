"""Live figures: server-sent events (HTML Living Standard, section 9.2) for the overview, for a
tenant, for the feed.

A stream asks ``ops/admin.py`` as its viewer would, again and again, and asks the gate whether the
viewer still may. It ends when the session has ended (event ``end``), and after ``MAX_S`` in any
case: browsers come back by themselves.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from respcache.core.errors import OperationError, StoreError
from respcache.ops.admin import Admin
from respcache.ops.dashboard import view
from respcache.ops.dashboard.api import numbers, refusal, say_no
from respcache.ops.dashboard.auth import Authenticator, AuthUnavailable, Viewer
from respcache.ops.dashboard.layout import PageRenderer
from respcache.ops.figures import Row

FIGURES_S = 2.0
FEED_S = 0.5
ASK_GATE_S = 10.0
MAX_S = 600.0
MAX_STREAMS = 64
"""Of one process; beyond them pages are told to come back later, and can be loaded anew by hand."""

TOO_MANY = "Too many pages are open: load this one anew for new figures"
EVENTS_AT_ONCE = 50

log = logging.getLogger("respcache")

Event = tuple[str, str]
RelayStep = Callable[[Viewer], Awaitable[list[Event]]]


class Live:
    """The streams."""

    def __init__(self, admin: Admin, authenticator: Authenticator, pages: PageRenderer) -> None:
        self._admin = admin
        self._authenticator = authenticator
        self._pages = pages
        self.streams = 0
        self._closing = asyncio.Event()

    def routes(self) -> list[BaseRoute]:
        """Return their routes."""
        return [
            Route("/live", self.counters, methods=["GET"]),
            Route("/live/feed", self.feed, methods=["GET"]),
        ]

    def close(self) -> None:
        """End all streams: for a server that shuts down."""
        self._closing.set()

    async def counters(self, request: Request) -> Response:
        """Stream the figures of everything, or of a tenant (``tenant=``)."""
        return await self._stream(request, self._figures_of, FIGURES_S)

    async def feed(self, request: Request) -> Response:
        """Stream invalidations as rows of the feed, from ``after=`` on."""
        return await self._stream(request, self._feed_of, FEED_S)

    # -- what is said ------------------------------------------------------------------------------

    def _figures_of(self, request: Request, viewer: Viewer) -> RelayStep:
        tenant = viewer.tenant(request.query_params.get("tenant", "")) or viewer.access.tenant
        if tenant is not None:
            return self._tenant(tenant)
        minutes = numbers(request, "minutes").get("minutes", 60)

        async def step(viewer: Viewer) -> list[Event]:
            nonlocal minutes
            overview = await self._admin.overview(viewer.access, minutes=minutes)
            minutes = 1  # what came before is on the page already
            text = view.texts([*view.tiles(overview), *view.states(overview)])
            return [("figures", _json({"text": text, "columns": view.columns(overview.series)}))]

        return step

    def _tenant(self, tenant: str) -> RelayStep:
        before: tuple[float, Row] | None = None

        async def step(viewer: Viewer) -> list[Event]:
            nonlocal before
            row, now = await self._admin.tenant(viewer.access, tenant), time.time()
            columns = {} if before is None else _since(*before, row, now)
            before = (now, row)
            return [
                ("figures", _json({"text": view.texts(view.tenant_tiles(row)), "columns": columns}))
            ]

        return step

    def _feed_of(self, request: Request, viewer: Viewer) -> RelayStep:
        tenant, after = (
            viewer.tenant(request.query_params.get("tenant", "")),
            request.query_params.get("after", ""),
        )
        after = request.headers.get("last-event-id", after)

        async def step(viewer: Viewer) -> list[Event]:
            nonlocal after
            feed = await self._admin.feed(
                viewer.access, after=after, tenant=tenant, limit=EVENTS_AT_ONCE
            )
            after = feed.last
            if not feed.events:
                return []
            rows = self._pages.text(
                request, "feed_rows.html", viewer=viewer, events=feed.events[::-1]
            )
            return [("rows", _json({"html": rows, "last": feed.last}))]

        return step

    # -- how it is said ----------------------------------------------------------------------------

    async def _stream(
        self, request: Request, begin: Callable[[Request, Viewer], RelayStep], every_s: float
    ) -> Response:
        viewer = await self._authenticator.by_cookie(request)
        if viewer is None:
            return say_no(401, "unauthenticated", "The session has ended")
        if self.streams >= MAX_STREAMS:
            return say_no(503, "unavailable", TOO_MANY)
        try:
            step = begin(request, viewer)
            first = await step(viewer)
        except (OperationError, StoreError) as error:
            return say_no(*refusal(error, viewer.access))
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(
            self._events(request, viewer, step, first, every_s),
            media_type="text/event-stream",
            headers=headers,
        )

    async def _events(
        self, request: Request, viewer: Viewer, step: RelayStep, events: list[Event], every_s: float
    ) -> AsyncIterator[str]:
        if self.streams >= MAX_STREAMS:  # others were let in while the first figures were read
            yield _event(("problem", _json({"message": TOO_MANY})))
            return
        self.streams += 1
        try:
            now = asyncio.get_running_loop().time
            began, asked = now(), now()
            yield "retry: 3000\n\n" + "".join(map(_event, events))
            while now() - began < MAX_S and not await self._closed_within(every_s):
                if now() - asked > ASK_GATE_S:
                    asked = now()
                    still = await self._authenticator.by_cookie(request)
                    if still is None or still.access != viewer.access:
                        yield _event(("end", "{}"))
                        return
                try:
                    yield "".join(map(_event, await step(viewer))) or ": nothing new\n\n"
                except (OperationError, StoreError) as error:
                    yield _event(("problem", _json({"message": refusal(error, viewer.access)[2]})))
        except AuthUnavailable:
            return
        finally:
            self.streams -= 1

    async def _closed_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._closing.wait()
        except TimeoutError:
            return False


def _since(then: float, before: Row, row: Row, now: float) -> dict[str, view.Column]:
    """Return what a tenant did since the last look, as rates per second; a worker that ended takes
    its figures along."""
    seconds = max(0.001, now - then)

    def rate(count: int, earlier: int) -> float:
        return max(0, count - earlier) / seconds

    return {
        "at": [round(now)],
        "hits": [rate(row.hits, before.hits)],
        "misses": [rate(row.misses, before.misses)],
        "bypasses": [rate(sum(row.bypasses.values()), sum(before.bypasses.values()))],
    }


def _event(event: Event) -> str:
    name, data = event
    return f"event: {name}\ndata: {data}\n\n"


def _json(data: Any) -> str:
    return msgspec.json.encode(data).decode()
