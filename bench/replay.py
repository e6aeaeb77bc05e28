"""How well the near cache's policy chooses: replays reads against S3-FIFO, LRU and Belady's MIN, at
eight sizes.

Two workloads: a recorded trace of database objects (docs/near.md says what it can tell of answers),
and a made one, popular items after Zipf with scans in between, which needs no file. All objects
count as one byte, so sizes are numbers of objects; a read that misses is a put. MIN knows the
future and may decline to keep: no policy can do better.

Also measures what a ``get`` that hits costs, against ``dict.get`` and LRU in turn. Draws a picture
(with matplotlib), prints tables and, last, one JSON line. Without the trace it replays the made
workload alone and draws only where ``--picture`` says.
"""

import argparse
import itertools
import json
import lzma
import random
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

from respcache.read.s3fifo import S3Fifo

REPOSITORY = Path(__file__).resolve().parents[1]
TRACE = REPOSITORY.parent / "shared" / "data" / "traces" / "orm-night.trace.xz"
PICTURE = REPOSITORY / "docs" / "pictures" / "near-hit-ratio.png"

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Of the number of different objects in the workload."""

ZIPF_SEED, ZIPF_EXPONENT, ZIPF_OBJECTS = 7, 0.9, 20_000
SCANS, SCAN_READS, READS_BETWEEN_SCANS = 20, 2_000, 20_000
GET_ITEMS, GET_ROUNDS = 1_000, 2_000


@dataclass
class Workload:
    """Keys in the order in which they are read."""

    title: str
    reads: Sequence[int]

    def __post_init__(self) -> None:
        self.objects = len(set(self.reads))


class Lru:
    """The usual one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any) -> Any:
        value = self._items.get(key)
        if value is not None:
            self._items.move_to_end(key)
        return value

    def put(self, key: Any, value: Any) -> None:
        self._items[key] = value
        if len(self._items) > self._size:
            self._items.popitem(last=False)


def s3fifo_hits(reads: Sequence[int], size: int) -> int:
    """Count the hits of S3-FIFO."""
    cache: S3Fifo[int, bool] = S3Fifo(size)
    get, put, misses = cache.get, cache.put, 0
    for key in reads:
        if get(key) is None:
            put(key, True, size_bytes=1)
            misses += 1
    return len(reads) - misses


def lru_hits(reads: Sequence[int], size: int) -> int:
    """Count the hits of LRU."""
    cache = Lru(size)
    get, put, misses = cache.get, cache.put, 0
    for key in reads:
        if get(key) is None:
            put(key, True)
            misses += 1
    return len(reads) - misses


def min_hits(reads: Sequence[int], size: int) -> int:
    """Count the hits of the best choice there is: what is read again latest goes, or is not kept at
    all.

    An object that is kept is known by the place of its next read, so the heap needs no keys; places
    that are past were hits.
    """
    kept, hits, due, latest = 0, 0, bytearray(len(reads)), list[int]()
    for place, following in enumerate(next_reads(reads)):
        if due[place]:
            hits += 1
            kept -= 1
        if following == len(reads):
            continue
        due[following] = 1
        heappush(latest, -following)
        kept += 1
        if kept > size:
            due[-heappop(latest)] = 0
            kept -= 1
        if len(latest) > 2 * size + 1_000:
            latest = [each for each in latest if -each > place]
            heapify(latest)
    return hits


def next_reads(reads: Sequence[int]) -> "array[int]":
    """Return for each read the place of the next read of the same key, or the number of reads."""
    following, seen = array("q", bytes(8 * len(reads))), dict[int, int]()
    for place in range(len(reads) - 1, -1, -1):
        following[place] = seen.get(reads[place], len(reads))
        seen[reads[place]] = place
    return following


POLICIES: dict[str, Callable[[Sequence[int], int], int]] = {
    "MIN": min_hits,
    "S3-FIFO": s3fifo_hits,
    "LRU": lru_hits,
}


def recorded(path: Path, limit: int) -> Workload:
    """Read a trace of 4-byte big-endian integers in xz, the format of the cache2k benchmarks."""
    try:
        with lzma.open(path) as file:
            reads = array("i", file.read(4 * limit))
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise SystemExit(f"cannot read the trace {path}: {error}") from error
    if sys.byteorder == "little":
        reads.byteswap()
    return Workload(
        f"Objects read by the ORM of a shop at night\n({len(reads):,} reads, {len(set(reads)):,} "
        f"objects)",
        list(reads),
    )


def made() -> Workload:
    """Make reads by Zipf with scans of objects that are read once."""
    rng = random.Random(ZIPF_SEED)
    weights = list(
        itertools.accumulate(1 / rank**ZIPF_EXPONENT for rank in range(1, ZIPF_OBJECTS + 1))
    )
    fresh, reads = itertools.count(ZIPF_OBJECTS), list[int]()
    for _ in range(SCANS):
        reads += rng.choices(range(ZIPF_OBJECTS), cum_weights=weights, k=READS_BETWEEN_SCANS)
        reads += itertools.islice(fresh, SCAN_READS)
    return Workload(
        f"Zipf({ZIPF_EXPONENT}) with scans\n({len(reads):,} reads, {len(set(reads)):,} objects)",
        reads,
    )


