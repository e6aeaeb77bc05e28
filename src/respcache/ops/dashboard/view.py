"""What the overview says, in words and in lines: the same for the page and for the live figures
that follow it. Pure."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from respcache.ops.dashboard import formatting as words
from respcache.ops.figures import Overview, Row
from respcache.ops.fleet import BUCKET_S, Point, Process

RECENT = 6
"""Points that make "now": a minute."""

FULL = 0.9
"""Of the server's memory limit, from which on it is said to be nearly full."""

PENDING_S = 5.0
"""An invalidation that waits longer is a warning."""


class Tile(msgspec.Struct, frozen=True):
    """A figure with its recent course. ``style``: the colour of its line; ``spark``: the column
    that it draws."""

    id: str
    label: str
    value: str
    unit: str = ""
    sub: str = ""
    style: str = "c-time"
    spark: str = ""


class State(msgspec.Struct, frozen=True):
    """How something is. ``tone``: good, warn, bad, or nothing."""

    id: str
    label: str
    value: str
    sub: str = ""
    tone: str = ""
    share: float | None = None
    """Of one, where it is a part of something: drawn as a bar."""


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
"""What is drawn of each point: rates per second, shares in per cent, times in milliseconds."""


def columns(points: Sequence[Point]) -> dict[str, Column]:
    """Return the columns that are drawn. The last point is unfinished, so it is left out."""
    return {name: [read(point) for point in points[:-1]] for name, read in _COLUMNS.items()}


def tiles(overview: Overview) -> list[Tile]:
    """Return the figures at the top of the overview, of the last minute."""
    recent, total = overview.series[:-1][-RECENT:], overview.totals
    seconds = max(1, len(recent)) * BUCKET_S
    hits, misses, bypasses = (
        sum(getattr(point, name) for point in recent) for name in ("hits", "misses", "bypasses")
    )
    ratio = hits / (hits + misses) if hits + misses else None
    saved = sum(point.saved_s for point in recent) / seconds
    hit, miss = _latest(recent, "hit_p50_s"), _latest(recent, "miss_p50_s")
    requests, in_all = (
        words.rate((hits + misses + bypasses) / seconds),
        f"{words.number(total.requests)} in all",
    )
    hit_p95, miss_p95 = (
        f"p95 {words.span(_latest(recent, name))}" for name in ("hit_p95_s", "miss_p95_s")
    )
    estimated = f"{words.span(total.saved_s)} in all, estimated"
    return [
        Tile("requests", "Requests", requests, "/s", in_all, "c-time", "requests"),
        Tile(
            "ratio",
            "Hit ratio",
            words.share(ratio),
            "",
            f"{words.share(total.hit_ratio)} in all",
            "c-hit",
            "ratio",
        ),
        Tile(
            "misses",
            "Misses",
            words.rate(misses / seconds),
            "/s",
            f"{words.number(total.misses)} in all",
            "c-miss",
            "misses",
        ),
        Tile(
            "saved", "Database time saved", words.rate(saved), "s/s", estimated, "c-saved", "saved"
        ),
        Tile("hit", "A hit takes", words.span(hit), "", hit_p95, "c-hit", "hit_p95"),
        Tile("miss", "A miss takes", words.span(miss), "", miss_p95, "c-miss", "miss_p95"),
    ]


def states(overview: Overview) -> list[State]:
    """Return how server, workers and invalidations are."""
    return [
        *_server(overview),
        _breaker(overview.processes),
        _workers(overview),
        *_fences(overview.processes),
        _verifier(overview),
    ]


def tenant_tiles(row: Row) -> list[Tile]:
    """Return the figures of a tenant, since the workers started."""
    return [
        Tile("requests", "Requests", words.number(row.requests), "", _bypassed(row), "c-time"),
        Tile(
            "ratio",
            "Hit ratio",
            words.share(row.hit_ratio),
            "",
            f"{words.number(row.hits)} hits",
            "c-hit",
        ),
        Tile(
            "misses",
            "Misses",
            words.number(row.misses),
            "",
            f"{words.number(row.collapsed)} shared a fill",
            "c-miss",
        ),
        Tile(
            "served",
            "Served from the cache",
            words.size(row.bytes_served),
            "",
            f"{words.size(row.bytes_stored)} stored",
            "c-hit",
        ),
        Tile(
            "stores",
            "Stored",
            words.number(row.stores),
            "",
            words.reasons(row.stores_refused) or "nothing refused",
            "c-time",
        ),
        Tile(
            "invalidations",
            "Invalidations",
            words.number(row.invalidations),
            "",
            "of its modules",
            "c-saved",
        ),
    ]


