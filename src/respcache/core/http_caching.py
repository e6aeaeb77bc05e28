"""The rules of HTTP for storing responses and for reporting it: RFC 9110, RFC 9111 and RFC 9211."""

import re
from collections.abc import Collection, Iterable
from functools import lru_cache

from respcache.core.encoding import Headers

CACHE_NAME = b"respcache"
BROWSER_CACHE_CONTROL = b"private, no-cache"
"""The directives for browsers: they cannot see our invalidations, so they must revalidate."""

BROWSERS = (b"cache-control", BROWSER_CACHE_CONTROL)
AS_IT_IS = (b"cache-control", BROWSER_CACHE_CONTROL + b", no-transform")
"""The same for a response that intermediaries must not change (RFC 9111, section 5.2.2.6)."""

_UNFIT = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""Bytes that a header must not contain (RFC 9110, section 5.5). A server would refuse them, but
only after we have stored the response."""

STORABLE_STATUS = frozenset({200, 203, 204})
KEPT_HEADERS = frozenset(
    {
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"content-language",
        b"content-disposition",
        b"etag",
        b"last-modified",
        b"link",
        b"vary",
        b"x-total-count",
    }
)
"""Headers that are stored with the body and sent with a hit."""


def refusal(
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    max_body_bytes: int,
    key_headers: Collection[bytes],
) -> str | None:
    """Return why a response with this status and these headers must not be stored, or None. The
    words are the counters' names.

    ``key_headers`` are the request headers (lower case) that are part of the key. RFC 9111,
    sections 3 and 4.1.
    """
    if status not in STORABLE_STATUS:
        return "status"
    length: int | None = 0 if status == 204 else None
    for name, value in headers:
        if _UNFIT.search(name) or _UNFIT.search(value):
            return "header"
        name = name.lower()
        if name == b"set-cookie":
            return "set-cookie"
        if name == b"cache-control" and _directives(value) & {b"no-store", b"private"}:
            return "cache-control"
        if name == b"vary" and not all(part in key_headers for part in _directives(value)):
            return "vary"
        if name == b"content-length" and value.isdigit():
            length = int(value)
    if length is None:
        return "stream"
    return "too-large" if length > max_body_bytes else None


def kept(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the headers to store; of ``Cache-Control``, only ``no-transform`` is kept."""
    given = list(headers)
    picked = tuple((name.lower(), value) for name, value in given if name.lower() in KEPT_HEADERS)
    return (*picked, AS_IT_IS) if _says_no_transform(given) else picked


def cache_status(*parts: str) -> tuple[bytes, bytes]:
    """Build the ``Cache-Status`` header (RFC 9211, section 2) from its parameters, such as ``hit``
    or ``fwd=uri-miss``."""
    return b"cache-status", b"; ".join([CACHE_NAME, *(part.encode("ascii") for part in parts)])


def of_a_hit(headers: Headers, *, ttl_s: int) -> list[tuple[bytes, bytes]]:
    """Return the headers of a response from the cache; ``headers`` are stored ones, so a
    ``Cache-Control`` among them is ours."""
    return (
        [*headers, _hit_with(ttl_s)]
        if AS_IT_IS in headers
        else [*headers, _hit_with(ttl_s), BROWSERS]
    )


@lru_cache(4096)
def _hit_with(ttl_s: int) -> tuple[bytes, bytes]:
    """Build the ``Cache-Status`` of a hit. Cached, so that entries share one object, which stays in
    the processor's cache."""
    return b"cache-status", b"%s; hit; ttl=%d" % (CACHE_NAME, ttl_s)


def for_browsers(
    headers: Iterable[tuple[bytes, bytes]], *, replace: bool
) -> list[tuple[bytes, bytes]]:
    """Return the headers with our ``Cache-Control``: always if ``replace``, else only if the
    handler set none."""
    given = list(headers)
    if not replace and any(name.lower() == b"cache-control" for name, _ in given):
        return given
    others = ((name, value) for name, value in given if name.lower() != b"cache-control")
    return [*others, AS_IT_IS if _says_no_transform(given) else BROWSERS]


def _says_no_transform(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(
        name.lower() == b"cache-control" and b"no-transform" in _directives(value)
        for name, value in headers
    )


def _directives(value: bytes) -> set[bytes]:
    """Split a comma-separated header value into lower-case names, without their arguments."""
    return {part.partition(b"=")[0].strip().lower() for part in value.split(b",") if part.strip()}
