"""respcache: a response cache for ASGI applications that multi-tenant APIs can trust.

``core/generations.py`` argues why no read is stale; ``cache.Cache`` is where to begin. Names are
imported when they are first asked for, so that the command line starts without what it does not
need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from respcache.cache import Cache
    from respcache.context import bind_scope, current_scope
    from respcache.core.errors import (
        ConfigurationError,
        Denied,
        InvalidationPending,
        RespcacheError,
        StoreError,
        UndeclaredRead,
        UndeclaredWrite,
    )
    from respcache.core.identity import Claim, RequestHead, Resolver, Scope, SingleTenant
    from respcache.core.policy import Level, Parameter, Policy
    from respcache.decorators import (
        cache_count,
        cache_detail,
        cache_list,
        cache_settings,
        invalidate_cache,
    )
    from respcache.routing.table import Route
    from respcache.stores.memory import MemoryStore
    from respcache.stores.redis import RedisStore

__all__ = [
    "Cache",
    "Claim",
    "ConfigurationError",
    "Denied",
    "InvalidationPending",
    "Level",
    "MemoryStore",
    "Parameter",
    "Policy",
    "RedisStore",
    "RequestHead",
    "Resolver",
    "RespcacheError",
    "Route",
    "Scope",
    "SingleTenant",
    "StoreError",
    "UndeclaredRead",
    "UndeclaredWrite",
    "bind_scope",
    "cache_count",
    "cache_detail",
    "cache_list",
    "cache_settings",
    "current_scope",
    "invalidate_cache",
]

_HOMES = {
    "cache": ("Cache",),
    "core.errors": (
        "ConfigurationError",
        "Denied",
        "InvalidationPending",
        "RespcacheError",
        "StoreError",
        "UndeclaredRead",
        "UndeclaredWrite",
    ),
    "core.identity": ("Claim", "RequestHead", "Resolver", "Scope", "SingleTenant"),
    "core.policy": ("Level", "Parameter", "Policy"),
    "decorators": (
        "cache_count",
        "cache_detail",
        "cache_list",
        "cache_settings",
        "invalidate_cache",
    ),
    "context": ("bind_scope", "current_scope"),
    "routing.table": ("Route",),
    "stores.memory": ("MemoryStore",),
    "stores.redis": ("RedisStore",),
}


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            found = globals()[name] = getattr(import_module(f"respcache.{module}"), name)
            return found
    raise AttributeError(f"module 'respcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
