"""Hits answered below ASGI: a protocol class for uvicorn that sends what is in memory before a
scope is built.

    uvicorn.run(wrapped, http=turbo.protocol(wrapped, skips=["GZipMiddleware"]))

It takes requests that were seen before: a GET without a body, on a kept connection, whose plan the
wrapper remembers (so identity, policy and role were decided by the same code) and whose answer is
held and proven by the same rules as in ``lookup.py``. Everything else goes the usual way,
untouched. While a view is being read the request has its place on the connection, so answers never
overtake each other.

A hit skips whatever stands around the application and in it. For the wrapper that was so before, of
what stands inside it; here it is also so for what stands around it. ``protocol`` therefore refuses
to be made unless every middleware that it finds is named in ``skips``: name those that do nothing
which a hit needs.
"""

import asyncio
import logging
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from respcache.core.errors import ConfigurationError, StoreError
from respcache.core.generations import GenerationView
from respcache.core.serving_lease import ServingLease
from respcache.middleware import CacheMiddleware
from respcache.read.lookup import LookupResult
from respcache.read.memory import MemoryEntry
from respcache.read.plans import (
    PLAN_BYTES,
    PLAN_CACHE_BYTES,
    HitProof,
    Key,
    Plan,
    PlanCache,
    ScopedPlan,
)
from respcache.read.s3fifo import S3Fifo
from respcache.routing.fastapi import before_cached
from respcache.telemetry.stats import SAMPLE_MASK

HARMLESS = frozenset({"uvicorn.middleware.proxy_headers.ProxyHeadersMiddleware"})
"""What uvicorn itself puts around an application: it changes who the client is, at which no plan
may look."""

WITH_A_BODY = frozenset({b"content-length", b"transfer-encoding", b"expect"})
log = logging.getLogger("respcache")

KEY_BYTES = PLAN_BYTES
"""What remembering a request takes besides the bytes that it is recognised by: its plan may have
left the memo."""

Headers = list[tuple[bytes, bytes]]


def protocol(app: Any, *, skips: Collection[str] = ()) -> type[HttpToolsProtocol]:
    """Make the protocol class for an application, to be given to uvicorn as ``http``.

    ``skips`` names the classes of all middlewares around the wrapper and in the wrapped application
    (``GZipMiddleware``, or in full ``package.module.GZipMiddleware``): each is declared to do
    nothing that a hit needs. Raises ``ConfigurationError`` for one that is not named, for an
    application that is not wrapped, and for a resolver that does not say which headers it reads.
    """
    middleware = _wrapper_of(app, frozenset(skips))
    if getattr(middleware.cache.resolver, "headers", None) is None:
        raise ConfigurationError(
            f"{type(middleware.cache.resolver).__name__} has no attribute 'headers': without it no "
            f"request is recognised"
        )
    own = {"wrapper": middleware, "skips": frozenset(skips), "checked": set()}
    return type(
        "TurboProtocol",
        (TurboProtocol,),
        {**own, "known": S3Fifo(PLAN_CACHE_BYTES), "recognised": S3Fifo(PLAN_CACHE_BYTES)},
    )


class _Never:
    """The event that the base class sets for whoever reads a body: here, nobody does."""

    def set(self) -> None:
        """Do nothing."""


class _Request:
    """A request that is answered here, or waits for that: what the base class looks at of a cycle,
    and how it came.

    ``data``: its bytes, where the parser has not seen them.
    """

    __slots__ = (
        "began",
        "body",
        "data",
        "disconnected",
        "headers",
        "keep_alive",
        "more_body",
        "response_complete",
        "url",
    )
    message_event = _Never()

    def __init__(
        self,
        began: float,
        *,
        url: bytes = b"",
        headers: Headers | None = None,
        data: bytes | None = None,
    ) -> None:
        self.began = began
        self.data = data
        self.url = url
        self.headers = headers or []
        self.body = bytearray()
        self.more_body = data is None
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False


