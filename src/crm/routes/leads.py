"""Leads: people who may buy, until they are converted."""

from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import Body, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func

from crm import caching, crud
from crm.bodies import Ids
from crm.db import WritableRows, WriteRows, as_uuid
from crm.errors import ApiError, respond
from crm.listing import Word, as_record
from crm.models import LEAD_STATUS, Account, Contact, Lead, Opportunity, now
from crm.module import Module
from crm.transitions import already, record_transition, relink

leads = Module(
    model=Lead,
    plural="leads",
    singular="lead",
    cached=caching.leads,
    required=("first_name", "last_name"),
    choices={"status": LEAD_STATUS},
    filters=("status", "source", "account_id"),
    excludes=("status",),
    searched=(Lead.first_name, Lead.last_name, Lead.email, Lead.phone, Lead.company),
    search_as="query",
    stats_by="status",
    deleted="Its opportunities stay, without a lead.",
)
router = leads.router()
COPIED = (
    "first_name",
    "last_name",
    "email",
    "phone",
    "job_title",
    "address",
    "city",
    "state",
    "zip",
    "country",
    "assigned_to",
)
MAX_AMOUNT = 9_999_999_999_999.99


class Conversion(BaseModel):
    """What becomes of a lead besides a contact."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    create_account: bool = Field(False, description="Find the account by name, or create it")
    account_name: Word | None = Field(
        None, max_length=200, description="The lead's company if left out"
    )
    selected_account_id: UUID | None = Field(None, description="An existing account instead")
    create_opportunity: bool = False
    opportunity_name: Word | None = Field(None, max_length=200)
    opportunity_amount: float | None = Field(None, ge=0, le=MAX_AMOUNT)


@router.post("/bulk-delete", summary="Delete many leads")
async def delete_leads(rows: WriteRows, body: Ids) -> Response:
    """In one transaction. What is not there, or not yours to see, is listed in `not_found`."""
    return respond(await crud.remove_many(rows, Lead, body.ids), message="Leads deleted")


leads.add_records(router)


@router.post("/{id}/convert", summary="Convert a lead")
async def convert_lead(
    rows: WriteRows, id: str, body: Annotated[Conversion, Body(default_factory=Conversion)]
) -> Response:
    """Make it a contact, with an account and an opportunity if asked, in one transaction. 409 when
    it was converted before."""
    identity = as_uuid(id)
    if identity is not None and await already(rows, "leads", identity, "convert"):
        raise ApiError(409, "Lead was already converted", code="already_converted")
    lead = await rows.get(Lead, id, lock=True)
    snapshot = as_record(lead)
    account = await _account_for(rows, lead, body)
    contact = _contact_from(lead, account)
    rows.add(contact)
    await rows.session.flush()
    opportunity = (
        _opportunity_for(lead, contact, account, body) if body.create_opportunity else None
    )
    if opportunity is not None:
        rows.add(opportunity)
    await relink(rows, lead, contact)
    moved: dict[str, Any] = {"lead_id": None, "contact_id": contact.id}
    if account is not None:
        moved["account_id"] = func.coalesce(Opportunity.account_id, account.id)
    await rows.session.execute(
        rows.update(Opportunity, unseen=True).where(Opportunity.lead_id == lead.id).values(moved)
    )
    record_transition(rows, "leads", lead.id, "contacts", contact.id, "convert", snapshot)
    await rows.session.delete(lead)
    await rows.session.flush()
    data = {
        "contact": as_record(contact),
        "account": as_record(account) if account else None,
        "opportunity": as_record(opportunity) if opportunity else None,
    }
    return respond(data, message="Lead converted and moved to contacts")


async def _account_for(rows: WritableRows, lead: Lead, body: Conversion) -> Account | None:
    """Return the selected account, or one of that name, or a new one, or the lead's own."""
    if body.selected_account_id is not None:
        return await rows.get(Account, body.selected_account_id)
    if not body.create_account:
        return (
            await rows.session.scalar(rows.select(Account).where(Account.id == lead.account_id))
            if lead.account_id
            else None
        )
    name = (
        body.account_name or lead.company or f"{lead.first_name or ''} {lead.last_name or ''}"
    ).strip()
    if not name:
        raise ApiError(
            422, "account_name: the lead has no company, give a name", field="account_name"
        )
    found = (
        rows.select(Account)
        .where(func.lower(Account.name) == name.lower())
        .order_by(Account.created_at)
        .limit(1)
    )
    account = await rows.session.scalar(found)
    if account is None:
        account = Account(
            name=name, type="prospect", phone=lead.phone, assigned_to=lead.assigned_to
        )
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
        metadata_={
            **lead.metadata_,
            "converted_from_lead_id": str(lead.id),
            "converted_at": now().isoformat(),
        },
    )


def _opportunity_for(
    lead: Lead, contact: Contact, account: Account | None, body: Conversion
) -> Opportunity:
    name = body.opportunity_name or f"{lead.company or contact.last_name or 'New'} - opportunity"
    return Opportunity(
        name=name[:200],
        stage="prospecting",
        probability=25,
        amount=body.opportunity_amount
        if body.opportunity_amount is not None
        else lead.estimated_value,
        close_date=now().date() + timedelta(days=30),
        account_id=account.id if account else None,
        contact_id=contact.id,
        assigned_to=lead.assigned_to,
        source=lead.source,
    )
