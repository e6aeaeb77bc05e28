"""The three ways in which an answer passes the wrapper: sent as stored, held until a write is
confirmed, recorded by a fill.

These are ASGI ``send`` callables; they own no decisions but those about their messages.
"""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from respcache.context import Exchange
from respcache.core import tokens
from respcache.core.encoding import negotiable, vary
from respcache.core.errors import AckBarrierOverflow
from respcache.core.http_caching import cache_status, for_browsers, refusal
from respcache.core.serving_lease import Outcome

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_HELD_BYTES = 4 * 1024 * 1024
INVALIDATION = b"x-cache-invalidation"
"""On the answer of a write that is committed, but whose invalidation the store has not confirmed:
``pending; safe``, or ``pending`` where there is no outbox."""


async def send_stored(
    send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, *said: str
) -> None:
    """Send a stored response, and what became of the request. No JSON, no copying of the body."""
    sent = for_browsers([*headers, cache_status(*said)], replace=True)
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def without_body(send: Send) -> Send:
    """Answer a HEAD request from what GET would have sent (RFC 9110, section 9.3.2)."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


def at_head(send: Send, callback: Callable[[], object]) -> Send:
    """Call back when the head of an answer leaves."""

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            callback()
        await send(message)

    return send_on


class HeldResponse:
    """Holds an answer back until every bump of its request is settled: the acknowledgement of a
    write is its answer.

    While a transaction of the request still has uncommitted changes (a session that a ``yield``
    dependency commits after the handler), messages are kept, up to ``MAX_HELD_BYTES``; ``release``
    sends them when the application has returned.
    """

    def __init__(
        self, send: Send, exchange: Exchange, before: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._send = send
        self._exchange = exchange
        self._before = before
        self._held: list[Message] = []
        self._held_bytes = 0
        self._passing = False
        self.started = False

    async def __call__(self, message: Message) -> None:
        """Take a message from the application."""
        if self._passing:
            await self._send(message)
            return
        self._held.append(message)
        self._held_bytes += len(message.get("body", b""))
        if not self._exchange.open:
            await self.release()
        elif self._held_bytes > MAX_HELD_BYTES:
            self._held.clear()
            raise AckBarrierOverflow(
                f"the response outgrew {MAX_HELD_BYTES} bytes while its transaction was still "
                f"open: commit before answering"
            )

    async def release(self) -> None:
        """Settle the bumps, then send what was kept and pass on the rest.

        Also when nothing was kept: the server itself answers for an application that raises, and
        that answer must wait too.
        """
        if self._passing:
            return
        if self._before is not None:
            await self._before()
        await self._exchange.settle()
        if not self._held:
            return
        self._passing = self.started = True
        held, self._held = self._held, []
        for message in held:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), *_said(self._exchange)],
                }
            await self._send(message)

    async def send_error(self, message: bytes) -> None:
        """Answer 500 in place of an answer that could not be held, if nothing was sent yet."""
        if not self.started:
            self.started = self._passing = True
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(message)).encode()),
            ]
            await self._send({"type": "http.response.start", "status": 500, "headers": headers})
            await self._send({"type": "http.response.body", "body": message, "more_body": False})


def _said(exchange: Exchange) -> Headers:
    """Return what the answer of a request says of its writes."""
    said: Headers = (
        [] if exchange.token is None else [(tokens.HEADER, tokens.encode(exchange.token))]
    )
    if exchange.outcome is not Outcome.CONFIRMED:
        said.append((INVALIDATION, exchange.outcome.encode()))
    return said


class StatusMarker:
    """Adds ``Cache-Status`` and ``Cache-Control`` to an answer that is not stored, and passes
    everything on as it comes."""

    def __init__(self, send: Send, *status: str) -> None:
        self._send = send
        self._status = status

    async def __call__(self, message: Message) -> None:
        """Take a message from the application."""
        if message["type"] == "http.response.start":
            headers: Headers = [*message.get("headers", ()), cache_status(*self._status)]
            message = {**message, "headers": for_browsers(headers, replace=False)}
        await self._send(message)


class ResponseRecorder:
    """Collects the answer of a fill and lands it when its last byte is there, before anything is
    sent.

    ``land(refused, status, headers, body)`` is called exactly once, with the reason for not storing
    or None; it returns the reason that finally holds. What cannot be stored is passed on at once,
    so streams stay streams.
    """

    def __init__(
        self,
        send: Send,
        *,
        complete: Callable[[str | None, int, Headers, bytes], str | None],
        forward: str,
        max_body_bytes: int,
        key_headers: frozenset[bytes],
    ) -> None:
        self._send = send
        self._complete = complete
        self._forward = forward
        self._max_body_bytes = max_body_bytes
        self._key_headers = key_headers
        self._start: Message | None = None
        self._body: list[bytes] = []
        self._size = 0
        self._through = False

    async def __call__(self, message: Message) -> None:
        """Take a message from the application."""
        if self._through:
            await self._send(message)
        elif message["type"] == "http.response.start":
            self._start = message
            headers = message.get("headers", ())
            reason = refusal(
                message["status"],
                headers,
                max_body_bytes=self._max_body_bytes,
                key_headers=self._key_headers,
            )
            if reason is not None:
                await self._pass_through(reason)
        elif message["type"] == "http.response.body" and self._start is not None:
            await self._take_body(message, self._start)
        else:
            await self._pass_through("stream")
            await self._send(message)

    async def _take_body(self, message: Message, start: Message) -> None:
        self._body.append(message.get("body", b""))
        self._size += len(self._body[-1])
        if self._size > self._max_body_bytes:
            await self._pass_through("too-large")
            if not message.get("more_body", False):
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        elif not message.get("more_body", False):
            body = b"".join(self._body)
            reason = self._complete(None, start["status"], list(start.get("headers", ())), body)
            await self._send_start(reason)
            self._through = True
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _pass_through(self, reason: str) -> None:
        self._through = True
        status = self._start["status"] if self._start is not None else 0
        self._complete(reason, status, [], b"")
        if self._start is not None:
            await self._send_start(reason)
        for part in self._body:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def _send_start(self, reason: str | None) -> None:
        assert self._start is not None
        status = (
            (self._forward, "stored") if reason is None else (self._forward, f"detail={reason}")
        )
        headers: Headers = [*self._start.get("headers", ()), cache_status(*status)]
        if reason is None and negotiable(headers, length=self._size):
            # this answer is plain, but others that are made of it will not be
            headers = [*vary(headers)]
        await self._send({**self._start, "headers": for_browsers(headers, replace=reason is None)})
