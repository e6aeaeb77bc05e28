"""Tokens: what the answer of a write says, and what a request that brings it back is served."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import FastAPI, Header, Request

from respcache import (
    Cache,
    ConfigurationError,
    Level,
    MemoryStore,
    SingleTenant,
    cache_list,
    invalidate_cache,
)
from respcache.core.errors import StoreError
from respcache.core.generations import Certificate, GenerationView
from respcache.core.tokens import (
    MAX_BYTES,
    UNKNOWN,
    ConsistencyToken,
    both,
    client_token,
    decode,
    encode,
    reached,
)
from respcache.stores.memory import MemoryServer

pytestmark = pytest.mark.anyio
TENANT = "public"
SECRET = b"k" * 32
N1, N2 = b"0123456789abcdef", b"fedcba9876543210"
GEN = f"tenant:{TENANT}:~gen"

GARBAGE = [
    b"",
    b",",
    b"validate",
    b"*",
    b"\xff\xfe",
    b"0123456789abcdef",
    b"0123456789abcdef.",
    b".7",
    b"0123456789abcdef.-1",
    b"0123456789abcdef.1e3",
    b"0123456789ABCDEF.7",
    b"0123456789abcdef.7;x",
    b"0123456789abcdef.7,",
    b"0123456789abcdef.7\n",
    b"0123456789abcdef." + b"9" * 19,
    "0123456789abcdef.\u0667".encode(),
    b"0123456789abcdef.7," * 15 + b"0123456789abcdef.7",
    b"x" * 100_000,
]


# -- the words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token", [(), (Certificate(N1, 0),), (Certificate(N1, 7), Certificate(N2, 10**17))]
)
def test_what_is_spelt_is_read_again(token: ConsistencyToken) -> None:
    """All of it, also where a client sends several, with blanks or in several headers."""
    assert decode(encode(token)) == token
    assert decode(encode(token).replace(b",", b" ,\t")) == token
    assert (
        client_token(
            [(b"x-other", b"1"), *((b"x-cache-token", part) for part in encode(token).split(b","))]
        )
        == token
    )
    assert client_token([(b"x-other", b"1")]) is None


@pytest.mark.parametrize("text", GARBAGE)
def test_whatever_is_no_token_is_reached_by_no_view(text: bytes) -> None:
    """It is never an error."""
    assert decode(text) == ()
    assert not reached(decode(text), GenerationView("s", N1, "s", 10**18))


def test_more_than_can_be_meant_is_not_read() -> None:
    """The length is looked at before anything else."""
    most = b",".join([encode((Certificate(N1, 10**17 + number),)) for number in range(7)])
    assert len(decode(most + b" " * (MAX_BYTES - len(most)))) == 7
    assert decode(most + b" " * (MAX_BYTES - len(most) + 1)) == ()


@pytest.mark.parametrize(
    "nonce", [b"", b"short", N1 + b"\r\nset-cookie: a=b", N1 + b".1,", b"\xff" * 16]
)
def test_a_nonce_that_a_foreign_hand_has_written_reaches_no_header(nonce: bytes) -> None:
    """The answer then says that a view must be read first."""
    assert encode((Certificate(nonce, 1),)) == UNKNOWN


def test_a_view_has_reached_a_token_of_its_own_life_up_to_its_sequence() -> None:
    """Of several marks, each must be reached."""
    view = GenerationView("s", N1, "s", 7)
    assert reached((Certificate(N1, 7),), view)
    assert reached((Certificate(N1, 7), Certificate(N1, 1)), view)
    for token in [
        (Certificate(N1, 8),),
        (Certificate(N2, 1),),
        (Certificate(N1, 7), Certificate(N2, 1)),
        (),
    ]:
        assert not reached(token, view)
    assert not reached((Certificate(N1, 1),), GenerationView("s"))


def test_one_token_stands_for_all_writes_of_a_request() -> None:
    """The highest of one life; of two lives, or where one is not known, none that a view could
    reach."""
    low, high, other = (Certificate(N1, 3),), (Certificate(N1, 9),), (Certificate(N2, 1),)
    assert both(None, None) is None
    assert both(None, low) == both(low, None) == both(low, low) == low
    assert both(low, high) == both(high, low) == high
    assert (
        both(low, other) == both((), low) == both(low, ()) == both(None, ()) == both((), None) == ()
    )


# -- two processes, of which the second is deaf ----------------------------------------------------


class Deaf(MemoryStore):
    """Hears of its own bumps alone; counts the views that it reads."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server)
        self.views = 0

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
        """Hear nothing."""


class Silent(SingleTenant):
    """Does not say which headers it looks at: nothing is recognised."""

    headers = None  # type: ignore[assignment]


class Data:
    """What both processes show."""

    version = 0


