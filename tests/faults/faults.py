"""The faults. Each is a function that breaks something, holds it for a while, and mends it whatever
happens.

A fault returns whether it took place. Faults of one *lane* follow each other, those of different
lanes overlap. Everything random comes from the given source.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import asyncpg
import redis

from respcache.core.serving_lease import LEASE_S
from respcache.testing.history import now

from .outsiders import AWAY, Outsiders
from .proxy import Link, State
from .registers import ACCOUNTS, TENANTS
from .stage import Stage
from .transports import POINTS

DIE_S = 8.0
START_ATTEMPTS = 5
REPLICATE_S = 30.0


@dataclass
class Scene:
    """What a fault gets: the stage, those who write behind the application's back, and its own
    source of randomness."""

    stage: Stage
    outsiders: Outsiders
    random: Random

    async def hold(self, least_s: float, most_s: float) -> None:
        """Let it last."""
        await asyncio.sleep(self.random.uniform(least_s, most_s))

    async def hold_beyond_lease(self) -> None:
        """Let it last for longer than a fence can live."""
        await self.hold(LEASE_S + 0.3, LEASE_S + 1.5)


Happens = Callable[[Scene], Awaitable[bool]]


@dataclass(frozen=True)
class Fault:
    """A kind of fault. ``what`` is its docstring."""

    kind: str
    lane: str
    what: str
    happen: Happens


FAULTS: dict[str, Fault] = {}


def _fault(lane: str) -> Callable[[Happens], Happens]:
    def note(happen: Happens) -> Happens:
        kind = happen.__name__.replace("_", "-")
        FAULTS[kind] = Fault(kind, lane, (happen.__doc__ or "").rstrip("."), happen)
        return happen

    return note


# -- the store as a server -------------------------------------------------------------------------


@_fault("store")
async def store_frozen(scene: Scene) -> bool:
    """SIGSTOP of Valkey, shorter than the lease."""
    return await _freeze_store(scene, 0.1, 1.5)


@_fault("store")
async def store_frozen_beyond_lease(scene: Scene) -> bool:
    """SIGSTOP of Valkey, longer than the lease."""
    return await _freeze_store(scene, LEASE_S + 0.3, LEASE_S + 2.0)


@_fault("store")
async def store_restarted_empty(scene: Scene) -> bool:
    """kill -9 of Valkey; it comes back without data."""
    master = scene.stage.master
    await asyncio.to_thread(master.kill)
    try:
        (master.directory / "dump.rdb").unlink(missing_ok=True)
        await scene.hold(0.0, 1.5)
    finally:
        await _start(master)
    return True


@_fault("store")
async def store_restarted_old(scene: Scene) -> bool:
    """kill -9 of Valkey; it comes back with the data of some seconds ago."""
    master = scene.stage.master
    if not await _asked(scene, ("SAVE",)):
        return False
    await scene.hold(0.5, 3.0)
    await asyncio.to_thread(master.kill)
    try:
        await scene.hold(0.0, 0.3)
    finally:
        await _start(master)
    return True


@_fault("store")
async def replica_promoted(scene: Scene) -> bool:
    """A lagging replica is promoted; some processes stay at the old master."""
    stage = scene.stage
    async with asyncio.timeout(REPLICATE_S):
        while (await stage.insist("INFO", "replication", server=stage.replica))[
            "master_link_status"
        ] != "up":
            await asyncio.sleep(0.1)
    stage.replication.set(State.DELAYED, delay_s=scene.random.uniform(0.2, 1.0))
    await scene.hold(0.3, 1.0)
    await stage.insist("REPLICAOF", "NO", "ONE", server=stage.replica)
    stage.master, stage.replica = stage.replica, stage.master
    try:
        names = list(stage.seats)
        for name in scene.random.sample(names, scene.random.randint(1, len(names) - 1)):
            stage.seats[name].store_link.move(stage.master.port)
        await scene.hold(0.5, LEASE_S + 1.5)
    finally:
        for seat in stage.seats.values():
            if seat.store_link.upstream != stage.master.port:
                seat.store_link.move(stage.master.port)
        stage.replication.set(State.NORMAL)
        await stage.replicate()
    return True


async def _freeze_store(scene: Scene, least_s: float, most_s: float) -> bool:
    master = scene.stage.master
    master.freeze()
    try:
        await scene.hold(least_s, most_s)
    finally:
        master.thaw()
    return True


async def _start(server: Any) -> None:
    """Start a server of ours; its port may still be in use for a moment."""
    for attempt in range(START_ATTEMPTS):
        try:
            await asyncio.to_thread(server.start)
            return
        except Exception:
            if attempt == START_ATTEMPTS - 1:
                raise
            await asyncio.sleep(0.3)


# -- the keys in it, and its clients ---------------------------------------------------------------


@_fault("keys")
async def flushall(scene: Scene) -> bool:
    """FLUSHALL."""
    return await _asked(scene, ("FLUSHALL",))


@_fault("keys")
async def generations_deleted(scene: Scene) -> bool:
    """DEL of some generations."""
    return await _deleted(scene, "tenant:*:~gen")


@_fault("keys")
async def epoch_deleted(scene: Scene) -> bool:
    """DEL of the epoch and the switches."""
    return await _asked(scene, ("DEL", "respcache:~inc", "respcache:~off"))


@_fault("keys")
async def entries_deleted(scene: Scene) -> bool:
    """DEL of some stored responses."""
    return await _deleted(scene, "tenant:*:*:*:*")


@_fault("keys")
async def leases_deleted(scene: Scene) -> bool:
    """DEL of the fill locks, repeatedly."""
    found = False
    for _ in range(20):
        found |= await _deleted(scene, "tenant:*:~fill:*")
        await scene.hold(0.0, 0.1)
    return found


@_fault("keys")
async def scripts_flushed(scene: Scene) -> bool:
    """SCRIPT FLUSH."""
    return await _asked(scene, ("SCRIPT", "FLUSH"))


@_fault("keys")
async def clients_killed(scene: Scene) -> bool:
    """CLIENT KILL of all connections, several times."""
    done = False
    for _ in range(scene.random.randint(1, 4)):
        done |= await _asked(scene, ("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES"))
        await scene.hold(0.0, 0.5)
    return done


@_fault("keys")
async def clients_paused(scene: Scene) -> bool:
    """CLIENT PAUSE."""
    pause_s = scene.random.uniform(0.05, LEASE_S + 0.5)
    done = await _asked(
        scene, ("CLIENT", "PAUSE", int(pause_s * 1000), scene.random.choice(("ALL", "WRITE")))
    )
    await asyncio.sleep(pause_s)
    return done


@_fault("keys")
async def evictions(scene: Scene) -> bool:
    """maxmemory 2 MB and other keys: generations, epoch and entries are evicted."""
    stage = scene.stage
    before = await _evicted(stage)
    done = await _asked(scene, ("CONFIG", "SET", "maxmemory", "2mb"))
    for round_ in range(scene.random.randint(10, 25)):
        with contextlib.suppress(redis.RedisError, OSError):
            async with _client(stage) as client:
                for number in range(20):
                    # not even an eviction makes room
                    with contextlib.suppress(redis.ResponseError):
                        await client.set(
                            f"others:{round_}:{number}", scene.random.randbytes(3_000), px=60_000
                        )
        await scene.hold(0.0, 0.2)
    after = await _evicted(stage)
    for server in (stage.master, stage.replica):
        with contextlib.suppress(redis.RedisError, OSError):
            await stage.ask_store("CONFIG", "SET", "maxmemory", "64mb", server=server)
    return done and after not in (0, before)


async def _asked(scene: Scene, words: tuple[Any, ...]) -> bool:
    """Send a command, unless another fault keeps the server from answering."""
    try:
        await scene.stage.ask_store(*words)
    except (redis.RedisError, OSError):
        return False
    return True


async def _deleted(scene: Scene, pattern: str) -> bool:
    try:
        async with _client(scene.stage) as client:
            keys = sorted([key async for key in client.scan_iter(match=pattern, count=500)])
            some = scene.random.sample(keys, scene.random.randint(1, len(keys))) if keys else []
            return bool(some and await client.delete(*some))
    except (redis.RedisError, OSError):
        return False


async def _evicted(stage: Stage) -> int:
    """Count since the server's start; 0 when it does not answer."""
    with contextlib.suppress(redis.RedisError, OSError):
        return int((await stage.ask_store("INFO", "stats"))["evicted_keys"])
    return 0


