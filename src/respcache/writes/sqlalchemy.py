"""Writes are seen, not remembered: hooks on a SQLAlchemy engine that tell the cache what each
transaction changed.

Seen are the ORM's unit of work, bulk and Core statements of every session and connection of the
watched engine. ``text()`` that changes data is refused unless it says what it changes
(``execution_options(respcache_writes=("accounts",), respcache_tenant=...)``). Not seen: other
engines, COPY through the driver, functions that write when selected, psql.

With an outbox (``Cache(outbox=...)``) the database's triggers see all of that, so no read is older
than a lease; the hooks make the writer's own answer wait. They note *that* a transaction may write,
and ask before COMMIT what its statements have left in the outbox. What they take for a write is
text with a verb anywhere in it, a call of a volatile function of the database, and what says
``execution_options(respcache_writes=...)``. Where there may be more than a transaction can tell
before COMMIT, a round has to find it: with deferrable constraint triggers, in AUTOCOMMIT, and where
a table that others may still take for watched left nothing. What passes SQLAlchemy by (COPY through
the driver), or calls a writing function through a view or an operator, delays no answer: say
``cache.committed(None)`` after its COMMIT.

A change is told after the outermost COMMIT has returned, or has raised (its outcome is then
unknown). SQLAlchemy's events do not offer that moment: the engine's ``commit`` is dispatched before
the COMMIT is sent, the session's ``after_commit`` also for a savepoint and for a session that
joined somebody else's transaction. So the dialect's own ``do_commit`` is wrapped:
it is called exactly when a COMMIT is sent. Read in SQLAlchemy 2.1: ``engine/base.py``
``Connection._commit_impl``.
"""

import logging
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import Connection, Engine, ExceptionContext, MetaData, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, object_mapper

from respcache.context import Exchange, current, tick
from respcache.core.errors import ConfigurationError, UndeclaredWrite
from respcache.core.generations import table_tag
from respcache.core.keys import SHARED
from respcache.writes.relay import Rows
from respcache.writes.statements import Change, Facts, Schema

if TYPE_CHECKING:
    from respcache.cache import Cache

log = logging.getLogger("respcache")

_KEY = "respcache"
_FLUSHING = "respcache_flushing"
_ROWS = msgspec.json.Decoder(list[tuple[str, str, str]])
_OLD_SNAPSHOTS = ("REPEATABLE READ", "SERIALIZABLE", "SNAPSHOT")

UNKNOWN = frozenset({""})
"""Stands for a table that cannot be told from the statement."""

MAX_FACTS = 4096
"""Texts of statements whose facts are remembered."""


@dataclass(slots=True, eq=False)
class Transaction:
    """One database transaction: since when, and what it changed, by tenant.

    With an outbox: ``doubtful`` when it may have written after all, and the tables that it says to
    have changed.
    """

    began: int = field(default_factory=tick)
    wrote: bool = False
    doubtful: bool = False
    targets: set[str] = field(default_factory=set)
    newest: frozenset[str] = frozenset()
    changes: dict[str, set[str]] = field(default_factory=dict)
    unresolved: set[str] = field(default_factory=set)
    exchange: Exchange | None = None
    session: "weakref.ref[Session] | None" = None

    def note(self, tenant: str, tables: Iterable[str]) -> None:
        """Remember that rows of a tenant change."""
        self.changes.setdefault(tenant, set()).update(tables)
        self.touch()

    def touch(self) -> None:
        """Remember that something may change; the answer of the current request has to wait for the
        end of this."""
        self.wrote = True
        self.doubt()
        if self.exchange is not None:
            self.exchange.wrote = True

    def expect(self, targets: frozenset[str]) -> None:
        """Remember which tables change, each of which leaves something in the outbox if it is
        watched; none: unknown ones."""
        self.touch()
        self.newest = (targets or UNKNOWN) - self.targets
        self.targets |= self.newest

    def doubt(self) -> None:
        """Remember that something might: to be asked for before COMMIT, for which the answer waits
        too."""
        self.doubtful = True
        exchange = current.get()
        if exchange is not None:
            exchange.open_transactions.add(self)
            self.exchange = exchange


