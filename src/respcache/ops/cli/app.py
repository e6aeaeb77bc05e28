"""The commands of ``respcache`` and their options. What they do is in the modules that they import
when they run.

``respcache --help`` imports neither rich nor anything else of weight.
"""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from respcache.ops.cli.client import Client
    from respcache.ops.cli.output import Output

STATUSES = "Exit status: 0 ok, 1 check failed, 2 usage, 3 unreachable, 4 refused."
DEFAULT_URL = "http://localhost:4001/cache"
MAX_KEYS = 100_000

app = typer.Typer(
    name="respcache",
    help="See and steer a response cache: what it holds, why it answers as it does, and whether "
    "its servers are set up right.",
    epilog=STATUSES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Url = Annotated[
    str,
    typer.Option(
        "--url", metavar="URL", envvar="RESPCACHE_URL", help="where the dashboard is mounted"
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="holds the token; -: standard input  [else: RESPCACHE_TOKEN]",
    ),
]
Tenant = Annotated[str | None, typer.Option("--tenant", help="only this one, by id or name")]
Module = Annotated[str | None, typer.Option("--module", help="only this one")]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        "-H", "--header", metavar="'NAME: VALUE'", help="of the request; @FILE: one a line"
    ),
]


def _run(as_json: bool, command: "Callable[[Output], int | None]") -> None:
    """Run a command with an output of its own; exit with what it returns."""
    from respcache.ops.cli.output import Output

    out = Output(as_json=as_json)
    with out.running():
        raise typer.Exit(command(out) or 0)


def _ask(
    as_json: bool,
    url: str,
    token_file: Path | None,
    command: "Callable[[Output, Client], int | None]",
) -> None:
    """Run a command that talks to the application."""
    from respcache.ops.cli.client import Client, read_token

    def connected(out: "Output") -> int | None:
        with Client(url, read_token(token_file)) as client:
            return command(out, client)

    _run(as_json, connected)


@app.command()
def status(url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Say how the cache is, and what keeps it from serving.

    Exit status 1 when something does.
    """
    from respcache.ops.cli import figures

    _ask(as_json, url, token_file, figures.status)


class By(StrEnum):
    """What figures are added up by."""

    TENANTS = "tenants"
    MODULES = "modules"
    ROUTES = "routes"


@app.command()
def stats(
    by: Annotated[By, typer.Option("--by", help="what they are added up by")] = By.MODULES,
    tenant: Tenant = None,
    module: Module = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Print requests, hits and times by module, route or tenant."""
    from respcache.ops.cli import figures

    _ask(
        as_json,
        url,
        token_file,
        lambda out, client: figures.stats(out, client, by=by, tenant=tenant, module=module),
    )


@app.command()
def keys(
    tenant: Tenant = None,
    module: Module = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=MAX_KEYS, help="how many at most")
    ] = 100,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """List stored answers of a tenant or a module."""
    from respcache.ops.cli import stored

    _ask(
        as_json,
        url,
        token_file,
        lambda out, client: stored.keys(out, client, tenant=tenant, module=module, limit=limit),
    )


