"""Error responses: one envelope, a message that names the field, never the database's own text."""

import logging
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from respcache import Denied
from respcache.core.errors import AuditLogUnavailable

log = logging.getLogger("crm")


class Problem(BaseModel):
    """The response to a request that failed."""

    status: Literal["error"]
    message: str = Field(description="What is wrong; it begins with the field, if there is one")
    field: str | None = Field(None, description="The field that is wrong")


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": Problem,
        "description": "The request is invalid or not allowed; the message says why",
    },
    503: {
        "model": Problem,
        "description": "The database is unavailable (on routes about the cache: the cache "
        "server or the audit log); try again",
    },
}
"""The error responses of every route."""

UNAVAILABLE = ("08", "57P", "53300")
"""SQLSTATEs of a server that starts, stops, or has no free connection: connection exceptions,
operator interventions, too many connections (PostgreSQL, appendix A)."""


class ApiError(Exception):
    """An error response: status, message, and further members of the envelope."""

    def __init__(self, status: int, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.extra = extra


class AccessDenied(ApiError, Denied):
    """The caller is unknown (401) or may not do this.

    403: forbidden. 404: the caller may not know that it exists. 400: no tenant was named.
    """


def not_found(title: str) -> ApiError:
    """Return the 404 for a row that is unknown, another tenant's, or invisible: always the same."""
    return ApiError(404, f"{capitalize(title)} not found")


def capitalize(text: str) -> str:
    """Return the text with its first letter in upper case and the others unchanged."""
    return text[:1].upper() + text[1:]


def respond(data: Any, *, status: int = 200, message: str | None = None) -> Response:
    """Return a success envelope."""
    envelope = {"status": "success", "data": data}
    if message is not None:
        envelope["message"] = message
    # default=str: the driver's UUIDs are of a class of their own
    content = orjson.dumps(envelope, default=str, option=orjson.OPT_UTC_Z)
    return Response(content, status, media_type="application/json")


def fail(status: int, message: str, **extra: Any) -> Response:
    """Return an error envelope."""
    content = orjson.dumps({"status": "error", "message": message, **extra}, default=str)
    return Response(content, status, media_type="application/json")


def install(app: FastAPI) -> None:
    """Turn every kind of exception into an error envelope."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        response = fail(error.status, error.message, **error.extra)
        if error.status == 401:
            response.headers["www-authenticate"] = "Bearer"
        if "retry_after" in error.extra:
            response.headers["retry-after"] = str(error.extra["retry_after"])
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [
            {
                "field": _field(problem["loc"]),
                "problem": problem["msg"].removeprefix("Value error, "),
            }
            for problem in error.errors()
        ]
        if not problems:
            return fail(422, "Invalid request")
        first = problems[0]
        message = f"{first['field']}: {first['problem']}"
        return fail(422, message, field=first["field"], details=problems)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = fail(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(IntegrityError)
    async def conflict(request: Request, error: IntegrityError) -> Response:
        log.info("integrity error on %s %s", request.method, request.url.path)
        return fail(
            409,
            "The change contradicts other data",
            hint="a referenced record may have been deleted, or a unique value is in use",
        )

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(OSError)
    async def database_unavailable(request: Request, error: Exception) -> Response:
        log.error("the database is unavailable: %s", type(error).__name__)
        return fail(503, "Database unavailable")

    @app.exception_handler(AuditLogUnavailable)
    async def audit_log_unavailable(request: Request, error: AuditLogUnavailable) -> Response:
        log.error("the audit log is unavailable, so the action was refused: %s", error)
        return fail(503, "The audit log is unavailable; nothing was changed: try again")

    @app.exception_handler(DBAPIError)
    async def database_error(request: Request, error: DBAPIError) -> Response:
        state = str(getattr(error.orig, "sqlstate", None) or "")
        if error.connection_invalidated or state.startswith(UNAVAILABLE):
            return await database_unavailable(request, error.orig or error)
        log.error(
            "the database refused a statement of %s %s",
            request.method,
            request.url.path,
            exc_info=error,
        )
        return fail(500, "Internal error")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return fail(500, "Internal error")


def _field(location: tuple[Any, ...]) -> str:
    """Return the field of a validation error, without the leading ``body`` or ``query``."""
    return ".".join(str(part) for part in location[1:]) or str(location[0])
