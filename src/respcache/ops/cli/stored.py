"""``respcache keys``, ``get`` and ``purge``: lists, shows and invalidates stored responses."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from respcache.ops.cli.client import Client
from respcache.ops.cli.explain import entry_pairs, generation_pairs, policy_pairs
from respcache.ops.cli.options import MAX_KEYS
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output, duration, size

Document = Mapping[str, Any]

MAX_PAGES = 1_000


def keys(
    out: Output, client: Client, *, tenant: str | None, module: str | None, limit: int
) -> Status:
    """Print stored responses: read pages until ``limit`` are found or all keys are scanned."""
    found: dict[str, Document] = {}
    cursor, scanned, total = "", 0, 0
    for _ in range(MAX_PAGES):
        page = client.get(
            "keys", tenant=tenant, module=module, cursor=cursor, limit=min(limit - len(found), 1000)
        )
        found.update((one["key"], one) for one in page["keys"])
        cursor, total = page["cursor"], page["total"]
        scanned += page["scanned"]
        if not cursor or len(found) >= limit:
            break
    complete = not cursor and len(found) <= limit
    chosen = [found[key] for key in sorted(found)[:limit]]
    scanned = min(scanned, total)

    def render() -> None:
        columns = ("key", "size>", "ttl left>", "age>", "fill>")
        rows = (
            (
                one["key"],
                size(one["size_bytes"]),
                duration(one["ttl_left_s"]),
                duration(one["age_s"]),
                duration(one["fill_ms"] / 1000),
            )
            for one in chosen
        )
        out.table(columns, rows, empty="no stored responses")
        more = "these are all" if complete else f"there may be more: {_more_hint(limit)}"
        out.print(
            f"{len(chosen)} found in {scanned:,} of {total:,} keys of the server; {more}", "dim"
        )

    out.emit({"keys": chosen, "scanned": scanned, "total": total, "complete": complete}, render)
    return Status.OK


def get(out: Output, client: Client, *, key: str, body: bool) -> Status:
    """Print one entry, or its body (which is recorded in the audit log)."""
    if body:
        revealed = client.post("reveal", {"key": key})
        out.emit(revealed, lambda: _render_body(out, revealed))
        return Status.OK
    found = client.get("key", key=key)
    out.emit(found, lambda: _render(out, found))
    return Status.OK


def purge(
    out: Output,
    client: Client,
    *,
    target: Mapping[str, str | None],
    dry_run: bool,
    yes: bool,
) -> Status:
    """Count the entries, ask for confirmation, and invalidate them.

    ``target`` has the keys tenant, module and key. Return FAILED if the invalidation is not
    confirmed in all processes yet.
    """
    tenant, module, key = target["tenant"], target["module"], target["key"]
    if (tenant is None) == (key is None):
        raise Failure(Status.USAGE, "use either --tenant (and --module) or --key")
    if key is not None and module is not None:
        raise Failure(Status.USAGE, "--key names one entry: leave out --module")
    interactive = sys.stdin.isatty() and sys.stderr.isatty()
    if not dry_run and not yes and not interactive:
        raise Failure(
            Status.REFUSED,
            "there is no terminal to confirm on: use --yes, or --dry-run to count only",
        )
    if tenant is not None:
        _warn_if_unknown(out, client, tenant)
    if dry_run or not yes:
        preview = client.post("purge", {**target, "dry_run": True})
        if dry_run:
            out.emit(preview, lambda: out.print(_planned(preview)))
            return Status.OK
        _confirm(_planned(preview), tenant or str(preview["tenant"]))
    done = client.post("purge", {**target, "dry_run": False})
    out.emit(done, lambda: out.print(_done(done)))
    return Status.OK if done["confirmed"] else Status.FAILED


def _more_hint(limit: int) -> str:
    return (
        f"--limit {min(limit * 10, MAX_KEYS)}" if limit < MAX_KEYS else "use --tenant and --module"
    )


def _confirm(planned: str, tenant: str) -> None:
    """Ask on standard error for the tenant's name. Raises ``Failure``."""
    sys.stderr.write(f"{planned}\nType the tenant ({tenant}) to continue: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip() != tenant:
        raise Failure(Status.REFUSED, "not confirmed: nothing was purged")


def _warn_if_unknown(out: Output, client: Client, tenant: str) -> None:
    """Print a note if no tenant has this name: it may be misspelt, and then the purge succeeds but
    invalidates nothing."""
    known = client.get("me")["tenants"]
    if known and tenant.strip().lower() not in {
        spelling.lower() for pair in known.items() for spelling in pair
    }:
        out.note(f"the application has no tenant named {tenant!r}: it is used as an id")


def _planned(preview: Document) -> str:
    return f"would invalidate {_what(preview)}: {_count(preview)}"


def _done(done: Document) -> str:
    if done["entries"] == 0:
        return f"{_what(done)} is not stored on the server"
    state = "confirmed in all processes" if done["confirmed"] else "not confirmed yet: retrying"
    return f"invalidated {_what(done)}; {state}"


def _what(purge: Document) -> str:
    if purge["key"] is not None:
        return str(purge["key"])
    module = f"module {purge['module']} of " if purge["module"] else "everything of "
    return f"{module}tenant {purge['tenant']}"


def _count(purge: Document) -> str:
    if purge["entries"] is None:
        return "entries were not counted"
    least = "" if purge["complete"] else "at least "
    rest = "" if purge["complete"] else f" (in {purge['scanned']:,} scanned keys)"
    return f"{least}{purge['entries']:,} entries{rest}"


def _render(out: Output, found: Document) -> None:
    out.print(found["key"], "bold")
    possible = ", ".join(found["routes"]) or "no known route"
    out.pairs(
        [
            ("tenant", found["tenant"]),
            ("module", f"{found['module']}, {found['kind']}"),
            ("route", found["route"] or f"one of {possible}"),
            ("in memory here", found["in_memory"]),
            *entry_pairs(found["entry"]),
            *generation_pairs(found["generation"]),
        ]
    )
    if found["policy"] is not None:
        out.pairs(policy_pairs(found["policy"]))
    for part in found["parts"]:
        out.print(Text.assemble("  ", (part["place"], "dim"), f" {part['name']} = {part['value']}"))
    for name, value in found["headers"]:
        out.print(Text.assemble("  ", (f"{name}: ", "dim"), value))


def _render_body(out: Output, revealed: Document) -> None:
    if revealed["text"] is None:
        what = f"{revealed['size_bytes']} bytes of {revealed['content_type']}"
        raise Failure(Status.FAILED, f"{revealed['key']} contains {what}, not text")
    out.body(revealed["text"])
    if revealed["truncated"]:
        out.note(f"truncated: the complete body has {revealed['size_bytes']:,} bytes")
