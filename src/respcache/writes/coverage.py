"""Which tables leave rows in the outbox, and which may still be believed to. No I/O."""

import logging
from collections.abc import Iterable

from respcache.core.serving_lease import OutboxPage

log = logging.getLogger("respcache")


class TableCoverage:
    """The tables, functions and triggers that the last page reported.

    ``lease_s`` in the methods is how long, by this process's clock, a serving lease of another
    host may outlive an event that this process has seen.
    """

    def __init__(self) -> None:
        self.tables: frozenset[str] = frozenset()
        """The tables whose writes leave rows. Read on every request."""
        self.functions: frozenset[str] = frozenset()
        """Functions that may write although the statement that calls them does not say so."""
        self.deferred = True
        """Whether triggers of the application may write at COMMIT; true until the first page."""
        self.unsound: frozenset[str] = frozenset()
        """Tables whose triggers miss some writes."""
        self.known_since: float | None = None
        """When this process first learnt which tables are covered."""
        self.missing_since: float | None = None
        """Since when there has been no outbox; None while there is one."""
        self.covered_until: dict[str, float] = {}
        """For each table that lost its coverage: until when other processes may rely on it."""

    def update(self, page: OutboxPage, *, now: float, lease_s: float) -> None:
        """Take over what a page reports; log tables whose triggers are incomplete, once."""
        self.missing_since = None
        self.replace(page.tables, now=now, lease_s=lease_s)
        self.functions, self.deferred = page.functions, page.deferred
        if page.unsound - self.unsound:
            log.warning(
                "not cached: reads of %s, because their triggers do not always fire, write the "
                "tag of another table, or miss writes to a parent or child table; watch_table "
                "(respcache.writes.alembic) repairs all but the last",
                ", ".join(sorted(page.unsound)),
            )
        self.unsound = page.unsound

    def lose(self, *, now: float, lease_s: float) -> None:
        """Record that the outbox does not exist."""
        if self.missing_since is None:
            self.missing_since = now
        self.replace(frozenset(), now=now, lease_s=lease_s)

    def replace(self, tables: frozenset[str], *, now: float, lease_s: float) -> None:
        """Set the covered tables, and remember those that are no longer covered."""
        if self.known_since is None:
            self.known_since = now
        until = now + lease_s
        self.covered_until.update((table, until) for table in self.tables - tables)
        self.covered_until = {table: end for table, end in self.covered_until.items() if end > now}
        self.tables = tables

    def covers(self, tables: Iterable[str]) -> bool:
        """Return whether writes to all of these tables leave rows."""
        return self.tables.issuperset(tables)

    def may_be_cached(self, table: str, *, now: float, lease_s: float) -> bool:
        """Return whether some process may still serve responses that were read from this table.

        False once a lease has passed since this process learnt that writes to the table leave no
        rows: by then every process has learnt it too, or has no serving lease.
        """
        if table in self.tables or self.known_since is None:
            return True
        return now < self.covered_until.get(table, self.known_since + lease_s)

    def anything_may_be_cached(self, *, now: float, lease_s: float) -> bool:
        """Return whether ``may_be_cached`` may hold for any table at all."""
        if self.tables or self.known_since is None:
            return True
        return now < max((self.known_since + lease_s, *self.covered_until.values()))
