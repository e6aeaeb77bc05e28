"""Lists: filter, order, page, count, and records as they are sent. Columns are selected, not entities: a page costs no ORM."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Query
from pydantic import AfterValidator
from sqlalchemy import ColumnElement, Result, func
from sqlalchemy.orm import InstrumentedAttribute

from crm.db import Rows
from crm.errors import ApiError
from crm.models import Account, Owned

MAX_LIMIT = 200
MAX_OFFSET = 1_000_000


def _printable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain NUL characters")
    return text


Word = Annotated[str, AfterValidator(_printable)]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Rows in a page")]
Offset = Annotated[int, Query(ge=0, le=MAX_OFFSET, description="Rows to skip")]
Filter = Annotated[
    Word | None,
    Query(
        description='JSON, such as `{"$or":[{"city":{"$icontains":"x"}},{"assigned_to":null}]}`',
        examples=['{"is_test_data":false}'],
    ),
]
Sort = Annotated[Word | None, Query(description="Field to order by, `-field` for descending; newest first if left out")]
Search = Annotated[Word | None, Query(max_length=200, description="Text to look for, without regard to case")]
Choice = Annotated[Word | None, Query(max_length=2000)]


async def page(
    rows: Rows,
    model: type[Owned],
    *,
    plural: str,
    where: Sequence[ColumnElement[bool]],
    limit: int,
    offset: int,
    sort: str | None = None,
    stats_by: InstrumentedAttribute[Any] | None = None,
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
    found = await rows.get(model, key)
    return records(await rows.session.execute(select_records(rows, model).where(model.id == found.id)))[0]


def select_records(rows: Rows, model: type[Owned]) -> Any:
    """Select a table's columns, and the account's name where rows point to one."""
    columns = model.__table__.c  # type: ignore[attr-defined]
    if "account_id" not in columns:
        return rows.select(model, *columns)
    joined = (Account.id == columns.account_id) & (Account.tenant_id == columns.tenant_id)
    return rows.select(model, *columns, Account.name.label("account_name")).outerjoin(Account, joined)


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
