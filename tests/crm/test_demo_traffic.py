"""The demo's traffic notices stale responses of the real application."""

import asyncio

import httpx2
import pytest

from crm.auth import issue_token
from crm.demo.counters import DemoCounters
from crm.demo.traffic import READS, WRITES, Traffic, Visitor

from .conftest import SECRET, Crm

WRITTEN = ("create", "change", "delete", "convert", "promote")


@pytest.mark.anyio
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
async def test_traffic_notices_a_cache_that_is_not_told_of_writes(
    crm: Crm, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Where writes are answered before the cache knows of them, answers are stale and counted; else
    none, whatever is done."""
    monkeypatch.setattr("crm.demo.traffic.THINK_S", 0.02)
    monkeypatch.setattr("crm.demo.traffic.WRITES", dict.fromkeys(WRITES, 4))
    if not told:
        monkeypatch.setattr(crm.cache, "committed", lambda rows: None)
    counters = DemoCounters()
    users = {
        "acme": [
            Visitor("acme", name, issue_token(SECRET, crm.users[name], hours=1))
            for name in ("abe", "ann")
        ]
    }
    transport = httpx2.ASGITransport(crm.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://crm", timeout=30) as client:
        traffic = Traffic(client, users, counters, rate=200, seed=1)
        running = asyncio.create_task(traffic.run())
        while counters.kinds.keys() < {*READS, "home", *WRITTEN} and not counters.stale:
            await asyncio.sleep(0.01)
        traffic.stop()
        await running
    assert counters.failed == 0, counters.problems
    assert (counters.stale == 0) is told, counters.problems
    assert counters.right is told
