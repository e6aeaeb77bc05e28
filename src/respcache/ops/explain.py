"""What is said of a request: what would become of it now, and why. ``ops/explainer.py`` finds it
out."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import msgspec

from respcache.core.errors import InvalidOperation
from respcache.ops.facts import EntryFacts, GenerationFacts, Part, PolicyFacts


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, as the resolver says. Nothing of the credentials."""

    tenant: str | None
    owner_tenant: str
    """The tenant whose generation covers what decides who sees what."""
    role: str | None
    """Where the application's scope has one."""
    fingerprint: str
    """Short digest of what the caller may see: equal for callers who see the same rows."""
    tables: tuple[str, ...]
    """Which were read to know."""
    remembered: bool
    """By this process, and still valid."""


class LeaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Until when this process may serve."""

    alive: bool
    left_s: float
    age_s: float | None
    """How long ago the moment is up to which every write was seen."""
    server: str
    problem: str
    """What kept the last round from being completed."""


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What this process holds itself."""

    plan: bool
    """The request would be recognised by its bytes."""
    held: bool = False
    """Its answer is in memory."""
    size_bytes: int = 0
    ttl_left_s: float = 0.0


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of a request now, in this process."""

    outcome: str
    """``hit``, ``miss`` or ``bypass``."""
    reason: str
    """Of a hit: ``memory`` or ``store``. Of a miss: ``absent``, ``unreadable``, ``damaged`` or the
    verdict on the entry. Of a bypass: the ``detail=`` of ``Cache-Status``, or ``not-cached``."""
    why: str
    """A sentence."""
    method: str
    path: str
    route: str | None = None
    policy: PolicyFacts | None = None
    parameters: list[Part] = []
    """What the key is made of, besides the tenant and what the caller may see."""
    left_out: list[str] = []
    """What the request has and the key has not."""
    caller: Caller | None = None
    key: str | None = None
    lock_key: str | None = None
    tags: tuple[str, ...] = ()
    """What the answer depends on."""
    generation: GenerationFacts | None = None
    owner_tenant: GenerationFacts | None = None
    """That of the caller's home, where it is another one."""
    lease: LeaseFacts | None = None
    entry: EntryFacts | None = None
    memory: MemoryFacts | None = None
    switches: tuple[str, ...] = ()
    """What is switched off: ``*``, ``tenant:<id>``, ``module:<name>``."""


@dataclass(frozen=True, slots=True)
class ExplainedRequest:
    """A request to explain. ``path`` may carry the query."""

    method: str
    path: str
    query: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def scope(self) -> dict[str, Any]:
        """Make the ASGI scope that a server would make of it. Raises ``InvalidOperation``."""
        path, _, query = self.path.partition("?")
        if not path.startswith("/"):
            raise InvalidOperation(f"path {self.path!r} must begin with '/'")
        try:
            headers = [
                (name.lower().encode("latin-1"), value.strip().encode("latin-1"))
                for name, value in self.headers
            ]
            given = "&".join(part for part in (query, self.query.removeprefix("?")) if part).encode(
                "latin-1"
            )
        except UnicodeEncodeError as error:
            raise InvalidOperation(
                f"{error.object!r} holds characters that no HTTP request can: percent-encode them"
            ) from None
        return {
            "type": "http",
            "http_version": "1.1",
            "method": self.method.upper(),
            "scheme": "http",
            "root_path": "",
            "path": unquote(path),
            "raw_path": path.encode("utf-8"),
            "query_string": given,
            "headers": headers,
        }
