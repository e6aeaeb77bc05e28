"""What conversions and promotions share: the record of what became of what, and moving what pointed to it."""

from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import select

from crm.db import Rows
from crm.models import Activity, EntityTransition, Opportunity


async def already(rows: Rows, table: str, key: UUID, action: str) -> bool:
    """Whether a record of the caller's tenant went through this transition before."""
    done = select(EntityTransition.id).where(
        EntityTransition.tenant_id == UUID(rows.scope.tenant or ""),
        EntityTransition.from_table == table,
        EntityTransition.from_id == key,
        EntityTransition.action == action,
    )
    return await rows.session.scalar(done.limit(1)) is not None


def record_transition(
    rows: Rows, from_table: str, from_id: UUID, to_table: str, to_id: UUID, action: str, snapshot: dict[str, Any]
) -> None:
    """Write down what became of a record, with the record as it was."""
    rows.add(
        EntityTransition(
            from_table=from_table,
            from_id=from_id,
            to_table=to_table,
            to_id=to_id,
            action=action,
            performed_by=rows.scope.user_id,
            snapshot=orjson.loads(orjson.dumps(snapshot, default=str)),
        )
    )


async def relink_activities(rows: Rows, old: tuple[str, UUID], new: tuple[str, UUID, str]) -> None:
    """Point activities about one record to another."""
    about = rows.update(Activity).where(Activity.related_to == old[0], Activity.related_id == old[1])
    await rows.session.execute(about.values(related_to=new[0], related_id=new[1], related_name=new[2][:300]))


async def relink_opportunities(rows: Rows, source: UUID, account: UUID) -> None:
    """Give opportunities that came from a source its new account."""
    came = rows.update(Opportunity).where(Opportunity.source == f"bizdev_source:{source}")
    await rows.session.execute(came.values(account_id=account))
