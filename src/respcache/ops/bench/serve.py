"""A process that is measured: uvicorn without an access log on a listening socket that was handed
down.

``python -m respcache.ops.bench.serve WAY TARGET DESCRIPTOR``. WAY is ``with`` (TARGET
``module:app`` as it is), ``without`` (the same with what its cache wraps in place of the wrapper)
or ``bare`` (TARGET is a file of prepared answers).
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
    """A server that says on its standard output when it is ready."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets=sockets)
        if self.started:
            os.write(1, READY)


def run(app: Any, descriptor: int, **options: Any) -> None:
    """Serve until terminated. ``options`` are uvicorn's."""
    config = uvicorn.Config(app, access_log=False, log_level="warning", **options)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(Announced(config).serve(sockets=[socket.socket(fileno=descriptor)]))


def bare(answers: list[Prepared]) -> App:
    """Make the floor: an application that only sends what others must first find."""
    by_target = {answer.target.encode(): answer for answer in answers}

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        query = scope["query_string"]
        answer = by_target[scope["raw_path"].partition(b"?")[0] + (b"?" + query if query else b"")]
        await send({"type": "http.response.start", "status": 200, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})

    return app


def without_cache(app: Any) -> Any:
    """Return an application with what its cache wraps in place of the wrapper, whatever stands
    around it."""
    if isinstance(app, CacheMiddleware):
        return app.app
    around = app
    while not isinstance(around.app, CacheMiddleware):
        around = around.app
    around.app = around.app.app
    return app


def main(way: str, target: str, descriptor: int) -> None:
    """Serve one of the three."""
    if way == "bare":
        run(
            bare(msgspec.msgpack.decode(Path(target).read_bytes(), type=list[Prepared])),
            descriptor,
            lifespan="off",
        )
        return
    app = load(target, Path.cwd()).app
    run(without_cache(app) if way == "without" else app, descriptor, lifespan="auto")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
