"""Create, change and delete one row, the same for every module."""

from typing import Any

from crm.bodies import Body
from crm.db import Rows
from crm.errors import ApiError
from crm.listing import as_record
from crm.models import Account, Contact, Lead, Owned, now

REFERENCES: dict[str, type[Owned]] = {"account_id": Account, "contact_id": Contact, "lead_id": Lead}


async def create(rows: Rows, model: type[Owned], body: Body) -> dict[str, Any]:
    """Insert a row from a body and return its record."""
    row = model(**{name: value for name, value in body.fields().items() if value is not None})
    await check_references(rows, body)
    rows.add(row)
    await rows.session.flush()
    return as_record(row)


async def change(rows: Rows, model: type[Owned], key: str, body: Body) -> dict[str, Any]:
    """Change the given fields of a row; metadata merges. Raises 404."""
    row = await rows.get(model, key, lock=True)
    await check_references(rows, body)
    columns = model.__table__.c  # type: ignore[attr-defined]
    for name, value in body.fields().items():
        if name == "metadata_":
            row.metadata_ = {**row.metadata_, **value}
        elif value is None and not columns[name].nullable:
            raise ApiError(422, f"{name}: must not be null", field=name)
        else:
            setattr(row, name, value)
    row.updated_at = now()
    await rows.session.flush()
    return as_record(row)


async def remove(rows: Rows, model: type[Owned], key: str) -> dict[str, Any]:
    """Delete a row and return its id. Raises 404."""
    row = await rows.get(model, key, lock=True)
    await rows.session.delete(row)
    await rows.session.flush()
    return {"id": str(row.id), "deleted": True}


async def check_references(rows: Rows, body: Body) -> None:
    """Demand that referenced rows and employees are the caller's own tenant's."""
    given = body.fields()
    for field, model in REFERENCES.items():
        if field in given:
            await rows.check(model, given[field], field=field)
    if given.get("assigned_to") is not None:
        await rows.check_employee(given["assigned_to"])
