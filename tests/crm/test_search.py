"""What is stored, as operators see it: search, samples, one key, its body; and purges. On a real
Valkey, through the CRM."""

import asyncio
from typing import Any

import pytest
import redis

from respcache import Cache, MemoryStore, SingleTenant
from respcache.core.errors import AccessRefused, InvalidOperation, NotFound, StoreUnavailable
from respcache.core.keys import generation_key
from respcache.ops import keyspace, search
from respcache.ops.access import Access, Role
from respcache.ops.admin import Admin
from respcache.ops.stats.publisher import StatsPublisher

from .conftest import LONG_LEASE_S, MODULES, Crm, hit

pytestmark = pytest.mark.anyio
ROOT = Access(name="root", role=Role.OPERATOR)
VIEWER = Access(name="vic", role=Role.VIEWER)


@pytest.fixture
def lease_s() -> float:
    """Hits are what these tests look at."""
    return LONG_LEASE_S


class Stored:
    """The CRM with answers in its cache."""

    def __init__(self, crm: Crm) -> None:
        self.crm = crm
        self.admin: Admin = crm.app.app.state.cache_admin
        self.acme, self.globex = (str(crm.tenants[name].id) for name in ("acme", "globex"))

    async def keys(self, **query: Any) -> list[str]:
        """Search to the end."""
        found, cursor = [], ""
        while True:
            page = await self.admin.keys(ROOT, cursor=cursor, **query)
            found += [facts.key for facts in page.keys]
            cursor = page.cursor
            if not cursor:
                return found

    async def settle(self) -> None:
        """Wait until what is stored is stored."""
        await asyncio.sleep(0)
        await self.crm.cache.store.info()


@pytest.fixture
async def stored(crm: Crm) -> Stored:
    for name in ("abe", "gus"):
        for module in MODULES:
            assert (await crm.as_user(name).get(f"/api/{module}")).status_code == 200
    await crm.as_user("abe").get("/api/accounts?search=secret-name&_t=1")
    made = Stored(crm)
    await made.settle()
    return made


async def test_keys_are_found_by_tenant_and_module(stored: Stored, valkey_url: str) -> None:
    """All of them, each once, and nothing else: neither generations nor leases nor what others keep
    there."""
    with redis.Redis.from_url(valkey_url) as client:
        client.set("tenant:foreign", "x")
        client.set(f"tenant:{stored.acme}:accounts:list:xyz", "x")
        there = {key.decode() for key in client.keys("tenant:*:list:*")} - {
            f"tenant:{stored.acme}:accounts:list:xyz"
        }
    assert set(await stored.keys()) == there
    assert len(there) == 2 * len(MODULES) + 1
    of_acme = await stored.keys(tenant=stored.acme)
    assert sorted(of_acme) == sorted(
        key for key in there if key.startswith(f"tenant:{stored.acme}:")
    )
    assert len(await stored.keys(tenant=stored.acme, module="accounts")) == 2
    assert len(await stored.keys(module="accounts")) == 3
    assert await stored.keys(tenant="nobody") == []


async def test_a_search_says_what_each_key_is_and_how_far_it_looked(
    stored: Stored, valkey_url: str
) -> None:
    """Sizes as on the server."""
    page = await stored.admin.keys(VIEWER, tenant=stored.acme, module="leads")
    (facts,) = page.keys
    with redis.Redis.from_url(valkey_url) as client:
        assert page.scanned == page.total == client.dbsize()
        assert facts.size_bytes == client.strlen(facts.key)
    assert (facts.tenant, facts.module, facts.kind) == (stored.acme, "leads", "list")
    assert 0 < facts.ttl_left_s <= 180
    assert 0 <= facts.age_s < 60
    found = [one.key for one in (await stored.admin.keys(VIEWER)).keys]
    assert found == sorted(found)
    assert facts.fill_ms >= 0


