"""One socket to a server, shared by all callers of an event loop.

Commands of all callers go out in one stream; replies come back in the same order, so a queue of
futures, first in first out, is all the bookkeeping there is. A caller that is cancelled or runs out
of time leaves its place in the queue: its replies are still consumed by it and can never become
somebody else's (redis-py lost that once, CVE-2023-28859).

The commands of one event-loop tick leave in one write. Their deadlines begin with that write, not
before: a tick that is kept busy does not use up the server's time. One timer looks after all
deadlines.

The identity of the server (``master_replid``) is asked in the handshake and belongs to this
socket's life: every reply that comes over it was given by that server life. Protocol: RESP3, parsed
by hiredis; its push messages (published ones, and the confirmation of SUBSCRIBE) stand between the
replies and take no place among them.
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
"""Commands that may wait for a reply; beyond it, callers are refused at once."""

MAX_UNSENT_BYTES = 32 * 1024 * 1024
"""Bytes that may wait to be written; beyond it, callers are refused at once."""

GRACE_S = 0.005
"""A deadline that has passed is looked at again after this: replies may lie unread in the socket
because the event loop was busy (uvloop runs timers before it reads)."""

LATENESS = 1 / 16
"""Deadlines are looked at one after another no sooner than this share of the shortest one (at most
``GRACE_S``, at least a millisecond, which is how uvloop counts): a busy connection notices a
deadline later by that, and ends it ``GRACE_S`` later."""

MAX_LATE_IN_A_ROW = 10
"""A server that answers, but always too late, is as good as hung: its callers would all pay the
deadline."""

FATAL_ERRORS = ("LOADING", "READONLY", "MASTERDOWN", "NOAUTH", "WRONGPASS")
"""Replies that say this connection is of no use."""

# RESP3 has a reply that reads as False, hiredis' own sign for "not enough data yet"
_MORE = object()


class HandshakeRefused(StoreUnavailable):
    """The server is there and does not take us: a wrong password, a replica, its data still
    loading, a false certificate."""


class PendingWrite:
    """What leaves in one write: the commands of one event-loop tick. ``at`` is infinite until they
    have left."""

    __slots__ = ("at", "packed", "received", "shortest_s", "size_bytes")

    def __init__(self) -> None:
        self.at = inf
        self.packed: list[bytes] = []
        self.received = 0
        self.shortest_s = inf
        self.size_bytes = 0


class Batch:
    """The commands that one caller sent together. ``future`` is None when nobody waits."""

    __slots__ = ("deadline_s", "expected", "future", "grace_until", "replies", "write")

    def __init__(
        self,
        expected: int,
        write: PendingWrite,
        future: "asyncio.Future[list[Any]] | None" = None,
        deadline_s: float = inf,
    ) -> None:
        self.expected = expected
        self.write = write
        self.future = future
        self.deadline_s = deadline_s
        self.replies: list[Any] = []
        self.grace_until = 0.0

    def awaited(self) -> bool:
        """Whether somebody waits for the replies."""
        return self.future is not None and not self.future.done()

    def due(self) -> float:
        """Return when to look at it: at its deadline, then once more."""
        return self.grace_until or self.write.at + self.deadline_s


class Subscription:
    """A channel, who hears its messages, and the batch that asked for it."""

    __slots__ = ("batch", "channel", "heard")

    def __init__(self, channel: bytes, heard: Callable[[bytes], None], batch: Batch) -> None:
        self.channel = channel
        self.heard = heard
        self.batch = batch


class Connection(asyncio.Protocol):
    """A connection from its handshake to its end. Make one with ``Connection.open``; it never
    reconnects."""

    def __init__(self, lost: Callable[["Connection", StoreUnavailable], None]) -> None:
        self.identity = ""
        self.listening = False
        self.errors = 0
        self.timeouts = 0
        self.commands = 0
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        # flushes and timers serve many callers: the context of none of them
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
        lost: Callable[["Connection", StoreUnavailable], None],
    ) -> "Connection":
        """Connect, log in, and learn the server's identity. Raises ``StoreUnavailable``. ``lost``
        is called once, at the end."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(deadline_s):
                connection = await _connect(url, lambda: cls(lost))
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
        """Send commands in one batch and return their replies in order; errors of the server are
        returned in their places.

        Raises ``StoreUnavailable`` when the connection ends or the deadline passes first.
        """
        return await self.request(commands, deadline_s=deadline_s)

    def request(
        self, commands: Sequence[Command], *, deadline_s: float
    ) -> "asyncio.Future[list[Any]]":
        """Send commands as ``execute`` does, and return the future of their replies. The deadline
        begins when they leave.

        Raises ``StoreUnavailable`` at once when they cannot be sent. The future may be cancelled.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if commands:
            self._write(commands, future, deadline_s)
        else:
            future.set_result([])
        return future

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands whose replies nobody waits for; errors among them are counted. Raises
        ``StoreUnavailable``."""
        if commands:
            self._write(commands, None, inf)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back once, just before this tick's commands leave: what it sends leaves with them.

        It is called also when the connection ends first. What it raises is logged. Raises
        ``StoreUnavailable`` after the end.
        """
        if self._ended is not None:
            raise _again(self._ended)
        self._callbacks.append(callback)
        self._flush_soon()

    def subscribe(
        self, channel: str, heard: Callable[[bytes], None], *, deadline_s: float
    ) -> "asyncio.Future[list[Any]]":
        """Ask for the messages of a channel, once in a connection's life; ``listening`` is true
        from the confirmation on.

        ``heard`` is called before any reply that came after the message is delivered. What it
        raises is logged. The future brings the server's error when it refuses. Raises
        ``StoreUnavailable`` as ``request`` does.
        """
        # The confirmation is a push; only a refusal is a reply. PING's reply tells that the one or
        # the other has come.
        future = self.request([("SUBSCRIBE", channel), ("PING",)], deadline_s=deadline_s)
        self._subscription = Subscription(channel.encode(), heard, self._waiting[-1])
        return future

    def abort(self, cause: StoreUnavailable) -> None:
        """End the connection now; everybody who waits gets ``StoreUnavailable``. What was sent
        before may still arrive."""
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
        self._waiting.append(Batch(len(commands), write, future, deadline_s))
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
            # asked for by callbacks: for the next tick, or they could keep this one for ever
            if self._callbacks:
                self._flush_soon()

    def _write_out(self) -> None:
        write, transport = self._next, self._transport
        if not write.packed or transport is None:
            return
        self._next = PendingWrite()
        packed, write.packed = write.packed, []
        # loop.time() of uvloop is that of the tick's beginning
        write.at, write.received = time.monotonic(), self._received
        self._set_alarm(write.at + write.shortest_s)
        transport.write(b"".join(packed))

    # -- asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio.Protocol)."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Hand replies to whoever is next (asyncio.Protocol)."""
        self._received += len(data)
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _MORE:
                self._take(reply)
        except (hiredis.ProtocolError, IndexError) as error:
            self.abort(StoreUnavailable(f"not understood: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        """Fail everybody who waits (asyncio.Protocol)."""
        self._end(StoreUnavailable(str(error) if error else "closed by the server"))
        if not self._closed.done():
            self._closed.set_result(None)

    # -- in ----------------------------------------------------------------------------------------

    def _take(self, reply: Any) -> None:
        if isinstance(reply, hiredis.PushNotification):
            self._hear(reply)
            return
        batch = self._waiting[0]
        batch.replies.append(reply)
        self._unanswered -= 1
        if isinstance(reply, hiredis.ReplyError):
            # an answer, not a fault: the script is sent in full then
            self.errors += not str(reply).startswith("NOSCRIPT")
            if not self.identity or str(reply).startswith(FATAL_ERRORS):
                self._loop.call_soon(self.abort, _refusal(reply))
        if len(batch.replies) == batch.expected:
            self._waiting.popleft()
            if batch.future is not None and not batch.future.done():
                self._late_in_a_row = 0
                batch.future.set_result(batch.replies)

    def _hear(self, push: "list[Any]") -> None:
        subscription = self._subscription
        if (
            subscription is None
            or self._ended is not None
            or len(push) != 3
            or push[1] != subscription.channel
        ):
            return
        if push[0] == b"message":
            call_safely(subscription.heard, push[2])
        elif push[0] == b"subscribe":
            self._confirm(subscription.batch)

    def _confirm(self, batch: Batch) -> None:
        """Take the confirmation as what SUBSCRIBE was waiting for: one reply fewer is to come."""
        if self._waiting[0] is not batch or batch.replies or batch.expected == 1:
            raise hiredis.ProtocolError("a confirmation that nobody waited for")
        batch.expected -= 1
        self._unanswered -= 1
        self.listening = True

    # -- deadlines ---------------------------------------------------------------------------------

    def _set_alarm(self, at: float) -> None:
        """See to it that ``_look`` runs at this moment, or before."""
        if at >= self._alarm_at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = self._loop.call_later(
            max(at - time.monotonic(), 0.001), self._look, context=self._context
        )

    def _look(self) -> None:
        """Find those whose deadline has passed, and set the alarm for the next of those that wait
        on; none, if none does."""
        self._alarm, self._alarm_at = None, inf
        now = time.monotonic()
        for batch in [batch for batch in self._waiting if batch.due() <= now]:
            self._late(batch, now)
        waiting = [batch for batch in self._waiting if batch.awaited()]
        if waiting:
            pause_s = min(LATENESS * min(batch.deadline_s for batch in waiting), GRACE_S)
            self._set_alarm(max(min(batch.due() for batch in waiting), now + pause_s))

    def _late(self, batch: Batch, now: float) -> None:
        """A deadline has passed: give the loop one more turn to read, then fail the caller, and the
        link if it is silent."""
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
        self._lost(self, cause)

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
        # a server that loads its data answers INFO, and nothing that we need
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
    """Call somebody's callback; what it raises is its own affair, not that of the others."""
    try:
        callback(*arguments)
    except (SystemExit, KeyboardInterrupt):
        raise
    # a CancelledError too: it is that of a future that the callback looked at
    except BaseException:
        log.exception("a callback failed")


def as_text(reply: Any) -> str:
    """Read a text reply: bytes, or what RESP3 gives for a verbatim string."""
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)


def fields_of(info: Any) -> dict[str, str]:
    """Read the reply to INFO: names and values."""
    return dict(line.split(":", 1) for line in as_text(info).splitlines() if ":" in line)


def _refusal(reply: Any) -> HandshakeRefused:
    """Say what the server said, without our arguments: a server that does not know HELLO repeats
    the password."""
    return HandshakeRefused(str(reply).partition(", with args")[0])


def _again(error: StoreUnavailable) -> StoreUnavailable:
    """Make a copy for one more caller: a raised exception collects the traceback of whoever raised
    it."""
    return type(error)(*error.args)


@asynccontextmanager
async def visit(url: ServerURL, *, deadline_s: float) -> AsyncIterator[Connection]:
    """Connect for a few commands, then disconnect: for probes and tools. Raises
    ``StoreUnavailable``."""
    connection = await Connection.open(url, deadline_s=deadline_s, lost=lambda *_: None)
    try:
        yield connection
    finally:
        connection.abort(StoreUnavailable("the visit is over"))
        await connection.wait_closed()
