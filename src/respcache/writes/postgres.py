"""The outbox as a process sees it: what a round reads and changes in PostgreSQL. ``core/fence.py`` says why.

Connections are of a pool of its own, with the settings of the application's engine: rounds must not wait for a free one.
Each statement is its own transaction (AUTOCOMMIT), so PgBouncer in transaction mode is fine, and every call ends within
``deadline_s`` or raises ``OutboxError``.

A *page* is one statement, so one snapshot: ``pg_current_snapshot()`` names exactly what the rows beside it were read from.
The incarnation names what must not change unnoticed: the server's start, the last reset of its statistics (a crash of the
server does that, and may lose what was committed asynchronously), the outbox, and every trigger with its function.
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
from respcache.core.errors import ConfigurationError, OutboxError
from respcache.core.fence import DRIFT, LEASE_S, MAX_ROWS, Page
from respcache.writes.triggers import FENCE, OUTBOX

DEADLINE_S = 1.0
RETENTION_S = 600.0
"""Rows younger than this are never deleted, however fast everybody has read them."""

MAX_DELETED = 5_000
"""Rows that one statement deletes."""


class PostgresOutbox:
    """The outbox in the database of ``engine`` (see ``writes/triggers.py``), shared by all processes of an application.

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
        self._deadline_s = deadline_s
        self._retention_s = retention_s
        self._shared = engine
        self._engine: AsyncEngine | None = None
        outbox, fence = f'"{schema}".{OUTBOX}', f'"{schema}".{FENCE}'
        self.own_rows = f"SELECT tenant, tag, id FROM {outbox} WHERE xid = pg_current_xact_id_if_assigned()"
        """What a transaction asks before its COMMIT: the rows that its own statements left."""
        self._page = text(_PAGE.format(outbox=outbox, fence=fence, schema=schema))
        self._claim = text(_CLAIM.format(fence=fence))
        self._record = text(_RECORD.format(fence=fence))
        self._remaining = text(f"SELECT extract(epoch FROM until - clock_timestamp())::float8 FROM {fence}")
        self._note = text(f"INSERT INTO {outbox} (tenant, tag) VALUES (:tenant, :tag) RETURNING tenant, tag, id")
        self._move_horizon = text(_MOVE_HORIZON.format(fence=fence))
        self._delete = text(_DELETE.format(outbox=outbox, fence=fence))

    async def page(self, after: Cursor | None) -> Page:
        """Read what came after the cursor (nothing for None), and everything that a round decides by. One round trip."""
        given = {"after": None if after is None else after.snapshot, "limit": MAX_ROWS + 1, "lease": self.lease_s * DRIFT}
        row = await self._one(self._page, given)
        if row is None:
            raise OutboxError(f"the table {FENCE} has lost its row: INSERT INTO {FENCE} DEFAULT VALUES")
        rows = msgspec.json.decode(row.rows, type=list[tuple[str, str, str]]) if row.rows else []
        return Page(
            cursor=Cursor(row.snapshot, row.taken_at),
            incarnation=row.incarnation,
            rows=rows,
            oldest_s=row.oldest_s or 0.0,
            pruned=int(row.pruned),
            authority=row.authority,
            effective=row.effective,
            recorded=row.recorded,
            expiring=row.expiring,
            tables=frozenset(msgspec.json.decode(row.tables, type=list[str])),
        )

    async def claim(self, identity: str, *, instead_of: str | None) -> None:
        """Make a server the authority, if that is still the other one. It becomes effective when no fence can be alive."""
        await self._run(self._claim, {"identity": identity, "instead_of": instead_of})

    async def record(self, identity: str) -> None:
        """See to it that ``until`` is two leases ahead, as long as this server is the authority and effective."""
        await self._run(self._record, {"identity": identity, "lease": self.lease_s})

    async def remaining_s(self) -> float:
        """Tell for how long any fence of any process can still be alive (below 0: none is). One round trip."""
        row = await self._one(self._remaining, {})
        if row is None:
            raise OutboxError(f"the table {FENCE} has lost its row")
        return float(row[0])

    async def note(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
        """Leave rows for (tenant, tag) in a transaction of their own: for what no trigger sees. Returns (tenant, tag, id)."""
        found = []
        async with self._connected() as connection:
            for tenant, tag in pairs:
                found.append(tuple((await connection.execute(self._note, {"tenant": tenant, "tag": tag})).one()))
        return found

    async def prune(self) -> int:
        """Delete some of the rows that everybody has read or need not read any more; return how many. Two round trips."""
        async with self._connected() as connection:
            await connection.execute(self._move_horizon, {"retention": self._retention_s})
            return (await connection.execute(self._delete, {"limit": MAX_DELETED})).rowcount

    async def close(self) -> None:
        """Disconnect."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()

    async def _run(self, statement: Any, values: dict[str, Any]) -> None:
        async with self._connected() as connection:
            await connection.execute(statement, values)

    async def _one(self, statement: Any, values: dict[str, Any]) -> Any:
        async with self._connected() as connection:
            return (await connection.execute(statement, values)).one_or_none()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        """Take a connection for one call: bounded in time, its failures as ``OutboxError``."""
        try:
            async with asyncio.timeout(self._deadline_s):
                engine = self._engine or await self._make_engine()
                async with engine.connect() as connection:
                    yield connection
        except TimeoutError:
            raise OutboxError(f"the database did not answer within {self._deadline_s} s") from None
        except (SQLAlchemyError, OSError) as error:
            raise OutboxError(str(getattr(error, "orig", None) or error).partition("\n")[0]) from error

    async def _make_engine(self) -> AsyncEngine:
        """Make an engine whose pool has the settings and listeners of the shared one, which is connected first.

        The first connection of an engine sets up its dialect. A copy of the pool that connects before would do that in its
        place, and what the application connects meanwhile would not wait for it and fail.
        """
        async with self._shared.connect():
            pass
        if self._engine is None:  # another call may have been faster
            pool = self._shared.sync_engine.pool.recreate()
            self._engine = create_async_engine(self._shared.url, pool=pool, isolation_level="AUTOCOMMIT")
        return self._engine


_PAGE = """
WITH due AS MATERIALIZED (
    SELECT tenant, tag, id, at FROM {outbox}
    WHERE xid >= pg_snapshot_xmin(CAST(CAST(:after AS text) AS pg_snapshot))
      AND NOT pg_visible_in_snapshot(xid, CAST(CAST(:after AS text) AS pg_snapshot))
    LIMIT :limit
), triggers AS MATERIALIZED (
    SELECT c.relname, t.tgenabled IN ('O', 'A') AS enabled,
           concat_ws(',', t.oid, t.xmin, t.tgenabled, p.oid, p.xmin) AS life
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE t.tgname LIKE 'respcache\\_%' AND c.relnamespace = CAST('"{schema}"' AS regnamespace)
)
SELECT CAST(pg_current_snapshot() AS text) AS snapshot,
       CAST(extract(epoch FROM clock_timestamp()) AS float8) AS taken_at,
       (SELECT CAST(json_agg(json_build_array(tenant, tag, id)) AS text) FROM due) AS rows,
       (SELECT CAST(extract(epoch FROM clock_timestamp() - min(at)) AS float8) FROM due) AS oldest_s,
       CAST(fence.pruned AS text) AS pruned, fence.authority,
       fence.effective_at <= clock_timestamp() AS effective,
       fence.until >= clock_timestamp() + make_interval(secs => CAST(:lease AS float8)) AS recorded,
       fence.until < clock_timestamp() + make_interval(secs => 1.5 * CAST(:lease AS float8)) AS expiring,
       (SELECT CAST(coalesce(json_agg(relname), '[]') AS text)
        FROM (SELECT relname FROM triggers WHERE enabled GROUP BY relname HAVING count(*) = 4) AS whole) AS tables,
       md5(concat_ws(' ', pg_postmaster_start_time(), (SELECT stats_reset FROM pg_stat_bgwriter),
                     CAST('{outbox}' AS regclass)::oid, (SELECT oid FROM pg_database WHERE datname = current_database()),
                     (SELECT string_agg(life, ' ' ORDER BY life) FROM triggers))) AS incarnation
FROM {fence} AS fence
"""

_CLAIM = """
UPDATE {fence} SET authority = :identity, effective_at = until WHERE authority IS NOT DISTINCT FROM :instead_of
"""

_RECORD = """
UPDATE {fence} SET until = greatest(until, clock_timestamp() + make_interval(secs => 2 * CAST(:lease AS float8)))
WHERE authority = :identity AND effective_at <= clock_timestamp()
"""

_MOVE_HORIZON = """
UPDATE {fence} SET pruned = horizon, horizon = pg_snapshot_xmin(pg_current_snapshot()), horizon_at = clock_timestamp()
WHERE horizon_at < clock_timestamp() - make_interval(secs => CAST(:retention AS float8))
"""

_DELETE = """
DELETE FROM {outbox} WHERE (xid, tenant, tag) IN (
    SELECT xid, tenant, tag FROM {outbox} WHERE xid < (SELECT pruned FROM {fence}) LIMIT :limit FOR UPDATE SKIP LOCKED)
"""
