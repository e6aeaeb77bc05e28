"""A server's address, parsed from a URL. Its password is never shown."""

import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from respcache.core.errors import ConfigurationError

DEFAULT_PORT = 6379
_FORMS = {
    "redis": "redis://[user]:[password]@host[:port][/database]",
    "rediss": "rediss://[user]:[password]@host[:port][/database][?ssl_ca_certs=path]",
    "unix": "unix://[user]:[password]@/path/to.sock[?db=database]",
}
_HINT = (
    "check host, port and database; percent-encode '/', '#', '?', '@', ':' and '%' in the password"
)
_PARAMETERS = {
    "redis": (),
    "rediss": ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile"),
    "unix": ("db",),
}
"""The allowed query parameters, named as in redis-py."""


@dataclass(frozen=True, slots=True)
class ServerURL:
    """A server's address and login: ``redis://``, ``rediss://`` (TLS) or ``unix://`` (a socket's
    path).

    Certificates that a URL names are read once, when the URL is parsed.
    """

    host: str
    port: int
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    path: str = ""
    tls: ssl.SSLContext | None = None

    @classmethod
    def parse(cls, url: str) -> "ServerURL":
        """Parse a URL. Raises ``ConfigurationError``, which shows the URL without its password."""
        shown = _without_secrets(url)
        try:
            parts = urlsplit(url)
            port = DEFAULT_PORT if parts.port is None else parts.port
        except ValueError:
            raise ConfigurationError(f"{shown!r} cannot be read: {_HINT}") from None
        form = _FORMS.get(parts.scheme, _FORMS["redis"])
        path = unquote(parts.path) if parts.scheme == "unix" else ""
        if not _names_a_place(parts, path):
            raise ConfigurationError(f"{shown!r} must have the form {form}: {_HINT}")
        options = _options(parts, shown)
        database = options.get("db", "0") if path else parts.path.removeprefix("/") or "0"
        if not re.fullmatch(r"[0-9]{1,5}", database):
            raise ConfigurationError(f"{shown!r} must have the form {form}: {_HINT}")
        if parts.username and not parts.password:
            raise ConfigurationError(f"{shown!r} names a user without a password: write {form}")
        user = unquote(parts.username) if parts.username else None
        password = unquote(parts.password) if parts.password else None
        tls = _tls(options, shown) if parts.scheme == "rediss" else None
        return cls(parts.hostname or "", port, int(database), user, password, path, tls)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}?db={self.database}"
        return f"{self.host}:{self.port}/{self.database}" + (" over TLS" if self.tls else "")


def _names_a_place(parts: SplitResult, path: str) -> bool:
    # a part of a password that is not encoded
    if parts.scheme not in _FORMS or "@" in parts.query or parts.fragment:
        return False
    if parts.scheme == "unix":
        return len(path) > 1 and "\0" not in path and not parts.hostname
    return bool(parts.hostname)


def _options(parts: SplitResult, shown: str) -> dict[str, str]:
    known = _PARAMETERS[parts.scheme]
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    unknown = sorted({name for name, _ in pairs} - set(known))
    if unknown:
        hint = (
            f"known for {parts.scheme}:// are {', '.join(known)}" if known else "redis:// has none"
        )
        raise ConfigurationError(
            f"{shown!r} must have the form {_FORMS[parts.scheme]}; unknown query parameters: "
            f"{', '.join(unknown)} ({hint})"
        )
    options = dict(pairs)
    if len(options) < len(pairs) or not all(options.values()):
        raise ConfigurationError(
            f"{shown!r} cannot be read: each query parameter must have one value"
        )
    return options


def _tls(options: dict[str, str], shown: str) -> ssl.SSLContext:
    """Read the certificates. The server's certificate and name are verified unless
    ``ssl_cert_reqs=none``."""
    required = options.get("ssl_cert_reqs", "required")
    if required not in ("none", "required"):
        raise ConfigurationError(
            f"{shown!r}: ssl_cert_reqs must be 'none' or 'required', not {required!r}"
        )
    certificate, key = options.get("ssl_certfile"), options.get("ssl_keyfile")
    if key and not certificate:
        raise ConfigurationError(f"{shown!r} has ssl_keyfile without ssl_certfile")
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        if certificate:
            # without a password, OpenSSL would prompt for that of an encrypted key, and wait
            context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        files = ", ".join(
            f"{name}={value}" for name, value in options.items() if name != "ssl_cert_reqs"
        )
        raise ConfigurationError(
            f"{shown!r}: the certificates cannot be read ({files}): {error}"
        ) from None
    if required == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _without_secrets(url: str) -> str:
    """Remove everything that could be a password, also with special characters that are not
    encoded, and the query."""
    return (
        re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL)
        .partition("?")[0]
        .partition("#")[0]
    )
