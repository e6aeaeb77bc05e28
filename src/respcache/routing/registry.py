"""What the routes of all wrapped applications cache: their modules and tables."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from respcache.core import tokens
from respcache.core.errors import ConfigurationError
from respcache.core.identity import Resolver
from respcache.routing.table import Route


class TableCheck(Protocol):
    """Raises ``ConfigurationError`` for tables on which a cached read may not depend."""

    def __call__(self, tables: Iterable[str], /, *, by_tenant: bool) -> None: ...


class Registry:
    """The modules and tables of all cached routes. Filled at start-up."""

    def __init__(self, resolver: Resolver) -> None:
        self.modules: set[str] = set()
        self.tables: set[str] = set()
        self._resolver = resolver
        self._readers: dict[str, set[str]] = {}  # table -> modules whose responses depend on it
        self._checks: list[TableCheck] = []

    def register(self, routes: Sequence[Route]) -> None:
        """Add what these routes cache, and check it. Raises ``ConfigurationError``."""
        for route in routes:
            if route.policy is not None:
                if tokens.HEADER in route.key_headers:
                    raise ConfigurationError(
                        f"GET {route.template} declares the header {tokens.HEADER.decode()}: "
                        f"{RESERVED}"
                    )
                self.modules.add(route.policy.module)
                self.tables.update(route.policy.tables)
                for table in route.policy.tables:
                    self._readers.setdefault(table, set()).add(route.policy.module)
            if route.invalidation is not None:
                self.modules.update(route.invalidation.modules)
        for check in self._checks:
            check(self.tables, by_tenant=True)
            check(self._resolver.tables, by_tenant=False)

    def readers(self, tables: Iterable[str]) -> set[str]:
        """Return the modules whose responses depend on any of these tables."""
        return set().union(*(self._readers.get(name, ()) for name in tables))

    def add_check(self, check: TableCheck) -> None:
        """Run this check on the declared tables at start-up."""
        self._checks.append(check)


RESERVED = "no response may depend on it, as plans ignore it; use another name"
