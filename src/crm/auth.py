"""Authentication and visibility: the resolver that the cache and every handler share.

The token names the user (``sub``) and the tenant; role, team and visibility come from the
database. ``CrmResolver.scope`` returns the very object that ``db.Rows`` filters by.
"""

import asyncio
import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID
from zoneinfo import ZoneInfo

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import APIKeyCookie, HTTPBearer
from sqlalchemy import bindparam, func, or_, select
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from crm.errors import AccessDenied
from crm.models import ROLES, Employee, Team, Tenant, as_uuid, now
from respcache import Claim, RequestHead, Scope, bind_scope
from respcache import current_scope as resolved_scope
from respcache.core.keys import SHARED

ALGORITHM = "HS256"
UNAUTHENTICATED = "Authentication required"
NO_TENANT = "User not assigned to any tenant. Contact administrator."
OTHER_TENANT = "Access denied: You do not have permission to access this tenant's data."
WRITE_NEEDS_TENANT = "Superadmin write operations require a tenant_id to be specified"
WRONG_LOGIN = "Wrong email or password"
DEFAULT_TIMEZONE = "UTC"
MAX_VERIFIED = 10_000
"""Tokens whose verified signature is cached."""

# every request runs this statement: it is built once, of plain tables, without the ORM
employees, teams, tenants = (model.__table__.c for model in (Employee, Team, Tenant))
_TENANT = (
    tenants.id.label("tenant"),
    tenants.slug,
    tenants.status.label("tenant_status"),
    tenants.settings,
)
_USER = (
    select(
        employees.id,
        employees.tenant_id,
        employees.email,
        employees.role,
        employees.team_id,
        employees.status,
        *_TENANT,
    )
    .select_from(Employee.__table__.outerjoin(Tenant.__table__, tenants.id == employees.tenant_id))
    .where(employees.id == bindparam("user"))
)

_hasher = PasswordHasher()
_DUMMY_HASH = PasswordHasher().hash("no user has this password")
Sessions = async_sessionmaker[AsyncSession]


@dataclass(frozen=True, slots=True)
class TenantScope(Scope):
    """A caller within a tenant.

    ``visible_ids`` are the employees whose rows the caller sees besides unassigned rows; None means
    all. ``timezone`` is the tenant's (an IANA name); it decides when a day ends.
    """

    user_id: UUID
    email: str
    role: str
    visible_ids: tuple[UUID, ...] | None
    timezone: str

    def today(self) -> date:
        """Return the current date in the tenant's time zone."""
        return now().astimezone(ZoneInfo(self.timezone)).date()


class RoleGuard:
    """A dependency that requires at least a role. Cached routes declare it as ``rule``."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.__name__ = f"require_{role}"

    def __repr__(self) -> str:
        return f"RoleGuard({self.role!r})"

    async def __call__(self, scope: "CurrentScope") -> TenantScope:
        """Return the scope. Raises 403."""
        if not self.allows(scope):
            raise AccessDenied(403, f"Access denied: this needs the role {self.role}", code="role")
        return scope

    def allows(self, scope: TenantScope) -> bool:
        """Return whether the scope's role is high enough."""
        return ROLES.index(scope.role) >= ROLES.index(self.role)


