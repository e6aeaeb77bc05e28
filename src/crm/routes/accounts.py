"""Accounts: companies."""

from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy import ColumnElement, or_

from crm import caching, crud
from crm.bodies import body_for
from crm.db import ReadRows, WriteRows
from crm.errors import respond
from crm.filters import contains, parse_filter, parse_values
from crm.listing import Choice, Filter, Limit, Offset, Search, Sort, one, page, records, select_records
from crm.models import ACCOUNT_TYPES, HEALTH, Account, Contact, Lead

router = APIRouter(prefix="/api/accounts", tags=["accounts"])
CHOICES = {"type": ACCOUNT_TYPES, "health_status": HEALTH}
NewAccount = body_for(Account, "NewAccount", required=["name"], choices=CHOICES)
AccountChange = body_for(Account, "AccountChange", choices=CHOICES)
columns = Account.__table__.c
MOST_PEOPLE = 200


def matching(text: str | None) -> list[ColumnElement[bool]]:
    """Find accounts by what people remember of them."""
    return (
        [or_(*(contains(column, text) for column in (Account.name, Account.email, Account.website, Account.city)))]
        if text
        else []
    )


@router.get("", summary="List accounts")
@caching.accounts_list
async def list_accounts(
    rows: ReadRows,
    type: Choice = None,
    industry: Choice = None,
    search: Search = None,
    assigned_to: Choice = None,
    filter: Filter = None,
    sort: Sort = None,
    limit: Limit = 50,
    offset: Offset = 0,
) -> Response:
    """Newest first; `stats` counts all visible accounts by type."""
    where = [
        *parse_values(type, columns.type, field="type"),
        *parse_values(industry, columns.industry, field="industry"),
        *parse_values(assigned_to, columns.assigned_to, field="assigned_to"),
        *matching(search),
        *parse_filter(filter, Account.__table__),
    ]
    data = await page(rows, Account, plural="accounts", where=where, limit=limit, offset=offset, sort=sort, stats_by=Account.type)
    return respond(data)


@router.get("/search", summary="Search accounts")
@caching.accounts_search
async def search_accounts(rows: ReadRows, q: Search = None, limit: Limit = 25, offset: Offset = 0) -> Response:
    """Look in name, mail, website and city."""
    return respond(await page(rows, Account, plural="accounts", where=matching(q), limit=limit, offset=offset))


@router.get("/{id}", summary="Show an account")
@caching.accounts_detail
async def show_account(rows: ReadRows, id: str) -> Response:
    """One account."""
    return respond({"account": await one(rows, Account, id)})


@router.get("/{id}/related-people", summary="People of an account")
@caching.accounts_people
async def related_people(rows: ReadRows, id: str) -> Response:
    """Contacts and leads of the account, newest first."""
    account = await rows.get(Account, id)
    data: dict[str, Any] = {"account_id": account.id}
    for plural, model in (("contacts", Contact), ("leads", Lead)):
        people = (
            select_records(rows, model).where(model.account_id == account.id).order_by(model.created_at.desc(), model.id.desc())
        )
        data[plural] = records(await rows.session.execute(people.limit(MOST_PEOPLE)))
    return respond(data)


@router.post("", status_code=201, summary="Create an account")
async def create_account(rows: WriteRows, body: NewAccount) -> Response:  # type: ignore[valid-type]
    """Only `name` is required."""
    return respond({"account": await crud.create(rows, Account, body)}, status=201, message="Account created")


@router.put("/{id}", summary="Change an account")
async def change_account(rows: WriteRows, id: str, body: AccountChange) -> Response:  # type: ignore[valid-type]
    """Only the given fields change."""
    return respond({"account": await crud.change(rows, Account, id, body)}, message="Account updated")


@router.delete("/{id}", summary="Delete an account")
async def delete_account(rows: WriteRows, id: str) -> Response:
    """Its contacts, leads and opportunities stay, without an account."""
    return respond(await crud.remove(rows, Account, id), message="Account deleted")
