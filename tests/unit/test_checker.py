"""The checker: each property violated and just not violated, proofs in words, and all of it against
the definitions."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from respcache.testing.checker import MAX_WORDS, Report, check
from respcache.testing.history import Event, History, Read, Recorder, Write, load
from respcache.testing.staleness import ViolationKind

BOUND_S = 2.0


def write(
    version: int | None,
    started: float,
    committed: float | None = None,
    acked: float | None = None,
    *,
    process: str = "w",
    session: str | None = None,
    register: str = "x",
) -> Write:
    return Write(register, version, started, committed, acked, process, session)


def read(
    version: int,
    start: float,
    end: float,
    *,
    session: str | None = None,
    received: str = "q",
    how: str = "",
    register: str = "x",
    process: str = "r",
    slack_s: float = 0.0,
) -> Read:
    return Read(start, end, {register: version}, process, "q", received, session, how, slack_s)


def violations(*events: Event) -> dict[ViolationKind, int]:
    return check(events, bound_s=BOUND_S).violations


ONE, TWO = write(1, 1.0, 1.1, 1.2), write(2, 3.0, 3.1, 3.2)


@pytest.mark.parametrize(
    ("returned", "start", "violated"),
    [
        (2, 3.3, False),
        (1, 3.3, True),
        (1, 3.2, False),
        (0, 3.3, True),
        (0, 1.2, False),
        (0, 1.3, True),
    ],
)
def test_a_read_returns_what_was_acknowledged_before_it_began(
    returned: int, start: float, violated: bool
) -> None:
    """I1. An acknowledgement at the very moment of the start binds nobody."""
    assert (ViolationKind.FRESHNESS in violations(ONE, TWO, read(returned, start, 9.0))) is violated


@pytest.mark.parametrize("acked", [None, 99.0])
@pytest.mark.parametrize(("start", "violated"), [(5.0, False), (5.125, True), (5.25, True)])
def test_a_read_returns_what_was_committed_a_bound_before_it_began(
    acked: float | None, start: float, violated: bool
) -> None:
    """I3. Acknowledged or not; a commit exactly the bound before the start must show."""
    assert violations(write(1, 3.0, 3.125, acked), read(0, start, 6.0)) == (
        {ViolationKind.BOUND: 1} if violated else {}
    )


def test_an_acknowledged_write_is_a_committed_one() -> None:
    """Whoever acknowledged knew the commit, even when nobody recorded it."""
    assert violations(write(1, 1.0, None, 1.5), read(0, 3.5, 4.0)) == {
        ViolationKind.FRESHNESS: 1,
        ViolationKind.BOUND: 1,
    }
    assert violations(write(1, 1.0, None, None), read(0, 3.5, 4.0)) == {}


@pytest.mark.parametrize(
    ("acked", "violated"), [(2.9, True), (2.999, True), (3.0, False), (3.5, False), (4.1, False)]
)
def test_a_read_with_a_slack_returns_what_was_acknowledged_a_slack_before_it_began(
    acked: float, violated: bool
) -> None:
    """I1 at level bounded: what was acknowledged exactly the slack before the start binds nobody. A
    fresh read is not spared."""
    events = write(1, 2.0, 2.1, acked), read(0, 4.0, 4.1, slack_s=1.0)
    assert violations(*events) == ({ViolationKind.FRESHNESS: 1} if violated else {})
    assert (ViolationKind.FRESHNESS in violations(*events, read(0, 4.0, 4.1))) is (acked < 4.0)


@pytest.mark.parametrize(("returned", "violated"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_slack_spares_only_the_writes_that_are_within_it(returned: int, violated: bool) -> None:
    """The second of three was acknowledged 1.3 s before, the third 0.3 s."""
    three = write(3, 4.0, 4.1, 4.2)
    assert (
        ViolationKind.FRESHNESS
        in violations(ONE, TWO, three, read(returned, 4.5, 4.6, slack_s=1.0))
    ) is violated


@pytest.mark.parametrize(("start", "violated"), [(6.0, False), (6.125, True), (6.25, True)])
def test_a_read_with_a_slack_returns_what_was_committed_a_bound_and_the_slack_before(
    start: float, violated: bool
) -> None:
    """I3."""
    events = write(1, 3.0, 3.125), read(0, start, 7.0, slack_s=1.0)
    assert violations(*events) == ({ViolationKind.BOUND: 1} if violated else {})
    assert check(events, bound_s=BOUND_S).lost_invalidations == violated


def test_a_slack_excuses_no_invention_and_nobody_elses_rows() -> None:
    """Neither has to do with age."""
    assert violations(ONE, TWO, read(2, 1.5, 2.9, slack_s=9.0)) == {ViolationKind.INVENTION: 1}
    assert violations(read(1, 2.5, 2.9, slack_s=9.0, register="of nobody")) == {
        ViolationKind.INVENTION: 1
    }
    assert violations(read(0, 1.0, 2.0, received="p", slack_s=9.0)) == {ViolationKind.ISOLATION: 1}


def test_a_read_with_a_slack_returns_what_its_session_wrote_and_may_go_back_otherwise() -> None:
    """I4. It may be answered from an older view than the read before it, never from one before its
    own write."""
    own, others = write(1, 1.0, 1.1, 1.2, session="s"), write(2, 3.0, 3.1, 3.2)
    saw = read(2, 3.3, 3.4, session="s")
    assert violations(own, others, saw, read(1, 3.5, 3.6, session="s", slack_s=1.0)) == {}
    assert violations(own, others, saw, read(1, 3.5, 3.6, session="s"))[ViolationKind.SESSION] == 1
    assert violations(own, read(0, 1.3, 1.4, session="s", slack_s=1.0)) == {
        ViolationKind.SESSION: 1
    }
    assert violations(own, read(0, 1.2, 1.4, session="s", slack_s=1.0)) == {}
    assert (
        violations(own, read(0, 1.3, 1.4, session="t", slack_s=1.0), read(0, 1.3, 1.4, slack_s=1.0))
        == {}
    )
    later = write(2, 3.0, 3.1, 3.2, session="s")
    for events in ((own, later), (later, own)):
        assert violations(*events, read(1, 3.3, 3.4, session="s", slack_s=1.0)) == {
            ViolationKind.SESSION: 1
        }


def test_what_a_read_with_a_slack_saw_binds_the_fresh_reads_of_its_session() -> None:
    """I4. The first had its slack and did not need it."""
    saw = read(1, 2.0, 2.5, session="s", slack_s=1.0)
    assert violations(write(1, 1.0, 1.1), saw, read(0, 2.6, 3.0, session="s")) == {
        ViolationKind.SESSION: 1
    }


def test_reads_with_a_slack_are_counted_and_their_age_is_what_exceeds_it() -> None:
    """Whoever reads the report sees how much of it rests on less."""
    two = write(1, 1.0, 1.1, 1.2, register="y")
    within = Read(2.0, 2.1, {"x": 0, "y": 0}, "r", "q", "q", slack_s=5.0)
    unacknowledged = read(0, 1.2, 1.3, slack_s=1.0)
    lenient = [
        read(0, 2.0, 2.1, slack_s=0.75),
        within,
        unacknowledged,
        read(1, 9.0, 9.1, slack_s=1.0),
    ]
    report = check([ONE, two, read(0, 1.3, 1.4), *lenient], bound_s=BOUND_S)
    assert (report.reads, report.lenient_reads, report.late_reads, report.violating_reads) == (
        5,
        4,
        2,
        2,
    )
    assert check([ONE, two, *lenient], bound_s=BOUND_S).worst_staleness_s == pytest.approx(0.15)
    assert str(report).startswith("5 reads (- 5), 4 of them with a slack, which 2 used\n2 writes, ")
    said = check([ONE, lenient[0]], bound_s=BOUND_S).excerpt()
    assert "but 1 was acknowledged 800.0 ms before it began (its slack is 750.0 ms)\n" in said


def test_a_slack_that_is_none_is_refused() -> None:
    """Compared with it, nothing would ever be too old."""
    for slack_s in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="slack_s"):
            check([read(0, 1.0, 2.0, slack_s=slack_s)], bound_s=1)


@pytest.mark.parametrize(("end", "violated"), [(2.9, True), (3.0, False), (3.1, False)])
def test_a_read_returns_nothing_whose_write_had_not_begun(end: float, violated: bool) -> None:
    """Invention. A write that began at the very end may have been seen."""
    assert (ViolationKind.INVENTION in violations(ONE, TWO, read(2, 1.5, end))) is violated


def test_a_version_cannot_be_there_before_an_earlier_one() -> None:
    """Write 3 had begun, and waited for write 2, which began after the read's end."""
    waiting = write(3, 2.0, 3.3, 3.4)
    assert violations(ONE, TWO, waiting, read(3, 1.5, 2.5)) == {ViolationKind.INVENTION: 1}
    assert violations(ONE, TWO, waiting, read(3, 1.5, 3.5)) == {}


