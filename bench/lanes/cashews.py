"""cashews 7 at its best: client side cache, and the finished Response as the value, so that a hit
serialises nothing.

``lock=True`` is its way to fill a cold key once.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import cashews
import handler
from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse


def make(url: str) -> Any:
    """Make the application."""
    cache = cashews.Cache()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # the response class is pickled; its own signing is left off, as by default
        await cache.setup(url, client_side=True).init()
        yield
        await cache.close()

    app = handler.application(lifespan=lifespan)
    Caller = Annotated[str, Depends(handler.caller)]

    @app.get(handler.PATH)
    @cache(ttl=handler.TTL_S, key="items:{caller}:{page}", tags=["items:{caller}"])
    async def items(caller: Caller, page: int) -> Response:
        return JSONResponse(await handler.fetch(page))

    @app.get(handler.SLOW_PATH)
    @cache(ttl=handler.TTL_S, key="slow:{caller}:{page}")
    async def slow(caller: Caller, page: int) -> Response:
        return JSONResponse(await handler.fetch_slowly(page))

    @app.get(handler.LOCKED_PATH)
    @cache(ttl=handler.TTL_S, key="locked:{caller}:{page}", lock=True)
    async def locked(caller: Caller, page: int) -> Response:
        return JSONResponse(await handler.fetch_slowly(page))

    return app
