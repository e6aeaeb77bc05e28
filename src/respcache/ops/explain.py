"""Why a request would be a hit, a miss or a bypass now: the steps of ``lookup.py``, taken without changing anything."""

from datetime import datetime

import msgspec


class PolicyFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How a route is cached."""

    module: str
    kind: str
    ttl_s: float
    level: str
    bound_s: float
    """0.0 where it does not count (levels ``strict`` and ``ttl``)."""
    tables: tuple[str, ...]
    varies_by: str | None
    """The name of the function that adds to the key."""
    rule: str | None
    """The role rule of the route."""
    max_body_bytes: int


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the key, in canonical form. ``place`` is path, query, header, cookie, value or varies."""

    place: str
    name: str
    value: str
    """``***`` for cookies and credentials."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, as the resolver says. Nothing of the credentials."""

    tenant: str | None
    home: str
    """The tenant whose generation covers what decides who sees what."""
    role: str | None
    """Where the application's scope has one."""
    fingerprint: str
    """Short digest of what the caller may see: equal for callers who see the same rows."""
    tables: tuple[str, ...]
    """Which were read to know."""
    remembered: bool
    """By this process, and still valid."""


class GenerationFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's generation, as the store tells it now."""

    key: str
    nonce: str | None
    """Shortened; None where there is none."""
    sequence: int
    server: str
    """The epoch and server life under which it was made, shortened."""
    connected: str
    """Those that this process is connected to."""
    bumps: dict[str, int]
    """Of each tag that counts here: the sequence of its last bump; absent: never bumped in this life."""


class EntryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A stored answer."""

    stored_at: datetime
    age_s: float
    ttl_s: float
    ttl_left_s: float
    size_bytes: int
    """As stored: head, headers and body."""
    body_bytes: int
    """As stored, so compressed where ``coding`` says so."""
    status: int
    coding: str
    negotiable: bool
    """May be sent in other codings than the handler's."""
    fill_ms: int
    nonce: str
    sequence: int
    """Of its certificate: captured before the handler ran."""
    verdict: str
    """``valid``, ``no-generation``, ``other-server``, ``other-epoch``, ``other-generation``, ``invalidated``, ``digest``; of the
    inspector also ``depends``: on which of several routes it is of."""
    why: str
    """The verdict in words."""


class FenceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Until when this process may serve."""

    alive: bool
    left_s: float
    age_s: float | None
    """How long ago the moment is up to which every write was seen."""
    server: str
    problem: str
    """What kept the last round from being completed."""


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What this process holds itself."""

    plan: bool
    """The request would be recognised by its bytes."""
    held: bool
    """Its answer is in memory."""
    size_bytes: int
    ttl_left_s: float


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of a request now, in this process."""

    outcome: str
    """``hit``, ``miss`` or ``bypass``."""
    reason: str
    """One word: ``memory`` or ``store``; ``absent`` or a verdict; the ``detail=`` of ``Cache-Status``, or ``not-cached``."""
    why: str
    """A sentence."""
    method: str
    path: str
    route: str | None = None
    policy: PolicyFacts | None = None
    parameters: list[Part] = []
    """What the key is made of, besides the tenant and what the caller may see."""
    left_out: list[str] = []
    """What the request has and the key has not."""
    caller: Caller | None = None
    key: str | None = None
    lease_key: str | None = None
    tags: tuple[str, ...] = ()
    """What the answer depends on."""
    generation: GenerationFacts | None = None
    home: GenerationFacts | None = None
    """That of the caller's home, where it is another one."""
    fence: FenceFacts | None = None
    entry: EntryFacts | None = None
    memory: MemoryFacts | None = None
    switches: tuple[str, ...] = ()
    """What is switched off: ``*``, ``tenant:<id>``, ``module:<name>``."""