def test_a_version_of_no_known_write_needs_a_later_one_that_had_begun() -> None:
    """Versions grow by one: where 3 is, 2 was. Nobody wrote down who made it."""
    three = write(3, 3.0, 3.1, 3.2)
    assert violations(ONE, three, read(2, 2.5, 3.0)) == {}
    assert violations(ONE, three, read(2, 2.5, 2.9)) == {ViolationKind.INVENTION: 1}
    waiting = write(4, 1.0, 3.3, 3.4)
    assert violations(ONE, three, waiting, read(2, 2.5, 2.9)) == {}
    assert violations(read(1, 2.5, 2.9, register="of nobody")) == {ViolationKind.INVENTION: 1}


def test_an_attempt_of_unknown_outcome_may_have_made_one_version() -> None:
    """The writer was killed; a read proves that it had committed, or does not. Two versions need
    two attempts."""
    attempt, other = write(None, 2.0), write(None, 2.5)
    assert violations(ONE, attempt, read(2, 1.5, 2.0), read(1, 1.5, 99.0)) == {}
    assert violations(ONE, attempt, read(2, 1.5, 1.9)) == {ViolationKind.INVENTION: 1}
    assert violations(ONE, attempt, read(3, 1.5, 9.0)) == {ViolationKind.INVENTION: 1}
    assert violations(ONE, attempt, other, read(3, 1.5, 9.0)) == {}
    assert violations(ONE, attempt, other, read(3, 1.5, 2.4)) == {ViolationKind.INVENTION: 1}


