"""What it costs that no invalidation is lost: side by side in one run, with the outbox and without
(the interim form).

1. How long until an UPDATE by psql shows through the cache.
2. What a write takes, of one row and of 5,000: without a cache, with the hooks alone, with the
   outbox.
3. The hit ratio of the same reads and writes in two processes, in both forms.

Prints tables and, last, one JSON line.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import String, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from respcache import Cache, RedisStore, SingleTenant
from respcache.testing.servers import EmbeddedPostgres, EmbeddedValkey
from respcache.writes import triggers
from respcache.writes.postgres import PostgresOutbox
from respcache.writes.sqlalchemy import watch

ROWS = 5_000
TENANTS = 20
FORMS = ("no cache", "hooks alone", "outbox")


class Base(DeclarativeBase):
    pass


class Thing:
    """A row; each form has a table of its own, as updates leave traces behind."""

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(20), index=True)
    version: Mapped[int]


class Plain(Thing, Base):
    """Written without a cache."""

    __tablename__ = "plain"


class Hooked(Thing, Base):
    """Written with hooks alone."""

    __tablename__ = "hooked"


class Watched(Thing, Base):
    """Has triggers."""

    __tablename__ = "watched"


TABLES: dict[str, type[Plain | Hooked | Watched]] = dict(
    zip(FORMS, (Plain, Hooked, Watched), strict=True)
)


@dataclass
class Process:
    """What one process of an application has, in one of the forms."""

    engine: AsyncEngine
    cache: Cache | None
    table: type[Plain | Hooked | Watched]

    async def write(self, where: Any) -> None:
        """Change rows and wait until the write may be acknowledged."""
        async with AsyncSession(self.engine) as session, session.begin():
            await session.execute(
                update(self.table).where(where).values(version=self.table.version + 1)
            )
        if self.cache is not None:
            await self.cache.settled()

    async def read(self, tenant: str) -> int:
        """Read the versions of a tenant through the cache."""

        async def make() -> int:
            async with AsyncSession(self.engine) as session:
                statement = (
                    select(self.table.version)
                    .where(self.table.tenant_id == tenant)
                    .order_by(self.table.id)
                    .limit(1)
                )
                return await session.scalar(statement) or 0

        assert self.cache is not None
        found: int = await self.cache.get_or_set(
            tenant, "things", {"q": 1}, make, tables=[self.table.__tablename__]
        )
        return found


@contextlib.asynccontextmanager
async def process(form: str, database: str, valkey: str) -> AsyncIterator[Process]:
    """Start one in a form."""
    engine = create_async_engine(database)
    table = TABLES[form]
    if form == "no cache":
        yield Process(engine, None, table)
    else:
        outbox = PostgresOutbox(engine) if form == "outbox" else None
        cache = Cache(
            RedisStore(valkey), secret=b"b" * 32, resolver=SingleTenant("t0"), outbox=outbox
        )
        watching = watch(engine, cache, metadata=Base.metadata)
        await cache.connect()
        yield Process(engine, cache, table)
        await cache.close()
        watching.close()
    await engine.dispose()


async def psql_to_visible(database: str, valkey: str, *, samples: int) -> dict[str, float]:
    """Measure from the COMMIT of an UPDATE by psql to the begin of the first read that shows it
    (ms)."""
    found: list[float] = []
    psql = await asyncpg.connect(database.replace("+asyncpg", ""))
    async with process("outbox", database, valkey) as here:
        await here.read("t0")
        for number in range(samples):
            before = await here.read("t0")
            await asyncio.sleep(random.uniform(0, 0.5))  # at any moment between two rounds
            await psql.execute("UPDATE watched SET version = version + 1 WHERE tenant_id = 't0'")
            committed = began = time.perf_counter()
            while await here.read("t0") == before:
                await asyncio.sleep(0.001)
                began = time.perf_counter()
            found.append((began - committed) * 1000)
            say(f"psql to visible: {number + 1} of {samples}")
    await psql.close()
    cuts = statistics.quantiles(found, n=100)
    return {
        "p50_ms": round(statistics.median(found), 1),
        "p99_ms": round(cuts[98], 1),
        "max_ms": round(max(found), 1),
    }


async def cost_of_writes(database: str, valkey: str, *, rounds: int) -> dict[str, dict[str, float]]:
    """Measure writes of one row and of all rows of a tenant in each form in turn (median, ms)."""
    took: dict[str, dict[str, list[float]]] = {"1 row": {}, f"{ROWS} rows": {}}
    async with contextlib.AsyncExitStack() as stack:
        psql = await asyncpg.connect(database.replace("+asyncpg", ""))
        processes = {
            form: await stack.enter_async_context(process(form, database, valkey)) for form in FORMS
        }
        for number in range(rounds):
            for form, one in processes.items():
                many = 20 if number else 5
                for repeat in range(many):
                    started = time.perf_counter()
                    await one.write(
                        (one.table.tenant_id == "t1") & (one.table.id == ROWS + 1 + repeat)
                    )
                    took["1 row"].setdefault(form, []).append(
                        (time.perf_counter() - started) * 1000
                    )
                started = time.perf_counter()
                await one.write(one.table.tenant_id == "t0")
                took[f"{ROWS} rows"].setdefault(form, []).append(
                    (time.perf_counter() - started) * 1000
                )
            say(f"writes: round {number + 1} of {rounds}")
            await psql.execute("VACUUM")
        await psql.close()
    return {
        size: {form: round(statistics.median(times), 3) for form, times in forms.items()}
        for size, forms in took.items()
    }


async def hit_ratio(form: str, database: str, valkey: str, *, operations: int) -> float:
    """Run the same reads (Zipf over tenants) and writes (one in a hundred) in two processes; return
    hits of all reads."""
    dice = random.Random(5)
    weights = [1 / (rank + 1) for rank in range(TENANTS)]
    async with process(form, database, valkey) as first, process(form, database, valkey) as second:
        processes = (first, second)
        for number in range(operations):
            tenant = f"t{dice.choices(range(TENANTS), weights)[0]}"
            if number % 100 == 99:
                table = processes[0].table
                await dice.choice(processes).write(
                    (table.tenant_id == tenant) & (table.id % ROWS == 1)
                )
            else:
                await dice.choice(processes).read(tenant)
            if number % 500 == 0:
                say(f"hit ratio, {form}: {number} of {operations}")
        figures = [one.cache.stats() for one in processes if one.cache is not None]
    hits = sum(figure["hits"] for figure in figures)
    return round(
        hits / (hits + sum(figure["misses"] + figure["bypasses"] for figure in figures)), 4
    )


async def prepare(database: str) -> None:
    """Make both tables with the same rows: 5,000 of each tenant's first two, one of the others."""
    engine = create_async_engine(database)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    psql = await asyncpg.connect(database.replace("+asyncpg", ""))
    for table in Base.metadata.tables:
        await psql.execute(
            f"INSERT INTO {table} SELECT tenant * {ROWS} + number, 't' || tenant, 0 "  # noqa: S608
            f"FROM generate_series(0, {TENANTS - 1}) tenant, generate_series(1, {ROWS}) number "
            f"WHERE tenant < 2 OR number < 50"
        )
    statements: list[str] = []
    triggers.create_outbox(statements.append)
    triggers.create_triggers(statements.append, [triggers.Watched("watched")])
    for statement in [*statements, "ANALYZE"]:
        await psql.execute(statement)
    await psql.close()


