"""The example of an application's tests passes, and docs/testing.md shows it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text()


def test_the_example_passes() -> None:
    """As its first lines say."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "examples/test_application.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout[:3]) == (0, "..."), done.stdout


def test_the_page_shows_the_example_and_the_contract() -> None:
    """Every line of its code is in a file that runs."""
    files = (
        ROOT / "examples" / "test_application.py",
        ROOT / "src" / "respcache" / "testing" / "store_contract.py",
    )
    programs = [{line.strip() for line in path.read_text().splitlines()} for path in files]
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        lines = {line.strip() for line in block.splitlines()}
        assert any(lines <= program for program in programs), block
