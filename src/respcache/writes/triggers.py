"""The outbox in PostgreSQL: its table and the triggers that fill it, as SQL. No I/O.

``writes/alembic.py`` has operations that run this SQL, and makes alembic generate them. Without
alembic::

    from respcache.writes import triggers

    triggers.create_outbox(execute)
    triggers.create_triggers(
        execute,
        [triggers.Watched("accounts"), triggers.Watched("tenants", tenant_column="id")],
    )
    ...
    triggers.drop_triggers(execute, ["accounts", "tenants"])
    triggers.drop_outbox(execute)

A statement that changes rows leaves one row per tenant, table and transaction, however many rows it
changed. An UPDATE leaves rows for the old and the new tenant; cascades are included; TRUNCATE
leaves one row for all tenants. A trigger names only its own table, so what depends on a table may
change without a migration. The functions run with their owner's rights, so a writer of a table
needs no right on the outbox. The triggers also fire under ``session_replication_role = replica``.
They do not fire after ``ALTER TABLE ... DISABLE TRIGGER``, or for rows written directly into a
partition of the table.

A setting (``setting``) also contains what a transaction has left so far. It ends with the
transaction and is rolled back with a savepoint. So a transaction can read it before COMMIT in any
role, without a right, and even when there is no outbox any more.

A row with the number of the running transaction is its own, unless it came with the dump of another
database (``pg_dump`` includes the outbox). In that case another transaction wrote the row's
version, and the row gets a new id.

``writes/postgres.py`` reads and prunes the outbox; ``core/serving_lease.py`` explains its purpose.
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
"""The prefix of a table's function. The table's name follows, or its MD5 if that is too long."""

MAX_NAME_BYTES = 63
"""PostgreSQL truncates longer names."""

MIN_SERVER_VERSION = 140_000
"""``CREATE OR REPLACE TRIGGER`` requires PostgreSQL 14."""

MAX_SETTING = 100_000
"""The maximum length of the setting, some 1,300 rows. If it is exceeded, the setting becomes
``TOO_MANY``."""

TOO_MANY = "*"

EVENTS = ("insert", "update", "delete", "truncate")

Execute = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Watched:
    """A table whose writes leave rows in the outbox.

    ``tenant_column`` is the column with the tenant of a row (NULL counts as shared by all tenants),
    or None for a table whose rows belong to no tenant. If ``shared``, changes also count as changes
    of data that all tenants share.
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
    """Return how each declared table is watched, by the same rules as ``writes.sqlalchemy.watch``.

    ``metadata`` is SQLAlchemy's. A table without the tenant column belongs to no tenant. Raises
    ``ConfigurationError`` for a table that is not in the metadata.
    """
    found = []
    for name in sorted(set(tables)):
        if name not in metadata.tables:
            raise ConfigurationError(
                f"table {name!r} is declared by cached reads but is not in the metadata: correct "
                f"its name"
            )
        column = (tenant_is or {}).get(name, tenant_column)
        found.append(
            Watched(name, column if column in metadata.tables[name].c else None, name in shared)
        )
    return found


def create_outbox(execute: Execute, *, schema: str = "public") -> None:
    """Create the outbox (one row per transaction, tenant and tag, with an id of its own) and the
    fence row.

    The application's database user needs SELECT, UPDATE (to lock) and DELETE on the outbox, SELECT
    and UPDATE on the fence row's table, and INSERT on the outbox if it uses ``Cache.invalidate_*``
    or ``invalidate_cache``. Servers older than PostgreSQL 14 raise an error.
    """
    execute(f"""
        DO $$BEGIN
            IF current_setting('server_version_num')::integer < {MIN_SERVER_VERSION} THEN
                RAISE EXCEPTION USING MESSAGE = 'respcache needs PostgreSQL '
                    '{MIN_SERVER_VERSION // 10_000} or newer, this is '
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
    """Drop the outbox and the fence row's table. Nothing is cached from then on. Drop the triggers
    first: without the outbox they would make every write fail."""
    execute(f"DROP TABLE {quoted(schema)}.{OUTBOX}, {quoted(schema)}.{FENCE}")


def create_triggers(execute: Execute, tables: Iterable[Watched], *, schema: str = "public") -> None:
    """Create or replace the triggers of these tables."""
    for watched in tables:
        function = f"{quoted(schema)}.{quoted(function_name(watched.table))}"
        execute(f"""
            CREATE OR REPLACE FUNCTION {function}() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
            AS $${body(watched, schema=schema)}$$""")
        table = f"{quoted(schema)}.{quoted(watched.table)}"
        for event in EVENTS:
            execute(f"""
                CREATE OR REPLACE TRIGGER respcache_{event}
                AFTER {event.upper()} ON {table} {_TRANSITIONS[event]}
                FOR EACH STATEMENT EXECUTE FUNCTION {function}()""")
            execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER respcache_{event}")


def drop_triggers(execute: Execute, tables: Iterable[str], *, schema: str = "public") -> None:
    """Drop the triggers of these tables. Reads of them are not cached from then on."""
    for table in tables:
        for event in EVENTS:  # a table that was renamed runs the function of its former name
            execute(f"DROP TRIGGER IF EXISTS respcache_{event} ON {quoted(schema)}.{quoted(table)}")
        execute(
            f"DROP FUNCTION IF EXISTS {quoted(schema)}.{quoted(function_name(table))}() CASCADE"
        )


def body(watched: Watched, *, schema: str = "public") -> str:
    """Return the body of a table's function. Alembic compares it with ``pg_proc.prosrc``, so any
    change of this text requires a migration."""
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
    overflow = f"length(respcache_all) + length(respcache_new) > {MAX_SETTING} THEN '{TOO_MANY}'"
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
                    WHEN {overflow}
                    ELSE concat_ws(',', nullif(respcache_all, ''), respcache_new) END, true);
            END IF;
            RETURN NULL;
        END """


def setting(schema: str = "public") -> str:
    """Return the name of the setting with the rows that the running transaction has left: JSON
    arrays [tenant, tag, id], separated by commas."""
    return f"respcache.rows_{re.sub(r'[^A-Za-z0-9_]', '_', schema)}"


def quoted(identifier: str) -> str:
    """Return an identifier quoted for SQL."""
    return '"' + identifier.replace('"', '""') + '"'


_TRANSITIONS = {
    "insert": "REFERENCING NEW TABLE AS new_rows",
    "update": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "delete": "REFERENCING OLD TABLE AS old_rows",
    "truncate": "",
}


def function_name(table: str) -> str:
    """Return the name of a table's function. Long names are hashed, because the truncated names of
    two tables could be equal."""
    name = FUNCTION + table
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    return FUNCTION + hashlib.md5(table.encode(), usedforsecurity=False).hexdigest()


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
