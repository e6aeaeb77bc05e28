"""The coherence protocol, sans I/O: what makes a stored response valid, and why no read is stale.

Every tenant has one small hash in the store, its *generation*::

    tenant:{tenant}:~gen = { n: random nonce, r: epoch and identity of the server that holds it, s:
    sequence,
                             *: sequence of the last bump of everything, M:accounts: ... of a
                             module, T:accounts: ... of a table, x: ids of the outbox rows that were
                             applied }

A reader that misses *captures* (n, s) before its handler touches the database and stores the
response with that certificate. A writer commits, then *bumps* the tags of what it changed (s += 1;
every tag := s), and only then answers. A stored response is valid iff

    1. a generation exists and was made on the very server life we are connected to,  (r = our epoch
       : identity of in the present epoch
       the connection)
    2. it is the generation under which the response was captured                     (n = nonce of
       the certificate)
    3. nothing that the response depends on was bumped after the capture              (bumps[tag] <=
       s of the certificate)

Why a read that begins after a write was acknowledged never sees the state before it. Let w be that
write and b its bump. The reader evaluates the three conditions on a generation that it reads after
its request began, so after b.

  * b was applied to the generation life n that the reader sees. Then bumps[tag] >= s(b) for each
    tag of w, and condition 3 demands s0 >= s(b): the capture came after b, so after the COMMIT of
    w, so the fill saw w.
  * b met another life, or none: bumping a missing generation does nothing, bumping one of another
    server life deletes it. The life n that the reader sees was then created after b, and every
    certificate under n was captured after that creation, so after COMMIT.

So entries certify themselves: storing one may be lost, delayed, repeated, reordered, rolled back or
evicted, and nothing stale can be served. Only the bump must not be lost: ``fence.py`` is why it
never is.

Why each part is there:

  * the nonce: a generation that is evicted and made anew starts at s = 0; without a fresh random
    nonce an old entry with s0 >= 0 would be valid again (ABA).
  * r: a server that restarts with an old dump, or a replica that is promoted, brings back an old
    generation *and* old entries that agree with each other. Its replication id differs, so
    condition 1 fails. The identity is learnt in the handshake of the connection over which the
    reply came; checked only now and then it would let stale reads by.
  * capture before the handler: a certificate taken after the read would cover writes that the read
    did not see.
  * one hash: it is evicted as a whole. "tag is absent" therefore means "not bumped in this life".
    Never split the tags over several keys, never give fields a time to live of their own, never
    delete a field without raising the floor.
  * a certificate is joined (a caller waits for somebody else's fill) only if it is valid for the
    joiner's own view of the generation, taken after the joiner's request began: condition 3 again.

Without an outbox (applications whose data is not in PostgreSQL) there is no fence: when a bump
cannot be confirmed, the answer of the write says so, this process bypasses that tenant and retries
with the floor ``*``; other processes may serve the old state until the retry lands, and if the
writing process dies first, until the entry's time to live.

Model-checked as core.pml; the mutants NONONCE, NORCHECK, CAPLATE, BUMPFIRST and JOINANY of that
model are the rules above, each left out once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

FLOOR = "*"
"""The tag that every entry of a tenant depends on."""

MAX_TAGS_PER_BUMP = 64
"""A bump of more tags than this becomes a bump of the floor."""

MAX_FIELDS = 2000
"""Fields of a generation beyond which a bump forgets the tags by raising the floor."""

RING_ROWS = 32
"""Ids of outbox rows that a generation remembers as applied, so that N processes that see a row
bump it once."""


def module_tag(module: str) -> str:
    """Name the tag that all entries of a module depend on, whatever tables they read."""
    return f"M:{module}"


def table_tag(table: str) -> str:
    """Name the tag of a database table: bumped by writes to it, depended on by reads of it."""
    return f"T:{table}"


def collapse(tags: Iterable[str]) -> tuple[str, ...]:
    """Return the tags of one bump in order, or only the floor when there are too many (or the floor
    is among them)."""
    unique = sorted(set(tags))
    if FLOOR in unique or len(unique) > MAX_TAGS_PER_BUMP:
        return (FLOOR,)
    return tuple(unique)


class Verdict(StrEnum):
    """Why an entry may or may not be served."""

    VALID = "valid"
    NO_GENERATION = "no-generation"
    OTHER_SERVER = "other-server"
    OTHER_GENERATION = "other-generation"
    INVALIDATED = "invalidated"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a fill captured before it read: the nonce of the generation and its sequence then."""

    nonce: bytes
    sequence: int


@dataclass(slots=True)  # not frozen: a hit from the store makes one
class GenerationView:
    """One view of a tenant's generation: what a single reply told, and over which server's
    connection it came. Never changed.

    ``bumps`` holds the fields that were asked for and have a value; an absent one was never bumped
    in this life.
    """

    server: str
    nonce: bytes | None = None
    recorded: str = ""
    sequence: int = 0
    bumps: dict[str, int] = field(default_factory=dict)

    def certificate(self) -> Certificate | None:
        """Capture: return the certificate for a fill that begins now, or None when there is no
        usable generation."""
        if self.nonce is None or self.recorded != self.server:
            return None
        return Certificate(self.nonce, self.sequence)

    def judge(self, certificate: Certificate, tags: Iterable[str]) -> Verdict:
        """Decide whether something certified by ``certificate`` and depending on ``tags`` is valid
        in this view.

        Every tag must be among the fields that this view was asked for: an unasked field looks like
        an unbumped one.
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
    """Make a view from the reply to ``HMGET gen n r s *tags``; ``server`` is the identity of the
    connection it came by.

    A hash without its head, or with something that is no number where one belongs (a foreign
    writer), counts as missing.
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
