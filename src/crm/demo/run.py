"""``make demo``: the whole system with traffic and outages of the cache's server, and what comes of
it said while it runs.

The application is a process of its own. This one sends the traffic, from a thread, and its main
thread breaks the server and writes to the console. Data lives in the folder ``demo`` of the data
folder, and begins anew each time; secrets stay, and so do sessions of browsers.
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
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from crm.cli.launch import CommandFailed, Launched, launched, port_to_serve
from crm.demo.counters import DemoCounters, span
from crm.demo.seed import PASSWORD, SMALL_TENANTS, TENANTS
from crm.demo.traffic import DEADLINE_S, Traffic, people
from crm.settings import Settings
from respcache.testing.servers import EmbeddedServer, EmbeddedValkey, ServerFailed

EVERY_TENANT = TENANTS | SMALL_TENANTS
SAVED = {"save": "86400 1000000"}
"""Has a Valkey that was stopped come back with what it held: the dashboard's charts, and old
answers, which nobody is served."""

BEGINS = """The cache's server is {word} for {length:g} s: every answer comes from the database, and nothing fails.
On the dashboard: bypasses take the place of hits; the cache server is away, the breaker open, the fence lost."""
ENDS = {
    "stopped": """The cache's server is started again, with what it held before. Nobody is served any of that: hits come back as
lists are asked for. In the chart of requests the outage stays as a grey hill.""",
    "frozen": """The cache's server goes on, and knows nothing of what was written meanwhile. That is made up for first; then what
nobody changed is a hit again.""",
}

VALKEY_PORT = 6390
"""One that nobody else begins to use while the server is stopped."""

TAKEN = (
    "Another program has taken the port of the cache's server: the outage lasts until it is free "
    "again."
)
PEOPLE = 5
"""Of each tenant: its admin, an employee, its manager and two more. In some of the tenants each
sees other rows."""

AGAIN_S = 2.0
LOOK_S = 0.25
LINE_S = 10.0
"""Between two lines where nobody looks: a terminal has one that changes."""

KEPT_ALIVE_S = 2.0
"""Connections that rest longer are not used again: the server closes them after 5 s."""


class EmbeddedCrm(EmbeddedServer):
    """The application, on servers that run."""

    name = "crm"

    def __init__(
        self, directory: Path, base: str, *, port: int, environment: Mapping[str, str]
    ) -> None:
        super().__init__(directory, port=port)
        self._base = base
        self._environment = environment

    def start(self) -> "EmbeddedCrm":
        """Start and return when it answers. Raises ``ServerFailed``."""
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
    """Breaks the cache's server for a while, again and again: stopped and frozen in turn."""

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
        self._taken = False

    def step(self, say: Callable[[str, str], None]) -> None:
        """Begin or end an outage if it is time to."""
        now, counters = time.monotonic(), self._counters
        if counters.outage and now >= self._until:
            self._end(counters.outages[-1], say)
        elif not counters.outage and now >= self._next:
            word = ("stopped", "frozen")[len(counters.outages) % 2]
            self._until, self._next = now + self._length_s, now + max(self._every_s, self._length_s)
            counters.outages.append(word)
            counters.outage = True
            (self._valkey.stop if word == "stopped" else self._valkey.freeze)()
            say("yellow", BEGINS.format(word=word, length=self._length_s))

    def _end(self, word: str, say: Callable[[str, str], None]) -> None:
        try:
            (self._valkey.start if word == "stopped" else self._valkey.thaw)()
        except ServerFailed as error:
            if "already in use" not in str(error):
                raise
            self._until = time.monotonic() + AGAIN_S
            if not self._taken:
                say("bold red", TAKEN)
            self._taken = True
        else:
            self._counters.outage = self._taken = False
            say("green", ENDS[word])


def run_demo(options: argparse.Namespace) -> int:
    """Run until Ctrl-C or for the minutes that were asked for; return 1 if a request failed or an
    answer was stale."""
    console = Console(stderr=options.json, highlight=False, soft_wrap=True)
    with contextlib.redirect_stdout(console.file):
        counters = _run(console, options)
        summary = counters.summary()
        if not options.json:
            _show(console, summary)
    if options.json:
        print(json.dumps(summary))
    return 0 if counters.right else 1


