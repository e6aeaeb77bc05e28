"""Decorators that attach a caching policy to an endpoint. They need no web framework.

A decorator stores its policy as an attribute and returns the same function, so the framework
still sees the original signature. ``routing/fastapi.py`` reads the attribute at start-up.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from respcache.core.identity import Dependency
from respcache.core.policy import (
    DEFAULT_BOUND_S,
    DEFAULT_TTL_S,
    Invalidation,
    Level,
    Parameter,
    Policy,
    VariesBy,
)

E = TypeVar("E", bound=Callable[..., Any])
Decorator = Callable[[E], E]

_POLICY = "__respcache_policy__"
_INVALIDATION = "__respcache_invalidation__"


class CacheDecorator(Protocol):
    """Caches a GET endpoint; what all decorators of this module accept."""

    def __call__(
        self,
        module: str,
        *,
        ttl: float | None = None,
        tables: Sequence[str] = (),
        rule: Dependency | None = None,
        varies_by: VariesBy | None = None,
        parameters: Sequence[Parameter] | None = None,
        level: Level | str = Level.STRICT,
        bound_s: float = DEFAULT_BOUND_S,
    ) -> Decorator[Any]:
        """Attach a policy.

        ``ttl`` is in seconds. ``tables`` are the tables that the endpoint reads; a committed write
        to one of them invalidates the response. ``rule`` is the dependency that checks the
        caller's role; the resolver evaluates it before the lookup. ``varies_by`` returns, for a
        caller's scope, anything else that the response depends on (for example the tenant's local
        date); it becomes part of the key. ``parameters`` are needed only where there is no
        signature to read them from (Starlette). ``level`` (``strict``, ``bounded``, ``ttl``) says
        how fresh hits from memory must be, ``bound_s`` how many seconds old at most at
        ``bounded``. Raises ``ConfigurationError`` for a value that is not allowed.
        """
        ...


def _decorator_for(kind: str) -> CacheDecorator:
    def decorate(
        module: str,
        *,
        ttl: float | None = None,
        tables: Sequence[str] = (),
        rule: Dependency | None = None,
        varies_by: VariesBy | None = None,
        parameters: Sequence[Parameter] | None = None,
        level: Level | str = Level.STRICT,
        bound_s: float = DEFAULT_BOUND_S,
    ) -> Decorator[Any]:
        policy = Policy(
            module,
            kind,
            DEFAULT_TTL_S[kind] if ttl is None else ttl,
            tables=tuple(sorted(set(tables))),
            rule=rule,
            parameters=None if parameters is None else tuple(parameters),
            varies_by=varies_by,
            level=Level.of(level, module),
            bound_s=bound_s,
        )
        return _attach(_POLICY, policy)

    decorate.__name__ = decorate.__qualname__ = f"cache_{kind}"
    decorate.__doc__ = (
        f"Cache a GET endpoint of kind {kind!r}, by default for {DEFAULT_TTL_S[kind]:g} s.\n\n"
        "``CacheDecorator`` describes the parameters."
    )
    return decorate


cache_list = _decorator_for("list")
cache_detail = _decorator_for("detail")
cache_count = _decorator_for("count")
cache_settings = _decorator_for("settings")


def invalidate_cache(*modules: str) -> Decorator[Any]:
    """Invalidate modules of the caller's tenant each time the endpoint responds.

    For handlers whose writes the database hooks do not see. The response waits until the
    invalidation is confirmed.
    """
    return _attach(_INVALIDATION, Invalidation(modules))


def policy_of(endpoint: Any) -> Policy | None:
    """Return the policy that a decorator attached to an endpoint, or None."""
    policy: Policy | None = getattr(endpoint, _POLICY, None)
    return policy


def invalidation_of(endpoint: Any) -> Invalidation | None:
    """Return what ``invalidate_cache`` attached to an endpoint, or None."""
    invalidation: Invalidation | None = getattr(endpoint, _INVALIDATION, None)
    return invalidation


def _attach(name: str, value: object) -> Decorator[Any]:
    def attach(endpoint: E) -> E:
        setattr(endpoint, name, value)
        return endpoint

    return attach
