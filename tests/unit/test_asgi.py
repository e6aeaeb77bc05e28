"""The way of a request through the wrapper, on the memory store: no sockets."""

import asyncio
import gzip
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    Header,
    Query,
    Request,
    Response,
)
from fastapi.responses import StreamingResponse
from fastapi.security import APIKeyHeader
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount
from starlette.routing import Route as StarletteRoute

from respcache import (
    Cache,
    Claim,
    ConfigurationError,
    Denied,
    MemoryStore,
    Parameter,
    Policy,
    RequestHead,
    Route,
    Scope,
    SingleTenant,
    cache_detail,
    cache_list,
    current_scope,
    invalidate_cache,
)
from respcache.core.errors import StoreReplyError
from respcache.core.keys import generation_key
from respcache.stores.base import Bumped

pytestmark = pytest.mark.anyio
SECRET = b"k" * 32


def make_cache(app: Any, **options: Any) -> tuple[Cache, Any]:
    options = {"resolver": SingleTenant("public"), "secret": SECRET, **options}
    routes = options.pop("routes", None)
    cache = Cache(options.pop("store", None) or MemoryStore(), **options)
    return cache, cache.wrap(app, routes)


@asynccontextmanager
async def client(app: Any, cache: Cache) -> AsyncIterator[httpx2.AsyncClient]:
    await cache.connect()
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http
    await cache.close()


@dataclass
class Gate:
    """Handlers that stop where the test wants them to."""

    calls: int = 0
    version: int = 0
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> int:
        """Read the 'database', then wait to be let on."""
        self.calls += 1
        seen = self.version
        self.entered.set()
        await self.go.wait()
        return seen


def status(response: httpx2.Response) -> str:
    return response.headers["cache-status"]


def things(read: Callable[[], Awaitable[Any]]) -> FastAPI:
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things(q: str = "", limit: int = 50) -> dict:
        return {"value": await read(), "q": q}

    @app.post("/things")
    @invalidate_cache("things")
    async def change() -> dict:
        return {}

    return app


async def test_a_hit_is_the_stored_answer_without_the_handler() -> None:
    """Status, body and chosen headers come back; the handler ran once."""
    calls = 0
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things() -> Response:
        nonlocal calls
        calls += 1
        return Response(b"caf\xc3\xa9", 203, {"x-total-count": "7", "x-other": "1"}, "text/plain")

    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        first, second = await http.get("/things"), await http.get("/things")
    assert status(first) == "respcache; fwd=uri-miss; stored"
    assert status(second).startswith("respcache; hit; ttl=")
    assert (second.status_code, second.content, calls) == (203, b"caf\xc3\xa9", 1)
    assert second.headers["x-total-count"] == "7"
    assert "x-other" not in second.headers
    assert first.headers["cache-control"] == second.headers["cache-control"] == "private, no-cache"


async def test_hits_and_misses_are_logged_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    """In the words that operators look for."""
    caplog.set_level("DEBUG", "respcache")
    cache, wrapped = make_cache(things(number))
    async with client(wrapped, cache) as http:
        await http.get("/things")
        await http.get("/things")
    said = [record.getMessage() for record in caplog.records if "ache" in record.getMessage()]
    assert re.fullmatch(
        r"\[CacheManager\] Cache miss: tenant:public:things:list:[0-9a-f]{32}", said[0]
    )
    assert said[1:] == ["[Cache] Hit: things list for tenant public"]


async def test_head_is_answered_from_get() -> None:
    """Same headers, no body, shared entry."""

    async def read() -> int:
        return 1

    cache, wrapped = make_cache(things(read))
    async with client(wrapped, cache) as http:
        missed, got, hit = (
            await http.head("/things"),
            await http.get("/things"),
            await http.head("/things"),
        )
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        for path in (b"", b"q=cold"):
            head = {
                "type": "http",
                "method": "HEAD",
                "path": "/things",
                "query_string": path,
                "headers": [],
            }
            await wrapped(head, None, send)
    assert "stored" in status(missed)
    assert "hit" in status(got)
    assert "hit" in status(hit)
    assert hit.headers["content-length"] == str(len(got.content))
    assert sent == [b""] * 4


