"""``respcache doctor`` on set-ups that are really broken: each fault is found, with why it matters
and how to mend it."""

import asyncio
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy.ext.asyncio import create_async_engine

from respcache.core.epochs import Epoch
from respcache.core.keys import EPOCH_KEY
from respcache.core.serving_lease import OutboxPage
from respcache.ops.acl import DATA_PLANE
from respcache.ops.doctor import DoctorReport, check_secret, servers
from respcache.ops.doctor.secrets import is_local
from respcache.ops.doctor.servers import CheckedServer
from respcache.resp.url import ServerURL
from respcache.testing.servers import EmbeddedPostgres, EmbeddedValkey
from respcache.writes import triggers
from respcache.writes.postgres import PostgresOutbox
from respcache.writes.triggers import OUTBOX, Watched
from tests.conftest import administer

from .conftest import Done, Run, document, log_in_as

SECRET = "a8f0" * 16
MEMORY = {"maxmemory-policy": "noeviction", "appendonly": "yes"}
TABLES = "accounts,leads"

Make = Callable[..., EmbeddedValkey]
Sql = Callable[..., None]
Environment = dict[str, str]


@pytest.fixture(scope="module")
def memory_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server as agent memory needs it."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("memory") / "valkey", settings=MEMORY)
    try:
        yield server.start().url
    finally:
        server.stop()


@pytest.fixture
def sql(postgres_server: EmbeddedPostgres, bare_database: str) -> Sql:
    """Run statements in the database, as an administrator would."""
    return lambda *statements: administer(postgres_server, *statements, database=bare_database)


@pytest.fixture
def environment(valkey_url: str, memory_url: str, empty_database_url: str, sql: Sql) -> Environment:
    """Everything as it should be: an outbox, and two tables that are watched."""
    statements = [
        f"CREATE TABLE {name} (id int PRIMARY KEY, tenant_id text)" for name in TABLES.split(",")
    ]
    triggers.create_outbox(statements.append)
    triggers.create_triggers(statements.append, [Watched("accounts"), Watched("leads")])
    sql(*statements)
    url = empty_database_url.replace("+asyncpg", "")
    return {
        "REDIS_CACHE_URL": valkey_url,
        "REDIS_URL": memory_url,
        "DATABASE_URL": url,
        "RESPCACHE_KEY": SECRET,
    }


def finding(done: Done, about: str, check: str, level: str) -> dict[str, Any]:
    """Return the one finding of this kind, from ``--json``; unless all is well it says why it
    matters and how to mend it."""
    report = document(done)
    assert done.returncode == (1 if report["faults"] else 0)
    found = [
        one
        for one in report["findings"]
        if (one["about"], one["check"], one["level"]) == (about, check, level)
    ]
    assert len(found) == 1, report["findings"]
    assert level == "ok" or (found[0]["why"] and found[0]["fix"])
    return dict(found[0])


def test_a_right_set_up_has_no_fault(respcache: Run, environment: Environment) -> None:
    """Nor a warning, but that no process has taken the fence yet. It takes the library's own view
    of the tables."""
    done = respcache("doctor", "--tables", TABLES, "--json", **environment)
    report = document(done)
    assert (done.returncode, report["faults"], done.stderr) == (0, 0, "")
    assert [(one["about"], one["check"]) for one in report["findings"] if one["level"] != "ok"] == [
        ("database", "serving lease")
    ]
    assert (
        finding(done, "database", "triggers", "ok")["found"] == "2 tables watched: accounts, leads"
    )


def test_nothing_is_changed_by_it(
    respcache: Run, environment: Environment, valkey_url: str
) -> None:
    """The probes of rights leave no key and change none."""
    with redis.Redis.from_url(valkey_url) as client:
        client.set("tenant:a:accounts:list:00", "x")
        client.hset("respcache:~off", "*", "1")
        before = {key: client.dump(key) for key in client.scan_iter()}
        respcache("doctor", **environment)
        assert {key: client.dump(key) for key in client.scan_iter()} == before


