"""What a SQL statement reads and changes: the tables, and the tenants whose rows it changes. No
I/O.

Reads are found in the SQL text that is actually sent, so eager loads, loader criteria, unions and
subqueries count: every known table whose name occurs in the text as a name counts as read. That may
find a table too many, never one too few. A name after FROM or JOIN that is no known table (a view,
a raw table) makes the statement *undeclared*. Changes are taken from the statement's structure.
Both depend only on the statement and are computed once per compiled statement; only the tenants are
looked up in the parameters each time.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Column, Integer, MetaData, Table, Uuid
from sqlalchemy.sql import operators
from sqlalchemy.sql.dml import Delete, Insert, Update
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ColumnElement,
)

_HARMLESS = re.compile(
    r"\(*(SELECT|WITH|VALUES|TABLE|SHOW|SET|RESET|EXPLAIN|BEGIN|START|SAVEPOINT|RELEASE|ROLLBACK"
    r"|LISTEN|UNLISTEN|NOTIFY|DISCARD|DECLARE|FETCH|MOVE|CLOSE|ANALYZE|VACUUM|DEALLOCATE|LOCK)\b",
    re.I,
)
"""First words of statements that change no rows, unless they contain a verb below."""

_LITERALS = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", re.S)
_VERB = re.compile(
    r"\b(?:INSERT INTO|DELETE FROM|MERGE INTO|TRUNCATE|(?<!FOR )(?<!DO )(?<!KEY )UPDATE)\b", re.I
)
_TARGET = re.compile(
    r"\b(?:INSERT INTO|DELETE FROM|MERGE INTO|TRUNCATE(?: TABLE)?|(?<!FOR )(?<!DO )(?<!KEY "
    r")UPDATE) (?:ONLY )?([\w.\"]+)",
    re.I,
)
_COUNTED = re.compile(r"(?:INSERT|DELETE|UPDATE)\b", re.I)
_CALL = re.compile(r"\b(\w+)\"?\s*\(")
_FROM = re.compile(r"\b(?:FROM|JOIN)\b", re.I)
_IN_FROM = re.compile(
    r"[(),]|\b(?:WHERE|GROUP|ORDER|LIMIT|HAVING|UNION|INTERSECT|EXCEPT|OFFSET|FETCH|FOR|WINDOW"
    r"|RETURNING)\b",
    re.I,
)
_SOURCE = re.compile(r"\s*(?:ONLY\s+|LATERAL\s+)?([\w.]+)\s*(\(?)", re.I)
_CTE = re.compile(
    r"(?:\bWITH\s+(?:RECURSIVE\s+)?|,\s*)\"?(\w+)\"?(?:\s*\([^()]*\))?\s+AS\s+"
    r"(?:NOT\s+)?(?:MATERIALIZED\s+)?\(",
    re.I,
)
_NOT_TABLES = re.compile(
    r"\b(?:EXTRACT|SUBSTRING|TRIM|OVERLAY|POSITION)\s*\([^()]*\bFROM\b"
    r"|\bIS\s+(?:NOT\s+)?DISTINCT\s+FROM\b",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Change:
    """A table that a statement changes, and the parameters that contain its tenants (None: the
    tenants cannot be determined)."""

    table: str
    tenant_parameters: tuple[str, ...] | None
    cascades: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a statement reads and changes. If it is ``undeclared`` or ``raw``, its reads or changes
    cannot be determined from its text.

    The other fields are for use with an outbox: ``targets`` are the tables that it changes, as far
    as they can be determined; ``counted``: it changes nothing if its row count is 0; ``doubtful``:
    something that we take for a literal contains a verb (escape strings and dollar quotes can
    mislead us); ``calls`` are the functions it names.
    """

    reads: frozenset[str]
    undeclared: bool
    change: Change | None
    raw: bool
    targets: frozenset[str] = frozenset()
    counted: bool = False
    doubtful: bool = False
    calls: frozenset[str] = frozenset()