async def test_undeclared_parameters_neither_split_nor_reach_the_handler() -> None:
    """A cache buster does not defeat the cache; the handler cannot read it either."""
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things(request: Request, q: str = "") -> str:
        return str(request.url.query)

    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        first, second = await http.get("/things?_t=1&q=a"), await http.get("/things?q=a&_t=2")
        cache.runtime.switches.everything = True
        without = await http.get("/things?_t=3&q=a")
    assert first.json() == "q=a"
    assert "hit" in status(second)
    assert without.json() == "q=a"
    assert status(without) == "respcache; fwd=bypass; detail=off"


async def test_declared_headers_and_cookies_split_the_key() -> None:
    """What the signature names may decide the answer."""
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things(
        x_view: Annotated[str, Header()] = "", lang: Annotated[str, Cookie()] = ""
    ) -> str:
        return x_view + lang

    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        for headers in ({"x-view": "a"}, {"x-view": "b"}, {"x-view": "b", "cookie": "lang=de"}):
            assert "stored" in status(await http.get("/things", headers=headers))
        again = await http.get("/things", headers={"x-view": "b", "cookie": "lang=de; other=1"})
    assert "hit" in status(again)
    assert again.json() == "bde"


async def test_list_parameters_keep_their_order() -> None:
    """A repeated parameter is one value: the list."""
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things(tag: Annotated[list[str] | None, Query()] = None) -> list[str]:
        return tag or []

    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        assert (await http.get("/things?tag=a&tag=b")).json() == ["a", "b"]
        assert (await http.get("/things?tag=b&tag=a")).json() == ["b", "a"]
        assert "hit" in status(await http.get("/things?x=1&tag=a&tag=b"))


async def test_a_slow_read_overtaken_by_a_write_is_never_served() -> None:
    """The fill read version 0, then version 1 was acknowledged: the stored answer is refused by its
    certificate."""
    gate = Gate()
    cache, wrapped = make_cache(things(gate.read))
    async with client(wrapped, cache) as http:
        slow = asyncio.create_task(http.get("/things"))
        await gate.entered.wait()
        gate.version = 1
        await http.post("/things")
        gate.go.set()
        assert (await slow).json()["value"] == 0
        after = await http.get("/things")
    assert after.json()["value"] == 1
    assert status(after) == "respcache; fwd=stale; stored"


async def test_a_read_begun_after_a_write_joins_no_older_flight() -> None:
    """The flight's capture is older than the bump that the newcomer sees."""
    gate = Gate()
    cache, wrapped = make_cache(things(gate.read))
    async with client(wrapped, cache) as http:
        old = asyncio.create_task(http.get("/things"))
        await gate.entered.wait()
        joined = asyncio.create_task(http.get("/things"))
        await until(lambda: cache.counters.of("public", "things").misses == 2)
        gate.version = 1
        gate.entered.clear()
        await http.post("/things")
        new = asyncio.create_task(http.get("/things"))
        await asyncio.wait_for(gate.entered.wait(), 5)
        gate.go.set()
        values = [(await task).json()["value"] for task in (old, joined, new)]
        assert (await http.get("/things")).json()["value"] == 1
    assert values == [0, 0, 1]
    assert gate.calls == 2


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never held")


async def test_a_hundred_callers_of_a_cold_key_run_the_handler_once() -> None:
    """One fill in the process; the others are served by it."""
    gate = Gate()
    cache, wrapped = make_cache(things(gate.read))
    async with client(wrapped, cache) as http:
        callers = [asyncio.create_task(http.get("/things")) for _ in range(100)]
        await until(lambda: cache.counters.of("public", "things").misses == 100)
        gate.go.set()
        answers = [await caller for caller in callers]
    assert gate.calls == 1
    assert {answer.status_code for answer in answers} == {200}
    assert sum("collapsed" in status(answer) for answer in answers) == 99


