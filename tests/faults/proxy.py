"""TCP links that can be made bad: delayed, cut, half-open, a black hole, or moved to another
server.

All links live in a thread with an event loop of its own, so that whatever the caller's thread does
delays no traffic. What was sent is never reordered within a connection and never lost unless the
connection is: that is TCP's promise, kept here.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any, TypeVar, cast

import uvloop

HOST = "127.0.0.1"
CONTROL_S = 10.0
CONNECT_S = 5.0

T = TypeVar("T")
Address = tuple[str, int]


class State(StrEnum):
    """What a link does with traffic."""

    NORMAL = "normal"
    DELAYED = "delayed"
    CUT = "cut"
    """Connections are reset, also new ones."""
    HALF_OPEN = "half-open"
    """The server's side is closed, the client is not told and what it sends goes nowhere; it is
    reset afterwards."""
    BLACK_HOLE = "black hole"
    """Nothing arrives on either side, also of new connections; all of it does afterwards."""


class Link:
    """One listening port and the server behind it. Methods may be called from any thread; they
    return when it is done."""

    def __init__(self, links: "Links", upstream: int) -> None:
        self.port = 0
        self.upstream = upstream
        self.state = State.NORMAL
        self.delay_s = 0.0
        self.pairs: set[_Pair] = set()
        self._links = links

    def set(self, state: State, *, delay_s: float = 0.0) -> None:
        """Put the link into a state."""
        self._links.run(self._set(state, delay_s))

    def move(self, upstream: int) -> None:
        """Lead to another server of this host from now on; connections to the old one are reset."""
        self._links.run(self._move(upstream))

    async def listen(self) -> None:
        """Begin to listen on a free port."""
        server = await asyncio.get_running_loop().create_server(lambda: _Pair(self).client, HOST, 0)
        self.port = cast(Address, server.sockets[0].getsockname())[1]

    async def _set(self, state: State, delay_s: float) -> None:
        before, self.state, self.delay_s = self.state, state, delay_s
        for pair in tuple(self.pairs):
            if state is State.CUT or (before is State.HALF_OPEN and state is not State.HALF_OPEN):
                pair.abort()
            elif state is State.HALF_OPEN:
                pair.close_server()
            else:
                pair.flush()

    async def _move(self, upstream: int) -> None:
        self.upstream = upstream
        for pair in tuple(self.pairs):
            pair.abort()


class Links:
    """The thread of all links. Use it with ``with``."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)

    def __enter__(self) -> "Links":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONTROL_S)

    def add(self, upstream: int) -> Link:
        """Make a link to a port of this host."""
        link = Link(self, upstream)
        self.run(link.listen())
        return link

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Run something in the thread and return its result."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(CONTROL_S)


class _Side(asyncio.Protocol):
    """One end of a connection through a link: what arrives here leaves at ``other``."""

    def __init__(self, pair: "_Pair", lost: Callable[[], None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self._pair = pair
        self._lost = lost
        # what has arrived and not left yet, and when it may leave
        self._waiting: deque[tuple[float, bytes]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._pair.made(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()

    def data_received(self, data: bytes) -> None:
        link = self._pair.link
        if link.state is State.NORMAL and not self._waiting and self._other_is_open():
            self.other.transport.write(data)  # type: ignore[union-attr]
        elif link.state is not State.HALF_OPEN:
            self._waiting.append((self._pair.loop.time() + link.delay_s, data))
            if link.state is not State.BLACK_HOLE:
                self._pair.loop.call_later(link.delay_s, self.flush)

    def flush(self) -> None:
        """Let leave what may: nothing in a black hole, what is due in a delayed link, all of it in
        a normal one."""
        link = self._pair.link
        if link.state is State.BLACK_HOLE:
            return
        while self._waiting and self._other_is_open():
            wait_s = self._waiting[0][0] - self._pair.loop.time()
            if wait_s > 0 and link.state is State.DELAYED:
                self._pair.loop.call_later(wait_s, self.flush)
                return
            self.other.transport.write(self._waiting.popleft()[1])  # type: ignore[union-attr]

    def _other_is_open(self) -> bool:
        other = self.other
        return (
            other is not None and other.transport is not None and not other.transport.is_closing()
        )


class _Pair:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.loop = asyncio.get_running_loop()
        self.client = _Side(self, self._client_lost)
        self.server = _Side(self, self._server_lost)
        self._connecting: asyncio.Task[None] | None = None

    def made(self, side: _Side) -> None:
        """One of both ends is connected."""
        if side is self.client:
            self.link.pairs.add(self)
            if self.link.state is State.CUT:
                self.abort()
            elif self.link.state not in (State.HALF_OPEN, State.BLACK_HOLE):
                self._connect()
        else:
            self.client.other, self.server.other = self.server, self.client
            self.client.flush()

    def flush(self) -> None:
        """Go on after the link has changed."""
        if self._connecting is None and self.link.state is not State.BLACK_HOLE:
            self._connect()
        self.client.flush()
        self.server.flush()

    def abort(self) -> None:
        """Reset both ends."""
        self.link.pairs.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        for side in (self.client, self.server):
            if side.transport is not None:
                side.transport.abort()

    def close_server(self) -> None:
        """Close the server's end; the client is not told."""
        if self.server.transport is not None:
            self.server.transport.abort()

    def _connect(self) -> None:
        self._connecting = self.loop.create_task(self._reach_server())

    async def _reach_server(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                await self.loop.create_connection(lambda: self.server, HOST, self.link.upstream)
        except (OSError, TimeoutError):
            self.abort()

    def _client_lost(self) -> None:
        self.abort()

    def _server_lost(self) -> None:
        """The client hears of it, unless nothing gets through to it."""
        if self.link.state is State.BLACK_HOLE:
            self.loop.call_later(0.05, self._server_lost)
        elif self.link.state is not State.HALF_OPEN:
            self.server.flush()
            if self.client.transport is not None:
                self.client.transport.close()
