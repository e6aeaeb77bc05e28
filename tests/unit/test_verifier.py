"""The continuous audit on the memory store: what is a finding and what is not. Time and timers are
the test's own."""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Header, Request, Response

from respcache import (
    Cache,
    Claim,
    ConfigurationError,
    Denied,
    MemoryStore,
    Policy,
    RequestHead,
    Route,
    Scope,
    SingleTenant,
    cache_list,
    invalidate_cache,
)
from respcache.context import current, current_scope
from respcache.core.generations import module_tag
from respcache.core.serving_lease import DRIFT, LEASE_S
from respcache.read.verifier import (
    EVERY_S,
    LEAST_PAUSE_S,
    LOG_EVERY_S,
    MAX_MISMATCHES,
    MOST_SHARE_OF_TIME,
    Verifier,
)
from respcache.writes.relay import OutboxRelay

pytestmark = pytest.mark.anyio
SECRET = b"k" * 32
WAIT_S = LEASE_S * DRIFT


class Timer:
    """What ``later`` returns."""

    def __init__(self, seconds: float, callback: Callable[[], object]) -> None:
        self.seconds, self.callback, self.cancelled = seconds, callback, False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class World:
    """An application, its cache, and a clock that the test moves."""

    cache: Cache
    http: httpx2.AsyncClient
    now: float = 0.0
    timers: list[Timer] = field(default_factory=list)

    @property
    def verifier(self) -> Verifier:
        assert self.cache.runtime.verifier is not None
        return self.cache.runtime.verifier

    def later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        self.timers.append(Timer(seconds, callback))
        return self.timers[-1]

    def fire(self) -> None:
        """Let the time of the newest timer pass."""
        timer = self.timers.pop()
        assert not timer.cancelled
        self.now += timer.seconds
        timer.callback()

    async def get(self, path: str = "/things", **headers: str) -> httpx2.Response:
        answer = await self.http.get(path, headers=headers)
        await asyncio.sleep(0)  # an answer is stored when it is on its way
        return answer

    async def audited_hit(self, path: str = "/things", **headers: str) -> httpx2.Response:
        """Be served from the cache, and have just that hit audited."""
        self.verifier.countdown, self.verifier.rest_until = 1, self.now
        answer = await self.http.get(path, headers=headers)
        assert "; hit" in answer.headers["cache-status"]
        assert self.verifier.busy
        return answer

    async def done(self) -> None:
        """Wait until no audit is under way."""
        await until(lambda: not self.verifier.busy)

    async def confirmed(self) -> None:
        """Let the lease pass for which a suspicion waits, then wait for what comes of it."""
        await until(lambda: bool(self.timers) and self.timers[-1].seconds == WAIT_S)
        self.fire()
        await self.done()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never held")


