"""The outbox in PostgreSQL: its table and the triggers that fill it, as SQL. No I/O.

``writes/alembic.py`` has operations that run it, and has alembic write them. Without alembic::

    from respcache.writes import triggers

    triggers.create_outbox(execute)
    triggers.create_triggers(execute, [triggers.Watched("accounts"), triggers.Watched("tenants",
    tenant_column="id")]) ...
    triggers.drop_triggers(execute, ["accounts", "tenants"])
    triggers.drop_outbox(execute)

A statement that changes rows leaves one row per tenant, table and transaction, however many rows it
changed: old and new tenant of an UPDATE, cascades included, and one row for everybody on TRUNCATE.
A trigger names only its own table, so what depends on a table may change without a migration. The
functions run with their owner's rights: who may write to a table needs no right on the outbox. The
triggers fire also under ``session_replication_role = replica``, not after ``ALTER TABLE ... DISABLE
TRIGGER``, and not for rows written straight into a partition of the table.

What a transaction has left so far stands also in a setting of its own (``setting``), which ends
with it and goes back with a savepoint. So whoever commits can ask for it in whatever role, without
a right, and also when there is no outbox any more.

A row that is met under the number of the running transaction is its own, unless it came with the
dump of another database (``pg_dump`` carries the outbox): its version was then written by another
transaction, and it gets an id that nobody knows.

``writes/postgres.py`` reads the outbox and clears it; ``core/fence.py`` says what it is for.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from respcache.core.errors import ConfigurationError
from respcache.core.generations import table_tag
from respcache.core.keys import EVERYBODY, SHARED

OUTBOX = "respcache_outbox"
FENCE = "respcache_fence"
FUNCTION = "respcache_note_"
"""How the function of a table is called, and then the table's name, or its MD5 if that would be too
long."""

MAX_NAME_BYTES = 63
"""PostgreSQL cuts longer names off."""

MIN_SERVER_VERSION = 140_000
"""``CREATE OR REPLACE TRIGGER`` came with PostgreSQL 14."""

MAX_SETTING = 100_000
"""Characters of the setting; more than that is ``TOO_MANY``. Some 1,300 rows."""

TOO_MANY = "*"

EVENTS = ("insert", "update", "delete", "truncate")

Execute = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Watched:
    """A table whose writes leave rows in the outbox.

    ``tenant_column`` names the tenant of a row (NULL counts as shared by all tenants), or is None
    for a table whose rows belong to no tenant. ``shared`` rows also count as changes of data shared
    by all tenants.
    """

    table: str
    tenant_column: str | None = "tenant_id"
    shared: bool = False


def watched(
    metadata: Any,
    tables: Iterable[str],
    *,
    tenant_column: str = "tenant_id",
    tenant_is: Mapping[str, str] | None = None,
    shared: Collection[str] = (),
) -> list[Watched]:
    """Say of each declared table how it is watched, by the same rules as
    ``writes.sqlalchemy.watch``.

    ``metadata`` is SQLAlchemy's. A table without the tenant column belongs to no tenant. Raises
    ``ConfigurationError`` for a table that is not in the metadata.
    """
    found = []
    for name in sorted(set(tables)):
        if name not in metadata.tables:
            raise ConfigurationError(
                f"table {name!r} is declared by cached reads but is not in the metadata: mend its "
                f"name"
            )
        column = (tenant_is or {}).get(name, tenant_column)
        found.append(
            Watched(name, column if column in metadata.tables[name].c else None, name in shared)
        )
    return found


def create_outbox(execute: Execute, *, schema: str = "public") -> None:
    """Create the outbox (one row per transaction, tenant and tag, with an id of its own) and the
    one row of the fence.

    Who runs the application needs SELECT, UPDATE (to lock) and DELETE on the outbox, SELECT and
    UPDATE on the fence; INSERT on the outbox too where ``Cache.invalidate_*`` or
    ``invalidate_cache`` are used. An older server than PostgreSQL 14 refuses.
    """
    execute(f"""
        DO $$BEGIN
            IF current_setting('server_version_num')::integer < {MIN_SERVER_VERSION} THEN
                RAISE EXCEPTION USING MESSAGE = 'respcache needs PostgreSQL {MIN_SERVER_VERSION // 10_000} or newer, this is '
                    || current_setting('server_version');
            END IF;
        END$$""")
    execute(f"""
        CREATE TABLE {quoted(schema)}.{OUTBOX} (
            xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
            tenant text NOT NULL,
            tag text NOT NULL,
            id text NOT NULL DEFAULT left(replace(gen_random_uuid()::text, '-', ''), 16),
            at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (xid, tenant, tag)
        )""")
    execute(f"""
        CREATE TABLE {quoted(schema)}.{FENCE} (
            one boolean PRIMARY KEY DEFAULT true CHECK (one),
            authority text,
            effective_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            until timestamptz NOT NULL DEFAULT clock_timestamp(),
            horizon xid8 NOT NULL DEFAULT '0',
            horizon_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            pruned xid8 NOT NULL DEFAULT '0'
        )""")
    execute(f"INSERT INTO {quoted(schema)}.{FENCE} DEFAULT VALUES")


def drop_outbox(execute: Execute, *, schema: str = "public") -> None:
    """Drop outbox and fence: nothing is cached from then on. Drop the triggers first: they would
    make every write fail."""
    execute(f"DROP TABLE {quoted(schema)}.{OUTBOX}, {quoted(schema)}.{FENCE}")


def create_triggers(execute: Execute, tables: Iterable[Watched], *, schema: str = "public") -> None:
    """Create the triggers of these tables; also to replace them when the tenant column of a table
    has changed."""
    for watched in tables:
        function = f"{quoted(schema)}.{quoted(function_name(watched.table))}"
        execute(f"""
            CREATE OR REPLACE FUNCTION {function}() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $${body(watched, schema=schema)}$$""")
        table = f"{quoted(schema)}.{quoted(watched.table)}"
        for event in EVENTS:
            execute(f"""
                CREATE OR REPLACE TRIGGER respcache_{event} AFTER {event.upper()} ON {table} {_TRANSITIONS[event]}
                FOR EACH STATEMENT EXECUTE FUNCTION {function}()""")
            execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER respcache_{event}")


def drop_triggers(execute: Execute, tables: Iterable[str], *, schema: str = "public") -> None:
    """Drop the triggers of these tables: what reads them is not cached from then on."""
    for table in tables:
        for event in EVENTS:  # a table that was renamed runs the function of its former name
            execute(f"DROP TRIGGER IF EXISTS respcache_{event} ON {quoted(schema)}.{quoted(table)}")
        execute(
            f"DROP FUNCTION IF EXISTS {quoted(schema)}.{quoted(function_name(table))}() CASCADE"
        )


def body(watched: Watched, *, schema: str = "public") -> str:
    """Return the body of a table's function, by which a changed tenant column shows
    (``pg_proc.prosrc``)."""
    tag = _text(table_tag(watched.table))

    def note(*rows: str) -> str:
        if watched.tenant_column is None:
            tenants = [f"SELECT {_text(SHARED)} AS tenant FROM {name}" for name in rows]
        else:
            column = quoted(watched.tenant_column)
            tenants = [
                f"SELECT coalesce({column}::text, {_text(SHARED)}) AS tenant FROM {name}"
                for name in rows
            ]
            tenants += [f"SELECT {_text(SHARED)} FROM {name}" for name in rows if watched.shared]
        return (
            f"{insert} SELECT DISTINCT changed.tenant, {tag} FROM ({' UNION ALL '.join(tenants)}) "
            f"AS changed {rest}"
        )

    insert = f"WITH noted AS (INSERT INTO {quoted(schema)}.{OUTBOX} AS outbox (tenant, tag)"
    rest = """ON CONFLICT (xid, tenant, tag) DO UPDATE SET id = EXCLUDED.id, at = EXCLUDED.at
                    WHERE outbox.xmin <> EXCLUDED.xid::xid
                    RETURNING outbox.tenant, outbox.tag, outbox.id)
                SELECT string_agg(json_build_array(noted.tenant, noted.tag, noted.id)::text, ',')
                    INTO respcache_new FROM noted;"""
    name = _text(setting(schema))
    return f"""
        #variable_conflict use_column
        DECLARE
            respcache_new text;
            respcache_all text := coalesce(current_setting({name}, true), '');
        BEGIN
            IF TG_OP = 'INSERT' THEN {note("new_rows")}
            ELSIF TG_OP = 'UPDATE' THEN {note("old_rows", "new_rows")}
            ELSIF TG_OP = 'DELETE' THEN {note("old_rows")}
            ELSE {insert} VALUES ({_text(EVERYBODY)}, {tag}) {rest}
            END IF;
            IF respcache_new IS NOT NULL AND respcache_all <> '{TOO_MANY}' THEN
                PERFORM set_config({name}, CASE
                    WHEN length(respcache_all) + length(respcache_new) > {MAX_SETTING} THEN '{TOO_MANY}'
                    ELSE concat_ws(',', nullif(respcache_all, ''), respcache_new) END, true);
            END IF;
            RETURN NULL;
        END """


def setting(schema: str = "public") -> str:
    """Name the setting that holds what the running transaction has left: JSON arrays [tenant, tag,
    id], between them commas."""
    return f"respcache.rows_{re.sub(r'[^A-Za-z0-9_]', '_', schema)}"


def quoted(identifier: str) -> str:
    """Return a name as it stands in SQL."""
    return '"' + identifier.replace('"', '""') + '"'


_TRANSITIONS = {
    "insert": "REFERENCING NEW TABLE AS new_rows",
    "update": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "delete": "REFERENCING OLD TABLE AS old_rows",
    "truncate": "",
}


def function_name(table: str) -> str:
    """Name the function of a table; one that PostgreSQL would cut off might become that of another
    table."""
    name = FUNCTION + table
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    return FUNCTION + hashlib.md5(table.encode(), usedforsecurity=False).hexdigest()


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
