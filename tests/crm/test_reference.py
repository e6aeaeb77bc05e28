"""docs/reference.md against the code: nothing missing, nothing left over, every default the real
one."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import respcache
from crm.cli.commands import main
from crm.settings import Settings
from respcache import Cache
from respcache.core import errors, keys
from respcache.core.http_caching import KEPT_HEADERS
from respcache.core.policy import DEFAULT_TTL_S
from respcache.integrations.prometheus import Endpoint
from respcache.ops.admin import Admin
from respcache.ops.cli.config import READ
from respcache.ops.postgres_audit_log import PostgresAuditLog
from respcache.ops.publisher import StatsPublisher
from respcache.writes.postgres import PostgresOutbox
from respcache.writes.sqlalchemy import watch

from .conftest import MODULES, Crm
from .test_statements import STATEMENTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference.md").read_text()
DIGEST = bytes(range(16))
OPTIONS = {
    "Cache": Cache, "RedisStore": respcache.RedisStore, "MemoryStore": respcache.MemoryStore, "cache_list": respcache.cache_list,
    "Endpoint": Endpoint, "PostgresOutbox": PostgresOutbox, "watch": watch, "get_or_set": Cache.get_or_set, "Board": StatsPublisher,
    "Admin": Admin, "PostgresAuditLog": PostgresAuditLog,
}  # fmt: skip
OUR_HEADERS = re.compile(r"(x|cache|retry|www)-[a-z-]+|authorization", re.IGNORECASE)


def section(heading: str) -> str:
    """Return the text of a section, up to the next one of its level or above."""
    level, name = heading.split(" ", 1)
    found = re.search(
        rf"^{level} {re.escape(name)}\n(.*?)(?=^#{{2,{len(level)}}} |\Z)",
        PAGE,
        re.MULTILINE | re.DOTALL,
    )
    assert found is not None, heading
    return found[1]


def tables(heading: str) -> list[dict[str, str]]:
    """Return the tables of a section: first cell to second cell, without quotes."""
    found: list[dict[str, str]] = []
    for line in section(heading).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|---"):
            found.append({})
        elif (
            line.startswith("| ")
            and found
            and cells[0] not in ("option", "header", "word", "`detail=`", "error", "status")
        ):
            found[-1][cells[0].strip("`")] = cells[1].strip("`")
    return found


def sources() -> Iterator[ast.AST]:
    """Walk the syntax of everything under src."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text()))


def literals(node: ast.AST) -> Iterator[str]:
    """Yield the strings in a piece of syntax."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str | bytes):
            yield part.value if isinstance(part.value, str) else part.value.decode("latin-1")


def called(node: ast.AST) -> str:
    """Name what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", None) or getattr(function, "id", "")


def test_keys_are_those_that_the_code_builds() -> None:
    """One row for each function that builds one."""
    holes = {
        "{tenant}": "abc", "{module}": "leads", "{kind}": "count", "{digest}": DIGEST.hex(), "{process}": "0123456789abcdef",
        "{bucket}": "7",
    }  # fmt: skip
    (listed,) = tables("## Keys")
    listed.pop("key", None)
    built = {
        keys.entry_key("abc", "leads", "count", DIGEST), keys.lock_key("abc", "leads", "count", DIGEST),
        keys.generation_key("abc"), keys.generation_key(keys.SHARED), keys.SWITCHES_KEY, keys.EPOCH_KEY, keys.FEED_KEY,
        keys.FED_KEY,
        keys.PROCESSES_KEY, keys.counters_key("0123456789abcdef"), keys.tenants_key("0123456789abcdef"),
        keys.routes_key("0123456789abcdef"), keys.series_key(7),
    }  # fmt: skip
    filled = set()
    for pattern in listed:
        for hole, value in holes.items():
            pattern = pattern.replace(hole, value)
        filled.add(pattern)
    assert filled == built
    assert all(f"`{kind}`" in section("## Keys") for kind in keys.KINDS)


@pytest.mark.anyio
async def test_no_other_key_appears_on_the_server(crm: Crm, valkey_url: str) -> None:
    """After reads, writes, a login and the kill switch."""
    abe = crm.as_user("abe")
    for module in MODULES:
        await abe.get(f"/api/{module}")
    await abe.post("/api/accounts", json={"name": "Acorn"})
    await crm.as_user("root").get("/api/accounts")
    await crm.cache.disable()
    publisher = crm.cache.publisher
    assert isinstance(publisher, StatsPublisher)
    await publisher.publish()
    (listed,) = tables("## Keys")
    patterns = [re.sub(r"\\\{\w+\\\}", r"[^:]+", re.escape(pattern)) for pattern in listed]
    with redis.Redis.from_url(valkey_url) as client:
        there = [key.decode() for key in client.scan_iter()]
    assert len(there) > len(MODULES)
    assert [
        key for key in there if not any(re.fullmatch(pattern, key) for pattern in patterns)
    ] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_defaults_are_those_of_the_signature(name: str) -> None:
    """In their order."""

    def default(parameter: inspect.Parameter) -> str:
        if parameter.default is parameter.empty:
            return "required"
        default = getattr(parameter.default, "func", parameter.default)
        return f"time.{default.__name__}" if callable(default) else repr(default)

    parameters = inspect.signature(OPTIONS[name]).parameters
    (listed,) = tables(f"### {name}")
    assert list(listed.items()) == [
        (key, default(value)) for key, value in parameters.items() if key != "self"
    ]


