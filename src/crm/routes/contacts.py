"""Contacts: people at customers and partners."""

from typing import Annotated

from fastapi import Query, Response

from crm import caching
from crm.db import ReadRows
from crm.errors import respond
from crm.listing import Limit, Offset, Word, page
from crm.models import CONTACT_STATUS, Contact
from crm.module import Module

contacts = Module(
    model=Contact,
    plural="contacts",
    singular="contact",
    cached=caching.contacts,
    required=("first_name", "last_name"),
    choices={"status": CONTACT_STATUS},
    filters=("status", "account_id"),
    searched=(
        Contact.first_name,
        Contact.last_name,
        Contact.email,
        Contact.phone,
        Contact.mobile,
        Contact.first_name + " " + Contact.last_name,
    ),
    deleted="Its opportunities remain, without a contact.",
)
router = contacts.router()


@router.get("/search", summary="Search contacts")
@caching.contacts.list
async def search_contacts(
    rows: ReadRows,
    *,
    q: Annotated[Word, Query(min_length=1, max_length=200)],
    limit: Limit = 25,
    offset: Offset = 0,
) -> Response:
    """Searches names, email and phone numbers; last updated first."""
    found = contacts.matching(q)
    return respond(
        await page(
            rows,
            Contact,
            plural="contacts",
            where=found,
            limit=limit,
            offset=offset,
            newest_by="updated_at",
        )
    )


contacts.add_records(router)
