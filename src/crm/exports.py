"""Exporting a module to CSV: what ``python -m crm export`` does. The file can be imported again,
and then changes nothing."""

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
NOBODY = UUID(int=0)


async def export(engine: AsyncEngine, tenant: UUID, module: str, file: IO[str]) -> int:
    """Write all records of a tenant's module, as of one moment; return how many. The column
    ``metadata`` holds JSON."""
    model = MODULES[module]
    scope = TenantScope(str(tenant), b"", NOBODY, "", "admin", None, DEFAULT_TIMEZONE)
    writer = csv.writer(file)
    written = 0
    async with engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="REPEATABLE READ")
        every = select_records(Rows(connection, scope), model)
        names = [name for name in every.selected_columns.keys() if name != "tenant_id"]  # noqa: SIM118 - no dictionary
        writer.writerow(names)
        async for page in _pages(connection, every):
            writer.writerows([_cell(record[name]) for name in names] for record in page)
            written += len(page)
    return written


async def _pages(
    connection: AsyncConnection, every: Select[Any]
) -> AsyncIterator[list[dict[str, Any]]]:
    key = every.selected_columns["id"]
    after = NOBODY
    while True:
        page = every.where(key > after).order_by(key).limit(PAGE)
        records = orjson.loads(await connection.scalar(select(JsonRows(page))))
        if not records:
            return
        yield records
        after = UUID(records[-1]["id"])


def _cell(value: Any) -> Any:
    """Write words with commas between them, other structures as JSON, and nothing as a blank."""
    if isinstance(value, list) and not any("," in word for word in value):
        return ", ".join(value)
    if isinstance(value, dict | list):
        return orjson.dumps(value).decode() if value else ""
    return "" if value is None else value
