"""The JSON API: who may ask what, what is answered, and that the page in docs/reference.md says
so."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.routing import Mount

from respcache.ops.dashboard import api, auth, live
from respcache.ops.dashboard.app import HEADERS
from tests.crm.conftest import PASSWORD, Crm

pytestmark = pytest.mark.anyio

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
SECTION = REFERENCE.split("## Dashboard API\n")[1].split("\n## ")[0]


def tenant(crm: Crm, slug: str) -> str:
    """Return a tenant's id."""
    return str(crm.tenants[slug].id)


async def get(crm: Crm, who: str | None, path: str, **query: Any) -> httpx2.Response:
    return await crm.as_user(who).get(f"/cache/api/{path}", params=query or None)


async def post(crm: Crm, who: str | None, path: str, **body: Any) -> httpx2.Response:
    return await crm.as_user(who).post(f"/cache/api/{path}", json=body)


async def test_a_token_is_had_for_a_name_and_a_password(crm: Crm) -> None:
    """Of those who may look at the cache; wrong passwords and people who may not are told the
    same."""
    answer = await post(crm, None, "token", name="abe@x.example", password=PASSWORD)
    assert answer.status_code == 200
    token = answer.json()["token"]
    me = await crm.as_user(None).get("/cache/api/me", headers={"authorization": f"Bearer {token}"})
    assert me.json()["access"] == {
        "name": "abe@x.example",
        "role": "operator",
        "tenant": tenant(crm, "acme"),
    }
    said = {
        (
            answer := await post(crm, None, "token", name=name, password=password)
        ).status_code: answer.json()["message"]
        for name, password in (
            ("abe@x.example", "wrong"),
            ("ann@x.example", PASSWORD),
            ("nobody@x.example", PASSWORD),
        )
    }
    assert list(said) == [401]


async def test_guessing_is_slowed_down(crm: Crm) -> None:
    """By the application's own limit."""
    answers = [
        await post(crm, None, "token", name="abe@x.example", password="wrong") for _ in range(11)
    ]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429]
    assert int(answers[-1].headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("who", "access", "reach"),
    [
        ("root", {"role": "operator", "tenant": None}, {"acme", "globex"}),
        ("abe", {"role": "operator", "tenant": "acme"}, {"acme"}),
        ("max", {"role": "viewer", "tenant": "globex"}, {"globex"}),
    ],
)
async def test_roles_follow_from_those_of_the_crm(
    crm: Crm, who: str, access: dict[str, Any], reach: set[str]
) -> None:
    """A superadmin operates everything, a tenant's admin the tenant, a manager looks at it; names
    are of tenants within reach."""
    me = (await get(crm, who, "me")).json()
    named = access["tenant"] and tenant(crm, access["tenant"])
    assert me["access"] == {**access, "tenant": named, "name": f"{who}@x.example"}
    assert set(me["tenants"].values()) == reach


