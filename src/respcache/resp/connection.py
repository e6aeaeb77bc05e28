"""One socket to a server, shared by all callers of an event loop.

Commands of all callers go out in one stream; replies come back in the same order, so a queue of futures, first in first out,
is all the bookkeeping there is. A caller that is cancelled or runs out of time leaves its place in the queue: its replies
are still consumed by it and can never become somebody else's (redis-py lost that once, CVE-2023-28859).

The identity of the server (``master_replid``) is asked in the handshake and belongs to this socket's life: every reply that
comes over it was given by that server life. Protocol: RESP3, parsed by hiredis.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import hiredis

from respcache.core.errors import StoreUnavailable
from respcache.resp.url import ServerURL

Command = tuple[str | bytes | int, ...]

MAX_WAITING = 20_000
"""Commands that may wait for a reply; beyond it, callers are refused at once."""

MAX_UNSENT_BYTES = 32 * 1024 * 1024
"""Bytes that may wait to be written; beyond it, callers are refused at once."""

GRACE_S = 0.005
"""A deadline that has passed is looked at again after this: replies may lie unread in the socket because the event loop was
busy (uvloop runs timers before it reads)."""

MAX_LATE_IN_A_ROW = 10
"""A server that answers, but always too late, is as good as hung: its callers would all pay the deadline."""

FATAL_ERRORS = ("LOADING", "READONLY", "MASTERDOWN", "NOAUTH", "WRONGPASS")
"""Replies that say this connection is of no use."""

_MORE = object()  # RESP3 has a reply that reads as False, hiredis' own sign for "not enough data yet"


class Refused(StoreUnavailable):
    """The server is there and does not take us: a wrong password, a replica, its data still loading."""


class Batch:
    """The commands that one caller sent together. ``future`` is None when nobody waits."""

    __slots__ = ("expected", "future", "replies", "timer")

    def __init__(self, expected: int, future: "asyncio.Future[list[Any]] | None") -> None:
        self.expected = expected
        self.future = future
        self.replies: list[Any] = []
        self.timer: asyncio.TimerHandle | None = None


class Connection(asyncio.Protocol):
    """A connection from its handshake to its end. Make one with ``Connection.open``; it never reconnects."""

    def __init__(self, lost: Callable[["Connection", StoreUnavailable], None]) -> None:
        self.identity = ""
        self.errors = 0
        self.timeouts = 0
        self.commands = 0
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._waiting: deque[Batch] = deque()
        self._unanswered = 0
        self._late_in_a_row = 0
        self._transport: asyncio.Transport | None = None
        self._received = 0
        self._ended: StoreUnavailable | None = None
        self._closed = self._loop.create_future()

    @classmethod
    async def open(
        cls, url: ServerURL, *, deadline_s: float, lost: Callable[["Connection", StoreUnavailable], None]
    ) -> "Connection":
        """Connect, log in, and learn the server's identity. Raises ``StoreUnavailable``. ``lost`` is called once, at the end."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(deadline_s):
                _, connection = await asyncio.get_running_loop().create_connection(lambda: cls(lost), url.host, url.port)
                await connection._shake_hands(url, deadline_s)
                return connection
        except TimeoutError:
            cause = StoreUnavailable(f"no answer within {deadline_s} s")
        except (OSError, UnicodeError) as error:  # a host name that IDNA cannot encode is a UnicodeError
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

    # -- commands ------------------------------------------------------------------------------------------------------

    async def execute(self, commands: Sequence[Command], *, deadline_s: float) -> list[Any]:
        """Send commands in one batch and return their replies in order; errors of the server are returned in their places.

        Raises ``StoreUnavailable`` when the connection ends or the deadline passes first.
        """
        if not commands:
            return []
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        batch = self._write(commands, future)
        batch.timer = self._loop.call_later(deadline_s, self._late, batch, self._received, deadline_s)
        try:
            return await future
        finally:
            batch.timer.cancel()

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands whose replies nobody waits for; errors among them are counted. Raises ``StoreUnavailable``."""
        if commands:
            self._write(commands, None)

    def abort(self, cause: StoreUnavailable) -> None:
        """End the connection now; everybody who waits gets ``StoreUnavailable``."""
        self._end(cause)
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Return when the socket is closed."""
        await asyncio.shield(self._closed)

    def _write(self, commands: Sequence[Command], future: "asyncio.Future[list[Any]] | None") -> Batch:
        transport = self._transport
        if self._ended is not None or transport is None:
            raise _again(self._ended or StoreUnavailable("not connected"))
        if self._unanswered + len(commands) > MAX_WAITING or transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise StoreUnavailable("too many commands are waiting")
        # this may raise: before the batch takes its place, never after
        packed = b"".join(map(hiredis.pack_command, commands))  # type: ignore[arg-type]
        batch = Batch(len(commands), future)
        self._waiting.append(batch)
        self._unanswered += len(commands)
        self.commands += len(commands)
        transport.write(packed)
        return batch

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------------

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

    # -- inside --------------------------------------------------------------------------------------------------------

    def _take(self, reply: Any) -> None:
        if isinstance(reply, hiredis.PushNotification):
            return
        batch = self._waiting[0]
        batch.replies.append(reply)
        self._unanswered -= 1
        if isinstance(reply, hiredis.ReplyError):
            self.errors += not str(reply).startswith("NOSCRIPT")  # an answer, not a fault: the script is sent in full then
            if not self.identity or str(reply).startswith(FATAL_ERRORS):
                self._loop.call_soon(self.abort, _refusal(reply))
        if len(batch.replies) == batch.expected:
            self._waiting.popleft()
            if batch.future is not None and not batch.future.done():
                self._late_in_a_row = 0
                batch.future.set_result(batch.replies)

    def _late(self, batch: Batch, received: int, deadline_s: float, *, again: bool = False) -> None:
        """A deadline has passed: give the loop one more turn to read, then fail the caller, and the link if it is silent."""
        future = batch.future
        if future is None or future.done():
            return
        if not again:
            batch.timer = self._loop.call_later(GRACE_S, lambda: self._late(batch, received, deadline_s, again=True))
            return
        self.timeouts += 1
        self._late_in_a_row += 1
        future.set_exception(StoreUnavailable(f"no reply within {deadline_s * 1000:.0f} ms"))
        if self._received == received:
            self.abort(StoreUnavailable(f"silent for {deadline_s * 1000:.0f} ms"))
        elif self._late_in_a_row >= MAX_LATE_IN_A_ROW:
            self.abort(StoreUnavailable(f"{MAX_LATE_IN_A_ROW} replies in a row later than {deadline_s * 1000:.0f} ms"))

    def _end(self, cause: StoreUnavailable) -> None:
        if self._ended is not None:
            return
        self._ended = cause
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
        if info.get("loading") != "0":  # a server that loads its data answers INFO, and nothing that we need
            raise Refused("the server is loading its data")
        if info.get("role") != "master" or not info.get("master_replid"):
            raise Refused(f"the server's role is {info.get('role')}, not master")
        self.identity = info["master_replid"]


def as_text(reply: Any) -> str:
    """Read a text reply: bytes, or what RESP3 gives for a verbatim string."""
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)


def fields_of(info: Any) -> dict[str, str]:
    """Read the reply to INFO: names and values."""
    return dict(line.split(":", 1) for line in as_text(info).splitlines() if ":" in line)


def _refusal(reply: Any) -> Refused:
    """Say what the server said, without our arguments: a server that does not know HELLO repeats the password."""
    return Refused(str(reply).partition(", with args")[0])


def _again(error: StoreUnavailable) -> StoreUnavailable:
    """Make a copy for one more caller: a raised exception collects the traceback of whoever raised it."""
    return type(error)(*error.args)


@asynccontextmanager
async def visit(url: ServerURL, *, deadline_s: float) -> AsyncIterator[Connection]:
    """Connect for a few commands, then disconnect: for probes and tools. Raises ``StoreUnavailable``."""
    connection = await Connection.open(url, deadline_s=deadline_s, lost=lambda *_: None)
    try:
        yield connection
    finally:
        connection.abort(StoreUnavailable("the visit is over"))
        await connection.wait_closed()
