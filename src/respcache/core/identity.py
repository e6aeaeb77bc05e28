"""Identity: the caller of a request and the rows it may see, which a resolver decides before any
lookup.

An application writes one resolver. The middleware calls it before it reads the cache, and the
handlers use the object that it returned, so that "authorised for the cache" and "authorised for
the handler" cannot differ.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qsl

from respcache.core.errors import Denied

Dependency = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """The verified credentials of a request, before any lookup.

    ``key`` contains everything on which ``Resolver.scope`` depends besides the database.
    ``owner_tenant`` is the tenant (or ``SHARED``) whose generation covers every row that
    ``Resolver.scope`` reads for this claim, spelt like ``Scope.tenant``. ``expires_at`` is when the
    credentials expire (seconds of the Unix epoch; None: never).
    """

    key: Hashable
    owner_tenant: str
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """The rows that the caller may see. Subclass it with the values that handlers filter by.

    ``tenant`` is the canonical id of the tenant, or None (then nothing is cached). It must equal
    the tenant column cast to ``::text`` in PostgreSQL, because writes bump that value: a uuid is in
    lower case with hyphens, in whatever form a token or a URL has it. ``fingerprint`` is equal for
    two callers iff they see the same rows of that tenant.
    """

    tenant: str | None
    fingerprint: bytes


class RequestHead:
    """The head of an HTTP request, read from an ASGI scope: everything that a resolver may read.
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
    """Decides identity, tenant and the role rule of a route, for the middleware and the handlers.

    If ``claim`` depends only on the path, the query string and some headers, name these headers in
    an attribute ``headers`` (lower-case names, with ``cookie`` if it reads cookies). Requests that
    are equal in all of that are then recognised by their bytes, and their credentials are verified
    again only from time to time.
    """

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that ``scope`` reads. A write to one of them invalidates the cached
        scope."""
        ...

    @property
    def stands_for(self) -> frozenset[Dependency]:
        """The dependencies of routes whose decision this resolver makes. The policy of a cached
        route must name any other security dependency as ``rule``, or the application does not
        start."""
        ...

    def claim(self, head: RequestHead) -> Claim:
        """Verify the credentials of a request without I/O. Raises ``Denied``."""
        ...

    async def scope(self, claim: Claim) -> Scope:
        """Read from the database what the caller may see. Raises ``Denied``. The generation of
        ``claim.owner_tenant`` must cover its reads."""
        ...

    def permits(self, scope: Scope, rule: Dependency | None) -> bool:
        """Return whether the role rule of a route permits the scope, without I/O."""
        ...


class SingleTenant:
    """The resolver of an application without tenants and logins: all callers see the same rows.

    Requests with an ``Authorization`` header bypass the cache (RFC 9111, section 3.5).
    """

    tables: tuple[str, ...] = ()
    stands_for: frozenset[Dependency] = frozenset()
    headers: tuple[str, ...] = ("authorization",)

    def __init__(self, tenant: str) -> None:
        self._claim = Claim("everybody", tenant)
        self._scope = Scope(tenant, b"")

    def claim(self, head: RequestHead) -> Claim:
        """Return the one claim. Raises ``Denied`` if the request has credentials."""
        if head.header("authorization") is not None:
            raise Denied("requests with an Authorization header are not cached by SingleTenant")
        return self._claim

    async def scope(self, claim: Claim) -> Scope:
        """Return the one scope."""
        return self._scope

    def permits(self, scope: Scope, rule: Dependency | None) -> bool:
        """Permit routes without a rule. A rule needs a resolver that knows roles."""
        return rule is None
