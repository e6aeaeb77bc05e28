"""The commands of ``respcache`` and their options. Each command imports the module that implements
it when it runs, so that ``respcache --help`` imports neither rich nor other large packages."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from respcache.ops.cli.options import (
    DEFAULT_URL,
    MAX_KEYS,
    Headers,
    Json,
    Module,
    Tenant,
    TokenFile,
    Url,
)

if TYPE_CHECKING:
    from respcache.ops.cli.client import Client
    from respcache.ops.cli.output import Output

STATUSES = "Exit status: 0 ok, 1 check failed, 2 usage, 3 unreachable, 4 refused."

app = typer.Typer(
    name="respcache",
    help="Inspect and control a response cache: its contents, its decisions, and the set-up of "
    "its servers.",
    epilog=STATUSES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _run(command: "Callable[[Output], int | None]", *, as_json: bool) -> None:
    """Run a command and exit with the status that it returns."""
    from respcache.ops.cli.output import Output

    out = Output(as_json=as_json)
    with out.running():
        raise typer.Exit(command(out) or 0)


def _ask(
    command: "Callable[[Output, Client], int | None]",
    *,
    as_json: bool,
    url: str,
    token_file: Path | None,
) -> None:
    """Run a command that connects to the application."""
    from respcache.ops.cli.client import Client, read_token

    def connected(out: "Output") -> int | None:
        with Client(url, read_token(token_file)) as client:
            return command(out, client)

    _run(connected, as_json=as_json)


@app.command()
def status(*, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Show the state of the cache and its problems.

    Exit status 1 if there is a problem.
    """
    from respcache.ops.cli import stats as command

    _ask(command.status, as_json=as_json, url=url, token_file=token_file)


class GroupBy(StrEnum):
    """The groups of ``respcache stats``."""

    TENANTS = "tenants"
    MODULES = "modules"
    ROUTES = "routes"


@app.command()
def stats(
    *,
    by: Annotated[GroupBy, typer.Option("--by", help="group by this")] = GroupBy.MODULES,
    tenant: Tenant = None,
    module: Module = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Print requests, hits and times by module, route or tenant."""
    from respcache.ops.cli import stats as command

    _ask(
        lambda out, client: command.stats(out, client, by=by, tenant=tenant, module=module),
        as_json=as_json,
        url=url,
        token_file=token_file,
    )


@app.command()
def keys(
    *,
    tenant: Tenant = None,
    module: Module = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=MAX_KEYS, help="maximal number")
    ] = 100,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """List the stored responses of a tenant or a module."""
    from respcache.ops.cli import stored

    _ask(
        lambda out, client: stored.keys(out, client, tenant=tenant, module=module, limit=limit),
        as_json=as_json,
        url=url,
        token_file=token_file,
    )


@app.command()
def get(
    key: Annotated[str, typer.Argument(help="as `respcache keys` prints it")],
    *,
    body: Annotated[
        bool, typer.Option("--body", help="print the body; recorded in the audit log")
    ] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Show one stored response, and whether and why it is valid."""
    from respcache.ops.cli import stored

    _ask(
        lambda out, client: stored.get(out, client, key=key, body=body),
        as_json=as_json,
        url=url,
        token_file=token_file,
    )


@app.command()
def explain(
    path: Annotated[str, typer.Argument(help="path of a request, such as /api/leads?limit=50")],
    *,
    method: Annotated[str, typer.Option("--method", "-X")] = "GET",
    headers: Headers = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="without credentials  [default: those of the token]")
    ] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Explain why a request would be a hit, a miss or a bypass now.

    Changes nothing. Without credentials in -H, the request carries those of the token.
    """
    from respcache.ops.cli import explain as command

    _ask(
        lambda out, client: command.run(
            out, client, path=path, method=method, headers=headers or [], anonymous=anonymous
        ),
        as_json=as_json,
        url=url,
        token_file=token_file,
    )


@app.command()
def purge(
    *,
    tenant: Tenant = None,
    module: Module = None,
    key: Annotated[str | None, typer.Option("--key", help="one stored response instead")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only count")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask for confirmation")] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Invalidate a tenant, one module of it, or one entry.

    Asks for the tenant's name first. Without a terminal, --yes is required.
    """
    from respcache.ops.cli import stored

    target = {"tenant": tenant, "module": module, "key": key}
    _ask(
        lambda out, client: stored.purge(out, client, target=target, dry_run=dry_run, yes=yes),
        as_json=as_json,
        url=url,
        token_file=token_file,
    )


