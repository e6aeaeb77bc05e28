"""The state of the system, and controls of the cache."""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field, SecretStr
from sqlalchemy import text

from crm.auth import WRITE_NEEDS_TENANT, TenantScope, require_admin, require_superadmin
from crm.cache_auth import access_of
from crm.errors import AccessDenied, ApiError, fail, respond
from crm.settings import Settings
from respcache import Cache, StoreError
from respcache.ops.admin import Admin as CacheAdmin
from respcache.resp.connection import visit
from respcache.resp.url import ServerURL

PROBE_S = 1.0

router = APIRouter(prefix="/api", tags=["system"])
Admin = Annotated[TenantScope, Depends(require_admin)]
Superadmin = Annotated[TenantScope, Depends(require_superadmin)]


class Invalidate(BaseModel):
    """The modules to invalidate."""

    modules: list[str] = Field(
        max_length=100, description='Modules; `[]` or `["*"]` means the whole tenant'
    )


class Switch(BaseModel):
    """The kill switch of the cache."""

    enabled: bool


@router.get("/system/status", summary="Check that the process is up")
async def status() -> Response:
    """Always 200. It contacts no server."""
    return respond({"service": "crm", "up": True})


@router.get("/system/health", summary="Check the health of the system")
async def health(request: Request) -> Response:
    """503 without the database. Without the cache the API is only slower, so the status is 200."""
    cache: Cache = request.app.state.cache
    database = await _database_answers(request)
    state = "none" if cache.store is None else "up" if cache.store.available else "down"
    data: dict[str, Any] = {
        "database": "up" if database else "down",
        "cache": state,
        "cache_enabled": cache.enabled,
    }
    if cache.runtime is not None and cache.runtime.relay is not None:
        lease = cache.runtime.relay.to_dict()
        data |= {
            "invalidations_pending": lease["pending_rows"],
            "oldest_pending_s": lease["pending_s"],
            "lease_alive": lease["alive"],
            "lease_age_s": lease["age_s"],
        }
    return respond(data) if database else fail(503, "Database unavailable", data=data)


@router.get("/system/containers-status", summary="Check the servers")
async def containers_status(request: Request, scope: Admin) -> Response:
    """Whether the database, the cache server and the agent memory respond, and how fast."""
    settings: Settings = request.app.state.settings
    cache = None if settings.without_cache else settings.redis_cache_url
    found = await asyncio.gather(
        _database_status(request), _redis_status(cache), _redis_status(settings.redis_url)
    )
    return respond(dict(zip(("database", "redis_cache", "redis_memory"), found, strict=True)))


@router.get("/system/cache-stats", summary="Show statistics of the cache")
async def cache_stats(request: Request, scope: Admin) -> Response:
    """Statistics of this process for your tenant; for a superadmin without a tenant: for all.

    503 if the cache server is unavailable.
    """
    cache: Cache = request.app.state.cache
    if cache.store is None:
        return fail(503, "Cache unavailable")
    try:
        info = await cache.store.info()
    except StoreError:
        return fail(503, "Cache unavailable")
    data: dict[str, Any] = {
        "connected": True,
        "info": info.stats,
        "memory": info.memory,
        "statistics_of": "this process",
        "server_statistics_of": "all processes and tenants; invalidated entries count until "
        "they expire or are evicted",
        "tenant": scope.tenant or "all",
        **cache.stats(scope.tenant),
    }
    if scope.role == "superadmin" and scope.tenant is None:
        data["tenants"] = {
            tenant: cache.stats(tenant)["modules"] for tenant in sorted(cache.counters.tenants())
        }
    return respond(data)


@router.post("/cache/invalidate", tags=["cache"], summary="Invalidate cached responses")
async def invalidate(request: Request, body: Invalidate, scope: Admin) -> Response:
    """Invalidates modules of your tenant, after an entry in the audit log.

    One write to the cache server per module, independent of the number of entries.
    """
    cache: Cache = request.app.state.cache
    admin: CacheAdmin = request.app.state.cache_admin
    access = access_of(scope)
    assert access is not None
    if scope.tenant is None:
        raise AccessDenied(400, WRITE_NEEDS_TENANT, field="tenant_id")
    named: list[str] | list[None] = [None] if body.modules in ([], ["*"]) else body.modules
    known = cache.registry.modules
    unknown = sorted({module for module in named if module is not None} - known)
    if unknown:
        raise ApiError(
            400,
            f"modules: unknown {unknown[0][:50]!r}; known are {', '.join(sorted(known))}",
            field="modules",
        )
    purged = [
        await admin.purge(access, tenant=scope.tenant, module=module)
        for module in dict.fromkeys(named)
    ]
    confirmed = all(purge.confirmed for purge in purged)
    message = (
        "Cache invalidated"
        if confirmed
        else "Cache unavailable: the invalidation is retried until it is confirmed"
    )
    return respond(
        {"tenant_id": scope.tenant, "modules": body.modules or ["*"], "confirmed": confirmed},
        message=message,
    )


@router.post("/cache/switch", tags=["cache"], summary="Switch the cache off or on")
async def switch(request: Request, body: Switch, scope: Superadmin) -> Response:
    """Switches the cache for all processes, after an entry in the audit log.

    Invalidations are still sent while it is off. `propagated` says that the cache server
    stored the switch: all processes follow within a second.
    """
    admin: CacheAdmin = request.app.state.cache_admin
    access = access_of(scope)
    assert access is not None
    switches = await admin.switch(access, off=not body.enabled)
    return respond({"enabled": switches.enabled, "propagated": switches.propagated})


async def _database_status(request: Request) -> dict[str, Any]:
    started = time.perf_counter()
    reachable = await _database_answers(request)
    return {
        "configured": True,
        "reachable": reachable,
        "latency_ms": _since(started) if reachable else None,
    }


async def _redis_status(url: SecretStr | None) -> dict[str, Any]:
    """Open a new connection and send one PING, as a client that starts now would."""
    if url is None:
        return {"configured": False, "reachable": False, "latency_ms": None}
    try:
        async with visit(ServerURL.parse(url.get_secret_value()), deadline_s=PROBE_S) as connection:
            started = time.perf_counter()
            await connection.execute([("PING",)], deadline_s=PROBE_S)
            return {"configured": True, "reachable": True, "latency_ms": _since(started)}
    except StoreError as error:
        return {"configured": True, "reachable": False, "latency_ms": None, "problem": str(error)}


def _since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 2)


async def _database_answers(request: Request) -> bool:
    try:
        async with asyncio.timeout(PROBE_S), request.app.state.reading.connect() as connection:
            return (await connection.scalar(text("SELECT 1"))) == 1
    except Exception:
        return False
