"""What is cached: one line per module and special route. The tables are those that the handlers read; writes to them
invalidate the answers.

Nothing else has to be remembered: writes are seen at the database engine. Lists of rows that show the name of their account
read ``accounts`` too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from crm.auth import TenantScope
from respcache.fastapi import VariesBy, cache_count, cache_detail, cache_list, cache_settings

E = TypeVar("E", bound=Callable[..., Any])


def today(scope: TenantScope) -> str:
    """Vary by the date where the tenant is: what is due today is overdue after midnight."""
    return scope.today().isoformat()


@dataclass(frozen=True)
class Cached:
    """How the list and the records of a module are cached."""

    module: str
    tables: tuple[str, ...]
    varies_by: VariesBy | None = None

    def list(self, endpoint: E) -> E:
        """Cache a list."""
        return cache_list(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)

    def detail(self, endpoint: E) -> E:
        """Cache a record."""
        return cache_detail(self.module, tables=self.tables, varies_by=self.varies_by)(endpoint)


accounts = Cached("accounts", ("accounts",))
accounts_people = cache_list("accounts", tables=["accounts", "contacts", "leads"])
leads = Cached("leads", ("leads", "accounts"))
contacts = Cached("contacts", ("contacts", "accounts"))
bizdevsources = Cached("bizdevsources", ("bizdev_sources", "accounts"))
opportunities = Cached("opportunities", ("opportunities", "accounts", "contacts", "leads"))
opportunities_stats = cache_count("opportunities", tables=["opportunities"])
activities = Cached("activities", ("activities",), today)
documents = Cached("documents", ("documents", "accounts"))
tasks = Cached("tasks", ("tasks",))
settings = cache_settings("settings", tables=["tenants"])
dashboard = cache_list(
    "dashboard",
    tables=["accounts", "leads", "contacts", "bizdev_sources", "opportunities", "activities", "documents", "tasks"],
    varies_by=today,
)
