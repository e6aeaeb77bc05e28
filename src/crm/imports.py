"""The import of CSV files: what ``python -m crm import`` does.

The bodies of requests also check rows. The id of a row is derived from its tenant and from what
identifies it (an id column, else its name or email), so a repeated import changes nothing. Each
batch is one transaction; the watched engine sends the invalidations.
"""

import csv
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import orjson
from pydantic import ValidationError
from sqlalchemy import Date, Integer, Numeric, Update, func, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncEngine

from crm.bodies import SERVER_FIELDS
from crm.csv_files import (
    REJECT_COLUMNS,
    STAGES,
    CsvFile,
    date_format,
    guess_mapping,
    identity_column,
    plain,
    read_date,
    read_number,
)
from crm.models import Account, Activity, Contact, Employee, Lead, Owned, Person, Tenant, as_uuid
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
EXTRA_FIELDS: dict[str, tuple[str, ...]] = {
    "accounts": (),
    "contacts": ("account", "full_name"),
    "leads": ("account", "full_name"),
    "opportunities": ("account",),
}
"""Fields that have no column: the name of an account, and first and last name in one."""
NATURAL_KEYS = {
    "accounts": (("name",),),
    "contacts": (("email",), ("first_name", "last_name", "phone")),
    "leads": (("email",), ("first_name", "last_name", "phone", "company")),
    "opportunities": (("name", "account", "close_date", "amount"),),
}
"""The fields that identify a row without an id column: the first key whose first field is given."""


class WrongMapping(ValueError):
    """``--map`` names a column or a field that does not exist."""


class BatchResult(NamedTuple):
    """The number of rows of a batch that were created, updated and left unchanged."""

    created: int
    updated: int
    unchanged: int


@dataclass
class ImportResult:
    """The number of rows of a file, by what was done with them."""

    read: int = 0
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    rejected: int = 0
    unlinked: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def stored(self) -> int:
        """The number of rows that are in the database."""
        return self.created + self.updated + self.unchanged

    def count(self, batch: BatchResult) -> None:
        """Add the rows of a stored batch."""
        self.created += batch.created
        self.updated += batch.updated
        self.unchanged += batch.unchanged


@dataclass(frozen=True)
class ExistingRecords:
    """The records of the tenant that rows may refer to.

    ``accounts`` and ``employees`` map a name (lower case, single spaces) to an id. ``ids`` maps a
    field to the ids that it may contain.
    """

    tenant: UUID
    accounts: Mapping[str, UUID]
    employees: Mapping[str, UUID]
    ids: Mapping[str, frozenset[UUID]]


