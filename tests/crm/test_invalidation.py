"""The invalidation map: every write of the application against every cached read. The oracle is
what the reads return."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import chain, repeat
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import update

from crm.models import (
    REFERABLE,
    Account,
    Activity,
    BizDevSource,
    Contact,
    Document,
    Employee,
    Lead,
    Opportunity,
    Task,
)

from .conftest import SINGULAR, Crm, hit

pytestmark = pytest.mark.anyio
Ids = dict[str, Any]
Write = Callable[[Crm, Ids], Awaitable[Any]]

LISTS = {module: f"/api/{module}" for module in SINGULAR}
RECORDS = {name: f"/api/{module}/{{{name}}}" for module, name in SINGULAR.items()}
READS = {
    **LISTS,
    **RECORDS,
    "account search": "/api/accounts/search?q=Base",
    "people": "/api/accounts/{account}/related-people",
    "contact search": "/api/contacts/search?q=Base",
    "late activities": "/api/activities?status=overdue",
    "stages": "/api/opportunities/stats",
    "deals": "/api/opportunities/count",
    "dashboard": "/api/reports/dashboard-bundle",
    "settings": "/api/settings",
}
"""Name of a cached read: its path."""


@dataclass(frozen=True)
class Call:
    """A write over HTTP by an admin. Names in ``ids`` of the body stand for the ids of the base
    records."""

    method: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)

    async def __call__(self, crm: Crm, ids: Ids) -> None:
        """Make it."""
        body = {
            key: [str(ids[name]) for name in value] if key == "ids" else value
            for key, value in self.body.items()
        }
        answer = await crm.as_user("abe").request(self.method, self.path.format(**ids), json=body)
        assert answer.status_code in (200, 201), answer.text


async def worker(crm: Crm, ids: Ids) -> None:
    """In the same process, outside any request."""
    async with crm.session() as session, session.begin():
        (await session.get_one(Account, ids["account"])).name = "Base renamed by a worker"
    await crm.cache.settled()


async def bulk_import(crm: Crm, ids: Ids) -> None:
    """Core statements, many rows."""
    async with crm.session() as session, session.begin():
        tenant = crm.tenants["acme"].id
        await session.execute(
            update(Contact).where(Contact.tenant_id == tenant).values(department="Imported")
        )
    await crm.cache.settled()


async def employee_moves(crm: Crm, ids: Ids) -> None:
    async with crm.session() as session, session.begin():
        (await session.get_one(Employee, crm.users["abe"].id)).role = "manager"
    await crm.cache.settled()


def module(plural: str, *more: str) -> set[str]:
    """The list and the record of a module, and the dashboard."""
    return {plural, SINGULAR[plural], "dashboard", *more}


ACCOUNTS, CONTACTS = (
    module("accounts", "account search"),
    module("contacts", "contact search", "people"),
)
LEADS, SOURCES = module("leads", "people"), module("bizdevsources")
DEALS, ACTIVITIES = (
    module("opportunities", "stages", "deals"),
    module("activities", "late activities"),
)
DOCUMENTS, TASKS = module("documents"), module("tasks")
NAMED = CONTACTS | LEADS | SOURCES | module("opportunities") | ACTIVITIES | DOCUMENTS
"""What shows the name of an account."""
ABOUT = ACTIVITIES | DOCUMENTS | TASKS
"""What may be about a record."""

CHANGED = {"name": "Base renamed"}
MAP: dict[str, tuple[Write, set[str]]] = {
    "account create": (Call("POST", "/api/accounts", {"name": "Base 2"}), ACCOUNTS),
    "account rename": (Call("PUT", "/api/accounts/{account}", CHANGED), ACCOUNTS | NAMED),
    "account delete": (Call("DELETE", "/api/accounts/{account}"), ACCOUNTS | NAMED | TASKS),
    "lead create": (Call("POST", "/api/leads", {"first_name": "A", "last_name": "B"}), LEADS),
    "lead rename": (
        Call("PUT", "/api/leads/{lead}", {"first_name": "New"}),
        LEADS | ACTIVITIES | module("opportunities"),
    ),
    "lead delete": (Call("DELETE", "/api/leads/{lead}"), LEADS | ABOUT | module("opportunities")),
    "leads bulk-delete": (
        Call("POST", "/api/leads/bulk-delete", {"ids": ["lead"]}),
        LEADS | ABOUT | module("opportunities"),
    ),
    "lead convert": (
        Call(
            "POST",
            "/api/leads/{lead}/convert",
            {"create_account": True, "account_name": "Base 3", "create_opportunity": True},
        ),
        LEADS | CONTACTS | ACCOUNTS | DEALS | ABOUT,
    ),
    "contact create": (
        Call("POST", "/api/contacts", {"first_name": "Base", "last_name": "2"}),
        CONTACTS,
    ),
    "contact rename": (
        Call("PUT", "/api/contacts/{contact}", {"last_name": "New"}),
        CONTACTS | ACTIVITIES | module("opportunities"),
    ),
    "contact delete": (
        Call("DELETE", "/api/contacts/{contact}"),
        CONTACTS | ABOUT | module("opportunities"),
    ),
    "source create": (Call("POST", "/api/bizdevsources", {"source_name": "2"}), SOURCES),
    "source rename": (
        Call("PUT", "/api/bizdevsources/{bizdevsource}", {"source_name": "New"}),
        SOURCES | ACTIVITIES,
    ),
    "source delete": (Call("DELETE", "/api/bizdevsources/{bizdevsource}"), SOURCES | ABOUT),
    "sources archive": (
        Call("POST", "/api/bizdevsources/archive", {"ids": ["bizdevsource"]}),
        SOURCES,
    ),
    "source promote": (
        Call("POST", "/api/bizdevsources/{bizdevsource}/promote", {"delete_source": True}),
        SOURCES | ACCOUNTS | CONTACTS | ABOUT | module("opportunities"),
    ),
    "opportunity create": (Call("POST", "/api/opportunities", {"name": "2", "amount": 5}), DEALS),
    "opportunity rename": (
        Call("PUT", "/api/opportunities/{opportunity}", CHANGED),
        module("opportunities") | ACTIVITIES,
    ),
    "opportunity won": (
        Call("PUT", "/api/opportunities/{opportunity}", {"stage": "closed_won"}),
        DEALS,
    ),
    "opportunity delete": (Call("DELETE", "/api/opportunities/{opportunity}"), DEALS | ABOUT),
    "activity create": (Call("POST", "/api/activities", {"type": "note"}), ACTIVITIES),
    "activity change": (Call("PUT", "/api/activities/{activity}", {"subject": "New"}), ACTIVITIES),
    "activities mark-overdue": (Call("POST", "/api/activities/mark-overdue", {}), ACTIVITIES),
    "activity delete": (Call("DELETE", "/api/activities/{activity}"), ACTIVITIES),
    "document create": (Call("POST", "/api/documents", {"name": "2"}), DOCUMENTS),
    "document change": (Call("PUT", "/api/documents/{document}", CHANGED), DOCUMENTS),
    "document delete": (Call("DELETE", "/api/documents/{document}"), DOCUMENTS),
    "task create": (Call("POST", "/api/tasks", {"description": "2"}), TASKS),
    "task change": (Call("PUT", "/api/tasks/{task}", {"status": "COMPLETED"}), TASKS),
    "task delete": (Call("DELETE", "/api/tasks/{task}"), TASKS),
    "settings change": (Call("PUT", "/api/settings", {"greeting": "New"}), {"settings"}),
    "time zone": (
        Call("PUT", "/api/settings", {"timezone": "Pacific/Kiritimati"}),
        {"settings"} | ACTIVITIES,
    ),
    "visibility": (Call("PUT", "/api/settings", {"visibility_mode": "hierarchical"}), {"settings"}),
    "a worker renames an account": (worker, ACCOUNTS | NAMED),
    "an import": (bulk_import, CONTACTS),
    "an employee's role": (employee_moves, set()),
}
"""Write -> the reads whose bytes it may change. Others must not change; whether they stay cached is
not promised."""


async def base(crm: Crm) -> Ids:
    """One record of each kind, all about each other."""
    tenant = crm.tenants["acme"].id
    ids = {name: uuid4() for name in SINGULAR.values()}

    def of(name: str) -> dict[str, Any]:
        return {"id": ids[name], "tenant_id": tenant}

    account, contact, lead = ids["account"], ids["contact"], ids["lead"]
    deal = {
        "account_id": account,
        "contact_id": contact,
        "lead_id": lead,
        "source": f"bizdev_source:{ids['bizdevsource']}",
    }
    about = [(kind, ids[kind.replace("_", "")]) for kind in REFERABLE]
    more = [
        Activity(
            id=uuid4(),
            tenant_id=tenant,
            type="call",
            related_to=kind,
            related_id=key,
            related_name="Base",
        )
        for kind, key in about
    ]
    more += [
        Document(id=uuid4(), tenant_id=tenant, name="Base", related_type=kind, related_id=key)
        for kind, key in about
    ]
    more += [
        Task(id=uuid4(), tenant_id=tenant, description="Base", entity_type=kind, entity_id=key)
        for kind, key in about
    ]
    late = {
        "type": "call",
        "status": "scheduled",
        "due_date": date(2020, 1, 1),
        "related_name": "Base",
    }
    await crm.save(
        Account(**of("account"), name="Base"),
        Lead(**of("lead"), first_name="Base", last_name="Lead", account_id=account),
        Contact(**of("contact"), first_name="Base", last_name="Contact", account_id=account),
        BizDevSource(
            **of("bizdevsource"),
            source_name="Base",
            company_name="Base 4",
            account_id=account,
            contact_person="Base P",
        ),
        Opportunity(**of("opportunity"), name="Base", **deal),
        Activity(**of("activity"), **late, related_to="account", related_id=account),
        Document(**of("document"), name="Base", related_type="account", related_id=account),
        Task(**of("task"), description="Base", entity_type="account", entity_id=account),
        *more,
    )
    await crm.cache.settled()
    return ids


async def walk(crm: Crm, write: Write) -> tuple[set[str], set[str], set[str]]:
    """Warm all reads, write, and read again; return which were wrong, which changed and which were
    served from the cache."""
    ids = await base(crm)
    http = crm.as_user("abe")
    before = {}
    for read, path in READS.items():
        before[read] = await http.get(path.format(**ids))
        async with asyncio.timeout(60):
            # on a busy machine a lease may end, or the store answer too late
            for pause_s in chain([0.0], repeat(0.02)):
                if hit(before[read]):
                    break
                await asyncio.sleep(pause_s)
                before[read] = await http.get(path.format(**ids))
    await write(crm, ids)
    after = {read: await http.get(path.format(**ids)) for read, path in READS.items()}
    crm.cache.runtime.switches.everything = True
    truth = {read: await http.get(path.format(**ids)) for read, path in READS.items()}
    wrong = {
        read
        for read in READS
        if (after[read].status_code, after[read].content)
        != (truth[read].status_code, truth[read].content)
    }
    changed = {read for read in READS if truth[read].content != before[read].content}
    return wrong, changed, {read for read in READS if hit(after[read])}


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, tuple[set[str], set[str]]]]:
    """Print the whole walk in the end: pytest -s."""
    walked: dict[str, tuple[set[str], set[str]]] = {}
    yield walked
    print(
        "\n\n#: changed, and read anew   -: as before, and read anew   .: as before, from the "
        "cache\n"
    )
    for number, read in enumerate(READS):
        print(f"{'':<28}{'| ' * number}{read}")
    for name, (changed, kept) in walked.items():
        print(
            f"{name:<28}"
            + " ".join("#" if read in changed else "." if read in kept else "-" for read in READS)
        )


@pytest.mark.parametrize("name", MAP)
async def test_every_cached_read_is_right_after_every_write(
    crm: Crm, name: str, table: dict[str, tuple[set[str], set[str]]]
) -> None:
    """Each answer after the write equals the one without the cache, and exactly the mapped ones may
    have changed."""
    write, expected = MAP[name]
    wrong, changed, kept = await walk(crm, write)
    table[name] = (changed, kept)
    assert wrong == set()
    assert changed <= expected, f"not in the map: {changed - expected}"
    assert changed or not expected


def template(path: str) -> str:
    """Return the path as the route declares it."""
    return re.sub(r"\{\w+\}", "{id}", path.partition("?")[0])


async def test_every_cached_route_is_read_above(crm: Crm) -> None:
    """A new cached route must be added to the walk."""
    assert {
        route.template for route in crm.app.prepare().routes if route.policy is not None
    } == set(map(template, READS.values()))


async def test_every_write_is_made_above(crm: Crm) -> None:
    """A new route that writes must be added to the walk, or be named here."""
    no_rows_of_tenants = {
        ("POST", "/api/auth/login"),
        ("POST", "/api/cache/invalidate"),
        ("POST", "/api/cache/switch"),
    }
    paths = crm.app.app.openapi()["paths"]
    writes = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if method != "get"
    }
    made = {
        (write.method, template(write.path)) for write, _ in MAP.values() if isinstance(write, Call)
    }
    assert writes - no_rows_of_tenants == made


async def test_a_write_leaves_other_tenants_cached(crm: Crm) -> None:
    """One bump, one tenant."""
    for user in ("ann", "gus"):
        for _ in range(2):
            await crm.as_user(user).get("/api/accounts")
    await crm.as_user("ann").post("/api/accounts", json={"name": "x"})
    assert hit(await crm.as_user("gus").get("/api/accounts"))
    assert not hit(await crm.as_user("ann").get("/api/accounts"))
