"""The ASGI wrapper: the way of a request, top to bottom. Outermost, so that a hit costs no
middleware and no routing.

It never reads a request body. A request whose like was seen before, and whose answer lies in
memory, is answered by the plan that was made then (``plans.py``): no routing, no parsing, no
verification. Else a request of a cached route goes: canonical form, look (identity, key, one round
trip), then hit, or fill (flight, lease, handler). Everything else passes through, with its answer
held until its bumps are settled. Whatever the store does, the application answers.
"""

import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from respcache.context import Exchange, ReadSet, current
from respcache.core import tokens
from respcache.core.encoding import accepted, negotiable, shared
from respcache.core.entry import Entry
from respcache.core.errors import (
    AckBarrierOverflow,
    ConfigurationError,
    Denied,
    StoreError,
    UndeclaredRead,
)
from respcache.core.http_caching import kept
from respcache.core.identity import RequestHead
from respcache.core.keys import SHARED
from respcache.core.policy import Invalidation, Policy, canonical
from respcache.core.tokens import ConsistencyToken
from respcache.read.fills import Fill
from respcache.read.lookup import Bypass, LookupResult
from respcache.read.memory import MemoryEntry, Representation
from respcache.read.plans import HitProof, Key, Plan, PlanCache, ScopedPlan
from respcache.read.responses import (
    Headers,
    HeldResponse,
    Message,
    ResponseRecorder,
    Send,
    StatusMarker,
    at_head,
    send_stored,
    without_body,
)
from respcache.read.verifier import ServedHit
from respcache.routing.table import Route, RouteTable
from respcache.telemetry.stats import SAMPLE_MASK
from respcache.telemetry.tracing import Trace

if TYPE_CHECKING:
    from respcache.cache import Cache

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READS = ("GET", "HEAD")
ACCEPT = b"accept-encoding"

TTL_JITTER = 0.05
"""Entries live up to this share shorter than their policy says, so that those made together do not
end together."""

HIT = "[Cache] Hit: %s %s for tenant %s"
log = logging.getLogger("respcache")


