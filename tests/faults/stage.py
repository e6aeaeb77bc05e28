"""Everything that takes part: PostgreSQL, a Valkey and its replica, the processes, and the links
between them.

Each process has links of its own to both servers. The servers and processes run in sessions of
their own, end when we die, and are told by the process ids that we started.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from math import ceil, floor
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import redis.asyncio

from crm.migrations import upgrade
from respcache.read.verifier import FOUND
from respcache.testing.history import now
from respcache.testing.servers import EmbeddedPostgres, EmbeddedValkey, ServerFailed

from .proxy import Link, Links
from .registers import SECRET, furnish
from .worker import Orders

ROOT = Path(__file__).parents[2]
DATABASE = "crm"
HISTORY = "history"
SAYS_ALARM = FOUND
PASSWORD = "only for faults"
LASTING_PORTS = range(20_000, 32_000)
"""Below those that systems give to outgoing connections."""

START_S = 60.0
END_S = 90.0
ASK_S = 10.0
INSIST_S = 30.0
RECOVERY_S = 1.0
"""After the database is back: what a process on a busy machine may take to read that its
connections were closed."""

STORE_PASSWORD = "only-for-faults"
VALKEY = {
    "save": '""',
    "repl-diskless-sync-delay": "0",
    "maxmemory": "64mb",
    "maxmemory-policy": "allkeys-lru",
    "user": f"deaf on >{STORE_PASSWORD} ~* +@all resetchannels",
}


@dataclass
class Plan:
    """How many of what, and how eager. The last of ``names`` is a server of its own that is asked
    over HTTP.

    Of the others every second one answers hits below ASGI, the server in every second run, by the
    seed; one that is alone does. About half of all have no right to hear of bumps or to tell of
    them.
    """

    names: tuple[str, ...] = ("one", "two", "server")
    readers: int = 12
    writers: int = 1
    pause_s: float = 0.0002
    sabotage: str | None = None

    def below(self, seed: str) -> set[str]:
        """Choose the processes that answer hits below ASGI."""
        randomness = random.Random(f"{seed}/below ASGI")
        *workers, server = self.names
        chosen = set(randomness.sample(workers, len(workers) // 2))
        return chosen | {server} if not workers or randomness.random() < 0.5 else chosen

    def deaf(self, seed: str) -> set[str]:
        """Choose the processes without the right to hear of bumps."""
        randomness, half = random.Random(f"{seed}/deaf"), len(self.names) / 2
        return set(randomness.sample(self.names, randomness.randint(floor(half), ceil(half))))


@dataclass
class Problem:
    """A request that did not end as it should have."""

    process: str
    start: float
    end: float
    what: str


@dataclass
class Seat:
    """The place of a process: its links, and what it told. Whoever sits there may die and be
    replaced."""

    name: str
    store_link: Link
    database_link: Link
    away: list[tuple[float, float]] = field(default_factory=list)
    """When the database (or the whole process, for those who ask it over HTTP) could not be
    reached."""
    frozen: list[tuple[float, float]] = field(default_factory=list)
    """When the process itself was stopped."""

    def excuses(self) -> list[tuple[float, float]]:
        """Return when requests may fail: a process that slept through the end of an outage finds
        out when it wakes up."""
        return [
            (
                begin,
                max(
                    [
                        end,
                        *(
                            woken + RECOVERY_S
                            for asleep, woken in self.frozen
                            if asleep <= end and begin <= woken
                        ),
                    ]
                ),
            )
            for begin, end in self.away
        ]


class Worker:
    """Clients in a process (``worker.py``). It is started again whenever it dies."""

    def __init__(self, stage: "Stage", orders: Orders) -> None:
        self.orders = orders
        self.lives = 0
        self.counters: dict[str, Any] = {}
        self.process: asyncio.subprocess.Process | None = None
        self.exited = asyncio.Event()
        self._stage = stage
        self._ending = False
        self._past: Counter[str] = Counter()
        self._watching: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Whose place it has."""
        return self.orders.name

    async def start(self) -> None:
        """Start it; returns when it reads."""
        await self._launch()
        self._watching = asyncio.create_task(self._watch())
        async with asyncio.timeout(START_S):
            while not self.counters.get("reads"):
                await asyncio.sleep(0.05)

    def order(self, **what: Any) -> None:
        """Send an order."""
        if (
            self.process is not None
            and self.process.stdin is not None
            and self.process.returncode is None
        ):
            with contextlib.suppress(OSError):
                self.process.stdin.write(json.dumps(what).encode() + b"\n")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that lives now."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def end(self) -> None:
        """Let it finish what it does and end."""
        self._ending = True
        self.order(end=True)
        try:
            async with asyncio.timeout(END_S):
                if self._watching is not None:
                    await self._watching
        finally:
            self.signal(signal.SIGKILL)

    def total(self, what: str) -> int:
        """Add up a figure over all lives, as far as it was reported."""
        return self._past[what] + self._figure(what)

    def _figure(self, what: str) -> int:
        return int(self.counters.get(what, 0))

    async def _launch(self) -> None:
        with (self._stage.folder / f"{self.name}.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.faults.worker",
                cwd=ROOT,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                env=_environment(),
                limit=2**24,
            )
        self.lives += 1
        self.exited = asyncio.Event()
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(self.orders) + b"\n")

    async def _watch(self) -> None:
        while True:
            process = self.process
            assert process is not None
            assert process.stdout is not None
            while line := await process.stdout.readline():
                if line.endswith(b"\n"):
                    self.counters = json.loads(line)
                    self._stage.alarms.update(self.counters["alarms"])
                    self._stage.problems += [
                        Problem(self.name, *problem) for problem in self.counters["problems"]
                    ]
            status = await process.wait()
            self.exited.set()
            if self._ending:
                return
            if status != -signal.SIGKILL:
                self._stage.broken.append(
                    f"{self.name} ended with status {status}: {self._stage.tail(self.name)}"
                )
                return
            for what in ("reads", "writes", "hits"):
                self._past[what] += self._figure(what)
            self.counters = {}
            await self._launch()


