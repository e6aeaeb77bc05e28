"""The feed of invalidations: what the CRM, psql, operators and the audit do, in two processes, on a
real server."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import redis

from crm.app import create_app
from crm.settings import Settings
from respcache import Cache, MemoryStore, SingleTenant
from respcache.core.errors import InvalidOperation, NotFound
from respcache.core.keys import FED_KEY, FEED_KEY
from respcache.core.serving_lease import Outcome
from respcache.ops import feed as feeds
from respcache.ops.access import Access, Role
from respcache.ops.acl import ADMINISTRATION
from respcache.ops.admin import Admin
from respcache.ops.feed import MAX_AT_ONCE, Event, Reporter
from respcache.ops.stats.publisher import StatsPublisher
from respcache.testing.servers import EmbeddedValkey
from tests.cli.conftest import log_in_as

from .conftest import NEW, SECRET, Crm

pytestmark = pytest.mark.anyio
ROOT = Access(name="root", role=Role.OPERATOR)


def admin_of(crm: Crm) -> Admin:
    admin: Admin = crm.app.app.state.cache_admin
    return admin


async def until(found: Callable[[], Awaitable[Any]], seconds: float = 60.0) -> Any:
    """Wait until there is something, and return it."""
    async with asyncio.timeout(seconds):
        while not (seen := await found()):
            await asyncio.sleep(0.05)
        return seen


async def caused(admin: Admin, cause: str, count: int = 1) -> list[Event]:
    """Wait for so many events with a cause."""

    async def look() -> list[Event] | None:
        found = [event for event in (await admin.feed(ROOT)).events if event.cause == cause]
        return found if len(found) >= count else None

    events: list[Event] = await until(look)
    return events


@asynccontextmanager
async def second_process(database_url: str, valkey_url: str) -> AsyncIterator[Cache]:
    """Run another process of the CRM."""
    app = create_app(
        Settings(
            database_url=database_url,
            redis_cache_url=valkey_url,
            jwt_secret=SECRET,
            respcache_key=SECRET,
        )
    )
    cache: Cache = app.app.state.cache
    await cache.connect()
    app.prepare()
    yield cache
    await cache.close()
    await app.app.state.sessions.kw["bind"].dispose()


@pytest.fixture
async def psql(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that no cache knows of."""
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    yield connection
    await connection.close()


def order(name: str) -> tuple[int, ...]:
    """Return what ids of the stream are sorted by."""
    return tuple(map(int, name.split("-")))


async def warm(crm: Crm) -> None:
    """Have generations, without which nothing is invalidated."""
    for name in ("abe", "gus"):
        await crm.as_user(name).get("/api/leads")


async def test_a_write_through_the_application_is_told_with_its_route(crm: Crm) -> None:
    """Not with its path, which names a row."""
    await warm(crm)
    abe = crm.as_user("abe")
    lead = (await abe.post("/api/leads", json=NEW["leads"])).json()["data"]["lead"]
    await abe.put(f"/api/leads/{lead['id']}", json={"first_name": "Lee"})
    (event,) = await caused(admin_of(crm), "PUT /api/leads/{id}")
    assert event.tenant == str(crm.tenants["acme"].id)
    assert event.tables == ("leads",)
    assert {"leads", "opportunities", "dashboard"} <= set(event.modules)
    assert (event.everything, event.outcome) == (False, "confirmed")
    assert 0 < event.seconds < 60
    assert (event.process, event.skipped) == (f"{socket.gethostname()}:{os.getpid()}", 0)
    assert lead["id"] not in repr(event)
    (created,) = await caused(admin_of(crm), "POST /api/leads")
    assert created.at < event.at


