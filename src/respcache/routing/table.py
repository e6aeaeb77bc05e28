"""Which requests are cached: an ordered table of all routes, so that the first match here is the
first match there.

The table is made once, at start-up, by ``fastapi.describe`` for FastAPI and Starlette applications
or by hand with ``Route.of`` for any other ASGI application. A route that is not cached still stands
in it where it could match first.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from respcache.core.policy import Invalidation, Parameter, Policy, in_order


@dataclass(frozen=True, slots=True)
class Route:
    """One route of the application. ``passed`` names query parameters that the resolver
    consumes."""

    template: str
    pattern: re.Pattern[str]
    methods: frozenset[str]
    policy: Policy | None = None
    invalidation: Invalidation | None = None
    parameters: tuple[Parameter, ...] = ()
    passed: tuple[str, ...] = ()
    endpoint: Callable[..., Any] | None = None

    @classmethod
    def of(
        cls, template: str, policy: Policy | None, *, methods: Sequence[str] = ("GET",)
    ) -> "Route":
        """Describe a route by its template: ``/things/{id}`` (a segment) or ``/files/{path:path}``
        (the rest)."""
        pattern = re.sub(
            r"\\\{(\w+)(:path)?\\\}",
            lambda m: f"(?P<{m[1]}>{'.*' if m[2] else '[^/]+'})",
            re.escape(template),
        )
        parameters = in_order(policy.parameters or ()) if policy else ()
        return cls(
            template, re.compile(rf"{pattern}\Z"), frozenset(methods), policy, parameters=parameters
        )

    @property
    def key_headers(self) -> frozenset[bytes]:
        """The request headers that the key holds, lower case."""
        return frozenset(
            p.name.lower().encode("latin-1") for p in self.parameters if p.place == "header"
        )


class RouteTable:
    """Finds the route of a request. ``root_path``: that of the application itself, which counts
    before the server's."""

    def __init__(self, routes: Sequence[Route], *, root_path: str = "") -> None:
        self.routes = tuple(routes)
        self._root_path = root_path
        last = max(
            (i for i, route in enumerate(routes) if route.policy or route.invalidation), default=-1
        )
        self._ordered = self.routes[: last + 1]
        self._fixed = {
            route.template: found
            for route in self._ordered
            if "{" not in route.template
            and (found := self._first(route.template, "GET")) is not None
        }

    def match(self, scope: Mapping[str, Any]) -> tuple[Route, Mapping[str, str]] | None:
        """Return the first route that matches the request's path and method, with its path
        parameters, or None."""
        method: str = scope["method"]
        path = self._path(scope)
        if method in ("GET", "HEAD"):
            fixed = self._fixed.get(path)
            return fixed if fixed is not None else self._first(path, "GET")
        return self._first(path, method)

    def template(self, scope: Mapping[str, Any]) -> str | None:
        """Return the template of the route of any request, cached or not. Not for the way of a
        hit."""
        method, path = scope["method"], self._path(scope)
        matching = (route for route in self.routes if method in route.methods or not route.methods)
        return next((route.template for route in matching if route.pattern.match(path)), None)

    def _first(self, path: str, method: str) -> tuple[Route, Mapping[str, str]] | None:
        for route in self._ordered:
            if method in route.methods or not route.methods:
                match = route.pattern.match(path)
                if match is not None:
                    return route, match.groupdict()
        return None

    def _path(self, scope: Mapping[str, Any]) -> str:
        """Return the path below ``root_path`` (ASGI 3.0, connection scope), as routers see it."""
        path: str = scope["path"]
        root: str = self._root_path or scope.get("root_path", "")
        if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
            return path[len(root) :]
        return path
