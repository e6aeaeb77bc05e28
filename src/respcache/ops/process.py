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

from respcache.ops.fleet import Audits, Fence, ModuleFigures, Process, RouteFigures, Sheet, Sum, read_row, totals_of
from respcache.ops.stats import Stats, Times, Totals

if TYPE_CHECKING:
    from respcache.cache import Cache

CHUNK = 50
"""Tenants that are worked on before the event loop gets its turn: well under a millisecond."""

T = TypeVar("T")


@dataclass(slots=True)
class Survey:
    """All figures of this process, added up; and of each tenant a number that grows when something changes."""

    routes: list[RouteFigures] = field(default_factory=list)
    writes: list[ModuleFigures] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    times: Times = field(default_factory=Times)
    events: dict[str, int] = field(default_factory=dict)


async def survey_of(stats: Stats) -> Survey:
    """Add up all figures of this process, in portions between which the event loop gets its turn."""
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
    sums: dict[tuple[str, str], Sum] = {}
    for chunk in chunks(stats.tenants()):
        for tenant in chunk:
            events = 0
            for one in stats.figures(tenant):
                row, bypasses, refusals = read_row(one), one.bypasses, one.refusals
                events += sum(row)
                if bypasses or refusals:
                    events += sum(bypasses.values()) + sum(refusals.values())
                name = one.route, one.module
                found = sums.get(name)
                if found is None:
                    found = sums[name] = Sum()
                found.take(row, (dict(bypasses), dict(refusals)))
            survey.events[tenant] = events
        yield
    for (route, module), found in sorted(sums.items()):
        totals = totals_of(*found.row())
        survey.totals.add(totals)
        if route:
            survey.routes.append(RouteFigures(route, module, totals, stats.times(route)))
            survey.times.add(stats.times(route))
        else:
            survey.writes.append(ModuleFigures(module, totals))


def sheet_of(cache: "Cache", survey: Survey, *, process: str, started_at: float) -> Sheet:
    """Return all that this process says of itself."""
    findings = [] if cache.audit is None else list(cache.audit.findings)
    return Sheet(_describe(cache, process, started_at), survey.routes, survey.writes, findings)


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
        library=_library(),
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


def _library() -> str:
    try:
        return version("respcache")
    except PackageNotFoundError:  # run from its source
        return ""


def _chosen(kind: type[T], said: dict[str, Any]) -> T:
    """Make a struct of those entries that it has fields for."""
    return kind(**{name: said[name] for name in kind.__annotations__})


def _audits(said: dict[str, Any]) -> Audits:
    return _chosen(Audits, {**said, "inconclusive": sum(said["inconclusive"].values())})
