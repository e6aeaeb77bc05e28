"""The counters of this process: plain integers that exporters read and that are never reset.

Events are counted per tenant and route (``RouteCounters``). Durations are kept per route
(``RouteTimes``), all tenants together. Every miss is timed, and one hit in ``SAMPLED``, from the
request's arrival at the middleware until the head of its response leaves it.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

MAX_COUNTERS = 50_000
"""Pairs of tenant and route with counters of their own, about 300 bytes each. Later pairs are
counted under ``OTHER``."""

OTHER = "~other"
"""Requests without a tenant, and tenants beyond the bound. No tenant can have this name."""

VALUE = "value:"
"""The prefix of the route of values (``get_or_set``), which are named by their module."""

SAMPLED = 64
"""One hit in this many is timed. A power of two."""

SAMPLE_MASK = SAMPLED - 1

BOUNDS_S = (
    25e-6,
    50e-6,
    100e-6,
    250e-6,
    500e-6,
    1e-3,
    2.5e-3,
    5e-3,
    10e-3,
    25e-3,
    50e-3,
    100e-3,
    250e-3,
    500e-3,
    1.0,
    2.5,
    5.0,
    10.0,
)
"""The inclusive upper bounds of a histogram's buckets, in seconds. One more holds the rest."""

_EMPTY: Mapping[str, int] = Counter()


