"""Roles and permissions of operators and tenant admins. Pure.

The application's authentication creates an ``Access``; every method of ``ops/admin.py`` takes one
and enforces it.
"""

from enum import StrEnum

import msgspec

from respcache.core.errors import AccessRefused, InvalidOperation, NotFound
from respcache.core.keys import SHARED, check_tenant


class Role(StrEnum):
    """A set of permissions."""

    VIEWER = "viewer"
    """Read everything within reach, except the bodies of responses."""
    OPERATOR = "operator"
    """Also purge, switch, and reveal a body."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """The permissions of a signed-in user. ``tenant`` is the only tenant within reach, exactly as
    the resolver spells it; None means all tenants."""

    name: str
    role: Role
    tenant: str | None = None

    def __post_init__(self) -> None:
        if self.role not in tuple(Role):
            raise InvalidOperation(f"role {self.role!r} must be one of {', '.join(Role)}")
        if self.tenant is not None and (self.tenant == SHARED or not _is_tenant(self.tenant)):
            raise InvalidOperation(
                f"tenant {self.tenant!r} of an access must be the id of one tenant"
            )

    def within(self, tenant: str | None) -> str | None:
        """Return the given tenant, else the only one within reach, else None for all.

        Raises ``NotFound`` for a tenant that is not within reach, whether it exists or not.
        """
        if self.tenant is not None and tenant not in (None, self.tenant):
            raise NotFound(f"no tenant {tenant!r}")
        if tenant is not None and not _is_tenant(tenant):
            raise NotFound(f"no tenant {tenant!r}")
        return self.tenant if tenant is None else tenant

    def demand_operator(self, what: str) -> None:
        """Raise ``AccessRefused`` unless the role is operator."""
        if self.role != Role.OPERATOR:
            raise AccessRefused(f"{what} requires the role {Role.OPERATOR}")

    def demand_everything(self, what: str) -> None:
        """Raise ``AccessRefused`` unless all tenants are within reach."""
        if self.tenant is not None:
            raise AccessRefused(f"{what} concerns all tenants")


def _is_tenant(tenant: str) -> bool:
    try:
        check_tenant(tenant)
    except ValueError:
        return False
    return True
