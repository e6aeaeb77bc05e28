"""The benchmark runs, tells apart what it must not measure, and leaves nothing behind. No figure
has a limit here."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests import needs

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, str(ROOT / "bench" / "run.py"), "--json", "--only", "hits", "--rounds", "1"]
WRONG = ("other_page", "short", "forgetful", "failing")
FIGURES = {"rps_ratio", "cpu_ratio", "rps", "cpu_us", "p50_ms", "p99_ms"}

pytestmark = [needs.LINUX, pytest.mark.long]


def test_two_lanes_have_figures_at_every_number_of_connections(tmp_path: Path) -> None:
    """The last line is one JSON object; ratios are finite and positive; the bare lane is its own
    measure."""
    found = measure(tmp_path, "bare,strict")
    assert found["skipped"] == found["refused"] == {}
    for lane in ("bare", "strict"):
        assert set(found[lane]) == {"c1", "c16", "c64"}
        for counters in found[lane].values():
            assert counters.keys() >= FIGURES
            assert all(math.isfinite(counters[name]) and counters[name] > 0 for name in FIGURES)
    assert found["bare"]["c16"]["cpu_ratio"] == found["bare"]["c16"]["rps_ratio"] == 1


def test_lanes_whose_answers_are_wrong_are_refused(tmp_path: Path) -> None:
    """Another page's bytes, a byte too few, a handler that runs again, an error later on: said, and
    no figure given."""
    found = measure(tmp_path, ",".join(["bare", *(f"wrong:{name}" for name in WRONG)]))
    refused = found["refused"]
    assert set(refused) == {f"wrong:{name}" for name in WRONG}
    assert "differ from byte" in refused["wrong:other_page"]
    assert "39999 bytes instead of 40000" in refused["wrong:short"]
    assert "the handler ran 64 times" in refused["wrong:forgetful"]
    assert "503" in refused["wrong:failing"]
    assert "bare" in found
    assert not set(found) & set(refused)


def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    """Ctrl-C in the middle leaves no process and no file."""
    process = subprocess.Popen(
        [*RUN, "--seconds", "600", "--lanes", "bare,strict"], env=environment(tmp_path)
    )
    try:
        # Valkey and a lane
        wait_until(lambda: len(working_below(tmp_path)) >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not working_below(tmp_path))
    assert list(tmp_path.iterdir()) == []


def measure(folder: Path, lanes: str) -> Any:
    """Run the benchmark with few requests; return its last line. It must leave nothing in its
    folder."""
    command = [*RUN, "--requests", "64", "--lanes", lanes]
    done = subprocess.run(
        command, env=environment(folder), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return json.loads(done.stdout.splitlines()[-1])


def environment(folder: Path) -> dict[str, str]:
    """Have it put its files into a folder, and find the lanes of this one."""
    path = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def working_below(folder: Path) -> list[int]:
    """Find processes whose working folder is below this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "cwd").startswith(f"{folder}/"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until(fact: Any, seconds: float = 60) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)
