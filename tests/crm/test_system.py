"""The system's own routes, the start of the application, its schema and its documentation."""

import asyncio
import re
import signal
from pathlib import Path

import asyncpg
import httpx2
import pytest
from alembic import command
from pydantic import SecretStr
from sqlalchemy import select

from crm.app import create_app
from crm.demo.seed import PASSWORD as DEMO_PASSWORD
from crm.demo.seed import seed_if_empty
from crm.errors import ApiError
from crm.home import USERS
from crm.migrations import configuration
from crm.models import Employee
from crm.routes.auth import LoginLimit
from crm.settings import Settings
from respcache import Claim, ConfigurationError
from respcache.core.errors import AuditLogUnavailable
from respcache.ops.postgres_audit_log import PostgresAuditLog
from respcache.testing.servers import EmbeddedPostgres

from .conftest import MODULES, NEW, PASSWORD, SECRET, Crm, hit

pytestmark = pytest.mark.anyio


async def test_health_and_status_are_open_and_say_what_is_up(crm: Crm) -> None:
    """The cache being away is said and is no failure."""
    http = crm.as_user(None)
    assert crm.cache.runtime.relay is not None
    async with asyncio.timeout(60):
        await crm.cache.runtime.relay.caught_up()  # with what made these people
    assert (await http.get("/api/system/status")).json()["data"]["up"] is True
    health = (await http.get("/api/system/health")).json()["data"]
    assert 0 <= health.pop("lease_age_s") < 3600
    assert health == {
        "database": "up",
        "cache": "up",
        "cache_enabled": True,
        "invalidations_pending": 0,
        "oldest_pending_s": 0.0,
        "lease_alive": True,
    }
    await crm.cache.store.close()
    answer = await http.get("/api/system/health")
    assert (answer.status_code, answer.json()["data"]["cache"]) == (200, "down")


async def test_health_without_a_cache_is_that_of_the_database(database_url: str) -> None:
    """REDIS_CACHE_URL=none: there is no serving lease, and nothing is pending."""
    settings = Settings(
        database_url=database_url, redis_cache_url="none", jwt_secret=SECRET, respcache_key=SECRET
    )
    app = create_app(settings)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://crm") as http:
        answer = await http.get("/api/system/health")
    await app.app.state.sessions.kw["bind"].dispose()
    assert answer.json()["data"] == {"database": "up", "cache": "none", "cache_enabled": False}


async def test_containers_status_says_who_answers_and_who_is_not_configured(
    crm: Crm, valkey_url: str
) -> None:
    """Of database, cache and agent memory; a wrong password is a problem that is named, without the
    password."""
    assert (await crm.as_user("ann").get("/api/system/containers-status")).status_code == 403
    data = (await crm.as_user("abe").get("/api/system/containers-status")).json()["data"]
    assert [data[name]["reachable"] for name in ("database", "redis_cache", "redis_memory")] == [
        True,
        True,
        False,
    ]
    assert data["redis_memory"]["configured"] is False
    assert data["redis_cache"]["latency_ms"] > 0
    wrong = re.sub(r":[^:@]*@", ":wrong-password@", valkey_url)
    crm.app.app.state.settings = crm.app.app.state.settings.model_copy(
        update={"redis_url": SecretStr(wrong)}
    )
    answer = await crm.as_user("abe").get("/api/system/containers-status")
    memory = answer.json()["data"]["redis_memory"]
    assert (memory["configured"], memory["reachable"]) == (True, False)
    assert "WRONGPASS" in memory["problem"]
    assert "wrong-password" not in answer.text


def test_a_wrong_address_of_the_agent_memory_is_said_at_the_start() -> None:
    """Not at the first look at its state."""
    settings = Settings(
        database_url="postgresql://127.0.0.1/x",
        redis_url="memory:6379",
        jwt_secret=SECRET,
        respcache_key=SECRET,
    )
    with pytest.raises(ConfigurationError, match="redis://"):
        create_app(settings)


async def test_guessing_passwords_is_slowed_down(crm: Crm) -> None:
    """Ten attempts for a mail; others still log in; whoever knows the password in time begins
    anew."""
    http = crm.as_user(None)

    async def attempt(email: str, password: str) -> httpx2.Response:
        return await http.post("/api/auth/login", json={"email": email, "password": password})

    for _ in range(9):
        assert (await attempt("abe@x.example", "wrong")).status_code == 401
    assert (await attempt("abe@x.example", PASSWORD)).status_code == 200
    many = await asyncio.gather(*(attempt("ABE@x.example", "wrong") for _ in range(12)))
    assert sorted(answer.status_code for answer in many) == [401] * 10 + [429] * 2
    refused = await attempt("abe@x.example", PASSWORD)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_attempts")
    assert 0 < int(refused.headers["retry-after"]) <= 900
    assert (await attempt("gus@x.example", PASSWORD)).status_code == 200


def test_an_address_that_tries_many_mails_is_slowed_down() -> None:
    """Three hundred attempts, of whatever mails; other addresses still log in."""
    limit = LoginLimit()
    for number in range(300):
        limit.attempt("192.0.2.1", f"{number}@x.example")
    with pytest.raises(ApiError, match="Too many attempts"):
        limit.attempt("192.0.2.1", "one-more@x.example")
    limit.attempt("192.0.2.2", "one-more@x.example")