# -- servers ---------------------------------------------------------------------------------------


def test_a_cache_that_does_not_evict_is_a_fault_and_is_mended_by_what_is_said(
    respcache: Run, environment: Environment, make_valkey: Make
) -> None:
    """The option's name and value are the server's own."""
    environment["REDIS_CACHE_URL"] = make_valkey(maxmemory_policy="noeviction").url
    found = finding(respcache("doctor", "--json", **environment), "cache", "eviction", "fault")
    assert found["found"] == "noeviction"
    mended = re.search(r"CONFIG SET (\S+) (\S+);", found["fix"])
    assert mended is not None
    with redis.Redis.from_url(environment["REDIS_CACHE_URL"]) as client:
        client.config_set(mended[1], mended[2])
    finding(respcache("doctor", "--json", **environment), "cache", "eviction", "ok")


def test_a_cache_on_disk_without_limits_is_warned_of(
    respcache: Run, environment: Environment, make_valkey: Make
) -> None:
    """Append-only file, snapshots, no memory limit, time-outs, unlimited buffers: five warnings, no
    fault."""
    server = make_valkey(
        appendonly="yes",
        save="60 1",
        maxmemory="0",
        timeout="30",
        client_output_buffer_limit="pubsub 0 0 0",
    )
    environment["REDIS_CACHE_URL"] = server.url
    done = respcache("doctor", "--json", **environment)
    assert (
        finding(done, "cache", "persistence", "warning")["found"]
        == "append-only file and snapshots (60 1)"
    )
    for check in ("maxmemory", "timeout", "output buffers"):
        finding(done, "cache", check, "warning")
    assert done.returncode == 0


def test_agent_memory_that_evicts_is_a_fault(
    respcache: Run, environment: Environment, make_valkey: Make
) -> None:
    """And one that forgets at a restart is warned of."""
    environment["REDIS_URL"] = make_valkey(tcp_keepalive="0").url
    done = respcache("doctor", "--json", **environment)
    assert finding(done, "memory", "eviction", "fault")["found"] == "allkeys-lru"
    finding(done, "memory", "persistence", "warning")
    finding(done, "memory", "timeout", "warning")


@pytest.mark.parametrize("database", ["0", "1"])
def test_one_server_for_both_is_a_fault_whatever_the_database(
    respcache: Run, environment: Environment, database: str
) -> None:
    """And no advice is given for it that would break the other half."""
    environment["REDIS_URL"] = environment["REDIS_CACHE_URL"].removesuffix("0") + database
    done = respcache("doctor", "--json", **environment)
    assert "one server" in finding(done, "servers", "two servers", "fault")["found"]
    assert "noeviction" not in {one["found"] for one in document(done)["findings"]}


def test_a_wrong_password_is_said_without_showing_it(
    respcache: Run, environment: Environment
) -> None:
    """The server is there, so it is the login."""
    environment["REDIS_CACHE_URL"] = re.sub(
        r":[^:@]*@", ":hidden-one@", environment["REDIS_CACHE_URL"]
    )
    done = respcache("doctor", "--json", **environment)
    assert "refuses the login" in finding(done, "cache", "reachable", "fault")["found"]
    assert "hidden-one" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hidden-one@127.0.0.1:1",
        "rediss://:hidden-one@127.0.0.1:1",
        "http://:hidden-one@x",
        "",
    ],
)
def test_a_server_that_is_not_there_is_a_fault(
    respcache: Run, environment: Environment, url: str
) -> None:
    """So is an address that is none, and one that is not set."""
    environment["REDIS_CACHE_URL"] = url
    done = respcache("doctor", "--json", **environment)
    assert done.returncode == 1
    assert any(
        one["about"] == "cache" and one["level"] == "fault" for one in document(done)["findings"]
    )
    assert "hidden-one" not in done.stdout + done.stderr


