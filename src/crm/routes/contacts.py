"""Contacts: people whom we know."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from sqlalchemy import or_

from crm import caching, crud
from crm.bodies import body_for
from crm.db import ReadRows, WriteRows
from crm.errors import respond
from crm.filters import contains, parse_filter, parse_values
from crm.listing import Choice, Filter, Limit, Offset, Search, Sort, Word, one, page
from crm.models import CONTACT_STATUS, Contact

router = APIRouter(prefix="/api/contacts", tags=["contacts"])
CHOICES = {"status": CONTACT_STATUS}
NewContact = body_for(Contact, "NewContact", required=["first_name", "last_name"], choices=CHOICES)
ContactChange = body_for(Contact, "ContactChange", choices=CHOICES)
columns = Contact.__table__.c
FOUND_IN = (
    Contact.first_name,
    Contact.last_name,
    Contact.email,
    Contact.phone,
    Contact.mobile,
    Contact.first_name + " " + Contact.last_name,
)


@router.get("", summary="List contacts")
@caching.contacts_list
async def list_contacts(
    rows: ReadRows,
    status: Choice = None,
    account_id: Choice = None,
    search: Search = None,
    assigned_to: Choice = None,
    filter: Filter = None,
    sort: Sort = None,
    limit: Limit = 50,
    offset: Offset = 0,
) -> Response:
    """Newest first, each with the name of its account."""
    where = [
        *parse_values(status, columns.status, field="status"),
        *parse_values(account_id, columns.account_id, field="account_id"),
        *parse_values(assigned_to, columns.assigned_to, field="assigned_to"),
        *([or_(*(contains(column, search) for column in FOUND_IN))] if search else []),
        *parse_filter(filter, Contact.__table__),
    ]
    return respond(await page(rows, Contact, plural="contacts", where=where, limit=limit, offset=offset, sort=sort))


@router.get("/search", summary="Search contacts")
@caching.contacts_search
async def search_contacts(
    rows: ReadRows, q: Annotated[Word, Query(min_length=1, max_length=200)], limit: Limit = 25, offset: Offset = 0
) -> Response:
    """Look in names, mail and phone numbers; last changed first."""
    where = [or_(*(contains(column, q) for column in FOUND_IN))]
    return respond(await page(rows, Contact, plural="contacts", where=where, limit=limit, offset=offset, newest_by="updated_at"))


@router.get("/{id}", summary="Show a contact")
@caching.contacts_detail
async def show_contact(rows: ReadRows, id: str) -> Response:
    """One contact."""
    return respond({"contact": await one(rows, Contact, id)})


@router.post("", status_code=201, summary="Create a contact")
async def create_contact(rows: WriteRows, body: NewContact) -> Response:  # type: ignore[valid-type]
    """First and last name are required."""
    return respond({"contact": await crud.create(rows, Contact, body)}, status=201, message="Contact created")


@router.put("/{id}", summary="Change a contact")
async def change_contact(rows: WriteRows, id: str, body: ContactChange) -> Response:  # type: ignore[valid-type]
    """Only the given fields change."""
    return respond({"contact": await crud.change(rows, Contact, id, body)}, message="Contact updated")


@router.delete("/{id}", summary="Delete a contact")
async def delete_contact(rows: WriteRows, id: str) -> Response:
    """Its opportunities stay, without a contact."""
    return respond(await crud.remove(rows, Contact, id), message="Contact deleted")
