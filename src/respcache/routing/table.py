"""The table of routes: it finds the route that the application's router would choose.

It is built once, at start-up: by ``routing.fastapi.describe_routes`` for FastAPI and Starlette, or
with ``Route.of`` for any other ASGI application. The order is the router's, and routes that are not
cached are included if they could match first.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from respcache.core.policy import Invalidation, Parameter, Policy, in_order


@dataclass(frozen=True, slots=True)
class Route:
    """One route. ``passed`` names the query parameters that the resolver consumes."""

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
        """Return a route for a template: ``/things/{id}`` (one segment) or ``/files/{path:path}``
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
        """The request headers that are part of the key, in lower case."""
        return frozenset(
            p.name.lower().encode("latin-1") for p in self.parameters if p.place == "header"
        )


class RouteTable:
    """Finds the route of a request.

    ``root_path`` is the application's own, which takes precedence over the server's.
    """

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
        """Return the first route that matches path and method, with its path parameters."""
        method: str = scope["method"]
        path = self._path(scope)
        if method in ("GET", "HEAD"):
            fixed = self._fixed.get(path)
            return fixed if fixed is not None else self._first(path, "GET")
        return self._first(path, method)

    def template(self, scope: Mapping[str, Any]) -> str | None:
        """Return the template of any request's route, cached or not. Too slow for hits."""
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
