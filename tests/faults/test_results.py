"""What is made of a run: the verdict, the totals, the last line, the exit status and the page. No
server is started here."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from respcache.testing.history import Event, Read, Recorder, Write
from respcache.testing.servers import ServerFailed
from respcache.testing.staleness import ViolationKind

from . import run
from .outsiders import Outsiders
from .results import NO_COMMAND, Result, add, judge, kept, line, summary
from .stage import HISTORY, ROOT, SAYS_ALARM, Problem, Stage

HIT = Read(1.3, 1.4, {"x": 1}, "r", "q", "q", None, "hit")
STALE = Read(9.0, 9.1, {"x": 0}, "r", "q", "q", None, "hit")
ONE = Write("x", 1, 1.0, 1.1, 1.2, "w")
RIGHT, WRONG = (ONE, HIT), (ONE, HIT, STALE)
OLD_STATE: dict[str, Any] = {
    "reads": 5,
    "writes": 2,
    "stale_reads": 0,
    "lost_invalidations": 0,
    "failed_requests": 0,
    "seconds": 180.5,
    "worst_staleness_s": 1.5,
    "how": {"hit": 4, "fill": 1},
    "faults": {"flushall": 3},
    "seeds": ["100", "101", "103"],
}
"""As states were before aborted runs, alarms, failed runs and commands were kept."""

Play = Callable[[Path, str], Result]


def record(folder: Path, *events: Event) -> Path:
    with Recorder(folder / HISTORY) as recorder:
        for event in events:
            recorder.append(event)
    return folder / HISTORY


def result(folder: Path, *events: Event, **more: Any) -> Result:
    return Result("7", 60.0, judge(record(folder, *events)), Counter(flushall=2), **more)


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    """Run the command with runs that end as told, one after the other; the state is kept."""

    def go(*plays: Play, arguments: tuple[str, ...] = ("--total-reads", "4")) -> tuple[int, Path]:
        coming = list(plays)

        async def play(folder: Path, *, seed: str, **options: Any) -> Result:
            return coming.pop(0)(folder, seed)

        monkeypatch.setattr(run, "play", play)
        state = tmp_path / "state.json"
        status = run.main(
            ["--seed", "100", "--folder", str(tmp_path), "--state", str(state), *arguments]
        )
        assert coming == []
        return status, state

    return go


def playing(*events: Event, **more: Any) -> Play:
    return lambda folder, seed: Result(seed, 60.0, judge(record(folder, *events)), **more)


def interrupted(*events: Event) -> Play:
    def play(folder: Path, seed: str) -> Result:
        record(folder, *events)
        raise KeyboardInterrupt

    return play


# -- a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "more", "broken"),
    [
        (RIGHT, {}, None),
        (WRONG, {}, "stale_reads"),
        (RIGHT, {"failed": [Problem("one", 1.0, 2.0, "500")]}, "failed_requests"),
        (RIGHT, {"alarms": {"stale"}}, "alarms"),
        (RIGHT, {"unrecovered": "not within 8 s"}, "failed_runs"),
        ((ONE,), {}, "failed_runs"),
        ((ONE, Read(1.3, 1.4, {"x": 1}, "r", "q", "q", None, "fill")), {}, "failed_runs"),
        ((ONE, Read(1.3, 1.4, {"x": 1}, "r", "q", "q", None, "bounded hit below ASGI")), {}, None),
        ((), {"aborted": "a disk broke"}, None),
        (WRONG, {"aborted": "a disk broke"}, "stale_reads"),
    ],
    ids=[
        "right",
        "stale",
        "failed",
        "alarm",
        "unrecovered",
        "no read",
        "no hit",
        "another hit",
        "aborted",
        "aborted and stale",
    ],
)
def test_a_run_is_ok_when_it_served_from_the_cache_and_broke_nothing(
    tmp_path: Path, events: tuple[Event, ...], more: dict[str, Any], broken: str | None
) -> None:
    """Whatever makes it not so is a figure of the last line, too."""
    found = result(tmp_path, *events, **more)
    assert found.ok is (broken is None)
    counters = line(add({}, found))
    assert broken is None or counters[broken] == 1
    assert counters["aborted"] == bool(found.aborted)


def test_a_read_that_violates_two_properties_is_one_stale_read(tmp_path: Path) -> None:
    """So there are never more of them than reads."""
    found = result(tmp_path, ONE, STALE)
    assert found.report.violations == {ViolationKind.FRESHNESS: 1, ViolationKind.BOUND: 1}
    assert line(add({}, found))["stale_reads"] == line(add({}, found))["reads"] == 1


class Scenery(Stage):
    """A stage without servers, whose workers have recorded something and then fail in a way."""

    def __init__(
        self, folder: Path, *events: Event, fails: str = "", serves: bool = False, log: str = ""
    ) -> None:
        self.folder, self.workers, self.problems, self.alarms, self.broken = (
            folder,
            {},
            [],
            set(),
            [],
        )
        self._fails, self._serves = fails, serves
        record(folder, *events)
        (folder / "server.log").write_text(log)

    async def start_processes(self) -> None:
        if self._fails == "raises":
            raise TimeoutError("too slow")
        self.broken += [self._fails] if self._fails else []

    async def hits_again(self, *, most_s: float) -> float | None:
        return 0.1 if self._serves else None


@pytest.fixture
def perform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Play on a stage without servers."""

    async def nothing(self: Outsiders) -> None:
        await asyncio.Event().wait()

    def go(*events: Event, **how: Any) -> Result:
        @contextlib.asynccontextmanager
        async def stage(folder: Path, *args: Any, **options: Any) -> AsyncIterator[Stage]:
            yield Scenery(folder, *events, **how)

        for name in ("observe", "write", "trade"):
            monkeypatch.setattr(Outsiders, name, nothing)
        monkeypatch.setattr(Outsiders, "__init__", lambda self, *args: None)
        monkeypatch.setattr(run, "stage", stage)
        return asyncio.run(run.play(tmp_path, seed="7", seconds=0.0, kinds=()))

    return go


