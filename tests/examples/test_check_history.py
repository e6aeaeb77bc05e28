"""The program of docs/checker.md runs, says what the page says that it does, and what it recorded
can be checked again."""

import re
import subprocess
import sys
from pathlib import Path

from respcache.testing.checker import check
from respcache.testing.history import load
from respcache.testing.staleness import ViolationKind

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checker.md").read_text()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_program_finds_the_stale_read_and_prints_what_the_page_says() -> None:
    """Three dots on the page stand for a number."""
    (expected,) = re.findall(
        r"```console\n\$ python examples/check_history\.py\n(.*?)```", PAGE, re.DOTALL
    )
    done = run("examples/check_history.py")
    pattern = r"-?[\d.]+".join(
        re.escape(part) for part in re.sub(r" +", " ", expected).split("...")
    )
    assert re.fullmatch(pattern, re.sub(r" +", " ", done.stdout)), done.stdout
    assert (done.returncode, done.stderr) == (1, "")


def test_what_the_program_recorded_is_judged_the_same_by_the_command(tmp_path: Path) -> None:
    """The file outlives the program."""
    path = tmp_path / "history"
    shown = run("examples/check_history.py", str(path))
    again = run("-m", "respcache.testing.checker", str(path), "--bound", "2.5")
    assert (again.stdout, again.returncode) == (shown.stdout, 1)
    assert check(load([path]), bound_s=2.5).violations == {ViolationKind.FRESHNESS: 1}


def test_the_page_shows_the_program_and_names_every_violation() -> None:
    """What it says of use stands in a program that runs."""
    program = (ROOT / "examples" / "check_history.py").read_text()
    for shown in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        for line in filter(None, shown.splitlines()):
            assert line in program, line
    named = re.findall(r"^\| (\w+) \|", PAGE, re.MULTILINE)
    assert named == ["violation", *ViolationKind]