async def test_a_failing_leader_fails_alone_and_hangs_nobody() -> None:
    """Followers run their own handlers, side by side; nothing of it is stored."""
    gate = Gate()

    async def read() -> int:
        number = gate.calls
        await gate.read()
        if number == 0:
            raise RuntimeError("broken")
        return number

    cache, wrapped = make_cache(things(read))
    async with client(wrapped, cache) as http:
        callers = [asyncio.create_task(http.get("/things")) for _ in range(5)]
        await until(lambda: cache.counters.of("public", "things").misses == 5)
        gate.go.set()
        answers = [await caller for caller in callers]
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 500]
    assert gate.calls == 5
    assert cache.counters.of("public", "things").stores == 0


async def test_a_leader_that_is_cancelled_hangs_nobody() -> None:
    """The leader's connection dies in the middle of the handler."""
    gate = Gate()
    cache, wrapped = make_cache(things(gate.read))
    async with client(wrapped, cache) as http:
        leader = asyncio.create_task(http.get("/things"))
        await gate.entered.wait()
        follower = asyncio.create_task(http.get("/things"))
        await until(lambda: cache.counters.of("public", "things").misses == 2)
        leader.cancel()
        gate.go.set()
        assert (await follower).status_code == 200
    assert cache.runtime.filler.flights == 0


async def test_refused_answers_are_passed_on_and_not_stored() -> None:
    """Errors, cookies, private answers and streams run the handler each time, and say why."""
    app = FastAPI()
    answers = {
        "status": lambda: Response(status_code=404),
        "set-cookie": lambda: Response(b"x", headers={"set-cookie": "a=b"}),
        "cache-control": lambda: Response(b"x", headers={"cache-control": "no-store"}),
        "vary": lambda: Response(b"x", headers={"vary": "accept-language"}),
        "stream": lambda: StreamingResponse(iter([b"x", b"y"])),
        "too-large": lambda: Response(b"x" * (1024 * 1024 + 1)),
    }

    @app.get("/things/{why}")
    @cache_detail("things")
    async def thing(why: str) -> Response:
        return answers[why]()

    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        for why in answers:
            for _ in range(2):
                answer = await http.get(f"/things/{why}")
                assert status(answer) == f"respcache; fwd=uri-miss; detail={why}"
        assert (await http.get("/things/stream")).content == b"xy"
        assert (await http.get("/things/cache-control")).headers["cache-control"] == "no-store"
    assert cache.counters.of("public", "things").stores == 0


async def test_an_encoded_body_keeps_its_encoding() -> None:
    """Without it a hit would be unreadable."""
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things() -> Response:
        return Response(gzip.compress(b"text"), headers={"content-encoding": "gzip"})

    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        answers = [await http.get("/things") for _ in range(2)]
    assert "hit" in status(answers[1])
    assert [answer.content for answer in answers] == [b"text", b"text"]


async def test_a_stream_is_passed_on_as_it_comes() -> None:
    """Its first part reaches the client while its last is not made yet."""
    app = FastAPI()
    go = asyncio.Event()

    async def parts() -> AsyncIterator[bytes]:
        yield b"first"
        await go.wait()
        yield b"last"

    @app.get("/things")
    @cache_list("things")
    async def stream() -> StreamingResponse:
        return StreamingResponse(parts())

    cache, wrapped = make_cache(app)
    await cache.connect()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body") == b"first":
            go.set()

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/things",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    await asyncio.wait_for(wrapped(scope, receive, send), 5)
    assert [message.get("body") for message in sent[1:3]] == [b"first", b"last"]
    await cache.close()


async def test_background_tasks_do_not_delay_the_answer_of_a_fill() -> None:
    """The answer is stored and sent when its last byte is there."""
    app = FastAPI()
    answered = asyncio.Event()

    @app.get("/things")
    @cache_list("things")
    async def list_things(tasks: BackgroundTasks) -> str:
        tasks.add_task(answered.wait)
        return "x"

    cache, wrapped = make_cache(app)
    await cache.connect()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            answered.set()

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/things",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    await asyncio.wait_for(wrapped(scope, receive, send), 5)
    await cache.close()


# -- identity --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member(Scope):
    role: str = "employee"


