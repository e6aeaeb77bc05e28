"""Checks of the database: outbox, fence, triggers, rights, and whether it belongs to this cache.
Reads, changes nothing."""

import contextlib
import time
from collections.abc import Collection, Mapping
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
"""The oldest row after the cursor that the store keeps is this old at most while anybody runs
rounds."""

UNPRUNED_S = 4 * RETENTION_S
"""Rows older than this are left where nobody deletes any."""

NEEDED = {OUTBOX: ("SELECT", "UPDATE", "DELETE", "INSERT"), FENCE: ("SELECT", "UPDATE")}


async def examine(
    report: DoctorReport,
    url: str | None,
    *,
    schema: str,
    tables: Collection[str] | None,
    cache: CheckedServer | None,
) -> None:
    """Check the database. ``tables`` are those that cached reads declare, None where nobody said.
    Some ten round trips."""
    why = "without it nothing is cached that the outbox must vouch for"
    if url is None:
        report.warn(
            "reachable", "DATABASE_URL is not set: not checked",
            "without the outbox in a PostgreSQL an unconfirmed invalidation ends with the process "
            "that had it",
            "export DATABASE_URL=postgresql://USER:PASSWORD@HOST:5432/DATABASE",
        )  # fmt: skip
        return
    form = "export DATABASE_URL=postgresql://USER:PASSWORD@HOST:5432/DATABASE"
    try:
        parsed = _with_driver(url)
    except (ArgumentError, ValueError):
        report.fault("address", "DATABASE_URL cannot be read", "nothing can connect to it", form)
        return
    place = f"{parsed.host or 'localhost'}:{parsed.port or 5432}/{parsed.database or ''}"
    try:
        engine = create_async_engine(parsed, connect_args=_deadlines(parsed))
    except (ImportError, SQLAlchemyError):
        found = (
            f"{parsed.drivername}:// is no driver for PostgreSQL that is installed here and works "
            f"with asyncio"
        )
        report.fault("address", found, "the outbox cannot be used with it", form)
        return
    try:
        async with engine.connect() as connection:
            version = await _check_server(report, connection, place)
            _check_access(report, parsed, await connection.scalar(text(_ENCRYPTED)))
            if version >= MIN_SERVER_VERSION and await _check_outbox(report, connection, schema):
                outbox = PostgresOutbox(engine, schema=schema, deadline_s=DEADLINE_S)
                try:
                    await _check_writes(report, outbox, connection, schema, tables, cache)
                finally:
                    await outbox.close()
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        cause = getattr(error, "orig", None) or error
        said = str(cause).partition("\n")[0] or type(cause).__name__
        mend = (
            "start the server, or mend host, port, user, password and database in DATABASE_URL; "
            'psql "$DATABASE_URL" tries it'
        )
        report.fault("reachable", f"{place}: {said}", why, mend)
    finally:
        await engine.dispose()


def _with_driver(url: str) -> URL:
    """Read the address; asyncpg is the driver where none is named."""
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
        why = "CREATE OR REPLACE TRIGGER came with PostgreSQL 14"
        report.fault("version", row.version, why, "upgrade the server: pg_upgrade")
    else:
        report.ok("version", row.version)
    if row.recovering:
        why = "outbox and fence cannot be written to"
        report.fault(
            "role",
            "a standby",
            why,
            "set DATABASE_URL to the primary (target_session_attrs=read-write)",
        )
    if abs(skew_s) > SKEW_S:
        why = (
            "only durations are compared, so nothing is served wrongly; but logs and expiry times "
            "do not agree"
        )
        report.warn(
            "clock",
            f"{skew_s:+.0f} s from here",
            why,
            "run an NTP client on both machines: timedatectl set-ntp true",
        )
    else:
        report.ok("clock", f"{skew_s:+.1f} s from here")
    return int(row.number)


def _check_access(report: DoctorReport, url: URL, encrypted: bool | None) -> None:
    local = is_local(url.host)
    if encrypted or local:
        report.ok("encryption", "TLS" if encrypted else "on this machine only")
    else:
        why = "rows of all tenants cross the network in the clear"
        report.warn(
            "encryption",
            "none",
            why,
            "set ssl = on in postgresql.conf, and ?ssl=verify-full in DATABASE_URL",
        )
    if url.password and (is_default(str(url.password)) or url.password == url.username):
        say = report.warn if local else report.fault
        mend = f"psql \"$DATABASE_URL\" -c '\\password {url.username}', then set DATABASE_URL"
        say("password", "a well-known one", "it is the first that is tried", mend)
    else:
        report.ok("password", "not a well-known one")


