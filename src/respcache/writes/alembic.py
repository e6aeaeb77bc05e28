"""Alembic operations that install and remove the outbox, its triggers and the audit log, for
``--autogenerate`` too.

In ``env.py``::

    import respcache.writes.alembic
    from respcache.writes.triggers import watched

    context.configure(
        ...,
        respcache_tables=watched(Base.metadata, TABLES_THAT_CACHED_READS_DECLARE),
        respcache_trail=True,
        include_name=respcache.writes.alembic.include_name,
    )

A generated revision then contains what the database lacks, and removes what is superfluous::

    op.create_respcache_outbox()
    op.watch_table("accounts", tenant_column="tenant_id", shared=False)

An empty list removes everything; ``respcache_trail=False`` removes the audit log
(``ops/audit_log.py``). Without these options nothing is compared. A table counts as watched if it
has its four triggers, they always fire, and they run exactly the function that would be generated
today. So another tenant column, a dropped or disabled trigger, and a release of this library with
another function are all detected. ``watch_table`` repairs all of them.

Tables are first unwatched and then dropped, first created and then watched; a downgrade is the
reverse. If the old function is not recognised, the downgrade leaves the table unwatched: reads of
the table are then not cached.

The outbox, the fence row's table and the audit log are in no metadata: alembic is kept from
proposing to drop them, in every schema. ``include_name`` also keeps alembic from reading them,
which SQLAlchemy would warn about, because it does not know their types. ``respcache_schema``, and
``schema=`` of each operation, name another schema than ``public`` for them and for the tables.
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
"""The import that registers the operations in a revision."""


def include_name(name: str | None, type_: str, parent_names: Mapping[str, Any]) -> bool:
    """Exclude our own tables: for ``context.configure(include_name=...)``."""
    return type_ != "table" or name not in OURS


@Operations.register_operation("create_respcache_outbox")
@dataclass(eq=False)
class CreateOutbox(MigrateOperation):
    """Create the outbox and the table of the fence row."""

    schema: str = PUBLIC

    @classmethod
    def create_respcache_outbox(cls, operations: Operations, *, schema: str = PUBLIC) -> None:
        """Create the outbox and the table of the fence row. The migration must grant the rights on
        them (``triggers.create_outbox``)."""
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
    """Drop the outbox and the table of the fence row."""

    schema: str = PUBLIC

    @classmethod
    def drop_respcache_outbox(cls, operations: Operations, *, schema: str = PUBLIC) -> None:
        """Drop the outbox and the table of the fence row, after the last table was unwatched.
        Nothing is cached from then on."""
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
    """Make writes to a table leave rows in the outbox. ``before`` is how it was watched before."""

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
        """Create or replace the triggers of a table. For the options see ``triggers.Watched``."""
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
    """Remove the triggers of a table. ``before`` is how it was watched before, None if
    unknown."""

    table: str
    schema: str = PUBLIC
    before: Watched | None = None

    @classmethod
    def unwatch_table(cls, operations: Operations, table: str, *, schema: str = PUBLIC) -> None:
        """Drop the triggers of a table, if any. Reads of it are not cached from then on."""
        operations.invoke(cls(table, schema))

    def reverse(self) -> "WatchTable | UnwatchTable":
        """Return the operation that undoes this one: itself if the way the table was watched is
        unknown."""
        return self if self.before is None else WatchTable(self.before, self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        return ("unwatch_table", self.table)


@Operations.register_operation("create_respcache_trail")
@dataclass(eq=False)
class CreateAuditLog(MigrateOperation):
    """Create the audit log of operators' actions."""

    schema: str = PUBLIC

    @classmethod
    def create_respcache_trail(cls, operations: Operations, *, schema: str = PUBLIC) -> None:
        """Create the audit log. The migration must grant the rights on it
        (``ops.audit_log.create_audit_log``)."""
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
    """Drop the audit log."""

    schema: str = PUBLIC

    @classmethod
    def drop_respcache_trail(cls, operations: Operations, *, schema: str = PUBLIC) -> None:
        """Drop the audit log with its contents."""
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
def _create_audit_log(operations: Operations, operation: CreateAuditLog) -> None:
    audit_log.create_audit_log(_execute(operations), schema=operation.schema)


@Operations.implementation_for(DropAuditLog)
def _drop_audit_log(operations: Operations, operation: DropAuditLog) -> None:
    audit_log.drop_audit_log(_execute(operations), schema=operation.schema)


def _execute(operations: Operations) -> triggers.Execute:
    """Run a statement literally: a colon in a name does not begin a parameter."""
    return lambda statement: operations.execute(text(statement.replace(":", r"\:")))


