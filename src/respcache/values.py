"""Values that the application's own code makes, cached under the same rules as responses
(``Cache.get_or_set``)."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

import msgspec

from respcache.core.entry import Entry
from respcache.core.policy import Policy
from respcache.fill.filler import Filler, Lead
from respcache.lookup import Bypass, Look, Lookup, as_parameters
from respcache.ops.stats import SAMPLE_MASK, VALUE, Figures, Stats
from respcache.ops.tracing import Trace, Tracing
from respcache.plans import Aim
from respcache.record import Reads, Record, current

T = TypeVar("T")
Make = Callable[[], Awaitable[T]]


class Values:
    """Finds values, or has them made once. One per cache with a store."""

    def __init__(
        self, lookup: Lookup, filler: Filler, *, stats: Stats, clock: Callable[[], float]
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
        target = self._lookup.target(
            policy, tenant=tenant, route=route, fingerprint=b"", parameters=as_parameters(key)
        )
        figures = self._stats.at(tenant, policy.module, route)
        # within a fill the value must be as fresh as what is made of it, whose certificate says so
        # for all its time
        view_s = policy.view_s(anonymous=True) if outer is None or outer.reads is None else 0.0
        aim = Aim(tenant, target, policy, figures=figures, view_s=view_s)
        held = await self._lookup.hit(aim, sent=None if outer is None else outer.sent)
        if held is not None:
            return cast(T, self._take(held.entry, figures, began))
        look = await self._lookup.value(aim)
        if isinstance(look, Bypass):
            figures.bypass(look.reason)
            return await make()
        if look.entry is not None:
            return cast(T, self._take(look.entry, figures, began))
        figures.misses += 1
        value = await self._fill(make, look, outer)
        figures.times.misses.observe(self._clock() - began)
        return value

    def _take(self, entry: Entry, figures: Figures, began: float) -> Any:
        """Return the value of a hit, and count it."""
        figures.hits += 1
        if figures.hits & SAMPLE_MASK == figures.phase:
            figures.sample(self._clock() - began, entry.fill_ms)
        return _decode(entry.body)

    async def _fill(self, make: Make[T], look: Look, outer: Record | None) -> T:
        entered = await self._filler.enter(
            look.target, view=look.view, certificate=look.certificate
        )
        if isinstance(entered, Entry):
            look.aim.figures.collapsed += 1
            return cast(T, _decode(entered.body))
        if entered is None:
            return await make()
        module = look.aim.policy.module
        with self.tracing.fill(
            tenant=look.aim.tenant, module=module, route=VALUE + module
        ) as trace:
            return await self._make(make, look, entered, outer, trace)

    async def _make(
        self, make: Make[T], look: Look, lead: Lead, outer: Record | None, trace: Trace
    ) -> T:
        """Make the value, store and share it if that may be."""
        policy, figures = look.aim.policy, look.aim.figures
        record = (
            Record(reads=Reads(look.aim.tenant)) if outer is None else outer.nested(look.aim.tenant)
        )
        token = current.set(record)
        started = self._clock()
        try:
            value = await make()
            reads = record.reads
            assert reads is not None
            covered = reads.tables.issubset(policy.tables) and reads.modules <= {policy.module}
            storable = covered and not (record.wrote or reads.undeclared_sql or reads.old_snapshot)
            if storable:
                seconds = self._clock() - started
                body = msgspec.msgpack.encode(value)
                now_ms, ttl_ms, fill_ms = (
                    int(time.time() * 1000),
                    int(policy.ttl_s * 1000),
                    round(seconds * 1000),
                )
                lead.land(
                    Entry(
                        lead.certificate, look.target.digest, now_ms, ttl_ms, fill_ms, 200, (), body
                    )
                )
                figures.store(size_bytes=len(body), seconds=seconds)
                value = _decode(body)
            else:
                figures.refuse("value")
            trace("stored" if storable else "value")
            return value
        finally:
            lead.land(None)
            current.reset(token)
            if outer is not None:
                outer.absorb(record)


def _decode(body: bytes) -> Any:
    return msgspec.msgpack.decode(body)
