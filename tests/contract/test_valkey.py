"""What only a real server can do to its store: scripts forgotten, replicas, full memory, freezing,
many clients."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

import pytest
import redis

from respcache.core.epochs import Cursor, Epoch
from respcache.core.errors import StoreReplyError, StoreUnavailable
from respcache.core.generations import FLOOR, Certificate, Verdict
from respcache.core.keys import EPOCH_KEY, SWITCHES_KEY
from respcache.stores.base import FillLock
from respcache.stores.redis import RedisStore
from respcache.testing.servers import EmbeddedValkey

pytestmark = pytest.mark.anyio

GEN, ENTRY, FILL = "tenant:a:~gen", "tenant:a:accounts:list:00", "tenant:a:~fill:accounts:list:00"
N1, N2 = b"0123456789abcdef", b"fedcba9876543210"
HOUR_MS = 3_600_000
LONG_S = 5.0
SCRIPTS = ("open", "bump", "epoch", "lock", "release")
SCRIPT_COMMANDS = {"INFO", "HMGET", "HSET", "HINCRBY", "HLEN", "GET", "SET", "DEL", "PEXPIRE"}
"""All in Redis 6.2."""

MakeStore = Callable[..., RedisStore]


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


@pytest.fixture
async def store_on() -> AsyncIterator[MakeStore]:
    """Make stores that are closed afterwards."""
    stores: list[RedisStore] = []

    def make(url: str, *, deadline_s: float = LONG_S) -> RedisStore:
        stores.append(RedisStore(url, deadline_s=deadline_s, connect_deadline_s=LONG_S))
        return stores[-1]

    yield make
    for store in stores:
        await store.close()


async def work(store: RedisStore, nonce: bytes = N1) -> None:
    """Use each script once, with its results checked."""
    certificate = (await store.open(GEN, nonce=nonce, ttl_ms=HOUR_MS)).certificate()
    assert certificate is not None
    await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS)
    found = (await store.read(None, [(GEN, ["T:accounts"])])).generations[0]
    assert found.judge(certificate, ["T:accounts"]) is Verdict.INVALIDATED
    epoch = Epoch("e" * 16, "d" * 40, "incarnation", Cursor("7:7:", 0.0))
    assert (await store.epoch(epoch, replacing=epoch.token, ttl_ms=HOUR_MS))[0] == epoch
    mine, yours = FillLock("mine", certificate), FillLock("yours", certificate)
    assert await store.lock(FILL, mine, ttl_ms=HOUR_MS) == mine
    store.release(FILL, "mine")
    assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == yours
    store.release(FILL, "yours")


# -- scripts and commands --------------------------------------------------------------------------


async def test_forgotten_scripts_are_sent_again(store_on: MakeStore, valkey_url: str) -> None:
    """SCRIPT FLUSH at any time: the same operation succeeds, and later ones use the digest
    again."""
    store = store_on(valkey_url)
    await store.connect()
    with redis.Redis.from_url(valkey_url) as client:
        for _ in range(3):
            await work(store)
            client.script_flush()
        await work(store)
        digests = [getattr(store, f"_{name}").digest for name in SCRIPTS]
        assert all(client.script_exists(*digests))


def test_each_script_touches_one_key_and_is_packaged() -> None:
    """Any single key may be evicted, moved or lost; no script may depend on two being together."""
    folder = resources.files("respcache.stores").joinpath("lua")
    assert {path.name for path in folder.iterdir() if path.name.endswith(".lua")} == {
        f"{name}.lua" for name in SCRIPTS
    }
    for name in SCRIPTS:
        text = folder.joinpath(f"{name}.lua").read_text("ascii")
        assert set(re.findall(r"KEYS\[\d+\]", text)) == {"KEYS[1]"}
        commands = re.findall(r"redis\.call\('(\w+)', ([^,)]+)", text)
        assert all(key == "KEYS[1]" for command, key in commands if command != "INFO")
        assert {command for command, _ in commands} <= SCRIPT_COMMANDS


async def test_a_look_up_is_one_round_trip_of_plain_commands(
    store_on: MakeStore, valkey_url: str
) -> None:
    """One GET and one HMGET per generation: no script, no transaction, nothing per entry."""
    store = store_on(valkey_url)
    await store.connect()
    with redis.Redis.from_url(valkey_url) as client:
        client.config_resetstat()
        await store.read(ENTRY, [(GEN, ["T:accounts", FLOOR]), ("tenant:~shared:~gen", [FLOOR])])
        called = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert {name: calls for name, calls in called.items() if "config" not in name} == {
        "cmdstat_get": 1,
        "cmdstat_pttl": 1,
        "cmdstat_hmget": 2,
    }
    assert store.counters()["commands"] == 4 + 4  # and four of the handshake


async def test_a_write_of_an_entry_is_one_set_with_its_time_to_live(
    store_on: MakeStore, valkey_url: str
) -> None:
    """No moment in which the entry has none."""
    store = store_on(valkey_url)
    await store.connect()
    with redis.Redis.from_url(valkey_url) as client:
        client.config_resetstat()
        store.put(ENTRY, b"x", ttl_ms=HOUR_MS, generation=GEN, generation_ttl_ms=HOUR_MS)
        await store.read(None, [(GEN, [])])
        called = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    writes = {
        name: calls
        for name, calls in called.items()
        if "config" not in name and name != "cmdstat_hmget"
    }
    assert writes == {"cmdstat_set": 1, "cmdstat_pexpire": 1}


async def test_a_foreign_value_under_a_key_is_as_good_as_missing(
    store_on: MakeStore, valkey_url: str
) -> None:
    """It keeps no tenant out of the cache, and no bump from being confirmed."""
    store = store_on(valkey_url)
    await store.connect()
    with redis.Redis.from_url(valkey_url) as client:
        client.set(GEN, "x")
        client.hset(ENTRY, "x", "y")
        reading = await store.read(ENTRY, [(GEN, ["T:accounts"])])
        assert (reading.entry, reading.generations[0].nonce) == (None, None)
        await store.bump(GEN, tags=[FLOOR], ttl_ms=HOUR_MS)
        assert not client.exists(GEN)
        client.set(GEN, "x")
        assert (await store.open(GEN, nonce=N1, ttl_ms=HOUR_MS)).certificate() == Certificate(N1, 0)
        store.put(ENTRY, b"ours", ttl_ms=HOUR_MS, generation=GEN, generation_ttl_ms=HOUR_MS)
        assert (await store.read(ENTRY, [])).entry == b"ours"


@pytest.mark.parametrize(
    "record",
    [
        "",
        "what is this",
        "{token} {id}",
        "{token} {id} x 1.5 7:junk",
        "{token} {id} x soon 7:7:",
        "{token} {id} x y 1.5 7:7:",
        "\u00fc {id} x 1.5 7:7:",
    ],
)
async def test_a_foreign_value_in_place_of_the_epoch_is_none_and_is_replaced(
    store_on: MakeStore, valkey_url: str, record: str
) -> None:
    """What the store cannot read it must not keep either: there would never be an epoch again."""
    store = store_on(valkey_url)
    await store.connect()
    _, identity = await store.epoch()
    mine = Epoch("e" * 16, identity, "incarnation", Cursor("7:7:", 1.5))
    with redis.Redis.from_url(valkey_url) as client:
        client.set(EPOCH_KEY, record.format(token="f" * 16, id=identity))
        assert (await store.epoch())[0] is None
        assert await store.epoch(mine, ttl_ms=HOUR_MS) == (mine, identity)
        client.delete(EPOCH_KEY)
        client.hset(EPOCH_KEY, "x", "y")
        assert (await store.epoch())[0] is None
        assert await store.epoch(mine, ttl_ms=HOUR_MS) == (mine, identity)


async def test_a_foreign_value_in_place_of_a_lease_is_an_error_of_the_store(
    store_on: MakeStore, valkey_url: str
) -> None:
    """Of the wrong type, or not a lease: the caller gets ``StoreReplyError``, and the connection
    stays."""
    store = store_on(valkey_url)
    await store.connect()
    with redis.Redis.from_url(valkey_url) as client:
        for put in (lambda: client.set(FILL, "what is this"), lambda: client.hset(FILL, "x", "y")):
            client.delete(FILL)
            put()
            with pytest.raises(StoreReplyError):
                await store.lock(FILL, FillLock("mine", Certificate(N1, 0)), ttl_ms=HOUR_MS)
    assert store.available
    # the other is one only to us, and a script that must be sent in full is none
    assert store.counters()["errors"] == 1


async def test_a_foreign_value_in_place_of_the_switches_is_none_and_is_replaced(
    store_on: MakeStore, valkey_url: str
) -> None:
    """Also that of a release which kept one switch in a string."""
    store = store_on(valkey_url)
    await store.connect()
    with redis.Redis.from_url(valkey_url) as client:
        client.set(SWITCHES_KEY, "1")
        assert await store.switch() == frozenset()
        assert await store.switch({"*": True}) == {"*"}
        assert client.hgetall(SWITCHES_KEY) == {b"*": b"1"}


async def test_the_kill_switch_survives_other_clients_and_restarts_of_the_store(
    store_on: MakeStore, valkey_url: str
) -> None:
    """It is one key that all processes look at; looking at it counts as a use, so it is not what
    LRU evicts first."""
    first, second = store_on(valkey_url), store_on(valkey_url)
    await first.connect()
    await second.connect()
    await first.switch({"*": True})
    assert await second.switch() == {"*"}
    with redis.Redis.from_url(valkey_url) as client:
        client.config_resetstat()
        await second.switch()
        assert "cmdstat_hkeys" in client.info("commandstats")
        assert client.exists(SWITCHES_KEY)


# -- identity --------------------------------------------------------------------------------------


async def test_a_first_replica_changes_the_identity_and_a_live_connection_learns_it(
    store_on: MakeStore, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Without learning it again, the connection would take every generation of others for another
    server's, for ever."""
    master = make_valkey(repl_diskless_sync_delay="0")
    reader, writer = store_on(master.url), store_on(master.url)
    await reader.connect()
    await writer.connect()
    before = await reader.open(GEN, nonce=N1, ttl_ms=HOUR_MS)
    make_valkey(replicaof=f"127.0.0.1 {master.port}", masterauth=master.password)
    with redis.Redis.from_url(master.url) as client:
        await until(lambda: client.info("replication")["master_replid"] != before.server)
    # made, but not for this connection
    assert (await reader.open(GEN, nonce=N2, ttl_ms=HOUR_MS)).certificate() is None
    await until(lambda: reader.available)
    certificate = (await reader.open(GEN, nonce=N1, ttl_ms=HOUR_MS)).certificate()
    assert certificate == Certificate(N2, 0)
    # the other connection has not noticed yet: its bump is confirmed all the same
    await writer.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS)
    found = (await reader.read(None, [(GEN, ["T:accounts"])])).generations[0]
    assert found.judge(certificate, ["T:accounts"]) is Verdict.INVALIDATED
    await until(lambda: writer.available)
    assert (await writer.read(None, [(GEN, [])])).generations[0].certificate() == Certificate(N2, 1)
    assert [store.counters()["reconnects"] for store in (reader, writer)] == [1, 1]


