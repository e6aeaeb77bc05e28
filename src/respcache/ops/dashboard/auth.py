"""Who is asking: what the application provides (``AuthBackend``), session cookies, bearer tokens, tokens
against forged requests.

The session cookie carries the gate's own token, so that a session ends when the gate says so and no
worker remembers anything. A form carries a digest of that cookie, which nobody can know who cannot
read it (OWASP CSRF cheat sheet: double submit, bound to the session); the cookie is HttpOnly and
SameSite=Strict besides. The form to sign in has a cookie of its own for that.
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
"""Characters; a browser keeps no longer cookie."""

NAMES_S = 30.0
"""How long the names of tenants are remembered."""

log = logging.getLogger("respcache")

T = TypeVar("T")


class TooManyAttempts(Exception):
    """Raised by a gate: signing in is refused for a while."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"Too many attempts to sign in: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class AuthUnavailable(Exception):
    """The gate failed, so nobody is let in: answered with 503."""


class AuthBackend(Protocol):
    """What the application knows of people. Whatever it raises besides ``TooManyAttempts`` is
    answered with 503."""

    async def sign_in(self, name: str, password: str, address: str) -> str | None:
        """Return a token of at most ``MAX_TOKEN`` characters for who may look at the cache, else
        None.

        ``address`` is the client's, for slowing guessing down: raise ``TooManyAttempts``.
        """
        ...

    async def access(self, token: str) -> Access | None:
        """Return what the holder of a token may do now, or None: it has ended, or the holder may do
        nothing. Asked every time."""
        ...

    async def tenant_names(self) -> Mapping[str, str]:
        """Return what people call the tenants, by their ids; those that are left out, or all, are
        called by their ids.

        So are those whose name could be taken for another tenant.
        """
        ...


@dataclass(frozen=True, slots=True)
class Viewer:
    """Somebody who is signed in. ``names``: of the tenants within reach."""

    access: Access
    token: str = field(repr=False)
    names: Mapping[str, str]

    @property
    def csrf(self) -> str:
        """What every form of this session carries."""
        return form_token(self.token)

    def name(self, tenant: str) -> str:
        """Return what people call a tenant."""
        return self.names.get(tenant, tenant)

    def tenant(self, called: str) -> str | None:
        """Return the id of the tenant that somebody means by an id or a name; None for nothing."""
        wanted = called.strip()
        if not wanted or wanted in self.names:
            return wanted or None
        return next(
            (tenant for tenant, name in self.names.items() if name.lower() == wanted.lower()),
            wanted,
        )


class Authenticator:
    """Lets in whom the gate knows."""

    def __init__(self, auth: AuthBackend, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._auth = auth
        self._clock = clock
        self._names: Mapping[str, str] = {}
        self._names_until = 0.0

    async def sign_in(self, request: Request, name: str, password: str) -> str | None:
        """Return the gate's token for a name and a password. Raises ``TooManyAttempts``."""
        return await self._asked(
            self._auth.sign_in(name, password, request.client.host if request.client else "")
        )

    async def by_cookie(self, request: Request) -> Viewer | None:
        """Return who has the session cookie."""
        return await self._viewer(request.cookies.get(SESSION_COOKIE, ""))

    async def by_bearer(self, request: Request) -> Viewer | None:
        """Return whose token the request bears. Cookies do not count: so no page of others can use
        the API."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return await self._viewer(token.strip() if scheme.lower() == "bearer" else "")

    async def _viewer(self, token: str) -> Viewer | None:
        if not token or len(token) > MAX_TOKEN:
            return None
        access = await self._asked(self._auth.access(token))
        if access is None:
            return None
        names = await self._tenant_names()
        if access.tenant is not None:
            names = {access.tenant: names.get(access.tenant, access.tenant)}
        return Viewer(access, token, names)

    async def _asked(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except TooManyAttempts:
            raise
        except Exception as error:
            log.warning("the dashboard's gate failed: %s", type(error).__name__, exc_info=error)
            raise AuthUnavailable("Who is asking cannot be told just now: try again") from None

    async def _tenant_names(self) -> Mapping[str, str]:
        now = self._clock()
        if now >= self._names_until:
            self._names_until = now + NAMES_S
            try:
                self._names = unmistakable(await self._auth.tenant_names())
            except Exception as error:
                log.warning("the names of tenants cannot be had: %s", type(error).__name__)
        return self._names


def unmistakable(names: Mapping[str, str]) -> dict[str, str]:
    """Leave out the names by which somebody could mean another tenant: those of several, and the
    ids of others."""
    names = {tenant: name.strip() for tenant, name in names.items()}
    called = Counter(name.lower() for name in names.values())
    ids = {tenant.lower(): tenant for tenant in names}
    return {
        tenant: name
        for tenant, name in names.items()
        if name and called[name.lower()] == 1 and ids.get(name.lower(), tenant) == tenant
    }


def form_token(secret: str) -> str:
    """Return what a form carries to show that it was sent by a page of ours. ``secret``: of a
    cookie that only we can read."""
    return blake2b(secret.encode(), digest_size=24, person=b"respcache-form").hexdigest()


def is_ours(given: str, secret: str) -> bool:
    """Whether a form carries the token that belongs to a cookie."""
    return bool(secret) and hmac.compare_digest(given.encode(), form_token(secret).encode())


def begin_session(response: Response, request: Request, token: str) -> None:
    """Give the browser the gate's token, until it is closed."""
    remember(response, request, SESSION_COOKIE, token)
    response.delete_cookie(SIGN_IN_COOKIE, path=_path(request))


def end_session(response: Response, request: Request) -> None:
    """Take the token back."""
    response.delete_cookie(SESSION_COOKIE, path=_path(request))


def sign_in_secret(request: Request) -> str:
    """Return the secret of the form to sign in: the browser's, or a new one."""
    return request.cookies.get(SIGN_IN_COOKIE) or secrets.token_urlsafe(24)


def keep_sign_in_secret(response: Response, request: Request, secret: str) -> None:
    """Have the browser keep it."""
    remember(response, request, SIGN_IN_COOKIE, secret)


def remember(
    response: Response, request: Request, name: str, value: str, *, max_age: int | None = None
) -> None:
    """Set a cookie of ours, which no script and no page of others can use."""
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
