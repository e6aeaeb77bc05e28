"""What is published and read back: the same figures, and nothing of what is not understood."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from respcache.ops.stats import shapes
from respcache.ops.stats.shapes import ModuleStats, ProcessReport, RouteRow, RouteStats, TenantRow
from respcache.telemetry.stats import (
    BOUNDS_S,
    Counters,
    Histogram,
    RouteCounters,
    RouteTimes,
    Totals,
)

COUNTS = ("hits", "misses", "collapsed", "stores", "invalidations", "bytes_served", "bytes_stored")
numbers = st.integers(0, 2**40)
reasons = st.dictionaries(st.sampled_from(["off", "store", "denied"]), st.integers(1, 9))


@st.composite
def counters(draw: st.DrawFn) -> RouteCounters:
    """Make the live counters of a route, or of writes."""
    one = RouteCounters(
        draw(st.sampled_from(["books", "films"])),
        draw(st.sampled_from(["", "/a", "/b"])),
        RouteTimes(),
    )
    for name in COUNTS:
        setattr(one, name, draw(numbers))
    for reason, count in draw(reasons).items():
        one.bypass(reason, count)
    for reason, count in draw(reasons).items():
        one.refuse(reason, count)
    return one


@given(st.lists(counters(), max_size=6))
def test_the_figures_of_a_tenant_survive_the_wire_and_add_up(made: list[RouteCounters]) -> None:
    """As a whole, by module and by route."""
    expected = Totals()
    for one in made:
        expected.add(one)
    rows = shapes.decode(shapes.encode(shapes.route_rows(made)), list[RouteRow])
    row = shapes.decode(shapes.encode(shapes.tenant_row(shapes.route_rows(made))), TenantRow)
    assert shapes.totals_of(*row) == expected
    found = shapes.of_tenant("acme", rows, alone=False, problem="")
    assert found.totals == expected
    total = Totals()
    for module in found.modules:
        total.add(module.totals)
    assert total == expected
    for route in found.routes:
        routed = Totals()
        for one in made:
            if (one.route, one.module) == (route.route, route.module):
                routed.add(one)
        assert route.totals == routed
    assert all(route.route for route in found.routes)


@given(st.binary(max_size=60))
def test_what_is_none_of_ours_is_nothing(data: bytes) -> None:
    """Whatever bytes."""
    for kind in (ProcessReport, list[RouteRow], TenantRow):
        assert (
            shapes.decode(data, kind) is None or msgspec.msgpack.decode(data)[0] == shapes.VERSION
        )


@pytest.mark.parametrize("version", [0, shapes.VERSION + 1, "1", None])
def test_another_version_is_left_out(version: Any) -> None:
    """Even if it looks the same."""
    row = shapes.tenant_row([])
    assert shapes.decode(msgspec.msgpack.encode((shapes.VERSION, row)), TenantRow) is not None
    assert shapes.decode(msgspec.msgpack.encode((version, row)), TenantRow) is None


def test_the_version_belongs_to_the_bounds() -> None:
    """Buckets are published by position: others need another version, and this test another
    line."""
    assert (shapes.VERSION, len(BOUNDS_S), BOUNDS_S[6]) == (1, 18, 0.0025)


def test_a_point_of_the_series_says_rates_and_percentiles() -> None:
    """Fields that it does not know are left out."""
    times = RouteTimes(hits=Histogram(), misses=Histogram(), saved_s=1.5)
    for seconds in (0.0002, 0.0002, 0.0002, 0.03):
        times.hits.observe(seconds)
    fields = shapes.series_fields(
        Totals(hits=4, misses=2, bypasses={"off": 1, "store": 2}), times, Counters()
    )
    point = shapes.series_point(1_000, {**fields, "of another release": 7})
    assert (point.at, point.hits, point.misses, point.bypasses, point.saved_s) == (
        1_000,
        4,
        2,
        3,
        1.5,
    )
    assert point.hit_p50_s == pytest.approx(0.0002, abs=5e-5)
    assert point.hit_p95_s == pytest.approx(0.05, rel=0.5)
    assert (point.miss_p50_s, shapes.series_point(1_010, {}).hits) == (None, 0)


def test_routes_and_writes_of_processes_are_added_up_by_module() -> None:
    """Times with them; adding up changes nothing of what is added."""
    times = RouteTimes(fill_s=1.0)
    reports = [
        ProcessReport(None, [RouteStats("/a", "books", Totals(hits=2), times)], [], [])
        for _ in range(3)
    ]  # type: ignore[arg-type]
    routes = shapes.by_route(reports)
    modules = shapes.by_module(
        routes, [ModuleStats("books", Totals(invalidations=4)), ModuleStats("atlas", Totals())]
    )
    assert [(route.route, route.totals.hits) for route in routes] == [("/a", 6)]
    found = [(one.module, one.totals.hits, one.totals.invalidations) for one in modules]
    assert found == [
        ("atlas", 0, 0),
        ("books", 6, 4),
    ]
    assert modules[1].times is not None
    assert (modules[1].times.fill_s, modules[0].times, times.fill_s) == (3.0, None, 1.0)