def say(what: str) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what}\033[K", end="", file=sys.stderr)


async def measure(database: str, valkey: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    await prepare(database)
    result: dict[str, Any] = {
        "psql_to_visible": await psql_to_visible(database, valkey, samples=options.samples)
    }
    result["writes_ms"] = await cost_of_writes(database, valkey, rounds=options.rounds)
    ratios = {
        form: await hit_ratio(form, database, valkey, operations=options.operations)
        for form in FORMS[1:]
    }
    return {**result, "hit_ratio": ratios}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200, help="UPDATEs by psql")
    parser.add_argument("--rounds", type=int, default=30, help="of writes")
    parser.add_argument(
        "--operations", type=int, default=10_000, help="reads and writes for the hit ratio"
    )
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="respcache-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        valkey = EmbeddedValkey(Path(folder) / "valkey").start()
        stack.callback(valkey.stop)
        postgres = EmbeddedPostgres(
            Path(folder) / "postgres", password="bench", durable=False
        ).start()
        stack.callback(postgres.remove)
        result = asyncio.run(measure(postgres.url("postgres"), valkey.url, options))
    say("")
    visible = result["psql_to_visible"]
    print(
        f"an UPDATE by psql shows after {visible['p50_ms']} ms (p50), {visible['p99_ms']} ms "
        f"(p99)\n"
    )
    print(
        f"{'a write of':<14}"
        + "".join(f"{form + ', ms':>18}" for form in FORMS)
        + f"{'outbox / none':>16}{'/ hooks':>10}"
    )
    for size, times in result["writes_ms"].items():
        cells = "".join(f"{times[form]:>18}" for form in FORMS)
        print(
            f"{size:<14}{cells}{times['outbox'] / times['no cache']:>16.2f}{times['outbox'] / times['hooks alone']:>10.2f}"
        )
    print(
        f"\nhit ratio: {result['hit_ratio']['outbox']:.2%} with the outbox, "
        f"{result['hit_ratio']['hooks alone']:.2%} without"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
