"""Checks of the database: outbox, serving lease, triggers, rights, and whether it belongs to this
cache. The checks only read."""

import contextlib
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from respcache.core.errors import OutboxError, OutboxMissing
from respcache.core.serving_lease import OutboxPage
from respcache.ops.doctor.findings import DoctorReport
from respcache.ops.doctor.secrets import is_default, is_local
from respcache.ops.doctor.servers import SKEW_S, CheckedServer
from respcache.writes.postgres import RETENTION_S, PostgresOutbox
from respcache.writes.relay import SAVE_CURSOR_S
from respcache.writes.triggers import EVENTS, FENCE, MIN_SERVER_VERSION, OUTBOX, function_name

DEADLINE_S = 5.0
BACKLOG_S = 2 * SAVE_CURSOR_S
"""Maximal age of the oldest row after the stored cursor, while any process runs relay cycles."""

UNPRUNED_S = 4 * RETENTION_S
"""Rows older than this show that no process deletes rows."""

NEEDED = {OUTBOX: ("SELECT", "UPDATE", "DELETE", "INSERT"), FENCE: ("SELECT", "UPDATE")}


@dataclass(frozen=True, slots=True)
class _Database:
    """A database under examination. ``tables`` are those that cached reads declare."""

    connection: AsyncConnection
    schema: str
    tables: Collection[str] | None
    cache: CheckedServer | None


async def examine(
    report: DoctorReport,
    url: str | None,
    *,
    schema: str,
    tables: Collection[str] | None,
    cache: CheckedServer | None,
) -> None:
    """Check the database. ``tables`` are those that cached reads declare; None if unknown. About
    ten round trips."""
    export = "export DATABASE_URL=postgresql://USER:PASSWORD@HOST:5432/DATABASE"
    if url is None:
        report.warn(
            "reachable",
            "DATABASE_URL is not set: not checked",
            why="without an outbox in PostgreSQL, an unconfirmed invalidation is lost when its "
            "process ends",
            fix=export,
        )
        return
    try:
        parsed = _with_driver(url)
    except (ArgumentError, ValueError):
        report.fault(
            "address",
            "DATABASE_URL cannot be parsed",
            why="nothing can connect to it",
            fix=export,
        )
        return
    place = f"{parsed.host or 'localhost'}:{parsed.port or 5432}/{parsed.database or ''}"
    try:
        engine = create_async_engine(parsed, connect_args=_deadlines(parsed))
    except (ImportError, SQLAlchemyError):
        report.fault(
            "address",
            f"{parsed.drivername}:// is not an installed asyncio driver for PostgreSQL",
            why="the outbox cannot be used with it",
            fix=export,
        )
        return
    try:
        async with engine.connect() as connection:
            version = await _check_server(report, connection, place)
            _check_access(report, parsed, await connection.scalar(text(_ENCRYPTED)))
            if version >= MIN_SERVER_VERSION and await _check_outbox(report, connection, schema):
                outbox = PostgresOutbox(engine, schema=schema, deadline_s=DEADLINE_S)
                try:
                    database = _Database(connection, schema, tables, cache)
                    await _check_writes(report, database, outbox)
                finally:
                    await outbox.close()
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        cause = getattr(error, "orig", None) or error
        message = str(cause).partition("\n")[0] or type(cause).__name__
        report.fault(
            "reachable",
            f"{place}: {message}",
            why="without it, nothing is cached that depends on the outbox",
            fix="start the server, or correct host, port, user, password and database in "
            'DATABASE_URL; test it with psql "$DATABASE_URL"',
        )
    finally:
        await engine.dispose()


def _with_driver(url: str) -> URL:
    """Parse the address; the default driver is asyncpg."""
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+asyncpg")
    return parsed


def _deadlines(url: URL) -> Mapping[str, Any]:
    if url.drivername.endswith("+asyncpg"):
        return {"timeout": DEADLINE_S, "command_timeout": DEADLINE_S}
    return {"connect_timeout": int(DEADLINE_S)}