async def _check_outbox(report: DoctorReport, connection: AsyncConnection, schema: str) -> bool:
    """Check that both tables are there, and whether this role may do with them what rounds do.
    False: they cannot be read."""
    given = {"schema": schema, "outbox": OUTBOX, "fence": FENCE}
    rows = (await connection.execute(text(_RIGHTS), given)).all()
    missing = [table for table in NEEDED if table not in {row.name for row in rows}]
    if missing:
        why = "no invalidation can be kept until it is confirmed, so nothing is cached"
        mend = (
            "op.create_respcache_outbox() in a migration (respcache.writes.alembic); if one "
            "exists: alembic upgrade head"
        )
        report.fault("outbox", f"{' and '.join(missing)} missing in schema {schema}", why, mend)
        return False
    role = rows[0].role
    lacking = {
        f'"{schema}".{row.name}': [one for one in NEEDED[row.name] if one not in row.still_proven]
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
    said = "; ".join(grant.removeprefix("GRANT ").partition(" TO ")[0] for grant in grants)
    mend = f"psql \"$DATABASE_URL\" -c '{'; '.join(grants)}' (as the owner)"
    report.fault("rights", f"{role} lacks {said}", "rounds fail, so nothing is cached", mend)
    return rows[0].usage and all("SELECT" not in rights for rights in lacking.values())


async def _check_writes(
    report: DoctorReport,
    outbox: PostgresOutbox,
    connection: AsyncConnection,
    schema: str,
    tables: Collection[str] | None,
    cache: CheckedServer | None,
) -> None:
    """Check what a round would read: fence, triggers, and what waits."""
    try:
        page = await outbox.page(None)
    except OutboxMissing as error:
        report.fault("outbox", str(error), "nothing is cached", "alembic upgrade head")
        return
    except OutboxError as error:
        said = str(error)
        report.fault(
            "outbox",
            said,
            "rounds fail, so nothing is cached",
            said.partition(": ")[2] or "see what the database says",
        )
        return
    report.ok("outbox", f"{OUTBOX} and {FENCE} are there and whole")
    await _check_fence(report, outbox, page, cache)
    await _check_triggers(report, connection, page, schema, tables)
    await _check_backlog(report, outbox, connection, page, schema, cache)


async def _check_fence(
    report: DoctorReport, outbox: PostgresOutbox, page: OutboxPage, cache: CheckedServer | None
) -> None:
    """Check which server the fence names, and that the epoch in the cache is of this database."""
    left_s = await outbox.remaining_s()
    running = (
        f"renewed, ends in {left_s:.1f} s"
        if left_s > 0
        else "not renewed: no process serves from the cache now"
    )
    if cache is None or not cache.identity:
        report.ok("lease", running)
    elif page.authority is None:
        why = "the first process that runs with the outbox takes it; until then nothing is cached"
        report.warn("lease", "held by no server yet", why, "start the application")
    elif page.authority != cache.identity:
        say = report.fault if left_s > 0 else report.warn
        say(
            "lease", f"names another server than REDIS_CACHE_URL, {running}",
            "what is served comes from the server that the fence names; this one is not used, or "
            "not yet after a restart",
            "set REDIS_CACHE_URL to the server that the application uses, or start the "
            "application on this one",
        )  # fmt: skip
    else:
        report.ok("lease", f"names this cache, {running}")
    if (
        cache is not None
        and cache.epoch is not None
        and cache.epoch.identity == cache.identity
        and left_s > 0
    ):
        if cache.epoch.incarnation != page.incarnation:
            report.fault(
                "one database", "the epoch in the cache is of another database",
                "two databases take turns in making each other's answers invalid; or triggers "
                "changed a moment ago",
                "give each database a cache server of its own; run doctor again after a second",
            )  # fmt: skip
        else:
            report.ok("one database", "the cache's epoch is of this database")


async def _check_triggers(
    report: DoctorReport,
    connection: AsyncConnection,
    page: OutboxPage,
    schema: str,
    tables: Collection[str] | None,
) -> None:
    """Check every declared table, or, where nobody said which, every table that has triggers of
    ours."""
    if tables is None:
        report.warn(
            "triggers", "which tables cached reads declare is not known here: only those with "
                        "triggers are checked",
            "a table without triggers is not cached at all",
            "respcache doctor --app MODULE:APP, or --tables a,b",
        )  # fmt: skip
        tables = page.tables | page.unsound
    found = {row.name: row for row in await connection.execute(text(_TRIGGERS), {"schema": schema})}
    sound = [table for table in sorted(tables) if table in page.tables]
    for table in sorted(set(tables) - page.tables):
        what, mend = _why_unsound(table, found.get(table), schema)
        report.fault("triggers", f"{table}: {what}", f"what reads {table} is not cached", mend)
    if sound:
        report.ok("triggers", f"{len(sound)} tables watched: {', '.join(sound)}")


def _why_unsound(table: str, row: Any, schema: str) -> tuple[str, str]:
    """Say what is wrong with the triggers of a table, and how to mend it."""
    where = "" if schema == "public" else f", schema={schema!r}"
    watch = (
        f"op.watch_table({table!r}{where}) in a migration, or triggers.create_triggers(execute, "
        f"[Watched({table!r})]{where})"
    )
    if row is None:
        return (
            "there is no such table in this schema",
            "mend the table's name in the policy, or the schema (--schema)",
        )
    if row.is_partition or row.inherits:
        why = "a partition" if row.is_partition else "it inherits or is inherited from"
        return (
            f"{why}: statements on its relatives fire none of its triggers",
            "declare the table that is written to",
        )
    missing = sorted(set(EVENTS) - {name.removeprefix("respcache_") for name in row.names or ()})
    if missing:
        return f"no trigger for {', '.join(missing)}", watch
    if row.functions != [function_name(table)]:
        return f"its triggers run {', '.join(row.functions)}: it took another table's name", watch
    if not row.always:
        every = "; ".join(
            f'ALTER TABLE "{schema}"."{table}" ENABLE ALWAYS TRIGGER respcache_{event}'
            for event in EVENTS
        )
        return "a trigger is disabled, or not ENABLE ALWAYS", f"psql \"$DATABASE_URL\" -c '{every}'"
    return "its triggers are not as they were made", watch


async def _check_backlog(
    report: DoctorReport,
    outbox: PostgresOutbox,
    connection: AsyncConnection,
    page: OutboxPage,
    schema: str,
    cache: CheckedServer | None,
) -> None:
    """Check that what is written is read, and that what was read is deleted in the end."""
    rows = (await connection.execute(text(_OUTBOX.format(table=f'"{schema}".{OUTBOX}')))).one()
    kept = (
        f"{rows.kept} rows kept, the oldest {rows.oldest_s:.0f} s old" if rows.kept else "no rows"
    )
    if page.foreign:
        why = (
            "they came with the dump of another database; a process deletes them while it runs "
            "rounds"
        )
        report.warn(
            "outbox rows",
            f"{kept}, some of another database",
            why,
            "start the application, or DELETE them",
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
                why = (
                    "invalidations wait: no process runs rounds, or none of them reaches database "
                    "and cache"
                )
                mend = (
                    "start the application; or see fence.problem in its figures: respcache status"
                )
                report.warn(
                    "outbox rows", f"{waiting} wait, the oldest for {oldest_s:.0f} s", why, mend
                )
                return
            kept += f"; {waiting} after the last cursor stored"
    if rows.kept and rows.oldest_s > UNPRUNED_S:
        why = "nobody deletes rows that everybody has read, and the table grows"
        report.warn(
            "outbox rows",
            kept,
            why,
            f"start the application; its role needs DELETE on {OUTBOX} and UPDATE on {FENCE}",
        )
        return
    report.ok("outbox rows", kept)


_SERVER = """
SELECT current_setting('server_version') AS version, CAST(current_setting('server_version_num') AS integer) AS number,
       current_user AS role, pg_is_in_recovery() AS recovering, CAST(extract(epoch FROM clock_timestamp()) AS float8) AS now
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
               WHERE (i.inhrelid = c.oid OR i.inhparent = c.oid) AND NOT child.relispartition) AS inherits,
       array_agg(t.tgname ORDER BY t.tgname) FILTER (WHERE t.oid IS NOT NULL) AS names,
       array_agg(DISTINCT p.proname ORDER BY p.proname) FILTER (WHERE p.oid IS NOT NULL) AS functions,
       bool_and(t.tgenabled = 'A') AS always
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     LEFT JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgname LIKE 'respcache\\_%' LEFT JOIN pg_proc p ON p.oid = t.tgfoid
WHERE n.nspname = :schema AND c.relkind IN ('r', 'p')
GROUP BY c.oid, c.relname, c.relispartition
"""
_OUTBOX = (
    "SELECT count(*) AS kept, CAST(extract(epoch FROM clock_timestamp() - min(at)) AS float8) AS "
    "oldest_s FROM {table}"
)