@asynccontextmanager
async def _client(stage: Stage) -> AsyncIterator[Any]:
    async with redis.asyncio.Redis.from_url(
        stage.master.url, socket_timeout=2, socket_connect_timeout=2
    ) as client:
        yield client


# -- processes -------------------------------------------------------------------------------------


@_fault("processes")
async def killed_after_commit(scene: Scene) -> bool:
    """kill -9 of a process after COMMIT, before any bump."""
    return await _killed(scene, POINTS[0])


@_fault("processes")
async def killed_between_bumps(scene: Scene) -> bool:
    """kill -9 of a process between two bumps."""
    return await _killed(scene, POINTS[1])


@_fault("processes")
async def killed_before_acknowledgement(scene: Scene) -> bool:
    """kill -9 of a process that has bumped, but not acknowledged."""
    return await _killed(scene, POINTS[2])


@_fault("processes")
async def killed_in_round(scene: Scene) -> bool:
    """kill -9 of a process whose relay cycle has read rows."""
    return await _killed(scene, POINTS[3])


@_fault("processes")
async def killed_after_put(scene: Scene) -> bool:
    """kill -9 of a process that has sent an entry and owns the fill lock."""
    return await _killed(scene, POINTS[4])


@_fault("processes")
async def server_killed(scene: Scene) -> bool:
    """kill -9 of the process that serves HTTP, at any moment."""
    server, name = scene.stage.server, scene.stage.plan.names[-1]
    with scene.stage.unavailable([name]):
        await server.kill()
        await scene.hold(0.0, 0.5)
        await server.start()
    return True


