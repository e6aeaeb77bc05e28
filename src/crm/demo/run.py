"""``make demo``: the whole system, with traffic, outages of the cache server, and a live report.

The application runs in a process of its own. In this process, one thread sends the traffic, and
the main thread breaks the cache server and writes to the console. The data is in the folder
``demo`` of the data folder and is new in each run; secrets, and so browser sessions, are kept.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from crm.cli.launch import Launched, launched, port_to_serve
from crm.cli.running import CommandFailed
from crm.demo.counters import DemoCounters, span
from crm.demo.seed import PASSWORD, SMALL_TENANTS, TENANTS
from crm.demo.traffic import DEADLINE_S, Traffic, visitors
from crm.settings import Settings
from respcache.testing.servers import EmbeddedServer, EmbeddedValkey, ServerFailed

ALL_TENANTS = TENANTS | SMALL_TENANTS
VALKEY_SETTINGS = {"save": "86400 1000000"}
"""Makes a restarted Valkey restore its data: the dashboard's charts, and old entries, which are
never served."""

BEGINS = """\
The cache server is {kind} for {length:g} s: every response comes from the database, none fails.
On the dashboard: bypasses replace hits; the cache server is down, the circuit breaker is open, the
serving lease has expired."""
ENDS = {
    "stopped": """\
The cache server is started again, with its old data. No old entry is served: hits return as lists
are requested. In the chart of requests, the outage remains as a grey hill.""",
    "frozen": """\