def watch(
    engine: Engine | AsyncEngine,
    cache: "Cache",
    *,
    metadata: MetaData,
    tenant_column: str = "tenant_id",
    tenant_is: Mapping[str, str] | None = None,
    shared: Sequence[str] = (),
) -> "Watch":
    """Watch an engine on behalf of a cache. Returns the watch, whose ``close`` ends it.

    ``tenant_column`` names the tenant in each table; ``tenant_is`` names another column for some
    (``{"tenants": "id"}``). Rows whose tenant is NULL and rows of the ``shared`` tables also count
    as changes of data shared by all tenants (``core.keys.SHARED``), which a resolver may take as
    the home of callers without a tenant. Cached reads may depend only on tables with a tenant
    column.
    """
    schema = Schema(metadata, tenant_column=tenant_column, tenant_is=tenant_is or {})
    sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    return Watch(sync, cache, schema, frozenset(shared))


class Watch:
    """The hooks on one engine."""

    def __init__(
        self, engine: Engine, cache: "Cache", schema: Schema, shared: frozenset[str]
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._relay = None if cache.runtime is None else cache.runtime.relay
        self._misspelt: set[str] = set()
        self._schema = schema
        self._shared = shared
        self._facts: dict[str, Facts] = {}
        self._compiled: weakref.WeakKeyDictionary[Any, Facts] = weakref.WeakKeyDictionary()
        self._listeners: list[tuple[Any, str, Callable[..., Any]]] = [
            (engine, "begin", self._begin),
            (engine, "before_cursor_execute", self._before_execute),
            (engine, "after_cursor_execute", self._after_execute),
            (engine, "handle_error", self._failed),
            (Session, "after_begin", self._session_begun),
            (Session, "before_flush", self._before_flush),
            (Session, "after_flush", self._after_flush),
            (Session, "after_soft_rollback", self._after_rollback),
        ]
        for target, name, listener in self._listeners:
            event.listen(target, name, listener)
        cache.registry.add_check(self._check_tables)
        self._wrap("do_commit", committed=True)
        self._wrap("do_commit_twophase", committed=True)
        self._wrap("do_rollback", committed=False)
        self._wrap("do_rollback_twophase", committed=False)

    def close(self) -> None:
        """Stop watching."""
        for target, name, listener in self._listeners:
            event.remove(target, name, listener)
        for name in ("do_commit", "do_commit_twophase", "do_rollback", "do_rollback_twophase"):
            self._engine.dialect.__dict__.pop(name, None)

    def _wrap(self, name: str, *, committed: bool) -> None:
        """Learn when a transaction has ended: replace one method of this engine's dialect by one
        that tells."""
        original = getattr(self._engine.dialect, name)

        def ended(connection: Any, *args: Any, **options: Any) -> Any:
            transaction = _info(connection).pop(_KEY, None)
            rows = None
            try:
                left = self._own_rows(connection, transaction) if name == "do_commit" else None
                result = original(connection, *args, **options)
                # only of a COMMIT that has returned: one whose outcome is unknown may still lie
                # ahead
                rows = left
            finally:
                if transaction is not None:
                    self._ended(transaction, rows, committed=committed)
            return result

        setattr(self._engine.dialect, name, ended)

    def _own_rows(self, connection: Any, transaction: Transaction | None) -> Rows | None:
        """Ask what the transaction has left in the outbox: one round trip, for those that may have
        written.

        None when that is not the whole of it, or cannot be known. The cursor is the driver's own,
        below all events. What it raises must reach the application: the transaction is then
        aborted, and a COMMIT would roll it back without a word.
        """
        relay = self._relay
        if relay is None or transaction is None or not transaction.doubtful:
            return None
        cursor = connection.cursor()
        try:
            cursor.execute(relay.outbox.own_rows)
            rows = _left(cursor.fetchone()[0])
        finally:
            cursor.close()
        if not transaction.wrote and rows != []:  # what was doubtful is certain now
            transaction.touch()
        if rows is None or relay.deferred:
            return None
        tags = {tag for _, tag, _ in rows}
        silent = (table for table in transaction.targets if table_tag(table) not in tags)
        if any(
            relay.believed(table) if table else not rows and relay.believed_any()
            for table in silent
        ):
            return None
        return rows

    def _ended(self, transaction: Transaction, rows: Rows | None, *, committed: bool) -> None:
        if committed:
            self._tell(transaction, rows)
        if transaction.exchange is not None:
            transaction.exchange.open_transactions.discard(transaction)

    def _tell(self, transaction: Transaction, rows: Rows | None) -> None:
        if not transaction.wrote:
            return
        changes, transaction.changes, transaction.wrote = transaction.changes, {}, False
        transaction.targets.clear()
        if self._relay is not None:
            self._cache.committed(rows)
        elif changes:
            self._cache.writes.changed(changes)

    # -- engine events -----------------------------------------------------------------------------

    def _begin(self, connection: Connection) -> None:
        _info(connection)[_KEY] = Transaction()

    def _before_execute(
        self,
        connection: Connection,
        cursor: Any,
        sql: str,
        parameters: Any,
        context: Any,
        executemany: bool,
    ) -> None:
        facts = self._facts_of(sql, context)
        transaction: Transaction = _info(connection).setdefault(_KEY, Transaction())
        relay = self._relay
        if relay is not None:
            declared = context.execution_options.get("respcache_writes")
            if facts.raw or facts.change is not None or declared:
                transaction.expect(facts.targets | frozenset(declared or ()))
            elif facts.doubtful or not facts.calls.isdisjoint(relay.functions):
                transaction.doubt()
        elif facts.raw:
            self._note_declared(transaction, sql, context.execution_options)
        elif facts.change is not None:
            self._note(transaction, facts.change, sql, context)
        exchange = current.get()
        if exchange is not None and exchange.reads is not None:
            self._note_reads(exchange, transaction, facts, connection, context.execution_options)

    def _after_execute(
        self,
        connection: Connection,
        cursor: Any,
        sql: str,
        parameters: Any,
        context: Any,
        executemany: bool,
    ) -> None:
        transaction: Transaction | None = _info(connection).get(_KEY)
        if (
            transaction is not None
            and cursor.rowcount == 0
            and self._facts_of(sql, context).counted
        ):
            transaction.targets -= transaction.newest
        self._tell_in_autocommit(connection)

    def _failed(self, context: ExceptionContext) -> None:
        """In AUTOCOMMIT a statement that raised may have been carried out: the connection broke
        before its answer came."""
        if context.connection is not None and context.execution_context is not None:
            transaction: Transaction | None = _info(context.connection).get(_KEY)
            if transaction is not None:  # elsewhere it has changed nothing
                transaction.targets -= transaction.newest
            self._tell_in_autocommit(context.connection)

    def _tell_in_autocommit(self, connection: Connection) -> None:
        """There a statement is its own transaction: whatever is rolled back later, it stays."""
        transaction: Transaction | None = _info(connection).get(_KEY)
        if (
            transaction is None
            or not transaction.doubtful
            or _isolation(connection) != "AUTOCOMMIT"
        ):
            return
        if self._relay is not None:  # without one, what is only doubtful is nothing
            transaction.touch()
        transaction.doubtful = False
        self._tell(transaction, None)

    def _facts_of(self, sql: str, context: Any) -> Facts:
        compiled = context.compiled
        facts = self._facts.get(sql) if compiled is None else self._compiled.get(compiled)
        if facts is None:
            if compiled is None:
                if len(self._facts) >= MAX_FACTS:
                    self._facts.clear()
                facts = self._facts[sql] = self._schema.facts_of_text(sql)
            elif context.isddl:
                facts = self._compiled[compiled] = Facts(frozenset(), False, None, False)
            else:
                facts = self._compiled[compiled] = self._schema.facts_of_compiled(compiled, sql)
        return facts

    # -- changes -----------------------------------------------------------------------------------

    def _note(self, transaction: Transaction, change: Change, sql: str, context: Any) -> None:
        tables = (change.table, *change.cascades)
        seen = _tenants(change, context)
        declared = _declared_tenants(context.execution_options)
        column = self._schema.tenant_column(change.table)
        if seen is not None or declared:
            shared = (SHARED,) if change.table in self._shared or column is None else ()
            for tenant in {*(seen or ()), *declared, *shared}:
                transaction.note(tenant, tables)
        elif _is_flushing(transaction):
            transaction.unresolved.add(change.table)
        else:
            raise UndeclaredWrite(
                f"cannot tell whose rows of {change.table!r} this changes: demand {column} = ... "
                f"in its WHERE clause, or say "
                f"execution_options(respcache_tenant=...): {_shortened(sql)}"
            )

    def _note_declared(
        self, transaction: Transaction, sql: str, options: Mapping[str, Any]
    ) -> None:
        """Take the word of a statement that cannot be understood, or refuse it."""
        tables = options.get("respcache_writes")
        tenants = _declared_tenants(options)
        if tables is None or (tables and not tenants):
            raise UndeclaredWrite(
                "cannot tell what this statement changes: say "
                "execution_options(respcache_writes=(tables...), "
                f"respcache_tenant=...), or respcache_writes=() if it changes no rows: "
                f"{_shortened(sql)}"
            )
        for tenant in tenants if tables else ():
            transaction.note(tenant, tables)

    def _note_reads(
        self,
        exchange: Exchange,
        transaction: Transaction,
        facts: Facts,
        connection: Connection,
        options: Mapping[str, Any],
    ) -> None:
        reads = exchange.reads
        assert reads is not None
        declared = options.get("respcache_reads")
        reads.tables.update(facts.reads if declared is None else declared)
        reads.undeclared_sql |= facts.undeclared and declared is None
        tenant = None if exchange.scope is None else exchange.scope.tenant
        if tenant is not None and tenant != SHARED and not reads.undeclared_sql:
            table = self._schema.misspelt(tenant, facts.reads)
            if table is not None:
                reads.undeclared_sql = True
                self._say_misspelt(tenant, table)
        if transaction.began < reads.captured_at:
            session = transaction.session() if transaction.session is not None else None
            held = session is not None and len(session.identity_map) > 0
            # in a transaction that may have written, rows are seen that nobody else will see if it
            # is rolled back
            reads.old_snapshot |= (
                held or transaction.doubtful or _isolation(connection) in _OLD_SNAPSHOTS
            )

    def _say_misspelt(self, tenant: str, table: str) -> None:
        if table not in self._misspelt:
            self._misspelt.add(table)
            log.warning(
                "not cached: reads of %s for tenant %r, which its rows spell differently: correct "
                "Scope.tenant",
                table,
                tenant,
            )

    # -- session events: whose rows a flush changes ------------------------------------------------

    def _session_begun(self, session: Session, _: Any, connection: Connection) -> None:
        transaction: Transaction | None = _info(connection).get(_KEY)
        if transaction is None or connection.engine.dialect is not self._engine.dialect:
            return
        transaction.session = weakref.ref(session)
        exchange = current.get()
        if exchange is not None:
            exchange.sessions.append(transaction.session)

    def _before_flush(self, session: Session, flush_context: Any, instances: Any) -> None:
        """Load the tenant of what changes while statements may still be sent: an expired object no
        longer knows it."""
        if self._relay is not None:
            return
        for instance in (*session.dirty, *session.deleted):
            for key, _ in self._tenant_attributes(object_mapper(instance)):
                getattr(instance, key)
        session.info[_FLUSHING] = True

    def _after_flush(self, session: Session, flush_context: Any) -> None:
        session.info.pop(_FLUSHING, None)
        transaction = self._transaction_of(session)
        if transaction is None or not transaction.unresolved:
            return
        for state, (is_delete, list_only) in flush_context.states.items():
            if not list_only:
                self._note_state(transaction, state, is_delete=is_delete)
        if transaction.unresolved:
            raise UndeclaredWrite(
                f"cannot tell whose rows of {', '.join(sorted(transaction.unresolved))} were "
                f"flushed"
            )

    def _after_rollback(self, session: Session, previous: Any) -> None:
        session.info.pop(_FLUSHING, None)

    def _transaction_of(self, session: Session) -> Transaction | None:
        if not session.in_transaction():
            return None
        connection = session.connection()
        if connection.engine.dialect is not self._engine.dialect:
            return None
        found: Transaction | None = _info(connection).get(_KEY)
        return found

    def _note_state(self, transaction: Transaction, state: Any, *, is_delete: bool) -> None:
        mapper = state.mapper
        for key, table in self._tenant_attributes(mapper):
            history = state.attrs[key].history
            tenants = {
                str(value) if value is not None else SHARED
                for value in (*history.added, *history.unchanged, *history.deleted)
            }
            if not tenants:
                continue
            if table in self._shared:
                tenants.add(SHARED)
            cascades = self._schema.cascades(table) if is_delete else ()
            for tenant in tenants:
                transaction.note(tenant, (table, *cascades))
            transaction.unresolved.discard(table)

    def _tenant_attributes(self, mapper: Any) -> Iterable[tuple[str, str]]:
        """Yield (attribute, table) for each table of a mapper that has a tenant column."""
        for table in mapper.tables:
            column = (
                self._schema.tenant_column(table.key) if table.key in self._schema.tables else None
            )
            if column is not None:
                yield mapper.get_property_by_column(table.c[column]).key, table.key

    def _check_tables(self, tables: Iterable[str], *, by_tenant: bool) -> None:
        """Refuse declarations that can never be invalidated. Called at start-up."""
        for table in tables:
            if table not in self._schema.tables:
                known = ", ".join(sorted(self._schema.tables))
                raise ConfigurationError(
                    f"a cached read declares the table {table!r}, which does not exist; known "
                    f"are: {known}"
                )
            if by_tenant and self._schema.tenant_column(table) is None:
                raise ConfigurationError(
                    f"a cached read declares the table {table!r}, whose rows belong to no tenant: "
                    f"not supported"
                )


def _left(setting: str | None) -> Rows | None:
    """Read what a transaction has left from the value of its setting; None when that is too much,
    or nothing of ours."""
    try:
        return _ROWS.decode(f"[{setting or ''}]")
    except msgspec.DecodeError:
        return None


def _info(connection: Any) -> dict[Any, Any]:
    """Return the place for notes on a connection. The one on which a dialect is set up, before any
    other, has none."""
    try:
        notes: dict[Any, Any] = connection.info
    except NotImplementedError:
        return {}
    return notes


def _tenants(change: Change, context: Any) -> set[str] | None:
    """Look the tenants up in the parameters of this execution; None when they are not there. NULL
    stands for shared data."""
    if change.tenant_parameters is None:
        return None
    found: set[str] = set()
    for parameters in context.compiled_parameters:
        for name in change.tenant_parameters:
            if name in parameters:
                values = [parameters[name]]
            else:  # the values of an IN have been spread over numbered parameters
                values = [
                    value
                    for key, value in parameters.items()
                    if re.fullmatch(rf"{re.escape(name)}_\d+", key)
                ]
            if not values:
                return None
            found.update(SHARED if value is None else str(value) for value in values)
    return found


def _declared_tenants(options: Mapping[str, Any]) -> tuple[str, ...]:
    value = options.get("respcache_tenant", ())
    return (
        tuple(map(str, value))
        if isinstance(value, list | tuple | set | frozenset)
        else (str(value),)
    )


def _is_flushing(transaction: Transaction) -> bool:
    session = transaction.session() if transaction.session is not None else None
    return session is not None and _FLUSHING in session.info


def _isolation(connection: Connection) -> str:
    """Return the isolation level without asking the server: as set on the connection, on the
    engine, or the server's default."""
    level = connection.get_execution_options().get("isolation_level")
    dialect = connection.dialect
    return str(
        level
        or getattr(dialect, "_on_connect_isolation_level", None)
        or dialect.default_isolation_level
        or ""
    )


def _shortened(sql: str) -> str:
    text = " ".join(sql.split())
    return text if len(text) <= 200 else text[:197] + "..."
