"""What is stored: search by tenant and module, samples, one key. The only place that walks keys, for operators, with a bound."""

import msgspec

from respcache.ops.facts import EntryFacts, GenerationFacts, Part, PolicyFacts

MAX_LOOKED_AT = 20_000
"""Keys that one request looks at."""


class KeyFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One stored answer, without its body."""

    key: str
    tenant: str
    module: str
    kind: str
    size_bytes: int
    ttl_left_s: float
    age_s: float
    fill_ms: int


class KeyPage(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a search."""

    keys: list[KeyFacts]
    cursor: str
    """Give it to go on; empty at the end."""
    looked_at: int
    """Keys of the server that this part went through, whoever they belong to."""
    total: int
    """Keys that the server has."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """One column of a histogram: ``count`` entries with less than ``below_s`` seconds to live (None: more than all others)."""

    below_s: float | None
    count: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What a bounded look at the server's keys found."""

    sampled: int
    """Entries that were looked at."""
    looked_at: int
    total: int
    complete: bool
    """All keys of the server were looked at, so these are all entries."""
    size_bytes: int
    """Of the sampled entries."""
    largest: list[KeyFacts]
    costliest: list[KeyFacts]
    """By what it took to make them."""
    ttl: list[Bucket]
    modules: dict[str, int]
    """Sampled bytes by module."""


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """One stored answer, looked at closely. The body is not in it: ``Admin.reveal``."""

    key: str
    tenant: str
    module: str
    kind: str
    digest: str
    entry: EntryFacts
    headers: list[tuple[str, str]]
    """That are stored with it."""
    generation: GenerationFacts
    routes: list[str]
    """Templates of the routes that can have stored it, by its module and kind."""
    route: str | None = None
    policy: PolicyFacts | None = None
    parts: list[Part] = []
    """Route, policy and parts: where this process remembers a request that leads to the key, as a digest tells nothing."""
    held: bool = False
    """In the memory of this process."""


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a stored answer, decompressed."""

    key: str
    content_type: str
    size_bytes: int
    text: str | None
    """None where it is no text."""
    truncated: bool
    """There is more of it than is shown."""