class People:
    """A resolver over a dictionary that stands for the employees table: user -> (tenant, group,
    role)."""

    tables = ("employees",)

    def __init__(self) -> None:
        self.rows = {
            "ann": ("acme", "g1", "employee"),
            "bob": ("acme", "g1", "admin"),
            "eve": ("globex", "g1", "employee"),
        }
        self.looked = 0
        self.stands_for = frozenset({who})

    def claim(self, head: RequestHead) -> Claim:
        user = head.header("x-user")
        if user is None:
            raise Denied("who are you?")
        return Claim(user, self.rows.get(user, ("acme",))[0])

    async def scope(self, claim: Claim) -> Member:
        self.looked += 1
        if claim.key not in self.rows:
            raise Denied("unknown")
        tenant, group, role = self.rows[claim.key]
        return Member(tenant, group.encode(), role)

    def permits(self, scope: Scope, rule: Any) -> bool:
        return rule is None or (isinstance(scope, Member) and scope.role == "admin")


async def who(request: Request) -> Scope:
    scope = current_scope()
    if scope is not None:
        return scope
    return await request.app.state.cache.resolver.scope(
        request.app.state.cache.resolver.claim(RequestHead(request.scope))
    )


async def admin(scope: Annotated[Scope, Depends(who)]) -> Scope:
    return scope


def team(rule: Any = None) -> tuple[FastAPI, list[Any]]:
    app, filtered_by = FastAPI(), []

    @app.get("/things")
    @cache_list("things", tables=("things",), rule=rule)
    async def list_things(scope: Annotated[Scope, Depends(rule or who)]) -> dict:
        filtered_by.append(scope)
        return {"tenant": scope.tenant, "group": scope.fingerprint.decode()}

    return app, filtered_by


async def test_those_who_see_the_same_rows_share_and_others_never() -> None:
    """The key carries what decides the rows, not who asks."""
    people = People()
    app, _ = team()
    cache, wrapped = make_cache(app, resolver=people)
    async with client(wrapped, cache) as http:
        assert "stored" in status(await http.get("/things", headers={"x-user": "ann"}))
        assert "hit" in status(await http.get("/things", headers={"x-user": "bob"}))
        other = await http.get("/things", headers={"x-user": "eve"})
    assert "stored" in status(other)
    assert other.json()["tenant"] == "globex"


async def test_nothing_is_looked_up_for_a_caller_who_is_not_known() -> None:
    """The application refuses; the cache is not even asked."""
    app, _ = team()
    cache, wrapped = make_cache(app, resolver=People())
    async with client(wrapped, cache) as http:
        await http.get("/things", headers={"x-user": "ann"})
        for headers in ({}, {"x-user": "nobody"}):
            answer = await http.get("/things", headers=headers)
            assert answer.status_code == 500  # the test application lets Denied through
    assert cache.counters.of(None, "things").bypasses["denied"] == 2


async def test_the_rule_of_a_route_is_decided_before_the_look_up() -> None:
    """An employee does not get an admin's answer out of the cache."""
    app, _ = team(rule=admin)
    people = People()
    cache, wrapped = make_cache(app, resolver=people)
    async with client(wrapped, cache) as http:
        assert "stored" in status(await http.get("/things", headers={"x-user": "bob"}))
        denied = await http.get("/things", headers={"x-user": "ann"})
    assert status(denied) == "respcache; fwd=bypass; detail=denied"


async def test_a_change_of_what_somebody_may_see_takes_effect_at_once() -> None:
    """The memoised scope carries a certificate over the tables it was read from."""
    people = People()
    app, filtered_by = team()
    cache, wrapped = make_cache(app, resolver=people)
    async with client(wrapped, cache) as http:
        await http.get("/things", headers={"x-user": "ann"})
        people.rows["ann"] = ("acme", "g2", "employee")
        cache.writes.changed({"acme": {"employees"}})
        await cache.settled()
        moved = await http.get("/things", headers={"x-user": "ann"})
        stayed = await http.get("/things", headers={"x-user": "bob"})
    assert moved.json()["group"] == "g2"
    assert stayed.json()["group"] == "g1"
    assert filtered_by[-1].fingerprint == b"g2"


