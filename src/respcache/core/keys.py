"""Every key that respcache writes is built here and only here.

| key                                            | type   | contents                               |
|------------------------------------------------|--------|----------------------------------------|
| tenant:{tenant}:{module}:{kind}:{digest}       | string | a stored response (``core/entry.py``)  |
| tenant:{tenant}:~gen                           | hash   | the tenant's generation                |
| tenant:{tenant}:~fill:{module}:{kind}:{digest} | string | the fill lock of that response         |
| tenant:~shared:~gen                            | hash   | generation of data without a tenant    |
| respcache:~inc                                 | string | the epoch (``core/epochs.py``)         |
| respcache:~off                                 | hash   | what is switched off for all processes |
| respcache:~procs                               | set    | processes that publish statistics      |
| respcache:~figures:{process}                   | string | a process's counters, by route         |
| respcache:~tenants:{process}                   | hash   | a process's counters, by tenant        |
| respcache:~routes:{process}                    | hash   | the same, by tenant and route          |
| respcache:~series:{bucket}                     | hash   | ten seconds of counters, all processes |
| respcache:~feed                                | stream | the latest invalidations               |
| respcache:~fed                                 | zset   | ids of outbox rows in the feed         |

An entry lives for its TTL. A generation lives longer than every entry, and so does the epoch. A
fill lock lives for seconds, the ids of the feed for minutes. A process's keys live for a minute
after its last report, a bucket of the series for 70 minutes, and the feed for a day. Switches stay
until they are turned on again.

``{kind}`` is list, detail, count or settings. ``{process}`` is 16 hexadecimal digits that a process
generates when it starts, ``{bucket}`` the Unix time divided by ten. ``{digest}`` is 32 hexadecimal
digits: a BLAKE2b of 128 bits, keyed with the secret that all processes share, over everything that
determines the response. The entry repeats it, and every hit compares it. No part of a key can
contain a colon, a blank or a glob character, so ``SCAN MATCH tenant:abc:accounts:*`` matches
exactly that tenant and module. Deleting any of these keys by hand is safe.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from respcache.core.errors import ConfigurationError

SHARED = "~shared"
"""The tenant of rows that belong to no tenant."""

EVERYBODY = "~all"
"""The tenant of an outbox row that concerns all tenants (TRUNCATE)."""

SWITCHES_KEY = "respcache:~off"
EPOCH_KEY = "respcache:~inc"
PROCESSES_KEY = "respcache:~procs"
FEED_KEY = "respcache:~feed"
FED_KEY = "respcache:~fed"
BUMPS_CHANNEL = "respcache:~bumps"
"""A channel, not a key. Each bump publishes the key of its generation, each deletion by an operator
the key of the entry."""

EVERYTHING = "*"
"""The switch of everything: not a key, but a field of the switches."""

KINDS = ("list", "detail", "count", "settings")
DIGEST_BYTES = 16
MIN_SECRET_BYTES = 16

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_ENTRY = re.compile(
    f"tenant:({_TENANT.pattern}):({_NAME.pattern}):({'|'.join(KINDS)})"
    f":([0-9a-f]{{{2 * DIGEST_BYTES}}})"
)


def check_tenant(tenant: str) -> str:
    """Return the tenant id if a key can contain it. Raises ``ValueError``."""
    if _TENANT.fullmatch(tenant) is None and tenant != SHARED:
        raise ValueError(
            f"tenant id {tenant!r} must be 1 to 128 letters, digits, '.', '_' or '-', beginning "
            f"with a letter or digit"
        )
    return tenant


def check_module(module: str) -> str:
    """Return the module's name if a key can contain it. Raises ``ConfigurationError``."""
    if _NAME.fullmatch(module) is None:
        raise ConfigurationError(
            f"module {module!r} must be 1 to 64 letters, digits, '_' or '-', beginning with a "
            f"letter"
        )
    return module


def entry_key(tenant: str, module: str, kind: str, *, digest: bytes) -> str:
    """Return the key of a stored response."""
    return f"tenant:{tenant}:{module}:{kind}:{digest.hex()}"


