"""Consistency tokens: how a client sees its own writes in every process, at the levels whose hits
may be judged by an older view.

At level ``bounded`` a process may use a view of a generation until it is ``bound_s`` old, and at
``ttl`` for longer. A client that wrote through one process and then reads through another could
miss its own write. So the response to a write carries a *token*: the nonce of the generation that
was bumped, and the sequence that it has reached. For a request that sends it back, a remembered
view counts only if it is of that life and has reached that sequence: then it includes the bump, and
whatever the write made invalid is invalid in it. Otherwise a view is read first, as at level
``strict``.

  * the nonce: a generation that is created again begins at 0. A view of its former life may have a
    higher sequence and not include the bump.
  * an unknown sequence (the generation did not exist, which says nothing about the views of other
    processes; several tenants were written to; a relay cycle confirmed the bump, not this
    process): the token says so, and no remembered view ever counts.

A token can only forbid a remembered view. Whatever it contains, true, old, foreign or forged, it
never widens what is served, and costs one read at most. So it is neither signed nor secret.
"""

import re
from collections.abc import Iterable

from respcache.core.generations import Certificate, GenerationView

HEADER = b"x-cache-token"
"""The header of requests and responses that carries it."""

UNKNOWN = b"validate"
"""The spelling of a token that no view has reached."""

MAX_BYTES = 256
"""Limit for all tokens of one request; longer values are not parsed."""

ConsistencyToken = tuple[Certificate, ...]
"""The certificates that a view must have reached, all of them; empty if they are unknown."""

_ONE = re.compile(rb"([0-9a-f]{16})\.([0-9]{1,18})")


def encode(token: ConsistencyToken) -> bytes:
    """Return the header value of a token: ``UNKNOWN`` if it could not be parsed again, for example
    because another program has written the nonce."""
    text = b",".join(b"%s.%d" % (one.nonce, one.sequence) for one in token)
    return text if token and decode(text) == token else UNKNOWN


def decode(text: bytes) -> ConsistencyToken:
    """Parse one or several tokens, separated by commas; return the empty one for anything
    else."""
    if len(text) > MAX_BYTES:
        return ()
    found = [_ONE.fullmatch(part.strip(b" \t")) for part in text.split(b",")]
    return (
        ()
        if None in found
        else tuple(Certificate(one[1], int(one[2])) for one in found if one is not None)
    )


def client_token(headers: Iterable[tuple[bytes, bytes]]) -> ConsistencyToken | None:
    """Return the token in a request's headers (names in lower case), or None without one."""
    values = [value for name, value in headers if name == HEADER]
    return decode(b",".join(values)) if values else None


def both(one: ConsistencyToken | None, other: ConsistencyToken | None) -> ConsistencyToken | None:
    """Return the combined token of two writes; None stands for no write."""
    if one is None or other is None:
        return other if one is None else one
    if not one or not other or len({mark.nonce for mark in one + other}) > 1:
        return ()
    return (max(one + other, key=lambda mark: mark.sequence),)


def reached(token: ConsistencyToken, view: GenerationView) -> bool:
    """Return whether a view has reached everything that the token names."""
    return bool(token) and all(
        view.nonce == mark.nonce and view.sequence >= mark.sequence for mark in token
    )