@pytest.mark.parametrize("then", [None, ("globex", "g1", "employee")])
async def test_who_leaves_a_tenant_invalidates_it_all_the_same(then: Any) -> None:
    """What they may see is asked after the handler, which has taken it away or moved them."""
    app, kept, resolver = FastAPI(), ["ann"], People()

    @app.get("/members")
    @cache_list("members")
    async def members() -> list[str]:
        return list(kept)

    @app.post("/leave")
    @invalidate_cache("members")
    async def leave() -> None:
        kept.remove("ann")
        del resolver.rows["ann"]
        if then is not None:
            resolver.rows["ann"] = then

    ann = resolver.claim

    def claim(head: RequestHead) -> Claim:
        """Say what the token says, which is older than the change."""
        return Claim("ann", "acme") if head.header("x-user") == "ann" else ann(head)

    resolver.claim = claim  # type: ignore[method-assign]
    cache, wrapped = make_cache(app, resolver=resolver)
    async with client(wrapped, cache) as http:
        for _ in range(2):
            assert (await http.get("/members", headers={"x-user": "bob"})).json() == ["ann"]
        await http.post("/leave", headers={"x-user": "ann"})
        assert (await http.get("/members", headers={"x-user": "bob"})).json() == []


async def test_a_scope_is_read_once_for_all_who_wait_for_it() -> None:
    """Fifty requests of one user on a cold process read the scope once."""
    people = People()
    app, _ = team()
    cache, wrapped = make_cache(app, resolver=people)
    async with client(wrapped, cache) as http:
        await asyncio.gather(*(http.get("/things", headers={"x-user": "ann"}) for _ in range(50)))
    assert people.looked == 1


# -- faults and switches ---------------------------------------------------------------------------


async def number() -> int:
    return 1


async def test_a_store_that_is_away_fails_no_request() -> None:
    """The handler answers; the bypass is counted."""
    store = MemoryStore()
    cache, wrapped = make_cache(things(number), store=store)
    async with client(wrapped, cache) as http:
        await store.close()
        answer = await http.get("/things")
        assert (answer.status_code, status(answer)) == (200, "respcache; fwd=bypass; detail=store")
        await store.connect()
        assert "stored" in status(await http.get("/things"))


async def test_without_a_store_the_application_serves() -> None:
    """``store=None`` is a configuration, not a fault."""
    cache = Cache(None, secret=SECRET, resolver=SingleTenant("public"))
    async with client(cache.wrap(things(number)), cache) as http:
        assert status(await http.get("/things")) == "respcache; fwd=bypass; detail=no-store"
        assert "x-cache-invalidation" not in (await http.post("/things")).headers
        await cache.settled()
    assert await cache.invalidate_all_tenant("public")


async def test_an_unconfirmed_invalidation_is_said_and_bypassed_until_it_is_confirmed() -> None:
    """The write succeeds, its answer says 'pending', this process serves nothing of that tenant
    until the retry lands."""
    store = MemoryStore()
    gate = Gate()
    gate.go.set()
    cache, wrapped = make_cache(things(gate.read), store=store)
    async with client(wrapped, cache) as http:
        await http.get("/things")
        await store.close()
        gate.version = 1
        written = await http.post("/things")
        assert (written.status_code, written.headers["x-cache-invalidation"]) == (200, "pending")
        assert cache.pending_tenants == ("public",)
        await store.connect()
        bypassed = await http.get("/things")
        assert status(bypassed) == "respcache; fwd=bypass; detail=pending-invalidation"
        assert bypassed.json()["value"] == 1
        await cache.settled()
        assert (await http.get("/things")).json()["value"] == 1
        confirmed = await http.post("/things")
    assert "x-cache-invalidation" not in confirmed.headers
    assert cache.stats()["unconfirmed_invalidations"] == 1


