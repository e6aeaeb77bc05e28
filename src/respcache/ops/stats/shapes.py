"""Statistics of all processes: their structs, and the bytes in which they are published. Pure: no
clock, no I/O.

Published values are MessagePack arrays ``[version, body]``. Readers skip values that have another
version or are damaged, so two releases of the library can run side by side. The time series is
stored as hashes of integers, so that the server can add them up: each field is named, and readers
skip unknown fields.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

import msgspec

from respcache.read.verifier import Mismatch
from respcache.telemetry.stats import (
    BOUNDS_S,
    Counters,
    Histogram,
    RouteCounters,
    RouteTimes,
    Totals,
    add_counts,
)

VERSION = 1
BUCKET_S = 10
"""Seconds that one point of the time series covers."""

Integers = tuple[int, int, int, int, int, int, int]
"""The integers of ``Totals``, in the order of its fields."""

ZEROS: Integers = (0,) * 7
Reasons = tuple[Mapping[str, int], Mapping[str, int]]
"""Counts by reason: of bypasses, and of refusals."""

TenantRow = tuple[Integers, Reasons]
RouteRow = tuple[str, str, Integers, Reasons]
"""Route, module, counters."""

read_integers: Callable[[RouteCounters], Integers] = attrgetter(
    "hits", "misses", "collapsed", "stores", "invalidations", "bytes_served", "bytes_stored"
)


class LeaseStats(msgspec.Struct):
    """The serving lease of a process (``core/serving_lease.py``), and its outbox relay."""

    alive: bool
    age_s: float | None
    """Age of the moment up to which the process has seen every write; None before the first relay
    cycle."""
    lease_s: float
    cycles: int
    """Relay cycles that were completed."""
    cycles_failed: int
    epochs_begun: int
    pending_rows: int
    """Outbox rows that this process has not yet applied or seen applied."""
    pending_s: float
    """Age of the oldest of them."""
    problem: str
    """Why the last relay cycle failed; empty if it did not."""
    unsound_tables: list[str]


class VerifierStats(msgspec.Struct):
    """What the verifier of a process has found (``read/verifier.py``)."""

    share: float
    verifications: int
    equal: int
    inconclusive: int
    nondeterministic: int
    stale: int
    leaks: int


class Process(msgspec.Struct):
    """One worker process. Times are seconds; ``started_at`` is Unix time.

    It has 21 attributes because it mirrors one JSON object of the dashboard's API.
    """

    id: str
    host: str
    pid: int
    started_at: float
    library: str
    python: str
    enabled: bool
    available: bool
    """Whether it is connected to the cache server. If not, its breaker is open, and no request
    waits for the server."""
    near_bytes: int
    near_entries: int
    near_limit_bytes: int
    near_evicted: int
    commands: dict[str, int]
    """Commands, timeouts, errors and reconnects on the connection to the cache server."""
    errors: int
    stale_served: int
    unconfirmed_invalidations: int
    acknowledgements_delayed: int
    pending_tenants: int
    """Tenants that this process bypasses, because their last invalidation is not confirmed."""
    lease: LeaseStats | None
    verifier: VerifierStats | None
    age_s: float = 0.0
    """Seconds since this was published."""


class RouteStats(msgspec.Struct):
    """Counters of one route: a path template, or ``value:`` and a module."""

    route: str
    module: str
    totals: Totals
    times: RouteTimes | None = None
    """None in the statistics of one tenant: times are not kept per tenant."""


class ModuleStats(msgspec.Struct):
    """Counters of one module: its requests and its writes."""

    module: str
    totals: Totals
    times: RouteTimes | None = None
    """None in the statistics of one tenant."""


class TenantTotals(msgspec.Struct):
    """Counters of one tenant: its requests and its writes."""

    tenant: str
    totals: Totals


class TenantStats(msgspec.Struct):
    """Counters of one tenant, by module and by route.

    ``alone`` means that they cover this process only, because the others' cannot be read;
    ``problem`` says why.
    """

    tenant: str
    totals: Totals
    modules: list[ModuleStats]
    routes: list[RouteStats]
    alone: bool
    problem: str


class Tenants(msgspec.Struct):
    """One page of tenants in some order. ``count`` is the number of all tenants."""

    tenants: list[TenantTotals]
    count: int
    alone: bool
    problem: str


class Server(msgspec.Struct):
    """What the cache server reports about itself (INFO).

    It has 16 attributes because it mirrors one JSON object of the dashboard's API.
    """

    name: str
    version: str
    role: str
    uptime_s: int
    clients: int
    memory_bytes: int
    memory_limit_bytes: int
    """0 means no limit."""
    memory_policy: str
    fragmentation: float
    keys: int
    """Keys in the cache's database."""
    evicted_keys: int
    expired_keys: int
    keyspace_hits: int
    keyspace_misses: int
    commands_per_s: int
    rejected_connections: int


