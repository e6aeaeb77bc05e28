"""The dashboard as an ASGI application: its routes, the headers of all its responses, and its error
responses.

It can be mounted at any path: every address that it writes begins with the ``root_path``.
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
from respcache.ops.dashboard.api import Api, error_response
from respcache.ops.dashboard.auth import AuthBackend, Authenticator, AuthUnavailable
from respcache.ops.dashboard.layout import Addresses, PageRenderer
from respcache.ops.dashboard.live import LiveStreams
from respcache.ops.dashboard.pages import Pages

MAX_BODY = 64 * 1024

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self'; "
    "connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""No inline code or style, and only the dashboard's own files (W3C CSP Level 3)."""

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
"""Headers of every response that does not set them itself."""

log = logging.getLogger("respcache")


class Dashboard:
    """Pages, API and live statistics for one ``Admin``; ``auth`` authenticates users. Mount it in
    an ASGI application."""

    def __init__(self, admin: Admin, auth: AuthBackend) -> None:
        authenticator, renderer = Authenticator(auth), PageRenderer()
        self._pages = Pages(admin, authenticator, renderer)
        self._live = LiveStreams(admin, authenticator, renderer)
        self.routes: list[BaseRoute] = [
            *Api(admin, authenticator).routes(),
            *self._live.routes(),
            *Actions(admin, authenticator, self._pages).routes(),
            *self._pages.routes(),
        ]
        app = Starlette(
            routes=self.routes,
            exception_handlers={
                HTTPException: self._http_error,
                AuthUnavailable: self._unavailable,
                Exception: self._server_error,
            },
            max_body_size=MAX_BODY,
        )
        # the outermost layer, so that error responses have these headers too
        self._app = SafeHeaders(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI 3.0)."""
        await self._app(scope, receive, send)

    @property
    def streams(self) -> int:
        """The number of open streams in this process."""
        return self._live.streams

    def close(self) -> None:
        """End all streams. Call it when the server starts to shut down, so that it does not wait
        for them."""
        self._live.close()

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        missing = error.status_code == 404
        message = "There is no page at this address" if missing else str(error.detail)
        code = "not-found" if missing else "invalid"
        return self._error(request, error.status_code, code=code, message=message)

    async def _unavailable(self, request: Request, error: Exception) -> Response:
        return self._error(request, 503, code="unavailable", message=str(error))

    async def _server_error(self, request: Request, error: Exception) -> Response:
        message = "The dashboard failed: see the log"
        return self._error(request, 500, code="failed", message=message)

    def _error(self, request: Request, status: int, *, code: str, message: str) -> Response:
        if request.url.path.startswith(Addresses(request)("api/")):
            return error_response(status, code, message)
        return self._pages.error_page(request, None, status=status, message=message)


class SafeHeaders:
    """Adds ``HEADERS`` to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_missing(message)
            await send(message)

        await self._app(scope, receive, add if scope["type"] == "http" else send)


def _add_missing(message: MutableMapping[str, Any]) -> None:
    given = message.get("headers", [])
    names = {name.lower() for name, _ in given}
    missing = [
        (name.encode(), value.encode())
        for name, value in HEADERS.items()
        if name.encode() not in names
    ]
    message["headers"] = [*given, *missing]
