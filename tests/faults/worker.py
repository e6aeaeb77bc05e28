"""One process of the fault suite: clients that read and write at the same time and record what they did.

They call the CRM's ASGI application in this process, or another process's over HTTP. What is to be done comes in on standard
input, one JSON object a line, the first of which says who we are (``Orders``); reports go out on standard output.

An order to die *at a point* replaces methods of the library in this process by ones that kill it there (SIGKILL).
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any, Protocol

import msgspec
import orjson
import uvloop

import crm.db
from crm.app import create_app
from crm.settings import Settings
from respcache import Cache
from respcache.testing.history import Read, Recorder, Write, now

from . import sabotage
from .registers import (
    ACCOUNTS,
    ADMINS,
    BATCH,
    FATES,
    OPPORTUNITIES,
    SECRET,
    TENANTS,
    Query,
    Settled,
    User,
    contact,
    fate,
    key,
    lead,
    queries,
    window,
)

REPORT_S = 0.25
FINISH_S = 30.0
AFTER_ERROR_S = 0.05
WAIT_S = 0.05
KEPT_S = 2.0
REST_S = 0.02
"""A reader rests after what the database had to answer: an outage is not to take the processor from those who mend it."""

POINTS = ("after COMMIT", "between two bumps", "before the acknowledgement", "in a round", "after PUT")
"""Where a process can be told to die."""

Headers = dict[bytes, bytes]
Answer = tuple[int, Headers, bytes, float]
"""Status, headers, body, and a moment before the answer left (or one after it came, over HTTP)."""


class Orders(msgspec.Struct):
    """Who we are. ``base`` is the port of a server to be asked over HTTP; without one the application runs here.

    ``pause_s`` is how long a reader rests on average; ``share`` and ``of`` say which leads are ours to write.
    """

    name: str
    seed: str
    history: str
    settled: str
    share: int
    of: int
    readers: int
    writers: int
    pause_s: float
    base: int | None = None
    database_url: str = ""
    cache_url: str = ""
    sabotage: str | None = None


class Transport(Protocol):
    """A way to the application."""

    @property
    def alarms(self) -> list[str]:
        """What the cache's own audit has found."""
        ...

    async def send(self, method: str, path: str, user: User, body: bytes | None = None) -> Answer:
        """Send a request and return the answer. Raises ``ConnectionError`` when there is none."""
        ...


# -- dying on demand ---------------------------------------------------------------------------------------------------


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
        store, rounds = cache.store, cache.rounds
        assert store is not None
        assert rounds is not None
        committed, bump, page, put = cache.committed, store.bump, rounds.outbox.page, store.put

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
        rounds.outbox.page = when_paged  # type: ignore[method-assign]


class Slowness:
    """Lets handlers take a while after they have read: a little now and then, or long and often when it was ordered."""

    def __init__(self, randomness: Random) -> None:
        self.ordered = False
        self._randomness = randomness

    def put_into_handlers(self) -> None:
        """Replace the methods by which the CRM's reading handlers read."""
        for name in ("execute", "scalar"):
            setattr(crm.db.Rows, name, self._slowed(getattr(crm.db.Rows, name)))

    def _slowed(self, read: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def slowed(rows: Any, statement: Any) -> Any:
            found = await read(rows, statement)
            if self._randomness.random() < (0.3 if self.ordered else 0.02):
                most_s = 3.0 if self.ordered else 0.1
                await asyncio.sleep(self._randomness.uniform(0.01, most_s))
            return found

        return slowed


# -- ways to the application -------------------------------------------------------------------------------------------


class InProcess:
    """The application in this process, with as little as possible around it."""

    def __init__(self, orders: Orders, points: Points) -> None:
        settings = Settings(
            database_url=orders.database_url, redis_cache_url=orders.cache_url, jwt_secret=SECRET, respcache_key=SECRET,
            **({} if orders.sabotage is None else {"respcache_audit_share": 0}),
        )  # fmt: skip
        self._app = create_app(settings)
        self._points = points
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said: asyncio.Queue[str] = asyncio.Queue()
        self._life: asyncio.Task[None] | None = None
        self._heads: dict[str, list[tuple[bytes, bytes]]] = {}
        points.put_into(self._app.app.state.cache)

    @property
    def alarms(self) -> list[str]:
        """What the cache's own audit has found."""
        audit = self._app.app.state.cache.audit
        return [] if audit is None else [str(finding) for finding in audit.findings]

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
            self._life = asyncio.create_task(self._app({"type": "lifespan", "asgi": {"version": "3.0"}}, self._events.get, send))
        await self._events.put({"type": event})
        said = await self._said.get()
        if said != f"{event}.complete":
            raise RuntimeError(said)

    async def send(self, method: str, path: str, user: User, body: bytes | None = None) -> Answer:
        """Send a request and return the answer."""
        plain, _, query = path.partition("?")
        headers = self._heads.get(user.name)
        if headers is None:
            headers = self._heads[user.name] = [(b"host", b"faults"), (b"authorization", f"Bearer {user.token}".encode())]
        if body is not None:
            headers = [*headers, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": plain,
            "raw_path": plain.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("faults", 80),
        }  # fmt: skip
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
                if method != "GET":
                    self._points.reach("before the acknowledgement")
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
        """Wait until the server listens: it is started at the same time as we are. Whoever started both stops waiting first."""
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

    async def send(self, method: str, path: str, user: User, body: bytes | None = None) -> Answer:
        """Send a request and return the answer. Raises ``ConnectionError`` when the server went away."""
        head = self._heads.setdefault(user.name, f"host: faults\r\nauthorization: Bearer {user.token}\r\n")
        request = f"{method} {path} HTTP/1.1\r\n{head}"
        if body is not None:
            request += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        try:
            reader, writer = await self._connected()
            writer.write(request.encode() + b"\r\n" + (body or b""))
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines if line)}
            content = await reader.readexactly(int(headers[b"content-length"]))
        except (OSError, asyncio.IncompleteReadError) as error:
            await self.stop()
            self._idle.clear()
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


