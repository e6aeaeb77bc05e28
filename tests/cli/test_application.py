"""Commands that ask a running application: the CRM with its demo data, met as a superadmin, a
tenant's admin and a manager."""

import json
import os
import pty
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import msgspec
import pytest

from respcache.ops.cli.tail import _line  # private: no test can cause such an event
from respcache.ops.feed import Event
from tests.crm.system import System

from .conftest import COMMAND, Done, Run, clean, document

Ask = Callable[..., Done]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One system for all of these."""
    started = System(tmp_path_factory.mktemp("system") / "data")
    try:
        yield started.ready()
    finally:
        started.end()


@pytest.fixture(scope="module")
def tokens(system: System) -> dict[str, str]:
    """By who they belong to."""
    people = {
        "root": ("acme", "superadmin"),
        "admin": ("acme", "admin"),
        "manager": ("globex", "manager"),
        "nobody": ("acme", "employee"),
    }
    return {
        name: system.command("token", "--tenant", who[0], "--role", who[1]).stdout.strip()
        for name, who in people.items()
    }


@pytest.fixture
def ask(respcache: Run, system: System, tokens: dict[str, str]) -> Ask:
    """Run a command as somebody, after a list was read twice: a miss and a hit at least."""
    for _ in range(2):
        httpx2.get(
            f"{system.base}/api/accounts?limit=2",
            headers={"authorization": f"Bearer {tokens['admin']}"},
        )

    def run(*arguments: str, who: str = "root", **environment: str) -> Done:
        return respcache(
            *arguments,
            RESPCACHE_URL=f"{system.base}/cache",
            RESPCACHE_TOKEN=tokens[who],
            **environment,
        )

    return run


def first_key(ask: Ask) -> str:
    """Name a stored answer."""
    return str(
        document(ask("keys", "--tenant", "acme", "--module", "accounts", "--json"))["keys"][0][
            "key"
        ]
    )


COMMANDS = [
    ("status",),
    ("stats",),
    ("stats", "--by", "routes"),
    ("stats", "--by", "tenants"),
    ("stats", "--tenant", "acme"),
    ("stats", "--module", "accounts"),
    ("keys",),
    ("keys", "--tenant", "acme", "--module", "accounts", "--limit", "5"),
    ("explain", "/api/accounts?limit=2"),
    ("explain", "/nowhere", "--anonymous"),
    ("purge", "--tenant", "acme", "--dry-run"),
    ("purge", "--tenant", "acme", "--module", "leads", "--yes"),
    ("config",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_prints_text_for_people_and_json_for_programs(
    ask: Ask, command: tuple[str, ...]
) -> None:
    """No colours in a pipe, no blanks at the end of lines, nothing on standard error."""
    said = ask(*command)
    assert (said.returncode, said.stderr, "\x1b" in said.stdout) == (0, "", False)
    assert said.stdout.strip()
    assert not re.search(r" $", said.stdout, re.MULTILINE)
    told = ask(*command, "--json")
    assert (told.returncode, told.stderr) == (0, "")
    assert document(told)


def test_status_says_how_it_is(ask: Ask) -> None:
    """And of a tenant's admin only what is the tenant's."""
    said = ask("status").stdout
    assert re.search(r"^server +up, valkey", said, re.MULTILINE)
    assert re.search(r"^hit ratio +[\d.]+%$", said, re.MULTILINE)
    own = document(ask("status", "--json", who="admin"))
    assert (own["processes"], own["server"]) == ([], None)


def test_status_fails_while_the_cache_is_switched_off(
    ask: Ask, system: System, tokens: dict[str, str]
) -> None:
    """A check that has failed: status 1, with the reason."""
    headers = {"authorization": f"Bearer {tokens['root']}"}
    httpx2.post(
        f"{system.base}/cache/api/switch", json={"off": True}, headers=headers
    ).raise_for_status()
    try:
        done = ask("status")
        assert (done.returncode, "! the cache is switched off" in done.stdout) == (1, True)
        assert document(ask("status", "--json"))["problems"]
    finally:
        httpx2.post(
            f"{system.base}/cache/api/switch", json={"off": False}, headers=headers
        ).raise_for_status()


def test_a_key_is_looked_at_and_its_body_printed(ask: Ask) -> None:
    """With its certificate and verdict; a key that is not there is status 1."""
    key = first_key(ask)
    said = ask("get", key).stdout
    assert said.startswith(key)
    assert re.search(r"^verdict +valid: ", said, re.MULTILINE)
    assert '"accounts"' in ask("get", key, "--body").stdout
    assert document(ask("get", key, "--json"))["key"] == key
    gone = ask("get", key[:-4] + "0000")
    assert (gone.returncode, gone.stdout) == (1, "")


def test_explain_says_why(ask: Ask) -> None:
    """As who asks, as somebody else, as nobody; never with the token."""
    found = document(ask("explain", "/api/accounts?limit=2", "--json", who="admin"))
    assert (found["outcome"], found["policy"]["module"]) == ("hit", "accounts")
    said = ask("explain", "/api/accounts?limit=2", who="admin").stdout
    for name in (
        "route",
        "policy",
        "reads",
        "caller",
        "key",
        "depends on",
        "generation",
        "certificate",
        "verdict",
        "serving lease",
    ):
        assert re.search(rf"^{name} +\S", said, re.MULTILINE), name
    assert "eyJ" not in said
    assert document(ask("explain", "/api/accounts", "--anonymous", "--json"))["outcome"] == "bypass"


def test_a_purge_says_what_it_would_do_and_does_it(
    ask: Ask, system: System, tokens: dict[str, str]
) -> None:
    """After it, the next read is a miss."""
    preview = document(
        ask("purge", "--tenant", "acme", "--module", "accounts", "--dry-run", "--json")
    )
    assert (preview["dry_run"], preview["entries"] > 0) == (True, True)
    done = document(ask("purge", "--tenant", "acme", "--module", "accounts", "--yes", "--json"))
    assert (done["confirmed"], done["module"]) == (True, "accounts")
    answer = httpx2.get(
        f"{system.base}/api/accounts?limit=2",
        headers={"authorization": f"Bearer {tokens['admin']}"},
    )
    assert "fwd=stale" in answer.headers["cache-status"]
    key = first_key(ask)
    assert document(ask("purge", "--key", key, "--yes", "--json"))["key"] == key
    assert ask("get", key).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "who", "status"),
    [
        (("purge", "--tenant", "acme"), "root", 4),
        (("purge", "--tenant", "globex", "--yes"), "manager", 4),
        (("config",), "admin", 4),
        (("status",), "nobody", 4),
        (("keys", "--tenant", "globex"), "admin", 1),
        (("purge", "--tenant", "acme", "--module", "nowhere", "--yes"), "root", 1),
        (("purge", "--yes"), "root", 2),
        (("purge", "--tenant", "acme", "--key", "x", "--yes"), "root", 2),
        (("purge", "--key", "x", "--module", "y", "--yes"), "root", 2),
        (("explain", "api/accounts"), "root", 2),
        (("explain", "/api/accounts", "-H", "hidden-one"), "root", 2),
        (("keys", "--limit", "0"), "root", 2),
        (("stats", "--by", "colours"), "root", 2),
        (("stats", "--by", "tenants", "--module", "accounts"), "root", 2),
        (("status", "--url", "ftp://127.0.0.1"), "root", 2),
        (("status", "--url", "http://me:hidden-one@127.0.0.1:1/cache"), "root", 2),
        (("status", "--url", "http://127.0.0.1:1/cache?x=1"), "root", 2),
        (("status", "--url", "http://127.0.0.1:1/cache"), "root", 3),
        (("status", "--url", "{base}/nowhere"), "root", 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_every_failure_has_its_exit_status(
    ask: Ask, system: System, arguments: tuple[str, ...], who: str, status: int
) -> None:
    """One line on standard error, nothing of a traceback, no secret; with --json a document that
    says the same."""
    given = [argument.format(base=system.base) for argument in arguments]
    done = ask(*given, who=who)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert "hidden-one" not in done.stderr
    # those are refused before a command begins
    if "colours" not in arguments and "0" not in arguments:
        assert document(ask(*given, "--json", who=who))["error"]["message"] in done.stderr


def test_a_token_comes_from_a_file_that_nobody_else_can_read(
    respcache: Run, system: System, tokens: dict[str, str], tmp_path: Path
) -> None:
    """Or from standard input; without one it is said how to give one."""
    url = f"{system.base}/cache"
    file = tmp_path / "token"
    file.write_text(tokens["root"] + "\n")
    file.chmod(0o644)
    shown = respcache("status", "--token-file", str(file), RESPCACHE_URL=url)
    assert (shown.returncode, "chmod 600" in shown.stderr) == (2, True)
    file.chmod(0o600)
    assert respcache("stats", "--token-file", str(file), RESPCACHE_URL=url).returncode == 0
    assert (
        respcache("stats", "--token-file", "-", stdin=tokens["root"], RESPCACHE_URL=url).returncode
        == 0
    )
    assert (
        respcache("status", "--token-file", str(tmp_path / "none"), RESPCACHE_URL=url).returncode
        == 2
    )
    without = respcache("status", RESPCACHE_URL=url)
    assert (without.returncode, "RESPCACHE_TOKEN" in without.stderr) == (4, True)


@pytest.mark.parametrize("token", ["hidden-one\nmore", "hidden-one more", "hidden-öne", ""])
def test_a_token_that_cannot_be_one_is_not_shown(respcache: Run, token: str) -> None:
    """Nor sent: nobody is asked."""
    done = respcache("status", RESPCACHE_URL="http://127.0.0.1:1/cache", RESPCACHE_TOKEN=token)
    assert (done.returncode, done.stdout) == (2 if token else 3, "")
    assert "hidden" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_token_that_nobody_knows_is_refused_with_what_to_do(
    respcache: Run, system: System
) -> None:
    """The fix is a new one."""
    done = respcache("status", RESPCACHE_URL=f"{system.base}/cache", RESPCACHE_TOKEN="wrong")
    assert (done.returncode, "set RESPCACHE_TOKEN" in done.stderr) == (4, True)


def test_a_search_shows_no_more_than_was_asked_for_in_the_order_of_names(
    ask: Ask, system: System, tokens: dict[str, str]
) -> None:
    """And says when there is more."""
    for limit in range(1, 9):
        httpx2.get(
            f"{system.base}/api/leads?limit={limit}",
            headers={"authorization": f"Bearer {tokens['admin']}"},
        )
    everything = document(ask("keys", "--json"))
    names = [one["key"] for one in everything["keys"]]
    assert (names == sorted(names), everything["complete"], len(names) > 1) == (True, True, True)
    part = document(ask("keys", "--limit", "1", "--json"))
    assert (len(part["keys"]), part["complete"], part["scanned"] <= part["total"]) == (
        1,
        False,
        True,
    )
    assert "there may be more: --limit 10" in ask("keys", "--limit", "1").stdout


def test_a_tenant_is_looked_for_as_it_was_spelt(ask: Ask) -> None:
    """Also where an address would end."""
    done = ask("stats", "--by", "tenants", "--tenant", "no?body")
    assert (done.returncode, "no tenant 'no?body'" in done.stderr) == (1, True)


def test_a_purge_of_nobody_is_doubted(ask: Ask) -> None:
    """It is done, as applications need not name all of their tenants; a key that is gone is said to
    be gone."""
    done = ask("purge", "--tenant", "amce", "--dry-run")
    assert (done.returncode, "has no tenant named 'amce'" in done.stderr) == (0, True)
    assert ask("purge", "--tenant", "Acme", "--dry-run").stderr == ""
    key = first_key(ask)
    assert "confirmed in all processes" in ask("purge", "--key", key, "--yes").stdout
    assert "is not stored on the server" in ask("purge", "--key", key, "--yes").stdout


@pytest.mark.parametrize(
    "given",
    [
        "host=h password=hidden-one",
        "me:hidden-one@h/db",
        "//me:hidden-one@h/db",
        "redis://me@h?password=hidden-one",
    ],
)
def test_an_address_that_is_none_is_not_shown(respcache: Run, given: str) -> None:
    """It may hold a password in a form that nobody knows."""
    done = respcache("config", "--json", DATABASE_URL=given)
    assert "hidden-one" not in done.stdout
    assert [
        one["source"] for one in document(done)["environment"] if one["name"] == "DATABASE_URL"
    ] == ["environment"]


def test_config_shows_no_secret(ask: Ask) -> None:
    """Values and sources of this environment and of the application."""
    done = ask(
        "config", "--json", REDIS_CACHE_URL="redis://me:hidden-one@h/1", RESPCACHE_KEY="hidden-one"
    )
    report = document(done)
    assert "hidden-one" not in done.stdout
    local = {one["name"]: (one["value"], one["source"]) for one in report["environment"]}
    assert local["REDIS_CACHE_URL"] == ("redis://me:***@h/1", "environment")
    assert (local["RESPCACHE_KEY"], local["REDIS_URL"]) == (
        ("set", "environment"),
        ("not set", "default"),
    )
    assert report["application"]


def on_a_terminal(*arguments: str, typed: str = "", **environment: str) -> tuple[int, str]:
    """Run the command on a terminal of its own, type something, and return its status and what was
    shown."""
    ours, theirs = pty.openpty()
    environment = clean(TERM="xterm-256color", **environment)
    process = subprocess.Popen(
        [COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
        if typed and b"to continue:" in shown:
            os.write(ours, typed.encode() + b"\n")
            typed = ""
    os.close(ours)
    return process.wait(30), shown.decode()


def test_a_terminal_has_colours_unless_it_wants_none(
    ask: Ask, system: System, tokens: dict[str, str]
) -> None:
    """NO_COLOR is honoured."""
    given = {"RESPCACHE_URL": f"{system.base}/cache", "RESPCACHE_TOKEN": tokens["root"]}
    colours = re.compile(r"\x1b\[[0-9;]*3[0-9]m")
    assert colours.search(on_a_terminal("status", **given)[1])
    assert not colours.search(on_a_terminal("status", NO_COLOR="1", **given)[1])


@pytest.mark.parametrize(("typed", "status"), [("acme", 0), ("globex", 4), ("", 4)])
def test_a_purge_asks_for_the_name_of_the_tenant(
    ask: Ask, system: System, tokens: dict[str, str], typed: str, status: int
) -> None:
    """Anything else than the name: nothing is purged."""
    given = {"RESPCACHE_URL": f"{system.base}/cache", "RESPCACHE_TOKEN": tokens["root"]}
    code, shown = on_a_terminal(
        "purge", "--tenant", "acme", "--module", "leads", typed=typed or " ", **given
    )
    assert code == status, shown
    assert ("confirmed in all processes" in shown) == (status == 0)
    assert ("nothing was purged" in shown) == (status == 4)


def test_tail_tells_of_a_write_and_ends_when_it_is_not_to_follow(
    ask: Ask, system: System, tokens: dict[str, str]
) -> None:
    """With its cause; one document a line. The feed is published in the background, so it is looked
    at until it is there."""
    headers = {"authorization": f"Bearer {tokens['admin']}"}
    httpx2.post(
        f"{system.base}/api/accounts", json={"name": "Acorn"}, headers=headers
    ).raise_for_status()
    deadline = time.monotonic() + 60
    while True:
        done = ask("tail", "--no-follow", "--module", "accounts", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        if "POST /api/accounts" in [json.loads(line)["cause"] for line in done.stdout.splitlines()]:
            break
        assert time.monotonic() < deadline, done.stdout
    assert "POST /api/accounts" in ask("tail", "--no-follow").stdout


def test_the_last_lines_of_a_module_are_of_that_module(
    ask: Ask, system: System, tokens: dict[str, str]
) -> None:
    """However many of others came after them."""
    ask("purge", "--tenant", "acme", "--module", "contacts", "--yes")
    ask("purge", "--tenant", "acme", "--module", "leads", "--yes")
    deadline = time.monotonic() + 60
    while "leads" not in ask("tail", "--no-follow", "-n", "1").stdout:
        assert time.monotonic() < deadline
    (event,) = [
        json.loads(line)
        for line in ask(
            "tail", "--no-follow", "-n", "1", "--module", "contacts", "--json"
        ).stdout.splitlines()
    ]
    assert event["modules"] == ["contacts"]


def test_an_invalidation_is_told_in_one_line() -> None:
    """When, what became of it, how fast, whose, what, why, by whom; what is not in the feed is
    counted."""
    event = Event(
        id="1",
        at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        tenant="acme",
        modules=("leads",),
        tables=("leads",),
        cause="PUT /api/leads/{id}",
        outcome="confirmed",
        seconds=0.0031,
        process="host:7",
        skipped=2,
    )
    line = _line(msgspec.to_builtins(event)).plain
    assert line.startswith("2026-01-02 03:04:05")
    for words in (
        "confirmed after 3.1 ms",
        "acme",
        "leads (leads)",
        "PUT /api/leads/{id}",
        "host:7",
        "2 more",
    ):
        assert words in line
