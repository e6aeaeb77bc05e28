"""How many statements a request sends: as many for one row as for many."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event

from crm.models import Account, Activity, Contact, Document, Lead, Opportunity, Task

from .conftest import NEW, SINGULAR, Crm

pytestmark = pytest.mark.anyio
MANY = 20
STATEMENTS = {
    "GET /api/accounts": 1,
    "GET /api/accounts/search?q=many": 1,
    "GET /api/accounts/{account}": 1,
    "GET /api/accounts/{account}/related-people": 1,
    "GET /api/leads": 1,
    "GET /api/leads/{lead}": 1,
    "GET /api/contacts": 1,
    "GET /api/contacts/search?q=many": 1,
    "GET /api/contacts/{contact}": 1,
    "GET /api/bizdevsources": 1,
    "GET /api/opportunities": 1,
    "GET /api/opportunities/stats": 1,
    "GET /api/opportunities/count": 1,
    "GET /api/activities": 1,
    "GET /api/activities?status=overdue": 1,
    "GET /api/documents": 1,
    "GET /api/tasks": 1,
    "GET /api/reports/dashboard-bundle": 1,
    "GET /api/settings": 1,
    "PUT /api/accounts/{account}": 3,
    "DELETE /api/accounts/{account}": 5,
    "POST /api/leads/{lead}/convert": 10,
    "POST /api/leads/bulk-delete": 5,
    "POST /api/activities/mark-overdue": 1,
}
"""Request: its statements, besides the one that reads who the caller is."""
BODIES: dict[str, dict[str, Any]] = {"PUT": {"name": "Renamed"}}


@contextmanager
def counting(crm: Crm) -> Iterator[list[str]]:
    """Collect the statements that are sent."""
    sent: list[str] = []

    def note(connection: Any, cursor: Any, sql: str, *rest: Any) -> None:
        sent.append(sql)

    engine = crm.app.app.state.sessions.kw["bind"].sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


async def fill(crm: Crm, count: int) -> dict[str, Any]:
    """Make so many records of each kind, all about one account, one contact and one lead; return
    the ids of these."""
    tenant = {"tenant_id": crm.tenants["acme"].id}
    ids = {"account": uuid4(), "contact": uuid4(), "lead": uuid4()}
    account = {**tenant, "account_id": ids["account"]}
    deal = {**account, "contact_id": ids["contact"], "lead_id": ids["lead"]}
    leads = [Lead(id=ids["lead"], **account, first_name="many")] + [
        Lead(id=uuid4(), **account) for _ in range(count)
    ]
    await crm.save(
        Account(id=ids["account"], **tenant, name="many"),
        *(Account(**tenant, name="many") for _ in range(count)),
        Contact(id=ids["contact"], **account, first_name="many"),
        *(Contact(**account, first_name="many") for _ in range(count)),
        *leads,
        *(Opportunity(**deal, name="many") for _ in range(count)),
        *(
            Activity(**tenant, type="call", related_to="lead", related_id=ids["lead"])
            for _ in range(count)
        ),
        *(
            Document(**tenant, name="many", related_type="account", related_id=ids["account"])
            for _ in range(count)
        ),
        *(
            Task(**tenant, description="many", entity_type="lead", entity_id=ids["lead"])
            for _ in range(count)
        ),
    )
    return {**ids, "ids": [str(lead.id) for lead in leads[1:]]}


@pytest.mark.parametrize("count", [1, MANY])
@pytest.mark.parametrize("request_line", STATEMENTS)
async def test_the_number_of_statements_does_not_depend_on_the_number_of_rows(
    crm: Crm, request_line: str, count: int
) -> None:
    """And it is the one listed above: a change that costs another statement is seen here."""
    ids = await fill(crm, count)
    method, path = request_line.split(" ")
    body = {"ids": ids["ids"]} if "bulk" in path else BODIES.get(method, {})
    http = crm.as_user("ann")
    crm.cache.runtime.switches.everything = True
    await http.get("/api/auth/me")  # the connection's first statements are its own
    with counting(crm) as identity:
        await http.get("/api/auth/me")
    with counting(crm) as sent:
        answer = await http.request(
            method, path.format(**ids), json=body if method != "GET" else None
        )
    assert answer.status_code == 200, answer.text
    assert len(identity) == 1
    assert len(sent) - len(identity) == STATEMENTS[request_line], "\n".join(sent)


async def test_every_list_is_counted_above() -> None:
    """A new module must be added."""
    assert {f"GET /api/{module}" for module in SINGULAR} <= STATEMENTS.keys()
    assert NEW.keys() == SINGULAR.keys()
