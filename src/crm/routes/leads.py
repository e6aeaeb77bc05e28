"""Leads: people who may become customers; conversion turns them into contacts."""

from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import Body, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func

from crm import caching, crud
from crm.bodies import Ids
from crm.db import WritableRows, WriteRows
from crm.errors import ApiError, respond
from crm.listing import Word, as_record
from crm.models import LEAD_STATUS, Account, Contact, Lead, Opportunity, as_uuid, now
from crm.module import Module
from crm.transitions import record_transition, relink, was_converted

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
    deleted="Its opportunities remain, without a lead.",
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
    """Options of a conversion."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    create_account: bool = Field(False, description="Find an account by name, or create it")
    account_name: Word | None = Field(
        None, max_length=200, description="Default: the lead's company"
    )
    selected_account_id: UUID | None = Field(None, description="Use this account instead")
    create_opportunity: bool = False
    opportunity_name: Word | None = Field(None, max_length=200)
    opportunity_amount: float | None = Field(None, ge=0, le=MAX_AMOUNT)


@router.post("/bulk-delete", summary="Delete many leads")
async def delete_leads(rows: WriteRows, body: Ids) -> Response:
    """Deletes in one transaction. `not_found` lists unknown and invisible ids."""
    return respond(await crud.delete_many(rows, Lead, body.ids), message="Leads deleted")


leads.add_records(router)


@router.post("/{id}/convert", summary="Convert a lead")
async def convert_lead(
    rows: WriteRows, id: str, body: Annotated[Conversion, Body(default_factory=Conversion)]
) -> Response:
    """Creates a contact, and if wanted an account and an opportunity, in one transaction.

    The lead is deleted. 409 if it was converted before.
    """
    identity = as_uuid(id)
    if identity is not None and await was_converted(rows, Lead, identity):
        raise ApiError(409, "Lead was already converted", code="already_converted")
    lead = await rows.get(Lead, id, lock=True)
    snapshot = as_record(lead)
    account = await _account_for(rows, lead, body)
    contact = _contact_from(lead, account)
    rows.add(contact)
    await rows.session.flush()
    opportunity = None
    if body.create_opportunity:
        opportunity = _opportunity_for(lead, contact, body)
        opportunity.account_id = account.id if account else None
        rows.add(opportunity)
    await relink(rows, lead, contact)
    moved: dict[str, Any] = {"lead_id": None, "contact_id": contact.id}
    if account is not None:
        moved["account_id"] = func.coalesce(Opportunity.account_id, account.id)
    await rows.session.execute(
        rows.update(Opportunity, unseen=True).where(Opportunity.lead_id == lead.id).values(moved)
    )
    record_transition(rows, lead, contact, action="convert", snapshot=snapshot)
    await rows.session.delete(lead)
    await rows.session.flush()
    data = {
        "contact": as_record(contact),
        "account": as_record(account) if account else None,
        "opportunity": as_record(opportunity) if opportunity else None,
    }
    return respond(data, message="Lead converted and moved to contacts")


async def _account_for(rows: WritableRows, lead: Lead, body: Conversion) -> Account | None:
    """Return the selected account, the one with the name, a new one, or the lead's own."""
    if body.selected_account_id is not None:
        return await rows.get(Account, body.selected_account_id)
    if not body.create_account:
        if lead.account_id is None:
            return None
        own = rows.select(Account).where(Account.id == lead.account_id)
        return await rows.session.scalar(own)
    name = (body.account_name or lead.company or lead.display_name).strip()
    if not name:
        message = "account_name: required, because the lead has no company and no name"
        raise ApiError(422, message, field="account_name")
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


def _opportunity_for(lead: Lead, contact: Contact, body: Conversion) -> Opportunity:
    amount = body.opportunity_amount
    name = body.opportunity_name or f"{lead.company or contact.last_name or 'New'} - opportunity"
    return Opportunity(
        name=name[:200],
        stage="prospecting",
        probability=25,
        amount=lead.estimated_value if amount is None else amount,
        close_date=now().date() + timedelta(days=30),
        contact_id=contact.id,
        assigned_to=lead.assigned_to,
        source=lead.source,
    )
