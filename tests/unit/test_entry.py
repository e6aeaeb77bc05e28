"""The bytes of a stored response."""

from hypothesis import given
from hypothesis import strategies as st

from respcache.core.entry import Entry, decode, encode
from respcache.core.generations import Certificate

entries = st.builds(
    Entry,
    certificate=st.builds(
        Certificate, nonce=st.binary(min_size=16, max_size=16), sequence=st.integers(0, 2**64 - 1)
    ),
    digest=st.binary(min_size=16, max_size=16),
    stored_at_ms=st.integers(0, 2**60),
    ttl_ms=st.integers(0, 2**32 - 1),
    fill_ms=st.integers(0, 2**32 - 1),
    status=st.integers(100, 599),
    headers=st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=40)), max_size=5).map(
        tuple
    ),
    body=st.binary(max_size=200),
)


@given(entries)
def test_an_entry_comes_back_as_it_was_stored(entry: Entry) -> None:
    """Status, headers and body survive, byte for byte."""
    assert decode(encode(entry)) == entry


@given(entries, st.integers(0, 400))
def test_a_truncated_entry_never_raises(entry: Entry, length: int) -> None:
    """Whatever stands under a key, reading it gives an entry or None."""
    cut = decode(encode(entry)[:length])
    assert cut is None or cut.headers == entry.headers


@given(st.binary(max_size=300))
def test_foreign_bytes_are_no_entry(data: bytes) -> None:
    """Only our own format and version is read."""
    assert decode(data) is None
    assert decode(b"RCE\x02" + data) is None