class Schema:
    """The tables that an application declares, and the tenant column of each."""

    def __init__(
        self, metadata: MetaData, *, tenant_column: str, tenant_is: Mapping[str, str]
    ) -> None:
        self.tables: dict[str, Table] = dict(metadata.tables)
        self._tenant_columns = {
            name: tenant_is.get(name, tenant_column)
            for name, table in self.tables.items()
            if tenant_is.get(name, tenant_column) in table.c
        }
        names = "|".join(re.escape(name) for name in sorted(self.tables, key=len, reverse=True))
        self._names = re.compile(rf"(?<![\w.])(?<!\bAS )({names})(?!\w)") if names else None

    def tenant_column(self, table: str) -> str | None:
        """Return the tenant column of a table, or None if its rows belong to no tenant."""
        return self._tenant_columns.get(table)

    def misspelt(self, tenant: str, tables: Iterable[str]) -> str | None:
        """Return one of these tables whose column type spells this tenant in another way, or None.

        Entries would depend on a generation that no write to that table bumps.
        """
        for table in tables:
            column = self._tenant_columns.get(table)
            kind = None if column is None else self.tables[table].c[column].type
            try:
                spelt = (
                    str(UUID(tenant))
                    if isinstance(kind, Uuid)
                    else str(int(tenant))
                    if isinstance(kind, Integer)
                    else tenant
                )
            except ValueError:
                return table
            if spelt != tenant:
                return table
        return None

    def cascades(self, table: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        """Return the tables that the database changes when rows of this one are deleted (ON
        DELETE ...)."""
        found: set[str] = set()
        for name, other in self.tables.items():
            for key in other.foreign_keys:
                action = (key.ondelete or "").upper()
                if key.column.table.key == table and action in (
                    "CASCADE",
                    "SET NULL",
                    "SET DEFAULT",
                ):
                    found.add(name)
                    if action == "CASCADE" and name not in seen:
                        found |= self.cascades(name, seen | {table, name})
        return frozenset(found - {table})

    def facts_of_text(self, sql: str) -> Facts:
        """Return what SQL text reads, and whether it may change anything."""
        plain = _plain(sql)
        raw = _HARMLESS.match(plain) is None or _VERB.search(plain) is not None
        return self._facts(sql, plain, raw=raw)

    def facts_of_compiled(self, compiled: Any, sql: str) -> Facts:
        """Return what a compiled statement reads and changes."""
        statement = getattr(compiled, "statement", None)
        state = getattr(compiled, "compile_state", None)
        final = getattr(state, "statement", statement)
        if not isinstance(final, Insert | Update | Delete):
            return self.facts_of_text(sql)
        plain = _plain(sql)
        if len(_VERB.findall(plain)) > 1:  # a WITH that changes more than the statement itself
            return self._facts(sql, plain, raw=True)
        return self._facts(sql, plain, change=self._change(final, compiled, plain))

    def _facts(
        self, sql: str, plain: str, *, change: Change | None = None, raw: bool = False
    ) -> Facts:
        reads, undeclared = self._reads(plain)
        writes = raw or change is not None
        targets = frozenset(
            {change.table} if change is not None else map(_table, _TARGET.findall(plain))
        )
        return Facts(
            reads,
            undeclared,
            change,
            raw,
            targets=targets if writes else frozenset(),
            counted=writes
            and len(targets) == 1
            and len(_VERB.findall(plain)) == 1
            and _COUNTED.match(plain) is not None,
            doubtful=not writes and _VERB.search(" ".join(sql.split())) is not None,
            calls=frozenset(name.lower() for name in _CALL.findall(plain)),
        )

    def _reads(self, plain: str) -> tuple[frozenset[str], bool]:
        text = plain.replace('"', "")
        reads = frozenset(self._names.findall(text)) if self._names else frozenset()
        text = _NOT_TABLES.sub(" ", text)
        own = {name.lower() for name in _CTE.findall(text)}
        return reads, any(
            name not in self.tables and name.lower() not in own for name in _sources(text)
        )

    def _change(self, statement: Insert | Update | Delete, compiled: Any, plain: str) -> Change:
        table = statement.table
        name = getattr(table, "key", str(table))
        cascades = tuple(self.cascades(name)) if isinstance(statement, Delete) else ()
        column = self.tenant_column(name)
        if column is None:
            return Change(name, (), cascades)
        written = () if isinstance(statement, Delete) else _written(compiled, column)
        if isinstance(statement, Insert):
            return Change(
                name, written if written and _stays_with_tenant(plain, column) else None, cascades
            )
        keys = {bind.key: given for bind, given in compiled.bind_names.items()}
        proven = [
            keys[bind.key]
            for bind in _equals(statement.whereclause, name, column)
            if bind.key in keys
        ]
        moves = isinstance(statement, Update) and _moves_to_unknown_tenant(statement, column)
        return Change(name, (*proven, *written) if proven and not moves else None, cascades)


def _plain(sql: str) -> str:
    """Return SQL without literals and comments, on one line."""
    return " ".join(_LITERALS.sub(" ", sql).split())


def _table(name: str) -> str:
    """Return the name of a table as the database stores it, without its schema."""
    last = name.rpartition(".")[2]
    return last.replace('"', "") if '"' in last else last.lower()


def _written(compiled: Any, column: str) -> tuple[str, ...]:
    """Return the parameters with the column's value in INSERT or in the SET of UPDATE (``x``, or
    ``x_m1`` for several rows)."""
    pattern = re.compile(rf"{re.escape(column)}(?:_m\d+)?")
    return tuple(name for name in compiled.binds if pattern.fullmatch(name))


def _stays_with_tenant(plain: str, column: str) -> bool:
    """Return whether an INSERT changes only rows of the tenants in its values. An upsert may change
    a row of another tenant, unless the tenant is part of the conflict's target and is not set to
    another value."""
    text = plain.replace('"', "")
    if re.search(r"\b(?:DO|KEY) UPDATE\b", text, re.I) is None:
        return True
    found = re.search(r"\bON CONFLICT \(([^()]*)\)(.*)", text, re.I)
    if found is None or column not in re.split(r"[,\s]+", found[1]):
        return False
    sets = re.findall(
        rf"\b{re.escape(column)} = (\S+)", re.split(r"\bDO UPDATE SET\b", found[2], flags=re.I)[-1]
    )
    return len(re.findall(r"\bDO UPDATE\b", text, re.I)) == 1 and set(sets) <= {
        f"excluded.{column}",
        f"excluded.{column},",
    }


def _moves_to_unknown_tenant(statement: Update, column: str) -> bool:
    """Return whether an UPDATE computes the tenant in the database, where we cannot see it."""
    values: Mapping[Any, Any] = statement._values or {}
    return any(
        getattr(key, "key", key) == column and not isinstance(value, BindParameter)
        for key, value in values.items()
    )


def _sources(text: str) -> Iterable[str]:
    """Yield the table names in FROM clauses (after FROM, JOIN and each comma), without functions
    and subqueries."""
    for start in _FROM.finditer(text):
        places, depth = [start.end()], 0
        for token in _IN_FROM.finditer(text, start.end()):
            if token[0] == "(":
                depth += 1
            elif token[0] == ")":
                depth -= 1
            elif token[0] == "," and depth == 0:
                places.append(token.end())
            if depth < 0 or (depth == 0 and token[0] not in ("(", ")", ",")):
                break
        for place in places:
            source = _SOURCE.match(text, place)
            if source is not None and not source[2]:
                yield source[1]


def _equals(
    clause: ColumnElement[Any] | None, table: str, column: str
) -> Iterable[BindParameter[Any]]:
    """Yield the values that a WHERE clause requires of the column: ``= value`` or ``IN (values)``,
    under AND only."""
    if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
        for part in clause.clauses:
            yield from _equals(part, table, column)
    elif isinstance(clause, BinaryExpression) and clause.operator in (
        operators.eq,
        operators.in_op,
    ):
        for side, other in ((clause.left, clause.right), (clause.right, clause.left)):
            owner = getattr(side, "table", None)
            is_column = (
                isinstance(side, Column)
                and side.name == column
                and getattr(owner, "key", None) == table
            )
            if is_column and isinstance(other, BindParameter):
                yield other
