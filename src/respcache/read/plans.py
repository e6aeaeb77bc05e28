"""Plans: what a request resolves to, computed once and looked up by the request's bytes.

A *plan* holds the route, the canonical form, the verified claim, the caller's scope, and the keys
that follow from them. Requests have the same plan if they agree in path, query string and every
header that any of these depends on. So a hit does no routing, no parsing and no verification.

A plan proves nothing. The scope is judged in the view of every request (or within the bound, at
level ``bounded``), like the entry. A token's expiry is checked on every request. After
``MAX_AGE_S`` everything is computed again, for facts that a resolver knows by other means than its
tables (a list of revoked tokens in memory).

Only for resolvers that name the headers they read (``Resolver.headers``).
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from respcache.core import tokens
from respcache.core.encoding import ContentCoding
from respcache.core.generations import GenerationView
from respcache.core.identity import Claim, RequestHead
from respcache.core.keys import CacheKey
from respcache.core.policy import FOREVER, Canonical, Policy
from respcache.core.serving_lease import ServingLease
from respcache.read.memory import MemoryEntry, Representation
from respcache.read.s3fifo import MAX_FREQUENCY, S3Fifo, Slot
from respcache.read.scopes import CachedScope
from respcache.read.views import Tags, ViewBatch
from respcache.routing.table import Route
from respcache.telemetry.stats import RouteCounters

MAX_AGE_S = 60.0
MAX_PARTS = 4096
MAX_SHARED_BYTES = 4096
"""Parts of keys up to this size are shared between keys. With ``MAX_PARTS`` this bounds all shared
parts by ``PLAN_CACHE_BYTES``, whatever clients send."""
PLAN_CACHE_BYTES = 16 * 1024 * 1024
PLAN_BYTES = 2048
"""The approximate size of a plan without the bytes of its key."""

ALWAYS = frozenset({b"accept-encoding"})

UNSEEN = frozenset({"client", "extensions", "http_version", "method", "scheme", "server"})
"""Keys of an ASGI scope that are hidden from resolvers: requests with one plan may differ in
them."""

Generations = Sequence[tuple[str, Sequence[str]]]
"""Generation keys, each with the tags to read."""

PlanKey = tuple[Any, ...]


class ScopedPlan:
    """A plan bound to one caller's scope: what a response is stored under, and judged by.

    ``generations`` are all that count, with their tags: the tenant's, and the owner tenant's if
    that is another one. ``tags`` are those of the one generation if there is only one. A scoped
    plan never changes, apart from ``proof``, the last proof of a hit: a request keeps the one that
    it started with, whatever becomes of the plan meanwhile. ``needs_view`` is False if an entry may
    be used for its whole lifetime even if no view can be read.
    """

    __slots__ = (
        "cache_key",
        "cached_scope",
        "coding",
        "counters",
        "generations",
        "max_view_age_s",
        "needs_view",
        "owner_tenant",
        "policy",
        "proof",
        "tags",
        "tenant",
        "vary_value",
    )

    def __init__(
        self,
        tenant: str,
        cache_key: CacheKey,
        policy: Policy,
        *,
        counters: RouteCounters,
        cached_scope: CachedScope | None = None,
        owner_tenant: str = "",
        generations: Generations = (),
        vary_value: str | None = None,
        max_view_age_s: float = 0.0,
        coding: ContentCoding = ContentCoding.identity,
    ) -> None:
        self.tenant = tenant
        self.cache_key = cache_key
        self.policy = policy
        self.counters = counters
        self.cached_scope = cached_scope
        self.owner_tenant = owner_tenant or tenant
        self.generations = generations or [(cache_key.generation_key, cache_key.tags)]
        single = len(self.generations) == 1
        self.tags: Tags = frozenset(self.generations[0][1]) if single else frozenset()
        self.vary_value = vary_value
        self.max_view_age_s = max_view_age_s
        self.needs_view = max_view_age_s != FOREVER
        self.coding = coding
        self.proof: HitProof | None = None

    def strict(self) -> "ScopedPlan":
        """Return a copy whose hits need a view that is read after the request began."""
        other = copy.copy(self)
        other.max_view_age_s, other.needs_view = 0.0, True
        other.proof = None
        return other


class HitProof:
    """A hit that was decided, and everything it rests on (``proofs.py``).

    It stands before ``until``, in seconds of the cache's clock: the first end of the entry, of the
    serving lease, and of a view that may be used again. Until then it stands while its ``slot``
    still holds the entry, the serving lease and the set of watched ``tables`` are the same, and the
    view is the same object: the one that ``batch`` has, or at level ``strict`` the one that was
    read for the request.
    """

    __slots__ = (
        "batch",
        "lease",
        "memory_entry",
        "representation",
        "slot",
        "tables",
        "until",
        "view",
    )

    def __init__(
        self,
        memory_entry: MemoryEntry,
        representation: Representation,
        *,
        view: GenerationView | None,
        slot: Slot[MemoryEntry] | None,
        batch: ViewBatch,
        lease: ServingLease | None,
        tables: object,
        until: float,
    ) -> None:
        self.memory_entry = memory_entry
        self.representation = representation
        self.view = view
        self.slot = slot
        self.batch = batch
        self.lease = lease
        self.tables = tables
        self.until = until

    def count_use(self) -> None:
        """Count a use of the entry for the near cache's eviction."""
        slot = self.slot
        if slot is not None and slot.frequency < MAX_FREQUENCY:
            slot.frequency += 1


