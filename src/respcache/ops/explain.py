"""The shapes of an explanation: what would become of a request now, and why."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import msgspec

from respcache.core.errors import InvalidOperation
from respcache.ops.facts import EntryFacts, GenerationFacts, Part, PolicyFacts


class CallerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The caller, according to the resolver. Contains no credentials."""

    tenant: str | None
    owner_tenant: str
    """The tenant whose generation covers the rows that decide what the caller may see."""
    role: str | None
    """None if the application's scope has none."""
    fingerprint: str
    """A short digest that is equal for callers who see the same rows."""
    tables: tuple[str, ...]
    """The tables that the resolver reads."""
    remembered: bool
    """This process has the caller's scope cached, and it is valid."""


class LeaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """This process's serving lease."""

    alive: bool
    left_s: float
    age_s: float | None
    """The age of the moment up to which this process has seen every write."""
    server: str
    problem: str
    """Why the last relay cycle failed; empty if it did not."""


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the memory of this process."""

    plan: bool
    """The request's plan is cached."""
    held: bool = False
    """Its response is in memory."""
    size_bytes: int = 0
    ttl_left_s: float = 0.0


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of a request now, in this process. Mirrors the JSON field by field."""

    outcome: str
    """``hit``, ``miss`` or ``bypass``."""
    reason: str
    """Hit: ``memory`` or ``store``. Miss: ``absent``, ``unreadable``, ``damaged`` or the verdict on
    the entry. Bypass: the ``detail`` of ``Cache-Status``, or ``not-cached``."""
    why: str
    """A sentence."""
    method: str
    path: str
    route: str | None = None
    policy: PolicyFacts | None = None
    parameters: list[Part] = []
    """The parts of the key, besides the tenant and the fingerprint."""
    left_out: list[str] = []
    """The parts of the request that are not in the key."""
    caller: CallerFacts | None = None
    key: str | None = None
    lock_key: str | None = None
    tags: tuple[str, ...] = ()
    """What the response depends on."""
    generation: GenerationFacts | None = None
    owner_generation: GenerationFacts | None = None
    """The owner tenant's, if that is another tenant."""
    lease: LeaseFacts | None = None
    entry: EntryFacts | None = None
    memory: MemoryFacts | None = None
    switches: tuple[str, ...] = ()
    """What is switched off: ``*``, ``tenant:<id>``, ``module:<name>``."""


@dataclass(frozen=True, slots=True)
class ExplainedRequest:
    """A request to explain. ``path`` may contain the query."""

    method: str
    path: str
    query: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def scope(self) -> dict[str, Any]:
        """Return the ASGI scope that a server would build. Raises ``InvalidOperation``."""
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
                f"{error.object!r} has characters that HTTP does not allow: percent-encode them"
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
