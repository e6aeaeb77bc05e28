"""The lane ``strict`` of respcache with its metrics exported: a board that publishes, and the page
that is scraped."""

from typing import Any

from lanes import ours
from respcache.ops.board import Board
from respcache.ops.prometheus import Endpoint

PATH = "/metrics"
TOKEN = "scrape-token-of-the-benchmark"  # noqa: S105


def scraped(url: str) -> Any:
    """Make it."""
    board = Board(url)
    app = ours.wrapped(ours.make_cache(url, name="exported", board=board), "strict")
    app.app.add_route(PATH, Endpoint(board, token=TOKEN))
    return app
