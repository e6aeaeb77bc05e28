"""Sessions, cookies and forms: what is refused, whatever a browser sends."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from crm.app import create_app
from crm.models import Tenant
from crm.settings import Settings
from respcache.core.errors import AuditLogUnavailable
from respcache.ops.admin import Admin
from respcache.ops.dashboard import auth, layout, live
from respcache.ops.postgres_audit_log import PostgresAuditLog
from respcache.ops.stats.rows import Overview
from respcache.testing.servers import EmbeddedValkey
from tests.crm.conftest import PASSWORD, SECRET, Crm, populate

pytestmark = pytest.mark.anyio

FORMS = ("purge", "switches", "explain", "key", "theme", "sign-out")


class Person:
    """Somebody with a browser that runs no script."""

    def __init__(self, crm: Crm, base: str = "http://crm") -> None:
        transport = httpx2.ASGITransport(crm.app, raise_app_exceptions=False)
        self.http = httpx2.AsyncClient(transport=transport, base_url=base, timeout=30)

    async def get(self, path: str, **more: Any) -> httpx2.Response:
        return await self.http.get(f"/cache/{path}", **more)

    async def post(self, to: str, **form: str) -> httpx2.Response:
        return await self.http.post(f"/cache/{to}", data=form)

    async def csrf(self, path: str) -> str:
        """Return the token in the form of a page."""
        found = re.search(r'name="csrf" value="(\w+)"', (await self.get(path)).text)
        assert found is not None
        return found[1]

    async def sign_in(
        self, name: str, password: str = PASSWORD, next_page: str = ""
    ) -> httpx2.Response:
        """Fill the form in and send it."""
        token = await self.csrf("sign-in")
        return await self.post(
            "sign-in", csrf=token, name=f"{name}@x.example", password=password, next=next_page
        )


@asynccontextmanager
async def system(database_url: str, server: EmbeddedValkey) -> AsyncIterator[Crm]:
    """The CRM on a server that the test may stop."""
    app = create_app(
        Settings(
            database_url=database_url,
            redis_cache_url=server.url,
            jwt_secret=SECRET,
            respcache_key=SECRET,
        )
    )
    made = Crm(app, app.app.state.cache)
    await made.cache.connect()
    app.prepare()
    await populate(made)
    try:
        yield made
    finally:
        await made.cache.close()
        await app.app.state.sessions.kw["bind"].dispose()


@pytest.fixture
async def person(crm: Crm) -> AsyncIterator[Person]:
    one = Person(crm)
    yield one
    await one.http.aclose()


async def stored(crm: Crm, who: str) -> str:
    """Return the key of somebody's accounts. The server has it a moment after the answer, if the
    cache was asked for that."""
    async with asyncio.timeout(60):
        while not (
            found := (await crm.as_user(who).get("/cache/api/keys?module=accounts")).json()["keys"]
        ):
            await crm.said(who, "/api/accounts")
    (one,) = found
    return str(one["key"])


async def test_cookies_are_for_this_dashboard_alone(crm: Crm, person: Person) -> None:
    """No script reads them, no other page sends them, and over TLS nobody on the way."""
    answer = await person.sign_in("abe")
    assert (answer.status_code, answer.headers["location"]) == (303, "/cache/")
    (session,) = (
        line
        for line in answer.headers.get_list("set-cookie")
        if line.startswith(auth.SESSION_COOKIE)
    )
    assert {"HttpOnly", "Path=/cache", "SameSite=strict"} <= set(session.split("; "))
    assert "Secure" not in session
    other = Person(crm, "https://crm")
    answer = await other.sign_in("abe")
    assert all(
        "Secure" in line
        for line in answer.headers.get_list("set-cookie")
        if "Max-Age=0" not in line
    )
    await other.http.aclose()


async def test_who_may_not_look_is_told_what_a_wrong_password_is_told(person: Person) -> None:
    """And no session begins."""
    said = [
        await person.sign_in("ann"),
        await person.sign_in("abe", "wrong"),
        await person.sign_in("nobody"),
    ]
    texts = {re.sub(r'value="[^"]*"', "", answer.text) for answer in said}
    assert ({answer.status_code for answer in said}, len(texts)) == ({401}, 1)
    assert auth.SESSION_COOKIE not in person.http.cookies
    assert (await person.get("")).headers["location"] == "/cache/sign-in?next=%2Fcache%2F"


async def test_signing_in_needs_the_form_that_was_sent(person: Person) -> None:
    """So that nobody is signed in as somebody else by a page of theirs; and guessing is slowed
    down."""
    form = {"name": "abe@x.example", "password": PASSWORD}
    assert (await person.post("sign-in", **form)).status_code == 403
    token = await person.csrf("sign-in")
    person.http.cookies.clear()
    assert (await person.post("sign-in", csrf=token, **form)).status_code == 403
    assert auth.SESSION_COOKIE not in person.http.cookies
    answers = [await person.sign_in("abe", "wrong") for _ in range(11)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429]
    assert int(answers[-1].headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("wanted", "leads"),
    [
        ("/cache/keys?module=leads", "/cache/keys?module=leads"),
        ("//evil.example/cache/", "/cache/"),
        ("https://evil.example/", "/cache/"),
        ("/cache/\\evil.example", "/cache/"),
        ("/api/accounts", "/cache/"),
        ("/cache/sign-in?next=x", "/cache/"),
        ("/cache/\r\nx: y", "/cache/"),
    ],
)
async def test_one_comes_back_to_a_page_of_the_dashboard_only(
    person: Person, wanted: str, leads: str
) -> None:
    """Never to another site."""
    assert (await person.sign_in("abe", next_page=wanted)).headers["location"] == leads


@pytest.mark.parametrize("path", FORMS)
async def test_a_form_without_the_token_of_its_session_does_nothing(
    crm: Crm, person: Person, path: str
) -> None:
    """Missing, made up, or of another session."""
    await person.sign_in("root")
    other = Person(crm)
    await other.sign_in("abe")
    stolen = await other.csrf("purge")
    await other.http.aclose()
    acts = await crm.as_user("root").get("/cache/api/audit-log")
    form = {
        "tenant": "acme",
        "confirmation": "acme",
        "module": "accounts",
        "off": "yes",
        "path": "/api/accounts",
        "theme": "dark",
    }
    for token in ("", "x" * 48, stolen, "ä"):
        answer = await person.post(path, **form, csrf=token)
        assert answer.status_code == 403, token
        assert "Nothing was done" in answer.text
    assert (await crm.as_user("root").get("/cache/api/audit-log")).json() == acts.json()
    assert (await person.get("")).status_code == 200
    assert auth.THEME_COOKIE not in person.http.cookies


@pytest.mark.parametrize("path", FORMS)
async def test_a_form_without_a_session_leads_to_sign_in(person: Person, path: str) -> None:
    """Whatever it carries."""
    answer = await person.post(path, csrf="x", tenant="acme", confirmation="acme")
    assert (answer.status_code, answer.headers["location"]) == (303, "/cache/sign-in")


async def test_a_viewer_can_do_nothing_by_hand_either(crm: Crm, person: Person) -> None:
    """With a good session and a good token."""
    await person.sign_in("max")
    token = await person.csrf("")
    for path, form in (
        ("purge", {"confirmation": "globex"}),
        ("switches", {"off": "yes", "tenant": "globex"}),
        ("key?key=x", {}),
    ):
        answer = await person.post(path, csrf=token, **form)
        assert answer.status_code in (403, 404), path
    for path in ("purge", "purge?tenant=globex", "switches"):
        assert (await person.get(path)).status_code == 403, path
    assert (await crm.as_user("root").get("/cache/api/audit-log")).json() == []


async def test_a_tenant_admin_reaches_no_other_tenant(crm: Crm, person: Person) -> None:
    """By no address and no form; what is everybody's is refused."""
    await crm.as_user("gus").get("/api/accounts")
    globex = str(crm.tenants["globex"].id)
    key = await stored(crm, "gus")
    await person.sign_in("abe")
    token = await person.csrf("purge")
    for path in (
        f"tenants/{globex}",
        f"modules?tenant={globex}",
        f"feed?tenant={globex}",
        f"live?tenant={globex}",
        f"live/feed?tenant={globex}",
        f"purge?tenant={globex}",
        f"purge?key={key}",
        f"key?key={key}",
    ):
        assert (await person.get(path)).status_code == 404, path
    for path in ("tenants", "latency", "configuration"):
        assert (await person.get(path)).status_code == 403, path
    for form in (
        {"tenant": globex, "off": "yes"},
        {"module": "accounts", "off": "yes"},
        {"everything": "yes", "off": "yes", "confirmation": "off"},
    ):
        assert (await person.post("switches", csrf=token, **form)).status_code in (403, 404), form
    assert (
        await person.post("purge", csrf=token, tenant=globex, confirmation="globex")
    ).status_code == 404
    assert (
        await person.post("purge", csrf=token, key=key, confirmation=key[-8:])
    ).status_code == 404
    assert (await person.post(f"key?key={key}", csrf=token)).status_code == 404
    assert "; hit" in await crm.said("gus", "/api/accounts")
    for path in ("", "modules", "keys", "feed", "audit-log"):
        page = (await person.get(path)).text
        assert "globex" not in page.lower(), path
        assert globex not in page, path


