"""Hits below ASGI: the same answers as above it, in their order, and everything else untouched.
Real uvicorn, real Valkey."""

import asyncio
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount, Route

from respcache import (
    Cache,
    Claim,
    ConfigurationError,
    Denied,
    RedisStore,
    RequestHead,
    Scope,
    cache_list,
)
from respcache.integrations import uvicorn as turbo
from respcache.middleware import CacheMiddleware
from respcache.read.plans import MAX_AGE_S
from respcache.testing.servers import EmbeddedValkey, free_port

pytestmark = pytest.mark.anyio
SECRET = b"k" * 32
ROWS = json.dumps([{"id": number, "name": "a row"} for number in range(300)]).encode()


class Callers:
    """Ann and Bob, by header."""

    tables: tuple[str, ...] = ()
    stands_for = frozenset[Any]()
    headers = ("x-user",)

    def claim(self, head: RequestHead) -> Claim:
        """Know them by name."""
        name = head.header("x-user")
        if name not in ("ann", "bob"):
            raise Denied("nobody")
        return Claim(name, "t")

    async def scope(self, claim: Claim) -> Scope:
        """Each sees their own."""
        return Scope("t", str(claim.key).encode())

    def permits(self, scope: Scope, rule: Any) -> bool:
        """No rules."""
        return rule is None


class Server:
    """A server of our application, with or without turbo, and what reached the ASGI application."""

    def __init__(self, url: str, **options: Any) -> None:
        self.calls: list[str] = []
        self.version = 0
        self.waiting = 0
        self.gate = asyncio.Event()
        self.cache = Cache(RedisStore(url), secret=SECRET, resolver=Callers(), verify_share=0)
        app = FastAPI()

        @app.get("/rows")
        @cache_list("rows", tables=["rows"])
        async def rows(request: Request, page: int = 0) -> Response:
            body = b"%d %d %s" % (self.version, page, ROWS)
            return Response(body, media_type="application/json", headers={"x-total-count": "7"})

        @app.api_route("/echo", methods=["GET", "POST", "PUT"])
        async def echo(request: Request) -> Response:
            return Response(await request.body())

        @app.get("/kept")
        @cache_list("rows", tables=["rows"], level="ttl")
        async def kept() -> Response:
            return Response(ROWS, media_type="application/json")

        @app.get("/slow")
        async def slow() -> Response:
            # longer than the connection may idle: that is the server's clock
            await asyncio.sleep(1.3)
            return Response(b"slow")

        @app.get("/gated")
        async def gated() -> Response:
            self.waiting += 1
            await self.gate.wait()
            return Response(b"gated")

        @app.post("/unread")
        async def unread() -> Response:
            return Response(b"not read")

        self.wrapped = self.cache.wrap(app)
        counted = self.wrapped

        class Counting(CacheMiddleware):
            async def __call__(middleware, scope: Any, receive: Any, send: Any) -> None:
                if scope["type"] == "http":
                    self.calls.append(
                        f"{scope['method']} {scope['path']}?{scope['query_string'].decode()}"
                    )
                await super().__call__(scope, receive, send)

        counted.__class__ = Counting
        self.port = free_port()
        http = turbo.protocol(self.wrapped) if options.pop("turbo", True) else "httptools"
        config = uvicorn.Config(
            self.wrapped,
            port=self.port,
            http=http,
            loop="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            **options,
        )
        self.uvicorn = uvicorn.Server(config)

    async def wait(self) -> None:
        """Return when it answers."""
        while not self.uvicorn.started:
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(url: str, **options: Any) -> AsyncIterator[Server]:
    server = Server(url, **options)
    running = asyncio.create_task(server.uvicorn.serve())
    try:
        await asyncio.wait_for(server.wait(), 20)
        yield server
    finally:
        server.uvicorn.should_exit = True
        await running