def test_an_attempt_whose_version_became_known_is_unknown_no_longer() -> None:
    """The same process, register and start; anybody else's attempt stays open."""
    attempt = write(None, 1.0)
    report = check([attempt, ONE, read(2, 1.3, 1.4)], bound_s=BOUND_S)
    assert (report.writes, report.attempts, report.violations) == (
        1,
        0,
        {ViolationKind.INVENTION: 1},
    )
    for other in (write(None, 1.0, process="v"), write(None, 0.9)):
        report = check([other, ONE, read(2, 1.3, 1.4)], bound_s=BOUND_S)
        assert (report.writes, report.attempts, report.violations) == (1, 1, {})


def test_a_write_known_by_its_version_alone_may_be_seen_or_not() -> None:
    """A writer that was killed after its UPDATE told it the version: reads on both sides are
    right."""
    assert violations(ONE, write(2, 3.0), read(1, 99.0, 99.1), read(2, 99.0, 99.1)) == {}


def test_two_events_of_a_version_are_one_write() -> None:
    """The process that commits and the client that is answered each record what they know."""
    worker, client = (
        write(1, 1.5, 1.6, process="worker"),
        write(1, 1.0, None, 1.9, process="client"),
    )
    for events in ([worker, client], [client, worker]):
        report = check(
            [*events, read(0, 2.0, 2.1), read(0, 3.7, 3.8), read(1, 1.0, 1.0)], bound_s=BOUND_S
        )
        assert (report.writes, report.violations) == (
            1,
            {ViolationKind.FRESHNESS: 2, ViolationKind.BOUND: 1},
        )
        names = ", ".join(event.process for event in events)
        assert (
            f"{names}: write x = 1, committed by 600.0, acknowledged at 900.0" in report.excerpt()
        )


@pytest.mark.parametrize(("start", "violated"), [(2.5, False), (2.6, True)])
def test_a_session_does_not_go_back(start: float, violated: bool) -> None:
    """I4. What it saw in a read that ended before; another session's sight binds nobody."""
    unacknowledged, saw = write(1, 1.0, 1.1), read(1, 2.0, 2.5, session="s")
    assert violations(unacknowledged, saw, read(0, start, 3.0, session="s")) == (
        {ViolationKind.SESSION: 1} if violated else {}
    )
    assert (
        violations(unacknowledged, saw, read(0, start, 3.0, session="t"), read(0, start, 3.0)) == {}
    )


