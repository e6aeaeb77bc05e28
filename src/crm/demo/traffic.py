"""Traffic for the demo: people of many tenants who look at lists, open records and change them.

Partly an open loop: visits begin at moments that chance alone decides, so a slow answer does not
keep the next visitor away; within a visit, the next page is asked for when the last one is there
and was thought about. Some pages ask for several things at once. Tenants, people, lists and their
variants are popular by Zipf's law. All choices come from a seed (what they meet depends on when
answers come). Every answer is compared with what this traffic wrote before (``demo_memory.py``).
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import httpx2
import orjson
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from crm.auth import issue_token
from crm.demo.counters import DemoCounters, Way
from crm.demo.expected import (
    VERSION,
    Expected,
    ExpectedRows,
    Mine,
    Row,
    minimum,
    stale_record,
    stale_rows,
)
from crm.demo.seed import FIRST, LAST, TRADES, WORDS
from crm.models import Employee, Tenant

THINK_S = 0.8
"""What somebody thinks about a page, on average."""

PAGES = 7
"""What somebody looks at besides the first page, on average."""

MOST_PAGES = 30
MOST_VISITS = 500
"""That are under way at once; more are skipped, and counted."""

DEADLINE_S = 30.0
"""For an answer: in an outage a write may wait 2 s."""

FINISH_S = 10.0
TOKEN_HOURS = 24 * 30.0
LIST = 50
NOTABLE = 8
"""Records of a list that people open, words that they search for."""

LATEST = 5
"""Records of each module in the report that everybody begins with."""


@dataclass(frozen=True)
class VisitKind:
    """A module as people use it: a new record, the field that changes, and how its list is filtered
    and ordered."""

    singular: str
    new: Callable[[Random], dict[str, Any]]
    changing: str
    filters: tuple[str, ...]


def _name(chance: Random) -> dict[str, Any]:
    return {"first_name": chance.choice(FIRST), "last_name": chance.choice(LAST)}


def _firm(chance: Random) -> str:
    return f"{chance.choice(WORDS)} {chance.choice(TRADES)} {chance.randrange(1000)}"


MODULES = {
    "accounts": VisitKind("account", lambda chance: {"name": _firm(chance), "type": "prospect"}, "next_action",
                     ("type=customer", "sort=name", "industry=Software", "sort=-annual_revenue&limit=20")),
    "leads": VisitKind("lead", lambda chance: {**_name(chance), "company": _firm(chance)}, "description",
                  ("status=new", "status=qualified", "source=event", "sort=-estimated_value&limit=20")),
    "contacts": VisitKind("contact", lambda chance: {**_name(chance), "department": "Sales"}, "department",
                     ("status=active", "sort=last_name", "status=customer")),
    "opportunities": VisitKind("opportunity", lambda chance: {"name": f"{_firm(chance)} deal", "amount": chance.randrange(9000)},
                          "next_step", ("stage=proposal", "sort=-amount&limit=20", "stage=negotiation")),
    "activities": VisitKind("activity", lambda chance: {"type": "call", "subject": f"Call "
                                                                              f"{_firm(chance)}"}, "outcome",
                       ("status=overdue", "type=call", "type=meeting&limit=20")),
    "tasks": VisitKind("task", lambda chance: {"description": f"Ring {_firm(chance)}"}, "result", ("status=PENDING",)),
    "documents": VisitKind("document", lambda chance: {"name": f"Offer for {_firm(chance)}"}, "description",
                      ("file_type=application/pdf",)),
    "bizdevsources": VisitKind("bizdevsource", lambda chance: {"source_name": f"{_firm(chance)} list", "company_name": _firm(chance),
                                                          "contact_person": " ".join(_name(chance).values())}, "city",
                          ("priority=high", "status=active")),
}  # fmt: skip
"""The most popular first."""

LOOKS = {"list": 10, "record": 7, "page": 2, "filter": 5, "search": 1, "people": 1, "figures": 2}
WRITES = {"create": 0.3, "change": 0.5, "delete": 0.2, "move": 0.2}
"""How often people do what. ``move``: convert a lead, promote a source."""

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
"""What is written most comes first."""

REQUESTS = {"home": 4, "figures": 2, "create": 2, "change": 2, "delete": 2, "move": 3}
"""What takes more than one."""

T = TypeVar("T")


@dataclass(frozen=True)
class Visitor:
    """Somebody who uses the CRM."""

    tenant: str
    role: str
    token: str


async def people(database_url: str, secret: str) -> dict[str, list[Visitor]]:
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
    """Choose by Zipf's law: the second is half as popular as the first, the third a third."""
    return chance.choices(
        ranked,
        cum_weights=list(itertools.accumulate(1 / rank for rank in range(1, len(ranked) + 1))),
    )[0]


def plan(chance: Random) -> list[tuple[str, str]]:
    """Plan a visit: what is done, in which module."""
    doings = {**LOOKS, **WRITES}
    count = 1 + min(MOST_PAGES, int(chance.expovariate(1 / PAGES)))
    steps = [("home", "")]
    for doing in chance.choices(list(doings), list(doings.values()), k=count):
        steps.append((doing, popular(WRITTEN if doing in WRITES else tuple(MODULES), chance)))
    return steps


