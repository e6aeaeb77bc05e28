"""Statistics as operators read them: one row per tenant, module or route, and an overview. Pure."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from respcache.core.policy import Policy
from respcache.ops.stats.shapes import ModuleStats, Point, Process, RouteStats, Server
from respcache.read.verifier import Mismatch
from respcache.routing.table import Route
from respcache.telemetry.stats import BOUNDS_S, Histogram, RouteTimes, Totals

MIN_LOOKUPS = 200
"""Lookups that a route needs before it gets advice."""

LOW_HIT_RATIO = 0.1
CHEAP_FILL = 2.0
"""A route whose fill takes at most this many times as long as a hit gains little."""


class StatsRow(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of one tenant, module or route.

    It has 25 attributes because it mirrors one JSON object of the dashboard's API.
    """

    name: str
    module: str | None = None
    """The module of a route."""
    kind: str | None = None
    """Of a route, as are the next two."""
    level: str | None = None
    ttl_s: float | None = None
    hits: int
    misses: int
    requests: int
    """Hits, misses and bypasses."""
    hit_ratio: float | None
    collapsed: int
    bypasses: dict[str, int]
    stores: int
    stores_refused: dict[str, int]
    invalidations: int
    bytes_served: int
    bytes_stored: int
    stored_mean_bytes: float | None
    """Mean body size of a stored response, before compression."""
    hit_p50_s: float | None = None
    """This and the following are set for modules and routes of all tenants together only."""
    hit_p95_s: float | None = None
    miss_p50_s: float | None = None
    miss_p95_s: float | None = None
    fill_s: float | None = None
    """Total duration of the fills."""
    fill_mean_s: float | None = None
    saved_s: float | None = None
    """Estimate of the time that the hits would have taken as fills."""
    advice: str | None = None
    """Why the route may not be worth caching."""


class SwitchStates(msgspec.Struct, frozen=True, kw_only=True):
    """What is switched off. An admin of one tenant sees the part that concerns the tenant."""

    enabled: bool
    """Whether this process uses the cache at all."""
    everything: bool
    tenants: list[str]
    modules: list[str]
    propagated: bool = True
    """Whether the cache server has the last change, so that all processes follow within a second.
    If not, it is sent as soon as the server is back."""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the cache. Histograms, series, processes and the server are hidden from an admin
    of one tenant, because they cover all tenants."""

    at: datetime
    source: str
    """Whose statistics these are: ``all processes``; or ``this process`` if the cache server is
    unavailable or none is configured."""
    problem: str
    """Why they cover this process only."""
    tenant: str | None
    """The tenant that they cover; None for all."""
    available: bool
    """Whether this process is connected to the cache server."""
    switches: SwitchStates
    totals: StatsRow
    hit_times: Histogram | None
    """By the bounds ``bounds_s``; one hit in 64 is timed."""
    miss_times: Histogram | None
    bounds_s: tuple[float, ...] = BOUNDS_S
    series: list[Point]
    """One point for each ten seconds, the oldest first."""
    processes: list[Process]
    server: Server | None
    findings: list[Mismatch]
    """The last findings of the verifier."""
    pending_tenants: list[str]
    """Tenants that this process bypasses, because their last invalidation is not confirmed."""


def stats_row(
    name: str,
    totals: Totals,
    *,
    module: str | None = None,
    times: RouteTimes | None = None,
    policy: Policy | None = None,
) -> StatsRow:
    """Return a row for these counters. ``module`` and ``policy`` are those of a route."""
    timed: dict[str, Any] = {} if times is None else _timed(totals, times)
    described: dict[str, Any] = (
        {}
        if policy is None
        else {"kind": policy.kind, "level": str(policy.level), "ttl_s": policy.ttl_s}
    )
    return StatsRow(
        name=name,
        module=module,
        requests=totals.requests,
        stored_mean_bytes=totals.bytes_stored / totals.stores if totals.stores else None,
        advice=None if module is None else _advice(totals, times),
        **totals.to_dict(),
        **timed,
        **described,
    )


def module_rows(modules: Iterable[ModuleStats]) -> list[StatsRow]:
    """Return a row for each module."""
    return [stats_row(one.module, one.totals, times=one.times) for one in modules]


def route_rows(routes: Iterable[RouteStats], policies: Mapping[str, Policy]) -> list[StatsRow]:
    """Return a row for each route. ``policies`` maps path templates to policies."""
    return [
        stats_row(
            one.route,
            one.totals,
            module=one.module,
            times=one.times,
            policy=policies.get(one.route),
        )
        for one in routes
    ]


def policies_of(routes: Iterable[Route]) -> dict[str, Policy]:
    """Return the policy of each path template."""
    return {route.template: route.policy for route in routes if route.policy is not None}


def _timed(totals: Totals, times: RouteTimes) -> dict[str, float | None]:
    return {
        "hit_p50_s": times.hits.quantile(0.5),
        "hit_p95_s": times.hits.quantile(0.95),
        "miss_p50_s": times.misses.quantile(0.5),
        "miss_p95_s": times.misses.quantile(0.95),
        "fill_s": times.fill_s,
        "fill_mean_s": times.fill_s / totals.stores if totals.stores else None,
        "saved_s": times.saved_s,
    }


def _advice(totals: Totals, times: RouteTimes | None) -> str | None:
    ratio = totals.hit_ratio
    if ratio is None or totals.hits + totals.misses < MIN_LOOKUPS:
        return None
    if ratio < LOW_HIT_RATIO:
        return (
            f"low hit ratio ({ratio:.0%}): its responses are requested too rarely or change too "
            f"often"
        )
    hit_s = None if times is None else times.hits.quantile(0.5)
    if (
        times is not None
        and hit_s is not None
        and totals.stores
        and times.fill_s / totals.stores <= CHEAP_FILL * hit_s
    ):
        return "a fill takes hardly longer than a hit"
    return None
