"""fastapi-cache2 0.2 as in its README: Redis backend, default coder (JSON) and key builder."""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import handler
import redis.asyncio
from fastapi import Depends, FastAPI
from fastapi_cache import FastAPICache
from fastapi_cache.backends.redis import RedisBackend
from fastapi_cache.decorator import cache


def make(url: str) -> Any:
    """Return the application."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with redis.asyncio.from_url(url) as client:
            FastAPICache.init(RedisBackend(client), prefix="fastapi-cache")
            yield

    app = handler.application(lifespan=lifespan)
    Caller = Annotated[str, Depends(handler.caller)]

    @app.get(handler.PATH)
    @cache(expire=handler.TTL_S)
    async def items(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch(page)

    @app.get(handler.SLOW_PATH)
    @cache(expire=handler.TTL_S)
    async def slow(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch_slowly(page)

    return app
