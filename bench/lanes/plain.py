"""The handler in FastAPI without any cache: the base for misses and for proxies."""

from typing import Annotated, Any

import handler
from fastapi import Depends


def make(url: str) -> Any:
    """Return the application."""
    app = handler.application()
    Caller = Annotated[str, Depends(handler.caller)]

    @app.get(handler.PATH)
    async def items(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch(page)

    @app.get(handler.SLOW_PATH)
    async def slow(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch_slowly(page)

    return app
