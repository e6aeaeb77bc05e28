"""What is stored: search by tenant and module, samples, one key looked at closely."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import nlargest
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec

from respcache.core import encoding, keys
from respcache.core import entry as entries
from respcache.core.encoding import ContentCoding
from respcache.core.entry import Entry
from respcache.core.errors import NotFound, StoreUnavailable
from respcache.core.generations import FLOOR, GenerationView, Verdict, module_tag, table_tag
from respcache.core.keys import EntryKey
from respcache.ops.facts import (
    EntryFacts,
    GenerationFacts,
    Part,
    PolicyFacts,
    entry_facts,
    generation_facts,
    judged,
    key_parts,
    policy_facts,
)
from respcache.ops.keyspace import Keyspace, Stored
from respcache.read.plans import Plan
from respcache.routing.table import Route
from respcache.stores.base import Reading

if TYPE_CHECKING:
    from respcache.cache import Cache

MAX_LOOKED_AT = 20_000
"""Keys that one request goes through."""

MAX_CURSOR = 2**64 - 1
"""What SCAN takes."""

MAX_SAMPLED = 2_000
AT_ONCE = 500
"""Keys that are looked at with one command."""

TOP = 20
TTL_BOUNDS_S = (10.0, 60.0, 180.0, 300.0, 600.0, 1800.0, 3600.0)
MAX_REVEALED_BYTES = 16 * 1024 * 1024
MAX_SHOWN = 64 * 1024
"""Characters of a body that are shown."""


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
    """A part of a search. SCAN may show a key twice in different parts."""

    keys: list[KeyFacts]
    cursor: str
    """Give it to go on; empty at the end."""
    looked_at: int
    """Keys of the server that this part went through, whoever they belong to; about."""
    total: int
    """Keys that the server has."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """One column of a histogram: ``count`` entries with less than ``below_s`` seconds to live
    (None: more than all others)."""

    below_s: float | None
    count: int


class KeySample(msgspec.Struct, frozen=True, kw_only=True):
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
    tags: tuple[str, ...]
    """What it depends on; where its route is not known: what it may depend on."""
    routes: list[str]
    """Templates of the routes that can have stored it, by its module and kind."""
    route: str | None = None
    policy: PolicyFacts | None = None
    parts: list[Part] = []
    """Route, policy and parts: where this process remembers a request that leads to the key, as a
    digest tells nothing."""
    held: bool = False
    """In the memory of this process."""


class StoredBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a stored answer, decompressed."""

    key: str
    content_type: str
    size_bytes: int
    text: str | None
    """None where it is no text. Of a value: JSON."""
    truncated: bool
    """There is more of it than is shown."""


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """How many entries there are, as far as was looked."""

    entries: int
    looked_at: int
    complete: bool


async def find(
    space: Keyspace, *, tenant: str | None, module: str | None, cursor: str, limit: int
) -> KeyPage:
    """Search. Costs a few round trips, more where matches are rare."""
    if cursor and not (
        cursor.isascii() and cursor.isdecimal() and len(cursor) <= 20 and int(cursor) <= MAX_CURSOR
    ):
        raise NotFound(f"no cursor {cursor[:40]!r}")
    walk = await space.walk(
        keys.entry_pattern(tenant, module), cursor=cursor, enough=limit, most=MAX_LOOKED_AT
    )
    total = await space.total()
    found = [
        facts
        for stored in await space.stored(_entries(walk.keys))
        if (facts := _facts(stored)) is not None
    ]
    return KeyPage(
        keys=found, cursor=walk.cursor, looked_at=min(walk.looked_at, total), total=total
    )