@pytest.mark.parametrize("who", [None, "ann"])
async def test_nobody_else_gets_anything(crm: Crm, who: str | None) -> None:
    """Nor does a token that is none, or one in a cookie."""
    answer = await get(crm, who, "overview")
    assert (answer.status_code, answer.json()["error"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"
    token = crm.as_user("root").headers["authorization"].split()[1]
    cookie = {"cookie": f"{auth.SESSION_COOKIE}={token}; access_token={token}"}
    for headers in (
        cookie,
        {"authorization": "Bearer no-token"},
        {"authorization": f"Basic {token}"},
    ):
        assert (
            await crm.as_user(None).get("/cache/api/overview", headers=headers)
        ).status_code == 401


async def test_a_session_ends_when_the_application_says_so(crm: Crm) -> None:
    """With the next request: the dashboard remembers nobody."""
    assert (await get(crm, "abe", "me")).status_code == 200
    async with crm.session() as session, session.begin():
        user = await session.get(type(crm.users["abe"]), crm.users["abe"].id)
        user.status = "inactive"
    assert (await get(crm, "abe", "me")).status_code == 401


async def test_a_tenant_is_named_by_id_or_name_and_others_are_not_found(crm: Crm) -> None:
    """Whether they exist or not, and the answer does not tell their id."""
    await crm.as_user("abe").get("/api/accounts")
    await crm.as_user("gus").get("/api/accounts")
    for name in ("acme", "ACME", tenant(crm, "acme")):
        assert (await get(crm, "abe", f"tenants/{name}")).json()["name"] == tenant(crm, "acme")
        assert (await get(crm, "root", f"tenants/{name}")).json()["name"] == tenant(crm, "acme")
    for name in ("globex", tenant(crm, "globex"), "nowhere"):
        for path in (
            f"tenants/{name}",
            f"modules?tenant={name}",
            f"routes?tenant={name}",
            f"feed?tenant={name}",
        ):
            answer = await get(crm, "abe", path)
            assert (answer.status_code, answer.json()["error"]) == (404, "not-found"), path
            assert tenant(crm, "globex") not in answer.text or name == tenant(crm, "globex")
    assert [row["name"] for row in (await get(crm, "abe", "tenants")).json()] == [
        tenant(crm, "acme")
    ]


async def test_acts_need_the_role_operator(crm: Crm) -> None:
    """A manager may count what a purge would concern, and do nothing."""
    for path, body in (
        ("purge", {"tenant": "globex", "dry_run": False}),
        ("switch", {"off": True, "tenant": "globex"}),
    ):
        answer = await post(crm, "max", path, **body)
        assert (answer.status_code, answer.json()["error"]) == (403, "refused"), path


async def test_a_purge_is_a_dry_run_unless_it_is_said(crm: Crm) -> None:
    """What was stored is a hit afterwards, and none after the real one."""
    abe = crm.as_user("abe")
    await abe.get("/api/accounts")
    assert (await post(crm, "abe", "purge", module="accounts")).json()["dry_run"] is True
    assert "; hit" in (await abe.get("/api/accounts")).headers["cache-status"]
    done = (await post(crm, "abe", "purge", module="accounts", dry_run=False)).json()
    assert (done["tenant"], done["confirmed"]) == (tenant(crm, "acme"), True)
    assert "fwd=stale" in (await abe.get("/api/accounts")).headers["cache-status"]
    assert (await get(crm, "abe", "audit-log")).json()[0]["action"] == "purge"


async def test_bad_input_is_named(crm: Crm) -> None:
    """With the value and what it must be."""
    for answer in (
        await get(crm, "root", "tenants", limit="many"),
        await get(crm, "root", "tenants", limit=0),
        await get(crm, "root", "tenants", limit="9" * 5000),
        await post(crm, "root", "purge", tenant="acme", mdoule="accounts"),
        await post(crm, "root", "switch"),
        await crm.as_user("root").post("/cache/api/purge", content=b"{"),
    ):
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid"), answer.text
        assert answer.json()["message"]
    assert (await get(crm, "root", "nothing")).json()["error"] == "not-found"
    assert (
        await crm.as_user("root").post("/cache/api/purge", content=b" " * 70_000)
    ).status_code == 413


async def test_nothing_of_it_is_ever_cached(crm: Crm) -> None:
    """Every answer, failures too, says no-store and has the headers that keep pages safe; none has
    a Cache-Status."""
    root = crm.as_user("root")
    for path in (
        "api/overview",
        "api/nothing",
        "api/tenants?limit=x",
        "nothing",
        "api/configuration",
    ):
        answer = await root.get(f"/cache/{path}")
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS, path
        assert "cache-status" not in answer.headers
    assert (await crm.as_user(None).get("/cache/api/overview")).headers[
        "cache-control"
    ] == "no-store"


async def test_it_can_stand_behind_a_path(crm: Crm) -> None:
    """As a proxy that strips a prefix announces it."""
    transport = httpx2.ASGITransport(crm.app, root_path="/behind/proxy")
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://crm", headers=crm.as_user("root").headers
    ) as client:
        answer = await client.get("/behind/proxy/cache")
        assert answer.headers["location"] == "/behind/proxy/cache/"
        assert (await client.get("/behind/proxy/cache/api/me")).status_code == 200


def test_words_of_errors_are_those_in_the_code() -> None:
    """The table of docs/reference.md against where they are said."""
    words = {
        word: int(status)
        for word, status in re.findall(r"^\| `([a-z-]+)` \| (\d+)", SECTION, re.MULTILINE)
    }
    source = Path(api.__file__).read_text() + Path(api.__file__).with_name("app.py").read_text()
    said = {
        word: int(status)
        for status, word in re.findall(r'(\d{3}),\s+(?:code=)?"([a-z-]+)"', source)
    }
    assert words == said | {word: status for status, word in api.ERRORS.values()}


async def test_methods_are_those_that_the_reference_lists(crm: Crm) -> None:
    """Nothing missing, nothing left over."""
    listed = set(re.findall(r"^\| `((?:GET|POST) api/\S+)`", SECTION, re.MULTILINE))
    (mount,) = (
        route for route in crm.app.app.routes if isinstance(route, Mount) and route.path == "/cache"
    )
    routes = {
        f"{method} {route.path.lstrip('/')}"
        for route in mount.app.routes
        for method in getattr(route, "methods", None) or ()
        if route.path.startswith("/api/") and method != "HEAD"
    }
    assert listed == routes


async def test_open_streams_end_when_the_dashboard_is_closed(crm: Crm) -> None:
    """As a server that shuts down needs it; each begins with all figures."""
    token = crm.as_user("root").headers["authorization"].split()[1]
    transport = httpx2.ASGITransport(crm.app)  # collects the whole answer
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://crm", cookies={auth.SESSION_COOKIE: token}
    ) as client:
        stream = asyncio.create_task(client.get("/cache/live"))
        while not crm.app.app.state.dashboard.streams:
            await asyncio.sleep(0.01)
        crm.app.app.state.dashboard.close()
        answer = await stream
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    _, first, *_ = answer.text.split("\n\n")
    name, data = first.splitlines()
    assert name == "event: stats"
    assert json.loads(data.removeprefix("data: "))["text"]["workers"][0] == "1"


