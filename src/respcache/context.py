"""What happens in the database on behalf of one request: the link between the ASGI wrapper and the
engine hooks.

The wrapper puts a mutable ``Exchange`` into a context variable before it calls the application. Child
tasks and threads see the same object (a value set by them would not come back, a change to the
object does). It owns no I/O.
"""

import asyncio
import itertools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from respcache.core.identity import Scope
from respcache.core.serving_lease import Ack, Outcome
from respcache.core.tokens import ConsistencyToken, both

_ticks = itertools.count(1)
_BY_SEVERITY = tuple(Outcome)


def tick() -> int:
    """Return the next number of a process-wide order, for "began before": no clock, so no ties and
    no steps."""
    return next(_ticks)


@dataclass(slots=True, eq=False)
class ReadSet:
    """What the database hooks saw while a response was being made to be stored.

    ``tenant`` is whose it is; ``modules`` are those of values that it was made of and that nothing
    but their module invalidates.
    """

    tenant: str | None = None
    captured_at: int = field(default_factory=tick)
    tables: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    undeclared_sql: bool = False
    old_snapshot: bool = False


@dataclass(slots=True, eq=False)
class Exchange:
    """One request, from the moment the wrapper took it. ``open`` holds transactions with
    uncommitted changes.

    ``sent`` is the token that it brought, ``token`` the one for its answer: None where it has
    bumped nothing.
    """

    scope: Scope | None = None
    sent: ConsistencyToken | None = None
    token: ConsistencyToken | None = None
    reads: ReadSet | None = None
    wrote: bool = False
    open: set[Any] = field(default_factory=set)
    sessions: list[Any] = field(default_factory=list)
    bumps: list[asyncio.Future[Ack]] = field(default_factory=list)
    outcome: Outcome = Outcome.CONFIRMED
    request: Mapping[str, Any] | None = None
    """The ASGI scope, for the feed."""

    def nested(self, tenant: str) -> "Exchange":
        """Begin the fill of a value of a tenant within this request: its own reads, the same
        transactions and bumps."""
        alive = [session for session in (begun() for begun in self.sessions) if session is not None]
        # objects read before the capture, given out again
        held = any(len(session.identity_map) > 0 for session in alive)
        return Exchange(
            scope=self.scope,
            reads=ReadSet(tenant, old_snapshot=held),
            open=self.open,
            sessions=self.sessions,
            bumps=self.bumps,
            request=self.request,
        )

    def absorb(self, inner: "Exchange") -> None:
        """Take over what a nested fill did: what it read and wrote, this request read and wrote."""
        self.wrote |= inner.wrote
        self.note(Ack(inner.outcome, inner.token))
        if self.reads is not None and inner.reads is not None:
            self.reads.tables |= inner.reads.tables
            self.reads.modules |= inner.reads.modules
            self.reads.undeclared_sql |= inner.reads.undeclared_sql
            self.reads.old_snapshot |= inner.reads.old_snapshot

    async def settle(self) -> None:
        """Wait until every write of this request so far may be acknowledged; remember what its
        answer has to say.

        Who is cancelled meanwhile takes no bump along, and whoever settles at the same time waits
        for it too.
        """
        while self.bumps:
            sent = self.bumps[0]
            await asyncio.wait([sent])
            if self.bumps and self.bumps[0] is sent:
                self.bumps.pop(0)
            self.note(sent.result())

    def note(self, ack: Ack) -> None:
        """Remember the worst of what became of this request's invalidations, and one token for all
        of them."""
        if _BY_SEVERITY.index(ack.outcome) > _BY_SEVERITY.index(self.outcome):
            self.outcome = ack.outcome
        self.token = both(self.token, ack.token)


current: ContextVar[Exchange | None] = ContextVar("respcache_record", default=None)
cause: ContextVar[str | None] = ContextVar("respcache_cause", default=None)
"""Why something is invalidated, where it is not the request's work: for the feed."""


def bind_scope(scope: Scope) -> None:
    """Tell the wrapper which scope a handler resolved itself: the tenant that ``invalidate_cache``
    then invalidates."""
    exchange = current.get()
    if exchange is not None:
        exchange.scope = scope


def current_scope() -> Scope | None:
    """Return the scope that the wrapper resolved for the request being handled, or None where it
    did not (writes, bypasses)."""
    exchange = current.get()
    return None if exchange is None else exchange.scope
