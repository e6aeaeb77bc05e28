"""Sign-in to the cache's dashboard at ``/cache`` with the CRM's own users.

Superadmins operate the whole cache, admins their tenant's part; managers may view their tenant's
statistics; employees have no access.
"""

from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from crm.auth import CrmResolver, Sessions, TenantScope, log_in, tenants
from crm.errors import AccessDenied, ApiError
from crm.routes.auth import LoginLimit
from respcache.ops.access import Access, Role
from respcache.ops.dashboard import TooManyAttempts

ROLES = {"superadmin": Role.OPERATOR, "admin": Role.OPERATOR, "manager": Role.VIEWER}


class CrmAuthBackend:
    """Authenticates users of the dashboard by the CRM's passwords and tokens."""

    def __init__(
        self,
        engine: AsyncEngine,
        sessions: Sessions,
        *,
        resolver: CrmResolver,
        limit: LoginLimit,
        token_hours: float,
    ) -> None:
        self._engine = engine
        self._sessions = sessions
        self._resolver = resolver
        self._limit = limit
        self._token_hours = token_hours

    async def sign_in(self, name: str, password: str, address: str) -> str | None:
        """See ``AuthBackend.sign_in``."""
        try:
            self._limit.attempt(address, name)
            user = await log_in(self._sessions, name.replace("\x00", ""), password)
        except AccessDenied:
            return None
        except ApiError as error:
            raise TooManyAttempts(error.extra["retry_after"]) from None
        self._limit.succeeded(address, name)
        token = self._resolver.token(user, hours=self._token_hours)
        return token if await self.access(token) else None

    async def access(self, token: str) -> Access | None:
        """See ``AuthBackend.access``. One statement."""
        try:
            scope = await self._resolver.scope(self._resolver.claim_of(token))
        except AccessDenied:
            return None
        return access_of(scope)

    async def tenant_names(self) -> Mapping[str, str]:
        """See ``AuthBackend.tenant_names``. One statement."""
        statement = select(tenants.id, tenants.slug).order_by(tenants.slug)
        async with self._engine.connect() as connection:
            return {str(row.id): row.slug for row in await connection.execute(statement)}


def access_of(scope: TenantScope) -> Access | None:
    """Return a user's access to the cache; None for no access."""
    role = ROLES.get(scope.role)
    if role is None or (scope.role != "superadmin" and scope.tenant is None):
        return None
    tenant = None if scope.role == "superadmin" else scope.tenant
    return Access(name=scope.email, role=role, tenant=tenant)
