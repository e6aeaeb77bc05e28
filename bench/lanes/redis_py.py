"""A cache written by hand: the body's bytes in Valkey, GET and SETEX with redis.asyncio."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import handler
import redis.asyncio
from fastapi import Depends, FastAPI, Response

Fetch = Callable[[int], Awaitable[Any]]


def make(url: str) -> Any:
    """Return the application."""
    client = redis.asyncio.from_url(url)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = handler.application(lifespan=lifespan)
    Caller = Annotated[str, Depends(handler.caller)]

    async def respond(key: str, page: int, fetch: Fetch) -> Response:
        body = await client.get(key)
        if body is None:
            body = json.dumps(await fetch(page), ensure_ascii=False, separators=(",", ":")).encode()
            await client.set(key, body, ex=handler.TTL_S)
        return Response(body, media_type="application/json")

    @app.get(handler.PATH)
    async def items(caller: Caller, page: int) -> Response:
        return await respond(f"by-hand:items:{caller}:{page}", page, handler.fetch)

    @app.get(handler.SLOW_PATH)
    async def slow(caller: Caller, page: int) -> Response:
        return await respond(f"by-hand:slow:{caller}:{page}", page, handler.fetch_slowly)

    return app