@_fault("processes")
async def process_frozen_beyond_lease(scene: Scene) -> bool:
    """SIGSTOP of a process, longer than the lease."""
    stage = scene.stage
    name = scene.random.choice(stage.plan.names)
    process = stage.server if name == stage.plan.names[-1] else stage.workers[name]
    process.signal(signal.SIGSTOP)
    asleep = now()
    try:
        await scene.hold_beyond_lease()
    finally:
        process.signal(signal.SIGCONT)
        stage.seats[name].frozen.append((asleep, now()))
    return True


async def _killed(scene: Scene, point: str) -> bool:
    """Have a process die at a point; one that does not get there dies anyway, and that is not
    counted."""
    worker = scene.stage.workers[scene.random.choice(scene.stage.plan.names[:-1])]
    exited = worker.exited
    worker.order(die=point)
    if point in ("between two bumps", "in a round"):  # give its next round something to do
        with contextlib.suppress(*AWAY):
            connection = await scene.stage.connect()
            await scene.outsiders.change(
                connection, [f"{tenant}/{ACCOUNTS[0]}" for tenant in TENANTS]
            )
            await connection.close()
    try:
        await asyncio.wait_for(exited.wait(), DIE_S)
    except TimeoutError:
        worker.signal(signal.SIGKILL)
        await exited.wait()
        return False
    return True


# -- links -----------------------------------------------------------------------------------------


@_fault("links")
async def store_link_delayed(scene: Scene) -> bool:
    """The link of a process to Valkey is slow: below and above its deadline."""
    return await _bad_store_link(scene, State.DELAYED, delay_s=scene.random.uniform(0.002, 0.08))


@_fault("links")
async def store_link_cut(scene: Scene) -> bool:
    """The link of a process to Valkey is cut."""
    return await _bad_store_link(scene, State.CUT)


@_fault("links")
async def store_link_half_open(scene: Scene) -> bool:
    """The link of a process to Valkey is half-open."""
    return await _bad_store_link(scene, State.HALF_OPEN)


@_fault("links")
async def store_link_black_hole(scene: Scene) -> bool:
    """The link of a process to Valkey delays all data for a time."""
    return await _bad_store_link(scene, State.BLACK_HOLE)


@_fault("links")
async def database_link_delayed(scene: Scene) -> bool:
    """The link of a process to PostgreSQL is slow."""
    link = scene.stage.seats[scene.random.choice(scene.stage.plan.names)].database_link
    return await _bad(scene, link, State.DELAYED, delay_s=scene.random.uniform(0.02, 0.3))


@_fault("links")
async def database_link_cut(scene: Scene) -> bool:
    """The link of a process to PostgreSQL is cut."""
    return await _bad_database_link(scene, State.CUT)


