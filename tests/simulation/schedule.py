"""One schedule: a small random world that lives for some leases, made from a seed. The same seed,
the same trace.

Processes are ``Cache`` objects with everything that belongs to them; only the store's server, the
database, the network and time are simulated. Readers call ``get_or_set`` or send requests, writers
do what the database hooks do, fate does the rest. What is drawn is drawn from one generator, in the
order of events.
"""

import asyncio
import logging
import random
import secrets
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

import respcache.core.serving_lease
import respcache.read.response_fill
import respcache.read.values
import respcache.runtime
import respcache.stores.memory
import respcache.writes.relay
import tests.simulation.database
from respcache.cache import Cache
from respcache.context import Exchange, current
from respcache.core import tokens
from respcache.core.identity import Claim, RequestHead, Scope, SingleTenant
from respcache.core.policy import Level, Policy
from respcache.core.serving_lease import DRIFT
from respcache.routing.table import Route
from respcache.writes.relay import OutboxRelay, Rows
from tests.simulation.database import NAME as DATABASE
from tests.simulation.database import (
    Database,
    DatabaseGone,
    SimulatedOutbox,
    Transaction,
    read_register,
)
from tests.simulation.loop import Host, VirtualLoop
from tests.simulation.oracle import Oracle, Register, Violation
from tests.simulation.world import Client, Server, World

SECRET = b"only-for-the-simulator"
MODULE = "items"
QUERIES: Mapping[str, Sequence[str]] = {
    "first": ("alpha",),
    "second": ("beta",),
    "both": ("alpha", "beta"),
}
"""What readers ask for, and the tables that the answer is made from."""

CLOCK_SPREAD = 0.0045
"""How much faster or slower than true time a host's clock may go: two of them differ by less than
``fence.DRIFT``."""


Commit = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Mix:
    """What may happen, with weights."""

    faults: Mapping[str, int] = field(
        default_factory=lambda: {
            "cut from the store": 3,
            "cut from the database": 3,
            "database out of reach": 1,
            "freeze": 3,
            "flush": 1,
            "evict": 4,
            "lose the epoch": 2,
            "freeze who makes an epoch": 1,
            "restart empty": 1,
            "restart with old data": 3,
            "identity changes": 1,
            "promotion": 4,
            "another address": 4,
            "another address after a write": 2,
            "database restart": 2,
            "slow pages": 2,
            "slow store": 1,
            "start": 2,
            "copy an entry": 1,
        }
    )
    writers: Mapping[str, int] = field(
        default_factory=lambda: {
            "acknowledged": 12,
            "dies": 2,
            "outsider": 2,
            "unknown": 2,
            "truncate": 1,
            "by hand": 1,
        }
    )
    least_faults: int = 0
    most_faults: int = 7
    processes: Sequence[int] = (1, 2, 2, 3)
    leases: tuple[float, float] = (3, 8)
    """How many leases a schedule lasts."""
    retention: Sequence[float] = (300.0, 0.4, 2.0)
    """For how many leases rows of the outbox are kept."""
    calm: Sequence[float] = (3.0,)
    """How much longer writers pause than readers."""
    small_limits: float = 0.5
    """The share of schedules in which the bounds of the library are so small that they are
    reached."""
    deferred: float = 0.3
    """The share of databases with triggers that write in COMMIT."""
    trouble: Sequence[float] = (0.0, 0.0, 0.003, 0.02)
    near_bytes: Sequence[int] = (0, 5000, 1 << 20)
    """What a process may keep in memory: nothing, a few values, all."""
    bounded: float = 0.25
    """The share of reads that are of level ``bounded``."""
    tokens: float = 0.5
    """The share of these that bring the token of a client who has written."""
    looks: int = 6
    """How many read at a process that comes back from an accident."""


