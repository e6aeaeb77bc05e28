"""BizDev sources: where business may come from, until they are promoted to accounts."""

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from crm import caching, crud
from crm.bodies import body_for
from crm.db import ReadRows, WriteRows
from crm.errors import ApiError, respond
from crm.filters import parse_filter, parse_values
from crm.listing import Choice, Filter, Limit, Offset, Sort, as_record, one, page
from crm.models import SOURCE_STATUS, Account, BizDevSource, Contact
from crm.transitions import record_transition, relink_activities, relink_opportunities

router = APIRouter(prefix="/api/bizdevsources", tags=["bizdevsources"])
CHOICES = {"status": SOURCE_STATUS}
NewSource = body_for(BizDevSource, "NewBizDevSource", required=["source_name"], choices=CHOICES)
SourceChange = body_for(BizDevSource, "BizDevSourceChange", choices=CHOICES)
columns = BizDevSource.__table__.c


class Promotion(BaseModel):
    """How a source is promoted."""

    model_config = ConfigDict(extra="ignore")

    delete_source: bool = Field(False, description="Delete the source afterwards; a snapshot stays")


@router.get("", summary="List BizDev sources")
@caching.bizdevsources_list
async def list_sources(
    rows: ReadRows,
    status: Choice = None,
    source_type: Choice = None,
    priority: Choice = None,
    assigned_to: Choice = None,
    filter: Filter = None,
    sort: Sort = None,
    limit: Limit = 50,
    offset: Offset = 0,
) -> Response:
    """Newest first."""
    where = [
        *parse_values(status, columns.status, field="status"),
        *parse_values(source_type, columns.source_type, field="source_type"),
        *parse_values(priority, columns.priority, field="priority"),
        *parse_values(assigned_to, columns.assigned_to, field="assigned_to"),
        *parse_filter(filter, BizDevSource.__table__),
    ]
    return respond(await page(rows, BizDevSource, plural="bizdevsources", where=where, limit=limit, offset=offset, sort=sort))


@router.get("/{id}", summary="Show a BizDev source")
@caching.bizdevsources_detail
async def show_source(rows: ReadRows, id: str) -> Response:
    """One source."""
    return respond({"bizdevsource": await one(rows, BizDevSource, id)})


@router.post("", status_code=201, summary="Create a BizDev source")
async def create_source(rows: WriteRows, body: NewSource) -> Response:  # type: ignore[valid-type]
    """Only `source_name` is required."""
    return respond({"bizdevsource": await crud.create(rows, BizDevSource, body)}, status=201, message="BizDev source created")


@router.put("/{id}", summary="Change a BizDev source")
async def change_source(rows: WriteRows, id: str, body: SourceChange) -> Response:  # type: ignore[valid-type]
    """Only the given fields change."""
    return respond({"bizdevsource": await crud.change(rows, BizDevSource, id, body)}, message="BizDev source updated")


@router.delete("/{id}", summary="Delete a BizDev source")
async def delete_source(rows: WriteRows, id: str) -> Response:
    """Its account, if it was promoted, stays."""
    return respond(await crud.remove(rows, BizDevSource, id), message="BizDev source deleted")


@router.post("/{id}/promote", summary="Promote a BizDev source")
async def promote_source(rows: WriteRows, id: str, body: Promotion) -> Response:
    """Make it an account, and its contact person a contact, in one transaction. 409 when it was promoted before."""
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
    await relink_activities(rows, ("bizdev_source", source.id), ("account", account.id, account.name))
    await relink_opportunities(rows, source.id, account.id)
    record_transition(rows, "bizdev_sources", source.id, "accounts", account.id, "promote", snapshot)
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