@_fault("links")
async def database_link_half_open(scene: Scene) -> bool:
    """The link of a process to PostgreSQL is half-open."""
    return await _bad_database_link(scene, State.HALF_OPEN)


@_fault("links")
async def database_link_black_hole(scene: Scene) -> bool:
    """The link of a process to PostgreSQL delays all data for a time."""
    return await _bad_database_link(scene, State.BLACK_HOLE)


@_fault("links")
async def writer_and_readers_apart(scene: Scene) -> bool:
    """One process loses Valkey, others PostgreSQL, beyond the lease."""
    stage = scene.stage
    writer = scene.random.choice(stage.plan.names)
    readers = [name for name in stage.plan.names if name != writer]
    with stage.unavailable(readers):
        try:
            stage.seats[writer].store_link.set(State.BLACK_HOLE)
            for name in readers:
                stage.seats[name].database_link.set(State.BLACK_HOLE)
            await scene.hold_beyond_lease()
        finally:
            for seat in stage.seats.values():
                seat.database_link.set(State.NORMAL)
            stage.seats[writer].store_link.set(State.NORMAL)
    return True


async def _bad_store_link(scene: Scene, state: State, *, delay_s: float = 0.0) -> bool:
    return await _bad(
        scene,
        scene.stage.seats[scene.random.choice(scene.stage.plan.names)].store_link,
        state,
        delay_s=delay_s,
    )


async def _bad_database_link(scene: Scene, state: State) -> bool:
    name = scene.random.choice(scene.stage.plan.names)
    with scene.stage.unavailable([name]):
        return await _bad(scene, scene.stage.seats[name].database_link, state)


async def _bad(scene: Scene, link: Link, state: State, *, delay_s: float = 0.0) -> bool:
    link.set(state, delay_s=delay_s)
    try:
        await scene.hold(0.2, LEASE_S + 1.5)
    finally:
        link.set(State.NORMAL)
    return True


# -- the database ----------------------------------------------------------------------------------


@_fault("database")
async def postgres_restarted(scene: Scene) -> bool:
    """PostgreSQL is shut down and started again."""
    postgres = scene.stage.postgres
    with scene.stage.unavailable(scene.stage.plan.names):
        await asyncio.to_thread(postgres.stop)
        try:
            await scene.hold(0.0, 1.0)
        finally:
            await _start(postgres)
    return True


@_fault("database")
async def postgres_stopped_at_once(scene: Scene) -> bool:
    """PostgreSQL is stopped as in a crash (immediate), and recovers."""
    postgres = scene.stage.postgres
    process = postgres.process
    assert process is not None
    with scene.stage.unavailable(scene.stage.plan.names):
        process.send_signal(signal.SIGQUIT)
        await asyncio.to_thread(process.wait)
        postgres.process = None
        try:
            await scene.hold(0.0, 1.0)
        finally:
            await _start(postgres)
    return True


@_fault("database")
async def long_transaction(scene: Scene) -> bool:
    """A transaction changes rows of all tenants, and commits seconds later."""
    rows = [f"{tenant}/{scene.random.choice(ACCOUNTS)}" for tenant in TENANTS]
    try:
        connection = await scene.stage.connect()
        try:
            await scene.outsiders.change(
                connection, rows, hold_s=scene.random.uniform(1.0, LEASE_S + 2.0)
            )
        finally:
            connection.terminate()
    except AWAY:
        return False
    return True


@_fault("database")
async def slow_fills(scene: Scene) -> bool:
    """Handlers take up to 3 s after their reads."""
    workers = scene.stage.workers.values()
    for worker in workers:
        worker.order(slow=True)
    try:
        await scene.hold(1.0, LEASE_S + 1.5)
    finally:
        for worker in workers:
            worker.order(slow=False)
    return True


@_fault("database")
async def outbox_pruned(scene: Scene) -> bool:
    """Rows of the outbox are deleted before all processes have read them."""
    try:
        connection = await scene.stage.connect()
        try:
            async with connection.transaction():
                await connection.execute(
                    "UPDATE respcache_fence SET pruned = pg_snapshot_xmin(pg_current_snapshot())"
                )
                await connection.execute(
                    "DELETE FROM respcache_outbox WHERE xid < (SELECT pruned FROM respcache_fence)"
                )
        finally:
            connection.terminate()
    except (*AWAY, asyncpg.PostgresError):
        return False
    return True
