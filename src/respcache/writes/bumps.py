"""Sends bumps: one command for each tenant that the outbox, a hook or an operator invalidates.

There may be thousands of tenants. They are sent in portions, so that other tasks run in between
and no command waits behind a portion for longer than its deadline.
"""

import asyncio
from collections.abc import Mapping

from respcache.core.errors import StoreError
from respcache.core.keys import generation_key
from respcache.core.serving_lease import DueBump
from respcache.stores.base import Bumped, Store

AT_ONCE = 50
"""Bumps in flight at the same time: about 5 ms of work for this process."""


class BumpSender:
    """Sends all bumps of one store."""

    def __init__(self, store: Store, *, generation_ttl_ms: int) -> None:
        self._store = store
        self._ttl_ms = generation_ttl_ms

    async def send(self, due: Mapping[str, DueBump]) -> dict[str, Bumped | StoreError]:
        """Bump what is due; return the result, or the error, for each tenant."""
        found: dict[str, Bumped | StoreError] = {}
        tenants = list(due)
        for start in range(0, len(tenants), AT_ONCE):
            portion = tenants[start : start + AT_ONCE]
            found.update(
                zip(
                    portion,
                    await asyncio.gather(*(self._one(tenant, due[tenant]) for tenant in portion)),
                    strict=True,
                )
            )
        return found

    async def _one(self, tenant: str, due: DueBump) -> Bumped | StoreError:
        try:
            return await self._store.bump(
                generation_key(tenant), tags=due.tags, ttl_ms=self._ttl_ms, rows=due.rows
            )
        except StoreError as error:
            return error