@pytest.mark.parametrize("fails", ["one ended with status 1: why\nso", "raises"])
def test_the_history_of_an_aborted_run_is_checked(
    perform: Callable[..., Result], fails: str
) -> None:
    """A worker crashed, or something never started: what was recorded until then counts."""
    found = perform(*WRONG, fails=fails)
    assert found.report.violating_reads == 1
    assert not found.ok
    reason = (
        "TimeoutError: too slow"
        if fails == "raises"
        else "ServerFailed: one ended with status 1: why"
    )
    assert add({}, found)["aborted"] == {"7": reason}
    # where it came from
    assert ServerFailed.__name__ in found.aborted or "start_processes" in found.aborted


def test_a_cache_that_does_not_serve_again_is_a_failure(perform: Callable[..., Result]) -> None:
    """Not a run that could not take place."""
    found = perform(*RIGHT)
    assert (found.aborted, found.ok) == ("", False)
    reason = f"nothing was served from the cache within {run.RECOVER_S} s after the last fault"
    assert reason in add({}, found)["failed_runs"]["7"]
    assert perform(*RIGHT, serves=True).ok


def test_alarms_of_the_server_are_in_its_log(perform: Callable[..., Result]) -> None:
    """Nobody else tells of them."""
    found = perform(
        *RIGHT, serves=True, log=f"ERROR {SAYS_ALARM} a stale answer (0 more): ...\nERROR other\n"
    )
    assert len(found.alarms) == 1
    assert not found.ok


# -- many runs, the command line -------------------------------------------------------------------


