"""Lists: filter, order, page, count, and records as they are sent."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Annotated, Any
from uuid import UUID

import orjson
from pydantic import AfterValidator, Field
from sqlalchemy import (
    ColumnElement,
    DateTime,
    Select,
    and_,
    case,
    func,
    literal_column,
    or_,
    select,
)

from crm.db import Rows, as_uuid, criteria
from crm.errors import ApiError, not_found
from crm.json_rows import EMPTY, JsonCounts, JsonRows
from crm.models import OPEN_ACTIVITY, Account, Activity, Contact, Document, Lead, Owned

MAX_LIMIT = 200
MAX_OFFSET = 1_000_000
_UTC: ColumnElement[str] = literal_column("'UTC'")
_MOMENT: ColumnElement[str] = literal_column("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'""")


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
Sort = Annotated[
    Word | None,
    Field(description="Field to order by, `-field` for descending; newest first if left out"),
]
Search = Annotated[
    Word | None, Field(max_length=200, description="Text to look for, without regard to case")
]
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
    """Return one page with its exact total; ``stats_by`` adds counts by a column over all rows that
    the caller sees. One statement, so that rows and total are of the same moment."""
    late = overdue(rows) if model is Activity else None
    build = _page if where or late is not None else _unfiltered_page
    scope = (rows.scope.tenant, rows.scope.visible_ids)
    statement = build(model, *scope, tuple(where), late, stats_by, sort, newest_by, limit, offset)
    text, number, *counts = (await rows.execute(statement)).one()
    data: dict[str, Any] = {
        plural: orjson.Fragment(text),
        "total": number,
        "limit": limit,
        "offset": offset,
    }
    for stats in counts:
        by = orjson.loads(stats)
        data["stats"] = {"total": sum(by.values()), **by}
    return data


def _page(
    model: type[Owned],
    tenant: str | None,
    visible_ids: tuple[UUID, ...] | None,
    where: tuple[ColumnElement[bool], ...],
    late: ColumnElement[bool] | None,
    stats_by: ColumnElement[Any] | None,
    sort: str | None,
    newest_by: str,
    limit: int,
    offset: int,
) -> Select[Any]:
    """Select a page of records as JSON, their total, and the counts if asked."""
    table = model.__table__  # type: ignore[attr-defined]
    visible = criteria(model, tenant, visible_ids)
    found = (
        _records(model) if late is None else _records(model).add_columns(late.label("is_overdue"))
    )
    found = (
        found.where(*visible, *where)
        .order_by(*_order(model, sort, newest_by))
        .limit(limit)
        .offset(offset)
    )
    total = select(func.count()).select_from(table).where(*visible, *where).scalar_subquery()
    parts: list[Any] = [JsonRows(found), total]
    if stats_by is not None:
        parts.append(
            JsonCounts(
                select(*_counted(stats_by)).select_from(table).where(*visible).group_by(stats_by)
            )
        )
    return select(*parts)


_unfiltered_page = lru_cache(maxsize=256)(_page)
"""Remembers the pages that are asked for most: to put a statement together takes as long as to run
it."""


@cache
def _counted(column: ColumnElement[Any]) -> tuple[ColumnElement[Any], ...]:
    return func.coalesce(column, "none").label("value"), func.count().label("count")


async def one(rows: Rows, model: type[Owned], key: str) -> orjson.Fragment:
    """Return one record as it is sent. Raises 404."""
    identity = as_uuid(key)
    if identity is not None:
        text = await rows.scalar(
            select(JsonRows(select_records(rows, model).where(model.id == identity)))
        )
        if text != EMPTY:
            return orjson.Fragment(text[1:-1])
    raise not_found(model.title)


def select_records(rows: Rows, model: type[Owned]) -> Select[Any]:
    """Select a table's columns, the names of the records that rows point to, and whether an
    activity is overdue."""
    statement = _records(model).where(*rows.visible(model))
    return (
        statement.add_columns(overdue(rows).label("is_overdue")) if model is Activity else statement
    )


@cache
def _records(model: type[Owned]) -> Select[Any]:
    """The part of ``select_records`` that is the same for everybody. Of plain tables: nothing here
    needs the ORM."""
    table = model.__table__  # type: ignore[attr-defined]
    account, contact, lead = (joined.__table__ for joined in (Account, Contact, Lead))  # type: ignore[attr-defined]
    names: list[Any] = []
    source = table
    if "account_id" in table.c or model is Document:
        about = (
            table.c.account_id
            if "account_id" in table.c
            else case((table.c.related_type == "account", table.c.related_id))
        )
        names.append(account.c.name.label("account_name"))
        source = source.outerjoin(
            account, and_(account.c.id == about, account.c.tenant_id == table.c.tenant_id)
        )
    for field, person in (("contact", contact), ("lead", lead)):
        if f"{field}_id" in table.c:
            full_name = func.nullif(
                func.concat_ws(" ", person.c.first_name, person.c.last_name), ""
            )
            names.append(full_name.label(f"{field}_name"))
            same = and_(
                person.c.id == table.c[f"{field}_id"], person.c.tenant_id == table.c.tenant_id
            )
            source = source.outerjoin(person, same)
    own = [
        _moment(column) if isinstance(column.type, DateTime) else column
        for column in table.c
        if column.name != "id"
    ]
    return select(table.c.id, *own, *names).select_from(source)


def _moment(column: ColumnElement[Any]) -> ColumnElement[str]:
    """Write a moment as ``as_record`` does: UTC, microseconds, Z."""
    return func.to_char(func.timezone(_UTC, column), _MOMENT).label(column.key)


def newest(rows: Rows, model: type[Owned], *, limit: int) -> Select[Any]:
    """Select the latest records of a module."""
    table = model.__table__  # type: ignore[attr-defined]
    return (
        select_records(rows, model)
        .order_by(table.c.created_at.desc(), table.c.id.desc())
        .limit(limit)
    )


def overdue(rows: Rows) -> ColumnElement[bool]:
    """Hold for activities that should have been done before today, where the tenant is."""
    columns = Activity.__table__.c
    late = and_(columns.status.in_(OPEN_ACTIVITY), columns.due_date < rows.scope.today())
    return func.coalesce(or_(columns.status == "overdue", late), False)


def as_record(instance: Owned, **more: Any) -> dict[str, Any]:
    """Return a changed or new entity as it is sent."""
    columns: Mapping[str, Any] = instance.__table__.c  # type: ignore[attr-defined]
    own = {
        str(name): getattr(instance, "metadata_" if name == "metadata" else name)
        for name in columns.keys()  # noqa: SIM118
    }
    for name, value in own.items():
        if isinstance(value, datetime):
            own[name] = (
                value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
            )
    return {**own["metadata"], **own, **more}


def _order(model: type[Owned], sort: str | None, newest_by: str) -> list[Any]:
    columns = model.__table__.c  # type: ignore[attr-defined]
    if not sort:
        return [columns[newest_by].desc(), columns.id.desc()]
    name = sort.removeprefix("-")
    if name not in columns or name in ("metadata", "tags", "tenant_id"):
        raise ApiError(400, f"sort: unknown field {name[:50]!r}", field="sort")
    ordered = (
        columns[name].desc().nulls_last()
        if sort.startswith("-")
        else columns[name].asc().nulls_last()
    )
    return [ordered, columns.id.desc()]
