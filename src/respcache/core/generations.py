"""The coherence protocol, sans I/O: what makes a stored response valid, and why no read is stale.

Every tenant has one small hash on the cache server, its *generation*::

    tenant:{tenant}:~gen = {
        n: random nonce,
        r: epoch and identity of the server that stores it,
        s: sequence,
        *: sequence of the last bump of everything,
        M:accounts: ... of a module,
        T:accounts: ... of a table,
        x: ids of the outbox rows that were applied,
    }

A reader that misses *captures* (n, s) before its handler reads the database, and stores the
response with that certificate. A writer commits, then *bumps* the tags of what it changed (s += 1;
every tag := s), and only then acknowledges the write. A stored response is valid iff

    1. a generation exists, and it was created on the very server life we are connected to, in the
       present epoch (r = our epoch : identity of the connection);
    2. it is the generation under which the response was captured (n = the certificate's nonce);
    3. nothing on which the response depends was bumped after the capture (bumps[tag] <= the
       certificate's s).

Why a read that begins after a write was acknowledged never returns the state before it. Let w be
that write and b its bump. The reader evaluates the three conditions on a generation that it reads
after its request began, so after b.

  * b was applied to the generation life n that the reader sees. Then bumps[tag] >= s(b) for each
    tag of w, and condition 3 requires s0 >= s(b): the capture came after b, so after the COMMIT of
    w, so the fill saw w.
  * b met another life, or none: bumping a missing generation does nothing, and bumping one of
    another server life deletes it. The life n that the reader sees was then created after b, and
    every certificate under n was captured after that creation, so after COMMIT.

So entries certify themselves. A stored entry may be lost, delayed, repeated, reordered, rolled back
or evicted, and still nothing stale can be served. Only the bump must not be lost:
``serving_lease.py`` explains why it never is.

Why each part is there:

  * the nonce: a generation that is evicted and created again starts at s = 0. Without a fresh
    random nonce, an old entry with s0 >= 0 would be valid again (ABA).
  * r: a server that restarts from an old dump, or a replica that is promoted, brings back an old
    generation *and* old entries that agree with each other. Its replication id differs, so
    condition 1 fails. The identity is read in the handshake of the connection over which the reply
    came; if it were only checked from time to time, stale reads would be possible in between.
  * capture before the handler: a certificate taken after the read would cover writes that the read
    did not see.
  * one hash: it is evicted as a whole. "tag is absent" therefore means "not bumped in this life".
    Never split the tags over several keys, never give fields a time to live of their own, never
    delete a field without raising the floor.
  * a certificate is joined (a caller waits for another caller's fill) only if it is valid for the
    joiner's own view of the generation, taken after the joiner's request began: condition 3 again.

Without an outbox (applications whose data is not in PostgreSQL) there is no serving lease. When a
bump cannot be confirmed, the response to the write says so, and this process bypasses that tenant
and retries with the floor ``*``. Other processes may serve the old state until the retry succeeds,
and, if the writing process dies first, until the entry's time to live ends.

Model-checked as core.pml. The mutants NONONCE, NORCHECK, CAPLATE, BUMPFIRST and JOINANY of that
model are the rules above, each left out once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

FLOOR = "*"
"""The tag on which every entry of a tenant depends."""

MAX_TAGS_PER_BUMP = 64
"""A bump of more tags than this becomes a bump of the floor."""

MAX_FIELDS = 2000
"""Beyond this number of fields, a bump deletes the tags and raises the floor."""

RING_ROWS = 32
"""Ids of applied outbox rows that a generation remembers, so that N processes that read a row bump
it once."""


def module_tag(module: str) -> str:
    """Return the tag on which all entries of a module depend, whatever tables they read."""
    return f"M:{module}"


def table_tag(table: str) -> str:
    """Return the tag of a database table: writes to it bump the tag, reads of it depend on it."""
    return f"T:{table}"


def collapse(tags: Iterable[str]) -> tuple[str, ...]:
    """Return the tags of one bump in order; only the floor if it is among them, or if there are
    more than ``MAX_TAGS_PER_BUMP``."""
    unique = sorted(set(tags))
    if FLOOR in unique or len(unique) > MAX_TAGS_PER_BUMP:
        return (FLOOR,)
    return tuple(unique)


class Verdict(StrEnum):
    """Whether an entry may be served, or why not."""

    VALID = "valid"
    NO_GENERATION = "no-generation"
    OTHER_SERVER = "other-server"
    OTHER_GENERATION = "other-generation"
    INVALIDATED = "invalidated"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a fill captured before it read: the generation's nonce and sequence at that time."""

    nonce: bytes
    sequence: int


@dataclass(slots=True)  # not frozen: a hit from the store makes one
class GenerationView:
    """One view of a tenant's generation: the contents of one reply, and the server identity of the
    connection over which it came. Never changed.

    ``bumps`` holds the requested fields that have a value. An absent one was never bumped in this
    life of the generation.
    """

    server: str
    nonce: bytes | None = None
    recorded: str = ""
    sequence: int = 0
    bumps: dict[str, int] = field(default_factory=dict)

    def certificate(self) -> Certificate | None:
        """Return the certificate for a fill that begins now, or None without a usable
        generation."""
        if self.nonce is None or self.recorded != self.server:
            return None
        return Certificate(self.nonce, self.sequence)

    def judge(self, certificate: Certificate, tags: Iterable[str]) -> Verdict:
        """Decide whether an entry with this certificate that depends on ``tags`` is valid in this
        view.

        Every tag must be among the fields that this view requested: a field that was not requested
        looks like one that was never bumped.
        """
        if self.nonce is None:
            return Verdict.NO_GENERATION
        if self.recorded != self.server:
            return Verdict.OTHER_SERVER
        if self.nonce != certificate.nonce:
            return Verdict.OTHER_GENERATION
        bumps, captured = self.bumps, certificate.sequence
        for tag in tags:
            if bumps.get(tag, 0) > captured:
                return Verdict.INVALIDATED
        return Verdict.VALID


def read_generation(
    values: Sequence[bytes | None], tags: Sequence[str], *, server: str
) -> GenerationView:
    """Return a view of the reply to ``HMGET gen n r s *tags``; ``server`` is the identity of the
    connection over which it came.

    A hash without ``n``, ``r`` or ``s``, or with a value that should be a number and is none,
    counts as missing.
    """
    nonce, recorded, sequence = values[0], values[1], values[2]
    if nonce is None or recorded is None or sequence is None:
        return GenerationView(server)
    try:
        bumps = {
            tag: int(value)
            for tag, value in zip(tags, values[3:], strict=True)
            if value is not None
        }
        return GenerationView(server, nonce, recorded.decode("latin-1"), int(sequence), bumps)
    except ValueError:
        return GenerationView(server)