def test_a_server_without_a_password_is_warned_of_on_this_machine(
    respcache: Run, environment: Environment, make_valkey: Make
) -> None:
    """Whoever has an account here may read it. A well-known password is the same."""
    server = make_valkey(requirepass='""')
    environment["REDIS_CACHE_URL"] = f"redis://127.0.0.1:{server.port}"
    done = respcache("doctor", "--json", **environment)
    assert "without one" in finding(done, "cache", "password", "warning")["found"]
    with redis.Redis.from_url(environment["REDIS_CACHE_URL"]) as client:
        client.config_set("requirepass", "changeme")
    environment["REDIS_CACHE_URL"] = f"redis://:changeme@127.0.0.1:{server.port}"
    done = respcache("doctor", "--json", **environment)
    assert "well-known" in finding(done, "cache", "password", "warning")["found"]


def test_a_replica_is_a_fault(
    respcache: Run, environment: Environment, make_valkey: Make, valkey_server: EmbeddedValkey
) -> None:
    """It cannot be written to; the primary is named."""
    environment["REDIS_CACHE_URL"] = make_valkey(replicaof=f"127.0.0.1 {valkey_server.port}").url
    found = finding(respcache("doctor", "--json", **environment), "cache", "role", "fault")
    assert f"127.0.0.1:{valkey_server.port}" in found["fix"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("+hset", "+hset"),
        ("+evalsha", "+evalsha"),
        ("+subscribe", "+subscribe"),
        ("&respcache:~bumps", "&respcache:~bumps"),
        ("~tenant:*", "~tenant:*"),
        ("~respcache:~*", "~respcache:~*"),
    ],
)
def test_a_missing_right_is_named_and_granted_by_what_is_said(
    respcache: Run, environment: Environment, valkey_url: str, without: str, said: str
) -> None:
    """Of commands, key patterns and channels."""
    environment["REDIS_CACHE_URL"] = log_in_as(valkey_url, DATA_PLANE, without=without)
    done = respcache("doctor", "--json", **environment)
    found = finding(done, "cache", "rights", "fault")
    assert said in found["found"]
    finding(done, "cache", "configuration", "warning")  # this user may not see it
    grant = found["fix"].partition(" ACL ")[2]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {grant}"], capture_output=True, text=True, check=True
    ).stdout.split()
    with redis.Redis.from_url(valkey_url) as client:
        client.execute_command("ACL", *words)
    finding(respcache("doctor", "--json", **environment), "cache", "rights", "ok")


def test_clocks_and_networks_are_judged() -> None:
    """What a test cannot break for real: a clock that is a minute off, a server elsewhere in the
    clear."""

    def judged(host: str, skew_s: float) -> dict[str, str]:
        report = DoctorReport("cache")
        server = CheckedServer(
            "REDIS_CACHE_URL", ServerURL.parse(f"redis://:x@{host}"), {}, None, skew_s
        )
        # private: no test can start a server elsewhere, or one with a wrong clock
        clock, encryption = servers._check_clock, servers._check_encryption
        clock(report, server)
        encryption(report, server, "REDIS_CACHE_URL")
        return {one.check: one.level for one in report.findings}

    assert judged("127.0.0.1", 0.5) == {"clock": "ok", "encryption": "ok"}
    assert judged("192.0.2.1", -60) == {"clock": "warning", "encryption": "warning"}
    assert [
        is_local(host)
        for host in ("localhost", "127.1.2.3", "::1", "/run/x", "10.0.0.1", "cache.example")
    ] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("info", "config", "check", "level"),
    [
        ({"redis_version": "6.0.9"}, {}, "version", "fault"),
        ({"redis_version": "6.2.0"}, {}, "version", "ok"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, {}, "version", "ok"),
        ({"role": "master", "cluster_enabled": 1}, {}, "role", "fault"),
        (
            {},
            {"client-output-buffer-limit": "normal 0 0 0 slave 0 0 0 pubsub 65536 0 0"},
            "output buffers",
            "warning",
        ),
        (
            {},
            {"client-output-buffer-limit": "normal 0 0 0 slave 0 0 0 pubsub 33554432 8388608 60"},
            "output buffers",
            "ok",
        ),
    ],
)
def test_servers_of_other_kinds_are_judged(
    info: dict[str, Any], config: dict[str, str], check: str, level: str
) -> None:
    """Old ones, clusters, small output buffers: by what they say of themselves."""
    report = DoctorReport("cache")
    server = CheckedServer(
        "REDIS_CACHE_URL", ServerURL.parse("redis://:x@127.0.0.1"), info, config, 0.0
    )
    # private: no test can start a server of another kind
    checks = servers._check_version, servers._check_role, servers._check_connections
    for judge in checks:
        judge(report, server)
    assert [one.level for one in report.findings if one.check == check] == [level]


