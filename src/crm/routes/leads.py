"""Leads: people who may buy, until they are converted."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, or_

from crm import caching, crud
from crm.bodies import body_for
from crm.db import ReadRows, Rows, WriteRows, as_uuid
from crm.errors import ApiError, respond
from crm.filters import contains, parse_filter, parse_values
from crm.listing import Choice, Filter, Limit, Offset, Search, Sort, Word, as_record, one, page
from crm.models import LEAD_STATUS, Account, Contact, Lead, Opportunity, now
from crm.transitions import already, record_transition, relink_activities

router = APIRouter(prefix="/api/leads", tags=["leads"])
CHOICES = {"status": LEAD_STATUS}
NewLead = body_for(Lead, "NewLead", required=["first_name", "last_name"], choices=CHOICES)
LeadChange = body_for(Lead, "LeadChange", choices=CHOICES)
columns = Lead.__table__.c
FOUND_IN = (Lead.first_name, Lead.last_name, Lead.email, Lead.phone, Lead.company)
COPIED = ("first_name", "last_name", "email", "phone", "job_title", "address", "city", "state", "zip", "country", "assigned_to")
MAX_AMOUNT = 9_999_999_999_999.99


class Conversion(BaseModel):
    """What becomes of a lead besides a contact."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    create_account: bool = Field(False, description="Find the account by name, or create it")
    account_name: Word | None = Field(None, max_length=200, description="The lead's company if left out")
    selected_account_id: UUID | None = Field(None, description="An existing account instead")
    create_opportunity: bool = False
    opportunity_name: Word | None = Field(None, max_length=200)
    opportunity_amount: float | None = Field(None, ge=0, le=MAX_AMOUNT)


@router.get("", summary="List leads")
@caching.leads_list
async def list_leads(
    rows: ReadRows,
    status: Choice = None,
    exclude_status: Choice = None,
    source: Choice = None,
    account_id: Choice = None,
    query: Search = None,
    assigned_to: Choice = None,
    filter: Filter = None,
    sort: Sort = None,
    limit: Limit = 50,
    offset: Offset = 0,
) -> Response:
    """Newest first; `stats` counts all visible leads by status; `status` may be `{"$nin":["lost"]}`."""
    where = [
        *parse_values(status, columns.status, field="status"),
        *([Lead.status.not_in(exclude_status.split(","))] if exclude_status else []),
        *parse_values(source, columns.source, field="source"),
        *parse_values(account_id, columns.account_id, field="account_id"),
        *parse_values(assigned_to, columns.assigned_to, field="assigned_to"),
        *([or_(*(contains(column, query) for column in FOUND_IN))] if query else []),
        *parse_filter(filter, Lead.__table__),
    ]
    data = await page(rows, Lead, plural="leads", where=where, limit=limit, offset=offset, sort=sort, stats_by=Lead.status)
    return respond(data)


@router.get("/{id}", summary="Show a lead")
@caching.leads_detail
async def show_lead(rows: ReadRows, id: str) -> Response:
    """One lead."""
    return respond({"lead": await one(rows, Lead, id)})


@router.post("", status_code=201, summary="Create a lead")
async def create_lead(rows: WriteRows, body: NewLead) -> Response:  # type: ignore[valid-type]
    """First and last name are required."""
    return respond({"lead": await crud.create(rows, Lead, body)}, status=201, message="Lead created")


@router.put("/{id}", summary="Change a lead")
async def change_lead(rows: WriteRows, id: str, body: LeadChange) -> Response:  # type: ignore[valid-type]
    """Only the given fields change."""
    return respond({"lead": await crud.change(rows, Lead, id, body)}, message="Lead updated")


@router.delete("/{id}", summary="Delete a lead")
async def delete_lead(rows: WriteRows, id: str) -> Response:
    """Its opportunities stay, without a lead."""
    return respond(await crud.remove(rows, Lead, id), message="Lead deleted")


@router.post("/{id}/convert", summary="Convert a lead")
async def convert_lead(rows: WriteRows, id: str, body: Conversion) -> Response:
    """Make it a contact, with an account and an opportunity if asked, in one transaction. 409 when it was converted before."""
    identity = as_uuid(id)
    if identity is not None and await already(rows, "leads", identity, "convert"):
        raise ApiError(409, "Lead was already converted", code="already_converted")
    lead = await rows.get(Lead, id, lock=True)
    snapshot = as_record(lead)
    account = await _account_for(rows, lead, body)
    contact = _contact_from(lead, account)
    rows.add(contact)
    await rows.session.flush()
    opportunity = _opportunity_for(lead, contact, account, body) if body.create_opportunity else None
    if opportunity is not None:
        rows.add(opportunity)
    name = f"{contact.first_name or ''} {contact.last_name or ''}".strip()
    await relink_activities(rows, ("lead", lead.id), ("contact", contact.id, name))
    moved: dict[str, Any] = {"lead_id": None, "contact_id": contact.id}
    if account is not None:
        moved["account_id"] = func.coalesce(Opportunity.account_id, account.id)
    await rows.session.execute(rows.update(Opportunity).where(Opportunity.lead_id == lead.id).values(moved))
    record_transition(rows, "leads", lead.id, "contacts", contact.id, "convert", snapshot)
    await rows.session.delete(lead)
    await rows.session.flush()
    data = {
        "contact": as_record(contact),
        "account": as_record(account) if account else None,
        "opportunity": as_record(opportunity) if opportunity else None,
    }
    return respond(data, message="Lead converted and moved to contacts")


async def _account_for(rows: Rows, lead: Lead, body: Conversion) -> Account | None:
    """Return the selected account, or one of that name, or a new one, or the lead's own."""
    if body.selected_account_id is not None:
        return await rows.get(Account, body.selected_account_id)
    if not body.create_account:
        return await rows.session.scalar(rows.select(Account).where(Account.id == lead.account_id)) if lead.account_id else None
    name = (body.account_name or lead.company or f"{lead.first_name or ''} {lead.last_name or ''}").strip()
    if not name:
        raise ApiError(422, "account_name: the lead has no company, give a name", field="account_name")
    found = rows.select(Account).where(func.lower(Account.name) == name.lower()).order_by(Account.created_at).limit(1)
    account = await rows.session.scalar(found)
    if account is None:
        account = Account(name=name, type="prospect", phone=lead.phone, assigned_to=lead.assigned_to)
        rows.add(account)
        await rows.session.flush()
    return account


def _contact_from(lead: Lead, account: Account | None) -> Contact:
    return Contact(
        **{name: getattr(lead, name) for name in COPIED},
        status="prospect",
        lead_source=lead.source,
        tags=list(lead.tags),
        account_id=account.id if account else lead.account_id,
        metadata_={**lead.metadata_, "converted_from_lead_id": str(lead.id), "converted_at": now().isoformat()},
    )


def _opportunity_for(lead: Lead, contact: Contact, account: Account | None, body: Conversion) -> Opportunity:
    name = body.opportunity_name or f"{lead.company or contact.last_name or 'New'} - opportunity"
    return Opportunity(
        name=name[:200],
        stage="prospecting",
        probability=25,
        amount=body.opportunity_amount if body.opportunity_amount is not None else lead.estimated_value,
        close_date=now().date() + timedelta(days=30),
        account_id=account.id if account else None,
        contact_id=contact.id,
        assigned_to=lead.assigned_to,
        source=lead.source,
    )
