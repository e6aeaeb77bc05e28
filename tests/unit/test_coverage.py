"""Which tables leave rows, and which may still be believed to."""

import pytest

from respcache.core.epochs import Cursor
from respcache.core.serving_lease import OutboxPage
from respcache.writes.coverage import TableCoverage

LEASE_S = 2.0


def page(*tables: str, unsound: tuple[str, ...] = ()) -> OutboxPage:
    cursor = Cursor("1:1:", 0.0)
    return OutboxPage(cursor, "i", tables=frozenset(tables), unsound=frozenset(unsound))


def test_before_the_first_page_any_table_may_be_cached() -> None:
    """Other processes may know more."""
    coverage = TableCoverage()
    assert coverage.deferred
    assert coverage.may_be_cached("accounts", now=0.0, lease_s=LEASE_S)
    assert coverage.anything_may_be_cached(now=0.0, lease_s=LEASE_S)


def test_a_table_may_be_cached_for_a_lease_after_it_lost_its_coverage() -> None:
    """Then every process has learnt of it, or has no serving lease."""
    coverage = TableCoverage()
    coverage.update(page("accounts"), now=0.0, lease_s=LEASE_S)
    assert coverage.covers(["accounts"])
    assert not coverage.covers(["accounts", "leads"])
    coverage.update(page(), now=10.0, lease_s=LEASE_S)
    for now, expected in ((11.0, True), (12.0, False)):
        assert coverage.may_be_cached("accounts", now=now, lease_s=LEASE_S) is expected
        assert coverage.anything_may_be_cached(now=now, lease_s=LEASE_S) is expected
    assert not coverage.may_be_cached("leads", now=11.0, lease_s=LEASE_S)


def test_a_missing_outbox_ends_all_coverage_and_is_dated() -> None:
    """From the first time that it was missing."""
    coverage = TableCoverage()
    coverage.update(page("accounts"), now=0.0, lease_s=LEASE_S)
    for now in (1.0, 2.0):
        coverage.lose(now=now, lease_s=LEASE_S)
    assert (coverage.tables, coverage.missing_since) == (frozenset(), 1.0)
    coverage.update(page("accounts"), now=3.0, lease_s=LEASE_S)
    assert coverage.missing_since is None


def test_unsound_tables_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """And again when there are more."""
    coverage = TableCoverage()
    for unsound in (("a",), ("a",), ("a", "b")):
        coverage.update(page(unsound=unsound), now=0.0, lease_s=LEASE_S)
    assert [record.getMessage()[:30] for record in caplog.records] == [
        "not cached: reads of a, becaus",
        "not cached: reads of a, b, bec",
    ]
