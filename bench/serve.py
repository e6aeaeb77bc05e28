"""One process of one lane: uvicorn with uvloop and httptools, no access log, on a listening socket that was handed down.

Run by ``machine.py``: ``serve.py MODULE:FACTORY DESCRIPTOR``. The factory gets the address of Valkey and returns an ASGI
application, or one with the protocol class that uvicorn is to use for it.
"""

import asyncio
import importlib
import os
import socket
import sys
from typing import Any

import uvicorn


class Announced(uvicorn.Server):
    """A server that says on its standard output when it is ready."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets=sockets)
        if self.started:
            print("ready", flush=True)


def main(target: str, descriptor: int) -> None:
    """Serve until terminated."""
    module, _, factory = target.partition(":")
    made: Any = getattr(importlib.import_module(module), factory)(os.environ["BENCH_STORE_URL"])
    app, http = made if isinstance(made, tuple) else (made, "httptools")
    config = uvicorn.Config(app, http=http, loop="uvloop", access_log=False, log_level="warning", lifespan="on")
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(Announced(config).serve(sockets=[socket.socket(fileno=descriptor)]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
