"""Stored responses: search by tenant and module, samples, and the details of one key."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import nlargest
from operator import attrgetter

import msgspec

from respcache.cache import Cache
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
from respcache.ops.keyspace import Keyspace, StoredKey
from respcache.read.plans import Plan
from respcache.routing.table import Route
from respcache.stores.base import Reading

MAX_SCANNED = 20_000
"""Keys that one request examines."""

MAX_CURSOR = 2**64 - 1
"""The largest cursor that SCAN accepts."""

MAX_SAMPLED = 2_000
READ_AT_ONCE = 500
"""Keys that are read in one round trip."""

TOP = 20
TTL_BOUNDS_S = (10.0, 60.0, 180.0, 300.0, 600.0, 1800.0, 3600.0)
MAX_REVEALED_BYTES = 16 * 1024 * 1024
MAX_SHOWN = 64 * 1024
"""Characters of a body that are returned."""


class KeyFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One stored response, without its body."""

    key: str
    tenant: str
    module: str
    kind: str
    size_bytes: int
    ttl_left_s: float
    age_s: float
    fill_ms: int


class KeyPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a search. SCAN may return a key on two pages."""

    keys: list[KeyFacts]
    cursor: str
    """Pass it to continue; empty at the end."""
    scanned: int
    """Approximate number of keys of all tenants that were examined for this page."""
    total: int
    """Keys on the server."""


class TtlBucket(msgspec.Struct, frozen=True, kw_only=True):
    """One column of a histogram: ``count`` entries with less than ``below_s`` seconds to live.

    None marks the last column, which has no bound.
    """

    below_s: float | None
    count: int


class KeySample(msgspec.Struct, frozen=True, kw_only=True):
    """A sample of the stored responses, from a bounded scan."""

    sampled: int
    """Entries in the sample."""
    scanned: int
    total: int
    complete: bool
    """Whether all keys of the server were examined, so that these are all entries."""
    size_bytes: int
    """Total size of the sample."""
    largest: list[KeyFacts]
    costliest: list[KeyFacts]
    """By the duration of their fills."""
    ttl: list[TtlBucket]
    modules: dict[str, int]
    """Bytes in the sample by module."""


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """The details of one stored response, without its body (see ``Admin.reveal``)."""

    key: str
    tenant: str
    module: str
    kind: str
    digest: str
    entry: EntryFacts
    headers: list[tuple[str, str]]
    """The stored response headers."""
    generation: GenerationFacts
    tags: tuple[str, ...]
    """The tags that it depends on; if its route is unknown, those on which it may depend."""
    routes: list[str]
    """Path templates of the routes with its module and kind, which may have stored it."""
    route: str | None = None
    policy: PolicyFacts | None = None
    parts: list[Part] = []
    """Route, policy and parts are set only if this process has cached a plan for the key: a digest
    does not reveal them."""
    in_memory: bool = False
    """Whether this process has it in memory."""


class StoredBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a stored response, decompressed."""

    key: str
    content_type: str
    size_bytes: int
    text: str | None
    """None if it is not text. JSON for a cached value."""
    truncated: bool
    """Whether ``text`` is only the beginning."""


class EntryCount(msgspec.Struct, frozen=True, kw_only=True):
    """The number of entries among the examined keys."""

    entries: int
    scanned: int
    complete: bool


async def find(
    space: Keyspace, *, tenant: str | None, module: str | None, cursor: str, limit: int
) -> KeyPage:
    """Search entries. Takes a few round trips, more if matches are rare. Raises ``NotFound``."""
    if cursor and not (
        cursor.isascii() and cursor.isdecimal() and len(cursor) <= 20 and int(cursor) <= MAX_CURSOR
    ):
        raise NotFound(f"no cursor {cursor[:40]!r}")
    scan = await space.find(
        keys.entry_pattern(tenant, module), cursor=cursor, enough=limit, most=MAX_SCANNED
    )
    total = await space.count()
    found = [
        facts
        for stored in await space.stored(_entries(scan.keys))
        if (facts := _facts(stored)) is not None
    ]
    return KeyPage(keys=found, cursor=scan.cursor, scanned=min(scan.scanned, total), total=total)