The cache server continues, and has missed all writes. The missed invalidations are applied first;
then unchanged responses are hits again.""",
}

VALKEY_PORT = 6390
"""A port that other programs are unlikely to use while the cache server is stopped."""

PORT_IN_USE = (
    "Another program uses the port of the cache server: the outage lasts until the port is free."
)
VISITORS = 5
"""Users per tenant: its admin, an employee, its manager and two more. In hierarchical tenants they
see different rows."""

RETRY_S = 2.0
STEP_S = 0.25
LINE_S = 10.0
"""Time between two lines if the output is no terminal; a terminal has one line that changes."""

KEEPALIVE_S = 2.0
"""Idle connections are closed after this time; the server closes them after 5 s."""

Say = Callable[[str, str], None]
"""Prints a text (second) in a style of rich (first)."""


class EmbeddedCrm(EmbeddedServer):
    """The application, in a process of its own, on running servers."""

    name = "crm"

    def __init__(
        self, directory: Path, base: str, *, port: int, environment: Mapping[str, str]
    ) -> None:
        super().__init__(directory, port=port)
        self._base = base
        self._environment = environment

    def start(self) -> "EmbeddedCrm":
        """Start and wait until it responds. Raises ``ServerFailed``."""
        with self.log_path.open("wb") as log:
            self._spawn(
                [sys.executable, "-m", "crm", "serve"], log=log, environment=self._environment
            )
        self._await(self._answers)
        return self

    def _answers(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"{self._base}/api/system/health", timeout=2).status_code == 200
        return False


class Outages:
    """Breaks the cache server periodically: stopped and frozen in turn."""

    def __init__(
        self,
        valkey: EmbeddedValkey,
        counters: DemoCounters,
        *,
        first_s: float,
        every_s: float,
        length_s: float,
    ) -> None:
        self._valkey = valkey
        self._counters = counters
        self._every_s = every_s
        self._length_s = length_s
        self._next = time.monotonic() + first_s
        self._until = 0.0
        self._port_in_use = False

    def step(self, say: Say) -> None:
        """Begin or end an outage if it is time to."""
        now, counters = time.monotonic(), self._counters
        if counters.outage and now >= self._until:
            self._end(counters.outages[-1], say)
        elif not counters.outage and now >= self._next:
            kind = ("stopped", "frozen")[len(counters.outages) % 2]
            self._until, self._next = now + self._length_s, now + max(self._every_s, self._length_s)
            counters.outages.append(kind)
            counters.outage = True
            (self._valkey.stop if kind == "stopped" else self._valkey.freeze)()
            say("yellow", BEGINS.format(kind=kind, length=self._length_s))

    def _end(self, kind: str, say: Say) -> None:
        try:
            (self._valkey.start if kind == "stopped" else self._valkey.thaw)()
        except ServerFailed as error:
            if "already in use" not in str(error):
                raise
            self._until = time.monotonic() + RETRY_S
            if not self._port_in_use:
                say("bold red", PORT_IN_USE)
            self._port_in_use = True
        else:
            self._counters.outage = self._port_in_use = False
            say("green", ENDS[kind])


@dataclass(frozen=True)
class DemoRun:
    """What the steps of a run share."""

    console: Console
    options: argparse.Namespace
    system: Launched
    port: int
    counters: DemoCounters

    @property
    def base(self) -> str:
        """The URL of the application."""
        host = self.system.settings.host
        return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.port}"


def run_demo(options: argparse.Namespace) -> int:
    """Run until Ctrl-C or for the given minutes.

    Return the exit status: 1 if a request failed or a response was stale.
    """
    console = Console(stderr=options.json, highlight=False, soft_wrap=True)
    with contextlib.redirect_stdout(console.file):
        counters = _run(console, options)
        summary = counters.summary()
        if not options.json:
            _print_summary(console, summary)
    if options.json:
        print(json.dumps(summary))
    return 0 if counters.right else 1


def _run(console: Console, options: argparse.Namespace) -> DemoCounters:
    settings = _settings()
    port = port_to_serve(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console.print("starting ...")
    with launched(
        settings,
        port,
        tenants=ALL_TENANTS,
        fresh=True,
        valkey=VALKEY_SETTINGS,
        valkey_port=VALKEY_PORT,
    ) as system:
        run = DemoRun(console, options, system, port, DemoCounters())
        with _application(run) as crm:
            _print_greeting(run)
            with contextlib.suppress(KeyboardInterrupt), _traffic(run) as thread:
                _watch(run, crm, thread)
            run.counters.end()
            console.print("stopping ...")
            return run.counters


def _settings() -> Settings:
    settings = Settings()
    given = [
        name.upper()
        for name in ("database_url", "redis_cache_url")
        if getattr(settings, name) is not None
    ]
    if given:
        raise CommandFailed(
            f"the demo breaks servers, so it starts its own: unset {' and '.join(given)}"
        )
    if settings.environment == "production":
        raise CommandFailed(
            "the demo has known passwords, so it does not run in production: unset ENVIRONMENT"
        )
    return settings.model_copy(update={"data_dir": settings.data_dir / "demo"}).with_secrets()


@contextlib.contextmanager
def _application(run: DemoRun) -> Iterator[EmbeddedCrm]:
    assert run.system.cache_url is not None
    folder = run.system.settings.data_dir.resolve()
    own = {
        "DATABASE_URL": run.system.database_url,
        "REDIS_CACHE_URL": run.system.cache_url,
        "DATA_DIR": str(folder),
        "PORT": str(run.port),
    }
    crm = EmbeddedCrm(folder, run.base, port=run.port, environment={**os.environ, **own})
    try:
        yield crm.start()
    finally:
        crm.stop()


@contextlib.contextmanager
def _traffic(run: DemoRun) -> Iterator[threading.Thread]:
    """Send traffic from a thread until the block ends."""
    secret = run.system.settings.jwt_secret
    assert secret is not None
    found = asyncio.run(visitors(run.system.database_url, secret.get_secret_value()))
    users = {slug: found[slug][:VISITORS] for slug in ALL_TENANTS}
    loop = asyncio.new_event_loop()
    client = httpx2.AsyncClient(
        base_url=run.base,
        timeout=DEADLINE_S,
        limits=httpx2.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
        trust_env=False,
    )
    options = run.options
    traffic = Traffic(client, users, run.counters, rate=options.rate, seed=options.seed)

    async def send() -> None:
        async with client:
            await traffic.run()

    thread = threading.Thread(target=lambda: loop.run_until_complete(send()), name="traffic")
    thread.start()
    try:
        yield thread
    finally:
        loop.call_soon_threadsafe(traffic.stop)
        thread.join()
        loop.close()


def _outages(run: DemoRun) -> Outages | None:
    if run.options.no_outage:
        return None
    assert run.system.valkey is not None
    return Outages(
        run.system.valkey,
        run.counters,
        first_s=run.options.first_outage,
        every_s=run.options.outage_every,
        length_s=run.options.outage_seconds,
    )


def _watch(run: DemoRun, crm: EmbeddedCrm, thread: threading.Thread) -> None:
    """Report and begin outages until the minutes are over. Raises ``CommandFailed``."""
    console, counters, minutes = run.console, run.counters, run.options.minutes
    outages = _outages(run)
    ends = time.monotonic() + 60 * minutes if minutes else None
    line_at, printed = time.monotonic() + LINE_S, 0

    def say(style: str, text: str) -> None:
        console.print(Text(f"\n{span(counters.seconds)}  {text}\n", style))

    with (
        Live(console=console, auto_refresh=False, transient=True)
        if console.is_terminal
        else contextlib.nullcontext() as live
    ):
        while ends is None or time.monotonic() < ends:
            if not crm.running or not thread.is_alive():
                raise CommandFailed(f"the application ended by itself: see {crm.log_path}")
            if outages is not None:
                outages.step(say)
            for problem in list(counters.problems)[printed:]:
                console.print(Text(problem, "bold red"))
            printed = len(counters.problems)
            if live is not None:
                live.update(_line(counters), refresh=True)
            elif time.monotonic() >= line_at:
                line_at += LINE_S
                console.print(_line(counters))
            time.sleep(STEP_S)


def _line(counters: DemoCounters) -> Text:
    style = "yellow" if counters.outage else "" if counters.right else "bold red"
    return Text(f"{counters.line()}{'   OUTAGE' if counters.outage else ''}", style)


def _print_greeting(run: DemoRun) -> None:
    options = run.options
    outages = (
        f"after {options.first_outage:g} s, then every {options.outage_every:g} s, for "
        f"{options.outage_seconds:g} s"
    )
    run.console.print(
        f"""
  Open        http://localhost:{run.port}/cache     sign in: root@crm.example, {PASSWORD}
              (for the view of a tenant's admin: admin@acme.example, the same password)
  Traffic     about {options.rate:g} requests per second in {len(ALL_TENANTS)} tenants; every \
response is checked
  Outages     {"none" if options.no_outage else outages}
  Data, logs  {run.system.settings.data_dir.resolve()}

  Ctrl-C stops it and prints a summary.
"""
    )


def _print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", "requests", "p50 ms", "p95 ms", "max ms"):
        table.add_column(name, justify="left" if not name else "right")
    names = {"hit": "hits", "database": "from the database", "write": "writes"}
    for when, times in (("", summary["times"]), (", in an outage", summary["times_in_outages"])):
        for source, name in names.items():
            row = times[source]
            if row["count"]:
                cells = [f"{row[key]:,.1f}" for key in ("p50_ms", "p95_ms", "max_ms")]
                table.add_row(f"{name}{when}", f"{row['count']:,}", *cells)
    ratio = "-" if summary["hit_ratio"] is None else f"{100 * summary['hit_ratio']:.0f} %"
    console.print(
        f"\n{span(summary['seconds'])} min, {summary['requests']:,} requests, hit ratio {ratio}\n"
    )
    console.print(table)
    console.print(f"\noutages: {', '.join(summary['outages']) or 'none'}")
    console.print(", ".join(f"{kind} {count:,}" for kind, count in summary["kinds"].items()))
    for problem in summary["problems"]:
        console.print(Text(problem, "bold red"))
    console.print(
        f"failed {summary['failed']}, in outages {summary['failed_in_outages']}; stale "
        f"{summary['stale']} (compared {summary['compared']:,} times with a written record)",
        style="bold green" if not (summary["failed"] or summary["stale"]) else "bold red",
    )
