"""The store on a Valkey or Redis server, version 6.2 or newer.

Hits are plain pipelined commands. What must be atomic is a script on one key (``lua/``). ``OPEN``
and ``BUMP`` also return the server's identity: when a server's first replica attaches, the identity
changes during a connection's life. The connection is then dropped, to learn the new identity.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import hiredis

from respcache.core.epochs import Epoch, decode_epoch
from respcache.core.errors import StoreError, StoreReplyError, StoreUnavailable
from respcache.core.generations import (
    MAX_FIELDS,
    RING_ROWS,
    Certificate,
    GenerationView,
    read_generation,
)
from respcache.core.keys import BUMPS_CHANNEL, EPOCH_KEY, SWITCHES_KEY
from respcache.resp.connection import FATAL_ERRORS, Command, as_text, fields_of
from respcache.resp.link import CONNECT_DEADLINE_S, DEADLINE_S, Link
from respcache.resp.url import ServerURL
from respcache.stores.base import Bumped, FillLock, Reading, ServerInfo

MAX_SEEN = 10_000
"""Generations whose last view is kept, so that an equal reply returns the same object."""


class Script:
    """A Lua script and its digest. Sent by digest, and in full if the server does not know it."""

    __slots__ = ("digest", "text")

    def __init__(self, name: str) -> None:
        self.text = (
            resources.files("respcache.stores").joinpath("lua", f"{name}.lua").read_text("ascii")
        )
        self.digest = hashlib.sha1(self.text.encode("ascii"), usedforsecurity=False).hexdigest()


class RedisStore:
    """A store on one server. ``url``: ``redis://[user]:[password]@host[:port][/database]``.

    It has more than 15 methods because it implements all of ``Store``.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = DEADLINE_S,
        connect_deadline_s: float = CONNECT_DEADLINE_S,
    ) -> None:
        self._link = Link(
            ServerURL.parse(url), deadline_s=deadline_s, connect_deadline_s=connect_deadline_s
        )
        self._open, self._bump, self._epoch = map(Script, ("open", "bump", "epoch"))
        self._lock, self._release = map(Script, ("lock", "release"))
        self._prefix = ""
        # of each generation: the last view
        self._seen: dict[str, tuple[Sequence[str], list[Any], str, GenerationView]] = {}
        self._on_pushed: Callable[[str], None] = lambda generation: None

    def __repr__(self) -> str:
        return f"RedisStore({self._link!r})"

    @property
    def available(self) -> bool:
        """Whether there is a connection now."""
        return self._link.up

    @property
    def url(self) -> ServerURL:
        """The server's address."""
        return self._link.url

    def counters(self) -> dict[str, int]:
        """Return the numbers of error replies, timeouts, commands sent and reconnects so far."""
        return self._link.counters()

    async def connect(self) -> None:
        """See ``Store.connect``."""
        await self._link.connect()

    async def close(self) -> None:
        """See ``Store.close``."""
        await self._link.close()

    async def read(self, entry: str | None, wanted: Sequence[tuple[str, Sequence[str]]]) -> Reading:
        """See ``Store.read``: GET, PTTL, and one HMGET per generation."""
        commands: list[Command] = [] if entry is None else [("GET", entry), ("PTTL", entry)]
        commands += [("HMGET", generation, "n", "r", "s", *tags) for generation, tags in wanted]
        prefix = self._prefix
        future, identity = self._link.request(*commands)
        replies = await future
        server = prefix + identity
        found, remaining_ms = None, 0
        if entry is not None:
            found, remaining_ms = _ours(replies[0]), max(0, _good(replies[1]))
            del replies[:2]
        views = [
            self._recognise(generation, tags, reply, server=server)
            for reply, (generation, tags) in zip(replies, wanted, strict=True)
        ]
        return Reading(found, tuple(views), remaining_ms)

    def soon(self, callback: Callable[[], None]) -> None:
        """See ``Store.soon``."""
        self._link.soon(callback)

    def view(
        self,
        generation: str,
        tags: Sequence[str],
        done: Callable[[GenerationView | StoreError], None],
    ) -> None:
        """See ``Store.view``: HMGET. A reply equal to the last one creates no new view."""
        prefix = self._prefix
        future, identity = self._link.request(("HMGET", generation, "n", "r", "s", *tags))

        def complete(replied: "asyncio.Future[list[Any]]") -> None:
            try:
                view = self._recognise(
                    generation, tags, replied.result()[0], server=prefix + identity
                )
            except StoreError as error:
                done(error)
                return
            done(view)

        future.add_done_callback(complete)

    def listen(self, on_pushed: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        """See ``Store.listen``: subscribe to the channel on which ``BUMP`` publishes. Without the
        permission for it, only the bumps of this store are reported."""
        self._on_pushed = on_pushed
        self._link.listen(
            BUMPS_CHANNEL, lambda payload: on_pushed(payload.decode("utf-8", "replace")), on_lost
        )

    def watch(self, changed: Callable[[StoreUnavailable | None], None]) -> None:
        """Register the one watcher: ``changed`` is called with the error when the server becomes
        unavailable, and with None when it is available again."""
        self._link.watch(changed)

    async def open(self, generation: str, *, nonce: bytes, ttl_ms: int) -> GenerationView:
        """See ``Store.open``."""
        prefix = self._prefix
        (identity, found, sequence), learnt = await self._run(
            self._open, generation, prefix, nonce, ttl_ms
        )
        self._compare(as_text(identity), learnt)
        return GenerationView(prefix + learnt, found, prefix + as_text(identity), int(sequence))

    async def bump(
        self, generation: str, *, tags: Sequence[str], ttl_ms: int, rows: Sequence[str] = ()
    ) -> Bumped:
        """See ``Store.bump``."""
        prefix = self._prefix
        # views read from now on come after the bump; again below, if it had to be sent twice
        self._on_pushed(generation)
        (identity, *reached), learnt = await self._run(
            self._bump,
            generation,
            prefix,
            ttl_ms,
            MAX_FIELDS,
            RING_ROWS,
            len(rows),
            BUMPS_CHANNEL,
            *rows,
            *tags,
        )
        self._on_pushed(generation)
        self._compare(as_text(identity), learnt)
        return Bumped(
            prefix + as_text(identity),
            Certificate(reached[0], int(reached[1])) if reached else None,
        )

    async def epoch(
        self, proposed: Epoch | None = None, *, replacing: str = "", ttl_ms: int = 0
    ) -> tuple[Epoch | None, str]:
        """See ``Store.epoch``: INFO and GET, or one script."""
        if proposed is None:
            replies, learnt = await self._link.execute(("INFO", "replication"), ("GET", EPOCH_KEY))
            identity = fields_of(_good(replies[0])).get("master_replid", "")
            self._compare(identity, learnt)
            record = _ours(replies[1])
            return (None if record is None else decode_epoch(as_text(record))), identity
        (named, record), learnt = await self._run(
            self._epoch, EPOCH_KEY, proposed.encode(), replacing, ttl_ms
        )
        self._compare(as_text(named), learnt)
        return decode_epoch(as_text(record)), as_text(named)

    def adopt(self, token: str) -> None:
        """See ``Store.adopt``."""
        self._prefix = f"{token}:" if token else ""

    def put(
        self, entry: str, envelope: bytes, *, ttl_ms: int, generation: str, generation_ttl_ms: int
    ) -> None:
        """See ``Store.put``: SET and PEXPIRE."""
        self._link.send(
            ("SET", entry, envelope, "PX", ttl_ms), ("PEXPIRE", generation, generation_ttl_ms)
        )

    async def lock(
        self, key: str, lock: FillLock, *, ttl_ms: int, replacing: str | None = None
    ) -> FillLock:
        """See ``Store.lock``. The value: token, nonce and sequence, separated by blanks."""
        value = f"{lock.token} {lock.certificate.nonce.decode()} {lock.certificate.sequence}"
        present, _ = await self._run(self._lock, key, lock.token, value, ttl_ms, replacing or "")
        parts = as_text(present).split(" ")
        if len(parts) != 3 or not parts[2].isdigit():
            raise StoreReplyError("the key of a fill lock contains another value")
        return FillLock(parts[0], Certificate(parts[1].encode(), int(parts[2])))

    def release(self, key: str, token: str) -> None:
        """See ``Store.release``."""
        # in full: no caller waits, so it could not be sent again
        self._link.send(("EVAL", self._release.text, 1, key, token))

    async def switch(self, changes: Mapping[str, bool] = {}) -> frozenset[str]:
        """See ``Store.switch``: HSET or HDEL, and HKEYS. HKEYS counts as a use, so LRU does not
        evict the switches early."""
        commands: list[Command] = [
            ("HSET", SWITCHES_KEY, name, "1") if off else ("HDEL", SWITCHES_KEY, name)
            for name, off in changes.items()
        ]
        commands.append(("HKEYS", SWITCHES_KEY))
        replies, _ = await self._link.execute(*commands)
        if changes and _ours(replies[0]) is None:  # the key contains something other than a hash
            replies, _ = await self._link.execute(("DEL", SWITCHES_KEY), *commands)
        for reply in replies:
            _ours(reply)
        return frozenset(map(as_text, _ours(replies[-1]) or ()))

    async def info(self) -> ServerInfo:
        """See ``Store.info``."""
        replies, _ = await self._link.execute(("INFO", "stats"), ("INFO", "memory"))
        return ServerInfo(as_text(_good(replies[0])), as_text(_good(replies[1])))

    async def _run(
        self, script: Script, key: str, *arguments: str | bytes | int
    ) -> tuple[Any, str]:
        """Run a script on one key; return its reply and the server identity of the connection."""
        (reply,), server = await self._link.execute(("EVALSHA", script.digest, 1, key, *arguments))
        if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
            (reply,), server = await self._link.execute(("EVAL", script.text, 1, key, *arguments))
        return _good(reply), server

    def _recognise(
        self, generation: str, tags: Sequence[str], reply: Any, *, server: str
    ) -> GenerationView:
        """Return a view of the reply to HMGET: the last one if the reply is equal."""
        found = _ours(reply) or [None] * (3 + len(tags))
        seen = self._seen.get(generation)
        if seen is None or seen[1] != found or seen[0] != tags or seen[2] != server:
            if len(self._seen) >= MAX_SEEN:
                self._seen.clear()
            seen = self._seen[generation] = (
                tags,
                found,
                server,
                read_generation(found, tags, server=server),
            )
        return seen[3]

    def _compare(self, identity: str, server: str) -> None:
        if identity != server:
            self._link.relearn(server)


def _ours(reply: Any) -> Any:
    """Return a reply, or None for a value of another type under our key. It counts as missing, and
    is replaced with the next write."""
    return (
        None
        if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("WRONGTYPE")
        else _good(reply)
    )


def _good(reply: Any) -> Any:
    """Return a reply that is no error. Raises ``StoreUnavailable`` if the server cannot serve now,
    ``StoreReplyError`` for other errors."""
    if isinstance(reply, hiredis.ReplyError):
        text = str(reply)
        raise StoreUnavailable(text) if text.startswith(FATAL_ERRORS) else StoreReplyError(text)
    return reply