def replay(workload: Workload) -> dict[str, list[float]]:
    """Return the hit ratio of each policy at each size, and print it."""
    print(
        f"\n{workload.title.replace(chr(10), ' ')}\n\n| of objects | size |",
        *(f"{name} |" for name in POLICIES),
    )
    print("|---|---|" + "---|" * len(POLICIES))
    ratios: dict[str, list[float]] = {name: [] for name in POLICIES}
    for share in SIZES:
        size = round(share * workload.objects)
        for name, hits in POLICIES.items():
            ratios[name].append(round(hits(workload.reads, size) / len(workload.reads), 4))
        print(
            f"| {share:.1%} | {size:,} |",
            *(f"{each[-1]:.1%} |" for each in ratios.values()),
            flush=True,
        )
    return ratios


def get_costs() -> dict[str, float]:
    """Return the nanoseconds of a ``get`` that hits, the best round of each; the rounds take
    turns."""
    keys = [f"rc:{{acme}}:{number}" for number in range(GET_ITEMS)]
    plain, cache, lru = dict.fromkeys(keys, True), S3Fifo[str, bool](10 * GET_ITEMS), Lru(GET_ITEMS)
    for key in keys:
        cache.put(key, True, size_bytes=1)
        lru.put(key, True)
    costs: dict[str, float] = {}
    gets: dict[str, Callable[[str], Any]] = {
        "dict": plain.get,
        "S3-FIFO": cache.get,
        "LRU": lru.get,
    }
    for _ in range(GET_ROUNDS):
        for name, get in gets.items():
            costs[name] = min(costs.get(name, float("inf")), round_ns(get, keys))
    return {name: round(cost, 1) for name, cost in costs.items()}


def round_ns(get: Callable[[str], Any], keys: Iterable[str]) -> float:
    """Return what one of these calls took."""
    began = time.perf_counter_ns()
    for key in keys:
        get(key)
    return (time.perf_counter_ns() - began) / GET_ITEMS


def draw(results: list[tuple[Workload, dict[str, list[float]]]], picture: Path) -> None:
    """Draw hit ratio over size, one panel a workload."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "no picture: it needs matplotlib (pip install matplotlib); --no-picture does without"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    styles: dict[str, dict[str, Any]] = {
        "MIN": {
            "color": "0.55",
            "linestyle": (0, (4, 3)),
            "label": "Belady's MIN (knows the future)",
        },
        "S3-FIFO": {
            "color": "#0b6fb8",
            "marker": "o",
            "linewidth": 2.2,
            "label": "S3-FIFO (respcache)",
        },
        "LRU": {"color": "#d1572a", "marker": "s", "label": "LRU"},
    }
    figure, panels = pyplot.subplots(
        1, len(results), figsize=(5.4 * len(results), 4.2), sharey=True, squeeze=False, dpi=140
    )
    for panel, (workload, ratios) in zip(panels[0], results, strict=True):
        for name, values in ratios.items():
            panel.plot([100 * share for share in SIZES], values, markersize=5, **styles[name])
        panel.set_xscale("log")
        panel.set_xticks([100 * share for share in SIZES])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.set_ylim(0, 1)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(workload.title, fontsize=10)
        panel.set_xlabel("cache size, share of all objects (log scale)")
    panels[0][0].set_ylabel("hit ratio")
    panels[0][0].legend(loc="lower right", frameon=False)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "trace",
        type=Path,
        nargs="?",
        help="by default ../shared/data/traces/orm-night.trace.xz of the repository",
    )
    parser.add_argument(
        "--reads", type=int, default=5_000_000, help="take so many reads of the trace at most"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        help="by default docs/pictures/near-hit-ratio.png, if there is a trace",
    )
    parser.add_argument("--no-picture", action="store_true")
    options = parser.parse_args()

    workloads, picture = [made()], options.picture
    if options.trace is not None or TRACE.exists():
        workloads.insert(0, recorded(options.trace or TRACE, options.reads))
        picture = picture or PICTURE
    else:
        print(
            f"no trace at ../{TRACE.relative_to(REPOSITORY.parent)}: the made workload alone",
            file=sys.stderr,
        )
    results = [(workload, replay(workload)) for workload in workloads]
    costs = get_costs()
    print("\na get that hits, ns:", ", ".join(f"{name} {cost:.0f}" for name, cost in costs.items()))
    if picture is not None and not options.no_picture:
        draw(results, picture)
    figures = {workload.title.split("\n")[0]: ratios for workload, ratios in results}
    print(json.dumps({"sizes": SIZES, "hit_ratios": figures, "get_ns": costs}))


if __name__ == "__main__":
    main()
