"""Tables of the results: for the terminal, and bench/RESULTS.md with the caveats beside the
figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lanes import BY_NAME, Lane
from measures import hits, memory, stampede

Result = Mapping[str, Any]
Table = tuple[Sequence[str], list[Sequence[str]]]
PEERS = ("cashews", "fastapi-cache2", "aiocache", "redis-py")
"""What runs in the application's own process, as ours does."""
COUNTS = [f"c{n}" for n in hits.CONNECTIONS]

CAVEATS = """\
- Every ratio is taken within one round (the lanes of a round run in random order, seconds apart) and against the bare lane of the
  same run. The tables show the median over the rounds and, in brackets, the quartiles: half of the rounds lie between. Where
  the quartiles are far apart, the machine was busy with something else.
- CPU is what the scheduler counted for all threads of all server processes of a lane, kernel time for its sockets included. It is
  the figure that counts: throughput also depends on what else the cores have to do. Valkey's CPU stands beside it, not inside.
- One worker: uvicorn with uvloop and httptools, no access log. The load generator (`src/respcache/ops/bench/load.py`)
  compares every answer with the expected bytes. It shares a core with Valkey: lanes that ask Valkey for every hit are slower
  here than on a larger machine.
  `>=` at a throughput: that core was the slower side ({busy} busy or more), so the lane could do more.
- Same handler, body (40,000 bytes of JSON, 64 pages), keys and `Authorization` header for all, except `uncached`, which is
  another list of about the same size, from PostgreSQL. Requests carry no `Accept-Encoding`: all bodies are sent plain.
- What a hit checks differs. The bare lane and the proxies check nobody's token; peers look it up in a dict, in a FastAPI
  dependency; ours do the same look-up in their resolver, and again now and then for a request that was seen before.
  fastapi-cache2, aiocache and redis-py read the entry itself from Valkey
  for every hit, so a deleted one is gone at once; cashews drops its copies when Valkey tells of a change. None of them notices
  an entry filled by a read that a write overtook, which is what `strict` checks. nginx and Varnish have no invalidation here.
- Ours run with their defaults, the audit of one hit in a thousand included, and without an outbox, as there is no database
  behind this handler (`make bench BENCH=outbox` measures that).
- A stretch of load in which one answer of ours was no hit (on a busy machine Valkey does not get to answer within 50 ms) is
  repeated, at most thrice: {repeated} here. Wrong bytes are never repeated.
- Peers are used as their documentation says, in the form that makes their hits cheapest where it names several. A hit of
  fastapi-cache2 and aiocache is decoded and serialised anew by FastAPI: that is how their decorators work."""


