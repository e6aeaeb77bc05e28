"""The commands behind ``python -m crm``."""

import argparse
import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from crm.cli.launch import STATE_FILE, CommandFailed, cache_url, launched, port_to_serve
from crm.settings import Settings
from respcache.core.errors import ConfigurationError, StoreError
from respcache.resp.connection import visit
from respcache.resp.url import ServerURL
from respcache.testing.servers import ServerFailed

MODULE_NAMES = (
    "accounts",
    "leads",
    "contacts",
    "bizdevsources",
    "opportunities",
    "activities",
    "documents",
    "tasks",
)
COMMAND_S = 10.0


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 when it failed, 2 when it was called wrongly."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc'])).upper() or 'environment'}: {p['msg']}"
            for p in error.errors()
        )
        return _say_failure(problems)
    except KeyboardInterrupt:
        return _say_failure("stopped")
    except (
        CommandFailed,
        ConfigurationError,
        ServerFailed,
        StoreError,
        LookupError,
        ValueError,
    ) as error:
        return _say_failure(str(error.args[0] if error.args else error))
    except (DBAPIError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            return _say_failure(f"{error.filename}: {error.strerror}")
        cause = getattr(error, "orig", None) or error
        return _say_failure(
            f"{type(cause).__name__}: {cause}. Check DATABASE_URL (host, port, user, password)"
        )


def run(options: argparse.Namespace) -> None:
    """Start what is needed, then serve until Ctrl-C; stop what was started."""
    from crm.auth import development_token

    settings = Settings().with_secrets()
    port = port_to_serve(settings)
    with launched(settings, port) as system:
        settings, token = system.settings, ""
        assert settings.jwt_secret is not None
        if settings.environment == "development":
            secret = settings.jwt_secret.get_secret_value()
            with contextlib.suppress(LookupError):
                token = asyncio.run(
                    development_token(system.database_url, secret, tenant="acme", role="admin")
                )
        _say_hello(settings, port, system.data, token)
        _serve(settings, port)


def serve(options: argparse.Namespace) -> None:
    """Serve with the servers that DATABASE_URL and REDIS_CACHE_URL name; start none."""
    settings = Settings().with_secrets()
    if settings.database_url is None or settings.redis_cache_url is None:
        raise CommandFailed(
            "serve starts no servers: set DATABASE_URL and REDIS_CACHE_URL (or 'none'), or use "
            "`python -m crm run`"
        )
    _serve(settings, port_to_serve(settings))


def token(options: argparse.Namespace) -> None:
    """Print a development token."""
    from crm.auth import development_token

    settings = Settings()
    if settings.environment == "production":
        raise CommandFailed(
            "development tokens are not issued in production: log in with POST /api/auth/login"
        )
    settings = settings.with_secrets()
    assert settings.jwt_secret is not None
    secret = settings.jwt_secret.get_secret_value()
    print(
        asyncio.run(
            development_token(
                _database_url(settings),
                secret,
                tenant=options.tenant,
                role=options.role,
                hours=options.hours,
            )
        )
    )


def migrate(options: argparse.Namespace) -> None:
    """Bring the database to the newest schema."""
    from crm.migrations import upgrade

    upgrade(_database_url(Settings()))
    print("the database has the newest schema")


def demo(options: argparse.Namespace) -> int:
    """Start everything with traffic and outages of the cache server, and say what comes of it,
    until Ctrl-C."""
    from crm.demo.run import run_demo

    return run_demo(options)


def demo_data(options: argparse.Namespace) -> None:
    """Put demo data into an empty database."""
    from crm.demo.seed import seed_if_empty

    print(asyncio.run(seed_if_empty(_database_url(Settings()))))


def import_files(options: argparse.Namespace) -> int:
    """Import CSV files into a module of a tenant."""
    from crm.cli.transfer import import_files

    settings = Settings()
    return asyncio.run(
        import_files(settings, _database_url(settings), _cache_of_database(settings), options)
    )


def export_module(options: argparse.Namespace) -> int:
    """Export all records of a module of a tenant as CSV."""
    from crm.cli.transfer import export_module

    return asyncio.run(export_module(_database_url(Settings()), options))


def valkey(options: argparse.Namespace) -> None:
    """Send one command to the cache server of the running system, as valkey-cli would, without
    having to know its password."""
    settings = Settings()
    url = _cache_of_database(settings)
    if url is None or url == "none":
        raise CommandFailed("this system runs without a cache: set REDIS_CACHE_URL")
    for line in _lines(asyncio.run(_ask(ServerURL.parse(url), options.words))):
        print(line)


async def _ask(url: ServerURL, words: list[str]) -> Any:
    async with visit(url, deadline_s=COMMAND_S) as connection:
        (reply,) = await connection.execute([tuple(words)], deadline_s=COMMAND_S)
    if isinstance(reply, Exception):
        raise CommandFailed(str(reply))
    return reply


def _lines(reply: Any) -> list[str]:
    """Write a reply as valkey-cli does when it does not write to a terminal."""
    if isinstance(reply, dict):
        return [line for pair in reply.items() for part in pair for line in _lines(part)]
    if isinstance(reply, list | set | tuple):
        return [line for part in reply for line in _lines(part)]
    if isinstance(reply, bytes):
        return reply.decode(errors="backslashreplace").rstrip().splitlines() or [""]
    return ["" if reply is None else str(reply)]


def test_cache(options: argparse.Namespace) -> int:
    """Check the cache of a running system, or of one that is started for it."""
    from crm.cli.cachecheck import check

    return check(options)


def _number(most: float) -> Callable[[str], float]:
    """Read a number of the command line: above 0, up to the given one."""

    def number(text: str) -> float:
        value = float(text)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {most:g}")
        return value

    return number


def _add_demo_options(command: argparse.ArgumentParser) -> None:
    def number(name: str, default: float | None, most: float, meaning: str) -> None:
        command.add_argument(name, type=_number(most), default=default, metavar="N", help=meaning)

    number("--minutes", None, 10_000, "end after so many minutes (default: at Ctrl-C)")
    number("--rate", 60, 1_000, "requests a second, on average (default: 60)")
    command.add_argument("--seed", type=int, default=1, help="of what chance decides (default: 1)")
    command.add_argument(
        "--no-outage", action="store_true", help="let the cache's server run all the time"
    )
    number("--first-outage", 90, 86_400, "seconds before the first outage (default: 90)")
    number("--outage-every", 180, 86_400, "seconds from one outage to the next (default: 180)")
    number("--outage-seconds", 10, 600, "how long an outage lasts (default: 10)")
    command.add_argument(
        "--json",
        action="store_true",
        help="print the summary as one JSON document; all else to standard error",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m crm",
        description="The CRM backend. Settings come from the environment; see README.md.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Any) -> argparse.ArgumentParser:
        help_text = (function.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=help_text, description=function.__doc__)
        command.set_defaults(run=function)
        return command

    add("run", run)
    add("serve", serve)
    command = add("token", token)
    command.add_argument("--tenant", default="acme", help="slug or UUID (default: acme)")
    command.add_argument(
        "--role", default="admin", choices=["employee", "manager", "admin", "superadmin"]
    )
    command.add_argument(
        "--hours", type=float, default=12.0, help="how long it is valid (default: 12)"
    )
    add("migrate", migrate)
    _add_demo_options(add("demo", demo))
    add("demo-data", demo_data)
    command = add("import", import_files)
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument("--tenant", required=True, help="slug of the tenant")
    command.add_argument(
        "--as",
        dest="kind",
        required=True,
        choices=["accounts", "contacts", "leads", "opportunities"],
    )
    command.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=FIELD",
        help="overrule the guess; COLUMN= drops it",
    )
    command.add_argument("--dry-run", action="store_true", help="check everything, store nothing")
    command.add_argument(
        "--rejects",
        type=Path,
        metavar="FILE",
        help="for rejected rows (default: NAME.rejects.csv here)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command = add("export", export_module)
    command.add_argument("module", choices=MODULE_NAMES)
    command.add_argument("--tenant", required=True, help="slug of the tenant")
    command.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    command = add("valkey", valkey)
    command.add_argument("words", nargs="+", metavar="COMMAND", help="such as: INFO memory")
    command = add("test-cache", test_cache)
    command.add_argument(
        "--url", help="base URL of a running system; without it one is started for the check"
    )
    command.add_argument("--tenant", default="acme")
    command.add_argument("--other-tenant", default="globex")
    command.add_argument(
        "--json", action="store_true", help="print one JSON document instead of tables"
    )
    return parser


class _Server(uvicorn.Server):
    """Ends the dashboard's streams as soon as it is told to stop, as it waits for open answers."""

    before_exit: Callable[[], None]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        self.before_exit()
        super().handle_exit(sig, frame)


def _serve(settings: Settings, port: int) -> None:
    from crm.app import create_app

    level = settings.log_level.upper()
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("asyncio").setLevel("WARNING")
    app = create_app(settings)
    config = uvicorn.Config(
        app, host=settings.host, port=port, loop="uvloop", http="httptools", lifespan="on", log_config=None,
        access_log=settings.log_level == "debug", timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = _Server(config)
    server.before_exit = app.app.state.dashboard.close
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise CommandFailed("the application did not start; the lines above say why")


def _database_url(settings: Settings) -> str:
    """Return the database that is meant: the one named by DATABASE_URL, or that of the system
    running on the data folder."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    url: str = _running(settings)["database_url"]
    return url


def _cache_of_database(settings: Settings) -> str | None:
    """Return the cache that belongs to the database that is meant."""
    if settings.redis_cache_url is not None or settings.database_url is not None:
        return cache_url(settings)
    url: str | None = _running(settings)["cache_url"]
    return url


def _running(settings: Settings) -> dict[str, Any]:
    """Return what the system that runs on the data folder says of itself."""
    try:
        state: dict[str, Any] = json.loads((settings.data_dir / STATE_FILE).read_text())
    except (OSError, ValueError):
        raise CommandFailed(
            f"no system runs on {settings.data_dir}: start one with `make run`, or set "
            f"DATABASE_URL or DATA_DIR"
        ) from None
    return state


def _say_hello(settings: Settings, port: int, said: str, token: str) -> None:
    """Tell what runs where, without passwords, and what to try."""
    from crm.demo.seed import PASSWORD

    base = f"http://localhost:{port}"
    signing_in = f"    sign in: root@crm.example, {PASSWORD}" if token else ""
    url = cache_url(settings)
    cache = "none" if url is None or settings.without_cache else str(ServerURL.parse(url))
    database = (
        settings.database_url.get_secret_value().rpartition("@")[2]
        if settings.database_url
        else "?"
    )
    lines = [
        "",
        f"  CRM         {base}    documentation: {base}/docs",
        f"  data        {settings.data_dir.resolve()}    {said}",
    ]
    lines += [
        f"  dashboard   {base}/cache{signing_in}",
        f"  PostgreSQL  {database}",
        f"  Valkey      {cache}",
        "",
    ]
    if token:
        lines += [
            "  Try it (the second answer says 'hit'):", "", f"  TOKEN={token}",
            f"  curl -si \"{base}/api/accounts?limit=2\" -H \"Authorization: Bearer $TOKEN\" | "
            f"grep -i cache-status",
            f"  curl -si \"{base}/api/accounts?limit=2\" -H \"Authorization: Bearer $TOKEN\" | "
            f"grep -i cache-status",
            f"  curl -s {base}/api/accounts -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: "
            f"application/json' "
            "-d '{\"name\":\"New Ltd\"}'",
            f"  curl -s {base}/api/system/cache-stats -H \"Authorization: Bearer $TOKEN\"", "",
        ]  # fmt: skip
    print("\n".join([*lines, "  Ctrl-C stops it.", ""]), flush=True)


def _say_failure(message: str) -> int:
    print(f"crm: {message}", file=sys.stderr)
    return 1