def test_a_session_reads_its_own_writes() -> None:
    """I4. Those that were acknowledged to it before; not those that were not."""
    for committed in (1.1, None):
        assert (
            violations(write(1, 1.0, committed, 1.2, session="s"), read(0, 1.25, 1.3, session="s"))[
                ViolationKind.SESSION
            ]
            == 1
        )
    assert violations(write(1, 1.0, 1.1, 1.2, session="s"), read(0, 1.2, 1.3, session="s")) == {}
    assert violations(write(1, 1.0, 1.1, None, session="s"), read(0, 1.25, 1.3, session="s")) == {}


def test_what_a_session_saw_is_right_in_any_order_of_events() -> None:
    """Its reads may stand in files of several processes; hundreds of them are folded together on
    the way."""
    writes = [write(version, version, version + 0.1) for version in range(1, 301)]
    reads = [read(version, version + 0.2, version + 0.3, session="s") for version in range(1, 301)]
    assert violations(*writes, *reads) == {}
    assert violations(*reversed(reads), *writes) == {}
    for order in (reads, reads[::-1], reads[::2] + reads[1::2]):
        late = [
            read(version - 1, version + 0.4, version + 0.5, session="s")
            for version in range(2, 301)
        ]
        assert violations(*writes, *order, *late) == {ViolationKind.SESSION: len(late)}
    sank = [
        read(1, 400.0, 401.0, session="s"),
        read(300, 350.0, 351.0, session="s"),
        read(299, 500.0, 501.0, session="s"),
    ]
    assert check([*writes, *sank], bound_s=1000.0).violations == {ViolationKind.SESSION: 2}


def test_a_read_is_told_what_it_asked_for() -> None:
    """I5."""
    assert violations(read(0, 1.0, 2.0, received="p")) == {ViolationKind.ISOLATION: 1}
    assert violations(read(0, 1.0, 2.0, received="q")) == {}


def test_registers_are_judged_apart_and_a_read_counts_once() -> None:
    """A read of three registers of which two are too old is one violation."""
    writes = [
        write(version, version, version + 0.1, version + 0.2, register=name)
        for name in "abc"
        for version in (1, 2)
    ]
    assert violations(*writes, Read(2.9, 3.0, {"a": 1, "b": 2, "c": 1}, "r", "q", "q")) == {
        ViolationKind.FRESHNESS: 1
    }
    assert violations(*writes, Read(2.9, 3.0, {"a": 2, "b": 2, "c": 2}, "r", "q", "q")) == {}


def test_lost_invalidations_are_the_writes_that_reads_missed_beyond_the_bound() -> None:
    """Each version once, however many reads missed it; not those within the bound; not those before
    what was returned."""
    writes = [write(version, version, version) for version in (1, 2, 3, 4, 5)]
    stale = [read(2, 6.0, 6.1), read(2, 6.0, 6.1), read(3, 6.5, 6.6)]
    # 3 and 4; 5 was committed 1.5 s before
    assert check([*writes, *stale], bound_s=BOUND_S).lost_invalidations == 2
    assert check([*writes, *stale], bound_s=1.0).lost_invalidations == 3
    assert (
        check([*writes, *reversed(stale), read(3, 5.5, 5.6)], bound_s=BOUND_S).lost_invalidations
        == 2
    )
    assert (
        check([*writes, read(2, 6.0, 6.1), read(2, 5.0, 5.1)], bound_s=BOUND_S).lost_invalidations
        == 2
    )
    assert check([*writes, *stale], bound_s=10.0).lost_invalidations == 0


def test_worst_staleness_is_since_the_returned_version_was_superseded() -> None:
    """By the first later commit that is known, also where nothing is violated."""
    report = check(
        [
            write(1, 0.0, 1.0),
            write(2, 0.0, 1.5),
            write(3, 0.0),
            read(0, 2.5, 2.6),
            read(2, 50.0, 50.1),
        ],
        bound_s=9,
    )
    assert (report.ok, report.worst_staleness_s) == (True, 1.5)
    assert check([ONE, read(1, 9.0, 9.1)], bound_s=9).worst_staleness_s == 0


