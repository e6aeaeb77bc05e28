"""Hits answered below ASGI: a protocol class for uvicorn that sends what is in memory before a scope is built.

    uvicorn.run(wrapped, http=turbo.protocol(wrapped, skips=["GZipMiddleware"]))

It takes requests that were seen before: a GET without a body, on a kept connection, whose plan the wrapper remembers (so
identity, policy and role were decided by the same code) and whose answer is held and proven by the same rules as in
``lookup.py``. Everything else goes the usual way, untouched. While a view is being read the request has its place on the
connection, so answers never overtake each other.

A hit skips whatever stands around the application and in it. For the wrapper that was so before, of what stands inside it;
here it is also so for what stands around it. ``protocol`` therefore refuses to be made unless every middleware that it finds
is named in ``skips``: name those that do nothing which a hit needs.
"""

import asyncio
import logging
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from respcache.asgi import Wrapper
from respcache.core.errors import ConfigurationError, StoreUnavailable
from respcache.core.generations import Generation
from respcache.lookup import Candidate, Look
from respcache.near.held import Held, Variant
from respcache.near.s3fifo import S3Fifo
from respcache.ops.stats import SAMPLE_MASK
from respcache.plans import MEMO_BYTES, Aim, Key, Memo, Plan

HARMLESS = frozenset({"uvicorn.middleware.proxy_headers.ProxyHeadersMiddleware"})
"""What uvicorn itself puts around an application: it changes who the client is, at which no plan may look."""

WITH_A_BODY = frozenset({b"content-length", b"transfer-encoding", b"expect"})
log = logging.getLogger("respcache")

KEY_BYTES = 512
"""What remembering a request takes besides the bytes that it is recognised by, roughly."""

Headers = list[tuple[bytes, bytes]]


def protocol(app: Any, *, skips: Collection[str] = ()) -> type[HttpToolsProtocol]:
    """Make the protocol class for an application, to be given to uvicorn as ``http``.

    ``skips`` names the classes of all middlewares around the wrapper and in the wrapped application (``GZipMiddleware``, or in
    full ``package.module.GZipMiddleware``): each is declared to do nothing that a hit needs. Raises ``ConfigurationError`` for
    one that is not named, for an application that is not wrapped, and for a resolver that does not say which headers it reads.
    """
    wrapper = _wrapper_of(app, frozenset(skips))
    if getattr(wrapper.cache.resolver, "headers", None) is None:
        raise ConfigurationError(
            f"{type(wrapper.cache.resolver).__name__} has no attribute 'headers': without it no request is recognised"
        )
    own = {"wrapper": wrapper, "skips": frozenset(skips), "recognised": S3Fifo(MEMO_BYTES), "checked": set()}
    return type("TurboProtocol", (_Turbo,), own)


class _Never:
    """The event that the base class sets for whoever reads a body: here, nobody does."""

    def set(self) -> None:
        """Do nothing."""


class _Request:
    """A request that is answered here, or waits for that: what the base class looks at of a cycle, and how it came."""

    __slots__ = ("began", "body", "disconnected", "headers", "keep_alive", "more_body", "response_complete", "url")
    message_event = _Never()

    def __init__(self, url: bytes, headers: Headers, began: float) -> None:
        self.began = began
        self.url = url
        self.headers = headers
        self.body = bytearray()
        self.more_body = True
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False