# -- database --------------------------------------------------------------------------------------

EXCHANGED = (
    "ALTER TABLE leads RENAME TO old",
    "ALTER TABLE accounts RENAME TO leads",
    "ALTER TABLE old RENAME TO accounts",
)


@pytest.mark.parametrize(
    ("broken", "table", "said"),
    [
        (
            ("CREATE TABLE tasks (id int)",),
            "tasks",
            "no trigger for delete, insert, truncate, update",
        ),
        (("DROP TRIGGER respcache_update ON leads",), "leads", "no trigger for update"),
        (
            ("ALTER TABLE leads DISABLE TRIGGER respcache_insert",),
            "leads",
            "disabled, or not ENABLE ALWAYS",
        ),
        (
            ("ALTER TABLE leads ENABLE TRIGGER respcache_insert",),
            "leads",
            "disabled, or not ENABLE ALWAYS",
        ),
        (EXCHANGED, "leads", "its triggers run respcache_note_accounts"),
        (("CREATE TABLE child () INHERITS (leads)",), "leads", "inherits"),
        ((), "nowhere", "no such table"),
    ],
    ids=["unwatched", "dropped", "disabled", "not always", "exchanged", "inherited", "missing"],
)
def test_a_table_whose_writes_are_not_seen_is_a_fault(
    respcache: Run,
    environment: Environment,
    sql: Sql,
    broken: tuple[str, ...],
    table: str,
    said: str,
) -> None:
    """By name, with the reason. Where tables were exchanged, both."""
    sql(*broken)
    tables = f"accounts,{table}" if broken != EXCHANGED else table
    found = finding(
        respcache("doctor", "--tables", tables, "--json", **environment),
        "database",
        "triggers",
        "fault",
    )
    assert found["found"].startswith(f"{table}: ")
    assert said in found["found"]


def test_both_tables_that_were_exchanged_are_named(
    respcache: Run, environment: Environment, sql: Sql
) -> None:
    """Without being told which tables are declared, it checks those that have triggers, and says
    so."""
    sql(*EXCHANGED)
    report = document(respcache("doctor", "--json", **environment))
    faults = [one["found"].split(":")[0] for one in report["findings"] if one["level"] == "fault"]
    assert faults == ["accounts", "leads"]
    assert any("are unknown" in one["found"] for one in report["findings"])


def test_triggers_are_mended_by_what_is_said(
    respcache: Run, environment: Environment, sql: Sql
) -> None:
    """The statement that is printed, as it stands."""
    sql("ALTER TABLE leads DISABLE TRIGGER ALL")
    found = finding(
        respcache("doctor", "--tables", TABLES, "--json", **environment),
        "database",
        "triggers",
        "fault",
    )
    mended = re.search(r"-c '(.*)'$", found["fix"])
    assert mended is not None
    sql(mended[1])
    assert respcache("doctor", "--tables", TABLES, **environment).returncode == 0


@pytest.mark.parametrize(
    ("broken", "check", "said"),
    [
        (f"DROP TABLE {OUTBOX}", "outbox", "missing in schema public"),
        ("DELETE FROM respcache_fence", "outbox", "has lost its row"),
    ],
)
def test_an_outbox_that_is_not_whole_is_a_fault(
    respcache: Run, environment: Environment, sql: Sql, broken: str, check: str, said: str
) -> None:
    """Nothing is cached then."""
    sql(broken)
    assert (
        said
        in finding(respcache("doctor", "--json", **environment), "database", check, "fault")[
            "found"
        ]
    )


