"""A store in the memory of one process: for tests, examples and applications of a single process.

It behaves like a server, including time to live and eviction; the contract tests check both. It
owns no tasks.

``MemoryServer`` executes commands as a server does, ``MemoryStore`` is a client of it. Several
clients may share one server, as processes do; the simulator in ``tests/simulation`` puts a network
between them.
"""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from respcache.core.epochs import Epoch, decode_epoch
from respcache.core.errors import StoreError, StoreUnavailable
from respcache.core.generations import (
    FLOOR,
    MAX_FIELDS,
    RING_ROWS,
    Certificate,
    GenerationView,
    read_generation,
)
from respcache.core.keys import EPOCH_KEY, SWITCHES_KEY
from respcache.stores.base import Bumped, FillLock, Reading, ServerInfo

MAX_KEYS = 10_000


class MemoryServer:
    """The keys and the identity of one server life. Each method is one atomic command, which never
    waits and never raises.

    Keeps at most ``max_keys`` keys and evicts the least recently used. ``clock`` returns seconds
    and never goes back. ``prefix`` is the one of the client's epoch, as in the scripts of ``lua/``.
    """

    def __init__(
        self, *, max_keys: int = MAX_KEYS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.identity = secrets.token_hex(8)
        self.values: OrderedDict[str, tuple[Any, float]] = OrderedDict()
        """The value of each key, and when it expires. Values are never changed in place, so a copy
        of this dictionary is a dump."""
        self.listeners: list[Callable[[str], None]] = []
        """Called with the key of every bumped generation."""
        self.evicted = 0
        self._clock = clock
        self._max_keys = max_keys

    def read(
        self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]], *, server: str
    ) -> Reading:
        """See ``Store.read``. ``server`` is the identity that the client's connection knows."""
        found = None if entry is None else self._get(entry)
        remaining_ms = (
            0
            if entry is None or found is None
            else int((self.values[entry][1] - self._clock()) * 1000)
        )
        return Reading(
            found,
            tuple(self.view(generation, tags, server=server) for generation, tags in wanted),
            remaining_ms,
        )

    def view(self, generation: str, tags: Sequence[str], *, server: str) -> GenerationView:
        """See ``Store.view``."""
        return read_generation(_values(self._get(generation), tags), tags, server=server)

    def open(self, generation: str, *, nonce: bytes, ttl_ms: int, prefix: str) -> GenerationView:
        """See ``Store.open``."""
        server = prefix + self.identity
        fields = self._get(generation)
        if not _usable(fields, server):
            fields = {"n": nonce, "r": server.encode(), "s": b"0"}
        self._set(generation, fields, ttl_ms)
        return self.view(generation, (), server=server)

    def bump(
        self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str], prefix: str
    ) -> Bumped:
        """See ``Store.bump``."""
        server = prefix + self.identity
        fields = self._get(generation)
        if fields is None:
            return Bumped(server)
        if not _usable(fields, server):
            del self.values[generation]
            self.publish(generation)
            return Bumped(server)
        ring = fields.get("x", b"").decode().split()
        new = [row for row in rows if row not in ring]
        if new or not rows:
            sequence = str(int(fields["s"]) + 1).encode()
            fields = {**fields, "s": sequence, **dict.fromkeys(tags, sequence)}
            if new:
                fields["x"] = " ".join([*ring, *new][-RING_ROWS:]).encode()
            if len(fields) > MAX_FIELDS:
                fields = {"n": fields["n"], "r": fields["r"], "s": sequence, FLOOR: sequence}
        self._set(generation, fields, ttl_ms)
        self.publish(generation)
        return Bumped(server, Certificate(fields["n"], int(fields["s"])))

    def epoch(
        self, proposed: Epoch | None = None, *, replacing: str = "", ttl_ms: int = 0
    ) -> tuple[Epoch | None, str]:
        """See ``Store.epoch``."""
        record = self._get(EPOCH_KEY)
        stored = decode_epoch(record) if isinstance(record, str) else None
        if proposed is not None and (
            stored is None or stored.identity != self.identity or stored.token == replacing
        ):
            self._set(EPOCH_KEY, proposed.encode(), ttl_ms)
            stored = proposed
        return stored, self.identity

    def put(
        self, entry: str, envelope: bytes, *, ttl_ms: int, generation: str, generation_ttl_ms: int
    ) -> None:
        """See ``Store.put``."""
        self._set(entry, envelope, ttl_ms)
        fields = self._get(generation)
        if fields is not None:
            self._set(generation, fields, generation_ttl_ms)

    def lock(self, key: str, lock: FillLock, *, ttl_ms: int, replacing: str | None) -> FillLock:
        """See ``Store.lock``."""
        present: FillLock | None = self._get(key)
        if present is not None and present.token != replacing:
            return present
        self._set(key, lock, ttl_ms)
        return lock

    def release(self, key: str, token: str) -> None:
        """See ``Store.release``."""
        present: FillLock | None = self._get(key)
        if present is not None and present.token == token:
            del self.values[key]

    def switch(self, changes: Mapping[str, bool]) -> frozenset[str]:
        """See ``Store.switch``."""
        switches = {**(self._get(SWITCHES_KEY) or {}), **changes}
        off = frozenset(name for name, is_off in switches.items() if is_off)
        if off:
            self.values[SWITCHES_KEY] = (dict.fromkeys(off, True), float("inf"))
        else:
            self.values.pop(SWITCHES_KEY, None)
        return off

    def info(self) -> ServerInfo:
        """See ``Store.info``."""
        return ServerInfo(f"evicted_keys:{self.evicted}\r\n", f"keys:{len(self.values)}\r\n")

    def restart(self, *, keep_data: bool) -> None:
        """Become another server life, with or without the old data, as after a crash, a failover or
        a restored dump."""
        self.identity = secrets.token_hex(8)
        if not keep_data:
            self.values.clear()

    def delete(self, key: str) -> None:
        """Remove a key, as eviction does."""
        self.values.pop(key, None)

    def publish(self, key: str) -> None:
        """Pass the key of a bumped or deleted generation to all listeners."""
        for on_pushed in self.listeners:
            on_pushed(key)

    def peek(self, key: str) -> tuple[Any, float]:
        """Return a value and its remaining time to live in seconds (None and 0 if there is none),
        without counting as a use."""
        value, expires = self.values.get(key, (None, 0.0))
        left_s = expires - self._clock()
        return (value, left_s) if left_s > 0 else (None, 0.0)

    def _get(self, key: str) -> Any:
        value, expires = self.values.get(key, (None, 0.0))
        if value is None:
            return None
        if expires <= self._clock():
            del self.values[key]
            return None
        self.values.move_to_end(key)
        return value

    def _set(self, key: str, value: Any, ttl_ms: int) -> None:
        self.values[key] = (value, self._clock() + ttl_ms / 1000)
        self.values.move_to_end(key)
        while len(self.values) > self._max_keys:
            self.values.popitem(last=False)
            self.evicted += 1


