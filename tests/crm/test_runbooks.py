"""The runbooks: the condition of each alert is made true, and every command of its page prints what
the page says."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx2
import pytest

from respcache.ops.cli.output import UNBROKEN
from respcache.testing.servers import free_port

from .system import PATIENT, System
from .test_pages import END, commands, fits

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
MENDED = "## How to verify the fix"
METRICS_TOKEN = "only-for-tests-" + "a" * 32


class Stage:
    """A running system, with people who look at it and what can happen to it."""

    def __init__(self, system: System, work: Path) -> None:
        self.system = system
        self.work = work
        running = json.loads((system.data / "running.json").read_text())
        tokens = {
            name: system.command("token", "--tenant", "acme", "--role", role).stdout.strip()
            for name, role in (("RESPCACHE_TOKEN", "superadmin"), ("TOKEN", "admin"))
        }
        self.user = {"authorization": f"Bearer {tokens['TOKEN']}"}
        self.database_url = running["database_url"]
        self.server = int(re.findall(r"process_id:(\d+)", self.valkey("INFO", "server"))[0])
        self.environment = {
            **system.environment,
            **tokens,
            "BASE": system.base,
            "RESPCACHE_URL": f"{system.base}/cache",
            "DATABASE_URL": running["database_url"],
            "REDIS_CACHE_URL": running["cache_url"],
            "METRICS_TOKEN": METRICS_TOKEN,
            "LC_ALL": "C.UTF-8",
            "COLUMNS": str(UNBROKEN),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def valkey(self, *words: str) -> str:
        """Send a command to the cache server."""
        return self.system.command("valkey", *words).stdout

    def sql(self, statement: str) -> None:
        """Do something to the database."""

        async def run() -> None:
            connection = await asyncpg.connect(self.database_url.replace("+asyncpg", ""))
            await connection.execute(statement)
            await connection.close()

        asyncio.run(run())

    def read(self) -> str:
        """Ask for a list; return what became of it."""
        return str(
            httpx2.get(f"{self.system.base}/api/accounts", headers=self.user).headers[
                "cache-status"
            ]
        )

    def write(self) -> None:
        """Make an account."""
        httpx2.post(
            f"{self.system.base}/api/accounts", headers=self.user, json={"name": "New"}
        ).raise_for_status()

    def wrong(self, part: str) -> list[str]:
        """Run the commands of a part of a page; return what does not print what it says."""
        asked = commands(part)
        script = "".join(f"{command}\nprintf '{END}'\n" for command, _ in asked)
        done = subprocess.run(
            ["bash"],
            input=script,
            env=self.environment,
            cwd=self.work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        printed = done.stdout.replace("\r", "").split(END)
        return [
            f"$ {command}\n{got}--- but the page says:\n{expected}"
            for (command, expected), got in zip(asked, printed, strict=False)
            if not fits(got, expected)
        ]

    def freeze(self, number: signal.Signals) -> None:
        """Stop the cache server's process, or have it go on."""
        os.kill(self.server, number)

    def until(self, there: Callable[[], bool]) -> None:
        """Wait for a state of the system."""
        deadline = time.monotonic() + 60
        while not there():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("system")
    system = System(folder / "data", METRICS_TOKEN=METRICS_TOKEN)
    try:
        yield Stage(system.ready(), folder)
    finally:
        system.end()


def root(stage: Stage) -> dict[str, str]:
    return {"authorization": f"Bearer {stage.environment['RESPCACHE_TOKEN']}"}


def switch(stage: Stage, **body: bool | str) -> None:
    httpx2.post(
        f"{stage.system.base}/cache/api/switch", json=body, headers=root(stage)
    ).raise_for_status()


def write_without_a_trace(stage: Stage) -> None:
    stage.sql("""
        BEGIN;
        UPDATE accounts SET name = 'unheard of ' || id
        WHERE tenant_id = (SELECT id FROM tenants WHERE slug = 'acme');
        DELETE FROM respcache_outbox WHERE xid = pg_current_xact_id();
        COMMIT
    """)
    stage.until(lambda: stage.read() != "" and found(stage))


def found(stage: Stage) -> bool:
    overview = httpx2.get(f"{stage.system.base}/cache/api/overview", headers=root(stage)).json()
    return bool(overview["findings"])


def fill_up(stage: Stage) -> None:
    stage.valkey("CONFIG", "SET", "maxmemory-policy", "noeviction")
    stage.valkey("CONFIG", "SET", "maxmemory", "1mb")
    stage.write()
    stage.until(lambda: "detail=no-lease" in stage.read())


