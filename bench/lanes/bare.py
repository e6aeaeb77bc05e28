"""The lower bound: an ASGI function that sends prepared bytes, with heads of the size of ours."""

import json
from typing import Any

import handler

HEADERS = [
    (b"content-type", b"application/json"),
    (b"vary", b"Accept-Encoding"),
    (b"content-length", str(handler.BODY_BYTES).encode()),
    (b"cache-control", b"private, no-cache"),
    (b"cache-status", b"respcache; hit; ttl=3599"),
]


def make(url: str) -> Any:
    """Return the application."""
    pages = {f"page={number}".encode(): handler.body(number) for number in range(handler.PAGES)}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            body = pages.get(scope["query_string"])
            if body is None:  # /fills
                body = json.dumps({"fills": 0}).encode()
                await send(
                    {
                        "type": "http.response.start",
                        "status": 200,
                        "headers": [(b"content-length", b"%d" % len(body))],
                    }
                )
            else:
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await send({"type": "http.response.body", "body": body})
        elif scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})

    return app
