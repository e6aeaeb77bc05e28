"""A module of the CRM: its table, the filters of its list, its cache policy, its five routes.

To add a module, add a table to ``models.py``, a line to ``caching.py`` and a ``Module`` in
``routes/``. Special routes are ordinary routes beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, create_model
from sqlalchemy import Column, ColumnElement, or_

from crm import crud
from crm.bodies import Body, body_for
from crm.caching import Cached
from crm.db import ReadRows, Rows, WriteRows
from crm.errors import capitalize, respond
from crm.filters import contains, parse_filter, parse_values
from crm.listing import Choice, Filter, Limit, Offset, Search, Sort, get_record, page
from crm.models import Owned

Criteria = Sequence[ColumnElement[bool]]


@dataclass(frozen=True, kw_only=True)
class Module:
    """One kind of record. ``plural`` and ``singular`` are its names in paths and responses.

    ``filters`` and ``excludes`` name columns; ``criteria`` overrides the meaning of a filter. The
    parameter ``search_as`` searches the columns ``searched``. ``stats_by`` adds counts by a column
    to the list. ``deleted`` describes the effect of DELETE on related records.
    """

    model: type[Owned]
    plural: str
    singular: str
    cached: Cached
    required: Sequence[str] = ()
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    filters: Sequence[str] = ()
    excludes: Sequence[str] = ()
    criteria: Mapping[str, Callable[[Rows, str], Criteria]] = field(default_factory=dict)
    searched: Sequence[ColumnElement[Any]] = ()
    search_as: str = "search"
    stats_by: str | None = None
    deleted: str = "It cannot be restored."

    @cached_property
    def new(self) -> type[Body]:
        """The body of a request that creates a record."""
        name = f"New{self.model.__name__}"
        return body_for(self.model, name, required=self.required, choices=self.choices)

    @cached_property
    def change(self) -> type[Body]:
        """The body of a request that updates a record."""
        return body_for(self.model, f"{self.model.__name__}Change", choices=self.choices)

    @cached_property
    def query(self) -> type[BaseModel]:
        """The parameters of the list."""
        names = [*self.filters, *(f"exclude_{name}" for name in self.excludes), "assigned_to"]
        fields: dict[str, Any] = dict.fromkeys(names, (Choice, None))
        if self.searched:
            fields[self.search_as] = (Search, None)
        fields |= {
            "filter": (Filter, None),
            "sort": (Sort, None),
            "limit": (Limit, 50),
            "offset": (Offset, 0),
        }
        made: type[BaseModel] = create_model(f"{self.model.__name__}List", **fields)
        return made

    def where(self, rows: Rows, parameters: BaseModel) -> list[ColumnElement[bool]]:
        """Return the criteria of a list's parameters. Raises 400 that names the field."""
        table = self.model.__table__  # type: ignore[attr-defined]
        columns: Mapping[str, Column[Any]] = table.c
        given = parameters.model_dump(exclude_none=True)
        found: list[ColumnElement[bool]] = []
        for name in (*self.filters, "assigned_to"):
            if name not in given:
                continue
            if special := self.criteria.get(name):
                found += special(rows, given[name])
            else:
                found += parse_values(given[name], columns[name], field=name)
        for name in self.excludes:
            if f"exclude_{name}" in given:
                found.append(columns[name].not_in(given[f"exclude_{name}"].split(",")))
        found += self.matching(given.get(self.search_as))
        return [*found, *parse_filter(given.get("filter"), table)]

    def matching(self, text: str | None) -> list[ColumnElement[bool]]:
        """Return the criteria of a search: a substring of any searched column."""
        return [or_(*(contains(column, text) for column in self.searched))] if text else []

    def router(self) -> APIRouter:
        """Return a router with list and create; add special routes, then call ``add_records``."""
        router = APIRouter(prefix=f"/api/{self.plural}", tags=[self.plural])
        query, new, title = self.query, self.new, capitalize(self.model.title)
        table = self.model.__table__  # type: ignore[attr-defined]
        stats = table.c[self.stats_by] if self.stats_by else None

        async def list_records(
            rows: ReadRows,
            parameters: Annotated[query, Query()],  # type: ignore[valid-type]
        ) -> Response:
            given: Any = parameters
            found = await page(
                rows,
                self.model,
                plural=self.plural,
                where=self.where(rows, given),
                limit=given.limit,
                offset=given.offset,
                sort=given.sort,
                stats_by=stats,
            )
            return respond(found)

        async def create(rows: WriteRows, body: new) -> Response:  # type: ignore[valid-type]
            record = await crud.create(rows, self.model, body)  # type: ignore[arg-type]
            return respond({self.singular: record}, status=201, message=f"{title} created")

        order = "Newest first."
        if self.stats_by:
            order += f" `stats` counts all records that you see by {self.stats_by}."
        required = ", ".join(f"`{name}`" for name in self.required)
        fields = f"Required: {required}. Unknown fields are stored as metadata."
        list_route = router.get("", summary=f"List {self.plural}", description=order)
        list_route(self.cached.list(list_records))
        summary = f"Create {self._a_record}"
        router.post("", status_code=201, summary=summary, description=fields)(create)
        return router

    def add_records(self, router: APIRouter) -> None:
        """Add show, update and delete. Call it after the special routes: ``/{id}`` matches any."""
        change, title = self.change, capitalize(self.model.title)

        async def show(rows: ReadRows, id: str) -> Response:
            return respond({self.singular: await get_record(rows, self.model, id)})

        async def change_record(
            rows: WriteRows,
            id: str,
            body: change,  # type: ignore[valid-type]
        ) -> Response:
            record = await crud.update(rows, self.model, id, body=body)  # type: ignore[arg-type]
            return respond({self.singular: record}, message=f"{title} updated")

        async def delete(rows: WriteRows, id: str) -> Response:
            return respond(await crud.delete(rows, self.model, id), message=f"{title} deleted")

        show_route = router.get(
            "/{id}",
            summary=f"Show {self._a_record}",
            description="404 also for records that you may not see.",
        )
        show_route(self.cached.detail(show))
        change_route = router.put(
            "/{id}",
            summary=f"Change {self._a_record}",
            description="Fields that are left out stay unchanged.",
        )
        change_route(change_record)
        summary = f"Delete {self._a_record}"
        router.delete("/{id}", summary=summary, description=self.deleted)(delete)

    @property
    def _a_record(self) -> str:
        return f"{'an' if self.model.title[0] in 'aeio' else 'a'} {self.model.title}"
