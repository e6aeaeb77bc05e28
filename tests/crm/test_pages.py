"""The commands in the documentation, run as they stand on a system of their own; what they print is
compared."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .system import Start, System

DOCS = Path(__file__).parents[2] / "docs"
END = "\x1e"
BLOCK = re.compile(r"^( *)```console\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[tuple[str, str]]:
    """Return the commands of a page with what they are said to print."""
    found: list[tuple[str, str]] = []
    for indent, block in BLOCK.findall(page):
        for line in block.splitlines():
            text = line.removeprefix(indent)
            if text.startswith("$ "):
                found.append((text[2:], ""))
            else:
                command, expected = found[-1]
                found[-1] = (command, f"{expected}{text}\n")
    return found


def fits(printed: str, expected: str) -> bool:
    """Whether a text is the expected one, with anything within a line or many lines for each
    ``...``."""
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def run(system: System, work: Path, page: str) -> list[str]:
    """Run a page in one shell on a system; return what does not print what the page says."""
    text = (
        (DOCS / page)
        .read_text()
        .replace("http://localhost:4001", system.base)
        .replace(".venv/bin/python", sys.executable)
    )
    text = text.replace(".venv/bin/respcache", str(Path(sys.executable).with_name("respcache")))
    asked = commands(text)
    script = "".join(f"{command}\nprintf '{END}'\n" for command, _ in asked)
    environment = {**system.environment, "COLUMNS": "500", "LC_ALL": "C.UTF-8"}
    work.mkdir()
    done = subprocess.run(
        ["bash"],
        input=script,
        env=environment,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    printed = done.stdout.replace("\r", "").split(END)
    assert len(asked) > 20
    assert len(printed) == len(asked) + 1, printed[-1]
    return [
        f"$ {command}\n{got}--- but the page says:\n{expected}"
        for (command, expected), got in zip(asked, printed, strict=False)
        if not fits(got, expected)
    ]


@pytest.mark.long
@pytest.mark.parametrize("page", ["curl.md", "operations.md", "cli.md"])
def test_every_command_of_a_page_prints_what_the_page_says(
    start: Start, tmp_path: Path, page: str
) -> None:
    """On fresh demo data."""
    wrong = run(start().ready(), tmp_path / "work", page)
    assert not wrong, "\n".join(wrong)


def test_what_is_compared_can_fail() -> None:
    """Dots stand for anything, everything else for itself."""
    assert fits("a: 12; b\n", "a: ...; b")
    assert not fits("a: 12; c\n", "a: ...; b")
    assert not fits("", "x")
    assert not fits("x", "")
