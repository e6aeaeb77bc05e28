"""Operations for alembic that install and remove the outbox, its triggers and the trail, and have
``--autogenerate`` write them.

In ``env.py``::

    import respcache.writes.alembic
    from respcache.writes.triggers import watched

    context.configure(
        ...,
        respcache_tables=watched(Base.metadata, TABLES_THAT_CACHED_READS_DECLARE),
        respcache_trail=True,
        include_name=respcache.writes.alembic.include_name,
    )

A revision then says what is missing in the database and what is too much::

    op.create_respcache_outbox()
    op.watch_table("accounts", tenant_column="tenant_id", shared=False)

An empty list has everything removed again, and so has ``respcache_trail=False`` with the trail
(``ops/trail.py``); without the options nothing of it is compared. A table counts as watched when
its four triggers are there, fire always, and run the very function that would be made today: so
another tenant column shows, a trigger that was dropped or disabled, and also a release of this
library that writes another function. ``watch_table`` mends all of these.

Tables are first unwatched and then dropped, first created and then watched; a downgrade is the
reverse. Where the old function is not recognised, it ends unwatched instead: what reads the table
is then not cached.

Outbox, fence and trail are in no metadata: alembic is kept from proposing to drop them, in every
schema. ``include_name`` spares it reading them at all, which SQLAlchemy warns of, as it does not
know their types. Another schema than ``public``, for them and for the tables, is named by
``respcache_schema`` and by ``schema=`` of each operation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from alembic.autogenerate import comparators, renderers
from alembic.autogenerate.api import AutogenContext
from alembic.operations import MigrateOperation, Operations
from alembic.operations.ops import UpgradeOps
from alembic.util import DispatchPriority, PriorityDispatchResult
from sqlalchemy import text

from respcache.core.errors import ConfigurationError
from respcache.ops import audit_log
from respcache.ops.audit_log import AUDIT_LOG
from respcache.writes import triggers
from respcache.writes.triggers import EVENTS, FENCE, OUTBOX, Watched

PUBLIC = "public"
OURS = (OUTBOX, FENCE, AUDIT_LOG)
IMPORT = f"import {__name__}  # noqa: F401  (op.watch_table)"
"""What a revision needs to know the operations by."""


def include_name(name: str | None, type_: str, parent_names: Mapping[str, Any]) -> bool:
    """Leave out our own tables: for ``context.configure(include_name=...)``."""
    return type_ != "table" or name not in OURS


@Operations.register_operation("create_respcache_outbox")
@dataclass(eq=False)
class CreateOutbox(MigrateOperation):
    """Create the outbox and the fence."""

    schema: str = PUBLIC

    @classmethod
    def create_respcache_outbox(cls, operations: Operations, *, schema: str = PUBLIC) -> None:
        """Create the outbox and the fence; rights on them are the migration's to grant
        (``triggers.create_outbox``)."""
        operations.invoke(cls(schema))

    def reverse(self) -> "DropOutbox":
        """Return the operation that undoes this one."""
        return DropOutbox(self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("create_respcache_outbox", self.schema)


@Operations.register_operation("drop_respcache_outbox")
@dataclass(eq=False)
class DropOutbox(MigrateOperation):
    """Drop the outbox and the fence."""

    schema: str = PUBLIC

    @classmethod
    def drop_respcache_outbox(cls, operations: Operations, *, schema: str = PUBLIC) -> None:
        """Drop the outbox and the fence, after the last table was unwatched: nothing is cached from
        then on."""
        operations.invoke(cls(schema))

    def reverse(self) -> CreateOutbox:
        """Return the operation that undoes this one."""
        return CreateOutbox(self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("drop_respcache_outbox", self.schema)


@Operations.register_operation("watch_table")
@dataclass(eq=False)
class WatchTable(MigrateOperation):
    """Have writes to a table leave rows in the outbox. ``before`` is how it was watched so far."""

    watched: Watched
    schema: str = PUBLIC
    before: Watched | None = None

    @classmethod
    def watch_table(
        cls,
        operations: Operations,
        table: str,
        *,
        tenant_column: str | None = "tenant_id",
        shared: bool = False,
        schema: str = PUBLIC,
    ) -> None:
        """Create the triggers of a table, or replace them. The options are those of
        ``triggers.Watched``."""
        operations.invoke(cls(Watched(table, tenant_column, shared), schema))

    def reverse(self) -> "WatchTable | UnwatchTable":
        """Return the operation that undoes this one."""
        if self.before is not None:
            return WatchTable(self.before, self.schema, self.watched)
        return UnwatchTable(self.watched.table, self.schema, self.watched)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("watch_table", self.watched)


@Operations.register_operation("unwatch_table")
@dataclass(eq=False)
class UnwatchTable(MigrateOperation):
    """Have writes to a table leave nothing. ``before`` is how it was watched so far, None where
    that is unknown."""

    table: str
    schema: str = PUBLIC
    before: Watched | None = None

    @classmethod
    def unwatch_table(cls, operations: Operations, table: str, *, schema: str = PUBLIC) -> None:
        """Drop the triggers of a table, if it has any: what reads it is not cached from then on."""
        operations.invoke(cls(table, schema))

    def reverse(self) -> "WatchTable | UnwatchTable":
        """Return the operation that undoes this one; nobody can watch a table in a way that is not
        known."""
        return self if self.before is None else WatchTable(self.before, self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("unwatch_table", self.table)


@Operations.register_operation("create_respcache_trail")
@dataclass(eq=False)
class CreateAuditLog(MigrateOperation):
    """Create the trail of what operators do."""

    schema: str = PUBLIC

    @classmethod
    def create_respcache_trail(cls, operations: Operations, *, schema: str = PUBLIC) -> None:
        """Create the trail; rights on it are the migration's to grant
        (``ops.trail.create_audit_log``)."""
        operations.invoke(cls(schema))

    def reverse(self) -> "DropAuditLog":
        """Return the operation that undoes this one."""
        return DropAuditLog(self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("create_respcache_trail", self.schema)


@Operations.register_operation("drop_respcache_trail")
@dataclass(eq=False)
class DropAuditLog(MigrateOperation):
    """Drop the trail."""

    schema: str = PUBLIC

    @classmethod
    def drop_respcache_trail(cls, operations: Operations, *, schema: str = PUBLIC) -> None:
        """Drop the trail, with all that is written in it."""
        operations.invoke(cls(schema))

    def reverse(self) -> CreateAuditLog:
        """Return the operation that undoes this one."""
        return CreateAuditLog(self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("drop_respcache_trail", self.schema)


@Operations.implementation_for(CreateOutbox)
def _create_outbox(operations: Operations, operation: CreateOutbox) -> None:
    triggers.create_outbox(_execute(operations), schema=operation.schema)


@Operations.implementation_for(DropOutbox)
def _drop_outbox(operations: Operations, operation: DropOutbox) -> None:
    triggers.drop_outbox(_execute(operations), schema=operation.schema)


@Operations.implementation_for(WatchTable)
def _watch_table(operations: Operations, operation: WatchTable) -> None:
    triggers.create_triggers(_execute(operations), [operation.watched], schema=operation.schema)


@Operations.implementation_for(UnwatchTable)
def _unwatch_table(operations: Operations, operation: UnwatchTable) -> None:
    triggers.drop_triggers(_execute(operations), [operation.table], schema=operation.schema)


@Operations.implementation_for(CreateAuditLog)
def _create_trail(operations: Operations, operation: CreateAuditLog) -> None:
    audit_log.create_audit_log(_execute(operations), schema=operation.schema)


@Operations.implementation_for(DropAuditLog)
def _drop_trail(operations: Operations, operation: DropAuditLog) -> None:
    audit_log.drop_audit_log(_execute(operations), schema=operation.schema)


def _execute(operations: Operations) -> triggers.Execute:
    """Run a statement as it is: a colon in a name begins no parameter."""
    return lambda statement: operations.execute(text(statement.replace(":", r"\:")))


@renderers.dispatch_for(CreateOutbox)
def _render_create_outbox(context: AutogenContext, operation: CreateOutbox) -> str:
    return _line(context, "create_respcache_outbox", [], operation.schema)


@renderers.dispatch_for(DropOutbox)
def _render_drop_outbox(context: AutogenContext, operation: DropOutbox) -> str:
    return _line(context, "drop_respcache_outbox", [], operation.schema)


@renderers.dispatch_for(WatchTable)
def _render_watch_table(context: AutogenContext, operation: WatchTable) -> str:
    watched = operation.watched
    options = [
        repr(watched.table),
        f"tenant_column={watched.tenant_column!r}",
        f"shared={watched.shared!r}",
    ]
    return _line(context, "watch_table", options, operation.schema)


@renderers.dispatch_for(UnwatchTable)
def _render_unwatch_table(context: AutogenContext, operation: UnwatchTable) -> str:
    return _line(context, "unwatch_table", [repr(operation.table)], operation.schema)


@renderers.dispatch_for(CreateAuditLog)
def _render_create_trail(context: AutogenContext, operation: CreateAuditLog) -> str:
    return _line(context, "create_respcache_trail", [], operation.schema)


@renderers.dispatch_for(DropAuditLog)
def _render_drop_trail(context: AutogenContext, operation: DropAuditLog) -> str:
    return _line(context, "drop_respcache_trail", [], operation.schema)


def _line(context: AutogenContext, name: str, arguments: list[str], schema: str) -> str:
    context.imports.add(IMPORT)
    given = ", ".join(arguments if schema == PUBLIC else [*arguments, f"schema={schema!r}"])
    return f"{context.opts['alembic_module_prefix'] or ''}{name}({given})"


@comparators.dispatch_for(
    "autogenerate", qualifier="postgresql", priority=DispatchPriority.LAST, subgroup="respcache"
)
def _compare(context: AutogenContext, upgrade: UpgradeOps) -> PriorityDispatchResult:
    """Put around alembic's own operations what the database lacks of outbox and triggers, or has
    too much."""
    own = [
        operation for operation in upgrade.ops if getattr(operation, "table_name", None) not in OURS
    ]
    schema = context.opts.get("respcache_schema", PUBLIC)
    wanted: Iterable[Watched] | None = context.opts.get("respcache_tables")
    before: list[MigrateOperation] = []
    after: list[MigrateOperation] = []
    if wanted is not None:
        before, after = _differences(
            context, {watched.table: watched for watched in wanted}, schema
        )
    with_trail: bool | None = context.opts.get("respcache_trail")
    if with_trail is not None and with_trail != context.inspector.has_table(
        AUDIT_LOG, schema=schema
    ):
        after.append(CreateAuditLog(schema) if with_trail else DropAuditLog(schema))
    upgrade.ops[:] = [*before, *own, *after]
    return PriorityDispatchResult.CONTINUE


def _differences(
    context: AutogenContext, wanted: dict[str, Watched], schema: str
) -> tuple[list[MigrateOperation], list[MigrateOperation]]:
    """Return what is to be done before alembic's own operations, and what after."""
    before: list[MigrateOperation] = []
    after: list[MigrateOperation] = []
    outbox = _has_outbox(context, schema)
    installed = _installed(context, schema)
    if wanted and not outbox:
        after.append(CreateOutbox(schema))
    for table, (source, _) in installed.items():
        if table not in wanted:
            before.append(UnwatchTable(table, schema, _recognised(context, table, source, schema)))
    for table, watched in wanted.items():
        source, whole = installed.get(table, (None, False))
        if not whole or source != triggers.body(watched, schema=schema):
            after.append(WatchTable(watched, schema, _recognised(context, table, source, schema)))
    if outbox and not wanted:
        before.append(DropOutbox(schema))
    return before, after


