"""The world of one schedule: its randomness and its trace, the network, and the servers of the
store.

A server of the store is the library's ``MemoryServer``: data and identity, each command atomic. A
process reaches it as a ``Client``, over a connection that knows the identity it was told when it
was made, with delays before and after each command; the request or the answer may be lost or come
late, and a network that is cut swallows or keeps what is sent.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from respcache.core.epochs import Epoch
from respcache.core.errors import StoreError, StoreUnavailable
from respcache.core.generations import GenerationView
from respcache.stores.base import Bumped, FillLock, Reading, ServerInfo
from respcache.stores.memory import MemoryServer
from tests.simulation.loop import Host, VirtualLoop

T = TypeVar("T")

DEADLINE_S = 0.05
REDIAL_S = 0.05


class World:
    """What is common to everything that happens in one schedule."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.trace: list[tuple[float, str, str, tuple[Any, ...]]] = []
        self.counts: Counter[str] = Counter()
        self.trouble = 0.0
        """The share of messages that are lost or late."""
        self.slow_until = 0.0
        self.over = False
        """Whether the schedule has ended: nobody connects any more."""
        self.cuts: Counter[tuple[str, str]] = Counter()
        """Pairs (host, server) that cannot reach each other; several cuts may overlap."""
        self.kept: list[tuple[tuple[str, str], Callable[[], None]]] = []

    def note(self, who: str, what: str, *details: Any) -> None:
        """Write a line of the trace."""
        self.trace.append((self.loop.time(), who, what, details))

    def after(self, delay_s: float, callback: Callable[..., object], *args: Any) -> None:
        """Have something happen later, whatever becomes of the hosts."""
        self.loop.happen(delay_s, callback, *args)

    def cut(self, pair: tuple[str, str], duration_s: float) -> None:
        """Cut the network between two for a while."""
        self.cuts[pair] += 1
        self.after(duration_s, self._mend, pair)

    def _mend(self, pair: tuple[str, str]) -> None:
        self.cuts[pair] -= 1
        if not self.cuts[pair]:
            now, self.kept = (
                [one for one in self.kept if one[0] == pair],
                [one for one in self.kept if one[0] != pair],
            )
            for _, arrive in now:
                self.after(self.delay(), arrive)

    def delay(self) -> float:
        """Return how long a message is on its way when nothing is wrong with it."""
        slow = 0.03 if self.loop.time() < self.slow_until else 0.0015
        return self.rng.random() * slow

    def send(self, pair: tuple[str, str], arrive: Callable[[], None]) -> None:
        """Send a message. It may be lost, come late, or be kept until the network is mended."""
        delay = self.delay()
        if self.trouble and self.rng.random() < self.trouble:
            kind = self.rng.random()
            if kind < 0.3:
                self.counts["message lost"] += 1
                return
            self.counts["message late"] += 1
            delay = self.rng.random() * (0.1 if kind < 0.7 else 2.0)
        self.after(delay, self._deliver, pair, arrive)

    def _deliver(self, pair: tuple[str, str], arrive: Callable[[], None]) -> None:
        if not self.cuts[pair]:
            arrive()
        elif self.rng.random() < 0.5:
            self.kept.append((pair, arrive))


