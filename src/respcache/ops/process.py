"""What a process says of itself: its figures, added up, and how it is."""

import asyncio
import os
import platform
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from respcache.ops.fleet import Audits, LeaseStats, ModuleStats, Process, ProcessReport, RouteStats
from respcache.telemetry.stats import Counters, RouteCounters, RouteTimes, Totals

if TYPE_CHECKING:
    from respcache.cache import Cache

CHUNK = 25
"""Tenants that are worked on before the event loop gets its turn: well under a millisecond."""

ATTEMPTS = 3

T = TypeVar("T")


@dataclass(slots=True)
class StatsSummary:
    """All figures of this process, added up; and of each tenant a number that grows when something
    changes."""

    routes: list[RouteStats] = field(default_factory=list)
    writes: list[ModuleStats] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    times: RouteTimes = field(default_factory=RouteTimes)
    events: dict[str, int] = field(default_factory=dict)


async def summary_of(stats: Counters) -> StatsSummary:
    """Add up all figures of this process, in portions between which the event loop gets its turn.

    Half a microsecond per tenant and route.
    """
    summary = StatsSummary()
    for _ in _add_up(stats, summary):
        await asyncio.sleep(0)
    return summary


def summary_at_once(stats: Counters) -> StatsSummary:
    """The same for whoever has no event loop, in any thread."""
    summary = StatsSummary()
    for _ in _add_up(stats, summary):
        pass
    return summary


def _add_up(stats: Counters, summary: StatsSummary) -> Iterator[None]:
    sums: dict[str, RouteCounters] = {}
    for chunk in chunks(stats.tenants()):
        for tenant in chunk:
            summary.events[tenant] = _take(stats.counters(tenant), sums)
        yield
    for _, found in sorted(sums.items()):
        totals = Totals()
        totals.add(found)
        summary.totals.add(found)
        if found.route:
            summary.routes.append(RouteStats(found.route, found.module, totals, found.times))
            summary.times.add(found.times)
        else:
            summary.writes.append(ModuleStats(found.module, totals))


def _take(counters: Iterable[RouteCounters], sums: dict[str, RouteCounters]) -> int:
    """Add the figures of a tenant to those of all; return a number that grows whenever one of them
    does.

    Written out: the event loop waits for it.
    """
    events = 0
    for one in counters:
        key = one.key
        total = sums.get(key)
        if total is None:
            total = sums[key] = RouteCounters(one.module, one.route, one.times)
        hits, misses, collapsed, stores, invalidations = (
            one.hits,
            one.misses,
            one.collapsed,
            one.stores,
            one.invalidations,
        )
        events += hits + misses + collapsed + stores + invalidations
        total.hits += hits
        total.misses += misses
        total.collapsed += collapsed
        total.stores += stores
        total.invalidations += invalidations
        total.bytes_served += one.bytes_served
        total.bytes_stored += one.bytes_stored
        for reason, count in list(one.bypassed.items()) if one.bypassed else ():
            events += count
            total.bypass(reason, count)
        for reason, count in list(one.refused.items()) if one.refused else ():
            events += count
            total.refuse(reason, count)
    return events


def report_of(
    cache: "Cache", summary: StatsSummary, *, process: str, started_at: float
) -> ProcessReport:
    """Return all that this process says of itself."""
    runtime = cache.runtime
    verifier = None if runtime is None else runtime.verifier
    findings = [] if verifier is None else list(verifier.found.mismatches)
    return ProcessReport(
        _describe(cache, process, started_at), summary.routes, summary.writes, findings
    )


def report_at_once(cache: "Cache", *, process: str, started_at: float) -> ProcessReport:
    """The same for whoever has no event loop, in any thread: what changes while it is read is read
    again."""
    for attempt in range(ATTEMPTS):
        try:
            return report_of(
                cache, summary_at_once(cache.counters), process=process, started_at=started_at
            )
        except RuntimeError:  # a dict or a set grew while it was walked over
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Split work into portions of ``CHUNK``."""
    rest = iter(items)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _describe(cache: "Cache", process: str, started_at: float) -> Process:
    runtime, stats = cache.runtime, cache.counters
    near = None if runtime is None else runtime.near
    relay = None if runtime is None else runtime.relay
    verifier = None if runtime is None else runtime.verifier
    return Process(
        id=process,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=started_at,
        library=library_version(),
        python=platform.python_version(),
        enabled=cache.enabled,
        available=cache.store is not None and cache.store.available,
        near_bytes=0 if near is None else near.size_bytes,
        near_entries=0 if near is None else len(near),
        near_limit_bytes=0 if near is None else near.max_bytes,
        near_evicted=0 if near is None else near.evicted,
        commands=getattr(cache.store, "counters", dict)(),
        errors=stats.errors,
        stale_served=stats.stale_served,
        unconfirmed_invalidations=stats.unconfirmed_invalidations,
        acknowledgements_delayed=stats.acknowledgements_delayed,
        pending_tenants=len(cache.pending_tenants),
        lease=None if relay is None else _chosen(LeaseStats, relay.to_dict()),
        verifier=None if verifier is None else _audits(verifier.to_dict()),
    )


def library_version() -> str:
    """Return the version of this library; empty where it runs from its source."""
    try:
        return version("respcache")
    except PackageNotFoundError:
        return ""


def _chosen(kind: type[T], said: dict[str, Any]) -> T:
    """Make a struct of those entries that it has fields for."""
    return kind(**{name: said[name] for name in kind.__annotations__})


def _audits(said: dict[str, Any]) -> Audits:
    return _chosen(Audits, {**said, "inconclusive": sum(said["inconclusive"].values())})
