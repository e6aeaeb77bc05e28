"""The audit log: actions on the cache, recorded before they are done and never changed.

``ops/postgres_audit_log.py`` stores it in the application's database, in a table that
``create_audit_log`` creates (an operation of ``writes/alembic.py``). ``LoggingAuditLog`` writes it
to the Python log.
"""

import logging
from collections import deque
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from respcache.writes.triggers import Execute, quoted

AUDIT_LOG = "respcache_trail"
GUARD = "append_only"
"""The trigger of the table. Its name differs from those of watched tables."""

MAX_REMEMBERED = 1_000
"""Actions that a ``LoggingAuditLog`` can return."""

log = logging.getLogger("respcache.audit_log")


class AuditEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One action. ``tenant`` is the tenant whose data it concerns; None means all tenants.
    ``details`` contains no bodies and no credentials."""

    action: str
    """``purge``, ``switch``, ``reveal``; or ``failed``, if the action recorded before it failed."""
    name: str
    role: str
    tenant: str | None = None
    details: dict[str, Any] = {}
    id: int = 0
    """Assigned by the audit log; increases."""
    at: datetime | None = None
    """Assigned by the audit log."""


class AuditLog(Protocol):
    """Stores actions. Append only."""

    async def append(self, event: AuditEvent) -> None:
        """Store an action durably. Raises ``AuditLogUnavailable`` unless that is certain."""
        ...

    async def latest(
        self, *, tenant: str | None, limit: int, before: int | None
    ) -> list[AuditEvent]:
        """Return actions on a tenant (None for all), the newest first, with ids below ``before``.

        Raises ``AuditLogUnavailable``.
        """
        ...


class LoggingAuditLog:
    """Writes actions to the logger ``respcache.audit_log``, one line of JSON each.

    It is meant for applications without a database, and returns the last ``MAX_REMEMBERED`` actions
    of this process.
    """

    def __init__(self) -> None:
        self._events: deque[AuditEvent] = deque(maxlen=MAX_REMEMBERED)
        self._last = 0

    async def append(self, event: AuditEvent) -> None:
        """Write a line."""
        self._last += 1
        kept = msgspec.structs.replace(event, id=self._last, at=datetime.now(UTC))
        log.warning("%s", msgspec.json.encode(kept).decode())
        self._events.append(kept)

    async def latest(
        self, *, tenant: str | None, limit: int, before: int | None
    ) -> list[AuditEvent]:
        """See ``AuditLog.latest``."""
        found = (one for one in reversed(self._events) if before is None or one.id < before)
        return [one for one in found if tenant is None or one.tenant == tenant][:limit]


def create_audit_log(execute: Execute, *, schema: str = "public") -> None:
    """Create the table of the audit log, to which rows can only be added.

    A trigger rejects UPDATE, DELETE and TRUNCATE for all roles, also under
    ``session_replication_role = replica``. The owner of the table can drop the trigger, so the
    application should not own it; it needs INSERT and SELECT.
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
            RAISE EXCEPTION USING
                MESSAGE = '{AUDIT_LOG} is append only: ' || TG_OP || ' is refused';
        END $$""")
    execute(f"""
        CREATE TRIGGER {GUARD} BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION {function}()""")
    execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {GUARD}")


def drop_audit_log(execute: Execute, *, schema: str = "public") -> None:
    """Drop the table and all actions in it."""
    execute(f"DROP TABLE {quoted(schema)}.{AUDIT_LOG}")
    execute(f"DROP FUNCTION {quoted(schema)}.{AUDIT_LOG}_{GUARD}()")
