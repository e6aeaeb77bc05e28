"""The rules that decide whether an entry is valid."""

from hypothesis import given
from hypothesis import strategies as st

from respcache.core.generations import (
    FLOOR,
    MAX_TAGS_PER_BUMP,
    Certificate,
    GenerationView,
    Verdict,
    collapse,
    read_generation,
)

NONCE, OTHER = b"0123456789abcdef", b"fedcba9876543210"


def view(**changes: object) -> GenerationView:
    base: dict = {
        "server": "run1",
        "nonce": NONCE,
        "recorded": "run1",
        "sequence": 9,
        "bumps": {"T:accounts": 5},
    }
    return GenerationView(**{**base, **changes})


def test_an_entry_captured_at_or_after_the_last_bump_is_valid() -> None:
    """The capture at the bump's own sequence saw its commit."""
    assert view().judge(Certificate(NONCE, 5), ["T:accounts", FLOOR]) is Verdict.VALID
    assert view().judge(Certificate(NONCE, 9), ["T:accounts"]) is Verdict.VALID


def test_an_entry_captured_before_a_bump_of_one_of_its_tags_is_invalid() -> None:
    """One bumped tag is enough."""
    assert view().judge(Certificate(NONCE, 4), ["T:leads", "T:accounts"]) is Verdict.INVALIDATED


def test_a_bump_of_other_tags_leaves_an_entry_valid() -> None:
    """Tags that an entry does not depend on do not count."""
    assert view().judge(Certificate(NONCE, 0), ["T:leads"]) is Verdict.VALID


def test_without_a_generation_nothing_is_valid() -> None:
    """A missing hash is a miss, never 'not bumped'."""
    assert GenerationView("run1").judge(Certificate(NONCE, 99), []) is Verdict.NO_GENERATION
    assert GenerationView("run1").certificate() is None


def test_a_generation_of_another_server_life_makes_everything_invalid() -> None:
    """Restarts with old data and promoted replicas bring old generations back."""
    assert view(server="run2").judge(Certificate(NONCE, 99), []) is Verdict.OTHER_SERVER
    assert view(server="run2").certificate() is None


def test_an_entry_of_an_earlier_generation_life_is_invalid() -> None:
    """An evicted generation starts at 0 again, under another nonce."""
    assert view().judge(Certificate(OTHER, 99), []) is Verdict.OTHER_GENERATION


def test_a_hash_without_its_head_counts_as_missing() -> None:
    """A stray field written by somebody else is not a generation."""
    assert read_generation([None, b"run1", b"3", b"1"], ["*"], server="run1").nonce is None
    assert read_generation(
        [NONCE, b"run1", b"3", None, b"2"], ["*", "T:a"], server="run1"
    ).bumps == {"T:a": 2}


def test_too_many_tags_become_the_floor() -> None:
    """A bump is bounded, whatever a transaction touched."""
    assert collapse(f"T:{i}" for i in range(MAX_TAGS_PER_BUMP + 1)) == (FLOOR,)
    assert collapse(["T:b", "T:a", "T:b"]) == ("T:a", "T:b")
    assert collapse(["T:a", FLOOR]) == (FLOOR,)


@given(
    bumps=st.dictionaries(st.sampled_from(["*", "T:a", "T:b", "M:m"]), st.integers(1, 20)),
    captured=st.integers(0, 20),
    tags=st.sets(st.sampled_from(["*", "T:a", "T:b", "M:m"])),
)
def test_validity_is_exactly_no_bump_after_the_capture(
    bumps: dict[str, int], captured: int, tags: set[str]
) -> None:
    """The verdict is the definition, for every state."""
    verdict = view(bumps=bumps, sequence=20).judge(Certificate(NONCE, captured), tags)
    assert (verdict is Verdict.VALID) == all(bumps.get(tag, 0) <= captured for tag in tags)