def test_the_excerpt_tells_how_a_fill_that_a_write_overtook_became_a_stale_hit() -> None:
    """The write of what was returned, the read that was overtaken, the missed write, the offender;
    in order, from 0 ms."""
    events = [
        write(1, 10.0, 10.002, 10.003, process="worker-1"),
        read(1, 9.970, 10.0115, process="ended before the commit"),
        read(1, 10.001, 10.030, how="hit", process="shorter"),
        read(1, 10.005, 10.040, how="miss", process="worker-2"),
        write(2, 10.010, 10.012, 10.014, process="worker-1"),
        read(1, 10.011, 10.013, process="shorter"),
        Read(10.0045, 10.0450, {"x": 1}, "another query", "p", "p"),
        read(1, 10.050, 10.0515, how="hit", process="worker-2"),
    ]
    assert check(events, bound_s=BOUND_S).excerpt().splitlines() == [
        "I1: x: a read returned 1, but 2 was acknowledged 36.0 ms before it began",
        "       0.0 ..      3.0 ms  worker-1: write x = 1, committed by 2.0, acknowledged at 3.0",
        "       5.0 ..     40.0 ms  worker-2: read q: x = 1 (miss), under way when 2 was committed",
        "      10.0 ..     14.0 ms  worker-1: write x = 2, committed by 12.0, acknowledged at 14.0",
        "      50.0 ..     51.5 ms  worker-2: read q: x = 1 (hit)   <-- I1",
    ]


def test_the_excerpt_is_the_violation_with_the_fewest_operations_then_the_shortest() -> None:
    """Three of the same kind, and then one of a kind that fewer operations prove."""
    stale = [read(1, 9.0, 9.1), read(1, 4.0, 4.1), read(1, 5.0, 5.1)]
    report = check([ONE, TWO, *stale], bound_s=99)
    (proof,) = report.proofs.values()
    assert proof.operations == (ONE, TWO, stale[1])
    early = read(0, 1.5, 99.0)
    assert check([ONE, TWO, *stale, early], bound_s=99).proofs[
        ViolationKind.FRESHNESS
    ].operations == (
        ONE,
        early,
    )
    report = check([ONE, TWO, *stale, read(2, 8.0, 8.5, received="p")], bound_s=99)
    assert report.excerpt().startswith("I5: a read that asked for q received p\n")
    assert report.excerpt(ViolationKind.FRESHNESS).startswith("I1: ")
    assert report.excerpt(ViolationKind.SESSION) == ""


def test_every_kind_has_a_proof_in_words() -> None:
    """Of the operations that matter, and no others."""

    def words(kind: ViolationKind, *events: Event) -> list[str]:
        return check(events, bound_s=BOUND_S).excerpt(kind).splitlines()

    outsider = write(2, 3.0, 3.1, process="psql")
    assert words(ViolationKind.BOUND, ONE, outsider, read(1, 9.0, 9.1)) == [
        "I3: x: a read returned 1, but 2 was committed 5900.0 ms before it began",
        "       0.0 ..    200.0 ms  w: write x = 1, committed by 100.0, acknowledged at 200.0",
        "    2000.0 ..   2100.0 ms  psql: write x = 2, committed by 2100.0, never acknowledged",
        "    8000.0 ..   8100.0 ms  r: read q: x = 1   <-- I3",
    ]
    others = read(2, 3.1, 3.3, session="t"), read(2, 3.2, 3.4, session="s")
    assert words(
        ViolationKind.SESSION,
        ONE,
        outsider,
        read(2, 3.2, 3.3, session="s"),
        *others,
        read(1, 3.5, 3.6, session="s"),
    ) == [
        "I4: x: a read returned 1, but 2 was known to session s 200.0 ms before it began",
        "       0.0 ..    100.0 ms  r: read q: x = 2",
        "     300.0 ..    400.0 ms  r: read q: x = 1   <-- I4",
    ]
    assert words(
        ViolationKind.SESSION, write(1, 3.0, 3.1, 3.2, session="s"), read(0, 3.5, 3.6, session="s")
    ) == [
        "I4: x: a read returned 0, but 1 was known to session s 300.0 ms before it began",
        "       0.0 ..    200.0 ms  w: write x = 1, committed by 100.0, acknowledged at 200.0",
        "     500.0 ..    600.0 ms  r: read q: x = 0   <-- I4",
    ]
    assert words(ViolationKind.INVENTION, write(1, 3.0), read(1, 1.0, 2.0)) == [
        "invention: x: a read returned 1, but 1 was begun 1000.0 ms after it ended",
        "       0.0 ..   1000.0 ms  r: read q: x = 1   <-- invention",
        "    2000.0 ..   2000.0 ms  w: write x = 1, commit unknown, never acknowledged",
    ]
    assert words(ViolationKind.INVENTION, read(7, 1.0, 2.0)) == [
        "invention: x: a read returned 7, but no write that can have made it was begun when it "
        "ended",
        "       0.0 ..   1000.0 ms  r: read q: x = 7   <-- invention",
    ]