class Traffic:
    """Visits to a CRM until told to stop. ``users`` by tenant, those who come most first, of
    both."""

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
        self._counters = counters
        self._rate = rate
        self._seed = seed
        self._memories = {tenant: ExpectedRows() for tenant in users}
        self._done = asyncio.Event()
        self._visits: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Begin no more visits, and end those that are under way with the answers that they wait
        for."""
        self._done.set()

    async def run(self) -> None:
        """Send until ``stop`` is called."""
        chance = Random(self._seed)
        for number in itertools.count():
            steps, tenant = plan(chance), popular(list(self._users), chance)
            requests = sum(REQUESTS.get(doing, 1) for doing, _ in steps)
            if len(self._visits) < MOST_VISITS:
                visit = Visit(
                    self, popular(self._users[tenant], chance), Random(f"{self._seed}/{number}")
                )
                self._keep(asyncio.create_task(visit.run(steps)))
            else:
                self._counters.skipped += 1
            if await self.pause(chance.expovariate(1) * requests / self._rate):
                break
        if self._visits:
            _, late = await asyncio.wait(self._visits, timeout=FINISH_S)
            for visit_task in late:
                visit_task.cancel()

    async def pause(self, seconds: float) -> bool:
        """Wait so long, or until told to stop; return whether that is."""
        try:
            await asyncio.wait_for(self._done.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def memory(self, person: Visitor) -> ExpectedRows:
        """Return what was written in somebody's tenant."""
        return self._memories[person.tenant]

    async def ask(
        self,
        person: Visitor,
        method: str,
        path: str,
        body: Row | None = None,
        *,
        may_be_gone: bool = False,
    ) -> tuple[int, Any]:
        """Send a request; return status and data of the answer, or status 0 if there is none.
        Counts it, and what is wrong.

        ``may_be_gone``: *not found* is an answer like others.
        """
        counters, began, outage = self._counters, time.perf_counter(), self._counters.outage
        headers = {"authorization": f"Bearer {person.token}"}
        try:
            answer = await self._client.request(method, path, headers=headers, json=body)
        except httpx2.HTTPError as error:
            counters.fail(
                f"{method} {path}: {type(error).__name__} {error}", outage=outage or counters.outage
            )
            return 0, None
        took_ms, outage = 1000 * (time.perf_counter() - began), outage or counters.outage
        hit = "; hit" in answer.headers.get("cache-status", "")
        way: Way = "hit" if hit else "database" if method == "GET" else "write"
        counters.answered(way, took_ms, tenant=person.tenant, outage=outage)
        if answer.status_code >= 400 and not (may_be_gone and answer.status_code == 404):
            counters.fail(
                f"{method} {path}: {answer.status_code} {answer.text[:200]}", outage=outage
            )
            return 0, None
        return answer.status_code, orjson.loads(answer.content).get("data")

    def judge(self, request: str, expected: Expected, stale: Sequence[str]) -> None:
        """Note what an answer shows of records that we wrote."""
        self._counters.compared += len(expected)
        if stale:
            self._counters.note_stale(request, stale)

    def did(self, doing: str) -> None:
        """Count something that was done."""
        self._counters.kinds[doing] += 1

    def missing(self, path: str) -> None:
        """Note a record that must be there whoever asks, and is not."""
        self._counters.fail(f"GET {path}: 404", outage=self._counters.outage)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._visits.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._visits.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._counters.fail(f"a visit ended with {error!r}", outage=self._counters.outage)


