"""The one sender of bumps."""

import asyncio
from typing import Any

import pytest

from respcache.core.errors import StoreUnavailable
from respcache.core.serving_lease import DueBump
from respcache.stores.base import Bumped
from respcache.writes.bumps import AT_ONCE, BumpSender

pytestmark = pytest.mark.anyio


class Slow:
    """A store that counts how many commands it has at the same time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def bump(self, generation: str, **options: Any) -> Bumped:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        if ":t7:" in generation:
            raise StoreUnavailable("away")
        return Bumped("server")


async def test_thousands_are_sent_in_portions_and_each_is_told_what_became_of_it() -> None:
    """One that fails holds up nobody."""
    store = Slow()
    due = {f"t{number}": DueBump(("T:x",)) for number in range(3 * AT_ONCE + 1)}
    found = await BumpSender(store, generation_ttl_ms=1).send(due)  # type: ignore[arg-type]
    assert list(found) == list(due)
    assert isinstance(found.pop("t7"), StoreUnavailable)
    assert set(found.values()) == {Bumped("server")}
    assert store.most == AT_ONCE