@pytest.mark.parametrize("typed", ["", "acm", "ACME", "globex", "accounts"])
async def test_a_purge_needs_what_stands_there(crm: Crm, person: Person, typed: str) -> None:
    """Anything else purges nothing, is not written down, and is kept in the form."""
    await crm.as_user("abe").get("/api/accounts")
    await person.sign_in("root")
    token = await person.csrf("purge?tenant=acme")
    answer = await person.post(
        "purge", csrf=token, tenant="acme", module="accounts", confirmation=typed
    )
    assert answer.status_code == 400
    assert "Nothing was purged" in answer.text
    assert f'data-confirm="acme" value="{typed}"' in answer.text
    assert "; hit" in await crm.said("abe", "/api/accounts")
    assert (await crm.as_user("root").get("/cache/api/audit-log")).json() == []


async def test_a_tenant_can_be_purged_while_the_server_is_away(
    database_url: str, make_valkey: Callable[..., EmbeddedValkey]
) -> None:
    """Nothing can be counted then, and the page says so; it is done as soon as it can be."""
    server = make_valkey()
    async with system(database_url, server) as made:
        person = Person(made)
        await person.sign_in("root")
        server.stop()
        page = await person.get("purge?tenant=acme")
        assert page.status_code == 200
        assert "An unknown number of responses" in page.text
        token = await person.csrf("purge?tenant=acme")
        answer = await person.post("purge", csrf=token, tenant="acme", confirmation="acme")
        assert "Not confirmed yet" in answer.text
        assert [
            act["action"] for act in (await made.as_user("root").get("/cache/api/audit-log")).json()
        ] == ["purge"]
        assert (
            await person.get(f"purge?key=tenant:{made.tenants['acme'].id}:leads:list:{'0' * 32}")
        ).status_code == 503
        await person.http.aclose()


