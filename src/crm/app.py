"""The CRM application: the only module that connects its parts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from starlette.responses import RedirectResponse, Response

from crm import errors
from crm.auth import CrmResolver
from crm.bodies import BodyLimit
from crm.cache_auth import CrmAuthBackend
from crm.caching import SHARED_TABLES, TENANT_IS
from crm.home import home_page
from crm.models import Base
from crm.routes import (
    accounts,
    activities,
    auth,
    bizdevsources,
    contacts,
    documents,
    leads,
    opportunities,
    reports,
    system,
    tasks,
)
from crm.routes import settings as tenant_settings
from crm.settings import Settings, public_settings
from respcache import Cache, ConfigurationError, RedisStore
from respcache.integrations.prometheus import Endpoint
from respcache.middleware import CacheMiddleware
from respcache.ops.admin import Admin
from respcache.ops.dashboard import Dashboard
from respcache.ops.postgres_audit_log import PostgresAuditLog
from respcache.ops.stats.publisher import StatsPublisher
from respcache.resp.url import ServerURL
from respcache.writes.postgres import PostgresOutbox
from respcache.writes.sqlalchemy import Watch, watch

SCHEMA_VERSION = "1"
"""Change it when the shape of a response changes: releases with different versions share no cache
entries."""

DESCRIPTION = """
A multi-tenant CRM with a response cache that never serves stale data.

Log in with `POST /api/auth/login`, or get a development token from `python -m crm token`; then
press *Authorize*. On cached routes, the response header `Cache-Status` says whether it was a hit.
"""


def watched_cache(
    settings: Settings,
    engine: AsyncEngine,
    url: str | None,
    *,
    resolver: CrmResolver | None = None,
    strict_reads: bool = False,
    publisher: StatsPublisher | None = None,
) -> tuple[Cache, Watch]:
    """Return a cache that watches the engine, for the application and for scripts.

    It has no store if ``url`` is None or ``none``.
    """
    settings = settings.with_secrets()
    assert settings.jwt_secret is not None
    assert settings.respcache_key is not None
    cache = Cache(
        None if url is None or url == "none" else RedisStore(url),
        secret=settings.respcache_key.get_secret_value().encode(),
        resolver=resolver or CrmResolver(engine, settings.jwt_secret.get_secret_value()),
        outbox=PostgresOutbox(engine),
        schema_version=SCHEMA_VERSION,
        enabled=settings.respcache_enabled,
        verify_share=settings.respcache_audit_share,
        near_bytes=settings.respcache_near_bytes,
        strict_reads=strict_reads,
        publisher=publisher,
    )
    return cache, watch(
        engine, cache, metadata=Base.metadata, tenant_is=TENANT_IS, shared=SHARED_TABLES
    )


def from_environment() -> CacheMiddleware:
    """Return the application with settings from the environment.

    For ``uvicorn --factory``, ``respcache doctor --app`` and ``respcache bench --app``.
    """
    return create_app(Settings().with_secrets())


def create_app(settings: Settings, *, strict_reads: bool = False) -> CacheMiddleware:
    """Return the application, wrapped in the cache. It connects when its lifespan starts.

    ``strict_reads`` makes a cached read of an undeclared table an error (for tests). Raises
    ``ConfigurationError``.
    """
    if (
        settings.database_url is None
        or settings.jwt_secret is None
        or settings.respcache_key is None
    ):
        raise ConfigurationError(
            "DATABASE_URL, JWT_SECRET and RESPCACHE_KEY are needed: start with `python -m crm run`"
        )
    if settings.redis_url is not None:
        ServerURL.parse(settings.redis_url.get_secret_value())
    engine = create_async_engine(
        settings.database_url.get_secret_value(),
        pool_size=10,
        max_overflow=10,
        pool_timeout=10,
        # PostgreSQL returns 1e300 as 301 digits; orjson reads them as a float, not an integer
        json_deserializer=orjson.loads,
    )
    event.listen(engine.sync_engine, "checkout", _check_connection)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    # reads need no BEGIN and ROLLBACK: each statement sees the newest state
    reading = engine.execution_options(isolation_level="AUTOCOMMIT")
    resolver = CrmResolver(reading, settings.jwt_secret.get_secret_value())
    url = None if settings.redis_cache_url is None else settings.redis_cache_url.get_secret_value()
    publisher = StatsPublisher(None if url == "none" else url)
    cache, watching = watched_cache(
        settings, engine, url, resolver=resolver, strict_reads=strict_reads, publisher=publisher
    )

    audit_log = PostgresAuditLog(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        watching.close()
        await audit_log.close()
        await engine.dispose()

    app = FastAPIOffline(
        title="CRM",
        description=DESCRIPTION,
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        responses=errors.RESPONSES,
    )
    app.state.settings = settings
    app.state.sessions, app.state.reading = sessions, reading
    app.state.resolver = resolver
    app.state.login_limit = auth.LoginLimit()
    errors.install(app)
    app.add_middleware(BodyLimit)
    for routes in (
        auth,
        accounts,
        leads,
        contacts,
        bizdevsources,
        opportunities,
        activities,
        documents,
        tasks,
        reports,
        tenant_settings,
        system,
    ):
        app.include_router(routes.router)
    cache_auth = CrmAuthBackend(
        reading,
        sessions,
        resolver=resolver,
        limit=app.state.login_limit,
        token_hours=settings.token_hours,
    )
    app.add_route("/", home_page(settings), include_in_schema=False)
    app.add_route("/cache", _to_dashboard, include_in_schema=False)
    app.state.cache_admin = Admin(cache, publisher, audit_log, settings=public_settings(settings))
    app.state.dashboard = Dashboard(app.state.cache_admin, cache_auth)
    app.mount("/cache", app.state.dashboard)
    if cache.store is not None:
        token = (
            None if settings.metrics_token is None else settings.metrics_token.get_secret_value()
        )
        metrics = Endpoint(
            publisher, token=token, auth=cache_auth.access, tenants=settings.metrics_tenants
        )
        app.add_route("/metrics", metrics, include_in_schema=False)
    return cache.wrap(app)


async def _to_dashboard(request: Request) -> Response:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/cache/", 308)


def _check_connection(connection: Any, record: Any, proxy: Any) -> None:
    """Make the pool replace a connection that was closed while idle. No round trip."""
    if connection.driver_connection.is_closed():
        raise DisconnectionError
