"""Access to rows: the one place where tenant and visibility are applied.

Handlers get a ``Rows`` and cannot select, change or delete anything that their caller may not see; none of them writes a
tenant filter of its own. A session ends before the answer is sent (its dependency has function scope), so that what an
answer acknowledges is committed.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any, TypeVar
from uuid import UUID

from fastapi import Depends, Request
from sqlalchemy import ColumnElement, Delete, Select, Update, delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from crm.auth import CurrentScope, TenantScope, WritingScope
from crm.errors import ApiError, not_found
from crm.models import Base, Employee, Owned

T = TypeVar("T", bound=Owned)


class Rows:
    """A session that sees what one caller may see."""

    def __init__(self, session: AsyncSession, scope: TenantScope) -> None:
        self.session = session
        self.scope = scope

    def visible(self, model: type[Owned]) -> list[ColumnElement[bool]]:
        """Return the criteria that every statement on this table carries."""
        criteria: list[ColumnElement[bool]] = []
        columns = model.__table__.c  # type: ignore[attr-defined]
        if self.scope.tenant is not None:
            criteria.append(columns.tenant_id == UUID(self.scope.tenant))
        if self.scope.visible_ids is not None:
            criteria.append(or_(columns.assigned_to.is_(None), columns.assigned_to.in_(self.scope.visible_ids)))
        return criteria

    def select(self, model: type[Owned], *columns: Any) -> Select[Any]:
        """Begin to select from a table."""
        return select(*(columns or (model,))).select_from(model).where(*self.visible(model))

    def update(self, model: type[Owned], *, unseen: bool = False) -> Update:
        """Begin to change many rows of a table; ``unseen`` also those that the caller does not see: what refers to a row that
        he changes must follow, whoever it is assigned to."""
        scope = [model.tenant_id == UUID(self.scope.tenant or "")] if unseen else self.visible(model)
        return update(model).where(*scope)

    def delete(self, model: type[Owned]) -> Delete:
        """Begin to delete many rows of a table."""
        return delete(model).where(*self.visible(model))

    async def get(self, model: type[T], key: str | UUID, *, lock: bool = False) -> T:
        """Return a row, locked until the end of the transaction if asked. Raises 404 for unknown, foreign and invisible ones."""
        identity = as_uuid(key)
        statement = self.select(model).where(model.id == identity)
        found: T | None = None
        if identity is not None:
            found = await self.session.scalar(statement.with_for_update(of=model) if lock else statement)
        if found is None:
            raise not_found(model.title)
        return found

    async def find(self, model: type[T], key: UUID, *, field: str) -> T:
        """Return a referenced row. Raises 422 that names the field where the caller sees none."""
        found: T | None = await self.session.scalar(self.select(model).where(model.id == key))
        if found is None:
            raise ApiError(422, f"{field}: no such {model.title}", field=field)
        return found

    async def check_employee(self, key: UUID) -> None:
        """Demand that rows are assigned to an employee of the tenant. Raises 422."""
        known = select(Employee.id).where(Employee.id == key, Employee.tenant_id == UUID(self.scope.tenant or ""))
        if await self.session.scalar(known) is None:
            raise ApiError(422, "assigned_to: no such employee", field="assigned_to")

    def add(self, row: Base) -> None:
        """Insert a row into the caller's tenant."""
        assert self.scope.tenant is not None
        row.tenant_id = UUID(self.scope.tenant)  # type: ignore[attr-defined]
        self.session.add(row)


def as_uuid(key: str | UUID) -> UUID | None:
    """Read an id, or return None for what cannot be one."""
    try:
        return key if isinstance(key, UUID) else UUID(key)
    except ValueError:
        return None


async def reading_rows(request: Request, scope: CurrentScope) -> AsyncIterator[Rows]:
    """Open a session for reading."""
    async with request.app.state.reading() as session:
        yield Rows(session, scope)


async def writing_rows(request: Request, scope: WritingScope) -> AsyncIterator[Rows]:
    """Open a transaction; it commits when the handler returns and rolls back when it raises."""
    async with request.app.state.sessions.begin() as session:
        yield Rows(session, scope)


ReadRows = Annotated[Rows, Depends(reading_rows, scope="function")]
WriteRows = Annotated[Rows, Depends(writing_rows, scope="function")]
