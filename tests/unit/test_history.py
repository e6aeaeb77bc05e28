"""Histories in files: what is appended comes back, whatever happens to the writers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respcache.testing import history
from respcache.testing.history import Event, Read, Recorder, Write, load

TIMES = st.floats(0, 1e9)
READS = st.builds(
    Read,
    start=TIMES,
    end=TIMES,
    values=st.dictionaries(st.text(), st.integers(0, 2**62)),
    process=st.text(),
    asked=st.text(),
    received=st.text(),
    session=st.none() | st.text(),
    how=st.text(),
    slack_s=TIMES,
)
WRITES = st.builds(
    Write,
    register=st.text(),
    version=st.none() | st.integers(0, 2**62),
    started=TIMES,
    committed=st.none() | TIMES,
    acked=st.none() | TIMES,
    process=st.text(),
    session=st.none() | st.text(),
)
READ = Read(1.5, 2.5, {"acme/é": 4, "acme/2": 1}, "worker-1", "acme list", "acme list", "s", "hit")
WRITE = Write("acme/é", 4, 1.0, 1.25, None, "worker-2")
APPEND_FOR_EVER = """
import sys
from respcache.testing.history import Recorder, Write
with Recorder(sys.argv[1]) as recorder:
    for version in range(10**9):
        recorder.append(Write("r" * 3000, version, 1.0, 2.0, 3.0, sys.argv[2]))
"""


def record(path: Path, *events: Event) -> None:
    with Recorder(path) as recorder:
        for event in events:
            recorder.append(event)


@given(st.lists(READS | WRITES))
def test_what_is_appended_comes_back(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event]
) -> None:
    """Every event, equal and in order, and again when it is iterated again."""
    path = tmp_path_factory.mktemp("history") / "events"
    record(path, *events)
    loaded = load([path])
    assert list(loaded) == events
    assert list(loaded) == events
    assert loaded.torn == 0


def test_histories_of_before_there_was_a_slack_are_read(tmp_path: Path) -> None:
    """They had none. One below 0 is no event."""
    path = tmp_path / "events"
    path.write_text(
        '\n["r",1.5,2.5,{"acme/é":4,"acme/2":1},"worker-1","acme list","acme list","s","hit"]'
    )
    assert list(load([path])) == [READ]
    path.write_text('\n["r",1.5,2.5,{},"worker-1","acme list","acme list","s","hit",-1.0]')
    with pytest.raises(ValueError, match="no event"):
        list(load([path]))


def test_events_do_not_change() -> None:
    """They are facts."""
    for event in (READ, WRITE):
        with pytest.raises(AttributeError):
            event.process = "x"  # type: ignore[misc]


@pytest.mark.parametrize("event", [READ, WRITE])
def test_a_torn_last_line_is_left_out_and_counted(tmp_path: Path, event: Event) -> None:
    """Wherever it is torn; whole events before it come back."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    record(whole, WRITE, event)
    line = whole.read_bytes()
    for length in range(line.rindex(b"\n") + 2, len(line)):
        torn.write_bytes(line[:length])
        loaded = load([torn])
        assert (list(loaded), loaded.torn) == ([WRITE], 1)
    torn.write_bytes(line[: line.rindex(b"\n") + 1])
    loaded = load([torn])
    assert (list(loaded), loaded.torn) == ([WRITE], 0)


def test_the_next_writer_keeps_a_fragment_apart(tmp_path: Path) -> None:
    """A file that several processes share loses nothing but the torn line itself."""
    path = tmp_path / "events"
    record(path, WRITE, READ)
    path.write_bytes(path.read_bytes()[:-7])
    record(path, READ, WRITE)
    loaded = load([path])
    assert (list(loaded), loaded.torn) == ([WRITE, READ, WRITE], 1)


def test_torn_lines_of_all_files_are_counted(tmp_path: Path) -> None:
    """Each file has its own last line."""
    paths = [tmp_path / "1", tmp_path / "2"]
    for path in paths:
        record(path, WRITE, READ)
        path.write_bytes(path.read_bytes()[:-7])
    loaded = load(paths)
    for _ in range(2):
        assert (list(loaded), loaded.torn) == ([WRITE, WRITE], 2)


@pytest.mark.parametrize("line", ['["w","r","one",1.0,2.0,3.0,"p"]', '["x"]', "{}", '["r",1.0]'])
def test_a_whole_line_that_is_no_event_is_an_error(tmp_path: Path, line: str) -> None:
    """It is no history, and nobody shall believe that it was checked; the message says where."""
    path = tmp_path / "events"
    path.write_text(f"\n\n{line}\n")
    with pytest.raises(ValueError, match=r"events:3: no event"):
        list(load([path]))


def test_what_is_appended_after_load_is_not_seen(tmp_path: Path) -> None:
    """All iterations see the same, so a history may be checked while it grows."""
    path = tmp_path / "events"
    record(path, WRITE)
    loaded = load([path])
    record(path, READ)
    assert (list(loaded), loaded.torn) == ([WRITE], 0)
    assert list(load([path])) == [WRITE, READ]


def test_an_event_that_was_not_written_as_a_whole_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk must not make a shorter history."""
    monkeypatch.setattr(history.os, "write", lambda file, line: len(line) - 1)
    with Recorder(tmp_path / "events") as recorder, pytest.raises(OSError, match="as a whole"):
        recorder.append(WRITE)


def test_an_event_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that processes that share a file do not interleave within lines."""
    calls: list[bytes] = []
    write = os.write
    monkeypatch.setattr(
        history.os, "write", lambda file, line: calls.append(line) or write(file, line)
    )
    record(tmp_path / "events", WRITE, READ)
    assert len(calls) == 2
    assert all(call.startswith(b"\n") and call.count(b"\n") == 1 for call in calls)


def test_killed_processes_that_share_a_file_lose_at_most_their_last_line(tmp_path: Path) -> None:
    """Three append long lines as fast as they can until they are killed; of each, the versions come
    back without a gap."""
    path = tmp_path / "events"
    path.touch()
    started = [
        subprocess.Popen([sys.executable, "-c", APPEND_FOR_EVER, str(path), str(number)])
        for number in range(3)
    ]
    deadline = time.monotonic() + 60
    while len({event.process for event in load([path])}) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    loaded = load([path])
    seen: dict[str, list[int | None]] = {}
    for event in loaded:
        assert isinstance(event, Write)
        seen.setdefault(event.process, []).append(event.version)
    assert len(seen) == 3
    assert all(versions == list(range(len(versions))) for versions in seen.values())
    assert loaded.torn <= 3


def test_the_clock_is_common_to_all_processes_of_a_host() -> None:
    """What another process reads between two readings of ours lies between them."""
    before = history.now()
    code = "from respcache.testing.history import now; print(repr(now()))"
    other = float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert before < other < history.now()
