"""Those who write without the application (psql, COPY), and an observer who notes which versions
are committed.

Nobody acknowledges these writes: reads must show them within the lease.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import asyncpg

from respcache.core.serving_lease import LEASE_S
from respcache.testing.history import Recorder, Write, now

from .registers import (
    ACCOUNTS,
    BATCH,
    TENANTS,
    VERSIONS_NOW,
    WINDOW,
    Settled,
    fate,
    key,
    lead,
    versioned,
)
from .stage import Stage

OBSERVE_S = 0.25
SETTLE_S = LEASE_S + 0.5
AWAY = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    TimeoutError,
)
"""What a database that is not there raises."""

BUMPED = """
WITH locked AS (SELECT id FROM accounts WHERE id = ANY($1) ORDER BY id FOR UPDATE)
UPDATE accounts SET updated_at = now() FROM locked WHERE accounts.id = locked.id
RETURNING accounts.id, (accounts.metadata->>'v')::int AS v
"""


class Outsiders:
    """They go on until they are cancelled, whatever becomes of the database."""

    def __init__(self, stage: Stage, recorder: Recorder, randomness: Random) -> None:
        self.writes = 0
        self._stage = stage
        self._recorder = recorder
        self._randomness = randomness
        self._names = versioned()
        self._settled = Settled(stage.settled)
        self._copied = dict.fromkeys(TENANTS, 0)  # batches

    async def observe(self) -> None:
        """Note again and again which versions are committed: also those whose writers died before
        they could tell."""
        seen: dict[Any, int] = {}
        before = now()
        while True:
            async with self._connected() as connection:
                while True:
                    started = now()
                    rows = await connection.fetch(VERSIONS_NOW)
                    committed = now()
                    for row in rows:
                        if seen.get(row["id"]) != row["v"]:
                            # it was not there when we looked the last time, so nobody can have read
                            # it before that
                            self._recorder.append(
                                Write(
                                    self._names[row["id"]],
                                    row["v"],
                                    before,
                                    committed,
                                    None,
                                    "observer",
                                )
                            )
                            seen[row["id"]] = row["v"]
                    before = started
                    await asyncio.sleep(OBSERVE_S)

    async def write(self) -> None:
        """Change versioned rows: one, all of a tenant, or some of all tenants, in one
        transaction."""
        while True:
            async with self._connected() as connection:
                while True:
                    kind = self._randomness.random()
                    tenants = TENANTS if kind < 0.3 else (self._randomness.choice(TENANTS),)
                    names = ACCOUNTS if 0.3 <= kind < 0.6 else (self._randomness.choice(ACCOUNTS),)
                    await self.change(
                        connection, [f"{tenant}/{name}" for tenant in tenants for name in names]
                    )
                    await asyncio.sleep(self._randomness.uniform(0.5, 2.5))

    async def change(self, connection: Any, rows: list[str], *, hold_s: float = 0.0) -> None:
        """Change rows in one transaction, which stays open for a while."""
        started = now()
        found: list[Any] = []
        try:
            async with connection.transaction():
                found = await connection.fetch(BUMPED, [key(row) for row in rows])
                await asyncio.sleep(hold_s)
            committed: float | None = now()
        except BaseException:
            committed = None
            raise
        finally:
            for row in found:
                self._recorder.append(
                    Write(self._names[row["id"]], row["v"], started, committed, None, "psql")
                )
        self.writes += len(found)

    async def trade(self) -> None:
        """Copy leads in, delete some of them later."""
        while True:
            async with self._connected() as connection:
                while True:
                    for tenant in TENANTS:
                        await self._copy(connection, tenant)
                        await asyncio.sleep(self._randomness.uniform(1.0, 2.5))
                        await self._delete(connection, tenant)

    async def _copy(self, connection: Any, tenant: str) -> None:
        """Add a batch. A COPY whose outcome is unknown is looked up."""
        batch = self._copied[tenant]
        numbers = range(batch * BATCH, (batch + 1) * BATCH)
        rows = [(key(lead(tenant, n)), key(tenant), "Lead", str(n)) for n in numbers]
        known = await connection.fetchval(
            "SELECT count(*) FROM leads WHERE id = ANY($1)", [row[0] for row in rows]
        )
        started = now()
        if not known:
            for n in numbers:
                self._recorder.append(Write(lead(tenant, n), 1, started, None, None, "copy"))
            columns = ["id", "tenant_id", "first_name", "last_name"]
            await connection.copy_records_to_table("leads", records=rows, columns=columns)
        committed = now()
        for n in numbers:
            self._recorder.append(Write(lead(tenant, n), 1, started, committed, None, "copy"))
        self._copied[tenant] = batch + 1
        self.writes += BATCH
        asyncio.get_running_loop().call_later(SETTLE_S, self._settle, tenant, batch + 1)

    def _settle(self, tenant: str, batches: int) -> None:
        self._settled[tenant] = max(batches, self._settled[tenant])

    async def _delete(self, connection: Any, tenant: str) -> None:
        """Delete what is ours of the newest batch that everybody knows, and all that reads look at
        no more."""
        settled = self._settled[tenant]
        newest = range(max(0, settled - 1) * BATCH, settled * BATCH)
        old = range(max(0, settled - WINDOW - 2) * BATCH, max(0, settled - WINDOW) * BATCH)
        numbers = [*(n for n in newest if fate(n) == "psql"), *old]
        started = now()
        for n in numbers:
            self._recorder.append(Write(lead(tenant, n), 2, started, None, None, "psql"))
        deleted = "DELETE FROM leads WHERE id = ANY($1) RETURNING id"
        gone = {
            row["id"]
            for row in await connection.fetch(deleted, [key(lead(tenant, n)) for n in numbers])
        }
        committed = now()
        for n in numbers:
            if key(lead(tenant, n)) in gone:
                self._recorder.append(Write(lead(tenant, n), 2, started, committed, None, "psql"))
        self.writes += len(gone)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        """Connect; whatever the database does to what goes on with it, the next attempt follows."""
        connection = None
        while connection is None:
            with contextlib.suppress(*AWAY):
                connection = await self._stage.connect()
            await asyncio.sleep(0.1)
        try:
            with contextlib.suppress(*AWAY):
                yield connection
        finally:
            connection.terminate()