@pytest.mark.parametrize(("who", "told"), [("root", True), ("abe", False)])
async def test_where_servers_are_is_told_to_those_who_reach_all_tenants(
    database_url: str, make_valkey: Callable[..., EmbeddedValkey], who: str, *, told: bool
) -> None:
    """By no page, stream or answer of the API while the server is away, nor by the trail."""
    server = make_valkey()
    async with system(database_url, server) as made:
        key = f"tenant:{made.tenants['acme'].id}:leads:list:{'0' * 32}"
        person, http = Person(made), made.as_user(who)
        await person.sign_in(who)
        server.stop()
        made.app.app.state.dashboard.close()  # a stream that is let in ends at once
        token = await person.csrf("explain")
        asked = {
            "path": "/api/leads",
            "headers": {"authorization": made.as_user("abe").headers["authorization"]},
        }
        form = {
            "path": "/api/leads",
            "headers": f"Authorization: {asked['headers']['authorization']}",
        }
        answers = [
            *[
                await person.get(path)
                for path in (
                    "",
                    "tenants/acme",
                    "modules",
                    "keys",
                    f"key?key={key}",
                    f"purge?key={key}",
                    "live",
                )
            ],
            await person.post("explain", csrf=token, **form),
            await person.post("purge", csrf=token, key=key, confirmation=key[-8:]),
            *[
                await http.get(f"/cache/api/{path}")
                for path in ("overview", "keys", "sample", f"key?key={key}")
            ],
            await http.post("/cache/api/explain", json=asked),
            await http.post("/cache/api/purge", json={"key": key, "dry_run": False}),
            await http.get("/cache/api/audit-log"),
        ]
        said = {str(answer.request.url): "127.0.0.1" in answer.text for answer in answers}
        assert {200, 503} == {answer.status_code for answer in answers}
        assert any(said.values()) is told, said
        await person.http.aclose()