@pytest.mark.long
async def test_what_psql_writes_is_told_once_however_many_processes_see_it(
    crm: Crm, psql: asyncpg.Connection, database_url: str, valkey_url: str
) -> None:
    """By the process that applied it first; and a write of the application by the one that did
    it."""
    async with second_process(database_url, valkey_url) as other:
        await warm(crm)
        for number in range(5):
            insert = (
                "INSERT INTO tasks (id, tenant_id, description) VALUES (gen_random_uuid(), $1, $2)"
            )
            await psql.execute(insert, crm.tenants["globex"].id, f"task {number}")
            await asyncio.wait_for(crm.cache.runtime.relay.caught_up(), 60)
            await asyncio.wait_for(other.runtime.relay.caught_up(), 60)
            await crm.as_user("abe").post("/api/leads", json=NEW["leads"])
            await asyncio.wait_for(crm.cache.runtime.relay.caught_up(), 60)
            await asyncio.wait_for(other.runtime.relay.caught_up(), 60)
        events = await caused(admin_of(crm), "outbox", 5)
        assert all(
            (event.tenant, event.tables) == (str(crm.tenants["globex"].id), ("tasks",))
            for event in events[:5]
        )
        assert all(0 < event.seconds < 60 for event in events)
        await caused(admin_of(crm), "POST /api/leads", 5)
        await asyncio.sleep(2 * feeds.PERIOD_S)
        found = (await admin_of(crm).feed(ROOT)).events
        assert [event.cause for event in found if event.tables == ("tasks",)] == ["outbox"] * 5
        # a relay cycle may be faster than the writer: then both tell
        assert 5 <= len([event for event in found if event.tables == ("leads",)]) <= 10


async def test_a_purge_and_an_invalidation_by_hand_are_told_with_who_did_it(crm: Crm) -> None:
    """Of a module, and of everything."""
    await warm(crm)
    acme = str(crm.tenants["acme"].id)
    await admin_of(crm).purge(ROOT, tenant=acme, module="leads")
    await admin_of(crm).purge(ROOT, tenant=acme)
    module, everything = await caused(admin_of(crm), "purge by root", 2)
    assert (module.modules, module.tables, module.everything) == (("leads",), (), False)
    assert (everything.modules, everything.everything) == ((), True)
    await crm.as_user("gus").post("/api/cache/invalidate", json={"modules": ["tasks"]})
    (event,) = await caused(admin_of(crm), "purge by gus@x.example")
    assert (event.tenant, event.modules) == (str(crm.tenants["globex"].id), ("tasks",))
    await crm.cache.invalidate_all_tenant(acme)
    await caused(admin_of(crm), "script")


async def test_what_the_audit_finds_is_told(crm: Crm, psql: asyncpg.Connection) -> None:
    """An invalidation that somebody took out of the outbox before its COMMIT."""
    await crm.save(crm.account("acme", "Acorn"))
    await warm(crm)
    abe = crm.as_user("abe")
    while "; hit" not in (await abe.get("/api/accounts")).headers["cache-status"]:
        await asyncio.sleep(0.01)
    async with psql.transaction():
        await psql.execute(
            "UPDATE accounts SET name = 'Oak' WHERE tenant_id = $1", crm.tenants["acme"].id
        )
        await psql.execute(
            "DELETE FROM respcache_outbox WHERE xid = pg_current_xact_id_if_assigned()"
        )
    verifier = crm.cache.runtime.verifier
    assert verifier is not None

    async def found() -> bool:
        verifier.countdown, verifier.rest_until = 1, float("-inf")
        await abe.get("/api/accounts")
        return bool(verifier.found.mismatches)

    await until(found)
    events = await caused(admin_of(crm), "verifier")
    assert {event.tenant for event in events} == {str(crm.tenants["acme"].id)}
    assert events[0].tables == ("accounts",)
    assert events[0].modules[0] == "accounts"


async def test_the_feed_goes_on_where_it_was_read_to(crm: Crm) -> None:
    """In parts, each event once; of one tenant, if that is asked for."""
    admin, acme, globex = admin_of(crm), *(str(crm.tenants[name].id) for name in ("acme", "globex"))
    await warm(crm)
    await caused(admin, "script")  # that the people of the test were made
    start = (await admin.feed(ROOT)).last
    for number in range(6):
        await admin.purge(ROOT, tenant=(acme, globex)[number % 2], module="leads")
    await caused(admin, "purge by root", 6)
    seen: list[Event] = []
    after = start
    while True:
        part = await admin.feed(ROOT, after=after, limit=4)
        assert part.processes == "all"
        if not part.events:
            break
        seen += part.events
        after = part.last
    assert [event.tenant for event in seen] == [acme, globex] * 3
    assert [event.id for event in seen] == sorted((event.id for event in seen), key=order)
    assert [
        event.tenant for event in (await admin.feed(ROOT, tenant=acme, after=start)).events
    ] == [acme] * 3
    assert [event.id for event in (await admin.feed(ROOT, limit=2)).events] == [
        event.id for event in seen[-2:]
    ]
    assert (await admin.feed(ROOT, after=after)).last == after
    mine = Access(name="abe", role=Role.VIEWER, tenant=acme)
    assert {event.tenant for event in (await admin.feed(mine)).events} == {acme}
    with pytest.raises(NotFound):
        await admin.feed(mine, tenant=globex)
    for wrong in ("x", "1", "-", "1-2-3", "$", f"{2**64}-0"):
        with pytest.raises(InvalidOperation, match="after"):
            await admin.feed(ROOT, after=wrong)


