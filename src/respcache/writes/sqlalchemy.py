"""Hooks on a SQLAlchemy engine that report to the cache what each transaction changed.

They see the ORM's unit of work, and bulk and Core statements of every session and connection of the
watched engine. A ``text()`` that changes data is refused unless it declares its changes
(``execution_options(respcache_writes=("accounts",), respcache_tenant=...)``). They do not see other
engines, COPY through the driver, functions that write when a SELECT calls them, or psql.

With an outbox (``Cache(outbox=...)``) the database's triggers see all of that, so no read is older
than a lease; the hooks make the response to the write wait. They record *that* a transaction may
write, and read before COMMIT which rows its statements have left in the outbox. These count as
writes: text with a verb anywhere in it, a call of a volatile function of the database, and a
statement with ``execution_options(respcache_writes=...)``. Where a transaction may leave more rows
than can be read before COMMIT, a relay cycle has to find them: with deferrable constraint triggers,
in AUTOCOMMIT, and where no row came from a table that other processes may still believe to be
watched. Writes that bypass SQLAlchemy (COPY through the driver), or that call a writing function
through a view or an operator, do not delay the response: call ``cache.committed(None)`` after their
COMMIT.

A change is reported after the outermost COMMIT has returned, or has raised (its outcome is then
unknown). SQLAlchemy has no event for that moment: the engine's ``commit`` is dispatched before the
COMMIT is sent; the session's ``after_commit`` is also dispatched for a savepoint and for a session
that joined an outer transaction. So the dialect's own ``do_commit`` is wrapped: it is called
exactly when a COMMIT is sent. (SQLAlchemy 2.1: ``engine/base.py``, ``Connection._commit_impl``.)
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
"""Stands for tables that cannot be determined from the statement."""

MAX_FACTS = 4096
"""The number of SQL texts whose facts are cached."""


@dataclass(slots=True, eq=False)
class Transaction:
    """A database transaction: when it began, and what it changed, by tenant.

    With an outbox: whether it may have written although no statement said so (``doubtful``), and
    the tables that its statements change (``targets``).
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
        """Record that rows of a tenant change."""
        self.changes.setdefault(tenant, set()).update(tables)
        self.touch()

    def touch(self) -> None:
        """Record that the transaction writes: the response of the current request waits for its
        end."""
        self.wrote = True
        self.doubt()
        if self.exchange is not None:
            self.exchange.wrote = True

    def expect(self, targets: frozenset[str]) -> None:
        """Record which tables change (none: unknown ones). Each of them leaves rows in the outbox
        if it is watched."""
        self.touch()
        self.newest = (targets or UNKNOWN) - self.targets
        self.targets |= self.newest

    def doubt(self) -> None:
        """Record that the transaction may write: its rows are read before COMMIT, and the response
        waits for that."""
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
    """Watch the writes of an engine for a cache. Return the watch; ``close`` ends it.

    ``tenant_column`` is the tenant column of each table; ``tenant_is`` names another column for
    some tables (``{"tenants": "id"}``). Changes of rows whose tenant is NULL, and of rows of the
    ``shared`` tables, also count as changes of data that all tenants share (``core.keys.SHARED``),
    which a resolver may use as the owner tenant of callers without a tenant. Cached reads may
    depend only on tables with a tenant column.
    """
    schema = Schema(metadata, tenant_column=tenant_column, tenant_is=tenant_is or {})
    sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    return Watch(sync, cache, schema, shared=frozenset(shared))