@app.command()
def tail(
    *,
    tenant: Tenant = None,
    module: Module = None,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, max=1000, help="number of earlier events")
    ] = 20,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="continue until Ctrl-C")
    ] = True,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Follow the invalidations: time, tenant, modules, cause, duration.

    With --json, prints one document per line.
    """
    from respcache.ops.cli import tail as command

    _ask(
        lambda out, client: command.run(
            out, client, tenant=tenant, module=module, lines=lines, follow=follow
        ),
        as_json=as_json,
        url=url,
        token_file=token_file,
    )


@app.command()
def config(
    *,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            envvar="RESPCACHE_URL",
            help="also print those of this running application",
        ),
    ] = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Print settings with their values and sources.

    Prints those of this environment, and with --url also those of the running application.
    Does not print secrets.
    """
    from respcache.ops.cli import config as command

    if url is None:
        _run(lambda out: command.run(out, None), as_json=as_json)
    else:
        _ask(command.run, as_json=as_json, url=url, token_file=token_file)


@app.command()
def doctor(
    *,
    app: Annotated[
        str | None,
        typer.Option("--app", metavar="MODULE:APP", help="application that declares the tables"),
    ] = None,
    tables: Annotated[
        str | None, typer.Option("--tables", metavar="A,B", help="tables that cached reads declare")
    ] = None,
    schema: Annotated[
        str, typer.Option("--schema", help="schema of the outbox and the tables")
    ] = "public",
    as_json: Json = False,
) -> None:
    """Check the set-up and print fixes for problems.

    Checks both servers, the database, triggers, rights and secrets. Exit status 1 if there is a
    fault.

    Reads REDIS_CACHE_URL, REDIS_URL, DATABASE_URL and RESPCACHE_KEY. Changes nothing.
    """
    from respcache.ops.cli import doctor as command

    _run(lambda out: command.run(out, app=app, tables=tables, schema=schema), as_json=as_json)


@app.command()
def acl(
    *,
    role: Annotated[str | None, typer.Option("--role", help="only this role")] = None,
    as_json: Json = False,
) -> None:
    """Print the ACL rules for the users of the cache server."""
    from respcache.ops.cli import acl as command

    _run(lambda out: command.run(out, role=role), as_json=as_json)


@app.command()
def bench(
    *,
    urls: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[URL|PATH]...", help="requests to a running application; with --app: paths"
        ),
    ] = None,
    app: Annotated[
        str | None,
        typer.Option(
            "--app", metavar="MODULE:APP", help="start this application, with and without its cache"
        ),
    ] = None,
    path: Annotated[list[str] | None, typer.Option("--path", help="same as an argument")] = None,
    headers: Headers = None,
    without: Annotated[
        str | None,
        typer.Option(
            "--without", metavar="URL", help="the same application, running without its cache"
        ),
    ] = None,
    pid: Annotated[
        list[int] | None,
        typer.Option("--pid", help="process of the application, to measure its CPU time"),
    ] = None,
    without_pid: Annotated[
        list[int] | None,
        typer.Option("--without-pid", help="process of the application without cache"),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=1000)] = 5,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0.01, max=600, help="duration of one lane in one round"),
    ] = 1.0,
    connections: Annotated[str, typer.Option("--connections", metavar="N,N")] = "1,16",
    as_json: Json = False,
) -> None:
    """Compare an application with and without its cache, and bare ASGI.

    Measures requests per second, latency and CPU time of the same requests, in turns.
    """
    from respcache.ops.cli import bench as command

    measured = command.Measured(
        urls=[*(urls or []), *(path or [])],
        app=app,
        headers=headers or [],
        without=without,
        pids=pid or [],
        without_pids=without_pid or [],
    )
    _run(
        lambda out: command.run(
            out, measured, rounds=rounds, seconds=seconds, connections=connections
        ),
        as_json=as_json,
    )
