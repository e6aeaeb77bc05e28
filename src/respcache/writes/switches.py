"""The switches of all processes: what is not served from the cache although invalidations are
still sent.

They are one hash on the cache server, which every process reads once a second. A decision of this
process holds here at once, and is written to the cache server as soon as it can be reached.
"""

import asyncio
import logging

from respcache.core import keys
from respcache.core.errors import StoreError
from respcache.stores.base import Store

log = logging.getLogger("respcache")

POLL_S = 1.0
"""How often each process reads the switches, in seconds."""


class Switches:
    """What is switched off, as far as this process knows."""

    __slots__ = (
        "_decisions",
        "_store",
        "_syncing",
        "_unsent",
        "everything",
        "modules",
        "off",
        "tenants",
    )

    def __init__(self, store: Store) -> None:
        self.everything = False
        self.tenants: frozenset[str] = frozenset()
        self.modules: frozenset[str] = frozenset()
        self.off: frozenset[str] = frozenset()
        """The names of all switches that are off (``core/keys.py``)."""
        self._store = store
        self._unsent: dict[str, bool] = {}  # decisions that the cache server does not have yet
        self._decisions = 0
        self._syncing: asyncio.Task[None] | None = None

    def is_off(self, tenant: str, module: str) -> bool:
        """Return whether the tenant, the module or everything is switched off."""
        return self.everything or tenant in self.tenants or module in self.modules

    async def set(self, name: str, *, off: bool) -> bool:
        """Set a switch: ``keys.EVERYTHING``, or that of a tenant or module. Return whether the
        cache server was reached."""
        log.warning("the cache is switched %s by this process: %s", "off" if off else "on", name)
        self._unsent[name] = off
        self._decisions += 1
        self._apply(self.off)
        await self.sync()
        return name not in self._unsent

    async def sync(self) -> None:
        """Write our decisions to the cache server, if there are any, and take over its switches.
        One round trip."""
        decisions = self._decisions
        try:
            off = await self._store.switch(dict(self._unsent))
        except StoreError:
            return
        if self._decisions != decisions:  # a decision was made meanwhile
            return
        self._unsent.clear()
        for name in sorted(off ^ self.off):
            log.warning(
                "the cache is switched %s for all processes: %s",
                "off" if name in off else "on",
                name,
            )
        self._apply(off)

    async def start(self) -> None:
        """Read the switches, then keep reading them in the background."""
        await self.sync()
        self._syncing = asyncio.create_task(self._keep_syncing())

    async def close(self) -> None:
        """Stop reading them."""
        if self._syncing is not None:
            self._syncing.cancel()
            await asyncio.gather(self._syncing, return_exceptions=True)

    async def _keep_syncing(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.sync()

    def _apply(self, stored: frozenset[str]) -> None:
        ours = frozenset(name for name, off in self._unsent.items() if off)
        off = self.off = stored.difference(self._unsent) | ours
        self.everything = keys.EVERYTHING in off
        self.tenants = keys.switched(off, keys.tenant_switch(""))
        self.modules = keys.switched(off, keys.module_switch(""))