class Fleet(msgspec.Struct):
    """All live processes and the sum of their counters, each since its process started.

    ``alone`` means that it covers this process only, because the others' statistics cannot be read;
    ``problem`` says why.
    """

    processes: list[Process]
    totals: Totals
    times: RouteTimes
    modules: list[ModuleStats]
    routes: list[RouteStats]
    findings: list[Mismatch]
    server: Server | None
    alone: bool
    problem: str


class Point(msgspec.Struct):
    """What happened in all processes in the ``BUCKET_S`` seconds from ``at`` on.

    ``at`` is Unix time by the server's clock. Percentiles are estimates in seconds; None where no
    request was timed.
    """

    at: int
    hits: int
    misses: int
    bypasses: int
    stores: int
    refusals: int
    invalidations: int
    errors: int
    bytes_served: int
    saved_s: float
    """Estimate of the time that the hits would have taken as fills."""
    hit_p50_s: float | None
    hit_p95_s: float | None
    miss_p50_s: float | None
    miss_p95_s: float | None


class Series(msgspec.Struct):
    """Points without gaps, the oldest first."""

    points: list[Point]
    alone: bool
    problem: str


class ProcessReport(msgspec.Struct):
    """What a process publishes about itself."""

    process: Process
    routes: list[RouteStats]
    writes: list[ModuleStats]
    """The invalidations of each module."""
    findings: list[Mismatch]


# -- sums ------------------------------------------------------------------------------------------


def totals_of(integers: Integers, reasons: Reasons) -> Totals:
    """Return the counters of a published row."""
    return Totals(*integers, bypasses=dict(reasons[0]), refusals=dict(reasons[1]))


def by_module(
    routes: Iterable[RouteStats], writes: Iterable[ModuleStats] = ()
) -> list[ModuleStats]:
    """Sum counters by module."""
    found: dict[str, ModuleStats] = {}
    parts: list[RouteStats | ModuleStats] = [*routes, *writes]
    for part in parts:
        module = found.setdefault(part.module, ModuleStats(part.module, Totals()))
        module.totals.add(part.totals)
        if part.times is not None:
            module.times = module.times or RouteTimes()
            module.times.add(part.times)
    return [found[name] for name in sorted(found)]


def by_route(reports: Iterable[ProcessReport]) -> list[RouteStats]:
    """Sum the counters of several processes by route."""
    found: dict[tuple[str, str], RouteStats] = {}
    for report in reports:
        for one in report.routes:
            route = found.setdefault(
                (one.route, one.module), RouteStats(one.route, one.module, Totals(), RouteTimes())
            )
            route.totals.add(one.totals)
            assert route.times is not None
            route.times.add(one.times or RouteTimes())
    return [found[name] for name in sorted(found)]


# -- bytes of tenants ------------------------------------------------------------------------------


def encode(body: Any) -> bytes:
    """Return the bytes to publish."""
    return msgspec.msgpack.encode((VERSION, body))


def decode(data: bytes | None, kind: Any) -> Any:
    """Return a published value; None for no data, another version, or damaged data."""
    if data is None:
        return None
    try:
        version, body = msgspec.msgpack.decode(data, type=tuple[int, msgspec.Raw])
        return msgspec.msgpack.decode(body, type=kind) if version == VERSION else None
    except msgspec.MsgspecError:
        return None


def route_rows(counters: Sequence[RouteCounters]) -> list[RouteRow]:
    """Return a tenant's counters as they are published: by route, and the writes by module."""
    return [
        (one.route, one.module, read_integers(one), (one.bypasses, one.refusals))
        for one in counters
    ]


