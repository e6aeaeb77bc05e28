"""respcache: a response cache for ASGI applications that multi-tenant APIs can trust.

``core/generations.py`` argues why no read is stale; ``cache.Cache`` is where to begin.
"""

from respcache.cache import Cache
from respcache.core.errors import (
    ConfigurationError,
    Denied,
    InvalidationPending,
    RespcacheError,
    StoreError,
    UndeclaredRead,
    UndeclaredWrite,
)
from respcache.core.identity import Claim, Head, Resolver, Scope, SingleTenant
from respcache.core.policy import Level, Parameter, Policy
from respcache.fastapi import cache_count, cache_detail, cache_list, cache_settings, invalidate_cache
from respcache.record import bind_scope, current_scope
from respcache.routing import Route
from respcache.stores.memory import MemoryStore
from respcache.stores.redis import RedisStore

__all__ = [
    "Cache",
    "Claim",
    "ConfigurationError",
    "Denied",
    "Head",
    "InvalidationPending",
    "Level",
    "MemoryStore",
    "Parameter",
    "Policy",
    "RedisStore",
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
