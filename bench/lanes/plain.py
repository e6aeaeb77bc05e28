"""The same handler in FastAPI without any cache: what the others' misses and proxies stand on."""

from typing import Annotated, Any

import handler
from fastapi import Depends


def make(url: str) -> Any:
    """Make the application."""
    app = handler.application()
    Caller = Annotated[str, Depends(handler.caller)]

    @app.get(handler.PATH)
    async def items(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch(page)

    @app.get(handler.SLOW_PATH)
    async def slow(caller: Caller, page: int) -> dict[str, Any]:
        return await handler.fetch_slowly(page)

    return app