class Server:
    """``python -m crm serve`` of an application with several levels (``ways.py``). ``below``: hits
    are answered below ASGI."""

    def __init__(self, stage: "Stage", seat: Seat, *, below: bool) -> None:
        self.port = lasting_port()
        self.process: asyncio.subprocess.Process | None = None
        self._stage = stage
        self._seat = seat
        self._below = below

    async def start(self) -> None:
        """Start it; returns when it answers."""
        environment = _environment() | {
            "DATABASE_URL": self._stage.database_url(self._seat),
            "REDIS_CACHE_URL": self._stage.store_url(self._seat),
            "JWT_SECRET": SECRET,
            "RESPCACHE_KEY": SECRET,
            "PORT": str(self.port),
            "LOG_LEVEL": "error",
            "DATA_DIR": str(self._stage.folder / "server"),
        }
        sabotage = self._stage.plan.sabotage
        if sabotage is not None:
            environment["RESPCACHE_AUDIT_SHARE"] = "0"  # it would mend what is broken on purpose
        options = ["--turbo"] if self._below else []
        options += [] if sabotage is None else ["--sabotage", sabotage]
        with (self._stage.folder / "server.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.faults.ways",
                *options,
                cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                env=environment,
            )
        async with asyncio.timeout(START_S):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                if self.process.returncode is not None:
                    raise RuntimeError(
                        f"the server ended with status {self.process.returncode}: "
                        f"{self._stage.tail('server')}"
                    )
                await asyncio.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def kill(self) -> None:
        """Let it die (SIGKILL)."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()


class Stage:
    """What the faults act upon. Made by ``stage``."""

    def __init__(self, folder: Path, links: Links, plan: Plan, *, seed: str) -> None:
        self.folder = folder
        self.plan = plan
        self.problems: list[Problem] = []
        self.alarms: set[str] = set()
        """What the caches' own audits found."""
        self.broken: list[str] = []
        self.postgres = EmbeddedPostgres(
            folder / "postgres", password=PASSWORD, port=lasting_port(), durable=False
        )
        self.master, self.replica = (
            EmbeddedValkey(
                folder / name, port=lasting_port(), password=STORE_PASSWORD, settings=VALKEY
            )
            for name in ("valkey1", "valkey2")
        )
        self.replication = links.add(self.master.port)
        self.seats = {
            name: Seat(name, links.add(self.master.port), links.add(self.postgres.port))
            for name in plan.names
        }
        self.below, self.deaf = plan.below(seed), plan.deaf(seed)
        self.server = Server(self, self.seats[plan.names[-1]], below=plan.names[-1] in self.below)
        self.workers = {
            name: Worker(self, self._orders(name, share, seed))
            for share, name in enumerate(plan.names)
        }

    @property
    def history(self) -> Path:
        """The file to which everybody adds."""
        return self.folder / HISTORY

    @property
    def settled(self) -> Path:
        """The file behind ``Settled``."""
        return self.folder / "settled"

    def database_url(self, seat: Seat) -> str:
        """Where a process finds the database."""
        return self.postgres.url(DATABASE).replace(
            f":{self.postgres.port}/", f":{seat.database_link.port}/"
        )

    def store_url(self, seat: Seat) -> str:
        """Where a process finds the store."""
        url = self.master.url.replace(f":{self.master.port}/", f":{seat.store_link.port}/")
        return url.replace("//:", "//deaf:") if seat.name in self.deaf else url

    def total(self, what: str) -> int:
        """Add up what the processes reported."""
        return sum(worker.total(what) for worker in self.workers.values())

    def tail(self, name: str) -> str:
        """Return the end of a log."""
        with contextlib.suppress(OSError):
            return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
        return ""

    def server_alarms(self) -> set[str]:
        """Return what the audit of the server found: that is only in its log."""
        with contextlib.suppress(OSError):
            return {
                row
                for row in (self.folder / "server.log").read_text(errors="replace").splitlines()
                if SAYS_ALARM in row
            }
        return set()

    async def start_processes(self) -> None:
        """Start the server and the workers, all at the same time; returns when all read."""
        await asyncio.gather(
            self.server.start(), *(worker.start() for worker in self.workers.values())
        )

    @contextmanager
    def unavailable(self, names: Iterable[str]) -> Iterator[None]:
        """Excuse failures of these processes, until a moment after this ends."""
        begin = now()
        try:
            yield
        finally:
            for name in names:
                self.seats[name].away.append((begin, now() + RECOVERY_S))

    def unexcused(self) -> list[Problem]:
        """Return the problems for which there was no reason: the database could be reached all the
        time."""
        found = []
        for problem in self.problems:
            away = self.seats[problem.process].excuses()
            if not any(begin <= problem.end and problem.start <= end for begin, end in away):
                since = min(
                    (problem.start - end + RECOVERY_S for _, end in away if end < problem.start),
                    default=None,
                )
                when = "" if since is None else f" ({since:.2f} s after the database was back)"
                found.append(
                    Problem(problem.process, problem.start, problem.end, problem.what + when)
                )
        return found

    async def connect(self) -> Any:
        """Connect to the database directly."""
        return await asyncpg.connect(self.postgres.url(DATABASE).replace("+asyncpg", ""), timeout=5)

    async def ask_store(self, *words: Any, server: EmbeddedValkey | None = None) -> Any:
        """Send one command to the master (or another server), directly. Raises
        ``redis.RedisError``."""
        client = redis.asyncio.Redis.from_url(
            (server or self.master).url, socket_timeout=ASK_S, socket_connect_timeout=ASK_S
        )
        async with client:
            return await client.execute_command(*words)

    async def insist(self, *words: Any, server: EmbeddedValkey | None = None) -> Any:
        """Send one command to the master (or another server) until it succeeds: other faults may be
        in the way."""
        async with asyncio.timeout(INSIST_S):
            while True:
                with contextlib.suppress(redis.RedisError, OSError):
                    return await self.ask_store(*words, server=server)
                await asyncio.sleep(0.1)

    async def replicate(self) -> None:
        """Let the replica follow the master, through its link."""
        self.replication.move(self.master.port)
        await self.insist("REPLICAOF", "127.0.0.1", self.replication.port, server=self.replica)

    async def hits_again(self, *, most_s: float) -> float | None:
        """Wait until the cache serves again; return how long that took, None when it did not."""
        before, started = self.total("hits"), now()
        while now() - started < most_s:
            if self.total("hits") > before + 20:
                return now() - started
            await asyncio.sleep(0.05)
        return None

    def _orders(self, name: str, share: int, seed: str) -> Orders:
        plan, seat, last = self.plan, self.seats[name], name == self.plan.names[-1]
        return Orders(
            name,
            seed,
            str(self.history),
            str(self.settled),
            share,
            len(plan.names),
            readers=plan.readers // 3 if last else plan.readers,
            writers=plan.writers,
            pause_s=plan.pause_s * (10 if last else 1),
            base=self.server.port if last else None,
            below=name in self.below,
            database_url=self.database_url(seat),
            cache_url=self.store_url(seat),
            sabotage=plan.sabotage,
        )


