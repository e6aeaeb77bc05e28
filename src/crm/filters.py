"""The ``filter`` parameter of lists: a bounded query language in JSON over the columns of a table.

Examples: ``{"status": "new"}``, ``{"score": {"$gte": 50}}``, ``{"$or": [{"city": {"$icontains":
"x"}}, {"assigned_to": null}]}``. All members of an object must match.
"""

from collections.abc import Callable, Mapping
from datetime import date, datetime
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Date,
    DateTime,
    Integer,
    Numeric,
    String,
    Table,
    Text,
    Uuid,
    and_,
    not_,
    or_,
)

from crm.errors import ApiError

MAX_DEPTH = 5
MAX_TERMS = 100
MAX_LENGTH = 10_000

_COMPARE: Mapping[str, Callable[[Any, Any], ColumnElement[bool]]] = {
    "$eq": lambda column, value: column.is_(None) if value is None else column == value,
    "$ne": lambda column, value: (
        column.is_not(None) if value is None else column.is_distinct_from(value)
    ),
    "$gt": lambda column, value: column > value,
    "$gte": lambda column, value: column >= value,
    "$lt": lambda column, value: column < value,
    "$lte": lambda column, value: column <= value,
}
_LISTS = ("$in", "$nin")
_TEXTS = ("$contains", "$icontains", "$startswith")


def parse_filter(
    text: str | None, table: Table, *, field: str = "filter"
) -> list[ColumnElement[bool]]:
    """Return the criteria of a filter. Raises 400 that names the problem and its place."""
    if not text:
        return []
    if len(text) > MAX_LENGTH:
        raise ApiError(400, f"{field}: longer than {MAX_LENGTH} characters", field=field)
    try:
        document = orjson.loads(text)
    except ValueError as error:
        raise ApiError(400, f"{field}: not valid JSON: {error}", field=field) from None
    return [_Parser(table, field).document(document, 1)]


def parse_values(text: str | None, column: Column[Any], *, field: str) -> list[ColumnElement[bool]]:
    """Return the criteria of a parameter: a value (``lost``) or JSON (``{"$nin": ["lost"]}``)."""
    if text is None:
        return []
    if text.startswith("{"):
        return parse_filter(
            orjson.dumps({column.name: _json(text, field)}).decode(), column.table, field=field
        )
    parser = _Parser(column.table, field)
    return [column == parser.value(column, text)]


def contains(column: Any, text: str) -> ColumnElement[bool]:
    """Return a case-insensitive substring match; % and _ have no special meaning."""
    return column.icontains(text, autoescape=True)  # type: ignore[no-any-return]


def _json(text: str, field: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise ApiError(400, f"{field}: not valid JSON: {error}", field=field) from None


class _Parser:
    """Parses one filter document and counts its terms."""

    def __init__(self, table: Table, field: str) -> None:
        self._table = table
        self._field = field
        self._terms = 0

    def document(self, document: Any, depth: int) -> ColumnElement[bool]:
        if not isinstance(document, dict) or not document:
            self._refuse("must be an object with at least one field")
        if depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH}")
        return and_(*(self._member(name, value, depth) for name, value in document.items()))

    def _member(self, name: str, value: Any, depth: int) -> ColumnElement[bool]:
        self._terms += 1
        if self._terms > MAX_TERMS:
            self._refuse(f"more than {MAX_TERMS} terms")
        if name in ("$or", "$and"):
            if not isinstance(value, list) or not value:
                self._refuse(f"{name} needs a list of objects")
            parts = [self.document(part, depth + 1) for part in value]
            return or_(*parts) if name == "$or" else and_(*parts)
        column = self._table.c.get(name)
        if column is None or name in ("tenant_id", "metadata", "tags"):
            self._refuse(f"unknown field {name!r}")
        if not isinstance(value, dict):
            return _COMPARE["$eq"](column, self.value(column, value))
        if not value:
            self._refuse(f"{name}: must be a value or an object with an operator")
        return and_(
            *(self._operator(column, operator, operand) for operator, operand in value.items())
        )

    def _operator(self, column: Column[Any], operator: str, operand: Any) -> ColumnElement[bool]:
        self._terms += 1
        if operator in _COMPARE:
            if operand is None and operator not in ("$eq", "$ne"):
                self._refuse(f"{column.name}: {operator} needs a value")
            return _COMPARE[operator](column, self.value(column, operand))
        if operator in _LISTS:
            if not isinstance(operand, list) or len(operand) > MAX_TERMS:
                self._refuse(
                    f"{column.name}: {operator} needs a list of at most {MAX_TERMS} values"
                )
            values = [self.value(column, item) for item in operand]
            found = or_(
                column.in_([value for value in values if value is not None]),
                column.is_(None) if None in values else False,
            )
            if operator == "$in":
                return found
            return or_(not_(found), column.is_(None) if None not in values else False)
        if operator in _TEXTS:
            if not isinstance(operand, str) or not isinstance(column.type, String | Text):
                self._refuse(f"{column.name}: {operator} needs a text, and a text field")
            text = self.value(column, operand)
            if operator == "$icontains":
                return contains(column, text)
            if operator == "$contains":
                return column.contains(text, autoescape=True)
            return column.startswith(text, autoescape=True)
        return self._refuse(f"{column.name}: unknown operator {operator!r}")

    def value(self, column: Column[Any], value: Any) -> Any:
        """Convert a JSON value to the column's type. Raises 400."""
        if value is None:
            return None
        kind = column.type
        try:
            if isinstance(kind, Uuid):
                return UUID(value)
            if isinstance(kind, Boolean):
                return {True: True, False: False, "true": True, "false": False}[value]
            if isinstance(kind, Integer):
                return _bounded(int(value), 2**31)
            if isinstance(kind, Numeric):
                return _bounded(float(value), 1e15)
            if isinstance(kind, DateTime):
                moment = datetime.fromisoformat(value)
                return moment if moment.tzinfo else moment.astimezone()
            if isinstance(kind, Date):
                return date.fromisoformat(value)
            if isinstance(value, str) and "\x00" not in value:
                return value
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            pass
        return self._refuse(f"{column.name}: {value!r} does not fit this field")

    def _refuse(self, problem: str) -> Any:
        where = f"{self._field}: "
        raise ApiError(400, where + problem.removeprefix(where)[:200], field=self._field)


def _bounded(value: Any, limit: float) -> Any:
    if not -limit < value < limit:
        raise ValueError("out of range")
    return value
