"""Switches on a real server: what is decided while it refuses, and while an earlier look is on its
way."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis
from tests.cli.conftest import log_in_as

from respcache import RedisStore
from respcache.ops.acl import DATA_PLANE
from respcache.writes.switches import Switches

pytestmark = pytest.mark.anyio
A = "tenant:a"


@pytest.fixture
async def store(valkey_url: str) -> AsyncIterator[RedisStore]:
    made = RedisStore(log_in_as(valkey_url, DATA_PLANE), deadline_s=5.0, connect_deadline_s=5.0)
    await made.connect()
    yield made
    await made.close()


async def test_a_decision_that_the_server_refuses_is_told_as_soon_as_it_does_not(
    store: RedisStore, valkey_url: str
) -> None:
    """Until then it holds here, and it is said that others do not know."""
    here, there = Switches(store), Switches(store)
    with redis.Redis.from_url(valkey_url) as admin:
        admin.execute_command("ACL", "SETUSER", DATA_PLANE.name, "-hset")
        assert not await here.set(A, off=True)
        await there.sync()
        assert (here.off, there.off) == ({A}, frozenset())
        admin.execute_command("ACL", "SETUSER", DATA_PLANE.name, "+hset")
    await here.sync()
    await there.sync()
    assert here.off == there.off == {A}


async def test_a_look_that_was_on_its_way_undoes_no_decision(store: RedisStore) -> None:
    """Its reply is from before."""
    switches, seen = Switches(store), list[frozenset[str]]()

    async def look() -> None:
        await switches.sync()
        seen.append(switches.off)

    looking = asyncio.create_task(look())
    await asyncio.sleep(0)
    assert await switches.set(A, off=True)
    await looking
    assert seen == [{A}]
