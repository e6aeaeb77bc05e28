"""cashews 7 in its fastest form: the client-side cache, with the finished Response as the value.

A hit then serializes nothing. ``lock=True`` is its way to fill a cold key once.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import cashews
import handler
from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse


def make(url: str) -> Any:
    """Return the application."""
    cache = cashews.Cache()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # responses are pickled; signing of pickles is off, as by default
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
