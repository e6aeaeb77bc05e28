"""Reports over all modules."""

from typing import Any

import orjson
from fastapi import APIRouter, Response
from sqlalchemy import func, select

from crm import caching
from crm.db import ReadRows
from crm.errors import respond
from crm.json_rows import JsonRows
from crm.listing import newest, overdue
from crm.models import (
    Account,
    Activity,
    BizDevSource,
    Contact,
    Document,
    Lead,
    Opportunity,
    Owned,
    Task,
)

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


@router.get("/dashboard-bundle", summary="Show the data of a dashboard")
@caching.dashboard
async def dashboard_bundle(rows: ReadRows) -> Response:
    """Counts and the latest records of all modules that you see, of one moment."""
    is_open = Opportunity.stage.not_in(("closed_won", "closed_lost"))
    counters = {
        "open_opportunities": rows.select(Opportunity, func.count()).where(is_open),
        "open_amount": rows.select(
            Opportunity, func.coalesce(func.sum(Opportunity.amount), 0.0)
        ).where(is_open),
        "overdue_activities": rows.select(Activity, func.count()).where(overdue(rows)),
    }
    columns = [
        *(rows.select(model, func.count()).scalar_subquery() for model in MODULES.values()),
        *(counter.scalar_subquery() for counter in counters.values()),
        *(JsonRows(newest(rows, model, limit=LATEST)) for model in MODULES.values()),
    ]
    found = list((await rows.execute(select(*columns))).one())
    size = len(MODULES)
    latest = map(orjson.Fragment, found[-size:])
    data: dict[str, Any] = {
        "counts": dict(zip(MODULES, found[:size], strict=True)),
        **dict(zip(counters, found[size:-size], strict=True)),
        "latest": dict(zip(MODULES, latest, strict=True)),
    }
    return respond(data)