@app.command()
def get(
    key: Annotated[str, typer.Argument(help="as `respcache keys` prints it")],
    body: Annotated[
        bool, typer.Option("--body", help="print the body: this is written into the trail")
    ] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Look at one stored answer, and whether it is valid and why."""
    from respcache.ops.cli import stored

    _ask(as_json, url, token_file, lambda out, client: stored.get(out, client, key=key, body=body))


@app.command()
def explain(
    path: Annotated[str, typer.Argument(help="of a request, such as /api/leads?limit=50")],
    method: Annotated[str, typer.Option("--method", "-X")] = "GET",
    headers: Headers = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="without credentials  [else: of whoever asks]")
    ] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Say why a request would be a hit, a miss or a bypass now.

    Changes nothing. Without credentials in -H it is explained as a request of whoever the token
    belongs to.
    """
    from respcache.ops.cli import explain as command

    _ask(
        as_json, url, token_file,
        lambda out, client: command.run(out, client, path=path, method=method, headers=headers or [], anonymous=anonymous),
    )  # fmt: skip


@app.command()
def purge(
    tenant: Tenant = None,
    module: Module = None,
    key: Annotated[str | None, typer.Option("--key", help="one stored answer instead")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what it would do")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Invalidate all of a tenant, one module of it, or one entry.

    Asks for the tenant's name before. Without a terminal, --yes is needed.
    """
    from respcache.ops.cli import stored

    _ask(
        as_json, url, token_file,
        lambda out, client: stored.purge(out, client, tenant=tenant, module=module, key=key, dry_run=dry_run, yes=yes),
    )  # fmt: skip


@app.command()
def tail(
    tenant: Tenant = None,
    module: Module = None,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, max=1000, help="how many of those before")
    ] = 20,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="go on until Ctrl-C")] = True,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Follow the invalidations: when, whose, what, why, how fast.

    With --json, one document a line.
    """
    from respcache.ops.cli import tail as command

    _ask(
        as_json, url, token_file,
        lambda out, client: command.run(out, client, tenant=tenant, module=module, lines=lines, follow=follow),
    )  # fmt: skip


@app.command()
def config(
    url: Annotated[
        str | None,
        typer.Option(
            "--url", metavar="URL", envvar="RESPCACHE_URL", help="asks the running application too"
        ),
    ] = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Print settings with their values and sources.

    Of this environment; with --url those of the running application too. Secrets are not shown.
    """
    from respcache.ops.cli import config as command

    if url is None:
        _run(as_json, lambda out: command.run(out, None))
    else:
        _ask(as_json, url, token_file, command.run)


@app.command()
def doctor(
    app: Annotated[
        str | None,
        typer.Option("--app", metavar="MODULE:APP", help="asks this application for its tables"),
    ] = None,
    tables: Annotated[
        str | None, typer.Option("--tables", metavar="A,B", help="tables that cached reads declare")
    ] = None,
    schema: Annotated[str, typer.Option("--schema", help="where outbox and tables are")] = "public",
    as_json: Json = False,
) -> None:
    """Check the set-up, and say how to mend what is wrong.

    Both servers, the database, triggers, rights, secrets. Exit status 1 when there is a fault.

    Reads REDIS_CACHE_URL, REDIS_URL, DATABASE_URL and RESPCACHE_KEY. Changes nothing.
    """
    from respcache.ops.cli import doctor as command

    _run(as_json, lambda out: command.run(out, app=app, tables=tables, schema=schema))


@app.command()
def acl(
    role: Annotated[str | None, typer.Option("--role", help="only this one")] = None,
    as_json: Json = False,
) -> None:
    """Print the rules for the server's ACL: what each user needs."""
    from respcache.ops.cli import acl as command

    _run(as_json, lambda out: command.run(out, role=role))


@app.command()
def bench(
    urls: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[URL|PATH]...", help="of a running application, or with --app paths"
        ),
    ] = None,
    app: Annotated[
        str | None,
        typer.Option(
            "--app", metavar="MODULE:APP", help="starts it itself, with its cache and without"
        ),
    ] = None,
    path: Annotated[
        list[str] | None, typer.Option("--path", help="the same as an argument")
    ] = None,
    headers: Headers = None,
    without: Annotated[
        str | None,
        typer.Option(
            "--without", metavar="URL", help="the same application, running without its cache"
        ),
    ] = None,
    pid: Annotated[
        list[int] | None,
        typer.Option("--pid", help="of a process of the running one: measures its CPU"),
    ] = None,
    without_pid: Annotated[
        list[int] | None, typer.Option("--without-pid", help="of a process of the other")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=1000)] = 5,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, max=600, help="of a lane in a round")
    ] = 1.0,
    connections: Annotated[str, typer.Option("--connections", metavar="N,N")] = "1,16",
    as_json: Json = False,
) -> None:
    """Measure what the cache brings: with it, without it, bare ASGI.

    Requests a second, latencies and CPU of the same requests, in turns within one run.
    """
    from respcache.ops.cli import bench as command

    _run(
        as_json,
        lambda out: command.run(
            out, urls=[*(urls or []), *(path or [])], app=app, headers=headers or [], without=without, pids=pid or [],
            without_pids=without_pid or [], rounds=rounds, seconds=seconds, connections=connections,
        ),
    )  # fmt: skip