def test_the_other_decorators_differ_in_their_ttl_only() -> None:
    """As the page says."""
    for kind, ttl in DEFAULT_TTL_S.items():
        parameters = inspect.signature(getattr(respcache, f"cache_{kind}")).parameters
        assert (list(parameters), parameters["ttl"].default) == (
            list(tables("### cache_list")[0]),
            ttl,
        )
        assert kind == "list" or f"{ttl:.0f}" in section("### cache_list")


def test_environment_is_that_of_the_settings() -> None:
    """Names and defaults."""
    (listed,) = tables("## Environment")
    listed.pop("variable", None)
    fields = Settings.model_fields
    assert listed == {
        name.upper(): "unset" if field.default is None else str(field.default)
        for name, field in fields.items()
    }


def test_environment_of_the_command_is_what_it_reads() -> None:
    """Names and defaults."""
    (listed,) = tables("## Environment of the command")
    listed.pop("variable", None)
    assert listed == {name: default or "unset" for name, (default, _) in READ.items()}


def test_commands_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them."""
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.search(r"\{([a-z,-]+)\}", capsys.readouterr().out)
    assert commands is not None
    (listed,) = tables("## Commands")
    listed.pop("command", None)
    assert list(listed) == commands[1].split(",")


def test_headers_are_those_in_the_code() -> None:
    """Every header of ours, and every header that is kept with a body."""
    asked, sent, _, _ = tables("## Headers")
    used = {
        text.lower() for node in sources() for text in literals(node) if OUR_HEADERS.fullmatch(text)
    }
    used -= {"cache-stats", "x-gzip", *(header.decode() for header in KEPT_HEADERS)}
    assert {name.lower() for name in (*asked, *sent)} == used
    kept = set(
        re.findall(
            r"`([a-z-]+)`",
            section("## Headers").partition("Stored with")[2].partition("All others")[0],
        )
    )
    assert kept == {header.decode() for header in KEPT_HEADERS}


def test_words_of_cache_status_are_those_in_the_code() -> None:
    """Collected from where bypasses and refusals are decided."""
    words: set[str] = set()
    for node in sources():
        if isinstance(node, ast.FunctionDef) and node.name in ("refusal", "_late_refusal"):
            words.update(
                text
                for part in ast.walk(node)
                if isinstance(part, ast.Return)
                for text in literals(part)
            )
        elif called(node) in ("Bypass", "_pass_through"):
            words.update(literals(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.update(re.findall(r"^detail=([a-z-]+)$", node.value))
    assert words == set(tables("## Headers")[3])
    forwards = {
        text for node in sources() for text in literals(node) if re.fullmatch(r"fwd=[a-z-]+", text)
    }
    assert forwards | {"stored", "collapsed"} == set(tables("## Headers")[2])


def test_errors_are_those_of_the_library_and_the_api() -> None:
    """Classes, and every status that the application answers with."""
    classes, statuses = tables("## Errors")
    assert set(classes) == {name for name, value in vars(errors).items() if inspect.isclass(value)}
    used: set[Any] = set()
    for node in sources():
        if isinstance(node, ast.Call) and called(node) in (
            "ApiError",
            "Refused",
            "fail",
            "HTTPException",
        ):
            given = node.args[0]
            options = [given.body, given.orelse] if isinstance(given, ast.IfExp) else [given]
            used.update(
                option.value
                for option in options
                if isinstance(option, ast.Constant) and isinstance(option.value, int)
            )
    assert {int(status) for status in statuses} == used


def test_statements_are_those_that_are_counted() -> None:
    """The table is the test's own."""
    (listed,) = tables("## Statements")
    listed.pop("request", None)
    assert {request: int(count) for request, count in listed.items()} == STATEMENTS


PAGES = [
    *sorted(path.name for path in (ROOT / "docs").glob("*.md")),
    "../README.md",
    "../ARCHITECTURE.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    """In backticks or as a link."""
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`((?:src|tests|docs|bench|examples)/[\w/.-]+)`", text)
    linked = [
        str(Path("docs") / page).rpartition("/")[0] + "/" + link
        for link in re.findall(r"\]\(([\w./-]+)\)", text)
    ]
    assert [path for path in (*named, *linked) if not (ROOT / path).exists()] == []
