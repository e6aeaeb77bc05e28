"""The outbox in PostgreSQL: what the relay reads and changes there.

``core/serving_lease.py`` gives the reasons.

The connections are a pool of their own, with the settings of the application's engine: the relay
must not wait for a free connection. Each statement is its own transaction (AUTOCOMMIT), so
PgBouncer in transaction mode works. Every call ends within ``deadline_s`` or raises
``OutboxError``.

A *page* is one statement, so one snapshot: ``pg_current_snapshot()`` identifies exactly what the
rows beside it were read from. The incarnation identifies what must not change unnoticed: the
server's start, the last reset of its statistics (a crash of the server resets them, and may lose
what was committed asynchronously), the outbox, every trigger with its function, and every watched
table with its partitions. For tables it includes the version of their rows in ``pg_class``: a
rename, a rewrite, an added column, or a partition that is attached, detached or dropped changes
what is read without firing a trigger.

A table counts as watched only if its four triggers always fire, run the function that is named
after it and so writes its tag (two tables may have exchanged their names), and see every row. They
do not see every row if the table inherits, is inherited from, or is itself a partition.

A dump may bring an outbox and a fence row into a database that has not assigned their transaction
numbers yet. No statement here treats such a row as one that was written, or deletes by such a
number; ``prune`` removes both.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from respcache.core.epochs import Cursor
from respcache.core.errors import ConfigurationError, OutboxError, OutboxMissing
from respcache.core.serving_lease import DRIFT, LEASE_S, MAX_ROWS, OutboxPage
from respcache.writes.triggers import FENCE, FUNCTION, MAX_NAME_BYTES, OUTBOX, setting

DEADLINE_S = 1.0
RETENTION_S = 600.0
"""Rows younger than this are never deleted, however early all processes have read them."""

MAX_DELETED = 5_000
"""The number of rows that one statement deletes."""

FIRST_OID = 16_384
"""Objects created after the server was initialised have numbers from here on."""

UNDEFINED = ("42P01", "3F000")
"""SQLSTATE codes for a missing table or schema."""


class OwnConnections:
    """A pool of connections with the settings of an application's engine: statements over them wait
    for no request, and the hooks of the application's engine do not see them. Each statement is its
    own transaction."""

    def __init__(self, engine: AsyncEngine, *, deadline_s: float) -> None:
        self._shared = engine
        self._deadline_s = deadline_s
        self._engine: AsyncEngine | None = None

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection for one call: bounded in time, failures raise ``OutboxError``."""
        try:
            async with asyncio.timeout(self._deadline_s):
                engine = self._engine or await self._make_engine()
                async with engine.connect() as connection:
                    yield connection
        except TimeoutError:
            raise OutboxError(f"the database did not answer within {self._deadline_s} s") from None
        except (SQLAlchemyError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            kind = OutboxMissing if getattr(cause, "sqlstate", None) in UNDEFINED else OutboxError
            raise kind(str(cause).partition("\n")[0]) from error

    async def close(self) -> None:
        """Disconnect."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()

    async def _make_engine(self) -> AsyncEngine:
        """Create an engine whose pool has the settings and listeners of the shared one, after
        connecting the shared one.

        The first connection of an engine initialises its dialect. If a copy of the pool connected
        earlier, it would initialise it instead; connections of the application in the meantime
        would not wait for that, and would fail.
        """
        async with self._shared.connect():
            pass
        if self._engine is None:  # another call may have created it
            pool = self._shared.sync_engine.pool.recreate()
            self._engine = create_async_engine(
                self._shared.url, pool=pool, isolation_level="AUTOCOMMIT"
            )
        return self._engine


class PostgresOutbox:
    """The outbox in the database of ``engine`` (see ``writes/triggers.py``), shared by all
    processes of an application.

    ``lease_s`` must be the same in all of them.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        schema: str = "public",
        lease_s: float = LEASE_S,
        deadline_s: float = DEADLINE_S,
        retention_s: float = RETENTION_S,
    ) -> None:
        if not re.fullmatch(r"\w+", schema):
            raise ConfigurationError(f"schema {schema!r} must be letters, digits and '_'")
        self.lease_s = lease_s
        self._retention_s = retention_s
        self._connections = OwnConnections(engine, deadline_s=deadline_s)
        outbox, fence = f'"{schema}".{OUTBOX}', f'"{schema}".{FENCE}'
        self.own_rows = f"SELECT current_setting('{setting(schema)}', true)"
        """The query of a transaction before its COMMIT: the rows that its own statements left. It
        needs no right and no outbox."""
        names = {
            "outbox": outbox,
            "fence": fence,
            "schema": schema,
            "function": FUNCTION,
            "name_bytes": MAX_NAME_BYTES,
        }
        self._page = text(_PAGE.format(**names, first_oid=FIRST_OID))
        self._claim = text(_CLAIM.format(fence=fence))
        self._record = text(_RECORD.format(fence=fence))
        self._remaining = text(
            f"SELECT extract(epoch FROM until - clock_timestamp())::float8 FROM {fence}"
        )
        self._note = text(_NOTE.format(outbox=outbox))
        self._backlog = text(_BACKLOG.format(outbox=outbox))
        self._move_horizon = text(_MOVE_HORIZON.format(fence=fence))
        self._delete = text(_DELETE.format(outbox=outbox, fence=fence))
        self._delete_foreign = text(_DELETE_FOREIGN.format(outbox=outbox))

    async def page(self, after: Cursor | None) -> OutboxPage:
        """Read the rows after the cursor (none for None), and everything on which a cycle's
        decisions depend. One round trip."""
        given = {
            "after": None if after is None else after.snapshot,
            "limit": MAX_ROWS + 1,
            "lease": self.lease_s * DRIFT,
        }
        row = await self._one(self._page, given)
        if row.hidden is not None:
            raise OutboxError(
                f"its policies hide rows: ALTER TABLE {row.hidden} DISABLE ROW LEVEL SECURITY"
            )
        if row.pruned is None:
            raise OutboxError(
                f"the table {FENCE} has lost its row: INSERT INTO {FENCE} DEFAULT VALUES"
            )
        rows = msgspec.json.decode(row.rows, type=list[tuple[str, str, str]]) if row.rows else []
        return OutboxPage(
            cursor=Cursor(row.snapshot, row.taken_at),
            incarnation=row.incarnation,
            rows=rows,
            oldest_s=row.oldest_s or 0.0,
            pruned=int(row.pruned),
            foreign=row.foreign_rows or row.foreign_numbers,
            authority=row.authority,
            effective=row.effective,
            recorded=row.recorded,
            expiring=row.expiring,
            tables=frozenset(msgspec.json.decode(row.tables, type=list[str])),
            unsound=frozenset(msgspec.json.decode(row.unsound, type=list[str])),
            functions=frozenset(msgspec.json.decode(row.functions, type=list[str])),
            deferred=row.deferred,
        )

    async def backlog(self, after: Cursor) -> tuple[int, float]:
        """Return the number of rows after the cursor, capped just above what a cycle replays, and
        the age of the oldest in seconds. One round trip."""
        row = await self._one(self._backlog, {"after": after.snapshot, "limit": MAX_ROWS + 1})
        return row.waiting, row.oldest_s or 0.0

    async def claim(self, identity: str, *, instead_of: str | None) -> None:
        """Make a server the authority if ``instead_of`` still is. It becomes effective when no
        serving lease can be alive. One round trip."""
        await self._run(self._claim, {"identity": identity, "instead_of": instead_of})

    async def record(self, identity: str) -> None:
        """Move ``until`` two leases ahead, if this server is the effective authority. One round
        trip."""
        await self._run(self._record, {"identity": identity, "lease": self.lease_s})

    async def remaining_s(self) -> float:
        """Return for how many seconds any process's serving lease can still be alive (below 0: none
        is). One round trip."""
        row = await self._one(self._remaining, {})
        if row is None:
            raise OutboxError(f"the table {FENCE} has lost its row")
        return float(row[0])

    async def note(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
        """Insert rows for (tenant, tag), each in its own transaction: for changes that no trigger
        sees. Return (tenant, tag, id). One round trip per row."""
        found = []
        async with self._connections.connected() as connection:
            for tenant, tag in pairs:
                found.append(
                    tuple(
                        (await connection.execute(self._note, {"tenant": tenant, "tag": tag})).one()
                    )
                )
        return found

    async def prune(self) -> int:
        """Delete some rows that no process needs any more, and rows that came with a dump; return
        how many. Three round trips."""
        async with self._connections.connected() as connection:
            await connection.execute(self._move_horizon, {"retention": self._retention_s})
            deletes = (self._delete, self._delete_foreign)
            return sum(
                [
                    (await connection.execute(delete, {"limit": MAX_DELETED})).rowcount
                    for delete in deletes
                ]
            )

    async def close(self) -> None:
        """Disconnect."""
        await self._connections.close()

    async def _run(self, statement: Any, values: dict[str, Any]) -> None:
        async with self._connections.connected() as connection:
            await connection.execute(statement, values)

    async def _one(self, statement: Any, values: dict[str, Any]) -> Any:
        async with self._connections.connected() as connection:
            return (await connection.execute(statement, values)).one_or_none()


_PAGE = """
WITH RECURSIVE due AS MATERIALIZED (
    SELECT tenant, tag, id, at FROM {outbox}
    WHERE xid >= pg_snapshot_xmin(CAST(CAST(:after AS text) AS pg_snapshot))
      AND xid < pg_snapshot_xmax(pg_current_snapshot())
      AND NOT pg_visible_in_snapshot(xid, CAST(CAST(:after AS text) AS pg_snapshot))
    LIMIT :limit
), triggers AS MATERIALIZED (
    SELECT t.tgrelid, c.relname,
           t.tgenabled = 'A' AND p.pronamespace = c.relnamespace
           AND p.proname = '{function}' || CASE
               WHEN octet_length('{function}' || c.relname) <= {name_bytes} THEN c.relname
               ELSE md5(c.relname) END AS fires,
           concat_ws(',', t.oid, t.xmin, t.tgenabled, p.oid, p.xmin) AS life
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE t.tgname LIKE 'respcache\\_%' AND c.relnamespace = CAST('"{schema}"' AS regnamespace)
), family (member, life) AS (
    SELECT DISTINCT tgrelid, '' FROM triggers
    UNION SELECT i.inhrelid, concat_ws(',', i.inhparent, i.xmin)
    FROM family JOIN pg_inherits i ON i.inhparent = family.member
), watched AS MATERIALIZED (
    SELECT relname, bool_and(fires) AND count(*) = 4 AND NOT EXISTS (
               SELECT FROM pg_inherits i JOIN pg_class child ON child.oid = i.inhrelid
               WHERE i.inhrelid = tgrelid
                  OR (i.inhparent = tgrelid AND NOT child.relispartition)) AS sound
    FROM triggers GROUP BY tgrelid, relname
)
SELECT CAST(pg_current_snapshot() AS text) AS snapshot,
       CAST(extract(epoch FROM clock_timestamp()) AS float8) AS taken_at,
       (SELECT CAST(json_agg(json_build_array(tenant, tag, id)) AS text) FROM due) AS rows,
       (SELECT CAST(extract(epoch FROM clock_timestamp() - min(at)) AS float8)
        FROM due) AS oldest_s,
       CASE WHEN row_security_active('{outbox}') THEN '{outbox}'
            WHEN row_security_active('{fence}') THEN '{fence}' END AS hidden,
       CAST(fence.pruned AS text) AS pruned,
       fence.pruned > pg_snapshot_xmax(pg_current_snapshot()) AS foreign_numbers,
       EXISTS (SELECT FROM {outbox}
               WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())) AS foreign_rows,
       fence.authority, fence.effective_at <= clock_timestamp() AS effective,
       fence.until >= clock_timestamp() + make_interval(secs => CAST(:lease AS float8)) AS recorded,
       fence.until < clock_timestamp() + make_interval(secs => 1.5 * CAST(:lease AS float8))
           AS expiring,
       (SELECT CAST(coalesce(json_agg(relname), '[]') AS text) FROM watched WHERE sound) AS tables,
       (SELECT CAST(coalesce(json_agg(relname), '[]') AS text)
        FROM watched WHERE NOT sound) AS unsound,
       (SELECT CAST(coalesce(json_agg(DISTINCT lower(proname)), '[]') AS text)
        FROM pg_proc WHERE oid >= {first_oid}
        AND provolatile = 'v' AND prokind = 'f'
        AND prorettype <> CAST('trigger' AS regtype)) AS functions,
       EXISTS (SELECT FROM pg_trigger
               WHERE tgdeferrable AND NOT tgisinternal AND tgenabled <> 'D') AS deferred,
       md5(concat_ws(' ', pg_postmaster_start_time(), (SELECT stats_reset FROM pg_stat_bgwriter),
                     CAST('{outbox}' AS regclass)::oid,
                     (SELECT oid FROM pg_database WHERE datname = current_database()),
                     (SELECT string_agg(life, ' ' ORDER BY life) FROM triggers),
                     (SELECT string_agg(concat_ws(',', family.life, c.oid, c.xmin), ' '
                                        ORDER BY c.oid, family.life)
                      FROM family JOIN pg_class c ON c.oid = family.member))) AS incarnation
FROM (SELECT 1) AS always LEFT JOIN {fence} AS fence ON true
"""
"""DDL on a table changes the version of its row in ``pg_class``; VACUUM and ANALYZE do not."""

_BACKLOG = """
SELECT count(*) AS waiting,
       CAST(extract(epoch FROM clock_timestamp() - min(at)) AS float8) AS oldest_s FROM (
    SELECT at FROM {outbox}
    WHERE xid >= pg_snapshot_xmin(CAST(CAST(:after AS text) AS pg_snapshot))
      AND xid < pg_snapshot_xmax(pg_current_snapshot())
      AND NOT pg_visible_in_snapshot(xid, CAST(CAST(:after AS text) AS pg_snapshot))
    LIMIT :limit) AS due
"""

_CLAIM = """
UPDATE {fence} SET authority = :identity, effective_at = until
WHERE authority IS NOT DISTINCT FROM :instead_of
"""

_RECORD = """
UPDATE {fence} SET until = greatest(
    until, clock_timestamp() + make_interval(secs => 2 * CAST(:lease AS float8)))
WHERE authority = :identity AND effective_at <= clock_timestamp()
"""

_NOTE = """
INSERT INTO {outbox} (tenant, tag) VALUES (:tenant, :tag)
ON CONFLICT (xid, tenant, tag) DO UPDATE SET id = EXCLUDED.id, at = EXCLUDED.at
RETURNING tenant, tag, id
"""

_MOVE_HORIZON = """
UPDATE {fence} SET
    horizon = pg_snapshot_xmin(pg_current_snapshot()), horizon_at = clock_timestamp(),
    pruned = CASE WHEN pruned > pg_snapshot_xmax(pg_current_snapshot())
             THEN pg_snapshot_xmin(pg_current_snapshot()) ELSE greatest(pruned, horizon) END
WHERE horizon_at < clock_timestamp() - make_interval(secs => CAST(:retention AS float8))
   OR pruned > pg_snapshot_xmax(pg_current_snapshot())
"""
"""A ``pruned`` from the future stands for no row that was deleted here. It is replaced by a number
that is high enough: it tells every cursor from before this moment that rows may be missing."""

_DELETE = """
DELETE FROM {outbox} WHERE (xid, tenant, tag) IN (
    SELECT xid, tenant, tag FROM {outbox}
    WHERE xid < (SELECT pruned FROM {fence} WHERE pruned <= pg_snapshot_xmax(pg_current_snapshot()))
    LIMIT :limit FOR UPDATE SKIP LOCKED)
"""

_DELETE_FOREIGN = """
WITH foreign_rows AS MATERIALIZED (
    SELECT xid, tenant, tag, id FROM {outbox}
    WHERE xid >= pg_snapshot_xmax(pg_current_snapshot()) LIMIT :limit
), found AS MATERIALIZED (
    SELECT xid, tenant, tag FROM {outbox} AS one JOIN foreign_rows USING (xid, tenant, tag, id)
    FOR UPDATE OF one SKIP LOCKED)
DELETE FROM {outbox} WHERE (xid, tenant, tag) IN (SELECT xid, tenant, tag FROM found)
"""
"""A row that a transaction has taken over meanwhile has another id, and is kept."""
