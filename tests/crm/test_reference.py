"""Compares docs/reference.md with the code: nothing is missing, nothing is left over, and every
default is the real one."""

import ast
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import crm.errors
import respcache
from crm.cli.commands import main
from crm.settings import Settings
from respcache import Cache
from respcache.core import errors, keys
from respcache.core.http_caching import KEPT_HEADERS
from respcache.core.policy import DEFAULT_TTL_S
from respcache.decorators import policy_of
from respcache.integrations.prometheus import Endpoint
from respcache.ops.admin import Admin
from respcache.ops.cli.config import READ
from respcache.ops.postgres_audit_log import PostgresAuditLog
from respcache.ops.stats.publisher import StatsPublisher
from respcache.read.verifier import EXTENSION
from respcache.writes.postgres import PostgresOutbox
from respcache.writes.sqlalchemy import watch

from .conftest import MODULES, Crm
from .test_statements import STATEMENTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference.md").read_text()
DIGEST = bytes(range(16))
PROCESS = "0123456789abcdef"
OPTIONS = {
    "Cache": Cache,
    "StatsPublisher": StatsPublisher,
    "Endpoint": Endpoint,
    "RedisStore": respcache.RedisStore,
    "PostgresOutbox": PostgresOutbox,
    "PostgresAuditLog": PostgresAuditLog,
    "Admin": Admin,
    "MemoryStore": respcache.MemoryStore,
    "cache_list": respcache.cache_list,
    "watch": watch,
    "get_or_set": Cache.get_or_set,
}
ITEM = re.compile(r"\* `(?P<name>[^`]+)`(?: \((?P<note>default `[^`]*`|[a-z]+)\))?:(?: |$)")
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


def listed(heading: str) -> dict[str, str]:
    """Return the list of a section: each name with its default or the word in parentheses.

    Every item must have the form "* `name`: ...", "* `name` (word): ..." or "* `name` (default
    `value`): ...".
    """
    found: dict[str, str] = {}
    for item in re.findall(r"^ *[*-] .*$", section(heading), re.MULTILINE):
        match = ITEM.match(item)
        assert match is not None, item
        assert match["name"] not in found, item
        found[match["name"]] = (match["note"] or "").removeprefix("default ").strip("`")
    assert found, heading
    return found


def table(heading: str) -> dict[str, str]:
    """Return the one table of a section: the first cell, without quotes, with the second."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    rows = [re.fullmatch(r"\| `([^`]+)` \| ([^|]+) \|", line) for line in lines[2:]]
    assert rows
    assert None not in rows, heading
    found = {row[1]: row[2] for row in rows if row is not None}
    assert len(found) == len(rows), heading
    return found


def sources(folder: str = "src") -> Iterator[ast.AST]:
    """Walk the syntax of everything in a folder."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text()))


def literals(node: ast.AST) -> Iterator[str]:
    """Yield the strings in a piece of syntax."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str | bytes):
            yield part.value if isinstance(part.value, str) else part.value.decode("latin-1")


def called(node: ast.AST) -> str:
    """Return the name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", None) or getattr(function, "id", "")


def default_of(parameter: inspect.Parameter) -> str:
    """Return the default of a parameter as the page writes it."""
    if parameter.default is parameter.empty:
        return "required"
    default = getattr(parameter.default, "func", parameter.default)
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    return f"time.{default.__name__}" if callable(default) else repr(default)


def test_keys_are_those_that_the_code_builds() -> None:
    """The page has one item for each function that builds a key."""
    holes = {
        "{tenant}": "abc",
        "{module}": "leads",
        "{kind}": "count",
        "{digest}": DIGEST.hex(),
        "{process}": PROCESS,
        "{bucket}": "7",
    }
    built = {
        keys.entry_key("abc", "leads", "count", digest=DIGEST),
        keys.lock_key("abc", "leads", "count", digest=DIGEST),
        keys.generation_key("abc"),
        keys.generation_key(keys.SHARED),
        keys.SWITCHES_KEY,
        keys.EPOCH_KEY,
        keys.FEED_KEY,
        keys.FED_KEY,
        keys.PROCESSES_KEY,
        keys.counters_key(PROCESS),
        keys.tenants_key(PROCESS),
        keys.routes_key(PROCESS),
        keys.series_key(7),
    }
    filled = set()
    for pattern in listed("## Keys"):
        for hole, value in holes.items():
            pattern = pattern.replace(hole, value)
        filled.add(pattern)
    assert filled == built
    assert all(f"`{kind}`" in section("## Keys") for kind in keys.KINDS)


@pytest.mark.anyio
async def test_no_other_key_appears_on_the_server(crm: Crm, valkey_url: str) -> None:
    """After reads, writes, a login and the kill switch, the page lists every key."""
    abe = crm.as_user("abe")
    for module in MODULES:
        await abe.get(f"/api/{module}")
    await abe.post("/api/accounts", json={"name": "Acorn"})
    await crm.as_user("root").get("/api/accounts")
    await crm.cache.disable()
    publisher = crm.cache.publisher
    assert isinstance(publisher, StatsPublisher)
    await publisher.publish()
    patterns = [re.sub(r"\\\{\w+\\\}", r"[^:]+", re.escape(key)) for key in listed("## Keys")]
    with redis.Redis.from_url(valkey_url) as client:
        there = [key.decode() for key in client.scan_iter()]
    assert len(there) > len(MODULES)
    assert [
        key for key in there if not any(re.fullmatch(pattern, key) for pattern in patterns)
    ] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_defaults_are_those_of_the_signature(name: str) -> None:
    """Names, defaults and order are the same."""
    parameters = inspect.signature(OPTIONS[name]).parameters
    assert list(listed(f"### {name}").items()) == [
        (key, default_of(value)) for key, value in parameters.items() if key != "self"
    ]


