"""Login."""

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
    """Credentials of a stored user."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"email": "admin@acme.example", "password": "demo-password"}]
        }
    )

    email: Word = Field(max_length=254, min_length=1)
    password: str = Field(max_length=1000, min_length=1, repr=False)


class LoginLimit:
    """Slows guessing down, in this process: so many attempts for one mail from one address, and
    from one address in all."""

    PER_MAIL = RateLimitItemPerMinute(10, 15)
    PER_ADDRESS = RateLimitItemPerMinute(300, 15)

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def attempt(self, address: str, email: str) -> None:
        """Count an attempt before it is made: many at once count too. Raises 429 that says when to
        come back."""
        self._count(self.PER_ADDRESS, address)
        self._count(self.PER_MAIL, address, email.lower())

    def succeeded(self, address: str, email: str) -> None:
        """Forget the attempts for a mail: its owner is here."""
        self._limiter.clear(self.PER_MAIL, address, email.lower())

    def _count(self, limit: RateLimitItem, *who: str) -> None:
        if not self._limiter.hit(limit, *who):
            wait = max(
                1, round(self._limiter.get_window_stats(limit, *who).reset_time - time.time())
            )
            message = f"Too many attempts to log in: try again in {wait} s"
            raise ApiError(429, message, code="too_many_attempts", retry_after=wait)


@router.post("/login", summary="Log in")
async def login(request: Request, body: Login) -> Response:
    """Exchange mail and password for a token. After ten attempts for a mail within 15 minutes:
    429."""
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


@router.get("/me", summary="Who am I")
async def me(scope: CurrentScope) -> Response:
    """The caller as the API sees them."""
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