class MemoryStore:
    """A client of the given server in memory, or of a new one with ``max_keys`` and ``clock``.

    It has more than 15 methods because it implements all of ``Store``.
    """

    def __init__(
        self,
        server: MemoryServer | None = None,
        *,
        max_keys: int = MAX_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server = MemoryServer(max_keys=max_keys, clock=clock) if server is None else server
        self._open = True
        self._prefix = ""
        self._seen: dict[str, GenerationView] = {}

    @property
    def available(self) -> bool:
        """Whether the store is open."""
        return self._open

    async def connect(self) -> None:
        """Open again after ``close``."""
        self._open = True

    async def read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """See ``Store.read``."""
        server = self._reach()
        return server.read(entry, wanted, server=self._prefix + server.identity)

    def soon(self, callback: Callable[[], None]) -> None:
        """See ``Store.soon``."""
        self._reach()
        asyncio.get_running_loop().call_soon(callback)

    def view(
        self,
        generation: str,
        tags: Sequence[str],
        done: Callable[[GenerationView | StoreError], None],
    ) -> None:
        """See ``Store.view``."""
        server = self._reach()
        found, seen = (
            server.view(generation, tags, server=self._prefix + server.identity),
            self._seen.get(generation),
        )
        if found != seen:
            seen = self._seen[generation] = found
        asyncio.get_running_loop().call_soon(done, seen)

    def listen(self, on_pushed: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        """See ``Store.listen``. No message is ever missed."""
        self.server.listeners.append(on_pushed)

    async def open(self, generation: str, *, nonce: bytes, ttl_ms: int) -> GenerationView:
        """See ``Store.open``."""
        return self._reach().open(generation, nonce=nonce, ttl_ms=ttl_ms, prefix=self._prefix)

    async def bump(
        self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str] = ()
    ) -> Bumped:
        """See ``Store.bump``."""
        return self._reach().bump(
            generation, tags=tags, ttl_ms=ttl_ms, rows=rows, prefix=self._prefix
        )

    async def epoch(
        self, proposed: Epoch | None = None, *, replacing: str = "", ttl_ms: int = 0
    ) -> tuple[Epoch | None, str]:
        """See ``Store.epoch``."""
        return self._reach().epoch(proposed, replacing=replacing, ttl_ms=ttl_ms)

    def adopt(self, token: str) -> None:
        """See ``Store.adopt``."""
        self._prefix = f"{token}:" if token else ""

    def put(
        self, entry: str, envelope: bytes, *, ttl_ms: int, generation: str, generation_ttl_ms: int
    ) -> None:
        """See ``Store.put``."""
        if self._open:
            self.server.put(
                entry,
                envelope,
                ttl_ms=ttl_ms,
                generation=generation,
                generation_ttl_ms=generation_ttl_ms,
            )

    async def lock(
        self, key: str, lock: FillLock, *, ttl_ms: int, replacing: str | None = None
    ) -> FillLock:
        """See ``Store.lock``."""
        return self._reach().lock(key, lock, ttl_ms=ttl_ms, replacing=replacing)

    def release(self, key: str, token: str) -> None:
        """See ``Store.release``."""
        self.server.release(key, token)

    async def switch(self, changes: Mapping[str, bool] = {}) -> frozenset[str]:
        """See ``Store.switch``."""
        return self._reach().switch(changes)

    async def info(self) -> ServerInfo:
        """See ``Store.info``."""
        return self._reach().info()

    async def close(self) -> None:
        """See ``Store.close``."""
        self._open = False

    def restart(self, *, keep_data: bool) -> None:
        """See ``MemoryServer.restart``."""
        self.server.restart(keep_data=keep_data)

    def delete(self, key: str) -> None:
        """See ``MemoryServer.delete``."""
        self.server.delete(key)

    def _reach(self) -> MemoryServer:
        if not self._open:
            raise StoreUnavailable("the memory store is closed")
        return self.server


def _usable(fields: dict[str, bytes] | None, server: str) -> bool:
    """Return whether a generation is complete and of this server life."""
    return read_generation(_values(fields), (), server=server).certificate() is not None


def _values(fields: dict[str, bytes] | None, tags: Sequence[str] = ()) -> list[bytes | None]:
    return [(fields or {}).get(name) for name in ("n", "r", "s", *tags)]