async def _check_server(report: DoctorReport, connection: AsyncConnection, place: str) -> int:
    before = time.time()
    row = (await connection.execute(text(_SERVER))).one()
    skew_s = row.now - (before + time.time()) / 2
    report.ok("reachable", f"{place}, PostgreSQL {row.version}, as {row.role}")
    if row.number < MIN_SERVER_VERSION:
        report.fault(
            "version",
            row.version,
            why="CREATE OR REPLACE TRIGGER needs PostgreSQL 14",
            fix="upgrade the server: pg_upgrade",
        )
    else:
        report.ok("version", row.version)
    if row.recovering:
        report.fault(
            "role",
            "a standby",
            why="outbox and serving lease cannot be written",
            fix="set DATABASE_URL to the primary (target_session_attrs=read-write)",
        )
    if abs(skew_s) > SKEW_S:
        report.warn(
            "clock",
            f"{skew_s:+.0f} s from here",
            why="responses stay correct, because only durations are compared, but logs and expiry "
            "times do not agree",
            fix="run an NTP client on both machines: timedatectl set-ntp true",
        )
    else:
        report.ok("clock", f"{skew_s:+.1f} s from here")
    return int(row.number)


def _check_access(report: DoctorReport, url: URL, encrypted: bool | None) -> None:
    local = is_local(url.host)
    if encrypted or local:
        report.ok("encryption", "TLS" if encrypted else "on this machine only")
    else:
        report.warn(
            "encryption",
            "none",
            why="rows of all tenants cross the network unencrypted",
            fix="set ssl = on in postgresql.conf, and ?ssl=verify-full in DATABASE_URL",
        )
    if url.password and (is_default(str(url.password)) or url.password == url.username):
        add = report.warn if local else report.fault
        add(
            "password",
            "a well-known one",
            why="attackers try it first",
            fix=f"psql \"$DATABASE_URL\" -c '\\password {url.username}', then set DATABASE_URL",
        )
    else:
        report.ok("password", "not a well-known one")


async def _check_outbox(report: DoctorReport, connection: AsyncConnection, schema: str) -> bool:
    """Check that both tables exist and that this role may use them as the relay does.

    Return False if they cannot be read.
    """
    given = {"schema": schema, "outbox": OUTBOX, "fence": FENCE}
    rows = (await connection.execute(text(_RIGHTS), given)).all()
    missing = [table for table in NEEDED if table not in {row.name for row in rows}]
    if missing:
        report.fault(
            "outbox",
            f"{' and '.join(missing)} missing in schema {schema}",
            why="invalidations cannot be kept until they are confirmed, so nothing is cached",
            fix="op.create_respcache_outbox() in a migration (respcache.writes.alembic); if one "
            "exists: alembic upgrade head",
        )
        return False
    role = rows[0].role
    lacking = {
        f'"{schema}".{row.name}': [one for one in NEEDED[row.name] if one not in row.granted]
        for row in rows
    }
    grants = [
        f'GRANT {", ".join(rights)} ON {table} TO "{role}"'
        for table, rights in lacking.items()
        if rights
    ]
    if not rows[0].usage:
        grants.insert(0, f'GRANT USAGE ON SCHEMA "{schema}" TO "{role}"')
    if not grants:
        report.ok("rights", f"{role} may use {OUTBOX} and {FENCE}")
        return True
    missing_rights = "; ".join(
        grant.removeprefix("GRANT ").partition(" TO ")[0] for grant in grants
    )
    report.fault(
        "rights",
        f"{role} lacks {missing_rights}",
        why="relay cycles fail, so nothing is cached",
        fix=f"psql \"$DATABASE_URL\" -c '{'; '.join(grants)}' (as the owner)",
    )
    return rows[0].usage and all("SELECT" not in rights for rights in lacking.values())


