"""Hits from the memory of a process: what proves them at each level, for whom they are, and in
which form they are sent."""

import asyncio
import gzip
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from starlette.middleware.gzip import GZipMiddleware

from respcache import (
    Cache,
    Claim,
    ConfigurationError,
    Denied,
    Level,
    MemoryStore,
    Policy,
    RequestHead,
    Scope,
    SingleTenant,
    cache_list,
)
from respcache.core.encoding import zstd
from respcache.core.errors import StoreError
from respcache.core.generations import GenerationView
from respcache.read.plans import MAX_AGE_S, PLAN_CACHE_BYTES, ScopedPlan
from respcache.stores.base import Bumped
from respcache.stores.memory import MemoryServer

pytestmark = pytest.mark.anyio
SECRET = b"k" * 32


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return seconds."""
        return self.now


class Counting(MemoryStore):
    """Counts what goes over the wire; ``cut`` makes it fail."""

    def __init__(self, server: MemoryServer | None = None) -> None:
        super().__init__(server)
        self.reads: list[str | None] = []
        self.views = 0
        self.deaf = False
        self.lost: Callable[[], None] = lambda: None

    async def read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Any:
        """Count."""
        self.reads.append(entry)
        return await super().read(entry, wanted)

    def view(
        self,
        generation: str,
        tags: Sequence[str],
        done: Callable[[GenerationView | StoreError], None],
    ) -> None:
        """Count."""
        self.views += 1
        super().view(generation, tags, done)

    def listen(self, heard: Callable[[str], None], lost: Callable[[], None]) -> None:
        """Hear what is bumped, unless deaf."""
        self.lost = lost
        super().listen(lambda generation: None if self.deaf else heard(generation), lost)


class World:
    """An application with a list of each level, its cache, and its clock."""

    def __init__(self, store: Counting | None = None, **options: Any) -> None:
        self.clock = options.pop("clock", None) or Clock()
        self.store = store or Counting()
        self.version = 0
        self.made = 0
        self.body = b""
        self.headers: dict[str, str] = {}
        self.vary_value = "a"
        app = FastAPI()
        for level in Level:
            app.get(f"/{level}")(
                cache_list("things", level=level, ttl=100, bound_s=2.0)(self._handler(level))
            )
        vary_value = cache_list(
            "things", level="ttl", ttl=100, varies_by=lambda scope: self.vary_value
        )
        app.get("/varied")(vary_value(self._handler("varied")))
        resolver = options.pop("resolver", SingleTenant("public"))
        self.cache = Cache(
            self.store,
            secret=SECRET,
            resolver=resolver,
            clock=self.clock,
            verify_share=0,
            **options,
        )
        self.wrapped = self.cache.wrap(app)
        self.http: httpx2.AsyncClient

    def _handler(self, level: str) -> Any:
        async def things(request: Request) -> Response:
            self.made += 1
            return Response(
                self.body or f"{level} {self.version}",
                headers=self.headers,
                media_type="text/plain",
            )

        things.__name__ = f"list_{level}"
        return things

    async def get(self, path: str = "/strict", **headers: str) -> str:
        """Ask; return the text and what the cache said, in a word."""
        answer = await self.http.get(path, headers=headers)
        await asyncio.sleep(0)  # what is stored is stored when the answer is on its way
        return f"{answer.text} {'hit' if '; hit' in answer.headers['cache-status'] else 'miss'}"

    async def write(self, *, by: MemoryStore | None = None) -> None:
        """Change the data, and bump, as this process or as another."""
        self.version += 1
        if by is None:
            await self.cache.invalidate_all_tenant("public")
        else:
            await by.bump("tenant:public:~gen", tags=["*"], ttl_ms=100_000)


@asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    await world.cache.connect()
    transport = httpx2.ASGITransport(app=world.wrapped, raise_app_exceptions=False)
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://test", headers={"accept-encoding": ""}
    ) as http:
        world.http = http
        yield world
    await world.cache.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running(World()) as made:
        yield made


# -- levels ----------------------------------------------------------------------------------------


async def test_a_strict_hit_from_memory_asks_for_a_view_alone(world: World) -> None:
    """The entry does not come over the wire again; what another process wrote is seen by the very
    next request."""
    await world.get()
    world.store.reads.clear()
    world.store.views = 0
    assert [await world.get() for _ in range(3)] == ["strict 0 hit"] * 3
    assert (world.store.reads, world.store.views) == ([], 3)
    await world.write(by=MemoryStore(world.store.server))
    assert await world.get() == "strict 1 miss"
    assert await world.get() == "strict 1 hit"


async def test_bounded_hits_need_no_view_until_the_bound_is_over(world: World) -> None:
    """Deaf to what others bump, they may be out of date for the bound, and not a moment longer."""
    world.store.deaf = True
    await world.get("/bounded")
    assert await world.get("/bounded") == "bounded 0 hit"
    views = world.store.views
    await world.write(by=MemoryStore(world.store.server))
    world.clock.now += 1.999
    assert await world.get("/bounded") == "bounded 0 hit"
    assert world.store.views == views
    world.clock.now += 0.002
    assert await world.get("/bounded") == "bounded 1 miss"


async def test_bounded_hits_see_what_is_heard_of_at_once(world: World) -> None:
    """What others bump when the message comes, what this process bumps always, and nothing is
    trusted once a link is gone."""
    await world.get("/bounded")
    assert await world.get("/bounded") == "bounded 0 hit"
    await world.write(by=MemoryStore(world.store.server))
    assert await world.get("/bounded") == "bounded 1 miss"
    assert await world.get("/bounded") == "bounded 1 hit"
    views = world.store.views
    world.store.lost()
    assert await world.get("/bounded") == "bounded 1 hit"
    assert world.store.views == views + 1


async def test_ttl_hits_last_without_the_store(world: World) -> None:
    """Until their time is over, or an invalidation is heard of."""
    await world.get("/ttl")
    assert await world.get("/ttl") == "ttl 0 hit"
    views = world.store.views
    world.clock.now += 90
    assert await world.get("/ttl") == "ttl 0 hit"
    assert world.store.views == views
    world.store.lost()
    await world.store.close()
    assert await world.get("/ttl") == "ttl 0 hit"
    assert "bypass" in (await world.http.get("/bounded")).headers["cache-status"]
    await world.store.connect()
    await world.write()
    assert await world.get("/ttl") == "ttl 1 miss"
    world.clock.now += 101
    world.version += 1
    world.store.server.values.clear()
    assert await world.get("/ttl") == "ttl 2 miss"


async def test_an_entry_in_memory_ends_when_it_ends_in_the_store(world: World) -> None:
    """Its time is what the store says is left, not the whole of it again."""
    clock = Clock()
    server = MemoryServer(clock=clock)
    first, second = (World(Counting(server), clock=clock) for _ in range(2))
    async with running(first), running(second):
        await first.get()
        clock.now += 60
        assert await second.get() == "strict 0 hit"
        assert (
            25
            < int((await second.http.get("/strict")).headers["cache-status"].partition("ttl=")[2])
            < 40
        )
        clock.now += 41
        assert await second.get() == "strict 0 miss"


async def test_without_memory_every_hit_comes_from_the_store() -> None:
    """``near_bytes=0``: one reading of entry and generation together, no view."""
    async with running(World(near_bytes=0)) as world:
        await world.get()
        world.store.reads.clear()
        world.store.views = 0
        assert [await world.get() for _ in range(3)] == ["strict 0 hit"] * 3
        assert (len(world.store.reads), world.store.views) == (3, 0)


async def test_requests_of_one_moment_share_a_view(world: World) -> None:
    """Fifty strict hits, a handful of questions."""
    await world.get()
    world.store.views = 0
    answers = await asyncio.gather(*(world.get() for _ in range(50)))
    assert answers == ["strict 0 hit"] * 50
    assert world.store.views <= 3


@pytest.mark.parametrize("options", [{"level": "loose"}, {"bound_s": 0}, {"bound_s": 61}])
def test_a_level_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    """With the value in the message."""
    with pytest.raises(ConfigurationError, match=str(next(iter(options.values())))):
        cache_list("things", **options)


# -- for whom --------------------------------------------------------------------------------------


class People:
    """A resolver with users in a table; ``headers`` says that only this header counts."""

    tables = ("users",)
    stands_for = frozenset[Any]()
    headers = ("x-user",)

    def __init__(self) -> None:
        self.verified = 0
        self.expires_at: float | None = None
        self.sees = {"ann": b"all", "bob": b"own"}
        self.pause: asyncio.Event | None = None

    def claim(self, head: RequestHead) -> Claim:
        """Verify."""
        self.verified += 1
        name = head.header("x-user")
        if name not in self.sees:
            raise Denied("nobody")
        return Claim(name, "public", self.expires_at)

    async def scope(self, claim: Claim) -> Scope:
        """Look the user up."""
        if self.pause is not None:
            await self.pause.wait()
        if claim.key not in self.sees:
            raise Denied("gone")
        return Scope("public", self.sees[claim.key])

    def permits(self, scope: Scope, rule: Any) -> bool:
        """Everything."""
        return rule is None


async def test_credentials_are_verified_once_and_again_when_they_end() -> None:
    """By the claim's own end, after a minute at the latest, and for every other spelling of the
    request."""
    people = People()
    async with running(World(resolver=people)) as world:
        await world.get(**{"x-user": "ann"})
        assert [await world.get(**{"x-user": "ann"}) for _ in range(3)] == ["strict 0 hit"] * 3
        assert people.verified == 1
        await world.get("/strict?ignored=1", **{"x-user": "ann"})
        assert people.verified == 2
        world.clock.now += MAX_AGE_S
        await world.get(**{"x-user": "ann"})
        assert people.verified == 3
        people.expires_at = time.time() + 10
        world.clock.now += MAX_AGE_S
        await world.get(**{"x-user": "ann"})
        world.clock.now += 9.9
        await world.get(**{"x-user": "ann"})
        assert people.verified == 4
        world.clock.now += 0.2
        await world.get(**{"x-user": "ann"})
        assert people.verified == 5


async def test_what_is_forgotten_is_verified_and_looked_up_anew() -> None:
    """For revocations that no table knows of."""
    people = People()
    async with running(World(resolver=people)) as world:
        for _ in range(2):
            await world.get(**{"x-user": "ann"})
        del people.sees["ann"]
        assert await world.get(**{"x-user": "ann"}) == "strict 0 hit"
        world.cache.forget()
        assert len(world.wrapped.plan_cache) == 0
        assert (
            "detail=denied"
            in (await world.http.get("/strict", headers={"x-user": "ann"})).headers["cache-status"]
        )


async def test_a_look_under_way_while_all_is_forgotten_is_not_remembered() -> None:
    """Its credentials were verified before: it is answered, and the next request is verified
    anew."""
    people = People()
    people.pause = asyncio.Event()
    async with running(World(resolver=people)) as world:
        asking = asyncio.create_task(world.get(**{"x-user": "ann"}))
        while not people.verified:
            await asyncio.sleep(0)
        world.cache.forget()
        people.pause.set()
        assert await asking == "strict 0 miss"
        del people.sees["ann"]
        assert (
            "detail=denied"
            in (await world.http.get("/strict", headers={"x-user": "ann"})).headers["cache-status"]
        )
        assert len(world.wrapped.plan_cache) == 0


async def test_a_header_that_the_resolver_looks_at_is_part_of_what_is_recognised() -> None:
    """Ann's plan is not Bob's, and nobody's is none."""
    async with running(World(resolver=People())) as world:
        world.body = b"for ann"
        assert await world.get(**{"x-user": "ann"}) == "for ann miss"
        world.body = b"for bob"
        assert await world.get(**{"x-user": "bob"}) == "for bob miss"
        assert await world.get(**{"x-user": "ann"}) == "for ann hit"
        world.body = b"for nobody"
        assert await world.get() == "for nobody miss"


