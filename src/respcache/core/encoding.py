"""Content codings: which bytes of a stored body a client receives (zstd as stored, gzip, or plain).
Also the headers that declare them.

A body is compressed once, when it is stored. Every function here depends on its arguments only; the
one piece of state is a bounded cache of parsed headers. No I/O, no clock. No compressor is kept
between calls, so any thread may call these functions. (A shared compressor would save about a tenth
of the time, but would not be safe for threads.)

Entity tags. A strong tag identifies bytes, so one tag must not be sent with two codings of a body
(RFC 9110, sections 8.8.1 and 8.8.3.3). Weakening it, as nginx and Django do, keeps
``If-None-Match`` working but makes every ``If-Match`` fail (section 13.1.1 requires the strong
comparison): a handler with optimistic locking would respond 412 to every client that received a
body of more than ``MIN_BYTES``. A suffix per coding would require rewriting every conditional
request and every 304. So ``encodable`` is false for a response with a strong tag, which is sent as
the handler made it. Weak tags are sent unchanged with every coding.

Sources: RFC 9110 (8.4 codings, 8.8 validators, 12.5.3 Accept-Encoding, 12.5.5 Vary), RFC 8878 and
9659 (zstd), RFC 1952 (gzip).
"""

import re
import sys
import zlib
from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Headers = tuple[tuple[bytes, bytes], ...]

MIN_BYTES = 1024
"""Shorter bodies fit into one or two packets uncompressed."""
MAX_RATIO = 0.9
"""The largest accepted ratio of compressed to plain size."""
ZSTD_LEVEL = 1
"""Measured on 36.8 KB of 50 accounts: level 1 takes 57 us (3 % of a fill of 2 ms) for a ratio of
5.56, level -1 50 us for 4.39, level 3 80 us for 5.65. Below level 1 zstd does not compress
literals."""
GZIP_LEVEL = 1
"""On the same list: level 1 takes 139 us for 4.86, level 3 192 us for 5.18, level 6 421 us for
5.63. gzip blocks the event loop."""
MAX_ACCEPT_BYTES = 256
"""Longer ``Accept-Encoding`` values are not parsed; browsers send about 25 bytes."""
MAX_ACCEPT_VALUES = 256
"""Distinct values that are cached: with the limit above, at most 64 KiB of clients' text."""


class ContentCoding(StrEnum):
    """A content coding that we can send (RFC 9110, section 8.4.1), in the order of our
    preference."""

    zstd = "zstd"
    gzip = "gzip"
    identity = "identity"


_ACCEPTED_ITEM = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)"  # a token; "*" is one, too
    rb"(?:[ \t]*;[ \t]*[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?"  # RFC 9110, section 12.4.2
)
_COMPRESSIBLE = frozenset({b"application/json", b"application/javascript", b"application/xml"})
_COMPRESSIBLE_ENDS = (b"+json", b"+xml")  # image/svg+xml is one of them
_OPTIONS: dict[int, int] = {
    zstd.CompressionParameter.compression_level: ZSTD_LEVEL,
    # 2.5 us per 36.8 KB: we and the client detect a flipped bit instead of reading it as data
    zstd.CompressionParameter.checksum_flag: 1,
}
# with the header and trailer of RFC 1952, whose time zlib leaves 0
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


def accepted(header: bytes | None) -> ContentCoding:
    """Choose the coding for a value of ``Accept-Encoding`` (RFC 9110, section 12.5.3).

    ``header`` is the value, several lines joined by commas, or None. The highest weight wins; at
    equal weight, the better compression. An absent, malformed or too long value gets plain bytes,
    and so does a client that accepts no coding of ours. Never raises. 0.2 us for a cached
    value, else about 10 us.
    """
    if header is None or len(header) > MAX_ACCEPT_BYTES:
        return ContentCoding.identity
    return _choose(header)