class _Turbo(HttpToolsProtocol):
    """One connection. ``recognised``: the plans of requests by their bytes on the wire."""

    wrapper: Wrapper
    skips: frozenset[str]
    recognised: S3Fifo[Key, Plan]
    checked: set[int]
    """Applications that uvicorn was seen to serve: whether they are the one that this was made for, checked once each."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Look at what uvicorn really serves, once (asyncio.Protocol)."""
        if id(self.app) not in self.checked:
            try:
                if _wrapper_of(self.app, self.skips | HARMLESS) is not self.wrapper:
                    raise ConfigurationError("uvicorn serves another application than the one that turbo.protocol was given")
            except ConfigurationError:
                transport.close()
                raise
            self.checked.add(id(self.app))
        super().connection_made(transport)

    def on_message_begin(self) -> None:
        """Begin a request (httptools). The scope is not built before it is needed."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        """Answer at once, or wait for a view, or go the usual way (httptools)."""
        try:
            answered = self._answer()
        except Exception:
            log.exception("a request could not be answered below ASGI")
            answered = False
        if not answered:
            self._go_on()

    def _answer(self) -> bool:
        """Answer, or begin to wait for a view; whether either could be done."""
        now = self.wrapper.cache.clock()
        plan = self._recognise(now)
        aim = None if plan is None else plan.aim
        candidate = None if aim is None else self.wrapper.cache.candidate(aim, now)
        if plan is None or aim is None or candidate is None:
            return False
        view = candidate[2]
        if view is None:
            return self._wait(plan, aim, candidate, now)
        variant = self._form(plan, aim, candidate, view, now)
        if variant is None:
            return False
        self.cycle = request = _Request(self.url, self.headers, now)  # type: ignore[assignment]
        self._send(request, plan, aim, candidate[0], variant, now)
        return True

    # -- which requests ------------------------------------------------------------------------------------------------

    def _recognise(self, now: float) -> Plan | None:
        """Return the plan of this request, if it is one that can be answered here."""
        memo, busy = self.wrapper.memo, self.cycle is not None and not self.cycle.response_complete
        parser = self.parser
        if memo is None or busy or self.access_log or self.limit_concurrency is not None or self.flow.write_paused:
            return None
        if parser.get_method() != b"GET" or parser.get_http_version() != "1.1" or not parser.should_keep_alive():
            return None
        if parser.should_upgrade() or not self.wrapper.cache.enabled:
            return None
        wanted, seen = memo.wanted, []
        for pair in self.headers:
            name = pair[0]
            if name in WITH_A_BODY:
                return None
            if name in wanted:
                seen.append(pair)
        key = (self.url, *seen)
        plan = self.recognised.get(key)
        if plan is None or now >= plan.expires_at or plan.life != memo.life:
            return self._recall(memo, key, seen, now)
        return plan

    def _recall(self, memo: Memo, key: Key, seen: Headers, now: float) -> Plan | None:
        """Ask the wrapper's memo."""
        parsed = httptools.parse_url(self.url)
        path = parsed.path.decode("ascii")
        path = self.root_path + (unquote(path) if "%" in path else path)
        plan = memo.recall((path, parsed.query or b"", self.root_path, *seen), now)
        if plan is not None:
            self.recognised.put(key, plan, size_bytes=len(self.url) + sum(len(value) for _, value in seen) + KEY_BYTES)
        return plan

    # -- waiting for a view --------------------------------------------------------------------------------------------

    def _wait(self, plan: Plan, aim: Aim, candidate: Candidate, now: float) -> bool:
        try:
            reading = self.wrapper.cache.read_view(aim)
        except StoreUnavailable:
            return False
        self._unset_keepalive_if_required()
        self.cycle = request = _Request(self.url, self.headers, now)  # type: ignore[assignment]
        reading.add_done_callback(lambda done: self._land(request, plan, aim, candidate, done))
        return True

    def _land(self, request: _Request, plan: Plan, aim: Aim, candidate: Candidate, done: "asyncio.Future[Generation]") -> None:
        """The view is there, or is not to be had: answer, or go the usual way after all."""
        if request.disconnected:
            done.exception()  # looked at, so that nobody is told that it was not
            return
        try:
            now = self.wrapper.cache.clock()
            view = None if done.exception() is not None or not self.wrapper.cache.serves(aim) else done.result()
            variant = None if view is None else self._form(plan, aim, candidate, view, now)
            if variant is None or self.flow.write_paused or not request.keep_alive:
                self._go_on_late(request)
            else:
                self._send(request, plan, aim, candidate[0], variant, now)
        except Exception:
            log.exception("a request could not be answered below ASGI")
            self.transport.close()

    # -- answering -----------------------------------------------------------------------------------------------------

    def _form(self, plan: Plan, aim: Aim, candidate: Candidate, view: Generation, now: float) -> Variant | None:
        held, fence, _ = candidate
        cache = self.wrapper.cache
        if not cache.proves(aim, held, fence, view, now):
            return None
        return held.variants.get(plan.coding) or cache.variant(aim, held, plan.coding)

    def _send(self, request: _Request, plan: Plan, aim: Aim, held: Held, variant: Variant, now: float) -> None:
        request.response_complete = True
        cache = self.wrapper.cache
        ttl_s = int(held.expires_at - now)
        self.transport.write(variant.head(STATUS_LINE[held.entry.status], self.server_state.default_headers, ttl_s))
        self.transport.write(variant.body)
        figures = aim.figures
        figures.hits = hits = figures.hits + 1
        figures.bytes_served += len(variant.body)
        if hits & SAMPLE_MASK == figures.phase:
            figures.sample(cache.clock() - request.began, held.entry.fill_ms)
        if cache.audit is not None and cache.audit.due() and held.proven is not None:
            look = Look(aim, held.proven, held.entry.certificate, held, outdated=False)
            self.wrapper.audit(plan, look, self._scope(request))
        self.on_response_complete()

    # -- the usual way -------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Let the base class have the request whose head was read just now."""
        self._unset_keepalive_if_required()  # an answer to the same packet may have armed it
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers += headers
        super().on_headers_complete()

    def _go_on_late(self, request: _Request) -> None:
        """Run the application for a request that waited: the parser may be at another one by now."""
        cycle = RequestResponseCycle(
            scope=self._scope(request),
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=request.keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.more_body = request.more_body
        if not request.more_body:
            cycle.message_event.set()
        if self.cycle is request:  # type: ignore[comparison-overlap]
            self.cycle = cycle
        self._start_asgi_task(cycle, self.app)

    def _scope(self, request: _Request) -> Any:
        """Build the scope that the base class would have built."""
        parsed = httptools.parse_url(request.url)
        path = parsed.path.decode("ascii")
        return {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": "GET",
            "root_path": self.root_path,
            "path": self.root_path + (unquote(path) if "%" in path else path),
            "raw_path": self.root_path.encode("ascii") + parsed.path,
            "query_string": parsed.query or b"",
            "headers": request.headers,
            "state": self.app_state.copy(),
        }


def _wrapper_of(app: Any, skips: frozenset[str]) -> Wrapper:
    """Find the wrapper in a chain of ASGI applications. Raises ``ConfigurationError`` for a layer that is not in ``skips``."""
    layer = app
    while not isinstance(layer, Wrapper):
        inner = getattr(layer, "app", None)
        if inner is None:
            raise ConfigurationError(f"{type(app).__name__} is not wrapped by a cache: give what Cache.wrap returned")
        _check(type(layer), skips)
        layer = inner
    for middleware in _inside(layer.app):
        _check(middleware, skips)
    return layer


def _inside(app: Any) -> Iterator[type]:
    """Name the middlewares within a wrapped application: those of Starlette's list, and plain ASGI layers."""
    while app is not None:
        yield from (getattr(middleware.cls, "__wrapped__", middleware.cls) for middleware in getattr(app, "user_middleware", ()))
        inner = getattr(app, "app", None)
        if inner is not None:
            yield type(app)
        app = inner


def _check(layer: type, skips: frozenset[str]) -> None:
    name = f"{layer.__module__}.{layer.__qualname__}"
    if not skips & {layer.__name__, name}:
        raise ConfigurationError(f"a hit would skip {name}: if nothing that it does is needed then, name it in skips")
