"""The verifier: executes a sampled share of the hits again in the background, and compares.

It looks for what the protocol itself cannot see: an invalidation that was lost although every rule
was kept (disabled triggers, an outbox emptied by hand, a defect of ours), a declaration that is too
narrow (a response that depends on something else than its tables, a fingerprint that is equal for
callers who see different rows), and a scope that was served after it had ended.

A difference alone proves nothing, because a write may have come between the hit and the second
execution. The certificate tells the two apart. Let the entry be valid when it was served, let r be
the second execution, and let v be a view of the generations that was read under a living serving
lease after a relay cycle that began after r was complete. Whatever r saw was committed before r
ended, so it is in the snapshot of that cycle, so it was bumped before v was read. If the entry is
*still* valid in v, nothing that it depends on was bumped since its capture. Then r had to give what
the entry holds, and the difference is a mismatch. Otherwise the entry was overtaken, and nothing is
reported. Without a relay, the verifier waits for the duration of a lease instead of a cycle. A
response that differs from execution to execution while nothing is bumped is *nondeterministic*:
that is reported once per route and is no mismatch.

The cost. A hit that is not sampled: one decrement of an integer. A verification with equal
responses, which is nearly every one: the resolver's statements and one run of the handler, without
a round trip to the store. One that differs: one more round trip; and if the entry is still valid,
the wait for a relay cycle, another round trip, ``CONFIRMING_RUNS`` runs, and a third round trip. At
most one runs per process, at most one begins in ``LEAST_PAUSE_S``, and the rest after each keeps
verifications below ``MOST_SHARE_OF_TIME``. Responses to users never wait for one. Nothing that it
makes is stored or shared, its requests are in no counters but its own, and its failures reach no
user.

A route whose handler wrote is not verified again. A handler can recognize a verification by
``scope["extensions"]["respcache.verifier"]``.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from respcache.context import App, AsgiScope, Exchange, Message, ReadSet, current
from respcache.core.encoding import ContentCoding, shared
from respcache.core.errors import ConfigurationError, Denied
from respcache.core.generations import FLOOR, Certificate, GenerationView
from respcache.core.http_caching import kept
from respcache.core.identity import RequestHead, Resolver, Scope
from respcache.core.serving_lease import DRIFT, LEASE_S
from respcache.read.lookup import Lookup, LookupResult
from respcache.read.memory import MemoryEntry
from respcache.read.plans import Plan
from respcache.telemetry.stats import Counters
from respcache.writes.relay import OutboxRelay

log = logging.getLogger("respcache")

DEFAULT_SHARE = 0.001
EVERY_S = 1.0
"""If there are hits, about one is verified in this time, however few they are."""

LEAST_PAUSE_S = 0.2
MOST_SHARE_OF_TIME = 0.1
"""Of the wall-clock time, waiting for the database included; the event loop's share is a fraction
of that."""

MOST_S = 30.0
"""A verification is given up after this time."""

CONFIRMING_RUNS = 3
MAX_MISMATCHES = 20
LOG_EVERY_S = 10.0
PASSING_STATUS = frozenset({408, 425, 429})
"""Statuses, besides those from 500 on, that say nothing about the data."""

EXTENSION = "respcache.verifier"
FOUND = "the verifier found"
"""How the log entry of a mismatch begins."""


class VerifierExchange(Exchange):
    """The exchange of a verification. Values that its handler would take from the cache are
    computed."""


@dataclass(frozen=True, slots=True)
class ServedHit:
    """A request that was a hit, and the lookup result that it was answered with."""

    app: App
    asgi_scope: AsgiScope
    head: RequestHead
    plan: Plan
    result: LookupResult

    @property
    def memory_entry(self) -> MemoryEntry:
        """What was served."""
        assert self.result.memory_entry is not None
        return self.result.memory_entry


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One proof that a hit was wrong. It contains no bodies and no credentials.

    The digests are keyed with a secret of this process, so they only show whether two responses
    are equal.
    """

    at: str
    kind: str
    """``stale`` or ``leak``."""
    tenant: str
    module: str
    route: str
    key: str
    age_ms: int
    certificate: dict[str, Any]
    """The certificate of the entry; of a leak: that of the scope of the hit."""
    served: dict[str, Any]
    """The generation when the hit was served."""
    confirmed: dict[str, Any]
    """The generation when everything that the second execution saw had been bumped."""
    held: str
    """The digest of what was served; of a leak: ``served``."""
    found: str
    """The digest of the second execution; of a leak: what has become of the caller."""


