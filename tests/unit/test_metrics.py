"""The metrics: their names, and what is said of tenants."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from respcache.ops.stats import metrics
from respcache.ops.stats.metrics import largest
from respcache.ops.stats.shapes import ProcessReport, RouteStats
from respcache.telemetry.stats import OTHER, RouteTimes, Totals

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(respcache_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)


# -- names -----------------------------------------------------------------------------------------


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    """docs/metrics.md: name, kind, labels and meaning of each, in this order, and none besides."""
    listed = [
        tuple(cell.strip() for cell in row)
        for row in ROW.findall((ROOT / "docs" / "metrics.md").read_text())
    ]
    assert listed == [
        (
            one.full_name,
            one.kind,
            ", ".join(f"`{label}`" for label in one.labels),
            one.help.rstrip("."),
        )
        for one in metrics.ALL
    ]


def test_reasons_come_in_the_order_of_their_names() -> None:
    """Whichever came first."""
    route = RouteStats("/a", "books", Totals(bypasses={"store": 1, "off": 2}), RouteTimes())
    report = ProcessReport(None, [route], [], [])  # type: ignore[arg-type]
    (bypasses,) = [one for one in metrics.OF_WORKERS if one.name == "bypasses"]
    assert list(bypasses.read(report)) == [
        (("books", "/a", "off"), 2),
        (("books", "/a", "store"), 1),
    ]
    assert list(route.totals.to_dict()["bypasses"]) == ["off", "store"]


def test_names_keep_the_conventions() -> None:
    """Snake case, unit before the end, ``_total`` on counters alone, and no name twice."""
    names = [one.full_name for one in metrics.ALL]
    assert len(set(names)) == len(names)
    for one in metrics.ALL:
        assert re.fullmatch(r"respcache(_[a-z]+)+", one.full_name)
        assert one.full_name.endswith("_total") == (one.kind == "counter")
        assert one.unit in one.full_name
        assert set(one.labels) <= {
            "module",
            "route",
            "reason",
            "outcome",
            "event",
            "tenant",
            "host",
            "pid",
            "version",
            "python",
            "name",
            "role",
            "maxmemory_policy",
        }


# -- the largest tenants ---------------------------------------------------------------------------


@given(
    st.lists(st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 5)), max_size=20),
    st.integers(0, 4),
)
def test_the_rest_of_the_tenants_never_goes_down(steps: list[dict[str, int]], k: int) -> None:
    """However tenants overtake each other: a counter that went down would count as one that began
    anew."""
    counters: dict[str, float] = dict.fromkeys("abcdefg", 0)
    before = 0.0
    for step in steps:
        for tenant, more in step.items():
            counters[tenant] += more
        found = dict(largest(counters, k))
        rest = found.pop(("other",))
        assert rest >= before
        assert len(found) == min(k, sum(counter > 0 for counter in counters.values()))
        assert sorted(found.values()) == sorted(counters.values())[len(counters) - len(found) :]
        assert sum(found.values()) + rest == sum(counters.values())
        before = rest


def test_tenants_without_a_name_of_their_own_are_of_the_rest() -> None:
    """Those beyond the bound, and one that is called like the rest, are never among the largest."""
    assert dict(largest({OTHER: 100, "other": 50, "acme": 2, "idle": 0}, 3)) == {
        ("acme",): 2,
        ("other",): 150,
    }
