"""The JSON API: the methods of ``ops/admin.py`` over HTTP, for the command line and other programs.

Requests carry a token of the ``AuthBackend`` (``Authorization: Bearer``). Responses are the structs
of ``Admin`` as JSON. Tenants can be given by id or by name. An error is ``{"error": code,
"message": text}``.
"""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from respcache.core.errors import (
    AccessRefused,
    AuditLogUnavailable,
    InvalidOperation,
    NotFound,
    OperationError,
    StoreError,
)
from respcache.ops.access import Access
from respcache.ops.admin import Admin
from respcache.ops.dashboard.auth import Authenticator, TooManyAttempts, Viewer

T = TypeVar("T")
Handler = Callable[["ApiCall"], Awaitable[Any]]

ERRORS: dict[type[Exception], tuple[int, str]] = {
    NotFound: (404, "not-found"),
    AccessRefused: (403, "refused"),
    InvalidOperation: (400, "invalid"),
    AuditLogUnavailable: (503, "audit-log-unavailable"),
    StoreError: (503, "unavailable"),
}
"""Status and error code for each exception of ``Admin``."""

TENANT_MESSAGES: dict[type[Exception], str] = {
    AuditLogUnavailable: "the audit log is unavailable, so nothing was changed",
    StoreError: "the cache server is unavailable",
}
"""Messages for users with access to one tenant, instead of those of servers, which name hosts."""


