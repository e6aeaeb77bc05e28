"""Access to rows: the one place where tenant and visibility are applied.

Handlers get a ``Rows`` and cannot select, change or delete anything that their caller may not see;
no handler writes a tenant filter of its own. A session ends before the response is sent (its
dependency has function scope), so everything that a response acknowledges is committed.
"""

from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Annotated, Any, TypeVar
from uuid import UUID

from fastapi import Depends, Request
from sqlalchemy import ColumnElement, Delete, Select, Update, delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from crm.auth import CurrentScope, TenantScope, WritingScope
from crm.errors import ApiError, not_found
from crm.models import Base, Employee, Owned, as_uuid

T = TypeVar("T", bound=Owned)


@lru_cache(maxsize=1024)
def criteria(
    model: type[Owned], tenant: str | None, visible_ids: tuple[UUID, ...] | None
) -> tuple[ColumnElement[bool], ...]:
    """Return the WHERE clause of a scope. Cached: building it takes longer than sending it."""
    columns = model.__table__.c  # type: ignore[attr-defined]
    found: list[ColumnElement[bool]] = []
    if tenant is not None:
        found.append(columns.tenant_id == UUID(tenant))
    if visible_ids is not None:
        found.append(or_(columns.assigned_to.is_(None), columns.assigned_to.in_(visible_ids)))
    return tuple(found)


class Rows:
    """The rows that one caller may see, for reading.

    It uses a plain connection, because reading needs no ORM.
    """

    def __init__(self, run: AsyncConnection | AsyncSession, scope: TenantScope) -> None:
        self._run = run
        self.scope = scope

    async def execute(self, statement: Select[Any]) -> Any:
        """Run a statement and return its result."""
        return await self._run.execute(statement)

    async def scalar(self, statement: Select[Any]) -> Any:
        """Run a statement and return the first column of its first row."""
        return await self._run.scalar(statement)

    def visible(self, model: type[Owned]) -> tuple[ColumnElement[bool], ...]:
        """Return the criteria that every statement on this table carries."""
        return criteria(model, self.scope.tenant, self.scope.visible_ids)

    def select(self, model: type[Owned], *columns: Any) -> Select[Any]:
        """Return a SELECT of visible rows: of columns, or (``WritableRows``) of the model."""
        table = model.__table__  # type: ignore[attr-defined]
        return select(*(columns or (model,))).select_from(table).where(*self.visible(model))


class WritableRows(Rows):
    """The rows that one caller may see and change: a session in a transaction."""

    def __init__(self, session: AsyncSession, scope: TenantScope) -> None:
        super().__init__(session, scope)
        self.session = session

    def update(self, model: type[Owned], *, unseen: bool = False) -> Update:
        """Return an UPDATE of visible rows, or with ``unseen`` of all rows of the tenant.

        ``unseen`` is for references: they follow a changed row even in rows that the caller does
        not see.
        """
        scope = (
            (model.tenant_id == UUID(self.scope.tenant or ""),) if unseen else self.visible(model)
        )
        return update(model).where(*scope)

    def delete(self, model: type[Owned]) -> Delete:
        """Return a DELETE of visible rows."""
        return delete(model).where(*self.visible(model))

    async def get(self, model: type[T], key: str | UUID, *, lock: bool = False) -> T:
        """Return a row, with ``lock`` locked until the end of the transaction.

        Raises 404 for unknown, foreign and invisible rows.
        """
        identity = as_uuid(key)
        statement = self.select(model).where(model.id == identity)
        found: T | None = None
        if identity is not None:
            found = await self.session.scalar(
                statement.with_for_update(of=model) if lock else statement
            )
        if found is None:
            raise not_found(model.title)
        return found

    async def find(self, model: type[T], key: UUID, *, field: str) -> T:
        """Return a referenced row. Raises 422 that names the field if it is not visible."""
        found: T | None = await self.session.scalar(self.select(model).where(model.id == key))
        if found is None:
            raise ApiError(422, f"{field}: no such {model.title}", field=field)
        return found

    async def check_employee(self, key: UUID) -> None:
        """Raise 422 unless this is an employee of the tenant."""
        known = select(Employee.id).where(
            Employee.id == key, Employee.tenant_id == UUID(self.scope.tenant or "")
        )
        if await self.session.scalar(known) is None:
            raise ApiError(422, "assigned_to: no such employee", field="assigned_to")

    def add(self, row: Base) -> None:
        """Insert a row into the caller's tenant."""
        assert self.scope.tenant is not None
        row.tenant_id = UUID(self.scope.tenant)  # type: ignore[attr-defined]
        self.session.add(row)


async def reading_rows(request: Request, scope: CurrentScope) -> AsyncIterator[Rows]:
    """Yield rows on a connection of the pool."""
    async with request.app.state.reading.connect() as connection:
        yield Rows(connection, scope)


async def writing_rows(request: Request, scope: WritingScope) -> AsyncIterator[WritableRows]:
    """Yield rows in a transaction: committed when the handler returns, rolled back if it raises."""
    async with request.app.state.sessions.begin() as session:
        yield WritableRows(session, scope)


ReadRows = Annotated[Rows, Depends(reading_rows, scope="function")]
WriteRows = Annotated[WritableRows, Depends(writing_rows, scope="function")]
