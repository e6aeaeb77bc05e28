"""The command as users start it: a process of its own, in an environment of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from respcache.ops.acl import AclRole

COMMAND = str(Path(sys.executable).with_name("respcache"))
OURS = re.compile(r"RESPCACHE_|REDIS_|DATABASE_URL|NO_COLOR|FORCE_COLOR|COLUMNS|TERM$")
PASSWORD = "only-for-tests"

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def clean(**environment: str) -> dict[str, str]:
    """Return our environment without what the command reads, and with what is given."""
    return {
        **{name: value for name, value in os.environ.items() if not OURS.match(name)},
        **environment,
    }


@pytest.fixture
def respcache(tmp_path: Path) -> Run:
    """Run the command in an empty folder, its output in a pipe."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> Done:
        return subprocess.run(
            [COMMAND, *arguments],
            input=stdin,
            env=clean(**environment),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def document(done: Done) -> Any:
    """Read what ``--json`` printed."""
    return json.loads(done.stdout)


def log_in_as(url: str, role: AclRole, *, without: str | None = None) -> str:
    """Make the user of a role, less one part of its rule, and return the address to log in by."""
    words = [word for word in role.rule(password=PASSWORD).split() if word != without]
    with redis.Redis.from_url(url) as client:
        client.execute_command(*words)
    return re.sub(r"//.*@", f"//{role.name}:{PASSWORD}@", url)
