"""Accounts: companies."""

import orjson
from fastapi import Response
from sqlalchemy import select

from crm import caching
from crm.db import ReadRows
from crm.errors import not_found, respond
from crm.json_rows import JsonRows
from crm.listing import Limit, Offset, Search, newest, page
from crm.models import ACCOUNT_TYPES, HEALTH, Account, Contact, Lead, as_uuid
from crm.module import Module

MAX_PEOPLE = 200
accounts = Module(
    model=Account,
    plural="accounts",
    singular="account",
    cached=caching.accounts,
    required=("name",),
    choices={"type": ACCOUNT_TYPES, "health_status": HEALTH},
    filters=("type", "industry"),
    searched=(Account.name, Account.email, Account.website, Account.city),
    stats_by="type",
    deleted="Its contacts, leads and opportunities remain, without an account.",
)
router = accounts.router()


@router.get("/search", summary="Search accounts")
@caching.accounts.list
async def search_accounts(
    rows: ReadRows, *, q: Search = None, limit: Limit = 25, offset: Offset = 0
) -> Response:
    """Searches name, email, website and city."""
    return respond(
        await page(
            rows, Account, plural="accounts", where=accounts.matching(q), limit=limit, offset=offset
        )
    )


@router.get("/{id}/related-people", summary="People of an account")
@caching.accounts_people
async def related_people(rows: ReadRows, id: str) -> Response:
    """Contacts and leads of the account, newest first; at most 200 of each."""
    key = as_uuid(id)
    people = [
        JsonRows(newest(rows, model, limit=MAX_PEOPLE).where(model.account_id == key))
        for model in (Contact, Lead)
    ]
    account = rows.select(Account, Account.id).where(Account.id == key).scalar_subquery()
    found, contacts, leads = (await rows.execute(select(account, *people))).one()
    if found is None:
        raise not_found(Account.title)
    return respond(
        {
            "account_id": found,
            "contacts": orjson.Fragment(contacts),
            "leads": orjson.Fragment(leads),
        }
    )


accounts.add_records(router)
