"""Settings of a tenant."""

from typing import Annotated, Any, Literal
from uuid import UUID
from zoneinfo import available_timezones

from fastapi import APIRouter, Depends, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import select

from crm import caching
from crm.auth import DEFAULT_TIMEZONE, require_admin
from crm.bodies import check_storable
from crm.db import ReadRows, WriteRows
from crm.errors import ApiError, respond
from crm.models import VISIBILITY, Tenant, now

router = APIRouter(prefix="/api/settings", tags=["settings"])
DEFAULTS: dict[str, Any] = {"visibility_mode": "shared", "timezone": DEFAULT_TIMEZONE}


def _known_timezone(name: str) -> str:
    if name not in available_timezones():
        raise ValueError("must be a time zone, for example Europe/Berlin")
    return name


class SettingsChange(BaseModel):
    """The settings to change; others stay unchanged. Unknown names are stored."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [{"visibility_mode": "hierarchical", "timezone": "Europe/Berlin"}]
        },
    )

    visibility_mode: Literal[VISIBILITY] | None = Field(  # type: ignore[valid-type]
        None, description="`hierarchical`: employees see only the records of their team"
    )
    timezone: Annotated[str, AfterValidator(_known_timezone)] | None = Field(
        None, description="Decides when a day ends"
    )

    @model_validator(mode="after")
    def _check_more(self) -> "SettingsChange":
        check_storable(self.model_extra or {}, "settings")
        return self


@router.get("", summary="Show settings")
@caching.settings
async def show_settings(rows: ReadRows) -> Response:
    """The settings of your tenant."""
    if rows.scope.tenant is None:
        message = "tenant_id: required, because settings are per tenant"
        raise ApiError(400, message, field="tenant_id")
    given = await rows.scalar(select(Tenant.settings).where(Tenant.id == UUID(rows.scope.tenant)))
    return respond({"settings": {**DEFAULTS, **given}})


@router.put("", summary="Change settings", dependencies=[Depends(require_admin)])
async def change_settings(rows: WriteRows, body: SettingsChange) -> Response:
    """Requires an admin. A change of visibility applies to every user's next request."""
    tenant = await rows.session.get_one(Tenant, UUID(rows.scope.tenant or ""), with_for_update=True)
    given = body.model_dump(exclude_unset=True, exclude_none=True)
    given.pop("tenant_id", None)
    tenant.settings = {**tenant.settings, **given}
    tenant.updated_at = now()
    await rows.session.flush()
    return respond({"settings": {**DEFAULTS, **tenant.settings}}, message="Settings updated")