class Server:
    """A server of the store. ``life`` counts what ends connections; the identity is the data's."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.life = 0
        self.up = True
        self.clients: list[Client] = []
        self.memory = MemoryServer(clock=world.loop.time)
        self.memory.listeners.append(self._tell)

    def dump(self) -> dict[str, Any]:
        """Return the data as it is now."""
        return dict(self.memory.values)

    def restart(self, dump: dict[str, Any], *, pause_s: float) -> None:
        """Die, and come back after a pause as another life with this data."""
        self.up = False
        self._disconnect()
        self.world.after(pause_s, self._come_up, dump)

    def die(self) -> None:
        """Be gone for good."""
        self.up = False
        self._disconnect()

    def _tell(self, generation: str) -> None:
        """Tell everybody who is connected that a generation was bumped."""
        for client in self.clients:
            client.told(generation)

    def _come_up(self, dump: dict[str, Any]) -> None:
        self.memory.restart(keep_data=False)
        self.memory.values.update(dump)
        self.up = True

    def _disconnect(self) -> None:
        self.life += 1
        for client in self.clients:
            client.look_at_connection()


class Connection:
    """A connection to a server life. ``identity`` was learnt when it was made."""

    __slots__ = ("identity", "life", "server")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.life = server.life
        self.identity = server.memory.identity

    @property
    def alive(self) -> bool:
        """Whether the server is the one that it was."""
        return self.server.up and self.server.life == self.life


class Client:
    """The store as one process sees it (``respcache.stores.base.Store``)."""

    def __init__(
        self, world: World, host: Host, home: Server, *, proposes: Callable[[], None]
    ) -> None:
        self.world = world
        self._proposes = proposes
        self.host = host
        self.home = home
        self._prefix = ""
        self._connection: Connection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._on_pushed: Callable[[str], None] = lambda generation: None
        self._lost: Callable[[], None] = lambda: None
        home.clients.append(self)

    @property
    def available(self) -> bool:
        """See ``Store.available``."""
        return self._connection is not None

    async def connect(self) -> None:
        """See ``Store.connect``."""
        first = asyncio.get_running_loop().create_future()
        self._dialling = asyncio.create_task(self._dial(first))
        await first

    def move(self, home: Server) -> None:
        """Be told another address: the present connection ends."""
        self.home.clients.remove(self)
        self.home = home
        home.clients.append(self)
        self.look_at_connection()

    def look_at_connection(self) -> None:
        """Have the process notice when its connection is not what it should be."""
        self.world.loop.happen(0, self._notice, host=self.host)

    def _notice(self) -> None:
        connection = self._connection
        if connection is not None and (not connection.alive or connection.server is not self.home):
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        if self._connection is connection and not self.world.over:
            self._connection = None
            self._lost()
            self._dialling = self.host.spawn(self._dial(None))

    async def _dial(self, first: "asyncio.Future[None] | None") -> None:
        world = self.world
        while True:
            await asyncio.sleep(world.delay())
            server = self.home
            if server.up and not world.cuts[self.host.name, server.name]:
                connection = self.shake_hands(server)
                await asyncio.sleep(world.delay())
                if connection.alive and server is self.home:
                    self._connection = connection
                    world.note(self.host.name, "connects to", server.name, connection.identity[:4])
                    break
            if first is not None and not first.done():
                first.set_result(None)
            await asyncio.sleep(REDIAL_S * (0.5 + world.rng.random()))
        if first is not None and not first.done():
            first.set_result(None)

    def shake_hands(self, server: Server) -> Connection:
        """Make a connection, which learns the server's identity."""
        return Connection(server)

    async def read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """See ``Store.read``."""
        connection = self._connected()
        known = self._prefix + connection.identity
        return await self._ask(
            connection, "", lambda memory: memory.read(entry, wanted, server=known)
        )

    def soon(self, callback: Callable[[], None]) -> None:
        """See ``Store.soon``."""
        self._connected()
        self.world.loop.call_soon(callback)

    def view(
        self,
        generation: str,
        tags: Sequence[str],
        done: Callable[[GenerationView | StoreError], None],
    ) -> None:
        """See ``Store.view``."""

        async def ask() -> None:
            try:
                done((await self.read(None, [(generation, tags)])).generations[0])
            except StoreError as error:
                done(error)

        self._connected()
        self.host.spawn(ask())

    def listen(self, on_pushed: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        """See ``Store.listen``."""
        self._on_pushed, self._lost = on_pushed, on_lost

    def told(self, generation: str) -> None:
        """Have a message of the server on its way to us."""
        connection = self._connection
        if connection is not None and connection.alive:
            self.world.send((self.host.name, self.home.name), lambda: self._hear(generation))

    def _hear(self, generation: str) -> None:
        self.world.loop.happen(0, self._on_pushed, generation, host=self.host)

    async def open(self, generation: str, *, nonce: bytes, ttl_ms: int) -> GenerationView:
        """See ``Store.open``."""
        prefix, connection = self._prefix, self._connected()
        found = await self._ask(
            connection,
            "open",
            lambda memory: memory.open(generation, nonce=nonce, ttl_ms=ttl_ms, prefix=prefix),
            generation,
        )
        self._compare(found.server.removeprefix(prefix), connection)
        return found

    async def bump(
        self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str] = ()
    ) -> Bumped:
        """See ``Store.bump``."""
        prefix, connection = self._prefix, self._connected()
        self._on_pushed(generation)
        bumped = await self._ask(
            connection,
            "bump",
            lambda memory: memory.bump(
                generation, tags=tags, ttl_ms=ttl_ms, rows=rows, prefix=prefix
            ),
            generation,
            tags,
            rows,
        )
        self._compare(bumped.server.removeprefix(prefix), connection)
        self._on_pushed(generation)
        return bumped

    async def epoch(
        self, proposed: Epoch | None = None, *, replacing: str = "", ttl_ms: int = 0
    ) -> tuple[Epoch | None, str]:
        """See ``Store.epoch``."""
        connection = self._connected()
        if proposed is not None:
            self._proposes()
        record, identity = await self._ask(
            connection,
            "" if proposed is None else "proposes epoch",
            lambda memory: memory.epoch(proposed, replacing=replacing, ttl_ms=ttl_ms),
            None if proposed is None else proposed.encode(),
        )
        self._compare(identity, connection)
        return record, identity

    def adopt(self, token: str) -> None:
        """See ``Store.adopt``."""
        self._prefix = f"{token}:" if token else ""

    def put(
        self, entry: str, envelope: bytes, *, ttl_ms: int, generation: str, generation_ttl_ms: int
    ) -> None:
        """See ``Store.put``."""
        self._tell(
            "put",
            lambda memory: memory.put(
                entry,
                envelope,
                ttl_ms=ttl_ms,
                generation=generation,
                generation_ttl_ms=generation_ttl_ms,
            ),
            entry[-40:],
        )

    async def lock(
        self, key: str, lock: FillLock, *, ttl_ms: int, replacing: str | None = None
    ) -> FillLock:
        """See ``Store.lock``."""
        return await self._ask(
            self._connected(),
            "",
            lambda memory: memory.lock(key, lock, ttl_ms=ttl_ms, replacing=replacing),
        )

    def release(self, key: str, token: str) -> None:
        """See ``Store.release``."""
        self._tell("", lambda memory: memory.release(key, token))

    async def switch(self, changes: Mapping[str, bool] = {}) -> frozenset[str]:
        """See ``Store.switch``."""
        return await self._ask(self._connected(), "", lambda memory: memory.switch(changes))

    async def info(self) -> ServerInfo:
        """See ``Store.info``."""
        return await self._ask(self._connected(), "", lambda memory: memory.info())

    async def close(self) -> None:
        """See ``Store.close``."""

    def _connected(self) -> Connection:
        if self._connection is None:
            raise StoreUnavailable("not connected")
        return self._connection

    def _compare(self, identity: str, connection: Connection) -> None:
        if identity != connection.identity:
            self._drop(connection)

    async def _ask(
        self, connection: Connection, what: str, command: Callable[[MemoryServer], T], *details: Any
    ) -> T:
        """Send a command and wait for its answer, as long as the deadline allows."""
        loop = self.world.loop
        future: asyncio.Future[T] = loop.create_future()
        self._send(connection, what, command, future, details)
        loop.happen(DEADLINE_S / self.host.rate, self._late, connection, future, host=self.host)
        return await future

    def _tell(self, what: str, command: Callable[[MemoryServer], object], *details: Any) -> None:
        if self._connection is not None:
            self._send(self._connection, what, command, None, details)

    def _send(
        self,
        connection: Connection,
        what: str,
        command: Callable[[MemoryServer], Any],
        future: "asyncio.Future[Any] | None",
        details: tuple[Any, ...],
    ) -> None:
        world, server, pair = (
            self.world,
            connection.server,
            (self.host.name, connection.server.name),
        )

        def arrive() -> None:
            if not connection.alive:
                if future is not None:
                    world.send(pair, lambda: _fail(future, "the connection was reset"))
                return
            answer = command(server.memory)
            if what:
                world.note(self.host.name, what, server.name, *details, answer)
            if future is not None:
                world.send(pair, lambda: _answer(future, answer))

        world.send(pair, arrive)

    def _late(self, connection: Connection, future: "asyncio.Future[Any]") -> None:
        if not future.done():
            self.world.counts["store timeout"] += 1
            _fail(future, "no answer in time")
            if self.world.rng.random() < 0.7:
                self._drop(connection)


def _answer(future: "asyncio.Future[T]", answer: T) -> None:
    if not future.done():
        future.set_result(answer)


def _fail(future: "asyncio.Future[Any]", why: str) -> None:
    if not future.done():
        future.set_exception(StoreUnavailable(why))
