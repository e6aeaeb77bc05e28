"""What is written and read: the rows of three tenants that carry a version, the users who ask, and
what their answers tell.

Versions are made by triggers of this suite alone (``v`` in the metadata of a row), so in the order
of commits whoever writes:
the CRM, psql, COPY. Accounts carry theirs in their name too, so the lists of other modules show it.
Leads come and go: the register of a lead has version 1 while it is there and 2 when it is gone,
that of its contact 1 when it was converted.

Tenant c is hierarchical: its employee sees the rows of nobody and his own. The superadmin reads
tenant a.

Most is read at level strict. Each query knows the level of its route (``ways.py``), and with it how
old its answer may be.
"""

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import orjson

from crm.auth import issue_token
from crm.models import Employee
from respcache import Level

from .ways import BOUND_S, MADE_IN, VALUE, VALUE_TTL_S

SECRET = "a secret of the fault suite alone, 40 chars"
TENANTS = ("a", "b", "c")
ACCOUNTS = ("acc1", "acc2", "acc3", "acc4")
OPPORTUNITIES = ("opp1", "opp2", "opp3")
OWNED_BY = {"c/acc3": "c/employee", "c/acc4": "c/admin", "c/opp3": "c/employee"}
"""Rows that are assigned to somebody."""

BATCH = 12
"""Leads that are copied in at once."""

WINDOW = 2
"""Batches that reads look at; older leads are deleted."""

KEPT_IN_S = 0.1
"""What may pass between the end of making a value and the beginning of its time to live."""

FATES = ("convert", "delete", "bulk-delete", "psql")
"""What becomes of the leads of a batch, in turn."""

Values = dict[str, int]
Judge = Callable[[dict[str, Any], int], tuple[Values, str | None]]


def key(name: str) -> UUID:
    """Return the id of whatever has this name."""
    return uuid5(NAMESPACE_URL, f"faults:{name}")


@dataclass(frozen=True)
class User:
    """Somebody who asks. Of no tenant: the superadmin."""

    name: str
    tenant: str | None
    role: str

    @cached_property
    def token(self) -> str:
        """A bearer token."""
        tenant = None if self.tenant is None else key(self.tenant)
        user = Employee(
            id=key(self.name),
            tenant_id=tenant,
            email=f"{self.name.replace('/', '.')}@faults.example",
            role=self.role,
        )
        return issue_token(SECRET, user, hours=24)


ADMINS = {tenant: User(f"{tenant}/admin", tenant, "admin") for tenant in TENANTS}
EMPLOYEE = User("c/employee", "c", "employee")
SUPERADMIN = User("root", None, "superadmin")
USERS = (*ADMINS.values(), EMPLOYEE, SUPERADMIN)


# -- the database ----------------------------------------------------------------------------------

VERSIONS = """
CREATE FUNCTION faults_version() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE version int := 1;
BEGIN
    IF TG_TABLE_NAME = 'tenants' THEN
        NEW.settings = NEW.settings
            || jsonb_build_object('v', coalesce((OLD.settings->>'v')::int, 0) + 1);
        RETURN NEW;
    END IF;
    IF TG_OP = 'UPDATE' THEN version = (OLD.metadata->>'v')::int + 1; END IF;
    NEW.metadata = NEW.metadata || jsonb_build_object('v', version);
    IF TG_TABLE_NAME = 'accounts' THEN
        NEW.name = split_part(NEW.name, ' ', 1) || ' ' || version;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER faults_version BEFORE INSERT OR UPDATE ON accounts
    FOR EACH ROW EXECUTE FUNCTION faults_version();
CREATE TRIGGER faults_version BEFORE INSERT OR UPDATE ON opportunities
    FOR EACH ROW EXECUTE FUNCTION faults_version();
CREATE TRIGGER faults_version BEFORE INSERT OR UPDATE ON tenants
    FOR EACH ROW EXECUTE FUNCTION faults_version();
"""

VERSIONS_NOW = """
SELECT id, (metadata->>'v')::int AS v FROM accounts
UNION ALL SELECT id, (metadata->>'v')::int FROM opportunities
UNION ALL SELECT id, (settings->>'v')::int FROM tenants
"""

_BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)


