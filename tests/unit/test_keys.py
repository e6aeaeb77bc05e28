"""Keys and digests: what separates one response from another."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from respcache.core import keys
from respcache.core.errors import ConfigurationError

SECRET = b"s" * 32


def digest(secret: bytes = SECRET, schema: str = "1", **changes: object) -> bytes:
    parts: dict = {
        "tenant": "abc",
        "route": "/a",
        "tables": ("a",),
        "fingerprint": b"f",
        "parameters": (("query", "q", "x"),),
    }
    return keys.Digester(secret, schema_version=schema).digest(**{**parts, **changes})


def test_keys_have_the_documented_shape() -> None:
    """SCAN and KEYS tooling written for this pattern keeps working."""
    name = digest()
    assert (
        keys.entry_key("abc-123", "accounts", "list", digest=name)
        == f"tenant:abc-123:accounts:list:{name.hex()}"
    )
    assert len(name) == 16
    assert keys.generation_key("abc-123") == "tenant:abc-123:~gen"
    assert keys.lock_key("abc-123", "accounts", "list", digest=name).startswith(
        "tenant:abc-123:~fill:accounts:list:"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "abd"},
        {"route": "/b"},
        {"tables": ("a", "b")},
        {"fingerprint": b"g"},
        {"parameters": (("query", "q", "y"),)},
        {"parameters": (("path", "q", "x"),)},
        {"parameters": ()},
        {"secret": b"t" * 32},
        {"schema": "2"},
    ],
)
def test_every_part_of_a_request_changes_its_digest(change: dict) -> None:
    """Leaving one part out would serve one request's answer to another."""
    assert digest(**change) != digest()


pairs = st.lists(st.tuples(st.text(), st.text()), max_size=4)


@given(pairs, pairs)
@example([("ab", "")], [("a", "b")])
@example([("a", "b"), ("c", "d")], [("a", "bquerycd")])
def test_no_two_parameter_lists_share_a_digest(one: list, other: list) -> None:
    """Separators inside names and values cannot make two requests alike."""
    as_triples = [tuple(("query", name, value) for name, value in pairs) for pairs in (one, other)]
    assert (digest(parameters=as_triples[0]) == digest(parameters=as_triples[1])) == (one == other)


@pytest.mark.parametrize("tenant", ["", "a:b", "a*", "a b", "~gen", "a\n", "x" * 129, "ä"])
def test_tenant_ids_that_could_break_out_of_a_key_are_refused(tenant: str) -> None:
    """Globs, colons and blanks never reach a key."""
    with pytest.raises(ValueError, match="tenant id"):
        keys.check_tenant(tenant)


def test_a_short_secret_is_refused_and_never_shown() -> None:
    """The message says what to do; the secret stays out of it and out of repr."""
    with pytest.raises(ConfigurationError, match="RESPCACHE_KEY") as error:
        keys.Digester(b"hunter2", schema_version="1")
    assert "hunter2" not in str(error.value)
    assert "s" * 32 not in repr(keys.Digester(SECRET, schema_version="1"))
