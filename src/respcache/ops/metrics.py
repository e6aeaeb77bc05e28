"""The metrics: what each is called, what it means and what it is read from, for every exporter.
Pure.

Every figure of a process carries the label ``worker``, so that a process that starts anew begins
series of its own; sums over workers are the reader's. No label but ``tenant`` comes from requests:
modules, routes and reasons are the application's.

Of tenants there are only the largest by the figure itself, and the rest together as ``other``. The
sum of all but the ``k`` largest of counters never goes down, however they overtake each other: each
term of the sorted row only grows. So ``other`` is a counter too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import nlargest
from operator import attrgetter
from typing import Generic, Literal, TypeVar

from respcache.ops.fleet import Process, ProcessReport, Server
from respcache.telemetry.stats import OTHER, Histogram, Totals

PREFIX = "respcache"
REST = "other"
"""Stands for the tenants that are not among the largest. A tenant of this name is added to it."""

T = TypeVar("T")
Value = float | Histogram
Sample = tuple[tuple[str, ...], Value]
"""The values of a metric's labels, and the figure."""
Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "seconds", "bytes"]


@dataclass(frozen=True, slots=True)
class Metric(Generic[T]):
    """One metric, and how it is read from what a process or the server says of itself."""

    name: str
    kind: Kind
    about: str
    read: Callable[[T], Iterable[Sample]]
    labels: tuple[str, ...] = ()
    unit: Unit = ""

    @property
    def full_name(self) -> str:
        """The name by Prometheus' conventions."""
        return "_".join(
            filter(None, (PREFIX, self.name, self.unit, "total" if self.kind == "counter" else ""))
        )


@dataclass(frozen=True, slots=True)
class LargestTenants:
    """What one process says of its tenants, and how many of them are wanted."""

    totals: Mapping[str, Totals]
    k: int


@dataclass(frozen=True, slots=True)
class ScrapeState:
    """How many processes were read, and whether these are all that live."""

    workers: int
    complete: bool


def worker_of(process: Process) -> str:
    """Name a process in the label ``worker``: readable, and another one after every start."""
    return f"{process.host}:{process.pid}:{process.id[:6]}"


def largest(counters: Mapping[str, float], k: int) -> Iterator[tuple[tuple[str, ...], float]]:
    """Return the ``k`` largest by tenant, those of 0 left out, and all others added up."""
    own = {
        tenant: figure
        for tenant, figure in counters.items()
        if figure and tenant not in (OTHER, REST)
    }
    chosen = nlargest(k, own.items(), key=lambda item: item[1])
    for tenant, figure in chosen:
        yield (tenant,), figure
    yield (REST,), sum(counters.values()) - sum(figure for _, figure in chosen)


# -- how they are read: ``field`` names the field of the figures -----------------------------------

_ROUTE = ("module", "route")
_REASON = (*_ROUTE, "reason")
Read = Callable[[ProcessReport], Iterable[Sample]]


def _routes(field: str) -> Read:
    read = attrgetter(field)
    return lambda report: (((one.module, one.route), read(one.totals)) for one in report.routes)


def _reasons(field: str) -> Read:
    read = attrgetter(field)
    return lambda report: (
        ((one.module, one.route, reason), count)
        for one in report.routes
        for reason, count in sorted(read(one.totals).items())
    )


def _times(field: str) -> Read:
    read = attrgetter(field)
    return lambda report: (
        ((one.module, one.route), read(one.times)) for one in report.routes if one.times is not None
    )


def _writes(report: ProcessReport) -> Iterator[Sample]:
    return (((one.module,), one.totals.invalidations) for one in report.writes)


def _process(field: str) -> Read:
    read = attrgetter(field)
    return lambda report: [((), read(report.process))]


def _lease(field: str) -> Read:
    read = attrgetter(field)

    def samples(report: ProcessReport) -> Iterator[Sample]:
        value = None if report.process.lease is None else read(report.process.lease)
        if value is not None:
            yield (), value

    return samples


def _relay(report: ProcessReport) -> Iterator[Sample]:
    if (lease := report.process.lease) is not None:
        yield ("completed",), lease.cycles
        yield ("failed",), lease.cycles_failed


