"""Who asks: runs the application's resolver and memoises what it read from the database, with a
certificate.

A memoised scope is judged in the same round trip as the entry that is looked up under it. It is
data like any other: a change of team, role or visibility bumps the tables it was read from, and
then it is read anew before a key is built from it. Callers share the reading of one scope by the
same rule as they share fills.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from respcache.core.generations import FLOOR, Certificate, GenerationView, Verdict, table_tag
from respcache.core.identity import Claim, Resolver, Scope
from respcache.core.keys import check_tenant
from respcache.read.flights import Flights

MAX_SCOPES = 10_000


@dataclass(frozen=True, slots=True)
class CachedScope:
    """A scope with the certificate captured before it was read."""

    scope: Scope
    certificate: Certificate


class ScopeCache:
    """The memo of scopes of one process, least recently used out first."""

    def __init__(self, resolver: Resolver) -> None:
        self.resolver = resolver
        self.tags: tuple[str, ...] = (FLOOR, *map(table_tag, resolver.tables))
        self._known: OrderedDict[Hashable, CachedScope] = OrderedDict()
        self._reading: Flights[CachedScope] = Flights()

    def forget(self) -> None:
        """Drop all scopes; they are read again when they are needed."""
        self._known.clear()

    def recall(self, claim: Claim) -> CachedScope | None:
        """Return what is known of the claim, still to be judged."""
        known = self._known.get(claim.key)
        if known is not None:
            self._known.move_to_end(claim.key)
        return known

    def peek(self, claim: Claim) -> CachedScope | None:
        """Return what ``recall`` would, without using it."""
        return self._known.get(claim.key)

    def judge(self, known: CachedScope, view: GenerationView) -> bool:
        """Whether the scope is still what the database says, in this view of the claim's home
        generation."""
        return view.judge(known.certificate, self.tags) is Verdict.VALID

    async def read(
        self, claim: Claim, *, view: GenerationView, certificate: Certificate
    ) -> CachedScope:
        """Read the scope from the database under this capture. Raises what the resolver raises;
        failures are not shared."""
        flight = self._reading.join(claim.key, view=view, tags=self.tags)
        if flight is not None:
            shared = await flight.wait()
            if shared is not None:
                return shared
        else:
            flight = self._reading.begin(claim.key, certificate)
        known = None
        try:
            scope = await self.resolver.scope(claim)
            if scope.tenant is not None:
                check_tenant(scope.tenant)
            known = CachedScope(scope, certificate)
            self._remember(claim.key, known)
            return known
        finally:
            flight.complete(known)

    def _remember(self, key: Hashable, known: CachedScope) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > MAX_SCOPES:
            self._known.popitem(last=False)