async def test_a_resolver_that_does_not_say_what_it_looks_at_is_asked_every_time() -> None:
    """Nothing is remembered of a request whose claim may depend on anything."""

    class Silent(People):
        headers = None  # type: ignore[assignment]

    people = Silent()
    async with running(World(resolver=people)) as world:
        for _ in range(3):
            await world.get(**{"x-user": "ann"})
        assert people.verified == 3


@pytest.mark.parametrize("level", ["strict", "bounded", "ttl"])
async def test_a_scope_that_changed_ends_the_plan(level: str) -> None:
    """At every level as soon as the bump of its table is heard of: the next request is looked up
    under the new scope."""
    people = People()
    async with running(World(resolver=people)) as world:
        world.body = b"all rows"
        await world.get(f"/{level}", **{"x-user": "ann"})
        assert await world.get(f"/{level}", **{"x-user": "ann"}) == "all rows hit"
        people.sees["ann"] = b"own"
        world.body = b"own rows"
        await world.store.bump("tenant:public:~gen", tags=["T:users"], ttl_ms=100_000)
        assert await world.get(f"/{level}", **{"x-user": "ann"}) == "own rows miss"


async def test_who_may_see_it_is_bounded_at_level_ttl() -> None:
    """Not even an invalidation that is never heard of lets a scope live longer than the bound."""
    people = People()
    async with running(World(resolver=people)) as world:
        world.store.deaf = True
        world.body = b"all rows"
        for _ in range(2):
            await world.get("/ttl", **{"x-user": "ann"})
        people.sees["ann"] = b"own"
        world.body = b"own rows"
        await MemoryStore(world.store.server).bump(
            "tenant:public:~gen", tags=["T:users"], ttl_ms=100_000
        )
        assert await world.get("/ttl", **{"x-user": "ann"}) == "all rows hit"
        world.clock.now += 2.001
        assert await world.get("/ttl", **{"x-user": "ann"}) == "own rows miss"