class Process:
    """A process with a list of each level, a value, and a write."""

    def __init__(
        self, store: MemoryStore, data: Data, resolver: SingleTenant | None = None
    ) -> None:
        self.now = 1000.0
        self.store = store
        self.seen: list[str | None] = []
        app = FastAPI()
        for level in Level:

            async def things(request: Request) -> int:
                self.seen.append(request.headers.get("x-cache-token"))
                return data.version

            app.get(f"/{level}")(cache_list("things", level=level, ttl=1000, bound_s=5.0)(things))

        @app.post("/write")
        @invalidate_cache("things")
        async def write() -> int:
            data.version += 1
            return data.version

        @app.post("/by-hand")
        async def by_hand(other: bool = False) -> bool:
            data.version += 1
            if other:
                await self.cache.invalidate_all_tenant("other")
            return await self.cache.invalidate_tenant_cache(TENANT, "things")

        @app.get("/value")
        async def value() -> int:
            async def make() -> int:
                return data.version

            return await self.cache.get_or_set(
                TENANT, "things", {}, make, level="bounded", bound_s=5.0
            )

        @app.post("/nested")
        async def nested() -> Any:
            async def make() -> bool:
                return await self.cache.invalidate_tenant_cache(TENANT, "things")

            return await self.cache.get_or_set("other", "outer", {}, make)

        @app.post("/nothing")
        async def nothing() -> None:
            return None

        self.cache = Cache(
            store,
            secret=SECRET,
            resolver=resolver or SingleTenant(TENANT),
            clock=lambda: self.now,
            verify_share=0,
        )
        self.http = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(self.cache.wrap(app)), base_url="http://test"
        )

    async def get(
        self, path: str = "/bounded", token: str | None = None, **headers: str
    ) -> tuple[int, str]:
        """Read; return the version and whether it was a hit."""
        if token is not None:
            headers["x-cache-token"] = token
        answer = await self.http.get(path, headers=headers)
        assert answer.status_code == 200
        await asyncio.sleep(0)  # what is stored is stored when the answer is on its way
        return answer.json(), "hit" if "; hit" in answer.headers.get("cache-status", "") else "miss"

    async def write(self, path: str = "/write") -> str | None:
        """Write; return the token of the answer."""
        answer = await self.http.post(path)
        assert answer.status_code == 200
        return answer.headers.get("x-cache-token")


@asynccontextmanager
async def two(resolver: SingleTenant | None = None) -> AsyncIterator[tuple[Process, Process]]:
    server, data = MemoryServer(), Data()
    processes = Process(MemoryStore(server), data), Process(Deaf(server), data, resolver)
    for process in processes:
        await process.cache.connect()
    yield processes
    for process in processes:
        await process.http.aclose()
        await process.cache.close()


async def remembered(reader: Process, path: str = "/bounded") -> None:
    """Have a process hold the answer, its plan and a view."""
    for _ in range(3):
        await reader.get(path)
    assert await reader.get(path) == (0, "hit")


def views(process: Process) -> int:
    assert isinstance(process.store, Deaf)
    return process.store.views


@pytest.mark.parametrize("path", ["/bounded", "/ttl"])
async def test_a_client_that_brings_its_token_sees_its_own_write(path: str) -> None:
    """Without it, another process may show what was before, within the bound; with it, never."""
    async with two() as (writer, reader):
        await remembered(reader, path)
        token = await writer.write()
        assert await reader.get(path) == (0, "hit")
        assert await reader.get(path, token) == (1, "miss")
        assert await reader.get(path) == (1, "hit")


@pytest.mark.parametrize("path", ["/bounded", "/ttl"])
async def test_a_token_that_a_view_has_reached_costs_no_round_trip(path: str) -> None:
    """For ever: what others write meanwhile is not demanded by it."""
    async with two() as (writer, reader):
        await remembered(reader, path)
        token = await writer.write()
        for _ in range(2):
            await reader.get(path, token)
        before = views(reader)
        await writer.write()
        assert [await reader.get(path, token) for _ in range(3)] == [(1, "hit")] * 3
        assert views(reader) == before


async def test_a_client_whose_bytes_are_new_here_sees_its_own_write() -> None:
    """No plan is remembered for them, so the hit is found on the long way; nothing is recognised
    where a resolver is silent."""
    for resolver, header in (None, "gzip"), (Silent(TENANT), ""):
        async with two(resolver) as (writer, reader):
            await remembered(reader)
            token = await writer.write()
            before = views(reader)
            assert await reader.get(**{"accept-encoding": header}) == (0, "hit")
            assert views(reader) == before
            assert await reader.get(token=token, **{"accept-encoding": header + ", br"}) == (
                1,
                "miss",
            )


@pytest.mark.parametrize("text", GARBAGE)
async def test_whatever_a_client_sends_costs_one_view_and_no_error(text: bytes) -> None:
    """And it goes on to do so: it is never remembered as a request that needs none."""
    async with two() as (writer, reader):
        await remembered(reader)
        for version in range(3):
            before = views(reader)
            answer = await reader.http.get("/bounded", headers=[(b"x-cache-token", text)])
            assert (answer.status_code, answer.json()) == (200, version)
            assert views(reader) == before + 1
            await asyncio.sleep(0)
            await writer.write()