def _run(console: Console, options: argparse.Namespace) -> DemoCounters:
    settings = _settings()
    port = port_to_serve(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console.print("starting ...")
    with (
        launched(
            settings, port, tenants=EVERY_TENANT, fresh=True, valkey=SAVED, valkey_port=VALKEY_PORT
        ) as system,
        _application(system, port) as crm,
    ):
        counters = DemoCounters()
        _say_hello(console, system, port, options)
        with (
            contextlib.suppress(KeyboardInterrupt),
            _traffic(system, _base(settings, port), counters, options) as thread,
        ):
            _watch(console, crm, thread, counters, _outages(system, counters, options), options)
        counters.end()
        console.print("stopping ...")
        return counters


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


def _base(settings: Settings, port: int) -> str:
    return f"http://{'127.0.0.1' if settings.host == '0.0.0.0' else settings.host}:{port}"


@contextlib.contextmanager
def _application(system: Launched, port: int) -> Iterator[EmbeddedCrm]:
    assert system.cache_url is not None
    folder = system.settings.data_dir.resolve()
    ours = {
        "DATABASE_URL": system.database_url,
        "REDIS_CACHE_URL": system.cache_url,
        "DATA_DIR": str(folder),
        "PORT": str(port),
    }
    crm = EmbeddedCrm(
        folder, _base(system.settings, port), port=port, environment={**os.environ, **ours}
    )
    try:
        yield crm.start()
    finally:
        crm.stop()


@contextlib.contextmanager
def _traffic(
    system: Launched, base: str, counters: DemoCounters, options: argparse.Namespace
) -> Iterator[threading.Thread]:
    """Send traffic from a thread of its own, until the block ends."""
    secret = system.settings.jwt_secret
    assert secret is not None
    found = asyncio.run(people(system.database_url, secret.get_secret_value()))
    users = {slug: found[slug][:PEOPLE] for slug in EVERY_TENANT}
    loop = asyncio.new_event_loop()
    limits = httpx2.Limits(max_connections=None, keepalive_expiry=KEPT_ALIVE_S)
    client = httpx2.AsyncClient(base_url=base, timeout=DEADLINE_S, limits=limits, trust_env=False)
    traffic = Traffic(client, users, counters, rate=options.rate, seed=options.seed)

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


def _outages(
    system: Launched, counters: DemoCounters, options: argparse.Namespace
) -> Outages | None:
    if options.no_outage:
        return None
    assert system.valkey is not None
    times = {
        "first_s": options.first_outage,
        "every_s": options.outage_every,
        "length_s": options.outage_seconds,
    }
    return Outages(system.valkey, counters, **times)


def _watch(
    console: Console, crm: EmbeddedCrm, thread: threading.Thread, counters: DemoCounters, outages: Outages | None,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Say how things are, break the server when it is time to; return when the minutes are over."""
    ends = time.monotonic() + 60 * options.minutes if options.minutes else None
    line_at, told = time.monotonic() + LINE_S, 0

    def say(style: str, text: str) -> None:
        console.print(Text(f"\n{span(counters.seconds)}  {text}\n", style))

    with (
        Live(console=console, auto_refresh=False, transient=True)
        if console.is_terminal
        else contextlib.nullcontext() as live
    ):
        while ends is None or time.monotonic() < ends:
            if not crm.running or not thread.is_alive():
                raise CommandFailed(f"the application ended by itself: {crm.log_path} says why")
            if outages is not None:
                outages.step(say)
            for problem in list(counters.problems)[told:]:
                console.print(Text(problem, "bold red"))
            told = len(counters.problems)
            if live is not None:
                live.update(_line(counters), refresh=True)
            elif time.monotonic() >= line_at:
                line_at += LINE_S
                console.print(_line(counters))
            time.sleep(LOOK_S)


def _line(counters: DemoCounters) -> Text:
    style = "yellow" if counters.outage else "" if counters.right else "bold red"
    return Text(f"{counters.line()}{'   OUTAGE' if counters.outage else ''}", style)


def _say_hello(console: Console, system: Launched, port: int, options: argparse.Namespace) -> None:
    broken = "never" if options.no_outage else (
        f"after {options.first_outage:g} s, then every {options.outage_every:g} s, for "
        f"{options.outage_seconds:g} s"
    )  # fmt: skip
    console.print(
        f"""
  Look at     http://localhost:{port}/cache     sign in: root@crm.example, {PASSWORD}
              (what an admin of one tenant sees: admin@acme.example, the same password)
  Traffic     about {options.rate:g} requests a second of {len(EVERY_TENANT)} tenants; every answer is checked by what was written
  Outages     {broken}
  Data, logs  {system.settings.data_dir.resolve()}

  Ctrl-C ends it and sums up.
"""
    )


def _show(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the summary for people."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", "requests", "p50 ms", "p95 ms", "max ms"):
        table.add_column(name, justify="left" if not name else "right")
    for when, times in (("", summary["times"]), (", in an outage", summary["times_in_outages"])):
        for way, name in (("hit", "hits"), ("database", "from the database"), ("write", "writes")):
            counters = times[way]
            if counters["count"]:
                cells = [f"{counters[key]:,.1f}" for key in ("p50_ms", "p95_ms", "max_ms")]
                table.add_row(f"{name}{when}", f"{counters['count']:,}", *cells)
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
        f"{summary['stale']} "
        f"({summary['compared']:,} times a record that was written here was looked for in an "
        f"answer)",
        style="bold green" if not (summary["failed"] or summary["stale"]) else "bold red",
    )