class Watch:
    """The hooks on one engine."""

    def __init__(
        self, engine: Engine, cache: "Cache", schema: Schema, *, shared: frozenset[str]
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
        """Replace a method of this engine's dialect by one that reports the end of the
        transaction."""
        original = getattr(self._engine.dialect, name)

        def ended(connection: Any, *args: Any, **options: Any) -> Any:
            transaction = _info(connection).pop(_KEY, None)
            rows = None
            try:
                left = self._own_rows(connection, transaction) if name == "do_commit" else None
                result = original(connection, *args, **options)
                # only after COMMIT has returned: if its outcome is unknown, it may still happen
                rows = left
            finally:
                if transaction is not None:
                    self._ended(transaction, rows, committed=committed)
            return result

        setattr(self._engine.dialect, name, ended)

    def _own_rows(self, connection: Any, transaction: Transaction | None) -> Rows | None:
        """Return the rows that the transaction has left in the outbox. One round trip, for
        transactions that may have written.

        None if these may not be all of its rows. The cursor is the driver's own, below all events.
        Its exceptions must reach the application: the transaction is then aborted, and a COMMIT
        would silently roll it back.
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
        if not transaction.wrote and rows != []:  # it is now certain that it wrote
            transaction.touch()
        if rows is None or relay.coverage.deferred:
            return None
        tags = {tag for _, tag, _ in rows}
        silent = (table for table in transaction.targets if table_tag(table) not in tags)
        if any(
            relay.may_be_cached(table) if table else not rows and relay.anything_may_be_cached()
            for table in silent
        ):
            return None
        return rows

    def _ended(self, transaction: Transaction, rows: Rows | None, *, committed: bool) -> None:
        if committed:
            self._report(transaction, rows)
        if transaction.exchange is not None:
            transaction.exchange.open_transactions.discard(transaction)

    def _report(self, transaction: Transaction, rows: Rows | None) -> None:
        if not transaction.wrote:
            return
        changes, transaction.changes, transaction.wrote = transaction.changes, {}, False
        transaction.targets.clear()
        if self._relay is not None:
            self._cache.committed(rows)
        elif changes:
            self._cache.writes.changed(changes)

    # -- engine events, whose parameters SQLAlchemy defines ----------------------------------------

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
            elif facts.doubtful or not facts.calls.isdisjoint(relay.coverage.functions):
                transaction.doubt()
        elif facts.raw:
            self._note_declared(transaction, sql, context.execution_options)
        elif facts.change is not None:
            self._note(transaction, facts.change, context)
        exchange = current.get()
        if exchange is not None and exchange.reads is not None:
            declared = context.execution_options.get("respcache_reads")
            self._note_reads(exchange, facts, declared)
            if transaction.began < exchange.reads.captured_at:
                exchange.reads.old_snapshot |= _reads_old_rows(transaction, connection)

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
        self._report_in_autocommit(connection)

    def _failed(self, context: ExceptionContext) -> None:
        """Handle a statement that raised: in AUTOCOMMIT it may have been carried out, if the
        connection broke before the reply arrived."""
        if context.connection is not None and context.execution_context is not None:
            transaction: Transaction | None = _info(context.connection).get(_KEY)
            if transaction is not None:  # outside AUTOCOMMIT it has changed nothing
                transaction.targets -= transaction.newest
            self._report_in_autocommit(context.connection)

    def _report_in_autocommit(self, connection: Connection) -> None:
        """Report a statement in AUTOCOMMIT, where it is its own transaction and no later rollback
        undoes it."""
        transaction: Transaction | None = _info(connection).get(_KEY)
        if (
            transaction is None
            or not transaction.doubtful
            or _isolation(connection) != "AUTOCOMMIT"
        ):
            return
        if self._relay is not None:  # without a relay, doubtful statements do not count as writes
            transaction.touch()
        transaction.doubtful = False
        self._report(transaction, None)

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

    def _note(self, transaction: Transaction, change: Change, context: Any) -> None:
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
                f"cannot tell whose rows of {change.table!r} this changes: require {column} = ... "
                f"in its WHERE clause, or set "
                f"execution_options(respcache_tenant=...): {_shortened(context.statement)}"
            )

    def _note_declared(
        self, transaction: Transaction, sql: str, options: Mapping[str, Any]
    ) -> None:
        """Use the declaration of a statement that cannot be analysed, or refuse it."""
        tables = options.get("respcache_writes")
        tenants = _declared_tenants(options)
        if tables is None or (tables and not tenants):
            raise UndeclaredWrite(
                "cannot tell what this statement changes: set "
                "execution_options(respcache_writes=(tables...), "
                f"respcache_tenant=...), or respcache_writes=() if it changes no rows: "
                f"{_shortened(sql)}"
            )
        for tenant in tenants if tables else ():
            transaction.note(tenant, tables)

    def _note_reads(self, exchange: Exchange, facts: Facts, declared: Iterable[str] | None) -> None:
        reads = exchange.reads
        assert reads is not None
        reads.tables.update(facts.reads if declared is None else declared)
        reads.undeclared_sql |= facts.undeclared and declared is None
        tenant = None if exchange.scope is None else exchange.scope.tenant
        if tenant is not None and tenant != SHARED and not reads.undeclared_sql:
            table = self._schema.misspelt(tenant, facts.reads)
            if table is not None:
                reads.undeclared_sql = True
                self._warn_of_misspelling(tenant, table)

    def _warn_of_misspelling(self, tenant: str, table: str) -> None:
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
        """Load the tenants of changed objects while statements may still be sent: an expired object
        has lost its tenant."""
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
        """Raise ``ConfigurationError`` for reads that could never be invalidated."""
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
    """Parse the setting with the rows that a transaction has left; None if they are too many, or
    the value is not ours."""
    try:
        return _ROWS.decode(f"[{setting or ''}]")
    except msgspec.DecodeError:
        return None


def _info(connection: Any) -> dict[Any, Any]:
    """Return the ``info`` of a connection. The first one, on which the dialect is initialised, has
    none."""
    try:
        notes: dict[Any, Any] = connection.info
    except NotImplementedError:
        return {}
    return notes


def _tenants(change: Change, context: Any) -> set[str] | None:
    """Return the tenants in the parameters of this execution, or None if they are absent. NULL
    stands for shared data."""
    if change.tenant_parameters is None:
        return None
    found: set[str] = set()
    for parameters in context.compiled_parameters:
        for name in change.tenant_parameters:
            if name in parameters:
                values = [parameters[name]]
            else:  # the values of an IN are in numbered parameters
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


def _reads_old_rows(transaction: Transaction, connection: Connection) -> bool:
    """Return whether a transaction that began before the capture may return rows from before it, or
    rows that are gone if it is rolled back."""
    session = transaction.session() if transaction.session is not None else None
    has_rows = session is not None and len(session.identity_map) > 0
    return has_rows or transaction.doubtful or _isolation(connection) in _OLD_SNAPSHOTS


def _is_flushing(transaction: Transaction) -> bool:
    session = transaction.session() if transaction.session is not None else None
    return session is not None and _FLUSHING in session.info


def _isolation(connection: Connection) -> str:
    """Return the isolation level without a round trip: as set on the connection or the engine, or
    the server's default."""
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
