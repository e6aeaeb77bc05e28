"""``respcache config``: prints settings with value and source, for this environment and, with a
client, for the running application."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from respcache.ops.cli.client import Client
from respcache.ops.cli.options import DEFAULT_URL
from respcache.ops.cli.outcome import Status
from respcache.ops.cli.output import Output

READ: Mapping[str, tuple[str | None, bool]] = {
    "RESPCACHE_URL": (DEFAULT_URL, False),
    "RESPCACHE_TOKEN": (None, True),
    "REDIS_CACHE_URL": (None, False),
    "REDIS_URL": (None, False),
    "DATABASE_URL": (None, False),
    "RESPCACHE_KEY": (None, True),
    "NO_COLOR": (None, False),
}
"""The variables that the commands read: default, and whether the whole value is secret."""


def run(out: Output, client: Client | None) -> Status:
    """Print the settings of this environment and, with a client, of the application."""
    local = list(_local())
    remote = None if client is None else client.get("configuration")
    document = {"environment": local, "application": remote}

    def render() -> None:
        columns = ("setting", "value", "source")
        out.table(columns, ((one["name"], one["value"], one["source"]) for one in local))
        if client is not None and remote is not None:
            out.print()
            out.table(
                (f"setting of {client.url}", *columns[1:]),
                ((one["name"], one["value"], one["source"]) for one in remote),
            )

    out.emit(document, render)
    return Status.OK


def _local() -> Iterator[dict[str, Any]]:
    for name, (default, secret) in READ.items():
        value = os.environ.get(name) or None
        if secret:
            shown: str | None = "set" if value else "not set"
        else:
            shown = default if value is None else without_password(value)
        yield {
            "name": name,
            "value": shown or "not set",
            "source": "environment" if value else "default",
        }


def without_password(url: str) -> str:
    """Return an address without its password and query, even if it is encoded incorrectly.

    Return ``set`` for anything else that may contain a secret (``host=h password=p``).
    """
    if "://" not in url.partition("@")[0]:
        return "set" if "@" in url or "=" in url else url
    hidden = re.sub(r"^([\w+]+://)([^:@/]*):?.*@", r"\1\2:***@", url, flags=re.DOTALL)
    return hidden.partition("?")[0]
