"""Importing CSV files: what ``python -m crm import`` does.

Rows are checked by the same bodies as requests. A row's id follows from its tenant and from what
names it (an id column, else its name or mail), so repeating an import changes nothing. Each batch
is one transaction, sent as one statement; the watched engine tells the cache.
"""

import csv
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import orjson
from pydantic import ValidationError
from sqlalchemy import Date, Integer, Numeric, Update, func, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncEngine

from crm.bodies import SERVER_FIELDS
from crm.csv_files import (
    REJECTED,
    STAGES,
    CsvFile,
    date_format,
    guess_mapping,
    identity_column,
    plain,
    read_date,
    read_number,
)
from crm.models import Account, Activity, Contact, Employee, Lead, Owned, Person, Tenant
from crm.module import Module
from crm.routes.accounts import accounts
from crm.routes.contacts import contacts
from crm.routes.leads import leads
from crm.routes.opportunities import opportunities

MODULES: dict[str, Module] = {
    "accounts": accounts,
    "contacts": contacts,
    "leads": leads,
    "opportunities": opportunities,
}
NAMESPACE = UUID("0f3e5c52-3f0e-4f43-9d0e-8f6f0a9f1a77")
BATCH = 500
PSEUDO: dict[str, tuple[str, ...]] = {
    "accounts": (),
    "contacts": ("account", "full_name"),
    "leads": ("account", "full_name"),
    "opportunities": ("account",),
}
"""Fields that are no columns: the name of an account, and first and last name in one."""
NATURAL = {
    "accounts": (("name",),),
    "contacts": (("email",), ("first_name", "last_name", "phone")),
    "leads": (("email",), ("first_name", "last_name", "phone", "company")),
    "opportunities": (("name", "account", "close_date", "amount"),),
}
"""What names a row where no column does: the first of these whose fields are given."""


class WrongMapping(ValueError):
    """``--map`` names a column or a field that does not exist."""


@dataclass
class ImportResult:
    """What became of the rows of a file."""

    read: int = 0
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    rejected: int = 0
    unlinked: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ExistingRecords:
    """The records of the tenant that rows refer to by name, in lower case without needless
    blanks."""

    tenant: UUID
    accounts: Mapping[str, UUID]
    employees: Mapping[str, UUID]
    ids: Mapping[str, frozenset[UUID]]
    """Of each field that refers to a record: what it may refer to."""


