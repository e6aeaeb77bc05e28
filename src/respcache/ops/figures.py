"""Figures as operators read them: rows of tenants, modules and routes, and the state at a glance.
Pure."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from respcache.core.policy import Policy
from respcache.ops.fleet import ModuleStats, Point, Process, RouteStats, Server
from respcache.read.verifier import Mismatch
from respcache.routing.table import Route
from respcache.telemetry.stats import BOUNDS_S, Histogram, RouteTimes, Totals

ENOUGH = 200
"""Look-ups before a route is said to be not worth caching."""

HARDLY_HIT = 0.1
HARDLY_LONGER = 2.0
"""A fill that takes no longer than so many hits saves little."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a tenant, a module or a route."""

    name: str
    module: str | None = None
    """Of a route."""
    kind: str | None = None
    """Of a route, with the next two."""
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
    """Of an answer that was stored, before compression."""
    hit_p50_s: float | None = None
    """This and what follows: of modules and routes, for those who reach all tenants; else None."""
    hit_p95_s: float | None = None
    miss_p50_s: float | None = None
    miss_p95_s: float | None = None
    fill_s: float | None = None
    """What the fills took together."""
    fill_mean_s: float | None = None
    saved_s: float | None = None
    """What hits would have taken had they been fills: an estimate."""
    advice: str | None = None
    """Why it may not be worth caching."""


class SwitchStates(msgspec.Struct, frozen=True, kw_only=True):
    """What is switched off. To a tenant's admin: as far as it concerns the tenant."""

    enabled: bool
    """This process looks into the cache at all."""
    everything: bool
    tenants: list[str]
    modules: list[str]
    told: bool = True
    """The store was reached: all processes follow within a second. If not, it is told as soon as it
    is."""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """The state at a glance. The admin of one tenant does not see what is kept of all: times,
    series, processes, server."""

    at: datetime
    figures_of: str
    """``all processes``, or ``this process`` where the server is away or is none."""
    problem: str
    """Why it is this process only."""
    tenant: str | None
    """Of whom: None: all."""
    available: bool
    """This process has a connection to the cache's server."""
    switches: SwitchStates
    totals: Row
    hit_times: Histogram | None
    """By the bounds ``bounds_s``; one hit in 64 is timed."""
    miss_times: Histogram | None
    bounds_s: tuple[float, ...] = BOUNDS_S
    series: list[Point]
    """Of ten seconds each, the oldest first."""
    processes: list[Process]
    server: Server | None
    findings: list[Mismatch]
    """Of the audit, the last ones."""
    pending_tenants: list[str]
    """Vetoed in this process: their last invalidation is not confirmed."""


def row(
    name: str,
    totals: Totals,
    *,
    module: str | None = None,
    times: RouteTimes | None = None,
    policy: Policy | None = None,
) -> Row:
    """Make a row of what was counted; ``policy``: of a route."""
    timed: dict[str, Any] = {} if times is None else _timed(totals, times)
    described: dict[str, Any] = (
        {}
        if policy is None
        else {"kind": policy.kind, "level": str(policy.level), "ttl_s": policy.ttl_s}
    )
    return Row(
        name=name,
        module=module,
        requests=totals.requests,
        stored_mean_bytes=totals.bytes_stored / totals.stores if totals.stores else None,
        advice=None if module is None else _advice(totals, times),
        **totals.to_dict(),
        **timed,
        **described,
    )


def module_rows(modules: Iterable[ModuleStats]) -> list[Row]:
    """Make a row of each module."""
    return [row(one.module, one.totals, times=one.times) for one in modules]


def route_rows(routes: Iterable[RouteStats], policies: Mapping[str, Policy]) -> list[Row]:
    """Make a row of each route; ``policies`` by template."""
    return [
        row(
            one.route,
            one.totals,
            module=one.module,
            times=one.times,
            policy=policies.get(one.route),
        )
        for one in routes
    ]


def policies_of(routes: Iterable[Route]) -> dict[str, Policy]:
    """Find the policy of each template."""
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
    if ratio is None or totals.hits + totals.misses < ENOUGH:
        return None
    if ratio < HARDLY_HIT:
        return (
            f"hardly ever hit ({ratio:.0%}): its answers are asked for too rarely, or change too "
            f"often"
        )
    hit_s = None if times is None else times.hits.quantile(0.5)
    if (
        times is not None
        and hit_s is not None
        and totals.stores
        and times.fill_s / totals.stores <= HARDLY_LONGER * hit_s
    ):
        return "making an answer takes hardly longer than a hit"
    return None
