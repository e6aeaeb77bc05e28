"""Values that the application's own code makes, cached under the same rules as responses
(``Cache.get_or_set``)."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

import msgspec

from respcache.context import Exchange, ReadSet, current
from respcache.core.entry import Entry
from respcache.core.policy import Policy
from respcache.read.fills import Fill, Filler
from respcache.read.lookup import Bypass, Lookup, LookupResult, as_parameters
from respcache.read.plans import ScopedPlan
from respcache.telemetry.stats import SAMPLE_MASK, VALUE, Counters, RouteCounters
from respcache.telemetry.tracing import Trace, Tracing

T = TypeVar("T")
Make = Callable[[], Awaitable[T]]


class Values:
    """Finds values, or has them made once. One per cache with a store."""

    def __init__(
        self, lookup: Lookup, filler: Filler, *, stats: Counters, clock: Callable[[], float]
    ) -> None:
        self.tracing = Tracing()
        self._lookup = lookup
        self._filler = filler
        self._stats = stats
        self._clock = clock

    async def get(self, tenant: str, policy: Policy, key: Mapping[str, Any], make: Make[T]) -> T:
        """Return the value of a tenant under this key, cached or made. ``current`` is the record of
        whoever asks."""
        began, outer, route = self._clock(), current.get(), VALUE + policy.module
        cache_key = self._lookup.cache_key(
            policy, tenant=tenant, route=route, fingerprint=b"", parameters=as_parameters(key)
        )
        counters = self._stats.at(tenant, policy.module, route)
        # within a fill the value must be as fresh as what is made of it, whose certificate says so
        # for all its time
        max_view_age_s = (
            policy.max_view_age_s(anonymous=True) if outer is None or outer.reads is None else 0.0
        )
        scoped = ScopedPlan(
            tenant, cache_key, policy, counters=counters, max_view_age_s=max_view_age_s
        )
        held = await self._lookup.hit(scoped, sent=None if outer is None else outer.sent)
        if held is not None:
            return cast(T, self._take(held.entry, counters, began))
        look = await self._lookup.value(scoped)
        if isinstance(look, Bypass):
            counters.bypass(look.reason)
            return await make()
        if look.entry is not None:
            return cast(T, self._take(look.entry, counters, began))
        counters.misses += 1
        value = await self._fill(make, look, outer)
        counters.times.misses.observe(self._clock() - began)
        return value

    def _take(self, entry: Entry, counters: RouteCounters, began: float) -> Any:
        """Return the value of a hit, and count it."""
        counters.hits += 1
        if counters.hits & SAMPLE_MASK == counters.phase:
            counters.sample(self._clock() - began, entry.fill_ms)
        return _decode(entry.body)

    async def _fill(self, make: Make[T], look: LookupResult, outer: Exchange | None) -> T:
        entered = await self._filler.enter(
            look.cache_key, view=look.view, certificate=look.certificate
        )
        if isinstance(entered, Entry):
            look.scoped.counters.collapsed += 1
            return cast(T, _decode(entered.body))
        if entered is None:
            return await make()
        module = look.scoped.policy.module
        with self.tracing.fill(
            tenant=look.scoped.tenant, module=module, route=VALUE + module
        ) as trace:
            return await self._make(make, look, entered, outer, trace)

    async def _make(
        self, make: Make[T], look: LookupResult, lead: Fill, outer: Exchange | None, trace: Trace
    ) -> T:
        """Make the value, store and share it if that may be."""
        policy, counters = look.scoped.policy, look.scoped.counters
        exchange = (
            Exchange(reads=ReadSet(look.scoped.tenant))
            if outer is None
            else outer.nested(look.scoped.tenant)
        )
        token = current.set(exchange)
        started = self._clock()
        try:
            value = await make()
            reads = exchange.reads
            assert reads is not None
            covered = reads.tables.issubset(policy.tables) and reads.modules <= {policy.module}
            storable = covered and not (
                exchange.wrote or reads.undeclared_sql or reads.old_snapshot
            )
            if storable:
                seconds = self._clock() - started
                body = msgspec.msgpack.encode(value)
                now_ms, ttl_ms, fill_ms = (
                    int(time.time() * 1000),
                    int(policy.ttl_s * 1000),
                    round(seconds * 1000),
                )
                lead.complete(
                    Entry(
                        lead.certificate,
                        look.cache_key.digest,
                        now_ms,
                        ttl_ms,
                        fill_ms,
                        200,
                        (),
                        body,
                    )
                )
                counters.store(size_bytes=len(body), seconds=seconds)
                value = _decode(body)
            else:
                counters.refuse("value")
            trace("stored" if storable else "value")
            return value
        finally:
            lead.complete(None)
            current.reset(token)
            if outer is not None:
                outer.absorb(exchange)


def _decode(body: bytes) -> Any:
    return msgspec.msgpack.decode(body)
