"""What conversions and promotions share: the record of what became of what, and moving what pointed
to it."""

from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import select

from crm.db import WritableRows
from crm.models import REFERRING, Activity, EntityTransition, Opportunity, Owned


async def already(rows: WritableRows, table: str, key: UUID, action: str) -> bool:
    """Whether a record of the caller's tenant went through this transition before."""
    done = select(EntityTransition.id).where(
        EntityTransition.tenant_id == UUID(rows.scope.tenant or ""),
        EntityTransition.from_table == table,
        EntityTransition.from_id == key,
        EntityTransition.action == action,
    )
    return await rows.session.scalar(done.limit(1)) is not None


def record_transition(
    rows: WritableRows,
    from_table: str,
    from_id: UUID,
    to_table: str,
    to_id: UUID,
    action: str,
    snapshot: dict[str, Any],
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


async def relink(rows: WritableRows, old: Owned, new: Owned) -> None:
    """Let everything that is about one record be about another."""
    for referring in REFERRING:
        assert referring.about is not None
        kind, key = (getattr(referring, name) for name in referring.about)
        values: dict[Any, Any] = {kind: new.kind, key: new.id}
        if referring is Activity:
            values[Activity.related_name] = new.display_name[:300]
        about = rows.update(referring, unseen=True).where(kind == old.kind, key == old.id)
        await rows.session.execute(about.values(values))


async def relink_opportunities(rows: WritableRows, source: UUID, account: UUID) -> None:
    """Give opportunities that came from a source its new account."""
    came = rows.update(Opportunity, unseen=True).where(
        Opportunity.source == f"bizdev_source:{source}"
    )
    await rows.session.execute(came.values(account_id=account))
