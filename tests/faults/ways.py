"""The CRM as the suite's processes serve it: some routes at other levels than strict, and hits
above ASGI or below it.

``python -m tests.faults.ways`` is ``python -m crm serve`` of that, told by the environment. With
``--turbo`` hits are answered by ``respcache.integrations.uvicorn``, with ``--sabotage NAME`` a rule
is missing.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import Request, Response

from crm.app import create_app
from crm.db import ReadRows
from crm.errors import respond
from crm.models import Account
from crm.settings import Settings
from respcache import Cache, Level
from respcache.integrations import uvicorn as turbo
from respcache.middleware import CacheMiddleware
from respcache.routing.fastapi import describe_routes
from respcache.routing.table import Route
from respcache.testing.history import now

from . import sabotage

BOUND_S = 1.0
LEVELS: Mapping[str, Level] = {
    "/api/accounts/{id}": Level.BOUNDED,
    "/api/opportunities": Level.BOUNDED,
}
"""Routes that are not strict, by template."""

VALUE, VALUE_TTL_S = "/api/faults/value", 2.0
"""A route that is not cached and answers with a value of level ttl, and how long that lives."""

MADE_IN = b"x-made-in"
"""The header that says how many seconds a value took to make: it lives from the end of that."""

ABOVE = b"x-above"
"""The header of all answers that have passed ASGI."""

ABOVE_ASGI = (ABOVE, b"1")


class Passing:
    """The outermost layer: marks what passes it, and tells when the answer to a write is about to
    leave."""

    def __init__(self, app: CacheMiddleware, leaves: Callable[[], None] = lambda: None) -> None:
        self.app = app
        self._leaves = leaves

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one connection of the server (ASGI 3.0)."""

        async def mark(message: Any) -> None:
            if message["type"] == "http.response.start":
                if scope["method"] != "GET":
                    self._leaves()
                message = {**message, "headers": [*message["headers"], ABOVE_ASGI]}
            await send(message)

        await self.app(scope, receive, mark if scope["type"] == "http" else send)


def application(settings: Settings) -> CacheMiddleware:
    """Make the CRM with its routes at their levels."""
    made = create_app(settings)
    app: Any = made.app
    app.get(VALUE)(show_value)
    routes = [leveled(route) for route in describe_routes(app, made.cache.resolver)]
    cache: Cache = app.state.cache
    return cache.wrap(app, routes)


def leveled(route: Route) -> Route:
    """Give a route its level."""
    if route.policy is None or "GET" not in route.methods or route.template not in LEVELS:
        return route
    return replace(
        route, policy=replace(route.policy, level=LEVELS[route.template], bound_s=BOUND_S)
    )


async def show_value(request: Request, rows: ReadRows) -> Response:
    """List the accounts of a tenant, from a value of level ttl; whether it was there, and how long
    it took to make."""
    filled = False

    async def make() -> dict[str, Any]:
        nonlocal filled
        filled, began = True, now()
        columns = Account.id, Account.tenant_id, Account.metadata_["v"].as_integer()
        found = await rows.execute(rows.select(Account, *columns))
        accounts = [{"id": str(id), "tenant_id": str(tenant), "v": v} for id, tenant, v in found]
        return {"accounts": accounts, "made_in_s": now() - began}

    tenant, seen = rows.scope.tenant, rows.scope.fingerprint.hex()
    value = await request.app.state.cache.get_or_set(
        tenant,
        "accounts",
        {"seen": seen},
        make,
        tables=["accounts"],
        ttl_s=VALUE_TTL_S,
        level=Level.TTL,
    )
    answer = respond({"accounts": value["accounts"], "limit": 50, "offset": 0})
    answer.headers["cache-status"] = "value; fwd=miss" if filled else "value; hit"
    answer.headers[MADE_IN.decode()] = str(value["made_in_s"])
    return answer


def config(app: Passing, *, port: int, below: bool) -> uvicorn.Config:
    """Configure a server of it; ``below``: hits are answered below ASGI."""
    http: Any = turbo.protocol(app, skips=["Passing", "BodyLimit"]) if below else "httptools"
    return uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http=http,
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.ways")
    parser.add_argument("--turbo", action="store_true")
    parser.add_argument("--sabotage", choices=sorted(sabotage.SABOTAGES))
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.ERROR, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if options.sabotage is not None:
        sabotage.commit(options.sabotage)
    settings = Settings()
    server = uvicorn.Server(
        config(Passing(application(settings)), port=settings.port, below=options.turbo)
    )
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