class CrmResolver:
    """Resolves user, tenant and role.

    A scope depends on the tenant's generation, that of a superadmin on the SHARED generation.
    """

    tables = ("employees", "teams", "tenants")
    headers = ("authorization", "cookie", "x-tenant-id")

    def __init__(self, engine: AsyncEngine, secret: str) -> None:
        self._engine = engine
        self._verified: dict[str, dict[str, Any]] = {}
        self._secret = secret
        self.stands_for = frozenset({current_scope})

    def claim(self, head: RequestHead, tenant_in_body: str | None = None) -> Claim:
        """Verify the token. The requested tenant comes from body, query, path or header, in this
        order."""
        authorization = head.header("authorization") or ""
        scheme, _, token = authorization.partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else head.cookie("access_token")
        path_tenant = head.path_params.get("tenant_id")
        wanted = (
            tenant_in_body
            or head.query("tenant_id")
            or path_tenant
            or head.header("x-tenant-id")
            or None
        )
        return self.claim_of(given, wanted)

    def claim_of(self, token: str | None, wanted: str | None = None) -> Claim:
        """Verify a token. ``wanted`` is the requested tenant (UUID or slug)."""
        payload = self._verify(token)
        owner_tenant = payload.get("tenant_id") or SHARED
        return Claim(
            (payload["sub"], payload.get("tenant_id"), wanted and wanted.lower()),
            owner_tenant,
            expires_at=payload["exp"],
        )

    async def scope(self, claim: Claim) -> TenantScope:
        """Read user, tenant and visible employees.

        One statement; up to three if visibility is hierarchical. Raises 401, 403 and 404.
        """
        subject, owner_tenant, wanted = claim.key  # type: ignore[misc]
        async with self._engine.connect() as connection:
            user = (await connection.execute(_USER, {"user": UUID(subject)})).one_or_none()
            if (
                user is None
                or user.status != "active"
                or str(user.tenant_id or "") != (owner_tenant or "")
            ):
                raise AccessDenied(401, UNAUTHENTICATED)
            tenant: Any = user
            if user.role == "superadmin":
                tenant = await self._tenant(connection, wanted) if wanted else None
            elif user.tenant_id is None:
                raise AccessDenied(403, NO_TENANT)
            elif user.tenant_status != "active" or (
                wanted and wanted not in (str(user.tenant), user.slug.lower())
            ):
                raise AccessDenied(403, OTHER_TENANT)
            visible = await self._visible(connection, user, tenant)
        return TenantScope(
            tenant=str(tenant.tenant) if tenant else None,
            fingerprint=_fingerprint(visible),
            user_id=user.id,
            email=user.email,
            role=user.role,
            visible_ids=visible,
            timezone=tenant.settings.get("timezone", DEFAULT_TIMEZONE)
            if tenant
            else DEFAULT_TIMEZONE,
        )

    def permits(self, scope: Scope, rule: Any) -> bool:
        """Return whether a ``RoleGuard`` (or no rule) permits the scope."""
        return rule is None or (
            isinstance(rule, RoleGuard) and isinstance(scope, TenantScope) and rule.allows(scope)
        )

    def token(self, user: Employee, *, hours: float) -> str:
        """Return a token for a user."""
        return issue_token(self._secret, user, hours=hours)

    def _verify(self, token: str | None) -> dict[str, Any]:
        """Return the claims of a token. Raises 401.

        The signature is verified once per token, the expiry every time.
        """
        cached = self._verified.get(token or "")
        if cached is not None and cached["exp"] > time.time():
            return cached
        try:
            payload = jwt.decode(
                token or "",
                self._secret,
                algorithms=[ALGORITHM],
                options={"require": ["exp", "sub"]},
            )
            UUID(payload["sub"])
            if payload.get("tenant_id") is not None:
                UUID(payload["tenant_id"])
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
            raise AccessDenied(401, UNAUTHENTICATED) from None
        if len(self._verified) >= MAX_VERIFIED:
            self._verified.clear()
        self._verified[token or ""] = payload
        return payload

    async def _tenant(self, connection: AsyncConnection, wanted: str) -> Any:
        key = as_uuid(wanted)
        match = func.lower(tenants.slug) == wanted if key is None else tenants.id == key
        found = select(*_TENANT).where(match, tenants.status == "active")
        tenant = (await connection.execute(found)).one_or_none() if "\x00" not in wanted else None
        if tenant is None:
            raise AccessDenied(404, "Tenant not found")
        return tenant

    async def _visible(
        self, connection: AsyncConnection, user: Any, tenant: Any
    ) -> tuple[UUID, ...] | None:
        """Return the employees whose rows the user sees; None for all."""
        if (
            tenant is None
            or user.role in ("superadmin", "admin")
            or tenant.settings.get("visibility_mode") != "hierarchical"
        ):
            return None
        if user.team_id is None:
            return (user.id,)
        seen_teams = {user.team_id}
        if user.role == "manager":
            rows = await connection.execute(
                select(teams.id, teams.parent_team_id).where(teams.tenant_id == tenant.tenant)
            )
            seen_teams |= _descendants(user.team_id, (tuple(row) for row in rows))
        seen = or_(employees.team_id.in_(seen_teams), employees.id == user.id)
        return tuple(
            sorted(
                await connection.scalars(
                    select(employees.id).where(employees.tenant_id == tenant.tenant, seen)
                )
            )
        )


async def current_scope(
    request: Request,
    *,
    tenant_id: Annotated[
        str | None,
        Query(description="Tenant, as UUID or slug (default: your own)", max_length=63),
    ] = None,
    x_tenant_id: Annotated[
        str | None, Header(description="Tenant, if the query names none", max_length=63)
    ] = None,
    bearer: Annotated[
        Any, Security(HTTPBearer(auto_error=False, description="Token from POST /api/auth/login"))
    ] = None,
    cookie: Annotated[Any, Security(APIKeyCookie(name="access_token", auto_error=False))] = None,
) -> TenantScope:
    """Return the caller's scope: the one that the cache resolved, else resolve it now."""
    scope = resolved_scope()
    if not isinstance(scope, TenantScope):
        resolver: CrmResolver = request.app.state.resolver
        scope = await resolver.scope(
            resolver.claim(RequestHead(request.scope), await _tenant_in_body(request))
        )
        bind_scope(scope)
    return scope


