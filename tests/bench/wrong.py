"""Lanes that are wrong, each in one way: the benchmark must refuse them."""

from typing import Any

import handler
from fastapi import Response
from lanes import bare


def other_page(url: str) -> Any:
    """Answer every request with the same page: right status, right length, the bytes of another
    one."""
    return _answering(lambda page: handler.body(0))


def short(url: str) -> Any:
    """Leave the last byte out."""
    return _answering(lambda page: handler.body(page)[:-1])


def forgetful(url: str) -> Any:
    """Answer rightly, and run the handler every time."""
    app = handler.application()

    @app.get(handler.PATH)
    async def items(page: int) -> dict[str, Any]:
        return await handler.fetch(page)

    return app


def failing(url: str) -> Any:
    """Answer with an error once it is warm."""
    served = bare.make(url)
    left = [2 * 2 * handler.PAGES]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            left[0] -= 1
            if left[0] < 0:
                return await Response(b"", 503)(scope, receive, send)
        await served(scope, receive, send)

    return app


def _answering(body: Any) -> Any:
    app = handler.application()

    @app.get(handler.PATH)
    async def items(page: int) -> Response:
        return Response(body(page), media_type="application/json")

    return app
