"""The feed: what is being invalidated just now, by whom, and how long it took."""

from datetime import datetime

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One invalidation of one tenant."""

    id: str
    """Of the feed; rises. ``feed(after=id)`` goes on from here."""
    at: datetime
    tenant: str
    modules: tuple[str, ...] = ()
    """Whose answers can have been made cold."""
    tables: tuple[str, ...] = ()
    everything: bool = False
    """All of the tenant."""
    cause: str
    """``PUT /api/leads/{id}``, ``outbox`` (another process's write, or psql's), ``purge by <name>``, ``audit``, ``script``."""
    outcome: str
    """``confirmed``, ``pending; safe`` or ``pending`` (``core.fence.Outcome``)."""
    seconds: float
    """From the COMMIT, or of the outbox from when the oldest row was written, to the outcome."""
    process: str
    """Host and process id of who sent the bump."""
    skipped: int = 0
    """Further invalidations of this process that are not in the feed, since its last event: there were too many."""


class Feed(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the feed, the oldest first."""

    events: list[Event]
    last: str
    """Give it as ``after`` to go on."""
    processes: str
    """``all``, or ``this`` where the server is away or is none."""
