"""Values that the application's own code computes, cached by the same rules as responses.

This is ``Cache.get_or_set``.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar, cast

import msgspec

from respcache.context import Exchange, ReadSet, current
from respcache.core.decision import Bypass
from respcache.core.entry import Entry
from respcache.core.policy import Policy
from respcache.read.fills import Fill, Filler
from respcache.read.lookup import Lookup, LookupResult, as_parameters
from respcache.read.plans import ScopedPlan
from respcache.read.proofs import Proofs
from respcache.telemetry.stats import VALUE, Counters
from respcache.telemetry.tracing import Trace, Tracing

T = TypeVar("T")
Make = Callable[[], Awaitable[T]]


class Values:
    """Looks values up, or has them computed once. One per runtime."""

    def __init__(
        self,
        lookup: Lookup,
        proofs: Proofs,
        filler: Filler,
        *,
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self.tracing = Tracing()
        self._lookup = lookup
        self._proofs = proofs
        self._filler = filler
        self._counters = counters
        self._clock = clock

    async def get(self, tenant: str, policy: Policy, key: Mapping[str, Any], *, make: Make[T]) -> T:
        """Return a tenant's value under this key, cached or computed by ``make``."""
        began, outer = self._clock(), current.get()
        # within a fill the value must be as fresh as the response, whose certificate covers it
        filling = outer is not None and outer.reads is not None
        scoped = self._plan(tenant, policy, key, strict=filling)
        token = None if outer is None else outer.client_token
        proof = await self._proofs.hit(self._proofs.require_token(scoped, token, began), began)
        if proof is not None:
            return cast(T, self._take(scoped, proof.memory_entry.entry, began))
        found = await self._lookup.fetch_value(scoped)
        if isinstance(found, Bypass):
            scoped.counters.bypass(found.reason)
            return await make()
        if found.memory_entry is not None:
            return cast(T, self._take(scoped, found.memory_entry.entry, began))
        scoped.counters.misses += 1
        value = await self._fill(found, make, outer)
        scoped.counters.times.misses.observe(self._clock() - began)
        return value

    def _plan(
        self, tenant: str, policy: Policy, key: Mapping[str, Any], *, strict: bool
    ) -> ScopedPlan:
        route = VALUE + policy.module
        cache_key = self._lookup.key(
            policy, tenant=tenant, route=route, fingerprint=b"", parameters=as_parameters(key)
        )
        return ScopedPlan(
            tenant,
            cache_key,
            policy,
            counters=self._counters.at(tenant, policy.module, route),
            max_view_age_s=0.0 if strict else policy.max_view_age_s(anonymous=True),
        )

    def _take(self, scoped: ScopedPlan, entry: Entry, began: float) -> Any:
        """Return the value of a hit, and count it."""
        if scoped.counters.hit(0):
            scoped.counters.sample(self._clock() - began, entry.fill_ms)
        return _decode(entry.body)

    async def _fill(self, result: LookupResult, make: Make[T], outer: Exchange | None) -> T:
        scoped = result.scoped
        assert result.view is not None
        fill = await self._filler.begin_or_join(
            scoped.cache_key, view=result.view, certificate=result.certificate
        )
        if isinstance(fill, Entry):
            scoped.counters.collapsed += 1
            return cast(T, _decode(fill.body))
        if fill is None:
            return await make()
        module = scoped.policy.module
        with self.tracing.fill(tenant=scoped.tenant, module=module, route=VALUE + module) as trace:
            value_fill: _ValueFill[T] = _ValueFill(scoped, fill, trace, clock=self._clock)
            return await value_fill.run(make, outer)


class _ValueFill(Generic[T]):
    """One fill of a value: runs ``make``, then stores and shares the value if that is allowed."""

    def __init__(
        self, scoped: ScopedPlan, fill: Fill, trace: Trace, *, clock: Callable[[], float]
    ) -> None:
        self._scoped = scoped
        self._fill = fill
        self._trace = trace
        self._clock = clock

    async def run(self, make: Make[T], outer: Exchange | None) -> T:
        tenant = self._scoped.tenant
        exchange = Exchange(reads=ReadSet(tenant)) if outer is None else outer.nested(tenant)
        token = current.set(exchange)
        started = self._clock()
        try:
            value = await make()
            if not self._storable(exchange):
                self._scoped.counters.refuse("value")
                self._trace("value")
                return value
            body = msgspec.msgpack.encode(value)
            self._store(body, self._clock() - started)
            self._trace("stored")
            return cast(T, _decode(body))
        finally:
            self._fill.complete(None)
            current.reset(token)
            if outer is not None:
                outer.absorb(exchange)

    def _storable(self, exchange: Exchange) -> bool:
        reads, policy = exchange.reads, self._scoped.policy
        assert reads is not None
        if exchange.wrote or reads.undeclared_sql or reads.old_snapshot:
            return False
        return reads.tables.issubset(policy.tables) and reads.modules <= {policy.module}

    def _store(self, body: bytes, seconds: float) -> None:
        scoped = self._scoped
        entry = Entry(
            certificate=self._fill.certificate,
            digest=scoped.cache_key.digest,
            stored_at_ms=int(time.time() * 1000),
            ttl_ms=int(scoped.policy.ttl_s * 1000),
            fill_ms=round(seconds * 1000),
            status=200,
            headers=(),
            body=body,
        )
        self._fill.complete(entry)
        scoped.counters.store(size_bytes=len(body), seconds=seconds)


def _decode(body: bytes) -> Any:
    return msgspec.msgpack.decode(body)
