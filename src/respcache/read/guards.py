"""What else a read depends on: coverage, role, switches, blocked tenants, the serving lease.

It gathers the ``Caller`` that ``core/decision.py`` judges, and decides nothing itself.
"""

from respcache.core.decision import Caller
from respcache.core.identity import Claim
from respcache.core.policy import Policy
from respcache.core.serving_lease import ServingLease
from respcache.read.plans import ScopedPlan
from respcache.read.scopes import CachedScope, ScopeCache
from respcache.writes.invalidator import Invalidator
from respcache.writes.relay import OutboxRelay
from respcache.writes.switches import Switches


class Guards:
    """What this process knows of them now. ``relay`` is None without an outbox."""

    def __init__(
        self,
        *,
        enabled: bool,
        switches: Switches,
        invalidator: Invalidator,
        relay: OutboxRelay | None,
        scopes: ScopeCache,
    ) -> None:
        self.relay = relay
        self._enabled = enabled
        self._switches = switches
        self._invalidator = invalidator
        self._blocked = invalidator.blocked_tenants
        self._scopes = scopes

    @property
    def enabled(self) -> bool:
        """Whether this process reads from the cache at all."""
        return self._enabled and not self._switches.everything

    def is_off(self, module: str) -> bool:
        """Whether the cache or this module is switched off, whatever the tenant."""
        return not self.enabled or module in self._switches.modules

    @property
    def restricted(self) -> bool:
        """Whether anything is switched off or any tenant is blocked."""
        return bool(self._switches.off or self._blocked)

    @property
    def lease(self) -> ServingLease | None:
        """The serving lease, to be read before a view is requested: a lease granted later covers
        writes that the view does not show. None without an outbox."""
        return None if self.relay is None else self.relay.lease

    @property
    def tables(self) -> object:
        """The set of watched tables; a new object whenever it changes. None without an outbox."""
        return None if self.relay is None else self.relay.coverage.tables

    def covers(self, policy: Policy) -> bool:
        """Whether this process sees every write to the tables of the policy and the resolver."""
        relay = self.relay
        return relay is None or (
            relay.covers(policy.tables) and relay.covers(self._scopes.resolver.tables)
        )

    def caller(self, policy: Policy, claim: Claim, cached_scope: CachedScope) -> Caller:
        """Return the facts about the caller of a request, before a key is built."""
        scope = cached_scope.scope
        permitted = scope.tenant is None or self._scopes.resolver.permits(scope, policy.rule)
        return self._caller(
            scope.tenant, policy, permitted, owner_tenant=claim.owner_tenant, cached=cached_scope
        )

    def caller_of(self, scoped: ScopedPlan, *, in_memory: bool = False) -> Caller:
        """Return the facts about the caller of a scoped plan, whose role is already decided.

        An entry ``in_memory`` that needs no view needs no coverage either (level ``ttl``).
        """
        return self._caller(
            scoped.tenant,
            scoped.policy,
            True,
            owner_tenant=scoped.owner_tenant,
            cached=scoped.cached_scope,
            covered=in_memory and not scoped.needs_view,
        )

    def _caller(
        self,
        tenant: str | None,
        policy: Policy,
        permitted: bool,
        *,
        owner_tenant: str,
        cached: CachedScope | None,
        covered: bool = False,
    ) -> Caller:
        switches, invalidator = self._switches, self._invalidator
        return Caller(
            tenant,
            covered=covered or self.covers(policy),
            permitted=permitted,
            is_off=bool(switches.off) and switches.is_off(tenant or "", policy.module),
            blocked=bool(self._blocked)
            and (invalidator.is_blocked(tenant or "") or invalidator.is_blocked(owner_tenant)),
            certificate=None if cached is None else cached.certificate,
            tags=() if cached is None else self._scopes.tags,
        )
