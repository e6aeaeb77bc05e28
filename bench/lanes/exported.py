"""The lane ``strict`` of respcache with its metrics exported: a board that publishes, and the page
that is scraped."""

from typing import Any

from lanes import ours
from respcache.integrations.prometheus import Endpoint
from respcache.ops.stats.publisher import StatsPublisher

PATH = "/metrics"
TOKEN = "scrape-token-of-the-benchmark"  # noqa: S105


def scraped(url: str) -> Any:
    """Make it."""
    publisher = StatsPublisher(url)
    app = ours.wrapped(ours.make_cache(url, name="exported", publisher=publisher), "strict")
    app.app.add_route(PATH, Endpoint(publisher, token=TOKEN))
    return app
