"""CSV files as people have them: any encoding, any delimiter, odd headers; and what their columns
mean."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

from charset_normalizer import from_bytes

MAX_FIELD = 1_000_000
SAMPLE = 100_000
DELIMITERS = ",;\t|"
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
DATE_FORMATS = ("%Y-%m-%d", "%d-%m-%y", "%d-%m-%Y", "%m-%d-%y", "%m-%d-%Y", "%Y-%m-%dT%H:%M:%S")
"""Tried in this order on a whole column, with ``/`` and ``.`` read as ``-``: the first that fits
every value counts."""

SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "accounts": {
        "account": "name", "company": "name", "companyname": "name", "organization": "name", "organisation": "name",
        "sector": "industry", "employees": "employee_count", "numberofemployees": "employee_count", "revenue": "annual_revenue",
        "turnover": "annual_revenue", "officelocation": "country", "url": "website", "homepage": "website", "address": "street",
        "postcode": "zip", "zipcode": "zip", "postalcode": "zip", "phonenumber": "phone", "emailaddress": "email",
    },
    "contacts": {
        "name": "full_name", "fullname": "full_name", "firstname": "first_name", "givenname": "first_name",
        "lastname": "last_name", "surname": "last_name",
        "familyname": "last_name", "emailaddress": "email", "phone1": "phone", "phonenumber": "phone", "telephone": "phone",
        "phone2": "mobile", "mobilephone": "mobile", "cell": "mobile", "company": "account", "organization": "account",
        "organisation": "account", "accountname": "account", "position": "job_title", "title": "job_title",
        "source": "lead_source", "street": "address", "postcode": "zip", "zipcode": "zip", "postalcode": "zip",
    },
    "leads": {
        "name": "full_name", "fullname": "full_name", "firstname": "first_name", "givenname": "first_name",
        "lastname": "last_name", "surname": "last_name",
        "familyname": "last_name", "emailaddress": "email", "phone1": "phone", "phonenumber": "phone", "telephone": "phone",
        "organization": "company", "organisation": "company", "companyname": "company", "accountname": "account",
        "position": "job_title", "title": "job_title", "leadsource": "source", "value": "estimated_value", "street": "address",
        "postcode": "zip", "zipcode": "zip", "postalcode": "zip",
    },
    "opportunities": {
        "opportunity": "name", "deal": "name", "dealname": "name", "opportunityname": "name", "dealstage": "stage",
        "status": "stage", "closevalue": "amount", "value": "amount", "dealvalue": "amount", "accountname": "account",
        "company": "account", "salesagent": "assigned_to", "owner": "assigned_to", "closedate": "close_date",
    },
}  # fmt: skip
"""What columns of other systems are called, in letters and digits only."""

STAGES = {
    "won": "closed_won", "closedwon": "closed_won", "lost": "closed_lost", "closedlost": "closed_lost",
    "engaging": "qualification", "qualified": "qualification", "prospect": "prospecting", "quote": "proposal",
    "negotiating": "negotiation",
}  # fmt: skip
NOTHING = (
    "index",
    "row",
    "rownumber",
    "createdat",
    "updatedat",
    "tenantid",
    "isoverdue",
    "contactname",
    "leadname",
)
"""Columns that say nothing of a record, or what only the server says."""
REJECTED = ("line", "reason")
"""The columns before the row itself in a file of rejected rows, which can be mended and imported
again."""
IDENTITIES = (
    "externalid",
    "organizationid",
    "customerid",
    "opportunityid",
    "accountid",
    "contactid",
    "leadid",
)
"""What the column is called that names a row in its own system, unless it is called id."""


class UnreadableFile(ValueError):
    """The file is no CSV that can be imported; the message says why."""


@dataclass(frozen=True)
class CsvFile:
    """A file, read: unique column names, and rows as (line number, values)."""

    path: Path
    encoding: str
    delimiter: str
    columns: tuple[str, ...]
    text: str

    @classmethod
    def open(cls, path: Path) -> "CsvFile":
        """Read a file into memory. Raises ``UnreadableFile`` and ``OSError``."""
        data = path.read_bytes()
        encoding = _encoding(data)
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            raise UnreadableFile(
                f"{path}: not readable as {encoding}: {error.reason} at byte {error.start}"
            ) from None
        if "\x00" in text[:SAMPLE]:
            raise UnreadableFile(f"{path}: this is no text file")
        first = text.partition("\n")[0]
        delimiter = max(DELIMITERS, key=first.count) if any(map(first.count, DELIMITERS)) else ","
        csv.field_size_limit(MAX_FIELD)
        _, header = next(_rows(text, delimiter), (0, []))
        if not any(cell.strip() for cell in header):
            raise UnreadableFile(f"{path}: the first line names no columns")
        return cls(path, encoding, delimiter, _unique(header), text)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line at which each row begins, and its cells; blank lines are left out. Raises
        ``UnreadableFile``."""
        rows = _rows(self.text, self.delimiter)
        next(rows, None)
        try:
            yield from rows
        except csv.Error as error:
            raise UnreadableFile(f"{self.path}: {error}") from None