@dataclass(slots=True)
class Result:
    """What became of a schedule."""

    seed: int
    violations: list[Violation]
    trace: list[tuple[float, str, str, tuple[Any, ...]]]
    counts: Counter[str]

    def text(self, lines: int = 60) -> str:
        """Show the end of the trace: one event a line."""
        shown = self.trace[-lines:]
        return "\n".join(
            f"{at:9.4f} {who:10} {what} {' '.join(map(str, details))}"
            for at, who, what, details in shown
        )


class _Tenants(SingleTenant):
    """Everybody is who the header says."""

    headers = ("x-tenant",)

    def __init__(self) -> None:
        super().__init__("")

    def claim(self, head: RequestHead) -> Claim:
        """Believe the header."""
        tenant = head.header("x-tenant") or ""
        return Claim(tenant, tenant)

    async def scope(self, claim: Claim) -> Scope:
        """Show everything of the tenant."""
        return Scope(claim.owner_tenant, b"")


def _routes(bound_s: float) -> list[Route]:
    return [
        Route.of(
            f"/{query}/{level}",
            Policy(MODULE, "list", 180.0, tuple(tables), level=level, bound_s=bound_s),
        )
        for query, tables in QUERIES.items()
        for level in (Level.STRICT, Level.BOUNDED)
    ]


async def _answer(scope: Mapping[str, Any], receive: Any, send: Any) -> None:
    """Be the application: answer with what the request's own ``make`` returns."""
    body = msgspec.msgpack.encode(await scope["make"]())
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"%d" % len(body))],
        }
    )
    await send({"type": "http.response.body", "body": body})


@dataclass(slots=True, eq=False)
class Session:
    """A client that writes one thing after the other, in whatever process: its last token, and what
    it has been told is done."""

    token: bytes | None = None
    writes: dict[Register, int] = field(default_factory=dict)
    busy: bool = False


class Process:
    """One process of the application."""

    def __init__(self, schedule: "Schedule", name: str, home: Server) -> None:
        world, rng = schedule.world, schedule.rng
        self.host = Host(
            name, rate=1 + rng.uniform(-CLOCK_SPREAD, CLOCK_SPREAD), offset=rng.uniform(0, 1000)
        )
        self.client = Client(world, self.host, home, proposes=lambda: schedule.proposes(self))
        self.outbox = SimulatedOutbox(
            schedule.database,
            self.host,
            lease_s=schedule.lease_s,
            deadline_s=schedule.lease_s / 2,
            retention_s=schedule.retention_s,
            recovered=lambda: schedule.look_around(self, 0.002),
        )
        relay = partial(
            OutboxRelay,
            period_s=schedule.period_s,
            jitter=rng.random,
            token=lambda: f"{rng.getrandbits(64):016x}",
        )
        self.ready = False
        with replaced(respcache.runtime, "OutboxRelay", relay):
            self.cache = Cache(
                self.client,
                secret=SECRET,
                resolver=_Tenants(),
                outbox=self.outbox,
                verify_share=0,
                clock=self.host.clock,
            )
        self._wrapped = self.cache.wrap(_answer, _routes(schedule.bound_s))

    async def request(
        self,
        tenant: str,
        query: str,
        make: Callable[[], Awaitable[Any]],
        level: Level,
        token: bytes | None,
    ) -> Any:
        """Send a request as a server would, whose handler calls ``make``; return what was
        answered."""
        self._wrapped.prepare()
        body = b""

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal body
            body += message.get("body", b"")

        async def receive() -> Mapping[str, Any]:
            return {"type": "http.request"}

        scope = {
            "type": "http",
            "method": "GET",
            "path": f"/{query}/{level}",
            "query_string": b"",
            "make": make,
        }
        brought = [] if token is None else [(tokens.HEADER, token)]
        await self._wrapped(
            {**scope, "headers": [(b"x-tenant", tenant.encode()), *brought]}, receive, send
        )
        return msgspec.msgpack.decode(body)

    @property
    def relay(self) -> OutboxRelay:
        """The rounds of this process."""
        assert self.cache.runtime.relay is not None
        return self.cache.runtime.relay


