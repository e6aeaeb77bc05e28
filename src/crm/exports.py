"""The export of a module to CSV: what ``python -m crm export`` does.

Importing the file again changes nothing.
"""

import csv
from collections.abc import AsyncIterator
from typing import IO, Any
from uuid import UUID

import orjson
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from crm.auth import DEFAULT_TIMEZONE, TenantScope
from crm.db import Rows
from crm.json_rows import JsonRows
from crm.listing import select_records
from crm.routes.reports import MODULES

PAGE = 1000
SMALLEST = UUID(int=0)


async def export(engine: AsyncEngine, tenant: UUID, module: str, *, file: IO[str]) -> int:
    """Write all records of a tenant's module, from one database snapshot; return their number.

    The column ``metadata`` contains JSON. One statement per 1,000 records.
    """
    model = MODULES[module]
    scope = TenantScope(
        tenant=str(tenant),
        fingerprint=b"",
        user_id=SMALLEST,
        email="",
        role="admin",
        visible_ids=None,
        timezone=DEFAULT_TIMEZONE,
    )
    writer = csv.writer(file)
    written = 0
    async with engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="REPEATABLE READ")
        statement = select_records(Rows(connection, scope), model)
        columns = statement.selected_columns
        names = [name for name in columns.keys() if name != "tenant_id"]  # noqa: SIM118 - no dict
        writer.writerow(names)
        async for page in _pages(connection, statement):
            writer.writerows([_cell(record[name]) for name in names] for record in page)
            written += len(page)
    return written


async def _pages(
    connection: AsyncConnection, statement: Select[Any]
) -> AsyncIterator[list[dict[str, Any]]]:
    key = statement.selected_columns["id"]
    after = SMALLEST
    while True:
        page = statement.where(key > after).order_by(key).limit(PAGE)
        records = orjson.loads(await connection.scalar(select(JsonRows(page))))
        if not records:
            return
        yield records
        after = UUID(records[-1]["id"])


def _cell(value: Any) -> Any:
    """Format a value: tags separated by commas, other structures as JSON, null as a blank cell."""
    if isinstance(value, list) and not any("," in word for word in value):
        return ", ".join(value)
    if isinstance(value, dict | list):
        return orjson.dumps(value).decode() if value else ""
    return "" if value is None else value