async def sample(space: Keyspace, *, tenant: str | None, module: str | None) -> KeySample:
    """Look at a bounded number of keys."""
    walk = await space.walk(
        keys.entry_pattern(tenant, module), cursor="", enough=MAX_SAMPLED, most=MAX_LOOKED_AT
    )
    names, found = _entries(walk.keys), list[KeyFacts]()
    for start in range(0, len(names), AT_ONCE):
        for stored in await space.stored(names[start : start + AT_ONCE]):
            facts = _facts(stored)
            if facts is not None:
                found.append(facts)
    total = await space.total()
    modules: Counter[str] = Counter()
    for facts in found:
        modules[facts.module] += facts.size_bytes
    return KeySample(
        sampled=len(found),
        looked_at=total if not walk.cursor else min(walk.looked_at, total),
        total=total,
        complete=not walk.cursor,
        size_bytes=sum(facts.size_bytes for facts in found),
        largest=nlargest(TOP, found, attrgetter("size_bytes")),
        costliest=nlargest(TOP, found, attrgetter("fill_ms")),
        ttl=_histogram([facts.ttl_left_s for facts in found]),
        modules=dict(sorted(modules.items(), key=lambda item: (-item[1], item[0]))),
    )


async def count(space: Keyspace, *, tenant: str, module: str | None) -> Counted:
    """Count the entries of a tenant, going through a bounded number of keys."""
    walk = await space.walk(
        keys.entry_pattern(tenant, module), cursor="", enough=MAX_LOOKED_AT, most=MAX_LOOKED_AT
    )
    total = await space.total()
    looked_at = total if not walk.cursor else min(walk.looked_at, total)
    return Counted(entries=len(_entries(walk.keys)), looked_at=looked_at, complete=not walk.cursor)


async def inspect(cache: "Cache", key: str, named: EntryKey) -> Inspection:
    """Look at one stored answer closely. One round trip, over the connection whose identity its
    verdict depends on.

    Raises ``NotFound`` and ``StoreError``.
    """
    routes = [] if cache.middleware is None else list(cache.middleware.prepare().routes)
    possible = [
        route
        for route in routes
        if route.policy and (route.policy.module, route.policy.kind) == (named.module, named.kind)
    ]
    plan = _plan_to(cache, key)
    if plan is not None:
        possible = [plan.route]
    tags = _tags(named.module, possible, cache.registry.tables)
    reading, entry = await _read(cache, key, named, tags)
    view = reading.generations[0]
    size_bytes, ttl_left_s = len(reading.entry or b""), reading.remaining_ms / 1000
    facts = entry_facts(
        entry,
        size_bytes=size_bytes,
        ttl_left_s=ttl_left_s,
        view=view,
        tags=tags,
        digest=named.digest,
    )
    known = plan is not None and plan.scoped is not None
    return Inspection(
        key=key,
        tenant=named.tenant,
        module=named.module,
        kind=named.kind,
        digest=named.digest.hex(),
        entry=facts if known else _doubted(facts, entry, view, named, possible),
        headers=[
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in entry.headers
        ],
        generation=generation_facts(keys.generation_key(named.tenant), view, view.bumps),
        tags=tags,
        routes=sorted({route.template for route in possible}),
        route=plan.route.template if plan is not None else None,
        policy=policy_facts(plan.policy) if plan is not None else None,
        parts=key_parts(plan.form.parameters) if plan is not None else [],
        held=cache.runtime is not None and key in cache.runtime.near,
    )


async def body_of(cache: "Cache", key: str, named: EntryKey) -> StoredBody:
    """Return the body of a stored answer. One round trip. Raises ``NotFound`` and
    ``StoreError``."""
    _, entry = await _read(cache, key, named, (FLOOR,))
    plain = entry.body
    if entry.coding is ContentCoding.zstd:
        found = encoding.decompress(entry.body, max_bytes=MAX_REVEALED_BYTES)
        if found is None:
            raise NotFound(f"the body of {key} cannot be decompressed")
        plain = found
    content_type = next(
        (value.decode("latin-1") for name, value in entry.headers if name == b"content-type"), ""
    )
    text = _text(plain, is_value=not entry.headers)
    return StoredBody(
        key=key,
        content_type=content_type,
        size_bytes=len(plain),
        text=None if text is None else text[:MAX_SHOWN],
        truncated=text is not None and len(text) > MAX_SHOWN,
    )


