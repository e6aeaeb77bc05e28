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

from respcache.ops.fleet import Audits, Fence, ModuleFigures, Process, RouteFigures, Sheet
from respcache.ops.stats import Figures, Stats, Times, Totals

if TYPE_CHECKING:
    from respcache.cache import Cache

CHUNK = 25
"""Tenants that are worked on before the event loop gets its turn: well under a millisecond."""

ATTEMPTS = 3

T = TypeVar("T")


@dataclass(slots=True)
class Survey:
    """All figures of this process, added up; and of each tenant a number that grows when something
    changes."""

    routes: list[RouteFigures] = field(default_factory=list)
    writes: list[ModuleFigures] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    times: Times = field(default_factory=Times)
    events: dict[str, int] = field(default_factory=dict)


async def survey_of(stats: Stats) -> Survey:
    """Add up all figures of this process, in portions between which the event loop gets its turn.

    Half a microsecond per tenant and route.
    """
    survey = Survey()
    for _ in _add_up(stats, survey):
        await asyncio.sleep(0)
    return survey


def survey_at_once(stats: Stats) -> Survey:
    """The same for whoever has no event loop, in any thread."""
    survey = Survey()
    for _ in _add_up(stats, survey):
        pass
    return survey


def _add_up(stats: Stats, survey: Survey) -> Iterator[None]:
    sums: dict[str, Figures] = {}
    for chunk in chunks(stats.tenants()):
        for tenant in chunk:
            survey.events[tenant] = _take(stats.figures(tenant), sums)
        yield
    for _, found in sorted(sums.items()):
        totals = Totals()
        totals.add(found)
        survey.totals.add(found)
        if found.route:
            survey.routes.append(RouteFigures(found.route, found.module, totals, found.times))
            survey.times.add(found.times)
        else:
            survey.writes.append(ModuleFigures(found.module, totals))


def _take(figures: Iterable[Figures], sums: dict[str, Figures]) -> int:
    """Add the figures of a tenant to those of all; return a number that grows whenever one of them
    does.

    Written out: the event loop waits for it.
    """
    events = 0
    for one in figures:
        key = one.key
        total = sums.get(key)
        if total is None:
            total = sums[key] = Figures(one.module, one.route, one.times)
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


def sheet_of(cache: "Cache", survey: Survey, *, process: str, started_at: float) -> Sheet:
    """Return all that this process says of itself."""
    findings = [] if cache.audit is None else list(cache.audit.findings)
    return Sheet(_describe(cache, process, started_at), survey.routes, survey.writes, findings)


def sheet_at_once(cache: "Cache", *, process: str, started_at: float) -> Sheet:
    """The same for whoever has no event loop, in any thread: what changes while it is read is read
    again."""
    for attempt in range(ATTEMPTS):
        try:
            return sheet_of(
                cache, survey_at_once(cache.figures), process=process, started_at=started_at
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
    near, rounds, audit, stats = cache.near, cache.rounds, cache.audit, cache.figures
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
        fence=None if rounds is None else _chosen(Fence, rounds.to_dict()),
        audit=None if audit is None else _audits(audit.to_dict()),
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
