"""Authentication: the application's ``AuthBackend``, session cookies, bearer tokens, and tokens
against forged requests.

The session cookie contains the token of the ``AuthBackend``, so a session ends when the backend
rejects the token, and no worker stores sessions. A form contains a digest of that cookie, which
cannot be computed without reading it (OWASP CSRF cheat sheet: signed double submit, bound to the
session); the cookie is also HttpOnly and SameSite=Strict. The sign-in form has a cookie of its own
for that purpose.
"""

import hmac
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from respcache.ops.access import Access

SESSION_COOKIE = "respcache_session"
SIGN_IN_COOKIE = "respcache_sign_in"
THEME_COOKIE = "respcache_theme"
MAX_TOKEN = 4_000
"""Characters; browsers do not store longer cookies."""

NAMES_S = 30.0
"""How long the names of tenants are cached."""

log = logging.getLogger("respcache")

T = TypeVar("T")


class TooManyAttempts(Exception):
    """Raised by an ``AuthBackend`` to refuse signing in for a while."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"Too many sign-in attempts: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class AuthUnavailable(Exception):
    """The ``AuthBackend`` failed, so the request is refused with 503."""


class AuthBackend(Protocol):
    """The application's authentication. Exceptions other than ``TooManyAttempts`` cause a response
    with status 503."""

    async def sign_in(self, name: str, password: str, address: str) -> str | None:
        """Return a token of at most ``MAX_TOKEN`` characters; None if the name or the password is
        wrong, or the user has no access to the cache.

        ``address`` is the client's. Raise ``TooManyAttempts`` to slow down guessing.
        """
        ...

    async def access(self, token: str) -> Access | None:
        """Return the current permissions of a token; None if it is invalid or has expired.

        Called for every request.
        """
        ...

    async def tenant_names(self) -> Mapping[str, str]:
        """Return the names of tenants by id. Tenants without a name are shown by their id.

        Names that could be mistaken for another tenant are ignored.
        """
        ...


@dataclass(frozen=True, slots=True)
class Viewer:
    """A signed-in user. ``names`` are the names of the tenants within reach, by id."""

    access: Access
    token: str = field(repr=False)
    names: Mapping[str, str]

    @property
    def csrf(self) -> str:
        """The CSRF token of every form in this session."""
        return form_token(self.token)

    def name(self, tenant: str) -> str:
        """Return the name of a tenant, or its id if it has none."""
        return self.names.get(tenant, tenant)

    def tenant(self, name_or_id: str) -> str | None:
        """Return the id of the tenant with this name or id; None for an empty text."""
        wanted = name_or_id.strip()
        if not wanted or wanted in self.names:
            return wanted or None
        return next(
            (tenant for tenant, name in self.names.items() if name.lower() == wanted.lower()),
            wanted,
        )


class Authenticator:
    """Authenticates requests by an ``AuthBackend``."""

    def __init__(self, auth: AuthBackend, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._auth = auth
        self._clock = clock
        self._names: Mapping[str, str] = {}
        self._names_until = 0.0

    async def sign_in(self, request: Request, name: str, password: str) -> str | None:
        """Return a token for a name and a password, or None. Raises ``TooManyAttempts``."""
        return await self._await_backend(
            self._auth.sign_in(name, password, request.client.host if request.client else "")
        )

    async def by_cookie(self, request: Request) -> Viewer | None:
        """Return the user of the session cookie."""
        return await self._viewer(request.cookies.get(SESSION_COOKIE, ""))

    async def by_bearer(self, request: Request) -> Viewer | None:
        """Return the user of the bearer token. Ignores cookies, so that other sites' pages cannot
        call the API."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return await self._viewer(token.strip() if scheme.lower() == "bearer" else "")

    async def _viewer(self, token: str) -> Viewer | None:
        if not token or len(token) > MAX_TOKEN:
            return None
        access = await self._await_backend(self._auth.access(token))
        if access is None:
            return None
        names = await self._tenant_names()
        if access.tenant is not None:
            names = {access.tenant: names.get(access.tenant, access.tenant)}
        return Viewer(access, token, names)

    async def _await_backend(self, result: Awaitable[T]) -> T:
        try:
            return await result
        except TooManyAttempts:
            raise
        except Exception as error:
            log.warning(
                "the dashboard's AuthBackend failed: %s", type(error).__name__, exc_info=error
            )
            raise AuthUnavailable("The authentication service is unavailable: try again") from None

    async def _tenant_names(self) -> Mapping[str, str]:
        now = self._clock()
        if now >= self._names_until:
            self._names_until = now + NAMES_S
            try:
                self._names = unambiguous_names(await self._auth.tenant_names())
            except Exception as error:
                log.warning("the names of tenants are unavailable: %s", type(error).__name__)
        return self._names


def unambiguous_names(names: Mapping[str, str]) -> dict[str, str]:
    """Remove names that several tenants have, and names that are the id of another tenant."""
    names = {tenant: name.strip() for tenant, name in names.items()}
    count = Counter(name.lower() for name in names.values())
    ids = {tenant.lower(): tenant for tenant in names}
    return {
        tenant: name
        for tenant, name in names.items()
        if name and count[name.lower()] == 1 and ids.get(name.lower(), tenant) == tenant
    }


def form_token(secret: str) -> str:
    """Return the CSRF token of a form. ``secret`` is the value of a cookie of the dashboard."""
    return blake2b(secret.encode(), digest_size=24, person=b"respcache-form").hexdigest()


def is_form_token(given: str, secret: str) -> bool:
    """Return whether a CSRF token belongs to a cookie."""
    return bool(secret) and hmac.compare_digest(given.encode(), form_token(secret).encode())


def begin_session(response: Response, request: Request, token: str) -> None:
    """Store the token in the browser until that is closed."""
    set_cookie(response, request, name=SESSION_COOKIE, value=token)
    response.delete_cookie(SIGN_IN_COOKIE, path=_path(request))


def end_session(response: Response, request: Request) -> None:
    """Delete the token from the browser."""
    response.delete_cookie(SESSION_COOKIE, path=_path(request))


def sign_in_secret(request: Request) -> str:
    """Return the secret of the sign-in form: that of the browser, or a new one."""
    return request.cookies.get(SIGN_IN_COOKIE) or secrets.token_urlsafe(24)


def keep_sign_in_secret(response: Response, request: Request, secret: str) -> None:
    """Store the secret of the sign-in form in the browser."""
    set_cookie(response, request, name=SIGN_IN_COOKIE, value=secret)


def set_cookie(
    response: Response, request: Request, *, name: str, value: str, max_age: int | None = None
) -> None:
    """Set a cookie that scripts and other sites cannot use."""
    secure = request.url.scheme == "https"
    response.set_cookie(
        name,
        value,
        max_age=max_age,
        path=_path(request),
        httponly=True,
        samesite="strict",
        secure=secure,
    )


def _path(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/") or "/"
