"""What conversion and promotion share: the transition row, and moving references."""

from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import select

from crm.db import WritableRows
from crm.models import REFERRING, Activity, EntityTransition, Opportunity, Owned


async def was_converted(rows: WritableRows, model: type[Owned], key: UUID) -> bool:
    """Return whether a record of the caller's tenant was converted before."""
    found = select(EntityTransition.id).where(
        EntityTransition.tenant_id == UUID(rows.scope.tenant or ""),
        EntityTransition.from_table == model.__table__.name,  # type: ignore[attr-defined]
        EntityTransition.from_id == key,
        EntityTransition.action == "convert",
    )
    return await rows.session.scalar(found.limit(1)) is not None


def record_transition(
    rows: WritableRows, old: Owned, new: Owned, *, action: str, snapshot: dict[str, Any]
) -> None:
    """Insert a transition row. ``snapshot`` is the record as it was before."""
    rows.add(
        EntityTransition(
            from_table=old.__table__.name,  # type: ignore[attr-defined]
            from_id=old.id,
            to_table=new.__table__.name,  # type: ignore[attr-defined]
            to_id=new.id,
            action=action,
            performed_by=rows.scope.user_id,
            snapshot=orjson.loads(orjson.dumps(snapshot, default=str)),
        )
    )


async def relink(rows: WritableRows, old: Owned, new: Owned) -> None:
    """Move all polymorphic references from one record to another."""
    for referring in REFERRING:
        assert referring.about is not None
        kind, key = (getattr(referring, name) for name in referring.about)
        values: dict[Any, Any] = {kind: new.kind, key: new.id}
        if referring is Activity:
            values[Activity.related_name] = new.display_name[:300]
        about = rows.update(referring, unseen=True).where(kind == old.kind, key == old.id)
        await rows.session.execute(about.values(values))


async def relink_opportunities(rows: WritableRows, source: UUID, account: UUID) -> None:
    """Set the account of the opportunities that came from a BizDev source."""
    from_source = rows.update(Opportunity, unseen=True).where(
        Opportunity.source == f"bizdev_source:{source}"
    )
    await rows.session.execute(from_source.values(account_id=account))
