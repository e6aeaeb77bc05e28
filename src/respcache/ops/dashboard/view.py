"""The content of the overview, as text and as columns for charts; the same for the page and for its
live updates. Pure."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from respcache.ops.dashboard import formatting as fmt
from respcache.ops.stats.rows import Overview, StatsRow
from respcache.ops.stats.shapes import BUCKET_S, LeaseStats, Point, Process

RECENT = 6
"""Points that are shown as the current value: one minute."""

FULL = 0.9
"""Share of the server's memory limit from which on it is shown as nearly full."""

PENDING_S = 5.0
"""Age of a pending invalidation from which on it is a warning."""


class Tile(msgspec.Struct, frozen=True):
    """A number with a small chart. ``style`` is the CSS class of the line, ``spark`` the column
    that it draws."""

    id: str
    label: str
    value: str
    unit: str = ""
    sub: str = ""
    style: str = "c-time"
    spark: str = ""


class State(msgspec.Struct, frozen=True):
    """The state of a component. ``tone`` is good, warn, bad or empty."""

    id: str
    label: str
    value: str
    sub: str = ""
    tone: str = ""
    share: float | None = None
    """A share from 0 to 1 that is drawn as a bar."""


Column = list[float | None]

_COLUMNS: dict[str, Callable[[Point], float | None]] = {
    "at": lambda point: point.at,
    "hits": lambda point: point.hits / BUCKET_S,
    "misses": lambda point: point.misses / BUCKET_S,
    "bypasses": lambda point: point.bypasses / BUCKET_S,
    "requests": lambda point: (point.hits + point.misses + point.bypasses) / BUCKET_S,
    "ratio": lambda point: (
        100 * point.hits / (point.hits + point.misses) if point.hits + point.misses else None
    ),
    "invalidations": lambda point: point.invalidations / BUCKET_S,
    "saved": lambda point: point.saved_s / BUCKET_S,
    "hit_p50": lambda point: _ms(point.hit_p50_s),
    "hit_p95": lambda point: _ms(point.hit_p95_s),
    "miss_p50": lambda point: _ms(point.miss_p50_s),
    "miss_p95": lambda point: _ms(point.miss_p95_s),
}
"""Values of a point: rates per second, shares in per cent, durations in milliseconds."""


def columns(points: Sequence[Point]) -> dict[str, Column]:
    """Return the columns of the charts, without the last point, which is unfinished."""
    return {name: [read(point) for point in points[:-1]] for name, read in _COLUMNS.items()}


def tiles(overview: Overview) -> list[Tile]:
    """Return the tiles of the overview, with values of the last minute."""
    recent, total = overview.series[:-1][-RECENT:], overview.totals
    seconds = max(1, len(recent)) * BUCKET_S
    hits, misses, bypasses = (
        sum(getattr(point, name) for point in recent) for name in ("hits", "misses", "bypasses")
    )
    ratio = hits / (hits + misses) if hits + misses else None
    saved = sum(point.saved_s for point in recent) / seconds
    hit, miss = _latest(recent, "hit_p50_s"), _latest(recent, "miss_p50_s")
    requests, in_all = (
        fmt.rate((hits + misses + bypasses) / seconds),
        f"{fmt.number(total.requests)} in total",
    )
    hit_p95, miss_p95 = (
        f"p95 {fmt.duration(_latest(recent, name))}" for name in ("hit_p95_s", "miss_p95_s")
    )
    estimated = f"{fmt.duration(total.saved_s)} in total (estimate)"
    return [
        Tile("requests", "Requests", requests, "/s", in_all, "c-time", "requests"),
        Tile(
            "ratio",
            "Hit ratio",
            fmt.share(ratio),
            "",
            f"{fmt.share(total.hit_ratio)} in total",
            "c-hit",
            "ratio",
        ),
        Tile(
            "misses",
            "Misses",
            fmt.rate(misses / seconds),
            "/s",
            f"{fmt.number(total.misses)} in total",
            "c-miss",
            "misses",
        ),
        Tile("saved", "Database time saved", fmt.rate(saved), "s/s", estimated, "c-saved", "saved"),
        Tile("hit", "A hit takes", fmt.duration(hit), "", hit_p95, "c-hit", "hit_p95"),
        Tile("miss", "A miss takes", fmt.duration(miss), "", miss_p95, "c-miss", "miss_p95"),
    ]


def states(overview: Overview) -> list[State]:
    """Return the states of server, workers and invalidations."""
    return [
        *_server(overview),
        _breaker(overview.processes),
        _workers(overview),
        *_leases(overview.processes),
        _verifier(overview),
    ]


