"""Simulated users for the demo: they read lists, open records and change them, in many tenants.

The load is partly an open loop: visits begin at random times, so a slow response does not delay the
next visitor. Within a visit the loop is closed: the next page is requested after the last one has
arrived and a think time has passed. Some pages send several requests at once. The popularity of
tenants, users, lists and filters follows Zipf's law. All random choices come from one seed; their
results also depend on when responses arrive. Every response is compared with what this traffic
wrote before (``expected.py``).
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import httpx2
import orjson
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from crm.auth import issue_token
from crm.demo.counters import DemoCounters, Source
from crm.demo.expected import (
    VERSION,
    Expectation,
    ExpectedRows,
    Row,
    WrittenRecord,
    expect,
    stale_record,
    stale_rows,
)
from crm.demo.seed import FIRST, LAST, TRADES, WORDS
from crm.models import Employee, Tenant

THINK_S = 0.8
"""Mean time that a user thinks about a page."""

PAGES = 7
"""Mean number of pages of a visit, besides the first."""

MAX_PAGES = 30
MAX_VISITS = 500
"""Concurrent visits; further ones are skipped and counted."""

DEADLINE_S = 30.0
"""Timeout of a request. In an outage a write may wait 2 s."""

FINISH_S = 10.0
TOKEN_HOURS = 24 * 30.0
LIST = 50
POPULAR = 8
"""The number of records of a list that users open, and of words that they search for."""

LATEST = 5
"""The number of records of each module in the report of the first page."""


@dataclass(frozen=True)
class DemoModule:
    """How the traffic uses a module.

    ``new`` returns a new record; ``changing`` is the field that updates set; ``filters`` are query
    strings of lists, the most popular first.
    """

    singular: str
    changing: str
    new: Callable[[Random], dict[str, Any]]
    filters: tuple[str, ...]


def _name(chance: Random) -> dict[str, Any]:
    return {"first_name": chance.choice(FIRST), "last_name": chance.choice(LAST)}


def _firm(chance: Random) -> str:
    return f"{chance.choice(WORDS)} {chance.choice(TRADES)} {chance.randrange(1000)}"


MODULES = {
    "accounts": DemoModule(
        "account",
        "next_action",
        new=lambda chance: {"name": _firm(chance), "type": "prospect"},
        filters=(
            "type=customer",
            "sort=name",
            "industry=Software",
            "sort=-annual_revenue&limit=20",
        ),
    ),
    "leads": DemoModule(
        "lead",
        "description",
        new=lambda chance: {**_name(chance), "company": _firm(chance)},
        filters=(
            "status=new",
            "status=qualified",
            "source=event",
            "sort=-estimated_value&limit=20",
        ),
    ),
    "contacts": DemoModule(
        "contact",
        "department",
        new=lambda chance: {**_name(chance), "department": "Sales"},
        filters=("status=active", "sort=last_name", "status=customer"),
    ),
    "opportunities": DemoModule(
        "opportunity",
        "next_step",
        new=lambda chance: {"name": f"{_firm(chance)} deal", "amount": chance.randrange(9000)},
        filters=("stage=proposal", "sort=-amount&limit=20", "stage=negotiation"),
    ),
    "activities": DemoModule(
        "activity",
        "outcome",
        new=lambda chance: {"type": "call", "subject": f"Call {_firm(chance)}"},
        filters=("status=overdue", "type=call", "type=meeting&limit=20"),
    ),
    "tasks": DemoModule(
        "task",
        "result",
        new=lambda chance: {"description": f"Ring {_firm(chance)}"},
        filters=("status=PENDING",),
    ),
    "documents": DemoModule(
        "document",
        "description",
        new=lambda chance: {"name": f"Offer for {_firm(chance)}"},
        filters=("file_type=application/pdf",),
    ),
    "bizdevsources": DemoModule(
        "bizdevsource",
        "city",
        new=lambda chance: {
            "source_name": f"{_firm(chance)} list",
            "company_name": _firm(chance),
            "contact_person": " ".join(_name(chance).values()),
        },
        filters=("priority=high", "status=active"),
    ),
}
"""The modules, the most popular first."""

READS = {"list": 10, "record": 7, "page": 2, "filter": 5, "search": 1, "people": 1, "stats": 2}
WRITES = {"create": 0.3, "change": 0.5, "delete": 0.2, "move": 0.2}
"""Kinds of pages and their relative frequency. ``move``: convert a lead, promote a source."""

WRITTEN = (
    "activities",
    "tasks",
    "leads",
    "contacts",
    "opportunities",
    "documents",
    "accounts",
    "bizdevsources",
)
"""The modules, the most frequently written first."""

REQUESTS = {"home": 4, "stats": 2, "create": 2, "change": 2, "delete": 2, "move": 3}
"""The number of requests of a page, if it is more than one."""

T = TypeVar("T")


@dataclass(frozen=True)
class Visitor:
    """A user of the CRM."""

    tenant: str
    role: str
    token: str


@dataclass(frozen=True)
class DemoResponse:
    """The response to a request. ``status`` is 0 if it failed; ``data`` is that of the envelope."""

    status: int
    data: Any = None


async def visitors(database_url: str, secret: str) -> dict[str, list[Visitor]]:
    """Return the users of each tenant, by its slug."""
    engine = create_async_engine(database_url)
    try:
        async with AsyncSession(engine) as session:
            found: dict[str, list[Visitor]] = {}
            users = (
                select(Employee, Tenant.slug)
                .join(Tenant, Tenant.id == Employee.tenant_id)
                .order_by(Employee.email)
            )
            for user, slug in await session.execute(users):
                token = issue_token(secret, user, hours=TOKEN_HOURS)
                found.setdefault(slug, []).append(Visitor(slug, user.role, token))
            return found
    finally:
        await engine.dispose()


def popular(ranked: Sequence[T], chance: Random) -> T:
    """Choose by Zipf's law: the item of rank n has the weight 1/n."""
    weights = itertools.accumulate(1 / rank for rank in range(1, len(ranked) + 1))
    return chance.choices(ranked, cum_weights=list(weights))[0]