def test_words_of_how_are_counted_up_to_a_number() -> None:
    """Some 100 apart, all others together: a word that is different each time does not grow a
    map."""
    reads = [read(0, 1.0, 2.0, how=str(number % (MAX_WORDS + 50))) for number in range(1000)]
    report = check(reads, bound_s=1)
    assert len(report.how) == MAX_WORDS + 1
    assert sum(report.how.values()) == report.reads == 1000


def test_a_generator_and_a_bound_that_is_none_are_refused() -> None:
    """A history is iterated several times: an exhausted one would pass."""
    with pytest.raises(TypeError):
        check(iter([ONE]), bound_s=1)
    for bound_s in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="bound_s"):
            check([ONE], bound_s=bound_s)


def test_torn_lines_are_reported(tmp_path: Path) -> None:
    """A writer was killed while it appended; the rest is judged."""
    path = tmp_path / "events"
    with Recorder(path) as recorder:
        for event in (ONE, read(0, 1.3, 1.4), TWO):
            recorder.append(event)
    path.write_bytes(path.read_bytes()[:-3])
    report = check(load([path]), bound_s=BOUND_S)
    assert (report.torn, report.writes, report.violations) == (1, 1, {ViolationKind.FRESHNESS: 1})


@pytest.mark.parametrize(("returned", "status"), [(1, 0), (0, 1)])
def test_the_command_prints_the_report_and_fails_on_violations(
    tmp_path: Path, returned: int, status: int
) -> None:
    """python -m respcache.testing.checker FILE... --bound S; nothing else is said."""
    paths = [tmp_path / "1", tmp_path / "2"]
    for path, event in zip(paths, [ONE, read(returned, 1.5, 1.6, how="hit")], strict=True):
        with Recorder(path) as recorder:
            recorder.append(event)
    done = run_checker(*map(str, paths), "--bound", "2.5")
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.startswith(
        "1 reads (hit 1)\n1 writes, 0 of unknown outcome, 0 torn lines\nviolations: "
    )
    assert ("I1: x: a read returned 0" in done.stdout) is bool(status)


