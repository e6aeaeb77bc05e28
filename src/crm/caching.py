"""What is cached: one line per module and special route. The tables are those that the handlers
read; writes to them invalidate the answers.

Writes are seen at the database engine and by triggers, which the next migration installs for a
table that is new here (``alembic revision --autogenerate``); until then what reads it is not
cached. Lists of rows that show the name of their account read ``accounts`` too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from crm.auth import CrmResolver, TenantScope
from crm.models import Base
from respcache.core.policy import VariesBy
from respcache.decorators import (
    cache_count,
    cache_detail,
    cache_list,
    cache_settings,
)
from respcache.writes.triggers import Watched, watched

E = TypeVar("E", bound=Callable[..., Any])

TENANT_IS = {"tenants": "id"}
"""Tables whose tenant is in another column than ``tenant_id``."""

SHARED_TABLES = ("tenants",)
"""Tables whose changes also count as changes of data shared by all tenants."""

declared_tables = set(CrmResolver.tables)
"""The tables that answers depend on: those that decide who sees what, and those of every line
below."""


def today(scope: TenantScope) -> str:
    """Vary by the date where the tenant is: what is due today is overdue after midnight."""
    return scope.today().isoformat()


@dataclass(frozen=True)
class Cached:
    """How the answers of a module are cached."""

    module: str
    tables: tuple[str, ...]
    varies_by: VariesBy | None = None

    def __post_init__(self) -> None:
        declared_tables.update(self.tables)

    def list(self, endpoint: E) -> E:
        """Cache a list."""
        return cache_list(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)

    def detail(self, endpoint: E) -> E:
        """Cache a record."""
        return cache_detail(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)

    def count(self, endpoint: E) -> E:
        """Cache a count."""
        return cache_count(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)

    def settings(self, endpoint: E) -> E:
        """Cache settings."""
        return cache_settings(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)


def watched_tables() -> list[Watched]:
    """Say how the tables that answers depend on are to be watched: what migrations are compared
    with."""
    return watched(Base.metadata, declared_tables, tenant_is=TENANT_IS, shared=SHARED_TABLES)


accounts = Cached("accounts", ("accounts",))
accounts_people = Cached("accounts", ("accounts", "contacts", "leads")).list
leads = Cached("leads", ("leads", "accounts"))
contacts = Cached("contacts", ("contacts", "accounts"))
bizdevsources = Cached("bizdevsources", ("bizdev_sources", "accounts"))
opportunities = Cached("opportunities", ("opportunities", "accounts", "contacts", "leads"))
opportunities_stats = Cached("opportunities", ("opportunities",)).count
activities = Cached("activities", ("activities",), today)
documents = Cached("documents", ("documents", "accounts"))
tasks = Cached("tasks", ("tasks",))
settings = Cached("settings", ("tenants",)).settings
dashboard = Cached(
    "dashboard",
    (
        "accounts",
        "leads",
        "contacts",
        "bizdev_sources",
        "opportunities",
        "activities",
        "documents",
        "tasks",
    ),
    today,
).list
