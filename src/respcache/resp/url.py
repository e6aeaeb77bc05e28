"""The address of a server, read from a URL. Its password never shows."""

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from respcache.core.errors import ConfigurationError

DEFAULT_PORT = 6379


@dataclass(frozen=True, slots=True)
class ServerURL:
    """Where a server listens and how to log in: ``redis://[user]:[password]@host[:port][/database]``."""

    host: str
    port: int
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> "ServerURL":
        """Read a URL. Raises ``ConfigurationError`` that shows the URL without its password."""
        try:
            parts = urlsplit(url)
            shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            if parts.scheme in ("rediss", "unix"):
                raise ConfigurationError(f"{shown!r}: {parts.scheme}:// is not supported yet; use redis://host:port/0")
            database = parts.path.strip("/") or "0"
            if parts.scheme not in ("redis", "valkey") or not parts.hostname or not database.isdigit() or parts.query:
                raise ConfigurationError(f"{shown!r} must have the form redis://[user]:[password]@host[:port][/database]")
            port = parts.port or DEFAULT_PORT
        except ValueError:
            raise ConfigurationError("the cache URL cannot be read: check its port and brackets") from None
        user = unquote(parts.username) if parts.username else None
        password = unquote(parts.password) if parts.password else None
        return cls(parts.hostname, port, int(database), user, password)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}/{self.database}"
