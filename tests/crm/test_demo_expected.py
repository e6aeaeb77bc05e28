"""The demo's judge of staleness: which responses are older than a confirmed write."""

from random import Random
from typing import Any

from crm.demo.expected import VERSION, ExpectedRows, expect, stale_record, stale_rows


def row(name: str, made: str, version: int = 1) -> dict[str, Any]:
    return {"id": name, "created_at": made, VERSION: version}


def test_an_answer_older_than_a_confirmed_write_is_noticed() -> None:
    """A version, a new record, a deleted one; and nothing else is."""
    expected = ExpectedRows()
    expected.add("leads", row("a", "t1"))
    expected.add("leads", row("b", "t2"))
    old = [row("b", "t2"), row("a", "t1")]
    assert not [*stale_rows(expected.expectations("leads"), old, first=50)]
    record = expected.find("leads", "a")
    assert record is not None
    record.sent = 2
    before = expected.expectations("leads")
    expected.confirm(record)
    assert not [*stale_rows(before, old, first=50)], (
        "it was asked for before the write was confirmed"
    )
    assert [*stale_rows(expected.expectations("leads"), old)] == [
        "leads a is shown in version 1, not 2"
    ]
    expected.add("leads", row("c", "t3"))
    assert "leads c is missing" in [*stale_rows(expected.expectations("leads"), old, first=50)]
    record.ending = True
    expected.confirm_deletion(record)
    assert "leads a is shown although it was deleted" in [
        *stale_rows(expected.expectations("leads"), old)
    ]
    assert [*stale_record(expect(record), row("a", "t1", 2))]
    assert not [*stale_record(expect(record), None)]


def test_what_a_list_need_not_show_is_not_missed() -> None:
    """What is older than a full page, what is being deleted, and on pages that are not the first
    one."""
    expected = ExpectedRows()
    expected.add("leads", row("a", "t1"))
    newer = [row("y", "t3"), row("x", "t2")]
    assert not [*stale_rows(expected.expectations("leads"), newer, first=2)]
    assert not [*stale_rows(expected.expectations("leads"), newer)]
    assert [*stale_rows(expected.expectations("leads"), newer, first=3)] == ["leads a is missing"]
    taken = expected.take("leads", Random(1))
    assert taken is not None
    assert expected.take("leads", Random(1)) is None, "one write at a time"
    taken.ending = True
    assert not [*stale_rows(expected.expectations("leads"), newer, first=3)]
