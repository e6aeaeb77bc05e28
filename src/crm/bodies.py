"""Request bodies, generated from the tables: types and lengths are declared in ``models.py`` only.

Unknown keys are metadata: they are merged into the record's ``metadata``, and responses show them
beside the columns.
"""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, create_model, model_validator
from sqlalchemy import Boolean, Column, Date, DateTime, Integer, Numeric, String, Uuid
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crm.models import Base

MAX_DEPTH = 10
MAX_TEXT = 100_000
MAX_ITEMS = 1_000
MAX_INTEGER = 2**63 - 1
MAX_IDS = 500
MAX_BODY = 1024 * 1024
SERVER_FIELDS = ("id", "tenant_id", "created_at", "updated_at")


class BodyLimit:
    """Rejects bodies of more than ``MAX_BODY`` bytes with 413 while they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:
                raise HTTPException(413, f"The body is larger than {MAX_BODY:,} bytes")
            return message

        await self._app(scope, counted, send)


class Body(BaseModel):
    """A JSON object with the columns of a table; other members are metadata."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, body: Any) -> Any:
        if isinstance(body, dict):
            check_storable(body, "body")
            return {key: value for key, value in body.items() if key not in SERVER_FIELDS}
        return body

    def fields(self) -> dict[str, Any]:
        """Return the given columns, by the names of the model's attributes."""
        given = {
            name: getattr(self, name)
            for name in self.model_fields_set
            if name in type(self).model_fields
        }
        extra = self.model_extra or {}
        metadata = given.pop("metadata", None) or {}
        if metadata or extra:
            given["metadata_"] = {**metadata, **extra}
        return given


class Ids(BaseModel):
    """The ids of records."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"ids": ["5f0c0f3e-6f0e-4b7c-9a53-7a3d1f6f2b11"]}]}
    )

    ids: list[UUID] = Field(min_length=1, max_length=MAX_IDS)


def body_for(
    model: type[Base],
    name: str,
    *,
    required: Sequence[str] = (),
    choices: Mapping[str, Sequence[str]] | None = None,
) -> type[Body]:
    """Return the body class of a table.

    ``required`` fields must be present and not blank; ``choices`` list the values of a field.
    """
    fields: dict[str, Any] = {}
    for column in model.__table__.columns:
        if column.name in SERVER_FIELDS:
            continue
        kind = (
            Literal[tuple(choices[column.name])]
            if choices and column.name in choices
            else _type(column, required=column.name in required)
        )
        if column.name in required:
            fields[column.name] = (kind, ...)
        elif column.nullable:
            fields[column.name] = (kind | None, None)  # type: ignore[operator]
        else:
            fields[column.name] = (kind, Field(default=None, validate_default=False))
    made: type[Body] = create_model(name, __base__=Body, **fields)
    return made


def _type(column: Column[Any], *, required: bool) -> Any:
    kind = column.type
    if isinstance(kind, Uuid):
        return UUID
    if isinstance(kind, Boolean):
        return bool
    if isinstance(kind, Integer):
        limits = (0, 100) if column.name in ("score", "probability") else (0, 2**31 - 1)
        return Annotated[int, Field(ge=limits[0], le=limits[1])]
    if isinstance(kind, Numeric):
        most = 10 ** ((kind.precision or 15) - (kind.scale or 2)) - 0.01
        return Annotated[float, Field(ge=-most, le=most)]
    if isinstance(kind, DateTime):
        return Annotated[datetime, AwareDatetime]
    if isinstance(kind, Date):
        return date
    if isinstance(kind, JSONB):
        return dict[str, Any]
    if isinstance(kind, ARRAY):
        return Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=100)]
    longest = kind.length if isinstance(kind, String) and kind.length else MAX_TEXT
    return Annotated[
        str,
        Field(max_length=longest, min_length=1, pattern=r"\S")
        if required
        else Field(max_length=longest),
    ]


def check_storable(value: Any, where: str, depth: int = 0) -> None:
    """Raise ``ValueError`` for what PostgreSQL or a JSON list cannot represent.

    That is NUL, lone surrogates, too deep nesting, and texts and numbers beyond the limits.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        if "\x00" in value or not _encodable(value):
            raise ValueError(f"{where} contains NUL or a lone surrogate")
        if len(value) > MAX_TEXT:
            raise ValueError(f"{where} is longer than {MAX_TEXT:,} characters")
    elif isinstance(value, dict):
        if len(value) > MAX_ITEMS:
            raise ValueError(f"{where} has more than {MAX_ITEMS} keys")
        for key, item in value.items():
            check_storable(key, f"a key of {where}", depth + 1)
            check_storable(item, f"{where}.{key}"[:100], depth + 1)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_storable(item, f"{where}[{number}]", depth + 1)
    elif isinstance(value, float) and (value != value or abs(value) == float("inf")):
        raise ValueError(f"{where} is not a number")
    elif isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise ValueError(
            f"{where} is not between -{MAX_INTEGER} and {MAX_INTEGER}: send larger numbers as text"
        )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
