"""Policies, generations, entries and verdicts, described for operators. Pure, except that the age
of an entry needs the clock."""

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import msgspec

from respcache.core.entry import Entry
from respcache.core.generations import FLOOR, GenerationView, Verdict, module_tag, table_tag
from respcache.core.policy import Level, Policy

SHORT = 8
"""Characters of a nonce or an identity that are shown: enough to distinguish two of them."""


class PolicyFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How a route is cached."""

    module: str
    kind: str
    ttl_s: float
    level: str
    bound_s: float | None
    """Of the level ``bounded``; else None."""
    tables: tuple[str, ...]
    varies_by: str | None
    """The name of the function whose result is part of the key."""
    rule: str | None
    """The name of the route's role rule."""
    max_body_bytes: int


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the key in canonical form. ``place`` is path, query, header, cookie or varies."""

    place: str
    name: str
    value: str
    """``***`` for cookies and credentials."""


class GenerationFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The current generation of a tenant."""

    key: str
    nonce: str | None
    """Shortened; None if the tenant has no generation."""
    sequence: int
    server: str
    """The epoch and server life in which it was created, shortened."""
    connected: str
    """The epoch and server life to which this process is connected."""
    bumps: dict[str, int]
    """The sequence of the last bump of each relevant tag; a tag that was never bumped in this
    server life is absent."""


class EntryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A stored response.

    It has 16 attributes because it mirrors one JSON object of the dashboard's API.
    """

    stored_at: datetime
    age_s: float
    ttl_s: float
    ttl_left_s: float
    size_bytes: int
    """Size as stored: entry header, response headers and body."""
    body_bytes: int
    """Size as stored: compressed if ``coding`` is set."""
    status: int
    coding: str
    negotiable: bool
    """Whether it may be sent in other content codings than the handler's."""
    fill_ms: int
    nonce: str
    sequence: int
    """The sequence in its certificate, captured before the handler ran."""
    verdict: str
    """``valid``, ``no-generation``, ``other-server``, ``other-epoch``, ``other-generation``,
    ``invalidated`` or ``digest``; for the inspector also ``depends``, if several routes may have
    stored it and the verdict is not the same for all of them."""
    why: str
    """An explanation of the verdict."""
    bumped: tuple[str, ...] = ()
    """The tags that invalidated it."""


def policy_facts(policy: Policy) -> PolicyFacts:
    """Describe a policy."""
    return PolicyFacts(
        module=policy.module,
        kind=policy.kind,
        ttl_s=policy.ttl_s,
        level=str(policy.level),
        bound_s=policy.bound_s if policy.level is Level.BOUNDED else None,
        tables=policy.tables,
        varies_by=None if policy.varies_by is None else _name(policy.varies_by),
        rule=None if policy.rule is None else _name(policy.rule),
        max_body_bytes=policy.max_body_bytes,
    )


def key_parts(parameters: Iterable[tuple[str, str, str]]) -> list[Part]:
    """Describe the parts of a key; hide cookies and credentials."""
    return [
        Part(
            place=place,
            name=name,
            value="***" if place == "cookie" or name.lower() == "authorization" else value,
        )
        for place, name, value in parameters
    ]


def generation_facts(key: str, view: GenerationView, bumps: Mapping[str, int]) -> GenerationFacts:
    """Describe a generation and the given bumps."""
    return GenerationFacts(
        key=key,
        nonce=None if view.nonce is None else short(view.nonce.decode("latin-1")),
        sequence=view.sequence,
        server=short_server(view.recorded),
        connected=short_server(view.server),
        bumps=dict(bumps),
    )


def entry_facts(
    entry: Entry,
    *,
    size_bytes: int,
    ttl_left_s: float,
    view: GenerationView,
    tags: Iterable[str],
    digest: bytes | None = None,
) -> EntryFacts:
    """Describe an entry, and judge it by a view. ``digest`` is the digest in its key, if known."""
    verdict, why, bumped = judged(entry, view, tuple(tags), digest=digest)
    return EntryFacts(
        stored_at=datetime.fromtimestamp(entry.stored_at_ms / 1000, UTC),
        age_s=round(max(0.0, time.time() - entry.stored_at_ms / 1000), 3),
        ttl_s=entry.ttl_ms / 1000,
        ttl_left_s=round(max(0.0, ttl_left_s), 3),
        size_bytes=size_bytes,
        body_bytes=len(entry.body),
        status=entry.status,
        coding=str(entry.coding),
        negotiable=entry.negotiable,
        fill_ms=entry.fill_ms,
        nonce=short(entry.certificate.nonce.decode("latin-1")),
        sequence=entry.certificate.sequence,
        verdict=verdict,
        why=why,
        bumped=bumped,
    )


def judged(
    entry: Entry, view: GenerationView, tags: tuple[str, ...], *, digest: bytes | None
) -> tuple[str, str, tuple[str, ...]]:
    """Judge an entry as ``core/generations.py`` does.

    Return the verdict, an explanation, and the tags that were bumped.
    """
    if digest is not None and entry.digest != digest:
        return "digest", "it was stored under another key and copied here", ()
    certificate = entry.certificate
    verdict = view.judge(certificate, tags)
    if verdict is Verdict.INVALIDATED:
        bumped = tuple(tag for tag in tags if view.bumps.get(tag, 0) > certificate.sequence)
        reasons = "; ".join(f"{describe_bump(tag)} (at {view.bumps[tag]})" for tag in bumped)
        return str(verdict), f"since it was stored (at {certificate.sequence}): {reasons}", bumped
    if (
        verdict is Verdict.OTHER_SERVER
        and view.recorded.rpartition(":")[0] != view.server.rpartition(":")[0]
    ):
        return "other-epoch", "a new epoch of the whole cache has begun since it was stored", ()
    return str(verdict), _WHY[verdict], ()


def describe_bump(tag: str) -> str:
    """Return what a bump of this tag means."""
    if tag == FLOOR:
        return "everything of the tenant was invalidated"
    if tag.startswith(module_tag("")):
        return f"module {tag.removeprefix(module_tag(''))} was invalidated"
    return f"table {tag.removeprefix(table_tag(''))} was written to"


def short(text: str) -> str:
    """Shorten a nonce or an identity."""
    return text[:SHORT]


def short_server(server: str) -> str:
    """Shorten the name of an epoch and server life."""
    return ":".join(map(short, server.split(":")))


_WHY = {
    Verdict.VALID: "nothing that it depends on has been written since it was stored",
    Verdict.NO_GENERATION: "the tenant's generation is missing: evicted, deleted or expired",
    Verdict.OTHER_SERVER: "it was stored in another life of the server: before a restart, a "
    "failover or a restored dump",
    Verdict.OTHER_GENERATION: "the tenant's generation was lost and created again since it was "
    "stored",
}


def _name(function: object) -> str:
    return str(getattr(function, "__name__", None) or repr(function))
