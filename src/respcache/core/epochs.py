"""The epoch: one life of the whole cache.

Its token is part of every generation's ``r``, so a new epoch invalidates everything. Its record is
stored on the cache server under ``respcache:~inc``. ``serving_lease.py`` explains why it exists,
``writes/relay.py`` creates it. Without an outbox there is no epoch, and the token is empty.
"""

import re
from dataclasses import dataclass

_RECORD = re.compile(r"([0-9a-f]+) ([0-9a-f]+) ([!-~]+) ([0-9]+\.[0-9]+) ([0-9]+:[0-9]+:[0-9,]*)")
"""``epoch.lua`` has the same pattern: a record that matches only one of them could neither be read
nor replaced."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """What has been read of the outbox: everything that a snapshot of the database
    (``xmin:xmax:xip,...``) sees."""

    snapshot: str
    taken_at: float
    """Seconds since 1970, by the database's clock."""

    @property
    def xmin(self) -> int:
        """All transactions with smaller numbers had ended."""
        return int(self.snapshot.split(":")[0])

    @property
    def xmax(self) -> int:
        """No transaction with this or a larger number had ended."""
        return int(self.snapshot.split(":")[1])


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch: its token, and the server life (``identity``), the incarnation of the database and
    the snapshot (``cursor``) for which it holds."""

    token: str
    identity: str
    incarnation: str
    cursor: Cursor

    @property
    def server(self) -> str:
        """The value that generations of this epoch record as ``r``."""
        return f"{self.token}:{self.identity}"

    def encode(self) -> str:
        """Return the stored record: fields separated by blanks, token and identity first."""
        return (
            f"{self.token} {self.identity} {self.incarnation} {self.cursor.taken_at!r} "
            f"{self.cursor.snapshot}"
        )


def decode_epoch(record: str) -> Epoch | None:
    """Parse a stored record; return None for anything else."""
    found = _RECORD.fullmatch(record)
    if found is None:
        return None
    token, identity, incarnation, taken_at, snapshot = found.groups()
    return Epoch(token, identity, incarnation, Cursor(snapshot, float(taken_at)))
