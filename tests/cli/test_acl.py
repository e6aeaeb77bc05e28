"""The users that ``respcache acl`` describes can do what the library does, and nothing more."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable

import pytest
import redis
from redis.exceptions import NoPermissionError, RedisError

from respcache import Cache, SingleTenant
from respcache.core.epochs import Cursor, Epoch
from respcache.core.errors import StoreError
from respcache.core.generations import Certificate
from respcache.core.keys import PROCESSES_KEY, SWITCHES_KEY, entry_key, generation_key, lock_key
from respcache.core.serving_lease import Outcome
from respcache.ops.access import Access, Role
from respcache.ops.acl import ADMINISTRATION, DATA_PLANE, ROLES
from respcache.ops.admin import Admin
from respcache.ops.feed import Reporter
from respcache.ops.stats.publisher import PRUNE_EVERY, StatsPublisher
from respcache.stores.base import FillLock
from respcache.stores.redis import RedisStore
from respcache.testing.servers import EmbeddedValkey

from .conftest import Run, document, log_in_as

HOUR_MS = 3_600_000
LONG_S = 60.0
GEN, ENTRY = generation_key("a"), entry_key("a", "accounts", "list", digest=bytes(16))
FILL = lock_key("a", "accounts", "list", digest=bytes(16))


async def exercise(url: str, admin: redis.Redis, *, patience_s: float = LONG_S) -> str:
    """Have a store do everything that a store does; return what went wrong, nothing if nothing
    did. Messages of bumps may take ``patience_s``."""
    store, heard = RedisStore(url, deadline_s=LONG_S, connect_deadline_s=LONG_S), list[str]()
    store.listen(heard.append, lambda: None)
    await store.connect()
    try:
        admin.script_flush()
        certificate = (
            await store.open(GEN, nonce=secrets.token_hex(8).encode(), ttl_ms=HOUR_MS)
        ).certificate()
        assert certificate is not None
        deadline, bumps = time.monotonic() + patience_s, 0
        while heard.count(GEN) <= 2 * bumps or not bumps:  # a bump of ours is heard twice by itself
            if time.monotonic() > deadline:
                return "no message of a bump"
            await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=["a" * 16])
            bumps += 1
            await asyncio.sleep(0.02)
        store.put(ENTRY, b"x", ttl_ms=HOUR_MS, generation=GEN, generation_ttl_ms=HOUR_MS)
        await store.read(ENTRY, [(GEN, ["T:accounts"])])
        await store.lock(FILL, FillLock("token", Certificate(b"n", 1)), ttl_ms=HOUR_MS)
        store.release(FILL, "token")
        _, identity = await store.epoch()
        await store.epoch(Epoch("ab", identity, "x", Cursor("1:1:", 1.0)), ttl_ms=HOUR_MS)
        await store.switch({"*": True})
        await store.switch({"*": False})
        await store.info()
        if store.counters()["errors"]:
            return "a reply was an error"
        admin.set(SWITCHES_KEY, "a foreign value")
        await store.switch({"*": True})
        return ""
    except StoreError as error:
        return str(error) or type(error).__name__
    finally:
        await store.close()


@pytest.fixture
async def admin(valkey_url: str) -> AsyncIterator[redis.Redis]:
    with redis.Redis.from_url(valkey_url) as client:
        yield client


@pytest.mark.anyio
async def test_the_user_of_the_application_can_do_all_that_a_store_does(
    valkey_url: str, admin: redis.Redis
) -> None:
    """Scripts in full and by digest, messages, switches, a foreign value in their place."""
    assert await exercise(log_in_as(valkey_url, DATA_PLANE), admin) == ""


@pytest.mark.anyio
@pytest.mark.parametrize(
    "right",
    [
        *(f"+{name}" for name in DATA_PLANE.commands),
        "~tenant:*",
        "~respcache:~*",
        "&respcache:~bumps",
    ],
)
async def test_there_is_no_right_too_much(valkey_url: str, admin: redis.Redis, right: str) -> None:
    """Without any single one something fails."""
    user = log_in_as(valkey_url, DATA_PLANE, without=right)
    assert await exercise(user, admin, patience_s=1.0) != ""


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "*"),
        ("scan", "0"),
        ("flushall",),
        ("config", "get", "*"),
        ("acl", "list"),
        ("hgetall", GEN),
        ("get", "other"),
        ("set", "other", "x"),
        ("publish", "other", "x"),
        ("shutdown",),
        ("client", "list"),
        ("multi",),
    ],
    ids=" ".join,
)
def test_the_user_of_the_application_is_refused_everything_else(
    valkey_url: str, words: tuple[str, ...]
) -> None:
    """Other commands, other keys, other channels."""
    with (
        redis.Redis.from_url(log_in_as(valkey_url, DATA_PLANE)) as client,
        pytest.raises(NoPermissionError),
    ):
        client.execute_command(*words)


def test_other_channels_are_refused_whatever_the_server_allows_by_itself(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """Redis 6.2 gives a user that was reset all channels."""
    url = make_valkey(acl_pubsub_default="allchannels").url
    with (
        redis.Redis.from_url(log_in_as(url, DATA_PLANE)) as client,
        pytest.raises(NoPermissionError),
    ):
        client.publish("other", "x")


async def operate(url: str, as_user: str, admin: redis.Redis) -> str:
    """Have a board and an ``Admin`` do everything that they do; return what went wrong, nothing if
    nothing did."""
    publisher, other = (StatsPublisher(as_user, deadline_s=LONG_S) for _ in range(2))
    cache, neighbour = (
        Cache(
            RedisStore(url, deadline_s=LONG_S, connect_deadline_s=LONG_S),
            secret=b"x" * 32,
            resolver=SingleTenant("public"),
            verify_share=0,
            publisher=one,
        )
        for one in (publisher, other)
    )
    facade, root = Admin(cache), Access(name="root", role=Role.OPERATOR)

    async def make() -> str:
        return "made"

    await cache.connect()
    await neighbour.connect()
    try:
        await cache.get_or_set("public", "books", {"number": 1}, make)
        for one in (publisher, other):
            if not await one.publish():
                return one.problem
        admin.sadd(PROCESSES_KEY, "0" * 16)  # one that has ended
        for _ in range(PRUNE_EVERY):
            await publisher.publish()
        if admin.sismember(PROCESSES_KEY, "0" * 16):
            return "what has ended is not forgotten"
        for seen in (
            await publisher.fleet(),
            await publisher.tenant("public"),
            await publisher.tenants(),
            await publisher.series(1),
        ):
            if seen.problem:
                return seen.problem
        if (await facade.overview(root)).server is None:
            return "the server does not say how it is"
        if len((await publisher.fleet()).processes) != 2:
            return "the other process is not seen"
        keys = (await facade.keys(root, tenant="public")).keys
        if (
            len(keys) != 1
            or not isinstance(keys[0].size_bytes, int)
            or (await facade.sample(root)).sampled != 1
        ):
            return "the stored value is not found"
        assert isinstance(cache.feed, Reporter)
        cache.feed.note([("public", "*", "a row")], Outcome.CONFIRMED, 0.1, by="somebody")
        await cache.feed.close()
        for after in ("", "0-0"):
            feed = await facade.feed(root, after=after)
            if feed.processes != "all" or [event.cause for event in feed.events] != ["somebody"]:
                return "the feed is not that of all"
        purged = await facade.purge(root, key=keys[0].key)
        return "" if purged.confirmed and purged.entries == 1 else "the key is still there"
    except (StoreError, RedisError) as error:
        return str(error) or type(error).__name__
    finally:
        await cache.close()
        await neighbour.close()


def elsewhere(url: str) -> str:
    """Return the address of another database of the server: it must be selected."""
    return url.removesuffix("/0") + "/1"


@pytest.mark.anyio
async def test_the_user_of_administration_can_do_all_that_is_done(valkey_url: str) -> None:
    """Figures of all processes, search, purge of a key; nothing is left when the process closes."""
    url = elsewhere(valkey_url)
    with redis.Redis.from_url(url) as client:
        assert await operate(url, log_in_as(url, ADMINISTRATION), client) == ""
        assert list(client.scan_iter("respcache:~figures:*")) == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "right", [f"+{name}" for name in ADMINISTRATION.commands if name != "config|get"]
)
async def test_administration_has_no_right_too_much(valkey_url: str, right: str) -> None:
    """Without any single one something fails; the server's configuration is for the doctor."""
    url = elsewhere(valkey_url)
    with redis.Redis.from_url(url) as client:
        assert await operate(url, log_in_as(url, ADMINISTRATION, without=right), client) != ""


def test_the_command_prints_each_rule_as_a_line_that_the_server_takes(
    respcache: Run, valkey_url: str
) -> None:
    """Less the lines that begin with #; --role is one of them."""
    done = respcache("acl")
    rules = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert (done.returncode, rules) == (0, [role.rule() for role in ROLES.values()])
    with redis.Redis.from_url(valkey_url) as client:
        for rule in rules:
            assert client.execute_command(*rule.split()) in (True, b"OK", "OK")
    assert (
        document(respcache("acl", "--role", "application", "--json"))["application"]["rule"]
        == DATA_PLANE.rule()
    )


def test_an_unknown_role_is_wrong_usage(respcache: Run) -> None:
    """And what is known is said."""
    done = respcache("acl", "--role", "nobody")
    assert (done.returncode, done.stdout) == (2, "")
    assert all(name in done.stderr for name in ROLES)