@dataclass(frozen=True)
class ImportPlan:
    """How the rows of a file become rows of a table.

    ``mapping`` maps columns to fields ("" drops a column); other columns are metadata.
    ``identity`` is the column that identifies a row.
    """

    file: CsvFile
    kind: str
    mapping: Mapping[str, str]
    identity: str | None

    @classmethod
    def make(cls, file: CsvFile, kind: str, given: Mapping[str, str]) -> "ImportPlan":
        """Guess the mapping and apply the given one on top. Raises ``WrongMapping``."""
        fields = [*_columns(kind), *EXTRA_FIELDS[kind]]
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
        others = [column for column in file.columns if column not in given]
        guessed = guess_mapping(others, kind, fields)
        taken = set(given.values())
        merged = {column: name for column, name in guessed.items() if name not in taken}
        merged |= given
        mapping = {column: merged[column] for column in file.columns if column in merged}
        if not any(mapping.values()):
            raise WrongMapping(
                f"{file.path}: no column is known as a field of {kind}: use --map COLUMN=FIELD; "
                f"its columns are {', '.join(file.columns)}; fields are "
                f"{', '.join(sorted(fields))}"
            )
        named = [column for column, name in mapping.items() if name == "id"]
        identity = named[0] if named else identity_column(file.columns, mapping)
        return cls(file, kind, mapping, identity)

    @cached_property
    def dates(self) -> dict[str, str | None]:
        """The format of each field that contains dates. Reads the whole file."""
        columns = _columns(self.kind)
        places = {
            name: self.file.columns.index(column)
            for column, name in self.mapping.items()
            if name in columns and isinstance(columns[name].type, Date)
        }
        if not places:
            return {}
        rows = [row for _, row in self.file.rows()]
        return {
            name: date_format([row[place] for row in rows if place < len(row)])
            for name, place in places.items()
        }

    def records(
        self,
        existing: ExistingRecords,
        result: ImportResult,
        reject: Callable[[int, Sequence[str], str], None],
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows to store; pass each invalid row to ``reject`` (line, cells, reason)."""
        seen: dict[UUID, int] = {}
        for line, cells in self.file.rows():
            result.read += 1
            try:
                record = self._record(cells, existing, result)
                first = seen.setdefault(record["id"], line)
                if first != line:
                    raise ValueError(f"the same record as in line {first}")
            except (ValueError, ValidationError) as error:
                result.rejected += 1
                reason = _reason(error)
                result.reasons[reason.partition(":")[0]] += 1
                reject(line, cells, reason)
            else:
                yield record

    def _record(
        self, cells: Sequence[str], existing: ExistingRecords, result: ImportResult
    ) -> dict[str, Any]:
        if len(cells) > len(self.file.columns):
            raise ValueError(f"{len(cells)} cells in a file of {len(self.file.columns)} columns")
        given = {
            column: cell.strip()
            for column, cell in zip(self.file.columns, cells, strict=False)
            if cell.strip()
        }
        external = given.get(self.identity) if self.identity else None
        own = as_uuid(external) if external else None
        if own not in existing.ids["id"]:
            own = None
        if own and self.identity:
            del given[self.identity]
        values, metadata = self._split(given)
        account = values.pop("account", None)
        self._check_ids(values, existing)
        if account is not None and self._link_account(values, account, existing) is None:
            metadata["account"] = account
            result.unlinked += 1
        self._link_owner(values, metadata, existing)
        if self.kind == "opportunities" and "name" not in values:
            named = " - ".join(part for part in (account, metadata.get("product")) if part)
            values["name"] = named or "Opportunity"
        body = MODULES[self.kind].new.model_validate({**values, "metadata": metadata})
        fields = {name: value for name, value in body.fields().items() if value is not None}
        if own is None:
            key = self._key({**values, "account": account or ""}, external)
            own = uuid5(NAMESPACE, "\x1f".join((str(existing.tenant), self.kind, *key)))
        metadata = fields.pop("metadata_", {})
        return {**fields, "id": own, "tenant_id": existing.tenant, "metadata": metadata}

    def _check_ids(self, values: Mapping[str, Any], existing: ExistingRecords) -> None:
        """Raise ``ValueError`` for the id of a record that the tenant does not have."""
        for name in existing.ids.keys() & values.keys():
            key = as_uuid(values[name])
            if key is None and name == "assigned_to":
                continue  # the name of an employee
            if key not in existing.ids[name]:
                raise ValueError(f"{name}: no such record in this tenant")

    def _link_account(
        self, values: dict[str, Any], account: str, existing: ExistingRecords
    ) -> UUID | None:
        """Refer to the account of this name, unless the row has an account id.

        Return the id, or None if the name is unknown.
        """
        if "account_id" not in values and (found := existing.accounts.get(_folded(account))):
            values["account_id"] = found
        return values.get("account_id")

    def _link_owner(
        self, values: dict[str, Any], metadata: dict[str, Any], existing: ExistingRecords
    ) -> None:
        """Replace the name of an employee by an id; keep an unknown name as metadata."""
        owner = values.get("assigned_to")
        if owner is None or as_uuid(owner) is not None:
            return
        employee = existing.employees.get(_folded(values.pop("assigned_to")))
        if employee is None:
            metadata["owner"] = owner
        else:
            values["assigned_to"] = employee

    def _split(self, given: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split a row into converted fields and metadata."""
        columns = _columns(self.kind)
        values: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        for column, cell in given.items():
            name = self.mapping.get(column)
            if name == "full_name":
                first, _, last = cell.rpartition(" ")
                names = {"first_name": first, "last_name": last} if first else {"first_name": last}
                values |= names
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
                if cell.startswith("["):
                    return orjson.loads(cell)
                return [tag.strip() for tag in cell.split(",") if tag.strip()]
        except ValueError:
            expected = "date" if isinstance(kind, Date) else "list"
            raise ValueError(f"{name}: {cell[:50]!r} is not a {expected}") from None
        if name in MODULES[self.kind].choices:
            options = {plain(option): option for option in MODULES[self.kind].choices[name]}
            other = STAGES.get(plain(cell), cell) if name == "stage" else cell
            return options.get(plain(cell)) or other
        return cell

    def _key(self, values: Mapping[str, Any], external: str | None) -> tuple[str, ...]:
        """Return what identifies a row: the cell of the identity column, or a natural key."""
        if external is not None:
            return (plain(self.identity or ""), external)
        keys = NATURAL_KEYS[self.kind]
        chosen = next((names for names in keys if values.get(names[0])), keys[-1])
        return tuple(_folded(str(values.get(name) or "")) for name in chosen)


async def tenant_id(engine: AsyncEngine, slug: str) -> UUID:
    """Return the id of a tenant. Raises ``LookupError`` for an unknown one."""
    async with engine.connect() as connection:
        tenant: UUID | None = await connection.scalar(
            select(Tenant.id).where(func.lower(Tenant.slug) == slug.lower())
        )
        if tenant is None:
            known = ", ".join(await connection.scalars(select(Tenant.slug).order_by(Tenant.slug)))
            raise LookupError(f"there is no tenant {slug!r}; known are {known or 'none'}")
        return tenant


async def load_existing(engine: AsyncEngine, slug: str, kind: str) -> ExistingRecords:
    """Read what rows of a module may refer to: 7 statements. Raises ``LookupError``."""
    tenant = await tenant_id(engine, slug)
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
            found = select(model.id).where(model.tenant_id == tenant)
            ids[name] = frozenset(await connection.scalars(found))
        return ExistingRecords(tenant, by_name, people, ids)


async def store(engine: AsyncEngine, kind: str, records: Sequence[dict[str, Any]]) -> BatchResult:
    """Insert or update one batch in one transaction; update the names in its activities."""
    table = MODULES[kind].model.__table__  # type: ignore[attr-defined]
    names = {name for record in records for name in record}
    optional = {name for name in names if table.c[name].nullable}
    # a column with a default is named only for the rows that have a value for it
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
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
    return BatchResult(created, len(updated), len(records) - created - len(updated))


def batches(records: Iterator[dict[str, Any]], size: int = BATCH) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of at most ``size`` rows."""
    while batch := list(islice(records, size)):
        yield batch


class Rejects:
    """The file of rejected rows: line, reason, and the cells of the row.

    The first rejected row creates it. Corrected, the file can be imported again.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        # the file itself may be one of rejected rows: drop its first two columns
        count = len(REJECT_COLUMNS)
        self._skip = count if tuple(columns[:count]) == REJECT_COLUMNS else 0
        self._columns = columns[self._skip :]
        self._file: Any = None

    def __call__(self, line: int, cells: Sequence[str], reason: str) -> None:
        """Append one row."""
        if self._file is None:
            self._file = self.path.open("w", newline="", encoding="utf-8")
            csv.writer(self._file).writerow([*REJECT_COLUMNS, *self._columns])
        csv.writer(self._file).writerow([line, reason, *cells[self._skip :]])

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()


def _columns(kind: str) -> Mapping[str, Any]:
    table = MODULES[kind].model.__table__  # type: ignore[attr-defined]
    return {
        column.name: column for column in table.c if column.name not in (*SERVER_FIELDS, "metadata")
    }


def _renamed(model: type[Owned], tenant: UUID, keys: Sequence[UUID]) -> Update:
    """Build the statement that updates ``related_name`` in the activities of changed rows."""
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
    """Build an upsert in which a blank cell changes nothing.

    Names come from the model, never from a file.
    """
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
        raise ValueError(f"metadata: {cell[:50]!r} is not a JSON object")
    return found


def _folded(name: str) -> str:
    return " ".join(name.lower().split())


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc'])) or 'row'}: {problem['msg']}"
    return str(error)
