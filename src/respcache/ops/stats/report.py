"""The statistics of this process: its counters, summed up, and its state."""

import asyncio
import os
import platform
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import TypeVar

from respcache.cache import Cache
from respcache.ops.stats.shapes import (
    LeaseStats,
    ModuleStats,
    Process,
    ProcessReport,
    RouteStats,
    VerifierStats,
)
from respcache.read.verifier import Verifier
from respcache.telemetry.stats import Counters, RouteCounters, RouteTimes, Totals
from respcache.writes.relay import OutboxRelay

CHUNK = 25
"""Tenants that are summed up before the event loop runs other tasks: well under a millisecond."""

ATTEMPTS = 3

T = TypeVar("T")


@dataclass(slots=True)
class StatsSummary:
    """The sum of all counters of this process.

    ``events`` holds a number for each tenant, which grows when any of its counters does.
    """

    routes: list[RouteStats] = field(default_factory=list)
    writes: list[ModuleStats] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    times: RouteTimes = field(default_factory=RouteTimes)
    events: dict[str, int] = field(default_factory=dict)


async def summary_of(stats: Counters) -> StatsSummary:
    """Sum all counters of this process; let other tasks run after every ``CHUNK`` tenants.

    Takes half a microsecond for each tenant and route.
    """
    summary = StatsSummary()
    for _ in _add_up(stats, summary):
        await asyncio.sleep(0)
    return summary


def summary_at_once(stats: Counters) -> StatsSummary:
    """Sum all counters without an event loop, in any thread."""
    summary = StatsSummary()
    for _ in _add_up(stats, summary):
        pass
    return summary


def _add_up(stats: Counters, summary: StatsSummary) -> Iterator[None]:
    sums: dict[str, RouteCounters] = {}
    for chunk in chunks(stats.tenants()):
        for tenant in chunk:
            summary.events[tenant] = _add_tenant(stats.counters(tenant), sums)
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


def _add_tenant(counters: Iterable[RouteCounters], sums: dict[str, RouteCounters]) -> int:
    """Add a tenant's counters to the sums; return a number that grows when any of them does.

    The additions are inlined, because the event loop waits for this function.
    """
    events = 0
    for one in counters:
        key = one.key
        total = sums.get(key)
        if total is None:
            total = sums[key] = RouteCounters(one.module, one.route, one.times)
        hits, misses, collapsed = one.hits, one.misses, one.collapsed
        stores, invalidations = one.stores, one.invalidations
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
    cache: Cache, summary: StatsSummary, *, process: str, started_at: float
) -> ProcessReport:
    """Return what this process publishes about itself. ``started_at`` is Unix time."""
    runtime = cache.runtime
    verifier = None if runtime is None else runtime.verifier
    findings = [] if verifier is None else list(verifier.found.mismatches)
    return ProcessReport(
        _describe(cache, process, started_at), summary.routes, summary.writes, findings
    )


def report_at_once(cache: Cache, *, process: str, started_at: float) -> ProcessReport:
    """Return the report without an event loop, in any thread.

    Starts again if a collection changes while it is being read, at most ``ATTEMPTS`` times.
    """
    for attempt in range(ATTEMPTS):
        try:
            return report_of(
                cache, summary_at_once(cache.counters), process=process, started_at=started_at
            )
        except RuntimeError:  # a dict or set changed its size during iteration
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Split items into lists of at most ``CHUNK``."""
    rest = iter(items)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def library_version() -> str:
    """Return the version of this library; empty if it is not installed as a package."""
    try:
        return version("respcache")
    except PackageNotFoundError:
        return ""


def _describe(cache: Cache, process: str, started_at: float) -> Process:
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
        lease=None if relay is None else _lease_stats(relay),
        verifier=None if verifier is None else _verifier_stats(verifier),
    )


def _lease_stats(relay: OutboxRelay) -> LeaseStats:
    age_s = relay.age_s
    return LeaseStats(
        alive=relay.alive,
        age_s=None if age_s is None else round(age_s, 3),
        lease_s=relay.outbox.lease_s,
        cycles=relay.counters.cycles,
        cycles_failed=relay.counters.failed,
        epochs_begun=relay.counters.epochs,
        pending_rows=relay.counters.pending_rows,
        pending_s=round(relay.counters.pending_s, 3),
        problem=relay.counters.problem,
        unsound_tables=relay.to_dict()["unsound_tables"],
    )


def _verifier_stats(verifier: Verifier) -> VerifierStats:
    found = verifier.found
    return VerifierStats(
        share=verifier.share,
        verifications=found.verifications,
        equal=found.equal,
        inconclusive=sum(found.inconclusive.values()),
        nondeterministic=found.nondeterministic,
        stale=found.stale,
        leaks=found.leaks,
    )