async def test_an_application_that_raises_without_an_answer_settles_first() -> None:
    """The server then answers 500 by itself: no sooner than the invalidation is confirmed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        cache.writes.bump_modules("public", ["things"])
        raise RuntimeError("after the commit")

    cache, wrapped = make_cache(app, routes=[])
    await cache.connect()
    with pytest.raises(RuntimeError):
        await wrapped(
            {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []},
            None,
            None,
        )
    await cache.settled(timeout_s=0)
    await cache.close()


async def test_the_kill_switch_is_told_when_the_store_comes_back() -> None:
    """A decision that was made while the store was away is not lost, nor undone by what the store
    remembers."""
    store = MemoryStore()
    cache, other = (make_cache(things(number), store=store)[0] for _ in range(2))
    await cache.connect()
    await other.connect()
    await store.close()
    assert not await cache.disable()
    assert not cache.enabled
    await store.connect()
    await cache.runtime.switches.sync()
    await other.runtime.switches.sync()
    assert (cache.enabled, other.enabled) == (False, False)
    assert await cache.enable()
    await other.runtime.switches.sync()
    assert (cache.enabled, other.enabled) == (True, True)
    for one in (cache, other):
        await one.close()


async def test_an_older_look_at_the_kill_switch_does_not_undo_a_decision() -> None:
    """What the store said before the decision counts no more."""
    go = asyncio.Event()

    class Slow(MemoryStore):
        async def switch(self, changes: Mapping[str, bool] = {}) -> frozenset[str]:
            found = await super().switch(changes)
            if not changes:
                await go.wait()
            return found

    cache, _ = make_cache(things(number), store=Slow())
    looking = asyncio.create_task(cache.runtime.switches.sync())
    await asyncio.sleep(0)
    assert await cache.disable()
    go.set()
    await looking
    assert not cache.enabled


async def test_a_tenant_whose_invalidation_is_refused_holds_up_no_other() -> None:
    """Each is retried by itself."""

    class Refusing(MemoryStore):
        async def bump(
            self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str] = ()
        ) -> Bumped:
            if generation == generation_key("refused"):
                raise StoreReplyError("WRONGTYPE")
            return await super().bump(generation, tags=tags, ttl_ms=ttl_ms, rows=rows)

    store = Refusing()
    cache, _ = make_cache(things(number), store=store)
    await cache.connect()
    await store.close()
    for tenant in ("refused", "good"):
        assert not await cache.invalidate_all_tenant(tenant)
    await store.connect()
    async with asyncio.timeout(30):
        while "good" in cache.pending_tenants:
            await asyncio.sleep(0.01)
    assert cache.pending_tenants == ("refused",)
    await cache.close()


async def test_the_kill_switch_stops_serving_but_not_invalidating() -> None:
    """Other processes may still serve, so bumps go on; enabling again is safe at once."""
    store = MemoryStore()
    gate = Gate()
    gate.go.set()
    cache, wrapped = make_cache(things(gate.read), store=store)
    other, other_wrapped = make_cache(things(gate.read), store=store)
    async with client(wrapped, cache) as http, client(other_wrapped, other) as elsewhere:
        await http.get("/things")
        assert await cache.disable()
        assert status(await http.get("/things")) == "respcache; fwd=bypass; detail=off"
        await other.runtime.switches.sync()
        assert not other.enabled
        gate.version = 1
        await http.post("/things")
        assert await cache.enable()
        await other.runtime.switches.sync()
        assert (await elsewhere.get("/things")).json()["value"] == 1


async def test_disabled_from_the_start_still_invalidates_for_the_others() -> None:
    """RESPCACHE_ENABLED=0 on one process must not make another stale."""
    store = MemoryStore()
    gate = Gate()
    gate.go.set()
    on, wrapped_on = make_cache(things(gate.read), store=store)
    off, wrapped_off = make_cache(things(gate.read), store=store, enabled=False)
    async with client(wrapped_on, on) as serving, client(wrapped_off, off) as writing:
        await serving.get("/things")
        gate.version = 1
        await writing.post("/things")
        assert (await serving.get("/things")).json()["value"] == 1


@pytest.mark.parametrize(
    "life", ["flushed", "restarted with old data", "restarted empty", "generation evicted"]
)
async def test_no_store_accident_brings_old_data_back(life: str) -> None:
    """Whatever the server lost or brought back, the next read is fresh and caching resumes."""
    store = MemoryStore()
    gate = Gate()
    gate.go.set()
    cache, wrapped = make_cache(things(gate.read), store=store)
    async with client(wrapped, cache) as http:
        await http.get("/things")
        gate.version = 1  # a write whose bump never came, before the accident
        if life == "generation evicted":
            store.delete(generation_key("public"))
        elif life == "flushed":
            store.server.values.clear()
        else:
            store.restart(keep_data=life == "restarted with old data")
        assert (await http.get("/things")).json()["value"] == 1
        assert "hit" in status(await http.get("/things"))


# -- routes ----------------------------------------------------------------------------------------


async def test_the_first_route_that_matches_decides_as_in_the_router() -> None:
    """A literal path before or after a parameter, a prefix, a mount: the table agrees with the
    application."""
    app, router, inner = FastAPI(), APIRouter(prefix="/api"), FastAPI()

    @router.get("/things/search")
    async def search() -> str:
        return "search"

    @router.get("/things/{id}")
    @cache_detail("things")
    async def thing(id: str) -> str:
        return f"thing {id}"

    @router.get("/things/{id}/late")
    async def late(id: str) -> str:
        return "late"

    @inner.get("/inside/{id}")
    @cache_detail("inner")
    async def inside(id: int) -> int:
        return id

    app.include_router(router)
    app.mount("/sub", inner)
    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        for path, cached in (
            ("/api/things/search", False),
            ("/api/things/7", True),
            ("/api/things/7/late", False),
        ):
            assert ("cache-status" in (await http.get(path)).headers) == cached
        assert "stored" in status(await http.get("/sub/inside/5"))
        assert "hit" in status(await http.get("/sub/inside/5"))
    assert cache.registry.modules == {"things", "inner"}


async def test_two_versions_of_a_route_do_not_share() -> None:
    """The template is in the key."""
    app = FastAPI()
    for version in ("v1", "v2"):

        @app.get(f"/{version}/things")
        @cache_list("things")
        async def list_things(version: str = version) -> str:
            return version

    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        assert [(await http.get(f"/{v}/things")).json() for v in ("v1", "v2", "v1")] == [
            "v1",
            "v2",
            "v1",
        ]


async def test_a_security_dependency_that_nobody_names_fails_at_start_up() -> None:
    """A hit would skip it."""
    app = FastAPI()
    key = APIKeyHeader(name="x-key")

    async def keyed(value: Annotated[str, Depends(key)]) -> str:
        return value

    @app.get("/things", dependencies=[Depends(keyed)])
    @cache_list("things")
    async def list_things() -> str:
        return "x"

    _, wrapped = make_cache(app)
    with pytest.raises(ConfigurationError, match=r"GET /things .*keyed"):
        wrapped.prepare()


async def test_a_cached_route_that_reads_a_body_fails_at_start_up() -> None:
    """The key does not hold it, the wrapper does not read it."""
    app = FastAPI()

    async def wanted(names: Annotated[list[str], Body()]) -> list[str]:
        return names

    @app.get("/things")
    @cache_list("things")
    async def list_things(names: Annotated[list[str], Depends(wanted)]) -> list[str]:
        return names

    _, wrapped = make_cache(app)
    with pytest.raises(ConfigurationError, match=r"GET /things .*body"):
        wrapped.prepare()


async def test_a_rule_that_the_endpoint_does_not_enforce_fails_at_start_up() -> None:
    """A miss would skip it."""
    app = FastAPI()

    @app.get("/things")
    @cache_list("things", rule=admin)
    async def list_things() -> str:
        return "x"

    _, wrapped = make_cache(app, resolver=People())
    with pytest.raises(ConfigurationError, match="rule"):
        wrapped.prepare()


async def test_a_wrong_set_up_is_said_by_the_server_at_start_up() -> None:
    """The lifespan fails with the message, instead of the first request."""
    app = FastAPI()

    @app.post("/things")
    @cache_list("things")
    async def change() -> str:
        return "x"

    _, wrapped = make_cache(app)
    messages: list[Any] = []
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    await inbox.put({"type": "lifespan.startup"})

    async def send(message: Any) -> None:
        messages.append(message)
        await inbox.put({"type": "lifespan.shutdown"})

    await wrapped({"type": "lifespan"}, inbox.get, send)
    assert messages[0]["type"] == "lifespan.startup.failed"
    assert "does not answer GET" in messages[0]["message"]


async def test_a_starlette_application_declares_its_parameters() -> None:
    """There is no signature to read them from."""

    @cache_list("things", parameters=[Parameter("q")])
    async def endpoint(request: Any) -> PlainTextResponse:
        return PlainTextResponse(request.url.query)

    app = Starlette(routes=[Mount("/api", routes=[StarletteRoute("/things", endpoint)])])
    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        assert (await http.get("/api/things?q=1&z=2")).text == "q=1"
        assert "hit" in status(await http.get("/api/things?z=3&q=1"))


async def test_cached_routes_behind_a_host_are_refused() -> None:
    """The table does not look at host names."""

    @cache_list("things", parameters=[])
    async def endpoint(request: Any) -> PlainTextResponse:
        return PlainTextResponse("x")

    app = Starlette(
        routes=[Host("api.example.org", FastAPI()), StarletteRoute("/things", endpoint)]
    )
    _, wrapped = make_cache(app)
    with pytest.raises(ConfigurationError, match=r"api\.example\.org"):
        wrapped.prepare()


async def test_any_asgi_application_can_be_wrapped() -> None:
    """Routes are given by hand where there is nothing to walk."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = scope["path"].encode()
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"%d" % len(body))],
            }
        )
        await send({"type": "http.response.body", "body": body})

    cache = Cache(MemoryStore(), secret=SECRET, resolver=SingleTenant("public"))
    wrapped = cache.wrap(app, [Route.of("/files/{path:path}", Policy("files", "detail", 60))])
    async with client(wrapped, cache) as http:
        await http.get("/files/a/b")
        assert "hit" in status(await http.get("/files/a/b"))
        assert "cache-status" not in (await http.get("/other")).headers


