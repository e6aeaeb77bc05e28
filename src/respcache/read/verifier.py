"""The continuous audit: a sampled share of hits is made anew in the background and compared with
what was served.

It looks for what the protocol cannot see by itself: an invalidation that was lost although every
rule was kept (triggers evaded, an outbox emptied by hand, a defect of ours), a declaration that is
too narrow (an answer that depends on something else than its tables, a fingerprint that is equal
for callers who see different rows), a scope served past its end.

A difference alone proves nothing: a write may have come between the hit and the second execution.
The certificate tells them apart. Let the entry be valid when it was served, r the second execution,
and v a view of the generations that was read under a living fence after a round that began after r
had been completed. Whatever r saw was committed before r ended, so it is in that round's snapshot,
so it was bumped before v was read. If the entry is *still* valid in v, nothing that it depends on
was bumped since its capture: so r had to give what the entry holds, and the difference is a
finding. If not, the entry was overtaken, and nothing is said. Without rounds there is a wait of one
lease in place of the round. An answer that differs from execution to execution while nothing is
bumped is *nondeterministic*, which is said once per route and is no finding.

What it costs. A hit that is not sampled: one decrement of an integer. An audit whose answers are
equal, which is nearly every one: the resolver's statements and one run of the handler, no round
trip to the store. One that differs: one round trip more, and where the entry is still valid the
wait for a round, another round trip, ``CONFIRMING_RUNS`` runs, a third. At most one is under way
per process, at most one begins in ``LEAST_PAUSE_S``, and after each there is a rest that keeps
audits below ``MOST_SHARE_OF_TIME``. The answers of users never wait for one, nothing that it makes
is stored or shared, its requests are in no figure but its own, and its failures reach nobody.

A route whose handler wrote is not audited again. Handlers can tell an audit from a request of a
user by ``scope["extensions"]["respcache.audit"]``.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from respcache.context import Exchange, ReadSet, current
from respcache.core.encoding import ContentCoding, shared
from respcache.core.entry import Entry
from respcache.core.errors import ConfigurationError, Denied
from respcache.core.generations import FLOOR, Certificate, GenerationView
from respcache.core.http_caching import kept
from respcache.core.identity import RequestHead, Resolver, Scope
from respcache.core.policy import Policy
from respcache.core.serving_lease import DRIFT, LEASE_S
from respcache.routing.table import Route
from respcache.telemetry.stats import Counters
from respcache.writes.relay import OutboxRelay

if TYPE_CHECKING:
    from respcache.middleware import App
    from respcache.read.lookup import Lookup, LookupResult
    from respcache.read.responses import Message

log = logging.getLogger("respcache")

DEFAULT_SHARE = 0.001
EVERY_S = 1.0
"""Where there are hits, one is audited about this often, however few they are."""

LEAST_PAUSE_S = 0.2
MOST_SHARE_OF_TIME = 0.1
"""By the clock on the wall, waiting for the database included: of the event loop's time it is a
fraction of that."""

MOST_S = 30.0
"""After this long an audit is given up."""

CONFIRMING_RUNS = 3
MAX_FINDINGS = 20
LOG_EVERY_S = 10.0
PASSING_STATUS = frozenset({408, 425, 429})
"""Answers, besides those from 500 on, that say nothing about the data."""


class VerifierExchange(Exchange):
    """The record of a request that the audit makes: values that its handler would take from the
    cache are made anew."""


@dataclass(frozen=True, slots=True)
class ServedHit:
    """A request and what it was answered with from the cache."""

    app: "App"
    scope: Mapping[str, Any]
    head: RequestHead
    route: Route
    policy: Policy
    parameters: Sequence[tuple[str, str, str]]
    look: "LookupResult"

    @property
    def entry(self) -> Entry:
        """What was served."""
        assert self.look.entry is not None
        return self.look.entry


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One proof that something was served which should not have been. No bodies, no credentials.

    The digests are keyed by a secret of this process: they tell answers apart, not what is in them.
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
    """Of the entry; of a leak: of the scope that the hit was served under."""
    served: dict[str, Any]
    """The generation as it was when the hit was served."""
    confirmed: dict[str, Any]
    """The generation as it was when everything that the second execution saw had been bumped."""
    held: str
    """Digest of what was served; of a leak: ``served``."""
    found: str
    """Digest of what the handler answers; of a leak: what the caller is by now."""


class CallLater(Protocol):
    """Calls something after some seconds, unless what it returns is cancelled."""

    def __call__(
        self, seconds: float, callback: Callable[[], object], /
    ) -> asyncio.TimerHandle: ...


class Inconclusive(Exception):
    """An audit that proves nothing, and why."""


class Verifier:
    """The audits of one process. Every hit asks whether one is ``due``; the one that hears yes
    calls ``begin``."""

    def __init__(
        self,
        *,
        share: float,
        resolver: Resolver,
        lookup: "Lookup",
        relay: OutboxRelay | None,
        stats: Counters,
        invalidate: Callable[[Mapping[str, list[str]]], Awaitable[bool]],
        enabled: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        later: CallLater | None = None,
    ) -> None:
        self.share = share
        self.audits = 0
        self.equal = 0
        self.nondeterministic = 0
        self.stale = 0
        self.leaks = 0
        self.inconclusive: Counter[str] = Counter()
        self.findings: deque[Mismatch] = deque(maxlen=MAX_FINDINGS)
        self._interval = max(1, round(1 / check_share(share)))
        self.countdown = self._interval
        self._resolver = resolver
        self._lookup = lookup
        self._relay = relay
        self._stats = stats
        self._invalidate = invalidate
        self._enabled = enabled
        self._clock = clock
        self._later: CallLater = later or _call_later
        self._digest_key = secrets.token_bytes(16)
        self._open = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rest_until = float("-inf")
        self._waited_s = 0.0
        self._excluded: set[str] = set()  # templates of routes that write
        # templates of routes whose answers were found to differ by themselves
        self._unsteady: set[str] = set()
        self._said_at = float("-inf")
        self._unsaid = 0

    # -- lifetime ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Audit hits from here on, the first one after about ``EVERY_S``."""
        self._open = True
        self._expect_after(EVERY_S)

    async def close(self) -> None:
        """Stop; an audit under way is given up."""
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def exclude(self, template: str) -> None:
        """Never audit this route: its handler writes."""
        self._excluded.add(template)

    def due(self) -> bool:
        """Count a hit; whether it is the one to be audited."""
        self.countdown -= 1
        return self.countdown <= 0

    def begin(self, hit: ServedHit) -> None:
        """Audit a hit in the background, unless it is not the time. Does no waiting."""
        self.countdown = self._interval
        if not self._open or self._task is not None or self._clock() < self._rest_until:
            return  # the timer that the last audit has set, or sets, makes another hit the next one
        if hit.route.template in self._excluded:
            self._expect_after(LEAST_PAUSE_S)
            return
        self._task = asyncio.create_task(self._run(hit))

    def to_dict(self, tenant: str | None = None) -> dict[str, Any]:
        """Return the figures of the stats endpoint; of the findings, those of one tenant or of
        all."""
        return {
            "share": self.share,
            "audits": self.audits,
            "equal": self.equal,
            "inconclusive": dict(self.inconclusive),
            "nondeterministic": self.nondeterministic,
            "stale": self.stale,
            "leaks": self.leaks,
            "nondeterministic_routes": sorted(self._unsteady),
            "excluded_routes": sorted(self._excluded),
            "findings": [
                asdict(finding) for finding in self.findings if tenant in (None, finding.tenant)
            ],
        }

    # -- when --------------------------------------------------------------------------------------

    def _expect_after(self, seconds: float) -> None:
        """Make the first hit after some time the next one to be audited, if none is before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._later(seconds, self._expect) if self._open else None

    def _expect(self) -> None:
        self.countdown = min(self.countdown, 1)

    async def _run(self, hit: ServedHit) -> None:
        began, self._waited_s = self._clock(), 0.0
        try:
            await self._verifier(hit)
        finally:
            now = self._clock()
            pause_s = max(
                LEAST_PAUSE_S, (now - began - self._waited_s) * (1 / MOST_SHARE_OF_TIME - 1)
            )
            self._rest_until = now + pause_s
            self._task = None
            self._expect_after(max(pause_s, began + EVERY_S - now))

    # -- what --------------------------------------------------------------------------------------

    async def _verifier(self, hit: ServedHit) -> None:
        self.audits += 1
        try:
            async with asyncio.timeout(MOST_S):
                await self._compare(hit)
        except Inconclusive as why:
            self.inconclusive[str(why)] += 1
        except TimeoutError:
            self.inconclusive["slow"] += 1
        except Exception as error:
            self.inconclusive["failed"] += 1
            # its text may hold rows
            log.info("an audit of GET %s failed: %s", hit.route.template, type(error).__name__)

    async def _compare(self, hit: ServedHit) -> None:
        scope = await self._scope_of(hit)
        if isinstance(scope, str):
            await self._suspect_leak(hit)
            return
        self._check_target(hit, scope)
        assert hit.look.held is not None
        served = hit.look.held.make(ContentCoding.identity, max_bytes=hit.policy.max_body_bytes)
        if served is None:
            raise Inconclusive("damaged")
        held = self._digest(hit.entry.status, hit.entry.headers, served.body)
        if await self._execute(hit, scope) == held:
            self.equal += 1
        else:
            await self._suspect_stale(hit, scope, held)

    async def _suspect_stale(self, hit: ServedHit, scope: Scope, held: str) -> None:
        await self._still_served(hit)
        await self._caught_up()
        view, _ = await self._still_served(hit)
        found = [await self._execute(hit, scope) for _ in range(CONFIRMING_RUNS)]
        steady = len(set(found)) == 1 and held not in found
        if not steady:
            await self._caught_up()  # a write that came between them looks the same
        self._check_target(hit, scope)
        await self._still_served(hit)
        if not steady:
            self._note_unsteady(hit)
            return
        self.stale += 1
        self._note(hit, "stale", hit.entry.certificate, view, held, found[0])
        await self._invalidate(
            {hit.look.scoped.tenant: [tag for tag in hit.policy.tags if tag != FLOOR]}
        )

    async def _suspect_leak(self, hit: ServedHit) -> None:
        await self._still_served(hit)
        await self._caught_up()
        _, owner_tenant = await self._still_served(hit)
        found = await self._scope_of(hit)
        if not isinstance(found, str):
            raise Inconclusive("overtaken")
        known = hit.look.scoped.known
        assert known is not None
        self.leaks += 1
        self._note(hit, "leak", known.certificate, owner_tenant, "served", found)
        await self._invalidate({hit.look.scoped.owner_tenant: [FLOOR]})

    async def _scope_of(self, hit: ServedHit) -> Scope | str:
        """Resolve the caller anew, past the memo; where he may not see what was served, say why."""
        try:
            claim = self._resolver.claim(hit.head)
        except Denied:
            raise Inconclusive("credentials ended") from None
        try:
            scope = await self._resolver.scope(claim)
        except Denied:
            return "denied"
        served = hit.look.scope
        assert served is not None
        if scope.tenant != served.tenant:
            return "another tenant"
        if scope.fingerprint != served.fingerprint:
            return "other rows"
        return scope if self._resolver.permits(scope, hit.policy.rule) else "another role"

    def _check_target(self, hit: ServedHit, scope: Scope) -> None:
        """Give up when the request means another key by now: ``varies_by`` went on, a day has
        ended."""
        cache_key = self._lookup.key_for(
            hit.route, hit.policy, scope=scope, parameters=hit.parameters
        )
        if cache_key.entry_key != hit.look.cache_key.entry_key:
            raise Inconclusive("another key")

    async def _still_served(self, hit: ServedHit) -> tuple[GenerationView, GenerationView]:
        """Read the generations of tenant and scope; give up unless what was served would be served
        in this view too."""
        views = await self._lookup.review(hit.look, hit.policy) if self._enabled() else None
        if views is None:
            raise Inconclusive("overtaken")
        return views

    async def _caught_up(self) -> None:
        """Wait until whatever is committed now has been bumped."""
        began = self._clock()
        try:
            if self._relay is not None:
                await self._relay.caught_up()
            else:
                over = asyncio.Event()
                self._later(LEASE_S * DRIFT, over.set)
                await over.wait()
        finally:
            self._waited_s += self._clock() - began

    async def _execute(self, hit: ServedHit, scope: Scope) -> str:
        """Run the application for the request and return the digest of its answer."""
        exchange, answer = (
            VerifierExchange(scope=scope, reads=ReadSet(scope.tenant)),
            _Answer(hit.policy.max_body_bytes),
        )
        asgi_scope = {
            **hit.scope,
            "method": "GET",
            "state": {**hit.scope.get("state", {})},
            "extensions": {"respcache.audit": {}},  # and no way of sending that we would not see
        }
        token = current.set(exchange)
        try:
            await hit.app(asgi_scope, _EmptyBody(), answer)
        finally:
            current.reset(token)
            if exchange.wrote:
                self.exclude(hit.route.template)
        if exchange.wrote:
            raise Inconclusive("wrote")
        if exchange.reads is None or exchange.reads.old_snapshot:
            raise Inconclusive("old snapshot")
        if not answer.complete or answer.status >= 500 or answer.status in PASSING_STATUS:
            raise Inconclusive("failed")
        headers = kept(answer.headers)
        return self._digest(
            answer.status, shared(headers) if hit.entry.negotiable else headers, answer.body
        )

    # -- findings ----------------------------------------------------------------------------------

    def _note(
        self,
        hit: ServedHit,
        kind: str,
        certificate: Certificate,
        view: GenerationView,
        held: str,
        found: str,
    ) -> None:
        """Keep a finding and say it."""
        self._stats.stale_served += 1
        entry, look = hit.entry, hit.look
        finding = Mismatch(
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            kind=kind,
            tenant=look.scoped.tenant,
            module=hit.policy.module,
            route=hit.route.template,
            key=look.cache_key.entry_key,
            age_ms=max(0, int(time.time() * 1000) - entry.stored_at_ms),
            certificate={
                "nonce": certificate.nonce.decode("latin-1"),
                "sequence": certificate.sequence,
            },
            served=_described(look.view),
            confirmed=_described(view),
            held=held,
            found=found,
        )
        self.findings.append(finding)
        now = self._clock()
        if now - self._said_at < LOG_EVERY_S:
            self._unsaid += 1
            return
        log.error(
            "the audit found a %s answer (%d more since the last one said): %s",
            kind,
            self._unsaid,
            asdict(finding),
        )
        self._said_at, self._unsaid = now, 0

    def _note_unsteady(self, hit: ServedHit) -> None:
        self.nondeterministic += 1
        template = hit.route.template
        if template not in self._unsteady:
            self._unsteady.add(template)
            log.warning(
                "GET %s answers differently each time while nothing is written: its hits cannot "
                "be audited",
                template,
            )

    def _digest(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> str:
        if (b"content-encoding", b"gzip") in headers:
            # RFC 1952, section 2.3: in between stands when it was compressed
            body = body[:4] + body[8:]
        made = hashlib.blake2b(
            repr((status, tuple(headers))).encode(), digest_size=16, key=self._digest_key
        )
        made.update(body)
        return made.hexdigest()


def check_share(share: float) -> float:
    """Return a share of hits above 0. Raises ``ConfigurationError`` for any other number."""
    if not 0 < share <= 1:
        raise ConfigurationError(
            f"audit_share {share!r} must be a share of all hits, from 0 (no audit) to 1"
        )
    return share


class _EmptyBody:
    """The ASGI ``receive`` of a request without a body, whose client does not go away."""

    def __init__(self) -> None:
        self._given = False

    async def __call__(self) -> "Message":
        if self._given:
            await asyncio.get_running_loop().create_future()
        self._given = True
        return {"type": "http.request", "body": b"", "more_body": False}


class _Answer:
    """The ASGI ``send`` that keeps an answer, up to the size that could have been stored."""

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

    async def __call__(self, message: "Message") -> None:
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


def _described(view: GenerationView) -> dict[str, Any]:
    return {
        "nonce": None if view.nonce is None else view.nonce.decode("latin-1"),
        "server": view.server,
        "sequence": view.sequence,
        "bumps": dict(view.bumps),
    }
