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

from respcache.answers import (
    Headers,
    HeldAnswer,
    Marked,
    Message,
    Recorder,
    Send,
    at_head,
    send_stored,
    without_body,
)
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
from respcache.core.identity import Head
from respcache.core.keys import SHARED
from respcache.core.policy import Invalidation, Policy, canonical
from respcache.core.tokens import Token
from respcache.fill.filler import Lead
from respcache.lookup import Bypass, Look
from respcache.near.held import Held, Variant
from respcache.ops.audit import Hit
from respcache.ops.stats import SAMPLE_MASK
from respcache.ops.tracing import Trace
from respcache.plans import Aim, Grant, Key, Memo, Plan
from respcache.record import Reads, Record, current
from respcache.routing import Route, Table

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


class Wrapper:
    """An ASGI application that answers for another one from the cache where it may."""

    def __init__(self, cache: "Cache", app: App, describe: Callable[[], list[Route]]) -> None:
        self.app = app
        self.cache = cache
        self.memo: Memo | None = None
        self._describe = describe
        self._table: Table | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of the server (ASGI 3.0)."""
        memo = self.memo
        if memo is None or scope["type"] != "http" or scope["method"] not in READS:
            await self._serve(scope, None, None, receive, send)
            return
        cache = self.cache
        began = now = cache.clock()
        key = memo.key(scope)
        plan = memo.get(key)
        if plan is not None and now < plan.expires_at:
            aim = plan.aim
            if aim is not None:
                grant = cache.granted(aim, now)
                if grant is None or not aim.view_s:
                    grant = await self._prove(plan, aim, grant, now)
                    now = cache.clock()
                if grant is not None:
                    held, variant, figures = grant.held, grant.variant, aim.figures
                    body = variant.body
                    figures.hits = hits = figures.hits + 1
                    figures.bytes_served += len(body)
                    if hits & SAMPLE_MASK == figures.phase:
                        figures.sample(cache.clock() - began, held.entry.fill_ms)
                    if grant.logged:
                        log.debug(HIT, aim.policy.module, aim.policy.kind, aim.tenant)
                    # what stands around us may add to it
                    headers = variant.headers(int(held.expires_at - now)).copy()
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
                    if cache.audit is not None and grant.view is not None and cache.audit.due():
                        self.audit(
                            plan,
                            Look(aim, grant.view, held.entry.certificate, held, outdated=False),
                            scope,
                        )
                    return
        else:
            plan = None
        await self._serve(scope, key, plan, receive, send)

    async def _prove(self, plan: Plan, aim: Aim, grant: Grant | None, now: float) -> Grant | None:
        """Prove a hit from memory, if it can be proven (``lookup.py``). At most one round trip, for
        a view.

        ``grant`` is the last proof, which holds if the view that is read now is the one that it was
        made in.
        """
        cache, view = self.cache, None
        if grant is not None:
            held, fence = grant.held, grant.fence
        else:
            candidate = cache.candidate(aim, now)
            if candidate is None:
                return None
            held, fence, view = candidate
        if view is None:
            try:
                view = await cache.read_view(aim)
            except StoreError:
                if not cache.lasts(aim):
                    return None
            now = cache.clock()
            if not cache.serves(aim):
                return None
            if grant is not None and view is grant.view and now < grant.until:
                return grant
        return cache.prove(plan, aim, held, fence, view, now)

    async def _hit(self, plan: Plan, sent: Token, scope: Scope, send: Send) -> bool:
        """Answer a request that brings this token from memory, if what is there can be proven."""
        cache, aim = self.cache, plan.aim
        if aim is None:
            return False
        began = now = cache.clock()
        aim = cache.heed(aim, sent, now)
        grant = cache.granted(aim, now)
        if grant is None or not aim.view_s:
            grant = await self._prove(plan, aim, grant, now)
        if grant is None:
            return False
        await self._send_hit(grant.held, grant.variant, aim, cache.clock(), began, scope, send)
        if cache.audit is not None and grant.view is not None and cache.audit.due():
            self.audit(
                plan,
                Look(aim, grant.view, grant.held.entry.certificate, grant.held, outdated=False),
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
            if self.memo is not None and scope["method"] in READS:
                key = self.memo.key(scope)
        sent = tokens.sent(scope["headers"])
        if sent is not None and key is not None and plan is None and self.memo is not None:
            key = self.memo.without_token(key)
            plan = self.memo.recall(key, self.cache.clock())
            if plan is not None and await self._hit(plan, sent, scope, send):
                return
        record = Record(sent=sent, request=scope)
        token = current.set(record)
        try:
            if plan is not None:
                await self._read(plan, None, scope, receive, send, record)
            else:
                await self._handle(table.match(scope), key, scope, receive, send, record)
        finally:
            current.reset(token)

    def prepare(self) -> Table:
        """Walk the application's routes and make the table. Raises ``ConfigurationError`` for a
        route cached wrongly."""
        if self._table is None:
            routes = self._describe()
            self.cache.register(routes)
            self._table = Table(routes, root_path=getattr(self.app, "root_path", ""))
            self.memo = self.cache.memo(routes)
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
        held: Held,
        variant: Variant,
        aim: Aim,
        now: float,
        began: float,
        scope: Scope,
        send: Send,
    ) -> None:
        """Send an entry, and count it. ``began``: when the request came."""
        body, figures = variant.body, aim.figures
        figures.hits = hits = figures.hits + 1
        figures.bytes_served += len(body)
        if hits & SAMPLE_MASK == figures.phase:
            figures.sample(self.cache.clock() - began, held.entry.fill_ms)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(HIT, aim.policy.module, aim.policy.kind, aim.tenant)
        # what stands around us may add to it
        headers = variant.headers(int(held.expires_at - now)).copy()
        await send({"type": "http.response.start", "status": held.entry.status, "headers": headers})
        await send(
            {"type": "http.response.body", "body": body if scope["method"] == "GET" else b""}
        )

    def audit(self, plan: Plan, look: Look, scope: Scope) -> None:
        """Have a hit audited."""
        audit = self.cache.audit
        assert audit is not None
        scope = {**scope, "method": "GET", "query_string": plan.form.query_string}
        audit.begin(
            Hit(
                self.app,
                scope,
                self._head(scope, plan.path),
                plan.route,
                plan.policy,
                plan.form.parameters,
                look,
            )
        )

    def _head(self, scope: Scope, path: Mapping[str, str]) -> Head:
        """Return what the resolver may see of a request of a cached route."""
        return Head(scope, path) if self.memo is None else self.memo.narrowed(scope, path)

    async def _handle(
        self,
        found: tuple[Route, Mapping[str, str]] | None,
        key: Key | None,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: Record,
    ) -> None:
        route = found[0] if found else None
        if route is None or route.policy is None or scope["method"] not in READS:
            before = None
            if route is not None and route.invalidation is not None:
                before = self._declared_bump(
                    route.invalidation, Head(scope, found[1] if found else None), record
                )
            await self._hold(scope, receive, HeldAnswer(send, record, before))
            return
        assert found is not None
        head = Head(scope, found[1])
        form = canonical(head, found[1], declared=route.parameters, passed=route.passed)
        coding = accepted(head.joined("accept-encoding"))
        life = 0 if self.memo is None else self.memo.life
        plan = Plan(route, route.policy, found[1], form, coding=coding, life=life)
        await self._read(plan, key, scope, receive, send, record)

    async def _read(
        self,
        plan: Plan,
        key: Key | None,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: Record,
    ) -> None:
        """Answer a request of a cached route the long way. ``key``: what to remember the plan by,
        if it is a new one."""
        route, policy, clock = plan.route, plan.policy, self.cache.clock
        began = clock()
        head = self._head(scope, plan.path)
        if scope["method"] == "HEAD":
            send = without_body(send)
        scope = {**scope, "method": "GET", "query_string": plan.form.query_string}
        look = await self.cache.look(plan, head, sent=record.sent)
        if key is not None and plan.aim is not None and self.memo is not None:
            self.memo.remember(key, plan)
        if isinstance(look, Bypass):
            self.cache.figures.at(look.tenant, policy.module, route.template).bypass(look.reason)
            held = HeldAnswer(send, record)
            await self._hold(
                scope, receive, held, Marked(held, "fwd=bypass", f"detail={look.reason}")
            )
            return
        figures = look.aim.figures
        if look.held is not None:
            variant = self.cache.variant(look.aim, look.held, plan.coding)
            if variant is not None:
                await self._send_hit(look.held, variant, look.aim, clock(), began, scope, send)
                if self.cache.audit is not None and self.cache.audit.due():
                    self.audit(plan, look, scope)
                return
        figures.misses += 1
        send = at_head(send, lambda: figures.times.misses.observe(clock() - began))
        if log.isEnabledFor(logging.DEBUG):
            log.debug("[CacheManager] Cache miss: %s", look.target.entry_key)
        record.scope = look.scope
        forward = "fwd=stale" if look.outdated else "fwd=uri-miss"
        entered = await self.cache.enter(look)
        variant = None
        if isinstance(entered, Entry):
            variant = Held(entry=entered, expires_at=0.0).make(
                plan.coding, max_bytes=policy.max_body_bytes
            )
        if isinstance(entered, Entry) and variant is not None:
            figures.collapsed += 1
            figures.bytes_served += len(variant.body)
            await send_stored(
                send, entered.status, variant.stored, variant.body, forward, "collapsed"
            )
        elif not isinstance(entered, Lead):
            figures.refuse("not-shareable")
            held = HeldAnswer(send, record)
            await self._hold(scope, receive, held, Marked(held, forward, "detail=not-shareable"))
        else:
            with self.cache.tracing.fill(
                tenant=look.aim.tenant, module=policy.module, route=route.template
            ) as trace:
                await self._fill(
                    route, policy, look, entered, forward, scope, receive, send, record, trace
                )

    async def _fill(
        self,
        route: Route,
        policy: Policy,
        look: Look,
        lead: Lead,
        forward: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: Record,
        trace: Trace,
    ) -> None:
        """Run the handler, store and share what it answers if that may be, and send it.

        The handler does not see which codings the client accepts: what it answers is for all of
        them.
        """
        if ACCEPT not in route.key_headers:
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != ACCEPT]}
        record.reads = Reads(look.aim.tenant)
        started = self.cache.clock()
        figures = look.aim.figures

        def land(refused: str | None, status: int, headers: Headers, body: bytes) -> str | None:
            refused = refused or _late_refusal(record, policy, route, scope, headers, body)
            if refused is None and status == 204 and body:
                refused = "length"
            if refused is not None:
                figures.refuse(refused)
                trace(refused)
                lead.land(None)
                self._complain(refused, record, policy, route)
                return refused
            seconds = self.cache.clock() - started
            lead.land(_entry(look, lead, policy, status, headers, body, round(seconds * 1000)))
            figures.store(size_bytes=len(body), seconds=seconds)
            trace("stored")
            return None

        held, seen = HeldAnswer(send, record), route.key_headers | {ACCEPT}
        recorder = Recorder(
            held, land=land, forward=forward, max_body_bytes=policy.max_body_bytes, key_headers=seen
        )
        try:
            await self._hold(scope, receive, held, recorder)
        finally:
            lead.land(None)
            if record.wrote and self.cache.audit is not None:
                self.cache.audit.exclude(route.template)

    async def _hold(
        self, scope: Scope, receive: Receive, held: HeldAnswer, send: Send | None = None
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
        self, invalidation: Invalidation, head: Head, record: Record
    ) -> Callable[[], Awaitable[None]]:
        """Make the step that bumps the modules which a handler without a database hook declares."""

        async def bump() -> None:
            resolver, scope, tenants = self.cache.resolver, record.scope, set[str | None]()
            try:
                if scope is None:
                    claim = resolver.claim(head)
                    if claim.home != SHARED:
                        # the handler may have taken away what they saw, or moved them
                        tenants.add(claim.home)
                    scope = await resolver.scope(claim)
                tenants.add(scope.tenant)
            except Denied:
                pass
            for tenant in tenants:
                if tenant is not None:
                    self.cache.bump_modules(tenant, invalidation.modules)

        return bump

    def _complain(self, refused: str, record: Record, policy: Policy, route: Route) -> None:
        """Say once per route and process that a declaration is wrong; in tests (``strict_reads``),
        fail."""
        if refused not in ("undeclared-table", "undeclared-sql") or record.reads is None:
            return
        missing = (
            ", ".join(sorted(record.reads.tables - set(policy.tables)))
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
    record: Record, policy: Policy, route: Route, scope: Scope, headers: Headers, body: bytes
) -> str | None:
    """Say why a complete answer must not be stored after all."""
    reads = record.reads
    assert reads is not None
    if record.wrote:
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
    look: Look, lead: Lead, policy: Policy, status: int, headers: Headers, body: bytes, fill_ms: int
) -> Entry:
    may_vary, stored = negotiable(headers, length=len(body)), kept(headers)
    return Entry(
        certificate=lead.certificate,
        digest=look.target.digest,
        stored_at_ms=int(time.time() * 1000),
        ttl_ms=max(1, int(policy.ttl_s * 1000 * (1 - random.uniform(0, TTL_JITTER)))),
        fill_ms=fill_ms,
        status=status,
        headers=shared(stored) if may_vary else stored,
        body=body,
        negotiable=may_vary,
    )
