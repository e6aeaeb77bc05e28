"""Options that several commands share, their defaults and limits."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_URL = "http://localhost:4001/cache"
MAX_KEYS = 100_000

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Url = Annotated[
    str,
    typer.Option("--url", metavar="URL", envvar="RESPCACHE_URL", help="address of the dashboard"),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="file with the token; -: standard input  [default: RESPCACHE_TOKEN]",
    ),
]
Tenant = Annotated[str | None, typer.Option("--tenant", help="only this tenant, by id or name")]
Module = Annotated[str | None, typer.Option("--module", help="only this module")]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        "-H",
        "--header",
        metavar="'NAME: VALUE'",
        help="header of the request; @FILE: one per line",
    ),
]