class Plan:
    """The resolved form of a request. Attributes that may be None are not known yet."""

    __slots__ = (
        "cached_scope",
        "claim",
        "coding",
        "expires_at",
        "form",
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
        *,
        form: Canonical,
        coding: ContentCoding,
        version: int = 0,
    ) -> None:
        self.route = route
        self.policy = policy
        self.path = path
        self.form = form
        self.coding = coding
        self.version = version
        self.claim: Claim | None = None
        self.expires_at = float("-inf")
        self.cached_scope: CachedScope | None = None
        self.scoped: ScopedPlan | None = None


class PlanCache:
    """The plans of one process, bounded in bytes."""

    def __init__(
        self,
        claim_headers: Iterable[bytes],
        key_headers: Iterable[bytes],
        *,
        clock: Callable[[], float],
    ) -> None:
        self.version = 0
        """Changes when all plans are dropped. A plan of an older version is not stored."""
        self._claim_headers = frozenset(claim_headers)
        self.headers = self._claim_headers.union(key_headers, ALWAYS, (tokens.HEADER,))
        self._clock = clock
        self._plans: S3Fifo[PlanKey, Plan] = S3Fifo(PLAN_CACHE_BYTES)
        self._parts: dict[Any, Any] = {}  # equal paths and tokens of many keys are one object

    def __len__(self) -> int:
        return len(self._plans)

    def key(self, asgi_scope: Mapping[str, Any]) -> PlanKey:
        """Return everything in a request that its plan depends on."""
        headers = self.headers
        seen = [pair for pair in asgi_scope["headers"] if pair[0] in headers]
        if seen and type(seen[0]) is not tuple:  # servers may send lists
            seen = [(name, value) for name, value in seen]
        return (asgi_scope["path"], asgi_scope["query_string"], asgi_scope.get("root_path"), *seen)

    def without_token(self, key: PlanKey) -> PlanKey:
        """Return the key of the same request without a consistency token.

        Plans are stored under such keys only. So a request whose full key has a plan brings no
        token.
        """
        return (*key[:3], *(pair for pair in key[3:] if pair[0] != tokens.HEADER))

    def resolver_head(self, asgi_scope: Mapping[str, Any], path: Mapping[str, str]) -> RequestHead:
        """Return the part of a request that a resolver may read.

        A header that the resolver did not name is absent, and so are facts about the connection.
        Otherwise two requests with the same plan could have different claims.
        """
        claim_headers = self._claim_headers
        headers = [(name, value) for name, value in asgi_scope["headers"] if name in claim_headers]
        kept = {name: value for name, value in asgi_scope.items() if name not in UNSEEN}
        return RequestHead({**kept, "headers": headers}, path)

    def get(self, key: PlanKey, now: float) -> Plan | None:
        """Return the plan of a key unless it has expired, and count a use."""
        plan = self._plans.get(key)
        return plan if plan is not None and now < plan.expires_at else None

    def peek(self, key: PlanKey, now: float) -> Plan | None:
        """Return what ``get`` would return, without counting a use."""
        plan = self._plans.peek(key)
        return plan if plan is not None and now < plan.expires_at else None

    def plans(self) -> list[Plan]:
        """Return all plans, without counting uses."""
        return self._plans.values()

    def put(self, key: PlanKey, plan: Plan) -> None:
        """Store a plan whose claim was verified now."""
        assert plan.claim is not None
        if plan.version != self.version:
            return
        lifetime_s = MAX_AGE_S
        if plan.claim.expires_at is not None:
            lifetime_s = min(lifetime_s, plan.claim.expires_at - time.time())
        plan.expires_at = self._clock() + lifetime_s
        key_bytes = sum(map(len, (*key[:2], *(value for _, value in key[3:]))))
        if len(self._parts) > MAX_PARTS:
            self._parts.clear()
        if key_bytes <= MAX_SHARED_BYTES:
            key = tuple(self._parts.setdefault(part, part) for part in key)
        self._plans.put(key, plan, size_bytes=PLAN_BYTES + key_bytes)

    def clear(self) -> None:
        """Drop all plans, and those that are being made."""
        self.version += 1
        self._plans.clear()
        self._parts.clear()