class Histogram(msgspec.Struct):
    """Durations: their number per bucket of ``BOUNDS_S``, and their sum in seconds."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """The number of durations."""
        return sum(self.counts)

    @property
    def mean_s(self) -> float | None:
        """The mean in seconds; None if there are none."""
        count = self.count
        return self.seconds / count if count else None

    def observe(self, seconds: float) -> None:
        """Add one duration."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.seconds += seconds

    def add(self, other: "Histogram") -> None:
        """Add the other's to these."""
        self.counts = [
            mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.seconds += other.seconds

    def quantile(self, share: float) -> float | None:
        """Return the estimated quantile for a share from 0 to 1, in seconds, or None.

        Durations are taken to be spread evenly within a bucket. Those above the last bound count
        as that bound.
        """
        rest = share * self.count
        for position, count in enumerate(self.counts):
            if count and rest <= count:
                low = BOUNDS_S[position - 1] if position else 0.0
                high = BOUNDS_S[min(position, len(BOUNDS_S) - 1)]
                return low + (high - low) * max(0.0, rest) / count
            rest -= count
        return None


class RouteTimes(msgspec.Struct):
    """The durations of one route, for all tenants."""

    hits: Histogram = msgspec.field(default_factory=Histogram)
    """Of one hit in ``SAMPLED``."""
    misses: Histogram = msgspec.field(default_factory=Histogram)
    """Of every miss that was answered."""
    fill_s: float = 0.0
    """The total duration of the fills that were stored: their handlers, with the database."""
    saved_s: float = 0.0
    """The estimated duration of all hits had they been fills, from the sampled ones."""

    def add(self, other: "RouteTimes") -> None:
        """Add the other's to these."""
        self.hits.add(other.hits)
        self.misses.add(other.misses)
        self.fill_s += other.fill_s
        self.saved_s += other.saved_s

    def to_dict(self) -> dict[str, Any]:
        """Return the estimates for the stats endpoint, in milliseconds and seconds."""
        quantiles: dict[str, Any] = {
            f"{name}_{label}_ms": None
            if (seconds := taken.quantile(share)) is None
            else round(seconds * 1000, 3)
            for name, taken in (("hit", self.hits), ("miss", self.misses))
            for label, share in (("p50", 0.5), ("p95", 0.95))
        }
        return {**quantiles, "fill_s": round(self.fill_s, 3), "saved_s": round(self.saved_s, 3)}


class Totals(msgspec.Struct):
    """Sums of what happened to requests and writes."""

    hits: int = 0
    misses: int = 0
    collapsed: int = 0
    stores: int = 0
    invalidations: int = 0
    bytes_served: int = 0
    bytes_stored: int = 0
    bypasses: dict[str, int] = msgspec.field(default_factory=dict)
    """By the reason in ``Cache-Status``."""
    refusals: dict[str, int] = msgspec.field(default_factory=dict)
    """Responses that were not stored, by reason."""

    @property
    def requests(self) -> int:
        """All requests of cached routes."""
        return self.hits + self.misses + self.bypassed

    @property
    def bypassed(self) -> int:
        """All bypasses."""
        return sum(self.bypasses.values())

    @property
    def refused(self) -> int:
        """All refusals."""
        return sum(self.refusals.values())

    @property
    def hit_ratio(self) -> float | None:
        """Hits per lookup; None before the first."""
        lookups = self.hits + self.misses
        return round(self.hits / lookups, 4) if lookups else None

    def add(self, other: "Totals | RouteCounters") -> None:
        """Add the other's to these."""
        self.hits += other.hits
        self.misses += other.misses
        self.collapsed += other.collapsed
        self.stores += other.stores
        self.invalidations += other.invalidations
        self.bytes_served += other.bytes_served
        self.bytes_stored += other.bytes_stored
        add_counts(self.bypasses, other.bypasses)
        add_counts(self.refusals, other.refusals)

    def to_dict(self) -> dict[str, Any]:
        """Return the counters under the names of the stats endpoint."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_ratio": self.hit_ratio,
            "collapsed": self.collapsed,
            "bypasses": dict(sorted(self.bypasses.items())),
            "stores": self.stores,
            "stores_refused": dict(sorted(self.refusals.items())),
            "invalidations": self.invalidations,
            "bytes_served": self.bytes_served,
            "bytes_stored": self.bytes_stored,
        }


def add_counts(total: dict[str, int], counts: Mapping[str, int]) -> None:
    """Add these counts to a total, by name."""
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


class RouteCounters:
    """The live counters of one route of one tenant; or, without ``route``, of a module's writes.

    ``phase`` chooses the hits that are sampled. It differs between tenants, so that one hit in
    ``SAMPLED`` is sampled even if each tenant has few.
    """

    __slots__ = (
        "bypassed",
        "bytes_served",
        "bytes_stored",
        "collapsed",
        "hits",
        "invalidations",
        "key",
        "misses",
        "module",
        "phase",
        "refused",
        "route",
        "stores",
        "times",
    )

    def __init__(self, module: str, route: str, times: RouteTimes, *, phase: int = 0) -> None:
        self.key = route or f"~{module}"
        self.module = module
        self.route = route
        self.times = times
        self.phase = phase
        self.hits = 0
        self.misses = 0
        self.collapsed = 0
        self.stores = 0
        self.invalidations = 0
        self.bytes_served = 0
        self.bytes_stored = 0
        # by reason; created by the first one, because most routes never have any
        self.bypassed: Counter[str] | None = None
        self.refused: Counter[str] | None = None

    @property
    def bypasses(self) -> Mapping[str, int]:
        """Read-only, by reason."""
        return self.bypassed or _EMPTY

    @property
    def refusals(self) -> Mapping[str, int]:
        """Read-only, by reason."""
        return self.refused or _EMPTY

    def hit(self, size_bytes: int) -> bool:
        """Count a hit. Return whether it must be timed (``sample``)."""
        self.hits = hits = self.hits + 1
        self.bytes_served += size_bytes
        return hits & SAMPLE_MASK == self.phase

    def bypass(self, reason: str, count: int = 1) -> None:
        """Count requests that bypassed the cache."""
        if self.bypassed is None:
            self.bypassed = Counter()
        self.bypassed[reason] += count

    def refuse(self, reason: str, count: int = 1) -> None:
        """Count responses that were not stored."""
        if self.refused is None:
            self.refused = Counter()
        self.refused[reason] += count

    def store(self, *, size_bytes: int, seconds: float) -> None:
        """Count a fill that is stored, and its duration."""
        self.stores += 1
        self.bytes_stored += size_bytes
        self.times.fill_s += seconds

    def sample(self, seconds: float, fill_ms: int) -> None:
        """Record the duration of a sampled hit. ``fill_ms`` is the duration of its fill."""
        self.times.hits.observe(seconds)
        self.times.saved_s += SAMPLED * fill_ms / 1000


class Counters:
    """The counters of one process: at most ``MAX_COUNTERS`` pairs of tenant and route."""

    __slots__ = (
        "_kept",
        "_tenants",
        "_times",
        "acknowledgements_delayed",
        "errors",
        "stale_served",
        "unconfirmed_invalidations",
    )

    def __init__(self) -> None:
        self._tenants: dict[str, dict[str, RouteCounters]] = {OTHER: {}}
        self._times: dict[str, RouteTimes] = {}
        self._kept = 0
        self.errors = 0
        self.unconfirmed_invalidations = 0
        self.acknowledgements_delayed = 0
        self.stale_served = 0

    def at(self, tenant: str | None, module: str, route: str = "") -> RouteCounters:
        """Return the live counters of a route, or without ``route`` of a module's writes.

        ``tenant`` is None for requests whose tenant is missing or unknown.
        """
        key = route or f"~{module}"
        routes = self._tenants.get(tenant or OTHER)
        counters = None if routes is None else routes.get(key)
        return self._begin(tenant or OTHER, module, route) if counters is None else counters

    def _begin(self, tenant: str, module: str, route: str) -> RouteCounters:
        key = route or f"~{module}"
        if tenant != OTHER and self._kept >= MAX_COUNTERS:
            return self.at(None, module, route)
        self._kept += 1
        counters = RouteCounters(
            module,
            route,
            self._times.setdefault(key, RouteTimes()),
            phase=hash((tenant, key)) % SAMPLED,
        )
        return self._tenants.setdefault(tenant, {}).setdefault(key, counters)

    def of(self, tenant: str | None, module: str) -> Totals:
        """Return the sums of one module of a tenant; None: of requests without a tenant."""
        return self.modules(tenant or OTHER).get(module) or Totals()

    def tenants(self) -> Iterable[str]:
        """Return the tenants that have counters."""
        return [tenant for tenant, routes in list(self._tenants.items()) if routes]

    def counters(self, tenant: str | None = None) -> list[RouteCounters]:
        """Return the live counters of one tenant, or of all."""
        chosen = list(self._tenants.values()) if tenant is None else [self._tenants.get(tenant, {})]
        return [counters for routes in chosen for counters in list(routes.values())]

    def modules(self, tenant: str | None = None) -> dict[str, Totals]:
        """Return the sums per module, of one tenant or of all."""
        total: dict[str, Totals] = {}
        for counters in self.counters(tenant):
            total.setdefault(counters.module, Totals()).add(counters)
        return total

    def routes(self, tenant: str | None = None) -> dict[str, tuple[str, Totals]]:
        """Return module and sums per route, of one tenant or of all."""
        total: dict[str, tuple[str, Totals]] = {}
        for counters in self.counters(tenant):
            if counters.route:
                total.setdefault(counters.route, (counters.module, Totals()))[1].add(counters)
        return total

    def times(self, route: str) -> RouteTimes:
        """Return the durations of a route, for all tenants."""
        return self._times.get(route) or RouteTimes()

    def to_dict(self, tenant: str | None = None) -> dict[str, Any]:
        """Return the statistics of one tenant or of all, for ``Cache.stats``."""
        modules, routes = self.modules(tenant), self.routes(tenant)
        total = Totals()
        for totals in modules.values():
            total.add(totals)
        by_route = {
            route: {"module": module, **totals.to_dict()}
            for route, (module, totals) in sorted(routes.items())
        }
        if tenant is None:
            for route in by_route:
                by_route[route] |= self.times(route).to_dict()
        return {
            "modules": {module: totals.to_dict() for module, totals in sorted(modules.items())},
            "routes": by_route,
            "hits": total.hits,
            "misses": total.misses,
            "bypasses": total.bypassed,
            "stores": total.stores,
            "stores_refused": total.refused,
            "invalidations": total.invalidations,
            "bytes_served": total.bytes_served,
            "bytes_stored": total.bytes_stored,
            "stale_served": self.stale_served,
            "errors": self.errors,
            "unconfirmed_invalidations": self.unconfirmed_invalidations,
            "acknowledgements_delayed": self.acknowledgements_delayed,
        }