# -- clients -----------------------------------------------------------------------------------------------------------


class Clients:
    """The readers and writers of this process."""

    def __init__(self, orders: Orders, transport: Transport, recorder: Recorder, settled: Settled) -> None:
        self.reads = self.writes = 0
        self.how: Counter[str] = Counter()
        self.problems: list[tuple[float, float, str]] = []
        self.done = asyncio.Event()
        self._orders = orders
        self._transport = transport
        self._recorder = recorder
        self._settled = settled
        self._queries = queries()
        self._weights = list(itertools.accumulate(query.weight for query in self._queries))
        self._finished: set[str] = set()  # leads that need no more attempt

    def start(self) -> list[asyncio.Task[None]]:
        """Let them begin; they end when ``done`` is set."""
        clients = [self._reader] * self._orders.readers + [self._writer] * self._orders.writers
        return [
            asyncio.create_task(client(Random(f"{self._orders.seed}/{self._orders.name}/{number}")))
            for number, client in enumerate(clients)
        ]

    async def _reader(self, randomness: Random) -> None:
        while not self.done.is_set():
            (query,) = randomness.choices(self._queries, cum_weights=self._weights)
            how = await self._read(query)
            pause_s = self._orders.pause_s if how in ("hit", "shared") else REST_S
            await asyncio.sleep(randomness.uniform(0, 2 * pause_s))

    async def _read(self, query: Query) -> str | None:
        """Read and record; return where the answer came from, None for a failure."""
        settled = self._settled[query.tenant]
        start = now()
        answer = await self._ask("GET", query.path, query.user, start)
        if answer is None:
            return None
        status, headers, body, _ = answer
        end = now()
        if status != 200:
            self._problem(start, f"GET {query.path}: {status} {body[:200]!r}")
            return None
        values, told = query.read(body, settled)
        how = _how(headers.get(b"cache-status", b""))
        self._recorder.append(Read(start, end, values, self._orders.name, query.name, told, None, how))
        self.reads += 1
        self.how[how] += 1
        return how

    async def _writer(self, randomness: Random) -> None:
        rows = [(name, "accounts", "account", "next_action") for name in ACCOUNTS]
        rows += [(name, "opportunities", "opportunity", "next_step") for name in OPPORTUNITIES]
        while not self.done.is_set():
            tenant = randomness.choice(TENANTS)
            kind = randomness.random()
            if kind < 0.4:
                await self._dispose(tenant, randomness)
            elif kind < 0.45:
                change = orjson.dumps({"note": randomness.random()})
                await self._change(tenant, "settings", "/api/settings", change, "settings")
            else:
                name, plural, singular, field = randomness.choice(rows)
                change = orjson.dumps({field: str(randomness.random())})
                await self._change(tenant, name, f"/api/{plural}/{key(f'{tenant}/{name}')}", change, singular)
            await asyncio.sleep(randomness.uniform(0.15, 0.9))

    async def _change(self, tenant: str, name: str, path: str, change: bytes, singular: str) -> None:
        """Change a row; the answer shows the version that it had under its lock, so this write made the next one."""
        register, process, started = f"{tenant}/{name}", self._orders.name, now()
        self._recorder.append(Write(register, None, started, None, None, process))
        answer = await self._ask("PUT", path, ADMINS[tenant], started, change)
        if answer is None:
            return
        status, headers, body, left = answer
        if status != 200:
            self._problem(started, f"PUT {path}: {status} {body[:200]!r}")
            return
        version = orjson.loads(body)["data"][singular]["v"] + 1
        self._recorder.append(Write(register, version, started, left, left, process))
        self._written(started, headers)

    async def _dispose(self, tenant: str, randomness: Random) -> None:
        """Convert or delete leads that are ours to write."""
        numbers = [n for n in window(self._settled[tenant]) if self._is_ours(n) and lead(tenant, n) not in self._finished]
        if not numbers:
            return
        number = randomness.choice(numbers)
        path, ends = f"/api/leads/{key(lead(tenant, number))}", [lead(tenant, number)]
        if fate(number) == "convert":
            await self._end("POST", f"{path}/convert", tenant, ends, becomes=contact(tenant, number))
        elif fate(number) == "delete":
            await self._end("DELETE", path, tenant, ends)
        else:
            many = [n for n in numbers if fate(n) == "bulk-delete" and n // BATCH == number // BATCH]
            body = orjson.dumps({"ids": [str(key(lead(tenant, n))) for n in many]})
            await self._end("POST", "/api/leads/bulk-delete", tenant, [lead(tenant, n) for n in many], body)

    def _is_ours(self, number: int) -> bool:
        group = number // BATCH if fate(number) == "bulk-delete" else number // len(FATES)
        return fate(number) != "psql" and group % self._orders.of == self._orders.share

    async def _end(
        self, method: str, path: str, tenant: str, leads: list[str], body: bytes = b"{}", *, becomes: str | None = None
    ) -> None:
        """End leads; where they were gone already, an attempt whose answer was lost has done it."""
        started, process = now(), self._orders.name
        made = [(register, 2) for register in leads] + ([(becomes, 1)] if becomes else [])
        for register, version in made:
            self._recorder.append(Write(register, version, started, None, None, process))
        answer = await self._ask(method, path, ADMINS[tenant], started, body)
        if answer is None:
            return
        status, headers, content, left = answer
        if status not in (200, 404, 409):
            self._problem(started, f"{method} {path}: {status} {content[:200]!r}")
            return
        self._finished.update(leads)
        if status == 200:
            for register, version in made:
                self._recorder.append(Write(register, version, started, left, left, process))
            self._written(started, headers)

    def _written(self, started: float, headers: Headers) -> None:
        self.writes += 1
        said = headers.get(b"x-cache-invalidation")
        self.how["write confirmed" if said is None else "write safe"] += 1
        if said not in (None, b"pending; safe"):
            self._problem(started, f"a write was acknowledged with {said!r}")

    async def _ask(self, method: str, path: str, user: User, started: float, body: bytes | None = None) -> Answer | None:
        try:
            return await self._transport.send(method, path, user, body)
        except Exception as error:
            self._problem(started, f"{method} {path}: {error!r}")
            await asyncio.sleep(AFTER_ERROR_S)
            return None

    def _problem(self, started: float, what: str) -> None:
        self.problems.append((started, now(), what))


def _how(cache_status: bytes) -> str:
    if b"; hit" in cache_status:
        return "hit"
    if b"collapsed" in cache_status:
        return "shared"
    return "bypass" if b"fwd=bypass" in cache_status else "fill"


# -- the process -------------------------------------------------------------------------------------------------------


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def _report(clients: Clients, alarms: list[str], **more: Any) -> None:
    problems, clients.problems = clients.problems, []
    told = {"reads": clients.reads, "writes": clients.writes, "how": clients.how, "problems": problems, "alarms": alarms, **more}
    print(json.dumps(told), flush=True)


async def _obey(lines: asyncio.StreamReader, clients: Clients, points: Points, slowness: Slowness) -> None:
    """Do what comes in; return when it is to end. Without whoever gives orders, this process has no reason to be."""
    while line := await lines.readline():
        order = json.loads(line)
        points.ordered = order.get("die", points.ordered)
        slowness.ordered = order.get("slow", slowness.ordered)
        if order.get("end"):
            return
    os._exit(3)


async def _work(orders: Orders, lines: asyncio.StreamReader) -> None:
    points, slowness = Points(), Slowness(Random(f"{orders.seed}/{orders.name}/slowness"))
    transport = InProcess(orders, points) if orders.base is None else OverHttp(orders.base)
    if orders.base is None:
        slowness.put_into_handlers()
    settled = Settled(Path(orders.settled))
    with Recorder(orders.history) as recorder:
        await transport.start()
        clients = Clients(orders, transport, recorder, settled)
        tasks = clients.start()
        obeying = asyncio.create_task(_obey(lines, clients, points, slowness))
        while not obeying.done():
            await asyncio.wait({obeying}, timeout=REPORT_S)
            _report(clients, transport.alarms)
        clients.done.set()
        _, hanging = await asyncio.wait(tasks, timeout=FINISH_S)
        for task in hanging:
            clients.problems.append((now() - FINISH_S, now(), f"a request has not ended: {task!r}"))
            task.cancel()
        broken = [task.exception() for task in tasks if task not in hanging and task.exception()]
        for error in broken:
            clients.problems.append((now(), now(), f"a client broke: {error!r}"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISH_S):
                await transport.stop()
        _report(clients, transport.alarms, ended=True)


async def _main() -> None:
    lines = await _lines()
    orders = msgspec.json.decode(await lines.readline(), type=Orders)
    if orders.sabotage is not None:
        sabotage.commit(orders.sabotage)
    await _work(orders, lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("crm").setLevel(logging.CRITICAL)  # an outage of the database is no news here
    uvloop.run(_main())
