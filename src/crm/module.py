"""A module of the CRM: its table, how its list is filtered, what is cached. The five ordinary
routes follow from that.

A new module is a table in ``models.py``, a line in ``caching.py`` and a ``Module`` in ``routes/``;
what is special about it stands beside it as ordinary routes.
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
from crm.errors import capital, respond
from crm.filters import contains, parse_filter, parse_values
from crm.listing import Choice, Filter, Limit, Offset, Search, Sort, one, page
from crm.models import Owned

Criteria = Sequence[ColumnElement[bool]]


@dataclass(frozen=True, kw_only=True)
class Module:
    """One kind of record. ``plural`` and ``singular`` are its names in paths and answers.

    ``filters`` and ``excludes`` name columns; ``criteria`` overrides what a filter means;
    ``searched`` are the columns in which ``search_as`` looks; ``stats_by`` adds counts by a column
    to the list. ``deleted`` says what becomes of related records.
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
    deleted: str = "It is gone for good."

    @cached_property
    def new(self) -> type[Body]:
        """The body that creates a record."""
        return body_for(
            self.model, f"New{self.model.__name__}", required=self.required, choices=self.choices
        )

    @cached_property
    def change(self) -> type[Body]:
        """The body that changes a record."""
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

    def where(self, rows: Rows, asked: BaseModel) -> list[ColumnElement[bool]]:
        """Turn the parameters of a list into criteria. Raises 400 that names the field."""
        columns: Mapping[str, Column[Any]] = self.model.__table__.c  # type: ignore[attr-defined]
        given = asked.model_dump(exclude_none=True)
        found: list[ColumnElement[bool]] = []
        for name in (*self.filters, "assigned_to"):
            if name in given:
                special = self.criteria.get(name)
                found += (
                    special(rows, given[name])
                    if special
                    else parse_values(given[name], columns[name], field=name)
                )
        for name in self.excludes:
            if f"exclude_{name}" in given:
                found.append(columns[name].not_in(given[f"exclude_{name}"].split(",")))
        return [
            *found,
            *self.matching(given.get(self.search_as)),
            *parse_filter(given.get("filter"), self.model.__table__),
        ]  # type: ignore[attr-defined]

    def matching(self, text: str | None) -> list[ColumnElement[bool]]:
        """Find records by what people remember of them."""
        return [or_(*(contains(column, text) for column in self.searched))] if text else []

    def router(self) -> APIRouter:
        """Begin the module's router: list and create. Special routes follow, then
        ``add_records``."""
        router = APIRouter(prefix=f"/api/{self.plural}", tags=[self.plural])
        query, new, title = self.query, self.new, capital(self.model.title)
        stats = self.model.__table__.c[self.stats_by] if self.stats_by else None  # type: ignore[attr-defined]

        async def list_records(rows: ReadRows, asked: Annotated[query, Query()]) -> Response:  # type: ignore[valid-type]
            where = self.where(rows, asked)  # type: ignore[arg-type]
            given = {"limit": asked.limit, "offset": asked.offset, "sort": asked.sort}  # type: ignore[attr-defined]
            return respond(
                await page(
                    rows, self.model, plural=self.plural, where=where, stats_by=stats, **given
                )
            )

        async def create(rows: WriteRows, body: new) -> Response:  # type: ignore[valid-type]
            record = await crud.create(rows, self.model, body)  # type: ignore[arg-type]
            return respond({self.singular: record}, status=201, message=f"{title} created")

        counted = f" `stats` counts all that you see by {self.stats_by}." if self.stats_by else ""
        needed = (
            f"Required: {', '.join(f'`{name}`' for name in self.required)}. Unknown fields are "
            f"kept as metadata."
        )
        router.get("", summary=f"List {self.plural}", description=f"Newest first.{counted}")(
            self.cached.list(list_records)
        )
        router.post("", status_code=201, summary=f"Create {self._a_record}", description=needed)(
            create
        )
        return router

    def add_records(self, router: APIRouter) -> None:
        """Add show, change and delete: after the special routes, since ``/{id}`` matches any
        name."""
        change, title = self.change, capital(self.model.title)

        async def show(rows: ReadRows, id: str) -> Response:
            return respond({self.singular: await one(rows, self.model, id)})

        async def change_record(rows: WriteRows, id: str, body: change) -> Response:  # type: ignore[valid-type]
            return respond(
                {self.singular: await crud.change(rows, self.model, id, body)},
                message=f"{title} updated",
            )  # type: ignore[arg-type]

        async def delete(rows: WriteRows, id: str) -> Response:
            return respond(await crud.remove(rows, self.model, id), message=f"{title} deleted")

        router.get(
            "/{id}",
            summary=f"Show {self._a_record}",
            description="404 also for those that you may not see.",
        )(self.cached.detail(show))
        router.put(
            "/{id}", summary=f"Change {self._a_record}", description="Only the given fields change."
        )(change_record)
        router.delete("/{id}", summary=f"Delete {self._a_record}", description=self.deleted)(delete)

    @property
    def _a_record(self) -> str:
        return f"{'an' if self.model.title[0] in 'aeio' else 'a'} {self.model.title}"
