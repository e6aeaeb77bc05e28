"""A valid entry, ready to be sent in every coding that clients ask for."""

from functools import lru_cache

from respcache.core import encoding
from respcache.core.encoding import ContentCoding, Headers
from respcache.core.entry import Entry
from respcache.core.generations import GenerationView
from respcache.core.http_caching import of_a_hit

OVERHEAD_BYTES = 1536
"""What an entry takes besides its bodies, roughly."""


class Representation:
    """One form of an answer: its bytes, and its headers, which are made anew once a second for what
    they say of its time."""

    __slots__ = ("_defaults", "_head", "_head_ttl_s", "_said", "_said_ttl_s", "body", "stored")

    def __init__(self, headers: Headers, body: bytes) -> None:
        self.body = body
        self.stored = headers
        self._said: list[tuple[bytes, bytes]] = []
        self._said_ttl_s = -1
        self._head = b""
        self._head_ttl_s = -1
        self._defaults: object = None

    def headers(self, ttl_s: int) -> list[tuple[bytes, bytes]]:
        """Return the headers of a hit with so many seconds left; not to be changed."""
        if ttl_s != self._said_ttl_s:
            self._said = of_a_hit(self.stored, ttl_s=max(0, ttl_s))
            self._said_ttl_s = ttl_s
        return self._said

    def head(self, status_line: bytes, defaults: list[tuple[bytes, bytes]], ttl_s: int) -> bytes:
        """Return the head of a hit as it goes over the wire (RFC 9112). ``defaults``: the server's
        own headers, a new list whenever they change."""
        if defaults is not self._defaults or ttl_s != self._head_ttl_s:
            lines = b"".join(b"%s: %s\r\n" % pair for pair in (*defaults, *self.headers(ttl_s)))
            self._head = b"%s%s\r\n" % (status_line, lines)
            self._defaults, self._head_ttl_s = defaults, ttl_s
        return self._head


class MemoryEntry:
    """An entry and until when it lives (by the cache's clock). ``proven`` is the last view that it
    was valid in.

    ``lasting``: it is kept in memory, so a form that is costly to make is worth making.
    """

    __slots__ = ("entry", "expires_at", "lasting", "packed", "proven", "representations")

    def __init__(
        self,
        entry: Entry,
        *,
        expires_at: float,
        proven: GenerationView | None = None,
        lasting: bool = False,
    ) -> None:
        self.entry = entry
        self.expires_at = expires_at
        self.proven = proven
        self.lasting = lasting
        self.packed = entry.body if entry.coding is ContentCoding.zstd else None
        self.representations: dict[ContentCoding, Representation] = {}
        """The forms that were asked for; ``make`` makes others."""

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, roughly."""
        bodies = {id(body): len(body) for body in (self.entry.body, self.packed or b"")}
        bodies.update(
            (id(representation.body), len(representation.body))
            for representation in self.representations.values()
        )
        return OVERHEAD_BYTES + sum(bodies.values())

    def pack(self, body: bytes) -> None:
        """Keep the compressed form of the body, too."""
        self.packed = body
        self.representations.pop(ContentCoding.zstd, None)

    def make(self, coding: ContentCoding, *, max_bytes: int) -> Representation | None:
        """Return the answer in this coding, or plain where it is not to be had so; None where the
        stored bytes are damaged."""
        known = self.representations.get(coding)
        if known is not None:
            return known
        if coding is ContentCoding.zstd and self.packed is not None:
            return self._add(coding, self.packed)
        plain = self.representations.get(ContentCoding.identity) or self._plain(max_bytes)
        if (
            plain is not None
            and coding is ContentCoding.gzip
            and self.entry.negotiable
            and self.lasting
        ):
            return self._add(coding, encoding.gzip(plain.body))
        if plain is not None:
            self.representations[coding] = plain
        return plain

    def _plain(self, max_bytes: int) -> Representation | None:
        entry = self.entry
        body = (
            encoding.decompress(entry.body, max_bytes=max_bytes)
            if entry.coding is ContentCoding.zstd
            else entry.body
        )
        return None if body is None else self._add(ContentCoding.identity, body)

    def _add(self, coding: ContentCoding, body: bytes) -> Representation:
        headers = self.entry.headers
        if self.entry.negotiable:
            headers = encoding.negotiated(headers, coding=coding, length=len(body))
        representation = self.representations[coding] = Representation(
            tuple(map(_one, headers)), body
        )
        return representation


@lru_cache(4096)
def _one(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Return one object for all equal headers: most entries have the same ones."""
    return header