class EntryKey(NamedTuple):
    """The parts of a stored response's key."""

    tenant: str
    module: str
    kind: str
    digest: bytes


def read_entry_key(key: str) -> EntryKey | None:
    """Parse the key of a stored response; return None for any other key."""
    found = _ENTRY.fullmatch(key)
    return (
        None if found is None else EntryKey(found[1], found[2], found[3], bytes.fromhex(found[4]))
    )


def entry_pattern(tenant: str | None, module: str | None) -> str:
    """Return a glob that matches all stored responses of a tenant and a module (None: of all). It
    may also match other keys."""
    return f"tenant:{tenant or '*'}:{module or '[A-Za-z]*'}:*"


def lock_key(tenant: str, module: str, kind: str, *, digest: bytes) -> str:
    """Return the key of the fill lock of a stored response."""
    return f"tenant:{tenant}:~fill:{module}:{kind}:{digest.hex()}"


def generation_key(tenant: str) -> str:
    """Return the key of a tenant's generation."""
    return f"tenant:{tenant}:~gen"


def tenant_switch(tenant: str) -> str:
    """Return the switch of a tenant."""
    return f"tenant:{tenant}"


def module_switch(module: str) -> str:
    """Return the switch of a module."""
    return f"module:{module}"


def switched(names: Iterable[str], prefix: str) -> frozenset[str]:
    """Return the tenants or modules whose switches are among these names; ``prefix`` is the switch
    of the empty name."""
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def counters_key(process: str) -> str:
    """Return the key of a process's counters by route."""
    return f"respcache:~figures:{process}"


def tenants_key(process: str) -> str:
    """Return the key of a process's counters by tenant."""
    return f"respcache:~tenants:{process}"


def routes_key(process: str) -> str:
    """Return the key of a process's counters by tenant and route."""
    return f"respcache:~routes:{process}"


def series_key(bucket: int) -> str:
    """Return the key of the counters of one bucket of the series."""
    return f"respcache:~series:{bucket}"


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Where one response is stored, and what judges it."""

    entry_key: str
    lock_key: str
    digest: bytes
    """The digest that the entry must repeat."""
    tags: Sequence[str]
    """What the response depends on, in the generation at ``generation_key``."""
    generation_key: str
    route: str
    """The template of the route; fills of one route take about equally long."""


class Digester:
    """Computes the digests of one deployment. Each includes the secret and the schema version."""

    __slots__ = ("_prefix", "_secret")

    def __init__(self, secret: bytes, *, schema_version: str) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ConfigurationError(
                f"the cache secret has {len(secret)} bytes; give at least {MIN_SECRET_BYTES} "
                f"random ones (RESPCACHE_KEY)"
            )
        self._secret = secret if len(secret) <= 64 else hashlib.sha512(secret).digest()
        self._prefix = _pack([b"respcache", schema_version.encode()])

    def __repr__(self) -> str:
        return "Digester(secret=***)"

    def digest(
        self,
        *,
        tenant: str,
        route: str,
        tables: Iterable[str],
        fingerprint: bytes,
        parameters: Sequence[tuple[str, str, str]],
    ) -> bytes:
        """Return the 16 bytes that identify a response.

        ``route`` is the template of the path; ``tables`` are the declared tables (another
        declaration gives another key); ``parameters`` are the canonical ``(place, name, value)``
        triples in order.
        """
        fields = [
            tenant.encode(),
            route.encode(),
            fingerprint,
            *(table.encode() for table in tables),
            b"",
        ]
        for place, name, value in parameters:
            fields += (place.encode(), name.encode(), value.encode("utf-8", "surrogatepass"))
        return hashlib.blake2b(
            self._prefix + _pack(fields), key=self._secret, digest_size=DIGEST_BYTES
        ).digest()


def _pack(fields: Iterable[bytes]) -> bytes:
    """Join fields, each preceded by its length, so that different sequences give different
    bytes."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)