@renderers.dispatch_for(CreateOutbox)
def _render_create_outbox(context: AutogenContext, operation: CreateOutbox) -> str:
    return _line(context, operation)


@renderers.dispatch_for(DropOutbox)
def _render_drop_outbox(context: AutogenContext, operation: DropOutbox) -> str:
    return _line(context, operation)


@renderers.dispatch_for(WatchTable)
def _render_watch_table(context: AutogenContext, operation: WatchTable) -> str:
    watched = operation.watched
    options = [
        repr(watched.table),
        f"tenant_column={watched.tenant_column!r}",
        f"shared={watched.shared!r}",
    ]
    return _line(context, operation, *options)


@renderers.dispatch_for(UnwatchTable)
def _render_unwatch_table(context: AutogenContext, operation: UnwatchTable) -> str:
    return _line(context, operation, repr(operation.table))


@renderers.dispatch_for(CreateAuditLog)
def _render_create_audit_log(context: AutogenContext, operation: CreateAuditLog) -> str:
    return _line(context, operation)


@renderers.dispatch_for(DropAuditLog)
def _render_drop_audit_log(context: AutogenContext, operation: DropAuditLog) -> str:
    return _line(context, operation)


def _line(context: AutogenContext, operation: Any, *arguments: str) -> str:
    """Return the call of an operation in a revision."""
    context.imports.add(IMPORT)
    given = ", ".join(
        arguments if operation.schema == PUBLIC else (*arguments, f"schema={operation.schema!r}")
    )
    return f"{context.opts['alembic_module_prefix'] or ''}{operation.to_diff_tuple()[0]}({given})"


@comparators.dispatch_for(
    "autogenerate", qualifier="postgresql", priority=DispatchPriority.LAST, subgroup="respcache"
)
def _compare(context: AutogenContext, upgrade: UpgradeOps) -> PriorityDispatchResult:
    """Add operations for a missing or superfluous outbox, trigger or audit log around alembic's
    own."""
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
    with_audit_log: bool | None = context.opts.get("respcache_trail")
    if with_audit_log is not None and with_audit_log != context.inspector.has_table(
        AUDIT_LOG, schema=schema
    ):
        after.append(CreateAuditLog(schema) if with_audit_log else DropAuditLog(schema))
    upgrade.ops[:] = [*before, *own, *after]
    return PriorityDispatchResult.CONTINUE


def _differences(
    context: AutogenContext, wanted: dict[str, Watched], schema: str
) -> tuple[list[MigrateOperation], list[MigrateOperation]]:
    """Return the operations to run before alembic's own, and those to run after."""
    before: list[MigrateOperation] = []
    after: list[MigrateOperation] = []
    outbox = _has_outbox(context, schema)
    installed = _installed(context, schema)
    if wanted and not outbox:
        after.append(CreateOutbox(schema))
    for table, (source, _) in installed.items():
        if table not in wanted:
            before.append(
                UnwatchTable(table, schema, _recognised(context, table, source, schema=schema))
            )
    for table, watched in wanted.items():
        source, whole = installed.get(table, (None, False))
        if not whole or source != triggers.body(watched, schema=schema):
            after.append(
                WatchTable(watched, schema, _recognised(context, table, source, schema=schema))
            )
    if outbox and not wanted:
        before.append(DropOutbox(schema))
    return before, after


def _has_outbox(context: AutogenContext, schema: str) -> bool:
    there = {name: context.inspector.has_table(name, schema=schema) for name in (OUTBOX, FENCE)}
    if any(there.values()) and not all(there.values()):
        missing, other = sorted(there, key=there.__getitem__)
        raise ConfigurationError(
            f"table {missing} is missing, but {other} exists: drop it, and it is proposed again"
        )
    return all(there.values())


def _installed(context: AutogenContext, schema: str) -> dict[str, tuple[str | None, bool]]:
    """Return, for every table with our triggers: the function (None for several), and whether all
    four triggers always fire."""
    assert context.connection is not None
    rows = context.connection.execute(text(_TRIGGERS), {"schema": schema})
    return {row.table: (row.source, row.firing == len(EVENTS)) for row in rows}


def _recognised(
    context: AutogenContext, table: str, source: str | None, *, schema: str
) -> Watched | None:
    """Return how a table is watched, if its function is the one that would be generated for one of
    its columns; else None."""
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
               ('respcache_insert', 4), ('respcache_delete', 8),
               ('respcache_update', 16), ('respcache_truncate', 32))
       ) AS firing
FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
                  JOIN pg_proc p ON p.oid = t.tgfoid
WHERE t.tgname LIKE 'respcache\\_%' AND n.nspname = :schema
GROUP BY c.relname ORDER BY c.relname
"""
"""For a trigger that fires after a statement, ``tgtype`` is the event alone."""
