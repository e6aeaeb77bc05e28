"""The address of a server, read from a URL. Its password never shows."""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from respcache.core.errors import ConfigurationError

DEFAULT_PORT = 6379
_FORM = "redis://[user]:[password]@host[:port][/database]"
_HINT = "check host, port and database; percent-encode '/', '#', '?', '@', ':' and '%' in the password"


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
        shown = _without_secrets(url)
        try:
            parts = urlsplit(url)
            port = DEFAULT_PORT if parts.port is None else parts.port
        except ValueError:
            raise ConfigurationError(f"{shown!r} cannot be read: {_HINT}") from None
        if parts.scheme in ("rediss", "unix"):
            raise ConfigurationError(f"{shown!r}: {parts.scheme}:// is not supported yet; use {_FORM}")
        database = parts.path.removeprefix("/") or "0"
        if parts.scheme != "redis" or not parts.hostname or not re.fullmatch(r"[0-9]{1,5}", database) or parts.query:
            raise ConfigurationError(f"{shown!r} must have the form {_FORM}: {_HINT}")
        if parts.username and not parts.password:
            raise ConfigurationError(f"{shown!r} names a user without a password: write {_FORM}")
        user = unquote(parts.username) if parts.username else None
        password = unquote(parts.password) if parts.password else None
        return cls(parts.hostname, port, int(database), user, password)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}/{self.database}"


def _without_secrets(url: str) -> str:
    """Cut out all that could be a password, also one whose special characters are not encoded, and the query."""
    return re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL).partition("?")[0].partition("#")[0]
