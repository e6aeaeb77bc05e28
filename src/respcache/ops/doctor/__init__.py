"""The doctor: looks at both servers, the database and the environment, and says what is wrong and
how to mend it."""

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
    """Check what the environment names. ``tables`` are those that cached reads declare, None where
    nobody said.

    Changes nothing. Raises nothing for what is broken: that is a finding.
    """
    cache, memory, both = DoctorReport("cache"), DoctorReport("memory"), DoctorReport("servers")
    stored, secret = DoctorReport("database"), DoctorReport("environment")
    url = environment.get("REDIS_CACHE_URL") or None
    served = None
    if url == NO_CACHE:
        cache.warn(
            "reachable",
            "REDIS_CACHE_URL=none: there is no cache",
            "every request runs its handler",
            "set REDIS_CACHE_URL",
        )
    else:
        served = servers.examine(
            cache, url, variable="REDIS_CACHE_URL", memory=False, role=DATA_PLANE
        )
    remembered = servers.examine(
        memory, environment.get("REDIS_URL") or None, variable="REDIS_URL", memory=True
    )
    # what is right for the one is wrong for the other
    if servers.compare(both, served, remembered):
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
            cache=served,
        )
    )
    check_secret(secret, environment.get("RESPCACHE_KEY") or None)
    return [
        finding for report in (cache, memory, both, stored, secret) for finding in report.findings
    ]


def check_secret(report: DoctorReport, secret: str | None) -> None:
    """Check the secret that keys the digests."""
    mend = f"export RESPCACHE_KEY=$({RANDOM}), the same in all processes"
    if secret is None:
        why = (
            "the application does not start, or makes one that other hosts do not have: then they "
            "share no answers"
        )
        report.warn("secret", "RESPCACHE_KEY is not set here", why, mend)
    elif len(secret.encode()) < MIN_SECRET_BYTES:
        report.fault(
            "secret",
            f"RESPCACHE_KEY has {len(secret.encode())} bytes",
            "the application does not start",
            mend,
        )
    elif is_default(secret):
        why = "who knows it can tell which key holds whose answer"
        report.fault("secret", "RESPCACHE_KEY is one of an example", why, mend)
    else:
        report.ok(
            "secret", f"RESPCACHE_KEY has {len(secret.encode())} bytes and is not of an example"
        )