def plan(chance: Random) -> list[tuple[str, str]]:
    """Return the pages of a visit as (kind, module)."""
    kinds = {**READS, **WRITES}
    count = 1 + min(MAX_PAGES, int(chance.expovariate(1 / PAGES)))
    steps = [("home", "")]
    for kind in chance.choices(list(kinds), list(kinds.values()), k=count):
        steps.append((kind, popular(WRITTEN if kind in WRITES else tuple(MODULES), chance)))
    return steps


class Traffic:
    """Sends visits until stopped. ``users`` are by tenant; both are ordered by popularity."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        users: dict[str, list[Visitor]],
        counters: DemoCounters,
        *,
        rate: float,
        seed: int,
    ) -> None:
        self._client = client
        self._users = users
        self.counters = counters
        self._rate = rate
        self._seed = seed
        self._expected = {tenant: ExpectedRows() for tenant in users}
        self._stopped = asyncio.Event()
        self._visits: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Begin no more visits; current ones end after the responses that they wait for."""
        self._stopped.set()

    async def run(self) -> None:
        """Send visits until ``stop`` is called; return when the current ones have ended."""
        chance = Random(self._seed)
        for number in itertools.count():
            steps, tenant = plan(chance), popular(list(self._users), chance)
            requests = sum(REQUESTS.get(kind, 1) for kind, _ in steps)
            if len(self._visits) < MAX_VISITS:
                visitor = popular(self._users[tenant], chance)
                visit = Visit(self, visitor, Random(f"{self._seed}/{number}"))
                task = asyncio.create_task(visit.run(steps))
                self._visits.add(task)
                task.add_done_callback(self._ended)
            else:
                self.counters.skipped += 1
            if await self.pause(chance.expovariate(1) * requests / self._rate):
                break
        if self._visits:
            _, late = await asyncio.wait(self._visits, timeout=FINISH_S)
            for visit_task in late:
                visit_task.cancel()

    async def pause(self, seconds: float) -> bool:
        """Sleep, or return True as soon as ``stop`` is called."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def expected(self, visitor: Visitor) -> ExpectedRows:
        """Return the records that were written in a visitor's tenant."""
        return self._expected[visitor.tenant]

    async def send(
        self, visitor: Visitor, request: httpx2.Request, *, may_be_gone: bool = False
    ) -> DemoResponse:
        """Send a request; count its response or failure.

        ``may_be_gone``: 404 is not a failure.
        """
        request.headers["authorization"] = f"Bearer {visitor.token}"
        name = f"{request.method} {request.url.raw_path.decode()}"
        counters, began, outage = self.counters, time.perf_counter(), self.counters.outage
        try:
            response = await self._client.send(request)
        except httpx2.HTTPError as error:
            problem = f"{name}: {type(error).__name__} {error}"
            counters.fail(problem, outage=outage or counters.outage)
            return DemoResponse(0)
        took_ms, outage = 1000 * (time.perf_counter() - began), outage or counters.outage
        hit = "; hit" in response.headers.get("cache-status", "")
        source: Source = "hit" if hit else "database" if request.method == "GET" else "write"
        counters.response(source, took_ms, tenant=visitor.tenant, outage=outage)
        if response.status_code >= 400 and not (may_be_gone and response.status_code == 404):
            problem = f"{name}: {response.status_code} {response.text[:200]}"
            counters.fail(problem, outage=outage)
            return DemoResponse(0)
        return DemoResponse(response.status_code, orjson.loads(response.content).get("data"))

    def request(self, method: str, path: str, body: Row | None = None) -> httpx2.Request:
        """Return a request to the CRM."""
        return self._client.build_request(method, path, json=body)

    def compare(self, path: str, expected: Sequence[Expectation], stale: Sequence[str]) -> None:
        """Count the comparisons of a response with written records."""
        self.counters.compared += len(expected)
        if stale:
            self.counters.note_stale(path, stale)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._visits.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.counters.fail(f"a visit ended with {error!r}", outage=self.counters.outage)


