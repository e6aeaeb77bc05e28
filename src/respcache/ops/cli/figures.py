"""``respcache status`` and ``stats``: the state at a glance, and figures by tenant, module or
route."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from rich.text import Text

from respcache.ops.cli.client import Client
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output, share, size, span

Document = Mapping[str, Any]

MAX_TENANTS = 1_000
"""The largest, if there are more."""

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
OF_PROCESSES = (
    "process", "in memory>", "of>", "entries>", "fence age>", "outbox waits>", "tenants pending>", "errors>", "audits>",
)  # fmt: skip


def status(out: Output, client: Client) -> Status:
    """Print the state; FAILED where nothing is served from the cache, or what was served was not
    right."""
    overview = client.get("overview")
    problems = _problems(overview)
    out.emit({**overview, "problems": problems}, lambda: _render(out, client, overview, problems))
    return Status.FAILED if problems else Status.OK


def stats(
    out: Output, client: Client, *, by: str, tenant: str | None, module: str | None
) -> Status:
    """Print figures by tenant, module or route."""
    if by == "tenants":
        if module is not None:
            raise Failure(
                Status.USAGE,
                "--by tenants adds all modules up: leave --module out, or take --by modules "
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
    out.emit(
        rows,
        lambda: out.table(
            (by.removesuffix("s"), *COLUMNS), map(_row, rows), empty="no figures yet"
        ),
    )
    return Status.OK


def _problems(overview: Document) -> list[str]:
    """Say what keeps the cache from serving, and what must never happen."""
    found = []
    if not overview["available"]:
        found.append("the cache's server is away: everything comes from the handlers")
    if overview["switches"]["everything"]:
        found.append(
            "the cache is switched off for all processes: the dashboard, or POST api/switch, "
            "switches it on"
        )
    elif (
        overview["available"] and not overview["switches"]["enabled"] and not overview["processes"]
    ):
        found.append(
            "the process that answered serves nothing from the cache: it was started with "
            "enabled=False"
        )
    if overview["tenant"] in overview["switches"]["tenants"]:
        found.append(f"tenant {overview['tenant']} is switched off")
    for process in overview["processes"]:
        name, lease = f"{process['host']}:{process['pid']}", process["lease"]
        if not process["enabled"] and not overview["switches"]["everything"]:
            found.append(f"{name} serves nothing from the cache: it was started with enabled=False")
        if not process["available"]:
            if overview["available"]:
                found.append(f"{name} has no connection to the cache's server")
        elif lease is not None and not lease["alive"]:
            found.append(
                f"{name} has no fence, so serves nothing from the cache: "
                f"{lease['problem'] or 'no round is completed yet'}"
            )
    unsound = {
        table
        for process in overview["processes"]
        if process["lease"]
        for table in process["lease"]["unsound_tables"]
    }
    if unsound:
        found.append(
            f"not cached, as their triggers are not sound: {', '.join(sorted(unsound))}; "
            f"respcache doctor says why"
        )
    if overview["findings"]:
        last = overview["findings"][-1]
        found.append(
            f"the audit found wrong answers ({len(overview['findings'])} are kept), the last one "
            f"{last['kind']}: {last['route']} "
            f"of tenant {last['tenant']}, at {last['at'][:19]}; docs/operations.md says what now"
        )
    return found


def _render(out: Output, client: Client, overview: Document, problems: Sequence[str]) -> None:
    totals, switches, server = overview["totals"], overview["switches"], overview["server"]
    off = [
        *(["everything"] if switches["everything"] else []),
        *switches["tenants"],
        *switches["modules"],
    ]
    why = f": {overview['problem']}" if overview["problem"] else ""
    pairs: list[tuple[str, Any]] = [
        ("application", f"{client.url}, figures of {overview['figures_of']}{why}"),
        ("server", _server(overview["available"], server)),
        ("switched off", ", ".join(off) or "nothing"),
        ("requests", f"{totals['requests']:,}: {totals['hits']:,} hits, {totals['misses']:,} "
                     f"misses, "
                     f"{sum(totals['bypasses'].values()):,} bypasses"),
        ("hit ratio", share(totals["hits"], totals["hits"] + totals["misses"])),
    ]  # fmt: skip
    if overview["tenant"] is None:
        pairs += [
            (
                "hits",
                Text.assemble(
                    "p50 ", span(totals["hit_p50_s"]), ", p95 ", span(totals["hit_p95_s"])
                ),
            ),
            (
                "misses",
                Text.assemble(
                    "p50 ", span(totals["miss_p50_s"]), ", p95 ", span(totals["miss_p95_s"])
                ),
            ),
            ("saved", Text.assemble(span(totals["saved_s"]), " of handlers' time, by estimate")),
        ]
    pairs.append(
        (
            "invalidations",
            f"{totals['invalidations']:,}; {len(overview['pending_tenants'])} tenants pending",
        )
    )
    out.pairs(pairs)
    if overview["processes"]:
        out.say()
        out.table(OF_PROCESSES, map(_process, overview["processes"]))
    for problem in problems:
        out.say(f"! {problem}", "bold red")


def _server(available: bool, server: Document | None) -> Text:
    state = ("up", "green") if available else ("away", "bold red")
    if server is None:
        return Text.assemble(state)
    limit = size(server["memory_limit_bytes"]) if server["memory_limit_bytes"] else "no limit"
    return Text.assemble(
        state, f", {server['name']} {server['version']}, ", size(server["memory_bytes"]), " of ", limit,
        f" ({server['memory_policy']}), {server['keys']:,} keys, {server['evicted_keys']:,} evicted",
    )  # fmt: skip


def _process(process: Document) -> tuple[Any, ...]:
    lease, verifier = process["lease"], process["verifier"]
    return (
        f"{process['host']}:{process['pid']}", size(process["near_bytes"]), size(process["near_limit_bytes"]),
        process["near_entries"], span(lease and lease["age_s"]), _waiting(lease), process["pending_tenants"], process["errors"],
        verifier and verifier["audits"],
    )  # fmt: skip


def _waiting(lease: Document | None) -> Any:
    """Say how many rows of the outbox wait, and for how long the oldest."""
    if lease is None or not lease["pending_rows"]:
        return lease and lease["pending_rows"]
    return Text.assemble(f"{lease['pending_rows']:,}, for ", span(lease["pending_s"]))


def _row(row: Document) -> tuple[Any, ...]:
    return (
        row["name"], row["requests"], share(row["hits"], row["hits"] + row["misses"]), row["hits"], row["misses"],
        sum(row["bypasses"].values()), row["invalidations"], span(row["hit_p95_s"]), span(row["miss_p95_s"]),
        span(row["saved_s"]), size(row["bytes_served"]),
    )  # fmt: skip