async def test_a_plan_that_moves_on_takes_no_request_along() -> None:
    """While one request waits for its view, another finds that the scope has changed and gives the
    plan a new aim: the first one, whose answer was made for the old scope, must not be proven by
    what was found of the new one."""
    people = People()

    class Slow(Counting):
        held: list[Callable[[], None]] | None = None

        def view(
            self,
            generation: str,
            tags: Sequence[str],
            done: Callable[[GenerationView | StoreError], None],
        ) -> None:
            if self.held is None:
                super().view(generation, tags, done)
            else:
                self.held.append(lambda: Counting.view(self, generation, tags, done))

    store = Slow()
    async with running(World(store, resolver=people)) as world:
        world.body = b"all rows"
        await world.get(**{"x-user": "ann"})
        assert await world.get(**{"x-user": "ann"}) == "all rows hit"
        people.sees["ann"] = b"own"
        world.body = b"own rows"
        await store.bump("tenant:public:~gen", tags=["T:users"], ttl_ms=100_000)
        store.held = []
        first = asyncio.create_task(world.get(**{"x-user": "ann"}))
        while not store.held:
            await asyncio.sleep(0)
        going, store.held = store.held, None
        (plan,), claim = world.wrapped.plan_cache.plans(), Claim("ann", "public")
        scoped, runtime = plan.scoped, world.cache.runtime
        found = store.server.view("tenant:public:~gen", (), server=store.server.identity)
        plan.cached_scope = await runtime.scopes.read(
            claim, view=found, certificate=found.certificate()
        )
        plan.scoped = runtime.lookup.scope_plan(plan, claim, plan.cached_scope)
        assert plan.scoped is not scoped
        for go in going:
            go()
        assert await first == "own rows miss"


