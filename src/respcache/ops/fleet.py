"""The figures of all processes: their shapes, as they are read, and their bytes, as they are
published. Pure: no clock, no I/O.

Published are MessagePack arrays ``[version, body]``. What has another version, or is damaged, is
left out by whoever reads it, so two releases of the library can run side by side. Series are hashes
of integers instead, for the server to add up: their fields say what they hold, and unknown ones are
left out.
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
"""Seconds of a point of the series."""

Row = tuple[int, int, int, int, int, int, int]
"""The integers of ``Totals``, in their order."""

NOTHING: Row = (0,) * 7
Reasons = tuple[Mapping[str, int], Mapping[str, int]]
"""Of bypasses, and of refusals."""

TenantRow = tuple[Row, Reasons]
RouteRow = tuple[str, str, Row, Reasons]
"""Route, module, figures."""

read_row: Callable[[RouteCounters], Row] = attrgetter(
    "hits", "misses", "collapsed", "stores", "invalidations", "bytes_served", "bytes_stored"
)


class LeaseStats(msgspec.Struct):
    """How well a process keeps up with the database (``core/fence.py``)."""

    alive: bool
    age_s: float | None
    """How old the moment is up to which it has seen every write; None before the first round."""
    lease_s: float
    cycles: int
    cycles_failed: int
    epochs_begun: int
    pending_rows: int
    """Invalidations in the database that this process has yet to apply, or see applied."""
    pending_s: float
    """The age of the oldest."""
    problem: str
    unsound_tables: list[str]


class Audits(msgspec.Struct):
    """What the audit of a process has found (``ops/audit.py``)."""

    share: float
    audits: int
    equal: int
    inconclusive: int
    nondeterministic: int
    stale: int
    leaks: int


class Process(msgspec.Struct):
    """One worker, and how it is. Times are seconds, ``started_at`` of the Unix epoch."""

    id: str
    host: str
    pid: int
    started_at: float
    library: str
    python: str
    enabled: bool
    available: bool
    """Whether it has a connection to the cache's server: if not, its breaker is open and nothing
    waits for the server."""
    near_bytes: int
    near_entries: int
    near_limit_bytes: int
    near_evicted: int
    commands: dict[str, int]
    """Commands, timeouts, errors and reconnects on the connection to the cache's server."""
    errors: int
    stale_served: int
    unconfirmed_invalidations: int
    acknowledgements_delayed: int
    pending_tenants: int
    """Tenants whose last invalidation is not confirmed: it bypasses them."""
    lease: LeaseStats | None
    verifier: Audits | None
    age_s: float = 0.0
    """How long ago this was published."""


class RouteStats(msgspec.Struct):
    """What happened to the requests of a route: a template, or ``value:`` and a module."""

    route: str
    module: str
    totals: Totals
    times: RouteTimes | None = None
    """None where the figures are of one tenant: times are not kept apart."""


class ModuleStats(msgspec.Struct):
    """What happened to the requests and writes of a module."""

    module: str
    totals: Totals
    times: RouteTimes | None = None
    """None where the figures are of one tenant."""


class TenantTotals(msgspec.Struct):
    """What happened to the requests and writes of a tenant."""

    tenant: str
    totals: Totals


class TenantStats(msgspec.Struct):
    """The same by module and route. ``alone``: of this process only, because the others' cannot be
    read (``problem``)."""

    tenant: str
    totals: Totals
    modules: list[ModuleStats]
    routes: list[RouteStats]
    alone: bool
    problem: str


class Tenants(msgspec.Struct):
    """Some of the tenants in an order, and how many there are."""

    tenants: list[TenantTotals]
    count: int
    alone: bool
    problem: str


class Server(msgspec.Struct):
    """The cache's server, as it says itself (INFO)."""

    name: str
    version: str
    role: str
    uptime_s: int
    clients: int
    memory_bytes: int
    memory_limit_bytes: int
    """0: none."""
    memory_policy: str
    fragmentation: float
    keys: int
    """In the cache's database."""
    evicted_keys: int
    expired_keys: int
    keyspace_hits: int
    keyspace_misses: int
    commands_per_s: int
    rejected_connections: int


