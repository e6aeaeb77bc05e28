"""Cached scopes: runs the application's resolver, and keeps what it read with a certificate.

A cached scope is judged in the same round trip as the entry that is looked up under it. It is data
like any other: a change of team, role or visibility bumps the tables that it was read from. The
scope is then read again before a key is built from it. Callers share the reading of one scope by
the same rule by which they share fills.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from respcache.core.generations import FLOOR, Certificate, GenerationView, table_tag
from respcache.core.identity import Claim, Resolver, Scope
from respcache.core.keys import check_tenant
from respcache.read.flights import Flights

MAX_SCOPES = 10_000


@dataclass(frozen=True, slots=True)
class CachedScope:
    """A scope with the certificate that was captured before it was read."""

    scope: Scope
    certificate: Certificate


class ScopeCache:
    """The cached scopes of one process; evicts the least recently used."""

    def __init__(self, resolver: Resolver) -> None:
        self.resolver = resolver
        self.tags: tuple[str, ...] = (FLOOR, *map(table_tag, resolver.tables))
        """What every scope depends on."""
        self._scopes: OrderedDict[Hashable, CachedScope] = OrderedDict()
        self._flights: Flights[CachedScope] = Flights()

    def __len__(self) -> int:
        return len(self._scopes)

    def clear(self) -> None:
        """Drop all scopes."""
        self._scopes.clear()

    def get(self, claim: Claim) -> CachedScope | None:
        """Return the claim's cached scope, which must still be judged, or None."""
        cached = self._scopes.get(claim.key)
        if cached is not None:
            self._scopes.move_to_end(claim.key)
        return cached

    def peek(self, claim: Claim) -> CachedScope | None:
        """Return what ``get`` would return, without counting a use."""
        return self._scopes.get(claim.key)

    async def read(
        self, claim: Claim, *, view: GenerationView, certificate: Certificate
    ) -> CachedScope:
        """Read the scope from the database under this certificate.

        Raises what the resolver raises; failures are not shared.
        """
        flight = self._flights.join(claim.key, view=view, tags=self.tags)
        if flight is not None:
            shared = await flight.wait()
            if shared is not None:
                return shared
        else:
            flight = self._flights.begin(claim.key, certificate)
        cached = None
        try:
            scope = await self.resolver.scope(claim)
            if scope.tenant is not None:
                check_tenant(scope.tenant)
            cached = CachedScope(scope, certificate)
            self._put(claim.key, cached)
            return cached
        finally:
            flight.complete(cached)

    def _put(self, key: Hashable, cached: CachedScope) -> None:
        self._scopes[key] = cached
        self._scopes.move_to_end(key)
        while len(self._scopes) > MAX_SCOPES:
            self._scopes.popitem(last=False)