async def furnish(connection: Any) -> None:
    """Put tenants, users and versioned rows into a migrated database."""
    await connection.execute(VERSIONS)
    for tenant in TENANTS:
        mode = "hierarchical" if tenant == "c" else "shared"
        settings = orjson.dumps({"visibility_mode": mode, "called": tenant}).decode()
        await connection.execute(
            "INSERT INTO tenants (id, slug, name, settings) VALUES ($1, $2, $2, $3)",
            key(tenant),
            tenant,
            settings,
        )
    for user in USERS:
        of = None if user.tenant is None else key(user.tenant)
        mail = f"{user.name.replace('/', '.')}@faults.example"
        await connection.execute(
            "INSERT INTO employees (id, tenant_id, email, name, role) VALUES ($1, $2, $3, $3, $4)",
            key(user.name),
            of,
            mail,
            user.role,
        )
    for tenant in TENANTS:
        for number, name in enumerate(ACCOUNTS):
            row = f"{tenant}/{name}"
            await connection.execute(
                "INSERT INTO accounts (id, tenant_id, name, assigned_to, created_at) VALUES ($1, "
                "$2, $3, $4, $5)",
                key(row),
                key(tenant),
                name,
                _owner(row),
                _BEGINNING - timedelta(minutes=number),
            )
        for number, name in enumerate(OPPORTUNITIES):
            row = f"{tenant}/{name}"
            await connection.execute(
                "INSERT INTO opportunities (id, tenant_id, name, assigned_to, created_at, "
                "account_id) "
                "VALUES ($1, $2, $3, $4, $5, $6)",
                key(row),
                key(tenant),
                name,
                _owner(row),
                _BEGINNING - timedelta(minutes=number),
                key(f"{tenant}/{ACCOUNTS[number]}"),
            )


def _owner(row: str) -> UUID | None:
    return key(OWNED_BY[row]) if row in OWNED_BY else None


def versioned() -> dict[UUID, str]:
    """Name the register of each row that carries a version."""
    rows = [f"{tenant}/{name}" for tenant in TENANTS for name in (*ACCOUNTS, *OPPORTUNITIES)]
    return {key(row): row for row in rows} | {
        key(tenant): f"{tenant}/settings" for tenant in TENANTS
    }


# -- leads -----------------------------------------------------------------------------------------


