"""CSV files of any encoding, delimiter and header, and the meaning of their columns."""

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
"""Tried in this order on a whole column, with ``/`` and ``.`` replaced by ``-``. The first that
fits every value is used."""

_PERSON = {
    "full_name": "name fullname",
    "first_name": "firstname givenname",
    "last_name": "lastname surname familyname",
    "email": "emailaddress",
    "phone": "phone1 phonenumber telephone",
    "job_title": "position title",
    "zip": "postcode zipcode postalcode",
}
_NAMES: Mapping[str, Mapping[str, str]] = {
    "accounts": {
        "name": "account company companyname organization organisation",
        "industry": "sector",
        "employee_count": "employees numberofemployees",
        "annual_revenue": "revenue turnover",
        "country": "officelocation",
        "website": "url homepage",
        "street": "address",
        "zip": "postcode zipcode postalcode",
        "phone": "phonenumber",
        "email": "emailaddress",
    },
    "contacts": {
        **_PERSON,
        "mobile": "phone2 mobilephone cell",
        "account": "company organization organisation accountname",
        "lead_source": "source",
        "address": "street",
    },
    "leads": {
        **_PERSON,
        "company": "organization organisation companyname",
        "account": "accountname",
        "source": "leadsource",
        "estimated_value": "value",
        "address": "street",
    },
    "opportunities": {
        "name": "opportunity deal dealname opportunityname",
        "stage": "dealstage status",
        "amount": "closevalue value dealvalue",
        "account": "accountname company",
        "assigned_to": "salesagent owner",
        "close_date": "closedate",
    },
}
SYNONYMS: Mapping[str, Mapping[str, str]] = {
    module: {name: field for field, names in fields.items() for name in names.split()}
    for module, fields in _NAMES.items()
}
"""For each module: names of columns in other systems (letters and digits only), and the field."""

STAGES = {
    "won": "closed_won",
    "closedwon": "closed_won",
    "lost": "closed_lost",
    "closedlost": "closed_lost",
    "engaging": "qualification",
    "qualified": "qualification",
    "prospect": "prospecting",
    "quote": "proposal",
    "negotiating": "negotiation",
}
"""Names of stages in other systems."""

IGNORED = (
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
"""Columns without information about a record, or with values that only the server sets."""

REJECT_COLUMNS = ("line", "reason")
"""The first columns of a file of rejected rows; such a file can be corrected and imported again."""

IDENTITIES = (
    "externalid",
    "organizationid",
    "customerid",
    "opportunityid",
    "accountid",
    "contactid",
    "leadid",
)
"""Names of the column that identifies a row in its own system, besides ``id``."""


class UnreadableFile(ValueError):
    """The file is not a CSV file that can be imported; the message says why."""


@dataclass(frozen=True)
class CsvFile:
    """The content of a file, with unique column names."""

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
            raise UnreadableFile(f"{path}: not a text file")
        first = text.partition("\n")[0]
        delimiter = max(DELIMITERS, key=first.count) if any(map(first.count, DELIMITERS)) else ","
        csv.field_size_limit(MAX_FIELD)
        _, header = next(_rows(text, delimiter), (0, []))
        if not any(cell.strip() for cell in header):
            raise UnreadableFile(f"{path}: the first line has no column names")
        return cls(path, encoding, delimiter, _unique(header), text)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield each row as (number of its first line, cells), without blank lines.

        Raises ``UnreadableFile``.
        """
        rows = _rows(self.text, self.delimiter)
        next(rows, None)
        try:
            yield from rows
        except csv.Error as error:
            raise UnreadableFile(f"{self.path}: {error}") from None


def plain(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def guess_mapping(columns: Sequence[str], kind: str, fields: Sequence[str]) -> dict[str, str]:
    """Guess the field of each column; "" drops a column, and columns left out are metadata.

    If two columns match one field, the first is used.
    """
    known = {plain(field): field for field in fields}
    synonyms = SYNONYMS[kind]
    rejected = tuple(columns[: len(REJECT_COLUMNS)]) == REJECT_COLUMNS
    mapping: dict[str, str] = {}
    for place, column in enumerate(columns):
        name = plain(column)
        field = known.get(name) or synonyms.get(name)
        if field and field not in mapping.values():
            mapping[column] = field
        elif name in IGNORED or (rejected and place < len(REJECT_COLUMNS)):
            mapping[column] = ""
    return mapping


def identity_column(columns: Sequence[str], mapping: Mapping[str, str]) -> str | None:
    """Return the column that identifies a row in its own system, or None."""
    words = {plain(column): column for column in columns if column not in mapping}
    return next((words[word] for word in ("id", *IDENTITIES) if word in words), None)


def date_format(values: Sequence[str]) -> str | None:
    """Return the first format that fits all dates of a column, or None."""
    given = [_dashed(value) for value in values if value.strip()]
    return next((form for form in DATE_FORMATS if all(_fits(value, form) for value in given)), None)


def read_date(value: str, form: str | None) -> date:
    """Parse a date. Raises ``ValueError``."""
    return datetime.strptime(_dashed(value), form or DATE_FORMATS[0]).date()


def read_number(value: str) -> str:
    """Remove currency signs, blanks and thousands separators: 1,234.50 and 1.234,50 are equal."""
    text = re.sub(r"[^\d,.\-+eE]", "", value)
    if "," in text and "." in text:
        if text.rindex(".") > text.rindex(","):
            text = text.replace(",", "")
        else:
            text = text.replace(".", "").replace(",", ".")
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
    """Make column names unique without regard to case, because metadata keys are lower case.

    A repeated name gets a number, a blank name its position.
    """
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