# -- proofs that are remembered --------------------------------------------------------------------

LEVELS = pytest.mark.parametrize("level", ["strict", "bounded", "ttl"])


async def proven(world: World, level: str) -> ScopedPlan:
    """Have a hit proven and that remembered; return where it leads."""
    world.body = b"proven"
    for _ in range(2):
        await world.get(f"/{level}")
    scoped = next(
        plan.scoped
        for plan in world.wrapped.plan_cache.plans()
        if plan.route.template == f"/{level}"
    )
    assert scoped is not None
    assert (
        world.cache.runtime.proofs.still_proven(scoped, world.clock()) is scoped.proof is not None
    )
    world.body = b"made anew"
    return scoped


@LEVELS
async def test_a_pending_invalidation_ends_a_proof(level: str) -> None:
    """The store still shows the view of the proof: it does not know of the write."""

    class Refusing(Counting):
        refuses = False

        async def bump(
            self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str] = ()
        ) -> Bumped:
            if self.refuses:
                raise StoreError("refused")
            return await super().bump(generation, tags=tags, ttl_ms=ttl_ms, rows=rows)

    store = Refusing()
    async with running(World(store)) as world:
        await proven(world, level)
        store.refuses = True
        await world.write()
        assert world.cache.pending_tenants == ("public",)
        for _ in range(2):
            assert (
                "detail=pending-invalidation"
                in (await world.http.get(f"/{level}")).headers["cache-status"]
            )
        store.refuses = False
        await world.cache.settled()
        assert await world.get(f"/{level}") == "made anew miss"