@dataclass(frozen=True)
class ImportPlan:
    """How a file becomes rows of a table."""

    file: CsvFile
    kind: str
    mapping: Mapping[str, str]
    identity: str | None

    @classmethod
    def make(cls, file: CsvFile, kind: str, given: Mapping[str, str]) -> "ImportPlan":
        """Guess the mapping, and overrule it by what was given (an empty field drops a column).
        Raises ``WrongMapping``."""
        fields = [*_columns(kind), *PSEUDO[kind]]
        for column, name in given.items():
            if column not in file.columns:
                raise WrongMapping(
                    f"{file.path}: there is no column {column!r}; its columns are "
                    f"{', '.join(file.columns)}"
                )
            if name and name not in (*fields, "id"):
                raise WrongMapping(
                    f"{kind} have no field {name!r}; known are {', '.join(sorted(fields))}"
                )
        guessed = guess_mapping(
            [column for column in file.columns if column not in given], kind, fields
        )
        taken = set(given.values())
        mapping = {column: name for column, name in guessed.items() if name not in taken} | dict(
            given
        )
        mapping = {column: mapping[column] for column in file.columns if column in mapping}
        if not any(mapping.values()):
            raise WrongMapping(
                f"{file.path}: no column is known as a field of {kind}: say --map COLUMN=FIELD; "
                f"its columns are "
                f"{', '.join(file.columns)}; fields are {', '.join(sorted(fields))}"
            )
        named = [column for column, name in mapping.items() if name == "id"]
        return cls(
            file, kind, mapping, named[0] if named else identity_column(file.columns, mapping)
        )

    @cached_property
    def dates(self) -> dict[str, str | None]:
        """The format of each column that holds dates."""
        columns = _columns(self.kind)
        places = {
            name: self.file.columns.index(column)
            for column, name in self.mapping.items()
            if name in columns and isinstance(columns[name].type, Date)
        }
        if not places:
            return {}
        cells = [row for _, row in self.file.rows()]
        return {
            name: date_format([row[place] for row in cells if place < len(row)])
            for name, place in places.items()
        }

    def records(
        self,
        known: ExistingRecords,
        outcome: ImportResult,
        reject: Callable[[int, Sequence[str], str], None],
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows to store; reject what does not fit."""
        seen: dict[UUID, int] = {}
        for line, cells in self.file.rows():
            outcome.read += 1
            try:
                record = self._record(cells, known, outcome)
                first = seen.setdefault(record["id"], line)
                if first != line:
                    raise ValueError(f"the same record as in line {first}")
            except (ValueError, ValidationError) as error:
                outcome.rejected += 1
                reason = _reason(error)
                outcome.reasons[reason.partition(":")[0]] += 1
                reject(line, cells, reason)
            else:
                yield record

    def _record(
        self, cells: Sequence[str], known: ExistingRecords, outcome: ImportResult
    ) -> dict[str, Any]:
        if len(cells) > len(self.file.columns):
            raise ValueError(f"{len(cells)} cells in a file of {len(self.file.columns)} columns")
        given = {
            column: cell.strip()
            for column, cell in zip(self.file.columns, cells, strict=False)
            if cell.strip()
        }
        named = given.get(self.identity) if self.identity else None
        own = UUID(named) if named and _is_uuid(named) and UUID(named) in known.ids["id"] else None
        if own and self.identity:
            del given[self.identity]
        values, metadata = self._split(given)
        account = values.pop("account", None)
        self._link(values, metadata, account, known, outcome)
        if self.kind == "opportunities" and "name" not in values:
            values["name"] = (
                " - ".join(part for part in (account, metadata.get("product")) if part)
                or "Opportunity"
            )
        body = MODULES[self.kind].new.model_validate({**values, "metadata": metadata})
        fields = {name: value for name, value in body.fields().items() if value is not None}
        identity = own or self._identity(named, values, account, known)
        metadata = fields.pop("metadata_", {})
        return {**fields, "id": identity, "tenant_id": known.tenant, "metadata": metadata}

    def _link(
        self,
        values: dict[str, Any],
        metadata: dict[str, Any],
        account: str | None,
        known: ExistingRecords,
        outcome: ImportResult,
    ) -> None:
        """Turn names of accounts and employees into references; keep names that nobody has as
        metadata."""
        for name in known.ids.keys() & values.keys():
            if name == "assigned_to" and not _is_uuid(values[name]):
                continue
            if not _is_uuid(values[name]) or UUID(values[name]) not in known.ids[name]:
                raise ValueError(f"{name}: no such record in this tenant")
        if (
            account is not None
            and "account_id" in _columns(self.kind)
            and "account_id" not in values
        ):
            if (key := known.accounts.get(_folded(account))) is not None:
                values["account_id"] = key
            else:
                metadata["account"] = account
                outcome.unlinked += 1
        owner = values.get("assigned_to")
        if owner is not None and not _is_uuid(owner):
            if (employee := known.employees.get(_folded(values.pop("assigned_to")))) is not None:
                values["assigned_to"] = employee
            else:
                metadata["owner"] = owner

    def _split(self, given: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split a row into converted fields and metadata."""
        columns = _columns(self.kind)
        values: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        for column, cell in given.items():
            name = self.mapping.get(column)
            if name == "full_name":
                first, _, last = cell.rpartition(" ")
                values |= (
                    {"first_name": first, "last_name": last} if first else {"first_name": last}
                )
            elif name in columns:
                values[name] = self._converted(name, cell)
            elif name == "account":
                values[name] = cell
            elif plain(column) == "metadata":
                metadata |= _metadata(cell)
            elif name != "":
                key = column.lower().replace(" ", "_")[:100]
                metadata[f"{key}_2" if key in columns else key] = cell
        return values, metadata

    def _converted(self, name: str, cell: str) -> Any:
        kind = _columns(self.kind)[name].type
        try:
            if isinstance(kind, Date):
                return read_date(cell, self.dates[name])
            if isinstance(kind, Integer | Numeric):
                return read_number(cell)
            if isinstance(kind, ARRAY):
                return (
                    orjson.loads(cell)
                    if cell.startswith("[")
                    else [tag.strip() for tag in cell.split(",") if tag.strip()]
                )
        except ValueError:
            raise ValueError(
                f"{name}: {cell[:50]!r} is no {'date' if isinstance(kind, Date) else 'list'}"
            ) from None
        if name in MODULES[self.kind].choices:
            options = {plain(option): option for option in MODULES[self.kind].choices[name]}
            return options.get(plain(cell)) or (
                STAGES.get(plain(cell), cell) if name == "stage" else cell
            )
        return cell

    def _identity(
        self,
        named: str | None,
        values: Mapping[str, Any],
        account: str | None,
        known: ExistingRecords,
    ) -> UUID:
        """Return the id of a new row, which follows from what names it: the same in every
        import."""
        if named is not None:
            name: tuple[str, ...] = (plain(self.identity or ""), named)
        else:
            every = {**values, "account": account or ""}
            natural = NATURAL[self.kind]
            chosen = next((names for names in natural if every.get(names[0])), natural[-1])
            name = tuple(_folded(str(every.get(one) or "")) for one in chosen)
        return uuid5(NAMESPACE, "\x1f".join((str(known.tenant), self.kind, *name)))


async def tenant_of(engine: AsyncEngine, slug: str) -> UUID:
    """Return the id of a tenant. Raises ``LookupError`` for an unknown one."""
    async with engine.connect() as connection:
        tenant: UUID | None = await connection.scalar(
            select(Tenant.id).where(func.lower(Tenant.slug) == slug.lower())
        )
        if tenant is None:
            known = ", ".join(await connection.scalars(select(Tenant.slug).order_by(Tenant.slug)))
            raise LookupError(f"there is no tenant {slug!r}; known are {known or 'none'}")
        return tenant


async def look_up(engine: AsyncEngine, slug: str, kind: str) -> ExistingRecords:
    """Read what the rows of a kind may refer to. Raises ``LookupError`` for an unknown tenant."""
    tenant = await tenant_of(engine, slug)
    async with engine.connect() as connection:
        accounts = (
            select(Account.name, Account.id)
            .where(Account.tenant_id == tenant)
            .order_by(Account.created_at.desc())
        )
        employees = select(Employee.name, Employee.id).where(Employee.tenant_id == tenant)
        by_name = {_folded(name): key for name, key in await connection.execute(accounts)}
        people = {_folded(name): key for name, key in await connection.execute(employees)}
        ids = {"assigned_to": frozenset(people.values())}
        for name, model in (
            ("id", MODULES[kind].model),
            ("account_id", Account),
            ("contact_id", Contact),
            ("lead_id", Lead),
        ):
            ids[name] = frozenset(
                await connection.scalars(select(model.id).where(model.tenant_id == tenant))
            )
        return ExistingRecords(tenant, by_name, people, ids)


async def store(
    engine: AsyncEngine, kind: str, records: Sequence[dict[str, Any]], outcome: ImportResult
) -> None:
    """Insert or update one batch in one transaction; activities about a row follow its new name."""
    table = MODULES[kind].model.__table__  # type: ignore[attr-defined]
    names = {name for record in records for name in record}
    optional = {name for name in names if table.c[name].nullable}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:  # a column with a default is named only for the rows that give it
        groups.setdefault(tuple(sorted(optional | record.keys())), []).append(record)
    tenant = records[0]["tenant_id"]
    options = {"respcache_writes": (table.name,), "respcache_tenant": str(tenant)}
    created, updated = 0, []
    async with engine.begin() as connection:
        for columns, group in groups.items():
            rows = orjson.dumps(group, default=str).decode()
            upsert = text(_upsert(table.name, columns, optional))
            for key, is_new in await connection.execute(
                upsert, {"rows": rows}, execution_options=options
            ):
                created += is_new
                updated += [] if is_new else [key]
        if updated:
            await connection.execute(_renamed(MODULES[kind].model, tenant, updated))
    outcome.created += created
    outcome.updated += len(updated)
    outcome.unchanged += len(records) - created - len(updated)


def batches(records: Iterator[dict[str, Any]], size: int = BATCH) -> Iterator[list[dict[str, Any]]]:
    """Cut rows into batches."""
    while batch := list(islice(records, size)):
        yield batch


class Rejects:
    """The file of rejected rows, made with the first of them: line and reason, then the row as it
    was."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._again = len(REJECTED) if tuple(columns[: len(REJECTED)]) == REJECTED else 0
        self._columns = columns[self._again :]
        self._file: Any = None

    def __call__(self, line: int, cells: Sequence[str], reason: str) -> None:
        """Write down one row."""
        if self._file is None:
            self._file = self.path.open("w", newline="", encoding="utf-8")
            csv.writer(self._file).writerow([*REJECTED, *self._columns])
        csv.writer(self._file).writerow([line, reason, *cells[self._again :]])

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()


def _columns(kind: str) -> Mapping[str, Any]:
    table = MODULES[kind].model.__table__  # type: ignore[attr-defined]
    return {
        column.name: column for column in table.c if column.name not in (*SERVER_FIELDS, "metadata")
    }


def _renamed(model: type[Owned], tenant: UUID, keys: Sequence[UUID]) -> Update:
    """Build the statement by which activities take over the names of rows that may have new
    ones."""
    table, about = model.__table__, Activity.__table__.c  # type: ignore[attr-defined]
    names = (
        (table.c.first_name, table.c.last_name) if issubclass(model, Person) else (table.c.name,)
    )
    name = func.left(func.concat_ws(" ", *(func.nullif(part, "") for part in names)), 300)
    return (
        update(Activity)
        .where(
            about.tenant_id == tenant,
            about.related_to == model.kind,
            about.related_id == table.c.id,
        )
        .where(
            table.c.tenant_id == tenant,
            table.c.id.in_(keys),
            about.related_name.is_distinct_from(name),
        )
        .values(related_name=name)
    )


def _upsert(table: str, columns: Sequence[str], optional: Collection[str]) -> str:
    """Build the statement: names come from the model, never from a file. A blank cell leaves what
    is there."""
    listed = ", ".join(columns)
    own = [name for name in columns if name not in ("id", "tenant_id", "metadata")]
    new = {
        name: f"COALESCE(EXCLUDED.{name}, {table}.{name})"
        if name in optional
        else f"EXCLUDED.{name}"
        for name in own
    }
    changes = [f"{name} = {value}" for name, value in new.items()]
    changes += [f"metadata = {table}.metadata || EXCLUDED.metadata", "updated_at = now()"]
    differs = [f"{table}.{name} IS DISTINCT FROM {value}" for name, value in new.items()]
    differs.append(f"NOT {table}.metadata @> EXCLUDED.metadata")
    return (
        f"INSERT INTO {table} ({listed}) SELECT {listed} FROM "  # noqa: S608
        f"jsonb_populate_recordset(NULL::{table}, CAST(:rows AS jsonb)) "
        f"ON CONFLICT (id) DO UPDATE SET {', '.join(changes)} "
        f"WHERE {table}.tenant_id = EXCLUDED.tenant_id AND ({' OR '.join(differs)}) RETURNING id, "
        f"(xmax = 0)"
    )


def _metadata(cell: str) -> dict[str, Any]:
    try:
        found = orjson.loads(cell)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"metadata: {cell[:50]!r} is no JSON object")
    return found


def _folded(name: str) -> str:
    return " ".join(name.lower().split())


def _is_uuid(value: str) -> bool:
    try:
        UUID(value)
    except ValueError:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc'])) or 'row'}: {problem['msg']}"
    return str(error)