def tenant_row(rows: Sequence[RouteRow]) -> TenantRow:
    """Sum the counters of a tenant."""
    total = tuple(map(sum, zip(*(row for _, _, row, _ in rows), strict=True))) if rows else ZEROS
    bypasses, refusals = dict[str, int](), dict[str, int]()
    for _, _, _, (bypassed, refused) in rows:
        add_counts(bypasses, bypassed)
        add_counts(refusals, refused)
    return cast(Integers, total), (bypasses, refusals)


def of_tenant(tenant: str, rows: Iterable[RouteRow], *, alone: bool, problem: str) -> TenantStats:
    """Sum the rows of a tenant, which may come from several processes."""
    routes: dict[tuple[str, str], RouteStats] = {}
    writes: list[ModuleStats] = []
    total = Totals()
    for route, module, integers, reasons in rows:
        counters = totals_of(integers, reasons)
        total.add(counters)
        if route:
            routes.setdefault((route, module), RouteStats(route, module, Totals())).totals.add(
                counters
            )
        else:
            writes.append(ModuleStats(module, counters))
    ordered = [routes[name] for name in sorted(routes)]
    return TenantStats(tenant, total, by_module(ordered, writes), ordered, alone, problem)


# -- fields of the time series ---------------------------------------------------------------------

_BUCKETS = (*(str(round(bound * 1e6)) for bound in BOUNDS_S), "more")
_HITS = tuple(f"hit:{bucket}" for bucket in _BUCKETS)
_MISSES = tuple(f"miss:{bucket}" for bucket in _BUCKETS)


def series_fields(totals: Totals, times: RouteTimes, stats: Counters) -> dict[str, int]:
    """Return the current values of the series' fields, which only grow.

    ``hit:<microseconds>`` and ``miss:<microseconds>`` are the buckets of the histograms.
    """
    return {
        "hits": totals.hits,
        "misses": totals.misses,
        "bypasses": totals.bypassed,
        "stores": totals.stores,
        "refusals": totals.refused,
        "invalidations": totals.invalidations,
        "errors": stats.errors,
        "bytes_served": totals.bytes_served,
        "saved_ms": round(times.saved_s * 1000),
        **dict(zip(_HITS, times.hits.counts, strict=True)),
        **dict(zip(_MISSES, times.misses.counts, strict=True)),
    }


def series_point(at: int, fields: Mapping[str, int]) -> Point:
    """Return the point that these fields describe; missing fields are 0."""
    hits, misses = (
        Histogram([fields.get(name, 0) for name in names]) for names in (_HITS, _MISSES)
    )
    return Point(
        at=at,
        hits=fields.get("hits", 0),
        misses=fields.get("misses", 0),
        bypasses=fields.get("bypasses", 0),
        stores=fields.get("stores", 0),
        refusals=fields.get("refusals", 0),
        invalidations=fields.get("invalidations", 0),
        errors=fields.get("errors", 0),
        bytes_served=fields.get("bytes_served", 0),
        saved_s=fields.get("saved_ms", 0) / 1000,
        hit_p50_s=hits.quantile(0.5),
        hit_p95_s=hits.quantile(0.95),
        miss_p50_s=misses.quantile(0.5),
        miss_p95_s=misses.quantile(0.95),
    )


def server_of(info: Mapping[str, Any], database: int) -> Server:
    """Return what INFO reports, given as redis-py parses it."""

    def number(name: str) -> int:
        value = info.get(name, 0)
        return int(value) if isinstance(value, int | float) else 0

    return Server(
        name=str(info.get("server_name", "redis")),
        version=str(info.get("valkey_version") or info.get("redis_version", "")),
        role=str(info.get("role", "")),
        uptime_s=number("uptime_in_seconds"),
        clients=number("connected_clients"),
        memory_bytes=number("used_memory"),
        memory_limit_bytes=number("maxmemory"),
        memory_policy=str(info.get("maxmemory_policy", "")),
        fragmentation=float(info.get("mem_fragmentation_ratio", 0.0)),
        keys=int(info.get(f"db{database}", {}).get("keys", 0)),
        evicted_keys=number("evicted_keys"),
        expired_keys=number("expired_keys"),
        keyspace_hits=number("keyspace_hits"),
        keyspace_misses=number("keyspace_misses"),
        commands_per_s=number("instantaneous_ops_per_sec"),
        rejected_connections=number("rejected_connections"),
    )
