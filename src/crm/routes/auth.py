"""Login, and the user of a token."""

import time

from fastapi import APIRouter, Request, Response
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field

from crm.auth import CurrentScope, log_in
from crm.errors import ApiError, respond
from crm.listing import Word

router = APIRouter(prefix="/api/auth", tags=["auth"])


class Login(BaseModel):
    """Email and password of a user."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"email": "admin@acme.example", "password": "demo-password"}]
        }
    )

    email: Word = Field(max_length=254, min_length=1)
    password: str = Field(max_length=1000, min_length=1, repr=False)


class LoginLimit:
    """Limits login attempts in this process: per address and email, and per address.

    Limits are 10 and 300 in 15 minutes.
    """

    PER_EMAIL = RateLimitItemPerMinute(10, 15)
    PER_ADDRESS = RateLimitItemPerMinute(300, 15)

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def attempt(self, address: str, email: str) -> None:
        """Count an attempt before it is made, so that concurrent ones count too.

        Raises 429 with the number of seconds to wait.
        """
        self._count(self.PER_ADDRESS, address)
        self._count(self.PER_EMAIL, address, email.lower())

    def succeeded(self, address: str, email: str) -> None:
        """Reset the attempts for an address and email."""
        self._limiter.clear(self.PER_EMAIL, address, email.lower())

    def _count(self, limit: RateLimitItem, *key: str) -> None:
        if not self._limiter.hit(limit, *key):
            reset = self._limiter.get_window_stats(limit, *key).reset_time
            wait = max(1, round(reset - time.time()))
            message = f"Too many attempts to log in: try again in {wait} s"
            raise ApiError(429, message, code="too_many_attempts", retry_after=wait)


@router.post("/login", summary="Log in")
async def login(request: Request, body: Login) -> Response:
    """Exchanges email and password for a token. 429 after ten attempts in 15 minutes."""
    limit: LoginLimit = request.app.state.login_limit
    address = request.client.host if request.client else ""
    limit.attempt(address, body.email)
    user = await log_in(request.app.state.sessions, body.email, body.password)
    limit.succeeded(address, body.email)
    token = request.app.state.resolver.token(user, hours=request.app.state.settings.token_hours)
    data = {
        "access_token": token,
        "token_type": "bearer",
        "user": {"id": user.id, "email": user.email, "role": user.role},
    }
    response = respond(data)
    response.headers["cache-control"] = "no-store"
    return response


@router.get("/me", summary="Show the current user")
async def me(scope: CurrentScope) -> Response:
    """The user and tenant of the token. `sees_employees` is null if all rows are visible."""
    visible = None if scope.visible_ids is None else len(scope.visible_ids)
    return respond(
        {
            "id": scope.user_id,
            "email": scope.email,
            "role": scope.role,
            "tenant_id": scope.tenant,
            "sees_employees": visible,
        }
    )
