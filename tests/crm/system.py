"""A system started as by ``python -m crm run``, for tests that meet it from outside."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

from respcache.testing.servers import EmbeddedPostgres, free_port

START_S = 120
DEADLINE_S = 0.5
"""Of the cache server: a busy machine must not make bypasses of what tests look at. Shorter than
the lease: when the server does not answer, that is noticed first. The real deadline has tests of
its own."""
PATIENT = (
    sys.executable,
    "-c",
    "import sys; from respcache import RedisStore; from crm.cli.commands import main; "
    f"RedisStore.__init__.__kwdefaults__['deadline_s'] = {DEADLINE_S}; sys.exit(main())",
)
"""``python -m crm`` with that deadline."""
Start = Callable[..., "System"]


class System:
    """A system started as by ``python -m crm run``, in a process of its own."""

    def __init__(self, data: Path, **environment: str) -> None:
        self.data = data
        self.log = data.with_suffix(".log")
        port = environment.get("PORT") or str(free_port())
        self.environment = {**clean(), "DATA_DIR": str(data), "PORT": port, **environment}
        self.base = f"http://127.0.0.1:{port}"
        with self.log.open("wb") as log:
            command = [*PATIENT, "run"]
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def ready(self) -> "System":
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.base}/api/system/health").status_code == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(f"did not start: {self.log.read_text()}")

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run another command in the same surroundings."""
        command = [sys.executable, "-m", "crm", *arguments]
        return subprocess.run(
            command,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def children(self) -> list[int]:
        """Return the processes that it started."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in found.stdout.split()]

    def end(self) -> None:
        """Stop it whatever its state is, and delete what it left elsewhere."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        EmbeddedPostgres(self.data / "postgres", password="").find().remove()


def clean() -> dict[str, str]:
    """Return the environment without settings of the CRM."""
    ours = {
        "PORT",
        "DATA_DIR",
        "DATABASE_URL",
        "REDIS_CACHE_URL",
        "REDIS_URL",
        "JWT_SECRET",
        "RESPCACHE_KEY",
        "ENVIRONMENT",
    }
    return {key: value for key, value in os.environ.items() if key not in ours}
