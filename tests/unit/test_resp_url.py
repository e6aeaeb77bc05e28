"""Addresses of servers: what is read from a URL, what is refused, and that no password shows."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respcache.core.errors import ConfigurationError
from respcache.resp.url import ServerURL

SECRET = "s3cr3t"


def test_all_parts_are_read() -> None:
    """User, password, host, port and database come from their places."""
    assert ServerURL.parse("redis://ann:pw@cache.example:7000/3") == ServerURL("cache.example", 7000, 3, "ann", "pw")


def test_what_is_left_out_has_the_usual_values() -> None:
    """Port 6379, database 0, nobody logs in."""
    assert ServerURL.parse("redis://cache") == ServerURL("cache", 6379, 0, None, None)
    assert ServerURL.parse("redis://:pw@cache/") == ServerURL("cache", 6379, 0, None, "pw")


def test_an_ipv6_address_stands_in_brackets() -> None:
    """The brackets belong to the URL, not to the address."""
    assert ServerURL.parse("redis://[::1]:6380/1") == ServerURL("::1", 6380, 1)


@given(st.text(min_size=1).filter(lambda text: text.isprintable()), st.text(min_size=1).filter(lambda text: text.isprintable()))
def test_user_and_password_are_percent_decoded(user: str, password: str) -> None:
    """Any character can be in a password when it is encoded."""
    url = ServerURL.parse(f"redis://{quote(user, safe='')}:{quote(password, safe='')}@h")
    assert (url.user, url.password) == (user, password)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://h",
        "redis://",
        "redis://h:x",
        "redis://h:99999",
        "redis://h/x",
        "redis://h/-1",
        "redis://h/1/2",
        "redis://h/²",
        "redis://[::1",
        "redis://ann@h",
        f"redis://h/0?password={SECRET}",
        f"redis://:{SECRET}@h:x/0",
        f"redis://:{SECRET}/x@h:6379/0",
        f"redis://:{SECRET}#x@h:6379/0",
        f"redis://:{SECRET}?x@h:6379/0",
        f"redis://:{SECRET}@x@h:y/0",
        f"{SECRET}@h",
    ],
)
def test_anything_else_is_a_configuration_error_that_shows_no_password(url: str) -> None:
    """The message names the fix; a password with unencoded characters does not leak by being read as something else."""
    with pytest.raises(ConfigurationError, match=r"must have the form|cannot be read|without a password") as error:
        ServerURL.parse(url)
    assert SECRET not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize("scheme", ["rediss", "unix"])
def test_tls_and_unix_sockets_are_refused_by_name(scheme: str) -> None:
    """They are not silently spoken to in plain TCP."""
    with pytest.raises(ConfigurationError, match="not supported yet") as error:
        ServerURL.parse(f"{scheme}://:{SECRET}@h/0")
    assert SECRET not in str(error.value)


def test_neither_repr_nor_str_shows_the_password() -> None:
    """Both end up in logs."""
    url = ServerURL.parse(f"redis://ann:{SECRET}@h:1/0")
    assert SECRET not in repr(url)
    assert str(url) == "h:1/0"