class Schedule:
    """The world, and what the people in it do."""

    def __init__(self, loop: VirtualLoop, seed: int, mix: Mix) -> None:
        self.rng = rng = random.Random(seed)
        self.mix = mix
        self.lease_s = rng.choice([0.5, 1.0, 2.0])
        self.period_s = self.lease_s * rng.choice([0.1, 0.2, 0.3])
        self.retention_s = self.lease_s * rng.choice(mix.retention)
        self.bound_s = self.lease_s * rng.choice([0.1, 0.5, 1.5])
        self.length_s = self.lease_s * rng.uniform(*mix.leases)
        self.world = World(loop, rng)
        self.world.trouble = rng.choice(mix.trouble)
        self.oracle = Oracle(lease_s=self.lease_s)
        self.tenants = ["t1", "t2"][: rng.choice([1, 2])]
        self.registers: list[Register] = [
            (tenant, table) for tenant in self.tenants for table in QUERIES["both"]
        ]
        self.database = Database(self.world, self.oracle, self.registers, ids=random.Random(seed))
        self.database.deferred = random.Random(f"deferred {seed}").random() < mix.deferred
        self.outsider = Host("outsider")
        self.servers = [Server(self.world, "s0")]
        self.processes: list[Process] = []
        self.sessions = [Session(), Session()]
        self.choices = random.Random(f"sessions {seed}")
        self.over = asyncio.Event()
        self.moves_next = False
        self.freezes_next = False
        self.calm = rng.choice(mix.calm)
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- the course of things ----------------------------------------------------------------------

    async def run(self) -> None:
        """Let it all happen."""
        for _ in range(self.rng.choice(self.mix.processes)):
            self._start_process()
        for _ in range(self.rng.randint(self.mix.least_faults, self.mix.most_faults)):
            self.world.after(self.rng.uniform(0.1, 0.8) * self.length_s, self._strike)
        for _ in range(self.rng.randint(1, 3)):
            self._spawn(self.outsider, self._keep_writing())
        self.world.after(self.length_s, self.over.set)
        await self.over.wait()
        self.world.over = True
        for process in self.processes:
            self.world.loop.thaw(process.host)

    def failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Count what nobody caught as a violation: it is a defect of the library or of the
        simulator."""
        error = context.get("exception")
        if not self.world.over:
            self.oracle.violations.append(
                Violation("exception", f"{context['message']}: {error!r}")
            )
            self.over.set()

    def _spawn(self, host: Host, work: Coroutine[Any, Any, Any]) -> None:
        task = host.spawn(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start_process(self) -> None:
        process = Process(self, f"p{len(self.processes)}", self.rng.choice(self._alive()))
        self.processes.append(process)
        self._spawn(process.host, self._live(process))

    async def _live(self, process: Process) -> None:
        await process.cache.connect()
        process.ready = True
        await asyncio.gather(
            *(self._keep_reading(process) for _ in range(self.rng.choice([1, 2, 2])))
        )

    def _pause(self) -> float:
        """Return for how long somebody does nothing: mostly short, sometimes long."""
        kind = self.rng.random()
        return self.rng.random() * (
            0.004 if kind < 0.3 else 0.04 if kind < 0.5 else 0.5 * self.lease_s
        )

    # -- reading -----------------------------------------------------------------------------------

    async def _keep_reading(self, process: Process) -> None:
        while True:
            await asyncio.sleep(self._pause())
            await self._read(process, self.rng.choice(self.tenants), self.rng.choice(list(QUERIES)))

    async def _read(self, process: Process, tenant: str, query: str) -> None:
        tables = QUERIES[query]
        registers = [(tenant, table) for table in tables]
        level, slack_s, session = Level.STRICT, 0.0, Session()
        if self.rng.random() < self.mix.bounded:
            level, slack_s = Level.BOUNDED, self.bound_s * DRIFT
            if self.choices.random() < self.mix.tokens:
                session = self.choices.choice(self.sessions)
        demand = self.oracle.demand(
            registers, by=process.host.name, own=session.writes, slack_s=slack_s
        )
        how = "is served"

        async def make() -> dict[str, Any]:
            nonlocal how
            how = "has made"
            values = {}
            for table in tables:
                await asyncio.sleep(self._making())
                values[table] = await read_register(self.database, process.host, (tenant, table))
            await asyncio.sleep(self._making())
            return {"tenant": tenant, "query": query, "values": values}

        self.world.counts["reads"] += 1
        request = current.set(
            None if session.token is None else Exchange(client_token=tokens.decode(session.token))
        )
        try:
            if self.rng.random() < 0.5:
                value = await process.request(tenant, query, make, level, session.token)
            else:
                value = await process.cache.get_or_set(
                    tenant,
                    MODULE,
                    {"query": query},
                    make,
                    tables=tables,
                    level=level,
                    bound_s=self.bound_s,
                )
        except DatabaseGone:
            self.world.counts["reads failed"] += 1
            return
        finally:
            current.reset(request)
        brought = "" if session.token is None else session.token.decode()
        self.world.counts[f"{level} {how}{' by token' if brought else ''}"] += 1
        self.world.note(
            process.host.name,
            how,
            tenant,
            query,
            value["values"],
            f"began {demand.began:.4f}",
            level,
            brought,
        )
        if (value["tenant"], value["query"]) != (tenant, query):
            self._violated(self.oracle.accuse_isolation((tenant, query), value))
            return
        found = {(tenant, table): stamp for table, stamp in value["values"].items()}
        violation = self.oracle.judge(demand, found)
        if violation is not None:
            self._violated(violation)

    def _making(self) -> float:
        kind = self.rng.random()
        return self.rng.random() * (
            0.002 if kind < 0.6 else 0.02 if kind < 0.95 else 1.5 * self.lease_s
        )

    def _violated(self, violation: Violation) -> None:
        self.world.note("ORACLE", str(violation))
        self.over.set()

    # -- writing -----------------------------------------------------------------------------------

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(self.calm * self._pause())
            style = _draw(self.rng, self.mix.writers)
            process = self.rng.choice(self.processes)
            if not process.ready or style == "outsider":
                await self._write_outside()
            else:
                task = process.host.spawn(self._write(process, style))
                await asyncio.wait({task}, timeout=self.lease_s)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _write_outside(self) -> None:
        """Write as psql does: nobody bumps, nobody is told."""
        transaction = Transaction(self.database, self.outsider)
        try:
            await transaction.update(*self._some_registers())
            await asyncio.sleep(self._pause() if self.rng.random() < 0.3 else 0)
            await transaction.commit()
        except DatabaseGone:
            transaction.abandon()
            return
        self.world.counts["writes of others"] += 1
        self._probe_later(transaction)

    async def _write(self, process: Process, style: str) -> None:
        if style == "by hand":
            await self._invalidate(process)
            return
        transaction = Transaction(self.database, process.host)
        try:
            if style == "truncate":
                await transaction.truncate(self.rng.choice(QUERIES["both"]))
            else:
                await transaction.update(*self._some_registers())
            rows = await transaction.own_rows()
        except DatabaseGone:
            transaction.abandon()
            return
        known = dict(transaction.writes)
        others = [register for register in self.registers if register not in known]
        # what writes in COMMIT, unknown to anybody: for that, no answer waits
        often = 0.3 if self.database.deferred else 0.05
        deferred = self.rng.choice(others) if others and self.rng.random() < often else None
        lands_after_s = self.rng.random() * self.lease_s if style == "unknown" else 0.0
        commit = partial(transaction.commit, deferred=deferred, lands_after_s=lands_after_s)
        if style == "dies":
            await self._die_in(transaction, commit)
            return
        self.world.counts["writes"] += 1
        session = self._begin_session()
        told = await self.commit_and_tell(process, commit, self.whole(process, rows))
        session.busy = False
        if told is None:
            self.world.counts["commits unknown"] += 1
            transaction.abandon()
            return
        self.world.counts[f"acknowledged: {told.outcome}"] += 1
        if self.database.deferred:
            known = dict(transaction.writes)
        session.token = session.token if told.token is None else tokens.encode(told.token)
        session.writes.update(known)
        self.world.note(process.host.name, "ACKNOWLEDGES", known, told.outcome, session.token)
        for register, stamp in known.items():
            self.oracle.acknowledge(register, stamp, by=process.host.name)
        if self.moves_next:
            self.moves_next = not self._move(process)
        self._probe(transaction)
        self._probe_later(transaction)

    def _begin_session(self) -> Session:
        """Choose the client who writes now: one that waits for no answer, or one that is never
        heard of again."""
        free = [session for session in self.sessions if not session.busy]
        session = self.choices.choice(free) if free else Session()
        session.busy = True
        return session

    async def commit_and_tell(
        self, process: Process, commit: Commit, rows: Rows
    ) -> Exchange | None:
        """Do what the database hooks do. Returns what the answer says, or None when COMMIT raised:
        nothing is acknowledged."""
        record = Exchange()
        token = current.set(record)
        try:
            try:
                await commit()
            except DatabaseGone:
                self.tell(process, self.rows_of_unknown_outcome(rows))
                await record.settle()
                return None
            self.tell(process, rows)
            await record.settle()
            return record
        finally:
            current.reset(token)

    def whole(self, process: Process, rows: Rows) -> Rows | None:
        """Tell whether these are all rows that the transaction will have left: not where triggers
        may write in COMMIT."""
        relay = process.cache.runtime.relay
        return None if relay is not None and relay.coverage.deferred else rows

    def tell(self, process: Process, rows: Rows | None) -> None:
        """Tell the cache what was committed."""
        process.cache.committed(rows)

    def rows_of_unknown_outcome(self, rows: Rows) -> Rows | None:
        """Tell which rows a writer knows of when its COMMIT raised: none."""
        return None

    async def _die_in(self, transaction: Transaction, commit: Commit) -> None:
        """Commit, and be no more."""
        try:
            await commit()
        except DatabaseGone:
            transaction.abandon()
            return
        self.world.counts["writers died"] += 1
        self._probe_later(transaction)

    async def _invalidate(self, process: Process) -> None:
        self.world.counts["invalidations by hand"] += 1
        tenant = self.rng.choice(self.tenants)
        if self.rng.random() < 0.5:
            await process.cache.invalidate_tenant_cache(tenant, MODULE)
        else:
            await process.cache.invalidate_all_tenant(tenant)

    def _some_registers(self) -> list[Register]:
        return self.rng.sample(self.registers, self.rng.choice([1, 1, 2]))

    def _probe(self, transaction: Transaction) -> None:
        """Have everybody look at what was written."""
        for tenant, table in transaction.writes:
            for process in self.processes:
                if self.rng.random() < 0.5:
                    query = self.rng.choice(
                        [name for name, tables in QUERIES.items() if table in tables]
                    )
                    self._read_now(process, tenant, query)

    def _probe_later(self, transaction: Transaction) -> None:
        self.world.after(self.oracle.bound_s + 0.001 * self.rng.random(), self._probe, transaction)

    # -- faults ------------------------------------------------------------------------------------

    def _strike(self) -> None:
        if self.world.over:
            return
        kind = _draw(self.rng, self.mix.faults)
        self.world.note("FATE", kind)
        if FAULTS[kind](self):
            self.world.counts[f"fault: {kind}"] += 1

    def _alive(self) -> list[Server]:
        return [server for server in self.servers if server.up] or self.servers[-1:]

    def _long(self) -> float:
        return self.rng.uniform(0.02, 2.5) * self.lease_s

    def cut_store(self) -> bool:
        """A process and its server do not reach each other for a while."""
        process = self.rng.choice(self.processes)
        self._cut(process, process.client.home.name, self._long())
        return True

    def cut_database(self) -> bool:
        """A process and the database do not reach each other for a while."""
        self._cut(self.rng.choice(self.processes), DATABASE, self._long())
        return True

    def cut_all_from_database(self) -> bool:
        """No process reaches the database for a while; others do."""
        duration_s = self._long()
        for process in self.processes:
            self._cut(process, DATABASE, duration_s)
        return True

    def _cut(self, process: Process, server: str, duration_s: float) -> None:
        self.world.cut((process.host.name, server), duration_s)
        self.world.after(duration_s, self.look_around, process, self.period_s)

    def look_around(self, process: Process, within_s: float) -> None:
        """Have many read at a process that comes back from an accident."""
        for _ in range(self.mix.looks):
            delay_s = self.rng.random() * within_s
            self.world.after(
                delay_s,
                self._read_now,
                process,
                self.rng.choice(self.tenants),
                self.rng.choice(list(QUERIES)),
            )

    def _read_now(self, process: Process, tenant: str, query: str) -> None:
        if not self.world.over:
            self._spawn(process.host, self._read(process, tenant, query))

    def freeze(self) -> bool:
        """Nothing of a process runs for a while."""
        return self._freeze(self.rng.choice(self.processes), self._long())

    def _freeze(self, process: Process, duration_s: float) -> bool:
        if process.host.frozen or self.world.over:
            return False
        self.world.note(process.host.name, "is frozen")
        self.world.loop.freeze(process.host)
        self.world.after(duration_s, self._thaw, process)
        return True

    def _thaw(self, process: Process) -> None:
        self.world.note(process.host.name, "goes on")
        self.world.loop.thaw(process.host)
        self.look_around(process, self.period_s)

    def flush(self) -> bool:
        """A server loses its data and nothing else."""
        self.rng.choice(self.servers).memory.values.clear()
        return True

    def evict(self) -> bool:
        """Keys of one sort are lost, now and again a little later."""
        part = self.rng.choice(["~gen", "~gen", "~fill", MODULE])
        for _ in range(3):
            self.world.after(self.rng.random() * self.lease_s, self._evict, part)
        return True

    def lose_epoch(self) -> bool:
        """The record of the epoch is lost."""
        self._evict("~inc")
        return True

    def freeze_who_makes_epoch(self) -> bool:
        """The record of the epoch is lost; who makes a new one is frozen meanwhile, and then
        somebody else for long."""
        self._evict("~inc")
        self.freezes_next = True
        return True

    def proposes(self, process: Process) -> None:
        """Note that a process makes an epoch."""
        if self.freezes_next and not self.world.over:
            self.freezes_next = False
            duration_s = self.rng.uniform(0.2, 1.0) * self.lease_s
            self._freeze(process, duration_s)
            others = [other for other in self.processes if other is not process]
            if others:
                at_s = self.rng.uniform(0.3, 1.0) * duration_s
                self.world.after(
                    at_s,
                    self._freeze,
                    self.rng.choice(others),
                    self.rng.uniform(1.0, 2.5) * self.lease_s,
                )

    def _evict(self, part: str) -> None:
        memory = self.rng.choice(self.servers).memory
        for key in [key for key in memory.values if part in key]:
            if self.rng.random() < 0.7:
                self.world.note("FATE", "evicts", key)
                memory.delete(key)

    def restart_empty(self) -> bool:
        """A server dies and comes back without data."""
        self.rng.choice(self._alive()).restart({}, pause_s=self.rng.random() * 0.5)
        return True

    def restart_old(self) -> bool:
        """A server dies and comes back with a dump of a while ago."""
        server = self.rng.choice(self._alive())
        dump = server.dump()
        self.world.after(
            self._long(),
            lambda: server.restart(dump, pause_s=self.rng.random() * 0.2 * self.lease_s),
        )
        return True

    def change_identity(self) -> bool:
        """A server gets another identity while connections last: its first replica attaches."""
        self.rng.choice(self._alive()).memory.restart(keep_data=True)
        return True

    def promote(self) -> bool:
        """A replica that lags becomes a master; the old one lives on, and processes move one by
        one, or never."""
        old = self.rng.choice(self._alive())
        dump = old.dump()
        self.world.after(self.rng.random() * self.lease_s, self._promote, old, dump)
        return True

    def _promote(self, old: Server, dump: dict[str, Any]) -> None:
        new = Server(self.world, f"s{len(self.servers)}")
        new.memory.values.update(dump)
        self.servers.append(new)
        self.world.note("FATE", "promotes", new.name, "from", old.name)
        for process in self.processes:
            if process.client.home is old and self.rng.random() < 0.7:
                self.world.after(self.rng.random() * 1.5 * self.lease_s, process.client.move, new)
        if self.rng.random() < 0.3:
            self.world.after(self._long(), self._retire, old)

    def _retire(self, old: Server) -> None:
        old.die()
        for process in self.processes:
            if process.client.home is old:
                process.client.move(self._alive()[-1])

    def move(self) -> bool:
        """A process is told the address of another server that answers."""
        return self._move(self.rng.choice(self.processes))

    def move_after_write(self) -> bool:
        """The next process that acknowledges a write is told another address at once."""
        self.moves_next = True
        return len(self._alive()) > 1

    def _move(self, process: Process) -> bool:
        others = [server for server in self._alive() if server is not process.client.home]
        if others:
            process.client.move(self.rng.choice(others))
        return bool(others)

    def restart_database(self) -> bool:
        """The database crashes; what was committed asynchronously may be lost."""
        if not self.database.up:
            return False
        lose = self.rng.choice([0, 0, 1, 3])
        self.database.restart(pause_s=self.rng.random() * self.lease_s, lose=lose, newest_s=0.6)
        return True

    def slow_pages(self) -> bool:
        """Statements take long after their snapshot was taken."""
        self.database.thinks_until = self.world.loop.time() + self._long()
        self.database.longest_thought_s = self.rng.choice([0.05, 0.2, 0.6]) * self.lease_s
        return True

    def slow_store(self) -> bool:
        """Answers of the store take about as long as its deadline."""
        self.world.slow_until = self.world.loop.time() + self._long()
        return True

    def start(self) -> bool:
        """One more process starts."""
        if len(self.processes) >= 4:
            return False
        self._start_process()
        return True

    def copy_entry(self) -> bool:
        """A foreign hand copies an entry over another one."""
        memory = self.rng.choice(self.servers).memory
        entries = [key for key in memory.values if f":{MODULE}:" in key and "~fill" not in key]
        if len(entries) < 2:
            return False
        source, cache_key = self.rng.sample(entries, 2)
        memory.values[cache_key] = memory.values[source]
        return True


FAULTS: Mapping[str, Callable[[Schedule], bool]] = {
    "cut from the store": Schedule.cut_store,
    "cut from the database": Schedule.cut_database,
    "freeze": Schedule.freeze,
    "flush": Schedule.flush,
    "evict": Schedule.evict,
    "restart empty": Schedule.restart_empty,
    "restart with old data": Schedule.restart_old,
    "identity changes": Schedule.change_identity,
    "promotion": Schedule.promote,
    "another address": Schedule.move,
    "another address after a write": Schedule.move_after_write,
    "database out of reach": Schedule.cut_all_from_database,
    "lose the epoch": Schedule.lose_epoch,
    "freeze who makes an epoch": Schedule.freeze_who_makes_epoch,
    "database restart": Schedule.restart_database,
    "slow pages": Schedule.slow_pages,
    "slow store": Schedule.slow_store,
    "start": Schedule.start,
    "copy an entry": Schedule.copy_entry,
}


def run(seed: int, mix: Mix | None = None) -> Result:
    """Run the schedule of a seed."""
    chosen = Mix() if mix is None else mix
    tokens = random.Random(f"tokens {seed}")
    with ExitStack() as stack:
        stack.enter_context(
            replaced(
                secrets, "token_hex", lambda size: f"{tokens.getrandbits(8 * size):0{2 * size}x}"
            )
        )
        stack.enter_context(replaced(logging.getLogger("respcache"), "disabled", True))
        stack.enter_context(_limits(random.Random(f"limits {seed}"), chosen))
        runner = stack.enter_context(asyncio.Runner(loop_factory=VirtualLoop))
        for module in (respcache.read.response_fill, respcache.read.values):
            stack.enter_context(replaced(module, "time", _VirtualTime(runner)))
        random.seed(seed)
        schedule = runner.run(_run(seed, chosen))
        return Result(seed, schedule.oracle.violations, schedule.world.trace, schedule.world.counts)


async def _run(seed: int, mix: Mix) -> Schedule:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    schedule = Schedule(loop, seed, mix)
    loop.set_exception_handler(schedule.failed)
    await schedule.run()
    for process in schedule.processes:
        _count(process, schedule.world.counts)
    return schedule


def _count(process: Process, counts: Counter[str]) -> None:
    counters = process.cache.stats()
    for name in ("hits", "misses", "bypasses", "stores"):
        counts[name] += counters[name]
    for one in process.cache.counters.modules(None).values():
        counts["joined fills"] += one.collapsed
        for reason, count in one.bypasses.items():
            counts[f"bypass: {reason}"] += count
    counts["rounds"] += process.relay.counters.cycles
    counts["rounds failed"] += process.relay.counters.failed
    counts["epochs"] += process.relay.counters.epochs
    counts["acknowledgements delayed"] += process.cache.counters.acknowledgements_delayed


class _VirtualTime:
    """Stands for the module ``time`` where the library stamps entries."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._loop = runner.get_loop()

    def time(self) -> float:
        """Return virtual seconds."""
        return self._loop.time()

    monotonic = time


