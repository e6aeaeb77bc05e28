"""The epoch: a life of the whole cache. Its token is part of every generation's ``r``, so a new one
invalidates everything.

Its record stands in the store under ``respcache:~inc``. ``fence.py`` says why there is one,
``writes/rounds.py`` makes it; without an outbox there is none and the token is empty.
"""

import re
from dataclasses import dataclass

_RECORD = re.compile(r"([0-9a-f]+) ([0-9a-f]+) ([!-~]+) ([0-9]+\.[0-9]+) ([0-9]+:[0-9]+:[0-9,]*)")
"""The same pattern stands in ``epoch.lua``: a record that only one of the two knew could neither be
read nor replaced."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """What has been read of the outbox: everything that a snapshot of the database sees
    (``xmin:xmax:xip,...``)."""

    snapshot: str
    taken_at: float
    """Seconds since 1970, by the database's clock."""

    @property
    def xmin(self) -> int:
        """Every transaction before this one had ended."""
        return int(self.snapshot.split(":")[0])

    @property
    def xmax(self) -> int:
        """No transaction from this one on had ended."""
        return int(self.snapshot.split(":")[1])


@dataclass(frozen=True, slots=True)
class Epoch:
    """On which server life (``identity``), for which incarnation of the database and from which
    snapshot on it holds."""

    token: str
    identity: str
    incarnation: str
    cursor: Cursor

    @property
    def server(self) -> str:
        """What a generation of this epoch records as its ``r``."""
        return f"{self.token}:{self.identity}"

    def encode(self) -> str:
        """Return the record that the store keeps: fields separated by blanks, token and identity
        first."""
        return (
            f"{self.token} {self.identity} {self.incarnation} {self.cursor.taken_at!r} "
            f"{self.cursor.snapshot}"
        )


def decode_epoch(record: str) -> Epoch | None:
    """Read a record back, or return None for anything that is none (a foreign value under our
    key)."""
    found = _RECORD.fullmatch(record)
    if found is None:
        return None
    token, identity, incarnation, taken_at, snapshot = found.groups()
    return Epoch(token, identity, incarnation, Cursor(snapshot, float(taken_at)))