def test_a_series_counts_aborted_runs_and_goes_on(
    series: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their reads are in the totals, their seeds and reasons in the state; their histories are
    kept, others are not."""
    status, path = series(
        playing(HIT, ONE, aborted="ServerFailed: gone\nlog"), playing(*RIGHT, HIT, HIT)
    )
    state = json.loads(path.read_text())
    assert (status, state["reads"], state["seeds"], state["aborted"]) == (
        0,
        4,
        ["101"],
        {"100": "ServerFailed: gone"},
    )
    assert len(list(tmp_path.glob("respcache-faults-*"))) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["aborted"], said["seed"]) == (1, "101")
    status, path = series(arguments=("--total-reads", "4"))  # there are enough already
    assert (status, json.loads(path.read_text())) == (0, state)
    status, path = series(playing(*RIGHT), arguments=())
    # the seed of an aborted run is not run again
    assert json.loads(path.read_text())["seeds"] == ["101", "102"]


def test_a_violation_in_an_aborted_run_ends_the_series(series: Callable[..., Any]) -> None:
    """Like in any other."""
    status, path = series(playing(*WRONG, aborted="ServerFailed: gone"))
    assert (status, json.loads(path.read_text())["stale_reads"]) == (1, 1)


def test_a_run_that_could_not_take_place_is_no_success(series: Callable[..., Any]) -> None:
    """Nor are some in a row."""
    gone = playing(aborted="ServerFailed: gone")
    assert series(gone, arguments=())[0] == 2
    assert series(gone, gone, gone)[0] == 2


@pytest.mark.parametrize(
    "more", [{"alarms": {"stale"}}, {"unrecovered": "never"}], ids=["alarm", "unrecovered"]
)
def test_the_exit_status_is_that_of_the_totals(
    series: Callable[..., Any], more: dict[str, Any]
) -> None:
    """A run without a flaw does not make up for an earlier one."""
    assert series(playing(*RIGHT, **more))[0] == 1
    assert series(playing(*RIGHT), arguments=())[0] == 1


def test_a_run_that_the_user_stops_is_checked(series: Callable[..., Any], tmp_path: Path) -> None:
    """What is wrong until then counts; otherwise it is as if it had not been."""
    status, path = series(interrupted(*RIGHT))
    assert (status, path.exists()) == (2, False)
    assert list(tmp_path.glob("respcache-faults-*")) == []
    status, path = series(interrupted(*WRONG))
    state = json.loads(path.read_text())
    assert (status, state["stale_reads"], state["aborted"]) == (
        1,
        1,
        {"100": "stopped by the user"},
    )
    assert len(list(tmp_path.glob("respcache-faults-*/history"))) == 1


def test_what_cannot_be_checked_is_no_verdict(series: Callable[..., Any]) -> None:
    """A history that is none."""

    def play(folder: Path, seed: str) -> Result:
        (folder / HISTORY).write_text('\n["x"]\n')
        return Result(seed, report=judge(folder / HISTORY))

    status, path = series(play)
    assert (status, path.exists()) == (2, False)


def test_sabotaged_runs_are_not_added_up(tmp_path: Path) -> None:
    """A state is about the cache as it is."""
    assert run.main(["--sabotage", "no-fence", "--state", str(tmp_path / "state.json")]) == 2


# -- the page --------------------------------------------------------------------------------------


def test_an_old_state_is_gone_on_with(tmp_path: Path) -> None:
    """What was not kept is nothing; of its seeds no command is known."""
    state = json.loads(json.dumps(OLD_STATE))
    assert kept(state)
    assert line(state)["alarms"] == line(state)["aborted"] == 0
    assert f"\nSeeds 100 to 101, 103:\n\n```\n{NO_COMMAND}\n```\n" in summary(state, command="c")
    add(state, result(tmp_path, *RIGHT), command="run --seed 7")
    assert (state["reads"], state["seeds"], state["faults"]) == (
        6,
        ["100", "101", "103", "7"],
        {"flushall": 5},
    )
    assert f"{NO_COMMAND}\n```\n\nSeeds 7:\n\n```\nrun --seed 7\n" in summary(state, command="c")


def test_the_page_counts_reads_by_level_and_hits_below_asgi(tmp_path: Path) -> None:
    """So that it can be seen that these ways were taken; what was read before they were was strict
    and above."""
    words = [
        "hit",
        "hit below ASGI",
        "bounded hit below ASGI",
        "bounded hit",
        "bounded fill",
        "ttl fill",
        "shared",
    ]
    found = result(
        tmp_path, ONE, *(Read(1.3, 1.4, {"x": 1}, "r", "q", "q", None, word) for word in words)
    )
    page = summary(add(json.loads(json.dumps(OLD_STATE)), found), command="c")
    assert "\n| reads served from the cache | 9 (75%) |\n" in page
    assert "\n| hits among the reads at level `strict` | 6 of 8 |\n" in page
    assert "\n| hits among the reads at level `bounded` | 2 of 3 |\n" in page
    assert "\n| hits among the reads at level `ttl` | 0 of 1 |\n" in page
    assert "\n| hits answered below ASGI (`respcache.integrations.uvicorn`) | 2 |\n" in page


def test_the_page_says_which_commands_made_it_and_what_was_aborted(
    series: Callable[..., Any], tmp_path: Path
) -> None:
    """With their arguments, as they were typed."""
    _, state = series(
        playing(ONE, HIT, aborted="ServerFailed: a | b"),
        playing(*RIGHT, HIT, HIT),
        arguments=("--total-reads", "4"),
    )
    page = tmp_path / "page.md"
    assert run.main(["--state", str(state), "--summary", str(page)]) == 0
    text = page.read_text()
    started = (
        f"python -m tests.faults.run --seed 100 --folder {tmp_path} --state {state} --total-reads 4"
    )
    assert f"\nSeeds 100 to 101:\n\n```\n{started}\n" in text
    assert f"\n```\npython -m tests.faults.run --state {state} --summary {page}\n" in text
    assert "whose histories were checked (seed 100: ServerFailed: a / b) | 1 |" in text
    assert "4 reads and 2 writes in 2 runs of together 120 seconds" in text


def test_the_published_page_is_that_of_the_published_state() -> None:
    """Make it anew with the command that it names."""
    state = json.loads((ROOT / "docs" / "faults.json").read_text())
    command = "python -m tests.faults.run --state docs/faults.json --summary docs/faults.md"
    assert (ROOT / "docs" / "faults.md").read_text() == summary(state, command=command)
