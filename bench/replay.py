"""Compare eviction policies: replay reads against S3-FIFO, LRU and Belady's MIN, at eight sizes.

There are two workloads: a recorded trace of database objects (docs/near.md says what it means for
responses), and a generated one, Zipf with scans in between, which needs no file. Each object counts
as one byte, so sizes are numbers of objects; a miss is followed by a put. MIN knows the future and
may decline to store an object: no policy can be better.

The program also measures the cost of a ``get`` that hits, in turn with ``dict.get`` and LRU. It
draws a picture (with matplotlib), prints tables and, as the last line, JSON. Without the trace it
replays only the generated workload, and draws only to ``--picture``.
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
"""Shares of the number of different objects in the workload."""

ZIPF_SEED, ZIPF_EXPONENT, ZIPF_OBJECTS = 7, 0.9, 20_000
SCANS, SCAN_READS, READS_BETWEEN_SCANS = 20, 2_000, 20_000
GET_ITEMS, GET_ROUNDS = 1_000, 2_000


@dataclass
class Workload:
    """The keys that are read, in order."""

    title: str
    reads: Sequence[int]

    def __post_init__(self) -> None:
        self.objects = len(set(self.reads))


class Lru:
    """Least recently used."""

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
    """Return the number of hits of S3-FIFO."""
    cache: S3Fifo[int, bool] = S3Fifo(size)
    get, put, misses = cache.get, cache.put, 0
    for key in reads:
        if get(key) is None:
            put(key, True, size_bytes=1)
            misses += 1
    return len(reads) - misses


def lru_hits(reads: Sequence[int], size: int) -> int:
    """Return the number of hits of LRU."""
    cache = Lru(size)
    get, put, misses = cache.get, cache.put, 0
    for key in reads:
        if get(key) is None:
            put(key, True)
            misses += 1
    return len(reads) - misses


def min_hits(reads: Sequence[int], size: int) -> int:
    """Return the number of hits of MIN: evict, or do not store, the object that is read again last.

    The position of its next read identifies a stored object, so the heap needs no keys; positions
    in the past were hits.
    """
    stored, hits, due, latest = 0, 0, bytearray(len(reads)), list[int]()
    for place, following in enumerate(next_reads(reads)):
        if due[place]:
            hits += 1
            stored -= 1
        if following == len(reads):
            continue
        due[following] = 1
        heappush(latest, -following)
        stored += 1
        if stored > size:
            due[-heappop(latest)] = 0
            stored -= 1
        if len(latest) > 2 * size + 1_000:
            latest = [position for position in latest if -position > place]
            heapify(latest)
    return hits


def next_reads(reads: Sequence[int]) -> "array[int]":
    """Return for each read the position of the key's next read, or the number of reads."""
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
    """Read a trace in the format of the cache2k benchmarks: xz, 4-byte big-endian integers."""
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


def generated() -> Workload:
    """Return reads by Zipf's law, with scans of objects that are read once."""
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
    """Print and return the hit ratio of each policy at each size."""
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
    """Return the nanoseconds of a ``get`` that hits: the best of interleaved rounds."""
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
    """Return the mean time of a call."""
    began = time.perf_counter_ns()
    for key in keys:
        get(key)
    return (time.perf_counter_ns() - began) / GET_ITEMS


def draw(results: list[tuple[Workload, dict[str, list[float]]]], picture: Path) -> None:
    """Draw the hit ratio by size, one panel per workload."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "the picture needs matplotlib (pip install matplotlib); or use --no-picture"
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
    """Replay, measure, draw, and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "trace",
        type=Path,
        nargs="?",
        help="default: ../shared/data/traces/orm-night.trace.xz beside the repository",
    )
    parser.add_argument(
        "--reads", type=int, default=5_000_000, help="use at most so many reads of the trace"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        help="default: docs/pictures/near-hit-ratio.png, if there is a trace",
    )
    parser.add_argument("--no-picture", action="store_true")
    options = parser.parse_args()

    workloads, picture = [generated()], options.picture
    if options.trace is not None or TRACE.exists():
        workloads.insert(0, recorded(options.trace or TRACE, options.reads))
        picture = picture or PICTURE
    else:
        print(
            f"no trace at ../{TRACE.relative_to(REPOSITORY.parent)}: replaying only the generated "
            f"workload",
            file=sys.stderr,
        )
    results = [(workload, replay(workload)) for workload in workloads]
    costs = get_costs()
    print("\na get that hits, ns:", ", ".join(f"{name} {cost:.0f}" for name, cost in costs.items()))
    if picture is not None and not options.no_picture:
        draw(results, picture)
    ratios = {workload.title.split("\n")[0]: found for workload, found in results}
    print(json.dumps({"sizes": SIZES, "hit_ratios": ratios, "get_ns": costs}))


if __name__ == "__main__":
    main()