def test_a_role_without_rights_is_a_fault_and_is_mended_by_what_is_said(
    respcache: Run, environment: Environment, sql: Sql, postgres_server: EmbeddedPostgres
) -> None:
    """Row level security hides rows: also a fault, with the statement against it."""
    sql(
        "DROP ROLE IF EXISTS visitor",
        f"CREATE ROLE visitor LOGIN PASSWORD 'visitor'; GRANT SELECT ON {OUTBOX} TO visitor",
    )
    environment["DATABASE_URL"] = re.sub(
        r"//.*@", "//visitor:visitor@", environment["DATABASE_URL"]
    )
    try:
        done = respcache("doctor", "--tables", TABLES, "--json", **environment)
        found = finding(done, "database", "rights", "fault")
        assert (
            f'USAGE ON SCHEMA "public"; UPDATE, DELETE, INSERT ON "public".{OUTBOX}; SELECT, '
            f"UPDATE ON" in found["found"]
        )
        finding(done, "database", "password", "warning")  # that of the user is the user's name
        mended = re.search(r"-c '(.*)' \(", found["fix"])
        assert mended is not None
        sql(mended[1])
        done = respcache("doctor", "--tables", TABLES, "--json", **environment)
        finding(done, "database", "rights", "ok")
        sql(f"ALTER TABLE {OUTBOX} ENABLE ROW LEVEL SECURITY")
        found = finding(
            respcache("doctor", "--tables", TABLES, "--json", **environment),
            "database",
            "outbox",
            "fault",
        )
        assert "DISABLE ROW LEVEL SECURITY" in found["fix"]
    finally:
        sql("DROP OWNED BY visitor", "DROP ROLE visitor")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://a:hidden-one@127.0.0.1:1/x",
        "nonsense",
        "postgresql://postgres:hidden-one@127.0.0.1:{port}/bare",
        "postgresql://a:hidden-one@127.0.0.1:word/x",
        "postgresql+nothing://a:hidden-one@127.0.0.1/x",
        "postgresql+psycopg2://a:hidden-one@127.0.0.1/x",
        "sqlite:///hidden-one",
    ],
)
def test_a_database_that_cannot_be_had_is_a_fault(
    respcache: Run, environment: Environment, postgres_server: EmbeddedPostgres, url: str
) -> None:
    """Nobody there, no address, a wrong password, a driver that is not here or cannot be used:
    never shown."""
    environment["DATABASE_URL"] = url.format(port=postgres_server.port)
    done = respcache("doctor", "--json", **environment)
    assert done.returncode == 1
    (found,) = [
        one
        for one in document(done)["findings"]
        if one["about"] == "database" and one["level"] == "fault"
    ]
    assert found["check"] == ("reachable" if ":1/" in url or "bare" in url else "address")
    assert "hidden-one" not in done.stdout + done.stderr


def test_rows_that_nobody_deletes_are_warned_of(
    respcache: Run, environment: Environment, sql: Sql
) -> None:
    """Such rows are left where no process prunes."""
    sql(f"INSERT INTO {OUTBOX} (tenant, tag, at) VALUES ('a', 'T:leads', now() - interval '1 day')")
    done = respcache("doctor", "--tables", TABLES, "--json", **environment)
    assert "the oldest 864" in finding(done, "database", "outbox rows", "warning")["found"]


def test_invalidations_that_wait_are_warned_of(
    respcache: Run, environment: Environment, sql: Sql, valkey_url: str
) -> None:
    """A row after the cursor that the store keeps, older than that cursor gets while a process
    runs."""

    async def look() -> OutboxPage:
        engine = create_async_engine(environment["DATABASE_URL"].replace("://", "+asyncpg://"))
        outbox = PostgresOutbox(engine)
        try:
            return await outbox.page(None)
        finally:
            await outbox.close()
            await engine.dispose()

    page = asyncio.run(look())
    with redis.Redis.from_url(valkey_url) as client:
        identity = client.info("replication")["master_replid"]
        client.set(EPOCH_KEY, Epoch("ab", identity, page.incarnation, page.cursor).encode())
    sql(
        f"INSERT INTO {OUTBOX} (tenant, tag, at) VALUES ('a', 'T:leads', now() - interval '2 "
        f"minutes')"
    )
    done = respcache("doctor", "--tables", TABLES, "--json", **environment)
    assert (
        "1 wait, the oldest for 12" in finding(done, "database", "outbox rows", "warning")["found"]
    )


