"""``respcache tail``: prints invalidations as they happen."""

import time
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from respcache.ops.cli.client import Client
from respcache.ops.cli.outcome import Status
from respcache.ops.cli.output import Output, duration

Document = Mapping[str, Any]

PAUSE_S = 1.0
MAX_EVENTS = 1_000

STYLES = {"confirmed": "green", "pending; safe": "yellow", "pending": "bold red"}


def run(
    out: Output, client: Client, *, tenant: str | None, module: str | None, lines: int, follow: bool
) -> Status:
    """Print the last events and, if ``follow``, new ones until Ctrl-C.

    In JSON, every line is one document.
    """
    feed = client.get("feed", tenant=tenant, limit=lines if module is None else MAX_EVENTS)
    if feed["processes"] != "all":
        out.note(
            "the cache server is unavailable: these are the invalidations of the process that "
            "responded"
        )
    for event in _chosen(feed, module)[-lines:]:
        out.line(event, _line(event))
    while follow:
        if len(feed["events"]) < MAX_EVENTS:
            time.sleep(PAUSE_S)
        feed = client.get("feed", after=feed["last"], tenant=tenant, limit=MAX_EVENTS)
        for event in _chosen(feed, module):
            out.line(event, _line(event))
    return Status.OK


def _chosen(feed: Document, module: str | None) -> list[Document]:
    return [
        event
        for event in feed["events"]
        if module is None or module in event["modules"] or event["everything"]
    ]


def _line(event: Document) -> Text:
    what = "everything" if event["everything"] else ", ".join(event["modules"]) or "no module"
    tables = f" ({', '.join(event['tables'])})" if event["tables"] else ""
    worker = f"  {event['process']}" if event["process"] else ""
    more = f"  and {event['skipped']} more that were skipped" if event["skipped"] else ""
    return Text.assemble(
        (event["at"][:23].replace("T", " "), "dim"),
        "  ",
        (event["outcome"], STYLES.get(event["outcome"], "")),
        " after ",
        duration(event["seconds"]),
        f"  {event['tenant']}  {what}{tables}  {event['cause']}",
        (worker, "dim"),
        more,
    )
