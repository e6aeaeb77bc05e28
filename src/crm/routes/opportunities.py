"""Opportunities: possible sales."""

from fastapi import Response
from sqlalchemy import func

from crm import caching
from crm.db import ReadRows
from crm.errors import respond
from crm.models import STAGES, Opportunity
from crm.module import Module

opportunities = Module(
    model=Opportunity,
    plural="opportunities",
    singular="opportunity",
    cached=caching.opportunities,
    required=("name",),
    choices={"stage": STAGES},
    filters=("stage", "account_id", "contact_id", "lead_id"),
    searched=(Opportunity.name, Opportunity.next_step, Opportunity.source),
    stats_by="stage",
)
router = opportunities.router()


@router.get("/stats", summary="Count opportunities by stage")
@caching.opportunities_stats
async def stats(rows: ReadRows) -> Response:
    """Number and amount of the opportunities that you see.

    `weighted` is the sum of amount times probability.
    """
    weighted = func.sum(Opportunity.amount * func.coalesce(Opportunity.probability, 0) / 100)
    columns = (Opportunity.stage, func.count(), func.sum(Opportunity.amount), weighted)
    by_stage = {stage: {"count": 0, "amount": 0.0, "weighted": 0.0} for stage in STAGES}
    for stage, count, amount, expected in await rows.execute(
        rows.select(Opportunity, *columns).group_by(columns[0])
    ):
        by_stage[stage] = {
            "count": count,
            "amount": float(amount or 0),
            "weighted": float(expected or 0),
        }
    total = {
        name: sum(counters[name] for counters in by_stage.values())
        for name in ("count", "amount", "weighted")
    }
    return respond({"stages": by_stage, "total": total})


@router.get("/count", summary="Count opportunities")
@caching.opportunities_stats
async def count(rows: ReadRows) -> Response:
    """The number of opportunities that you see, and of the open ones among them."""
    is_open = Opportunity.stage.not_in(("closed_won", "closed_lost"))
    total, still_open = (
        await rows.execute(rows.select(Opportunity, func.count(), func.count().filter(is_open)))
    ).one()
    return respond({"count": total, "open": still_open})


opportunities.add_records(router)
