"""Tokens: how a client sees its own writes in every process, at the levels whose hits may be judged
by an older view.

At level ``bounded`` a process may use a view of a generation until it is ``bound_s`` old, and at
``ttl`` for longer. A client that wrote through one process and then reads through another could
miss its own write. So the answer of a write carries a *token*: the nonce of the generation that was
bumped, and the sequence that it has reached. For a request that brings it back, a remembered view
counts only if it is of that life and has reached that sequence: then it holds the bump, and
whatever the write made invalid is invalid in it. Else a view is read first, as at level ``strict``.

  * the nonce: a generation that is made anew begins at 0. A view of its former life may have a
    higher sequence and knows nothing of the bump.
  * no known sequence (the generation did not exist, which says nothing of the views of others;
    several tenants were written to; a round has confirmed the bump, not this process): the token
    says so, and no remembered view ever counts.

A token can only forbid a remembered view. Whatever stands in one, true, old, foreign or forged, it
never widens what is served, and costs one reading at most. So it is neither signed nor secret.
"""

import re
from collections.abc import Iterable

from respcache.core.generations import Certificate, GenerationView

HEADER = b"x-cache-token"
"""Of requests and of answers."""

UNKNOWN = b"validate"
"""The token that no view has reached."""

MAX_BYTES = 256
"""Of all that one request brings; longer ones are not read."""

ConsistencyToken = tuple[Certificate, ...]
"""What a view must have reached, each of it; empty where that is not known."""

_ONE = re.compile(rb"([0-9a-f]{16})\.([0-9]{1,18})")


def encode(token: ConsistencyToken) -> bytes:
    """Spell a token. One that could not be read again (a foreign hand has written the nonce) is
    spelt ``UNKNOWN``."""
    text = b",".join(b"%s.%d" % (one.nonce, one.sequence) for one in token)
    return text if token and decode(text) == token else UNKNOWN


def decode(text: bytes) -> ConsistencyToken:
    """Read one or several tokens, separated by commas; the empty one where that is not what they
    are."""
    if len(text) > MAX_BYTES:
        return ()
    found = [_ONE.fullmatch(part.strip(b" \t")) for part in text.split(b",")]
    return (
        ()
        if None in found
        else tuple(Certificate(one[1], int(one[2])) for one in found if one is not None)
    )


def client_token(headers: Iterable[tuple[bytes, bytes]]) -> ConsistencyToken | None:
    """Return what a request with these headers (names in lower case) brings, or None where it
    brings none."""
    values = [value for name, value in headers if name == HEADER]
    return decode(b",".join(values)) if values else None


def both(one: ConsistencyToken | None, other: ConsistencyToken | None) -> ConsistencyToken | None:
    """Return the token of two writes, each with one of its own; None: nothing was written."""
    if one is None or other is None:
        return other if one is None else one
    if not one or not other or len({mark.nonce for mark in one + other}) > 1:
        return ()
    return (max(one + other, key=lambda mark: mark.sequence),)


def reached(token: ConsistencyToken, view: GenerationView) -> bool:
    """Whether a view holds everything that the token names."""
    return bool(token) and all(
        view.nonce == mark.nonce and view.sequence >= mark.sequence for mark in token
    )
