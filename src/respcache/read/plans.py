"""What a request comes to, worked out once and remembered by the very bytes it came as.

A *plan* holds the route, the canonical form, the verified claim, the scope, and the keys that
follow from them. Requests that agree in path, query string and every header that any of these may
depend on have the same plan, so a hit neither routes nor parses nor verifies a token again. What is
remembered proves nothing: a scope is judged in the view of every request (or of the bound, at level
``bounded``), like the entry itself; a token's end is looked at every time; and after ``MAX_AGE_S``
everything is worked out anew, for what a resolver knows by other means than its tables (a list of
revoked tokens in memory).

Only for resolvers that say which headers they look at (``Resolver.headers``).
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from respcache.core import tokens
from respcache.core.encoding import ContentCoding
from respcache.core.generations import GenerationView
from respcache.core.identity import Claim, RequestHead
from respcache.core.policy import FOREVER, Canonical, Policy
from respcache.core.serving_lease import ServingLease
from respcache.read.fill_locks import CacheKey
from respcache.read.memory import MemoryEntry, Representation
from respcache.read.s3fifo import S3Fifo, Slot
from respcache.read.scopes import CachedScope
from respcache.read.views import Tags, ViewBatch
from respcache.routing.table import Route
from respcache.telemetry.stats import RouteCounters

log = logging.getLogger("respcache")

MAX_AGE_S = 60.0
MAX_PARTS = 4096
MAX_SHARED_BYTES = 4096
"""Of keys whose parts are shared with others: so all parts take no more than ``PLAN_CACHE_BYTES`` either,
whatever clients send."""
PLAN_CACHE_BYTES = 16 * 1024 * 1024
PLAN_BYTES = 2048
"""What a plan takes besides the bytes it is remembered by, roughly."""

ALWAYS = frozenset({b"accept-encoding"})

UNSEEN = frozenset({"client", "extensions", "http_version", "method", "scheme", "server"})
"""Of a scope (ASGI 3.0): what differs between requests that have one plan."""

Key = tuple[Any, ...]


class ScopedPlan:
    """Where a request leads for a scope: what an answer is stored under, and judged by.

    ``home`` is the tenant whose generation covers the scope; ``wanted`` is every generation that
    counts, with its tags, and ``tags`` are those of the one, if it is one alone. Never changed: a
    request takes it once and keeps it, whatever others make of the plan meanwhile. Only what was
    found out of it moves on: ``proven``, the last view in which the scope was judged to be valid,
    ``covered_by``, the set of watched tables by which it was found covered, and ``grant``, the last
    proof of a hit.
    """

    __slots__ = (
        "cache_key",
        "counters",
        "covered_by",
        "known",
        "max_view_age_s",
        "needs_no_view",
        "owner_tenant",
        "policy",
        "proof",
        "proven",
        "tags",
        "tenant",
        "vary_value",
        "wanted",
    )  # fmt: skip

    def __init__(
        self,
        tenant: str,
        cache_key: CacheKey,
        policy: Policy,
        *,
        counters: RouteCounters,
        known: CachedScope | None = None,
        owner_tenant: str = "",
        wanted: Sequence[tuple[str, Sequence[str]]] = (),
        vary_value: str | None = None,
        max_view_age_s: float = 0.0,
    ) -> None:
        self.tenant = tenant
        self.cache_key = cache_key
        self.policy = policy
        self.counters = counters
        self.known = known
        self.owner_tenant = owner_tenant
        self.wanted = wanted or [(cache_key.generation_key, cache_key.tags)]
        self.tags: Tags = frozenset(self.wanted[0][1]) if len(self.wanted) == 1 else frozenset()
        self.vary_value = vary_value
        self.max_view_age_s = max_view_age_s
        # what is held may be used all its time to live, whatever can be learnt meanwhile
        self.needs_no_view = max_view_age_s == FOREVER
        self.proven: GenerationView | None = None
        self.covered_by: object = None
        self.proof: HitProof | None = None

    def strict(self) -> "ScopedPlan":
        """Return one like it whose hits are judged in views that are younger than the request,
        whatever its level."""
        other = copy.copy(self)
        other.max_view_age_s, other.needs_no_view = 0.0, False
        other.proof = None
        return other


class HitProof:
    """A hit that was proven (``Lookup.prove``), and everything that the proof rests on, to be
    compared instead of proven again.

    It holds before ``until`` (by the cache's clock: the first end of entry, fence, and of a view
    that may be used again), while the entry is in its ``slot``, the fence and the set of watched
    tables are those of the proof, and the view is the very same object: the one that ``group`` has,
    or at level ``strict`` the one that is read for the request. ``logged``: whether hits are to be
    logged; a level that is set later is followed when the next proof is made, within a minute.
    """

    __slots__ = (
        "group",
        "held",
        "lease",
        "logged",
        "representation",
        "slot",
        "tables",
        "until",
        "view",
    )

    def __init__(
        self,
        held: MemoryEntry,
        representation: Representation,
        view: GenerationView | None,
        slot: Slot[MemoryEntry] | None,
        group: ViewBatch,
        lease: ServingLease | None,
    ) -> None:
        self.held = held
        self.representation = representation
        self.view = view
        self.slot = slot
        self.group = group
        self.lease = lease
        self.tables: object = None
        self.logged = log.isEnabledFor(logging.DEBUG)
        self.until = held.expires_at if lease is None else min(held.expires_at, lease.until)


class Plan:
    """One kind of request. ``claim``, ``known`` and ``aim`` are None until they are found out."""

    __slots__ = (
        "claim",
        "coding",
        "expires_at",
        "form",
        "known",
        "path",
        "policy",
        "route",
        "scoped",
        "version",
    )

    def __init__(
        self,
        route: Route,
        policy: Policy,
        path: Mapping[str, str],
        form: Canonical,
        *,
        coding: ContentCoding,
        version: int = 0,
    ) -> None:
        self.route = route
        self.coding = coding
        self.version = version
        self.policy = policy
        self.path = path
        self.form = form
        self.claim: Claim | None = None
        self.expires_at = float("-inf")
        self.known: CachedScope | None = None
        self.scoped: ScopedPlan | None = None


class PlanCache:
    """The plans of one process, bounded in bytes."""

    def __init__(
        self, claimed: Iterable[bytes], others: Iterable[bytes], *, clock: Callable[[], float]
    ) -> None:
        self.version = 0
        """Changes when all plans are forgotten: one that was begun before is of no use after."""
        self._claimed = frozenset(claimed)
        self.wanted = self._claimed.union(others, ALWAYS, (tokens.HEADER,))
        self._clock = clock
        self._plans: S3Fifo[Key, Plan] = S3Fifo(PLAN_CACHE_BYTES)
        # one object for all equal parts of keys: paths and tokens are the same in many
        self._parts: dict[Any, Any] = {}
        self.get = self._plans.get
        """Returns the plan of such requests, which may have ended, or None."""

    def __len__(self) -> int:
        return len(self._plans)

    def key(self, scope: Mapping[str, Any]) -> Key:
        """Return everything of a request that its plan depends on."""
        wanted = self.wanted
        seen = [pair for pair in scope["headers"] if pair[0] in wanted]
        if seen and type(seen[0]) is not tuple:  # servers may send lists
            seen = [(name, value) for name, value in seen]
        return (scope["path"], scope["query_string"], scope.get("root_path"), *seen)

    def without_token(self, key: Key) -> Key:
        """Return the key of the same request without a token. Plans are remembered by such keys
        alone: a request with a token is not recalled at once, and one that is need not be asked for
        a token."""
        return (*key[:3], *(pair for pair in key[3:] if pair[0] != tokens.HEADER))

    def narrowed(self, scope: Mapping[str, Any], path: Mapping[str, str]) -> RequestHead:
        """Return of a request what a resolver may look at: a header that it did not name is not
        there, nor what belongs to the connection, instead of being missed when the request is
        recognised."""
        headers = [(name, value) for name, value in scope["headers"] if name in self._claimed]
        kept = {name: value for name, value in scope.items() if name not in UNSEEN}
        return RequestHead({**kept, "headers": headers}, path)

    def recall(self, key: Key, now: float) -> Plan | None:
        """Return the plan of such requests, if there is one that has not ended."""
        plan = self._plans.get(key)
        # one that has ended keeps its place for the next
        return None if plan is None or now >= plan.expires_at else plan

    def peek(self, key: Key, now: float) -> Plan | None:
        """Return what ``recall`` would, without using it."""
        plan = self._plans.peek(key)
        return None if plan is None or now >= plan.expires_at else plan

    def plans(self) -> list[Plan]:
        """Return all plans that are kept, without using them."""
        return self._plans.values()

    def remember(self, key: Key, plan: Plan) -> None:
        """Keep a plan whose claim was verified now."""
        assert plan.claim is not None
        if plan.version != self.version:
            return
        lasts_s = MAX_AGE_S
        if plan.claim.expires_at is not None:
            lasts_s = min(lasts_s, plan.claim.expires_at - time.time())
        plan.expires_at = self._clock() + lasts_s
        key_bytes = sum(map(len, (*key[:2], *(value for _, value in key[3:]))))
        if len(self._parts) > MAX_PARTS:
            self._parts.clear()
        if key_bytes <= MAX_SHARED_BYTES:
            key = tuple(self._parts.setdefault(part, part) for part in key)
        self._plans.put(key, plan, size_bytes=PLAN_BYTES + key_bytes)

    def forget(self) -> None:
        """Drop all plans, those under way too."""
        self.version += 1
        self._plans.clear()
        self._parts.clear()
