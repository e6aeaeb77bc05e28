"""The audit log in PostgreSQL. ``ops/audit_log.py`` creates its append-only table."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from respcache.core.errors import AuditLogUnavailable, ConfigurationError, OutboxError
from respcache.ops.audit_log import AUDIT_LOG, AuditEvent
from respcache.writes.postgres import OwnConnections

DEADLINE_S = 2.0


class PostgresAuditLog:
    """The audit log in the database of ``engine``, over connections of its own.

    Close it when the application shuts down.
    """

    def __init__(
        self, engine: AsyncEngine, *, schema: str = "public", deadline_s: float = DEADLINE_S
    ) -> None:
        if not re.fullmatch(r"\w+", schema):
            raise ConfigurationError(f"schema {schema!r} must be letters, digits and '_'")
        self._connections = OwnConnections(engine, deadline_s=deadline_s)
        table = f'"{schema}".{AUDIT_LOG}'
        self._append = text(_APPEND.format(table=table))
        self._latest = text(_LATEST.format(table=table))

    async def append(self, event: AuditEvent) -> None:
        """See ``AuditLog.append``. One round trip, committed when it returns."""
        values = {
            "action": event.action,
            "name": event.name,
            "role": event.role,
            "tenant": event.tenant,
            "details": msgspec.json.encode(event.details).decode(),
        }
        async with self._connected() as connection:
            await connection.execute(self._append, values)

    async def latest(
        self, *, tenant: str | None, limit: int, before: int | None
    ) -> list[AuditEvent]:
        """See ``AuditLog.latest``. One round trip."""
        given = {"tenant": tenant, "limit": limit, "before": before}
        async with self._connected() as connection:
            rows = (await connection.execute(self._latest, given)).mappings().all()
        return [
            AuditEvent(**{**row, "details": msgspec.json.decode(row["details"])}) for row in rows
        ]

    async def close(self) -> None:
        """Disconnect."""
        await self._connections.close()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        """Provide a connection for one call; bounded in time. Raises ``AuditLogUnavailable``."""
        try:
            async with self._connections.connected() as connection:
                yield connection
        except OutboxError as error:
            raise AuditLogUnavailable(f"the audit log: {error}") from error


# the column `act` keeps its name, so that existing tables need no migration
_APPEND = """
INSERT INTO {table} (act, name, role, tenant, details)
VALUES (:action, :name, :role, :tenant, CAST(CAST(:details AS text) AS jsonb))
"""

_LATEST = """
SELECT id, at, act AS action, name, role, tenant, CAST(details AS text) AS details FROM {table}
WHERE (CAST(:tenant AS text) IS NULL OR tenant = :tenant)
  AND (CAST(:before AS bigint) IS NULL OR id < :before)
ORDER BY id DESC LIMIT :limit
"""
