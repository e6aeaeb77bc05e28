"""Which passwords and secrets everybody would try first, and which addresses nobody else
reaches."""

import ipaddress

DEFAULTS = (
    "admin", "changeme", "changeit", "default", "foobared", "guest", "password", "postgres", "redis", "root", "secret", "test",
    "valkey", "123456",
)  # fmt: skip
MARKS = ("changeme", "change-me", "only for trying it out")
"""What secrets of tutorials are made of, this library's own among them."""


def is_default(secret: str | None) -> bool:
    """Whether a password or secret looks as it came with an example."""
    if secret is None:
        return False
    lower = secret.lower()
    return lower in DEFAULTS or any(mark in lower for mark in MARKS)


def is_local(host: str | None) -> bool:
    """Whether only this machine reaches an address: loopback, or a socket's path."""
    if not host or host == "localhost" or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
