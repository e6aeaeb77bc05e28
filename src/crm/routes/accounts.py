"""Accounts: companies."""

from typing import Any

from fastapi import Response

from crm import caching
from crm.db import ReadRows
from crm.errors import respond
from crm.listing import Limit, Offset, Search, page, records, select_records
from crm.models import ACCOUNT_TYPES, HEALTH, Account, Contact, Lead
from crm.module import Module

MOST_PEOPLE = 200
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
    deleted="Its contacts, leads and opportunities stay, without an account.",
)
router = accounts.router()


@router.get("/search", summary="Search accounts")
@caching.accounts.list
async def search_accounts(rows: ReadRows, q: Search = None, limit: Limit = 25, offset: Offset = 0) -> Response:
    """Look in name, mail, website and city."""
    return respond(await page(rows, Account, plural="accounts", where=accounts.matching(q), limit=limit, offset=offset))


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


accounts.add_records(router)
