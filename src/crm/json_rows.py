"""Rows as JSON text made by PostgreSQL: no row is decoded and encoded again in Python.

These are SQL expressions of their own because the equivalent SQLAlchemy subqueries take longer to
build than the rest of a request.
"""

from typing import Any

from sqlalchemy import ColumnElement, Select, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.visitors import InternalTraversal

EMPTY = "[]"


class JsonRows(ColumnElement[str]):
    """The rows of a statement, in their order, as the text of a JSON array.

    The keys of a row's ``metadata`` become members of its object; columns take precedence.
    """

    __visit_name__ = "json_rows"
    inherit_cache = True
    # the name and the mutable list are SQLAlchemy's protocol for its statement cache
    _traverse_internals = [("rows", InternalTraversal.dp_clauseelement)]  # noqa: RUF012
    type = Text()
    expression = (
        "coalesce(json_agg(CASE WHEN record.metadata = '{}'::jsonb THEN to_json(record) "
        "ELSE (record.metadata || to_jsonb(record))::json END)::text, '[]')"
    )

    def __init__(self, statement: Select[Any]) -> None:
        self.rows = statement.subquery("record")


class JsonCounts(JsonRows):
    """The columns ``value`` and ``count`` of a statement as the text of a JSON object.

    It is ordered by value. Otherwise a changed query plan could reorder it, and a re-executed
    response would differ from the stored one.
    """

    __visit_name__ = "json_counts"
    inherit_cache = True
    expression = (
        "coalesce(json_object_agg(record.value, record.count ORDER BY record.value)::text, '{}')"
    )


@compiles(JsonRows)
@compiles(JsonCounts)
def _render(element: JsonRows, compiler: Any, **options: Any) -> str:
    rows = compiler.process(element.rows, asfrom=True)
    return f"(SELECT {element.expression} FROM {rows})"  # noqa: S608 - it contains no values
