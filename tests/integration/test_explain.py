"""``Admin.explain`` says what a request then gets, for every outcome there is. On a real PostgreSQL
and a real Valkey."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx2
import pytest
import redis
from fastapi import Depends, FastAPI, Header
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from respcache import Cache, Claim, Denied, RedisStore, RequestHead, Scope, cache_list
from respcache.core import entry as entries
from respcache.core.errors import InvalidOperation, NotFound
from respcache.core.keys import EPOCH_KEY, generation_key
from respcache.ops.access import Access, Role
from respcache.ops.admin import Admin
from respcache.ops.explain import Explanation
from respcache.testing.servers import EmbeddedValkey
from respcache.writes import triggers
from respcache.writes.postgres import PostgresOutbox

pytestmark = pytest.mark.anyio
ROOT = Access(name="root", role=Role.VIEWER)
COMMON = {"accept-encoding": "gzip, deflate", "x-user": "ann"}
SCHEMA = """
    CREATE TABLE people (name text PRIMARY KEY, tenant_id text, role text NOT NULL);
    CREATE TABLE things (id int PRIMARY KEY, tenant_id text NOT NULL);
    CREATE TABLE others (id int PRIMARY KEY, tenant_id text NOT NULL);
    INSERT INTO people VALUES
        ('ann', 'acme', 'user'), ('abe', 'acme', 'admin'), ('gus', 'globex', 'admin');
    INSERT INTO people VALUES ('root', NULL, 'admin');
