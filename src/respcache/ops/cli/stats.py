"""``respcache status`` and ``stats``: the state of the cache, and statistics by tenant, module or
route."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from rich.text import Text

from respcache.ops.cli.client import Client
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output, duration, share, size

Document = Mapping[str, Any]

MAX_TENANTS = 1_000
"""Tenants that are printed; if there are more, the largest."""

COLUMNS = (
    "requests>",
    "hit ratio>",
    "hits>",
    "misses>",
    "bypasses>",
    "writes>",
    "hit p95>",
    "miss p95>",
    "saved>",
    "sent>",
)
PROCESS_COLUMNS = (
    "process",
    "in memory>",
    "limit>",
    "entries>",
    "serving lease>",
    "outbox waits>",
    "tenants pending>",
    "errors>",
    "verified>",
)


def status(out: Output, client: Client) -> Status:
    """Print the state and its problems. Return FAILED if there is a problem."""
    overview = client.get("overview")
    problems = list(problems_of(overview))
    document = {**overview, "problems": problems}
    out.emit(document, lambda: _render(out, overview, problems, address=str(client.url)))
    return Status.FAILED if problems else Status.OK


def stats(
    out: Output, client: Client, *, by: str, tenant: str | None, module: str | None
) -> Status:
    """Print statistics by tenant, module or route."""
    if by == "tenants":
        if module is not None:
            raise Failure(
                Status.USAGE,
                "--by tenants sums up all modules: leave out --module, or use --by modules "
                "--tenant",
            )
        rows = (
            client.get(by, limit=MAX_TENANTS)
            if tenant is None
            else [client.get(f"tenants/{quote(tenant, safe='')}")]
        )
    else:
        rows = client.get(by, tenant=tenant)
    if module is not None:
        rows = [row for row in rows if (row["module"] or row["name"]) == module]
    columns = (by.removesuffix("s"), *COLUMNS)
    out.emit(rows, lambda: out.table(columns, map(_row, rows), empty="no statistics yet"))
    return Status.OK


def problems_of(overview: Document) -> Iterator[str]:
    """Yield what keeps the cache from serving, and what must never happen."""
    switches, available = overview["switches"], overview["available"]
    if not available:
        yield "the cache server is unavailable: all requests are answered by the handlers"
    if switches["everything"]:
        yield (
            "the cache is switched off for all processes: switch it on in the dashboard, or by "
            "POST api/switch"
        )
    elif available and not switches["enabled"] and not overview["processes"]:
        yield (
            "the process that responded serves nothing from the cache: it was started with "
            "enabled=False"
        )
    if overview["tenant"] in switches["tenants"]:
        yield f"tenant {overview['tenant']} is switched off"
    for process in overview["processes"]:
        yield from _process_problems(process, overview)
    unsound = {
        table
        for process in overview["processes"]
        if process["lease"]
        for table in process["lease"]["unsound_tables"]
    }
    if unsound:
        yield (
            f"not cached, because their triggers are not sound: {', '.join(sorted(unsound))}; "
            f"respcache doctor says why"
        )
    if overview["findings"]:
        last = overview["findings"][-1]
        yield (
            f"the verifier found wrong responses ({len(overview['findings'])} are kept), the last "
            f"one {last['kind']}: {last['route']} of tenant {last['tenant']}, at "
            f"{last['at'][:19]}; see docs/operations.md"
        )


def _process_problems(process: Document, overview: Document) -> Iterator[str]:
    name, lease = f"{process['host']}:{process['pid']}", process["lease"]
    if not process["enabled"] and not overview["switches"]["everything"]:
        yield f"{name} serves nothing from the cache: it was started with enabled=False"
    if not process["available"]:
        if overview["available"]:
            yield f"{name} is not connected to the cache server"
    elif lease is not None and not lease["alive"]:
        yield (
            f"{name} has no serving lease, so it serves nothing from the cache: "
            f"{lease['problem'] or 'no relay cycle has been completed yet'}"
        )


def _render(out: Output, overview: Document, problems: Sequence[str], *, address: str) -> None:
    out.pairs([*_state(overview, address), *_totals(overview)])
    if overview["processes"]:
        out.print()
        out.table(PROCESS_COLUMNS, map(_process, overview["processes"]))
    for problem in problems:
        out.print(f"! {problem}", "bold red")


def _state(overview: Document, address: str) -> Iterator[tuple[str, Any]]:
    switches = overview["switches"]
    off = [
        *(["everything"] if switches["everything"] else []),
        *switches["tenants"],
        *switches["modules"],
    ]
    why = f": {overview['problem']}" if overview["problem"] else ""
    yield "application", f"{address}, statistics of {overview['source']}{why}"
    yield "server", _server(overview["available"], overview["server"])
    yield "switched off", ", ".join(off) or "nothing"


def _totals(overview: Document) -> Iterator[tuple[str, Any]]:
    totals = overview["totals"]
    yield (
        "requests",
        f"{totals['requests']:,}: {totals['hits']:,} hits, {totals['misses']:,} misses, "
        f"{sum(totals['bypasses'].values()):,} bypasses",
    )
    yield "hit ratio", share(totals["hits"], totals["hits"] + totals["misses"])
    if overview["tenant"] is None:
        for name, label in (("hit", "hits"), ("miss", "misses")):
            p50, p95 = duration(totals[f"{name}_p50_s"]), duration(totals[f"{name}_p95_s"])
            yield label, Text.assemble("p50 ", p50, ", p95 ", p95)
        saved = Text.assemble(duration(totals["saved_s"]), " of handlers' time (estimate)")
        yield "saved", saved
    pending = len(overview["pending_tenants"])
    yield "invalidations", f"{totals['invalidations']:,}; {pending} tenants pending"


def _server(available: bool, server: Document | None) -> Text:
    state = ("up", "green") if available else ("unavailable", "bold red")
    if server is None:
        return Text.assemble(state)
    limit = size(server["memory_limit_bytes"]) if server["memory_limit_bytes"] else "no limit"
    return Text.assemble(
        state,
        f", {server['name']} {server['version']}, ",
        size(server["memory_bytes"]),
        " of ",
        limit,
        f" ({server['memory_policy']}), {server['keys']:,} keys, "
        f"{server['evicted_keys']:,} evicted",
    )


def _process(process: Document) -> tuple[Any, ...]:
    lease, verifier = process["lease"], process["verifier"]
    return (
        f"{process['host']}:{process['pid']}",
        size(process["near_bytes"]),
        size(process["near_limit_bytes"]),
        process["near_entries"],
        duration(lease and lease["age_s"]),
        _waiting(lease),
        process["pending_tenants"],
        process["errors"],
        verifier and verifier["verifications"],
    )


def _waiting(lease: Document | None) -> Any:
    """Return how many rows of the outbox wait, and the age of the oldest."""
    if lease is None or not lease["pending_rows"]:
        return lease and lease["pending_rows"]
    return Text.assemble(f"{lease['pending_rows']:,}, for ", duration(lease["pending_s"]))


def _row(row: Document) -> tuple[Any, ...]:
    return (
        row["name"],
        row["requests"],
        share(row["hits"], row["hits"] + row["misses"]),
        row["hits"],
        row["misses"],
        sum(row["bypasses"].values()),
        row["invalidations"],
        duration(row["hit_p95_s"]),
        duration(row["miss_p95_s"]),
        duration(row["saved_s"]),
        size(row["bytes_served"]),
    )
