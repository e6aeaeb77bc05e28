"""The switches of all processes: what is not served from the cache, though invalidations go on
being sent.

They are one hash in the store that every process looks at once a second. What this process decides
holds here at once, and is told to the store as soon as it can be reached.
"""

import asyncio
import logging

from respcache.core import keys
from respcache.core.errors import StoreError
from respcache.stores.base import Store

log = logging.getLogger("respcache")

POLL_S = 1.0
"""How soon the other processes notice."""


class Switches:
    """What is switched off, as far as this process knows."""

    __slots__ = (
        "_decisions",
        "_polling",
        "_store",
        "_unsaid",
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
        """The names of all that are off (``core/keys.py``)."""
        self._store = store
        self._unsaid: dict[str, bool] = {}  # decisions of ours that the store does not have yet
        self._decisions = 0
        self._polling: asyncio.Task[None] | None = None

    def is_off(self, tenant: str, module: str) -> bool:
        """Whether a tenant, a module or everything is switched off."""
        return self.everything or tenant in self.tenants or module in self.modules

    async def turn(self, name: str, *, off: bool) -> bool:
        """Decide a switch: ``keys.EVERYTHING``, or that of a tenant or a module. Returns whether
        the store was reached."""
        log.warning("the cache is switched %s by this process: %s", "off" if off else "on", name)
        self._unsaid[name] = off
        self._decisions += 1
        self._take(self.off)
        await self.poll()
        return name not in self._unsaid

    async def poll(self) -> None:
        """Tell the store our decisions, if there are any, and take over what it says."""
        decisions = self._decisions
        try:
            off = await self._store.switch(dict(self._unsaid))
        except StoreError:
            return
        if self._decisions != decisions:  # decided anew while this was on its way
            return
        self._unsaid.clear()
        for name in sorted(off ^ self.off):
            log.warning(
                "the cache is switched %s for all processes: %s",
                "off" if name in off else "on",
                name,
            )
        self._take(off)

    async def start(self) -> None:
        """Look for the first time, then go on."""
        await self.poll()
        self._polling = asyncio.create_task(self._keep_polling())

    async def close(self) -> None:
        """Stop looking."""
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.poll()

    def _take(self, said: frozenset[str]) -> None:
        ours = frozenset(name for name, off in self._unsaid.items() if off)
        off = self.off = said.difference(self._unsaid) | ours
        self.everything = keys.EVERYTHING in off
        self.tenants = keys.switched(off, keys.tenant_switch(""))
        self.modules = keys.switched(off, keys.module_switch(""))