CurrentScope = Annotated[TenantScope, Depends(current_scope)]


async def writing_scope(scope: CurrentScope) -> TenantScope:
    """Return the scope of a write, which has exactly one tenant. Raises 400."""
    if scope.tenant is None:
        raise AccessDenied(400, WRITE_NEEDS_TENANT, field="tenant_id")
    return scope


WritingScope = Annotated[TenantScope, Depends(writing_scope)]
require_admin = RoleGuard("admin")
require_superadmin = RoleGuard("superadmin")


async def log_in(sessions: Sessions, email: str, password: str) -> Employee:
    """Return the active user with this email and password. Raises 401.

    An unknown email takes as long as a wrong password.
    """
    async with sessions() as session:
        user = await session.scalar(
            select(Employee).where(func.lower(Employee.email) == email.lower())
        )
    stored = user.password_hash if user is not None and user.password_hash else _DUMMY_HASH
    matches = await asyncio.to_thread(_matches, stored, password)
    if user is None or not matches or user.status != "active" or not user.password_hash:
        raise AccessDenied(401, WRONG_LOGIN)
    return user


def hash_password(password: str) -> str:
    """Return the argon2id hash of a password (RFC 9106)."""
    return _hasher.hash(password)


def issue_token(secret: str, user: Employee, *, hours: float) -> str:
    """Return a signed token (JWT, HS256) for a user."""
    expires = datetime.now(UTC) + timedelta(hours=hours)
    tenant = str(user.tenant_id) if user.tenant_id else None
    claims = {
        "sub": str(user.id),
        "email": user.email,
        "role": user.role,
        "tenant_id": tenant,
        "exp": expires,
    }
    return jwt.encode(claims, secret, ALGORITHM)


async def development_token(
    database_url: str, secret: str, *, tenant: str, role: str, hours: float = 12
) -> str:
    """Return a token for the first active user of a role in a tenant (UUID or slug).

    Raises ``LookupError`` if there is none.
    """
    engine = create_async_engine(database_url)
    try:
        async with AsyncSession(engine) as session:
            users = (
                select(Employee)
                .where(Employee.role == role, Employee.status == "active")
                .order_by(Employee.email)
            )
            if role != "superadmin":
                key = as_uuid(tenant)
                match = Tenant.slug == tenant if key is None else Tenant.id == key
                users = users.join(Tenant, Tenant.id == Employee.tenant_id).where(match)
            user = await session.scalar(users.limit(1))
            if user is None:
                known = ", ".join(await session.scalars(select(Tenant.slug).order_by(Tenant.slug)))
                raise LookupError(
                    f"there is no active {role} in tenant {tenant!r}; tenants: {known or 'none'}; "
                    f"roles: {', '.join(ROLES)}"
                )
            return issue_token(secret, user, hours=hours)
    finally:
        await engine.dispose()


async def _tenant_in_body(request: Request) -> str | None:
    """Return ``tenant_id`` of a JSON body; FastAPI itself reports invalid JSON."""
    if request.method in ("GET", "HEAD") or not request.headers.get("content-type", "").startswith(
        "application/json"
    ):
        return None
    try:
        body = await request.json()
    except ValueError:
        return None
    tenant = body.get("tenant_id") if isinstance(body, dict) else None
    return tenant if isinstance(tenant, str) else None


def _descendants(root: UUID, teams: Iterable[tuple[UUID, UUID | None]]) -> set[UUID]:
    """Return the team and all teams below it. Cycles are harmless."""
    children: dict[UUID | None, list[UUID]] = {}
    for team, parent in teams:
        children.setdefault(parent, []).append(team)
    found, pending = set[UUID](), [root]
    while pending:
        team = pending.pop()
        if team not in found:
            found.add(team)
            pending += children.get(team, [])
    return found


def _fingerprint(visible: tuple[UUID, ...] | None) -> bytes:
    """Return bytes that are equal for two callers iff they see the same rows."""
    if visible is None:
        return b"all"
    return hashlib.sha256(b"".join(key.bytes for key in visible)).digest()


def _matches(stored: str, password: str) -> bool:
    try:
        return _hasher.verify(stored, password)
    except (Argon2Error, InvalidHashError):
        return False
