"""BizDev sources: sources of new business; promotion turns them into accounts."""

from typing import Annotated, Any

from fastapi import Body, Response
from pydantic import BaseModel, ConfigDict, Field

from crm import caching
from crm.bodies import Ids
from crm.db import WriteRows
from crm.errors import ApiError, respond
from crm.listing import as_record
from crm.models import SOURCE_STATUS, Account, BizDevSource, Contact, now
from crm.module import Module
from crm.transitions import record_transition, relink, relink_opportunities

bizdevsources = Module(
    model=BizDevSource,
    plural="bizdevsources",
    singular="bizdevsource",
    cached=caching.bizdevsources,
    required=("source_name",),
    choices={"status": SOURCE_STATUS},
    filters=("status", "source_type", "priority"),
    searched=(
        BizDevSource.source_name,
        BizDevSource.company_name,
        BizDevSource.contact_person,
        BizDevSource.city,
    ),
    deleted="Its account, if it was promoted, remains.",
)
router = bizdevsources.router()


class Promotion(BaseModel):
    """Options of a promotion."""

    model_config = ConfigDict(extra="ignore")

    delete_source: bool = Field(False, description="Delete the source afterwards; a copy is kept")


@router.post("/archive", summary="Archive many BizDev sources")
async def archive_sources(rows: WriteRows, body: Ids) -> Response:
    """Archives active sources in one transaction; others stay unchanged.

    `not_found` lists unknown and invisible ids.
    """
    wanted = rows.select(BizDevSource).where(BizDevSource.id.in_(body.ids)).with_for_update()
    found = {source.id: source for source in await rows.session.scalars(wanted)}
    moved = [source for source in found.values() if source.status == "active"]
    for source in moved:
        source.status, source.archived_at = "Archived", now()
    await rows.session.flush()
    data = {"archived": len(moved), "ids": [source.id for source in moved]}
    return respond(
        {**data, "not_found": [key for key in body.ids if key not in found]},
        message="BizDev sources archived",
    )


bizdevsources.add_records(router)


@router.post("/{id}/promote", summary="Promote a BizDev source")
async def promote_source(
    rows: WriteRows, id: str, body: Annotated[Promotion, Body(default_factory=Promotion)]
) -> Response:
    """Creates an account, and a contact of the contact person, in one transaction.

    409 if the source was promoted before.
    """
    source = await rows.get(BizDevSource, id, lock=True)
    if source.status == "Promoted":
        raise ApiError(409, "BizDev source was already promoted", code="already_promoted")
    snapshot = as_record(source)
    account = _account_from(source)
    rows.add(account)
    await rows.session.flush()
    contact = _contact_from(source, account) if (source.contact_person or "").strip() else None
    if contact is not None:
        rows.add(contact)
    await relink(rows, source, account)
    await relink_opportunities(rows, source.id, account.id)
    record_transition(rows, source, account, action="promote", snapshot=snapshot)
    if body.delete_source:
        await rows.session.delete(source)
    else:
        source.status, source.account_id = "Promoted", account.id
    await rows.session.flush()
    data: dict[str, Any] = {
        "account": as_record(account),
        "contact": as_record(contact) if contact else None,
        "bizdev_source_id": source.id,
    }
    return respond(data, message="BizDev source promoted to account")


def _account_from(source: BizDevSource) -> Account:
    return Account(
        name=source.company_name or source.source_name,
        type="prospect",
        industry=source.industry,
        website=source.website,
        phone=source.phone_number or source.contact_phone,
        email=source.contact_email,
        city=source.city,
        state=source.state_province,
        country=source.country,
        tags=list(source.tags),
        assigned_to=source.assigned_to,
        metadata_={**source.metadata_, "promoted_from_bizdev_source_id": str(source.id)},
    )


def _contact_from(source: BizDevSource, account: Account) -> Contact:
    first, _, last = (source.contact_person or "").strip().partition(" ")
    return Contact(
        first_name=first[:100],
        last_name=last.strip()[:100] or None,
        email=source.contact_email,
        phone=source.contact_phone,
        account_id=account.id,
        status="prospect",
        lead_source="bizdev",
        assigned_to=source.assigned_to,
        metadata_={"bizdev_source_id": str(source.id)},
    )