def test_the_other_decorators_differ_in_their_ttl_only() -> None:
    """Each kind has the TTL that the page names."""
    for kind, ttl in DEFAULT_TTL_S.items():
        decorator = getattr(respcache, f"cache_{kind}")
        assert list(inspect.signature(decorator).parameters) == list(listed("### cache_list"))
        policy = policy_of(decorator("books")(lambda: None))
        assert policy is not None
        assert (policy.kind, policy.ttl_s) == (kind, ttl)
        assert re.search(rf"{ttl:.0f}\s+for\s+`cache_{kind}`", section("### cache_list"))


def test_environment_is_that_of_the_settings() -> None:
    """Names and defaults are the same."""
    fields = Settings.model_fields
    assert listed("## Environment") == {
        name.upper(): "unset" if field.default is None else str(field.default)
        for name, field in fields.items()
    }


def test_environment_of_the_command_is_what_it_reads() -> None:
    """Names and defaults are the same."""
    assert listed("## Environment of the command") == {
        name: default or "unset" for name, (default, _) in READ.items()
    }


def test_fields_of_the_verifier_are_those_that_it_reports() -> None:
    """The page lists every field."""
    reported = {
        key.value
        for node in sources("src/respcache/read")
        if isinstance(node, ast.FunctionDef) and node.name == "to_dict"
        for part in ast.walk(node)
        if isinstance(part, ast.Dict)
        for key in part.keys
        if isinstance(key, ast.Constant)
    }
    assert set(listed("## Verifier")) == reported
    (item,) = re.findall(r"^\* `inconclusive`:(.*?)^\* ", section("## Verifier"), re.M | re.S)
    reasons = {
        text
        for node in sources("src/respcache/read")
        if called(node) == "Inconclusive"
        for text in literals(node)
    }
    assert set(re.findall(r"`([a-z ]+)`", item.replace("\n ", ""))) == {*reasons, "slow"}
    assert f"`{EXTENSION}`" in section("## Verifier")


def test_commands_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command is listed, in the parser's order."""
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    assert list(table("## Commands")) == commands


def test_headers_are_those_in_the_code() -> None:
    """The page lists every header of ours, and every header that is kept with a body."""
    used = {
        text.lower() for node in sources() for text in literals(node) if OUR_HEADERS.fullmatch(text)
    }
    used -= {"cache-stats", "x-gzip", *(header.decode() for header in KEPT_HEADERS)}
    named = (*listed("### Request headers"), *listed("### Response headers"))
    assert {name.lower() for name in named} == used
    text = section("## Headers").partition("Stored with")[2].partition("All other")[0]
    assert set(re.findall(r"`([a-z-]+)`", text)) == {header.decode() for header in KEPT_HEADERS}


def test_words_of_cache_status_are_those_in_the_code() -> None:
    """The code decides on bypasses and refusals in the places that this test collects from."""
    refusals = [
        node
        for folder in ("src/respcache/core", "src/respcache/read")
        for node in sources(folder)
        if isinstance(node, ast.FunctionDef) and node.name in ("refusal", "_refusal")
    ]
    assert len(refusals) == 2
    words = {
        text
        for refusal in refusals
        for part in ast.walk(refusal)
        if isinstance(part, ast.Return)
        for text in literals(part)
    }
    for node in sources():
        if called(node) == "Bypass":
            words.update(literals(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.update(re.findall(r"^detail=([a-z-]+)$", node.value))
    assert words == set(listed("### Details of Cache-Status"))
    forwards = {
        text for node in sources() for text in literals(node) if re.fullmatch(r"fwd=[a-z-]+", text)
    }
    assert forwards | {"stored", "collapsed"} == set(listed("### Cache-Status"))


def test_errors_are_those_of_the_library_and_the_api() -> None:
    """The page lists every class, and every status that the application responds with."""
    classes, statuses = listed("### Errors of the library"), listed("### Status codes of the API")
    assert set(classes) == {name for name, value in vars(errors).items() if inspect.isclass(value)}
    raising = {
        name
        for name, value in vars(crm.errors).items()
        if inspect.isclass(value) and issubclass(value, crm.errors.ApiError)
    }
    used: set[Any] = set()
    for node in sources():
        if isinstance(node, ast.Call) and called(node) in {*raising, "fail", "HTTPException"}:
            given = node.args[0]
            options = [given.body, given.orelse] if isinstance(given, ast.IfExp) else [given]
            used.update(
                option.value
                for option in options
                if isinstance(option, ast.Constant) and isinstance(option.value, int)
            )
    assert {int(status) for status in statuses} == used


def test_statements_are_those_that_are_counted() -> None:
    """The page has the table of the test that counts them."""
    found = {request: int(count) for request, count in table("## Statements").items()}
    assert found == STATEMENTS
