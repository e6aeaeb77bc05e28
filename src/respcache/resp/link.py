"""The link to a server: one connection while there is one, and reconnecting while there is none.

This is the circuit breaker. *Up*: commands go to the connection. *Down*: they fail at once, and no
caller waits for a deadline; the background retries the connection and the whole handshake, with
capped, jittered pauses, until they succeed. A connection that is silent past a deadline is dropped,
so a frozen server costs its callers one deadline, once. Pauses grow until a connection has lasted:
a server that shakes hands and then hangs is not retried in a tight loop that delays its callers.
One log line per change of state.

The link can listen to one channel of push messages. Every new connection subscribes to it before
it sends anything else.
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
"""A connection that lasted this long is replaced without a pause, and the pauses after it start
again at the shortest."""


@dataclass(slots=True)
class Listener:
    """The callbacks for a channel, and whether the server's refusal was logged."""

    channel: str
    on_message: Callable[[bytes], None]
    on_lost: Callable[[], None]
    refused: bool = False


class Link:
    """Keeps one connection to one server, in the event loop in which ``connect`` was called."""

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
        self._reported: set[type[Exception]] = set()
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
        """Whether the server has confirmed our subscription on the present connection."""
        return self._connection is not None and self._connection.listening

    async def connect(self) -> None:
        """Try once, then continue in the background. An unavailable server raises nothing."""
        if self._trying is None and self._connection is None:
            first = asyncio.get_running_loop().create_future()
            self._trying = asyncio.create_task(self._try_until_up(first))
            await asyncio.wait({self._trying, first}, return_when=asyncio.FIRST_COMPLETED)

    async def execute(self, *commands: Command) -> tuple[list[Any], str]:
        """Send one batch; return its replies and the identity of the server that sent them. Raises
        ``StoreUnavailable``."""
        future, identity = self.request(*commands)
        return await future, identity

    def request(self, *commands: Command) -> "tuple[asyncio.Future[list[Any]], str]":
        """Send one batch; return the future of its replies and the identity of the server that
        will send them.

        Raises ``StoreUnavailable`` at once while the link is down or too busy; later failures are
        the future's.
        """
        connection = self._present()
        return connection.request(commands, deadline_s=self._deadline_s), connection.identity

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back once, just before this tick's commands are sent; what it sends goes out in the
        same write.

        It is also called if the link goes down first. Its exceptions are logged. Raises
        ``StoreUnavailable`` while down.
        """
        self._present().soon(callback)

    def listen(
        self, channel: str, on_message: Callable[[bytes], None], on_lost: Callable[[], None]
    ) -> None:
        """Subscribe to a channel on the present connection, if any, and on all later ones. Once per
        link.

        ``on_message`` receives the payload of each message before any reply that follows it is
        delivered. ``on_lost`` is called when a listening connection ends, ``close`` included,
        before waiting requests fail: messages may be missed from then until ``listening``. Both
        are plain functions; their exceptions are logged. A server that refuses, for lack of a
        permission, is logged once, and the next connection tries again.
        """
        if self._listener is not None:
            raise ValueError(f"this link already listens to {self._listener.channel!r}")
        self._listener = Listener(channel, on_message, on_lost)
        if self._connection is not None:
            self._subscribe(self._connection, self._listener)

    def watch(self, changed: Callable[[StoreUnavailable | None], None]) -> None:
        """Register the one watcher, a plain function: called at every change with the error when
        down, with None when up."""
        self._watch = changed

    def send(self, *commands: Command) -> None:
        """Send one batch without waiting for replies; do nothing while the link is down or too
        busy."""
        if self._connection is not None:
            try:
                self._connection.send(commands)
            except StoreUnavailable:
                self._counted["errors"] += 1

    def relearn(self, identity: str) -> None:
        """Drop the connection if it still has this identity, to read the server's present one."""
        if self._connection is not None and self._connection.identity == identity:
            self._connection.abort(StoreUnavailable("the server has changed its identity"))

    def counters(self) -> dict[str, int]:
        """Return the numbers of errors, timeouts, commands and reconnects over all connections."""
        live = self._connection
        return {
            name: count + (getattr(live, name) if live else 0)
            for name, count in self._counted.items()
        } | {"reconnects": self.reconnects}

    async def close(self) -> None:
        """Stop connecting, and disconnect. Leaves no task behind."""
        self._cause = StoreUnavailable("closed")
        connection, self._connection = self._connection, None
        trying, self._trying = self._trying, None
        if trying is not None:
            trying.cancel()
            await asyncio.wait({trying})
        if connection is not None:
            self._count(connection)
            connection.abort(self._cause)
            self._report_lost(connection)
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
        self._report_down(cause)
        loop = asyncio.get_running_loop()
        lasted = self._up_since is not None and loop.time() - self._up_since >= STEADY_S
        self._pause_s = 0.0 if lasted else _longer(self._pause_s)
        self._trying = loop.create_task(self._try_until_up(None))
        self._report_lost(connection)

    def _report_lost(self, connection: Connection) -> None:
        if connection.listening and self._listener is not None:
            call_safely(self._listener.on_lost)

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
                self.url, deadline_s=self._connect_deadline_s, on_lost=self._lost
            )
        except StoreUnavailable as error:
            self._cause = error
            self._report_down(error)
            return False
        self._connection = connection
        self._trying = None
        self.reconnects += self._up_since is not None
        self._up_since = asyncio.get_running_loop().time()
        self._reported.clear()
        log.info("cache server %s is up (identity %s)", self.url, connection.identity[:8])
        call_safely(self._watch, None)
        if self._listener is not None:
            self._subscribe(connection, self._listener)
        return True

    def _subscribe(self, connection: Connection, listener: Listener) -> None:
        try:
            asked = connection.subscribe(
                listener.channel, listener.on_message, deadline_s=self._connect_deadline_s
            )
        # too many commands wait: subscribe first on the next connection
        except StoreUnavailable as error:
            connection.abort(error)
        else:
            asked.add_done_callback(partial(self._subscribed, connection, listener))

    def _subscribed(
        self, connection: Connection, listener: Listener, asked: "asyncio.Future[list[Any]]"
    ) -> None:
        if asked.exception() is not None:
            # the connection has ended, or the reply is late: a late confirmation still counts
            return
        if not connection.listening and not listener.refused:
            log.warning(
                "cache server %s refuses the channel %r: %s",
                self.url,
                listener.channel,
                asked.result()[0],
            )
        listener.refused = not connection.listening

    def _report_down(self, cause: StoreUnavailable) -> None:
        """Log the outage once, and a refusal by the server once more, as an operator must fix
        it."""
        kind = HandshakeRefused if isinstance(cause, HandshakeRefused) else StoreUnavailable
        if kind not in self._reported:
            log.warning(
                "cache server %s is down: %s; requests go on without it, reconnecting",
                self.url,
                cause,
            )
            call_safely(self._watch, cause)
        self._reported |= {kind, StoreUnavailable}


def _longer(pause_s: float) -> float:
    return min(max(pause_s * 2, FIRST_PAUSE_S), MOST_PAUSE_S)
