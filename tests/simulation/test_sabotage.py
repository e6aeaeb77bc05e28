"""Each rule of the protocol, broken once, is noticed by the simulator: what it does not notice, it
does not test.

``pytest -s`` prints which invariant noticed what, and after how many schedules.
"""

from collections.abc import Iterator

import pytest

from tests.simulation.sabotage import SABOTAGES
from tests.simulation.schedule import run

QUICK = {
    "acknowledge without checking the serving lease",
    "another life of the database is not detected",
    "a consistency token is ignored",
    "the serving lease begins at the end of the cycle",
}
"""Those that are noticed within a second or two: the others are for ``make test-long``."""
MOST_SCHEDULES = 3000
"""Within which a sabotage must be noticed; the rarest took some hundreds."""


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Lines of the table that is printed in the end."""
    lines: list[str] = []
    yield lines
    print(
        "\n| rule that is broken | noticed by | after schedules |\n|---|---|---|", *lines, sep="\n"
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in SABOTAGES],
)
def test_a_broken_rule_is_noticed(name: str, table: list[str]) -> None:
    """Some schedule violates an invariant."""
    sabotage = SABOTAGES[name]
    with sabotage.done():
        for seed in range(MOST_SCHEDULES):
            violations = run(seed, sabotage.mix).violations
            if violations:
                table.append(f"| {name} | {violations[0].rule} | {seed + 1} |")
                return
    pytest.fail(f"nobody noticed: {name}")


def test_some_of_them_are_tried_by_every_make_test() -> None:
    """The names above exist."""
    assert SABOTAGES.keys() > QUICK
