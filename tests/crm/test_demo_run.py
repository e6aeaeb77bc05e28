"""``python -m crm demo`` as a newcomer meets it."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crm.cli.commands import main
from crm.demo.counters import DemoCounters
from crm.demo.run import Outages
from respcache.testing.servers import EmbeddedPostgres, EmbeddedValkey, free_port

from .system import clean
from .test_commands import all_gone

OUTAGES = ("--first-outage", "2", "--outage-every", "3", "--outage-seconds", "1")
OFTEN = {"home", "list", "record", "page", "filter", "create"}
"""What happens within seconds; the rest may come later."""


class Demo:
    """A demo in a process of its own."""

    def __init__(self, data: Path, *options: str, **environment: str) -> None:
        self.data = data
        self.port = int(environment.get("PORT") or free_port())
        self.said = data.with_suffix(".said")
        self.summary = data.with_suffix(".json")
        surroundings = {**clean(), "DATA_DIR": str(data), "PORT": str(self.port), **environment}
        with self.said.open("wb") as said, self.summary.open("wb") as summary:
            command = [sys.executable, "-m", "crm", "demo", "--json", *options]
            self.process = subprocess.Popen(
                command, env=surroundings, stdout=summary, stderr=said, start_new_session=True
            )

    def until(self, text: str) -> None:
        """Wait until it says something."""
        while text not in self.said.read_text():
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.05)

    def children(self) -> list[int]:
        """Return the processes that it started."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in found.stdout.split()]

    def interrupt(self) -> int:
        """Press Ctrl-C; return the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def end(self) -> None:
        """Leave nothing."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        EmbeddedPostgres(self.data / "demo" / "postgres", password="").find().remove()


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Any]:
    demos: list[Demo] = []

    def make(*options: str, **environment: str) -> Demo:
        demos.append(Demo(tmp_path / f"data{len(demos)}", *options, **environment))
        return demos[-1]

    yield make
    for demo in demos:
        demo.end()


def free(port: int) -> bool:
    """Whether nobody listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.long
def test_a_demo_shows_traffic_and_outages_without_a_fault_and_ends_with_ctrl_c(
    start_demo: Any,
) -> None:
    """Reads and writes of all kinds, a stopped and a frozen server, nothing failed, nothing stale;
    nothing stays behind."""
    demo = start_demo(*OUTAGES, "--rate", "40")
    demo.until("is started again")
    demo.until("continues")
    children = demo.children()
    assert len(children) == 3
    assert demo.interrupt() == 0, demo.said.read_text()
    assert all_gone(children)
    assert free(demo.port)
    summary = json.loads(demo.summary.read_text())
    assert (summary["failed"], summary["stale"], summary["problems"]) == (0, 0, [])
    assert summary["outages"][:2] == ["stopped", "frozen"]
    assert summary["kinds"].keys() >= OFTEN
    assert summary["times"]["hit"]["count"] > 0
    assert summary["times_in_outages"]["database"]["count"] > 0
    assert (summary["writes"] > 0, summary["compared"] > 0, len(summary["tenants"]) > 5) == (
        True,
        True,
        True,
    )
    said = demo.said.read_text()
    assert f"http://localhost:{demo.port}/cache" in said
    assert "root@crm.example" in said
    assert "Traceback" not in said
    assert not (demo.data / "demo" / "running.json").exists()


def test_ctrl_c_while_it_starts_leaves_nothing(start_demo: Any) -> None:
    """No server, no port, no traceback."""
    demo = start_demo()
    demo.until("starting")
    while not (children := demo.children()):
        assert demo.process.poll() is None
    assert demo.interrupt() == 1
    assert all_gone(children)
    assert "Traceback" not in demo.said.read_text()


@pytest.mark.parametrize(
    "options",
    [
        ("--rate", "0"),
        ("--rate", "many"),
        ("--minutes", "-1"),
        ("--outage-seconds", "nan"),
        ("--seed", "x"),
        ("--loud",),
    ],
    ids=" ".join,
)
def test_wrong_options_are_exit_status_2(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    """Before anything is started."""
    with pytest.raises(SystemExit) as ended:
        main(["demo", *options])
    assert (ended.value.code, options[0] in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DATABASE_URL": "postgresql://u:hidden@127.0.0.1:1/x"}, "unset DATABASE_URL"),
        ({"REDIS_CACHE_URL": "none"}, "unset REDIS_CACHE_URL"),
        (
            {
                "ENVIRONMENT": "production",
                "JWT_SECRET": "0123456789abcdef" * 4,
                "RESPCACHE_KEY": "fedcba9876543210" * 4,
            },
            "production",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_servers_of_others_and_a_production_system_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    words: str,
) -> None:
    """With the way out in the message, and before anything is made."""
    for name, value in {"DATA_DIR": str(tmp_path / "data"), **environment}.items():
        monkeypatch.setenv(name, value)
    assert main(["demo"]) == 1
    said = capsys.readouterr().err
    assert (words in said, "hidden" in said) == (True, False)
    assert not (tmp_path / "data").exists()


def test_a_taken_port_is_a_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a server is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        monkeypatch.setenv("PORT", str(taken.getsockname()[1]))
        assert main(["demo"]) == 1
    assert "PORT=" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "valkey").exists()


@pytest.mark.parametrize(("wrong", "status"), [("nothing", 0), ("fail", 1), ("note_stale", 1)])
def test_a_failed_request_or_a_stale_answer_is_exit_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: str, status: int
) -> None:
    """And is told in both forms of the summary."""
    counters = DemoCounters()
    counters.response("hit", 1.0, tenant="acme", outage=False)
    if wrong == "fail":
        counters.fail("GET /x: 500", outage=True)
    elif wrong == "note_stale":
        counters.note_stale("GET /x", ["leads a is missing"])
    monkeypatch.setattr("crm.demo.run._run", lambda console, options: counters)
    assert main(["demo", "--json"]) == status
    assert len(json.loads(capsys.readouterr().out)["problems"]) == status
    assert main(["demo"]) == status
    assert ("GET /x" in capsys.readouterr().out) == bool(status)


def test_an_outage_lasts_while_another_program_has_the_servers_port(
    make_valkey: Callable[..., EmbeddedValkey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and the server is started when the port is free."""
    monkeypatch.setattr("crm.demo.run.RETRY_S", 0)
    valkey, counters, said = make_valkey(), DemoCounters(), list[str]()
    outages = Outages(valkey, counters, first_s=0, every_s=1e6, length_s=0)
    outages.step(lambda style, text: said.append(text))
    assert not valkey.running
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", valkey.port))
        other.listen()
        for _ in range(2):
            outages.step(lambda style, text: said.append(text))
    assert counters.outage
    outages.step(lambda style, text: said.append(text))
    assert valkey.running
    assert not counters.outage
    assert ["uses the port" in text for text in said] == [False, True, False]
