"""The exchange: one request, and what happens in the database on its behalf.

It links the middleware to the database hooks. The middleware puts the exchange into a context
variable before it calls the application. Child tasks and threads see the same object: a value that
they set in the variable would not come back, but a change to the object does. No I/O.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from respcache.core.identity import Scope
from respcache.core.serving_lease import Ack, Outcome
from respcache.core.tokens import ConsistencyToken, both

Message = MutableMapping[str, Any]
AsgiScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[AsgiScope, Receive, Send], Awaitable[None]]

_ticks = itertools.count(1)
_BY_SEVERITY = tuple(Outcome)


def tick() -> int:
    """Return the next number of a process-wide order: strictly increasing, and not a clock."""
    return next(_ticks)


async def _no_receive() -> Message:
    raise RuntimeError("this exchange has no request body")


async def _no_send(message: Message) -> None:
    raise RuntimeError("this exchange has no client")


@dataclass(slots=True, eq=False)
class ReadSet:
    """What the database hooks saw while a response or value was made to be stored.

    ``tenant`` is the tenant that it belongs to. ``modules`` are those of the values in it that only
    an invalidation of their module reaches.
    """

    tenant: str | None = None
    captured_at: int = field(default_factory=tick)
    tables: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    undeclared_sql: bool = False
    old_snapshot: bool = False


@dataclass(slots=True, eq=False)
class Exchange:
    """One request from its arrival to its response, or the fill of a value within it.

    ``asgi_scope``, ``receive`` and ``send`` are ASGI's; ``scope`` is what the caller may see.
    ``client_token`` is the consistency token that the request brought, ``token`` the one that its
    response returns: None if the request bumped nothing. ``open_transactions`` have uncommitted
    changes.
    """

    asgi_scope: AsgiScope = field(default_factory=dict)
    receive: Receive = _no_receive
    send: Send = _no_send
    request: Mapping[str, Any] | None = None
    """The ASGI scope as the server sent it, for the feed; None outside of a request."""
    scope: Scope | None = None
    client_token: ConsistencyToken | None = None
    token: ConsistencyToken | None = None
    reads: ReadSet | None = None
    wrote: bool = False
    open_transactions: set[Any] = field(default_factory=set)
    sessions: list[Any] = field(default_factory=list)
    bumps: list[asyncio.Future[Ack]] = field(default_factory=list)
    outcome: Outcome = Outcome.CONFIRMED

    def nested(self, tenant: str) -> "Exchange":
        """Begin the fill of a tenant's value within this request.

        It has its own reads, and shares transactions and bumps.
        """
        alive = [session for session in (begun() for begun in self.sessions) if session is not None]
        # a session may return objects again that it loaded before the certificate was captured
        loaded = any(len(session.identity_map) > 0 for session in alive)
        return Exchange(
            asgi_scope=self.asgi_scope,
            request=self.request,
            scope=self.scope,
            reads=ReadSet(tenant, old_snapshot=loaded),
            open_transactions=self.open_transactions,
            sessions=self.sessions,
            bumps=self.bumps,
        )

    def absorb(self, inner: "Exchange") -> None:
        """Add what a nested fill read and wrote to this request."""
        self.wrote |= inner.wrote
        self.note(Ack(inner.outcome, inner.token))
        if self.reads is not None and inner.reads is not None:
            self.reads.tables |= inner.reads.tables
            self.reads.modules |= inner.reads.modules
            self.reads.undeclared_sql |= inner.reads.undeclared_sql
            self.reads.old_snapshot |= inner.reads.old_snapshot

    async def settle(self) -> None:
        """Wait until every write of this request so far may be acknowledged.

        Cancelling one waiter does not cancel the bump, and other waiters still wait for it.
        """
        while self.bumps:
            bump = self.bumps[0]
            await asyncio.wait([bump])
            if self.bumps and self.bumps[0] is bump:
                self.bumps.pop(0)
            self.note(bump.result())

    def note(self, ack: Ack) -> None:
        """Keep the worst outcome of this request's invalidations, and one token for all of them."""
        if _BY_SEVERITY.index(ack.outcome) > _BY_SEVERITY.index(self.outcome):
            self.outcome = ack.outcome
        self.token = both(self.token, ack.token)


current: ContextVar[Exchange | None] = ContextVar("respcache_exchange", default=None)
cause: ContextVar[str | None] = ContextVar("respcache_cause", default=None)
"""Why something is invalidated, if not by the current request. Shown in the feed."""


def bind_scope(scope: Scope) -> None:
    """Report the scope that a handler resolved itself. ``invalidate_cache`` uses its tenant."""
    exchange = current.get()
    if exchange is not None:
        exchange.scope = scope


def current_scope() -> Scope | None:
    """Return the scope of the current request if it was resolved or bound, else None."""
    exchange = current.get()
    return None if exchange is None else exchange.scope
