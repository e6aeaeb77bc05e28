"""What may be stored, and what browsers are told."""

import pytest

from respcache.core.http_caching import cache_status, for_browsers, kept, refusal

LENGTH = (b"content-length", b"10")


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (200, [LENGTH], None),
        (204, [], None),
        (404, [LENGTH], "status"),
        (500, [LENGTH], "status"),
        (301, [LENGTH], "status"),
        (200, [], "stream"),
        (200, [LENGTH, (b"Set-Cookie", b"a=b")], "set-cookie"),
        (200, [LENGTH, (b"Cache-Control", b"max-age=1, No-Store")], "cache-control"),
        (200, [LENGTH, (b"cache-control", b"private")], "cache-control"),
        (200, [LENGTH, (b"cache-control", b"private=set-cookie")], "cache-control"),
        (200, [LENGTH, (b"cache-control", b"public, max-age=60")], None),
        (200, [LENGTH, (b"vary", b"Accept-Language")], "vary"),
        (200, [LENGTH, (b"vary", b"*")], "vary"),
        (200, [LENGTH, (b"vary", b"X-View")], None),
        (200, [(b"content-length", b"1001")], "too-large"),
    ],
)
def test_only_complete_shareable_answers_are_stored(
    status: int, headers: list, reason: str | None
) -> None:
    """Errors, cookies, streams, private answers and those that vary beyond the key are refused by
    name."""
    assert refusal(status, headers, max_body_bytes=1000, key_headers={b"x-view"}) == reason


def test_chosen_headers_are_kept() -> None:
    """Type, length and pagination survive; hop-by-hop and unknown ones do not."""
    headers = [
        (b"Content-Type", b"a/b"),
        (b"X-Total-Count", b"7"),
        (b"Server", b"x"),
        (b"Date", b"now"),
    ]
    assert kept(headers) == ((b"content-type", b"a/b"), (b"x-total-count", b"7"))


def test_browsers_are_told_to_ask() -> None:
    """They cannot see invalidations; a refused answer keeps its own word."""
    assert for_browsers([(b"Cache-Control", b"max-age=9")], replace=True) == [
        (b"cache-control", b"private, no-cache")
    ]
    assert for_browsers([(b"Cache-Control", b"no-store")], replace=False) == [
        (b"Cache-Control", b"no-store")
    ]
    assert for_browsers([], replace=False) == [(b"cache-control", b"private, no-cache")]


def test_cache_status_is_a_structured_field() -> None:
    """RFC 9211: the cache's name, then parameters."""
    assert cache_status("fwd=uri-miss", "stored") == (
        b"cache-status",
        b"respcache; fwd=uri-miss; stored",
    )