@dataclass(slots=True)
class Verifications:
    """What the verifications of one process found."""

    verifications: int = 0
    equal: int = 0
    nondeterministic: int = 0
    stale: int = 0
    leaks: int = 0
    inconclusive: Counter[str] = field(default_factory=Counter)
    """By reason."""
    mismatches: deque[Mismatch] = field(default_factory=lambda: deque(maxlen=MAX_MISMATCHES))
    excluded_routes: set[str] = field(default_factory=set)
    """Routes that write."""
    nondeterministic_routes: set[str] = field(default_factory=set)

    def to_dict(self, tenant: str | None) -> dict[str, Any]:
        """Return them for the stats endpoint, with the mismatches of one tenant or of all."""
        mismatches = [one for one in self.mismatches if tenant in (None, one.tenant)]
        return {
            "verifications": self.verifications,
            "equal": self.equal,
            "inconclusive": dict(self.inconclusive),
            "nondeterministic": self.nondeterministic,
            "stale": self.stale,
            "leaks": self.leaks,
            "nondeterministic_routes": sorted(self.nondeterministic_routes),
            "excluded_routes": sorted(self.excluded_routes),
            "mismatches": [asdict(one) for one in mismatches],
        }


class CallLater(Protocol):
    """Calls a function after some seconds, unless the returned handle is cancelled."""

    def __call__(
        self, seconds: float, callback: Callable[[], object], /
    ) -> asyncio.TimerHandle: ...


class Inconclusive(Exception):
    """Raised by a verification that proves nothing, with the reason."""


