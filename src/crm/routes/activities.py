"""Activities: calls, emails, meetings, tasks and notes about other records."""

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
    """Return the criteria of a status; ``overdue`` includes open activities due before today."""
    if text == "overdue":
        return [overdue(rows)]
    return parse_values(text, Activity.__table__.c.status, field="status")


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
    """Marks those that you see, that are scheduled or in progress, and due before today.

    The tenant's time zone decides which day is today.
    """
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
