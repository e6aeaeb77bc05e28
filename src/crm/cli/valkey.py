"""``python -m crm valkey``: one command to the cache server of the running system."""

import asyncio
from typing import Any

from crm.cli.running import CommandFailed, database_cache_url
from crm.settings import Settings
from respcache.resp.connection import visit
from respcache.resp.url import ServerURL

COMMAND_S = 10.0


def send_command(words: list[str]) -> None:
    """Send a command and print its reply as valkey-cli does. Raises ``CommandFailed``."""
    url = database_cache_url(Settings())
    if url is None or url == "none":
        raise CommandFailed("this system runs without a cache: set REDIS_CACHE_URL")
    for line in _lines(asyncio.run(_execute(ServerURL.parse(url), words))):
        print(line)


async def _execute(url: ServerURL, words: list[str]) -> Any:
    async with visit(url, deadline_s=COMMAND_S) as connection:
        (reply,) = await connection.execute([tuple(words)], deadline_s=COMMAND_S)
    if isinstance(reply, Exception):
        raise CommandFailed(str(reply))
    return reply


def _lines(reply: Any) -> list[str]:
    """Format a reply as valkey-cli does when its output is not a terminal."""
    if isinstance(reply, dict):
        return [line for pair in reply.items() for part in pair for line in _lines(part)]
    if isinstance(reply, list | set | tuple):
        return [line for part in reply for line in _lines(part)]
    if isinstance(reply, bytes):
        return reply.decode(errors="backslashreplace").rstrip().splitlines() or [""]
    return ["" if reply is None else str(reply)]
