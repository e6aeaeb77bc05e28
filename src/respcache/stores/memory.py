"""A store in the memory of one process: for tests, examples and applications of a single process.

The same semantics as a server, time to live and eviction included; the contract tests hold both to it. It owns no tasks.
"""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from respcache.core.epochs import Epoch, decode_epoch
from respcache.core.errors import StoreUnavailable
from respcache.core.generations import FLOOR, MAX_FIELDS, RING_ROWS, Generation, read_generation
from respcache.core.keys import EPOCH_KEY, KILL_SWITCH_KEY
from respcache.stores.base import Lease, Reading, ServerInfo

MAX_KEYS = 10_000


class MemoryStore:
    """Keeps at most ``max_keys`` keys, least recently used out first. ``clock`` returns seconds and never goes back."""

    def __init__(self, *, max_keys: int = MAX_KEYS, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._max_keys = max_keys
        self._identity = secrets.token_hex(8)
        self._values: OrderedDict[str, tuple[Any, float]] = OrderedDict()
        self._open = True
        self._prefix = ""
        self.evicted = 0

    @property
    def available(self) -> bool:
        """Whether the store was not closed."""
        return self._open

    async def connect(self) -> None:
        """Open again after ``close``."""
        self._open = True

    async def read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """See ``Store.read``."""
        self._check()
        found = None if entry is None else self._get(entry)
        return Reading(found, tuple(self._view(generation, tags) for generation, tags in wanted))

    async def open(self, generation: str, *, nonce: bytes, ttl_ms: int) -> Generation:
        """See ``Store.open``."""
        self._check()
        fields = self._get(generation)
        if not self._usable(fields):
            fields = {"n": nonce, "r": self._server.encode(), "s": b"0"}
        self._set(generation, fields, ttl_ms)
        return self._view(generation, ())

    async def bump(self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str] = ()) -> str:
        """See ``Store.bump``."""
        self._check()
        fields = self._get(generation)
        if fields is None:
            return self._server
        if not self._usable(fields):
            del self._values[generation]
            return self._server
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
        return self._server

    async def epoch(self, proposed: Epoch | None = None, *, replacing: str = "", ttl_ms: int = 0) -> tuple[Epoch | None, str]:
        """See ``Store.epoch``."""
        self._check()
        record = self._get(EPOCH_KEY)
        held = decode_epoch(record) if isinstance(record, str) else None
        if proposed is not None and (held is None or held.identity != self._identity or held.token == replacing):
            self._set(EPOCH_KEY, proposed.encode(), ttl_ms)
            held = proposed
        return held, self._identity

    def adopt(self, token: str) -> None:
        """See ``Store.adopt``."""
        self._prefix = f"{token}:" if token else ""

    def put(self, entry: str, envelope: bytes, *, ttl_ms: int, generation: str, generation_ttl_ms: int) -> None:
        """See ``Store.put``."""
        if not self._open:
            return
        self._set(entry, envelope, ttl_ms)
        fields = self._get(generation)
        if fields is not None:
            self._set(generation, fields, generation_ttl_ms)

    async def lease(self, key: str, lease: Lease, *, ttl_ms: int, replacing: str | None = None) -> Lease:
        """See ``Store.lease``."""
        self._check()
        held: Lease | None = self._get(key)
        if held is not None and held.token != replacing:
            return held
        self._set(key, lease, ttl_ms)
        return lease

    def release(self, key: str, token: str) -> None:
        """See ``Store.release``."""
        held: Lease | None = self._get(key)
        if held is not None and held.token == token:
            del self._values[key]

    async def switch(self, off: bool | None = None) -> bool:
        """See ``Store.switch``."""
        self._check()
        if off:
            self._values[KILL_SWITCH_KEY] = (b"1", float("inf"))
        elif off is False:
            self._values.pop(KILL_SWITCH_KEY, None)
        return self._get(KILL_SWITCH_KEY) is not None

    async def info(self) -> ServerInfo:
        """See ``Store.info``."""
        self._check()
        return ServerInfo(f"evicted_keys:{self.evicted}\r\n", f"keys:{len(self._values)}\r\n")

    async def close(self) -> None:
        """See ``Store.close``."""
        self._open = False

    def restart(self, *, keep_data: bool) -> None:
        """Become another server life, with the old data or without: what a crash, a failover or a restored dump does."""
        self._identity = secrets.token_hex(8)
        if not keep_data:
            self._values.clear()

    def delete(self, key: str) -> None:
        """Lose a key, as by eviction."""
        self._values.pop(key, None)

    @property
    def _server(self) -> str:
        return self._prefix + self._identity

    def _check(self) -> None:
        if not self._open:
            raise StoreUnavailable("the memory store is closed")

    def _usable(self, fields: dict[str, bytes] | None) -> bool:
        """Whether a generation is whole and of this server life."""
        return read_generation(_values(fields), (), server=self._server).certificate() is not None

    def _view(self, generation: str, tags: Sequence[str]) -> Generation:
        return read_generation(_values(self._get(generation), tags), tags, server=self._server)

    def _get(self, key: str) -> Any:
        value, expires = self._values.get(key, (None, 0.0))
        if value is None:
            return None
        if expires <= self._clock():
            del self._values[key]
            return None
        self._values.move_to_end(key)
        return value

    def _set(self, key: str, value: Any, ttl_ms: int) -> None:
        self._values[key] = (value, self._clock() + ttl_ms / 1000)
        self._values.move_to_end(key)
        while len(self._values) > self._max_keys:
            self._values.popitem(last=False)
            self.evicted += 1


def _values(fields: dict[str, bytes] | None, tags: Sequence[str] = ()) -> list[bytes | None]:
    return [(fields or {}).get(name) for name in ("n", "r", "s", *tags)]
