"""``respcache explain``: what would become of a request now, and why, step by step as the cache
takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from respcache.ops.cli.client import Client
from respcache.ops.cli.headers import read_headers
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output, size, span

Document = Mapping[str, Any]
Pairs = list[tuple[str, Any]]

OUTCOMES = {"hit": "bold green", "miss": "bold yellow", "bypass": "bold magenta"}


def run(
    out: Output, client: Client, *, path: str, method: str, headers: Sequence[str], anonymous: bool
) -> Status:
    """Explain a request: of whoever the headers say, else of whoever the token belongs to."""
    if not path.startswith("/"):
        raise Failure(
            Status.USAGE, f"{path!r} must be a path of the application, such as /api/leads?limit=50"
        )
    given = dict(read_headers(headers))
    if not anonymous and client.token is not None and not {"authorization", "cookie"} & set(given):
        given["authorization"] = f"Bearer {client.token}"
    found = client.post("explain", {"method": method.upper(), "path": path, "headers": given})
    out.emit(found, lambda: _render(out, found))
    return Status.OK


def policy_pairs(policy: Document) -> Pairs:
    """List how a route is cached."""
    level = f"{policy['level']} ({policy['bound_s']:g} s)" if policy["bound_s"] else policy["level"]
    return [
        (
            "policy",
            f"{policy['kind']} of {policy['module']}, for {policy['ttl_s']:g} s, level {level}",
        ),
        ("reads", ", ".join(policy["tables"]) or "no tables"),
        *([("varies by", policy["varies_by"])] if policy["varies_by"] else []),
        *([("rule", policy["rule"])] if policy["rule"] else []),
    ]


def generation_pairs(generation: Document, name: str = "generation") -> Pairs:
    """List what a tenant's generation says."""
    if generation["nonce"] is None:
        return [(name, "none: nothing of this tenant is cached")]
    bumps = ", ".join(f"{tag} at {sequence}" for tag, sequence in generation["bumps"].items())
    same = (
        "this server life"
        if generation["server"] == generation["connected"]
        else "another server life or epoch"
    )
    return [
        (name, f"{generation['nonce']}, sequence {generation['sequence']}, of {same}"),
        ("last writes", bumps or "none that counts here"),
    ]


def entry_pairs(entry: Document) -> Pairs:
    """List what is known of a stored answer."""
    style = "green" if entry["verdict"] == "valid" else "yellow"
    lives = Text.assemble(
        "stored ",
        span(entry["age_s"]),
        " ago, ",
        span(entry["ttl_left_s"]),
        f" of {entry['ttl_s']:g} s left",
    )
    coding = entry["coding"] or "plain"
    return [
        ("entry", lives),
        (
            "size",
            Text.assemble(
                size(entry["size_bytes"]),
                f", {coding}; status {entry['status']}; made in {entry['fill_ms']} ms",
            ),
        ),
        ("certificate", f"{entry['nonce']}, sequence {entry['sequence']}"),
        ("verdict", Text.assemble((entry["verdict"], style), f": {entry['why']}")),
    ]


def _render(out: Output, found: Document) -> None:
    head = (found["outcome"], OUTCOMES.get(found["outcome"], "bold"))
    out.say(Text.assemble(head, f" ({found['reason']}): {found['why']}"))
    pairs: Pairs = [
        ("request", f"{found['method']} {found['path']}"),
        ("route", found["route"] or "none that is cached"),
    ]
    if found["policy"] is not None:
        pairs += policy_pairs(found["policy"])
    if found["caller"] is not None:
        pairs += _caller(found["caller"])
    parts = [f"{part['place']} {part['name']}={part['value']}" for part in found["parameters"]]
    if found["key"] is not None:
        pairs += [("key", found["key"]), ("made of", ", ".join(parts) or "the route alone")]
        pairs.append(("left out", ", ".join(found["left_out"]) or "nothing"))
        pairs.append(("depends on", ", ".join(found["tags"])))
    for name in ("generation", "owner_generation"):
        if found[name] is not None:
            pairs += generation_pairs(found[name], name.replace("_", " "))
    if found["lease"] is not None:
        pairs.append(("lease", _lease(found["lease"])))
    if found["entry"] is not None:
        pairs += entry_pairs(found["entry"])
    if found["memory"] is not None:
        pairs.append(("in memory here", _memory(found["memory"])))
    pairs.append(("switched off", ", ".join(found["switches"]) or "nothing"))
    out.pairs(pairs)


def _caller(caller: Document) -> Pairs:
    who = (
        f"tenant {caller['tenant'] or 'none'}{', role ' + caller['role'] if caller['role'] else ''}"
    )
    known = "remembered" if caller["remembered"] else "read anew"
    sees = f"{caller['fingerprint']}, from {', '.join(caller['tables']) or 'no tables'} ({known})"
    return [("caller", who), ("sees", sees)]


def _lease(lease: Document) -> Text:
    if lease["alive"]:
        return Text.assemble(
            ("alive", "green"), " for ", span(lease["left_s"]), ", age ", span(lease["age_s"])
        )
    return Text.assemble(
        ("none", "bold red"), f": {lease['problem'] or 'no round has been completed yet'}"
    )


def _memory(memory: Document) -> Text:
    plan = "recognised by its bytes" if memory["plan"] else "not recognised yet"
    if not memory["held"]:
        return Text(f"no; {plan}")
    return Text.assemble(
        "yes, ", size(memory["size_bytes"]), ", for ", span(memory["ttl_left_s"]), f" more; {plan}"
    )
