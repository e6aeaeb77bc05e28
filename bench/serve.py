"""One process of one lane: uvicorn with uvloop and httptools, on an inherited listening socket.

``machine.py`` runs it as ``serve.py MODULE:FACTORY DESCRIPTOR``. The factory takes the address of
Valkey and returns an ASGI application, or a pair of it and the protocol class for uvicorn.
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
