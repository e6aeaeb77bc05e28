"""``python -m crm`` as a user meets it: run, token, wrong settings, Ctrl-C, a crash."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from crm.cli.cachecheck import MODULES as CHECKED
from respcache.testing.servers import free_port

from .system import Start, clean


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if all(gone(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_run_starts_everything_says_what_to_try_and_stops_with_ctrl_c(start: Start) -> None:
    """Two systems side by side; the printed token works; Ctrl-C of one ends its servers and nobody
    else's."""
    one, other = start("one"), start("other")
    one.ready()
    other.ready()
    said = one.log.read_text()
    assert f"http://localhost:{one.environment['PORT']}" in said
    assert str(one.data) in said
    printed = next(
        line.strip().removeprefix("TOKEN=") for line in said.splitlines() if "TOKEN=" in line
    )
    token = one.command("token", "--tenant", "globex", "--role", "manager").stdout.strip()
    for bearer, status in ((printed, 200), (token, 200)):
        answer = httpx2.get(
            f"{one.base}/api/accounts", headers={"authorization": f"Bearer {bearer}"}
        )
        assert answer.status_code == status
    assert 0 < answer.json()["data"]["total"] < 900
    assert (
        httpx2.get(
            f"{other.base}/api/accounts", headers={"authorization": f"Bearer {printed}"}
        ).status_code
        == 401
    )
    secrets = one.data / "secrets"
    assert {path.name for path in secrets.iterdir()} == {
        "JWT_SECRET",
        "RESPCACHE_KEY",
        "POSTGRES_PASSWORD",
        "VALKEY_PASSWORD",
    }
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets.iterdir())
    assert not any(path.read_text() in said for path in secrets.iterdir())
    refused = one.command("run", PORT=str(free_port()))
    assert (refused.returncode, "already runs" in refused.stderr) == (1, True)
    mine, theirs = one.children(), other.children()
    assert len(mine) == len(theirs) == 2
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(30) == 0
    assert all_gone(mine)
    assert not any(gone(pid) for pid in theirs)
    assert "Traceback" not in one.log.read_text()
    no_system = one.command("token")
    assert (no_system.returncode, no_system.stdout, "make run" in no_system.stderr) == (1, "", True)


@pytest.mark.long
def test_a_killed_system_leaves_no_servers_and_starts_again(start: Start) -> None:
    """SIGKILL cannot be caught; the kernel ends the servers with us. The data is still there."""
    first = start().ready()
    children = first.children()
    first.process.kill()
    first.process.wait()
    assert all_gone(children)
    second = start().ready()
    assert "data found" in second.log.read_text()


def test_a_taken_port_is_a_clear_message(start: Start) -> None:
    """With the way out in it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        system = start(PORT=str(taken.getsockname()[1]))
        assert system.process.wait(30) == 1
    said = system.log.read_text()
    assert "PORT=" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PORT": "none"}, "PORT"),
        ({"DATABASE_URL": "mysql://x"}, "postgresql://"),
        ({"REDIS_CACHE_URL": "http://:hidden@x"}, "redis://"),
        (
            {"DATABASE_URL": "postgresql://u:hidden@127.0.0.1:1/x", "REDIS_CACHE_URL": "none"},
            "DATABASE_URL",
        ),
        ({"JWT_SECRET": "short"}, "JWT_SECRET"),
        ({"ENVIRONMENT": "production"}, "JWT_SECRET"),
        (
            {"ENVIRONMENT": "production", "JWT_SECRET": "changeme" * 4, "RESPCACHE_KEY": "k" * 40},
            "JWT_SECRET",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_wrong_settings_are_one_clear_line(
    tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    """Exit status 1, the variable's name, no traceback, no secret."""
    arguments = {**clean(), "DATA_DIR": str(tmp_path), "PORT": str(free_port()), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "crm", "run"],
        env=arguments,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "hidden" not in done.stderr


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """It may be known already."""
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "JWT_SECRET").write_text("x" * 64)
    arguments = {**clean(), "DATA_DIR": str(tmp_path), "PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-m", "crm", "run"],
        env=arguments,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "chmod 600" in done.stderr) == (1, True)


def test_ctrl_c_while_it_is_loaded_is_no_traceback(tmp_path: Path) -> None:
    """That takes a second, and people are quick."""
    (tmp_path / "uvicorn.py").write_text("raise KeyboardInterrupt")
    environment = {**clean(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "crm", "run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "crm: stopped\n")


def test_wrong_usage_is_exit_status_2() -> None:
    """As everywhere."""
    assert (
        subprocess.run(
            [sys.executable, "-m", "crm", "dance"], capture_output=True, check=False
        ).returncode
        == 2
    )


@pytest.mark.long
def test_the_check_passes_on_a_right_system_and_fails_without_invalidation(
    start: Start, tmp_path: Path
) -> None:
    """``make test-cache``: 0 on a running system; 1 on one whose engine is not watched."""
    system = start().ready()
    right = system.command("test-cache", "--json")
    assert right.returncode == 0, right.stdout + right.stderr
    report: dict[str, Any] = json.loads(right.stdout)
    checked = {timing["module"] for timing in report["timings"]}
    assert (report["failed"], len(report["checks"]) > 80, checked) == (0, True, set(CHECKED))
    running = json.loads((system.data / "running.json").read_text())
    broken = subprocess.run(
        [sys.executable, "-c", BROKEN, running["database_url"], str(free_port())],
        env={**system.environment, "REDIS_CACHE_URL": running["cache_url"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "FAIL accounts: a created record is in the next list" in broken.stdout


BROKEN = """
import sys, threading, time, uvicorn
from crm import app as crm_app
from crm.cli import commands
from crm.settings import Settings
class Unwatched:
    def close(self): pass
crm_app.watch = lambda *a, **k: Unwatched()
settings = Settings(database_url=sys.argv[1]).with_secrets()
app, port = crm_app.create_app(settings), int(sys.argv[2])
server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started: time.sleep(0.05)
try:
    status = commands.main(["test-cache", "--url", f"http://127.0.0.1:{sys.argv[2]}"])
finally:
    server.should_exit = True
    thread.join()
sys.exit(status)
"""
