"""Programs and conditions that some tests need, and the report of tests skipped without them.

Every skip reason has the form "what is missing; to run them: command", so that the end of a test
run lists each reason once, with the number of tests and the command that enables them.
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM_PATH = Path("/usr/bin/chromium")
TO_RUN = "; to run them: "


def needs(condition: bool, *, missing: str, to_run: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test unless the condition holds."""
    return pytest.mark.skipif(not condition, reason=f"{missing}{TO_RUN}{to_run}")


def program(name: str, *, package: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test where a program is not on the PATH."""
    return needs(
        shutil.which(name) is not None,
        missing=f"{name} is not installed",
        to_run=f"apt-get install {package}",
    )


CHROMIUM = needs(
    CHROMIUM_PATH.exists(),
    missing=f"{CHROMIUM_PATH} does not exist",
    to_run="apt-get install chromium",
)
LINUX = needs(sys.platform == "linux", missing="/proc does not exist", to_run="use Linux")
OPENSSL = program("openssl", package="openssl")
PROMTOOL = program("promtool", package="prometheus")
REDIS_SERVER = program("redis-server", package="redis-server")
ROOT = needs(
    os.getuid() == 0,
    missing="only root can start a server as another user",
    to_run="run pytest as root, in a container",
)
SPIN = program("spin", package="spin gcc")


def require(mark: pytest.MarkDecorator) -> None:
    """Skip the test that uses a fixture, for the reason of a mark."""
    if mark.args[0]:
        pytest.skip(mark.kwargs["reason"])


def skipped(reports: Iterable[Any]) -> Iterator[str]:
    """Yield one line for each reason, the most frequent first: count, reason, command."""
    counts = Counter(_reason(report.longrepr) for report in reports)
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        yield f"{count:>5}  {reason}"


def _reason(longrepr: Any) -> str:
    """Return the reason of a skip report: its representation is (path, line, "Skipped: reason")."""
    text = longrepr[2] if isinstance(longrepr, (tuple, list)) else str(longrepr)
    return str(text).removeprefix("Skipped: ")