async def _read(
    cache: "Cache", key: str, named: EntryKey, tags: Sequence[str]
) -> tuple[Reading, Entry]:
    if cache.store is None:
        raise StoreUnavailable("the application runs without a server for its cache")
    reading = await cache.store.read(key, [(keys.generation_key(named.tenant), tags)])
    entry = None if reading.entry is None else entries.decode(reading.entry)
    if entry is None:
        raise NotFound(
            f"no key {key!r}"
            if reading.entry is None
            else f"{key!r} holds none of this release's entries"
        )
    return reading, entry


def _plan_to(cache: "Cache", key: str) -> Plan | None:
    """Find a request that this process remembers and that leads to a key."""
    plan_cache = None if cache.middleware is None else cache.middleware.plan_cache
    plans = () if plan_cache is None else plan_cache.plans()
    return next(
        (
            plan
            for plan in plans
            if plan.scoped is not None and plan.scoped.cache_key.entry_key == key
        ),
        None,
    )


def _tags(module: str, routes: Iterable[Route], known: Iterable[str]) -> tuple[str, ...]:
    """Return what an entry of the module depends on: of these routes, or where there are none, of
    all tables that are known."""
    tables = [table for route in routes if route.policy for table in route.policy.tables]
    return (
        FLOOR,
        module_tag(module),
        *(table_tag(table) for table in dict.fromkeys(tables or sorted(known))),
    )


def _doubted(
    facts: EntryFacts, entry: Entry, view: GenerationView, named: EntryKey, routes: Sequence[Route]
) -> EntryFacts:
    """Take a verdict back that holds for some only of the routes that can have stored the entry."""
    if facts.verdict != Verdict.INVALIDATED or {FLOOR, module_tag(named.module)} & set(
        facts.bumped
    ):
        return facts
    said = {
        route.template: judged(entry, view, route.policy.tags, named.digest)[0]
        for route in routes
        if route.policy is not None
    }
    if said and set(said.values()) == {facts.verdict}:
        return facts
    why = "; ".join(
        f"{verdict} if it is of {template}" for template, verdict in sorted(said.items())
    )
    return msgspec.structs.replace(
        facts, verdict="depends", why=why or f"{facts.why}, if it depends on that"
    )


def _entries(names: Iterable[str]) -> list[str]:
    """Choose those of entries, in the order of their names: that of SCAN is another one on every
    server."""
    return sorted(name for name in names if keys.read_entry_key(name) is not None)


def _facts(stored: Stored) -> KeyFacts | None:
    named, head = keys.read_entry_key(stored.key), entries.decode_header(stored.head)
    if named is None or head is None:
        return None
    return KeyFacts(
        key=stored.key,
        tenant=named.tenant,
        module=named.module,
        kind=named.kind,
        size_bytes=stored.size_bytes,
        ttl_left_s=round(stored.ttl_left_s, 3),
        age_s=round(max(0.0, time.time() - head.stored_at_ms / 1000), 3),
        fill_ms=head.fill_ms,
    )


def _histogram(seconds: Sequence[float]) -> list[Bucket]:
    lower = (0.0, *TTL_BOUNDS_S)
    upper = (*TTL_BOUNDS_S, float("inf"))
    counts = [
        sum(low <= one < high for one in seconds) for low, high in zip(lower, upper, strict=True)
    ]
    return [
        Bucket(below_s=bound, count=found)
        for bound, found in zip((*TTL_BOUNDS_S, None), counts, strict=True)
    ]


def _text(plain: bytes, *, is_value: bool) -> str | None:
    try:
        return (
            msgspec.json.encode(msgspec.msgpack.decode(plain)).decode()
            if is_value
            else plain.decode()
        )
    except (msgspec.MsgspecError, TypeError, UnicodeDecodeError):
        return None
