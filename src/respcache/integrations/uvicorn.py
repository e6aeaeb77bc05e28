"""Hits below ASGI: a uvicorn protocol class that sends a hit before an ASGI scope is built.

    uvicorn.run(wrapped, http=protocol(wrapped, skips=["GZipMiddleware"]))

Experimental, because it subclasses internals of uvicorn. It takes repeated requests only: a GET
without a body, on a kept connection, whose plan the middleware has (so identity, policy and role
were decided by the same code), and whose response is a hit from memory by ``read/proofs.py``. Every
other request goes the usual way, unchanged. While a view is being read, the request keeps its place
on the connection, so responses never overtake each other.

A hit bypasses all other middleware. The ASGI middleware does so too for everything inside it; here
the same holds for everything around it. ``protocol`` therefore raises unless every middleware that
it finds is named in ``skips``. Name those that do nothing that a hit needs.
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
from respcache.middleware import CacheMiddleware
from respcache.read.lookup import result_of
from respcache.read.plans import PLAN_BYTES, PLAN_CACHE_BYTES, HitProof, Plan, PlanCache, PlanKey
from respcache.read.proofs import InMemory
from respcache.read.s3fifo import S3Fifo
from respcache.routing.fastapi import before_cached
from respcache.runtime import Runtime

HARMLESS = frozenset({"uvicorn.middleware.proxy_headers.ProxyHeadersMiddleware"})
"""Uvicorn's own middleware: it changes the client's address, which no plan depends on."""

BODY_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"expect"})
log = logging.getLogger("respcache")

KEY_BYTES = PLAN_BYTES
"""The size of a remembered request without its bytes: the plan cache may have dropped its plan."""

Headers = list[tuple[bytes, bytes]]


def protocol(app: Any, *, skips: Collection[str] = ()) -> type[HttpToolsProtocol]:
    """Return a protocol class for this application, for uvicorn's option ``http``.

    ``skips`` names the classes of all middlewares around and inside the wrapped application
    (``GZipMiddleware``, or in full ``package.module.GZipMiddleware``) and declares that a hit needs
    none of them. Raises ``ConfigurationError`` for a middleware that is not named, for an
    application that is not wrapped, and for a resolver that does not name the headers it reads.
    """
    middleware = _middleware_of(app, frozenset(skips))
    resolver = middleware.cache.resolver
    if getattr(resolver, "headers", None) is None:
        raise ConfigurationError(
            f"{type(resolver).__name__} has no attribute 'headers': without it no request can be "
            "recognized"
        )
    own = {"middleware": middleware, "skips": frozenset(skips), "checked": set()}
    caches: dict[str, Any] = {
        "by_bytes": S3Fifo(PLAN_CACHE_BYTES),
        "by_parts": S3Fifo(PLAN_CACHE_BYTES),
    }
    return type("HitProtocol", (_HitProtocol,), {**own, **caches})


class _Ignored:
    """The event that the base class sets when a body arrives. No code waits for it here."""

    def set(self) -> None:
        """Do nothing."""


class _Request:
    """A request that is answered here or waits for it; it stands in for uvicorn's cycle.

    ``data`` holds its bytes if the parser has not seen them.
    """

    __slots__ = (
        "began",
        "body",
        "data",
        "disconnected",
        "headers",
        "keep_alive",
        "more_body",
        "plan",
        "proof",
        "response_complete",
        "scoped",
        "url",
    )
    message_event = _Ignored()

    def __init__(self, plan: Plan, began: float, *, data: bytes | None) -> None:
        self.plan = plan
        self.scoped = plan.scoped  # another request may scope the plan again meanwhile
        self.proof: HitProof | None = None
        self.began = began
        self.data = data
        self.url = b""
        self.headers: Headers = []
        self.body = bytearray()
        self.more_body = data is None
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False


class _HitProtocol(HttpToolsProtocol):
    """One connection.

    ``by_bytes`` finds plans by the bytes of a whole request; ``by_parts`` by its parsed parts, for
    requests that differ in bytes that no plan depends on.
    """

    middleware: CacheMiddleware
    skips: frozenset[str]
    by_bytes: S3Fifo[bytes, Plan]
    by_parts: S3Fifo[PlanKey, Plan]
    checked: set[tuple[int, str]]
    """The applications and root paths that uvicorn was seen to serve with this class."""

    _between = True
    """Whether the parser is between two requests."""
    _begun = 0
    """The number of requests that began in the present call's data."""
    _recognized: Plan | None = None
    """The plan of the last of them."""
    idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Check once what uvicorn serves (asyncio.Protocol)."""
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
        if _middleware_of(self.app, self.skips | HARMLESS) is not self.middleware:
            raise ConfigurationError("uvicorn serves another application than protocol() was given")
        if any(path != self.root_path for _, path in self.checked):
            raise ConfigurationError(
                f"another server has root_path {self.root_path!r}: call protocol() for each"
            )

    def data_received(self, data: bytes) -> None:
        """Answer a request whose bytes are known, else parse them (asyncio.Protocol).

        Bytes that once were a whole request between two others are the same request whenever they
        arrive between two requests again.
        """
        plan = self.by_bytes.get(data)
        if plan is not None and self._between and not self._busy():
            plan_cache, now = self.middleware.plan_cache, self.middleware.cache.clock()
            current = plan_cache is not None and plan.version == plan_cache.version
            if current and now < plan.expires_at and self._try_answer(plan, now, data):
                return
        between, self._begun, self._recognized = self._between, 0, None
        super().data_received(data)
        whole = between and self._between and self._begun == 1 and data.endswith(b"\r\n\r\n")
        if self._recognized is not None and whole:
            self.by_bytes.put(data, self._recognized, size_bytes=len(data) + KEY_BYTES)

    def on_message_begin(self) -> None:
        """Begin a request (httptools). The ASGI scope is built only if it is needed."""
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
            self._recognized = plan = self._recognize(now)
        except Exception:
            log.exception("a request could not be recognized")
            plan = None
        if plan is None or not self._try_answer(plan, now, None):
            self._continue()

    # -- recognizing -------------------------------------------------------------------------------

    def _busy(self) -> bool:
        """Whether no request may be answered here now: a response is in progress, or uvicorn must
        see every request."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            return True
        return self.access_log or self.limit_concurrency is not None or self.flow.write_paused

    def _recognize(self, now: float) -> Plan | None:
        """Return the plan of the parsed request if it may be answered here."""
        plan_cache, parser = self.middleware.plan_cache, self.parser
        if plan_cache is None or self._busy():
            return None
        if parser.get_method() != b"GET" or parser.get_http_version() != "1.1":
            return None
        if not parser.should_keep_alive() or parser.should_upgrade():
            return None
        headers, seen = plan_cache.headers, []
        for pair in self.headers:
            name = pair[0]
            if name in BODY_HEADERS:
                return None
            if name in headers:
                seen.append(pair)
        key = (self.url, *seen)
        plan = self.by_parts.get(key)
        if plan is not None and now < plan.expires_at and plan.version == plan_cache.version:
            return plan
        plan = self._find_plan(plan_cache, seen, now)
        if plan is not None:
            size_bytes = len(self.url) + sum(len(value) for _, value in seen) + KEY_BYTES
            self.by_parts.put(key, plan, size_bytes=size_bytes)
        return plan

    def _find_plan(self, plan_cache: PlanCache, seen: Headers, now: float) -> Plan | None:
        """Return the middleware's plan. None for an absolute or an invalid request target."""
        if not self.url.startswith(b"/"):
            return None
        parsed = httptools.parse_url(self.url)
        path = parsed.path.decode("ascii")
        path = self.root_path + (unquote(path) if "%" in path else path)
        return plan_cache.get((path, parsed.query or b"", self.root_path, *seen), now)

    # -- deciding ----------------------------------------------------------------------------------

    def _try_answer(self, plan: Plan, now: float, data: bytes | None) -> bool:
        """Answer, or begin to wait for a view. Return False if neither is possible.

        ``data`` is the request if the parser has not seen it.
        """
        runtime = self.middleware.cache.runtime
        try:
            return runtime is not None and self._answer(runtime, _Request(plan, now, data=data))
        except StoreError:  # no view can be read
            return False
        except Exception:
            log.exception("a request could not be answered below ASGI")
            return False

    def _answer(self, runtime: Runtime, request: _Request) -> bool:
        scoped, now, proofs = request.scoped, request.began, runtime.proofs
        if scoped is None:
            return False
        proof = request.proof = proofs.still_proven(scoped, now)
        if proof is not None:
            if scoped.max_view_age_s:
                proof.count_use()
                self._begin(request)
                self._send(request, proof, now)
                return True
            found = InMemory(proof.memory_entry, proof.lease, None)
        else:
            candidate = proofs.candidate(scoped, now)
            if candidate is None:
                return False
            found = candidate
            if found.view is not None:
                proof = proofs.prove(scoped, found, view=found.view, now=now)
                if proof is None:
                    return False
                self._begin(request)
                self._send(request, proof, now)
                return True
        runtime.views.wait(
            scoped.cache_key.generation_key,
            scoped.tags,
            partial(self._on_view, request, found),
        )
        self._begin(request)
        if request.data is None:
            self._unset_keepalive_if_required()
        return True

    def _begin(self, request: _Request) -> None:
        """Let the request take its place on the connection."""
        if request.data is None:
            request.url, request.headers = self.url, self.headers
        self.cycle = request  # type: ignore[assignment]

    def _on_view(
        self, request: _Request, found: InMemory, result: GenerationView | StoreError
    ) -> None:
        """Receive the view: answer, or go the usual way after all."""
        if request.disconnected:
            return
        try:
            cache, scoped = self.middleware.cache, request.scoped
            now, runtime = cache.clock(), cache.runtime
            assert scoped is not None
            assert runtime is not None
            proof = None
            if not isinstance(result, StoreError):
                proof = runtime.proofs.confirm(scoped, request.proof, found, view=result, now=now)
            if proof is None or self.flow.write_paused or not request.keep_alive:
                self._continue_late(request)
            else:
                self._send(request, proof, now)
        except Exception:
            log.exception("a request could not be answered below ASGI")
            self.transport.close()

    # -- responding --------------------------------------------------------------------------------

    def _send(self, request: _Request, proof: HitProof, now: float) -> None:
        """Send and count a hit."""
        request.response_complete = True
        memory_entry, state = proof.memory_entry, self.server_state
        scoped, body = request.scoped, proof.representation.body
        assert scoped is not None
        head = proof.representation.head(
            STATUS_LINE[memory_entry.entry.status],
            state.default_headers,
            ttl_s=int(memory_entry.expires_at - now),
        )
        self.transport.writelines((head, body))
        if scoped.counters.hit(len(body)):
            elapsed_s = self.middleware.cache.clock() - request.began
            scoped.counters.sample(elapsed_s, memory_entry.entry.fill_ms)
        if self.middleware.verification_due(proof.view):
            result = result_of(scoped, proof)
            self.middleware.verify(request.plan, result, self._asgi_scope(request))
        if self.pipeline or self.flow.read_paused:
            self.on_response_complete()
            return
        state.total_requests += 1
        self.idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._arm(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it was idle long enough, else check again later.

        So a hit moves no timer.
        """
        if self.transport.is_closing():  # the cycle of a client that left never completes
            return
        left_s = self.idle_since + self.timeout_keep_alive - self.loop.time()
        if self.cycle is not None and not self.cycle.response_complete:
            self._arm(self.timeout_keep_alive)
        elif left_s > 0:
            self._arm(left_s)
        else:
            super().timeout_keep_alive_handler()

    def _arm(self, seconds: float) -> None:
        handler = self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(seconds, handler)

    # -- the usual way -----------------------------------------------------------------------------

    def _continue(self) -> None:
        """Let the base class handle the request whose head was just parsed."""
        # the response to an earlier request of the same packet may have armed it
        self._unset_keepalive_if_required()
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers += headers
        super().on_headers_complete()

    def _continue_late(self, request: _Request) -> None:
        """Run the application for a request that has waited.

        The parser may be at a later request by now, or may not have seen this one.
        """
        cycle = RequestResponseCycle(
            scope=self._asgi_scope(request),
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

    def _asgi_scope(self, request: _Request) -> Any:
        """Build the ASGI scope that the base class would have built."""
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


class _HeadCollector:
    """Collects URL and headers of one request (the callbacks of httptools)."""

    def __init__(self) -> None:
        self.url = bytearray()
        self.headers = Headers()

    def on_url(self, part: bytes) -> None:
        self.url.extend(part)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


def _parse(data: bytes) -> tuple[bytes, Headers]:
    """Return URL and headers of one whole request, as the base class collects them."""
    collector = _HeadCollector()
    httptools.HttpRequestParser(collector).feed_data(data)
    return bytes(collector.url), collector.headers


def _middleware_of(app: Any, skips: frozenset[str]) -> CacheMiddleware:
    """Find the cache middleware in a chain of ASGI applications.

    Raises ``ConfigurationError`` for a layer that is not in ``skips``.
    """
    layer = app
    while not isinstance(layer, CacheMiddleware):
        inner = getattr(layer, "app", None)
        if inner is None:
            raise ConfigurationError(
                f"{type(app).__name__} is not wrapped by a cache: pass the result of Cache.wrap"
            )
        _check(type(layer), skips)
        layer = inner
    for inside in _inside(layer.app):
        _check(inside, skips)
    return layer


def _inside(app: Any) -> Iterator[type]:
    """Yield the middlewares inside a wrapped application.

    They are those of Starlette's lists and plain ASGI layers, also within mounts and routes that
    lead to a cached endpoint.
    """
    while app is not None:
        for middleware in getattr(app, "user_middleware", ()):
            yield getattr(middleware.cls, "__wrapped__", middleware.cls)
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
            f"cache hits bypass {name}; if that is safe, add it to skips (skips=[{name!r}])"
        )
