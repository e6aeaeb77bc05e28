"""The link to a server: a connection while there is one, and the endless effort to get one while
there is none.

This is the circuit breaker. *Up*: commands go to the connection. *Down*: they fail at once, no
caller waits for a deadline again; in the background, connecting and the whole handshake are tried,
with capped, jittered pauses, until they succeed. A connection that goes silent past a deadline is
dropped, so a frozen server costs its callers one deadline, once. Pauses grow until a connection has
lasted: a server that shakes hands and then hangs is not tried, and its callers not delayed, in a
tight loop. One log line per change of state.

One channel of push messages can be listened to; every new connection subscribes to it before
anything else is sent over it.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from respcache.core.errors import StoreUnavailable
from respcache.resp.connection import Command, Connection, HandshakeRefused, call_safely
from respcache.resp.url import ServerURL

log = logging.getLogger("respcache.resp")

DEADLINE_S = 0.05
CONNECT_DEADLINE_S = 0.5
FIRST_PAUSE_S = 0.05
MOST_PAUSE_S = 2.0
STEADY_S = 2.0
"""A connection that lasted this long is replaced without a pause, and the pauses after it begin
anew."""


@dataclass(slots=True)
class Listener:
    """Who listens to a channel, and whether it was said that the server refuses it."""

    channel: str
    heard: Callable[[bytes], None]
    lost: Callable[[], None]
    refused: bool = False


class Link:
    """Keeps one connection to one server. Bound to the event loop in which ``connect`` was
    called."""

    def __init__(
        self,
        url: ServerURL,
        *,
        deadline_s: float = DEADLINE_S,
        connect_deadline_s: float = CONNECT_DEADLINE_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.url = url
        self.reconnects = 0
        self._deadline_s = deadline_s
        self._connect_deadline_s = connect_deadline_s
        self._jitter = jitter
        self._connection: Connection | None = None
        self._listener: Listener | None = None
        self._trying: asyncio.Task[None] | None = None
        self._cause = StoreUnavailable("not connected yet")
        self._watch: Callable[[StoreUnavailable | None], None] = lambda cause: None
        self._said: set[type[Exception]] = set()
        self._pause_s = 0.0
        self._up_since: float | None = None
        self._counted = {"errors": 0, "timeouts": 0, "commands": 0}

    def __repr__(self) -> str:
        return f"Link({self.url}, {'up' if self.up else 'down'})"

    @property
    def up(self) -> bool:
        """Whether there is a connection now."""
        return self._connection is not None

    @property
    def listening(self) -> bool:
        """Whether the server has confirmed, on the present connection, that it will send the
        messages of our channel."""
        return self._connection is not None and self._connection.listening

    async def connect(self) -> None:
        """Try once, and leave the rest to the background. Never raises because the server is
        away."""
        if self._trying is None and self._connection is None:
            first = asyncio.get_running_loop().create_future()
            self._trying = asyncio.create_task(self._try_until_up(first))
            await asyncio.wait({self._trying, first}, return_when=asyncio.FIRST_COMPLETED)

    async def execute(self, *commands: Command) -> tuple[list[Any], str]:
        """Send one batch; return its replies and the identity of the server that gave them. Raises
        ``StoreUnavailable``."""
        future, identity = self.request(*commands)
        return await future, identity

    def request(self, *commands: Command) -> "tuple[asyncio.Future[list[Any]], str]":
        """Send one batch; return the future of its replies and the identity of the server that they
        will come from.

        Raises ``StoreUnavailable`` at once while the link is down or too busy; later, the future
        does.
        """
        connection = self._present()
        return connection.request(commands, deadline_s=self._deadline_s), connection.identity

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back once, just before this tick's commands leave: what it sends leaves in the same
        write.

        It is called also when the link goes down first. What it raises is logged. Raises
        ``StoreUnavailable`` while down.
        """
        self._present().soon(callback)

    def listen(
        self, channel: str, heard: Callable[[bytes], None], lost: Callable[[], None]
    ) -> None:
        """Subscribe to a channel on this connection, if there is one, and on all that follow. Once
        in a link's life.

        ``heard`` gets the payload of each message, before any reply that came after it is
        delivered. ``lost`` is called whenever a connection ends that was listening, ``close``
        included, before those who wait for replies hear of it:
        messages may have been missed from then until ``listening``. Both are plain functions; what
        they raise is logged. A server that refuses, for want of a permission, is reported in the
        log, once, and asked again by the next connection.
        """
        if self._listener is not None:
            raise ValueError(f"this link listens already, to {self._listener.channel!r}")
        self._listener = Listener(channel, heard, lost)
        if self._connection is not None:
            self._subscribe(self._connection, self._listener)

    def watch(self, changed: Callable[[StoreUnavailable | None], None]) -> None:
        """Have a plain function called at every change: with what is wrong while down, None when
        up. One watcher."""
        self._watch = changed

    def send(self, *commands: Command) -> None:
        """Send one batch without waiting for replies; does nothing while the link is down or too
        busy."""
        if self._connection is not None:
            try:
                self._connection.send(commands)
            except StoreUnavailable:
                self._counted["errors"] += 1

    def relearn(self, identity: str) -> None:
        """Drop the connection if it still claims this identity, to learn the server's present
        one."""
        if self._connection is not None and self._connection.identity == identity:
            self._connection.abort(StoreUnavailable("the server has changed its identity"))

    def counters(self) -> dict[str, int]:
        """Return what happened on this link so far, over all its connections."""
        live = self._connection
        return {
            name: count + (getattr(live, name) if live else 0)
            for name, count in self._counted.items()
        } | {"reconnects": self.reconnects}

    async def close(self) -> None:
        """Stop trying and disconnect. Leaves no task behind."""
        self._cause = StoreUnavailable("closed")
        connection, self._connection = self._connection, None
        trying, self._trying = self._trying, None
        if trying is not None:
            trying.cancel()
            await asyncio.wait({trying})
        if connection is not None:
            self._count(connection)
            connection.abort(self._cause)
            self._tell_lost(connection)
            await connection.wait_closed()

    def _present(self) -> Connection:
        if self._connection is None:
            raise type(self._cause)(*self._cause.args)
        return self._connection

    def _lost(self, connection: Connection, cause: StoreUnavailable) -> None:
        if self._connection is not connection:
            return  # a handshake that failed, or close()
        self._connection = None
        self._cause = cause
        self._count(connection)
        self._say_down(cause)
        loop = asyncio.get_running_loop()
        lasted = self._up_since is not None and loop.time() - self._up_since >= STEADY_S
        self._pause_s = 0.0 if lasted else _longer(self._pause_s)
        self._trying = loop.create_task(self._try_until_up(None))
        self._tell_lost(connection)

    def _tell_lost(self, connection: Connection) -> None:
        if connection.listening and self._listener is not None:
            call_safely(self._listener.lost)

    def _count(self, connection: Connection) -> None:
        for name in self._counted:
            self._counted[name] += getattr(connection, name)

    async def _try_until_up(self, first: "asyncio.Future[None] | None") -> None:
        while True:
            await asyncio.sleep(self._pause_s * self._jitter())
            if await self._try():
                return
            self._pause_s = _longer(self._pause_s)
            if first is not None and not first.done():
                first.set_result(None)

    async def _try(self) -> bool:
        try:
            connection = await Connection.open(
                self.url, deadline_s=self._connect_deadline_s, lost=self._lost
            )
        except StoreUnavailable as error:
            self._cause = error
            self._say_down(error)
            return False
        self._connection = connection
        self._trying = None
        self.reconnects += self._up_since is not None
        self._up_since = asyncio.get_running_loop().time()
        self._said.clear()
        log.info("cache server %s is up (identity %s)", self.url, connection.identity[:8])
        call_safely(self._watch, None)
        if self._listener is not None:
            self._subscribe(connection, self._listener)
        return True

    def _subscribe(self, connection: Connection, listener: Listener) -> None:
        try:
            asked = connection.subscribe(
                listener.channel, listener.heard, deadline_s=self._connect_deadline_s
            )
        # too many commands wait: the next connection begins with this one
        except StoreUnavailable as error:
            connection.abort(error)
        else:
            asked.add_done_callback(partial(self._subscribed, connection, listener))

    def _subscribed(
        self, connection: Connection, listener: Listener, asked: "asyncio.Future[list[Any]]"
    ) -> None:
        if asked.exception() is not None:
            # the connection has ended, or the answer is late: a confirmation is still taken when it
            # comes
            return
        if not connection.listening and not listener.refused:
            log.warning(
                "cache server %s refuses the channel %r: %s",
                self.url,
                listener.channel,
                asked.result()[0],
            )
        listener.refused = not connection.listening

    def _say_down(self, cause: StoreUnavailable) -> None:
        """Log the change of state, once per outage; that the server refuses us is said once more,
        as somebody must mend it."""
        kind = HandshakeRefused if isinstance(cause, HandshakeRefused) else StoreUnavailable
        if kind not in self._said:
            log.warning(
                "cache server %s is down: %s; requests go on without it, reconnecting",
                self.url,
                cause,
            )
            call_safely(self._watch, cause)
        self._said |= {kind, StoreUnavailable}


def _longer(pause_s: float) -> float:
    return min(max(pause_s * 2, FIRST_PAUSE_S), MOST_PAUSE_S)
