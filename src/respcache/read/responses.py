"""How a response passes the middleware: as stored, deferred, or recorded.

These are ASGI ``send`` callables. They decide nothing but what concerns their messages.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from respcache.context import Exchange, Message, Send
from respcache.core import tokens
from respcache.core.encoding import negotiable, vary
from respcache.core.errors import AckBarrierOverflow
from respcache.core.http_caching import cache_status, for_browsers, refusal
from respcache.core.serving_lease import Outcome

Headers = list[tuple[bytes, bytes]]

MAX_DEFERRED_BYTES = 4 * 1024 * 1024
INVALIDATION = b"x-cache-invalidation"
"""On the response of a committed write whose invalidation is not confirmed: ``pending; safe``, or
``pending`` if there is no outbox."""


async def send_stored(
    send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], *, body: bytes, forward: str
) -> None:
    """Send the stored response of another caller's fill, with ``Cache-Status``."""
    marked = for_browsers([*headers, cache_status(forward, "collapsed")], replace=True)
    await send({"type": "http.response.start", "status": status, "headers": marked})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def without_body(send: Send) -> Send:
    """Return a ``send`` for HEAD: what GET would have sent, without the body (RFC 9110, 9.3.2)."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


def at_head(send: Send, callback: Callable[[], object]) -> Send:
    """Return a ``send`` that calls back when the head of the response leaves."""

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            callback()
        await send(message)

    return send_on


class DeferredResponse:
    """Keeps a response back until every bump of its request is settled.

    The response acknowledges the write. While a transaction of the request has uncommitted changes
    (a session that a ``yield`` dependency commits after the handler), messages are kept, up to
    ``MAX_DEFERRED_BYTES``. ``release`` sends them after the application has returned.
    """

    def __init__(
        self, exchange: Exchange, before: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._exchange = exchange
        self._before = before
        self._kept: list[Message] = []
        self._kept_bytes = 0
        self._passing = False
        self.started = False

    async def __call__(self, message: Message) -> None:
        """Receive a message from the application (ASGI ``send``)."""
        if self._passing:
            await self._exchange.send(message)
            return
        self._kept.append(message)
        self._kept_bytes += len(message.get("body", b""))
        if not self._exchange.open_transactions:
            await self.release()
        elif self._kept_bytes > MAX_DEFERRED_BYTES:
            self._kept.clear()
            raise AckBarrierOverflow(
                f"the response exceeded {MAX_DEFERRED_BYTES} bytes while its transaction was still "
                "open: commit before responding"
            )

    async def release(self) -> None:
        """Settle the bumps, then send what was kept and pass on the rest.

        Also needed if nothing was kept: the server itself responds for an application that raises,
        and that response must wait too.
        """
        if self._passing:
            return
        if self._before is not None:
            await self._before()
        await self._exchange.settle()
        if not self._kept:
            return
        self._passing = self.started = True
        kept, self._kept = self._kept, []
        for message in kept:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *_write_headers(self._exchange)]
                message = {**message, "headers": headers}
            await self._exchange.send(message)

    async def send_error(self, message: bytes) -> None:
        """Send a 500 response instead of the deferred one, if nothing was sent yet."""
        if self.started:
            return
        self.started = self._passing = True
        length = str(len(message)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        send = self._exchange.send
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": message, "more_body": False})


def _write_headers(exchange: Exchange) -> Headers:
    """Return the headers that report a request's writes."""
    headers: Headers = []
    if exchange.token is not None:
        headers.append((tokens.HEADER, tokens.encode(exchange.token)))
    if exchange.outcome is not Outcome.CONFIRMED:
        headers.append((INVALIDATION, exchange.outcome.encode()))
    return headers


class StatusMarker:
    """Adds ``Cache-Status`` and ``Cache-Control`` to a response that is not stored."""

    def __init__(self, send: Send, *status: str) -> None:
        self._send = send
        self._status = status

    async def __call__(self, message: Message) -> None:
        """Receive a message from the application (ASGI ``send``)."""
        if message["type"] == "http.response.start":
            headers: Headers = [*message.get("headers", ()), cache_status(*self._status)]
            message = {**message, "headers": for_browsers(headers, replace=False)}
        await self._send(message)


class WholeResponse(NamedTuple):
    """A complete response of a handler."""

    status: int
    headers: Headers
    body: bytes


OnRecorded = Callable[[WholeResponse | str], str | None]
"""Receives a complete response, or the reason why it cannot be stored. Returns the final reason, or
None if it was stored."""


class ResponseRecorder:
    """Records the response of a fill, and reports it before anything is sent.

    ``on_recorded`` is called exactly once, when the last byte has arrived. A response that cannot
    be stored is passed on at once, so streams stay streams.
    """

    def __init__(
        self,
        send: Send,
        on_recorded: OnRecorded,
        *,
        forward: str,
        max_body_bytes: int,
        key_headers: frozenset[bytes],
    ) -> None:
        self._send = send
        self._on_recorded = on_recorded
        self._forward = forward
        self._max_body_bytes = max_body_bytes
        self._key_headers = key_headers
        self._start: Message | None = None
        self._body: list[bytes] = []
        self._size = 0
        self._passing = False

    async def __call__(self, message: Message) -> None:
        """Receive a message from the application (ASGI ``send``)."""
        if self._passing:
            await self._send(message)
        elif message["type"] == "http.response.start":
            self._start = message
            reason = refusal(
                message["status"],
                message.get("headers", ()),
                max_body_bytes=self._max_body_bytes,
                key_headers=self._key_headers,
            )
            if reason is not None:
                await self._pass_on(reason)
        elif message["type"] == "http.response.body" and self._start is not None:
            await self._record(message, self._start)
        else:
            await self._pass_on("stream")
            await self._send(message)

    async def _record(self, message: Message, start: Message) -> None:
        more_body = message.get("more_body", False)
        self._body.append(message.get("body", b""))
        self._size += len(self._body[-1])
        if self._size > self._max_body_bytes:
            await self._pass_on("too-large")
            if not more_body:
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        elif not more_body:
            body = b"".join(self._body)
            headers = list(start.get("headers", ()))
            reason = self._on_recorded(WholeResponse(start["status"], headers, body))
            await self._send_start(start, reason)
            self._passing = True
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _pass_on(self, reason: str) -> None:
        self._passing = True
        self._on_recorded(reason)
        if self._start is not None:
            await self._send_start(self._start, reason)
        for part in self._body:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def _send_start(self, start: Message, reason: str | None) -> None:
        result = "stored" if reason is None else f"detail={reason}"
        headers: Headers = [*start.get("headers", ()), cache_status(self._forward, result)]
        if reason is None and negotiable(headers, length=self._size):
            # this response is plain, but later ones made from it may be compressed
            headers = [*vary(headers)]
        await self._send({**start, "headers": for_browsers(headers, replace=reason is None)})
