"""The fill of a response: runs the handler, then stores and shares its response if that is allowed.

The handler does not see which codings the client accepts, because its response serves all clients,
unless the route declares that header.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from respcache.context import Exchange, ReadSet, Send
from respcache.core.encoding import negotiable, shared
from respcache.core.entry import Entry
from respcache.core.errors import UndeclaredRead
from respcache.core.http_caching import kept
from respcache.read.fills import Fill
from respcache.read.lookup import LookupResult
from respcache.read.responses import DeferredResponse, ResponseRecorder, WholeResponse
from respcache.routing.table import Route
from respcache.telemetry.findings import Findings
from respcache.telemetry.tracing import Trace

log = logging.getLogger("respcache")

ACCEPT = b"accept-encoding"
TTL_JITTER = 0.05
"""Entries expire up to this share early, so that those stored together do not expire together."""

RunApplication = Callable[[Exchange, DeferredResponse, Send], Awaitable[None]]
"""Runs the application; its response passes the ``send``, then the deferred response."""


@dataclass(slots=True)
class ResponseFill:
    """One fill of one response."""

    exchange: Exchange
    route: Route
    result: LookupResult
    fill: Fill
    forward: str
    findings: Findings
    clock: Callable[[], float]
    trace: Trace
    strict_reads: bool
    started: float = 0.0

    async def run(self, run_application: RunApplication) -> None:
        """Run the handler and send its response. The fill is completed in any case."""
        exchange, policy = self.exchange, self.result.scoped.policy
        if ACCEPT not in self.route.key_headers:
            headers = [pair for pair in exchange.asgi_scope["headers"] if pair[0] != ACCEPT]
            exchange.asgi_scope = {**exchange.asgi_scope, "headers": headers}
        exchange.reads = ReadSet(self.result.scoped.tenant)
        self.started = self.clock()
        deferred = DeferredResponse(exchange)
        recorder = ResponseRecorder(
            deferred,
            self._complete,
            forward=self.forward,
            max_body_bytes=policy.max_body_bytes,
            key_headers=self.route.key_headers | {ACCEPT},
        )
        try:
            await run_application(exchange, deferred, recorder)
        finally:
            self.fill.complete(None)

    def _complete(self, recorded: WholeResponse | str) -> str | None:
        """Store the recorded response, or count why not. Return that reason, or None."""
        counters = self.result.scoped.counters
        if isinstance(recorded, str):
            reason: str | None = recorded
        else:
            reason = self._refusal(recorded)
        if reason is not None or isinstance(recorded, str):
            assert reason is not None
            counters.refuse(reason)
            self.trace(reason)
            self.fill.complete(None)
            self._report(reason)
            return reason
        seconds = self.clock() - self.started
        self.fill.complete(self._entry(recorded, round(seconds * 1000)))
        counters.store(size_bytes=len(recorded.body), seconds=seconds)
        self.trace("stored")
        return None

    def _entry(self, response: WholeResponse, fill_ms: int) -> Entry:
        policy = self.result.scoped.policy
        may_vary = negotiable(response.headers, length=len(response.body))
        stored = kept(response.headers)
        return Entry(
            certificate=self.fill.certificate,
            digest=self.result.scoped.cache_key.digest,
            stored_at_ms=int(time.time() * 1000),
            ttl_ms=max(1, int(policy.ttl_s * 1000 * (1 - random.uniform(0, TTL_JITTER)))),
            fill_ms=fill_ms,
            status=response.status,
            headers=shared(stored) if may_vary else stored,
            body=response.body,
            negotiable=may_vary,
        )

    def _report(self, reason: str) -> None:
        """Report a wrong declaration once per route and process; in tests (``strict_reads``), raise
        ``UndeclaredRead``."""
        reads = self.exchange.reads
        if reason not in ("undeclared-table", "undeclared-sql") or reads is None:
            return
        undeclared = sorted(reads.tables - set(self.result.scoped.policy.tables))
        missing = ", ".join(undeclared) or "tables that a text() statement does not show"
        message = (
            f"GET {self.route.template} reads {missing}, which its policy does not declare: its "
            "responses are not stored"
        )
        if self.strict_reads:
            raise UndeclaredRead(message)
        self.findings.warn_once(message)

    def _refusal(self, response: WholeResponse) -> str | None:
        """Return why a complete response must not be stored, or None."""
        exchange, route, policy = self.exchange, self.route, self.result.scoped.policy
        reads, asgi_scope = exchange.reads, exchange.asgi_scope
        assert reads is not None
        if exchange.wrote:
            return "wrote"
        if (
            route.endpoint is not None
            and asgi_scope.get("endpoint", route.endpoint) is not route.endpoint
        ):
            return "other-endpoint"
        if reads.undeclared_sql:
            return "undeclared-sql"
        if not reads.tables.issubset(policy.tables):
            return "undeclared-table"
        if not reads.modules <= {policy.module}:
            return "other-module"
        if reads.old_snapshot:
            return "old-snapshot"
        lengths = [value for name, value in response.headers if name.lower() == b"content-length"]
        if lengths and int(lengths[0]) != len(response.body):
            return "length"
        return "length" if response.status == 204 and response.body else None
