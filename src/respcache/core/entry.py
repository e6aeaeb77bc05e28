"""The bytes of a stored response. Built and read here and only here.

Layout, big-endian: ``RCE`` and format version (4 bytes), nonce (16), sequence (u64), digest (16), stored at (u64, milliseconds
of the Unix epoch, for display only), time to live (u32, ms), cost of the fill (u32, ms), status (u16), length of the
headers (u32); then the headers (each: u16 length + name, u16 length + value) and, to the end, the body.
"""

import struct
from dataclasses import dataclass

from respcache.core.generations import Certificate

Headers = tuple[tuple[bytes, bytes], ...]

MAGIC = b"RCE\x01"
_HEAD = struct.Struct(">4s16sQ16sQIIHI")
_LENGTH = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored response with the certificate that says how long it is true and the digest that says whose it is."""

    certificate: Certificate
    digest: bytes
    stored_at_ms: int
    ttl_ms: int
    fill_ms: int
    status: int
    headers: Headers
    body: bytes


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
        len(headers),
    )
    return head + headers + entry.body


def decode(data: bytes) -> Entry | None:
    """Read stored bytes back, or return None for anything that is not an entry of this format version."""
    if len(data) < _HEAD.size:
        return None
    magic, nonce, sequence, digest, stored_at, ttl, fill, status, length = _HEAD.unpack_from(data)
    if magic != MAGIC or len(data) < _HEAD.size + length:
        return None
    end = _HEAD.size + length
    headers = _read_headers(data, _HEAD.size, end)
    if headers is None:
        return None
    return Entry(Certificate(nonce, sequence), digest, stored_at, ttl, fill, status, headers, data[end:])


def _pair(name: bytes, value: bytes) -> bytes:
    return _LENGTH.pack(len(name)) + name + _LENGTH.pack(len(value)) + value


def _read_headers(data: bytes, position: int, end: int) -> Headers | None:
    parts: list[bytes] = []
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
