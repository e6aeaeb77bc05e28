"""The invalidation map: every write of the application against every cached read. The oracle is what the reads return."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest

from crm.models import Account, BizDevSource, Contact, Employee, Lead

from .conftest import Crm, hit

pytestmark = pytest.mark.anyio
Ids = dict[str, Any]
Write = Callable[[Crm, Ids], Awaitable[Any]]

READS = {
    "accounts": "/api/accounts",
    "account search": "/api/accounts/search?q=Base",
    "account": "/api/accounts/{account}",
    "people": "/api/accounts/{account}/related-people",
    "leads": "/api/leads",
    "lead": "/api/leads/{lead}",
    "contacts": "/api/contacts",
    "contact search": "/api/contacts/search?q=Base",
    "contact": "/api/contacts/{contact}",
    "sources": "/api/bizdevsources",
    "source": "/api/bizdevsources/{source}",
}


def call(method: str, path: str, body: Any = None) -> Write:
    async def write(crm: Crm, ids: Ids) -> Any:
        answer = await crm.as_user("ann").request(method, path.format(**ids), json=body)
        assert answer.status_code in (200, 201), answer.text

    return write


async def external_orm(crm: Crm, ids: Ids) -> None:
    """A worker in the same process, outside any request."""
    async with crm.session() as session, session.begin():
        (await session.get_one(Account, ids["account"])).name = "Base renamed by a worker"
    await crm.cache.settled()


async def employee_moves(crm: Crm, ids: Ids) -> None:
    async with crm.session() as session, session.begin():
        (await session.get_one(Employee, crm.users["ann"].id)).role = "admin"
    await crm.cache.settled()


ACCOUNTS = {"accounts", "account search"}
ONE = {"account", "people"}
JOINED = {"leads", "lead", "contacts", "contact search", "contact", "sources", "source", "people"}
PEOPLE = {"people"}

MAP: dict[str, tuple[Write, set[str]]] = {
    "account create": (call("POST", "/api/accounts", {"name": "Base 2"}), ACCOUNTS),
    "account rename": (call("PUT", "/api/accounts/{account}", {"name": "Base renamed"}), ACCOUNTS | {"account"} | JOINED),
    "account delete": (call("DELETE", "/api/accounts/{account}"), ACCOUNTS | ONE | JOINED),
    "lead create": (call("POST", "/api/leads", {"first_name": "A", "last_name": "B"}), {"leads"}),
    "lead change": (call("PUT", "/api/leads/{lead}", {"city": "Ulm"}), {"leads", "lead", "people"}),
    "lead delete": (call("DELETE", "/api/leads/{lead}"), {"leads", "lead", "people"}),
    "contact create": (call("POST", "/api/contacts", {"first_name": "Base", "last_name": "2"}), {"contacts", "contact search"}),
    "contact change": (
        call("PUT", "/api/contacts/{contact}", {"city": "Ulm"}),
        {"contacts", "contact search", "contact", "people"},
    ),
    "contact delete": (call("DELETE", "/api/contacts/{contact}"), {"contacts", "contact search", "contact", "people"}),
    "source change": (call("PUT", "/api/bizdevsources/{source}", {"city": "Ulm"}), {"sources", "source"}),
    "source delete": (call("DELETE", "/api/bizdevsources/{source}"), {"sources", "source"}),
    "convert": (
        call("POST", "/api/leads/{lead}/convert", {"create_account": True, "account_name": "Base 3"}),
        {"leads", "lead", "contacts", "contact search", "accounts", "account search", "people"},
    ),
    "promote": (
        call("POST", "/api/bizdevsources/{source}/promote", {}),
        {"sources", "source", "accounts", "account search", "contacts", "contact search"},
    ),
    "worker": (external_orm, ACCOUNTS | {"account"} | JOINED),
    "employee": (employee_moves, set()),
}
"""Write -> the reads whose bytes it may change. Others must not change; whether they stay cached is not promised."""


async def base(crm: Crm) -> Ids:
    tenant = crm.tenants["acme"].id
    account, lead, contact, source = uuid4(), uuid4(), uuid4(), uuid4()
    await crm.save(
        Account(id=account, tenant_id=tenant, name="Base"),
        Lead(id=lead, tenant_id=tenant, first_name="Base", last_name="Lead", account_id=account),
        Contact(id=contact, tenant_id=tenant, first_name="Base", last_name="Contact", account_id=account),
        BizDevSource(
            id=source, tenant_id=tenant, source_name="Base", company_name="Base 4", account_id=account, contact_person="Base P"
        ),
    )
    await crm.cache.settled()
    return {"account": account, "lead": lead, "contact": contact, "source": source}


@pytest.mark.parametrize("name", MAP)
async def test_every_cached_read_is_right_after_every_write(crm: Crm, name: str) -> None:
    """Each answer after the write equals the one without the cache, and exactly the mapped ones may have changed."""
    write, expected = MAP[name]
    ids = await base(crm)
    http = crm.as_user("ann")
    before = {}
    for read, path in READS.items():
        await http.get(path.format(**ids))
        before[read] = await http.get(path.format(**ids))
        assert hit(before[read]), read
    await write(crm, ids)
    after = {read: await http.get(path.format(**ids)) for read, path in READS.items()}
    crm.cache._switched_off = True
    truth = {read: await http.get(path.format(**ids)) for read, path in READS.items()}
    wrong = [
        read for read in READS if (after[read].status_code, after[read].content) != (truth[read].status_code, truth[read].content)
    ]
    changed = {read for read in READS if truth[read].content != before[read].content}
    assert wrong == []
    assert changed <= expected, f"not in the map: {changed - expected}"
    assert changed or not expected


async def test_every_cached_route_is_read_above(crm: Crm) -> None:
    """A new cached route must be added to the walk."""
    cached = {route.template for route in crm.app.prepare().routes if route.policy is not None}
    walked = {path.partition("?")[0] for path in READS.values()}
    for name in ("account", "lead", "contact", "source"):
        walked = {path.replace("{" + name + "}", "{id}") for path in walked}
    assert cached == walked


async def test_a_write_leaves_other_tenants_cached(crm: Crm) -> None:
    """One bump, one tenant."""
    for user in ("ann", "gus"):
        for _ in range(2):
            await crm.as_user(user).get("/api/accounts")
    await crm.as_user("ann").post("/api/accounts", json={"name": "x"})
    assert hit(await crm.as_user("gus").get("/api/accounts"))
    assert not hit(await crm.as_user("ann").get("/api/accounts"))
