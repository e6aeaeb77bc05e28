"""What the cache requires of a store, independent of the server behind it.

A store never delays a request for long: every awaited operation ends within the store's deadline
(tens of milliseconds) or raises ``StoreUnavailable``. While the server is known to be unavailable,
operations raise at once. ``respcache.testing.store_contract`` tests every store against these
definitions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from respcache.core.epochs import Epoch
from respcache.core.errors import StoreError
from respcache.core.generations import Certificate, GenerationView


@dataclass(slots=True)
class Reading:
    """The result of ``read``: the stored bytes or None, one view per requested generation in the
    same order, and the entry's remaining time to live (ms; 0 without an entry)."""

    entry: bytes | None
    generations: tuple[GenerationView, ...]
    remaining_ms: int = 0


@dataclass(frozen=True, slots=True)
class FillLock:
    """The right to fill one key: the holder's token, and the certificate of its fill."""

    token: str
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Bumped:
    """A confirmed bump: the server life (as in ``GenerationView.server``) that confirmed it, and
    what the generation has reached with it; None if there is no generation (any more)."""

    server: str
    reached: Certificate | None = None


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The text of the server's ``INFO stats`` and ``INFO memory``."""

    stats: str
    memory: str


class EntryStore(Protocol):
    """Stored responses, and the locks of their fills."""

    async def read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """Fetch an entry (none for ``None``) and, for each ``(generation key, tags)``, a view with
        these tags. One round trip of plain commands. All parts come over one connection; its
        server identity is the views' ``server``."""
        ...

    def put(
        self, entry: str, envelope: bytes, *, ttl_ms: int, generation: str, generation_ttl_ms: int
    ) -> None:
        """Send the entry, and renew the generation's time to live. Does not wait, may be lost,
        never raises."""
        ...

    async def lock(
        self, key: str, lock: FillLock, *, ttl_ms: int, replacing: str | None = None
    ) -> FillLock:
        """Take the lock if it is free or owned by the token ``replacing``; return the lock that is
        in force afterwards (ours if its token is ours). One round trip, atomic on one key."""
        ...

    def release(self, key: str, token: str) -> None:
        """Release the lock if ``token`` still owns it. Does not wait, may be lost, never raises.
        Sent after earlier puts."""
        ...


class GenerationStore(Protocol):
    """The generations of tenants, and the epoch that they belong to."""

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back in this turn of the event loop, just before the commands of this turn are
        sent. Raises ``StoreUnavailable``."""
        ...

    def view(
        self,
        generation: str,
        tags: Sequence[str],
        done: Callable[[GenerationView | StoreError], None],
    ) -> None:
        """Fetch a view and pass it, or the error, to ``done``, without a task. If nothing has
        changed, it is the same object as the last time. One round trip. Raises
        ``StoreUnavailable`` where that is known at once."""
        ...

    def listen(self, on_pushed: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        """Register the one listener for bumps.

        ``on_pushed`` is called with the key of each bumped generation: for bumps of this store
        when ``bump`` begins and when it returns, for those of others soon after. ``on_lost`` is
        called when some may have been missed. Messages of others may be late or lost."""
        ...

    async def open(self, generation: str, *, nonce: bytes, ttl_ms: int) -> GenerationView:
        """Create the generation with this nonce at sequence 0, unless a usable one exists, and
        return a view without tags. Replaces a generation of another server life, and renews the
        time to live. One round trip, atomic on one key."""
        ...

    async def bump(
        self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str] = ()
    ) -> Bumped:
        """Advance the sequence, and record it for every tag.

        Returning means confirmed: the bump was applied; or there was no generation, so nothing
        depends on it; or the generation was of another server life or epoch and was deleted.
        ``rows`` are ids of outbox rows (16 characters each): a bump whose rows were all applied to
        this generation before does nothing. A view that has reached the returned certificate
        includes the bump. One round trip, atomic on one key."""
        ...

    async def epoch(
        self, proposed: Epoch | None = None, *, replacing: str = "", ttl_ms: int = 0
    ) -> tuple[Epoch | None, str]:
        """Read the stored epoch (``None``), or set it unless one with another token than
        ``replacing`` is in force on this server life. Return the one in force, or None, and the
        server's identity. One round trip, atomic on one key."""
        ...

    def adopt(self, token: str) -> None:
        """Create, read and bump generations of this epoch from now on. Until then the epoch's token
        is empty."""
        ...


class Store(EntryStore, GenerationStore, Protocol):
    """A store: entries, generations, switches, and the connection to the server.

    ``core.keys`` makes all keys.
    """

    @property
    def available(self) -> bool:
        """Whether an operation can succeed now, because a usable connection exists. Free."""
        ...

    async def connect(self) -> None:
        """Begin to connect; return when connected, or when the first attempt has failed. Never
        raises for an unavailable server: the store retries in the background until ``close``."""
        ...

    async def switch(self, changes: Mapping[str, bool] = {}) -> frozenset[str]:
        """Turn switches off (True) or on for all processes of this store; return the names of all
        that are off. They stay off until turned on, or lost. One round trip."""
        ...

    async def info(self) -> ServerInfo:
        """Read the server's statistics. One round trip."""
        ...

    async def close(self) -> None:
        """Release connections and tasks. Later operations raise ``StoreUnavailable``."""
        ...
