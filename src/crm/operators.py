"""Who of the CRM's people may look at the cache: the gate of the dashboard at ``/cache``.

A superadmin operates everything, a tenant's admin what is the tenant's; a manager looks at the
tenant's figures. Nobody else.
"""

from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from crm.auth import CrmResolver, Sessions, TenantScope, log_in, tenants
from crm.errors import ApiError, ErrorResponse
from crm.routes.auth import LoginLimit
from respcache.ops.access import Access, Role
from respcache.ops.dashboard import TooManyAttempts

MAY = {"superadmin": Role.OPERATOR, "admin": Role.OPERATOR, "manager": Role.VIEWER}


class CrmAuthBackend:
    """The CRM's users, with the passwords and the tokens that they have anyway."""

    def __init__(
        self,
        engine: AsyncEngine,
        sessions: Sessions,
        resolver: CrmResolver,
        limit: LoginLimit,
        *,
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
        except ErrorResponse:
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
        except ErrorResponse:
            return None
        return access_of(scope)

    async def tenant_names(self) -> Mapping[str, str]:
        """See ``AuthBackend.tenant_names``."""
        everyone = select(tenants.id, tenants.slug).order_by(tenants.slug)
        async with self._engine.connect() as connection:
            return {str(row.id): row.slug for row in await connection.execute(everyone)}


def access_of(scope: TenantScope) -> Access | None:
    """Return what somebody may do with the cache, if anything."""
    role = MAY.get(scope.role)
    if role is None or (scope.role != "superadmin" and scope.tenant is None):
        return None
    return Access(
        name=scope.email, role=role, tenant=None if scope.role == "superadmin" else scope.tenant
    )
