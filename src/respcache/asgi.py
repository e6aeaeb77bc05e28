"""The ASGI wrapper: the way of a request, top to bottom. Outermost, so that a hit costs no middleware and no routing.

It never reads a request body. A request of a cached route goes: canonical form, look (identity, key, one round trip), then
hit, or fill (flight, lease, handler). Everything else passes through, with its answer held until its bumps are settled.
Whatever the store does, the application answers.
"""

import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from respcache.answers import Headers, HeldAnswer, Marked, Message, Recorder, Send, remaining_s, send_entry, without_body
from respcache.core.entry import Entry
from respcache.core.errors import AckBarrierOverflow, ConfigurationError, Denied, UndeclaredRead
from respcache.core.http_caching import kept
from respcache.core.identity import Head
from respcache.core.policy import Invalidation, Policy, canonical
from respcache.fill.filler import Lead
from respcache.lookup import Bypass, Look
from respcache.ops.audit import Hit
from respcache.record import Reads, Record, current
from respcache.routing import Route, Table

if TYPE_CHECKING:
    from respcache.cache import Cache

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TTL_JITTER = 0.05
"""Entries live up to this share shorter than their policy says, so that those made together do not end together."""

log = logging.getLogger("respcache")


class Wrapper:
    """An ASGI application that answers for another one from the cache where it may."""

    def __init__(self, cache: "Cache", app: App, describe: Callable[[], list[Route]]) -> None:
        self.app = app
        self._cache = cache
        self._describe = describe
        self._table: Table | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of the server (ASGI 3.0)."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        table = self._table
        if table is None:  # a server without lifespan events
            table = self.prepare()
            await self._cache.connect()
        record = Record()
        token = current.set(record)
        try:
            await self._handle(table.match(scope), scope, receive, send, record)
        finally:
            current.reset(token)

    def prepare(self) -> Table:
        """Walk the application's routes and make the table. Raises ``ConfigurationError`` for a route cached wrongly."""
        if self._table is None:
            routes = self._describe()
            self._cache.register(routes)
            self._table = Table(routes)
        return self._table

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Connect before the application starts, check its routes when it has, close when it has shut down."""

        async def watch(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    self.prepare()
                except ConfigurationError as error:
                    message = {"type": "lifespan.startup.failed", "message": f"respcache: {error}"}
            elif message["type"].startswith("lifespan.shutdown"):
                await self._cache.close()  # before the server hears of it: it then ends this task
            await send(message)

        await self._cache.connect()
        await self.app(scope, receive, watch)

    async def _handle(
        self, found: tuple[Route, Mapping[str, str]] | None, scope: Scope, receive: Receive, send: Send, record: Record
    ) -> None:
        route = found[0] if found else None
        if route is None or route.policy is None or scope["method"] not in ("GET", "HEAD"):
            before = None
            if route is not None and route.invalidation is not None:
                before = self._declared_bump(route.invalidation, Head(scope, found[1] if found else None), record)
            await self._hold(scope, receive, HeldAnswer(send, record, before))
            return
        assert found is not None
        if scope["method"] == "HEAD":
            send = without_body(send)
        await self._read(route, route.policy, found[1], scope, receive, send, record)

    async def _read(
        self, route: Route, policy: Policy, path: Mapping[str, str], scope: Scope, receive: Receive, send: Send, record: Record
    ) -> None:
        head = Head(scope, path)
        form = canonical(head, path, declared=route.parameters, passed=route.passed)
        scope = {**scope, "method": "GET", "query_string": form.query_string}
        look = await self._cache.look(route, policy, head=head, parameters=form.parameters)
        if isinstance(look, Bypass):
            self._cache.figures.of(look.tenant, policy.module).bypasses[look.reason] += 1
            held = HeldAnswer(send, record)
            await self._hold(scope, receive, held, Marked(held, "fwd=bypass", f"detail={look.reason}"))
            return
        figures = self._cache.figures.of(look.tenant, policy.module)
        if look.entry is not None:
            figures.hits += 1
            figures.bytes_served += len(look.entry.body)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("[Cache] Hit: %s %s for tenant %s", policy.module, policy.kind, look.tenant)
            await send_entry(send, look.entry, "hit", f"ttl={remaining_s(look.entry)}")
            audit = self._cache.audit
            if audit is not None:
                audit.countdown -= 1
                if audit.countdown <= 0:
                    audit.begin(Hit(self.app, scope, head, route, policy, form.parameters, look))
            return
        figures.misses += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("[CacheManager] Cache miss: %s", look.target.entry_key)
        record.scope = look.scope
        forward = "fwd=stale" if look.outdated else "fwd=uri-miss"
        entered = await self._cache.enter(look)
        if isinstance(entered, Entry):
            figures.collapsed += 1
            figures.bytes_served += len(entered.body)
            await send_entry(send, entered, forward, "collapsed")
        elif entered is None:
            figures.refusals["not-shareable"] += 1
            held = HeldAnswer(send, record)
            await self._hold(scope, receive, held, Marked(held, forward, "detail=not-shareable"))
        else:
            await self._fill(route, policy, look, entered, forward, scope, receive, send, record)

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
    ) -> None:
        """Run the handler, store and share what it answers if that may be, and send it."""
        record.reads = Reads()
        started = time.monotonic()
        figures = self._cache.figures.of(look.tenant, policy.module)

        def land(refused: str | None, status: int, headers: Headers, body: bytes) -> str | None:
            refused = refused or _late_refusal(record, policy, route, scope, headers, body)
            if refused is not None:
                figures.refusals[refused] += 1
                lead.land(None)
                self._complain(refused, record, policy, route)
                return refused
            fill_ms = int((time.monotonic() - started) * 1000)
            lead.land(_entry(look, lead, policy, status, headers, body, fill_ms))
            figures.stores += 1
            figures.bytes_stored += len(body)
            return None

        held = HeldAnswer(send, record)
        recorder = Recorder(held, land=land, forward=forward, max_body_bytes=policy.max_body_bytes, key_headers=route.key_headers)
        try:
            await self._hold(scope, receive, held, recorder)
        finally:
            lead.land(None)
            if record.wrote and self._cache.audit is not None:
                self._cache.audit.exclude(route.template)

    async def _hold(self, scope: Scope, receive: Receive, held: HeldAnswer, send: Send | None = None) -> None:
        """Run the application; its answer passes ``held``, which it leaves when the request's writes are settled."""
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

    def _declared_bump(self, invalidation: Invalidation, head: Head, record: Record) -> Callable[[], Awaitable[None]]:
        """Make the step that bumps the modules which a handler without a database hook declares."""

        async def bump() -> None:
            resolver = self._cache.resolver
            try:
                scope = record.scope or await resolver.scope(resolver.claim(head))
            except Denied:
                return
            if scope.tenant is not None:
                self._cache.bump_modules(scope.tenant, invalidation.modules)

        return bump

    def _complain(self, refused: str, record: Record, policy: Policy, route: Route) -> None:
        """Say once per route and process that a declaration is wrong; in tests (``strict_reads``), fail."""
        if refused not in ("undeclared-table", "undeclared-sql") or record.reads is None:
            return
        missing = (
            ", ".join(sorted(record.reads.tables - set(policy.tables))) or "tables that cannot be told from a text() statement"
        )
        message = f"GET {route.template} reads {missing}, which its policy does not declare: its answers are not stored"
        if self._cache.strict_reads:
            raise UndeclaredRead(message)
        if self._cache.first_time(message):
            log.warning("%s", message)


def _late_refusal(record: Record, policy: Policy, route: Route, scope: Scope, headers: Headers, body: bytes) -> str | None:
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
    if reads.old_snapshot:
        return "old-snapshot"
    length = next((value for name, value in headers if name.lower() == b"content-length"), None)
    return "length" if length is not None and int(length) != len(body) else None


def _entry(look: Look, lead: Lead, policy: Policy, status: int, headers: Headers, body: bytes, fill_ms: int) -> Entry:
    return Entry(
        certificate=lead.certificate,
        digest=look.target.digest,
        stored_at_ms=int(time.time() * 1000),
        ttl_ms=max(1, int(policy.ttl_s * 1000 * (1 - random.uniform(0, TTL_JITTER)))),
        fill_ms=fill_ms,
        status=status,
        headers=kept(headers),
        body=body,
    )