@contextmanager
def _limits(rng: random.Random, mix: Mix) -> Iterator[None]:
    """Make bounds of the library so small, in some schedules, that they are reached."""
    small = rng.random() < mix.small_limits

    def choose(value: Any, *smaller: Any) -> Any:
        return rng.choice([value, *smaller]) if small else value

    rows, ring = choose(20_000, 3, 8), choose(32, 2)
    with ExitStack() as stack:
        for module, name, value in (
            (respcache.stores.memory, "MAX_FIELDS", choose(2000, 5, 6)),
            (respcache.stores.memory, "RING_ROWS", ring),
            (respcache.core.serving_lease, "RING_ROWS", ring),
            (respcache.core.serving_lease, "MAX_ROWS", rows),
            (respcache.writes.relay, "MAX_ROWS", rows),
            (tests.simulation.database, "MAX_ROWS", rows),
            (respcache.writes.relay, "LOST_AUTHORITY_S", choose(30.0, 0.1, 1.0)),
            (respcache.writes.relay, "SAVE_CURSOR_S", choose(30.0, 0.5)),
            (respcache.writes.relay, "PRUNE_S", 0.4),
            (respcache.core.serving_lease, "MAX_TENANTS", choose(2_000, 2_000, 2_000, 1)),
        ):
            stack.enter_context(replaced(module, name, value))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something else in the place of an attribute for a while."""
    before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _draw(rng: random.Random, weights: Mapping[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


if __name__ == "__main__":  # python -m tests.simulation.schedule SEED
    shown = run(int(sys.argv[1]))
    print(shown.text(lines=10_000))
    sys.exit(1 if shown.violations else 0)
