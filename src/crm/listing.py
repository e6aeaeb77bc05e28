"""Lists (order, pages, counts), and records in the form of a response."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Annotated, Any, NamedTuple
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

from crm.db import Rows, criteria
from crm.errors import ApiError, not_found
from crm.json_rows import EMPTY, JsonCounts, JsonRows
from crm.models import OPEN_ACTIVITY, Account, Activity, Contact, Document, Lead, Owned, as_uuid

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
        description='JSON, like `{"$or":[{"city":{"$icontains":"x"}},{"assigned_to":null}]}`',
        examples=['{"is_test_data":false}'],
    ),
]
Sort = Annotated[
    Word | None,
    Field(description="Field to sort by, `-field` for descending; default: newest first"),
]
Search = Annotated[
    Word | None, Field(max_length=200, description="Text to search for, case-insensitive")
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
    """Return one page with its exact total, in one statement, so both are of one snapshot.

    ``stats_by`` adds counts by a column, over all rows that the caller sees. Raises 400 for an
    unknown ``sort``.
    """
    query = PageQuery(
        model=model,
        tenant=rows.scope.tenant,
        visible_ids=rows.scope.visible_ids,
        where=tuple(where),
        overdue=overdue(rows) if model is Activity else None,
        stats_by=stats_by,
        sort=sort,
        newest_by=newest_by,
        limit=limit,
        offset=offset,
    )
    plain = not query.where and query.overdue is None
    statement = _unfiltered_page(query) if plain else _page(query)
    text, total, *counts = (await rows.execute(statement)).one()
    data: dict[str, Any] = {
        plural: orjson.Fragment(text),
        "total": total,
        "limit": limit,
        "offset": offset,
    }
    for stats in counts:
        by_value = orjson.loads(stats)
        data["stats"] = {"total": sum(by_value.values()), **by_value}
    return data


class PageQuery(NamedTuple):
    """All that the statement of a page depends on. Hashable: it is the key of a cache."""

    model: type[Owned]
    tenant: str | None
    visible_ids: tuple[UUID, ...] | None
    where: tuple[ColumnElement[bool], ...]
    overdue: ColumnElement[bool] | None
    stats_by: ColumnElement[Any] | None
    sort: str | None
    newest_by: str
    limit: int
    offset: int


def _page(query: PageQuery) -> Select[Any]:
    """Return the statement for a page of records as JSON, their total, and counts if wanted."""
    model, stats_by = query.model, query.stats_by
    table = model.__table__  # type: ignore[attr-defined]
    visible = criteria(model, query.tenant, query.visible_ids)
    found = _records(model)
    if query.overdue is not None:
        found = found.add_columns(query.overdue.label("is_overdue"))
    found = (
        found.where(*visible, *query.where)
        .order_by(*_order(query))
        .limit(query.limit)
        .offset(query.offset)
    )
    total = select(func.count()).select_from(table).where(*visible, *query.where).scalar_subquery()
    parts: list[Any] = [JsonRows(found), total]
    if stats_by is not None:
        counted = select(*_counted(stats_by)).select_from(table).where(*visible)
        parts.append(JsonCounts(counted.group_by(stats_by)))
    return select(*parts)


_unfiltered_page = lru_cache(maxsize=256)(_page)
"""Caches statements without filters: building one takes as long as running it."""


@cache
def _counted(column: ColumnElement[Any]) -> tuple[ColumnElement[Any], ...]:
    return func.coalesce(column, "none").label("value"), func.count().label("count")


async def get_record(rows: Rows, model: type[Owned], key: str) -> orjson.Fragment:
    """Return one record as JSON. Raises 404."""
    identity = as_uuid(key)
    if identity is not None:
        text = await rows.scalar(
            select(JsonRows(select_records(rows, model).where(model.id == identity)))
        )
        if text != EMPTY:
            return orjson.Fragment(text[1:-1])
    raise not_found(model.title)


def select_records(rows: Rows, model: type[Owned]) -> Select[Any]:
    """Return a SELECT of visible records.

    It has the table's columns, the names of referenced records, and ``is_overdue`` of activities.
    """
    statement = _records(model).where(*rows.visible(model))
    if model is Activity:
        return statement.add_columns(overdue(rows).label("is_overdue"))
    return statement


@cache
def _records(model: type[Owned]) -> Select[Any]:
    """Return the part of ``select_records`` that does not depend on the caller.

    It uses plain tables, because nothing here needs the ORM.
    """
    table = model.__table__  # type: ignore[attr-defined]
    joined: Any = (Account, Contact, Lead)
    account, contact, lead = (other.__table__ for other in joined)
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
    """Format a timestamp as ``as_record`` does: UTC, microseconds, Z."""
    return func.to_char(func.timezone(_UTC, column), _MOMENT).label(column.key)


def newest(rows: Rows, model: type[Owned], *, limit: int) -> Select[Any]:
    """Return a SELECT of the newest visible records of a module."""
    table = model.__table__  # type: ignore[attr-defined]
    return (
        select_records(rows, model)
        .order_by(table.c.created_at.desc(), table.c.id.desc())
        .limit(limit)
    )


def overdue(rows: Rows) -> ColumnElement[bool]:
    """Return the criterion of overdue activities: open, and due before the tenant's today."""
    columns = Activity.__table__.c
    late = and_(columns.status.in_(OPEN_ACTIVITY), columns.due_date < rows.scope.today())
    return func.coalesce(or_(columns.status == "overdue", late), False)


def as_record(instance: Owned, **more: Any) -> dict[str, Any]:
    """Return a new or changed row as a record. ``more`` adds members."""
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


def _order(query: PageQuery) -> list[Any]:
    columns = query.model.__table__.c  # type: ignore[attr-defined]
    if not query.sort:
        return [columns[query.newest_by].desc(), columns.id.desc()]
    name = query.sort.removeprefix("-")
    if name not in columns or name in ("metadata", "tags", "tenant_id"):
        raise ApiError(400, f"sort: unknown field {name[:50]!r}", field="sort")
    descending = query.sort.startswith("-")
    ordered = columns[name].desc() if descending else columns[name].asc()
    return [ordered.nulls_last(), columns.id.desc()]
