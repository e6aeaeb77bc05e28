"""Ways from a client to the CRM's application: called in this process, over HTTP, and over HTTP to
this very process."""

import asyncio
import contextlib
import os
import signal
import socket
from typing import Any, Protocol

import uvicorn

from respcache import Cache
from respcache.middleware import CacheMiddleware
from respcache.testing.history import now

from .registers import User
from .ways import Passing, config

WAIT_S = 0.05
KEPT_S = 2.0

POINTS = (
    "after COMMIT",
    "between two bumps",
    "before the acknowledgement",
    "in a round",
    "after PUT",
)
"""Where a process can be told to die."""

Headers = dict[bytes, bytes]
Answer = tuple[int, Headers, bytes, float]
"""Status, headers, body, and a moment before the answer left (or one after it came, over HTTP)."""


class Transport(Protocol):
    """A way to the application."""

    @property
    def alarms(self) -> list[str]:
        """What the cache's own audit has found."""
        ...

    async def start(self) -> None:
        """Return when it can be sent to."""
        ...

    async def stop(self) -> None:
        """End what was started."""
        ...

    async def send(self, method: str, path: str, user: User, body: bytes | None = None) -> Answer:
        """Send a request and return the answer. Raises ``ConnectionError`` when there is none."""
        ...


class Points:
    """Dies at the point that was ordered, when this process passes it next."""

    def __init__(self) -> None:
        self.ordered: str | None = None
        self._bumping = 0

    def reach(self, point: str) -> None:
        """Die, if it is here."""
        if self.ordered == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def put_into(self, cache: Cache) -> None:
        """Replace the methods by which this cache passes the points."""
        store, relay = cache.store, cache.runtime.relay
        assert store is not None
        assert relay is not None
        committed, bump, page, put = cache.committed, store.bump, relay.outbox.page, store.put

        def when_committed(rows: Any) -> None:
            self.reach("after COMMIT")
            committed(rows)

        async def when_bumping(*args: Any, **options: Any) -> str:
            self._bumping += 1
            try:
                if self._bumping > 1 and self.ordered == "between two bumps":
                    await asyncio.sleep(0.002)  # the first one is on its way
                    self.reach("between two bumps")
                return await bump(*args, **options)
            finally:
                self._bumping -= 1

        async def when_paged(*args: Any) -> Any:
            found = await page(*args)
            if found.rows:
                self.reach("in a round")
            return found

        def when_put(*args: Any, **options: Any) -> None:
            put(*args, **options)
            asyncio.get_running_loop().call_later(0.002, self.reach, "after PUT")

        cache.committed = when_committed  # type: ignore[method-assign]
        store.bump, store.put = when_bumping, when_put  # type: ignore[method-assign]
        relay.outbox.page = when_paged  # type: ignore[method-assign]


class InProcess:
    """The application in this process, with as little as possible around it."""

    def __init__(self, middleware: CacheMiddleware, points: Points) -> None:
        self._cache = middleware.cache
        self._app = Passing(middleware, lambda: points.reach("before the acknowledgement"))
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said: asyncio.Queue[str] = asyncio.Queue()
        self._life: asyncio.Task[None] | None = None
        self._heads: dict[str, list[tuple[bytes, bytes]]] = {}

    @property
    def alarms(self) -> list[str]:
        """What the cache's own audit has found."""
        return _alarms(self._cache)

    async def start(self) -> None:
        """Start the application."""
        await self._live("lifespan.startup")

    async def stop(self) -> None:
        """Shut it down."""
        await self._live("lifespan.shutdown")

    async def _live(self, event: str) -> None:
        async def send(message: Any) -> None:
            await self._said.put(message["type"])

        if self._life is None:
            self._life = asyncio.create_task(
                self._app({"type": "lifespan", "asgi": {"version": "3.0"}}, self._events.get, send)
            )
        await self._events.put({"type": event})
        said = await self._said.get()
        if said != f"{event}.complete":
            raise RuntimeError(said)

    async def send(self, method: str, path: str, user: User, body: bytes | None = None) -> Answer:
        """Send a request and return the answer."""
        plain, _, query = path.partition("?")
        headers = self._heads.get(user.name)
        if headers is None:
            headers = self._heads[user.name] = [
                (b"host", b"faults"),
                (b"authorization", f"Bearer {user.token}".encode()),
            ]
        if body is not None:
            headers = [
                *headers,
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": plain,
            "raw_path": plain.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("faults", 80),
        }
        waiting = [{"type": "http.request", "body": body or b"", "more_body": False}]
        started: dict[str, Any] = {}
        parts: list[bytes] = []
        left = 0.0

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await asyncio.Event().wait()  # nobody hangs up here

        async def take(message: Any) -> None:
            nonlocal left
            if message["type"] == "http.response.start":
                left = now()
                started.update(message)
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, take)
        return started["status"], dict(started["headers"]), b"".join(parts), left


class OverHttp:
    """A server on a port of this host; connections are kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._heads: dict[str, str] = {}

    @property
    def alarms(self) -> list[str]:
        """Those of the server are in its log."""
        return []

    async def start(self) -> None:
        """Wait until the server listens: it is started at the same time as we are. Whoever started
        both stops waiting first."""
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.close()
                return
            await asyncio.sleep(WAIT_S)

    async def stop(self) -> None:
        """Close the connections."""
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def send(self, method: str, path: str, user: User, body: bytes | None = None) -> Answer:
        """Send a request and return the answer. Raises ``ConnectionError`` when the server went
        away."""
        head = self._heads.setdefault(
            user.name, f"host: faults\r\nauthorization: Bearer {user.token}\r\n"
        )
        request = f"{method} {path} HTTP/1.1\r\n{head}"
        if body is not None:
            request += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        try:
            reader, writer = await self._connected()
            writer.write(request.encode() + b"\r\n" + (body or b""))
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(b":") for line in lines if line)
            }
            content = await reader.readexactly(int(headers[b"content-length"]))
        except (OSError, asyncio.IncompleteReadError) as error:
            await OverHttp.stop(self)
            raise ConnectionError(repr(error)) from error
        self._idle.append((now(), reader, writer))
        return int(first.split()[1]), headers, content, now()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Take a kept connection, unless it has idled so long that the server may be closing it."""
        while self._idle:
            since, reader, writer = self._idle.pop()
            if now() - since < KEPT_S:
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)


class Below(OverHttp):
    """The application in this process behind a server of its own, which answers hits below ASGI."""

    def __init__(self, middleware: CacheMiddleware, points: Points) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        super().__init__(self._socket.getsockname()[1])
        self._cache = middleware.cache
        app = Passing(middleware, lambda: points.reach("before the acknowledgement"))
        self._server = uvicorn.Server(config(app, port=self._port, below=True))
        self._serving: asyncio.Task[None] | None = None

    @property
    def alarms(self) -> list[str]:
        """What the cache's own audit has found."""
        return _alarms(self._cache)

    async def start(self) -> None:
        """Start the application and the server."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                raise RuntimeError("the application did not start")
            await asyncio.sleep(WAIT_S)

    async def stop(self) -> None:
        """Close the connections and shut everything down."""
        await super().stop()
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


def _alarms(cache: Cache) -> list[str]:
    return (
        []
        if cache.runtime.verifier is None
        else [str(finding) for finding in cache.runtime.verifier.found.mismatches]
    )
