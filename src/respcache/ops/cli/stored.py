"""``respcache keys``, ``get`` and ``purge``: what is stored, one entry of it, and invalidating
it."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from respcache.ops.cli.app import MAX_KEYS
from respcache.ops.cli.client import Client
from respcache.ops.cli.explain import entry_pairs, generation_pairs, policy_pairs
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output, size, span

Document = Mapping[str, Any]

MAX_PAGES = 1_000


def keys(
    out: Output, client: Client, *, tenant: str | None, module: str | None, limit: int
) -> Status:
    """Search stored answers, page by page until ``limit`` are found or all keys were looked at."""
    found: dict[str, Document] = {}
    cursor, looked_at, total = "", 0, 0
    for _ in range(MAX_PAGES):
        page = client.get(
            "keys", tenant=tenant, module=module, cursor=cursor, limit=min(limit - len(found), 1000)
        )
        found.update((one["key"], one) for one in page["keys"])
        cursor, total = page["cursor"], page["total"]
        looked_at += page["looked_at"]
        if not cursor or len(found) >= limit:
            break
    complete = not cursor and len(found) <= limit
    chosen = [found[key] for key in sorted(found)[:limit]]
    looked_at = min(looked_at, total)

    def render() -> None:
        columns = ("key", "size>", "ttl left>", "age>", "fill>")
        rows = (
            (
                one["key"],
                size(one["size_bytes"]),
                span(one["ttl_left_s"]),
                span(one["age_s"]),
                span(one["fill_ms"] / 1000),
            )
            for one in chosen
        )
        out.table(columns, rows, empty="no stored answers")
        more = "that is all" if complete else f"there may be more: {_further(limit)}"
        out.say(
            f"{len(chosen)} found in {looked_at:,} of {total:,} keys of the server; {more}", "dim"
        )

    out.emit({"keys": chosen, "looked_at": looked_at, "total": total, "complete": complete}, render)
    return Status.OK


def get(out: Output, client: Client, *, key: str, body: bool) -> Status:
    """Look at one entry, or print its body (which is written into the trail)."""
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
    tenant: str | None,
    module: str | None,
    key: str | None,
    dry_run: bool,
    yes: bool,
) -> Status:
    """Say what would be invalidated, have it confirmed, invalidate it. FAILED where it is not
    confirmed everywhere yet."""
    if (tenant is None) == (key is None):
        raise Failure(Status.USAGE, "give --tenant (and --module), or --key: one of them")
    if key is not None and module is not None:
        raise Failure(Status.USAGE, "--key is one entry: leave --module out")
    asked = {"tenant": tenant, "module": module, "key": key}
    interactive = sys.stdin.isatty() and sys.stderr.isatty()
    if not dry_run and not yes and not interactive:
        raise Failure(
            Status.REFUSED,
            "nobody is there to confirm it: give --yes, or --dry-run to see what it would do",
        )
    if tenant is not None:
        _doubt(out, client, tenant)
    if dry_run or not yes:
        preview = client.post("purge", {**asked, "dry_run": True})
        if dry_run:
            out.emit(preview, lambda: out.say(_planned(preview)))
            return Status.OK
        _confirm(_planned(preview), tenant or str(preview["tenant"]))
    done = client.post("purge", {**asked, "dry_run": False})
    out.emit(done, lambda: out.say(_done(done)))
    return Status.OK if done["confirmed"] else Status.FAILED


def _further(limit: int) -> str:
    return (
        f"--limit {min(limit * 10, MAX_KEYS)}"
        if limit < MAX_KEYS
        else "--tenant and --module name fewer"
    )


def _confirm(planned: str, tenant: str) -> None:
    """Have the tenant's name typed: on the terminal, so that output stays clean. Raises
    ``Failure``."""
    sys.stderr.write(f"{planned}\nType the tenant ({tenant}) to go on: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip() != tenant:
        raise Failure(Status.REFUSED, "not confirmed: nothing was purged")


def _doubt(out: Output, client: Client, tenant: str) -> None:
    """Tell of a tenant that has no name here: it may be misspelt, and a purge of nobody
    succeeds."""
    known = client.get("me")["tenants"]
    if known and tenant.strip().lower() not in {
        spelling.lower() for pair in known.items() for spelling in pair
    }:
        out.note(f"the application names no tenant {tenant!r}: it is taken as an id")


def _planned(preview: Document) -> str:
    return f"would invalidate {_what(preview)}: {_count(preview)}"


def _done(done: Document) -> str:
    if done["entries"] == 0:
        return f"{_what(done)} is not on the server any more"
    state = "it holds everywhere" if done["confirmed"] else "not confirmed yet: it is being retried"
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
    rest = "" if purge["complete"] else f" (after a look at {purge['looked_at']:,} keys)"
    return f"{least}{purge['entries']:,} entries{rest}"


def _render(out: Output, found: Document) -> None:
    out.say(found["key"], "bold")
    out.pairs(
        [
            ("tenant", found["tenant"]), ("module", f"{found['module']}, {found['kind']}"),
            ("route", found["route"] or f"one of "
                                        f"{', '.join(found['routes']) or 'none that is known here'}"),
            ("in memory here", found["held"]),
            *entry_pairs(found["entry"]), *generation_pairs(found["generation"]),
        ]
    )  # fmt: skip
    if found["policy"] is not None:
        out.pairs(policy_pairs(found["policy"]))
    for part in found["parts"]:
        out.say(Text.assemble("  ", (part["place"], "dim"), f" {part['name']} = {part['value']}"))
    for name, value in found["headers"]:
        out.say(Text.assemble("  ", (f"{name}: ", "dim"), value))


def _render_body(out: Output, revealed: Document) -> None:
    if revealed["text"] is None:
        what = f"{revealed['size_bytes']} bytes of {revealed['content_type']}"
        raise Failure(Status.FAILED, f"{revealed['key']} holds {what}, no text")
    out.body(revealed["text"])
    if revealed["truncated"]:
        out.note(f"cut off: the whole body has {revealed['size_bytes']:,} bytes")
