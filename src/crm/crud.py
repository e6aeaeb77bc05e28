"""Create, update and delete records of any module, and maintain the references to them."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from crm.bodies import Body
from crm.db import WritableRows
from crm.errors import ApiError
from crm.listing import as_record
from crm.models import REFERABLE, REFERRING, Account, Activity, Contact, Lead, Owned, now

REFERENCES: dict[str, type[Owned]] = {"account_id": Account, "contact_id": Contact, "lead_id": Lead}


async def create(rows: WritableRows, model: type[Owned], body: Body) -> dict[str, Any]:
    """Insert a row and return its record. Raises 422 that names a wrong reference."""
    row = model(**{name: value for name, value in body.fields().items() if value is not None})
    await _check_references(rows, row, body)
    rows.add(row)
    await rows.session.flush()
    return as_record(row)


async def update(rows: WritableRows, model: type[Owned], key: str, *, body: Body) -> dict[str, Any]:
    """Update the given fields of a row and return its record. Raises 404 and 422.

    Metadata is merged. If the display name changes, ``related_name`` follows in activities.
    """
    row = await rows.get(model, key, lock=True)
    old_name = row.display_name
    columns = model.__table__.c  # type: ignore[attr-defined]
    for name, value in body.fields().items():
        if name == "metadata_":
            row.metadata_ = {**row.metadata_, **value}
        elif value is None and not columns[name].nullable:
            raise ApiError(422, f"{name}: must not be null", field=name)
        else:
            setattr(row, name, value)
    await _check_references(rows, row, body)
    row.updated_at = now()
    await rows.session.flush()
    if model.kind and row.display_name != old_name:
        about = (Activity.related_to == model.kind, Activity.related_id == row.id)
        renamed = (
            rows.update(Activity, unseen=True)
            .where(*about)
            .values(related_name=row.display_name[:300])
        )
        await rows.session.execute(renamed)
    return as_record(row)


async def delete(rows: WritableRows, model: type[Owned], key: str) -> dict[str, Any]:
    """Delete a row and return its id. Raises 404."""
    row = await rows.get(model, key, lock=True)
    await detach_references(rows, model, [row.id])
    await rows.session.delete(row)
    await rows.session.flush()
    return {"id": str(row.id), "deleted": True}


async def delete_many(
    rows: WritableRows, model: type[Owned], keys: Sequence[UUID]
) -> dict[str, Any]:
    """Delete rows; return the deleted ids, and in ``not_found`` the unknown and invisible ones."""
    found = list(
        await rows.session.scalars(
            rows.select(model, model.id).where(model.id.in_(keys)).with_for_update()
        )
    )
    if found:
        await detach_references(rows, model, found)
        await rows.session.execute(rows.delete(model).where(model.id.in_(found)))
    missing = [key for key in dict.fromkeys(keys) if key not in set(found)]
    return {"deleted": len(found), "ids": found, "not_found": missing}


async def detach_references(rows: WritableRows, model: type[Owned], keys: Sequence[UUID]) -> None:
    """Clear polymorphic references to rows about to be deleted; activities keep their names."""
    for referring in REFERRING if model.kind else ():
        assert referring.about is not None
        kind, key = (getattr(referring, name) for name in referring.about)
        about = rows.update(referring, unseen=True).where(kind == model.kind, key.in_(keys))
        await rows.session.execute(about.values({key: None}))


async def _check_references(rows: WritableRows, row: Owned, body: Body) -> None:
    """Raise 422 that names the field if a reference is to another tenant's or an unknown row."""
    given = body.fields()
    # an automatic flush would let the database refuse the reference with a worse message
    with rows.session.no_autoflush:
        for field, model in REFERENCES.items():
            if given.get(field) is not None:
                await rows.find(model, given[field], field=field)
        if given.get("assigned_to") is not None:
            await rows.check_employee(given["assigned_to"])
        if row.about is not None and any(field in given for field in row.about):
            await _check_about(rows, row, row.about)


async def _check_about(rows: WritableRows, row: Owned, fields: tuple[str, str]) -> None:
    """Check a polymorphic reference; set ``related_name`` of an activity."""
    kind_field, key_field = fields
    kind, key = getattr(row, kind_field), getattr(row, key_field)
    if key is None:
        return
    if kind is None:
        message = f"{kind_field}: required together with {key_field}"
        raise ApiError(422, message, field=kind_field)
    found = await rows.find(REFERABLE[kind], key, field=key_field)
    if isinstance(row, Activity):
        row.related_name = found.display_name[:300]