def markdown(
    result: Result, *, command: str, notes: Sequence[str], pictures: Sequence[Path]
) -> str:
    """Write RESULTS.md."""
    what = (
        "Written by `bench/run.py`. Read the ratios, which are of one run each; absolute figures "
        "are of this machine."
    )
    parts = ["# Results of `make bench`", what]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = [
        ("machine", result["machine"]),
        ("pinned", result["cores"]),
        ("versions", versions),
        ("command", f"`{command}`"),
    ]
    parts += ["\n".join(f"- {name}: {value}" for name, value in machine), *notes]
    for title, text, table in sections(result):
        parts += [f"## {title}", text, _markdown(table)]
        parts += [
            f"![{picture.stem}](../docs/pictures/{picture.name})"
            for picture in pictures
            if _belongs(picture, title)
        ]
    parts += [
        "## Caveats",
        CAVEATS.format(busy=f"{hits.BUSY:.0%}", repeated=_repeated(result)),
        "## What a hit of each lane does",
        _markdown(_abouts(result)),
        *_absent(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(result: Result) -> str:
    """Write the same tables for a terminal."""
    return "\n\n".join(f"{title}\n{_columns(table)}" for title, _, table in sections(result))


def sections(result: Result) -> Iterable[tuple[str, str, Table]]:
    """List title, explanation and table of everything that was measured."""
    if lanes(result):
        yield (
            "Hits: CPU of bare ASGI / CPU of the lane",
            "Higher is better; 1 is a hit for the price of sending prepared bytes. 1, 16 and 64 "
            "connections.",
            _cpu(result),
        )
        yield "Hits: throughput and latency", "", _throughput(result)
        best = against_peers(result)
        if best:
            yield (
                "Throughput against the best form of a peer",
                "Peers: " + ", ".join(PEERS) + ".",
                _best(best),
            )
    if "invalidation" in result:
        text = (
            "Milliseconds until the caller knows, and the commands that Valkey ran (those inside "
            "scripts too). Ours writes one "
            "generation, whatever there is; the others find keys and remove them."
        )
        yield "Invalidating a tenant's list", text, _invalidation(result["invalidation"])
    if "stampede" in result:
        text = (
            f"{stampede.CALLERS} callers in the same moment, {stampede.PROCESSES} processes, a "
            f"handler that takes 200 ms."
        )
        yield "A cold key", text, _stampede(result["stampede"])
    if "misses" in result:
        text = (
            "Fresh keys, one connection, in turns with the same handler without a cache. In "
            "percent of the handler alone."
        )
        yield "A miss", text, _misses(result["misses"])
    if "memory" in result:
        text = (
            f"{result['memory']['requests']:,} requests for {memory.KEYS:,} keys (Zipf "
            f"{memory.EXPONENT}), Valkey with "
            f"{memory.MEMORY} and LRU, near cache off."
        )
        yield "Memory, and the hit ratio at equal memory", text, _memory(result["memory"])
    if "workers" in result:
        text = (
            "64 connections. With two cores the second worker shares one with the load generator "
            "and Valkey."
        )
        yield "One worker and two", text, _workers(result["workers"])


def lanes(result: Result) -> list[str]:
    """Name the lanes that were measured, in the order of the list."""
    order = [*BY_NAME, *result]
    return sorted(
        (name for name, found in result.items() if isinstance(found, dict) and "c1" in found),
        key=order.index,
    )


def against_peers(result: Result) -> dict[str, dict[str, float]]:
    """Divide the throughput of each of our lanes by that of the fastest peer, by connections."""
    peers = [name for name in PEERS if name in result]
    ours = [name for name in lanes(result) if name in BY_NAME and BY_NAME[name].ours]
    if not peers:
        return {}
    best = {count: max(result[peer][count]["rps_ratio"] for peer in peers) for count in COUNTS}
    return {
        name: {count: round(result[name][count]["rps_ratio"] / best[count], 2) for count in COUNTS}
        for name in ours
    }


def _cpu(result: Result) -> Table:
    head = [
        "lane",
        *(f"{n} conn." if n > 1 else "1 connection" for n in hits.CONNECTIONS),
        "CPU us",
        "Valkey CPU us",
    ]
    rows = []
    for name in lanes(result):
        found = [result[name][count] for count in COUNTS]
        cells = [
            f"{one['cpu_ratio']:.2f} ({one['cpu_ratio_iqr'][0]:.2f}-{one['cpu_ratio_iqr'][1]:.2f})"
            for one in found
        ]
        asks = _lane(name).store or any(one["valkey_us"] > 10 for one in found)
        valkey = " / ".join(f"{one['valkey_us']:.0f}" for one in found) if asks else "-"
        rows.append([name, *cells, " / ".join(f"{one['cpu_us']:.0f}" for one in found), valkey])
    return head, rows


def _throughput(result: Result) -> Table:
    head = [
        "lane",
        *(
            f"{what}, {n}"
            for what in ("req/s / bare", "req/s", "p50 / p99 ms")
            for n in hits.CONNECTIONS
        ),
    ]
    rows = []
    for name in lanes(result):
        found = [result[name][count] for count in COUNTS]
        marks = [">=" if one["asking_core_busy"] >= hits.BUSY else "" for one in found]
        rows.append(
            [
                name,
                *(f"{mark}{one['rps_ratio']:.2f}" for one, mark in zip(found, marks, strict=True)),
                *(f"{mark}{one['rps']:,.0f}" for one, mark in zip(found, marks, strict=True)),
                *(f"{one['p50_ms']:.2f} / {one['p99_ms']:.2f}" for one in found),
            ]
        )
    return head, rows


def _best(best: Mapping[str, Mapping[str, float]]) -> Table:
    return ["lane", *COUNTS], [
        [name, *(f"{ratios[count]:.1f}" for count in COUNTS)] for name, ratios in best.items()
    ]


def _invalidation(found: Result) -> Table:
    rows = []
    for case, sizes in found.items():
        for size, ways in sizes.items():
            for way, one in ways.items():
                ran = ", ".join(
                    f"{count:,} {command}" for command, count in one["commands"].items()
                )
                rows.append([f"{int(size):,}", case, way, f"{one['ms']:,.2f}", ran])
    return ["keys", "of the tenant", "way", "ms", "commands"], rows


def _stampede(found: Result) -> Table:
    head = ["library", "fetches", "failed requests", "slowest answer, ms"]
    return head, [
        [name, _range(one["fetches"]), str(one["failed"]), f"{one['slowest_ms']:,.0f}"]
        for name, one in found.items()
    ]


def _misses(found: Result) -> Table:
    names = {"handler": "the benchmark's handler", "crm": "the CRM's list from PostgreSQL"}
    head = ["handler", "CPU of it, us", "CPU more, %", "p50 of it, us", "p50 more, %"]
    return head, [
        [
            names[name],
            f"{one['uncached_cpu_us']:,.0f}",
            _percent(one, "cpu_overhead_percent"),
            f"{one['uncached_p50_us']:,.0f}",
            _percent(one, "latency_overhead_percent"),
        ]
        for name, one in found.items()
    ]


def _memory(found: Result) -> Table:
    sides = [name for name in found if isinstance(found[name], dict)]
    head = ["stored as", f"bytes of an entry ({found['body_bytes']:,} of JSON)", "hit ratio"]
    return head, [
        [name, f"{found[name]['bytes_per_entry']:,}", f"{found[name]['hit_ratio']:.3f}"]
        for name in sides
    ]


def _workers(found: Result) -> Table:
    head = ["lane", "workers", "req/s", "CPU us", "share of the busier worker"]
    return head, [
        [
            name,
            count.removeprefix("w"),
            f"{one['rps']:,.0f}",
            f"{one['cpu_us']:.0f}",
            f"{one['busier_share']:.0%}",
        ]
        for name, counts in found.items()
        for count, one in counts.items()
    ]


def _abouts(result: Result) -> Table:
    return ["lane", "a hit"], [[name, _lane(name).about] for name in lanes(result)]


def _absent(result: Result) -> list[str]:
    reasons = {**result.get("skipped", {}), **result.get("refused", {})}
    return (
        ["Not measured: " + "; ".join(f"{name} ({why})" for name, why in reasons.items()) + "."]
        if reasons
        else []
    )


def _repeated(result: Result) -> int:
    return sum(int(result[name][count]["repeated"]) for name in lanes(result) for count in COUNTS)


def _lane(name: str) -> Lane:
    return BY_NAME.get(name) or Lane(name, name, "given by its import path")


def _belongs(picture: Path, title: str) -> bool:
    words = {
        "bench-cpu": "CPU of bare",
        "bench-throughput": "throughput and",
        "bench-invalidation": "Invalidating",
    }
    return words[picture.stem] in title


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _percent(one: Result, name: str) -> str:
    low, high = one[f"{name}_iqr"]
    return f"{one[name]:+.1f} ({low:+.1f} to {high:+.1f})"


def _markdown(table: Table) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _columns(table: Table) -> str:
    head, rows = table
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    padded = (
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in [head, *rows]
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
