"""What database hooks and handlers report: which writes were committed, and what to invalidate.

The response of the current request waits for the invalidations that are reported during it.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from respcache.context import cause, current
from respcache.core.generations import module_tag, table_tag
from respcache.core.serving_lease import Ack, Outcome
from respcache.core.tokens import both
from respcache.routing.registry import Registry
from respcache.telemetry.stats import Counters
from respcache.writes.invalidator import Invalidator
from respcache.writes.relay import Rows


class WriteHooks:
    """Receives reports from any thread. ``invalidator`` is None without a store."""

    def __init__(
        self, invalidator: Invalidator | None, registry: Registry, counters: Counters
    ) -> None:
        self._invalidator = invalidator
        self._registry = registry
        self._counters = counters

    def changed(self, tables: Mapping[str, set[str]]) -> None:
        """Report that a committed transaction changed these tables, by tenant."""
        if self._invalidator is not None:
            tags = {tenant: set(map(table_tag, names)) for tenant, names in tables.items()}
            _await(self._invalidator.bump(tags))
        self._count(tables)

    def committed(self, rows: Rows | None) -> None:
        """Report that a transaction was committed which left these outbox rows, or unknown ones."""
        if self._invalidator is not None:
            _await(self._invalidator.committed(rows))
        tables: dict[str, set[str]] = {}
        for tenant, tag, _ in rows or ():
            tables.setdefault(tenant, set()).add(tag.removeprefix(table_tag("")))
        self._count(tables)

    def bump_modules(self, tenant: str, modules: Sequence[str]) -> None:
        """Begin to invalidate modules of a tenant on behalf of the current request."""
        if self._invalidator is not None:
            _await(self._invalidator.bump({tenant: set(map(module_tag, modules))}))
        for module in modules:
            self._counters.at(tenant, module).invalidations += 1

    async def bump_now(self, tags: Mapping[str, list[str]], *, why: str | None = None) -> bool:
        """Invalidate these tags, by tenant. Return whether that is confirmed for all processes."""
        if self._invalidator is None:
            return True
        context = cause.set(why or cause.get())
        try:
            bump = self._invalidator.bump(tags)
        finally:
            cause.reset(context)
        ack = Ack(Outcome.PENDING) if bump is None else await asyncio.shield(bump)
        exchange = current.get()
        if exchange is not None:  # its caller reports the outcome; the client needs the token
            exchange.token = both(exchange.token, ack.token)
        return ack.outcome is Outcome.CONFIRMED

    def _count(self, tables: Mapping[str, Collection[str]]) -> None:
        for tenant, names in tables.items():
            for module in self._registry.readers(names):
                self._counters.at(tenant, module).invalidations += 1


def _await(bump: asyncio.Future[Ack] | None) -> None:
    """Let the response of the current request wait for a bump; None: it could not be sent."""
    exchange = current.get()
    if exchange is None:
        return
    if bump is None:
        exchange.note(Ack(Outcome.PENDING))
    else:
        exchange.bumps.append(bump)
