"""What operators' tools plug into a cache. The cache knows them by these protocols only."""

from typing import Any, Protocol

from respcache.core.serving_lease import Outcome
from respcache.writes.relay import Rows


class Publisher(Protocol):
    """Publishes the statistics of a cache, which starts and closes it."""

    def attach(self, cache: Any, /) -> None:
        """Take over a cache. Raises ``ConfigurationError`` for a second one."""
        ...

    def start(self) -> None:
        """Begin to publish. Does not wait."""
        ...

    async def close(self) -> None:
        """Stop, and disconnect."""
        ...


class InvalidationFeed(Protocol):
    """Receives the invalidations of a cache, which closes it. Must not wait and not raise."""

    def note(self, rows: Rows, outcome: Outcome, seconds: float) -> None:
        """Receive what this process has invalidated: rows of (tenant, tag, id), and the seconds
        since the COMMIT."""
        ...

    def found(self, rows: Rows, outcome: Outcome, seconds: float) -> None:
        """Receive what other writers left in the outbox and this process has invalidated."""
        ...

    async def close(self) -> None:
        """Stop, and disconnect."""
        ...
