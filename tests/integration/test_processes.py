"""The CRM in several processes over real HTTP: what a read may return, while the cache server comes
and goes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx2
import pytest
import redis
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from crm.auth import issue_token
from crm.models import Account, Employee, Tenant
from respcache.core.keys import counters_key
from respcache.ops.stats.publisher import StatsPublisher
from respcache.ops.stats.shapes import Fleet
from respcache.testing.servers import EmbeddedValkey, free_port

pytestmark = pytest.mark.anyio
SECRET = "a secret for these tests alone, 40 chars"
REGISTERS = 3


@dataclass
class History:
    """Registers, one a row: versions acknowledged with a confirmed invalidation, and what reads
    returned."""

    acknowledged: dict[str, int] = field(default_factory=dict)
    reads: int = 0
    hits: int = 0
    writes: int = 0
    pending: int = 0
    stale: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def workers(count: int, environment: dict[str, str]) -> AsyncIterator[list[str]]:
    """Start worker processes; yield their addresses when all answer; stop them whatever happens."""
    ports = [free_port() for _ in range(count)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "crm", "serve"],
            env={**os.environ, **environment, "PORT": str(port)},
        )
        for port in ports
    ]
    try:
        async with httpx2.AsyncClient() as http, asyncio.timeout(60):
            for port in ports:
                while True:
                    with contextlib.suppress(httpx2.HTTPError):
                        if (
                            await http.get(f"http://127.0.0.1:{port}/api/system/health")
                        ).status_code == 200:
                            break
                    await asyncio.sleep(0.05)
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


async def tenant_with_accounts(database_url: str) -> tuple[str, list[str]]:
    """Make a tenant with registers; return a token of its admin and their ids."""
    engine = create_async_engine(database_url)
    tenant, admin = Tenant(id=uuid4(), slug="t", name="T"), uuid4()
    rows = [
        Account(id=uuid4(), name=f"register {number}", employee_count=0)
        for number in range(REGISTERS)
    ]
    async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
        session.add(tenant)
        await session.flush()
        user = Employee(id=admin, tenant_id=tenant.id, email="a@t.example", name="A", role="admin")
        session.add(user)
        for row in rows:
            row.tenant_id = tenant.id
            session.add(row)
    await engine.dispose()
    return issue_token(SECRET, user, hours=1), [str(row.id) for row in rows]


async def write(
    http: httpx2.AsyncClient, history: History, base: str, register: str, done: asyncio.Event
) -> None:
    version = 0
    while not done.is_set():
        version += 1
        try:
            answer = await http.put(
                f"{base}/api/accounts/{register}", json={"employee_count": version}
            )
        except httpx2.HTTPError as error:
            history.failed.append(f"write: {error!r}")
            continue
        if answer.status_code != 200:
            history.failed.append(f"write: {answer.status_code} {answer.text}")
        elif "x-cache-invalidation" in answer.headers:
            history.pending += 1
        else:
            history.acknowledged[register] = version
        history.writes += 1
        await asyncio.sleep(0.01)


async def read(
    http: httpx2.AsyncClient, history: History, base: str, path: str, done: asyncio.Event
) -> None:
    while not done.is_set():
        least = dict(history.acknowledged)
        try:
            answer = await http.get(base + path)
        except httpx2.HTTPError as error:
            history.failed.append(f"read: {error!r}")
            continue
        if answer.status_code != 200:
            history.failed.append(f"read: {answer.status_code} {answer.text}")
            continue
        history.reads += 1
        history.hits += "; hit" in answer.headers["cache-status"]
        data: dict[str, Any] = answer.json()["data"]
        for row in data.get("accounts") or [data["account"]]:
            if row["employee_count"] < least.get(row["id"], 0):
                history.stale.append(
                    f"{path}: {row['employee_count']} < {least[row['id']]} "
                    f"({answer.headers['cache-status']})"
                )


def flush(valkey: EmbeddedValkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()


@pytest.mark.long
async def test_no_read_is_stale_while_the_cache_server_is_frozen_killed_and_flushed(
    database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Two processes, three registers. A read returns at least what was acknowledged as confirmed
    before it began; none fails."""
    valkey = make_valkey()
    token, registers = await tenant_with_accounts(database_url)
    environment = {
        "DATABASE_URL": database_url,
        "REDIS_CACHE_URL": valkey.url,
        "JWT_SECRET": SECRET,
        "RESPCACHE_KEY": SECRET,
        "LOG_LEVEL": "error",
    }
    history, done = History(), asyncio.Event()
    headers = {"authorization": f"Bearer {token}"}
    limits = httpx2.Limits(max_connections=50)
    async with (
        workers(2, environment) as bases,
        httpx2.AsyncClient(headers=headers, timeout=30, limits=limits) as http,
    ):
        paths = ["/api/accounts", "/api/accounts?sort=name", f"/api/accounts/{registers[0]}"]
        tasks = [
            asyncio.create_task(write(http, history, bases[n % 2], one, done))
            for n, one in enumerate(registers)
        ]
        tasks += [
            asyncio.create_task(read(http, history, base, path, done))
            for base in bases
            for path in paths
        ]
        await progress(history, 300)
        for accident in ("freeze", "kill", "flush", "freeze", "flush", "kill"):
            if accident == "freeze":
                valkey.freeze()
                await progress(history, 150)
                valkey.thaw()
            elif accident == "kill":
                valkey.kill()
                await progress(history, 150)
                valkey.start()
            else:
                flush(valkey)
            before = history.hits
            async with asyncio.timeout(60):
                while history.hits < before + 30:
                    await asyncio.sleep(0.02)
        done.set()
        await asyncio.gather(*tasks)
    assert history.stale == []
    assert history.failed == []
    assert history.acknowledged.keys() == set(registers)
    assert history.pending > 0, "the accidents touched no write"


