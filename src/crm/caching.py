"""What is cached: one line per module and special route.

The tables are those that the handlers read; writes to them invalidate the cached responses. Writes
are detected at the database engine and by triggers. The next migration (``alembic revision
--autogenerate``) installs triggers for a table that is new here; until then, responses that read
it are not cached. Lists that show the name of an account also read ``accounts``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from crm.auth import CrmResolver, TenantScope
from crm.models import Base
from respcache.core.policy import VariesBy
from respcache.decorators import cache_count, cache_detail, cache_list, cache_settings
from respcache.writes.triggers import Watched, watched

E = TypeVar("E", bound=Callable[..., Any])

TENANT_IS = {"tenants": "id"}
"""Tables whose tenant column is not ``tenant_id``."""

SHARED_TABLES = ("tenants",)
"""Tables whose writes also invalidate data that all tenants share."""

declared_tables = set(CrmResolver.tables)
"""All tables that cached responses depend on: those of visibility, and those of each line below."""


def today(scope: TenantScope) -> str:
    """Vary by the date in the tenant's time zone: what is due today is overdue after midnight."""
    return scope.today().isoformat()


@dataclass(frozen=True)
class Cached:
    """How the responses of a module are cached: decorators for its endpoints."""

    module: str
    tables: tuple[str, ...]
    varies_by: VariesBy | None = None

    def __post_init__(self) -> None:
        declared_tables.update(self.tables)

    def list(self, endpoint: E) -> E:
        """Cache a list."""
        return cache_list(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)

    def detail(self, endpoint: E) -> E:
        """Cache a single record."""
        return cache_detail(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)

    def count(self, endpoint: E) -> E:
        """Cache a count."""
        return cache_count(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)

    def settings(self, endpoint: E) -> E:
        """Cache settings."""
        return cache_settings(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)


def watched_tables() -> list[Watched]:
    """Return how the tables above are watched. Migrations are compared with it."""
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
