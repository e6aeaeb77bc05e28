"""``respcache explain``: prints how the cache would handle a request now, and why."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from respcache.ops.cli.client import Client
from respcache.ops.cli.headers import read_headers
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output, duration, size

Document = Mapping[str, Any]
Pairs = list[tuple[str, Any]]

OUTCOMES = {"hit": "bold green", "miss": "bold yellow", "bypass": "bold magenta"}


def run(
    out: Output, client: Client, *, path: str, method: str, headers: Sequence[str], anonymous: bool
) -> Status:
    """Explain a request, with the credentials in the headers, else with the token."""
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
    """Return names and values of a policy."""
    level = f"{policy['level']} ({policy['bound_s']:g} s)" if policy["bound_s"] else policy["level"]
    return [
        (
            "policy",
            f"{policy['kind']} of {policy['module']}, ttl {policy['ttl_s']:g} s, level {level}",
        ),
        ("reads", ", ".join(policy["tables"]) or "no tables"),
        *([("varies by", policy["varies_by"])] if policy["varies_by"] else []),
        *([("rule", policy["rule"])] if policy["rule"] else []),
    ]


def generation_pairs(generation: Document, name: str = "generation") -> Pairs:
    """Return names and values of a tenant's generation."""
    if generation["nonce"] is None:
        return [(name, "none: no response of this tenant is valid")]
    bumps = ", ".join(f"{tag} at {sequence}" for tag, sequence in generation["bumps"].items())
    same = (
        "this server life"
        if generation["server"] == generation["connected"]
        else "another server life or epoch"
    )
    return [
        (name, f"{generation['nonce']}, sequence {generation['sequence']}, from {same}"),
        ("last writes", bumps or "none that is relevant"),
    ]


def entry_pairs(entry: Document) -> Pairs:
    """Return names and values of a stored response."""
    style = "green" if entry["verdict"] == "valid" else "yellow"
    lives = Text.assemble(
        "stored ",
        duration(entry["age_s"]),
        " ago, ",
        duration(entry["ttl_left_s"]),
        f" of {entry['ttl_s']:g} s left",
    )
    coding = entry["coding"] or "plain"
    return [
        ("entry", lives),
        (
            "size",
            Text.assemble(
                size(entry["size_bytes"]),
                f", {coding}; status {entry['status']}; filled in {entry['fill_ms']} ms",
            ),
        ),
        ("certificate", f"{entry['nonce']}, sequence {entry['sequence']}"),
        ("verdict", Text.assemble((entry["verdict"], style), f": {entry['why']}")),
    ]


def _render(out: Output, found: Document) -> None:
    head = (found["outcome"], OUTCOMES.get(found["outcome"], "bold"))
    out.print(Text.assemble(head, f" ({found['reason']}): {found['why']}"))
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
        pairs += [("key", found["key"]), ("key parts", ", ".join(parts) or "the route only")]
        pairs.append(("not in key", ", ".join(found["left_out"]) or "nothing"))
        pairs.append(("depends on", ", ".join(found["tags"])))
    for name in ("generation", "owner_generation"):
        if found[name] is not None:
            pairs += generation_pairs(found[name], name.replace("_", " "))
    if found["lease"] is not None:
        pairs.append(("serving lease", _lease(found["lease"])))
    if found["entry"] is not None:
        pairs += entry_pairs(found["entry"])
    if found["memory"] is not None:
        pairs.append(("in memory here", _memory(found["memory"])))
    pairs.append(("switched off", ", ".join(found["switches"]) or "nothing"))
    out.pairs(pairs)


def _caller(caller: Document) -> Pairs:
    role = f", role {caller['role']}" if caller["role"] else ""
    source = "cached" if caller["remembered"] else "read now"
    tables = ", ".join(caller["tables"]) or "no tables"
    return [
        ("caller", f"tenant {caller['tenant'] or 'none'}{role}"),
        ("scope", f"{caller['fingerprint']}, from {tables} ({source})"),
    ]


def _lease(lease: Document) -> Text:
    if lease["alive"]:
        return Text.assemble(
            ("alive", "green"),
            " for ",
            duration(lease["left_s"]),
            ", age ",
            duration(lease["age_s"]),
        )
    return Text.assemble(
        ("none", "bold red"), f": {lease['problem'] or 'no relay cycle has been completed yet'}"
    )


def _memory(memory: Document) -> Text:
    plan = "plan cached" if memory["plan"] else "no plan cached yet"
    if not memory["held"]:
        return Text(f"no; {plan}")
    return Text.assemble(
        "yes, ",
        size(memory["size_bytes"]),
        ", for ",
        duration(memory["ttl_left_s"]),
        f" more; {plan}",
    )
