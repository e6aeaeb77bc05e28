"""The examples are programs that run."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from respcache.testing.servers import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("server", ["memory", "valkey"])
def test_the_quickstart_caches_and_invalidates(server: str, valkey_url: str) -> None:
    """As its first line says: under uvicorn, on either store."""
    port = free_port()
    environment = {**os.environ, **({"REDIS_CACHE_URL": valkey_url} if server == "valkey" else {})}
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "examples.quickstart:app",
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as http:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx2.HTTPError):
                    http.get("/books")
                    break
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert "; hit" in http.get("/books").headers["cache-status"]
            assert http.post("/books/Emma").json() == {"count": 2}
            assert http.get("/books").json() == ["Middlemarch", "Emma"]
    finally:
        process.terminate()
        process.wait(20)


def test_the_readme_shows_the_quickstart() -> None:
    """What the README says of use stands in a program that runs."""
    program = (ROOT / "examples" / "quickstart.py").read_text()
    shown = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for line in filter(None, shown.splitlines()):
        assert line in program, line