class CacheMiddleware:
    """An ASGI application that answers for another one from the cache where it may."""

    def __init__(self, cache: "Cache", app: App, describe: Callable[[], list[Route]]) -> None:
        self.app = app
        self.cache = cache
        self.plan_cache: PlanCache | None = None
        self._describe = describe
        self._table: RouteTable | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of the server (ASGI 3.0)."""
        plan_cache = self.plan_cache
        if plan_cache is None or scope["type"] != "http" or scope["method"] not in READS:
            await self._serve(scope, None, None, receive, send)
            return
        cache = self.cache
        began = now = cache.clock()
        key = plan_cache.key(scope)
        plan = plan_cache.get(key)
        if plan is not None and now < plan.expires_at:
            scoped = plan.scoped
            if scoped is not None:
                proof = cache.still_proven(scoped, now)
                if proof is None or not scoped.max_view_age_s:
                    proof = await self._prove(plan, scoped, proof, now)
                    now = cache.clock()
                if proof is not None:
                    held, representation, counters = (
                        proof.held,
                        proof.representation,
                        scoped.counters,
                    )
                    body = representation.body
                    counters.hits = hits = counters.hits + 1
                    counters.bytes_served += len(body)
                    if hits & SAMPLE_MASK == counters.phase:
                        counters.sample(cache.clock() - began, held.entry.fill_ms)
                    if proof.logged:
                        log.debug(HIT, scoped.policy.module, scoped.policy.kind, scoped.tenant)
                    # what stands around us may add to it
                    headers = representation.headers(int(held.expires_at - now)).copy()
                    await send(
                        {
                            "type": "http.response.start",
                            "status": held.entry.status,
                            "headers": headers,
                        }
                    )
                    await send(
                        {
                            "type": "http.response.body",
                            "body": body if scope["method"] == "GET" else b"",
                        }
                    )
                    if (
                        cache.verifier is not None
                        and proof.view is not None
                        and cache.verifier.due()
                    ):
                        self.verifier(
                            plan,
                            LookupResult(
                                scoped, proof.view, held.entry.certificate, held, outdated=False
                            ),
                            scope,
                        )
                    return
        else:
            plan = None
        await self._serve(scope, key, plan, receive, send)

    async def _prove(
        self, plan: Plan, scoped: ScopedPlan, proof: HitProof | None, now: float
    ) -> HitProof | None:
        """Prove a hit from memory, if it can be proven (``lookup.py``). At most one round trip, for
        a view.

        ``grant`` is the last proof, which holds if the view that is read now is the one that it was
        made in.
        """
        cache, view = self.cache, None
        if proof is not None:
            held, lease = proof.held, proof.lease
        else:
            candidate = cache.candidate(scoped, now)
            if candidate is None:
                return None
            held, lease, view = candidate
        if view is None:
            try:
                view = await cache.read_view(scoped)
            except StoreError:
                if not cache.needs_no_view(scoped):
                    return None
            now = cache.clock()
            if not cache.serves(scoped):
                return None
            if proof is not None and view is proof.view and now < proof.until:
                return proof
        return cache.prove(plan, scoped, held, lease, view, now)

    async def _hit(self, plan: Plan, sent: ConsistencyToken, scope: Scope, send: Send) -> bool:
        """Answer a request that brings this token from memory, if what is there can be proven."""
        cache, scoped = self.cache, plan.scoped
        if scoped is None:
            return False
        began = now = cache.clock()
        scoped = cache.require_token(scoped, sent, now)
        proof = cache.still_proven(scoped, now)
        if proof is None or not scoped.max_view_age_s:
            proof = await self._prove(plan, scoped, proof, now)
        if proof is None:
            return False
        await self._send_hit(
            proof.held, proof.representation, scoped, cache.clock(), began, scope, send
        )
        if cache.verifier is not None and proof.view is not None and cache.verifier.due():
            self.verifier(
                plan,
                LookupResult(
                    scoped, proof.view, proof.held.entry.certificate, proof.held, outdated=False
                ),
                scope,
            )
        return True

    async def _serve(
        self, scope: Scope, key: Key | None, plan: Plan | None, receive: Receive, send: Send
    ) -> None:
        """Handle what is not answered from memory: the long way of a read, writes, and whatever is
        none of ours."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        table = self._table
        if table is None:  # a server without lifespan events
            table = self.prepare()
            await self.cache.connect()
            if self.plan_cache is not None and scope["method"] in READS:
                key = self.plan_cache.key(scope)
        sent = tokens.sent(scope["headers"])
        if sent is not None and key is not None and plan is None and self.plan_cache is not None:
            key = self.plan_cache.without_token(key)
            plan = self.plan_cache.recall(key, self.cache.clock())
            if plan is not None and await self._hit(plan, sent, scope, send):
                return
        exchange = Exchange(sent=sent, request=scope)
        token = current.set(exchange)
        try:
            if plan is not None:
                await self._read(plan, None, scope, receive, send, exchange)
            else:
                await self._handle(table.match(scope), key, scope, receive, send, exchange)
        finally:
            current.reset(token)

    def prepare(self) -> RouteTable:
        """Walk the application's routes and make the table. Raises ``ConfigurationError`` for a
        route cached wrongly."""
        if self._table is None:
            routes = self._describe()
            self.cache.register(routes)
            self._table = RouteTable(routes, root_path=getattr(self.app, "root_path", ""))
            self.plan_cache = self.cache.plan_cache(routes)
        return self._table

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Connect before the application starts, check its routes when it has, close when it has
        shut down."""

        async def watch(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    self.prepare()
                except ConfigurationError as error:
                    message = {"type": "lifespan.startup.failed", "message": f"respcache: {error}"}
            elif message["type"].startswith("lifespan.shutdown"):
                await self.cache.close()  # before the server hears of it: it then ends this task
            await send(message)

        await self.cache.connect()
        await self.app(scope, receive, watch)

    async def _send_hit(
        self,
        held: MemoryEntry,
        representation: Representation,
        scoped: ScopedPlan,
        now: float,
        began: float,
        scope: Scope,
        send: Send,
    ) -> None:
        """Send an entry, and count it. ``began``: when the request came."""
        body, counters = representation.body, scoped.counters
        counters.hits = hits = counters.hits + 1
        counters.bytes_served += len(body)
        if hits & SAMPLE_MASK == counters.phase:
            counters.sample(self.cache.clock() - began, held.entry.fill_ms)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(HIT, scoped.policy.module, scoped.policy.kind, scoped.tenant)
        # what stands around us may add to it
        headers = representation.headers(int(held.expires_at - now)).copy()
        await send({"type": "http.response.start", "status": held.entry.status, "headers": headers})
        await send(
            {"type": "http.response.body", "body": body if scope["method"] == "GET" else b""}
        )

    def verifier(self, plan: Plan, look: LookupResult, scope: Scope) -> None:
        """Have a hit audited."""
        verifier = self.cache.verifier
        assert verifier is not None
        scope = {**scope, "method": "GET", "query_string": plan.form.query_string}
        verifier.begin(
            ServedHit(
                self.app,
                scope,
                self._head(scope, plan.path),
                plan.route,
                plan.policy,
                plan.form.parameters,
                look,
            )
        )

    def _head(self, scope: Scope, path: Mapping[str, str]) -> RequestHead:
        """Return what the resolver may see of a request of a cached route."""
        return (
            RequestHead(scope, path)
            if self.plan_cache is None
            else self.plan_cache.narrowed(scope, path)
        )

    async def _handle(
        self,
        found: tuple[Route, Mapping[str, str]] | None,
        key: Key | None,
        scope: Scope,
        receive: Receive,
        send: Send,
        exchange: Exchange,
    ) -> None:
        route = found[0] if found else None
        if route is None or route.policy is None or scope["method"] not in READS:
            before = None
            if route is not None and route.invalidation is not None:
                before = self._declared_bump(
                    route.invalidation, RequestHead(scope, found[1] if found else None), exchange
                )
            await self._hold(scope, receive, HeldResponse(send, exchange, before))
            return
        assert found is not None
        head = RequestHead(scope, found[1])
        form = canonical(head, found[1], declared=route.parameters, passed=route.passed)
        coding = accepted(head.joined("accept-encoding"))
        version = 0 if self.plan_cache is None else self.plan_cache.version
        plan = Plan(route, route.policy, found[1], form, coding=coding, version=version)
        await self._read(plan, key, scope, receive, send, exchange)

    async def _read(
        self,
        plan: Plan,
        key: Key | None,
        scope: Scope,
        receive: Receive,
        send: Send,
        exchange: Exchange,
    ) -> None:
        """Answer a request of a cached route the long way. ``key``: what to remember the plan by,
        if it is a new one."""
        route, policy, clock = plan.route, plan.policy, self.cache.clock
        began = clock()
        head = self._head(scope, plan.path)
        if scope["method"] == "HEAD":
            send = without_body(send)
        scope = {**scope, "method": "GET", "query_string": plan.form.query_string}
        look = await self.cache.look(plan, head, sent=exchange.sent)
        if key is not None and plan.scoped is not None and self.plan_cache is not None:
            self.plan_cache.remember(key, plan)
        if isinstance(look, Bypass):
            self.cache.counters.at(look.tenant, policy.module, route.template).bypass(look.reason)
            held = HeldResponse(send, exchange)
            await self._hold(
                scope, receive, held, StatusMarker(held, "fwd=bypass", f"detail={look.reason}")
            )
            return
        counters = look.scoped.counters
        if look.held is not None:
            representation = self.cache.representation(look.scoped, look.held, plan.coding)
            if representation is not None:
                await self._send_hit(
                    look.held, representation, look.scoped, clock(), began, scope, send
                )
                if self.cache.verifier is not None and self.cache.verifier.due():
                    self.verifier(plan, look, scope)
                return
        counters.misses += 1
        send = at_head(send, lambda: counters.times.misses.observe(clock() - began))
        if log.isEnabledFor(logging.DEBUG):
            log.debug("[CacheManager] Cache miss: %s", look.cache_key.entry_key)
        exchange.scope = look.scope
        forward = "fwd=stale" if look.outdated else "fwd=uri-miss"
        entered = await self.cache.enter(look)
        representation = None
        if isinstance(entered, Entry):
            representation = MemoryEntry(entry=entered, expires_at=0.0).make(
                plan.coding, max_bytes=policy.max_body_bytes
            )
        if isinstance(entered, Entry) and representation is not None:
            counters.collapsed += 1
            counters.bytes_served += len(representation.body)
            await send_stored(
                send,
                entered.status,
                representation.stored,
                representation.body,
                forward,
                "collapsed",
            )
        elif not isinstance(entered, Fill):
            counters.refuse("not-shareable")
            held = HeldResponse(send, exchange)
            await self._hold(
                scope, receive, held, StatusMarker(held, forward, "detail=not-shareable")
            )
        else:
            with self.cache.tracing.fill(
                tenant=look.scoped.tenant, module=policy.module, route=route.template
            ) as trace:
                await self._fill(
                    route, policy, look, entered, forward, scope, receive, send, exchange, trace
                )

    async def _fill(
        self,
        route: Route,
        policy: Policy,
        look: LookupResult,
        lead: Fill,
        forward: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        exchange: Exchange,
        trace: Trace,
    ) -> None:
        """Run the handler, store and share what it answers if that may be, and send it.

        The handler does not see which codings the client accepts: what it answers is for all of
        them.
        """
        if ACCEPT not in route.key_headers:
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != ACCEPT]}
        exchange.reads = ReadSet(look.scoped.tenant)
        started = self.cache.clock()
        counters = look.scoped.counters

        def complete(refused: str | None, status: int, headers: Headers, body: bytes) -> str | None:
            refused = refused or _late_refusal(exchange, policy, route, scope, headers, body)
            if refused is None and status == 204 and body:
                refused = "length"
            if refused is not None:
                counters.refuse(refused)
                trace(refused)
                lead.complete(None)
                self._complain(refused, exchange, policy, route)
                return refused
            seconds = self.cache.clock() - started
            lead.complete(_entry(look, lead, policy, status, headers, body, round(seconds * 1000)))
            counters.store(size_bytes=len(body), seconds=seconds)
            trace("stored")
            return None

        held, seen = HeldResponse(send, exchange), route.key_headers | {ACCEPT}
        recorder = ResponseRecorder(
            held,
            complete=complete,
            forward=forward,
            max_body_bytes=policy.max_body_bytes,
            key_headers=seen,
        )
        try:
            await self._hold(scope, receive, held, recorder)
        finally:
            lead.complete(None)
            if exchange.wrote and self.cache.verifier is not None:
                self.cache.verifier.exclude(route.template)

    async def _hold(
        self, scope: Scope, receive: Receive, held: HeldResponse, send: Send | None = None
    ) -> None:
        """Run the application; its answer passes ``held``, which it leaves when the request's
        writes are settled."""
        try:
            await self.app(scope, receive, send or held)
        except AckBarrierOverflow as error:
            log.error("%s", error)
            await held.send_error(json.dumps({"status": "error", "message": str(error)}).encode())
        except Exception:
            await held.release()
            raise
        else:
            await held.release()

    def _declared_bump(
        self, invalidation: Invalidation, head: RequestHead, exchange: Exchange
    ) -> Callable[[], Awaitable[None]]:
        """Make the step that bumps the modules which a handler without a database hook declares."""

        async def bump() -> None:
            resolver, scope, tenants = self.cache.resolver, exchange.scope, set[str | None]()
            try:
                if scope is None:
                    claim = resolver.claim(head)
                    if claim.owner_tenant != SHARED:
                        # the handler may have taken away what they saw, or moved them
                        tenants.add(claim.owner_tenant)
                    scope = await resolver.scope(claim)
                tenants.add(scope.tenant)
            except Denied:
                pass
            for tenant in tenants:
                if tenant is not None:
                    self.cache.bump_modules(tenant, invalidation.modules)

        return bump

    def _complain(self, refused: str, exchange: Exchange, policy: Policy, route: Route) -> None:
        """Say once per route and process that a declaration is wrong; in tests (``strict_reads``),
        fail."""
        if refused not in ("undeclared-table", "undeclared-sql") or exchange.reads is None:
            return
        missing = (
            ", ".join(sorted(exchange.reads.tables - set(policy.tables)))
            or "tables that cannot be told from a text() statement"
        )
        message = (
            f"GET {route.template} reads {missing}, which its policy does not declare: its "
            f"answers are not stored"
        )
        if self.cache.strict_reads:
            raise UndeclaredRead(message)
        if self.cache.first_time(message):
            log.warning("%s", message)


def _late_refusal(
    exchange: Exchange, policy: Policy, route: Route, scope: Scope, headers: Headers, body: bytes
) -> str | None:
    """Say why a complete answer must not be stored after all."""
    reads = exchange.reads
    assert reads is not None
    if exchange.wrote:
        return "wrote"
    if route.endpoint is not None and scope.get("endpoint", route.endpoint) is not route.endpoint:
        return "other-endpoint"
    if reads.undeclared_sql:
        return "undeclared-sql"
    if not reads.tables.issubset(policy.tables):
        return "undeclared-table"
    if not reads.modules <= {policy.module}:
        return "other-module"
    if reads.old_snapshot:
        return "old-snapshot"
    length = next((value for name, value in headers if name.lower() == b"content-length"), None)
    return "length" if length is not None and int(length) != len(body) else None


def _entry(
    look: LookupResult,
    lead: Fill,
    policy: Policy,
    status: int,
    headers: Headers,
    body: bytes,
    fill_ms: int,
) -> Entry:
    may_vary, stored = negotiable(headers, length=len(body)), kept(headers)
    return Entry(
        certificate=lead.certificate,
        digest=look.cache_key.digest,
        stored_at_ms=int(time.time() * 1000),
        ttl_ms=max(1, int(policy.ttl_s * 1000 * (1 - random.uniform(0, TTL_JITTER)))),
        fill_ms=fill_ms,
        status=status,
        headers=shared(stored) if may_vary else stored,
        body=body,
        negotiable=may_vary,
    )
