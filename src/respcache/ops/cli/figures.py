"""``respcache status`` and ``stats``: the state at a glance, and figures by tenant, module or route."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from respcache.ops.cli.client import Client
from respcache.ops.cli.outcome import Status
from respcache.ops.cli.output import Output, share, size, span

Document = Mapping[str, Any]

COLUMNS = ("requests>", "hit ratio>", "hits>", "misses>", "bypasses>", "writes>", "hit p95>", "miss p95>", "saved>", "sent>")


def status(out: Output, client: Client) -> Status:
    """Print the state; FAILED where nothing is served from the cache, or what was served was not right."""
    overview = client.get("overview")
    problems = _problems(overview)
    out.emit({**overview, "problems": problems}, lambda: _render(out, client, overview, problems))
    return Status.FAILED if problems else Status.OK


def stats(out: Output, client: Client, *, by: str, tenant: str | None, module: str | None) -> Status:
    """Print figures by tenant, module or route."""
    rows = client.get(by) if by == "tenants" else client.get(by, tenant=tenant)
    if by == "tenants" and tenant is not None:
        rows = [client.get(f"tenants/{tenant}")]
    if module is not None:
        rows = [row for row in rows if (row["module"] or row["name"]) == module]
    out.emit(rows, lambda: out.table((by.removesuffix("s"), *COLUMNS), map(_row, rows), empty="no figures yet"))
    return Status.OK


def _problems(overview: Document) -> list[str]:
    """Say what keeps the cache from serving, and what must never happen."""
    switches, fence, audit = overview["switches"], overview["fence"], overview["audit"]
    found = []
    if not overview["available"]:
        found.append("the cache's server is away: everything comes from the handlers")
    if switches["everything"]:
        found.append("the cache is switched off for all processes: POST api/switch, or the dashboard, switches it on")
    elif not switches["enabled"]:
        found.append("this process serves nothing from the cache: it was started with enabled=False")
    if fence is not None and not fence["alive"]:
        found.append(f"no fence: nothing is served from the cache. {fence['problem'] or 'No round has been completed yet'}")
    if fence is not None and fence["unsound_tables"]:
        found.append(f"not cached, as triggers are not sound: {', '.join(fence['unsound_tables'])}")
    if audit is not None and audit["stale"] + audit["leaks"]:
        found.append(f"the audit found {audit['stale']} stale answers and {audit['leaks']} leaks: see its findings")
    return found


def _render(out: Output, client: Client, overview: Document, problems: Sequence[str]) -> None:
    totals, switches, fence, audit = overview["totals"], overview["switches"], overview["fence"], overview["audit"]
    off = [*(["everything"] if switches["everything"] else []), *switches["tenants"], *switches["modules"]]
    pairs: list[tuple[str, Any]] = [
        ("application", f"{client.url} (figures of {overview['figures_of']})"),
        ("server", Text("up", "green") if overview["available"] else Text("away", "bold red")),
        ("switched off", ", ".join(off) or "nothing"),
        ("requests", f"{totals['requests']:,}: {totals['hits']:,} hits, {totals['misses']:,} misses, "
                     f"{sum(totals['bypasses'].values()):,} bypasses"),
        ("hit ratio", share(totals["hits"], totals["hits"] + totals["misses"])),
        ("hits", Text.assemble("p50 ", span(totals["hit_p50_s"]), ", p95 ", span(totals["hit_p95_s"]))),
        ("misses", Text.assemble("p50 ", span(totals["miss_p50_s"]), ", p95 ", span(totals["miss_p95_s"]))),
        ("saved", Text.assemble(span(totals["saved_s"]), " of handlers' time, by estimate")),
        ("invalidations", f"{totals['invalidations']:,}; pending for {len(overview['pending_tenants'])} tenants here"),
    ]  # fmt: skip
    if fence is not None:
        alive = Text("alive", "green") if fence["alive"] else Text("none", "bold red")
        waiting = f"{fence['pending_rows']:,} rows of the outbox wait, the oldest for {fence['pending_s']:.1f} s"
        said = waiting if fence["pending_rows"] else "nothing waits in the outbox"
        pairs.append(("fence", Text.assemble(alive, ", age ", span(fence["age_s"]), "; ", said)))
    if audit is not None:
        pairs.append(("audit", f"{audit['audits']:,} answers made anew: {audit['stale']} stale, {audit['leaks']} leaks"))
    out.pairs(pairs)
    for problem in problems:
        out.say(f"! {problem}", "bold red")


def _row(row: Document) -> tuple[Any, ...]:
    return (
        row["name"], row["requests"], share(row["hits"], row["hits"] + row["misses"]), row["hits"], row["misses"],
        sum(row["bypasses"].values()), row["invalidations"], span(row["hit_p95_s"]), span(row["miss_p95_s"]),
        span(row["saved_s"]), size(row["bytes_served"]),
    )  # fmt: skip