async def test_streams_of_a_tenants_admin_are_of_the_tenant(crm: Crm) -> None:
    """Figures and invalidations, though nobody names the tenant."""
    await crm.as_user("abe").get("/api/accounts")
    for _ in range(3):
        await crm.as_user("gus").get("/api/accounts")
    for name in ("abe", "gus"):
        assert (
            await crm.as_user(name).post("/api/accounts", json={"name": "Acorn"})
        ).status_code == 201
    ids = {tenant(crm, slug) for slug in ("acme", "globex")}
    async with asyncio.timeout(60):
        while not ids <= {
            event["tenant"] for event in (await get(crm, "root", "feed")).json()["events"]
        }:
            await asyncio.sleep(0.05)
    token = crm.as_user("abe").headers["authorization"].split()[1]
    transport = httpx2.ASGITransport(crm.app)
    crm.app.app.state.dashboard.close()  # so that each stream ends with what it begins with
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://crm", cookies={auth.SESSION_COOKIE: token}
    ) as client:
        counters, feed = (
            (await client.get("/cache/live")).text,
            (await client.get("/cache/live/feed")).text,
        )
    text = json.loads(counters.split("data: ")[1])["text"]
    assert text["requests"][0] == "1"
    assert "server" not in text
    rows = json.loads(feed.split("data: ")[1])["html"]
    assert "POST /api/accounts" in rows
    assert "globex" not in rows
    assert tenant(crm, "globex") not in rows


@pytest.mark.parametrize(
    "change", [{"status": "inactive"}, {"role": "manager"}, {"role": "employee"}]
)
async def test_a_stream_ends_when_its_viewer_may_something_else(
    crm: Crm, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    """The gate is asked again and again; the page is loaded anew then, as whoever its viewer is by
    now."""
    monkeypatch.setattr(live, "RECHECK_S", 0.0)
    monkeypatch.setattr(live, "STATS_S", 0.01)
    token = crm.as_user("abe").headers["authorization"].split()[1]
    transport = httpx2.ASGITransport(crm.app)  # collects the whole answer
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://crm", cookies={auth.SESSION_COOKIE: token}
    ) as client:
        stream = asyncio.create_task(client.get("/cache/live"))
        while not crm.app.app.state.dashboard.streams:
            await asyncio.sleep(0.01)
        async with crm.session() as session, session.begin():
            user = await session.get(type(crm.users["abe"]), crm.users["abe"].id)
            for name, value in change.items():
                setattr(user, name, value)
        async with asyncio.timeout(60):
            answer = await stream
    assert answer.text.endswith("event: end\ndata: {}\n\n")