"""


async def only_admins(x_user: str = Header("")) -> None:
    """The rule of a route."""


class People:
    """Callers by header, known from the database. Whoever belongs to no tenant may name one."""

    tables = ("people",)
    stands_for = frozenset[Any]()
    headers = ("x-user", "x-tenant")

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.broken = False

    def claim(self, head: RequestHead) -> Claim:
        """Believe the header."""
        name = head.header("x-user")
        if name is None:
            raise Denied("nobody")
        if self.broken:
            raise RuntimeError("broken")
        owner_tenant = {"ann": "acme", "abe": "acme", "gus": "globex"}.get(name, "~shared")
        return Claim((name, head.header("x-tenant")), owner_tenant)

    async def scope(self, claim: Claim) -> Scope:
        """Ask the database."""
        name, wanted = claim.key
        async with self._engine.connect() as connection:
            asked = text("SELECT tenant_id, role FROM people WHERE name = :name")
            row = (await connection.execute(asked, {"name": name})).one_or_none()
        if row is None:
            raise Denied("unknown")
        return Scope(row.tenant_id or wanted, row.role.encode())

    def permits(self, scope: Scope, rule: Any) -> bool:
        """Admins may everything."""
        return rule is None or scope.fingerprint == b"admin"


class World:
    """One process, and what can happen to it."""

    def __init__(self, database_url: str, valkey_url: str) -> None:
        self.engine = create_async_engine(database_url)
        self.store = RedisStore(valkey_url, deadline_s=2.0)
        self.resolver = People(self.engine)
        self.outbox = PostgresOutbox(self.engine)
        self.day = "monday"
        self.cache = Cache(
            self.store, secret=b"k" * 32, resolver=self.resolver, outbox=self.outbox, verify_share=0
        )
        self.app = FastAPI()
        self._add("/things", tables=["things"])
        self._add("/bounded", tables=["things"], level="bounded", bound_s=60)
        self._add("/admin", tables=["things"], rule=only_admins)
        self._add("/daily", tables=["things"], varies_by=lambda scope: self.day)
        self._add("/others", tables=["others"])
        self._add("/things/{id}", tables=["things"])
        self.app.get("/open")(self.handler("open"))
        self.app.put("/things")(self.handler("put"))
        self.wrapped = self.cache.wrap(self.app)
        self.admin = Admin(self.cache)
        transport = httpx2.ASGITransport(self.wrapped, raise_app_exceptions=False)
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://test")

    def handler(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def handler(q: str = "", limit: int = 50) -> str:
            return name * 2000

        handler.__name__ = name
        return handler

    def _add(self, path: str, **options: Any) -> None:
        dependencies = [Depends(only_admins)] if "rule" in options else []
        handler = self.handler(path.strip("/").replace("/", "_").replace("{id}", "one"))
        self.app.get(path, dependencies=dependencies)(cache_list("things", **options)(handler))

    async def get(self, path: str = "/things", method: str = "GET", **headers: str) -> str:
        """Ask, and wait until what is stored is stored."""
        answer = await self.http.request(method, path, headers={**COMMON, **headers})
        await asyncio.sleep(0)
        if self.store.available:
            await self.store.info()
        return answer.headers.get("cache-status", "")

    async def explain(
        self, path: str = "/things", method: str = "GET", **headers: str
    ) -> Explanation:
        """Have a request explained."""
        given = {"host": "test", **COMMON, **headers}
        return await self.admin.explain(ROOT, method=method, path=path, headers=given)

    async def agree(
        self, outcome: str, reason: str, path: str = "/things", method: str = "GET", **headers: str
    ) -> Explanation:
        """Have a request explained, then make it: it gets what was said."""
        said = await self.explain(path, method, **headers)
        assert (said.outcome, said.reason) == (outcome, reason), said
        assert said.why
        got = await self.get(path, method, **headers)
        if outcome == "hit":
            assert "; hit" in got
        elif outcome == "miss":
            assert "fwd=uri-miss" in got or "fwd=stale" in got
        else:
            assert got == (
                "" if reason == "not-cached" else f"respcache; fwd=bypass; detail={reason}"
            )
        return said

    async def served(self, path: str = "/things", **headers: str) -> None:
        """Wait until the request is a hit."""
        async with asyncio.timeout(20):
            while "; hit" not in await self.get(path, **headers):
                await asyncio.sleep(0.01)

    def forget_entries(self) -> None:
        """Have nothing in memory, so that the store is asked."""
        assert self.cache.runtime.near is not None
        self.cache.runtime.near.clear()

    async def stop_rounds(self) -> None:
        """Have the fence end with its lease."""
        assert self.cache.runtime.relay is not None
        running = self.cache.runtime.relay._running  # private: stops it without closing the outbox
        assert running is not None
        running.cancel()


@asynccontextmanager
async def running(database_url: str, valkey_url: str) -> AsyncIterator[World]:
    world = World(database_url, valkey_url)
    await world.cache.connect()
    yield world
    await world.http.aclose()
    await world.cache.close()
    await world.engine.dispose()


@pytest.fixture
async def psql(empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(empty_database_url.replace("+asyncpg", ""))
    statements: list[str] = []
    triggers.create_outbox(statements.append)
    triggers.create_triggers(
        statements.append, [triggers.Watched("people"), triggers.Watched("things")]
    )
    for statement in (SCHEMA, *statements):
        await connection.execute(statement)
    yield connection
    await connection.close()


@pytest.fixture
async def world(
    psql: asyncpg.Connection, empty_database_url: str, valkey_url: str
) -> AsyncIterator[World]:
    async with running(empty_database_url, valkey_url) as made:
        yield made


# -- hits ------------------------------------------------------------------------------------------


async def test_a_hit_from_memory_and_one_from_the_store(world: World) -> None:
    """Recognised by its bytes or not."""
    await world.served()
    said = await world.agree("hit", "memory")
    assert said.memory is not None
    assert (said.memory.plan, said.memory.held) == (True, True)
    said = await world.agree("hit", "memory", **{"x-tenant": "acme"})
    assert said.memory is not None
    assert (said.memory.plan, said.memory.held) == (False, True)
    world.forget_entries()
    said = await world.agree("hit", "store")
    assert said.memory is not None
    assert (said.memory.plan, said.memory.held) == (True, False)
    world.cache.forget()
    said = await world.agree("hit", "store")
    assert said.memory is not None
    assert said.caller is not None
    assert (said.memory.plan, said.caller.remembered) == (False, False)


async def test_what_is_said_of_a_hit(world: World, valkey_url: str) -> None:
    """Route, policy, parts, identity without credentials, generation, fence, entry and its
    verdict."""
    path = "/things?q=a&_t=1&limit=50&q=b"
    await world.served(path)
    said = await world.explain(path, cookie="session=secret")
    assert said.route == "/things"
    assert said.policy is not None
    assert (said.policy.module, said.policy.kind, said.policy.ttl_s, said.policy.tables) == (
        "things",
        "list",
        180,
        ("things",),
    )
    assert [(part.place, part.name, part.value) for part in said.parameters] == [
        ("query", "q", "b")
    ]
    assert said.left_out == [
        "query q: given again",
        "query _t: not declared",
        "query limit: the default",
        "header host: not declared",
        "header accept-encoding: only chooses the coding",
        "header x-user: identifies the caller",
        "header cookie: not declared",
    ]
    assert said.caller is not None
    assert (
        said.caller.tenant,
        said.caller.owner_tenant,
        said.caller.tables,
        said.caller.remembered,
    ) == (
        "acme",
        "acme",
        ("people",),
        True,
    )
    assert said.tags == ("*", "M:things", "T:things")
    assert said.generation is not None
    assert said.entry is not None
    assert (said.generation.server, said.generation.nonce) == (
        said.generation.connected,
        said.entry.nonce,
    )
    assert said.lease is not None
    assert said.lease.alive
    assert (said.entry.verdict, said.entry.status, said.entry.coding) == ("valid", 200, "zstd")
    with redis.Redis.from_url(valkey_url) as client:
        assert client.strlen(said.key) == said.entry.size_bytes
    assert said.entry.size_bytes < 2000 < 10_000
    assert 0 < said.entry.ttl_left_s <= said.entry.ttl_s <= 180
    assert "secret" not in repr(said)


async def test_a_bounded_hit_is_judged_by_what_this_process_last_knew(
    world: World, valkey_url: str
) -> None:
    """A write that it has not heard of does not count yet, but for who brings its token."""
    await world.served("/bounded")
    await world.stop_rounds()
    with redis.Redis.from_url(valkey_url) as client:
        sequence = client.hincrby(generation_key("acme"), "s", 1)
        client.hset(generation_key("acme"), "T:things", sequence)
        nonce = client.hget(generation_key("acme"), "n").decode()
    said = await world.agree("hit", "memory", "/bounded")
    assert said.entry is not None
    assert (said.entry.verdict, said.entry.bumped) == ("invalidated", ("T:things",))
    said = await world.agree(
        "hit", "memory", "/bounded", **{"x-cache-token": f"{nonce}.{sequence - 1}"}
    )
    assert said.memory is not None
    assert (
        said.memory.plan,
        "header x-cache-token: requires the writes that it names" in said.left_out,
    ) == (True, True)
    await world.agree("miss", "invalidated", "/bounded", **{"x-cache-token": f"{nonce}.{sequence}"})
    await world.agree("miss", "absent", "/things")


async def test_head_is_explained_like_get(world: World) -> None:
    """They share an entry."""
    await world.served()
    await world.agree("hit", "memory", method="HEAD")


# -- misses ----------------------------------------------------------------------------------------


async def test_nothing_is_stored_yet(world: World) -> None:
    """Nor is there a generation, or a scope that is known."""
    said = await world.agree("miss", "absent")
    assert said.entry is None
    assert said.generation is not None
    assert said.generation.nonce is None
    assert said.memory is not None
    assert not said.memory.held


@pytest.mark.parametrize("held", [True, False], ids=["held", "stored"])
@pytest.mark.parametrize(
    ("accident", "reason", "bumped"),
    [
        ("table", "invalidated", ("T:things",)),
        ("module", "invalidated", ("M:things",)),
        ("floor", "invalidated", ("*",)),
        ("generation lost", "no-generation", ()),
        ("generation made anew", "other-generation", ()),
        ("another life", "other-server", ()),
        ("another epoch", "other-epoch", ()),
    ],
)
async def test_an_entry_that_is_not_valid_any_more(
    world: World,
    psql: asyncpg.Connection,
    valkey_url: str,
    accident: str,
    reason: str,
    bumped: tuple[str, ...],
    held: bool,
) -> None:
    """Each reason by itself, for what is in memory and for what is not."""
    await world.served()
    with redis.Redis.from_url(valkey_url) as client:
        if accident == "table":
            await psql.execute("INSERT INTO things VALUES (1, 'acme')")
        elif accident == "module":
            await world.cache.invalidate_tenant_cache("acme", "things")
        elif accident == "floor":
            await world.cache.invalidate_all_tenant("acme")
        elif accident == "generation lost":
            client.delete(generation_key("acme"))
        elif accident == "generation made anew":
            client.delete(generation_key("acme"))
            await world.get("/daily")
        elif accident == "another life":
            server = client.hget(generation_key("acme"), "r").decode()
            client.hset(generation_key("acme"), "r", server.rpartition(":")[0] + ":" + "0" * 40)
        elif accident == "another epoch":
            client.delete(EPOCH_KEY)
            epochs = world.cache.runtime.relay.counters.epochs
            async with asyncio.timeout(20):
                while world.cache.runtime.relay.counters.epochs == epochs:
                    await asyncio.sleep(0.01)
    if accident == "table":
        async with asyncio.timeout(20):
            while (await world.explain()).outcome == "hit":
                await asyncio.sleep(0.01)
    if not held:
        world.forget_entries()
    said = await world.agree("miss", reason)
    assert said.entry is not None
    assert (said.entry.verdict, said.entry.bumped) == (reason, bumped)
    await world.agree("hit", "memory")


async def test_an_entry_whose_time_to_live_is_over(world: World, valkey_url: str) -> None:
    """It is not there any more, like one that was evicted."""
    await world.served()
    key = (await world.explain()).key
    world.forget_entries()
    with redis.Redis.from_url(valkey_url) as client:
        client.pexpire(key, 1)
        while client.exists(key):
            await asyncio.sleep(0.001)
    await world.agree("miss", "absent")


@pytest.mark.parametrize(
    ("accident", "reason"), [("digest", "digest"), ("foreign", "unreadable"), ("bits", "damaged")]
)
async def test_what_is_stored_is_not_what_it_should_be(
    world: World, valkey_url: str, accident: str, reason: str
) -> None:
    """Copied from another key, none of ours, or damaged."""
    await world.served()
    key = (await world.explain()).key
    world.forget_entries()
    with redis.Redis.from_url(valkey_url) as client:
        stored = client.get(key)
        entry = entries.decode(stored)
        assert entry is not None
        if accident == "digest":
            entry.digest = b"0" * 16
        stored = b"what is this" if accident == "foreign" else entries.encode(entry)
        client.set(key, stored[:-9] if accident == "bits" else stored, px=60_000)
    if accident == "bits":  # whoever accepts zstd gets it as it is, and sees it
        said = await world.explain(**{"accept-encoding": "zstd"})
        assert (said.outcome, said.reason) == ("hit", "store")
    await world.agree("miss", reason)


async def test_another_day_is_another_key(world: World) -> None:
    """``varies_by`` is among the parts."""
    await world.served("/daily")
    world.day = "tuesday"
    said = await world.agree("miss", "absent", "/daily")
    assert ("varies", "tuesday") in [(part.place, part.value) for part in said.parameters]


async def test_a_scope_that_changed_is_read_anew(world: World, psql: asyncpg.Connection) -> None:
    """What somebody may see by now decides, not what is remembered."""
    await world.served()
    before = await world.explain()
    await psql.execute("UPDATE people SET role = 'admin' WHERE name = 'ann'")
    async with asyncio.timeout(20):
        while (await world.explain()).outcome == "hit":
            await asyncio.sleep(0.01)
    said = await world.agree("miss", "absent")
    assert said.caller is not None
    assert before.caller is not None
    assert (said.caller.remembered, said.caller.fingerprint == before.caller.fingerprint) == (
        False,
        False,
    )


# -- bypasses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/open"), ("PUT", "/things"), ("GET", "/nowhere"), ("DELETE", "/things")],
)
async def test_a_request_that_is_not_cached(world: World, method: str, path: str) -> None:
    """By its route or by its method."""
    await world.agree("bypass", "not-cached", path, method)


@pytest.mark.parametrize(
    ("headers", "path", "reason"),
    [
        ({"x-user": "stranger"}, "/things", "denied"),
        ({}, "/admin", "denied"),
        ({"x-user": "root"}, "/things", "no-tenant"),
        ({}, "/others", "no-trigger"),
        ({"x-user": "root", "x-tenant": "a b"}, "/things", "identity"),
    ],
)
@pytest.mark.parametrize("times", [0, 1], ids=["first", "again"])
async def test_who_asks_and_for_what(
    world: World, headers: dict[str, str], path: str, reason: str, times: int
) -> None:
    """Unknown, of too low a role, without a tenant, of a table without triggers, with a tenant that
    cannot be."""
    for _ in range(times):
        await world.get(path, **headers)
    await world.agree("bypass", reason, path, **headers)


async def test_a_request_without_credentials_and_a_resolver_that_fails(world: World) -> None:
    """The second is our fault."""
    said = await world.admin.explain(ROOT, path="/things")
    assert (said.outcome, said.reason) == ("bypass", "denied")
    world.resolver.broken = True
    await world.agree("bypass", "identity")


@pytest.mark.parametrize(
    "switch",
    [{}, {"tenant_id": "acme"}, {"module": "things"}],
    ids=["everything", "tenant", "module"],
)
@pytest.mark.parametrize("warm", [True, False])
async def test_what_is_switched_off(world: World, switch: dict[str, str], warm: bool) -> None:
    """Also what is in memory."""
    if warm:
        await world.served()
    await world.cache.disable(**switch)
    said = await world.agree("bypass", "off")
    assert (switch.get("module") or switch.get("tenant_id") or "the cache") in said.why
    assert said.switches == tuple(world.cache.runtime.switches.off)
    await world.cache.enable(**switch)
    await world.served()


@pytest.mark.parametrize("warm", [True, False])
async def test_no_fence(world: World, warm: bool) -> None:
    """No round was completed for a lease."""
    if warm:
        await world.served()
    await world.stop_rounds()
    async with asyncio.timeout(20):
        while world.cache.runtime.relay.alive:
            await asyncio.sleep(0.01)
    said = await world.agree("bypass", "no-lease")
    assert said.lease is not None
    assert not said.lease.alive


async def test_no_fence_and_no_server(world: World) -> None:
    """The reason is that which the request is given."""
    await world.served()
    await world.stop_rounds()
    world.forget_entries()
    await world.store.close()
    async with asyncio.timeout(20):
        while world.cache.runtime.relay.alive:
            await asyncio.sleep(0.01)
    said = await world.explain()
    assert f"detail={said.reason}" in await world.get()


async def test_a_fence_for_another_server(world: World) -> None:
    """It does not vouch for the one that answers."""
    await world.served()
    await world.stop_rounds()
    lease = world.cache.runtime.relay.lease
    world.cache.runtime.relay.lease = type(lease)("another", lease.until)
    await world.agree("bypass", "no-lease")
    world.forget_entries()
    await world.agree("bypass", "no-lease")


async def test_no_store(
    psql: asyncpg.Connection, empty_database_url: str, make_valkey: Callable[[], EmbeddedValkey]
) -> None:
    """It went away; or there never was one."""
    valkey = make_valkey()
    async with running(empty_database_url, valkey.url) as world:
        await world.served()
        valkey.kill()
        async with asyncio.timeout(20):
            while world.store.available:
                await asyncio.sleep(0.01)
        await world.agree("bypass", "store")
        # the role is remembered: nobody need be asked
        await world.agree("bypass", "denied", "/admin")
    app = FastAPI()
    app.get("/things")(cache_list("things")(world.handler("things")))
    cache = Cache(None, secret=b"k" * 32, resolver=People(world.engine))
    wrapped = cache.wrap(app)
    said = await Admin(cache).explain(ROOT, path="/things", headers={"x-user": "ann"})
    assert (said.outcome, said.reason) == ("bypass", "no-store")
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(wrapped), base_url="http://test"
    ) as http:
        answer = await http.get("/things", headers={"x-user": "ann"})
    assert answer.headers["cache-status"] == "respcache; fwd=bypass; detail=no-store"


@pytest.mark.parametrize("warm", [True, False])
async def test_an_invalidation_that_is_not_confirmed(world: World, warm: bool) -> None:
    """This process leaves the tenant alone until it is."""
    if warm:
        await world.served()
    blocked: Any = world.cache.runtime.invalidator.blocked_tenants
    blocked["acme"] = 1
    await world.agree("bypass", "pending-invalidation")
    blocked.clear()


async def test_a_generation_that_never_stays_cannot_be_foreseen(
    world: World, valkey_url: str
) -> None:
    """Whoever looks once sees none, which is a miss; whoever makes one again and again, and never
    finds it, bypasses."""
    opened = world.store.open

    async def open_in_vain(generation: str, **options: Any) -> Any:
        made = await opened(generation, **options)
        with redis.Redis.from_url(valkey_url) as client:
            client.delete(generation)
        return made

    world.store.open = open_in_vain  # type: ignore[method-assign]
    said = await world.explain()
    assert (said.outcome, said.reason) == ("miss", "absent")
    assert said.generation is not None
    assert said.generation.nonce is None
    assert await world.get() == "respcache; fwd=bypass; detail=unstable"


# -- what it must not do ---------------------------------------------------------------------------


async def test_explaining_changes_nothing(world: World, valkey_url: str) -> None:
    """No key, no counter, nothing remembered, no use counted: whatever the outcome."""
    await world.served()
    await world.get("/bounded")
    await world.stop_rounds()
    near, plan_cache = world.cache.runtime.near, world.wrapped.plan_cache
    assert plan_cache is not None

    def state() -> Any:
        with redis.Redis.from_url(valkey_url) as client:
            kept = {
                key: client.dump(key)
                for key in client.keys("*")
                if not key.startswith(b"respcache:~")
            }
        uses = {key: near.slot(key).frequency for key in near}
        return (
            kept,
            uses,
            plan_cache.plans(),
            len(world.cache.runtime.scopes),
            world.cache.runtime.views.reads,
            world.cache.stats()["modules"],
            list(world.cache.counters.tenants()),
        )

    near.slot((await world.explain()).key).frequency = 0
    before = state()
    for path in ("/things", "/things?q=new", "/bounded", "/admin", "/others", "/daily", "/open"):
        for user in ("ann", "abe", "gus", "root", "stranger"):
            await world.explain(path, **{"x-user": user})
    assert state() == before


async def test_explaining_looks_once(world: World, valkey_url: str) -> None:
    """At an entry, whatever is said of it."""
    await world.served()
    await world.stop_rounds()
    world.forget_entries()
    with redis.Redis.from_url(valkey_url) as client:

        def looks() -> int:
            return int(client.info("commandstats")["cmdstat_pttl"]["calls"])

        before = looks()
        assert (await world.explain()).reason == "store"
        assert looks() == before + 1


async def test_a_tenants_admin_gets_requests_of_the_own_tenant_explained_only(world: World) -> None:
    """Remembered or not, of another tenant or of none: not found, and nothing else is said."""
    acme = Access(name="abe", role=Role.OPERATOR, tenant="acme")

    async def explained(user: str, **headers: str) -> Explanation:
        return await world.admin.explain(acme, path="/things", headers={"x-user": user, **headers})

    await world.cache.disable(tenant_id="globex")
    await world.cache.enable(tenant_id="globex")
    for _ in range(2):
        assert (await explained("ann")).caller is not None
        for user in ("gus", "root"):
            with pytest.raises(NotFound):
                await explained(user)
        for user in ("ann", "gus"):
            await world.get(**{"x-user": user})
        await world.cache.disable(tenant_id="globex")
        assert (await explained("ann")).switches == ()
        await world.cache.enable(tenant_id="globex")
    said = await explained("root", **{"x-tenant": "acme"})
    assert (said.caller is not None and said.caller.tenant, said.owner_generation) == ("acme", None)


@pytest.mark.parametrize(("path", "query"), [("things", ""), ("/things", "q=\u20ac"), ("", "")])
async def test_a_request_that_cannot_be_is_refused(world: World, path: str, query: str) -> None:
    """With a message that names it."""

    with pytest.raises(InvalidOperation, match=r"things|''|\u20ac"):
        await world.admin.explain(ROOT, path=path, query=query)
