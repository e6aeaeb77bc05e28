"""What the cache asks of a store, in the words of the protocol, whatever server is behind it.

A store never blocks a request for long: every awaited operation ends within the store's deadline
(tens of milliseconds) or raises ``StoreUnavailable``. While the store is known to be away they
raise at once. ``contract`` tests in ``tests/contract`` run on every store.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from respcache.core.epochs import Epoch
from respcache.core.errors import StoreError
from respcache.core.generations import Certificate, GenerationView


@dataclass(slots=True)
class Reading:
    """The answer to ``read``: the stored bytes, if any, one view per generation asked for, in that
    order, and for how long the entry will go on living (ms; 0 where there is none)."""

    entry: bytes | None
    generations: tuple[GenerationView, ...]
    remaining_ms: int = 0


@dataclass(frozen=True, slots=True)
class FillLock:
    """Who fills a key at present, and under which certificate."""

    token: str
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Bumped:
    """What a bump came to: the server life (as in ``GenerationView.server``) that confirmed it, and
    what the generation has reached with it, None where there is none (any more)."""

    server: str
    reached: Certificate | None = None


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server says of itself, as text: ``INFO stats`` and ``INFO memory``."""

    stats: str
    memory: str


class Store(Protocol):
    """Where entries, generations and leases live. All keys are made by ``core.keys``."""

    @property
    def available(self) -> bool:
        """Whether an operation has a chance now (a usable connection exists). Costs nothing."""
        ...

    async def connect(self) -> None:
        """Begin to connect, and return when connected or when the first attempt has failed. Never
        raises for a dead server; the store goes on trying in the background until ``close``."""
        ...

    async def read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """Fetch an entry (or none, with ``None``) and, for each ``(generation key, tags)``, a view
        with these tags. One round trip of plain commands. All parts come over one connection, whose
        identity is the views' ``server``."""
        ...

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back in this turn of the event loop, just before what was asked for in it leaves.
        Raises ``StoreUnavailable``."""
        ...

    def view(
        self,
        generation: str,
        tags: Sequence[str],
        done: Callable[[GenerationView | StoreError], None],
    ) -> None:
        """Fetch a view and hand it, or what went wrong, to ``done``, without a task. The same
        object as the last time where nothing has changed. One round trip. Raises
        ``StoreUnavailable`` where that is known at once."""
        ...

    def listen(self, heard: Callable[[str], None], lost: Callable[[], None]) -> None:
        """Have ``heard`` called with the key of every generation that is bumped: by this store when
        ``bump`` begins and when it returns, by others soon after; ``lost`` when some may have been
        missed. No promise: messages of others may be late or lost. One listener."""
        ...

    async def open(self, generation: str, *, nonce: bytes, ttl_ms: int) -> GenerationView:
        """Make the generation with this nonce at sequence 0, unless a usable one exists, and return
        a view without tags. A generation of another server life is replaced. Renews the time to
        live. One round trip, atomic on one key."""
        ...

    async def bump(
        self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str] = ()
    ) -> Bumped:
        """Advance the sequence and stamp it on every tag. Returning means confirmed: applied, or
        there was no generation (nothing depends on it), or one of another server life or epoch,
        which is deleted. ``rows`` are ids of outbox rows (16 characters each): a bump whose rows
        were all applied to this generation before does nothing. A view that has reached what is
        returned holds it. One round trip, atomic on one key."""
        ...

    async def epoch(
        self, proposed: Epoch | None = None, *, replacing: str = "", ttl_ms: int = 0
    ) -> tuple[Epoch | None, str]:
        """Read the epoch's record (``None``), or set it unless another than the token ``replacing``
        is in force on this server life. Returns the one in force, or None, and the server's
        identity. One round trip, atomic on one key."""
        ...

    def adopt(self, token: str) -> None:
        """Make, read and bump generations of this epoch from now on; the empty one until then."""
        ...

    def put(
        self, entry: str, envelope: bytes, *, ttl_ms: int, generation: str, generation_ttl_ms: int
    ) -> None:
        """Send the entry on its way and renew the generation's time to live; does not wait, may be
        lost, never raises."""
        ...

    async def lock(
        self, key: str, lock: FillLock, *, ttl_ms: int, replacing: str | None = None
    ) -> FillLock:
        """Take the lease if it is free or held by the token ``replacing``; return the lease that is
        in force afterwards (ours if its token is ours). One round trip, atomic on one key."""
        ...

    def release(self, key: str, token: str) -> None:
        """Give the lease back if ``token`` still holds it; does not wait, may be lost, never
        raises. Sent after earlier puts."""
        ...

    async def switch(self, changes: Mapping[str, bool] = {}) -> frozenset[str]:
        """Turn switches off (True) or on that all processes of this store look at; return the names
        of all that are off. They stay until they are turned on, or lost. One round trip."""
        ...

    async def info(self) -> ServerInfo:
        """Ask the server for its figures. One round trip."""
        ...

    async def close(self) -> None:
        """Let go of connections and tasks. Later operations raise ``StoreUnavailable``."""
        ...
