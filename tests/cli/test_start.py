"""How the command starts: fast, with a clear message where its packages are missing, and its
help."""

import subprocess
import sys

import pytest

from .conftest import Run

COMMANDS = (
    "status",
    "stats",
    "keys",
    "get",
    "explain",
    "purge",
    "tail",
    "config",
    "doctor",
    "acl",
    "bench",
)
HEAVY = (
    "asyncio",
    "httpx2",
    "hiredis",
    "msgspec",
    "pydantic",
    "redis",
    "rich",
    "sqlalchemy",
    "ssl",
    "uvicorn",
)


def test_help_imports_nothing_of_weight() -> None:
    """Nor the library itself."""
    code = f"""
import sys
from respcache.ops.cli import main
sys.argv = ["respcache", "--help"]
try:
    main()
except SystemExit:
    print([name for name in {HEAVY} if name in sys.modules], "respcache.cache" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] False"


def test_missing_packages_are_a_clear_message() -> None:
    """With the command that installs them, and no traceback."""
    code = "import sys; sys.modules['typer'] = None; from respcache.ops.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "respcache: typer is not installed: pip install 'respcache[cli]'\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_refuses_unknown_options(respcache: Run, command: str) -> None:
    """Status 2 as everywhere."""
    helped = respcache(command, "--help")
    assert (helped.returncode, "--json" in helped.stdout, helped.stderr) == (0, True, "")
    wrong = respcache(command, "--dance")
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_all_commands_are_in_the_help(respcache: Run) -> None:
    """In one line each, none of them cut off; the exit statuses too."""
    said = respcache("--help").stdout
    assert all(f"\n  {command} " in said for command in COMMANDS)
    assert "..." not in said.partition("Commands:")[2]
    assert "4 refused" in " ".join(said.split())
    assert respcache().returncode == 2