def _audits(report: ProcessReport) -> Iterator[Sample]:
    if (verifier := report.process.verifier) is not None:
        yield ("equal",), verifier.equal
        yield ("inconclusive",), verifier.inconclusive
        yield ("nondeterministic",), verifier.nondeterministic
        yield ("stale",), verifier.stale
        yield ("leak",), verifier.leaks


def _commands(report: ProcessReport) -> Iterator[Sample]:
    return (((name,), count) for name, count in sorted(report.process.commands.items()))


def _worker_info(report: ProcessReport) -> Iterator[Sample]:
    process = report.process
    yield (process.host, str(process.pid), process.library, process.python), 1


def _server(field: str) -> Callable[[Server], Iterable[Sample]]:
    read = attrgetter(field)
    return lambda server: [((), read(server))]


def _server_info(server: Server) -> Iterator[Sample]:
    yield (server.name, server.version, server.role, server.memory_policy), 1


def _tenants(field: str) -> Callable[[LargestTenants], Iterable[Sample]]:
    read = attrgetter(field)
    return lambda tenants: largest(
        {tenant: read(totals) for tenant, totals in tenants.totals.items()}, tenants.k
    )


# -- which there are -------------------------------------------------------------------------------

OF_WORKERS: tuple[Metric[ProcessReport], ...] = (
    Metric("hits", "counter", "Requests answered from the cache.", _routes("hits"), _ROUTE),
    Metric("misses", "counter", "Requests that found no valid entry.", _routes("misses"), _ROUTE),
    Metric("collapsed", "counter", "Misses that another caller's fill answered.", _routes("collapsed"), _ROUTE),
    Metric("bypasses", "counter", "Requests for which the cache was left alone.", _reasons("bypasses"), _REASON),
    Metric("stores", "counter", "Answers that were stored.", _routes("stores"), _ROUTE),
    Metric("refusals", "counter", "Answers that were not stored.", _reasons("refusals"), _REASON),
    Metric("served", "counter", "Bodies of hits, as they were sent.", _routes("bytes_served"), _ROUTE, "bytes"),
    Metric("stored", "counter", "Bodies that were stored, before compression.", _routes("bytes_stored"), _ROUTE, "bytes"),
    Metric("hit_duration", "histogram", "From request to head of answer, of one hit in 64.", _times("hits"), _ROUTE, "seconds"),
    Metric("miss_duration", "histogram", "From request to head of answer, of all misses.", _times("misses"), _ROUTE, "seconds"),
    Metric("fill", "counter", "What the handlers took whose answers were stored.", _times("fill_s"), _ROUTE, "seconds"),
    Metric("saved", "counter", "Estimate of what hits would have taken as fills.", _times("saved_s"), _ROUTE, "seconds"),
    Metric("invalidations", "counter", "Writes that made answers of the module invalid.", _writes, ("module",)),
    Metric("audits", "counter", "Hits made anew and compared; stale and leak are wrong answers.", _audits, ("outcome",)),
    Metric("enabled", "gauge", "1: the process looks into the cache; 0: it is switched off.", _process("enabled")),
    Metric("store_up", "gauge", "1: the process has a connection to the cache server.", _process("available")),
    Metric("store_commands", "counter", "Commands on it, errors, timeouts, reconnects.", _commands, ("event",)),
    Metric("errors", "counter", "Look-ups that the cache server did not answer as it must.", _process("errors")),
    Metric("fence_held", "gauge", "1: the process has seen every write, so it may serve; 0: it "
                                  "serves nothing.", _lease("alive")),
    Metric("fence_age", "gauge", "How old the moment is up to which it has seen every write.", _lease("age_s"), (), "seconds"),
    Metric("rounds", "counter", "Looks at what was written, by outcome.", _relay, ("outcome",)),
    Metric("epochs", "counter", "Epochs that it began: each makes the whole cache cold.", _lease("epochs_begun")),
    Metric("pending_invalidations", "gauge", "Rows of the outbox that it has not applied yet.", _lease("pending_rows")),
    Metric("pending_invalidations_oldest", "gauge", "How old the oldest of them is.", _lease("pending_s"), (), "seconds"),
    Metric("pending_tenants", "gauge", "Tenants bypassed until an invalidation is confirmed.", _process("pending_tenants")),
    Metric(
        "unconfirmed_invalidations", "counter", "Invalidations that the cache server did not "
                                                "confirm.",
        _process("unconfirmed_invalidations"),
    ),
    Metric(
        "delayed_acknowledgements", "counter", "Writes whose answer waited for a round, or for "
                                               "the lease to end.",
        _process("acknowledgements_delayed"),
    ),
    Metric("near", "gauge", "What the process keeps of its entries in memory.", _process("near_bytes"), (), "bytes"),
    Metric("near_limit", "gauge", "What it may keep at most.", _process("near_limit_bytes"), (), "bytes"),
    Metric("near_entries", "gauge", "Entries that it keeps.", _process("near_entries")),
    Metric("near_evictions", "counter", "Entries that left its memory to make room.", _process("near_evicted")),
    Metric("worker_start_time", "gauge", "When the process began, in Unix time.", _process("started_at"), (), "seconds"),
    Metric("worker_info", "gauge", "The process; always 1.", _worker_info, ("host", "pid", "version", "python")),
)  # fmt: skip
"""Of each process; they have the label ``worker`` besides."""

