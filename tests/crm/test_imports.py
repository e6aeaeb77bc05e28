"""``python -m crm import`` and ``export``: what files become, what is refused, and lists that are
right at once."""

import argparse
import asyncio
import csv
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import create_async_engine

from crm.cli.transfer import export_module, import_files
from crm.csv_files import CsvFile, UnreadableFile, date_format, guess_mapping, read_number
from crm.imports import BATCH, WrongMapping, store
from crm.models import Account
from crm.settings import Settings

from .conftest import NEW, SECRET, Crm, hit

pytestmark = pytest.mark.anyio
Import = Callable[..., Awaitable[tuple[int, dict[str, Any]]]]


@pytest.fixture
def run_import(
    crm: Crm,
    database_url: str,
    valkey_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Import:
    """Write a file and import it for acme, as the command does; return the exit status and what
    ``--json`` says."""
    monkeypatch.chdir(tmp_path)
    settings = Settings(jwt_secret=SECRET, respcache_key=SECRET)

    async def run(
        content: str | bytes | Path, kind: str = "accounts", **options: Any
    ) -> tuple[int, dict[str, Any]]:
        path = content if isinstance(content, Path) else written(tmp_path / f"{kind}.csv", content)
        chosen = {
            "files": [path],
            "kind": kind,
            "tenant": "acme",
            "map": [],
            "dry_run": False,
            "rejects": None,
            "json": True,
        }
        status = await import_files(
            settings,
            argparse.Namespace(**{**chosen, **options}),
            database_url=database_url,
            cache_url=valkey_url,
        )
        return status, json.loads(capsys.readouterr().out)[0]

    return run


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


async def listed(crm: Crm, kind: str = "accounts", user: str = "abe") -> list[dict[str, Any]]:
    """Return the first page as the API gives it."""
    answer = await crm.as_user(user).get(f"/api/{kind}?limit=200")
    found: list[dict[str, Any]] = answer.json()["data"][kind]
    return found


def counts(outcome: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return how many rows were created, updated, unchanged, rejected."""
    return outcome["created"], outcome["updated"], outcome["unchanged"], outcome["rejected"]


async def test_a_file_becomes_rows_that_the_next_cached_list_shows(
    crm: Crm, run_import: Import
) -> None:
    """Guessed columns, metadata, metres of noise; the list that was cached before is right when the
    import returns."""
    abe = crm.as_user("abe")
    for _ in range(2):
        before = await abe.get("/api/accounts?limit=200")
    assert hit(before)
    status, outcome = await run_import(
        "Index,Company,Sector,Revenue,Number of employees,Founded in\n"
        '1, Acorn Ltd ,retail,"€1,234.50",1200,1996\n\n2,Böhm & Söhne,,,,\n'
    )
    assert (status, counts(outcome)) == (0, (2, 0, 0, 0))
    found = {record["name"]: record for record in await listed(crm)}
    acorn = found["Acorn Ltd"]
    assert set(found) == {"Acorn Ltd", "Böhm & Söhne"}
    assert (
        acorn["industry"],
        float(acorn["annual_revenue"]),
        acorn["employee_count"],
        acorn["founded_in"],
    ) == (
        "retail",
        1234.5,
        1200,
        "1996",
    )
    assert "index" not in acorn
    assert await listed(crm, user="gus") == []


async def test_a_repeated_import_changes_nothing_and_a_changed_cell_only_its_row(
    crm: Crm, run_import: Import
) -> None:
    """Rows are recognised; a blank cell leaves what is there; an unchanged file leaves the cached
    list in the cache."""
    await run_import("name,city,note\nAcorn,Leeds,x\nBirch,Berlin,y\n")
    abe = crm.as_user("abe")
    for _ in range(2):
        await abe.get("/api/accounts")
    before = await listed(crm)
    status, outcome = await run_import("name,city,note\nAcorn,Leeds,x\nBirch,Berlin,y\n")
    assert (status, counts(outcome)) == (0, (0, 0, 2, 0))
    assert await listed(crm) == before
    status, outcome = await run_import("name,city,note\nacorn,,x\nBIRCH,Bonn,z\n")
    assert (status, counts(outcome)) == (0, (0, 2, 0, 0))  # the first: written in other letters
    found = {record["name"]: (record["city"], record["note"]) for record in await listed(crm)}
    assert found == {"acorn": ("Leeds", "x"), "BIRCH": ("Bonn", "z")}


async def test_a_column_of_ids_names_rows_even_when_everything_else_changes(
    crm: Crm, run_import: Import
) -> None:
    """As in most systems' exports; two rows of one id are one too many."""
    await run_import("Organization Id,Name\n7,Acorn\n8,Birch\n")
    status, outcome = await run_import("Organization Id,Name\n7,Oak\n8,Birch\n8,Beech\n")
    assert (status, counts(outcome)) == (1, (0, 1, 1, 1))
    assert {record["name"] for record in await listed(crm)} == {"Oak", "Birch"}
    assert rejected("accounts") == [
        {
            "line": "4",
            "reason": "the same record as in line 3",
            "Organization Id": "8",
            "Name": "Beech",
        }
    ]


async def test_rejected_rows_are_written_with_line_and_reason_and_can_be_mended_and_imported(
    crm: Crm, run_import: Import, tmp_path: Path
) -> None:
    """Nothing of the file is lost; the rejects are themselves a file that can be imported."""
    status, outcome = await run_import(
        'name,employees,type\nAcorn,12,customer\n,5,customer\nBirch,many,\n"Two\nlines",3,customer\nCedar,1,friend\nDogwood,1,,too,much\n'
    )
    assert (status, counts(outcome)) == (1, (2, 0, 0, 4))
    assert [(row["line"], row["reason"].partition(":")[0]) for row in rejected("accounts")] == [
        ("3", "name"),
        ("4", "employee_count"),
        ("7", "type"),
        ("8", "5 cells in a file of 3 columns"),
    ]
    assert outcome["reasons"] == {
        "name": 1,
        "employee_count": 1,
        "type": 1,
        "5 cells in a file of 3 columns": 1,
    }
    mended = (
        (tmp_path / outcome["rejects"])
        .read_text()
        .replace("many", "20")
        .replace("friend", "partner")
    )
    status, outcome = await run_import(written(tmp_path / "mended.csv", mended))
    assert counts(outcome) == (2, 0, 0, 2)
    found = {record["name"]: record for record in await listed(crm)}
    assert set(found) == {"Acorn", "Two\nlines", "Birch", "Cedar"}
    assert not {"line", "reason"} & set(found["Birch"])


def rejected(stem: str) -> list[dict[str, str]]:
    with Path(f"{stem}.rejects.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


async def test_a_dry_run_checks_everything_and_stores_nothing(crm: Crm, run_import: Import) -> None:
    """The same rejects, no rows."""
    status, outcome = await run_import("name,employees\nAcorn,12\nBirch,many\n", dry_run=True)
    assert (status, outcome["read"], counts(outcome), outcome["dry_run"]) == (
        1,
        2,
        (0, 0, 0, 1),
        True,
    )
    assert await listed(crm) == []


async def test_people_find_their_accounts_and_sellers_by_name(crm: Crm, run_import: Import) -> None:
    """A name that nobody has is kept; a full name is taken apart; a contact without an account is
    no error."""
    acorn = crm.account("acme", "Acorn  Ltd")
    await crm.save(acorn, crm.account("globex", "Birch"))
    status, outcome = await run_import(
        "Name,Company,Phone 1,assigned_to\nAda M. Lovelace,ACORN Ltd,+1,ann\nBob "
        "Ross,Birch,+2,Somebody Else\nCher,,,\n",
        "contacts",
    )
    assert (status, outcome["unlinked"], outcome["reasons"]) == (1, 1, {"last_name": 1})
    ada, bob = sorted(await listed(crm, "contacts"), key=lambda record: record["first_name"])
    assert (ada["first_name"], ada["last_name"], ada["account_id"], ada["account_name"]) == (
        "Ada M.",
        "Lovelace",
        str(acorn.id),
        "Acorn  Ltd",
    )
    assert (ada["assigned_to"], ada["phone"]) == (str(crm.users["ann"].id), "+1")
    assert (bob["account_id"], bob["account"], bob["owner"], bob["assigned_to"]) == (
        None,
        "Birch",
        "Somebody Else",
        None,
    )


async def test_references_to_other_tenants_are_refused_and_their_rows_untouched(
    crm: Crm, run_import: Import
) -> None:
    """An id of another tenant's row names a new row here; a reference to one is the error that an
    unknown one is."""
    theirs = crm.account("globex", "Theirs", city="Bonn")
    await crm.save(theirs)
    status, outcome = await run_import(f"id,name,city\n{theirs.id},Mine,Leeds\n")
    assert (status, counts(outcome)) == (0, (1, 0, 0, 0))
    (mine,) = await listed(crm)
    assert mine["id"] != str(theirs.id)
    assert [(record["name"], record["city"]) for record in await listed(crm, user="gus")] == [
        ("Theirs", "Bonn")
    ]
    foreign = {"account_id": theirs.id, "assigned_to": crm.users["gus"].id}
    for field, key in foreign.items():
        status, outcome = await run_import(
            f"first_name,last_name,{field}\nA,B,{key}\nA,C,{uuid4()}\n", "contacts"
        )
        assert (status, counts(outcome)) == (1, (0, 0, 0, 2))
        assert {row["reason"] for row in rejected("contacts")} == {
            f"{field}: no such record in this tenant"
        }


async def test_a_row_of_another_tenant_is_not_overwritten_even_by_its_id(
    crm: Crm, database_url: str
) -> None:
    """Whatever led to such a record: the statement itself changes no foreign row."""
    theirs = crm.account("globex", "Theirs")
    await crm.save(theirs)
    engine = create_async_engine(database_url)
    record = {"id": theirs.id, "tenant_id": crm.tenants["acme"].id, "name": "Mine", "metadata": {}}
    result = await store(engine, "accounts", [record])
    await engine.dispose()
    assert (result.created, result.updated) == (0, 0)
    assert [account["name"] for account in await listed(crm, user="gus")] == ["Theirs"]


async def test_a_rename_by_import_reaches_the_activities_about_the_row(
    crm: Crm, run_import: Import
) -> None:
    """Also in the cached list of activities."""
    abe = crm.as_user("abe")
    contact = (await abe.post("/api/contacts", json=NEW["contacts"])).json()["data"]["contact"]
    about = {"type": "call", "related_to": "contact", "related_id": contact["id"]}
    await abe.post("/api/activities", json=about)
    for _ in range(2):
        before = await listed(crm, "activities")
    assert before[0]["related_name"] == "Con Tact"
    status, _ = await run_import(
        f"id,first_name,last_name\n{contact['id']},Connie,Tact\n", "contacts"
    )
    assert (status, (await listed(crm, "activities"))[0]["related_name"]) == (0, "Connie Tact")


async def test_what_is_exported_can_be_imported_and_changes_nothing(
    crm: Crm, run_import: Import, database_url: str, tmp_path: Path
) -> None:
    """Metadata of every shape, lists, dates, numbers, line breaks, references: all the way and
    back; then in another tenant."""
    abe = crm.as_user("abe")
    awkward = {
        "nested": {"a": [1, None, "x"]},
        "count": 3,
        "company": "no column",
        "Case": "kept",
        "quote": 'a "b", c\nd;e',
    }
    account = (
        await abe.post(
            "/api/accounts",
            json={"name": "Acorn", "tags": ["a", "b, c"], "annual_revenue": 1.5, **awkward},
        )
    ).json()
    key = account["data"]["account"]["id"]
    await abe.post(
        "/api/accounts", json={"name": "Birch", "tags": ["x", "y"], "description": "two\nlines"}
    )
    contact = {**NEW["contacts"], "account_id": key, "assigned_to": str(crm.users["ann"].id)}
    await abe.post("/api/contacts", json=contact)
    await abe.post(
        "/api/leads",
        json={**NEW["leads"], "last_contacted": "2026-02-03", "do_not_call": True, "score": 5},
    )
    await abe.post(
        "/api/opportunities",
        json={
            "name": "Deal",
            "stage": "proposal",
            "amount": 10,
            "close_date": "2026-03-04",
            "account_id": key,
        },
    )
    for kind, rows in {"accounts": 2, "contacts": 1, "leads": 1, "opportunities": 1}.items():
        path = tmp_path / f"{kind}.csv"
        await export_module(
            database_url, argparse.Namespace(tenant="acme", module=kind, output=path)
        )
        before = await listed(crm, kind)
        status, outcome = await run_import(path, kind)
        assert (kind, status, counts(outcome)) == (kind, 0, (0, 0, rows, 0)), (
            rejected(kind) if outcome["rejects"] else outcome
        )
        assert await listed(crm, kind) == before
    status, outcome = await run_import(tmp_path / "accounts.csv", tenant="globex")
    assert counts(outcome) == (2, 0, 0, 0)
    copy = next(record for record in await listed(crm, user="gus") if record["name"] == "Acorn")
    assert {name: copy[name] for name in awkward} == awkward
    assert copy["tags"] == ["a", "b, c"]


async def test_an_empty_module_is_exported_as_its_header(
    crm: Crm, database_url: str, tmp_path: Path
) -> None:
    """So that it says what an import may give."""
    await export_module(
        database_url, argparse.Namespace(tenant="acme", module="tasks", output=tmp_path / "t.csv")
    )
    assert (tmp_path / "t.csv").read_text().startswith("id,description,status,")


async def test_a_cancelled_import_leaves_whole_batches_and_a_right_list(
    crm: Crm, run_import: Import
) -> None:
    """Ctrl-C: what is in is in, what is not can be had by repeating it."""
    abe = crm.as_user("abe")
    await abe.get("/api/accounts")
    rows = 20 * BATCH
    content = "name,city\n" + "".join(f"Account {number},Leeds\n" for number in range(rows))
    running = asyncio.create_task(run_import(content))
    while await stored(crm) == 0:
        await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    there = await stored(crm)
    assert 0 < there < rows
    assert there % BATCH == 0
    assert (await abe.get("/api/accounts")).json()["data"]["total"] == there
    _, outcome = await run_import(content)
    assert counts(outcome) == (rows - there, 0, there, 0)


async def stored(crm: Crm) -> int:
    async with crm.session() as session:
        return await session.scalar(select(func.count()).select_from(Account)) or 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
async def test_encodings_and_delimiters(
    run_import: Import, crm: Crm, encoding: str, delimiter: str
) -> None:
    """What Excel and its like write, line ends included."""
    lines = [
        ["name", "city"],
        ["Müller, Söhne; & Co", "Zürich"],
        ["Café “Olé”", "Málaga"],
        ["O'Brien", "Saint-Étienne"],
    ]
    text = "\r\n".join(delimiter.join(f'"{cell}"' for cell in line) for line in lines)
    status, outcome = await run_import(text.encode(encoding))
    assert (status, counts(outcome)) == (0, (3, 0, 0, 0))
    assert {(record["name"], record["city"]) for record in await listed(crm)} == {
        tuple(line) for line in lines[1:]
    }


async def test_odd_headers_and_huge_fields(crm: Crm, run_import: Import) -> None:
    """Repeated and blank column names stay apart; a field too long for its column is refused, one
    too long for CSV too."""
    status, outcome = await run_import(
        "name,city,city,,Name\nAcorn,Leeds,Bonn,blank,again\n"
        f"{'x' * 300},Leeds,,,\nCedar,Leeds,{'y' * 150_000},,\n"
    )
    assert (status, counts(outcome)) == (1, (1, 0, 0, 2))
    (acorn,) = await listed(crm)
    assert (acorn["name"], acorn["city"], acorn["city_2"], acorn["column_4"], acorn["name_2"]) == (
        "Acorn",
        "Leeds",
        "Bonn",
        "blank",
        "again",
    )
    with pytest.raises(UnreadableFile, match="field larger than field limit"):
        await run_import(f"name\n{'x' * 1_000_001}\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no column names"),
        (b"\n\n", "has no column names"),
        (b",,\n , ,\n", "has no column names"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "text file"),
        (b"\xff\xfea", "not readable as utf-16"),
        (b"colour,shape\nred,round\n", "--map COLUMN=FIELD"),
    ],
)
async def test_files_that_are_none(run_import: Import, content: bytes, words: str) -> None:
    """Are refused in words that say what to do."""
    with pytest.raises(ValueError, match=words):
        await run_import(content)


async def test_a_header_alone_is_an_empty_import_and_a_missing_file_an_error(
    run_import: Import, tmp_path: Path
) -> None:
    """The one is fine, the other is named."""
    status, outcome = await run_import("name,city\n")
    assert (status, outcome["read"]) == (0, 0)
    with pytest.raises(UnreadableFile, match=r"nowhere\.csv: No such file"):
        await run_import(tmp_path / "nowhere.csv")
    with pytest.raises(LookupError, match="known are acme, globex"):
        await run_import("name\nx\n", tenant="nobody")
    with pytest.raises(ValueError, match="one by one"):
        await run_import("name\nx\n", files=[tmp_path / "a" / "x.csv", tmp_path / "b" / "x.csv"])


async def test_map_overrules_the_guess_and_says_what_is_wrong(crm: Crm, run_import: Import) -> None:
    """A field may be taken from another column, a column dropped."""
    status, outcome = await run_import(
        "alias,name,city\nOak,Acorn,Leeds\n", map=["alias=name", "city="]
    )
    assert (status, outcome["mapping"]) == (0, {"alias": "name", "city": ""})
    (record,) = await listed(crm)
    assert (record["name"], record["name_2"], record["city"]) == ("Oak", "Acorn", None)
    for wrong, words in (
        ("colour=name", "there is no column 'colour'"),
        ("alias=colour", "have no field 'colour'"),
    ):
        with pytest.raises(WrongMapping, match=words):
            await run_import("name,alias\nAcorn,Oak\n", map=[wrong])


async def test_import_with_the_cache_server_away_leaves_no_old_list_anywhere(
    crm: Crm, database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows in the outbox are found by the process that still reaches the server; it returns
    when none can be old."""
    path = tmp_path / "accounts.csv"
    path.write_text("name\nAcorn\n")
    options = argparse.Namespace(
        files=[path], kind="accounts", tenant="acme", map=[], dry_run=False, rejects=None, json=True
    )
    settings = Settings(jwt_secret=SECRET, respcache_key=SECRET)
    assert await listed(crm, "accounts") == []
    urls = {"database_url": database_url, "cache_url": "redis://127.0.0.1:1"}
    assert await import_files(settings, options, **urls) == 0
    assert [record["name"] for record in await listed(crm, "accounts")] == ["Acorn"]
    assert await stored(crm) == 1
    assert await import_files(settings, options, database_url=database_url, cache_url=None) == 0


async def test_stages_dates_and_amounts_of_deals(crm: Crm, run_import: Import) -> None:
    """The words of other systems; one format of dates in a column, found by all of its values."""
    await crm.save(crm.account("acme", "Isdom"))
    status, outcome = await run_import(
        "opportunity_id,account,product,deal_stage,close_date,close_value\n"
        'A1,Isdom,GTX,Won,03/04/2017,"1,054"\nA2,Isdom,GTX,Engaging,25/04/2017,\nA3,,GTX,Lost,,0\n',
        "opportunities",
    )
    assert (status, counts(outcome)) == (0, (3, 0, 0, 0))
    found = {record["opportunity_id"]: record for record in await listed(crm, "opportunities")}
    assert [
        (found[key]["name"], found[key]["stage"], found[key]["close_date"])
        for key in ("A1", "A2", "A3")
    ] == [
        ("Isdom - GTX", "closed_won", "2017-04-03"),
        ("Isdom - GTX", "qualification", "2017-04-25"),
        ("GTX", "closed_lost", None),
    ]
    assert float(found["A1"]["amount"]) == 1054


def test_numbers_and_dates_are_read_as_people_write_them() -> None:
    """Thousands, currencies, decimal commas; a format fits a whole column or none."""
    written = {
        "1,234.50": "1234.50",
        "1.234,50": "1234.50",
        "€ 1,234": "1234",
        "12,5": "12.5",
        "-7": "-7",
        "1 000": "1000",
    }
    assert {text: read_number(text) for text in written} == written
    assert date_format(["01-02-17", "25-12-17", ""]) == "%d-%m-%y"
    assert date_format(["01/25/2017"]) == "%m-%d-%Y"
    assert date_format(["2017-01-25", "25.01.2017"]) is None


def test_each_field_is_guessed_from_one_column_only() -> None:
    """The first that fits."""
    assert guess_mapping(["Company", "Organization", "E-mail"], "accounts", ["name", "email"]) == {
        "Company": "name",
        "E-mail": "email",
    }


@given(
    st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\x00\r")),
            min_size=3,
            max_size=3,
        ),
        max_size=8,
    )
)
def test_any_cells_survive_being_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    """Quotes, delimiters, line breaks, every script."""
    path = tmp_path_factory.mktemp("csv") / "any.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["a", "b", "c"], *rows])
    read = [cells for _, cells in CsvFile.open(path).rows()]
    assert read == [row for row in rows if any(cell.strip() for cell in row)]
