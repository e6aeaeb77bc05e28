"""respcache in its levels: one FastAPI application, the handler's own objects, the cache around it.

No outbox, as there is no database: ``make bench BENCH=outbox`` measures that. The resolver looks
the token up where the peers do, and names the one header that it reads, so the library may
recognise a request that it saw before. Everything else is left at its default.

What a version of the library does not know yet (levels, the near cache, turbo) is looked for in its
signatures and left out.
"""

import inspect
from importlib.util import find_spec
from typing import Annotated, Any

import handler
from fastapi import Depends

from respcache import Cache, Claim, Denied, RedisStore, RequestHead, Scope, cache_list

NEAR_BYTES = 64 * 2**20
SECRET = b"a secret of the benchmark alone, 40 chars"
LEVELS = "level" in inspect.signature(cache_list).parameters
NEAR = "near_bytes" in inspect.signature(Cache).parameters


class Callers:
    """The resolver: who asks is who holds the token."""

    tables: tuple[str, ...] = ()
    stands_for = frozenset({handler.caller})
    headers = ("authorization",)

    def claim(self, head: RequestHead) -> Claim:
        """Look the token up."""
        token = head.header("authorization")
        tenant = handler.CALLERS.get(token or "")
        if tenant is None:
            raise Denied("no such token")
        return Claim(token, tenant)

    async def scope(self, claim: Claim) -> Scope:
        """Say what the caller sees: everything of the tenant."""
        return Scope(claim.owner_tenant, b"")

    def permits(self, scope: Scope, rule: Any) -> bool:
        """Permit: there are no roles."""
        return True


def near(url: str) -> Any:
    """Make the lane of level ttl."""
    return _wrapped(url, level="ttl")


def strict(url: str) -> Any:
    """Make the lane of level strict."""
    return _wrapped(url, level="strict")


def bounded(url: str) -> Any:
    """Make the lane of level bounded."""
    return _wrapped(url, level="bounded")


def store(url: str) -> Any:
    """Make the lane without a near cache."""
    return _wrapped(url, level="strict", near_bytes=0)


def turbo(url: str) -> Any:
    """Make the lane below ASGI: the application, and the protocol class for uvicorn."""
    from respcache.integrations.uvicorn import protocol

    app = _wrapped(url, level="strict")
    return app, protocol(app)


def missing(factory: str) -> str | None:
    """Say what the library does not have yet of a lane."""
    if factory in ("near", "bounded") and not (LEVELS and NEAR):
        return "this version of the library has no levels or no near cache"
    if factory == "turbo" and find_spec("respcache.integrations.uvicorn") is None:
        return "this version of the library has no respcache.integrations.uvicorn"
    return None


def make_cache(
    url: str, *, name: str = "bench", near_bytes: int = NEAR_BYTES, **options: Any
) -> Cache:
    """Make a cache for these callers. Lanes of different names share no entries."""
    options |= {"near_bytes": near_bytes} if NEAR else {}
    return Cache(RedisStore(url), secret=SECRET, resolver=Callers(), schema_version=name, **options)


def wrapped(cache: Cache, level: str) -> Any:
    """Make the application with a cache around it."""
    app = handler.application()
    options: dict[str, Any] = {"level": level} if LEVELS else {}
    Caller = Annotated[str, Depends(handler.caller)]

    @app.get(handler.PATH)
    @cache_list("items", ttl=handler.TTL_S, tables=["items"], **options)
    async def items(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch(page)

    @app.get(handler.SLOW_PATH)
    @cache_list("items", ttl=handler.TTL_S, tables=["items"], **options)
    async def slow(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch_slowly(page)

    return cache.wrap(app)


def _wrapped(url: str, *, level: str, near_bytes: int = NEAR_BYTES) -> Any:
    return wrapped(make_cache(url, name=f"{level} {near_bytes}", near_bytes=near_bytes), level)