async def progress(history: History, reads: int) -> None:
    """Wait until that many more reads were answered."""
    wanted = history.reads + reads
    async with asyncio.timeout(60):
        while history.reads < wanted:
            await asyncio.sleep(0.02)


@pytest.mark.long
async def test_a_worker_starts_and_serves_while_the_cache_server_is_away(database_url: str) -> None:
    """The cache is no start-up dependency; neither is there one at all with
    REDIS_CACHE_URL=none."""
    token, _ = await tenant_with_accounts(database_url)
    for cache_url in (f"redis://:x@127.0.0.1:{free_port()}/0", "none"):
        environment = {
            "DATABASE_URL": database_url,
            "REDIS_CACHE_URL": cache_url,
            "JWT_SECRET": SECRET,
            "RESPCACHE_KEY": SECRET,
            "LOG_LEVEL": "error",
        }
        async with (
            workers(1, environment) as [base],
            httpx2.AsyncClient(headers={"authorization": f"Bearer {token}"}) as http,
        ):
            answer = await http.get(f"{base}/api/accounts")
            assert answer.status_code == 200
            assert "fwd=bypass" in answer.headers["cache-status"]
            assert (await http.get(f"{base}/api/system/cache-stats")).status_code == 503


async def test_figures_of_workers_add_up_and_go_with_them(
    database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Anybody reads them on the server. Those of a killed worker vanish; those of the others return
    with a server that died."""
    valkey = make_valkey()
    token, registers = await tenant_with_accounts(database_url)
    environment = {
        "DATABASE_URL": database_url,
        "REDIS_CACHE_URL": valkey.url,
        "JWT_SECRET": SECRET,
        "RESPCACHE_KEY": SECRET,
        "LOG_LEVEL": "error",
    }
    publisher = StatsPublisher(valkey.url)

    async def until(wanted: Callable[[Fleet], bool]) -> Fleet:
        async with asyncio.timeout(60):
            while not wanted(found := await publisher.fleet()):
                await asyncio.sleep(0.05)
            return found

    headers = {"authorization": f"Bearer {token}"}
    async with (
        workers(2, environment) as bases,
        httpx2.AsyncClient(headers=headers, timeout=30) as http,
    ):
        for base, count in zip(bases, (5, 7), strict=True):
            for _ in range(count):
                assert (await http.get(f"{base}/api/accounts")).status_code == 200
            await http.get(f"{base}/api/accounts/{registers[0]}")
        await http.put(f"{bases[0]}/api/accounts/{registers[0]}", json={"employee_count": 7})
        found = await until(
            lambda fleet: fleet.totals.requests >= 14 and fleet.totals.invalidations > 0
        )
        assert (len(found.processes), found.totals.requests, found.alone) == (2, 14, False)
        routes = {route.route: route for route in found.routes}
        assert routes["/api/accounts"].totals.requests == 12
        assert routes["/api/accounts"].times is not None
        assert routes["/api/accounts"].times.misses.count == routes["/api/accounts"].totals.misses
        assert all(
            process.available and process.lease is not None and process.lease.alive
            for process in found.processes
        )
        (tenant,) = (await publisher.tenants()).tenants
        assert tenant.totals.requests == 14
        assert (await publisher.tenant(tenant.tenant)).totals == tenant.totals
        assert (
            sum(
                point.hits + point.misses + point.bypasses
                for point in (await publisher.series()).points
            )
            == 14
        )

        killed, alive = found.processes
        os.kill(killed.pid, signal.SIGKILL)
        with redis.Redis.from_url(valkey.url) as client:
            # as if it had been dead for half a minute
            assert client.pexpire(counters_key(killed.id), 30_000)
        left = await publisher.fleet()
        assert [process.pid for process in left.processes] == [alive.pid]
        assert left.totals.requests in (6, 8)
        valkey.kill()
        assert (await publisher.fleet()).alone
        valkey.start()
        back = await until(lambda fleet: not fleet.alone and bool(fleet.processes))
        assert ([process.pid for process in back.processes], back.totals.requests) == (
            [alive.pid],
            left.totals.requests,
        )
        async with asyncio.timeout(60):
            while not (rows := (await publisher.tenants()).tenants):
                await asyncio.sleep(0.05)
        assert (await publisher.tenant(tenant.tenant)).totals == rows[0].totals
    assert (await publisher.fleet()).processes == []
    await publisher.close()
