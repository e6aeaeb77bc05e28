"""The ASGI middleware: how a request is answered. It is outermost, so a hit runs no other code.

It never reads a request body. A repeated request whose response is in memory is answered from its
cached plan (``read/plans.py``): no routing, no parsing, no verification. Other requests of a cached
route are looked up (``read/lookup.py``): they are hits, are filled (``read/response_fill.py``), or
bypass the cache. Everything else passes through; its response is deferred until its bumps are
settled. Whatever the store does, the application responds.
"""

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from respcache.context import App, AsgiScope, Exchange, Message, Receive, Send, current
from respcache.core import tokens
from respcache.core.decision import Bypass, Miss
from respcache.core.encoding import accepted
from respcache.core.entry import Entry
from respcache.core.errors import AckBarrierOverflow, ConfigurationError, Denied
from respcache.core.generations import GenerationView
from respcache.core.identity import RequestHead, Resolver
from respcache.core.keys import SHARED
from respcache.core.policy import Invalidation, canonical
from respcache.read.lookup import LookupResult, result_of
from respcache.read.memory import MemoryEntry, Representation
from respcache.read.plans import Plan, PlanCache, PlanKey, ScopedPlan
from respcache.read.proofs import Proofs
from respcache.read.response_fill import ResponseFill
from respcache.read.responses import (
    DeferredResponse,
    StatusMarker,
    at_head,
    send_stored,
    without_body,
)
from respcache.read.verifier import ServedHit
from respcache.routing.registry import Registry
from respcache.routing.table import Route, RouteTable
from respcache.runtime import Options, Runtime
from respcache.telemetry.findings import Findings
from respcache.telemetry.stats import Counters
from respcache.telemetry.tracing import Tracing
from respcache.writes.hooks import WriteHooks

READS = ("GET", "HEAD")

log = logging.getLogger("respcache")


class WrappingCache(Protocol):
    """What the middleware needs of ``respcache.Cache``."""

    runtime: Runtime | None
    options: Options
    registry: Registry
    resolver: Resolver
    writes: WriteHooks
    counters: Counters
    findings: Findings
    tracing: Tracing
    clock: Callable[[], float]

    async def connect(self) -> None:
        """Connect to the store."""
        ...

    async def close(self) -> None:
        """Disconnect from it."""
        ...


