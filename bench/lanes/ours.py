"""respcache at its levels: one FastAPI application, the handler's objects, the cache around it.

There is no outbox, because there is no database: ``make bench BENCH=outbox`` measures that. The
resolver looks the token up, as the peers do, and declares the one header that it reads, so that the
library can recognize a repeated request. All else has its default.
"""

from typing import Annotated, Any

import handler
from fastapi import Depends

from respcache import Cache, Claim, Denied, RedisStore, RequestHead, Scope, cache_list

NEAR_BYTES = 64 * 2**20
SECRET = b"a secret of the benchmark alone, 40 chars"


class Callers:
    """The resolver: the token identifies the caller."""

    tables: tuple[str, ...] = ()
    stands_for = frozenset({handler.caller})
    headers = ("authorization",)

    def claim(self, head: RequestHead) -> Claim:
        """Look the token up. Raises ``Denied``."""
        token = head.header("authorization")
        tenant = handler.CALLERS.get(token or "")
        if tenant is None:
            raise Denied("no such token")
        return Claim(token, tenant)

    async def scope(self, claim: Claim) -> Scope:
        """Return the scope: every caller sees everything of the tenant."""
        return Scope(claim.owner_tenant, b"")

    def permits(self, scope: Scope, rule: Any) -> bool:
        """Return True: there are no roles."""
        return True


def near(url: str) -> Any:
    """Return the lane of level ``ttl``."""
    return _wrapped(url, level="ttl")


def strict(url: str) -> Any:
    """Return the lane of level ``strict``."""
    return _wrapped(url, level="strict")


def bounded(url: str) -> Any:
    """Return the lane of level ``bounded``."""
    return _wrapped(url, level="bounded")


def store(url: str) -> Any:
    """Return the lane without a near cache."""
    return _wrapped(url, level="strict", near_bytes=0)


def turbo(url: str) -> Any:
    """Return the lane below ASGI: the application, and the protocol class for uvicorn."""
    from respcache.integrations.uvicorn import protocol

    app = _wrapped(url, level="strict")
    return app, protocol(app)


def make_cache(
    url: str, *, name: str = "bench", near_bytes: int = NEAR_BYTES, **options: Any
) -> Cache:
    """Return a cache for these callers. Lanes with different names share no entries."""
    return Cache(
        RedisStore(url),
        secret=SECRET,
        resolver=Callers(),
        schema_version=name,
        near_bytes=near_bytes,
        **options,
    )


def wrapped(cache: Cache, level: str) -> Any:
    """Return the application, wrapped in a cache."""
    app = handler.application()
    Caller = Annotated[str, Depends(handler.caller)]

    @app.get(handler.PATH)
    @cache_list("items", ttl=handler.TTL_S, tables=["items"], level=level)
    async def items(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch(page)

    @app.get(handler.SLOW_PATH)
    @cache_list("items", ttl=handler.TTL_S, tables=["items"], level=level)
    async def slow(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch_slowly(page)

    return cache.wrap(app)


def _wrapped(url: str, *, level: str, near_bytes: int = NEAR_BYTES) -> Any:
    return wrapped(make_cache(url, name=f"{level} {near_bytes}", near_bytes=near_bytes), level)