def test_an_epoch_or_a_fence_of_somebody_else_is_a_fault(
    respcache: Run, environment: Environment, sql: Sql, valkey_url: str
) -> None:
    """A cache that another database uses too; a fence that names another server."""
    with redis.Redis.from_url(valkey_url) as client:
        identity = client.info("replication")["master_replid"]
        client.set(EPOCH_KEY, f"ab {identity} of-another-database 1.0 3:3:")
    sql(f"UPDATE respcache_fence SET authority = '{identity}', until = now() + interval '1 minute'")
    done = respcache("doctor", "--tables", TABLES, "--json", **environment)
    assert "another database" in finding(done, "database", "one database", "fault")["found"]
    finding(done, "database", "serving lease", "ok")
    sql("UPDATE respcache_fence SET authority = 'abc'")
    done = respcache("doctor", "--tables", TABLES, "--json", **environment)
    assert "another server" in finding(done, "database", "serving lease", "fault")["found"]


# -- the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "level"),
    [
        (None, "warning"),
        ("short", "fault"),
        ("only for trying it out, not more", "fault"),
        ("Changeme" * 4, "fault"),
        (SECRET, "ok"),
    ],
)
def test_a_secret_that_everybody_knows_is_a_fault(secret: str | None, level: str) -> None:
    """That of the quickstart among them; it is never shown."""
    report = DoctorReport("environment")
    check_secret(report, secret)
    (found,) = report.findings
    assert found.level == level
    assert secret is None or secret not in str(found)


@pytest.mark.long
def test_tables_come_from_an_application(
    respcache: Run, environment: Environment, tmp_path: Path
) -> None:
    """As its cached routes declare them; an application without a cache, or none at all, is wrong
    usage."""
    (tmp_path / "shop.py").write_text(APPLICATION)
    done = respcache("doctor", "--app", "shop:app", "--json", **environment)
    assert finding(done, "database", "triggers", "fault")["found"].startswith("orders: ")
    assert finding(done, "database", "triggers", "ok")["found"] == "1 tables watched: leads"
    assert respcache("doctor", "--app", "shop:make()", "--json", **environment).returncode == 1
    for wrong in ("shop:api", "shop:nothing", "nowhere:app", "shop"):
        done = respcache("doctor", "--app", wrong, **environment)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr


def test_what_people_see_says_why_and_how_to_mend(
    respcache: Run, environment: Environment, make_valkey: Make
) -> None:
    """In a pipe without colours, however long the lines."""
    environment["REDIS_CACHE_URL"] = make_valkey(maxmemory_policy="noeviction").url
    done = respcache("doctor", "--tables", TABLES, **environment)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if "FAULT" in line)
    assert re.fullmatch(r"  FAULT +eviction +noeviction", lines[at])
    assert lines[at + 1].strip().startswith("why ")
    assert re.fullmatch(
        r' +fix   valkey-cli -u "\$REDIS_CACHE_URL" CONFIG SET maxmemory-policy allkeys-lru; .*',
        lines[at + 2],
    )
    assert re.fullmatch(r"\d+ checks: 1 faults, \d+ warnings", lines[-1])


APPLICATION = """
from fastapi import FastAPI
from respcache import Cache, MemoryStore, SingleTenant, cache_list

api = FastAPI()

@api.get("/orders")
@cache_list("orders", tables=["orders", "leads"])
async def orders() -> list[str]:
    return []

app = Cache(MemoryStore(), secret=b"x" * 32, resolver=SingleTenant("public")).wrap(api)

def make():
    return app
"""
