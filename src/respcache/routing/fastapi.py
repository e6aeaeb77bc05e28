"""The walk over the routes of a Starlette or FastAPI application, once, at start-up.

It reads what FastAPI declares for each route: parameters and dependencies. It refuses to start if a
cached route checks its caller in a way that the resolver does not know. FastAPI is imported only if
the application is one.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from respcache.core.errors import ConfigurationError
from respcache.core.identity import Dependency, Resolver
from respcache.core.policy import Parameter, Policy, in_order
from respcache.decorators import invalidation_of, policy_of
from respcache.routing.table import Route


def describe_routes(app: Any, resolver: Resolver) -> list[Route]:
    """Return all HTTP routes of a FastAPI or Starlette application in matching order.

    Mounts are included. Raises ``ConfigurationError`` for a cached route whose security the
    resolver does not decide, whose parameters are unknown, or that follows a route by host name.
    """
    if not hasattr(app, "routes"):
        raise ConfigurationError(
            f"{type(app).__name__} has no routes to walk: give them to wrap(app, routes=[...])"
        )
    routes = list(_walk(app.routes, "", resolver))
    _refuse_hosts(routes)
    return routes


def before_cached(routes: Sequence[Any]) -> Iterator[Any]:
    """Yield the applications of routes and mounts that lead to a cached endpoint.

    They may contain middleware.
    """
    for route in _effective(routes):
        original = getattr(route, "original_route", route)
        if policy_of(getattr(original, "endpoint", None)) is not None or any(
            before_cached(getattr(original, "routes", None) or ())
        ):
            yield original.app


def _walk(routes: Sequence[Any], prefix: str, resolver: Resolver) -> Iterator[Route]:
    from starlette.routing import Host, Mount, WebSocketRoute, compile_path

    for route in _effective(routes):
        original = getattr(route, "original_route", route)
        if isinstance(original, WebSocketRoute):
            continue
        if isinstance(original, Host):
            pattern, _, _ = compile_path("/{path:path}")
            yield Route(f"host {original.host}", pattern, frozenset())
        elif isinstance(original, Mount):
            path = prefix + route.path
            yield from _walk(original.routes or (), path, resolver)
            pattern, _, _ = compile_path(path + "/{path:path}")
            yield Route(path + "/...", pattern, frozenset())
        elif route.path is not None:
            yield _describe(route, prefix, resolver)


def _effective(routes: Sequence[Any]) -> Iterator[Any]:
    """Yield routes as they are matched. FastAPI merges the prefixes of included routers on
    request."""
    fastapi_routing = sys.modules.get("fastapi.routing")
    if fastapi_routing is None:
        yield from routes
    else:
        yield from fastapi_routing.iter_route_contexts(routes)


def _describe(route: Any, prefix: str, resolver: Resolver) -> Route:
    from starlette.routing import compile_path

    template = prefix + route.path
    pattern, _, _ = compile_path(template)
    methods = frozenset(route.methods or ())
    endpoint = route.endpoint
    policy, invalidation = policy_of(endpoint), invalidation_of(endpoint)
    if policy is None:
        return Route(template, pattern, methods, invalidation=invalidation)
    if "GET" not in methods:
        raise ConfigurationError(
            f"{template} is cached but does not answer GET: remove its cache decorator"
        )
    dependant = getattr(route, "dependant", None)
    if dependant is None:
        if policy.parameters is None:
            raise ConfigurationError(
                f"GET {template}: give parameters=[...] to its cache decorator, it has no "
                f"signature to read"
            )
        return Route(
            template,
            pattern,
            methods,
            policy,
            parameters=in_order(policy.parameters),
            endpoint=endpoint,
        )
    if any(part.body_params for part in (dependant, *_dependencies(dependant))):
        raise ConfigurationError(
            f"GET {template} is cached but reads a request body, on which no cached response "
            "may depend: make it a query parameter"
        )
    _check_security(dependant, policy, resolver, template=template)
    declared, passed = _parameters(dependant, resolver)
    return Route(
        template, pattern, methods, policy, invalidation, in_order(declared), passed, endpoint
    )


def _check_security(dependant: Any, policy: Policy, resolver: Resolver, *, template: str) -> None:
    """Raise for a route that checks its caller in a way that the resolver does not decide."""
    named = resolver.stands_for | ({policy.rule} if policy.rule is not None else frozenset())
    unknown = list(_security_calls(dependant, named))
    if unknown:
        names = ", ".join(getattr(call, "__name__", type(call).__name__) for call in unknown)
        raise ConfigurationError(
            f"GET {template} is cached but depends on {names} for security, which neither the "
            f"resolver stands for nor the "
            "policy names as rule: a hit would skip it"
        )
    if policy.rule is not None and policy.rule not in {
        part.call for part in _dependencies(dependant)
    }:
        raise ConfigurationError(
            f"GET {template}: its policy names the rule {policy.rule!r}, which the endpoint does "
            f"not depend on: "
            "a miss would skip it"
        )


def _security_calls(dependant: Any, named: frozenset[Dependency]) -> Iterator[Any]:
    from fastapi.security.base import SecurityBase

    for child in dependant.dependencies:
        if child.call in named:
            continue
        checks = (
            isinstance(child.call, SecurityBase)
            or child.own_oauth_scopes
            or child.security_scopes_param_name
        )
        if checks or any(True for _ in _security_calls(child, named)):
            yield child.call


def _dependencies(dependant: Any) -> Iterator[Any]:
    for child in dependant.dependencies:
        yield child
        yield from _dependencies(child)


def _parameters(dependant: Any, resolver: Resolver) -> tuple[list[Parameter], tuple[str, ...]]:
    """Return the route's own parameters, and the query parameters that the resolver consumes."""
    declared = list(_declared(dependant, resolver.stands_for, consumed=False))
    names = {parameter.name for parameter in declared if parameter.place == "query"}
    consumed = _declared(dependant, resolver.stands_for, consumed=True)
    return declared, tuple(sorted({p.name for p in consumed if p.place == "query"} - names))


def _declared(
    dependant: Any, stands_for: frozenset[Dependency], *, consumed: bool
) -> Iterator[Parameter]:
    from fastapi._compat import field_annotation_is_sequence
    from fastapi.dependencies.utils import _get_flat_fields_from_params, _get_param_aliases

    inside = dependant.call in stands_for
    if inside == consumed:
        for place in ("query", "header", "cookie"):
            for field in _get_flat_fields_from_params(getattr(dependant, f"{place}_params")):
                aliases = [
                    name
                    for _, name in _get_param_aliases(field, convert_underscores=place == "header")
                ]
                repeated = field_annotation_is_sequence(field.field_info.annotation)
                default = _spelling(field.default) if len(aliases) == 1 and not repeated else None
                yield from (Parameter(name, place, repeated, default) for name in aliases)
    for child in dependant.dependencies:
        yield from _declared(
            child, frozenset({child.call}) if inside else stands_for, consumed=consumed
        )


def _spelling(default: Any) -> str | None:
    """Return the spelling of a default that is sure to equal an omitted parameter, or None."""
    if isinstance(default, str):
        return default
    return str(default) if isinstance(default, int) and not isinstance(default, bool) else None


def _refuse_hosts(routes: Sequence[Route]) -> None:
    """Raise for a cached route after a route by host name, because the table ignores hosts."""
    hosts = [i for i, route in enumerate(routes) if route.template.startswith("host ")]
    for route in routes[hosts[0] :] if hosts else ():
        if route.policy is not None:
            raise ConfigurationError(
                f"GET {route.template} is cached but stands behind {routes[hosts[0]].template}: "
                f"put it first"
            )
