"""The rule that decides whether a read was stale, and the steps that it is computed from."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respcache.testing.staleness import Minimum, RegisterHistory, Steps, ViolationKind

FRESHNESS, SESSION, BOUND = ViolationKind.FRESHNESS, ViolationKind.SESSION, ViolationKind.BOUND


@pytest.mark.parametrize(
    ("returned", "violated"),
    [(3, ()), (2, (FRESHNESS,)), (1, (FRESHNESS, SESSION)), (0, (FRESHNESS, SESSION, BOUND))],
)
def test_a_read_violates_each_rule_whose_minimum_it_misses(
    returned: int, violated: tuple[ViolationKind, ...]
) -> None:
    """The strictest rule comes first."""
    assert Minimum(acknowledged=3, session=2, committed=1).violated_by(returned) == violated


def test_a_loss_lowers_the_minimum() -> None:
    """What the database has lost need not be returned."""
    assert Minimum(3, 2, 1).limited(2) == Minimum(2, 2, 1)


def test_acknowledgements_count_strictly_before_the_start_and_commits_up_to_the_bound() -> None:
    """Two moments with the same clock reading may be in either order."""
    history = RegisterHistory()
    history.add(1, committed=1.0, acknowledged=2.0)
    history.add(2, committed=3.0, acknowledged=inf)
    history.settle()
    assert history.minimum(2.0, slack_s=0, bound_s=9) == Minimum()
    assert history.minimum(2.5, slack_s=0, bound_s=9) == Minimum(acknowledged=1)
    assert history.minimum(2.5, slack_s=0.5, bound_s=9) == Minimum()
    assert history.minimum(5.0, slack_s=1, bound_s=1, session=1) == Minimum(1, 1, 2)


STEPS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=200)


@given(STEPS, st.integers(-1, 10), st.integers(0, 9))
def test_steps_return_the_highest_version_so_far(
    steps: list[tuple[int, int]], time: int, limit: int
) -> None:
    """In any order of additions, and after a loss."""
    found = Steps()
    for at, version in steps:
        found.add(at, version)
    found.settle()
    assert found.before(time)[1] == max((one for at, one in steps if at < time), default=0)
    assert found.until(time) == max((one for at, one in steps if at <= time), default=0)
    found.limit(limit)
    highest = max((one for at, one in steps if at <= time), default=0)
    assert found.until(time) == min(highest, limit)