async def sample(space: Keyspace, *, tenant: str | None, module: str | None) -> KeySample:
    """Describe a sample of the entries, from a bounded number of keys."""
    scan = await space.find(
        keys.entry_pattern(tenant, module), cursor="", enough=MAX_SAMPLED, most=MAX_SCANNED
    )
    names, found = _entries(scan.keys), list[KeyFacts]()
    for start in range(0, len(names), READ_AT_ONCE):
        for stored in await space.stored(names[start : start + READ_AT_ONCE]):
            facts = _facts(stored)
            if facts is not None:
                found.append(facts)
    total = await space.count()
    modules: Counter[str] = Counter()
    for facts in found:
        modules[facts.module] += facts.size_bytes
    return KeySample(
        sampled=len(found),
        scanned=total if not scan.cursor else min(scan.scanned, total),
        total=total,
        complete=not scan.cursor,
        size_bytes=sum(facts.size_bytes for facts in found),
        largest=nlargest(TOP, found, attrgetter("size_bytes")),
        costliest=nlargest(TOP, found, attrgetter("fill_ms")),
        ttl=_histogram([facts.ttl_left_s for facts in found]),
        modules=dict(sorted(modules.items(), key=lambda item: (-item[1], item[0]))),
    )


async def count(space: Keyspace, *, tenant: str, module: str | None) -> EntryCount:
    """Count the entries of a tenant among a bounded number of keys."""
    scan = await space.find(
        keys.entry_pattern(tenant, module), cursor="", enough=MAX_SCANNED, most=MAX_SCANNED
    )
    total = await space.count()
    scanned = total if not scan.cursor else min(scan.scanned, total)
    return EntryCount(entries=len(_entries(scan.keys)), scanned=scanned, complete=not scan.cursor)


async def inspect(cache: Cache, key: str, named: EntryKey) -> Inspection:
    """Return the details of one stored response. One round trip, over the cache's own connection,
    because the verdict depends on that connection's server life.

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
    reading, entry = await _read(cache, key, named, tags=tags)
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
        entry=facts if known else _qualified(facts, (entry, view), named=named, routes=possible),
        headers=[
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in entry.headers
        ],
        generation=generation_facts(keys.generation_key(named.tenant), view, view.bumps),
        tags=tags,
        routes=sorted({route.template for route in possible}),
        route=plan.route.template if plan is not None else None,
        policy=policy_facts(plan.policy) if plan is not None else None,
        parts=key_parts(plan.form.parameters) if plan is not None else [],
        in_memory=cache.runtime is not None and key in cache.runtime.near,
    )


async def body_of(cache: Cache, key: str, named: EntryKey) -> StoredBody:
    """Return the body of a stored response. One round trip.

    Raises ``NotFound`` and ``StoreError``.
    """
    _, entry = await _read(cache, key, named, tags=(FLOOR,))
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
    cache: Cache, key: str, named: EntryKey, *, tags: Sequence[str]
) -> tuple[Reading, Entry]:
    if cache.store is None:
        raise StoreUnavailable("the application runs without a cache server")
    reading = await cache.store.read(key, [(keys.generation_key(named.tenant), tags)])
    entry = None if reading.entry is None else entries.decode(reading.entry)
    if entry is None:
        raise NotFound(
            f"no key {key!r}"
            if reading.entry is None
            else f"{key!r} is not an entry of this release"
        )
    return reading, entry


def _plan_to(cache: Cache, key: str) -> Plan | None:
    """Return a plan in the plan cache of this process that leads to a key."""
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
    """Return the tags of an entry: with the tables of these routes, or of all routes if there are
    none."""
    tables = [table for route in routes if route.policy for table in route.policy.tables]
    return (
        FLOOR,
        module_tag(module),
        *(table_tag(table) for table in dict.fromkeys(tables or sorted(known))),
    )


def _qualified(
    facts: EntryFacts,
    judged_by: tuple[Entry, GenerationView],
    *,
    named: EntryKey,
    routes: Sequence[Route],
) -> EntryFacts:
    """Replace the verdict by ``depends`` unless it is the same for all possible routes."""
    if facts.verdict != Verdict.INVALIDATED or {FLOOR, module_tag(named.module)} & set(
        facts.bumped
    ):
        return facts
    verdicts = {
        route.template: judged(*judged_by, route.policy.tags, digest=named.digest)[0]
        for route in routes
        if route.policy is not None
    }
    if verdicts and set(verdicts.values()) == {facts.verdict}:
        return facts
    why = "; ".join(
        f"{verdict} if {template} stored it" for template, verdict in sorted(verdicts.items())
    )
    return msgspec.structs.replace(
        facts, verdict="depends", why=why or f"{facts.why}, if it depends on them"
    )


def _entries(names: Iterable[str]) -> list[str]:
    """Return the names of entries in sorted order: that of SCAN differs between servers."""
    return sorted(name for name in names if keys.read_entry_key(name) is not None)


def _facts(stored: StoredKey) -> KeyFacts | None:
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


def _histogram(seconds: Sequence[float]) -> list[TtlBucket]:
    lower = (0.0, *TTL_BOUNDS_S)
    upper = (*TTL_BOUNDS_S, float("inf"))
    counts = [
        sum(low <= one < high for one in seconds) for low, high in zip(lower, upper, strict=True)
    ]
    return [
        TtlBucket(below_s=bound, count=found)
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