class Settled:
    """How many batches of leads of each tenant everybody must know of by now: a few bytes that all
    processes share."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * len(TENANTS)))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 8 * len(TENANTS))

    def __getitem__(self, tenant: str) -> int:
        found: int = struct.unpack_from("q", self._shared, 8 * TENANTS.index(tenant))[0]
        return found

    def __setitem__(self, tenant: str, batches: int) -> None:
        struct.pack_into("q", self._shared, 8 * TENANTS.index(tenant), batches)

    def close(self) -> None:
        """Let go of the memory."""
        self._shared.close()


def lead(tenant: str, number: int) -> str:
    """Name the register of a lead."""
    return f"{tenant}/lead{number}"


def contact(tenant: str, number: int) -> str:
    """Name the register of the contact that a lead becomes."""
    return f"{tenant}/contact{number}"


def window(settled: int) -> range:
    """Number the leads that reads look at."""
    return range(max(0, settled - WINDOW) * BATCH, settled * BATCH)


def fate(number: int) -> str:
    """Say what is to become of a lead."""
    return FATES[number % len(FATES)]


# -- reads -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """A request, and how its answer is read. ``name`` says what was asked; an answer that fits it
    is told by the same name."""

    name: str
    path: str
    user: User
    tenant: str
    judge: Judge
    fixed: bool = True
    """Whether what the answer means depends on nothing but its body."""
    weight: float = 1.0
    level: Level = Level.STRICT
    known: dict[bytes, tuple[Values, str]] = field(default_factory=dict, repr=False, compare=False)

    def read(self, body: bytes, settled: int) -> tuple[Values, str]:
        """Return the versions that a body shows, and what it says that it is."""
        found = self.known.get(body) if self.fixed else None
        if found is None:
            values, problem = self.judge(orjson.loads(body)["data"], settled)
            found = values, self.name if problem is None else f"{self.name}, but {problem}"
            if self.fixed:
                if len(self.known) > 64:
                    self.known.clear()
                self.known[body] = found
        return found

    def slack_s(self, headers: Mapping[bytes, bytes]) -> float:
        """Return how many seconds an answer with these headers may be older than a fresh one."""
        if self.level is Level.TTL:
            return VALUE_TTL_S + float(headers[MADE_IN]) + KEPT_IN_S
        return BOUND_S if self.level is Level.BOUNDED else 0.0


def queries() -> list[Query]:
    """List everything that is read: of the same rows by several users, as lists, records, searches,
    of several modules."""
    found: list[Query] = []
    for user, tenant in (
        *((admin, tenant) for tenant, admin in ADMINS.items()),
        (EMPLOYEE, "c"),
        (SUPERADMIN, "a"),
    ):
        found += _queries_of(user, tenant)
    return found


def _queries_of(user: User, tenant: str) -> Iterator[Query]:
    accounts, opportunities = (_visible(user, tenant, names) for names in (ACCOUNTS, OPPORTUNITIES))
    suffix = f"tenant_id={tenant}" if user.tenant is None else ""

    def query(
        path: str,
        judge: Judge,
        *,
        level: Level = Level.STRICT,
        fixed: bool = True,
        weight: float = 1.0,
    ) -> Query:
        full = path if not suffix else f"{path}{'&' if '?' in path else '?'}{suffix}"
        return Query(
            f"{user.name} {tenant} {path}", full, user, tenant, judge, fixed, weight, level
        )

    detail = f"/api/accounts/{key(f'{tenant}/{ACCOUNTS[0]}')}"
    yield query("/api/accounts", _list(tenant, "accounts", accounts), weight=12)
    yield query(detail, _detail(tenant, "account", ACCOUNTS[0]), level=Level.BOUNDED, weight=12)
    yield query(
        "/api/opportunities",
        _list(tenant, "opportunities", opportunities),
        level=Level.BOUNDED,
        weight=4,
    )
    yield query(VALUE, _list(tenant, "accounts", accounts), level=Level.TTL, weight=2)
    yield query("/api/reports/dashboard-bundle", _dashboard(tenant, accounts, opportunities))
    if user.role != "admin":
        return
    yield query("/api/accounts?limit=2", _list(tenant, "accounts", accounts[:2], limit=2), weight=8)
    yield query("/api/accounts?sort=name&limit=20", _list(tenant, "accounts", accounts, limit=20))
    yield query("/api/accounts/search?q=ACC", _list(tenant, "accounts", accounts, limit=25))
    yield query(
        f"/api/opportunities/{key(f'{tenant}/{OPPORTUNITIES[0]}')}",
        _detail(tenant, "opportunity", OPPORTUNITIES[0]),
    )
    yield query("/api/settings", _settings(tenant))
    yield query("/api/leads?limit=200", _leads(tenant), fixed=False, weight=0.5)
    yield query("/api/contacts?limit=200", _contacts(tenant), fixed=False, weight=0.5)


def _visible(user: User, tenant: str, names: Sequence[str]) -> list[str]:
    owners = {name: OWNED_BY.get(f"{tenant}/{name}") for name in names}
    return [name for name in names if user is not EMPLOYEE or owners[name] in (None, user.name)]


def _list(tenant: str, plural: str, names: Sequence[str], *, limit: int = 50) -> Judge:
    def judge(data: dict[str, Any], settled: int) -> tuple[Values, str | None]:
        values, problem = _versions(data[plural], tenant, names)
        if (data["limit"], data["offset"]) != (limit, 0):
            problem = f"limit {data['limit']}, offset {data['offset']}"
        return values, problem

    return judge


def _detail(tenant: str, singular: str, name: str) -> Judge:
    return lambda data, settled: _versions([data[singular]], tenant, [name])


def _dashboard(tenant: str, accounts: Sequence[str], opportunities: Sequence[str]) -> Judge:
    def judge(data: dict[str, Any], settled: int) -> tuple[Values, str | None]:
        values, problem = _versions(data["latest"]["accounts"], tenant, accounts)
        more, other = _versions(data["latest"]["opportunities"], tenant, opportunities)
        return {**more, **values}, problem or other

    return judge


def _settings(tenant: str) -> Judge:
    def judge(data: dict[str, Any], settled: int) -> tuple[Values, str | None]:
        found = data["settings"]
        return {f"{tenant}/settings": found["v"]}, None if found[
            "called"
        ] == tenant else f"of {found['called']}"

    return judge


def _leads(tenant: str) -> Judge:
    def judge(data: dict[str, Any], settled: int) -> tuple[Values, str | None]:
        there = {row["id"] for row in data["leads"]}
        values = {
            lead(tenant, n): 1 if str(key(lead(tenant, n))) in there else 2 for n in window(settled)
        }
        return values, _foreign(data["leads"], tenant) or _not_paged(data)

    return judge


def _contacts(tenant: str) -> Judge:
    def judge(data: dict[str, Any], settled: int) -> tuple[Values, str | None]:
        came_from = {row.get("converted_from_lead_id") for row in data["contacts"]}
        values = {
            contact(tenant, n): int(str(key(lead(tenant, n))) in came_from)
            for n in window(settled)
            if fate(n) == "convert"
        }
        return values, _foreign(data["contacts"], tenant) or _not_paged(data)

    return judge


def _versions(
    rows: Sequence[Mapping[str, Any]], tenant: str, names: Sequence[str]
) -> tuple[Values, str | None]:
    """Read the versions of the rows that must be there (0 for one that is not), and of the accounts
    that they name."""
    expected = {str(key(f"{tenant}/{name}")): f"{tenant}/{name}" for name in names}
    values = dict.fromkeys(expected.values(), 0)
    problem = _foreign(rows, tenant)
    for row in rows:
        if row["id"] not in expected:
            problem = f"with a row {row['id']}"
            continue
        values[expected[row["id"]]] = row["v"]
        if row.get("account_name"):
            name, version = row["account_name"].split()
            values[f"{tenant}/{name}"] = int(version)
    return values, problem


def _foreign(rows: Sequence[Mapping[str, Any]], tenant: str) -> str | None:
    of = {row["tenant_id"] for row in rows} - {str(key(tenant))}
    return f"with rows of {', '.join(sorted(of))}" if of else None


def _not_paged(data: Mapping[str, Any]) -> str | None:
    return (
        None
        if (data["limit"], data["offset"]) == (200, 0)
        else f"limit {data['limit']}, offset {data['offset']}"
    )