async def _check_writes(report: DoctorReport, database: _Database, outbox: PostgresOutbox) -> None:
    """Check what a relay cycle reads: serving lease, triggers, and waiting rows."""
    try:
        page = await outbox.page(None)
    except OutboxMissing as error:
        report.fault("outbox", str(error), why="nothing is cached", fix="alembic upgrade head")
        return
    except OutboxError as error:
        message = str(error)
        report.fault(
            "outbox",
            message,
            why="relay cycles fail, so nothing is cached",
            fix=message.partition(": ")[2] or "read the message of the database",
        )
        return
    report.ok("outbox", f"{OUTBOX} and {FENCE} exist and are complete")
    await _check_lease(report, outbox, page, cache=database.cache)
    await _check_triggers(report, database, page)
    await _check_backlog(report, database, outbox, page=page)


async def _check_lease(
    report: DoctorReport, outbox: PostgresOutbox, page: OutboxPage, *, cache: CheckedServer | None
) -> None:
    """Check which server the serving lease names, and whose database the epoch belongs to."""
    left_s = await outbox.remaining_s()
    state = (
        f"renewed, ends in {left_s:.1f} s"
        if left_s > 0
        else "not renewed: no process serves from the cache now"
    )
    if cache is None or not cache.identity:
        report.ok("serving lease", state)
    elif page.authority is None:
        report.warn(
            "serving lease",
            "names no server yet",
            why="the first process that runs with the outbox takes it; until then nothing is "
            "cached",
            fix="start the application",
        )
    elif page.authority != cache.identity:
        add = report.fault if left_s > 0 else report.warn
        add(
            "serving lease",
            f"names another server than REDIS_CACHE_URL, {state}",
            why="processes serve from the server that the lease names; this one is not used, or "
            "not yet after a restart",
            fix="set REDIS_CACHE_URL to the server that the application uses, or start the "
            "application with this one",
        )
    else:
        report.ok("serving lease", f"names this cache, {state}")
    if (
        cache is not None
        and cache.epoch is not None
        and cache.epoch.identity == cache.identity
        and left_s > 0
    ):
        if cache.epoch.incarnation != page.incarnation:
            report.fault(
                "one database",
                "the epoch in the cache belongs to another database",
                why="either two databases invalidate each other's responses, or triggers changed a "
                "moment ago",
                fix="give each database its own cache server; run doctor again after a second",
            )
        else:
            report.ok("one database", "the cache's epoch belongs to this database")


async def _check_triggers(report: DoctorReport, database: _Database, page: OutboxPage) -> None:
    """Check every declared table; if these are unknown, every table with respcache triggers."""
    tables, schema = database.tables, database.schema
    if tables is None:
        report.warn(
            "triggers",
            "the tables that cached reads declare are unknown, so only tables with triggers are "
            "checked",
            why="reads from a table without triggers are not cached",
            fix="respcache doctor --app MODULE:APP, or --tables a,b",
        )
        tables = page.tables | page.unsound
    found = {
        row.name: row
        for row in await database.connection.execute(text(_TRIGGERS), {"schema": schema})
    }
    sound = [table for table in sorted(tables) if table in page.tables]
    for table in sorted(set(tables) - page.tables):
        problem, fix = _why_unsound(table, found.get(table), schema)
        report.fault(
            "triggers",
            f"{table}: {problem}",
            why=f"reads from {table} are not cached",
            fix=fix,
        )
    if sound:
        report.ok("triggers", f"{len(sound)} tables watched: {', '.join(sound)}")


def _why_unsound(table: str, row: Any, schema: str) -> tuple[str, str]:
    """Return what is wrong with the triggers of a table, and the fix."""
    where = "" if schema == "public" else f", schema={schema!r}"
    watch = (
        f"op.watch_table({table!r}{where}) in a migration, or triggers.create_triggers(execute, "
        f"[Watched({table!r})]{where})"
    )
    if row is None:
        return (
            "there is no such table in this schema",
            "correct the table's name in the policy, or the schema (--schema)",
        )
    if row.is_partition or row.inherits:
        why = "a partition" if row.is_partition else "it inherits or is inherited from"
        return (
            f"{why}: statements on related tables do not fire its triggers",
            "declare the table that the statements name",
        )
    missing = sorted(set(EVENTS) - {name.removeprefix("respcache_") for name in row.names or ()})
    if missing:
        return f"no trigger for {', '.join(missing)}", watch
    if row.functions != [function_name(table)]:
        return f"its triggers run {', '.join(row.functions)}: it was renamed", watch
    if not row.always:
        every = "; ".join(
            f'ALTER TABLE "{schema}"."{table}" ENABLE ALWAYS TRIGGER respcache_{event}'
            for event in EVENTS
        )
        return "a trigger is disabled, or not ENABLE ALWAYS", f"psql \"$DATABASE_URL\" -c '{every}'"
    return "its triggers were changed", watch


