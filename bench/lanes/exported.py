"""The lane ``strict`` of respcache with metrics: a publisher, and the endpoint for Prometheus."""

from typing import Any

from lanes import ours
from respcache.integrations.prometheus import Endpoint
from respcache.ops.stats.publisher import StatsPublisher

PATH = "/metrics"
TOKEN = "scrape-token-of-the-benchmark"  # noqa: S105


def scraped(url: str) -> Any:
    """Return the application."""
    publisher = StatsPublisher(url)
    app = ours.wrapped(ours.make_cache(url, name="exported", publisher=publisher), "strict")
    app.app.add_route(PATH, Endpoint(publisher, token=TOKEN))
    return app