def texts(shown: Sequence[Tile | State]) -> dict[str, list[str | float | None]]:
    """Return value, subtitle, tone and share by name, for what is on the page already."""
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
                "up" if up else "away",
                "" if up else overview.problem,
                "good" if up else "bad",
            )
        ]
    limit, used = server.memory_limit_bytes, server.memory_bytes
    tone = "warn" if limit and used > FULL * limit else "good"
    of = f"of {words.size(limit)}" if limit else "no limit"
    tight = "warn" if server.memory_policy == "noeviction" and limit else ""
    return [
        State(
            "server",
            "Cache server",
            f"{server.name} {server.version}",
            f"up {words.span(server.uptime_s)}",
            "good",
        ),
        State(
            "memory", "Memory", words.size(used), of, tight or tone, used / limit if limit else None
        ),
        State(
            "evictions",
            "Evicted",
            words.number(server.evicted_keys),
            f"of {words.number(server.keys)} keys now",
        ),
    ]


def _breaker(processes: Sequence[Process]) -> State:
    away = [process for process in processes if not process.available]
    if not processes:
        return State("breaker", "Breaker", "unknown", "no worker publishes figures", "warn")
    if not away:
        return State("breaker", "Breaker", "closed", "all reach the server", "good")
    return State(
        "breaker",
        "Breaker",
        f"open in {len(away)} of {len(processes)}",
        "they answer without the cache",
        "bad",
    )


def _workers(overview: Overview) -> State:
    count, off = len(overview.processes), sum(not process.enabled for process in overview.processes)
    if off:
        return State("workers", "Workers", str(count), f"{off} switched off", "warn")
    if overview.problem:
        return State("workers", "Workers", str(count), "figures of this one only", "warn")
    hosts = len({process.host for process in overview.processes})
    return State(
        "workers",
        "Workers",
        str(count),
        "on one host" if hosts == 1 else f"on {hosts} hosts",
        "good",
    )


def _fences(processes: Sequence[Process]) -> list[State]:
    fences = [process.lease for process in processes if process.lease is not None]
    if not fences:
        return []
    rows, oldest = (
        max(lease.pending_rows for lease in fences),
        max(lease.pending_s for lease in fences),
    )
    age = max((lease.age_s for lease in fences if lease.age_s is not None), default=None)
    lost = [lease for lease in fences if not lease.alive]
    problem = next(
        (lease.problem for lease in lost if lease.problem), "nothing is served from the cache there"
    )
    waits = f"the oldest for {words.span(oldest)}" if rows else "none waits"
    bound = (
        f"lost in {len(lost)}: {problem}" if lost else f"of {words.span(fences[0].lease_s)} at most"
    )
    return [
        State(
            "pending",
            "Pending invalidations",
            words.number(rows),
            waits,
            "warn" if oldest > PENDING_S else "good",
        ),
        State("lease", "Fence age", words.span(age), bound, "bad" if lost else "good"),
    ]


def _verifier(overview: Overview) -> State:
    audits = [process.verifier for process in overview.processes if process.verifier is not None]
    made, found = (
        sum(verifier.audits for verifier in audits),
        sum(verifier.stale + verifier.leaks for verifier in audits),
    )
    if not audits:
        return State("verifier", "Audit", "off", "no hit is made anew and compared")
    return State(
        "verifier",
        "Audit",
        f"{found} found" if found else "nothing found",
        f"{words.number(made)} hits compared",
        "bad" if found else "good",
    )


def _bypassed(row: Row) -> str:
    return f"{words.number(sum(row.bypasses.values()))} bypassed the cache"


def _latest(points: Sequence[Point], name: str) -> Any:
    return next(
        (value for point in reversed(points) if (value := getattr(point, name)) is not None), None
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
