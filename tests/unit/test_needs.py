"""The end of a test run lists what was skipped, why, and the command that enables it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests import needs

ROOT = Path(__file__).parents[2]
SAMPLE = """
import pytest
from tests import needs

absent = needs.program("no-such-program", package="such-package")
other = needs.needs(False, missing="the moon is down", to_run="wait until it rises")

@absent
@pytest.mark.parametrize("number", range(5))
def test_with_a_mark(number): pass

@pytest.fixture
def thing(): needs.require(other)

def test_with_a_fixture(thing): pass

def test_that_runs(): pass
"""


def test_each_reason_is_listed_once_with_its_count_and_command(tmp_path: Path) -> None:
    """The worker processes of pytest-xdist report the skips."""
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2"),
            *("-p", "tests.conftest", "test_sample.py"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.strip("= ") == "skipped"]
    assert lines[start + 1 : start + 3] == [
        "    5  no-such-program is not installed; to run them: apt-get install such-package",
        "    1  the moon is down; to run them: wait until it rises",
    ]
    assert "1 passed, 6 skipped" in lines[start + 3]


def test_every_reason_names_the_command() -> None:
    """Of all marks that tests use."""
    marks = [mark for mark in vars(needs).values() if isinstance(mark, pytest.MarkDecorator)]
    assert marks
    for mark in marks:
        reason, command = mark.kwargs["reason"].split(needs.TO_RUN)
        assert reason
        assert command