async def test_cache_stats_are_for_admins_and_of_their_tenant(crm: Crm) -> None:
    """Counters per module; INFO as text; says whose figures they are."""
    for user in ("ann", "gus"):
        for _ in range(3):
            await crm.as_user(user).get("/api/accounts")
    assert (await crm.as_user(None).get("/api/system/cache-stats")).status_code == 401
    assert (await crm.as_user("ann").get("/api/system/cache-stats")).status_code == 403
    data = (await crm.as_user("abe").get("/api/system/cache-stats")).json()["data"]
    assert (data["connected"], data["statistics_of"]) == (True, "this process")
    assert (data["modules"]["accounts"]["hits"], data["modules"]["accounts"]["misses"]) == (2, 1)
    assert "total_commands_processed" in data["info"]
    assert "used_memory" in data["memory"]
    assert "tenants" not in data
    everything = (await crm.as_user("root").get("/api/system/cache-stats")).json()["data"]
    assert everything["hits"] == 4
    assert {str(crm.tenants["acme"].id), str(crm.tenants["globex"].id)} <= everything[
        "tenants"
    ].keys()
    await crm.cache.store.close()
    answer = await crm.as_user("abe").get("/api/system/cache-stats")
    assert (answer.status_code, answer.json()) == (
        503,
        {"status": "error", "message": "Cache unavailable"},
    )


@pytest.mark.parametrize("module", MODULES)
async def test_figures_count_a_module_that_was_written_before_it_was_read(
    crm: Crm, module: str
) -> None:
    """Whichever way the rows were written."""
    abe = crm.as_user("abe")
    await abe.post(f"/api/{module}", json=NEW[module])
    await abe.post(
        "/api/activities", json={"type": "call", "status": "scheduled", "due_date": "2020-01-01"}
    )
    before = (await abe.get("/api/system/cache-stats")).json()["data"]["modules"]["activities"][
        "invalidations"
    ]
    await abe.post("/api/activities/mark-overdue")
    modules = (await abe.get("/api/system/cache-stats")).json()["data"]["modules"]
    assert modules[module]["invalidations"] > 0
    assert modules["activities"]["invalidations"] == before + 1


async def test_an_admin_invalidates_modules_of_his_own_tenant(crm: Crm) -> None:
    """One, all, and nobody else's."""
    for user in ("abe", "gus"):
        for path in ("/api/accounts", "/api/leads"):
            for _ in range(2):
                await crm.as_user(user).get(path)
    http = crm.as_user("abe")
    assert (
        await crm.as_user("ann").post("/api/cache/invalidate", json={"modules": []})
    ).status_code == 403
    answer = await http.post("/api/cache/invalidate", json={"modules": ["accounts"]})
    assert answer.json()["data"]["confirmed"] is True
    assert not hit(await http.get("/api/accounts"))
    assert hit(await http.get("/api/leads"))
    await http.post("/api/cache/invalidate", json={"modules": ["*"]})
    assert not hit(await http.get("/api/leads"))
    assert hit(await crm.as_user("gus").get("/api/accounts"))
    assert (
        await http.post("/api/cache/invalidate?tenant_id=globex", json={"modules": []})
    ).status_code == 403


async def test_the_kill_switch_is_for_superadmins(crm: Crm) -> None:
    """Off and on without a deploy."""
    assert (
        await crm.as_user("abe").post("/api/cache/switch", json={"enabled": False})
    ).status_code == 403
    root = crm.as_user("root")
    answer = await root.post("/api/cache/switch", json={"enabled": False})
    assert answer.json()["data"] == {"enabled": False, "propagated": True}
    assert "detail=off" in (await crm.as_user("ann").get("/api/accounts")).headers["cache-status"]
    await root.post("/api/cache/switch", json={"enabled": True})
    assert "stored" in (await crm.as_user("ann").get("/api/accounts")).headers["cache-status"]