def run_checker(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "respcache.testing.checker", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("events", [[], [ONE, TWO]], ids=["empty", "only writes"])
def test_a_history_without_reads_is_no_proof(tmp_path: Path, events: list[Event]) -> None:
    """Nothing violated anything because nothing was read: the report is not ok, the command's
    status is neither 0 nor 1."""
    path = tmp_path / "events"
    with Recorder(path) as recorder:
        for event in events:
            recorder.append(event)
    assert not check(events, bound_s=BOUND_S).ok
    done = run_checker(str(path), "--bound", "2.5")
    assert (done.returncode, done.stderr) == (2, "nothing to check: no reads were recorded\n")


def test_what_is_no_history_is_not_taken_for_a_violation(tmp_path: Path) -> None:
    """Status 2, and what is wrong in one line."""
    path = tmp_path / "events"
    path.write_text('\n["x"]\n')
    for file, said in ((path, "events:2: no event"), (tmp_path / "absent", "No such file")):
        done = run_checker(str(file), "--bound", "2.5")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert said in done.stderr


def test_a_read_that_violates_several_properties_is_one_read() -> None:
    """It counts for each of its kinds, and once altogether; registers do not matter either."""
    both = Read(9.0, 9.1, {"x": 0, "y": 0}, "r", "q", "another")
    report = check(
        [ONE, write(1, 1.0, 1.1, 1.2, register="y"), both, read(0, 9.2, 9.3), read(1, 9.4, 9.5)],
        bound_s=BOUND_S,
    )
    assert report.violations == {
        ViolationKind.FRESHNESS: 2,
        ViolationKind.BOUND: 2,
        ViolationKind.ISOLATION: 1,
    }
    assert report.violating_reads == 2
    assert "violations: I1: 2 reads, I3: 2 reads, I5: 1 reads (2 distinct reads)\n" in str(report)


MOMENTS = st.integers(0, 12).map(float)
REGISTERS = st.sampled_from("xy")
SESSIONS = st.sampled_from([None, "s", "t"])
SOME_WRITES = st.builds(
    Write,
    register=REGISTERS,
    version=st.none() | st.integers(1, 6),
    started=MOMENTS,
    committed=st.none() | MOMENTS,
    acked=st.none() | MOMENTS,
    process=st.sampled_from("pq"),
    session=SESSIONS,
)
SOME_READS = st.builds(
    lambda start, length, values, asked, received, session, slack_s: Read(
        start, start + length, values, "r", asked, received, session, "", slack_s
    ),
    MOMENTS,
    MOMENTS,
    st.dictionaries(REGISTERS, st.integers(0, 7)),
    st.sampled_from("ab"),
    st.sampled_from("ab"),
    SESSIONS,
    st.sampled_from([0.0, 1.0, 4.0]),
)


def resolved(events: Sequence[Event]) -> list[Write]:
    """Return the events of versions, and the attempts that no later event of the same start gave a
    version."""
    kept: list[Write] = []
    for at, event in enumerate(events):
        if isinstance(event, Write):
            same = (event.register, event.process, event.started)
            later = (
                other
                for other in events[at:]
                if isinstance(other, Write) and other.version is not None
            )
            if event.version is not None or all(
                same != (other.register, other.process, other.started) for other in later
            ):
                kept.append(event)
    return kept


def possible(read: Read, register: str, version: int, writes: list[Write]) -> bool:
    """Whether a version can have been there when the read ended."""
    started: dict[int, float] = {}
    for write in writes:
        if write.register == register and write.version is not None:
            started[write.version] = min(write.started, started.get(write.version, write.started))
    if any(known <= version and begun > read.end for known, begun in started.items()):
        return False
    if any(known >= version and begun <= read.end for known, begun in started.items()):
        return True
    attempts = {
        (write.process, write.started)
        for write in writes
        if write.register == register and write.version is None and write.started <= read.end
    }
    return version - max((known for known in started if known < version), default=0) <= len(
        attempts
    )


def due(
    read: Read, register: str, events: Sequence[Event], *, bound_s: float
) -> dict[ViolationKind, int]:
    """Return the least version that each property demands."""
    least = dict.fromkeys((ViolationKind.FRESHNESS, ViolationKind.BOUND, ViolationKind.SESSION), 0)
    for event in events:
        own = event.session is not None and event.session == read.session
        if isinstance(event, Read):
            if own and event.end < read.start and read.slack_s == 0:
                least[ViolationKind.SESSION] = max(
                    least[ViolationKind.SESSION], event.values.get(register, 0)
                )
        elif event.register == register and event.version is not None:
            if event.acked is not None and event.acked < read.start - read.slack_s:
                least[ViolationKind.FRESHNESS] = max(least[ViolationKind.FRESHNESS], event.version)
            if event.acked is not None and event.acked < read.start and own:
                least[ViolationKind.SESSION] = max(least[ViolationKind.SESSION], event.version)
            if any(
                time is not None and time <= read.start - read.slack_s - bound_s
                for time in (event.committed, event.acked)
            ):
                least[ViolationKind.BOUND] = max(least[ViolationKind.BOUND], event.version)
    return least


def plainly(
    events: Sequence[Event], *, bound_s: float
) -> tuple[dict[ViolationKind, int], int, int, float]:
    """Judge by the definitions alone, every read against every event: what ``facts`` are."""
    writes, counts, lost, worst = (
        resolved(events),
        dict.fromkeys(ViolationKind, 0),
        set[tuple[str, int]](),
        0.0,
    )
    violating = 0
    for read in events:
        if not isinstance(read, Read):
            continue
        found = {ViolationKind.ISOLATION} if read.asked != read.received else set[ViolationKind]()
        for register, version in read.values.items():
            least = due(read, register, events, bound_s=bound_s)
            found |= {kind for kind, wanted in least.items() if version < wanted}
            found |= (
                set() if possible(read, register, version, writes) else {ViolationKind.INVENTION}
            )
            for write in writes:
                moments = [time for time in (write.committed, write.acked) if time is not None]
                if (
                    write.register == register
                    and write.version is not None
                    and write.version > version
                    and moments
                ):
                    worst = max(worst, read.start - read.slack_s - min(moments))
                    if min(moments) <= read.start - read.slack_s - bound_s:
                        lost.add((register, write.version))
        for kind in found:
            counts[kind] += 1
        violating += bool(found)
    return {kind: count for kind, count in counts.items() if count}, violating, len(lost), worst


def facts(report: Report) -> tuple[dict[ViolationKind, int], int, int, float]:
    """Violations, violating reads, lost invalidations, worst staleness."""
    return (
        report.violations,
        report.violating_reads,
        report.lost_invalidations,
        report.worst_staleness_s,
    )


@settings(max_examples=400)
@given(st.lists(SOME_WRITES | SOME_READS, max_size=14), st.sampled_from([0.0, 1.0, 3.0]))
@example([write(1, 3.0, 3.0), read(0, 3.0, 3.0)], 0.0)
@example([write(1, 1.0, 1.0, 2.0), read(0, 3.0, 3.0, slack_s=1.0)], 1.0)
def test_the_checker_agrees_with_the_definitions(events: list[Event], bound_s: float) -> None:
    """Random histories, most of them of no cache that there could be, judged by comparing
    everything with everything."""
    report = check(events, bound_s=bound_s)
    assert facts(report) == plainly(events, bound_s=bound_s)


@settings(max_examples=400)
@given(st.lists(SOME_WRITES | SOME_READS, max_size=14), st.sampled_from([0.0, 1.0, 3.0]))
@example(
    [write(1, 0.0, None, 0.0, session="s"), read(0, 1.0, 1.0, session="s"), write(1, 0.0)], 0.0
)
@example(
    [write(1, 0.0), write(1, 0.0, None, 0.0, session="s"), read(0, 1.0, 1.0, session="s")], 0.0
)
@example(
    [
        write(1, 0.0, None, 1.0, session="s"),
        read(1, 0.0, 1.0, session="s"),
        read(0, 2.0, 2.0, session="s", slack_s=1.0),
    ],
    0.0,
)
def test_a_proof_alone_proves(events: list[Event], bound_s: float) -> None:
    """The operations of each proof, without the rest of the history, are a violation of the same
    kind."""
    report = check(events, bound_s=bound_s)
    assert report.proofs.keys() == report.violations.keys()
    for kind, proof in report.proofs.items():
        assert len(proof.operations) == proof.violation.operations
        assert proof.violation.read in proof.operations
        if kind in (ViolationKind.FRESHNESS, ViolationKind.BOUND):
            first = min(
                event.started if isinstance(event, Write) else event.start
                for event in proof.operations
            )
            assert proof.violation.span == proof.violation.read.end - first
        assert kind in check(proof.operations, bound_s=bound_s).violations
        assert str(proof).startswith(str(kind))


def test_a_long_history_of_a_right_cache_is_accepted_and_one_stale_read_in_it_found(
    tmp_path: Path,
) -> None:
    """From files, with sessions."""
    path = tmp_path / "events"
    with Recorder(path) as recorder:
        for version in range(1, 1001):
            at = float(version)
            recorder.append(write(version, at, at + 0.2, at + 0.3, session="s"))
            for reader in range(5):
                recorder.append(
                    read(version, at + 0.4 + reader / 100, at + 0.5, session=f"reader {reader}")
                )
    history: History = load([path])
    assert check(history, bound_s=BOUND_S).ok
    with Recorder(path) as recorder:
        recorder.append(read(499, 500.35, 500.36))
    report = check(load([path]), bound_s=BOUND_S)
    assert report.violations == {ViolationKind.FRESHNESS: 1}
    assert [
        operation.version
        for operation in report.proofs[ViolationKind.FRESHNESS].operations
        if isinstance(operation, Write)
    ] == [
        499,
        500,
    ]