async def test_a_search_goes_through_a_bounded_number_of_keys(
    stored: Stored, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on where it stopped, until all was looked at."""
    monkeypatch.setattr(search, "MAX_SCANNED", 1_000)
    with redis.Redis.from_url(valkey_url) as client:
        pipeline = client.pipeline()
        for number in range(5_000):
            pipeline.set(f"foreign:{number}", "x")
        pipeline.execute()
    pages, cursor = 0, ""
    found: set[str] = set()
    while pages == 0 or cursor:
        page = await stored.admin.keys(ROOT, tenant=stored.acme, cursor=cursor)
        assert page.scanned <= 3_000
        assert page.total > 5_000
        found |= {facts.key for facts in page.keys}
        cursor, pages = page.cursor, pages + 1
    assert pages >= 2
    assert len(found) == len(MODULES) + 1
    purge = await stored.admin.purge(VIEWER, tenant=stored.acme, dry_run=True)
    assert not purge.complete
    assert purge.scanned < purge.scanned + 1 <= page.total
    assert not (await stored.admin.sample(VIEWER)).complete


@pytest.mark.parametrize(
    "wrong",
    [
        {"cursor": "x"},
        {"cursor": "-1"},
        {"cursor": str(2**64)},
        {"module": "*"},
        {"module": "a:b"},
        {"tenant": "*"},
    ],
)
async def test_a_search_for_what_cannot_be_is_refused(
    stored: Stored, wrong: dict[str, str]
) -> None:
    """No glob, no blank, no colon gets to the server."""
    with pytest.raises(NotFound):
        await stored.admin.keys(ROOT, **wrong)
    for limit in (0, 1_001):
        with pytest.raises(InvalidOperation, match=str(limit)):
            await stored.admin.keys(ROOT, limit=limit)


async def test_one_command_goes_through_a_bounded_number_of_keys(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands go through more and more of them, up to an end."""
    monkeypatch.setattr(keyspace, "FIRST_BATCH", 1)
    monkeypatch.setattr(keyspace, "MAX_BATCH", 2)
    with redis.Redis.from_url(valkey_url) as client:
        client.mset({f"key {number}": "x" for number in range(500)})
    publisher = StatsPublisher(valkey_url)
    walk = await keyspace.ServerKeys(publisher).find("nothing", cursor="", enough=1, most=9)
    assert (walk.scanned, walk.cursor != "") == (9, True)
    await publisher.close()


async def test_a_sample_names_the_largest_and_the_costliest_and_when_they_end(
    stored: Stored,
) -> None:
    """Of one tenant and module, or of all."""
    for number in range(40):
        await stored.crm.as_user("abe").post("/api/accounts", json={"name": f"account {number}"})
    await stored.crm.as_user("abe").get("/api/accounts")
    await stored.settle()
    sample = await stored.admin.sample(VIEWER)
    assert sample.complete
    assert sample.sampled == len(await stored.keys())
    assert sample.scanned == sample.total
    sizes = [facts.size_bytes for facts in sample.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert sample.largest[0].module == "accounts"
    costs = [facts.fill_ms for facts in sample.costliest]
    assert costs == sorted(costs, reverse=True)
    assert sum(bucket.count for bucket in sample.ttl) == sample.sampled
    assert {bucket.below_s: bucket.count for bucket in sample.ttl}[180.0] == sample.sampled
    assert sum(sample.modules.values()) == sample.size_bytes
    part = await stored.admin.sample(VIEWER, tenant=stored.globex, module="leads")
    assert (part.sampled, list(part.modules)) == (1, ["leads"])


# -- one key ---------------------------------------------------------------------------------------


async def test_a_key_is_scanned_closely(stored: Stored) -> None:
    """With the parts of the request that leads to it, where this process remembers one; and no
    body."""
    keys = await stored.keys(tenant=stored.acme, module="accounts")
    found = [await stored.admin.inspect(VIEWER, key) for key in keys]
    (one,) = [
        inspection
        for inspection in found
        if any(part.value == "secret-name" for part in inspection.parts)
    ]
    assert (one.tenant, one.module, one.kind, one.route) == (
        stored.acme,
        "accounts",
        "list",
        "/api/accounts",
    )
    assert one.key.endswith(one.digest)
    assert one.policy is not None
    assert one.tags == ("*", "M:accounts", "T:accounts")
    assert one.entry.verdict == "valid"
    assert one.generation.server == one.generation.connected
    assert one.in_memory
    assert ("content-type", "application/json") in one.headers


async def test_the_verdict_of_a_key_is_that_of_its_generation(stored: Stored) -> None:
    """With and without a request that is remembered; where several routes are possible that differ,
    it says so."""
    (key,) = await stored.keys(tenant=stored.acme, module="leads")
    await stored.crm.as_user("abe").post("/api/leads", json={"first_name": "A", "last_name": "B"})
    for _ in range(2):
        found = await stored.admin.inspect(VIEWER, key)
        assert (found.entry.verdict, found.entry.bumped) == ("invalidated", ("T:leads",))
        assert (found.route is None) == (_ == 1)
        stored.crm.cache.forget()
    keys = await stored.keys(tenant=stored.acme, module="accounts")
    contact = {"first_name": "A", "last_name": "B"}
    # which related-people reads, also a list of accounts
    await stored.crm.as_user("abe").post("/api/contacts", json=contact)
    found = await stored.admin.inspect(VIEWER, keys[0])
    assert found.entry.verdict == "depends"
    assert "invalidated if /api/accounts/{id}/related-people" in found.entry.why
    assert "valid if /api/accounts" in found.entry.why
    assert set(found.routes) == {
        "/api/accounts",
        "/api/accounts/search",
        "/api/accounts/{id}/related-people",
    }
    await stored.crm.cache.invalidate_tenant_cache(stored.acme, "accounts")
    found = await stored.admin.inspect(VIEWER, keys[0])
    assert (found.entry.verdict, found.entry.bumped[:1]) == ("invalidated", ("M:accounts",))


@pytest.mark.parametrize(
    "key", ["", "x", "respcache:~inc", "tenant:{acme}:~gen", "tenant:{acme}:leads:list:" + "0" * 32]
)
async def test_a_key_that_is_none_is_not_found(stored: Stored, key: str) -> None:
    """Whatever else is stored under it."""
    for look in (stored.admin.inspect, stored.admin.reveal):
        with pytest.raises(NotFound):
            await look(ROOT, key.format(acme=stored.acme))


async def test_what_is_no_entry_is_not_found(stored: Stored, valkey_url: str) -> None:
    """A foreign value under one of our keys is said to be one."""
    (key,) = await stored.keys(tenant=stored.acme, module="leads")
    with redis.Redis.from_url(valkey_url) as client:
        client.set(key, "x" * 200)
    with pytest.raises(NotFound, match="not an entry of this release"):
        await stored.admin.inspect(ROOT, key)
    assert (await stored.admin.keys(ROOT, tenant=stored.acme, module="leads")).keys == []


async def test_a_body_is_shown_to_operators_and_that_is_trailed(stored: Stored) -> None:
    """Decompressed."""
    for number in range(40):
        await stored.crm.as_user("abe").post(
            "/api/leads", json={"first_name": f"person {number}", "last_name": "B"}
        )
    await stored.crm.as_user("abe").get("/api/leads")
    await stored.settle()
    (key,) = await stored.keys(tenant=stored.acme, module="leads")
    with pytest.raises(AccessRefused):
        await stored.admin.reveal(VIEWER, key)
    assert await stored.admin.audit_log(ROOT) == []
    body = await stored.admin.reveal(ROOT, key)
    assert (await stored.admin.inspect(VIEWER, key)).entry.coding == "zstd"
    assert body.text is not None
    assert "person 39" in body.text
    assert (body.content_type, body.size_bytes, body.truncated) == (
        "application/json",
        len(body.text),
        False,
    )
    (act,) = await stored.admin.audit_log(ROOT)
    assert (act.action, act.name, act.tenant, act.details) == (
        "reveal",
        "root",
        stored.acme,
        {"key": key},
    )


async def test_a_long_body_is_shown_in_part_and_a_value_as_json(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no text is not shown."""
    monkeypatch.setattr(search, "MAX_SHOWN", 10)

    async def make() -> Any:
        return {"answer": 42}

    async def bytes_that_are_none() -> Any:
        return {1: b"\xff"}

    await stored.crm.cache.get_or_set(stored.acme, "numbers", {"n": 1}, make)
    await stored.settle()
    (key,) = await stored.keys(tenant=stored.acme, module="numbers")
    body = await stored.admin.reveal(ROOT, key)
    assert (body.text, body.truncated, body.content_type) == ('{"answer":', True, "")
    found = await stored.admin.inspect(VIEWER, key)
    assert (found.routes, found.entry.verdict) == ([], "valid")
    await stored.crm.as_user("abe").post("/api/accounts", json={"name": "x"})
    assert (await stored.admin.inspect(VIEWER, key)).entry.verdict == "depends"


# -- purge -----------------------------------------------------------------------------------------


async def test_a_dry_run_counts_and_changes_nothing(stored: Stored) -> None:
    """And is not trailed; viewers may."""
    everything = await stored.admin.purge(VIEWER, tenant=stored.acme, dry_run=True)
    module = await stored.admin.purge(VIEWER, tenant=stored.acme, module="accounts", dry_run=True)
    (key,) = await stored.keys(tenant=stored.acme, module="leads")
    one = await stored.admin.purge(VIEWER, key=key, dry_run=True)
    none = await stored.admin.purge(
        VIEWER, key=key[:-1] + ("0" if key[-1] != "0" else "1"), dry_run=True
    )
    assert [purge.entries for purge in (everything, module, one, none)] == [
        len(MODULES) + 1,
        2,
        1,
        0,
    ]
    assert all(
        purge.complete and purge.dry_run and purge.confirmed is None
        for purge in (everything, module, one, none)
    )
    assert hit(await stored.crm.as_user("abe").get("/api/leads"))
    assert await stored.admin.audit_log(ROOT) == []


async def test_a_purge_of_a_module_or_a_tenant_is_one_bump(stored: Stored, valkey_url: str) -> None:
    """Of just that; nothing is deleted; trailed."""
    abe, gus = stored.crm.as_user("abe"), stored.crm.as_user("gus")
    with redis.Redis.from_url(valkey_url) as client:
        size = client.dbsize()
        sequence = int(client.hget(generation_key(stored.acme), "s"))
        purge = await stored.admin.purge(ROOT, tenant=stored.acme, module="leads")
        assert (purge.confirmed, purge.dry_run, purge.entries) == (True, False, None)
        assert int(client.hget(generation_key(stored.acme), "s")) == sequence + 1
        assert client.dbsize() == size
    assert not hit(await abe.get("/api/leads"))
    assert hit(await abe.get("/api/contacts"))
    assert hit(await gus.get("/api/leads"))
    assert (await stored.admin.purge(ROOT, tenant=stored.acme)).confirmed
    assert not hit(await abe.get("/api/contacts"))
    assert hit(await gus.get("/api/contacts"))
    acts = await stored.admin.audit_log(ROOT)
    assert [(act.action, act.tenant, act.details) for act in acts] == [
        ("purge", stored.acme, {}),
        ("purge", stored.acme, {"module": "leads"}),
    ]


async def test_a_purge_of_a_key_deletes_it_everywhere(stored: Stored, valkey_url: str) -> None:
    """From the server, and from the memory of every process that hears it."""
    (key,) = await stored.keys(tenant=stored.acme, module="leads")
    other = Cache(
        type(stored.crm.cache.store)(valkey_url),
        secret=b"k" * 32,
        resolver=SingleTenant("x"),
        verify_share=0,
    )
    await other.connect()
    other.runtime.near.put(key, stored.crm.cache.runtime.near.peek(key), size_bytes=100)  # type: ignore[arg-type]
    other.runtime.near.put(key + "x", stored.crm.cache.runtime.near.peek(key), size_bytes=100)  # type: ignore[arg-type]
    purge = await stored.admin.purge(ROOT, key=key)
    assert (purge.tenant, purge.entries, purge.confirmed) == (stored.acme, 1, True)
    async with asyncio.timeout(60):
        while key in other.runtime.near:
            await asyncio.sleep(0.01)
    assert key + "x" in other.runtime.near
    assert key not in stored.crm.cache.runtime.near
    assert not hit(await stored.crm.as_user("abe").get("/api/leads"))
    assert hit(await stored.crm.as_user("abe").get("/api/contacts"))
    await other.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"tenant": "*"},
        {"tenant": "{acme}", "module": "nothing"},
        {"key": "x"},
        {"key": "{key}", "module": "leads"},
        {"key": "{key}", "tenant": "{globex}"},
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
async def test_a_purge_of_what_cannot_be_is_refused(
    stored: Stored, wrong: dict[str, str], dry_run: bool
) -> None:
    """And not trailed."""
    (key,) = await stored.keys(tenant=stored.acme, module="leads")
    given = {
        name: value.format(acme=stored.acme, globex=stored.globex, key=key)
        for name, value in wrong.items()
    }
    with pytest.raises((NotFound, InvalidOperation)):
        await stored.admin.purge(ROOT, dry_run=dry_run, **given)
    assert await stored.admin.audit_log(ROOT) == []


# -- other servers ---------------------------------------------------------------------------------


async def test_a_store_in_memory_is_searched_too() -> None:
    """For applications of one process."""
    cache = Cache(MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("t"), verify_share=0)
    admin = Admin(cache)
    await cache.connect()

    async def make() -> int:
        return 1

    for number in range(3):
        await cache.get_or_set("t", "numbers", {"n": number}, make)
    await asyncio.sleep(0)
    keys = [facts.key for facts in (await admin.keys(ROOT, tenant="t")).keys]
    assert len(keys) == 3
    assert (await admin.sample(ROOT)).sampled == 3
    assert (await admin.purge(ROOT, tenant="t", dry_run=True)).entries == 3
    assert (await admin.inspect(ROOT, keys[0])).in_memory
    assert (await admin.purge(ROOT, key=keys[0])).entries == 1
    assert keys[0] not in cache.runtime.near
    assert len((await admin.keys(ROOT)).keys) == 2
    await cache.get_or_set("t", "words", {}, make)
    await asyncio.sleep(0)
    assert [facts.module for facts in (await admin.keys(ROOT, module="words")).keys] == ["words"]
    assert len((await admin.keys(ROOT)).keys) == 3
    await cache.close()


async def test_without_its_server_the_keys_cannot_be_searched(
    stored: Stored, valkey_url: str
) -> None:
    """That is said."""
    cache = Cache(
        type(stored.crm.cache.store)(valkey_url),
        secret=b"k" * 32,
        resolver=SingleTenant("x"),
        verify_share=0,
    )
    for publisher in (None, StatsPublisher("redis://127.0.0.1:1/0")):
        admin = Admin(cache, publisher)
        for question in (
            admin.keys(ROOT),
            admin.sample(ROOT),
            admin.purge(ROOT, tenant="x", dry_run=True),
        ):
            with pytest.raises(StoreUnavailable):
                await question
        with pytest.raises(StoreUnavailable):
            await admin.inspect(ROOT, f"tenant:{stored.acme}:leads:list:" + "0" * 32)