@asynccontextmanager
async def stage(folder: Path, plan: Plan, *, seed: str) -> AsyncIterator[Stage]:
    """Start the servers that others stand on; stop all there is, whatever happens."""
    with Links() as links:
        made = Stage(folder, links, plan, seed=seed)
        try:
            await asyncio.to_thread(_start_servers, made)
            connection = await made.connect()
            await furnish(connection)
            await connection.close()
            await made.replicate()
            yield made
        finally:
            for worker in made.workers.values():
                worker.signal(signal.SIGKILL)
            made.server.signal(signal.SIGKILL)
            await asyncio.to_thread(_stop_servers, made)


def lasting_port() -> int:
    """Return a free port that no connection of anybody gets by chance while its server is down."""
    for port in random.sample(LASTING_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerFailed("no free port on 127.0.0.1")


def _start_servers(made: Stage) -> None:
    made.postgres.start()
    made.master.start()
    made.replica.start()
    asyncio.run(_make_database(made.postgres.url("postgres").replace("+asyncpg", "")))
    upgrade(made.postgres.url(DATABASE))


async def _make_database(url: str) -> None:
    """Make it, with commits that survive a crash of the server (though not of the machine)."""
    connection = await asyncpg.connect(url)
    await connection.execute(f"CREATE DATABASE {DATABASE}")
    await connection.execute(f"ALTER DATABASE {DATABASE} SET synchronous_commit = on")
    await connection.close()


def _stop_servers(made: Stage) -> None:
    for valkey in (made.master, made.replica):
        valkey.kill()
    made.postgres.remove()
    shutil.rmtree(made.folder / "postgres", ignore_errors=True)


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "PYTHONPATH", "HOME", "LANG", "TZ", "VIRTUAL_ENV")
    }


def _die_with_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
