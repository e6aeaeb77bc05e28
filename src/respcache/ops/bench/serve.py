"""The server process of a lane: uvicorn without an access log, on an inherited listening socket.

``python -m respcache.ops.bench.serve LANE TARGET DESCRIPTOR``. LANE is ``with`` (TARGET is
``module:app``), ``without`` (the same application without its cache middleware) or ``bare`` (TARGET
is a file of prepared responses).
"""

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from respcache.context import App, AsgiScope, Receive, Send
from respcache.middleware import CacheMiddleware
from respcache.ops.application import load
from respcache.ops.bench.processes import READY, Prepared


class Announced(uvicorn.Server):
    """A server that writes ``READY`` to standard output when it is ready."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then write ``READY``."""
        await super().startup(sockets=sockets)
        if self.started:
            os.write(1, READY)


def run(app: Any, descriptor: int, **options: Any) -> None:
    """Serve until terminated. ``options`` are those of uvicorn."""
    config = uvicorn.Config(app, access_log=False, log_level="warning", **options)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(Announced(config).serve(sockets=[socket.socket(fileno=descriptor)]))


def bare(responses: list[Prepared]) -> App:
    """Return the baseline: an ASGI application that only sends prepared responses."""
    by_target = {response.target.encode(): response for response in responses}

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        query = scope["query_string"]
        path = scope["raw_path"].partition(b"?")[0]
        response = by_target[path + (b"?" + query if query else b"")]
        await send({"type": "http.response.start", "status": 200, "headers": response.headers})
        await send({"type": "http.response.body", "body": response.body})

    return app


def without_cache(app: Any) -> Any:
    """Return an application without its cache middleware, but with other outer middleware."""
    if isinstance(app, CacheMiddleware):
        return app.app
    around = app
    while not isinstance(around.app, CacheMiddleware):
        around = around.app
    around.app = around.app.app
    return app


def main(lane: str, target: str, descriptor: int) -> None:
    """Serve one lane."""
    if lane == "bare":
        run(
            bare(msgspec.msgpack.decode(Path(target).read_bytes(), type=list[Prepared])),
            descriptor,
            lifespan="off",
        )
        return
    app = load(target, Path.cwd()).app
    run(without_cache(app) if lane == "without" else app, descriptor, lifespan="auto")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
