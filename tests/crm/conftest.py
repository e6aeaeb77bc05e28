"""The CRM in process, on a real PostgreSQL and a real Valkey, with two tenants whose people see
different rows."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from crm.app import create_app
from crm.auth import hash_password, issue_token
from crm.models import Account, Employee, Team, Tenant
from crm.settings import Settings
from respcache import Cache, RedisStore
from respcache.core.serving_lease import LEASE_S
from respcache.writes.postgres import PostgresOutbox

from .system import DEADLINE_S, Start, System

SECRET = "a secret for these tests alone, 40 chars"
PASSWORD = "correct horse battery staple"
PASSWORD_HASH = hash_password(PASSWORD)  # slow on purpose, so once


@dataclass
class Crm:
    """The running application and the people in it. ``globex`` is hierarchical, ``acme`` shared."""

    app: Any
    cache: Cache
    users: dict[str, Employee] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    teams: dict[str, Team] = field(default_factory=dict)
    clients: dict[str, httpx2.AsyncClient] = field(default_factory=dict)

    def session(self) -> AsyncSession:
        """Open a session of the application, hooks included."""
        session: AsyncSession = self.app.app.state.sessions()
        return session

    def as_user(self, name: str | None) -> httpx2.AsyncClient:
        """Return a client that is logged in as somebody."""
        key = name or ""
        if key not in self.clients:
            token = issue_token(SECRET, self.users[name], hours=1) if name else None
            headers = {"authorization": f"Bearer {token}"} if token else {}
            transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
            self.clients[key] = httpx2.AsyncClient(
                transport=transport, base_url="http://crm", headers=headers, timeout=30
            )
        return self.clients[key]

    async def said(self, name: str, path: str) -> str:
        """Return what the cache says to somebody; asked again while it is left alone, as on a busy
        machine for a moment."""
        async with asyncio.timeout(60):
            while "fwd=bypass" in (said := status(await self.as_user(name).get(path))):
                await asyncio.sleep(0.05)
        return said

    async def save(self, *rows: Any) -> None:
        """Insert rows in one transaction."""
        async with self.session() as session, session.begin():
            for row in rows:
                session.add(row)
                await session.flush()

    def account(self, tenant: str, name: str, **values: Any) -> Account:
        """Make an account of a tenant, to be saved."""
        return Account(id=uuid4(), tenant_id=self.tenants[tenant].id, name=name, **values)


SINGULAR = {
    "accounts": "account",
    "leads": "lead",
    "contacts": "contact",
    "bizdevsources": "bizdevsource",
    "opportunities": "opportunity",
    "activities": "activity",
    "documents": "document",
    "tasks": "task",
}
MODULES = tuple(SINGULAR)
NEW: dict[str, dict[str, Any]] = {
    "accounts": {"name": "Acorn"},
    "leads": {"first_name": "Lea", "last_name": "Deed"},
    "contacts": {"first_name": "Con", "last_name": "Tact"},
    "bizdevsources": {"source_name": "Source"},
    "opportunities": {"name": "Deal"},
    "activities": {"type": "call"},
    "documents": {"name": "Offer"},
    "tasks": {"description": "Ring"},
}


LONG_LEASE_S = 10.0
"""So long that a busy machine makes no bypasses of hits."""


@pytest.fixture
def lease_s() -> float:
    """How long a process may serve without having read the outbox. Some writes wait for it."""
    return LEASE_S


@pytest.fixture
async def crm(
    database_url: str, valkey_url: str, lease_s: float, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Crm]:
    monkeypatch.setitem(RedisStore.__init__.__kwdefaults__, "deadline_s", DEADLINE_S)
    monkeypatch.setitem(PostgresOutbox.__init__.__kwdefaults__, "lease_s", lease_s)
    settings = Settings(
        database_url=database_url,
        redis_cache_url=valkey_url,
        jwt_secret=SECRET,
        respcache_key=SECRET,
    )
    app = create_app(settings, strict_reads=True)
    made = Crm(app, app.app.state.cache)
    await made.cache.connect()
    app.prepare()
    await populate(made)
    yield made
    for client in made.clients.values():
        await client.aclose()
    await made.cache.close()
    await app.app.state.sessions.kw["bind"].dispose()


async def populate(crm: Crm) -> None:
    for slug, mode in (("acme", "shared"), ("globex", "hierarchical")):
        crm.tenants[slug] = Tenant(
            id=uuid4(), slug=slug, name=slug.title(), settings={"visibility_mode": mode}
        )
    sales = Team(id=uuid4(), name="Sales", tenant_id=crm.tenants["globex"].id)
    north = Team(
        id=uuid4(), name="North", tenant_id=crm.tenants["globex"].id, parent_team_id=sales.id
    )
    south = Team(
        id=uuid4(), name="South", tenant_id=crm.tenants["globex"].id, parent_team_id=sales.id
    )
    crm.teams = {"sales": sales, "north": north, "south": south}

    def person(name: str, tenant: str | None, role: str, team: Team | None = None) -> Employee:
        where: UUID | None = crm.tenants[tenant].id if tenant else None
        user = Employee(
            id=uuid4(),
            email=f"{name}@x.example",
            name=name,
            role=role,
            tenant_id=where,
            team_id=team.id if team else None,
            password_hash=PASSWORD_HASH,
        )
        crm.users[name] = user
        return user

    people = [
        person("ann", "acme", "employee"),
        person("abe", "acme", "admin"),
        person("gus", "globex", "admin"),
        person("max", "globex", "manager", sales),
        person("nora", "globex", "employee", north),
        person("nils", "globex", "employee", north),
        person("suzy", "globex", "employee", south),
        person("root", None, "superadmin"),
    ]
    async with crm.session() as session, session.begin():
        for rows in (crm.tenants.values(), [sales], [north, south], people):
            session.add_all(rows)
            await session.flush()
        session.expunge_all()


def status(answer: httpx2.Response) -> str:
    """Return what an answer says of the cache."""
    return answer.headers["cache-status"]


def hit(answer: httpx2.Response) -> bool:
    """Whether an answer came from the cache."""
    return "; hit" in status(answer)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    systems: list[System] = []

    def make(name: str = "data", **environment: str) -> System:
        systems.append(System(tmp_path / name, **environment))
        return systems[-1]

    yield make
    for system in systems:
        system.end()
