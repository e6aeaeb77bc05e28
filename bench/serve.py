"""One process of one lane: uvicorn with uvloop and httptools, no access log, on a listening socket
that was handed down.

Run by ``machine.py``: ``serve.py MODULE:FACTORY DESCRIPTOR``. The factory gets the address of
Valkey and returns an ASGI application, or one with the protocol class that uvicorn is to use for
it.
"""

import importlib
import os
import sys
from typing import Any

from respcache.ops.bench.serve import run


def main(target: str, descriptor: int) -> None:
    """Serve until terminated."""
    module, _, factory = target.partition(":")
    made: Any = getattr(importlib.import_module(module), factory)(os.environ["BENCH_STORE_URL"])
    app, http = made if isinstance(made, tuple) else (made, "httptools")
    run(app, descriptor, http=http, loop="uvloop", lifespan="on")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
