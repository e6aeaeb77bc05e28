"""The trail: who did what to the cache, written down before it is done and never changed.

``ops/postgres.py`` keeps it in the application's database, in a table that ``create_audit_log`` makes
(an operation of ``writes/alembic.py``); ``LoggingAuditLog`` keeps it in the log.
"""

import logging
from collections import deque
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from respcache.writes.triggers import Execute, quoted

AUDIT_LOG = "respcache_trail"
GUARD = "append_only"
"""The trigger of the table. Its name is none of those by which a watched table is known."""

MAX_REMEMBERED = 1_000
"""Acts that a ``LoggingAuditLog`` can show again."""

log = logging.getLogger("respcache.trail")


class AuditEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One act. ``tenant`` is whose data it concerns, None: everybody's. ``details`` holds no bodies
    and no credentials."""

    act: str
    """``purge``, ``switch``, ``reveal``; ``failed`` when what was written down before could not be
    done."""
    name: str
    role: str
    tenant: str | None = None
    details: dict[str, Any] = {}
    id: int = 0
    """Given by the trail; rises."""
    at: datetime | None = None
    """Given by the trail."""


class AuditLog(Protocol):
    """Where acts are written down. Append only."""

    async def append(self, act: AuditEvent) -> None:
        """Keep an act. Raises ``AuditLogUnavailable`` unless that is certain."""
        ...

    async def latest(
        self, *, tenant: str | None, limit: int, before: int | None
    ) -> list[AuditEvent]:
        """Return acts that concern a tenant (None: all), the newest first, of ids below ``before``.
        Raises ``AuditLogUnavailable``."""
        ...


class LoggingAuditLog:
    """A trail in the log (``respcache.trail``, one line of JSON each): for applications without a
    database.

    Shows the last ``MAX_REMEMBERED`` acts of this process.
    """

    def __init__(self) -> None:
        self._acts: deque[AuditEvent] = deque(maxlen=MAX_REMEMBERED)
        self._last = 0

    async def append(self, act: AuditEvent) -> None:
        """Write a line."""
        self._last += 1
        kept = msgspec.structs.replace(act, id=self._last, at=datetime.now(UTC))
        log.warning("%s", msgspec.json.encode(kept).decode())
        self._acts.append(kept)

    async def latest(
        self, *, tenant: str | None, limit: int, before: int | None
    ) -> list[AuditEvent]:
        """See ``AuditLog.latest``."""
        found = (act for act in reversed(self._acts) if before is None or act.id < before)
        return [act for act in found if tenant is None or act.tenant == tenant][:limit]


def create_audit_log(execute: Execute, *, schema: str = "public") -> None:
    """Create the table of the trail, to which rows can only be added: UPDATE, DELETE and TRUNCATE
    are refused to everybody.

    Also under ``session_replication_role = replica``; not to who may drop the trigger, so the
    application should not own the table. It needs INSERT and SELECT.
    """
    table, function = f"{quoted(schema)}.{AUDIT_LOG}", f"{quoted(schema)}.{AUDIT_LOG}_{GUARD}"
    execute(f"""
        CREATE TABLE {table} (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            at timestamptz NOT NULL DEFAULT clock_timestamp(),
            act text NOT NULL,
            name text NOT NULL,
            role text NOT NULL,
            tenant text,
            details jsonb NOT NULL
        )""")
    execute(f"CREATE INDEX {AUDIT_LOG}_tenant ON {table} (tenant, id)")
    execute(f"""
        CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION USING MESSAGE = '{AUDIT_LOG} is append only: ' || TG_OP || ' is refused';
        END $$""")
    execute(f"""
        CREATE TRIGGER {GUARD} BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION {function}()""")
    execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {GUARD}")


def drop_audit_log(execute: Execute, *, schema: str = "public") -> None:
    """Drop the table, and with it all that was written down."""
    execute(f"DROP TABLE {quoted(schema)}.{AUDIT_LOG}")
    execute(f"DROP FUNCTION {quoted(schema)}.{AUDIT_LOG}_{GUARD}()")