async def test_what_is_of_no_tenant_is_called_so(crm: Crm, person: Person) -> None:
    """And leads nowhere. The feed is a little behind."""
    await crm.save(Tenant(id=uuid4(), slug="initech", name="Initech", settings={}))
    await person.sign_in("root")
    async with asyncio.timeout(60):
        while "shared data" not in (page := await person.get("feed")).text:
            await asyncio.sleep(0.05)
    assert "~shared" not in page.text


async def test_a_body_is_shown_to_who_reveals_it_only(crm: Crm, person: Person) -> None:
    """Not with the key's page, not to a viewer, and that it was revealed is in the trail."""
    await crm.save(crm.account("globex", "Hidden Acorns"))
    assert "Hidden Acorns" in (await crm.as_user("gus").get("/api/accounts")).text
    key = await stored(crm, "gus")
    for name, shown in (("max", False), ("gus", True)):
        await person.sign_in(name)
        token = await person.csrf("")
        page = await person.get("key", params={"key": key})
        assert page.status_code == 200
        assert "Hidden Acorns" not in page.text
        answer = await person.post(f"key?key={key}", csrf=token)
        assert ("Hidden Acorns" in answer.text) is shown, name
        await person.post("sign-out", csrf=token)
    acts = (await crm.as_user("root").get("/cache/api/audit-log")).json()
    assert [(act["action"], act["name"], act["details"]) for act in acts] == [
        ("reveal", "gus@x.example", {"key": key})
    ]


