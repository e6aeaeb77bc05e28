"""One process of the fault suite: clients that read and write at the same time and record what they
did.

They call the CRM's ASGI application in this process, or ask a server over HTTP: of another process,
or of this one, with hits below ASGI (``transports.py``). What is to be done comes in on standard
input, one JSON object a line, the first of which says who we are (``Orders``); reports go out on
standard output.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import orjson
import uvloop

import crm.db
from crm.settings import Settings
from respcache import Level
from respcache.middleware import CacheMiddleware
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
from .transports import Answer, Below, Headers, InProcess, OverHttp, Points, Transport
from .ways import ABOVE, application

REPORT_S = 0.25
FINISH_S = 30.0
AFTER_ERROR_S = 0.05
REST_S = 0.02
"""A reader rests after what the database had to answer: an outage is not to take the processor from
those who mend it."""

ALONE_S = 4.0
"""How long a tenant is read at other levels than strict alone, one after the other: a strict read
renews the view that reads at level bounded then need not ask for."""

HITS = ("hit", "hit below ASGI")


class Orders(msgspec.Struct):
    """Who we are. ``base`` is the port of a server to be asked over HTTP; without one the
    application runs here, ``below`` with a server around it that answers hits below ASGI.

    ``pause_s`` is how long a reader rests on average; ``share`` and ``of`` say which leads are ours
    to write.
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
    below: bool = False
    database_url: str = ""
    cache_url: str = ""
    sabotage: str | None = None


class Slowness:
    """Lets handlers take a while after they have read: a little now and then, or long and often
    when it was ordered."""

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


def _application(orders: Orders, points: Points) -> CacheMiddleware:
    """Make the application for this process, that it may die in it."""
    settings = Settings(
        database_url=orders.database_url,
        redis_cache_url=orders.cache_url,
        jwt_secret=SECRET,
        respcache_key=SECRET,
        **({} if orders.sabotage is None else {"respcache_audit_share": 0}),
    )
    middleware = application(settings)
    points.put_into(middleware.cache)
    return middleware


# -- clients ---------------------------------------------------------------------------------------


class Clients:
    """The readers and writers of this process."""

    def __init__(
        self, orders: Orders, transport: Transport, recorder: Recorder, settled: Settled
    ) -> None:
        self.reads = self.writes = self.hits = 0
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
            if (
                query.level is Level.STRICT
                and query.tenant == TENANTS[int(now() / ALONE_S) % len(TENANTS)]
            ):
                continue
            how = await self._read(query)
            pause_s = self._orders.pause_s if how in (*HITS, "shared") else REST_S
            await asyncio.sleep(randomness.uniform(0, 2 * pause_s))

    async def _read(self, query: Query) -> str | None:
        """Read and record; return where the answer came from, None for a failure.

        At level bounded whatever this process has written shows at once: its reads are the session
        of its writes.
        """
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
        how, name = _how(headers), self._orders.name
        word = how if query.level is Level.STRICT else f"{query.level} {how}"
        session, slack_s = name if query.level is Level.BOUNDED else None, query.slack_s(headers)
        self._recorder.append(
            Read(start, end, values, name, query.name, told, session, word, slack_s)
        )
        self.reads += 1
        self.hits += word in HITS  # at level ttl there are some without a store
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
                await self._change(
                    tenant, name, f"/api/{plural}/{key(f'{tenant}/{name}')}", change, singular
                )
            await asyncio.sleep(randomness.uniform(0.15, 0.9))

    async def _change(
        self, tenant: str, name: str, path: str, change: bytes, singular: str
    ) -> None:
        """Change a row; the answer shows the version that it had under its lock, so this write made
        the next one."""
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
        self._recorder.append(
            Write(register, version, started, left, left, process, session=process)
        )
        self._written(started, headers)

    async def _dispose(self, tenant: str, randomness: Random) -> None:
        """Convert or delete leads that are ours to write."""
        numbers = [
            n
            for n in window(self._settled[tenant])
            if self._is_ours(n) and lead(tenant, n) not in self._finished
        ]
        if not numbers:
            return
        number = randomness.choice(numbers)
        path, ends = f"/api/leads/{key(lead(tenant, number))}", [lead(tenant, number)]
        if fate(number) == "convert":
            await self._end(
                "POST", f"{path}/convert", tenant, ends, becomes=contact(tenant, number)
            )
        elif fate(number) == "delete":
            await self._end("DELETE", path, tenant, ends)
        else:
            many = [
                n for n in numbers if fate(n) == "bulk-delete" and n // BATCH == number // BATCH
            ]
            body = orjson.dumps({"ids": [str(key(lead(tenant, n))) for n in many]})
            await self._end(
                "POST", "/api/leads/bulk-delete", tenant, [lead(tenant, n) for n in many], body
            )

    def _is_ours(self, number: int) -> bool:
        group = number // BATCH if fate(number) == "bulk-delete" else number // len(FATES)
        return fate(number) != "psql" and group % self._orders.of == self._orders.share

    async def _end(
        self,
        method: str,
        path: str,
        tenant: str,
        leads: list[str],
        body: bytes = b"{}",
        *,
        becomes: str | None = None,
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
        if said not in (None, b"pending; safe"):
            self._problem(started, f"a write was acknowledged with {said!r}")

    async def _ask(
        self, method: str, path: str, user: User, started: float, body: bytes | None = None
    ) -> Answer | None:
        try:
            return await self._transport.send(method, path, user, body)
        except Exception as error:
            self._problem(started, f"{method} {path}: {error!r}")
            await asyncio.sleep(AFTER_ERROR_S)
            return None

    def _problem(self, started: float, what: str) -> None:
        self.problems.append((started, now(), what))


def _how(headers: Headers) -> str:
    cache_status = headers.get(b"cache-status", b"")
    if b"; hit" in cache_status:
        return HITS[0] if ABOVE in headers else HITS[1]
    if b"collapsed" in cache_status:
        return "shared"
    return "bypass" if b"fwd=bypass" in cache_status else "fill"


# -- the process -----------------------------------------------------------------------------------


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    return reader


def _report(clients: Clients, alarms: list[str], **more: Any) -> None:
    problems, clients.problems = clients.problems, []
    told = {
        "reads": clients.reads,
        "writes": clients.writes,
        "hits": clients.hits,
        "problems": problems,
        "alarms": alarms,
    }
    print(json.dumps({**told, **more}), flush=True)


async def _obey(
    lines: asyncio.StreamReader, clients: Clients, points: Points, slowness: Slowness
) -> None:
    """Do what comes in; return when it is to end. Without whoever gives orders, this process has no
    reason to be."""
    while line := await lines.readline():
        order = json.loads(line)
        points.ordered = order.get("die", points.ordered)
        slowness.ordered = order.get("slow", slowness.ordered)
        if order.get("end"):
            return
    os._exit(3)


async def _work(orders: Orders, lines: asyncio.StreamReader) -> None:
    points, slowness = Points(), Slowness(Random(f"{orders.seed}/{orders.name}/slowness"))
    transport: Transport
    if orders.base is None:
        transport = (Below if orders.below else InProcess)(_application(orders, points), points)
        slowness.put_into_handlers()
    else:
        transport = OverHttp(orders.base)
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
    logging.basicConfig(
        level=logging.ERROR, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("crm").setLevel(logging.CRITICAL)  # an outage of the database is no news here
    uvloop.run(_main())