@LEVELS
@pytest.mark.parametrize(
    "switch",
    [{}, {"tenant_id": "public"}, {"module": "things"}],
    ids=["everything", "tenant", "module"],
)
async def test_a_switch_ends_a_proof(world: World, level: str, switch: dict[str, str]) -> None:
    """Also where nobody is asked; another tenant's ends none."""
    await proven(world, level)
    await world.cache.disable(**switch)
    for _ in range(2):
        assert "detail=off" in (await world.http.get(f"/{level}")).headers["cache-status"]
    await world.cache.enable(**switch)
    await world.cache.disable(tenant_id="other")
    assert await world.get(f"/{level}") == "proven hit"


@LEVELS
async def test_a_proof_ends_with_its_entry(world: World, level: str) -> None:
    """Dropped from memory, all of memory dropped, or another entry in its place: what is there now
    is served."""
    scoped = await proven(world, level)
    near = world.cache.runtime.near
    for drop in (lambda: near.discard(scoped.cache_key.entry_key), near.clear):
        drop()
        assert world.cache.runtime.proofs.still_proven(scoped, world.clock()) is None
        world.store.reads.clear()
        assert await world.get(f"/{level}") == "proven hit"
        assert world.store.reads == [scoped.cache_key.entry_key]
        assert await world.get(f"/{level}") == "proven hit"
        assert world.store.reads == [scoped.cache_key.entry_key]
    kept = near.get(scoped.cache_key.entry_key)
    assert kept is not None
    near.keep(scoped.cache_key, replace(kept.entry, body=b"another"), remaining_ms=50_000)
    assert await world.get(f"/{level}") == "another hit"


@LEVELS
async def test_a_proof_ends_when_the_entry_does(world: World, level: str) -> None:
    """Not a view later."""
    scoped = await proven(world, level)
    world.store.server.values.pop(scoped.cache_key.entry_key)
    assert scoped.proof is not None
    world.clock.now = scoped.proof.memory_entry.expires_at
    assert await world.get(f"/{level}") == "made anew miss"


async def test_a_proof_of_level_bounded_ends_with_the_bound(world: World) -> None:
    """It counts from the view's question, not from the proof; views that are read for others renew
    it."""
    world.store.deaf = True
    await proven(world, "bounded")
    began = world.clock.now
    scoped = next(plan.scoped for plan in world.wrapped.plan_cache.plans())
    assert scoped is not None
    world.clock.now = began + 1.5
    scoped.proof = None
    assert await world.get("/bounded") == "proven hit"
    assert scoped.proof is not None
    await world.write(by=MemoryStore(world.store.server))
    world.clock.now = began + 1.99
    assert await world.get("/bounded") == "proven hit"
    world.clock.now = began + 2.01
    assert await world.get("/bounded") == "made anew miss"


async def test_what_an_answer_varies_by_is_asked_for_every_request(world: World) -> None:
    """It may change without a word to any table: no proof is remembered over it."""
    world.body = b"of a"
    assert [await world.get("/varied") for _ in range(3)] == ["of a miss", "of a hit", "of a hit"]
    world.vary_value, world.body = "b", b"of b"
    assert [await world.get("/varied") for _ in range(3)] == ["of b miss", "of b hit", "of b hit"]
    world.vary_value = "a"
    assert await world.get("/varied") == "of a hit"


# -- in which form ---------------------------------------------------------------------------------

ROWS = (
    b"["
    + b", ".join(b'{"id": %d, "name": "a row of the list"}' % number for number in range(200))
    + b"]"
)


async def coded(world: World, accept: str, path: str = "/strict") -> httpx2.Response:
    """Ask for codings, and return the answer as it came."""
    request = world.http.build_request("GET", path, headers={"accept-encoding": accept})
    answer = await world.http.send(request, stream=True)
    answer.raw = b"".join([part async for part in answer.aiter_raw()])
    await asyncio.sleep(0)
    return answer


@pytest.mark.parametrize("near_bytes", [0, 1 << 20])
async def test_hits_are_sent_as_the_client_accepts_them(near_bytes: int) -> None:
    """Compressed once and served as stored; gzip and plain for others; the same rows in every form,
    and Vary on each."""
    async with running(World(near_bytes=near_bytes)) as world:
        world.body = ROWS
        first = await coded(world, "zstd")
        assert (first.raw, first.headers["vary"]) == (ROWS, "Accept-Encoding")
        found = {
            accept: await coded(world, accept)
            for accept in ("zstd", "gzip", "zstd, gzip", "br", "", "gzip;q=0")
        }
        assert world.made == 1
        assert all("hit" in answer.headers["cache-status"] for answer in found.values())
        assert all(answer.headers["vary"] == "Accept-Encoding" for answer in found.values())
        assert all(
            int(answer.headers["content-length"]) == len(answer.raw) for answer in found.values()
        )
        codings = {
            accept: answer.headers.get("content-encoding") for accept, answer in found.items()
        }
        assert codings == {
            "zstd": "zstd",
            "gzip": "gzip" if near_bytes else None,
            "zstd, gzip": "zstd",
            "br": None,
            "": None,
            "gzip;q=0": None,
        }
        assert zstd.decompress(found["zstd"].raw) == found["br"].raw == found[""].raw == ROWS
        assert len(found["zstd"].raw) < len(ROWS) / 3
        if near_bytes:
            assert gzip.decompress(found["gzip"].raw) == ROWS