async def test_what_cannot_be_written_down_is_not_done(
    crm: Crm, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A purge, a switch, a look at a body: the page says so, and nothing has happened."""
    await crm.as_user("abe").get("/api/accounts")
    key = await stored(crm, "abe")
    await person.sign_in("abe")
    token = await person.csrf("purge")

    async def fail(*_: object) -> None:
        raise AuditLogUnavailable("the audit log: 127.0.0.1 is away")

    monkeypatch.setattr(PostgresAuditLog, "append", fail)
    for path, form in (
        ("purge", {"module": "accounts", "confirmation": "acme"}),
        ("purge", {"key": key, "confirmation": key[-8:]}),
        ("switches", {"off": "yes", "tenant": "acme"}),
        (f"key?key={key}", {}),
    ):
        answer = await person.post(path, csrf=token, **form)
        assert answer.status_code == 503, path
        assert "the audit log is unavailable" in answer.text
        assert "127.0.0.1" not in answer.text, "of servers a tenant's admin is told nothing"
        assert "revealed" not in answer.text
        assert "; hit" in await crm.said("abe", "/api/accounts"), path


async def test_the_content_policy_lets_nothing_else_in(person: Person) -> None:
    """On every page: nothing unless it is named, nothing inline, nothing from elsewhere, in no
    frame."""
    for path in ("sign-in", "nothing", "static/0/app.js"):
        policy = (await person.get(path)).headers["content-security-policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules.pop("default-src") == "'none'"
        assert {"frame-ancestors", "base-uri", "form-action", "script-src"} <= set(rules)
        assert set(rules.values()) == {"'self'", "'none'"}


async def test_everything_is_switched_off_by_typing_it(crm: Crm, person: Person) -> None:
    """And by nothing less."""
    await person.sign_in("root")
    token = await person.csrf("switches")
    assert (
        await person.post("switches", csrf=token, everything="yes", off="yes", confirmation="of")
    ).status_code == 400
    assert crm.cache.enabled
    assert (
        await person.post("switches", csrf=token, everything="yes", off="yes", confirmation="off")
    ).status_code == 200
    assert not crm.cache.enabled
    assert (
        await person.post("switches", csrf=token, everything="yes", off="no")
    ).status_code == 200
    assert crm.cache.enabled


async def test_files_of_pages_may_be_kept_and_change_their_address(person: Person) -> None:
    """Everything else may not; another address has nothing."""
    for name in layout.ASSETS:
        answer = await person.get(f"static/{layout.fingerprint()}/{name}")
        assert (answer.status_code, answer.headers["cache-control"]) == (
            200,
            "public, max-age=31536000, immutable",
        ), name
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in (
        f"static/{layout.fingerprint()}/vendor",
        f"static/{layout.fingerprint()}/..%2Fapp.py",
        "static/0/app.js",
    ):
        answer = await person.get(path)
        assert (answer.status_code, answer.headers["cache-control"]) == (404, "no-store"), path


async def test_pages_with_nothing_to_show_hold_nothing_inline(person: Person) -> None:
    """No script, no style, no handler: what the content policy would refuse anyway. Before the
    first request they say so."""
    await person.sign_in("root")
    for _, places in layout.NAVIGATION:
        for place in places:
            answer = await person.get(place.path)
            assert answer.status_code == 200, place.path
            assert not re.search(
                r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", answer.text
            ), place.path
            assert "<table" not in answer.text or "<td" in answer.text, place.path


async def test_a_gate_that_fails_lets_nobody_in(
    crm: Crm, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages and API answer 503 in their own way."""
    await person.sign_in("abe")
    headers = crm.as_user("abe").headers

    async def fail(*_: object) -> None:
        raise ConnectionError("the database is away")

    monkeypatch.setattr(type(crm.app.app.state.resolver), "scope", fail)
    page = await person.get("")
    assert (page.status_code, page.headers["content-type"]) == (503, "text/html; charset=utf-8")
    assert "database" not in page.text
    answer = await person.get("api/me", headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (503, "unavailable")


async def test_streams_need_a_session_and_are_bounded(
    crm: Crm, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say so in their own way, as no browser shows a page there."""
    crm.app.app.state.dashboard.close()  # a stream that is let in ends at once
    assert (await person.get("live")).status_code == 401
    await person.sign_in("root")
    monkeypatch.setattr(live, "MAX_STREAMS", 0)
    assert (await person.get("live")).status_code == 503


async def test_streams_that_begin_at_the_same_moment_are_bounded_too(
    crm: Crm, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are let in before the first of them is open; the others end with the reason."""
    monkeypatch.setattr(live, "MAX_STREAMS", 1)
    monkeypatch.setattr(live, "STATS_S", 3600.0)
    dashboard, overview = crm.app.app.state.dashboard, Admin.overview
    together = asyncio.Barrier(3)

    async def all_at_once(self: Admin, *asked: Any, **more: Any) -> Overview:
        found = await overview(self, *asked, **more)
        await together.wait()
        return found

    await person.sign_in("root")
    monkeypatch.setattr(Admin, "overview", all_at_once)
    streams = [asyncio.create_task(person.get("live")) for _ in range(3)]
    texts: list[str] = []
    async with asyncio.timeout(60):
        for ended in asyncio.as_completed(streams):
            texts.append((await ended).text)
            if len(texts) == 2:
                assert dashboard.streams == 1
                dashboard.close()
    assert [live.TOO_MANY in text for text in texts] == [True, True, False]


async def test_a_look_for_news_without_a_session_is_sent_to_sign_in(person: Person) -> None:
    """By the header that htmx follows."""
    answer = await person.get("modules", headers={"hx-request": "true"})
    assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "/cache/sign-in")