OF_SERVER: tuple[Metric[Server], ...] = (
    Metric(
        "server_memory",
        "gauge",
        "What the cache server uses.",
        _server("memory_bytes"),
        (),
        "bytes",
    ),
    Metric(
        "server_memory_limit",
        "gauge",
        "Its maxmemory; 0: none.",
        _server("memory_limit_bytes"),
        (),
        "bytes",
    ),
    Metric(
        "server_keys",
        "gauge",
        "Keys in the cache's database, invalid entries included.",
        lambda one: [((), one.keys)],
    ),
    Metric(
        "server_evicted_keys", "counter", "Keys that left it to make room.", _server("evicted_keys")
    ),
    Metric(
        "server_expired_keys",
        "counter",
        "Keys that left it as their time had come.",
        _server("expired_keys"),
    ),
    Metric("server_clients", "gauge", "Connections that it has.", _server("clients")),
    Metric(
        "server_uptime",
        "gauge",
        "For how long it has been running.",
        _server("uptime_s"),
        (),
        "seconds",
    ),
    Metric(
        "server_info",
        "gauge",
        "The server; always 1.",
        _server_info,
        ("name", "version", "role", "maxmemory_policy"),
    ),
)
"""Of the cache server, as it says itself (INFO), if it lets the process ask."""

OF_READING: tuple[Metric[ScrapeState], ...] = (
    Metric(
        "workers", "gauge", "Processes whose figures these are.", lambda one: [((), one.workers)]
    ),
    Metric(
        "fleet_complete",
        "gauge",
        "1: of all that live; 0: of the one that was asked.",
        lambda one: [((), one.complete)],
    ),
)

OF_TENANTS: tuple[Metric[LargestTenants], ...] = (
    Metric("tenant_hits", "counter", "Hits of the largest tenants.", _tenants("hits"), ("tenant",)),
    Metric(
        "tenant_misses",
        "counter",
        "Misses of the largest tenants.",
        _tenants("misses"),
        ("tenant",),
    ),
    Metric(
        "tenant_bypasses",
        "counter",
        "Bypasses of the largest tenants.",
        _tenants("bypassed"),
        ("tenant",),
    ),
    Metric(
        "tenant_invalidations",
        "counter",
        "Invalidations of the largest tenants.",
        _tenants("invalidations"),
        ("tenant",),
    ),
    Metric(
        "tenant_served",
        "counter",
        "Bodies of their hits.",
        _tenants("bytes_served"),
        ("tenant",),
        "bytes",
    ),
)
"""Of each process and its largest tenants, where that is asked for; they have the label ``worker``
besides."""

Any = Metric[ProcessReport] | Metric[Server] | Metric[ScrapeState] | Metric[LargestTenants]
ALL: tuple[Any, ...] = (*OF_WORKERS, *OF_SERVER, *OF_READING, *OF_TENANTS)
