"""Activities: what was done and what is to be done, about other records."""

from fastapi import Response
from sqlalchemy import ColumnElement

from crm import caching
from crm.db import Rows, WriteRows
from crm.errors import respond
from crm.filters import parse_values
from crm.listing import overdue
from crm.models import ACTIVITY_STATUS, ACTIVITY_TYPES, OPEN_ACTIVITY, RELATED, Activity, now
from crm.module import Module


def by_status(rows: Rows, text: str) -> list[ColumnElement[bool]]:
    """Choose by status; ``overdue`` also means what should have been done before today."""
    return (
        [overdue(rows)]
        if text == "overdue"
        else parse_values(text, Activity.__table__.c.status, field="status")
    )


activities = Module(
    model=Activity,
    plural="activities",
    singular="activity",
    cached=caching.activities,
    required=("type",),
    choices={"type": ACTIVITY_TYPES, "status": ACTIVITY_STATUS, "related_to": RELATED},
    filters=("type", "status", "related_id", "related_to"),
    criteria={"status": by_status},
    searched=(Activity.subject, Activity.body, Activity.related_name),
    search_as="q",
)
router = activities.router()


@router.post("/mark-overdue", summary="Mark activities as overdue")
async def mark_overdue(rows: WriteRows) -> Response:
    """Of those that you see: scheduled or under way, and due before today, where the tenant is."""
    late = (Activity.status.in_(OPEN_ACTIVITY), Activity.due_date < rows.scope.today())
    marked = await rows.session.scalars(
        rows.update(Activity)
        .where(*late)
        .values(status="overdue", updated_at=now())
        .returning(Activity.id)
    )
    ids = sorted(marked)
    return respond(
        {"marked": len(ids), "ids": ids}, message=f"{len(ids)} activities marked as overdue"
    )


activities.add_records(router)