@pytest.mark.parametrize("level", list(Level))
async def test_who_is_served_before_an_answer_is_compressed_gets_it_compressed_from_then_on(
    world: World, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof that was made with the plain form ends when there is a compressed one."""
    world.body = ROWS
    near, delayed = world.cache.runtime.near, list[Any]()
    add_compressed = near.add_compressed
    monkeypatch.setattr(near, "add_compressed", lambda *given: delayed.append(given))
    for _ in range(3):
        assert (await coded(world, "zstd", f"/{level}")).raw == ROWS
    add_compressed(*delayed[0])
    assert zstd.decompress((await coded(world, "zstd", f"/{level}")).raw) == ROWS
    assert world.made == 1


async def test_what_a_fill_does_with_its_answer_counts_as_no_use(world: World) -> None:
    """Compressed, sent and resized, yet asked for once: such entries must go before those that are
    asked for again."""
    world.body = ROWS
    await coded(world, "gzip")
    (plan,) = world.wrapped.plan_cache.plans()
    slot = world.cache.runtime.near.slot(plan.scoped.cache_key.entry_key)
    assert slot.frequency == 0
    await coded(world, "gzip")
    assert slot.frequency == 1


async def test_what_is_kept_in_the_store_is_the_compressed_form(world: World) -> None:
    """A third of the memory there; another process decompresses it for who needs that."""
    world.body = ROWS
    await coded(world, "")
    stored = [value for key, (value, _) in world.store.server.values.items() if ":list:" in key]
    assert len(stored[0]) < len(ROWS) / 3
    async with running(World(Counting(world.store.server))) as other:
        assert (await coded(other, "")).raw == ROWS
        assert other.made == 0


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-type": "image/png"}, ROWS),
        ({"content-type": "text/plain", "etag": '"strong"'}, ROWS),
        ({}, b"short"),
    ],
)
async def test_what_does_not_gain_is_sent_as_the_handler_made_it(
    headers: dict[str, str], body: bytes
) -> None:
    """No coding, no Vary."""
    async with running(World()) as world:
        world.headers, world.body = headers, body
        for _ in range(3):
            answer = await coded(world, "zstd, gzip")
            assert (answer.raw, "vary" in answer.headers, "content-encoding" in answer.headers) == (
                body,
                False,
                False,
            )
        assert world.made == 1


async def test_damaged_bytes_in_the_store_are_a_miss() -> None:
    """Never an error, never half a body; the entry is made anew."""
    async with running(World(near_bytes=0)) as world:
        world.body = ROWS
        await coded(world, "")
        key = next(key for key in world.store.server.values if ":list:" in key)
        value, ends = world.store.server.values[key]
        world.store.server.values[key] = (value[:-20] + bytes(20), ends)
        answer = await coded(world, "")
        assert (answer.status_code, answer.raw, world.made) == (200, ROWS, 2)
        assert "stored" in answer.headers["cache-status"]


async def test_a_head_request_is_answered_from_memory_without_a_body(world: World) -> None:
    """With the length of what GET would send."""
    world.body = ROWS
    await world.get()
    answer = await world.http.head("/strict")
    assert "hit" in answer.headers["cache-status"]
    assert (answer.content, int(answer.headers["content-length"])) == (b"", len(ROWS))


async def test_memory_is_bounded_by_what_is_kept_in_every_form() -> None:
    """Forms that are made later count too."""
    async with running(World(near_bytes=200_000)) as world:
        world.body = ROWS
        near = world.cache.runtime.near
        assert near is not None
        await coded(world, "")
        before = near.size_bytes
        assert before > len(ROWS)
        await coded(world, "gzip")
        assert before < near.size_bytes <= 200_000


def test_the_level_is_part_of_the_policy() -> None:
    """Strict unless said otherwise."""
    assert Policy("things", "list", 10).level is Level.STRICT


# -- what a reader with fresh eyes found -----------------------------------------------------------


async def test_a_header_that_a_resolver_did_not_name_is_not_there_for_it() -> None:
    """It would be missed when the next caller is recognised: so nobody is let in by it."""

    class Forgetful(People):
        headers = ("x-other",)

    async with running(World(resolver=Forgetful())) as world:
        for user in ("ann", "bob"):
            answer = await world.http.get("/strict", headers={"x-user": user})
            assert "detail=denied" in answer.headers["cache-status"]


async def test_a_resolver_with_named_headers_sees_nothing_of_the_connection() -> None:
    """Who is told by an address would be taken for the next one who asks the same."""

    class ByAddress(People):
        def claim(self, head: RequestHead) -> Claim:
            addresses.append(head.scope.get("client"))
            return Claim("ann", "public")

    addresses: list[Any] = []
    async with running(World(resolver=ByAddress())) as world:
        await world.get()
    assert addresses == [None]


async def test_what_clients_send_takes_no_more_memory_than_the_memo_counts(world: World) -> None:
    """Parts that keys have in common are kept once; long ones, which nobody else sends, leave with
    their plan."""
    await world.get()
    plan_cache = world.wrapped.plan_cache
    assert plan_cache is not None
    (plan,) = plan_cache.plans()
    tracemalloc.start()
    try:
        for number in range(40):
            plan_cache.put(("/strict", b"%d=" % number + bytes(1_000_000), ""), plan)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 2 * PLAN_CACHE_BYTES


def test_one_name_in_place_of_a_tuple_is_refused() -> None:
    """A missing comma would make a set of letters."""

    class Slip(People):
        headers = "x-user"  # type: ignore[assignment]

    with pytest.raises(ConfigurationError, match="x-user"):
        World(resolver=Slip()).wrapped.prepare()


async def test_a_header_that_a_server_refuses_is_not_stored(world: World) -> None:
    """By the time it does, the entry would be there for everybody."""
    world.headers = {"content-disposition": "attachment; filename=a\r\nSet-Cookie: evil=1"}
    assert "detail=header" in (await world.http.get("/strict")).headers["cache-status"]


async def test_what_others_add_to_a_hit_stays_with_it(world: World) -> None:
    """Two hits never share a list of headers."""
    await world.get()
    seen: list[Any] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"].append((b"set-cookie", b"session=%d" % len(seen)))
            seen.append(message["headers"])

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/strict",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "state": {},
    }
    for _ in range(3):
        await world.wrapped(dict(scope), None, send)  # type: ignore[arg-type]
    assert [sum(name == b"set-cookie" for name, _ in headers) for headers in seen] == [1, 1, 1]
    assert all(dict(headers)[b"cache-status"].startswith(b"respcache; hit") for headers in seen)


@pytest.mark.parametrize("inner", ["bounded", "ttl"])
async def test_a_value_inside_a_strict_fill_is_strict(world: World, inner: str) -> None:
    """Its certificate was captured after the write: what is made of an older value would be stale
    for all its time."""

    async def value() -> int:
        return world.version

    async def outer(key: int) -> Any:
        async def make() -> Any:
            return await world.cache.get_or_set(
                "public", "inner", {}, value, level=inner, bound_s=50
            )

        return await world.cache.get_or_set("public", "outer", {"key": key}, make)

    world.store.deaf = True
    assert [
        await outer(1),
        await world.cache.get_or_set("public", "inner", {}, value, level=inner, bound_s=50),
    ] == [0, 0]
    await asyncio.sleep(0)
    world.version = 1
    await MemoryStore(world.store.server).bump("tenant:public:~gen", tags=["*"], ttl_ms=100_000)
    assert await outer(2) == 1


async def test_ttl_does_not_last_against_what_was_heard(world: World) -> None:
    """This process has bumped it itself: it is over, whether the store answers or not."""
    await world.get("/ttl")
    assert await world.get("/ttl") == "ttl 0 hit"
    await world.write()
    await world.store.close()
    assert "bypass" in (await world.http.get("/ttl")).headers["cache-status"]


async def test_an_old_view_is_not_what_new_entries_are_judged_by(world: World) -> None:
    """A generation that was lost without a word: one look at the store, then memory serves
    again."""
    world.store.deaf = True
    for _ in range(2):
        await world.get("/ttl")
    world.store.server.delete("tenant:public:~gen")
    world.clock.now += 101  # the entry is over
    world.version = 1
    for _ in range(2):
        await world.get("/ttl")
    world.store.reads.clear()
    assert [await world.get("/ttl") for _ in range(3)] == ["ttl 1 hit"] * 3
    assert world.store.reads == []


@pytest.mark.parametrize("accident", ["off", "pending-invalidation"])
async def test_a_bypass_that_is_known_at_arrival_waits_for_no_view(
    world: World, accident: str
) -> None:
    """A switch must help although the cache server is slow. And a tenant that is blocked when its
    request arrives must not be a hit because the view was read after its last bump was applied but
    requested before."""
    for _ in range(3):
        await world.get()
    if accident == "off":
        await world.cache.disable(tenant_id="public")
    else:
        blocked: Any = world.cache.runtime.invalidator.blocked_tenants
        blocked["public"] = 1
    views = world.store.views
    status = (await world.http.get("/strict")).headers["cache-status"]
    assert status == f"respcache; fwd=bypass; detail={accident}"
    assert world.store.views == views
    if accident != "off":
        blocked.clear()


@pytest.mark.parametrize("name", ["*", "tenant:public", "module:things"])
async def test_the_kill_switch_counts_for_who_waits_for_a_view(world: World, name: str) -> None:
    """Off means off, also a moment before the answer."""
    await world.get()
    view = world.store.view

    def off(
        generation: str, tags: Sequence[str], done: Callable[[GenerationView | StoreError], None]
    ) -> None:
        # private: the switch must turn while the view is read
        world.cache.runtime.switches._apply(frozenset({name}))
        view(generation, tags, done)

    world.store.view = off  # type: ignore[method-assign]
    assert "detail=off" in (await world.http.get("/strict")).headers["cache-status"]


async def test_compression_inside_the_application_hides_nothing(world: World) -> None:
    """The handler of a fill does not learn what the client accepts: its answer is for everybody."""
    app, calls = FastAPI(), 0
    app.add_middleware(GZipMiddleware, minimum_size=100)

    @app.get("/big")
    @cache_list("things")
    async def big() -> Response:
        nonlocal calls
        calls += 1
        return Response(ROWS, media_type="application/json")

    cache = Cache(Counting(), secret=SECRET, resolver=SingleTenant("public"), verify_share=0)
    wrapped = cache.wrap(app)
    await cache.connect()
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(wrapped), base_url="http://test"
    ) as http:
        answers = []
        for accept in ("gzip", "gzip", "", "zstd"):
            answers.append(await http.get("/big", headers={"accept-encoding": accept}))
            await asyncio.sleep(0)
    await cache.close()
    assert (calls, [answer.headers.get("content-encoding") for answer in answers]) == (
        1,
        [None, "gzip", None, "zstd"],
    )


async def test_an_answer_without_content_that_has_some_is_not_stored() -> None:
    """Below ASGI its bytes would be taken for the next answer of the connection (RFC 9110, section
    15.3.5)."""
    app = FastAPI()

    @app.get("/none")
    @cache_list("things")
    async def none() -> Response:
        return Response(b"null", 204, headers={"content-length": "4"})

    cache = Cache(Counting(), secret=SECRET, resolver=SingleTenant("public"), verify_share=0)
    wrapped = cache.wrap(app)
    await cache.connect()
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(wrapped), base_url="http://test"
    ) as http:
        assert "detail=length" in (await http.get("/none")).headers["cache-status"]
    await cache.close()


async def test_an_answer_that_nobody_may_change_says_so_every_time(world: World) -> None:
    """RFC 9111, section 5.2.2.6: on the miss, from memory, and from the store; nothing else of the
    handler's word is kept."""
    world.headers = {"cache-control": "max-age=60, no-transform"}
    for expected in ("stored", "hit", "hit"):
        answer = await world.http.get("/strict")
        await asyncio.sleep(0)
        assert expected in answer.headers["cache-status"]
        assert answer.headers["cache-control"] == "private, no-cache, no-transform"
        if expected == "hit":
            world.cache.runtime.near.clear()  # the next one comes from the store
    world.headers = {}
    await world.http.get("/bounded")
    await asyncio.sleep(0)
    assert (await world.http.get("/bounded")).headers["cache-control"] == "private, no-cache"