class Credentials(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request for ``token``."""

    name: str
    password: str


class ExplainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request for ``explain``. ``path`` may include the query."""

    path: str
    method: str = "GET"
    query: str = ""
    headers: dict[str, str] = {}


class KeyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request for ``reveal``."""

    key: str


class PurgeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request for ``purge``: a tenant, one module of it, or one key."""

    tenant: str | None = None
    module: str | None = None
    key: str | None = None
    dry_run: bool = True


class SwitchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request for ``switch``: a tenant, a module, or everything."""

    off: bool
    tenant: str | None = None
    module: str | None = None


class Me(msgspec.Struct):
    """The user of a token, and the names of the tenants within reach, by id."""

    access: Access
    tenants: dict[str, str]


class ApiCall:
    """An authenticated request to the API."""

    def __init__(self, request: Request, viewer: Viewer, body: bytes) -> None:
        self.request = request
        self.viewer = viewer
        self.access = viewer.access
        self._body = body

    def text(self, name: str) -> str | None:
        """Return a query parameter; None if it is empty or missing."""
        return self.request.query_params.get(name) or None

    def tenant(self) -> str | None:
        """Return the id of the tenant in the query."""
        return self.viewer.tenant(self.text("tenant") or "")

    def number(self, name: str) -> dict[str, int]:
        """Return a number of the query as a keyword argument, or no argument if it is missing.

        Raises ``InvalidOperation``.
        """
        return numbers(self.request, name)

    def page(self) -> dict[str, Any]:
        """Return the query's order, offset and limit as keyword arguments."""
        order = self.text("order")
        return {
            **({} if order is None else {"order": order}),
            **self.number("offset"),
            **self.number("limit"),
        }

    def body(self, kind: type[T]) -> T:
        """Return the body. Raises ``InvalidOperation``."""
        try:
            return msgspec.json.decode(self._body or b"{}", type=kind)
        except msgspec.DecodeError as error:
            raise InvalidOperation(f"the body is invalid: {error}") from None


class Api:
    """The methods and their paths below ``api/``."""

    def __init__(self, admin: Admin, authenticator: Authenticator) -> None:
        self._admin = admin
        self._authenticator = authenticator

    def routes(self) -> list[Route]:
        """Return the routes of the API."""
        reads: dict[str, Handler] = {
            "me": self.me,
            "overview": lambda a: self._admin.overview(a.access, **a.number("minutes")),
            "tenants": lambda a: self._admin.tenants(a.access, **a.page()),
            "tenants/{tenant}": lambda a: self._admin.tenant(
                a.access, a.viewer.tenant(a.request.path_params["tenant"]) or ""
            ),
            "modules": lambda a: self._admin.modules(a.access, tenant=a.tenant()),
            "routes": lambda a: self._admin.routes(a.access, tenant=a.tenant()),
            "keys": lambda a: self._admin.keys(
                a.access,
                tenant=a.tenant(),
                module=a.text("module"),
                cursor=a.text("cursor") or "",
                **a.number("limit"),
            ),
            "sample": lambda a: self._admin.sample(
                a.access, tenant=a.tenant(), module=a.text("module")
            ),
            "key": lambda a: self._admin.inspect(a.access, a.text("key") or ""),
            "feed": lambda a: self._admin.feed(
                a.access, after=a.text("after") or "", tenant=a.tenant(), **a.number("limit")
            ),
            "audit-log": lambda a: self._admin.audit_log(
                a.access, tenant=a.tenant(), **a.number("limit"), **a.number("before")
            ),
            "switches": lambda a: self._admin.switches(a.access),
            "configuration": lambda a: self._admin.configuration(a.access),
        }
        actions: dict[str, Handler] = {
            "explain": self.explain,
            "reveal": lambda a: self._admin.reveal(a.access, a.body(KeyRequest).key),
            "purge": self.purge,
            "switch": self.switch,
        }
        return [
            Route("/api/token", self.token, methods=["POST"]),
            *(
                Route(f"/api/{path}", self._endpoint(handler), methods=["GET"])
                for path, handler in reads.items()
            ),
            *(
                Route(f"/api/{path}", self._endpoint(handler), methods=["POST"])
                for path, handler in actions.items()
            ),
        ]

    async def token(self, request: Request) -> Response:
        """Return a token for a name and a password."""
        try:
            given = msgspec.json.decode(await request.body(), type=Credentials)
        except msgspec.DecodeError as error:
            return error_response(400, "invalid", f"the body is invalid: {error}")
        try:
            token = await self._authenticator.sign_in(request, given.name, given.password)
        except TooManyAttempts as error:
            return error_response(
                429,
                "too-many-attempts",
                str(error),
                headers={"retry-after": str(error.retry_after_s)},
            )
        if token is None:
            return error_response(
                401,
                "unauthenticated",
                "Wrong name or password, or this user has no access to the cache",
            )
        return json_response({"token": token})

    async def me(self, call: ApiCall) -> Me:
        """Return the user of the token."""
        return Me(call.access, dict(call.viewer.names))

    async def explain(self, call: ApiCall) -> Any:
        """Explain a request."""
        given = call.body(ExplainRequest)
        return await self._admin.explain(
            call.access,
            method=given.method,
            path=given.path,
            query=given.query,
            headers=given.headers,
        )

    async def purge(self, call: ApiCall) -> Any:
        """Purge, or count entries."""
        given = call.body(PurgeRequest)
        tenant = call.viewer.tenant(given.tenant or "")
        return await self._admin.purge(
            call.access, tenant=tenant, module=given.module, key=given.key, dry_run=given.dry_run
        )

    async def switch(self, call: ApiCall) -> Any:
        """Switch off or on."""
        given = call.body(SwitchRequest)
        tenant = call.viewer.tenant(given.tenant or "")
        return await self._admin.switch(
            call.access, off=given.off, tenant=tenant, module=given.module
        )

    def _endpoint(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            viewer = await self._authenticator.by_bearer(request)
            if viewer is None:
                return error_response(
                    401, "unauthenticated", "A valid token is required: Authorization: Bearer ..."
                )
            try:
                return json_response(await handler(ApiCall(request, viewer, await request.body())))
            except (OperationError, StoreError) as error:
                return error_response(*describe_error(error, viewer.access))

        return respond


def numbers(request: Request, name: str) -> dict[str, int]:
    """Return a number of the query as a keyword argument, or no argument if it is missing.

    Raises ``InvalidOperation``.
    """
    given = request.query_params.get(name)
    if not given:
        return {}
    if not given.isascii() or not given.isdecimal() or len(given) > 15:
        raise InvalidOperation(f"{name} {given[:40]!r} must be a whole number")
    return {name: int(given)}


def describe_error(error: Exception, access: Access) -> tuple[int, str, str]:
    """Return status, error code and message for an exception of ``Admin``."""
    status, code = next(
        (found for kind, found in ERRORS.items() if isinstance(error, kind)), (400, "invalid")
    )
    replaced = {} if access.tenant is None else TENANT_MESSAGES
    message = next((text for kind, text in replaced.items() if isinstance(error, kind)), str(error))
    return status, code, message


def error_response(
    status: int, code: str, message: str, *, headers: dict[str, str] | None = None
) -> Response:
    """Return an error as JSON."""
    headers = {**(headers or {}), **({"www-authenticate": "Bearer"} if status == 401 else {})}
    return json_response({"error": code, "message": message}, status, headers)


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return structs or plain values as JSON."""
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")
