"""The metrics of all exporters: name, help text, and the statistics that each is read from. Pure.

Every metric of a process carries the label ``worker``, so that a restarted process begins new
series; readers sum over workers. Only the label ``tenant`` takes values from requests: modules,
routes and reasons are defined by the application.

Per tenant, only the largest tenants of each metric are exported, and the sum of all others as
``other``. That sum is a counter too: for counters that only grow, the sum of all but the ``k``
largest never decreases, in whatever order tenants overtake each other, because each term of the
sorted list only grows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import nlargest
from operator import attrgetter
from typing import Generic, Literal, TypeVar

from respcache.ops.stats.shapes import Process, ProcessReport, Server
from respcache.telemetry.stats import OTHER, Histogram, Totals

PREFIX = "respcache"
REST = "other"
"""The tenants that are not among the largest. A tenant with this name is counted here too."""

T = TypeVar("T")
Value = float | Histogram
Sample = tuple[tuple[str, ...], Value]
"""The values of a metric's labels, and its value."""
Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "seconds", "bytes"]
Read = Callable[[T], Iterable[Sample]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(Generic[T]):
    """One metric. ``read`` returns its samples from the statistics of a process or the server."""

    name: str
    kind: Kind
    help: str
    read: Read[T]
    labels: tuple[str, ...] = ()
    unit: Unit = ""

    @property
    def full_name(self) -> str:
        """The name that Prometheus' conventions prescribe."""
        return "_".join(
            filter(None, (PREFIX, self.name, self.unit, "total" if self.kind == "counter" else ""))
        )


@dataclass(frozen=True, slots=True)
class LargestTenants:
    """The counters of the tenants of one process; ``k`` is how many of them are exported."""

    totals: Mapping[str, Totals]
    k: int


@dataclass(frozen=True, slots=True)
class ScrapeState:
    """The number of processes that a scrape covers, and whether these are all live processes."""

    workers: int
    complete: bool


def worker_of(process: Process) -> str:
    """Return the label ``worker`` of a process, which differs after every restart."""
    return f"{process.host}:{process.pid}:{process.id[:6]}"


def largest(counters: Mapping[str, float], k: int) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the ``k`` largest tenants, without those at 0, and the sum of all others."""
    named = {
        tenant: value for tenant, value in counters.items() if value and tenant not in (OTHER, REST)
    }
    chosen = nlargest(k, named.items(), key=lambda item: item[1])
    for tenant, value in chosen:
        yield (tenant,), value
    yield (REST,), sum(counters.values()) - sum(value for _, value in chosen)


# -- metrics that read one field -------------------------------------------------------------------

_ROUTE = ("module", "route")
_REASON = (*_ROUTE, "reason")


def _route_counter(name: str, field: str, about: str, *, unit: Unit = "") -> Metric[ProcessReport]:
    read = attrgetter(field)

    def samples(report: ProcessReport) -> Iterator[Sample]:
        return (((one.module, one.route), read(one.totals)) for one in report.routes)

    return Metric(name=name, kind="counter", help=about, read=samples, labels=_ROUTE, unit=unit)


def _reason_counter(name: str, field: str, about: str) -> Metric[ProcessReport]:
    read = attrgetter(field)

    def samples(report: ProcessReport) -> Iterator[Sample]:
        return (
            ((one.module, one.route, reason), count)
            for one in report.routes
            for reason, count in sorted(read(one.totals).items())
        )

    return Metric(name=name, kind="counter", help=about, read=samples, labels=_REASON)


def _duration(name: str, field: str, about: str, *, kind: Kind) -> Metric[ProcessReport]:
    read = attrgetter(field)

    def samples(report: ProcessReport) -> Iterator[Sample]:
        return (
            ((one.module, one.route), read(one.times))
            for one in report.routes
            if one.times is not None
        )

    return Metric(name=name, kind=kind, help=about, read=samples, labels=_ROUTE, unit="seconds")


def _process(
    name: str, field: str, about: str, *, kind: Kind = "gauge", unit: Unit = ""
) -> Metric[ProcessReport]:
    read = attrgetter(field)
    return Metric(
        name=name,
        kind=kind,
        help=about,
        read=lambda report: [((), read(report.process))],
        unit=unit,
    )


def _lease(
    name: str, field: str, about: str, *, kind: Kind = "gauge", unit: Unit = ""
) -> Metric[ProcessReport]:
    read = attrgetter(field)

    def samples(report: ProcessReport) -> Iterator[Sample]:
        value = None if report.process.lease is None else read(report.process.lease)
        if value is not None:
            yield (), value

    return Metric(name=name, kind=kind, help=about, read=samples, unit=unit)


def _server(
    name: str, field: str, about: str, *, kind: Kind = "gauge", unit: Unit = ""
) -> Metric[Server]:
    read = attrgetter(field)
    return Metric(
        name=f"server_{name}",
        kind=kind,
        help=about,
        read=lambda server: [((), read(server))],
        unit=unit,
    )


def _tenant_counter(
    name: str, field: str, about: str, *, unit: Unit = ""
) -> Metric[LargestTenants]:
    read = attrgetter(field)

    def samples(tenants: LargestTenants) -> Iterator[Sample]:
        counters = {tenant: read(totals) for tenant, totals in tenants.totals.items()}
        return largest(counters, tenants.k)

    return Metric(
        name=f"tenant_{name}",
        kind="counter",
        help=about,
        read=samples,
        labels=("tenant",),
        unit=unit,
    )


# -- samples of the other metrics ------------------------------------------------------------------


def _invalidations(report: ProcessReport) -> Iterator[Sample]:
    return (((one.module,), one.totals.invalidations) for one in report.writes)


def _verifications(report: ProcessReport) -> Iterator[Sample]:
    if (verifier := report.process.verifier) is not None:
        yield ("equal",), verifier.equal
        yield ("inconclusive",), verifier.inconclusive
        yield ("nondeterministic",), verifier.nondeterministic
        yield ("stale",), verifier.stale
        yield ("leak",), verifier.leaks


def _commands(report: ProcessReport) -> Iterator[Sample]:
    return (((name,), count) for name, count in sorted(report.process.commands.items()))


def _relay_cycles(report: ProcessReport) -> Iterator[Sample]:
    if (lease := report.process.lease) is not None:
        yield ("completed",), lease.cycles
        yield ("failed",), lease.cycles_failed


def _worker_info(report: ProcessReport) -> Iterator[Sample]:
    process = report.process
    yield (process.host, str(process.pid), process.library, process.python), 1


def _server_info(server: Server) -> Iterator[Sample]:
    yield (server.name, server.version, server.role, server.memory_policy), 1


# -- the metrics -----------------------------------------------------------------------------------

_REQUESTS: tuple[Metric[ProcessReport], ...] = (
    _route_counter("hits", "hits", "Requests answered from the cache."),
    _route_counter("misses", "misses", "Requests that found no valid entry."),
    _route_counter("collapsed", "collapsed", "Misses that waited for a fill."),
    _reason_counter("bypasses", "bypasses", "Requests without the cache."),
    _route_counter("stores", "stores", "Responses that were stored."),
    _reason_counter("refusals", "refusals", "Responses not stored."),
    _route_counter("served", "bytes_served", "Bodies of hits, as sent.", unit="bytes"),
    _route_counter("stored", "bytes_stored", "Stored bodies, uncompressed.", unit="bytes"),
    _duration(
        "hit_duration",
        "hits",
        "Latency of one hit in 64.",
        kind="histogram",
    ),
    _duration(
        "miss_duration",
        "misses",
        "Latency of all misses.",
        kind="histogram",
    ),
    _duration("fill", "fill_s", "Handler time of stored fills.", kind="counter"),
    _duration("saved", "saved_s", "Estimated time saved by hits.", kind="counter"),
    Metric(
        name="invalidations",
        kind="counter",
        help="Writes that invalidated responses.",
        read=_invalidations,
        labels=("module",),
    ),
    Metric(
        name="verifications",
        kind="counter",
        help="Hits that were re-executed and compared.",
        read=_verifications,
        labels=("outcome",),
    ),
)

_STATE: tuple[Metric[ProcessReport], ...] = (
    _process("enabled", "enabled", "1: the process uses the cache; 0: it is switched off."),
    _process("store_up", "available", "1: the process is connected to the cache server."),
    Metric(
        name="store_commands",
        kind="counter",
        help="Commands, errors, timeouts, reconnects.",
        read=_commands,
        labels=("event",),
    ),
    _process("errors", "errors", "Lookups that failed on the cache server.", kind="counter"),
    _lease(
        "serving_lease_held",
        "alive",
        "1: it has seen every write, so it may serve hits.",
    ),
    _lease(
        "serving_lease_age",
        "age_s",
        "Time since it had seen every write.",
        unit="seconds",
    ),
    Metric(
        name="relay_cycles",
        kind="counter",
        help="Cycles of the outbox relay.",
        read=_relay_cycles,
        labels=("outcome",),
    ),
    _lease(
        "epochs",
        "epochs_begun",
        "Epochs that it began; each empties the cache.",
        kind="counter",
    ),
    _lease(
        "pending_invalidations",
        "pending_rows",
        "Outbox rows that it has not applied yet.",
    ),
    _lease(
        "pending_invalidations_oldest", "pending_s", "Age of the oldest of them.", unit="seconds"
    ),
    _process(
        "pending_tenants",
        "pending_tenants",
        "Tenants bypassed until an invalidation is confirmed.",
    ),
    _process(
        "unconfirmed_invalidations",
        "unconfirmed_invalidations",
        "Invalidations without confirmation.",
        kind="counter",
    ),
    _process(
        "delayed_acknowledgements",
        "acknowledgements_delayed",
        "Writes that waited for a relay cycle.",
        kind="counter",
    ),
    _process("near", "near_bytes", "Size of the entries in memory.", unit="bytes"),
    _process("near_limit", "near_limit_bytes", "Limit of that size.", unit="bytes"),
    _process("near_entries", "near_entries", "Number of entries in memory."),
    _process(
        "near_evictions",
        "near_evicted",
        "Entries removed from memory to make room.",
        kind="counter",
    ),
    _process(
        "worker_start_time", "started_at", "Start of the process, in Unix time.", unit="seconds"
    ),
    Metric(
        name="worker_info",
        kind="gauge",
        help="The process; always 1.",
        read=_worker_info,
        labels=("host", "pid", "version", "python"),
    ),
)

OF_WORKERS: tuple[Metric[ProcessReport], ...] = (*_REQUESTS, *_STATE)
"""Metrics of each process; they also have the label ``worker``."""

OF_SERVER: tuple[Metric[Server], ...] = (
    _server("memory", "memory_bytes", "Memory that the cache server uses.", unit="bytes"),
    _server("memory_limit", "memory_limit_bytes", "Its maxmemory; 0: no limit.", unit="bytes"),
    _server("keys", "keys", "Keys, including invalid entries."),
    _server("evicted_keys", "evicted_keys", "Keys that it evicted.", kind="counter"),
    _server("expired_keys", "expired_keys", "Keys that expired.", kind="counter"),
    _server("clients", "clients", "Client connections."),
    _server("uptime", "uptime_s", "Time since the cache server started.", unit="seconds"),
    Metric(
        name="server_info",
        kind="gauge",
        help="Always 1.",
        read=_server_info,
        labels=("name", "version", "role", "maxmemory_policy"),
    ),
)
"""Metrics of the cache server (INFO), if the process may read them."""

OF_SCRAPE: tuple[Metric[ScrapeState], ...] = (
    Metric(
        name="workers",
        kind="gauge",
        help="Processes that the scrape covers.",
        read=lambda scrape: [((), scrape.workers)],
    ),
    Metric(
        name="fleet_complete",
        kind="gauge",
        help="1: the scrape covers all live processes.",
        read=lambda scrape: [((), scrape.complete)],
    ),
)

OF_TENANTS: tuple[Metric[LargestTenants], ...] = (
    _tenant_counter("hits", "hits", "Hits of the largest tenants."),
    _tenant_counter("misses", "misses", "Misses of the largest tenants."),
    _tenant_counter("bypasses", "bypassed", "Bypasses of the largest tenants."),
    _tenant_counter("invalidations", "invalidations", "Invalidations of these tenants."),
    _tenant_counter("served", "bytes_served", "Bodies of their hits.", unit="bytes"),
)
"""Metrics of the largest tenants of each process, if requested; with the label ``worker``."""

AnyMetric = Metric[ProcessReport] | Metric[Server] | Metric[ScrapeState] | Metric[LargestTenants]
ALL: tuple[AnyMetric, ...] = (*OF_WORKERS, *OF_SERVER, *OF_SCRAPE, *OF_TENANTS)