class TurboProtocol(HttpToolsProtocol):
    """One connection.

    ``known``: the plans of requests by their bytes as they came. ``recognised``: the same by what
    the parser made of them, for those that differ in what no plan depends on.
    """

    middleware: CacheMiddleware
    skips: frozenset[str]
    known: S3Fifo[bytes, Plan]
    recognised: S3Fifo[Key, Plan]
    checked: set[tuple[int, str]]
    """What uvicorn was seen to serve: whether it is the one application that this was made for,
    under one path."""

    _between = True
    """Whether the parser stands between two requests."""
    _begun = 0
    """Requests that began in the data of the present call."""
    _found: Plan | None = None
    """The plan that was found for the last of them."""
    _idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Look at what uvicorn really serves, once (asyncio.Protocol)."""
        served = id(self.app), self.root_path
        if served not in self.checked:
            try:
                self._check_served()
            except ConfigurationError:
                transport.close()
                raise
            self.checked.add(served)
        super().connection_made(transport)

    def _check_served(self) -> None:
        if _wrapper_of(self.app, self.skips | HARMLESS) is not self.middleware:
            raise ConfigurationError(
                "uvicorn serves another application than the one that turbo.protocol was given"
            )
        if any(path != self.root_path for _, path in self.checked):
            raise ConfigurationError(
                f"another server has root_path {self.root_path!r}: give it a turbo.protocol of "
                f"its own"
            )

    def data_received(self, data: bytes) -> None:
        """Answer a request whose bytes are known, else have them parsed (asyncio.Protocol).

        Bytes that were one whole request when they came between two others are the same request
        whenever they do so again.
        """
        plan = self.known.get(data)
        if plan is not None and self._between and not self._busy():
            cache, plan_cache = self.middleware.cache, self.middleware.plan_cache
            now = cache.clock()
            if (
                plan_cache is not None
                and now < plan.expires_at
                and plan.version == plan_cache.version
                and self._safely(plan, now, data)
            ):
                return
        between, self._begun, self._found = self._between, 0, None
        super().data_received(data)
        if (
            self._found is not None
            and between
            and self._between
            and self._begun == 1
            and data.endswith(b"\r\n\r\n")
        ):
            self.known.put(data, self._found, size_bytes=len(data) + KEY_BYTES)

    def on_message_begin(self) -> None:
        """Begin a request (httptools). The scope is not built before it is needed."""
        self._between = False
        self._begun += 1
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_message_complete(self) -> None:
        """End a request (httptools)."""
        self._between = True
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        """Answer at once, or wait for a view, or go the usual way (httptools)."""
        now = self.middleware.cache.clock()
        try:
            self._found = plan = self._recognise(now)
        except Exception:
            log.exception("a request could not be recognised")
            plan = None
        if plan is None or not self._safely(plan, now, None):
            self._go_on()

    # -- which requests ----------------------------------------------------------------------------

    def _busy(self) -> bool:
        """Whether nothing may be answered here at present: an answer is under way, or uvicorn wants
        to see every request."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            return True
        return self.access_log or self.limit_concurrency is not None or self.flow.write_paused

    def _recognise(self, now: float) -> Plan | None:
        """Return the plan of this request, if it is one that can be answered here."""
        plan_cache, parser = self.middleware.plan_cache, self.parser
        if plan_cache is None or self._busy():
            return None
        if (
            parser.get_method() != b"GET"
            or parser.get_http_version() != "1.1"
            or not parser.should_keep_alive()
        ):
            return None
        if parser.should_upgrade():
            return None
        wanted, seen = plan_cache.wanted, []
        for pair in self.headers:
            name = pair[0]
            if name in WITH_A_BODY:
                return None
            if name in wanted:
                seen.append(pair)
        key = (self.url, *seen)
        plan = self.recognised.get(key)
        if plan is None or now >= plan.expires_at or plan.version != plan_cache.version:
            return self._recall(plan_cache, key, seen, now)
        return plan

    def _recall(self, plan_cache: PlanCache, key: Key, seen: Headers, now: float) -> Plan | None:
        """Ask the wrapper's memo. Not for the absolute form of an address, nor for what is none at
        all."""
        if not self.url.startswith(b"/"):
            return None
        parsed = httptools.parse_url(self.url)
        path = parsed.path.decode("ascii")
        path = self.root_path + (unquote(path) if "%" in path else path)
        plan = plan_cache.recall((path, parsed.query or b"", self.root_path, *seen), now)
        if plan is not None:
            self.recognised.put(
                key,
                plan,
                size_bytes=len(self.url) + sum(len(value) for _, value in seen) + KEY_BYTES,
            )
        return plan

    # -- proving -----------------------------------------------------------------------------------

    def _safely(self, plan: Plan, now: float, data: bytes | None) -> bool:
        try:
            return self._answer(plan, now, data)
        except StoreError:  # no view is to be had
            return False
        except Exception:
            log.exception("a request could not be answered below ASGI")
            return False

    def _answer(self, plan: Plan, now: float, data: bytes | None) -> bool:
        """Answer, or begin to wait for a view; whether either could be done.

        ``data``: the request, if the parser has not seen it.
        """
        cache, scoped = self.middleware.cache, plan.scoped
        if scoped is None:
            return False
        proof = cache.still_proven(scoped, now)
        if proof is None:
            candidate = cache.candidate(scoped, now)
            if candidate is None:
                return False
            held, lease, view = candidate
            if view is not None:
                proof = cache.prove(plan, scoped, held, lease, view, now)
                if proof is None:
                    return False
        else:
            held, lease, view = (
                proof.held,
                proof.lease,
                proof.view if scoped.max_view_age_s else None,
            )
        request = (
            _Request(now, data=data)
            if data is not None
            else _Request(now, url=self.url, headers=self.headers)
        )
        if view is None:
            cache.wait_for_view(
                scoped, partial(self._complete, request, plan, scoped, proof, held, lease)
            )
            if data is None:
                self._unset_keepalive_if_required()
            self.cycle = request  # type: ignore[assignment]
        else:
            assert proof is not None
            self.cycle = request  # type: ignore[assignment]
            self._send(request, plan, scoped, proof, now)
        return True

    def _complete(
        self,
        request: _Request,
        plan: Plan,
        scoped: ScopedPlan,
        proof: HitProof | None,
        held: MemoryEntry,
        lease: ServingLease | None,
        result: GenerationView | StoreError,
    ) -> None:
        """The view is there, or is not to be had: answer, or go the usual way after all."""
        if request.disconnected:
            return
        try:
            cache = self.middleware.cache
            now = cache.clock()
            if isinstance(result, StoreError) or not cache.serves(scoped):
                proof = None
            elif proof is None or result is not proof.view or now >= proof.until:
                proof = cache.prove(plan, scoped, held, lease, result, now)
            if proof is None or self.flow.write_paused or not request.keep_alive:
                self._go_on_late(request)
            else:
                self._send(request, plan, scoped, proof, now)
        except Exception:
            log.exception("a request could not be answered below ASGI")
            self.transport.close()

    # -- answering ---------------------------------------------------------------------------------

    def _send(
        self, request: _Request, plan: Plan, scoped: ScopedPlan, proof: HitProof, now: float
    ) -> None:
        request.response_complete = True
        held, representation, counters = proof.held, proof.representation, scoped.counters
        body, state = representation.body, self.server_state
        head = representation.head(
            STATUS_LINE[held.entry.status], state.default_headers, int(held.expires_at - now)
        )
        self.transport.writelines((head, body))
        counters.hits = hits = counters.hits + 1
        counters.bytes_served += len(body)
        cache = self.middleware.cache
        if hits & SAMPLE_MASK == counters.phase:
            counters.sample(cache.clock() - request.began, held.entry.fill_ms)
        if cache.verifier is not None and proof.view is not None and cache.verifier.due():
            look = LookupResult(scoped, proof.view, held.entry.certificate, held, outdated=False)
            self.middleware.verifier(plan, look, self._scope(request))
        if self.pipeline or self.flow.read_paused:
            self.on_response_complete()
            return
        state.total_requests += 1
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._arm(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it was idle for so long, else look again later: hits move no
        timer."""
        if self.transport.is_closing():  # a cycle whose client has left is never complete
            return
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if self.cycle is not None and not self.cycle.response_complete:
            self._arm(self.timeout_keep_alive)
        elif left_s > 0:
            self._arm(left_s)
        else:
            super().timeout_keep_alive_handler()

    def _arm(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    # -- the usual way -----------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Let the base class have the request whose head was read just now."""
        self._unset_keepalive_if_required()  # an answer to the same packet may have armed it
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers += headers
        super().on_headers_complete()

    def _go_on_late(self, request: _Request) -> None:
        """Run the application for a request that waited: the parser may be at another one by now,
        or has not seen this one."""
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
        if request.data is not None:
            request.url, request.headers = _parse(request.data)
            request.data = None
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


def _parse(data: bytes) -> tuple[bytes, Headers]:
    """Return URL and headers of one whole request, as the base class collects them."""
    url, headers = bytearray(), Headers()

    class HeadCollector:
        def on_url(self, part: bytes) -> None:
            url.extend(part)

        def on_header(self, name: bytes, value: bytes) -> None:
            headers.append((name.lower(), value))

    httptools.HttpRequestParser(HeadCollector()).feed_data(data)
    return bytes(url), headers


def _wrapper_of(app: Any, skips: frozenset[str]) -> CacheMiddleware:
    """Find the wrapper in a chain of ASGI applications. Raises ``ConfigurationError`` for a layer
    that is not in ``skips``."""
    layer = app
    while not isinstance(layer, CacheMiddleware):
        inner = getattr(layer, "app", None)
        if inner is None:
            raise ConfigurationError(
                f"{type(app).__name__} is not wrapped by a cache: give what Cache.wrap returned"
            )
        _check(type(layer), skips)
        layer = inner
    for middleware in _inside(layer.app):
        _check(middleware, skips)
    return layer


def _inside(app: Any) -> Iterator[type]:
    """Name the middlewares within a wrapped application, and within its mounts and routes that lead
    to a cached endpoint: those of Starlette's lists, and plain ASGI layers."""
    while app is not None:
        yield from (
            getattr(middleware.cls, "__wrapped__", middleware.cls)
            for middleware in getattr(app, "user_middleware", ())
        )
        for mounted in before_cached(getattr(app, "routes", ())):
            yield from _inside(mounted)
        inner = getattr(app, "app", None)
        if inner is not None:
            yield type(app)
        app = inner


def _check(layer: type, skips: frozenset[str]) -> None:
    name = f"{layer.__module__}.{layer.__qualname__}"
    if not skips & {layer.__name__, name}:
        raise ConfigurationError(
            f"a hit would skip {name}: if nothing that it does is needed then, name it in skips"
        )