async def _check_backlog(
    report: DoctorReport, database: _Database, outbox: PostgresOutbox, *, page: OutboxPage
) -> None:
    """Check that the rows of the outbox are applied, and deleted afterwards."""
    count = text(_OUTBOX.format(table=f'"{database.schema}".{OUTBOX}'))
    rows, cache = (await database.connection.execute(count)).one(), database.cache
    kept = (
        f"{rows.kept} rows kept, the oldest {rows.oldest_s:.0f} s old" if rows.kept else "no rows"
    )
    if page.foreign:
        report.warn(
            "outbox rows",
            f"{kept}, some of another database",
            why="they came with the dump of another database; the relay of a process deletes them",
            fix="start the application, or DELETE them",
        )
        return
    if (
        cache is not None
        and cache.epoch is not None
        and cache.epoch.incarnation == page.incarnation
    ):
        with contextlib.suppress(OutboxError):
            waiting, oldest_s = await outbox.backlog(cache.epoch.cursor)
            if oldest_s > BACKLOG_S:
                report.warn(
                    "outbox rows",
                    f"{waiting} wait, the oldest for {oldest_s:.0f} s",
                    why="invalidations wait: no process runs relay cycles, or none reaches both "
                    "database and cache server",
                    fix="start the application; if it runs, respcache status shows the problem",
                )
                return
            kept += f"; {waiting} after the stored cursor"
    if rows.kept and rows.oldest_s > UNPRUNED_S:
        report.warn(
            "outbox rows",
            kept,
            why="applied rows are not deleted, so the table grows",
            fix=f"start the application; its role needs DELETE on {OUTBOX} and UPDATE on {FENCE}",
        )
        return
    report.ok("outbox rows", kept)


_SERVER = """
SELECT current_setting('server_version') AS version,
       CAST(current_setting('server_version_num') AS integer) AS number,
       current_user AS role,
       pg_is_in_recovery() AS recovering,
       CAST(extract(epoch FROM clock_timestamp()) AS float8) AS now
"""
_ENCRYPTED = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
_RIGHTS = """
SELECT c.relname AS name, current_user AS role, has_schema_privilege(n.oid, 'USAGE') AS usage,
       ARRAY(SELECT "right" FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS "right"
             WHERE has_table_privilege(c.oid, "right")) AS granted
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relname IN (:outbox, :fence) ORDER BY c.relname DESC
"""
_TRIGGERS = """
SELECT c.relname AS name, c.relispartition AS is_partition,
       EXISTS (SELECT FROM pg_inherits i JOIN pg_class child ON child.oid = i.inhrelid
               WHERE (i.inhrelid = c.oid OR i.inhparent = c.oid)
                 AND NOT child.relispartition) AS inherits,
       array_agg(t.tgname ORDER BY t.tgname) FILTER (WHERE t.oid IS NOT NULL) AS names,
       array_agg(DISTINCT p.proname ORDER BY p.proname)
         FILTER (WHERE p.oid IS NOT NULL) AS functions,
       bool_and(t.tgenabled = 'A') AS always
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     LEFT JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgname LIKE 'respcache\\_%'
     LEFT JOIN pg_proc p ON p.oid = t.tgfoid
WHERE n.nspname = :schema AND c.relkind IN ('r', 'p')
GROUP BY c.oid, c.relname, c.relispartition
"""
_OUTBOX = """
SELECT count(*) AS kept,
       CAST(extract(epoch FROM clock_timestamp() - min(at)) AS float8) AS oldest_s
FROM {table}
"""
