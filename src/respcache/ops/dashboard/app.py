"""The dashboard as an ASGI application: its routes, the headers of all its answers, and what is
answered when something fails.

It can be mounted anywhere: every address that it writes begins with the ``root_path`` that it is
given.
"""

import logging
from collections.abc import MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from respcache.ops.admin import Admin
from respcache.ops.dashboard.actions import Actions
from respcache.ops.dashboard.api import Api, say_no
from respcache.ops.dashboard.auth import AuthBackend, Authenticator, AuthUnavailable
from respcache.ops.dashboard.layout import Addresses, PageRenderer
from respcache.ops.dashboard.live import Live
from respcache.ops.dashboard.pages import Pages

MAX_BODY = 64 * 1024

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self'; "
    "connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""Nothing inline, nothing from elsewhere (W3C Content Security Policy 3)."""

HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
"""On every answer that does not say otherwise itself."""

log = logging.getLogger("respcache")


class Dashboard:
    """PageRenderer, API and live figures over one ``Admin``. ``gate`` says who people are. To be mounted
    in an ASGI application."""

    def __init__(self, admin: Admin, auth: AuthBackend) -> None:
        authenticator, pages = Authenticator(auth), PageRenderer()
        self._looks = Pages(admin, authenticator, pages)
        self._live = Live(admin, authenticator, pages)
        self.routes: list[BaseRoute] = [
            *Api(admin, authenticator).routes(),
            *self._live.routes(),
            *Actions(admin, authenticator, pages, self._looks).routes(),
            *self._looks.routes(),
        ]
        app = Starlette(
            routes=self.routes,
            exception_handlers={
                HTTPException: self._refused,
                AuthUnavailable: self._away,
                Exception: self._failed,
            },
            max_body_size=MAX_BODY,
        )
        # around all of it: also what a fault is answered with has them
        self._safe = SafeHeaders(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI 3.0)."""
        await self._safe(scope, receive, send)

    @property
    def streams(self) -> int:
        """Streams of live figures that are open in this process."""
        return self._live.streams

    def close(self) -> None:
        """End all live streams: call it when the server begins to shut down, so that it need not
        wait for them."""
        self._live.close()

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        word = "not-found" if error.status_code == 404 else "invalid"
        return self._say(
            request,
            error.status_code,
            word,
            "There is no such page" if word == "not-found" else str(error.detail),
        )

    async def _away(self, request: Request, error: Exception) -> Response:
        return self._say(request, 503, "unavailable", str(error))

    async def _failed(self, request: Request, error: Exception) -> Response:
        return self._say(request, 500, "failed", "The dashboard failed: the log says why")

    def _say(self, request: Request, status: int, word: str, message: str) -> Response:
        if request.url.path.startswith(Addresses(request)("api/")):
            return say_no(status, word, message)
        return self._looks.problem(request, None, status, message)


class SafeHeaders:
    """Adds ``HEADERS`` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                _complete(message)
            await send(message)

        await self._app(scope, receive, add if scope["type"] == "http" else send)


def _complete(message: MutableMapping[str, Any]) -> None:
    given = message.get("headers", [])
    names = {name.lower() for name, _ in given}
    missing = [
        (name.encode(), value.encode())
        for name, value in HEADERS.items()
        if name.encode() not in names
    ]
    message["headers"] = [*given, *missing]
