"""Who asks, and which rows are theirs: what a resolver decides before anything is looked up.

An application writes one resolver. The wrapper calls it before it looks into the cache, the
handlers use the very object that it returned, so that "authorised for the cache" and "authorised
for the handler" cannot differ.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qsl

from respcache.core.errors import Denied

Dependency = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request says of its caller, verified but not yet looked up.

    ``key`` holds everything that ``Resolver.scope`` depends on besides the database. ``home`` is
    the tenant (or ``SHARED``) whose generation covers every row that ``Resolver.scope`` reads for
    this claim, spelt like ``Scope.tenant``. ``expires_at`` is when the credentials end by
    themselves (seconds of the Unix epoch), None: never.
    """

    key: Hashable
    owner_tenant: str
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """What the caller may see. Subclass it with what the handlers filter by.

    ``tenant`` is the one canonical id of the tenant, or None (then nothing is cached): letter for
    letter what PostgreSQL makes of the tenant column with ``::text``, as that is what writes bump.
    A uuid is in lower case with hyphens, whatever a token or an address says. ``fingerprint`` is
    equal for two callers iff they see the same rows of that tenant.
    """

    tenant: str | None
    fingerprint: bytes


class RequestHead:
    """The head of an HTTP request, read from an ASGI scope: everything a resolver may look at.
    Bodies are never read."""

    __slots__ = ("_query", "path_params", "scope")

    def __init__(
        self, scope: Mapping[str, Any], path_params: Mapping[str, Any] | None = None
    ) -> None:
        self.scope = scope
        self.path_params = scope.get("path_params", {}) if path_params is None else path_params
        self._query: dict[str, str] | None = None

    def headers(self, name: str) -> list[str]:
        """Return the values of all headers of that name (lower case), in order."""
        wanted = name.lower().encode("latin-1")
        return [value.decode("latin-1") for key, value in self.scope["headers"] if key == wanted]

    def header(self, name: str) -> str | None:
        """Return the first header of that name, or None."""
        values = self.headers(name)
        return values[0] if values else None

    def joined(self, name: str) -> bytes | None:
        """Return the values of all headers of that name, joined by commas, or None (RFC 9110,
        section 5.3)."""
        wanted = name.encode("latin-1")
        values = [value for key, value in self.scope["headers"] if key == wanted]
        return b", ".join(values) if values else None

    def cookies(self, name: str) -> list[str]:
        """Return the raw values of all cookies of that name, in order. RFC 6265, section 5.4."""
        pairs = (
            part.strip().partition("=")
            for line in self.headers("cookie")
            for part in line.split(";")
        )
        return [value for key, _, value in pairs if key.strip() == name]

    def cookie(self, name: str) -> str | None:
        """Return the value of the last cookie of that name, or None."""
        values = self.cookies(name)
        return values[-1].strip().strip('"') if values else None

    def query(self, name: str) -> str | None:
        """Return the last value of a query parameter, or None."""
        if self._query is None:
            self._query = dict(
                parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True)
            )
        return self._query.get(name)


class Resolver(Protocol):
    """Decides identity, tenant and the role rule of a route; the same code serves the wrapper and
    the handlers.

    A resolver whose ``claim`` looks at nothing but the path, the query string and some headers
    should name these in an attribute ``headers`` (a collection of lower-case names, ``cookie``
    among them if it looks at cookies). Requests that agree in all of that are then recognised by
    their bytes, and their credentials verified again only now and then.
    """

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that ``scope`` reads; a write to one of them makes the memoised scope
        invalid."""
        ...

    @property
    def stands_for(self) -> frozenset[Dependency]:
        """The dependencies of routes whose decision this resolver makes; any other security
        dependency of a cached route must be named by its policy as ``rule``, or the application
        does not start."""
        ...

    def claim(self, head: RequestHead) -> Claim:
        """Verify the credentials of a request without I/O. Raises ``Denied``."""
        ...

    async def scope(self, claim: Claim) -> Scope:
        """Read from the database what the caller may see. Raises ``Denied``. Its reads must be
        covered by ``claim.home``."""
        ...

    def permits(self, scope: Scope, rule: Dependency | None) -> bool:
        """Decide the role rule of a route, without I/O."""
        ...


class SingleTenant:
    """The resolver of an application without tenants and without logins: everybody sees the same
    rows.

    Requests with an ``Authorization`` header are not answered from the cache (RFC 9111, section
    3.5).
    """

    tables: tuple[str, ...] = ()
    stands_for: frozenset[Dependency] = frozenset()
    headers: tuple[str, ...] = ("authorization",)

    def __init__(self, tenant: str) -> None:
        self._claim = Claim("everybody", tenant)
        self._scope = Scope(tenant, b"")

    def claim(self, head: RequestHead) -> Claim:
        """Return the one claim there is. Raises ``Denied`` when the request carries credentials."""
        if head.header("authorization") is not None:
            raise Denied("requests with an Authorization header are not cached by SingleTenant")
        return self._claim

    async def scope(self, claim: Claim) -> Scope:
        """Return the one scope there is."""
        return self._scope

    def permits(self, scope: Scope, rule: Dependency | None) -> bool:
        """Permit routes without a rule; a rule needs a resolver that knows roles."""
        return rule is None
