"""Reports over all modules."""

from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy import func, literal, union_all

from crm import caching
from crm.db import ReadRows
from crm.errors import respond
from crm.listing import overdue, records, select_records
from crm.models import Account, Activity, BizDevSource, Contact, Document, Lead, Opportunity, Owned, Task

router = APIRouter(prefix="/api/reports", tags=["reports"])
LATEST = 5
MODULES: dict[str, type[Owned]] = {
    "accounts": Account,
    "leads": Lead,
    "contacts": Contact,
    "bizdevsources": BizDevSource,
    "opportunities": Opportunity,
    "activities": Activity,
    "documents": Document,
    "tasks": Task,
}


@router.get("/dashboard-bundle", summary="Everything that a dashboard shows")
@caching.dashboard
async def dashboard_bundle(rows: ReadRows) -> Response:
    """Numbers and the latest records of all modules, of what you see, in one answer."""
    counted = union_all(*(rows.select(model, literal(name), func.count()) for name, model in MODULES.items()))
    counts = {row[0]: row[1] for row in await rows.session.execute(counted)}
    is_open = Opportunity.stage.not_in(("closed_won", "closed_lost"))
    deals = rows.select(Opportunity, func.count().filter(is_open), func.sum(Opportunity.amount).filter(is_open))
    open_deals, open_amount = (await rows.session.execute(deals)).one()
    late = await rows.session.scalar(rows.select(Activity, func.count()).where(overdue(rows)))
    latest: dict[str, Any] = {}
    for name, model in MODULES.items():
        newest = select_records(rows, model).order_by(model.created_at.desc(), model.id.desc()).limit(LATEST)
        latest[name] = records(await rows.session.execute(newest))
    more = {"open_opportunities": open_deals, "open_amount": float(open_amount or 0), "overdue_activities": late}
    return respond({"counts": {name: counts[name] for name in MODULES}, **more, "latest": latest})
