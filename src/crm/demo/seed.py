"""Demo data: deterministic, related, realistic. It is inserted into an empty database only."""

import random
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid5

from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from crm import models as m
from crm.auth import hash_password

PASSWORD = "demo-password"  # noqa: S105 - of demo users in a development database
NAMESPACE = UUID("5f0c0f3e-6f0e-4b7c-9a53-7a3d1f6f2b11")
PRESENT = datetime(2026, 11, 1, 9, 0, tzinfo=UTC)


class DemoTenant(NamedTuple):
    """The name of a tenant, its number of accounts, and its visibility mode."""

    name: str
    accounts: int
    visibility: str


TENANTS: dict[str, DemoTenant] = {
    "acme": DemoTenant("Acme Industries", 1200, "shared"),
    "globex": DemoTenant("Globex Corporation", 900, "hierarchical"),
    "initech": DemoTenant("Initech Software", 400, "shared"),
    "umbra": DemoTenant("Umbra Logistics", 300, "hierarchical"),
    "wonka": DemoTenant("Wonka Foods", 250, "shared"),
}
SMALL_TENANTS: dict[str, DemoTenant] = {
    slug: DemoTenant(
        f"{slug.title()} {trade}", size, "hierarchical" if number % 3 == 0 else "shared"
    )
    for number, (slug, trade, size) in enumerate(
        (
            ("aurora", "Optics", 160),
            ("bramble", "Bakery", 140),
            ("cobalt", "Metals", 120),
            ("dovetail", "Design", 100),
            ("ember", "Energy", 90),
            ("fathom", "Freight", 80),
            ("garnet", "Glass", 70),
            ("hazel", "Hotels", 60),
            ("indigo", "Media", 50),
            ("jasper", "Motors", 40),
            ("kestrel", "Labs", 30),
            ("lotus", "Clinics", 20),
        )
    )
}
"""Further tenants, for the demo with traffic only."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TEAMS = (("Sales", None), ("Sales North", "Sales"), ("Sales South", "Sales"), ("Partners", None))
FIRST = _words(
    """
    Ada Alan Barbara Carlos Chen Dana Edsger Elena Farid Grace Hiro Ines Jamal Katrin Lena Linus
    Mary Noor Olga Omar Priya Quinn Rosa Sven Tariq Uma Vera Wei Yara Zoe
    """
)
LAST = _words(
    """
    Abbott Baker Castillo Dubois Eriksen Fischer Garcia Haddad Ivanov Jansen Khan Larsen Moreau
    Nakamura Okafor Patel Quist Rossi Schmidt Tanaka Ueda Varga Weber Xu Yilmaz Zhang
    """
)
WORDS = _words(
    """
    Apex Blue Cedar Delta Evergreen Falcon Granite Harbor Iron Juniper Keystone Lumen Meridian
    North Orchid Pioneer Quarry River Summit Tidal Union Vertex Willow Zenith
    """
)
TRADES = _words(
    """
    Analytics Bakery Builders Chemicals Clinics Components Design Energy Foods Freight Glass
    Hotels Labs Logistics Media Metals Motors Optics Paper Partners Robotics Systems Textiles
    Works
    """
)
INDUSTRIES = (
    "Software",
    "Manufacturing",
    "Healthcare",
    "Retail",
    "Logistics",
    "Finance",
    "Education",
    "Energy",
)
PLACES = (
    ("Berlin", "BE", "Germany"),
    ("Austin", "TX", "United States"),
    ("Lyon", "ARA", "France"),
    ("Osaka", "Osaka", "Japan"),
    ("Leeds", "ENG", "United Kingdom"),
    ("Porto", "Porto", "Portugal"),
    ("Toronto", "ON", "Canada"),
    ("Cairo", "C", "Egypt"),
)
SOURCES = ("website", "referral", "event", "cold call", "partner", "newsletter")
JOBS = ("CEO", "CTO", "Buyer", "Head of Sales", "Engineer", "Office manager", "Consultant")


async def seed_if_empty(database_url: str, tenants: Mapping[str, DemoTenant] = TENANTS) -> str:
    """Insert the demo data unless there are tenants; return a line that describes the data."""
    engine = create_async_engine(database_url)
    try:
        async with engine.begin() as connection:
            if await connection.scalar(select(func.count()).select_from(m.Tenant)):
                accounts = await connection.scalar(select(func.count()).select_from(m.Account))
                return f"data found: {accounts} accounts"
            password = hash_password(PASSWORD)
            for slug, tenant in tenants.items():
                await _Tenant(slug, tenant, password).insert(connection)
            root = {
                "id": key("Root", "employee", "root"),
                "tenant_id": None,
                "email": "root@crm.example",
                "name": "Root root",
                "role": "superadmin",
                "team_id": None,
                "password_hash": password,
            }
            await _insert(connection, m.Employee, [root])
            # without it, the first queries use the plans of empty tables
            await connection.execute(text("ANALYZE"))
        return f"demo data created: {len(tenants)} tenants ({', '.join(tenants)})"
    finally:
        await engine.dispose()


def key(*parts: object) -> UUID:
    """Return the id of a demo row: always the same for the same parts."""
    return uuid5(NAMESPACE, "/".join(map(str, parts)))


class _Tenant:
    """Generates the rows of one tenant from a seeded random generator."""

    def __init__(self, slug: str, tenant: DemoTenant, password: str) -> None:
        self.slug = slug
        self.name, self.size, self.mode = tenant
        self.tenant = key(slug)
        self.chance = random.Random(slug)
        self.password = password
        self.employees: list[dict[str, Any]] = []

    async def insert(self, connection: AsyncConnection) -> None:
        """Insert all rows, referenced rows first."""
        settings = {"visibility_mode": self.mode}
        await _insert(
            connection,
            m.Tenant,
            [{"id": self.tenant, "slug": self.slug, "name": self.name, "settings": settings}],
        )
        team = {name: key(self.slug, "team", name) for name, _ in TEAMS}
        for name, parent in TEAMS:
            row = {
                "id": team[name],
                "tenant_id": self.tenant,
                "name": name,
                "parent_team_id": team[parent] if parent else None,
            }
            await _insert(connection, m.Team, [row])
        self.employees = self._employees(team)
        await _insert(connection, m.Employee, self.employees)
        accounts = [self._account(number) for number in range(self.size)]
        await _insert(connection, m.Account, accounts)
        contacts = [
            self._contact(number, self.chance.choice(accounts)) for number in range(self.size * 2)
        ]
        await _insert(connection, m.Contact, contacts)
        leads = [self._lead(number) for number in range(self.size)]
        await _insert(connection, m.Lead, leads)
        sources = [self._source(number) for number in range(self.size // 4)]
        await _insert(connection, m.BizDevSource, sources)
        about = {"contact": contacts, "lead": leads, "account": accounts, "bizdev_source": sources}
        opportunities = [
            self._opportunity(number, self.chance.choice(contacts), about)
            for number in range(self.size)
        ]
        await _insert(connection, m.Opportunity, opportunities)
        await _insert(
            connection,
            m.Activity,
            [self._activity(number, about) for number in range(self.size * 2)],
        )
        await _insert(
            connection,
            m.Document,
            [
                self._document(number, self.chance.choice(accounts))
                for number in range(self.size // 3)
            ],
        )
        await _insert(
            connection,
            m.Task,
            [self._task(number, self.chance.choice(contacts)) for number in range(self.size // 3)],
        )

    def _employees(self, team: dict[str, UUID]) -> list[dict[str, Any]]:
        people = [
            self._employee("admin", "admin", None),
            self._employee("manager", "manager", team["Sales"]),
            self._employee("employee", "employee", team["Sales North"]),
        ]
        teams = list(team.values())
        for number in range(9):
            row = self._employee(f"user{number}", "employee", teams[number % len(teams)])
            people.append({**row, "name": self._full_name()})
        return people

    def _employee(self, name: str, role: str, team: UUID | None) -> dict[str, Any]:
        return {
            "id": key(self.slug, "employee", name),
            "tenant_id": self.tenant,
            "email": f"{name}@{self.slug}.example",
            "name": f"{self.slug.title()} {name}",
            "role": role,
            "team_id": team,
            "password_hash": self.password,
        }

    def _full_name(self) -> str:
        return f"{self.chance.choice(FIRST)} {self.chance.choice(LAST)}"

    def _common(self, kind: str, number: int) -> dict[str, Any]:
        created = PRESENT - timedelta(minutes=self.chance.randrange(60 * 24 * 700))
        owner = self.chance.choice(self.employees)["id"] if self.chance.random() < 0.8 else None
        return {
            "id": key(self.slug, kind, number),
            "tenant_id": self.tenant,
            "assigned_to": owner,
            "created_at": created,
            "updated_at": created,
            "metadata": {"imported_from": "demo"} if number % 10 == 0 else {},
        }

    def _account(self, number: int) -> dict[str, Any]:
        chance = self.chance
        name = f"{chance.choice(WORDS)} {chance.choice(TRADES)} {number + 1}"
        domain = name.lower().replace(" ", "-") + ".example"
        city, state, country = chance.choice(PLACES)
        return {
            **self._common("account", number),
            "name": name,
            "type": chance.choice(m.ACCOUNT_TYPES),
            "industry": chance.choice(INDUSTRIES),
            "website": f"https://{domain}",
            "email": f"info@{domain}",
            "phone": f"+1 555 {chance.randrange(1000000):07d}",
            "annual_revenue": float(chance.randrange(50, 90000) * 1000),
            "employee_count": chance.randrange(3, 5000),
            "city": city,
            "state": state,
            "country": country,
            "tags": chance.sample(
                ["key", "renewal", "at event", "newsletter"], chance.randrange(3)
            ),
            "score": chance.randrange(101),
            "health_status": chance.choice(m.HEALTH),
            "description": f"{name} of {city} has known us for {number % 19 + 1} years. "
            f"{' '.join(chance.sample(WORDS, 6))}.",
        }

    def _person(self, kind: str, number: int) -> dict[str, Any]:
        first, _, last = self._full_name().partition(" ")
        city, state, country = self.chance.choice(PLACES)
        mail = f"{first}.{last}.{kind[0]}{number}@{self.slug}-mail.example".lower()
        phone = f"+49 30 {self.chance.randrange(10000000):08d}"
        return {
            **self._common(kind, number),
            "first_name": first,
            "last_name": last,
            "email": mail,
            "phone": phone,
            "job_title": self.chance.choice(JOBS),
            "city": city,
            "state": state,
            "country": country,
        }

    def _contact(self, number: int, account: dict[str, Any]) -> dict[str, Any]:
        status = self.chance.choice(m.CONTACT_STATUS)
        source = self.chance.choice(SOURCES)
        return {
            **self._person("contact", number),
            "account_id": account["id"],
            "status": status,
            "lead_source": source,
        }

    def _lead(self, number: int) -> dict[str, Any]:
        chance = self.chance
        return {
            **self._person("lead", number),
            "company": f"{chance.choice(WORDS)} {chance.choice(TRADES)}",
            "status": chance.choice([s for s in m.LEAD_STATUS if s != "converted"]),
            "source": chance.choice(SOURCES),
            "estimated_value": float(chance.randrange(1, 500) * 100),
            "score": chance.randrange(101),
        }

    def _source(self, number: int) -> dict[str, Any]:
        chance = self.chance
        company = f"{chance.choice(WORDS)} {chance.choice(TRADES)}"
        return {
            **self._common("source", number),
            "source_name": f"{company} list {number + 1}",
            "company_name": company,
            "source_type": chance.choice(["directory", "event", "partner", "license board"]),
            "contact_person": self._full_name(),
            "contact_email": f"hello{number}@{self.slug}-source.example",
            "priority": chance.choice(["low", "medium", "high"]),
            "industry": chance.choice(INDUSTRIES),
        }

    def _opportunity(
        self, number: int, contact: dict[str, Any], about: dict[str, list[Any]]
    ) -> dict[str, Any]:
        chance = self.chance
        source = (
            f"bizdev_source:{chance.choice(about['bizdev_source'])['id']}"
            if number % 7 == 0
            else chance.choice(SOURCES)
        )
        return {
            **self._common("opportunity", number),
            "name": f"{chance.choice(WORDS)} deal {number + 1}",
            "stage": chance.choice(m.STAGES),
            "amount": float(chance.randrange(1, 900) * 250),
            "probability": chance.randrange(0, 101, 5),
            "close_date": date(2026, 11, 1) + timedelta(days=chance.randrange(-200, 200)),
            "account_id": contact["account_id"],
            "contact_id": contact["id"],
            "lead_id": chance.choice(about["lead"])["id"] if number % 3 == 0 else None,
            "source": source,
        }

    def _activity(self, number: int, about: dict[str, list[Any]]) -> dict[str, Any]:
        chance = self.chance
        related = chance.choice(list(about))
        record = chance.choice(about[related])
        name = (
            record.get("name")
            or record.get("source_name")
            or f"{record['first_name']} {record['last_name']}"
        )
        kind = chance.choice(m.ACTIVITY_TYPES)
        return {
            **self._common("activity", number),
            "type": kind,
            "subject": f"{kind.capitalize()} with {name}",
            "status": chance.choice(m.ACTIVITY_STATUS),
            "due_date": date(2026, 11, 1) + timedelta(days=chance.randrange(-60, 60)),
            "related_to": related,
            "related_id": record["id"],
            "related_name": name,
        }

    def _document(self, number: int, account: dict[str, Any]) -> dict[str, Any]:
        what = self.chance.choice(("Offer", "Contract", "Minutes", "Invoice"))
        return {
            **self._common("document", number),
            "name": f"{what} for {account['name']}",
            "file_type": "application/pdf",
            "file_url": f"https://files.example/{self.slug}/{number}.pdf",
            "file_size": self.chance.randrange(10_000, 5_000_000),
            "related_type": "account",
            "related_id": account["id"],
        }

    def _task(self, number: int, contact: dict[str, Any]) -> dict[str, Any]:
        what = self.chance.choice(("Ring", "Write to", "Prepare an offer for", "Meet"))
        return {
            **self._common("task", number),
            "description": f"{what} {contact['first_name']} {contact['last_name']}",
            "status": self.chance.choice(m.TASK_STATUS),
            "entity_type": "contact",
            "entity_id": contact["id"],
        }


async def _insert(
    connection: AsyncConnection, model: type[m.Base], rows: list[dict[str, Any]]
) -> None:
    await connection.execute(insert(model.__table__), rows)  # type: ignore[arg-type]
