"""Addresses of servers: what is read from a URL, what is refused, and that no password shows."""

import ssl
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respcache.core.errors import ConfigurationError
from respcache.resp.url import ServerURL

SECRET = "s3cr3t"


def test_all_parts_are_read() -> None:
    """User, password, host, port and database come from their places."""
    assert ServerURL.parse("redis://ann:pw@cache.example:7000/3") == ServerURL(
        "cache.example", 7000, 3, "ann", "pw"
    )


def test_what_is_left_out_has_the_usual_values() -> None:
    """Port 6379, database 0, nobody logs in."""
    assert ServerURL.parse("redis://cache") == ServerURL("cache", 6379, 0, None, None)
    assert ServerURL.parse("redis://:pw@cache/") == ServerURL("cache", 6379, 0, None, "pw")


def test_an_ipv6_address_stands_in_brackets() -> None:
    """The brackets belong to the URL, not to the address."""
    assert ServerURL.parse("redis://[::1]:6380/1") == ServerURL("::1", 6380, 1)


@given(
    st.text(min_size=1).filter(lambda text: text.isprintable()),
    st.text(min_size=1).filter(lambda text: text.isprintable()),
)
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
    """The message names the fix; a password with unencoded characters does not leak by being read
    as something else."""
    with pytest.raises(
        ConfigurationError, match=r"must have the form|cannot be read|without a password"
    ) as error:
        ServerURL.parse(url)
    assert SECRET not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "names"),
    [
        (f"redis://h/0?password={SECRET}", "password"),
        ("redis://h?ssl_ca_certs=x", "ssl_ca_certs"),
        ("redis://h?db=3", "db"),
        (
            "rediss://h?ssl_verify=no&socket_timeout=3&ssl_cert_reqs=none",
            "socket_timeout, ssl_verify",
        ),
        ("rediss://h?db=3", "db"),
        (f"unix:///s?db=1&password={SECRET}", "password"),
    ],
)
def test_unknown_query_parameters_are_refused_by_name(url: str, names: str) -> None:
    """An option that is not understood is never silently left out, and its value not shown."""
    with pytest.raises(ConfigurationError, match=rf"unknown query parameters: {names} \(") as error:
        ServerURL.parse(url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        f"rediss://:a?{SECRET}=1@h:6379/0",
        f"rediss://ann:1234?{SECRET}=1@h:6379/0",  # a host named ann, with a port, as it seems
        f"redis://ann:1234#{SECRET}@h",
        f"unix://:a?{SECRET}@/s",
        f"redis://:a?{SECRET}=1",
    ],
)
def test_half_a_password_is_not_taken_for_the_name_of_a_parameter(url: str) -> None:
    """What stands behind an unencoded '?' is not repeated."""
    with pytest.raises(ConfigurationError, match=r"must have the form|cannot be read") as error:
        ServerURL.parse(url)
    assert SECRET not in str(error.value)


def test_a_unix_socket_has_a_path_and_a_database() -> None:
    """User and password stand where they stand in the other forms; the path is percent-decoded."""
    url = ServerURL.parse("unix://ann:pw@/run/my%20cache.sock?db=3")
    assert (url.path, url.database, url.user, url.password) == (
        "/run/my cache.sock",
        3,
        "ann",
        "pw",
    )
    assert (ServerURL.parse("unix:///s").database, str(url)) == (0, "unix:/run/my cache.sock?db=3")


@pytest.mark.parametrize(
    "url",
    ["unix://", "unix:///", "unix://host/s", "unix:///s?db=x", "unix:///s?db=-1", "unix:///a%00b"],
)
def test_a_unix_socket_without_a_usable_path_or_database_is_refused(url: str) -> None:
    """The message shows the form."""
    with pytest.raises(ConfigurationError, match=r"must have the form unix://\[user\]"):
        ServerURL.parse(url)


def test_tls_verifies_certificate_and_name_unless_told_otherwise() -> None:
    """``ssl_cert_reqs=none`` gives up both; ``redis://`` has no TLS."""
    strict, same = (
        ServerURL.parse("rediss://h:1/2").tls,
        ServerURL.parse("rediss://h?ssl_cert_reqs=required").tls,
    )
    blind = ServerURL.parse("rediss://h?ssl_cert_reqs=none").tls
    assert strict is not None
    assert same is not None
    assert blind is not None
    assert (
        (strict.verify_mode, strict.check_hostname)
        == (same.verify_mode, same.check_hostname)
        == (ssl.CERT_REQUIRED, True)
    )
    assert (blind.verify_mode, blind.check_hostname) == (ssl.CERT_NONE, False)
    assert ServerURL.parse("redis://h").tls is None
    assert str(ServerURL.parse("rediss://h:1/2")) == "h:1/2 over TLS"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("ssl_cert_reqs=optional", "must be 'none' or 'required'"),
        ("ssl_cert_reqs=", "one value"),
        ("ssl_cert_reqs=required&ssl_cert_reqs=none", "one value"),
        ("ssl_keyfile=k", "without ssl_certfile"),
        (
            "ssl_ca_certs=/no/such.pem",
            r"cannot be read \(ssl_ca_certs=/no/such.pem\): .*No such file",
        ),
        ("ssl_ca_certs=a%00b", "cannot be read"),
        (f"ssl_certfile={__file__}", "cannot be read"),
    ],
)
def test_tls_that_cannot_be_set_up_is_refused_at_once(query: str, message: str) -> None:
    """At start-up, not at the first connection: the files are read when the URL is."""
    with pytest.raises(ConfigurationError, match=message) as error:
        ServerURL.parse(f"rediss://:{SECRET}@h?{query}")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://ann:{}@h:1/0", "h:1/0"),
        ("rediss://ann:{}@h:1/0", "h:1/0 over TLS"),
        ("unix://:{}@/s", "unix:/s?db=0"),
    ],
)
def test_neither_repr_nor_str_shows_the_password(address: str, shown: str) -> None:
    """Both end up in logs."""
    url = ServerURL.parse(address.format(SECRET))
    assert SECRET not in repr(url)
    assert str(url) == shown