def plain(name: str) -> str:
    """Return the letters and digits of a column's name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def guess_mapping(columns: Sequence[str], kind: str, fields: Sequence[str]) -> dict[str, str]:
    """Guess which field each column means; columns that mean none are metadata under their own
    name. First come, first served."""
    known = {plain(field): field for field in fields}
    synonyms = SYNONYMS[kind]
    mapping: dict[str, str] = {}
    for place, column in enumerate(columns):
        word = plain(column)
        field = known.get(word) or synonyms.get(word)
        if field and field not in mapping.values():
            mapping[column] = field
        elif word in NOTHING or (place < len(REJECTED) and tuple(columns[:2]) == REJECTED):
            mapping[column] = ""
    return mapping


def identity_column(columns: Sequence[str], mapping: Mapping[str, str]) -> str | None:
    """Find the column that names a row in its own system."""
    words = {plain(column): column for column in columns if column not in mapping}
    return next((words[word] for word in ("id", *IDENTITIES) if word in words), None)


def date_format(values: Sequence[str]) -> str | None:
    """Find the one format that fits all dates of a column, or None."""
    given = [_dashed(value) for value in values if value.strip()]
    return next((form for form in DATE_FORMATS if all(_fits(value, form) for value in given)), None)


def read_date(value: str, form: str | None) -> date:
    """Read a date. Raises ``ValueError``."""
    return datetime.strptime(_dashed(value), form or DATE_FORMATS[0]).date()


def read_number(value: str) -> str:
    """Take currency signs, blanks and separators of thousands out of a number: 1,234.50 and
    1.234,50 alike."""
    text = re.sub(r"[^\d,.\-+eE]", "", value)
    if "," in text and "." in text:
        text = (
            text.replace(",", "")
            if text.rindex(".") > text.rindex(",")
            else text.replace(".", "").replace(",", ".")
        )
    elif re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    return text.replace(",", ".")


def _encoding(data: bytes) -> str:
    for mark, encoding in BOMS.items():
        if data.startswith(mark):
            return encoding
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        best = from_bytes(
            data[:SAMPLE],
            cp_isolation=["cp1252", "cp1250", "cp1251", "utf_16_le", "utf_16_be", "shift_jis"],
        ).best()
        return best.encoding if best is not None else "cp1252"
    return "utf-8"


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
    line = 1
    for row in reader:
        if any(cell.strip() for cell in row):
            yield line, row
        line = reader.line_num + 1


def _unique(header: Sequence[str]) -> tuple[str, ...]:
    """Name every column once: a repeated name gets a number, a blank one its place. Metadata has
    small letters only."""
    names: list[str] = []
    taken: set[str] = set()
    for place, cell in enumerate(header, 1):
        name = wanted = cell.strip() or f"column {place}"
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{wanted} {number}"
        names.append(name)
        taken.add(name.lower())
    return tuple(names)


def _dashed(value: str) -> str:
    return re.sub(r"[/.]", "-", value.strip())


def _fits(value: str, form: str) -> bool:
    try:
        datetime.strptime(value, form)
    except ValueError:
        return False
    return True
