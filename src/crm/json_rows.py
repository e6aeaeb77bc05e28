"""Rows as JSON, made by PostgreSQL: the cheapest way from a row to an answer.

Expressions of their own, because the same in terms of subqueries costs more to put together than
all the rest of a request.
"""

from typing import Any

from sqlalchemy import ColumnElement, Select, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.visitors import InternalTraversal

EMPTY = "[]"


class JsonRows(ColumnElement[str]):
    """The rows of a statement as the text of a JSON array, in their order.

    The keys of a row's ``metadata`` stand beside its columns, never over them.
    """

    __visit_name__ = "json_rows"
    inherit_cache = True
    _traverse_internals = [("rows", InternalTraversal.dp_clauseelement)]  # noqa: RUF012 - SQLAlchemy's protocol for its cache
    type = Text()
    made = (
        "coalesce(json_agg(CASE WHEN record.metadata = '{}'::jsonb THEN to_json(record) "
        "ELSE (record.metadata || to_jsonb(record))::json END)::text, '[]')"
    )

    def __init__(self, statement: Select[Any]) -> None:
        self.rows = statement.subquery("record")


class JsonCounts(JsonRows):
    """A statement of values and their counts (columns ``value`` and ``count``) as the text of a
    JSON object, in their order.

    Else PostgreSQL could change its plan, and an answer that is made anew would not be the stored
    one.
    """

    __visit_name__ = "json_counts"
    inherit_cache = True
    made = "coalesce(json_object_agg(record.value, record.count ORDER BY record.value)::text, '{}')"


@compiles(JsonRows)
@compiles(JsonCounts)
def _render(element: JsonRows, compiler: Any, **options: Any) -> str:
    return f"(SELECT {element.made} FROM {compiler.process(element.rows, asfrom=True)})"  # noqa: S608
