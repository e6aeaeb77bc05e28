"""One socket to a server, shared by all callers of an event loop.

Commands of all callers are sent in one stream. Replies come back in the same order, so a queue of
futures, first in first out, is all the bookkeeping there is. A caller that is cancelled or runs out
of time keeps its place in the queue: its replies are still consumed by it and cannot be delivered
to another caller (redis-py once had that bug, CVE-2023-28859).

The commands of one event-loop tick are sent in one write. Their deadlines begin with that write,
not before: a busy tick does not use up the server's time. One timer serves all deadlines.

The handshake reads the identity of the server (``master_replid``), which belongs to this socket's
life: every reply over it came from that server life. Protocol: RESP3, parsed by hiredis. Its push
messages (published ones, and the confirmation of SUBSCRIBE) come between the replies and take no
place among them.
"""

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from math import inf
from typing import Any, cast

import hiredis

from respcache.core.errors import StoreUnavailable
from respcache.resp.url import ServerURL

log = logging.getLogger("respcache.resp")

Command = tuple[str | bytes | int, ...]

MAX_WAITING = 20_000
"""Commands that may wait for a reply. Beyond it, requests fail at once."""

MAX_UNSENT_BYTES = 32 * 1024 * 1024
"""Bytes that may wait to be written. Beyond it, requests fail at once."""

GRACE_S = 0.005
"""A deadline that has passed is checked again after this time: replies may lie unread in the socket
because the event loop was busy (uvloop runs timers before it reads)."""

LATENESS = 1 / 16
"""The pause between two checks of deadlines, as a share of the shortest deadline (at most
``GRACE_S``, at least a millisecond, uvloop's resolution). A busy connection notices a passed
deadline later by that pause, and fails the request ``GRACE_S`` after that."""

MAX_LATE_IN_A_ROW = 10
"""A server that always replies too late is treated as hung: otherwise every request would wait for
its deadline."""

FATAL_ERRORS = ("LOADING", "READONLY", "MASTERDOWN", "NOAUTH", "WRONGPASS")
"""Error replies after which this connection cannot be used."""

# RESP3's reply false reads as False, which hiredis returns for "not enough data yet"
_MORE = object()


class HandshakeRefused(StoreUnavailable):
    """The server is reachable but refuses the connection: wrong password, replica, data still
    loading, invalid certificate."""


class PendingWrite:
    """The commands of one event-loop tick, sent in one write. ``at`` is infinite until they are
    sent."""

    __slots__ = ("at", "packed", "received", "shortest_s", "size_bytes")

    def __init__(self) -> None:
        self.at = inf
        self.packed: list[bytes] = []
        self.received = 0
        self.shortest_s = inf
        self.size_bytes = 0


class Batch:
    """The commands that one caller sent together. ``future`` is None if no caller waits."""

    __slots__ = ("deadline_s", "expected", "future", "grace_until", "replies", "write")

    def __init__(
        self,
        expected: int,
        write: PendingWrite,
        future: "asyncio.Future[list[Any]] | None" = None,
        *,
        deadline_s: float = inf,
    ) -> None:
        self.expected = expected
        self.write = write
        self.future = future
        self.deadline_s = deadline_s
        self.replies: list[Any] = []
        self.grace_until = 0.0

    def awaited(self) -> bool:
        """Return whether a caller waits for the replies."""
        return self.future is not None and not self.future.done()

    def due(self) -> float:
        """Return when to check it: at its deadline, then at the end of the grace."""
        return self.grace_until or self.write.at + self.deadline_s


class Subscription:
    """A channel, the callback for its messages, and the batch that subscribes to it."""

    __slots__ = ("batch", "channel", "on_message")

    def __init__(self, channel: bytes, on_message: Callable[[bytes], None], batch: Batch) -> None:
        self.channel = channel
        self.on_message = on_message
        self.batch = batch


