"""The JSON API: the methods of ``ops/admin.py`` over HTTP, for the command line and for programs.

A request bears the gate's token (``Authorization: Bearer``). Answers are the facade's structs as
JSON; a tenant may be called by its id or its name. What was refused is answered ``{"error": word,
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
Answer = Callable[["ApiCall"], Awaitable[Any]]

WORDS: dict[type[Exception], tuple[int, str]] = {
    NotFound: (404, "not-found"),
    AccessRefused: (403, "refused"),
    InvalidOperation: (400, "invalid"),
    AuditLogUnavailable: (503, "not-trailed"),
    StoreError: (503, "unavailable"),
}
"""Status and word of what a method raises."""

UNTOLD: dict[type[Exception], str] = {
    AuditLogUnavailable: "the trail cannot be reached just now, and what cannot be written down is not done",
    StoreError: "the cache's server cannot be asked just now",
}
"""What is said in place of what servers say, which names hosts, to whoever does not reach all
tenants."""


class Credentials(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``token``."""

    name: str
    password: str


class ExplainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``explain``. ``headers``: of the request that is to be explained; ``path`` may
    carry the query."""

    path: str
    method: str = "GET"
    query: str = ""
    headers: dict[str, str] = {}


class KeyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``reveal``."""

    key: str


class PurgeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``purge``: all of a tenant, one module of it, or one key."""

    tenant: str | None = None
    module: str | None = None
    key: str | None = None
    dry_run: bool = True


class SwitchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``switch``: of a tenant, of a module, or of everything."""

    off: bool
    tenant: str | None = None
    module: str | None = None


class Me(msgspec.Struct):
    """Who a token belongs to; ``tenants``: the names of those within reach, by their ids."""

    access: Access
    tenants: dict[str, str]


class ApiCall:
    """A request to the API by somebody who is known."""

    def __init__(self, request: Request, viewer: Viewer, body: bytes) -> None:
        self.request = request
        self.viewer = viewer
        self.access = viewer.access
        self._body = body

    def text(self, name: str) -> str | None:
        """Return a parameter of the query; None where it is empty or missing."""
        return self.request.query_params.get(name) or None

    def tenant(self) -> str | None:
        """Return the id of the tenant in the query."""
        return self.viewer.tenant(self.text("tenant") or "")

    def number(self, name: str) -> dict[str, int]:
        """Return a number of the query as an argument of that name, or none. Raises
        ``InvalidOperation``."""
        return numbers(self.request, name)

    def page(self) -> dict[str, Any]:
        """Return the order and the part of a list that the query asks for, as arguments."""
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
            raise InvalidOperation(f"the body is not as it must be: {error}") from None


class Api:
    """The methods, and where they are found below ``api/``."""

    def __init__(self, admin: Admin, authenticator: Authenticator) -> None:
        self._admin = admin
        self._authenticator = authenticator

    def routes(self) -> list[Route]:
        """Return the routes of the API."""
        reads: dict[str, Answer] = {
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
            "trail": lambda a: self._admin.audit_log(
                a.access, tenant=a.tenant(), **a.number("limit"), **a.number("before")
            ),
            "switches": lambda a: self._admin.switches(a.access),
            "configuration": lambda a: self._admin.configuration(a.access),
        }
        acts: dict[str, Answer] = {
            "explain": self.explain,
            "reveal": lambda a: self._admin.reveal(a.access, a.body(KeyRequest).key),
            "purge": self.purge,
            "switch": self.switch,
        }
        return [
            Route("/api/token", self.token, methods=["POST"]),
            *(
                Route(f"/api/{path}", self._answering(answer), methods=["GET"])
                for path, answer in reads.items()
            ),
            *(
                Route(f"/api/{path}", self._answering(answer), methods=["POST"])
                for path, answer in acts.items()
            ),
        ]

    async def token(self, request: Request) -> Response:
        """Exchange a name and a password for the gate's token."""
        try:
            given = msgspec.json.decode(await request.body(), type=Credentials)
        except msgspec.DecodeError as error:
            return say_no(400, "invalid", f"the body is not as it must be: {error}")
        try:
            token = await self._authenticator.sign_in(request, given.name, given.password)
        except TooManyAttempts as error:
            return say_no(
                429, "too-many-attempts", str(error), {"retry-after": str(error.retry_after_s)}
            )
        if token is None:
            return say_no(
                401,
                "unauthenticated",
                "Wrong name or password, or this person may not look at the cache",
            )
        return answer_json({"token": token})

    async def me(self, asked: ApiCall) -> Me:
        """Say who asks."""
        return Me(asked.access, dict(asked.viewer.names))

    async def explain(self, asked: ApiCall) -> Any:
        """Explain a request."""
        given = asked.body(ExplainRequest)
        return await self._admin.explain(
            asked.access,
            method=given.method,
            path=given.path,
            query=given.query,
            headers=given.headers,
        )

    async def purge(self, asked: ApiCall) -> Any:
        """Purge, or count what would be."""
        given = asked.body(PurgeRequest)
        tenant = asked.viewer.tenant(given.tenant or "")
        return await self._admin.purge(
            asked.access, tenant=tenant, module=given.module, key=given.key, dry_run=given.dry_run
        )

    async def switch(self, asked: ApiCall) -> Any:
        """Switch off or on."""
        given = asked.body(SwitchRequest)
        tenant = asked.viewer.tenant(given.tenant or "")
        return await self._admin.switch(
            asked.access, off=given.off, tenant=tenant, module=given.module
        )

    def _answering(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            viewer = await self._authenticator.by_bearer(request)
            if viewer is None:
                return say_no(
                    401, "unauthenticated", "A valid token is needed: Authorization: Bearer ..."
                )
            try:
                return answer_json(await answer(ApiCall(request, viewer, await request.body())))
            except (OperationError, StoreError) as error:
                return say_no(*refusal(error, viewer.access))

        return respond


def numbers(request: Request, name: str) -> dict[str, int]:
    """Return a number of the query as an argument of that name, or none. Raises
    ``InvalidOperation``."""
    given = request.query_params.get(name)
    if not given:
        return {}
    if not given.isascii() or not given.isdecimal() or len(given) > 15:
        raise InvalidOperation(f"{name} {given[:40]!r} must be a whole number")
    return {name: int(given)}


def refusal(error: Exception, access: Access) -> tuple[int, str, str]:
    """Return status, word and text for what a method raised."""
    status, word = next(
        (found for kind, found in WORDS.items() if isinstance(error, kind)), (400, "invalid")
    )
    untold = {} if access.tenant is None else UNTOLD
    return (
        status,
        word,
        next((text for kind, text in untold.items() if isinstance(error, kind)), str(error)),
    )


def say_no(status: int, word: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """Say no in JSON."""
    headers = {**(headers or {}), **({"www-authenticate": "Bearer"} if status == 401 else {})}
    return answer_json({"error": word, "message": message}, status, headers)


def answer_json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Encode structs and plain values."""
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")