async def test_the_token_of_another_tenant_is_reached_by_no_view() -> None:
    """However far this tenant's generation is: one reading, and the same answer."""
    async with two() as (writer, reader):
        await reader.get()
        for _ in range(5):
            await writer.write()
            await reader.get("/strict")
        token = f"{N2.decode()}.1"
        for _ in range(3):
            await reader.get()
        before = views(reader)
        assert [await reader.get(token=token) for _ in range(2)] == [(5, "hit")] * 2
        assert views(reader) == before + 2


async def test_a_write_to_a_generation_that_was_made_anew_is_seen() -> None:
    """Its sequence begins again: the view of its former life is far ahead, and knows nothing of the
    write."""
    async with two() as (writer, reader):
        await reader.get()
        for _ in range(4):
            await writer.write()
        for _ in range(3):
            await reader.get()
        assert await reader.get() == (4, "hit")
        writer.store.server.delete(GEN)
        await writer.get("/strict")
        token = await writer.write()
        assert token is not None
        assert token.endswith(".1")
        assert await reader.get() == (4, "hit")
        assert await reader.get(token=token) == (5, "miss")


async def test_a_write_to_a_generation_that_was_lost_is_seen() -> None:
    """Nothing was bumped, and the view of another process still says what was before."""
    async with two() as (writer, reader):
        await remembered(reader)
        writer.store.server.delete(GEN)
        token = await writer.write()
        assert token == UNKNOWN.decode()
        assert await reader.get() == (0, "hit")
        assert await reader.get(token=token) == (1, "miss")


async def test_the_answer_of_a_write_names_what_it_has_reached() -> None:
    """Of an invalidation by hand too, alone or within a fill; nothing where nothing was bumped, and
    nothing on reads."""
    async with two() as (writer, reader):
        await reader.get()
        nonce = writer.store.server.values[GEN][0]["n"].decode()
        assert await writer.write() == f"{nonce}.1"
        assert await writer.write("/by-hand") == f"{nonce}.2"
        assert await writer.write("/nested") == f"{nonce}.3"
        assert await writer.write("/by-hand?other=true") == UNKNOWN.decode()
        assert await writer.write("/nothing") is None
        assert "x-cache-token" not in (await reader.http.get("/bounded")).headers
        await writer.store.close()
        assert await writer.write() == UNKNOWN.decode()


async def test_a_value_in_a_request_that_brings_a_token_holds_the_write() -> None:
    """And in the process that wrote it does without one."""
    async with two() as (writer, reader):
        for process in (writer, reader):
            for _ in range(2):
                assert (await process.get("/value"))[0] == 0
        token = await writer.write()
        assert (await writer.get("/value"))[0] == 1
        assert (await reader.get("/value"))[0] == 0
        assert (await reader.get("/value", token))[0] == 1


async def test_with_a_token_a_hit_does_not_last_while_the_store_is_away() -> None:
    """At level ``ttl`` what lies in memory is used without the store: not by who has written
    since."""
    async with two() as (writer, reader):
        await remembered(reader, "/ttl")
        token = await writer.write()
        await reader.store.close()
        for _ in ("with a view", "without one, as the connection is gone"):
            assert await reader.get("/ttl") == (0, "hit")
            assert await reader.get("/ttl", token) == (1, "miss")
            reader.cache.runtime.views.expire_all()
        assert await reader.get("/ttl") == (0, "hit")


async def test_a_strict_route_needs_no_token() -> None:
    """One reading with it as without it."""
    async with two() as (writer, reader):
        await remembered(reader, "/strict")
        token = await writer.write()
        await reader.get("/strict")
        for brought in (token, None, "garbage"):
            before = views(reader)
            assert await reader.get("/strict", brought) == (1, "hit")
            assert views(reader) == before + 1


async def test_the_handler_sees_the_header_and_the_key_does_not() -> None:
    """Whoever brings one or none is served by the same entry, and recognised by the same plan."""
    async with two() as (_, reader):
        await reader.get(token=f"{N1.decode()}.1")
        assert reader.seen == [f"{N1.decode()}.1"]
        assert await reader.get() == (0, "hit")
        assert await reader.get(token="something else") == (0, "hit")
        plan_cache = reader.cache.middleware.plan_cache
        assert len(plan_cache) == 1


def test_a_route_or_a_resolver_that_takes_the_name_is_refused() -> None:
    """A request is recognised without it, so no answer can depend on it."""
    app = FastAPI()

    @app.get("/things")
    @cache_list("things")
    async def things(x_cache_token: Annotated[str, Header()] = "") -> str:
        return x_cache_token

    with pytest.raises(ConfigurationError, match="GET /things declares the header x-cache-token"):
        Cache(MemoryStore(), secret=SECRET, resolver=SingleTenant(TENANT)).wrap(app).prepare()

    class Reading(SingleTenant):
        headers = ("X-Cache-Token",)

    with pytest.raises(ConfigurationError, match=r"Reading\.headers names x-cache-token"):
        Cache(MemoryStore(), secret=SECRET, resolver=Reading(TENANT)).wrap(FastAPI()).prepare()
