"""Who may see and do what with a running cache. Pure.

Whoever signs people in makes an ``Access``; every method of ``ops/admin.py`` takes one and enforces
it.
"""

from enum import StrEnum

import msgspec

from respcache.core.errors import AccessRefused, InvalidOperation, NotFound
from respcache.core.keys import SHARED, check_tenant


class Role(StrEnum):
    """What somebody may do."""

    VIEWER = "viewer"
    """Look at everything within reach but the bodies of answers."""
    OPERATOR = "operator"
    """Act, too: purge, switch, reveal a body."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody who was signed in. ``tenant`` is the one within reach, letter for letter as the
    resolver spells it; None: all."""

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
        """Return the tenant that a question is about: the one that is named, else the only one
        within reach, else None for all.

        Raises ``NotFound`` for any tenant that is not within reach, whether it exists or not.
        """
        if self.tenant is not None and tenant not in (None, self.tenant):
            raise NotFound(f"no tenant {tenant!r}")
        if tenant is not None and not _is_tenant(tenant):
            raise NotFound(f"no tenant {tenant!r}")
        return self.tenant if tenant is None else tenant

    def demand_operator(self, what: str) -> None:
        """Raise ``AccessRefused`` for whoever may only look."""
        if self.role != Role.OPERATOR:
            raise AccessRefused(f"{what} needs the role {Role.OPERATOR}")

    def demand_everything(self, what: str) -> None:
        """Raise ``AccessRefused`` for whoever reaches one tenant only."""
        if self.tenant is not None:
            raise AccessRefused(f"{what} concerns all tenants")


def _is_tenant(tenant: str) -> bool:
    try:
        check_tenant(tenant)
    except ValueError:
        return False
    return True