async def test_what_is_done_to_the_cache_by_the_api_is_in_the_trail_too(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With who did it, as by the dashboard; what cannot be written down is not done."""
    root, abe = crm.as_user("root"), crm.as_user("abe")
    acme, globex = (str(crm.tenants[slug].id) for slug in ("acme", "globex"))
    await root.post("/api/cache/switch", json={"enabled": False})
    await root.post("/api/cache/switch", json={"enabled": True})
    await abe.post("/api/cache/invalidate", json={"modules": ["leads", "accounts", "leads"]})
    await root.post("/api/cache/invalidate?tenant_id=globex", json={"modules": []})
    acts = [
        (act["action"], act["name"], act["tenant"], act["details"])
        for act in (await root.get("/cache/api/audit-log")).json()[::-1]
    ]
    assert acts == [
        ("switch", "root@x.example", None, {"off": True}),
        ("switch", "root@x.example", None, {"off": False}),
        ("purge", "abe@x.example", acme, {"module": "leads"}),
        ("purge", "abe@x.example", acme, {"module": "accounts"}),
        ("purge", "root@x.example", globex, {}),
    ]

    async def fail(*_: object) -> None:
        raise AuditLogUnavailable("the trail is away")

    monkeypatch.setattr(PostgresAuditLog, "append", fail)
    for _ in range(2):
        await abe.get("/api/accounts")
    for http, path, body in (
        (root, "switch", {"enabled": False}),
        (abe, "invalidate", {"modules": ["accounts"]}),
        (abe, "invalidate", {"modules": []}),
    ):
        answer = await http.post(f"/api/cache/{path}", json=body)
        assert (answer.status_code, answer.json()["status"]) == (503, "error")
        assert hit(await abe.get("/api/accounts"))


async def test_without_the_database_the_answer_is_503(crm: Crm) -> None:
    """In the envelope; what is cached and still provable goes on being served."""
    http = crm.as_user("ann")
    for _ in range(2):
        await http.get("/api/accounts")
    crm.app.app.state.sessions.kw["bind"].sync_engine.dialect.connect = _refuse
    await crm.app.app.state.sessions.kw["bind"].dispose()
    assert hit(await http.get("/api/accounts"))
    answer = await http.get("/api/leads")
    assert (answer.status_code, answer.json()) == (
        503,
        {"status": "error", "message": "Database unavailable"},
    )
    assert (await http.get("/api/system/health")).status_code == 503


def _refuse(*args: object, **options: object) -> None:
    raise ConnectionRefusedError("no database")


async def _connect_again_and_again(url: str) -> None:
    while True:
        await (await asyncpg.connect(url)).close()


async def test_while_the_database_shuts_down_the_answer_is_503(tmp_path: Path) -> None:
    """A server that answers, but only that it lets nobody in (57P03), is away as well: no error of
    ours, no traceback."""
    server = EmbeddedPostgres(tmp_path / "postgres", password=PASSWORD, durable=False).start()
    try:
        plain_url = server.url("postgres").replace("+asyncpg", "")
        session = await asyncpg.connect(plain_url)  # a smart shutdown waits for it
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(asyncpg.CannotConnectNowError):
            await asyncio.wait_for(_connect_again_and_again(plain_url), 30)
        settings = Settings(
            database_url=server.url("postgres"),
            redis_cache_url="none",
            jwt_secret=SECRET,
            respcache_key=SECRET,
        )
        transport = httpx2.ASGITransport(create_app(settings), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://crm") as http:
            answer = await http.post(
                "/api/auth/login", json={"email": "ann@x.example", "password": PASSWORD}
            )
        await session.close()
    finally:
        server.remove()
    assert (answer.status_code, answer.json()) == (
        503,
        {"status": "error", "message": "Database unavailable"},
    )


async def test_the_documentation_describes_every_route(crm: Crm) -> None:
    """Summaries, tags, the token button, parameters with descriptions."""
    schema = (await crm.as_user(None).get("/openapi.json")).json()
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert len(operations) > 25
    assert all(
        operation["summary"] and operation["description"] and operation["tags"]
        for operation in operations
    )
    assert "HTTPBearer" in schema["components"]["securitySchemes"]
    parameters = {
        parameter["name"] for parameter in schema["paths"]["/api/accounts"]["get"]["parameters"]
    }
    assert {"limit", "offset", "filter", "sort", "search", "tenant_id"} <= parameters


def test_models_and_migrations_agree(empty_database_url: str) -> None:
    """What the models say is what the steps make; and the steps can be undone."""
    config = configuration(empty_database_url)
    command.upgrade(config, "head")
    command.check(config)
    command.downgrade(config, "base")
    command.upgrade(config, "head")


def test_demo_data_is_made_once_and_the_same_each_time(database_url: str) -> None:
    """A second start finds it; the admin of acme can log in; the home page names users of it."""

    async def run() -> tuple[str, str, str]:
        first, second = await seed_if_empty(database_url), await seed_if_empty(database_url)
        settings = Settings(
            database_url=database_url,
            redis_cache_url="none",
            jwt_secret=SECRET,
            respcache_key=SECRET,
        )
        app = create_app(settings).app
        from crm.auth import log_in

        user = await log_in(app.state.sessions, "admin@acme.example", DEMO_PASSWORD)
        scope = await app.state.resolver.scope(
            Claim((str(user.id), str(user.tenant_id), None), str(user.tenant_id))
        )
        async with app.state.sessions() as session:
            assert set(USERS) <= set(await session.scalars(select(Employee.email)))
        await app.state.sessions.kw["bind"].dispose()
        return first, second, scope.role

    first, second, role = asyncio.run(run())
    assert "acme" in first
    assert second == "data found: 3050 accounts"
    assert role == "admin"


async def test_the_documentation_page_needs_nobody_elses_server(crm: Crm) -> None:
    """Its script and style are served by us: it works without the internet, and tells nobody who
    reads it."""
    http = crm.as_user(None)
    page = (await http.get("/docs")).text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) >= 3
    for source in sources:
        assert (source[0], (await http.get(source)).status_code) == ("/", 200)
