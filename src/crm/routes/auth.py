"""Login."""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from crm.auth import CurrentScope, log_in
from crm.errors import respond
from crm.listing import Word

router = APIRouter(prefix="/api/auth", tags=["auth"])


class Login(BaseModel):
    """Credentials of a stored user."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"email": "admin@acme.example", "password": "demo-password"}]})

    email: Word = Field(max_length=254, min_length=1)
    password: str = Field(max_length=1000, min_length=1, repr=False)


@router.post("/login", summary="Log in")
async def login(request: Request, body: Login) -> Response:
    """Exchange mail and password for a token."""
    user = await log_in(request.app.state.sessions, body.email, body.password)
    token = request.app.state.resolver.token(user, hours=request.app.state.settings.token_hours)
    data = {"access_token": token, "token_type": "bearer", "user": {"id": user.id, "email": user.email, "role": user.role}}
    response = respond(data)
    response.headers["cache-control"] = "no-store"
    return response


@router.get("/me", summary="Who am I")
async def me(scope: CurrentScope) -> Response:
    """The caller as the API sees them."""
    visible = None if scope.visible_ids is None else len(scope.visible_ids)
    return respond(
        {"id": scope.user_id, "email": scope.email, "role": scope.role, "tenant_id": scope.tenant, "sees_employees": visible}
    )