class Wire:
    """A connection that sends bytes as they are and reads answers."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> "Wire":
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self.port, limit=2**20
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()

    def send(self, *requests: bytes) -> None:
        """Send, all in one packet."""
        self.writer.write(b"".join(requests))

    async def answer(self, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Read one answer."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)).decode()
        lines = head.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        length = 0 if head_only else int(headers["content-length"])
        return int(lines[0].split()[1]), headers, await self.reader.readexactly(length)

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request and read its answer."""
        self.send(request)
        return await self.answer()


def get(path: str = "/rows", user: str = "ann", method: str = "GET", **headers: str) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: test",
        f"X-User: {user}",
        *(f"{n}: {v}" for n, v in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def warm(wire: Wire, *requests: bytes) -> None:
    """Have the requests filled, recognised by the wrapper, and held."""
    for request in requests:
        for _ in range(3):
            await wire.ask(request)
            await asyncio.sleep(0.01)


def stable(headers: dict[str, str]) -> dict[str, str]:
    return {name: value.partition("ttl=")[0] for name, value in headers.items() if name != "date"}


async def test_a_hit_is_what_asgi_would_have_sent_without_reaching_it(valkey_url: str) -> None:
    """Status, headers in every coding, body; and the application is not called."""
    async with serving(valkey_url) as fast, serving(valkey_url, turbo=False) as plain:
        for coding in ("", "gzip", "zstd"):
            request = get("/rows?page=1", **{"Accept-Encoding": coding})
            async with Wire(fast.port) as one, Wire(plain.port) as other:
                await warm(one, request)
                await warm(other, request)
                fast.calls.clear()
                status, headers, body = await one.ask(request)
                assert fast.calls == []
                expected = await other.ask(request)
            assert (status, stable(headers), body) == (
                expected[0],
                stable(expected[1]),
                expected[2],
            )
            assert headers["cache-status"].startswith("respcache; hit; ttl=")
            assert {"date", "server", "vary", "x-total-count", "cache-control"} <= set(headers)
        assert fast.cache.stats()["hits"] >= 3


async def test_one_hit_in_64_is_timed_also_below_asgi(valkey_url: str) -> None:
    """Among them those that wait for a view."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get(), get("/kept"))
        counters = [server.cache.counters.at("t", "rows", route) for route in ("/rows", "/kept")]
        before = [(one.hits, one.times.hits.count) for one in counters]
        server.calls.clear()
        for _ in range(2 * 64):
            for path in ("/rows", "/kept"):
                assert "hit" in (await wire.ask(get(path)))[1]["cache-status"]
        assert server.calls == []
        after = [
            (one.hits - hits, one.times.hits.count - timed)
            for one, (hits, timed) in zip(counters, before, strict=True)
        ]
        assert after == [(128, 2), (128, 2)]
        assert all(0 < one.times.hits.seconds < 10 for one in counters)


async def test_what_was_written_is_seen_by_the_next_request(valkey_url: str) -> None:
    """Strict, whoever invalidates; and everybody gets their own."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get(), get(user="bob"))
        other = Cache(RedisStore(valkey_url), secret=SECRET, resolver=Callers())
        await other.connect()
        server.version = 1
        assert await other.invalidate_tenant_cache("t", "rows")
        for user in ("ann", "bob"):
            server.calls.clear()
            _, headers, body = await wire.ask(get(user=user))
            assert body.startswith(b"1 0 ")
            assert "stored" in headers["cache-status"]
            assert len(server.calls) == 1
        assert "hit" not in (await wire.ask(get(user="nobody")))[1]["cache-status"]
        await other.close()


async def test_pipelined_answers_keep_their_order(valkey_url: str) -> None:
    """Hits, misses and other requests in one packet."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get("/rows?page=1"), get("/rows?page=2"))
        echo = get("/echo", method="POST", **{"Content-Length": "5"}) + b"hello"
        pages = [1, 2, 3, 1, None, 2, 4, None, 1]
        wire.send(*(echo if page is None else get(f"/rows?page={page}") for page in pages))
        answers = [await wire.answer() for _ in pages]
        assert [
            body.split(b" ")[1].decode() if body != b"hello" else None for _, _, body in answers
        ] == [None if page is None else str(page) for page in pages]
        assert (await wire.ask(get("/rows?page=1")))[2].startswith(b"0 1 ")


@pytest.mark.parametrize(
    "request_",
    [
        get(method="HEAD"),
        get(**{"Content-Length": "3"}) + b"abc",
        get(**{"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n",
        get(**{"Connection": "close"}),
        get().replace(b"HTTP/1.1", b"HTTP/1.0"),
        get(**{"Connection": "upgrade", "Upgrade": "h2c"}),
        get(**{"X-Cache-Token": "0123456789abcdef.7"}),
    ],
    ids=["head", "body", "chunked", "close", "1.0", "upgrade", "token"],
)
async def test_what_is_no_plain_get_takes_the_usual_way(valkey_url: str, request_: bytes) -> None:
    """And is answered, from the cache too."""
    async with serving(valkey_url) as server:
        async with Wire(server.port) as wire:
            await warm(wire, get())
        server.calls.clear()
        async with Wire(server.port) as wire:
            wire.send(request_)
            status, headers, _ = await wire.answer(head_only=request_.startswith(b"HEAD"))
        assert (status, len(server.calls)) == (200, 1)
        assert "hit" in headers["cache-status"]


@pytest.mark.parametrize("address", ["http://host", "http://host:99999/rows"])
async def test_an_address_that_is_none_is_no_fault_of_ours(
    valkey_url: str, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    """Uvicorn says what is wrong with it; whoever sends it writes no traceback into our log."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        assert (await wire.ask(get(address)))[0] == 400
    assert not [record for record in caplog.records if record.name == "respcache"]


async def test_a_store_that_stops_answering_fails_no_request(
    make_valkey: Callable[[], EmbeddedValkey],
) -> None:
    """Those who wait for a view go to the application, with the connection in order afterwards."""
    valkey = make_valkey()
    async with serving(valkey.url) as server, Wire(server.port) as wire:
        await warm(wire, get("/rows?page=1"), get("/rows?page=2"))
        valkey.freeze()
        try:
            wire.send(get("/rows?page=1"), get("/rows?page=2"), get("/echo"))
            answers = [await wire.answer() for _ in range(3)]
            assert [status for status, _, _ in answers] == [200, 200, 200]
            assert [body.split(b" ")[1] for _, _, body in answers[:2]] == [b"1", b"2"]
            assert all("hit" not in headers["cache-status"] for _, headers, _ in answers[:2])
            async with Wire(server.port) as gone:
                gone.send(get("/rows?page=1"))
        finally:
            valkey.thaw()
        async with asyncio.timeout(20):
            while "hit" not in (await wire.ask(get("/rows?page=1")))[1]["cache-status"]:
                await asyncio.sleep(0.02)


async def test_while_the_store_is_away_requests_write_nothing_into_the_log(
    make_valkey: Callable[[], EmbeddedValkey], caplog: pytest.LogCaptureFixture
) -> None:
    """They take the usual way; the outage is said once, by the link."""
    valkey = make_valkey()
    async with serving(valkey.url) as server, Wire(server.port) as wire:
        await warm(wire, get())
        valkey.kill()
        async with asyncio.timeout(20):
            while server.cache.store is not None and server.cache.store.available:
                await asyncio.sleep(0.005)
        answers = [await wire.ask(get()) for _ in range(3)]
        assert {
            (status, headers["cache-status"].split("; ", 1)[1]) for status, headers, _ in answers
        } == {(200, "fwd=bypass; detail=store")}
    assert not [record for record in caplog.records if record.name == "respcache"]


async def test_a_client_that_leaves_while_a_view_is_read_harms_nobody(valkey_url: str) -> None:
    """Its answer goes nowhere; others on other connections get theirs."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get())
        for _ in range(50):
            async with Wire(server.port) as leaving:
                leaving.send(get(), get(), get())
                await asyncio.sleep(0)
        assert (await wire.ask(get()))[0] == 200
        async with asyncio.timeout(20):
            while server.uvicorn.server_state.tasks:  # what was pipelined runs to its end
                await asyncio.sleep(0.005)


async def test_the_kill_switch_stops_it_too(valkey_url: str) -> None:
    """At once."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get())
        await server.cache.disable()
        assert "detail=off" in (await wire.ask(get()))[1]["cache-status"]
        await server.cache.enable()
        assert "hit" in (await wire.ask(get()))[1]["cache-status"]


def test_it_does_not_start_with_a_middleware_that_nobody_declared() -> None:
    """Around the wrapper or in the application, by name in full or in short."""
    app = FastAPI()
    cache = Cache(None, secret=SECRET, resolver=Callers())
    turbo.protocol(cache.wrap(app))
    app.add_middleware(GZipMiddleware)
    wrapped = cache.wrap(app)
    with pytest.raises(ConfigurationError, match=r"starlette\.middleware\.gzip\.GZipMiddleware"):
        turbo.protocol(wrapped)
    turbo.protocol(wrapped, skips=["GZipMiddleware"])
    outside = GZipMiddleware(cache.wrap(FastAPI()))
    with pytest.raises(ConfigurationError, match="GZipMiddleware"):
        turbo.protocol(outside)
    turbo.protocol(outside, skips=["starlette.middleware.gzip.GZipMiddleware"])
    with pytest.raises(ConfigurationError, match="not wrapped"):
        turbo.protocol(FastAPI())


class Passes:
    """A middleware that does nothing."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


@pytest.mark.parametrize("where", ["mounted application", "mount", "route"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_middleware_of_a_mount_or_route_is_asked_about_where_it_stands_before_a_cached_endpoint(
    where: str, *, cached: bool
) -> None:
    """Others, such as those of a mounted dashboard, are skipped by nothing."""

    async def things(request: Request) -> Response:
        return Response(b"")

    if cached:
        things = cache_list("things", parameters=[])(things)
    around, inner = [Middleware(Passes)], FastAPI()
    route = Route("/things", things, middleware=around if where == "route" else None)
    if where == "mounted application":
        inner.add_middleware(Passes)
    inner.router.routes.append(route)
    app = Starlette(
        routes=[Mount("/inner", inner, middleware=around if where == "mount" else None)]
    )
    wrapped = Cache(None, secret=SECRET, resolver=Callers()).wrap(app)
    if cached:
        with pytest.raises(ConfigurationError, match="Passes"):
            turbo.protocol(wrapped)
    turbo.protocol(wrapped, skips=[] if not cached else ["Passes"])


async def test_two_servers_under_two_paths_need_a_protocol_each(valkey_url: str) -> None:
    """What is recognised by its bytes on one of them must not be taken for the same on the
    other."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get())
        one = uvicorn.Config(
            server.wrapped, http=server.uvicorn.config.http, root_path="/api", log_config=None
        )
        with pytest.raises(ConfigurationError, match="root_path '/api'"):
            Closing.connect(one)
        one.root_path = ""
        Closing.connect(one)


class Closing(asyncio.Transport):
    """A transport of nothing."""

    @classmethod
    def connect(cls, config: uvicorn.Config) -> None:
        """Make the protocol of a new connection."""
        if not config.loaded:
            config.load()
        made: Any = config.http_protocol_class
        made(
            config=config, server_state=uvicorn.server.ServerState(), app_state={}
        ).connection_made(cls())

    def close(self) -> None:
        """Do nothing."""


def test_it_does_not_start_where_nothing_could_be_recognised() -> None:
    """A resolver that does not say which headers it reads."""

    class Silent(Callers):
        headers = None  # type: ignore[assignment]

    with pytest.raises(ConfigurationError, match="headers"):
        turbo.protocol(Cache(None, secret=SECRET, resolver=Silent()).wrap(FastAPI()))


async def test_what_is_forgotten_is_not_recognised_here_either(valkey_url: str) -> None:
    """Credentials that are revoked by other means than a table: another spelling may hold the
    answer in memory again."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get("/rows?page=1"))
        server.cache.forget()
        await warm(wire, get("/rows?page=1&other=spelling"))
        resolver: Any = server.cache.resolver
        resolver.claim = lambda head: (_ for _ in ()).throw(Denied("revoked"))
        assert "detail=denied" in (await wire.ask(get("/rows?page=1")))[1]["cache-status"]


async def test_a_hit_before_it_ends_no_request_of_the_same_packet(valkey_url: str) -> None:
    """The time that a connection may idle is not counted while the application works."""
    async with serving(valkey_url, timeout_keep_alive=1) as server, Wire(server.port) as wire:
        await warm(wire, get("/kept"))
        wire.send(get("/kept"), get("/slow"))
        assert "hit" in (await wire.answer())[1]["cache-status"]
        assert (await wire.answer())[2] == b"slow"


@pytest.mark.parametrize(
    "switch", [{}, {"tenant_id": "t"}, {"module": "rows"}], ids=["everything", "tenant", "module"]
)
async def test_what_is_switched_off_takes_the_usual_way_and_bypasses(
    valkey_url: str, switch: dict[str, str]
) -> None:
    """Also what is kept until its time to live, for which nobody is asked; and it is answered here
    again when it is on."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        requests = get(), get("/kept")
        await warm(wire, *requests)
        assert await server.cache.disable(**switch)
        for request in requests:
            assert "detail=off" in (await wire.ask(request))[1]["cache-status"]
        assert await server.cache.enable(**switch)
        server.calls.clear()
        for request in requests:
            assert "; hit" in (await wire.ask(request))[1]["cache-status"]
        assert server.calls == []


@pytest.mark.parametrize("name", ["*", "tenant:t", "module:rows"])
async def test_a_switch_counts_for_who_waits_for_a_view(valkey_url: str, name: str) -> None:
    """Off means off, also a moment before the answer."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get())
        view = server.cache.store.view

        def off(*arguments: Any) -> None:
            # private: the switch must turn while the view is read
            server.cache.runtime.switches._apply(frozenset({name}))
            view(*arguments)

        server.cache.store.view = off
        assert "detail=off" in (await wire.ask(get()))[1]["cache-status"]


# -- requests that are known by their bytes --------------------------------------------------------


async def packets(wire: Wire, *parts: bytes) -> None:
    """Send each for the server to read by itself."""
    for part in parts:
        wire.send(part)
        for _ in range(4):  # turns of the loop that both run in
            await asyncio.sleep(0)


def only(server: Server) -> Any:
    """Return the server's end of the one connection there is."""
    (protocol,) = server.uvicorn.server_state.connections
    return protocol


async def test_a_request_cut_anywhere_is_one_request(valkey_url: str) -> None:
    """Whatever comes first of it, the rest is not taken for a request, even when it was seen
    before."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        request = get("/kept")
        await warm(wire, request)
        for cut in range(1, len(request)):
            await packets(wire, request[:cut], request[cut:])
            assert (await wire.answer())[2] == ROWS
        for rest in (request[1:], request[10:], request[-2:] + request):
            async with Wire(server.port) as other:
                await packets(other, rest)
                status, _, body = await other.answer()
                assert (status, body == ROWS) in (
                    (404, False),
                    (405, False),
                    (400, False),
                    (200, True),
                )
                assert (status == 200) == rest.endswith(request)
        for rest in (request[1:], request[10:], b"xy" + request):
            assert rest not in only_class(server).by_bytes


def only_class(server: Server) -> Any:
    """Return the protocol class of a server."""
    return server.uvicorn.config.http_protocol_class


async def test_requests_in_one_packet_are_as_many_every_time(valkey_url: str) -> None:
    """The packet was seen before, and the plan of its last request was found: it is still not that
    one request."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        one, other = get("/kept"), get("/kept", user="bob")
        await warm(wire, one, other)
        for _ in range(4):
            wire.send(one, other)
            assert [(await wire.answer())[2] == ROWS for _ in range(2)] == [True, True]
            await packets(wire, one + other[:20], other[20:])
            assert [(await wire.answer())[2] == ROWS for _ in range(2)] == [True, True]
            await packets(wire, one[:20], one[20:] + other)
            assert [(await wire.answer())[2] == ROWS for _ in range(2)] == [True, True]
        assert (await wire.ask(get("/rows?page=5")))[2].startswith(b"0 5 ")


async def test_a_body_that_reads_like_a_request_is_none(valkey_url: str) -> None:
    """Neither one that the application reads, nor the rest of one that it answered without reading
    it."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        request = get("/kept")
        await warm(wire, request)
        length = {"Content-Length": str(len(request))}
        await packets(wire, get("/echo", method="POST", **length), request)
        assert (await wire.answer())[2] == request
        wire.send(get("/unread", method="POST", **length))
        assert (await wire.answer())[2] == b"not read"
        await packets(wire, request, get("/rows?page=4"))
        assert (await wire.answer())[2].startswith(b"0 4 ")


async def test_a_known_request_waits_for_its_turn(valkey_url: str) -> None:
    """Behind one that the application is at, and behind one that waits for a view."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get("/kept"), get("/rows?page=1"))
        wire.send(get("/gated"))
        while not server.waiting:
            await asyncio.sleep(0)
        await packets(wire, get("/kept"))
        server.gate.set()
        assert [(await wire.answer())[2] for _ in range(2)] == [b"gated", ROWS]
        await packets(wire, get("/rows?page=1"), get("/kept"))
        assert [(await wire.answer())[2][:4] for _ in range(2)] == [b"0 1 ", ROWS[:4]]


async def test_a_plan_that_ends_is_made_anew_also_where_the_bytes_are_known(
    valkey_url: str,
) -> None:
    """A token's end, or a minute: whatever a proof says."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        requests = get(), get("/kept")
        await warm(wire, *requests)
        resolver: Any = server.cache.resolver
        resolver.claim = lambda head: (_ for _ in ()).throw(Denied("ended"))
        assert all(
            ["; hit" in (await wire.ask(request))[1]["cache-status"] for request in requests]
        )
        clock = server.cache.clock
        server.cache.clock = lambda: clock() + MAX_AGE_S
        for request in requests:
            assert "detail=denied" in (await wire.ask(request))[1]["cache-status"]


@pytest.mark.parametrize("seed", range(3))
async def test_any_requests_in_any_packets_are_answered_as_by_uvicorn(
    valkey_url: str, seed: int
) -> None:
    """In their order, each by its own answer: hits, misses, bodies that read like requests, empty
    lines, cut anywhere."""
    rng = random.Random(seed)
    hits = [
        get("/kept"),
        get("/kept", user="bob"),
        get("/rows?page=1"),
        get("/rows?page=2", user="bob"),
    ]
    inner = rng.choice(hits)
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner)
    others = [
        get("/echo", method="POST", **{"Content-Length": str(len(inner))}) + inner,
        get("/echo", method="PUT", **{"Transfer-Encoding": "chunked"}) + chunk,
        get("/kept", **{"Content-Length": str(len(inner))}) + inner,
        get("/kept", **{"Transfer-Encoding": "chunked"}) + chunk,
        get("/kept", **{"X-Other": "header"}),
        get("/kept", user="nobody"),
        b"\r\n" + hits[0],
        get("/kept", method="HEAD"),
        get("/missing"),
    ]
    async with serving(valkey_url) as fast, serving(valkey_url, turbo=False) as plain:
        for server in (fast, plain):
            async with Wire(server.port) as wire:
                await warm(wire, *hits)
        for _ in range(25):
            requests = [
                rng.choice(hits if rng.random() < 0.7 else others)
                for _ in range(rng.randrange(1, 7))
            ]
            stream = b"".join(requests)
            borders = [sum(map(len, requests[:number])) for number in range(1, len(requests))]
            cuts = sorted(
                {
                    *rng.sample(borders, rng.randint(0, len(borders))),
                    *rng.sample(range(1, len(stream)), rng.randint(0, 3)),
                }
            )
            parts = [
                stream[first:last]
                for first, last in zip([0, *cuts], [*cuts, len(stream)], strict=True)
            ]
            answers = []
            for server in (fast, plain):
                async with Wire(server.port) as wire:
                    await packets(wire, *parts)
                    got = [
                        await wire.answer(head_only=request.startswith(b"HEAD"))
                        for request in requests
                    ]
                    answers.append(
                        [(status, unmarked(headers), body) for status, headers, body in got]
                    )
            assert answers[0] == answers[1], parts


def unmarked(headers: dict[str, str]) -> dict[str, str]:
    """Return headers without what differs from one moment to the next."""
    return {
        name: value
        for name, value in headers.items()
        if name not in ("date", "cache-status", "age")
    }


# -- connections that idle -------------------------------------------------------------------------


async def test_hits_keep_a_connection_open_and_nothing_else_does(valkey_url: str) -> None:
    """The timer goes off for the first of them, and is set again for the last."""
    async with serving(valkey_url) as server, Wire(server.port) as wire:
        await warm(wire, get("/kept"))
        protocol = only(server)
        timer = protocol.timeout_keep_alive_task
        await wire.ask(get("/kept"))
        assert protocol.timeout_keep_alive_task is timer
        protocol.timeout_keep_alive_handler()
        assert protocol.timeout_keep_alive_task is not timer
        assert (
            protocol.timeout_keep_alive_task.when()
            <= protocol.idle_since + protocol.timeout_keep_alive + 0.001
        )
        assert "; hit" in (await wire.ask(get("/kept")))[1]["cache-status"]
        protocol.idle_since -= protocol.timeout_keep_alive
        protocol.timeout_keep_alive_handler()
        assert await wire.reader.read() == b""
        timer.cancel()


async def test_an_idle_connection_is_closed_after_its_last_hit(valkey_url: str) -> None:
    """By its own timer."""
    async with serving(valkey_url, timeout_keep_alive=1) as server, Wire(server.port) as wire:
        await warm(wire, get("/kept"))
        assert "; hit" in (await wire.ask(get("/kept")))[1]["cache-status"]
        last = asyncio.get_running_loop().time()
        assert await wire.reader.read() == b""
        assert asyncio.get_running_loop().time() - last > 0.9


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_connection_that_waits_for_a_view_is_not_idle(
    valkey_url: str, *, leaves: bool
) -> None:
    """However long it waits; one whose client is gone sets no timer any more."""
    async with serving(valkey_url) as server:
        wire = await Wire(server.port).__aenter__()
        await warm(wire, get())
        protocol, view, held = only(server), server.cache.store.view, []
        server.cache.store.view = lambda *arguments: held.append(arguments)
        wire.send(get())
        while not held:
            await asyncio.sleep(0)
        protocol.idle_since -= protocol.timeout_keep_alive
        if leaves:
            linger = struct.pack("ii", 1, 0)  # a reset, not an orderly end
            wire.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
            wire.writer.transport.abort()
            while server.uvicorn.server_state.connections:
                await asyncio.sleep(0)
        timer = protocol.timeout_keep_alive_task
        protocol.timeout_keep_alive_handler()
        assert (protocol.timeout_keep_alive_task is timer) == leaves
        server.cache.store.view = view
        view(*held[0])
        if not leaves:
            assert "; hit" in (await wire.answer())[1]["cache-status"]
            await wire.__aexit__()
