"""aiocache 0.12 as in its README: the ``cached`` decorator, a Redis cache, the JSON serializer."""

from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import aiocache
import handler
from aiocache.serializers import JsonSerializer
from fastapi import Depends


def make(url: str) -> Any:
    """Return the application."""
    server = urlsplit(url)
    app = handler.application()
    Caller = Annotated[str, Depends(handler.caller)]

    def cached(namespace: str) -> Any:
        return aiocache.cached(
            ttl=handler.TTL_S,
            cache=aiocache.Cache.REDIS,
            key_builder=lambda function, caller, page: f"{caller}:{page}",
            namespace=namespace,
            serializer=JsonSerializer(),
            endpoint=server.hostname,
            port=server.port,
            password=unquote(server.password or ""),
        )

    @app.get(handler.PATH)
    @cached("aiocache-items")
    async def items(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch(page)

    @app.get(handler.SLOW_PATH)
    @cached("aiocache-slow")
    async def slow(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch_slowly(page)

    return app