def make_room(stage: Stage) -> None:
    stage.valkey("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    stage.valkey("CONFIG", "SET", "maxmemory", "512mb")


def take_the_server_away(stage: Stage) -> None:
    stage.freeze(signal.SIGSTOP)
    stage.until(lambda: health(stage)["cache"] == "down")


def lose_the_outbox(stage: Stage) -> None:
    stage.sql("ALTER TABLE respcache_outbox RENAME TO gone")
    stage.until(lambda: not health(stage)["lease_alive"])


def disable_a_trigger(stage: Stage) -> None:
    stage.sql("ALTER TABLE accounts DISABLE TRIGGER respcache_insert")
    stage.until(lambda: "detail=no-trigger" in stage.read())


def evict(stage: Stage) -> None:
    """More is stored than there is room for."""
    stage.valkey("CONFIG", "SET", "maxmemory", "64mb")
    fill = "for i = 1, 4000 do redis.call('SET', 'foreign:' .. i, string.rep('x', 20000)) end"
    stage.valkey("EVAL", fill, "0")
    stage.until(lambda: "evicted_keys:0" not in stage.valkey("INFO", "stats"))


def stop_evicting(stage: Stage) -> None:
    stage.valkey("CONFIG", "SET", "maxmemory", "512mb")
    stage.valkey("FLUSHALL")


def ask_for_what_nobody_asked_for(stage: Stage) -> None:
    for number in range(30):
        answer = httpx2.get(
            f"{stage.system.base}/api/accounts?search=new-{time.monotonic_ns()}-{number}",
            headers=stage.user,
        )
        assert "hit" not in answer.headers["cache-status"]


def lose_a_worker(stage: Stage) -> None:
    """Another one starts, is seen, and dies without a word."""
    environment = {**stage.environment, "PORT": str(free_port())}
    with subprocess.Popen(
        [*PATIENT, "serve"], env=environment, stdout=subprocess.DEVNULL
    ) as worker:
        try:
            stage.until(lambda: workers(stage) == 2)
        finally:
            worker.kill()


def workers(stage: Stage) -> int:
    metrics = httpx2.get(
        f"{stage.system.base}/metrics", headers={"authorization": f"Bearer {METRICS_TOKEN}"}
    ).text
    return len(re.findall("^respcache_worker_info{", metrics, re.MULTILINE))


def health(stage: Stage) -> dict[str, Any]:
    return dict(httpx2.get(f"{stage.system.base}/api/system/health").json()["data"])


def nothing(stage: Stage) -> None:
    """For pages that look at figures which are there all the time."""


BROKEN: dict[str, tuple[Callable[[Stage], None], Callable[[Stage], None]]] = {
    "RespcacheSwitchedOff": (lambda stage: switch(stage, off=True), nothing),
    "RespcacheMemoryNearlyFull": (fill_up, make_room),
    "RespcachePendingInvalidations": (fill_up, make_room),
    "RespcacheStoreErrors": (fill_up, make_room),
    "RespcacheEvictionsHigh": (evict, stop_evicting),
    "RespcacheMissesSurge": (ask_for_what_nobody_asked_for, nothing),
    "RespcacheHitRatioCollapsed": (ask_for_what_nobody_asked_for, nothing),
    "RespcacheWorkerMissing": (lose_a_worker, nothing),
    "RespcacheRelayFailing": (
        lose_the_outbox,
        lambda stage: stage.sql("ALTER TABLE gone RENAME TO respcache_outbox"),
    ),
    "RespcacheStoreDown": (take_the_server_away, lambda stage: stage.freeze(signal.SIGCONT)),
    "RespcacheServingLeaseLost": (
        lose_the_outbox,
        lambda stage: stage.sql("ALTER TABLE gone RENAME TO respcache_outbox"),
    ),
    "RespcacheTablesUnwatched": (
        disable_a_trigger,
        lambda stage: stage.sql("ALTER TABLE accounts ENABLE ALWAYS TRIGGER respcache_insert"),
    ),
    "RespcacheWrongResponse": (
        write_without_a_trace,
        lambda stage: switch(stage, off=False, module="accounts"),
    ),
}
"""What makes the condition of an alert true, and what ends it where the page has no command for
that. RespcacheNotScraped has none: what is wrong then is on the side of Prometheus."""


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(path.stem for path in RUNBOOKS.glob("*.md")))
def test_every_command_of_a_runbook_prints_what_it_says(stage: Stage, name: str) -> None:
    """While the condition of its alert is true, and after it was mended as the page says."""
    breaks, mends = BROKEN.get(name, (nothing, nothing))
    seen, mended = (RUNBOOKS / f"{name}.md").read_text().split(MENDED)
    stage.until(lambda: "hit" in stage.read())
    try:
        breaks(stage)
        assert stage.wrong(seen) == []
    finally:
        mends(stage)
    stage.until(lambda: "detail" not in stage.read())
    if name == "RespcacheTablesUnwatched":  # the page ends with a miss
        stage.write()
    assert stage.wrong(mended) == []
