"""Alembic's environment: it connects through asyncpg, or prints the statements with ``--sql``.

The address comes from ``crm.migrations.configuration``, or from ``DATABASE_URL`` for alembic's own
command line.
"""

import asyncio

from alembic import context
from sqlalchemy import Connection, pool
from sqlalchemy.ext.asyncio import create_async_engine

from crm.caching import watched_tables
from crm.models import Base
from crm.settings import Settings
from respcache import ConfigurationError
from respcache.writes.alembic import include_name


def database_url() -> str:
    """Return the address of the database."""
    given: str | None = context.config.attributes.get("database_url")
    if given is not None:
        return given
    configured = Settings().database_url
    if configured is None:
        raise ConfigurationError("DATABASE_URL is required")
    return configured.get_secret_value()


def run(connection: Connection) -> None:
    """Run the revisions in one transaction."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        include_name=include_name,
        respcache_tables=watched_tables(),
        respcache_trail=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def connect_and_run() -> None:
    """Connect to the database and run the revisions."""
    engine = create_async_engine(database_url(), poolclass=pool.NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
            await connection.commit()
    finally:
        await engine.dispose()


def print_statements() -> None:
    """Print the statements of the revisions."""
    context.configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    print_statements()
else:
    asyncio.run(connect_and_run())