@asynccontextmanager
async def running(app: Any, *, routes: Any = None, **options: Any) -> AsyncIterator[World]:
    cache = Cache(
        MemoryStore(), **{"secret": SECRET, "resolver": SingleTenant("public"), **options}
    )
    wrapped = cache.wrap(app, routes)

    async def server(scope: Any, receive: Any, send: Any) -> None:
        """Serve with the state of a lifespan."""
        await wrapped({**scope, "state": {"pool": 1}}, receive, send)

    transport = httpx2.ASGITransport(app=server, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        world = World(cache, http)
        if cache.runtime.verifier is not None:
            cache.runtime.verifier.clock, cache.runtime.verifier.later = (
                lambda: world.now,
                world.later,
            )
        await cache.connect()
        yield world
        await cache.close()


@dataclass
class Data:
    """The 'database' of a handler, which stops where the test wants it to."""

    version: int = 0
    calls: int = 0
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    before: Callable[["Data"], None] = lambda data: None

    def __post_init__(self) -> None:
        self.go.set()

    async def read(self) -> int:
        self.calls += 1
        self.before(self)
        seen = self.version
        self.entered.set()
        await self.go.wait()
        return seen

    def stop(self) -> None:
        """Make the next read wait after it has read."""
        self.entered.clear()
        self.go.clear()


def things(data: Data) -> FastAPI:
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things() -> int:
        return await data.read()

    @app.post("/things")
    @invalidate_cache("things")
    async def change() -> dict:
        data.version += 1
        return {}

    return app


@pytest.fixture
def data() -> Data:
    return Data()


@pytest.fixture
async def world(data: Data) -> AsyncIterator[World]:
    """A cache with one stored answer."""
    async with running(things(data)) as made:
        await made.get()
        yield made


# -- verdicts --------------------------------------------------------------------------------------


async def test_an_equal_answer_is_counted_and_nothing_else(world: World, data: Data) -> None:
    """The second execution is in no figure of users, stores nothing, and asks the store nothing."""
    await world.audited_hit()
    for operation in ("read", "put", "lease", "open"):
        setattr(world.cache.store, operation, fail)
    await world.done()
    counters = world.cache.stats()["modules"]["things"]
    assert (counters["hits"], counters["misses"], counters["stores"], data.calls) == (1, 1, 1, 2)
    verifier = world.cache.stats()["verifier"]
    assert (
        verifier["verifications"],
        verifier["equal"],
        verifier["inconclusive"],
        verifier["mismatches"],
    ) == (
        1,
        1,
        {},
        [],
    )


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("the audit used the store")


async def test_a_hit_does_not_wait_for_its_audit_and_one_is_under_way_at_most(
    world: World, data: Data
) -> None:
    """The handler of the audit hangs; hits go on, sampled ones too, and are not audited
    meanwhile."""
    data.stop()
    await world.audited_hit()
    await data.entered.wait()
    for _ in range(3):
        world.verifier.countdown = 1
        assert "; hit" in (await world.get()).headers["cache-status"]
    data.go.set()
    await world.done()
    assert (world.verifier.found.verifications, data.calls) == (1, 2)


async def test_a_write_that_overtakes_the_audit_is_no_finding(world: World, data: Data) -> None:
    """The handler saw the new state; the entry that was served is not valid any more. Nobody waits
    for a lease."""
    data.stop()
    data.before = lambda data: setattr(data, "version", 1)
    await world.audited_hit()
    await data.entered.wait()
    await world.http.post("/things")
    data.go.set()
    await world.done()
    assert (world.verifier.found.inconclusive, world.verifier.found.stale, data.calls) == (
        {"overtaken": 1},
        0,
        2,
    )


async def test_a_commit_whose_bump_is_under_way_is_no_finding(world: World, data: Data) -> None:
    """It may be visible before it is acknowledged: the suspicion waits for as long as that may
    take."""
    data.version = 1
    await world.audited_hit()
    await until(lambda: world.timers[-1].seconds == WAIT_S)
    await world.cache.invalidate_tenant_cache("public", "things")
    await world.confirmed()
    assert (world.verifier.found.inconclusive, world.verifier.found.stale, data.calls) == (
        {"overtaken": 1},
        0,
        2,
    )


async def test_a_lost_invalidation_is_found(
    world: World, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    """Both certificates are kept and said, users are helped at once, it is counted; no body is
    anywhere."""
    # so that the certificates have something to say
    await world.cache.invalidate_tenant_cache("public", "other")
    await world.cache.invalidate_tenant_cache("public", "things")
    data.version = 7_654_321
    await world.get()
    data.version = 1_234_567  # and nobody is told
    assert (await world.audited_hit()).json() == 7_654_321
    await world.confirmed()
    stats = world.cache.stats()
    (finding,) = stats["verifier"]["mismatches"]
    assert (stats["verifier"]["stale"], stats["verifier"]["leaks"], stats["stale_served"]) == (
        1,
        0,
        1,
    )
    assert [finding[name] for name in ("kind", "tenant", "module", "route")] == [
        "stale",
        "public",
        "things",
        "/things",
    ]
    assert finding["key"].startswith("tenant:public:things:list:")
    assert (
        finding["certificate"]["sequence"]
        == finding["served"]["sequence"]
        == finding["confirmed"]["sequence"]
        == 2
    )
    assert (
        finding["certificate"]["nonce"]
        == finding["served"]["nonce"]
        == finding["confirmed"]["nonce"]
    )
    assert finding["served"]["bumps"] == finding["confirmed"]["bumps"] == {module_tag("things"): 2}
    assert finding["held"] != finding["found"]
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert str(finding) in said
    assert "7654321" not in said
    assert "1234567" not in said
    again = await world.get()
    assert (again.json(), again.headers["cache-status"]) == (
        1_234_567,
        "respcache; fwd=stale; stored",
    )


async def test_an_answer_that_differs_by_itself_is_said_once_and_no_finding(
    data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts its calls."""
    data.before = lambda data: setattr(data, "version", data.calls)
    async with running(things(data)) as world:
        await world.get()
        for _ in range(2):
            await world.audited_hit()
            await until(lambda: world.timers[-1].seconds == WAIT_S)
            world.fire()
            await world.confirmed()
        assert (
            world.verifier.found.nondeterministic,
            world.verifier.found.stale,
            world.cache.stats()["stale_served"],
        ) == (2, 0, 0)
        assert world.cache.stats()["verifier"]["nondeterministic_routes"] == ["/things"]
        assert "; hit" in (await world.get()).headers["cache-status"]
    assert [
        record.levelname for record in caplog.records if "differently" in record.getMessage()
    ] == ["WARNING"]


async def test_an_answer_that_returns_to_what_was_served_is_no_finding(
    world: World, data: Data
) -> None:
    """One of two that alternate."""
    data.before = lambda data: setattr(data, "version", int(data.calls == 2))
    await world.audited_hit()
    await until(lambda: world.timers[-1].seconds == WAIT_S)
    world.fire()
    await world.confirmed()
    assert (world.verifier.found.nondeterministic, world.verifier.found.stale) == (1, 0)


async def test_a_write_between_the_confirming_runs_is_not_taken_for_nondeterminism(
    world: World, data: Data
) -> None:
    """Everything was overtaken, so nothing is said."""
    data.version = 1

    def write(data: Data) -> None:
        if data.calls == 4:
            data.version = 2
            world.cache.writes.bump_modules("public", ["things"])

    data.before = write
    await world.audited_hit()
    await until(lambda: world.timers[-1].seconds == WAIT_S)
    world.fire()
    await until(lambda: data.calls == 5 and world.timers[-1].seconds == WAIT_S)
    await world.cache.settled()
    await world.confirmed()
    assert (world.verifier.found.inconclusive, world.verifier.found.nondeterministic) == (
        {"overtaken": 1},
        0,
    )


class NoOutbox:
    """The outbox of rounds that never ran."""

    lease_s = LEASE_S
    own_rows = ""


@pytest.mark.parametrize(
    "accident", ["switched off", "store away", "other server", "vetoed", "no fence", "no trigger"]
)
async def test_nothing_is_found_where_nothing_would_be_served(
    world: World, data: Data, accident: str
) -> None:
    """The kill switch, an outage, a server life that ended, an invalidation known to be pending, no
    fence, no triggers."""
    store, guards = world.cache.store, world.cache.runtime.guards
    assert isinstance(store, MemoryStore)
    blocked: Any = world.cache.runtime.invalidator.blocked_tenants
    data.version = 1
    await world.audited_hit()
    await until(lambda: world.timers[-1].seconds == WAIT_S)
    if accident == "switched off":
        await world.cache.disable()
    elif accident == "store away":
        await store.close()
    elif accident == "other server":
        store.restart(keep_data=True)
    elif accident == "no fence":
        guards.relay = OutboxRelay(store, NoOutbox(), generation_ttl_ms=1000)
        guards.covers = lambda policy: True  # type: ignore[method-assign]
    elif accident == "no trigger":
        guards.covers = lambda policy: False  # type: ignore[method-assign]
    else:
        blocked["public"] = 1
    await world.confirmed()
    blocked.clear()
    assert (world.verifier.found.inconclusive, world.verifier.found.stale) == ({"overtaken": 1}, 0)


@pytest.mark.parametrize("problem", ["raises", 500, 503, 429])
async def test_a_failing_handler_proves_nothing_and_reaches_nobody(
    problem: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a user nor, with what its message holds, the log of the cache."""
    fails = False
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things() -> Response:
        if fails and problem == "raises":
            raise RuntimeError("a row of somebody")
        return Response(b"x", problem if fails else 200)

    async with running(app) as world:
        await world.get()
        fails = True
        caplog.set_level("DEBUG", "respcache")
        assert (await world.audited_hit()).status_code == 200
        await world.done()
        assert world.verifier.found.inconclusive == {"failed": 1}
        assert "a row of somebody" not in "".join(
            r.getMessage() for r in caplog.records if r.name == "respcache"
        )
        assert "; hit" in (await world.get()).headers["cache-status"]


async def test_a_row_that_is_gone_is_a_finding(data: Data) -> None:
    """404 is an answer like any other."""
    gone = False
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things() -> Response:
        return Response(b"x", 404 if gone else 200)

    async with running(app) as world:
        await world.get()
        gone = True
        await world.audited_hit()
        await world.confirmed()
        assert world.verifier.found.stale == 1


async def test_a_kept_header_counts_and_one_that_is_not_kept_does_not() -> None:
    """As what was served."""
    total, other = "1", "1"
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things() -> Response:
        return Response(b"x", headers={"x-total-count": total, "x-other": other})

    async with running(app) as world:
        await world.get()
        other = "2"
        await world.audited_hit()
        await world.done()
        assert world.verifier.found.equal == 1
        total = "2"
        await world.audited_hit()
        await world.confirmed()
        assert world.verifier.found.stale == 1


async def test_the_time_of_compression_makes_no_difference() -> None:
    """gzip writes it into its head."""
    calls = 0
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things() -> Response:
        nonlocal calls
        calls += 1
        return Response(
            gzip.compress(b"x" * 100, mtime=calls), headers={"content-encoding": "gzip"}
        )

    async with running(app) as world:
        await world.get()
        await world.audited_hit()
        await world.done()
        assert (calls, world.verifier.found.equal) == (2, 1)


async def test_an_answer_that_varies_by_something_which_went_on_is_not_compared() -> None:
    """Midnight came between: the request means another key."""
    day = 1
    app = FastAPI()

    @app.get("/things")
    @cache_list("things", varies_by=lambda scope: str(day))
    async def list_things() -> int:
        return day

    async with running(app) as world:
        await world.get()
        await world.audited_hit()
        day = 2
        await world.done()
        assert world.verifier.found.inconclusive == {"another key": 1}
        day = 1
        await world.audited_hit()
        await world.done()
        assert world.verifier.found.equal == 1


async def test_values_are_made_anew(data: Data) -> None:
    """A stale value within an answer is as bad as a stale answer."""
    app = FastAPI()

    @app.get("/things")
    @cache_list("things", tables=["things"])
    async def list_things(request: Request) -> int:
        return await request.app.state.cache.get_or_set(
            "public", "values", {}, data.read, tables=["things"]
        )

    async with running(app) as world:
        await world.get()
        data.version = 1
        await world.audited_hit()
        await world.confirmed()
        assert world.verifier.found.stale == 1
        assert world.cache.counters.of("public", "values").hits == 0


# -- who may see it --------------------------------------------------------------------------------


class People:
    """Callers whose tenant, rows and role are in a 'database'; ``ends`` are those whose token has
    expired."""

    tables: tuple[str, ...] = ()
    stands_for: frozenset[Any] = frozenset()

    def __init__(self, owner_tenant: str = "acme") -> None:
        self.owner_tenant = owner_tenant
        self.people = {"ann": ("acme", b"north", "admin")}
        self.ended: set[str] = set()

    def claim(self, head: RequestHead) -> Claim:
        name = head.header("x-user") or ""
        if name in self.ended:
            raise Denied(name)
        return Claim(name, self.owner_tenant)

    async def scope(self, claim: Claim) -> Scope:
        if claim.key not in self.people:
            raise Denied(str(claim.key))
        tenant, rows, _ = self.people[claim.key]  # type: ignore[index]
        return Scope(tenant, rows)

    def permits(self, scope: Scope, rule: Any) -> bool:
        return self.people["ann"][2] == "admin"


async def admin() -> None:
    """Stand for a dependency that demands a role."""


def rows_of_callers() -> FastAPI:
    app = FastAPI()

    @app.get("/things", dependencies=[Depends(admin)])
    @cache_list("things", rule=admin)
    async def list_things() -> str:
        scope = current_scope()
        assert scope is not None
        return scope.fingerprint.decode()

    return app


@pytest.mark.parametrize(
    ("now", "word"),
    [
        (("acme", b"south", "admin"), "other rows"),
        (("other", b"north", "admin"), "another tenant"),
        (("acme", b"north", "employee"), "another role"),
        (None, "denied"),
    ],
)
async def test_a_scope_that_ended_unnoticed_is_a_leak(
    now: Any, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller sees other rows by now, and nobody told the cache."""
    people = People()
    async with running(rows_of_callers(), resolver=people) as world:
        await world.get(**{"x-user": "ann"})
        # the role is decided without I/O, by each look
        await world.audited_hit(**{"x-user": "ann"})
        if now is None:
            del people.people["ann"]
        else:
            people.people["ann"] = now
        await world.confirmed()
        stats = world.cache.stats("acme")
        assert (stats["verifier"]["leaks"], stats["verifier"]["stale"], stats["stale_served"]) == (
            1,
            0,
            1,
        )
        (finding,) = stats["verifier"]["mismatches"]
        assert (finding["kind"], finding["found"], finding["certificate"]["sequence"]) == (
            "leak",
            word,
            0,
        )
        assert world.cache.stats("other")["verifier"]["mismatches"] == []
        assert "found a leak response" in caplog.text
        people.people["ann"] = ("acme", b"south", "admin")
        assert (await world.get(**{"x-user": "ann"})).json() == "south"


async def test_the_audit_sees_no_more_of_a_request_than_the_look_did() -> None:
    """A header that the resolver does not name is not there for it: what it would say of that is no
    leak."""

    class Named(People):
        headers = ("x-user",)

        def claim(self, head: RequestHead) -> Claim:
            return Claim(head.header("x-instead") or head.header("x-user"), self.owner_tenant)

    async with running(rows_of_callers(), resolver=Named()) as world:
        await world.get(**{"x-user": "ann"})
        await world.audited_hit(**{"x-user": "ann", "x-instead": "bob"})
        await world.done()
        assert (world.verifier.found.equal, world.verifier.found.leaks) == (1, 0)


async def test_a_change_of_scope_whose_bump_is_under_way_is_no_leak() -> None:
    """It comes while the suspicion waits."""
    people = People()
    async with running(rows_of_callers(), resolver=people) as world:
        await world.get(**{"x-user": "ann"})
        await world.audited_hit(**{"x-user": "ann"})
        people.people["ann"] = ("acme", b"south", "admin")
        await until(lambda: world.timers[-1].seconds == WAIT_S)
        await world.cache.invalidate_all_tenant("acme")
        await world.confirmed()
        assert (world.verifier.found.inconclusive, world.verifier.found.leaks) == (
            {"overtaken": 1},
            0,
        )


async def test_a_scope_is_judged_where_it_was_read_from() -> None:
    """The caller's home is another generation than that of the rows."""
    people = People(owner_tenant="hq")
    async with running(rows_of_callers(), resolver=people) as world:
        await world.get(**{"x-user": "ann"})
        await world.audited_hit(**{"x-user": "ann"})
        people.people["ann"] = ("acme", b"south", "admin")
        await until(lambda: world.timers[-1].seconds == WAIT_S)
        await world.cache.invalidate_all_tenant("hq")
        await world.confirmed()
        assert (world.verifier.found.inconclusive, world.verifier.found.leaks) == (
            {"overtaken": 1},
            0,
        )


async def test_a_scope_that_returned_is_no_leak() -> None:
    """What was served may be served."""
    people = People()
    async with running(rows_of_callers(), resolver=people) as world:
        await world.get(**{"x-user": "ann"})
        await world.audited_hit(**{"x-user": "ann"})
        before, people.people["ann"] = people.people["ann"], ("acme", b"south", "admin")
        await until(lambda: world.timers[-1].seconds == WAIT_S)
        people.people["ann"] = before
        await world.confirmed()
        assert (world.verifier.found.inconclusive, world.verifier.found.leaks) == (
            {"overtaken": 1},
            0,
        )


async def test_credentials_that_end_meanwhile_are_no_leak() -> None:
    """They were good when the hit was served."""
    people = People()
    async with running(rows_of_callers(), resolver=people) as world:
        await world.get(**{"x-user": "ann"})
        await world.audited_hit(**{"x-user": "ann"})
        people.ended.add("ann")
        await world.done()
        assert (world.verifier.found.inconclusive, world.verifier.found.leaks) == (
            {"credentials ended": 1},
            0,
        )


async def test_the_request_is_made_anew_as_it_came_and_can_be_told_apart() -> None:
    """Headers, canonical query, no body, no ways of sending that would be missed, a state of its
    own."""
    seen: list[Any] = []
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things(
        request: Request, q: str = "", x_view: Annotated[str, Header()] = ""
    ) -> str:
        seen.append(
            (
                request.method,
                q,
                x_view,
                request.headers["x-other"],
                request.url.query,
                await request.body(),
            )
        )
        seen.append("respcache.verifier" in request.scope.get("extensions", {}))
        return q

    async with running(app) as world:
        await world.get("/things?q=a&_t=1", **{"x-view": "b", "x-other": "c"})
        await world.audited_hit("/things?_t=2&q=a", **{"x-view": "b", "x-other": "c"})
        await world.done()
    request = ("GET", "a", "b", "c", "q=a", b"")
    assert seen == [request, False, request, True]


async def test_the_client_of_an_audit_stays_and_each_run_has_a_state_of_its_own(data: Data) -> None:
    """Who listens for a disconnection hears none; what a run leaves in its state, the next does not
    find."""
    heard: list[bool] = []
    states: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if "respcache.verifier" in scope.get("extensions", {}):
            await receive()
            listening = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            heard.append(listening.done())
            listening.cancel()
        states.append(dict(scope["state"]))
        scope["state"]["mine"] = 1
        body = str(await data.read()).encode()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}
        )
        await send({"type": "http.response.body", "body": body})

    async with running(app, routes=[Route.of("/things", Policy("things", "list", 60))]) as world:
        await world.get()
        data.version = 1
        await world.audited_hit()
        await world.confirmed()
        assert world.verifier.found.stale == 1
    assert (heard, states) == ([False] * 4, [{"pool": 1}] * 5)


async def test_an_execution_in_an_older_snapshot_is_not_compared() -> None:
    """Its reads may be older than what was served."""
    calls = 0
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def list_things() -> int:
        nonlocal calls
        calls += 1
        record = current.get()
        assert record is not None
        assert record.reads is not None
        record.reads.old_snapshot = calls == 2
        return calls

    async with running(app) as world:
        await world.get()
        await world.audited_hit()
        await world.done()
        assert world.verifier.found.inconclusive == {"old snapshot": 1}


# -- handlers that write ---------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["in the audit", "in a background task", "in the fill"])
async def test_a_route_that_writes_is_not_audited_again(when: str) -> None:
    """Not a second time where the audit notices, not once where a fill did."""
    calls = 0
    app = FastAPI()

    def write() -> None:
        record = current.get()
        assert record is not None
        record.wrote = True

    @app.get("/things")
    @cache_list("things")
    async def list_things(background: BackgroundTasks) -> int:
        nonlocal calls
        calls += 1
        if when == "in the audit" and calls == 2:
            write()
        if when == "in a background task" or (when == "in the fill" and calls == 1):
            background.add_task(write)
        return 1

    async with running(app) as world:
        await world.get()
        if when == "in the audit":
            await world.audited_hit()
            await world.done()
            assert world.verifier.found.inconclusive == {"wrote": 1}
        assert world.cache.stats()["verifier"]["excluded_routes"] == ["/things"]
        before = calls
        world.verifier.countdown, world.verifier.rest_until = 1, 0
        await world.get()
        assert not world.verifier.busy
        assert world.timers[-1].seconds == LEAST_PAUSE_S, "another route's hit is audited soon"
        assert calls == before


# -- how often -------------------------------------------------------------------------------------


async def test_a_share_of_the_hits_is_audited(data: Data) -> None:
    """Every fourth."""
    async with running(things(data), verify_share=0.25) as world:
        await world.get()
        for count in (0, 0, 0, 1, 1, 1, 1, 2):
            await world.get()
            await world.done()
            assert world.verifier.found.verifications == count
            world.verifier.rest_until = 0


async def test_where_hits_are_few_one_a_second_is_audited(world: World) -> None:
    """The default share would come to it after a thousand."""
    assert world.timers[-1].seconds == EVERY_S
    await world.get()
    assert world.verifier.found.verifications == 0
    for count in (1, 2):
        world.fire()
        await world.get()
        await world.done()
        assert (world.verifier.found.verifications, world.timers[-1].seconds) == (count, EVERY_S)
        await world.get()
        assert world.verifier.found.verifications == count


async def test_audits_rest_as_long_as_keeps_them_below_their_share_of_time(
    world: World, data: Data
) -> None:
    """A handler that takes a second is not run again for nine; a sampled hit in between starts
    nothing."""
    data.before = lambda _: setattr(world, "now", world.now + 1)
    world.verifier.countdown = 1
    await world.get()
    await world.done()
    assert world.timers[-1].seconds == pytest.approx(1 / MOST_SHARE_OF_TIME - 1)
    world.now += 8
    world.verifier.countdown = 1
    await world.get()
    assert (world.verifier.busy, world.verifier.found.verifications) == (False, 1)
    world.now += 1.001
    world.verifier.countdown = 1
    await world.get()
    assert world.verifier.found.verifications == 2


async def test_waiting_for_the_writers_is_not_time_used(world: World, data: Data) -> None:
    """The lease that a suspicion waits for costs nothing."""
    data.version = 1
    await world.audited_hit()
    await world.confirmed()
    assert world.now >= WAIT_S
    assert world.verifier.rest_until == world.now + LEAST_PAUSE_S


async def test_findings_are_bounded_and_said_at_most_every_few_seconds(
    world: World, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    """The next line says how many there were."""

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]

    for number in range(MAX_MISMATCHES + 2):
        await world.get()
        data.version = number + 1
        await world.audited_hit()
        await until(lambda: world.timers[-1].seconds == WAIT_S)
        world.timers.pop().callback()  # as if no time had passed
        await world.done()
    assert len(said()) == 1
    assert len(world.verifier.found.mismatches) == MAX_MISMATCHES
    world.now += LOG_EVERY_S
    await world.get()
    data.version = 0
    await world.audited_hit()
    await world.confirmed()
    assert f"{MAX_MISMATCHES + 1} more" in said()[1]


# -- the switch, and the end -----------------------------------------------------------------------


async def test_switched_off_nothing_is_audited(data: Data) -> None:
    """No object, no task, no timer."""
    async with running(things(data), verify_share=0) as world:
        for _ in range(3):
            await world.get()
        assert (world.cache.runtime.verifier, world.cache.stats()["verifier"], data.calls) == (
            None,
            None,
            1,
        )


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_cannot_be_is_refused(share: float) -> None:
    """By name."""
    with pytest.raises(ConfigurationError, match="verify_share"):
        Cache(None, secret=SECRET, resolver=SingleTenant("public"), verify_share=share)


async def test_closing_ends_an_audit_under_way(data: Data) -> None:
    """No task and no timer are left behind, and nothing begins afterwards."""
    before = asyncio.all_tasks()
    async with running(things(data)) as world:
        await world.get()
        data.stop()
        hits: list[Any] = []
        begin = world.verifier.begin
        world.verifier.begin = lambda hit: hits.append(hit) or begin(hit)  # type: ignore[method-assign]
        await world.audited_hit()
        await data.entered.wait()
        await world.cache.close()
        assert asyncio.all_tasks() == before
        assert not world.verifier.busy
        assert all(timer.cancelled for timer in world.timers)
        world.verifier.rest_until = 0
        begin(hits[0])  # of a request that was under way
        assert not world.verifier.busy


async def test_closing_between_audits_leaves_no_timer(world: World) -> None:
    """The one that makes the next hit of the second an audited one."""
    await world.audited_hit()
    await world.done()
    await world.cache.close()
    assert all(timer.cancelled for timer in world.timers)
