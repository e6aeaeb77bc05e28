"""The one canonical form of a request."""

from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respcache.core.errors import ConfigurationError
from respcache.core.identity import RequestHead
from respcache.core.policy import Canonical, Parameter, Policy, canonical, in_order

LIMIT, QUERY, TAGS = (
    Parameter("limit", default="50"),
    Parameter("q"),
    Parameter("tag", repeated=True),
)
DECLARED = in_order([QUERY, LIMIT, TAGS])


def form(
    query: str, headers: list[tuple[bytes, bytes]] | None = None, declared: tuple = DECLARED
) -> Canonical:
    head = RequestHead({"query_string": query.encode("latin-1"), "headers": headers or []})
    return canonical(head, {}, declared=declared, passed=("tenant_id",))


def test_order_and_spelling_of_parameters_do_not_matter() -> None:
    """One request, one key."""
    assert form("q=a%20b&limit=10") == form("limit=10&q=a+b")


def test_undeclared_parameters_neither_split_the_key_nor_reach_the_handler() -> None:
    """Cache busters and unknown names are gone."""
    assert form("q=x&_t=123&utm_source=mail") == form("q=x")
    assert form("q=x&_t=123").query_string == b"q=x"


def test_a_default_given_is_a_default_left_out() -> None:
    """``limit=50`` is what the handler assumes anyway."""
    assert form("limit=50") == form("")
    assert form("limit=51") != form("")


def test_the_last_of_a_scalar_counts_and_all_of_a_list_in_order() -> None:
    """As the framework reads them; the handler gets exactly these."""
    assert form("q=a&q=b") == form("q=b")
    assert form("tag=a&tag=b") != form("tag=b&tag=a")
    assert form("tag=a&tag=b").query_string == b"tag=a&tag=b"


def test_what_the_resolver_consumes_reaches_the_handler_but_not_the_key() -> None:
    """A slug and a UUID of the same tenant share entries."""
    by_slug, by_id = form("tenant_id=acme&q=x"), form("tenant_id=0b6e&q=x")
    assert by_slug.parameters == by_id.parameters
    assert by_slug.query_string == b"q=x&tenant_id=acme"


def test_an_empty_value_is_not_an_absent_one() -> None:
    """The framework tells them apart, so the key does."""
    assert form("q=") != form("")


def test_declared_headers_and_cookies_are_part_of_the_key_with_all_their_values() -> None:
    """They reach the handler as they came, so each of them may decide."""
    declared = (Parameter("lang", "cookie"), Parameter("x-view", "header"))
    one = form("", [(b"x-view", b"a"), (b"cookie", b"lang=de; other=1")], declared)
    assert one.parameters == (("cookie", "lang", "de"), ("header", "x-view", "a"))
    assert (
        form("", [(b"x-view", b"a"), (b"x-view", b"b"), (b"cookie", b"lang=de")], declared) != one
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(["q", "limit", "tag", "_t", "tenant_id"]), st.text(max_size=8)),
        max_size=6,
    )
)
def test_the_canonical_form_is_a_fixed_point(pairs: list[tuple[str, str]]) -> None:
    """Handling the canonical request again changes nothing, whatever was sent."""
    once = form(urlencode(pairs, errors="replace"))
    assert form(once.query_string.decode()) == once


@given(st.lists(st.tuples(st.sampled_from(["q", "limit"]), st.text(max_size=4)), max_size=5))
def test_requests_with_one_key_give_the_handler_one_view(pairs: list[tuple[str, str]]) -> None:
    """The key's values and the handler's query string say the same."""
    made = form(urlencode(pairs, errors="replace"))
    assert parse_qsl(made.query_string.decode(), keep_blank_values=True) == [
        (n, v) for _, n, v in made.parameters
    ]


@pytest.mark.parametrize(
    ("kind", "ttl"),
    [("lists", 180), ("list", 0), ("list", -1), ("list", 1e9), ("list", float("nan"))],
)
def test_a_policy_that_makes_no_sense_is_refused(kind: str, ttl: float) -> None:
    """At import of the routes, with the value in the message."""
    with pytest.raises(ConfigurationError):
        Policy("accounts", kind, ttl)
