"""What the demo's traffic saw: counted, timed and summed up. Written by the traffic's thread, read
by the console's."""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from respcache.ops.bench.load import percentile

NOW_S = 10.0
"""What the live line speaks of."""

MOST_TIMES = 100_000
"""Times of which percentiles are made: the latest."""

MOST_TOLD = 20
"""Problems whose text is kept: the first ones."""

Way = Literal["hit", "database", "write"]
WAYS: tuple[Way, ...] = ("hit", "database", "write")


@dataclass
class ResponseTimes:
    """How many requests went one way, and how long they took."""

    count: int = 0
    most_ms: float = 0.0
    latest_ms: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_TIMES))

    def add(self, took_ms: float) -> None:
        """Note one."""
        self.count += 1
        self.most_ms = max(self.most_ms, took_ms)
        self.latest_ms.append(took_ms)

    def summary(self) -> dict[str, float | int | None]:
        """Return the number and percentiles of milliseconds."""
        times = list(self.latest_ms)
        p50, p95 = (round(percentile(times, percent), 2) if times else None for percent in (50, 95))
        return {
            "count": self.count,
            "p50_ms": p50,
            "p95_ms": p95,
            "max_ms": round(self.most_ms, 2) if times else None,
        }


class DemoCounters:
    """Of one run of the demo."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._ended: float | None = None
        self.outage = False
        """The cache's server is away now."""
        self.outages: list[str] = []
        self.calm: dict[Way, ResponseTimes] = {way: ResponseTimes() for way in WAYS}
        self.broken: dict[Way, ResponseTimes] = {way: ResponseTimes() for way in WAYS}
        self.kinds: Counter[str] = Counter()
        self.tenants: Counter[str] = Counter()
        self.compared = 0
        """Records of ours that answers were compared by."""
        self.failed = self.failed_in_outage = self.stale = self.skipped = 0
        self.problems: list[str] = []
        self._recent: deque[tuple[float, Way, float]] = deque(maxlen=50_000)

    def answered(self, way: Way, took_ms: float, *, tenant: str, outage: bool) -> None:
        """Note an answer, and whether the server was away at its beginning or its end."""
        (self.broken if outage else self.calm)[way].add(took_ms)
        self.tenants[tenant] += 1
        self._recent.append((time.monotonic(), way, took_ms))

    def fail(self, problem: str, *, outage: bool) -> None:
        """Note a request that did not get the answer that it must get."""
        self.failed += 1
        self.failed_in_outage += outage
        self._tell(f"failed: {problem}")

    def note_stale(self, request: str, what: Sequence[str]) -> None:
        """Note an answer that was older than it may be."""
        self.stale += 1
        self._tell(f"stale: {request}: {'; '.join(what[:3])}")

    def _tell(self, problem: str) -> None:
        if len(self.problems) < MOST_TOLD:
            self.problems.append(problem)

    def end(self) -> None:
        """Note that nothing more comes."""
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return (self._ended or time.monotonic()) - self._began

    @property
    def right(self) -> bool:
        """Whether nothing failed and nothing was stale."""
        return not (self.failed or self.stale)

    def line(self) -> str:
        """Say how things are now."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - NOW_S:
            self._recent.popleft()
        recent = list(self._recent)
        seconds = min(NOW_S, max(0.1, self.seconds))
        hits, others = (
            [took for _, way, took in recent if way == wanted] for wanted in ("hit", "database")
        )
        ratio = f"{100 * len(hits) / (len(hits) + len(others)):.0f} %" if hits or others else "-"
        return (
            f"{span(self.seconds)} {len(recent) / seconds:5.1f}/s  hits {ratio:>4}  p50: hit "
            f"{_middle(hits)}, "
            f"database {_middle(others)}  failed {self.failed}  stale {self.stale}"
        )

    def summary(self) -> dict[str, Any]:
        """Return everything that was counted."""
        hits, others = (
            self.calm[way].count + self.broken[way].count for way in ("hit", "database")
        )
        writes = self.calm["write"].count + self.broken["write"].count
        return {
            "seconds": round(self.seconds, 1),
            "requests": hits + others + writes,
            "reads": hits + others,
            "writes": writes,
            "hit_ratio": round(hits / (hits + others), 4) if hits + others else None,
            "kinds": dict(self.kinds.most_common()),
            "tenants": dict(self.tenants.most_common()),
            "outages": self.outages,
            "times": {way: times.summary() for way, times in self.calm.items()},
            "times_in_outages": {way: times.summary() for way, times in self.broken.items()},
            "compared": self.compared,
            "failed": self.failed,
            "failed_in_outages": self.failed_in_outage,
            "stale": self.stale,
            "skipped_visits": self.skipped,
            "problems": list(self.problems),
        }


def span(seconds: float) -> str:
    """Write minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _middle(times: Sequence[float]) -> str:
    return f"{percentile(times, 50):.1f} ms" if times else "-"