class Verifier:
    """The verifications of one process. Each hit calls ``due``; if it is, the hit calls ``begin``.

    It has more than 15 attributes: half of them are the parts and callbacks it is given.
    """

    def __init__(
        self,
        *,
        share: float,
        resolver: Resolver,
        lookup: Lookup,
        relay: OutboxRelay | None,
        counters: Counters,
        invalidate: Callable[[Mapping[str, list[str]]], Awaitable[bool]],
        enabled: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        later: CallLater | None = None,
    ) -> None:
        self.share = share
        self.found = Verifications()
        self.countdown = self._interval = max(1, round(1 / check_share(share)))
        self._resolver = resolver
        self._lookup = lookup
        self._relay = relay
        self._counters = counters
        self._invalidate = invalidate
        self._enabled = enabled
        self.clock = clock
        self.later: CallLater = later or _call_later
        self._digest_key = secrets.token_bytes(16)
        self._started = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.rest_until = float("-inf")
        self._waited_s = 0.0
        self._logged_at = float("-inf")
        self._unlogged = 0

    # -- lifetime ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Verify hits from here on, the first one after about ``EVERY_S``."""
        self._started = True
        self._expect_after(EVERY_S)

    async def close(self) -> None:
        """Stop. A verification in progress is given up."""
        self._started = False
        if self._timer is not None:
            self._timer.cancel()
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def exclude(self, template: str) -> None:
        """Never verify this route again, because its handler writes."""
        self.found.excluded_routes.add(template)

    @property
    def busy(self) -> bool:
        """Whether a verification is in progress."""
        return self._task is not None

    def due(self) -> bool:
        """Count a hit. Return whether it must be verified."""
        self.countdown -= 1
        return self.countdown <= 0

    def begin(self, hit: ServedHit) -> None:
        """Verify a hit in the background unless the verifier is busy or resting. Does not wait."""
        self.countdown = self._interval
        if not self._started or self._task is not None or self.clock() < self.rest_until:
            return  # the timer of the last verification chooses another hit
        if hit.plan.route.template in self.found.excluded_routes:
            self._expect_after(LEAST_PAUSE_S)
            return
        self._task = asyncio.create_task(self._run(hit))

    def to_dict(self, tenant: str | None = None) -> dict[str, Any]:
        """Return the counts for the stats endpoint, with one tenant's mismatches or all."""
        return {"share": self.share, **self.found.to_dict(tenant)}

    # -- when --------------------------------------------------------------------------------------

    def _expect_after(self, seconds: float) -> None:
        """Verify the first hit after this time, if none is verified before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.later(seconds, self._expect) if self._started else None

    def _expect(self) -> None:
        self.countdown = min(self.countdown, 1)

    async def _run(self, hit: ServedHit) -> None:
        began, self._waited_s = self.clock(), 0.0
        try:
            await self._verify(hit)
        finally:
            now = self.clock()
            busy_s = now - began - self._waited_s
            pause_s = max(LEAST_PAUSE_S, busy_s * (1 / MOST_SHARE_OF_TIME - 1))
            self.rest_until = now + pause_s
            self._task = None
            self._expect_after(max(pause_s, began + EVERY_S - now))

    # -- what --------------------------------------------------------------------------------------

    async def _verify(self, hit: ServedHit) -> None:
        self.found.verifications += 1
        inconclusive = self.found.inconclusive
        try:
            async with asyncio.timeout(MOST_S):
                await self._compare(hit)
        except Inconclusive as reason:
            inconclusive[str(reason)] += 1
        except TimeoutError:
            inconclusive["slow"] += 1
        except Exception as error:
            inconclusive["failed"] += 1
            # not the message, which may contain rows
            template = hit.plan.route.template
            log.info("a verification of GET %s failed: %s", template, type(error).__name__)

    async def _compare(self, hit: ServedHit) -> None:
        scope = await self._read_scope(hit)
        if isinstance(scope, str):
            await self._suspect_leak(hit)
            return
        self._check_key(hit, scope)
        entry = hit.memory_entry.entry
        served = hit.memory_entry.represent(
            ContentCoding.identity, max_bytes=hit.plan.policy.max_body_bytes
        )
        if served is None:
            raise Inconclusive("damaged")
        held = self._digest(entry.status, entry.headers, served.body)
        if await self._execute(hit, scope) == held:
            self.found.equal += 1
        else:
            await self._suspect_stale(hit, scope, held)

    async def _suspect_stale(self, hit: ServedHit, scope: Scope, held: str) -> None:
        await self._still_served(hit)
        await self._catch_up()
        view, _ = await self._still_served(hit)
        found = [await self._execute(hit, scope) for _ in range(CONFIRMING_RUNS)]
        steady = len(set(found)) == 1 and held not in found
        if not steady:
            await self._catch_up()  # a write between the runs looks the same
        self._check_key(hit, scope)
        await self._still_served(hit)
        if not steady:
            self._note_nondeterministic(hit.plan.route.template)
            return
        self.found.stale += 1
        certificate = hit.memory_entry.entry.certificate
        self._note(_mismatch(hit, "stale", certificate, view=view, held=held, found=found[0]))
        tags = [tag for tag in hit.plan.policy.tags if tag != FLOOR]
        await self._invalidate({hit.result.scoped.tenant: tags})

    async def _suspect_leak(self, hit: ServedHit) -> None:
        await self._still_served(hit)
        await self._catch_up()
        _, owner_view = await self._still_served(hit)
        found = await self._read_scope(hit)
        if not isinstance(found, str):
            raise Inconclusive("overtaken")
        scoped = hit.result.scoped
        assert scoped.cached_scope is not None
        self.found.leaks += 1
        certificate = scoped.cached_scope.certificate
        self._note(_mismatch(hit, "leak", certificate, view=owner_view, held="served", found=found))
        await self._invalidate({scoped.owner_tenant: [FLOOR]})

    async def _read_scope(self, hit: ServedHit) -> Scope | str:
        """Resolve the caller without the scope cache, or return why the hit must not be theirs."""
        try:
            claim = self._resolver.claim(hit.head)
        except Denied:
            raise Inconclusive("credentials ended") from None
        try:
            scope = await self._resolver.scope(claim)
        except Denied:
            return "denied"
        served = hit.result.scope
        assert served is not None
        if scope.tenant != served.tenant:
            return "another tenant"
        if scope.fingerprint != served.fingerprint:
            return "other rows"
        permitted = self._resolver.permits(scope, hit.plan.policy.rule)
        return scope if permitted else "another role"

    def _check_key(self, hit: ServedHit, scope: Scope) -> None:
        """Give up if the request has another key by now: the value of ``varies_by`` changed."""
        plan = hit.plan
        key = self._lookup.key_for(
            plan.route, plan.policy, scope=scope, parameters=plan.form.parameters
        )
        if key.entry_key != hit.result.scoped.cache_key.entry_key:
            raise Inconclusive("another key")

    async def _still_served(self, hit: ServedHit) -> tuple[GenerationView, GenerationView]:
        """Read the generations of tenant and owner tenant. Give up unless the entry would still be
        served."""
        views = await self._lookup.recheck(hit.result) if self._enabled() else None
        if views is None:
            raise Inconclusive("overtaken")
        return views

    async def _catch_up(self) -> None:
        """Wait until whatever is committed now has been bumped."""
        began = self.clock()
        try:
            if self._relay is not None:
                await self._relay.caught_up()
            else:
                over = asyncio.Event()
                self.later(LEASE_S * DRIFT, over.set)
                await over.wait()
        finally:
            self._waited_s += self.clock() - began

    async def _execute(self, hit: ServedHit, scope: Scope) -> str:
        """Run the application for the request. Return the digest of its response."""
        response = _Response(hit.plan.policy.max_body_bytes)
        asgi_scope = {
            **hit.asgi_scope,
            "method": "GET",
            "state": {**hit.asgi_scope.get("state", {})},
            "extensions": {EXTENSION: {}},  # no other one: the response must pass ``response``
        }
        exchange = VerifierExchange(asgi_scope, scope=scope, reads=ReadSet(scope.tenant))
        token = current.set(exchange)
        try:
            await hit.app(asgi_scope, _EmptyBody(), response)
        finally:
            current.reset(token)
            if exchange.wrote:
                self.exclude(hit.plan.route.template)
        if exchange.wrote:
            raise Inconclusive("wrote")
        if exchange.reads is None or exchange.reads.old_snapshot:
            raise Inconclusive("old snapshot")
        if not response.complete or response.status >= 500 or response.status in PASSING_STATUS:
            raise Inconclusive("failed")
        headers = kept(response.headers)
        if hit.memory_entry.entry.negotiable:
            headers = shared(headers)
        return self._digest(response.status, headers, response.body)

    # -- results -----------------------------------------------------------------------------------

    def _note(self, mismatch: Mismatch) -> None:
        """Keep a mismatch, and log it, at most once in ``LOG_EVERY_S``."""
        self._counters.stale_served += 1
        self.found.mismatches.append(mismatch)
        now = self.clock()
        if now - self._logged_at < LOG_EVERY_S:
            self._unlogged += 1
            return
        log.error(
            "%s a %s response (%d more since the last log entry): %s",
            FOUND,
            mismatch.kind,
            self._unlogged,
            asdict(mismatch),
        )
        self._logged_at, self._unlogged = now, 0

    def _note_nondeterministic(self, template: str) -> None:
        self.found.nondeterministic += 1
        if template not in self.found.nondeterministic_routes:
            self.found.nondeterministic_routes.add(template)
            log.warning(
                "GET %s responds differently each time while nothing is written: its hits cannot "
                "be verified",
                template,
            )

    def _digest(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> str:
        if (b"content-encoding", b"gzip") in headers:
            body = body[:4] + body[8:]  # without the time of compression (RFC 1952, section 2.3)
        head = repr((status, tuple(headers))).encode()
        digest = hashlib.blake2b(head, digest_size=16, key=self._digest_key)
        digest.update(body)
        return digest.hexdigest()


def check_share(share: float) -> float:
    """Return a share of hits above 0. Raises ``ConfigurationError`` for any other number."""
    if not 0 < share <= 1:
        raise ConfigurationError(
            f"verify_share {share!r} must be a share of all hits, from 0 (none) to 1"
        )
    return share


class _EmptyBody:
    """The ASGI ``receive`` of a request without a body, whose client stays connected."""

    def __init__(self) -> None:
        self._given = False

    async def __call__(self) -> Message:
        if self._given:
            await asyncio.get_running_loop().create_future()
        self._given = True
        return {"type": "http.request", "body": b"", "more_body": False}


class _Response:
    """The ASGI ``send`` that keeps a response, up to the size that could have been stored."""

    def __init__(self, max_body_bytes: int) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self._max_body_bytes = max_body_bytes
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            part = message.get("body", b"")
            if self._size <= self._max_body_bytes:
                self._parts.append(part)
            self._size += len(part)
            self.complete = not message.get("more_body", False)


def _call_later(seconds: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, callback)


def _mismatch(
    hit: ServedHit,
    kind: str,
    certificate: Certificate,
    *,
    view: GenerationView,
    held: str,
    found: str,
) -> Mismatch:
    scoped, stored_at_ms = hit.result.scoped, hit.memory_entry.entry.stored_at_ms
    assert hit.result.view is not None
    return Mismatch(
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        kind=kind,
        tenant=scoped.tenant,
        module=hit.plan.policy.module,
        route=hit.plan.route.template,
        key=scoped.cache_key.entry_key,
        age_ms=max(0, int(time.time() * 1000) - stored_at_ms),
        certificate={
            "nonce": certificate.nonce.decode("latin-1"),
            "sequence": certificate.sequence,
        },
        served=_described(hit.result.view),
        confirmed=_described(view),
        held=held,
        found=found,
    )


def _described(view: GenerationView) -> dict[str, Any]:
    return {
        "nonce": None if view.nonce is None else view.nonce.decode("latin-1"),
        "server": view.server,
        "sequence": view.sequence,
        "bumps": dict(view.bumps),
    }
