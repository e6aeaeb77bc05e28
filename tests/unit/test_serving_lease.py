"""The fence's decisions."""

import pytest

from respcache.core.epochs import Cursor, Epoch
from respcache.core.generations import FLOOR, RING_ROWS
from respcache.core.keys import EVERYBODY
from respcache.core.serving_lease import (
    MAX_ROWS,
    OutboxPage,
    RelayStep,
    ServingLease,
    by_tenant,
    next_step,
    outdated,
)

CURSOR = Cursor("100:105:101", 1.0)
EPOCH = Epoch("e" * 16, "d" * 40, "life", CURSOR)


def page(**given: object) -> OutboxPage:
    values = {"cursor": Cursor("102:107:", 2.0), "incarnation": "life", **given}
    return OutboxPage(**values)  # type: ignore[arg-type]


def test_a_fence_allows_its_own_server_until_its_moment() -> None:
    """The moment itself is too late, and what another server said is not vouched for."""
    lease = ServingLease("e:x", 10.0)
    assert lease.allows("e:x", 9.999)
    assert not lease.allows("e:x", 10.0)
    assert not lease.allows("f:x", 9.0)
    assert not ServingLease().allows("", 0.0)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        ({"pruned": 100}, None),
        ({"pruned": 101}, "pruned"),
        ({"incarnation": "other"}, "have changed"),
        ({"cursor": Cursor("99:107:", 2.0)}, "back in time"),
        ({"rows": [("a", "T:x", str(n)) for n in range(MAX_ROWS)]}, None),
        ({"rows": [("a", "T:x", str(n)) for n in range(MAX_ROWS + 1)]}, "replayed"),
        ({"rows": [("a", "T:x", "1"), (EVERYBODY, "T:x", "2")]}, "emptied"),
    ],
)
def test_an_epoch_ends_when_rows_may_have_been_missed(
    given: dict[str, object], reason: str | None
) -> None:
    """And only then: a new one makes everything cold."""
    found = outdated(EPOCH, CURSOR, page(**given))
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ({}, RelayStep.CLAIM),
        ({"authority": "other", "effective": True, "recorded": True}, RelayStep.CLAIM),
        ({"authority": EPOCH.identity, "recorded": True}, RelayStep.WAIT),
        ({"authority": EPOCH.identity, "effective": True}, RelayStep.RECORD),
        ({"authority": EPOCH.identity, "effective": True, "recorded": True}, RelayStep.GRANT),
    ],
)
def test_a_fence_is_granted_by_the_effective_authority_with_its_end_recorded(
    given: dict[str, object], step: RelayStep
) -> None:
    """Everything else has to be mended first, or awaited."""
    assert next_step(page(**given), EPOCH.identity) is step


def test_rows_are_sorted_by_tenant_with_ids_as_far_as_the_ring_reaches() -> None:
    """Tags once each; with more ids than a generation remembers, none: then the bump is
    unconditional."""
    rows = [("a", "T:x", "1"), ("b", "T:x", "2"), ("a", "T:y", "3"), ("a", "T:x", "4")]
    due = by_tenant(rows)
    assert due["a"].tags == ("T:x", "T:y")
    assert due["a"].rows == ("1", "3", "4")
    assert due["b"].rows == ("2",)
    many = by_tenant([("a", "T:x", str(n)) for n in range(RING_ROWS + 1)])
    assert (many["a"].tags, many["a"].rows) == (("T:x",), ())


def test_more_tags_than_a_bump_takes_become_the_floor() -> None:
    """One tag that everything depends on."""
    assert by_tenant([("a", f"T:{n}", str(n)) for n in range(65)])["a"].tags == (FLOOR,)
