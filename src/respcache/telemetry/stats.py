"""Counters of this process, as plain integers: a hit costs additions and one comparison. Exporters
read them, nobody resets them.

What is counted is kept per tenant and route (``RouteCounters``); times are kept per route (``RouteTimes``),
all tenants together. Every miss is timed, and one hit in ``SAMPLED``: from when the request came to
the wrapper until the head of its answer leaves it.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

MAX_COUNTERS = 50_000
"""Pairs of tenant and route that are kept apart, some 300 bytes each; what comes later is added up
under ``OTHER``."""

OTHER = "~other"
"""Stands for requests without a tenant, and for tenants beyond the bound. No tenant can have this
name."""

VALUE = "value:"
"""Begins the route of values (``get_or_set``), which are named by their module."""

SAMPLED = 64
"""One hit in so many is timed; a power of two."""

SAMPLE_MASK = SAMPLED - 1

BOUNDS_S = (
    25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper ends of the buckets of a histogram, in seconds, each included; one more bucket holds what
took longer."""

_EMPTY: Mapping[str, int] = Counter()


class Histogram(msgspec.Struct):
    """How long things took: their number by bucket of ``BOUNDS_S``, and the sum in seconds."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """How many."""
        return sum(self.counts)

    @property
    def mean_s(self) -> float | None:
        """Their mean in seconds; None where there is none."""
        count = self.count
        return self.seconds / count if count else None

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.seconds += seconds

    def add(self, other: "Histogram") -> None:
        """Add another's to these."""
        self.counts = [
            mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.seconds += other.seconds

    def quantile(self, share: float) -> float | None:
        """Estimate what this share (0 to 1) of them did not exceed, in seconds; None where there is
        none.

        Within a bucket they are taken to lie evenly; whatever took longer than the last bound
        counts as that.
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
    """How long the requests of one route took, whoever asked."""

    hits: Histogram = msgspec.field(default_factory=Histogram)
    """One hit in ``SAMPLED``."""
    misses: Histogram = msgspec.field(default_factory=Histogram)
    """Every miss that was answered."""
    fill_s: float = 0.0
    """What the fills took that were stored: their handlers, with the database."""
    saved_s: float = 0.0
    """What hits would have taken had they been fills: estimated from the sampled ones."""

    def add(self, other: "RouteTimes") -> None:
        """Add another's to these."""
        self.hits.add(other.hits)
        self.misses.add(other.misses)
        self.fill_s += other.fill_s
        self.saved_s += other.saved_s

    def to_dict(self) -> dict[str, Any]:
        """Return what the stats endpoint says of them: estimates, in milliseconds and seconds."""
        said: dict[str, Any] = {
            f"{name}_{label}_ms": None
            if (seconds := taken.quantile(share)) is None
            else round(seconds * 1000, 3)
            for name, taken in (("hit", self.hits), ("miss", self.misses))
            for label, share in (("p50", 0.5), ("p95", 0.95))
        }
        return {**said, "fill_s": round(self.fill_s, 3), "saved_s": round(self.saved_s, 3)}


class Totals(msgspec.Struct):
    """What happened to requests and writes, added up."""

    hits: int = 0
    misses: int = 0
    collapsed: int = 0
    stores: int = 0
    invalidations: int = 0
    bytes_served: int = 0
    bytes_stored: int = 0
    bypasses: dict[str, int] = msgspec.field(default_factory=dict)
    """By reason, as in ``Cache-Status``."""
    refusals: dict[str, int] = msgspec.field(default_factory=dict)
    """Answers that were not stored, by reason."""

    @property
    def requests(self) -> int:
        """Of cached routes."""
        return self.hits + self.misses + self.bypassed

    @property
    def bypassed(self) -> int:
        """Bypasses, whatever the reason."""
        return sum(self.bypasses.values())

    @property
    def refused(self) -> int:
        """Refusals, whatever the reason."""
        return sum(self.refusals.values())

    @property
    def hit_ratio(self) -> float | None:
        """Hits of all look-ups; None before the first."""
        looked = self.hits + self.misses
        return round(self.hits / looked, 4) if looked else None

    def add(self, other: "Totals | RouteCounters") -> None:
        """Add another's to these."""
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
        """Return the figures under the names that the stats endpoint uses."""
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
    """Add counts by name to others."""
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


class RouteCounters:
    """What happens to the requests of one route of one tenant, or to the writes of one module: then
    ``route`` is empty.

    The live counters: whoever has them adds to them. ``phase`` says which hits are sampled: others
    for every tenant, so that it is one in ``SAMPLED`` however few each of them has.
    """

    __slots__ = (
        "bypassed", "bytes_served", "bytes_stored", "collapsed", "hits", "invalidations", "key", "misses", "module", "phase",
        "refused", "route", "stores", "times",
    )  # fmt: skip

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
        # by reason; made by the first, as most never have one
        self.bypassed: Counter[str] | None = None
        self.refused: Counter[str] | None = None

    @property
    def bypasses(self) -> Mapping[str, int]:
        """By reason; to be read."""
        return self.bypassed or _EMPTY

    @property
    def refusals(self) -> Mapping[str, int]:
        """By reason; to be read."""
        return self.refused or _EMPTY

    def bypass(self, reason: str, count: int = 1) -> None:
        """Count requests that left the cache alone."""
        if self.bypassed is None:
            self.bypassed = Counter()
        self.bypassed[reason] += count

    def refuse(self, reason: str, count: int = 1) -> None:
        """Count answers that were not stored."""
        if self.refused is None:
            self.refused = Counter()
        self.refused[reason] += count

    def store(self, *, size_bytes: int, seconds: float) -> None:
        """Count a fill that is stored, and what it took."""
        self.stores += 1
        self.bytes_stored += size_bytes
        self.times.fill_s += seconds

    def sample(self, seconds: float, fill_ms: int) -> None:
        """Time a hit that stands for ``SAMPLED`` of them. ``fill_ms``: what its fill had taken."""
        self.times.hits.observe(seconds)
        self.times.saved_s += SAMPLED * fill_ms / 1000


class Counters:
    """Figures per tenant and route, at most ``MAX_COUNTERS``; the number of routes is the
    application's."""

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
        """Return the figures to add to: of a route, or without one of a module's writes.

        ``tenant`` is None where the request had none or it was not resolved.
        """
        key = route or f"~{module}"
        routes = self._tenants.get(tenant or OTHER)
        counters = None if routes is None else routes.get(key)
        return self._begin(tenant or OTHER, module, route, key) if counters is None else counters

    def _begin(self, tenant: str, module: str, route: str, key: str) -> RouteCounters:
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
        """Add up what happened to a module of a tenant; None: of requests without one."""
        return self.modules(tenant or OTHER).get(module) or Totals()

    def tenants(self) -> Iterable[str]:
        """Name the tenants that have figures."""
        return [tenant for tenant, routes in list(self._tenants.items()) if routes]

    def counters(self, tenant: str | None = None) -> list[RouteCounters]:
        """Return the live counters of one tenant, or of all."""
        chosen = list(self._tenants.values()) if tenant is None else [self._tenants.get(tenant, {})]
        return [counters for routes in chosen for counters in list(routes.values())]

    def modules(self, tenant: str | None = None) -> dict[str, Totals]:
        """Return figures per module: of one tenant, or added up over all."""
        total: dict[str, Totals] = {}
        for counters in self.counters(tenant):
            total.setdefault(counters.module, Totals()).add(counters)
        return total

    def routes(self, tenant: str | None = None) -> dict[str, tuple[str, Totals]]:
        """Return module and figures per route: of one tenant, or added up over all."""
        total: dict[str, tuple[str, Totals]] = {}
        for counters in self.counters(tenant):
            if counters.route:
                total.setdefault(counters.route, (counters.module, Totals()))[1].add(counters)
        return total

    def times(self, route: str) -> RouteTimes:
        """Return how long the requests of a route took, all tenants together."""
        return self._times.get(route) or RouteTimes()
