"""Recognizes default passwords and secrets, and addresses that only this machine can reach."""

import ipaddress

DEFAULTS = frozenset(
    (
        *("admin", "changeme", "changeit", "default", "foobared", "guest", "password", "postgres"),
        *("redis", "root", "secret", "test", "valkey", "123456"),
    )
)
MARKS = ("changeme", "change-me", "only for trying it out")
"""Parts of the secrets in tutorials, including those of this library."""


def is_default(secret: str | None) -> bool:
    """Return whether a password or secret looks like one from an example."""
    if secret is None:
        return False
    lower = secret.lower()
    return lower in DEFAULTS or any(mark in lower for mark in MARKS)


def is_local(host: str | None) -> bool:
    """Return whether only this machine can reach an address: loopback, or the path of a socket."""
    if not host or host == "localhost" or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
