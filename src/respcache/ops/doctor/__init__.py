"""``respcache doctor``: checks both servers, the database and the environment, and reports problems
with their fixes."""

import asyncio
from collections.abc import Collection, Mapping

from respcache.core.keys import MIN_SECRET_BYTES
from respcache.ops.acl import DATA_PLANE
from respcache.ops.doctor import database, servers
from respcache.ops.doctor.findings import DoctorReport, Finding, Severity
from respcache.ops.doctor.secrets import is_default

__all__ = ["DoctorReport", "Finding", "Severity", "diagnose"]

NO_CACHE = "none"
RANDOM = "python -c 'import secrets; print(secrets.token_hex(32))'"


def diagnose(
    environment: Mapping[str, str], *, schema: str = "public", tables: Collection[str] | None = None
) -> list[Finding]:
    """Check what the environment names. Changes nothing; problems are findings, not exceptions.

    ``tables`` are those that cached reads declare; None if unknown.
    """
    cache, memory, both = DoctorReport("cache"), DoctorReport("memory"), DoctorReport("servers")
    stored, secret = DoctorReport("database"), DoctorReport("environment")
    url = environment.get("REDIS_CACHE_URL") or None
    cache_server = None
    if url == NO_CACHE:
        cache.warn(
            "reachable",
            "REDIS_CACHE_URL=none: there is no cache",
            why="every request runs its handler",
            fix="set REDIS_CACHE_URL",
        )
    else:
        cache_server = servers.examine(
            cache, url, variable="REDIS_CACHE_URL", memory=False, role=DATA_PLANE
        )
    memory_server = servers.examine(
        memory, environment.get("REDIS_URL") or None, variable="REDIS_URL", memory=True
    )
    # if both are one server, a fix for one of these checks would break the other server
    if servers.compare(both, cache_server, memory_server):
        memory.findings = [
            finding
            for finding in memory.findings
            if finding.check not in ("eviction", "maxmemory", "persistence")
        ]
    asyncio.run(
        database.examine(
            stored,
            environment.get("DATABASE_URL") or None,
            schema=schema,
            tables=tables,
            cache=cache_server,
        )
    )
    check_secret(secret, environment.get("RESPCACHE_KEY") or None)
    return [
        finding for report in (cache, memory, both, stored, secret) for finding in report.findings
    ]


def check_secret(report: DoctorReport, secret: str | None) -> None:
    """Check the secret that keys the digests."""
    fix = f"export RESPCACHE_KEY=$({RANDOM}), the same in all processes"
    if secret is None:
        report.warn(
            "secret",
            "RESPCACHE_KEY is not set here",
            why="the application does not start, or generates a secret that other hosts do not "
            "have, so that they share no responses",
            fix=fix,
        )
    elif len(secret.encode()) < MIN_SECRET_BYTES:
        report.fault(
            "secret",
            f"RESPCACHE_KEY has {len(secret.encode())} bytes",
            why="the application does not start",
            fix=fix,
        )
    elif is_default(secret):
        report.fault(
            "secret",
            "RESPCACHE_KEY comes from an example",
            why="anyone who knows it can find out whose response a key holds",
            fix=fix,
        )
    else:
        report.ok(
            "secret",
            f"RESPCACHE_KEY has {len(secret.encode())} bytes and does not come from an example",
        )
