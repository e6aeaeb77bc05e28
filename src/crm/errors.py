"""Errors as the API answers them: one envelope, a message that names the field, never the
database's own words."""

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
    """The answer to a request that failed."""

    status: Literal["error"]
    message: str = Field(description="What is wrong, beginning with the field when there is one")
    field: str | None = Field(None, description="The field that is wrong")


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": Problem,
        "description": "The request cannot be served as it is: the message says why",
    },
    503: {
        "model": Problem,
        "description": "The database, or for routes about the cache the cache, is away: try again",
    },
}
"""What every route may answer besides success."""

AWAY = ("08", "57P", "53300")
"""SQLSTATEs of a server that starts, stops, or has no connection left: connection exceptions,
operator interventions."""


class ApiError(Exception):
    """An answer that is an error: status, message, and what else helps the caller."""

    def __init__(self, status: int, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.extra = extra


class ErrorResponse(ApiError, Denied):
    """The caller is unknown (401) or may not do this (403, 404 for what he may not know of, 400 for
    a missing tenant)."""


def not_found(title: str) -> ApiError:
    """Answer for a row that does not exist, is another tenant's, or is invisible: the same in all
    three cases."""
    return ApiError(404, f"{capital(title)} not found")


def capital(words: str) -> str:
    """Begin a sentence."""
    return words[:1].upper() + words[1:]


def respond(data: Any, *, status: int = 200, message: str | None = None) -> Response:
    """Encode a success envelope once."""
    envelope = (
        {"status": "success", "data": data}
        if message is None
        else {"status": "success", "data": data, "message": message}
    )
    # default=str: the driver's UUIDs are a class of its own
    return Response(
        orjson.dumps(envelope, default=str, option=orjson.OPT_UTC_Z),
        status,
        media_type="application/json",
    )


def fail(status: int, message: str, **extra: Any) -> Response:
    """Encode an error envelope."""
    return Response(
        orjson.dumps({"status": "error", "message": message, **extra}, default=str),
        status,
        media_type="application/json",
    )


def install(app: FastAPI) -> None:
    """Answer every kind of failure with the envelope."""

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
        return fail(
            422, f"{first['field']}: {first['problem']}", field=first["field"], details=problems
        )

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
            hint="a referenced record may be gone, or a unique value taken",
        )

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(OSError)
    async def database_away(request: Request, error: Exception) -> Response:
        log.error("the database is away: %s", type(error).__name__)
        return fail(503, "Database unavailable")

    @app.exception_handler(AuditLogUnavailable)
    async def not_trailed(request: Request, error: AuditLogUnavailable) -> Response:
        log.error("nothing was done, as it could not be written down who did it: %s", error)
        return fail(503, "Not done, as it cannot be written down just now who did it: try again")

    @app.exception_handler(DBAPIError)
    async def database_refused(request: Request, error: DBAPIError) -> Response:
        state = str(getattr(error.orig, "sqlstate", None) or "")
        if error.connection_invalidated or state.startswith(AWAY):
            return await database_away(request, error.orig or error)
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
    """Name the field of a validation error as the caller wrote it: without 'body' or 'query' before
    it."""
    return ".".join(str(part) for part in location[1:]) or str(location[0])
