"""What the demo's traffic counts and measures, and the summary.

The traffic's thread writes, the console's thread reads.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from respcache.ops.bench.load import percentile

RECENT_S = 10.0
"""The period of the live line."""

MAX_TIMES = 100_000
"""The latest response times, from which percentiles are computed."""

MAX_PROBLEMS = 20
"""The first problems, whose text is kept."""

Source = Literal["hit", "database", "write"]
SOURCES: tuple[Source, ...] = ("hit", "database", "write")


@dataclass
class ResponseTimes:
    """The number of requests of one kind, and their response times."""

    count: int = 0
    max_ms: float = 0.0
    latest_ms: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TIMES))

    def add(self, took_ms: float) -> None:
        """Add the time of a request."""
        self.count += 1
        self.max_ms = max(self.max_ms, took_ms)
        self.latest_ms.append(took_ms)

    def summary(self) -> dict[str, float | int | None]:
        """Return the number of requests, and percentiles in milliseconds."""
        times = list(self.latest_ms)
        p50, p95 = (round(percentile(times, percent), 2) if times else None for percent in (50, 95))
        return {
            "count": self.count,
            "p50_ms": p50,
            "p95_ms": p95,
            "max_ms": round(self.max_ms, 2) if times else None,
        }


class DemoCounters:
    """The counters of one run.

    ``outage`` says that the cache server is stopped or frozen now. ``compared`` counts comparisons
    of a written record with a response.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._ended: float | None = None
        self.outage = False
        self.outages: list[str] = []
        self.times: dict[Source, ResponseTimes] = {name: ResponseTimes() for name in SOURCES}
        self.outage_times: dict[Source, ResponseTimes] = {name: ResponseTimes() for name in SOURCES}
        self.kinds: Counter[str] = Counter()
        self.tenants: Counter[str] = Counter()
        self.compared = 0
        self.failed = self.failed_in_outage = self.stale = self.skipped = 0
        self.problems: list[str] = []
        self._recent: deque[tuple[float, Source, float]] = deque(maxlen=50_000)

    def response(self, source: Source, took_ms: float, *, tenant: str, outage: bool) -> None:
        """Count a response. ``outage``: there was an outage at its beginning or its end."""
        (self.outage_times if outage else self.times)[source].add(took_ms)
        self.tenants[tenant] += 1
        self._recent.append((time.monotonic(), source, took_ms))

    def fail(self, problem: str, *, outage: bool) -> None:
        """Count a request that failed."""
        self.failed += 1
        self.failed_in_outage += outage
        self._keep(f"failed: {problem}")

    def note_stale(self, request: str, stale: Sequence[str]) -> None:
        """Count a stale response."""
        self.stale += 1
        self._keep(f"stale: {request}: {'; '.join(stale[:3])}")

    def _keep(self, problem: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def end(self) -> None:
        """Stop the clock."""
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """The duration of the run so far."""
        return (self._ended or time.monotonic()) - self._began

    @property
    def right(self) -> bool:
        """Whether no request failed and no response was stale."""
        return not (self.failed or self.stale)

    def line(self) -> str:
        """Return the live line: the last 10 seconds."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RECENT_S:
            self._recent.popleft()
        recent = list(self._recent)
        seconds = min(RECENT_S, max(0.1, self.seconds))
        hits, others = (
            [took for _, source, took in recent if source == wanted]
            for wanted in ("hit", "database")
        )
        ratio = f"{100 * len(hits) / (len(hits) + len(others)):.0f} %" if hits or others else "-"
        return (
            f"{span(self.seconds)} {len(recent) / seconds:5.1f}/s  hits {ratio:>4}  p50: hit "
            f"{_median(hits)}, database {_median(others)}  failed {self.failed}  stale {self.stale}"
        )

    def summary(self) -> dict[str, Any]:
        """Return all counters, for ``--json``."""
        hits, others, writes = (
            self.times[source].count + self.outage_times[source].count for source in SOURCES
        )
        return {
            "seconds": round(self.seconds, 1),
            "requests": hits + others + writes,
            "reads": hits + others,
            "writes": writes,
            "hit_ratio": round(hits / (hits + others), 4) if hits + others else None,
            "kinds": dict(self.kinds.most_common()),
            "tenants": dict(self.tenants.most_common()),
            "outages": self.outages,
            "times": {name: times.summary() for name, times in self.times.items()},
            "times_in_outages": {
                name: times.summary() for name, times in self.outage_times.items()
            },
            "compared": self.compared,
            "failed": self.failed,
            "failed_in_outages": self.failed_in_outage,
            "stale": self.stale,
            "skipped_visits": self.skipped,
            "problems": list(self.problems),
        }


def span(seconds: float) -> str:
    """Format a duration as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _median(times: Sequence[float]) -> str:
    return f"{percentile(times, 50):.1f} ms" if times else "-"
