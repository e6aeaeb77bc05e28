"""Live statistics as server-sent events (HTML Living Standard, section 9.2), for the overview, a
tenant, and the feed.

A stream repeatedly calls ``ops/admin.py`` with the access of its viewer, and checks the session
again every ``RECHECK_S``. It ends when the session has ended (event ``end``), and after ``MAX_S``;
browsers reconnect by themselves.
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
from respcache.ops.dashboard.api import describe_error, error_response, numbers
from respcache.ops.dashboard.auth import Authenticator, AuthUnavailable, Viewer
from respcache.ops.dashboard.layout import PageRenderer
from respcache.ops.stats.rows import StatsRow

STATS_S = 2.0
FEED_S = 0.5
RECHECK_S = 10.0
MAX_S = 600.0
MAX_STREAMS = 64
"""Streams of one process. Further pages show a message, and can be reloaded by hand."""

TOO_MANY = "Too many pages are open: reload this page for new statistics"
EVENTS_AT_ONCE = 50

log = logging.getLogger("respcache")

Event = tuple[str, str]
Step = Callable[[Viewer], Awaitable[list[Event]]]


class LiveStreams:
    """The streams of live statistics."""

    def __init__(self, admin: Admin, authenticator: Authenticator, renderer: PageRenderer) -> None:
        self._admin = admin
        self._authenticator = authenticator
        self._renderer = renderer
        self.streams = 0
        self._closing = asyncio.Event()

    def routes(self) -> list[BaseRoute]:
        """Return the routes of the streams."""
        return [
            Route("/live", self.stats, methods=["GET"]),
            Route("/live/feed", self.feed, methods=["GET"]),
        ]

    def close(self) -> None:
        """End all streams, for a server that shuts down."""
        self._closing.set()

    async def stats(self, request: Request) -> Response:
        """Stream the overview, or the statistics of one tenant (``tenant=``)."""
        return await self._stream(request, self._stats_step, STATS_S)

    async def feed(self, request: Request) -> Response:
        """Stream invalidations as rows of the feed, from ``after=`` on."""
        return await self._stream(request, self._feed_step, FEED_S)

    # -- events ------------------------------------------------------------------------------------

    def _stats_step(self, request: Request, viewer: Viewer) -> Step:
        tenant = viewer.tenant(request.query_params.get("tenant", "")) or viewer.access.tenant
        if tenant is not None:
            return self._tenant_step(tenant)
        minutes = numbers(request, "minutes").get("minutes", 60)

        async def step(viewer: Viewer) -> list[Event]:
            nonlocal minutes
            overview = await self._admin.overview(viewer.access, minutes=minutes)
            minutes = 1  # the page already has the earlier points
            text = view.texts([*view.tiles(overview), *view.states(overview)])
            return [("stats", _json({"text": text, "columns": view.columns(overview.series)}))]

        return step

    def _tenant_step(self, tenant: str) -> Step:
        before: tuple[float, StatsRow] | None = None

        async def step(viewer: Viewer) -> list[Event]:
            nonlocal before
            row, now = await self._admin.tenant(viewer.access, tenant), time.time()
            columns = {} if before is None else _rates_since(*before, row=row, now=now)
            before = (now, row)
            return [
                ("stats", _json({"text": view.texts(view.tenant_tiles(row)), "columns": columns}))
            ]

        return step

    def _feed_step(self, request: Request, viewer: Viewer) -> Step:
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
            rows = self._renderer.text(
                request, "feed_rows.html", viewer=viewer, events=feed.events[::-1]
            )
            return [("rows", _json({"html": rows, "last": feed.last}))]

        return step

    # -- streams -----------------------------------------------------------------------------------

    async def _stream(
        self, request: Request, begin: Callable[[Request, Viewer], Step], every_s: float
    ) -> Response:
        viewer = await self._authenticator.by_cookie(request)
        if viewer is None:
            return error_response(401, "unauthenticated", "The session has ended")
        if self.streams >= MAX_STREAMS:
            return error_response(503, "unavailable", TOO_MANY)
        try:
            step = begin(request, viewer)
            first = await step(viewer)
        except (OperationError, StoreError) as error:
            return error_response(*describe_error(error, viewer.access))
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(
            self._events(request, viewer, step=step, events=first, every_s=every_s),
            media_type="text/event-stream",
            headers=headers,
        )

    async def _events(
        self,
        request: Request,
        viewer: Viewer,
        *,
        step: Step,
        events: list[Event],
        every_s: float,
    ) -> AsyncIterator[str]:
        if (
            self.streams >= MAX_STREAMS
        ):  # other streams started while this one read its first events
            yield _event(("problem", _json({"message": TOO_MANY})))
            return
        self.streams += 1
        try:
            now = asyncio.get_running_loop().time
            began, checked = now(), now()
            yield "retry: 3000\n\n" + "".join(map(_event, events))
            while now() - began < MAX_S and not await self._closed_within(every_s):
                if now() - checked > RECHECK_S:
                    checked = now()
                    still = await self._authenticator.by_cookie(request)
                    if still is None or still.access != viewer.access:
                        yield _event(("end", "{}"))
                        return
                try:
                    yield "".join(map(_event, await step(viewer))) or ": no change\n\n"
                except (OperationError, StoreError) as error:
                    yield _event(
                        ("problem", _json({"message": describe_error(error, viewer.access)[2]}))
                    )
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


def _rates_since(
    then: float, before: StatsRow, *, row: StatsRow, now: float
) -> dict[str, view.Column]:
    """Return a tenant's rates per second since the last step, at least 0: counters decrease when a
    worker ends."""
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