async def test_an_empty_feed_can_be_gone_on_from(crm: Crm) -> None:
    """What comes next is not missed."""
    with redis.Redis.from_url(
        crm.app.app.state.settings.redis_cache_url.get_secret_value()
    ) as client:
        await caused(admin_of(crm), "script")
        client.delete(FEED_KEY)
    start = await admin_of(crm).feed(ROOT)
    assert (start.events, start.last) == ([], "0-0")
    await admin_of(crm).purge(ROOT, tenant="anybody")
    await caused(admin_of(crm), "purge by root")
    assert [event.cause for event in (await admin_of(crm).feed(ROOT, after=start.last)).events] == [
        "purge by root"
    ]


async def test_what_is_too_much_is_counted(
    crm: Crm, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the stream has an end, in number and in time; what another release wrote there is left
    out."""
    admin = admin_of(crm)
    reporter = crm.cache.feed
    await caused(admin, "script")  # that the people of the test were made
    rows = [(f"tenant-{number}", "T:leads", "") for number in range(MAX_AT_ONCE + 30)]
    reporter.note(rows, Outcome.CONFIRMED, 0.1, by="a burst")
    events = await caused(admin, "a burst", MAX_AT_ONCE)
    assert len(events) == MAX_AT_ONCE
    assert sum(event.skipped for event in events) == 30
    reporter.note([("one", "*", "")], Outcome.CONFIRMED, 0.1, by="another")
    (event,) = await caused(admin, "another")
    assert (event.skipped, event.everything) == (0, True)
    with redis.Redis.from_url(valkey_url) as client:
        assert 0 < client.ttl(FEED_KEY) <= feeds.TTL_S
        client.zadd(FED_KEY, {"long ago": 1})
        reporter.note([("one", "T:leads", "a row")], Outcome.CONFIRMED, 0.1, by="a row")
        (event,) = await caused(admin, "a row")
        assert 0 < client.ttl(FED_KEY) <= feeds.REPORTED_S
        assert (
            client.zscore(FED_KEY, "a row") is not None,
            client.zscore(FED_KEY, "long ago"),
        ) == (True, None)
        client.xadd(FEED_KEY, {"e": "what is this"})
        client.xadd(FEED_KEY, {"other": "x"})
        assert (await admin.feed(ROOT)).events[-1] == event
        monkeypatch.setattr(feeds, "MAX_KEPT", 10)
        for number in range(300):
            client.xadd(FEED_KEY, {"e": f"{number}"})
        reporter.note([("one", "*", "")], Outcome.CONFIRMED, 0.1, by="the last")
        await caused(admin, "the last")
        assert client.xlen(FEED_KEY) < 200


async def test_who_reaches_one_tenant_is_told_nothing_of_workers_and_of_what_others_write(
    crm: Crm,
) -> None:
    """What was too much to be told is of all tenants together."""
    admin = admin_of(crm)
    await caused(admin, "script")  # that the people of the test were made
    rows = [(f"tenant-{number}", "T:leads", "") for number in range(MAX_AT_ONCE + 30)]
    crm.cache.feed.note(rows, Outcome.CONFIRMED, 0.1, by="a burst")
    events = await caused(admin, "a burst", MAX_AT_ONCE)
    (told,) = (event for event in events if event.skipped)
    (own,) = (await admin.feed(Access(name="abe", role=Role.OPERATOR, tenant=told.tenant))).events
    assert (own.id, own.skipped, own.process) == (told.id, 0, "")
    (same,) = (await admin.feed(ROOT, tenant=told.tenant)).events
    assert same == told


@pytest.mark.parametrize("away", ["refuses", "is silent"])
async def test_no_write_waits_for_the_feed(away: str) -> None:
    """Its server may refuse or be silent: the last events of this process are shown, and later it
    is said what is missing."""
    callers: list[asyncio.StreamWriter] = []
    for_ever = asyncio.Event()

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(writer)
        await for_ever.wait()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1] if away == "is silent" else 1
    publisher = StatsPublisher(f"redis://127.0.0.1:{port}/0", deadline_s=3600.0)
    cache = Cache(MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("t"), verify_share=0)
    reporter = Reporter(cache, publisher)
    cache.report(reporter)
    await cache.connect()
    for number in range(100):
        await cache.invalidate_tenant_cache("t", "leads")
        if number == 50 and away == "is silent":
            # something is being sent, and waits for an hour if it has to
            async with asyncio.timeout(60):
                while not callers:
                    await asyncio.sleep(0.01)
    silent.close()
    for_ever.set()
    for writer in callers:
        writer.transport.abort()
    async with asyncio.timeout(60):
        part = await reporter.read(tenant=None, after="", limit=10)
    assert (part.processes, len(part.events)) == ("this", 10)
    assert sum(event.skipped for event in part.events) > 0
    assert (await reporter.read(tenant=None, after=part.last, limit=10)).events == []
    assert len((await reporter.read(tenant=None, after=part.events[4].id, limit=10)).events) == 5
    await cache.close()


async def test_what_could_not_be_sent_is_counted(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """In the next event that can."""
    server = make_valkey()
    publisher = StatsPublisher(server.url)
    reporter = Reporter(
        Cache(MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("t"), verify_share=0),
        publisher,
    )
    server.stop()
    reporter.note([("t", "*", "")], Outcome.CONFIRMED, 0.1, by="lost")
    await reporter.close()
    server.start()
    reporter.note([("t", "*", "")], Outcome.CONFIRMED, 0.1, by="told")
    await reporter.close()
    events = (await reporter.read(tenant=None, after="", limit=10)).events
    assert [(event.cause, event.skipped) for event in events] == [("told", 1)]
    await publisher.close()


async def test_what_was_to_be_counted_is_counted_again(valkey_url: str) -> None:
    """Where the server refuses the event that said it."""
    publisher = StatsPublisher(log_in_as(valkey_url, ADMINISTRATION, without="+xadd"))
    reporter = Reporter(
        Cache(MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("t"), verify_share=0),
        publisher,
    )
    reporter.note(
        [(f"t{number}", "*", "") for number in range(MAX_AT_ONCE + 5)],
        Outcome.CONFIRMED,
        0.1,
        by="lost",
    )
    await reporter.close()
    log_in_as(valkey_url, ADMINISTRATION)
    reporter.note([("t", "*", "")], Outcome.CONFIRMED, 0.1, by="told")
    await reporter.close()
    (event,) = (await reporter.read(tenant=None, after="", limit=10)).events
    assert (event.cause, event.skipped) == ("told", MAX_AT_ONCE + 5)
    await publisher.close()


async def test_without_a_server_a_bounded_number_is_remembered() -> None:
    """The last ones; of tenants in the order of their names."""
    reporter = Reporter(
        Cache(MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("t"), verify_share=0),
        StatsPublisher(),
    )
    for number in range(feeds.MAX_REMEMBERED + 10):
        reporter.note([("t", "*", "")], Outcome.CONFIRMED, 0.1, by=f"{number}")
        await reporter.read(tenant=None, after="", limit=1)
    reporter.note([("b", "*", ""), ("a", "*", "")], Outcome.CONFIRMED, 0.1, by="two")
    events = (await reporter.read(tenant=None, after="", limit=1000)).events
    assert len(events) == feeds.MAX_REMEMBERED
    assert [event.tenant for event in events[-3:]] == ["t", "a", "b"]
    await reporter.close()


async def test_a_report_that_fails_fails_no_write(crm: Crm) -> None:
    """Whatever it is."""

    def broken(*arguments: Any) -> None:
        raise RuntimeError("broken")

    crm.cache.runtime.invalidator.on_invalidated = broken
    answer = await crm.as_user("abe").post("/api/leads", json=NEW["leads"])
    assert (answer.status_code, answer.headers.get("x-cache-invalidation")) == (201, None)