def tenant_tiles(row: StatsRow) -> list[Tile]:
    """Return the tiles of a tenant, with totals since the workers started."""
    return [
        Tile("requests", "Requests", fmt.number(row.requests), "", _bypassed(row), "c-time"),
        Tile(
            "ratio",
            "Hit ratio",
            fmt.share(row.hit_ratio),
            "",
            f"{fmt.number(row.hits)} hits",
            "c-hit",
        ),
        Tile(
            "misses",
            "Misses",
            fmt.number(row.misses),
            "",
            f"{fmt.number(row.collapsed)} shared a fill",
            "c-miss",
        ),
        Tile(
            "served",
            "Served from the cache",
            fmt.size(row.bytes_served),
            "",
            f"{fmt.size(row.bytes_stored)} stored",
            "c-hit",
        ),
        Tile(
            "stores",
            "Stored",
            fmt.number(row.stores),
            "",
            fmt.reasons(row.stores_refused) or "nothing refused",
            "c-time",
        ),
        Tile(
            "invalidations",
            "Invalidations",
            fmt.number(row.invalidations),
            "",
            "of its modules",
            "c-saved",
        ),
    ]


def texts(shown: Sequence[Tile | State]) -> dict[str, list[str | float | None]]:
    """Return value, subtitle, tone and share by id, to update tiles and states on a page."""
    return {
        one.id: [one.value, one.sub, getattr(one, "tone", ""), getattr(one, "share", None)]
        for one in shown
    }


def _server(overview: Overview) -> list[State]:
    server = overview.server
    if server is None:
        up = overview.available
        return [
            State(
                "server",
                "Cache server",
                "up" if up else "unavailable",
                "" if up else overview.problem,
                "good" if up else "bad",
            )
        ]
    limit, used = server.memory_limit_bytes, server.memory_bytes
    tone = "warn" if limit and used > FULL * limit else "good"
    of = f"of {fmt.size(limit)}" if limit else "no limit"
    tight = "warn" if server.memory_policy == "noeviction" and limit else ""
    return [
        State(
            "server",
            "Cache server",
            f"{server.name} {server.version}",
            f"up {fmt.duration(server.uptime_s)}",
            "good",
        ),
        State(
            "memory", "Memory", fmt.size(used), of, tight or tone, used / limit if limit else None
        ),
        State(
            "evictions",
            "Evicted",
            fmt.number(server.evicted_keys),
            f"of {fmt.number(server.keys)} keys now",
        ),
    ]


def _breaker(processes: Sequence[Process]) -> State:
    open_in = [process for process in processes if not process.available]
    if not processes:
        return State("breaker", "Breaker", "unknown", "no worker publishes statistics", "warn")
    if not open_in:
        return State("breaker", "Breaker", "closed", "all workers are connected", "good")
    return State(
        "breaker",
        "Breaker",
        f"open in {len(open_in)} of {len(processes)}",
        "these respond without the cache",
        "bad",
    )


def _workers(overview: Overview) -> State:
    count, off = len(overview.processes), sum(not process.enabled for process in overview.processes)
    if off:
        return State("workers", "Workers", str(count), f"{off} switched off", "warn")
    if overview.problem:
        return State("workers", "Workers", str(count), "only this one is shown", "warn")
    hosts = len({process.host for process in overview.processes})
    return State(
        "workers",
        "Workers",
        str(count),
        "on one host" if hosts == 1 else f"on {hosts} hosts",
        "good",
    )


def _leases(processes: Sequence[Process]) -> list[State]:
    leases = [process.lease for process in processes if process.lease is not None]
    return [_pending(leases), _serving_lease(leases)] if leases else []


def _pending(leases: Sequence[LeaseStats]) -> State:
    rows, oldest_s = (
        max(lease.pending_rows for lease in leases),
        max(lease.pending_s for lease in leases),
    )
    return State(
        "pending",
        "Pending invalidations",
        fmt.number(rows),
        f"the oldest for {fmt.duration(oldest_s)}" if rows else "none",
        "warn" if oldest_s > PENDING_S else "good",
    )


def _serving_lease(leases: Sequence[LeaseStats]) -> State:
    age_s = max((lease.age_s for lease in leases if lease.age_s is not None), default=None)
    lost = [lease for lease in leases if not lease.alive]
    problem = next(
        (lease.problem for lease in lost if lease.problem), "these serve nothing from the cache"
    )
    return State(
        "lease",
        "Serving lease",
        "none yet" if age_s is None else f"{fmt.duration(age_s)} old",
        f"lost in {len(lost)}: {problem}"
        if lost
        else f"valid for {fmt.duration(leases[0].lease_s)}",
        "bad" if lost else "good",
    )


def _verifier(overview: Overview) -> State:
    verifiers = [process.verifier for process in overview.processes if process.verifier is not None]
    if not verifiers:
        return State("verifier", "Verifier", "off", "no hit is re-executed")
    compared = sum(verifier.verifications for verifier in verifiers)
    found = sum(verifier.stale + verifier.leaks for verifier in verifiers)
    return State(
        "verifier",
        "Verifier",
        f"{found} wrong responses" if found else "no findings",
        f"{fmt.number(compared)} hits compared",
        "bad" if found else "good",
    )


def _bypassed(row: StatsRow) -> str:
    return f"{fmt.number(sum(row.bypasses.values()))} bypassed the cache"


def _latest(points: Sequence[Point], name: str) -> Any:
    return next(
        (value for point in reversed(points) if (value := getattr(point, name)) is not None), None
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
