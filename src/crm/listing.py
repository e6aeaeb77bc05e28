"""Lists: filter, order, page, count, and records as they are sent. Columns are selected, not entities: a page costs no ORM."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from sqlalchemy import ColumnElement, Result, and_, func, or_

from crm.db import Rows, as_uuid
from crm.errors import ApiError, not_found
from crm.models import OPEN_ACTIVITY, Account, Activity, Contact, Document, Lead, Owned

MAX_LIMIT = 200
MAX_OFFSET = 1_000_000


def _printable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain NUL characters")
    return text


Word = Annotated[str, AfterValidator(_printable)]
Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT, description="Rows in a page")]
Offset = Annotated[int, Field(ge=0, le=MAX_OFFSET, description="Rows to skip")]
Filter = Annotated[
    Word | None,
    Field(
        description='JSON, such as `{"$or":[{"city":{"$icontains":"x"}},{"assigned_to":null}]}`',
        examples=['{"is_test_data":false}'],
    ),
]
Sort = Annotated[Word | None, Field(description="Field to order by, `-field` for descending; newest first if left out")]
Search = Annotated[Word | None, Field(max_length=200, description="Text to look for, without regard to case")]
Choice = Annotated[Word | None, Field(max_length=2000)]


async def page(
    rows: Rows,
    model: type[Owned],
    *,
    plural: str,
    where: Sequence[ColumnElement[bool]],
    limit: int,
    offset: int,
    sort: str | None = None,
    stats_by: ColumnElement[Any] | None = None,
    newest_by: str = "created_at",
) -> dict[str, Any]:
    """Return one page with its exact total; ``stats_by`` adds counts by a column over all rows that the caller sees."""
    statement = select_records(rows, model).where(*where).order_by(*_order(model, sort, newest_by)).limit(limit).offset(offset)
    found = records(await rows.session.execute(statement))
    total = await rows.session.scalar(rows.select(model, func.count()).where(*where))
    data: dict[str, Any] = {plural: found, "total": total, "limit": limit, "offset": offset}
    if stats_by is not None:
        counts = await rows.session.execute(rows.select(model, stats_by, func.count()).group_by(stats_by))
        by_value = {value or "none": count for value, count in counts}
        data["stats"] = {"total": sum(by_value.values()), **by_value}
    return data


async def one(rows: Rows, model: type[Owned], key: str) -> dict[str, Any]:
    """Return one record as it is sent. Raises 404."""
    identity = as_uuid(key)
    if identity is not None:
        for record in records(await rows.session.execute(select_records(rows, model).where(model.id == identity))):
            return record
    raise not_found(model.title)


def select_records(rows: Rows, model: type[Owned]) -> Any:
    """Select a table's columns, the names of the records that rows point to, and whether an activity is overdue."""
    columns = model.__table__.c  # type: ignore[attr-defined]
    more: list[Any] = []
    joins: list[tuple[type[Owned], Any]] = []
    if "account_id" in columns or model is Document:
        key = columns.account_id if "account_id" in columns else columns.related_id
        about = True if "account_id" in columns else columns.related_type == Account.kind
        more.append(Account.name.label("account_name"))
        joins.append((Account, and_(Account.id == key, Account.tenant_id == columns.tenant_id, about)))
    for field, person in (("contact", Contact), ("lead", Lead)):
        if f"{field}_id" in columns:
            more.append(func.nullif(func.concat_ws(" ", person.first_name, person.last_name), "").label(f"{field}_name"))
            joins.append((person, and_(person.id == columns[f"{field}_id"], person.tenant_id == columns.tenant_id)))
    if model is Activity:
        more.append(overdue(rows).label("is_overdue"))
    statement = rows.select(model, *columns, *more)
    for joined, condition in joins:
        statement = statement.outerjoin(joined, condition)
    return statement


def overdue(rows: Rows) -> ColumnElement[bool]:
    """Hold for activities that should have been done before today, where the tenant is."""
    late = and_(Activity.status.in_(OPEN_ACTIVITY), Activity.due_date < rows.scope.today())
    return func.coalesce(or_(Activity.status == "overdue", late), False)


def records(result: Result[Any]) -> list[dict[str, Any]]:
    """Return rows as they are sent: their own columns, and the keys of their metadata beside them, never over them."""
    names = [str(name) for name in result.keys()]  # noqa: SIM118 - plain text: the encoder takes no subclass as a key
    own = [dict(zip(names, row, strict=True)) for row in result]
    return [{**one["metadata"], **one} if one["metadata"] else one for one in own]


def as_record(instance: Owned, **more: Any) -> dict[str, Any]:
    """Return a changed or new entity as it is sent."""
    columns: Mapping[str, Any] = instance.__table__.c  # type: ignore[attr-defined]
    own = {str(name): getattr(instance, "metadata_" if name == "metadata" else name) for name in columns.keys()}  # noqa: SIM118
    return {**own["metadata"], **own, **more}


def _order(model: type[Owned], sort: str | None, newest_by: str) -> list[Any]:
    columns = model.__table__.c  # type: ignore[attr-defined]
    if not sort:
        return [columns[newest_by].desc(), columns.id.desc()]
    name = sort.removeprefix("-")
    if name not in columns or name in ("metadata", "tags", "tenant_id"):
        raise ApiError(400, f"sort: unknown field {name[:50]!r}", field="sort")
    ordered = columns[name].desc().nulls_last() if sort.startswith("-") else columns[name].asc().nulls_last()
    return [ordered, columns.id.desc()]