def _has_outbox(context: AutogenContext, schema: str) -> bool:
    there = {name: context.inspector.has_table(name, schema=schema) for name in (OUTBOX, FENCE)}
    if any(there.values()) and not all(there.values()):
        missing, other = sorted(there, key=there.__getitem__)
        raise ConfigurationError(
            f"table {missing} is missing, but {other} is there: drop it, and it is proposed anew"
        )
    return all(there.values())


def _installed(context: AutogenContext, schema: str) -> dict[str, tuple[str | None, bool]]:
    """Return, for every table with a trigger of ours: the function (None for several), and whether
    all four fire always."""
    assert context.connection is not None
    rows = context.connection.execute(text(_TRIGGERS), {"schema": schema})
    return {row.table: (row.source, row.firing == len(EVENTS)) for row in rows}


def _recognised(
    context: AutogenContext, table: str, source: str | None, schema: str
) -> Watched | None:
    """Tell how a table is watched, from its function: the one that would be made for one of its
    columns, or else None."""
    if source is None:
        return None
    columns = [column["name"] for column in context.inspector.get_columns(table, schema=schema)]
    possible = (
        Watched(table, column, shared) for column in (None, *columns) for shared in (False, True)
    )
    return next((one for one in possible if triggers.body(one, schema=schema) == source), None)


_TRIGGERS = """
SELECT CAST(c.relname AS text) AS "table",
       CASE WHEN count(DISTINCT p.prosrc) = 1 THEN min(p.prosrc) END AS source,
       count(*) FILTER (
           WHERE t.tgenabled = 'A' AND (CAST(t.tgname AS text), t.tgtype) IN (
               ('respcache_insert', 4), ('respcache_delete', 8), ('respcache_update', 16), ('respcache_truncate', 32))
       ) AS firing
FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
                  JOIN pg_proc p ON p.oid = t.tgfoid
WHERE t.tgname LIKE 'respcache\\_%' AND n.nspname = :schema
GROUP BY c.relname ORDER BY c.relname
"""
"""``tgtype`` is the event alone for what fires after a statement."""