class Connection(asyncio.Protocol):
    """A connection from its handshake to its end. Create it with ``Connection.open``; it never
    reconnects.

    It has more than 15 attributes: they are the state of one socket, and an object between them
    would add a call to every command.
    """

    def __init__(self, on_lost: Callable[["Connection", StoreUnavailable], None]) -> None:
        self.identity = ""
        self.listening = False
        self.errors = 0
        self.timeouts = 0
        self.commands = 0
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        # flushes and timers serve many callers, so they run in the context of none
        self._context = Context()
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._waiting: deque[Batch] = deque()
        self._unanswered = 0
        self._next = PendingWrite()
        self._callbacks: list[Callable[[], None]] = []
        self._flushing = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = inf
        self._late_in_a_row = 0
        self._subscription: Subscription | None = None
        self._transport: asyncio.Transport | None = None
        self._received = 0
        self._ended: StoreUnavailable | None = None
        self._closed = self._loop.create_future()

    @classmethod
    async def open(
        cls,
        url: ServerURL,
        *,
        deadline_s: float,
        on_lost: Callable[["Connection", StoreUnavailable], None],
    ) -> "Connection":
        """Connect, log in, and read the server's identity. Raises ``StoreUnavailable``. ``on_lost``
        is called once, when the connection ends."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(deadline_s):
                connection = await _connect(url, lambda: cls(on_lost))
                await connection._shake_hands(url, deadline_s)
                return connection
        except TimeoutError:
            cause = StoreUnavailable(f"no answer within {deadline_s} s")
        except ssl.SSLCertVerificationError as error:
            cause = HandshakeRefused(error.verify_message)
        # a host name that IDNA cannot encode is a UnicodeError
        except (OSError, UnicodeError) as error:
            cause = StoreUnavailable(getattr(error, "strerror", None) or str(error))
        except StoreUnavailable as error:
            cause = error
        except BaseException:
            if connection is not None:
                connection.abort(StoreUnavailable("cancelled"))
            raise
        if connection is not None:
            connection.abort(cause)
        raise cause

    # -- commands ----------------------------------------------------------------------------------

    async def execute(self, commands: Sequence[Command], *, deadline_s: float) -> list[Any]:
        """Send commands in one batch and return their replies in order, error replies included.

        Raises ``StoreUnavailable`` if the connection ends or the deadline passes first.
        """
        return await self.request(commands, deadline_s=deadline_s)

    def request(
        self, commands: Sequence[Command], *, deadline_s: float
    ) -> "asyncio.Future[list[Any]]":
        """Send commands as ``execute`` does, and return the future of their replies. The deadline
        begins when they are sent.

        Raises ``StoreUnavailable`` at once if they cannot be sent. The future may be cancelled.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if commands:
            self._write(commands, future, deadline_s)
        else:
            future.set_result([])
        return future

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands without waiting for replies; error replies are counted. Raises
        ``StoreUnavailable``."""
        if commands:
            self._write(commands, None, inf)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back once, just before this tick's commands are sent; what it sends goes out with
        them.

        It is also called if the connection ends first. Its exceptions are logged. Raises
        ``StoreUnavailable`` after the end.
        """
        if self._ended is not None:
            raise _again(self._ended)
        self._callbacks.append(callback)
        self._flush_soon()

    def subscribe(
        self, channel: str, on_message: Callable[[bytes], None], *, deadline_s: float
    ) -> "asyncio.Future[list[Any]]":
        """Subscribe to a channel, once per connection. ``listening`` is true from the confirmation
        on.

        ``on_message`` is called before any reply that follows the message is delivered. Its
        exceptions are logged. If the server refuses, the future returns its error. Raises
        ``StoreUnavailable`` as ``request`` does.
        """
        # The confirmation is a push message; only a refusal is a reply. The reply to PING shows
        # that one of them has arrived.
        future = self.request([("SUBSCRIBE", channel), ("PING",)], deadline_s=deadline_s)
        self._subscription = Subscription(channel.encode(), on_message, self._waiting[-1])
        return future

    def abort(self, cause: StoreUnavailable) -> None:
        """End the connection now. All waiting requests fail with ``StoreUnavailable``. Commands
        sent before may still arrive."""
        self._write_out()
        self._end(cause)
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Return when the socket is closed."""
        await asyncio.shield(self._closed)

    # -- out ---------------------------------------------------------------------------------------

    def _write(
        self,
        commands: Sequence[Command],
        future: "asyncio.Future[list[Any]] | None",
        deadline_s: float,
    ) -> None:
        transport, write = self._transport, self._next
        if self._ended is not None or transport is None:
            raise _again(self._ended or StoreUnavailable("not connected"))
        unsent_bytes = write.size_bytes + transport.get_write_buffer_size()
        if self._unanswered + len(commands) > MAX_WAITING or unsent_bytes > MAX_UNSENT_BYTES:
            raise StoreUnavailable("too many commands are waiting")
        # this may raise: before the batch takes its place, never after
        packed = b"".join(map(hiredis.pack_command, commands))  # type: ignore[arg-type]
        self._waiting.append(Batch(len(commands), write, future, deadline_s=deadline_s))
        self._unanswered += len(commands)
        self.commands += len(commands)
        write.packed.append(packed)
        write.size_bytes += len(packed)
        write.shortest_s = min(write.shortest_s, deadline_s)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush, context=self._context)

    def _flush(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        try:
            for callback in callbacks:
                call_safely(callback)
        finally:
            self._flushing = False
            self._write_out()
            # registered by callbacks: next tick, or they could keep this one busy for ever
            if self._callbacks:
                self._flush_soon()

    def _write_out(self) -> None:
        write, transport = self._next, self._transport
        if not write.packed or transport is None:
            return
        self._next = PendingWrite()
        packed, write.packed = write.packed, []
        # uvloop's loop.time() is the beginning of the tick
        write.at, write.received = time.monotonic(), self._received
        self._set_alarm(write.at + write.shortest_s)
        transport.write(b"".join(packed))

    # -- asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio.Protocol)."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Deliver replies in order (asyncio.Protocol)."""
        self._received += len(data)
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _MORE:
                self._take(reply)
        except (hiredis.ProtocolError, IndexError) as error:
            self.abort(StoreUnavailable(f"not understood: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        """Fail all waiting requests (asyncio.Protocol)."""
        self._end(StoreUnavailable(str(error) if error else "closed by the server"))
        if not self._closed.done():
            self._closed.set_result(None)

    # -- in ----------------------------------------------------------------------------------------

    def _take(self, reply: Any) -> None:
        if isinstance(reply, hiredis.PushNotification):
            self._take_push(reply)
            return
        batch = self._waiting[0]
        batch.replies.append(reply)
        self._unanswered -= 1
        if isinstance(reply, hiredis.ReplyError):
            # not a fault: the script is then sent in full
            self.errors += not str(reply).startswith("NOSCRIPT")
            if not self.identity or str(reply).startswith(FATAL_ERRORS):
                self._loop.call_soon(self.abort, _refusal(reply))
        if len(batch.replies) == batch.expected:
            self._waiting.popleft()
            if batch.future is not None and not batch.future.done():
                self._late_in_a_row = 0
                batch.future.set_result(batch.replies)

    def _take_push(self, push: "list[Any]") -> None:
        subscription = self._subscription
        if (
            subscription is None
            or self._ended is not None
            or len(push) != 3
            or push[1] != subscription.channel
        ):
            return
        if push[0] == b"message":
            call_safely(subscription.on_message, push[2])
        elif push[0] == b"subscribe":
            self._confirm(subscription.batch)

    def _confirm(self, batch: Batch) -> None:
        """Count the confirmation as the reply to SUBSCRIBE: one reply fewer is expected."""
        if self._waiting[0] is not batch or batch.replies or batch.expected == 1:
            raise hiredis.ProtocolError("a confirmation that was not requested")
        batch.expected -= 1
        self._unanswered -= 1
        self.listening = True

    # -- deadlines ---------------------------------------------------------------------------------

    def _set_alarm(self, at: float) -> None:
        """Schedule ``_check_deadlines`` for this moment, unless it runs before."""
        if at >= self._alarm_at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = self._loop.call_later(
            max(at - time.monotonic(), 0.001), self._check_deadlines, context=self._context
        )

    def _check_deadlines(self) -> None:
        """Handle passed deadlines, and set the alarm for the next one, if a caller still
        waits."""
        self._alarm, self._alarm_at = None, inf
        now = time.monotonic()
        for batch in [batch for batch in self._waiting if batch.due() <= now]:
            self._late(batch, now)
        waiting = [batch for batch in self._waiting if batch.awaited()]
        if waiting:
            pause_s = min(LATENESS * min(batch.deadline_s for batch in waiting), GRACE_S)
            self._set_alarm(max(min(batch.due() for batch in waiting), now + pause_s))

    def _late(self, batch: Batch, now: float) -> None:
        """Handle a passed deadline: give the loop one more turn to read, then fail the request, and
        end the connection if it is silent."""
        future = batch.future
        if future is None or future.done():
            return
        if not batch.grace_until:
            batch.grace_until = now + GRACE_S
            return
        self.timeouts += 1
        self._late_in_a_row += 1
        late = f"{batch.deadline_s * 1000:.0f} ms"
        future.set_exception(StoreUnavailable(f"no reply within {late}"))
        if self._received == batch.write.received:
            self.abort(StoreUnavailable(f"silent for {late}"))
        elif self._late_in_a_row >= MAX_LATE_IN_A_ROW:
            self.abort(StoreUnavailable(f"{MAX_LATE_IN_A_ROW} replies in a row later than {late}"))

    # -- inside ------------------------------------------------------------------------------------

    def _end(self, cause: StoreUnavailable) -> None:
        if self._ended is not None:
            return
        self._ended = cause
        self._next = PendingWrite()
        if self._alarm is not None:
            self._alarm.cancel()
        waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            if batch.future is not None and not batch.future.done():
                batch.future.set_exception(_again(cause))
        self._on_lost(self, cause)

    async def _shake_hands(self, url: ServerURL, deadline_s: float) -> None:
        hello: Command = ("HELLO", "3")
        if url.password is not None:
            hello = (*hello, "AUTH", url.user or "default", url.password)
        commands: list[Command] = [(*hello, "SETNAME", "respcache"), ("SELECT", url.database)]
        commands += [("INFO", "replication"), ("INFO", "persistence")]
        replies = await self.execute(commands, deadline_s=deadline_s)
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise _refusal(reply)
        info = {**fields_of(replies[2]), **fields_of(replies[3])}
        # a server that loads its data replies to INFO, but not to the commands we need
        if info.get("loading") != "0":
            raise HandshakeRefused("the server is loading its data")
        if info.get("role") != "master" or not info.get("master_replid"):
            raise HandshakeRefused(f"the server's role is {info.get('role')}, not master")
        self.identity = info["master_replid"]


async def _connect(url: ServerURL, make: Callable[[], Connection]) -> Connection:
    loop = asyncio.get_running_loop()
    if url.path:
        _, connection = await loop.create_unix_connection(make, url.path)
    else:
        _, connection = await loop.create_connection(make, url.host, url.port, ssl=url.tls)
    return connection


def call_safely(callback: Callable[..., None], *arguments: Any) -> None:
    """Call a callback, and log its exceptions so that they do not affect other callers."""
    try:
        callback(*arguments)
    except (SystemExit, KeyboardInterrupt):
        raise
    # CancelledError too: it belongs to a future that the callback read
    except BaseException:
        log.exception("a callback failed")


def as_text(reply: Any) -> str:
    """Return a text reply: bytes, or RESP3's verbatim string."""
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)


def fields_of(info: Any) -> dict[str, str]:
    """Parse the reply to INFO into names and values."""
    return dict(line.split(":", 1) for line in as_text(info).splitlines() if ":" in line)


def _refusal(reply: Any) -> HandshakeRefused:
    """Return the server's error without our arguments: a server that does not know HELLO repeats
    the password."""
    return HandshakeRefused(str(reply).partition(", with args")[0])


def _again(error: StoreUnavailable) -> StoreUnavailable:
    """Return a copy for another caller: a raised exception collects the tracebacks of all that
    raise it."""
    return type(error)(*error.args)


@asynccontextmanager
async def visit(url: ServerURL, *, deadline_s: float) -> AsyncIterator[Connection]:
    """Connect for a few commands, then disconnect: for probes and tools. Raises
    ``StoreUnavailable``."""
    connection = await Connection.open(url, deadline_s=deadline_s, on_lost=lambda *_: None)
    try:
        yield connection
    finally:
        connection.abort(StoreUnavailable("the visit is over"))
        await connection.wait_closed()