class Visit:
    """What one person does, one thing after the other."""

    def __init__(self, traffic: Traffic, person: Visitor, chance: Random) -> None:
        self._traffic = traffic
        self._person = person
        self._chance = chance
        self._memory = traffic.memory(person)
        self._seen: dict[str, list[str]] = {}  # ids of the list that was looked at last

    async def run(self, steps: Sequence[tuple[str, str]]) -> None:
        """Do what is planned, and think in between."""
        for doing, module in steps:
            await getattr(self, f"_{doing}")(module)
            if doing not in WRITES:
                self._traffic.did(doing)
            if await self._traffic.pause(self._chance.expovariate(1 / THINK_S)):
                return

    # -- looking -----------------------------------------------------------------------------------

    async def _home(self, module: str) -> None:
        """Everything that the first page shows, at once."""
        await asyncio.gather(
            self._report(), self._get("/api/settings"), self._rows("activities", "?status=overdue&limit=10"),
            self._get("/api/opportunities/count"),
        )  # fmt: skip

    async def _report(self) -> None:
        path, looks = (
            "/api/reports/dashboard-bundle",
            {module: self._memory.expected(module) for module in MODULES},
        )
        if found := await self._get(path):
            for module, look in looks.items():
                self._traffic.judge(
                    path, look, [*stale_rows(look, found["latest"][module], first=LATEST)]
                )

    async def _list(self, module: str) -> None:
        self._seen[module] = [row["id"] for row in await self._rows(module, "", first=LIST)]

    async def _page(self, module: str) -> None:
        await self._rows(module, f"?offset={popular(range(LIST, 4 * LIST, LIST), self._chance)}")

    async def _filter(self, module: str) -> None:
        await self._rows(module, f"?{popular(MODULES[module].filters, self._chance)}")

    async def _search(self, module: str) -> None:
        await self._rows("accounts", f"/search?q={popular(WORDS[:NOTABLE], self._chance).lower()}")

    async def _counters(self, module: str) -> None:
        await asyncio.gather(
            self._get("/api/opportunities/stats"), self._get("/api/opportunities/count")
        )

    async def _people(self, module: str) -> None:
        """The people of an account, where one was seen."""
        if not (accounts := self._seen.get("accounts")):
            return await self._list("accounts")
        path = f"/api/accounts/{popular(accounts[:NOTABLE], self._chance)}/related-people"
        await self._traffic.ask(self._person, "GET", path, may_be_gone=True)

    async def _record(self, module: str) -> None:
        """One of ours, or of the list that was looked at; without either, the list."""
        ours, seen = list(self._memory.kept.get(module, ())), self._seen.get(module, [])[:NOTABLE]
        if not ours and not seen:
            return await self._list(module)
        record = (
            self._chance.choice(ours)
            if ours and self._chance.random() < 0.3
            else popular(seen or ours, self._chance)
        )
        mine, path = self._memory.find(module, record), f"/api/{module}/{record}"
        look = [] if mine is None else [(mine, minimum(mine))]
        status, data = await self._traffic.ask(self._person, "GET", path, may_be_gone=True)
        row = data[MODULES[module].singular] if status == 200 else None
        if status == 404 and mine is None and self._memory.find(module, record) is None:
            self._traffic.missing(path)
        if status:
            stale = [word for one, least in look for word in stale_record(one, least, row=row)]
            self._traffic.judge(path, look, stale)

    async def _rows(self, module: str, query: str, *, first: int | None = None) -> list[Row]:
        path, look = f"/api/{module}{query}", self._memory.expected(module)
        found = await self._get(path)
        if found is None:
            return []
        rows: list[Row] = found[module]
        self._traffic.judge(path, look, [*stale_rows(look, rows, first=first)])
        return rows

    async def _get(self, path: str) -> Any:
        _, data = await self._traffic.ask(self._person, "GET", path)
        return data

    # -- writing, and looking at what became of it -------------------------------------------------

    async def _create(self, module: str) -> None:
        if self._memory.full(module):
            return await self._delete(module)
        body = {**MODULES[module].new(self._chance), VERSION: 1}
        _, data = await self._traffic.ask(self._person, "POST", f"/api/{module}", body)
        if data:
            self._memory.add(module, data[MODULES[module].singular])
            self._traffic.did("create")
        await self._list(module)

    async def _change(self, module: str) -> None:
        mine = self._memory.take(module, self._chance)
        if mine is None:
            return await self._create(module)
        mine.sent += 1
        body = {
            VERSION: mine.sent,
            MODULES[module].changing: f"Seen by {self._person.role} {self._chance.randrange(1000)}",
        }
        status, _ = await self._traffic.ask(self._person, "PUT", f"/api/{module}/{mine.id}", body)
        (self._memory.written if status else self._memory.forget)(mine)
        self._traffic.did("change")
        await self._list(module)

    async def _delete(self, module: str) -> None:
        mine = self._memory.take(module, self._chance)
        if mine is None:
            return await self._create(module)
        await self._end(mine, "DELETE", f"/api/{module}/{mine.id}")
        self._traffic.did("delete")
        await self._list(module)

    async def _move(self, module: str) -> None:
        """Convert a lead, or promote a source; one is created first where there is none."""
        source = self._chance.random() < 0.3
        module, verb, into = (
            ("bizdevsources", "promote", "accounts") if source else ("leads", "convert", "contacts")
        )
        mine = self._memory.take(module, self._chance)
        if mine is None or self._memory.full(into):
            if mine is not None:
                mine.busy = False
            await (self._create(module) if mine is None else self._delete(into))
            return await self._list(module)
        body = (
            {"delete_source": True}
            if source
            else {"create_opportunity": not self._memory.full("opportunities")}
        )
        made = await self._end(mine, "POST", f"/api/{module}/{mine.id}/{verb}", body)
        for plural, singular in (
            ("accounts", "account"),
            ("contacts", "contact"),
            ("opportunities", "opportunity"),
        ):
            if made and made.get(singular):
                self._memory.add(plural, made[singular])
        self._traffic.did(verb)
        await asyncio.gather(self._list(module), self._list(into))

    async def _end(self, mine: Mine, method: str, path: str, body: Row | None = None) -> Any:
        mine.ending = True
        status, data = await self._traffic.ask(self._person, method, path, body)
        (self._memory.ended if status else self._memory.forget)(mine)
        return data
