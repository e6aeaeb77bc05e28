"""The bytes of a stored response. Encoded and decoded here and only here.

Layout, big-endian: ``RCE`` and format version (4 bytes), nonce (16), sequence (u64), digest (16),
stored at (u64, milliseconds of the Unix epoch, for display only), time to live (u32, ms), duration
of the fill (u32, ms), status (u16), flags (u8), length of the headers (u32); then the headers
(each: u16 length + name, u16 length + value) and, to the end, the body. Flags: 1, the body is
compressed with zstd; 2, it may be sent in other content codings than the handler's.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache

from respcache.core.encoding import ContentCoding, Headers
from respcache.core.generations import Certificate

MAGIC = b"RCE\x02"
_HEAD = struct.Struct(">4s16sQ16sQIIHBI")
_COMPRESSED = 1
_NEGOTIABLE = 2
_LENGTH = struct.Struct(">H")


@dataclass(slots=True)  # not frozen: that would double the cost of decoding for each hit
class Entry:
    """A stored response with the certificate that decides its validity, and the digest of the
    request that it belongs to. Never changed."""

    certificate: Certificate
    digest: bytes
    stored_at_ms: int
    ttl_ms: int
    fill_ms: int
    status: int
    headers: Headers
    """Those of the handler's response. If it is ``negotiable``: those that all its representations
    share (``encoding.shared``)."""
    body: bytes
    coding: ContentCoding = ContentCoding.identity
    """The coding of ``body``: ``identity`` or ``zstd``."""
    negotiable: bool = False


HEAD_BYTES = _HEAD.size


@dataclass(frozen=True, slots=True)
class EntryHeader:
    """The times in the first ``HEAD_BYTES`` of a stored response."""

    stored_at_ms: int
    ttl_ms: int
    fill_ms: int


def decode_header(data: bytes) -> EntryHeader | None:
    """Parse the first bytes of a stored response; return None for anything that is not of this
    format version."""
    if len(data) < HEAD_BYTES:
        return None
    magic, _, _, _, stored_at, ttl, fill, *_ = _HEAD.unpack_from(data)
    return EntryHeader(stored_at, ttl, fill) if magic == MAGIC else None


def encode(entry: Entry) -> bytes:
    """Return the bytes to store."""
    headers = b"".join(_pair(name, value) for name, value in entry.headers)
    head = _HEAD.pack(
        MAGIC,
        entry.certificate.nonce,
        entry.certificate.sequence,
        entry.digest,
        entry.stored_at_ms,
        entry.ttl_ms,
        min(entry.fill_ms, 0xFFFFFFFF),
        entry.status,
        _COMPRESSED * (entry.coding is ContentCoding.zstd) | _NEGOTIABLE * entry.negotiable,
        len(headers),
    )
    return head + headers + entry.body


def decode(data: bytes) -> Entry | None:
    """Parse stored bytes; return None for anything that is not an entry of this format version."""
    if len(data) < _HEAD.size:
        return None
    magic, nonce, sequence, digest, stored_at, ttl, fill, status, flags, length = _HEAD.unpack_from(
        data
    )
    if magic != MAGIC or len(data) < _HEAD.size + length:
        return None
    end = _HEAD.size + length
    headers = _read_headers(data[_HEAD.size : end])
    if headers is None:
        return None
    coding = ContentCoding.zstd if flags & _COMPRESSED else ContentCoding.identity
    body, negotiable = data[end:], bool(flags & _NEGOTIABLE)
    return Entry(
        Certificate(nonce, sequence),
        digest,
        stored_at,
        ttl,
        fill,
        status,
        headers,
        body,
        coding,
        negotiable,
    )


def _pair(name: bytes, value: bytes) -> bytes:
    return _LENGTH.pack(len(name)) + name + _LENGTH.pack(len(value)) + value


@lru_cache(1024)
def _read_headers(data: bytes) -> Headers | None:
    """Parse headers. Cached, because most entries have the same ones."""
    parts: list[bytes] = []
    position, end = 0, len(data)
    while position < end:
        if position + 2 > end:
            return None
        (length,) = _LENGTH.unpack_from(data, position)
        position += 2
        if position + length > end:
            return None
        parts.append(data[position : position + length])
        position += length
    if len(parts) % 2:
        return None
    return tuple(zip(parts[::2], parts[1::2], strict=True))
