"""The commands that serve the API (``run``, ``serve``), and ``token``."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from crm.app import create_app
from crm.auth import development_token
from crm.cli.launch import Launched, launched, port_to_serve
from crm.cli.running import CommandFailed, cache_url, database_url
from crm.demo.seed import PASSWORD
from crm.settings import Settings
from respcache.resp.url import ServerURL

STOP_S = 5
"""Seconds that open requests get to finish when the server stops."""


def run() -> None:
    """Start the servers that are missing, then serve until Ctrl-C; stop what was started."""
    settings = Settings().with_secrets()
    port = port_to_serve(settings)
    with launched(settings, port) as system:
        token = ""
        if settings.environment == "development":
            with contextlib.suppress(LookupError):
                token = _token(system.settings, system.database_url)
        print(_greeting(system, port, token), flush=True)
        _serve(system.settings, port)


def serve() -> None:
    """Serve with the servers of DATABASE_URL and REDIS_CACHE_URL; start none."""
    settings = Settings().with_secrets()
    if settings.database_url is None or settings.redis_cache_url is None:
        raise CommandFailed(
            "serve starts no servers: set DATABASE_URL and REDIS_CACHE_URL (or 'none'), or use "
            "`python -m crm run`"
        )
    _serve(settings, port_to_serve(settings))


def print_token(*, tenant: str, role: str, hours: float) -> None:
    """Print a development token. Raises ``CommandFailed`` in production."""
    settings = Settings()
    if settings.environment == "production":
        raise CommandFailed(
            "development tokens are not issued in production: log in with POST /api/auth/login"
        )
    settings = settings.with_secrets()
    print(_token(settings, database_url(settings), tenant=tenant, role=role, hours=hours))


def _token(
    settings: Settings, url: str, *, tenant: str = "acme", role: str = "admin", hours: float = 12
) -> str:
    assert settings.jwt_secret is not None
    secret = settings.jwt_secret.get_secret_value()
    return asyncio.run(development_token(url, secret, tenant=tenant, role=role, hours=hours))


class _Server(uvicorn.Server):
    """Closes the dashboard's streams before it waits for open responses: they never end."""

    before_exit: Callable[[], None]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        self.before_exit()
        super().handle_exit(sig, frame)


def _serve(settings: Settings, port: int) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("asyncio").setLevel("WARNING")
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        log_config=None,
        access_log=settings.log_level == "debug",
        timeout_graceful_shutdown=STOP_S,
    )
    server = _Server(config)
    server.before_exit = app.app.state.dashboard.close
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise CommandFailed("the application did not start; the lines above say why")


def _greeting(system: Launched, port: int, token: str) -> str:
    """Return what runs where, without passwords, and commands to try."""
    base = f"http://localhost:{port}"
    settings, url = system.settings, cache_url(system.settings)
    sign_in = f"    sign in: root@crm.example, {PASSWORD}" if token else ""
    lines = [
        "",
        f"  CRM         {base}/    start here: links and accounts",
        f"  API         {base}/docs",
        f"  dashboard   {base}/cache{sign_in}",
        f"  data        {settings.data_dir.resolve()}    {system.data}",
        f"  PostgreSQL  {system.database_url.rpartition('@')[2]}",
        f"  Valkey      {'none' if url in (None, 'none') else ServerURL.parse(url)}",
        "",
    ]
    if token:
        header = '-H "Authorization: Bearer $TOKEN"'
        listed = f'  curl -si "{base}/api/accounts?limit=2" {header} | grep -i cache-status'
        lines += [
            "  Try it (the second response is a hit):",
            "",
            f"  TOKEN={token}",
            listed,
            listed,
            f"  curl -s {base}/api/accounts {header} -H 'Content-Type: application/json' "
            '-d \'{"name":"New Ltd"}\'',
            f"  curl -s {base}/api/system/cache-stats {header}",
            "",
        ]
    return "\n".join([*lines, "  Ctrl-C stops it.", ""])