class CacheMiddleware:
    """Answers from the cache where that is allowed, else runs the application. Made by
    ``Cache.wrap``."""

    def __init__(self, cache: WrappingCache, app: App, describe: Callable[[], list[Route]]) -> None:
        self.app = app
        self.cache = cache
        self.plan_cache: PlanCache | None = None
        """None before start-up, without a store, and if the resolver names no headers."""
        self._proofs: Proofs | None = None
        self._describe = describe
        self._table: RouteTable | None = None

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Handle one connection of the server (ASGI 3.0)."""
        if scope["type"] != "http":
            await self._pass_connection(scope, receive, send)
            return
        table = self._table
        if table is None:  # a server without lifespan events
            table = self.prepare()
            await self.cache.connect()
        key = plan = token = None
        plan_cache, proofs = self.plan_cache, self._proofs
        if plan_cache is not None and proofs is not None and scope["method"] in READS:
            began = self.cache.clock()
            key = plan_cache.key(scope)
            plan = plan_cache.get(key, began)
            if plan is None:  # plans are stored without tokens
                token = tokens.client_token(scope["headers"])
                if token is not None:
                    key = plan_cache.without_token(key)
                    plan = plan_cache.get(key, began)
            if plan is not None and plan.scoped is not None:
                scoped = proofs.require_token(plan.scoped, token, began)
                proof = proofs.recall(scoped, began) or await proofs.hit(scoped, began)
                if proof is not None:
                    await self._send_hit(
                        scope,
                        send,
                        scoped,
                        memory_entry=proof.memory_entry,
                        representation=proof.representation,
                        began=began,
                    )
                    if self.verification_due(proof.view):
                        self.verify(plan, result_of(scoped, proof), scope)
                    return
        else:
            token = tokens.client_token(scope["headers"])
        exchange = Exchange(scope, receive, send, request=scope, client_token=token)
        context = current.set(exchange)
        try:
            if plan is not None:
                await self._read(exchange, plan, None)
            else:
                await self._route(exchange, key, table)
        finally:
            current.reset(context)

    def prepare(self) -> RouteTable:
        """Return the table of the application's routes; build it at the first call.

        Raises ``ConfigurationError`` for a route that cannot be cached as declared.
        """
        if self._table is None:
            routes = self._describe()
            self.cache.registry.register(routes)
            self._table = RouteTable(routes, root_path=getattr(self.app, "root_path", ""))
            runtime = self.cache.runtime
            if runtime is not None:
                runtime.report_uncovered()
                self._proofs = runtime.proofs
                self.plan_cache = runtime.add_plan_cache(routes)
        return self._table

    def verification_due(self, view: GenerationView | None) -> bool:
        """Count a hit for the verifier. Return whether it must be verified.

        A hit without a view proves nothing and is never verified.
        """
        runtime = self.cache.runtime
        verifier = None if runtime is None else runtime.verifier
        return verifier is not None and view is not None and verifier.due()

    def verify(self, plan: Plan, result: LookupResult, asgi_scope: AsgiScope) -> None:
        """Verify a hit in the background."""
        runtime = self.cache.runtime
        if runtime is None or runtime.verifier is None:
            return
        request = self._as_get(plan, asgi_scope)
        head = self._resolver_head(request, plan.path)
        runtime.verifier.begin(ServedHit(self.app, request, head, plan, result))

    async def _pass_connection(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Pass on a websocket, or the application's lifespan.

        The cache connects before the application starts, checks its routes when it has started,
        and closes when it has shut down.
        """
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return

        async def watch(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    self.prepare()
                except ConfigurationError as error:
                    text = f"respcache: {error}"
                    message = {"type": "lifespan.startup.failed", "message": text}
            elif message["type"].startswith("lifespan.shutdown"):
                await self.cache.close()  # first, because the server then ends this task
            await send(message)

        await self.cache.connect()
        await self.app(scope, receive, watch)

    async def _route(self, exchange: Exchange, key: PlanKey | None, table: RouteTable) -> None:
        """Answer a request without a plan: make one for a cached route, else run the handler."""
        scope = exchange.asgi_scope
        found = table.match(scope)
        route, path = found if found is not None else (None, None)
        if route is None or route.policy is None or scope["method"] not in READS:
            before = None
            if route is not None and route.invalidation is not None:
                head = RequestHead(scope, path)
                before = self._declared_bump(route.invalidation, head, exchange)
            deferred = DeferredResponse(exchange, before)
            await self._run_application(exchange, deferred, deferred)
            return
        assert path is not None
        head = RequestHead(scope, path)
        plan = Plan(
            route,
            route.policy,
            path,
            form=canonical(head, path, declared=route.parameters, passed=route.passed),
            coding=accepted(head.joined("accept-encoding")),
            version=0 if self.plan_cache is None else self.plan_cache.version,
        )
        await self._read(exchange, plan, key)

    async def _read(self, exchange: Exchange, plan: Plan, key: PlanKey | None) -> None:
        """Look up the response to a request of a cached route. ``key`` is for a new plan."""
        cache, began, scope = self.cache, self.cache.clock(), exchange.asgi_scope
        if scope["method"] == "HEAD":
            exchange.send = without_body(exchange.send)
        exchange.asgi_scope = self._as_get(plan, scope)
        runtime, head = cache.runtime, self._resolver_head(scope, plan.path)
        found: LookupResult | Bypass = Bypass("no-store")
        if runtime is not None:
            found = await runtime.lookup.fetch(plan, head, exchange.client_token)
        if key is not None and plan.scoped is not None and self.plan_cache is not None:
            self.plan_cache.put(key, plan)
        if isinstance(found, Bypass):
            counters = cache.counters.at(found.tenant, plan.policy.module, plan.route.template)
            counters.bypass(found.reason)
            await self._pass(exchange, "fwd=bypass", f"detail={found.reason}")
            return
        scoped, memory_entry = found.scoped, found.memory_entry
        assert runtime is not None
        if memory_entry is not None:
            representation = runtime.near.represent(
                scoped.cache_key.entry_key,
                memory_entry,
                plan.coding,
                max_bytes=plan.policy.max_body_bytes,
            )
            if representation is not None:
                await self._send_hit(
                    exchange.asgi_scope,
                    exchange.send,
                    scoped,
                    memory_entry=memory_entry,
                    representation=representation,
                    began=began,
                )
                if self.verification_due(found.view):
                    self.verify(plan, found, exchange.asgi_scope)
                return
        await self._miss(exchange, plan, found, began=began)

    async def _send_hit(
        self,
        scope: AsgiScope,
        send: Send,
        scoped: ScopedPlan,
        *,
        memory_entry: MemoryEntry,
        representation: Representation,
        began: float,
    ) -> None:
        """Count and send a hit. ``began`` is when its request arrived."""
        now, counters = self.cache.clock(), scoped.counters
        entry, body = memory_entry.entry, representation.body
        if counters.hit(len(body)):
            counters.sample(now - began, entry.fill_ms)
        if log.isEnabledFor(logging.DEBUG):
            module, kind = scoped.policy.module, scoped.policy.kind
            log.debug("[Cache] Hit: %s %s for tenant %s", module, kind, scoped.tenant)
        # a copy, because outer middleware may append headers
        headers = representation.headers(int(memory_entry.expires_at - now)).copy()
        await send({"type": "http.response.start", "status": entry.status, "headers": headers})
        body = body if scope["method"] == "GET" else b""
        await send({"type": "http.response.body", "body": body})

    async def _miss(
        self, exchange: Exchange, plan: Plan, result: LookupResult, *, began: float
    ) -> None:
        """Answer a miss: by another caller's fill, by a fill, or by the handler alone."""
        cache, runtime, scoped = self.cache, self.cache.runtime, result.scoped
        assert runtime is not None
        counters, clock, template = scoped.counters, cache.clock, plan.route.template
        assert result.view is not None
        counters.misses += 1
        exchange.send = at_head(
            exchange.send, lambda: counters.times.misses.observe(clock() - began)
        )
        exchange.scope = result.scope
        log.debug("[CacheManager] Cache miss: %s", scoped.cache_key.entry_key)
        # a hit here means that the stored bytes are damaged
        outdated = isinstance(result.decision, Miss) and result.decision.outdated
        forward = "fwd=stale" if outdated else "fwd=uri-miss"
        fill = await runtime.filler.begin_or_join(
            scoped.cache_key, view=result.view, certificate=result.certificate
        )
        if isinstance(fill, Entry):
            shared = MemoryEntry(fill, expires_at=0.0).represent(
                plan.coding, max_bytes=plan.policy.max_body_bytes
            )
            if shared is not None:
                counters.collapsed += 1
                counters.bytes_served += len(shared.body)
                await send_stored(
                    exchange.send, fill.status, shared.stored, body=shared.body, forward=forward
                )
                return
            fill = None
        if fill is None:
            counters.refuse("not-shareable")
            await self._pass(exchange, forward, "detail=not-shareable")
            return
        tracing = cache.tracing.fill(
            tenant=scoped.tenant, module=plan.policy.module, route=template
        )
        with tracing as trace:
            response_fill = ResponseFill(
                exchange=exchange,
                route=plan.route,
                result=result,
                fill=fill,
                forward=forward,
                findings=cache.findings,
                clock=clock,
                trace=trace,
                strict_reads=cache.options.strict_reads,
            )
            try:
                await response_fill.run(self._run_application)
            finally:
                if exchange.wrote and runtime.verifier is not None:
                    runtime.verifier.exclude(template)

    async def _pass(self, exchange: Exchange, *status: str) -> None:
        """Run the application without storing its response, which is marked with this status."""
        deferred = DeferredResponse(exchange)
        await self._run_application(exchange, deferred, StatusMarker(deferred, *status))

    async def _run_application(
        self, exchange: Exchange, deferred: DeferredResponse, send: Send
    ) -> None:
        """Run the application. ``send`` passes messages on to the deferred response."""
        try:
            await self.app(exchange.asgi_scope, exchange.receive, send)
        except AckBarrierOverflow as error:
            log.error("%s", error)
            message = json.dumps({"status": "error", "message": str(error)})
            await deferred.send_error(message.encode())
        except Exception:
            await deferred.release()
            raise
        else:
            await deferred.release()

    def _declared_bump(
        self, invalidation: Invalidation, head: RequestHead, exchange: Exchange
    ) -> Callable[[], Awaitable[None]]:
        """Return the step that bumps the modules declared by ``invalidate_cache``."""

        async def bump() -> None:
            resolver, scope, tenants = self.cache.resolver, exchange.scope, set[str | None]()
            try:
                if scope is None:
                    claim = resolver.claim(head)
                    if claim.owner_tenant != SHARED:
                        # the handler may have removed the caller's rights, or moved the caller
                        tenants.add(claim.owner_tenant)
                    scope = await resolver.scope(claim)
                tenants.add(scope.tenant)
            except Denied:
                pass
            for tenant in tenants:
                if tenant is not None:
                    self.cache.writes.bump_modules(tenant, invalidation.modules)

        return bump

    def _resolver_head(self, scope: AsgiScope, path: Mapping[str, str]) -> RequestHead:
        """Return the part of a request of a cached route that the resolver may read."""
        if self.plan_cache is None:
            return RequestHead(scope, path)
        return self.plan_cache.resolver_head(scope, path)

    def _as_get(self, plan: Plan, scope: AsgiScope) -> AsgiScope:
        """Return the request as the handler gets it: a GET with the canonical query string."""
        return {**scope, "method": "GET", "query_string": plan.form.query_string}