def encodable(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a response with these headers may be sent in other codings.

    False if the handler chose a coding, forbade others (``no-transform``: RFC 9111, section
    5.2.2.6) or identifies the bytes with a strong entity tag. ``headers`` must be all headers of
    the handler's response, not only those that are stored.
    """
    content_type = None
    for name, value in headers:
        match name.lower():
            case b"content-type":
                content_type = value
            case b"content-encoding":
                return False
            case b"cache-control" if b"no-transform" in value.lower():
                return False
            case b"etag" if not value.startswith(b"W/"):
                return False
    return compressible(content_type)


def negotiable(headers: Iterable[tuple[bytes, bytes]], *, length: int) -> bool:
    """Return whether a response is ``encodable`` and long enough to compress."""
    return length >= MIN_BYTES and encodable(headers)


def compressible(content_type: bytes | None) -> bool:
    """Return whether bodies of a media type are compressible text."""
    if content_type is None:
        return False
    kind = content_type.partition(b";")[0].strip().lower()
    return kind.startswith(b"text/") or kind in _COMPRESSIBLE or kind.endswith(_COMPRESSIBLE_ENDS)


def compress(body: bytes) -> bytes | None:
    """Return the body as one zstd frame with its size and a checksum, or None if that saves too
    little.

    About 1.5 us per KB. The window stays far below the 8 MiB that clients must support (RFC 9659).
    """
    if len(body) < MIN_BYTES:
        return None
    packed = zstd.compress(body, options=_OPTIONS)
    return packed if len(packed) <= len(body) * MAX_RATIO else None


def decompress(data: bytes, *, max_bytes: int) -> bytes | None:
    """Return the body of a frame made by ``compress``; None for anything that is not one whole
    frame of at most ``max_bytes``.

    The checksum detects damage; a frame without its size is not ours. Memory is bounded by
    ``max_bytes`` for any frame: the stated size is checked first, and limits libzstd's buffer and
    the output of a frame whose stated size is wrong.
    """
    try:
        size = zstd.get_frame_info(data).decompressed_size
        if size is None or size > max_bytes:
            return None
        frame = zstd.ZstdDecompressor()
        body = frame.decompress(data, max_length=size)
    except zstd.ZstdError:
        return None
    return body if frame.eof and not frame.unused_data else None


def gzip(body: bytes) -> bytes:
    """Return the body as gzip: always the same bytes, because the header contains no time. About
    4 us per KB."""
    return zlib.compress(body, GZIP_LEVEL, _GZIP_WINDOW)


def vary(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the headers with one ``Vary`` that also names ``Accept-Encoding``.

    Every response whose coding was negotiated needs it, plain ones too (RFC 9110, section 12.5.5).
    """
    given = tuple(headers)
    parts = b",".join(value for name, value in given if name.lower() == b"vary").split(b",")
    named = {part.strip().lower(): part.strip() for part in parts if part.strip()}
    if b"*" not in named:
        named.setdefault(b"accept-encoding", b"Accept-Encoding")
    return (
        *(pair for pair in given if pair[0].lower() != b"vary"),
        (b"vary", b", ".join(named.values())),
    )


def shared(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the headers that all codings of a response share: with ``Vary``, without a length."""
    return vary(pair for pair in headers if pair[0].lower() != b"content-length")


def negotiated(headers: Headers, *, coding: ContentCoding, length: int) -> Headers:
    """Return the headers of a response in one coding, with ``length`` bytes; ``headers`` are the
    ``shared`` ones."""
    if coding is ContentCoding.identity:
        return (*headers, (b"content-length", b"%d" % length))
    return (*headers, (b"content-encoding", coding.encode()), (b"content-length", b"%d" % length))


@lru_cache(MAX_ACCEPT_VALUES)
def _choose(header: bytes) -> ContentCoding:
    weights = _weights(header)
    if weights is None:
        return ContentCoding.identity
    others = weights.get(b"*", 0)
    # A coding that is not named has the weight of "*". Without "*", identity stays acceptable, but
    # after every named coding.
    best = max(ContentCoding, key=lambda coding: weights.get(coding.encode(), others))
    return best if weights.get(best.encode(), others) > 0 else ContentCoding.identity


def _weights(header: bytes) -> dict[bytes, int] | None:
    """Return the weights of the codings in thousandths, or None for a malformed value. If a coding
    is named twice, the lower weight counts."""
    weights: dict[bytes, int] = {}
    for part in header.split(b","):
        part = part.strip(b" \t")
        if not part:
            continue  # RFC 9110, section 5.6.1.2
        item = _ACCEPTED_ITEM.fullmatch(part)
        if item is None:
            return None
        name = item[1].lower()
        if name == b"x-gzip":
            name = b"gzip"  # RFC 9110, section 8.4.1.3
        weight = 1000 if item[2] is None else int(item[2].replace(b".", b"").ljust(4, b"0"))
        weights[name] = min(weight, weights.get(name, weight))
    return weights