class Fleet(msgspec.Struct):
    """All processes that live, and their figures added up. Of each, since it started.

    ``alone``: this process only, because the others' cannot be read; ``problem`` says why.
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
    """What happened in ``BUCKET_S`` seconds from ``at`` on (of the Unix epoch, by the server's
    clock), everywhere.

    Percentiles are estimates in seconds; None where nothing was timed.
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
    """Estimated: what hits would have taken had they been fills."""
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
    """What a process publishes of itself."""

    process: Process
    routes: list[RouteStats]
    writes: list[ModuleStats]
    """Of each module: its invalidations."""
    findings: list[Mismatch]


# -- adding up -------------------------------------------------------------------------------------


def totals_of(row: Row, reasons: Reasons) -> Totals:
    """Read figures from a row."""
    return Totals(*row, bypasses=dict(reasons[0]), refusals=dict(reasons[1]))


def by_module(
    routes: Iterable[RouteStats], writes: Iterable[ModuleStats] = ()
) -> list[ModuleStats]:
    """Add figures up by module."""
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
    """Add the figures of many processes up by route."""
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


# -- tenants on the wire ---------------------------------------------------------------------------


def encode(body: Any) -> bytes:
    """Return the bytes to publish."""
    return msgspec.msgpack.encode((VERSION, body))


def decode(data: bytes | None, kind: Any) -> Any:
    """Read published bytes back; None for nothing, for another version, and for what is none of
    ours."""
    if data is None:
        return None
    try:
        version, body = msgspec.msgpack.decode(data, type=tuple[int, msgspec.Raw])
        return msgspec.msgpack.decode(body, type=kind) if version == VERSION else None
    except msgspec.MsgspecError:
        return None


def route_rows(counters: Sequence[RouteCounters]) -> list[RouteRow]:
    """Return the figures of a tenant as they are published: route by route, and the writes of each
    module."""
    return [
        (one.route, one.module, read_row(one), (one.bypasses, one.refusals)) for one in counters
    ]


def tenant_row(rows: Sequence[RouteRow]) -> TenantRow:
    """Add the figures of a tenant up."""
    total = tuple(map(sum, zip(*(row for _, _, row, _ in rows), strict=True))) if rows else NOTHING
    bypasses, refusals = dict[str, int](), dict[str, int]()
    for _, _, _, (left, refused) in rows:
        add_counts(bypasses, left)
        add_counts(refusals, refused)
    return cast(Row, total), (bypasses, refusals)


def of_tenant(tenant: str, rows: Iterable[RouteRow], *, alone: bool, problem: str) -> TenantStats:
    """Add up the rows of a tenant, of as many processes as there are."""
    routes: dict[tuple[str, str], RouteStats] = {}
    writes: list[ModuleStats] = []
    total = Totals()
    for route, module, row, reasons in rows:
        counters = totals_of(row, reasons)
        total.add(counters)
        if route:
            routes.setdefault((route, module), RouteStats(route, module, Totals())).totals.add(
                counters
            )
        else:
            writes.append(ModuleStats(module, counters))
    ordered = [routes[name] for name in sorted(routes)]
    return TenantStats(tenant, total, by_module(ordered, writes), ordered, alone, problem)


# -- series on the wire ----------------------------------------------------------------------------

_BUCKETS = (*(str(round(bound * 1e6)) for bound in BOUNDS_S), "more")
_HITS = tuple(f"hit:{bucket}" for bucket in _BUCKETS)
_MISSES = tuple(f"miss:{bucket}" for bucket in _BUCKETS)


def counters(totals: Totals, times: RouteTimes, stats: Counters) -> dict[str, int]:
    """Return the fields of the series as they stand: they only grow. Times in
    ``hit:<microseconds>`` by bucket."""
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


def point(at: int, fields: Mapping[str, int]) -> Point:
    """Read a point of the series."""
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
    """Read what INFO says, as redis-py parses it."""

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