async def test_an_application_below_a_root_path_of_its_own_is_cached_and_invalidated() -> None:
    """FastAPI takes ``root_path`` off the path before it looks for a route."""
    app, kept = FastAPI(), ["old"]
    app.root_path = "/api"

    @app.get("/plans")
    @cache_list("plans")
    async def plans() -> str:
        return kept[0]

    @app.post("/plans")
    @invalidate_cache("plans")
    async def change() -> None:
        kept[0] = "new"

    cache, wrapped = make_cache(app)
    async with client(wrapped, cache) as http:
        for path in ("/api/plans", "/plans"):
            await http.get(path)
            assert "hit" in status(await http.get(path))
        await http.post("/api/plans")
        assert (await http.get("/plans")).json() == "new"


async def test_a_path_with_a_line_break_at_its_end_is_another_path() -> None:
    """What an application answers for it is not served for the route."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b"the route" if scope["path"] == "/plans" else b"another"
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"%d" % len(body))],
            }
        )
        await send({"type": "http.response.body", "body": body})

    cache = Cache(MemoryStore(), secret=SECRET, resolver=SingleTenant("public"))
    async with client(
        cache.wrap(app, [Route.of("/plans", Policy("plans", "list", 60))]), cache
    ) as http:
        assert (await http.get("/plans%0A")).text == "another"
        assert (await http.get("/plans")).text == "the route"


# -- values ----------------------------------------------------------------------------------------


async def test_get_or_set_makes_a_value_once_and_again_after_a_write() -> None:
    """The same coherence as for responses."""
    cache, _ = make_cache(FastAPI())
    await cache.connect()
    calls = 0

    async def make() -> dict:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        return {"calls": calls}

    async def get(**key: Any) -> dict:
        return await cache.get_or_set("acme", "plans", key or {"id": 1}, make, tables=("plans",))

    assert await asyncio.gather(*(get() for _ in range(20))) == [{"calls": 1}] * 20
    assert await get(id="1") == {"calls": 2}
    cache.writes.changed({"acme": {"plans"}})
    await cache.settled()
    assert await get() == {"calls": 3}
    await cache.invalidate_tenant_cache("acme", "plans")
    assert await get() == {"calls": 4}
    await cache.store.close()
    assert await get() == {"calls": 5}
    await cache.close()


async def test_a_tenant_id_that_cannot_be_is_refused() -> None:
    """A glob in a tenant id reaches no key."""
    cache, _ = make_cache(FastAPI())
    for call in (
        cache.invalidate_all_tenant("*"),
        cache.invalidate_tenant_cache("a:b", "m"),
        cache.get_or_set("", "m", {}, number),
    ):
        with pytest.raises(ValueError, match="tenant id"):
            await call