class Visit:
    """The pages of one visitor, one after the other."""

    def __init__(self, traffic: Traffic, visitor: Visitor, chance: Random) -> None:
        self._traffic = traffic
        self._visitor = visitor
        self._chance = chance
        self._expected = traffic.expected(visitor)
        self._listed: dict[str, list[str]] = {}  # module: ids of the list that was read last
        self._pages: dict[str, Callable[[str], Awaitable[None]]] = {
            "home": self._home,
            "list": self._list,
            "record": self._record,
            "page": self._page,
            "filter": self._filter,
            "search": self._search,
            "people": self._people,
            "stats": self._stats,
            "create": self._create,
            "change": self._change,
            "delete": self._delete,
            "move": self._move,
        }

    async def run(self, steps: Sequence[tuple[str, str]]) -> None:
        """Request the planned pages, with think times."""
        for kind, module in steps:
            await self._pages[kind](module)
            if kind not in WRITES:
                self._count(kind)
            if await self._traffic.pause(self._chance.expovariate(1 / THINK_S)):
                return

    def _count(self, kind: str) -> None:
        self._traffic.counters.kinds[kind] += 1

    # -- reads -------------------------------------------------------------------------------------

    async def _home(self, module: str) -> None:
        """Send the four requests of the first page at once."""
        await asyncio.gather(
            self._report(),
            self._get("/api/settings"),
            self._rows("activities", "?status=overdue&limit=10"),
            self._get("/api/opportunities/count"),
        )

    async def _report(self) -> None:
        path = "/api/reports/dashboard-bundle"
        expected = {module: self._expected.expectations(module) for module in MODULES}
        if found := await self._get(path):
            for module, expectations in expected.items():
                rows = found["latest"][module]
                stale = [*stale_rows(expectations, rows, first=LATEST)]
                self._traffic.compare(path, expectations, stale)

    async def _list(self, module: str) -> None:
        self._listed[module] = [row["id"] for row in await self._rows(module, "", first=LIST)]

    async def _page(self, module: str) -> None:
        await self._rows(module, f"?offset={popular(range(LIST, 4 * LIST, LIST), self._chance)}")

    async def _filter(self, module: str) -> None:
        await self._rows(module, f"?{popular(MODULES[module].filters, self._chance)}")

    async def _search(self, module: str) -> None:
        await self._rows("accounts", f"/search?q={popular(WORDS[:POPULAR], self._chance).lower()}")

    async def _stats(self, module: str) -> None:
        await asyncio.gather(
            self._get("/api/opportunities/stats"), self._get("/api/opportunities/count")
        )

    async def _people(self, module: str) -> None:
        """Read the people of a listed account; without one, read the list of accounts."""
        if not (accounts := self._listed.get("accounts")):
            return await self._list("accounts")
        path = f"/api/accounts/{popular(accounts[:POPULAR], self._chance)}/related-people"
        request = self._traffic.request("GET", path)
        await self._traffic.send(self._visitor, request, may_be_gone=True)
        return None

    async def _record(self, module: str) -> None:
        """Read a written record or a listed one; without either, read the list."""
        written = list(self._expected.records.get(module, ()))
        listed = self._listed.get(module, [])[:POPULAR]
        if not written and not listed:
            return await self._list(module)
        if written and self._chance.random() < 0.3:
            key = self._chance.choice(written)
        else:
            key = popular(listed or written, self._chance)
        record, path = self._expected.find(module, key), f"/api/{module}/{key}"
        expected = [] if record is None else [expect(record)]
        request = self._traffic.request("GET", path)
        response = await self._traffic.send(self._visitor, request, may_be_gone=True)
        found = response.status == 200
        row = response.data[MODULES[module].singular] if found else None
        if response.status == 404 and record is None and self._expected.find(module, key) is None:
            counters = self._traffic.counters
            counters.fail(f"GET {path}: 404", outage=counters.outage)
        if response.status:
            stale = [text for item in expected for text in stale_record(item, row)]
            self._traffic.compare(path, expected, stale)
        return None

    async def _rows(self, module: str, query: str, *, first: int | None = None) -> list[Row]:
        path, expected = f"/api/{module}{query}", self._expected.expectations(module)
        found = await self._get(path)
        if found is None:
            return []
        rows: list[Row] = found[module]
        self._traffic.compare(path, expected, [*stale_rows(expected, rows, first=first)])
        return rows

    async def _get(self, path: str) -> Any:
        response = await self._traffic.send(self._visitor, self._traffic.request("GET", path))
        return response.data

    # -- writes, each followed by a list that must show it -----------------------------------------

    async def _create(self, module: str) -> None:
        if self._expected.full(module):
            return await self._delete(module)
        body = {**MODULES[module].new(self._chance), VERSION: 1}
        request = self._traffic.request("POST", f"/api/{module}", body)
        response = await self._traffic.send(self._visitor, request)
        if response.data:
            self._expected.add(module, response.data[MODULES[module].singular])
            self._count("create")
        return await self._list(module)

    async def _change(self, module: str) -> None:
        record = self._expected.take(module, self._chance)
        if record is None:
            return await self._create(module)
        record.sent += 1
        text = f"Seen by {self._visitor.role} {self._chance.randrange(1000)}"
        body = {VERSION: record.sent, MODULES[module].changing: text}
        request = self._traffic.request("PUT", f"/api/{module}/{record.id}", body)
        if (await self._traffic.send(self._visitor, request)).status:
            self._expected.confirm(record)
        else:
            self._expected.discard(record)
        self._count("change")
        return await self._list(module)

    async def _delete(self, module: str) -> None:
        record = self._expected.take(module, self._chance)
        if record is None:
            # if all records are being written, one more would exceed the limit
            page = self._list if self._expected.full(module) else self._create
            return await page(module)
        await self._end(record, self._traffic.request("DELETE", f"/api/{module}/{record.id}"))
        self._count("delete")
        return await self._list(module)

    async def _move(self, module: str) -> None:
        """Convert a lead or promote a source; without one, create one."""
        source = self._chance.random() < 0.3
        module, verb, into = (
            ("bizdevsources", "promote", "accounts") if source else ("leads", "convert", "contacts")
        )
        record = self._expected.take(module, self._chance)
        if record is None or self._expected.full(into):
            if record is not None:
                record.busy = False
            await (self._create(module) if record is None else self._delete(into))
            return await self._list(module)
        body = {"create_opportunity": not self._expected.full("opportunities")}
        if source:
            body = {"delete_source": True}
        request = self._traffic.request("POST", f"/api/{module}/{record.id}/{verb}", body)
        created = await self._end(record, request)
        for plural in ("accounts", "contacts", "opportunities"):
            if created and (row := created.get(MODULES[plural].singular)):
                self._expected.add(plural, row)
        self._count(verb)
        await asyncio.gather(self._list(module), self._list(into))
        return None

    async def _end(self, record: WrittenRecord, request: httpx2.Request) -> Any:
        """Send a request that ends a record; return the data of its response."""
        record.ending = True
        response = await self._traffic.send(self._visitor, request)
        if response.status:
            self._expected.confirm_deletion(record)
        else:
            self._expected.discard(record)
        return response.data