async def test_a_replica_is_not_read(
    store_on: MakeStore,
    make_valkey: Callable[..., EmbeddedValkey],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may lag behind confirmed bumps."""
    master = make_valkey(repl_diskless_sync_delay="0")
    replica = make_valkey(replicaof=f"127.0.0.1 {master.port}", masterauth=master.password)
    store = store_on(replica.url)
    await store.connect()
    assert not store.available
    with pytest.raises(StoreUnavailable, match=r"role is slave|loading"):
        await store.read(ENTRY, [])
    assert "is down" in caplog.text


async def test_a_promoted_replica_with_the_data_of_its_master_is_another_server(
    store_on: MakeStore, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """The generation that it replicated is of another life, though its bytes are the same."""
    master = make_valkey(repl_diskless_sync_delay="0")
    replica = make_valkey(replicaof=f"127.0.0.1 {master.port}", masterauth=master.password)
    with redis.Redis.from_url(replica.url) as client:
        await until(lambda: client.info("replication")["master_link_status"] == "up")
        first = store_on(master.url)
        await first.connect()
        before = (await first.open(GEN, nonce=N1, ttl_ms=HOUR_MS)).certificate()
        assert before is not None
        await until(lambda: client.exists(GEN))
        master.kill()
        client.replicaof("NO", "ONE")
    second = store_on(replica.url)
    await second.connect()
    await until(lambda: second.available)
    found = (await second.read(None, [(GEN, [])])).generations[0]
    assert found.nonce == N1
    assert found.judge(before, []) is Verdict.OTHER_SERVER


# -- trouble ---------------------------------------------------------------------------------------


async def test_a_full_server_refuses_writes_and_still_answers(
    store_on: MakeStore, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """With OOM, puts are lost and counted, bumps are not confirmed, reads go on, the connection
    stays."""
    server = make_valkey(maxmemory_policy="noeviction")
    store = store_on(server.url)
    await store.connect()
    certificate = (await store.open(GEN, nonce=N1, ttl_ms=HOUR_MS)).certificate()
    assert certificate is not None
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "1")
        store.put(ENTRY, b"x" * 1000, ttl_ms=HOUR_MS, generation=GEN, generation_ttl_ms=HOUR_MS)
        with pytest.raises(StoreReplyError, match="OOM"):
            await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS)
        reading = await store.read(ENTRY, [(GEN, ["T:accounts"])])
        assert reading.entry is None
        assert reading.generations[0].judge(certificate, ["T:accounts"]) is Verdict.VALID
        assert store.available
        assert store.counters()["errors"] >= 2
        client.config_set("maxmemory", "0")
    await work(store)


async def test_eviction_under_pressure_loses_nothing_but_hits(
    store_on: MakeStore, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """A small server that evicts all the time: what is judged valid was captured after the last
    bump."""
    server = make_valkey(maxmemory="4mb", maxmemory_policy="allkeys-random")
    store = store_on(server.url)
    await store.connect()
    lost = 0
    for number in range(600):
        generation = f"tenant:t{number % 7}:~gen"
        view = await store.open(generation, nonce=b"%016x" % number, ttl_ms=HOUR_MS)
        before = view.certificate()
        assert before is not None
        await store.bump(generation, tags=["T:accounts"], ttl_ms=HOUR_MS)
        store.put(
            f"tenant:t:x:list:{number}",
            b"x" * 30_000,
            ttl_ms=HOUR_MS,
            generation=generation,
            generation_ttl_ms=HOUR_MS,
        )
        found = (await store.read(None, [(generation, ["T:accounts"])])).generations[0]
        verdict = found.judge(before, ["T:accounts"])
        assert verdict in (Verdict.INVALIDATED, Verdict.NO_GENERATION)
        lost += verdict is Verdict.NO_GENERATION
    assert "evicted_keys:0\r\n" not in (await store.info()).stats


@pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
async def test_a_frozen_server_delays_nobody_for_longer_than_one_deadline(
    store_on: MakeStore,
    make_valkey: Callable[..., EmbeddedValkey],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every operation fails: the first after its deadline, the later ones in their first step,
    before they could wait. Thawed, all work again."""
    caplog.set_level(logging.INFO, "respcache.resp")
    server = make_valkey()
    store = store_on(server.url, deadline_s=0.05)
    await store.connect()
    await work(store)
    await store.switch()  # nothing is under way any more that could still be answered
    server.freeze()
    with pytest.raises(StoreUnavailable):
        await store.read(ENTRY, [(GEN, [])])
    for operation in (
        store.read(ENTRY, [(GEN, [])]),
        store.open(GEN, nonce=N1, ttl_ms=HOUR_MS),
        store.bump(GEN, tags=[FLOOR], ttl_ms=HOUR_MS),
        store.lock(FILL, FillLock("mine", Certificate(N1, 0)), ttl_ms=HOUR_MS),
        store.switch(),
        store.info(),
    ):
        with pytest.raises(StoreUnavailable):
            operation.send(None)
    store.put(ENTRY, b"x", ttl_ms=HOUR_MS, generation=GEN, generation_ttl_ms=HOUR_MS)
    store.release(FILL, "mine")
    server.thaw()
    await until(lambda: store.available)
    # what was put while it was down is lost, not late
    assert (await store.read(ENTRY, [])).entry is None
    await work(store)


async def test_after_a_crash_the_store_comes_back_by_itself(
    store_on: MakeStore, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Killed in the middle of work: those who wait fail at once, and later ones are served by the
    new life."""
    server = make_valkey()
    store = store_on(server.url, deadline_s=HOUR_MS / 1000)
    await store.connect()
    await work(store)
    server.freeze()  # so that the work is certainly under way when it dies
    waiting = [asyncio.create_task(store.read(ENTRY, [(GEN, [])])) for _ in range(20)]
    await asyncio.sleep(0)
    server.kill()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
    assert all(isinstance(result, StoreUnavailable) for result in results)
    server.start()
    await until(lambda: store.available)
    assert (await store.read(None, [(GEN, [])])).generations[0].nonce is None
    await work(store, N2)


async def test_two_processes_that_open_and_bump_at_once_agree(
    store_on: MakeStore, valkey_url: str
) -> None:
    """Each on a connection of its own: one nonce wins, and no bump is lost."""
    stores = [store_on(valkey_url) for _ in range(4)]
    for store in stores:
        await store.connect()
    views = await asyncio.gather(
        *(store.open(GEN, nonce=b"%016d" % n, ttl_ms=HOUR_MS) for n, store in enumerate(stores))
    )
    assert len({view.nonce for view in views}) == 1
    await asyncio.gather(
        *(
            store.bump(GEN, tags=[f"T:t{n % 3}"], ttl_ms=HOUR_MS)
            for n in range(25)
            for store in stores
        )
    )
    found = (await stores[0].read(None, [(GEN, ["T:t0", "T:t1", "T:t2"])])).generations[0]
    assert found.sequence == 100
    assert max(found.bumps.values()) == 100


async def test_the_password_shows_nowhere(
    store_on: MakeStore, valkey_server: EmbeddedValkey
) -> None:
    """Stores are printed in tracebacks and logs."""
    store = store_on(valkey_server.url)
    assert valkey_server.password not in repr(store)
    assert str(valkey_server.port) in repr(store)
