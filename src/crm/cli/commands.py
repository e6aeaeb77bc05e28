"""The arguments of ``python -m crm``, and its errors, one line each.

A command imports its modules when it runs: ``--help`` and wrong arguments then cost no start-up.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from crm.cli.running import CommandFailed, database_cache_url, database_url
from crm.settings import Settings
from respcache.core.errors import ConfigurationError, StoreError
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


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 if it failed, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc'])).upper() or 'environment'}: {p['msg']}"
            for p in error.errors()
        )
        return _print_failure(problems)
    except KeyboardInterrupt:
        return _print_failure("stopped")
    except (
        CommandFailed,
        ConfigurationError,
        ServerFailed,
        StoreError,
        LookupError,
        ValueError,
    ) as error:
        return _print_failure(str(error.args[0] if error.args else error))
    except (DBAPIError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            return _print_failure(f"{error.filename}: {error.strerror}")
        cause = getattr(error, "orig", None) or error
        return _print_failure(
            f"{type(cause).__name__}: {cause}. Check DATABASE_URL (host, port, user, password)"
        )


def run(options: argparse.Namespace) -> None:
    """Start the missing servers and serve until Ctrl-C; stop what was started."""
    from crm.cli import serving

    serving.run()


def serve(options: argparse.Namespace) -> None:
    """Serve with the servers of DATABASE_URL and REDIS_CACHE_URL; start none."""
    from crm.cli import serving

    serving.serve()


def token(options: argparse.Namespace) -> None:
    """Print a development token."""
    from crm.cli import serving

    serving.print_token(tenant=options.tenant, role=options.role, hours=options.hours)


def migrate(options: argparse.Namespace) -> None:
    """Bring the database to the newest schema."""
    from crm.migrations import upgrade

    upgrade(database_url(Settings()))
    print("the database has the newest schema")


def demo(options: argparse.Namespace) -> int:
    """Run everything with simulated traffic and outages of the cache server, until Ctrl-C."""
    from crm.demo.run import run_demo

    return run_demo(options)


def demo_data(options: argparse.Namespace) -> None:
    """Insert the demo data into an empty database."""
    from crm.demo.seed import seed_if_empty

    print(asyncio.run(seed_if_empty(database_url(Settings()))))


def import_files(options: argparse.Namespace) -> int:
    """Import CSV files into a module of a tenant."""
    from crm.cli.transfer import import_files

    settings = Settings()
    urls = {"database_url": database_url(settings), "cache_url": database_cache_url(settings)}
    return asyncio.run(import_files(settings, options, **urls))


def export_module(options: argparse.Namespace) -> int:
    """Export all records of a module of a tenant as CSV."""
    from crm.cli.transfer import export_module

    return asyncio.run(export_module(database_url(Settings()), options))


def valkey(options: argparse.Namespace) -> None:
    """Send one command to the cache server of the running system; no password is needed."""
    from crm.cli.valkey import send_command

    send_command(options.words)


def test_cache(options: argparse.Namespace) -> int:
    """Check the cache of a running system, or of one started for the check."""
    from crm.cli.cachecheck import check

    return check(options)


def _number(most: float) -> Callable[[str], float]:
    """Return a converter for numbers above 0 and at most ``most``."""

    def number(text: str) -> float:
        value = float(text)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {most:g}")
        return value

    return number


def _add_demo_options(command: argparse.ArgumentParser) -> None:
    def number(name: str, default: float | None, *, most: float, meaning: str) -> None:
        command.add_argument(name, type=_number(most), default=default, metavar="N", help=meaning)

    number("--minutes", None, most=10_000, meaning="stop after N minutes (default: at Ctrl-C)")
    number("--rate", 60, most=1_000, meaning="requests per second, on average (default: 60)")
    command.add_argument(
        "--seed", type=int, default=1, help="seed of all random choices (default: 1)"
    )
    command.add_argument(
        "--no-outage", action="store_true", help="never stop or freeze the cache server"
    )
    number("--first-outage", 90, most=86_400, meaning="seconds before the first one (default: 90)")
    number("--outage-every", 180, most=86_400, meaning="seconds between outages (default: 180)")
    number("--outage-seconds", 10, most=600, meaning="length of an outage (default: 10)")
    command.add_argument(
        "--json",
        action="store_true",
        help="print the summary as one JSON document, everything else to standard error",
    )


def _add_import_options(command: argparse.ArgumentParser) -> None:
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
        help="override the guessed field of a column; COLUMN= drops the column",
    )
    command.add_argument("--dry-run", action="store_true", help="check everything, store nothing")
    command.add_argument(
        "--rejects",
        type=Path,
        metavar="FILE",
        help="file for rejected rows (default: NAME.rejects.csv in this folder)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON document")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m crm",
        description="The CRM backend. Settings come from the environment; see docs/reference.md.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
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
        "--hours", type=float, default=12.0, help="hours until it expires (default: 12)"
    )
    add("migrate", migrate)
    _add_demo_options(add("demo", demo))
    add("demo-data", demo_data)
    _add_import_options(add("import", import_files))
    command = add("export", export_module)
    command.add_argument("module", choices=MODULE_NAMES)
    command.add_argument("--tenant", required=True, help="slug of the tenant")
    command.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    command = add("valkey", valkey)
    command.add_argument("words", nargs="+", metavar="COMMAND", help="for example: INFO memory")
    command = add("test-cache", test_cache)
    command.add_argument(
        "--url", help="base URL of a running system (default: start one for the check)"
    )
    command.add_argument("--tenant", default="acme")
    command.add_argument("--other-tenant", default="globex")
    command.add_argument(
        "--json", action="store_true", help="print one JSON document instead of tables"
    )
    return parser


def _print_failure(message: str) -> int:
    print(f"crm: {message}", file=sys.stderr)
    return 1
