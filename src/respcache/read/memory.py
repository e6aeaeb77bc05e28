"""The near cache: entries in the memory of this process, ready to be sent in every coding."""

from collections.abc import Callable
from functools import lru_cache

from respcache.core import encoding
from respcache.core.encoding import ContentCoding, Headers
from respcache.core.entry import Entry
from respcache.core.http_caching import of_a_hit
from respcache.core.keys import CacheKey
from respcache.read.s3fifo import S3Fifo

DEFAULT_NEAR_BYTES = 64 * 1024 * 1024

OVERHEAD_BYTES = 1536
"""The approximate size of a memory entry without its bodies."""


class Representation:
    """One form of a response (RFC 9110, section 3.2): headers and body in one content coding.

    The headers of a hit are built again once a second, because they contain the remaining TTL.
    """

    __slots__ = (
        "_defaults",
        "_head",
        "_head_ttl_s",
        "_hit_headers",
        "_hit_ttl_s",
        "body",
        "stored",
    )

    def __init__(self, headers: Headers, body: bytes) -> None:
        self.body = body
        self.stored = headers
        self._hit_headers: list[tuple[bytes, bytes]] = []
        self._hit_ttl_s = -1
        self._head = b""
        self._head_ttl_s = -1
        self._defaults: object = None

    def headers(self, ttl_s: int) -> list[tuple[bytes, bytes]]:
        """Return the headers of a hit with this many seconds left. Callers must not change them."""
        if ttl_s != self._hit_ttl_s:
            self._hit_headers = of_a_hit(self.stored, ttl_s=max(0, ttl_s))
            self._hit_ttl_s = ttl_s
        return self._hit_headers

    def head(self, status_line: bytes, defaults: list[tuple[bytes, bytes]], *, ttl_s: int) -> bytes:
        """Return the serialized head of a hit (RFC 9112).

        ``defaults`` are the server's own headers: a new list object whenever they change.
        """
        if defaults is not self._defaults or ttl_s != self._head_ttl_s:
            lines = b"".join(b"%s: %s\r\n" % pair for pair in (*defaults, *self.headers(ttl_s)))
            self._head = b"%s%s\r\n" % (status_line, lines)
            self._defaults, self._head_ttl_s = defaults, ttl_s
        return self._head


class MemoryEntry:
    """An entry and its expiry in seconds of the cache's clock.

    ``kept`` says that the near cache keeps it, so an expensive representation is worth building.
    """

    __slots__ = ("compressed", "entry", "expires_at", "kept", "representations")

    def __init__(self, entry: Entry, *, expires_at: float, kept: bool = False) -> None:
        self.entry = entry
        self.expires_at = expires_at
        self.kept = kept
        self.compressed = entry.body if entry.coding is ContentCoding.zstd else None
        self.representations: dict[ContentCoding, Representation] = {}
        """Those built so far; ``represent`` builds others."""

    @property
    def size_bytes(self) -> int:
        """The approximate size in memory."""
        bodies = {id(body): len(body) for body in (self.entry.body, self.compressed or b"")}
        for representation in self.representations.values():
            bodies[id(representation.body)] = len(representation.body)
        return OVERHEAD_BYTES + sum(bodies.values())

    def add_compressed(self, body: bytes) -> None:
        """Keep the zstd form of the body, too."""
        self.compressed = body
        self.representations.pop(ContentCoding.zstd, None)

    def represent(self, coding: ContentCoding, *, max_bytes: int) -> Representation | None:
        """Return the response in this coding, or plain if it is not available in it.

        None: the stored bytes are damaged, or larger than ``max_bytes`` when decompressed.
        """
        known = self.representations.get(coding)
        if known is not None:
            return known
        if coding is ContentCoding.zstd and self.compressed is not None:
            return self._add(coding, self.compressed)
        plain = self.representations.get(ContentCoding.identity) or self._plain(max_bytes)
        if plain is None:
            return None
        if coding is ContentCoding.gzip and self.entry.negotiable and self.kept:
            return self._add(coding, encoding.gzip(plain.body))
        self.representations[coding] = plain
        return plain

    def _plain(self, max_bytes: int) -> Representation | None:
        entry = self.entry
        body: bytes | None = entry.body
        if entry.coding is ContentCoding.zstd:
            body = encoding.decompress(entry.body, max_bytes=max_bytes)
        return None if body is None else self._add(ContentCoding.identity, body)

    def _add(self, coding: ContentCoding, body: bytes) -> Representation:
        headers = self.entry.headers
        if self.entry.negotiable:
            headers = encoding.negotiated(headers, coding=coding, length=len(body))
        shared = tuple(map(_shared, headers))
        representation = self.representations[coding] = Representation(shared, body)
        return representation


class NearCache(S3Fifo[str, MemoryEntry]):
    """The entries of one process by entry key, bounded in bytes; 0 bytes keep nothing."""

    def __init__(self, max_bytes: int, *, clock: Callable[[], float]) -> None:
        super().__init__(max_bytes)
        self._clock = clock

    def keep(self, cache_key: CacheKey, entry: Entry, *, remaining_ms: int) -> MemoryEntry:
        """Return a memory entry with this many milliseconds left, and keep it if there is room."""
        kept = self.max_bytes > 0
        expires_at = self._clock() + remaining_ms / 1000
        memory_entry = MemoryEntry(entry, expires_at=expires_at, kept=kept)
        if kept:
            self.put(cache_key.entry_key, memory_entry, size_bytes=memory_entry.size_bytes)
        return memory_entry

    def add_compressed(self, cache_key: CacheKey, memory_entry: MemoryEntry, body: bytes) -> None:
        """Add the zstd form to an entry. A proof made with the plain form no longer stands."""
        memory_entry.add_compressed(body)
        if self.peek(cache_key.entry_key) is memory_entry:
            self.renew(cache_key.entry_key)
            self.resize(cache_key.entry_key, memory_entry.size_bytes)

    def represent(
        self, entry_key: str, memory_entry: MemoryEntry, coding: ContentCoding, *, max_bytes: int
    ) -> Representation | None:
        """Return ``MemoryEntry.represent``, and account for its size. Drops a damaged entry."""
        if not memory_entry.kept:
            return memory_entry.represent(coding, max_bytes=max_bytes)
        before = memory_entry.size_bytes
        representation = memory_entry.represent(coding, max_bytes=max_bytes)
        if representation is None:
            self.drop(entry_key, memory_entry)
        elif memory_entry.size_bytes != before and self.peek(entry_key) is memory_entry:
            self.resize(entry_key, memory_entry.size_bytes)
        return representation

    def drop(self, entry_key: str, memory_entry: MemoryEntry) -> None:
        """Discard an entry unless a newer one has replaced it."""
        if self.peek(entry_key) is memory_entry:
            self.discard(entry_key)


@lru_cache(4096)
def _shared(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Return one object for all equal headers, because most entries have the same ones."""
    return header
