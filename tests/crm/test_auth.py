"""Who may see what: login, tokens, tenants, roles, team visibility, and the cache under all of
it."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import jwt
import pytest
from sqlalchemy import delete, update

from crm.auth import issue_token
from crm.models import Employee, Tenant

from .conftest import LONG_LEASE_S, MODULES, NEW, PASSWORD, SECRET, SINGULAR, Crm, hit, status

pytestmark = pytest.mark.anyio


async def names(crm: Crm, user: str, query: str = "") -> list[str]:
    answer = await crm.as_user(user).get(f"/api/accounts?sort=name{query}")
    assert answer.status_code == 200, answer.text
    return [row["name"] for row in answer.json()["data"]["accounts"]]


@pytest.fixture
def lease_s() -> float:
    """Hits are what these tests look at."""
    return LONG_LEASE_S


async def test_login_gives_a_token_that_works(crm: Crm) -> None:
    """As bearer and as cookie; the password never comes back."""
    http = crm.as_user(None)
    answer = await http.post(
        "/api/auth/login", json={"email": "Ann@X.example", "password": PASSWORD}
    )
    token = answer.json()["data"]["access_token"]
    assert answer.headers["cache-control"] == "no-store"
    assert PASSWORD not in answer.text
    for headers in ({"authorization": f"Bearer {token}"}, {"cookie": f"access_token={token}"}):
        me = await http.get("/api/auth/me", headers=headers)
        assert (me.json()["data"]["email"], me.json()["data"]["role"]) == (
            "ann@x.example",
            "employee",
        )


async def test_wrong_logins_are_indistinguishable(crm: Crm) -> None:
    """An unknown mail and a wrong password get the same answer."""
    http = crm.as_user(None)
    answers = [
        await http.post("/api/auth/login", json={"email": mail, "password": password})
        for mail, password in (("ann@x.example", "wrong"), ("nobody@x.example", PASSWORD))
    ]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].content == answers[1].content
    assert PASSWORD not in (await http.post("/api/auth/login", json={"password": PASSWORD})).text


def token_of(crm: Crm, name: str, **changes: Any) -> str:
    user = crm.users[name]
    claims = {
        "sub": str(user.id),
        "tenant_id": str(user.tenant_id),
        "exp": datetime.now(UTC) + timedelta(hours=1),
        **changes,
    }
    return jwt.encode(
        {k: v for k, v in claims.items() if v is not None}, changes.pop("key", SECRET), "HS256"
    )


async def test_only_a_valid_token_is_somebody(crm: Crm) -> None:
    """Expired, unsigned, foreign, of nobody, of another tenant, without expiry: all are nobody."""
    bad = [
        "",
        "x",
        token_of(crm, "ann", exp=datetime.now(UTC) - timedelta(seconds=5)),
        token_of(crm, "ann", exp=None),
        token_of(crm, "ann", sub=str(uuid4())),
        token_of(crm, "ann", sub="ann"),
        token_of(crm, "ann", tenant_id=str(uuid4())),
        jwt.encode({"sub": str(crm.users["ann"].id), "exp": 9999999999}, "other" * 10, "HS256"),
        jwt.encode({"sub": str(crm.users["ann"].id), "exp": 9999999999}, None, "none"),
    ]
    http = crm.as_user(None)
    for token in bad:
        answer = await http.get("/api/accounts", headers={"authorization": f"Bearer {token}"})
        assert (answer.status_code, answer.json()["message"]) == (401, "Authentication required")
        assert "hit" not in status(answer)


async def test_a_token_that_was_good_ends_when_it_says(crm: Crm) -> None:
    """Its signature is checked once, its time at every request."""
    token = issue_token(SECRET, crm.users["ann"], hours=3 / 3600)
    headers = {"authorization": f"Bearer {token}"}
    expires = jwt.decode(token, options={"verify_signature": False})["exp"]
    seen = set()
    while (now := time.time()) < expires + 0.5:
        answer = await crm.as_user(None).get("/api/accounts", headers=headers)
        if now > expires or time.time() < expires:
            seen.add((now > expires, answer.status_code))
        await asyncio.sleep(0.05)
    assert seen == {(False, 200), (True, 401)}


async def test_the_role_in_the_token_does_not_count(crm: Crm) -> None:
    """Role, team and status are the database's."""
    forged = token_of(crm, "ann", role="superadmin")
    answer = await crm.as_user(None).get(
        "/api/system/cache-stats", headers={"authorization": f"Bearer {forged}"}
    )
    assert answer.status_code == 403


async def test_slug_and_uuid_callers_share_and_invalidate_each_other(crm: Crm) -> None:
    """One canonical tenant: by query, by header, by nothing."""
    await crm.save(crm.account("acme", "One"))
    tenant = crm.tenants["acme"].id
    assert await names(crm, "ann") == ["One"]
    for query in (
        "&tenant_id=acme",
        f"&tenant_id={tenant}",
        "&tenant_id=ACME",
        f"&tenant_id={str(tenant).upper()}",
    ):
        assert hit(await crm.as_user("ann").get(f"/api/accounts?sort=name{query}"))
    assert hit(
        await crm.as_user("ann").get("/api/accounts?sort=name", headers={"x-tenant-id": "acme"})
    )
    created = await crm.as_user("ann").post(
        "/api/accounts", json={"name": "Two", "tenant_id": "acme"}
    )
    assert created.status_code == 201
    assert await names(crm, "ann", f"&tenant_id={tenant}") == ["One", "Two"]


@pytest.mark.parametrize("module", MODULES)
async def test_another_tenant_gets_nothing_of_ours(crm: Crm, module: str) -> None:
    """Lists, details, changes, deletes and conversions; a foreign id looks exactly like an unknown
    one."""
    mine, theirs = crm.as_user("ann"), crm.as_user("gus")
    record = (await mine.post(f"/api/{module}", json=NEW[module])).json()["data"][SINGULAR[module]]
    for _ in range(2):
        await mine.get(f"/api/{module}")
        await mine.get(f"/api/{module}/{record['id']}")
    assert (await theirs.get(f"/api/{module}")).json()["data"]["total"] == 0
    unknown = f"/api/{module}/{uuid4()}"
    foreign = f"/api/{module}/{record['id']}"
    actions = {"leads": "convert", "bizdevsources": "promote"}
    for method, suffix, body in (
        ("GET", "", None),
        ("PUT", "", {"tags": []}),
        ("DELETE", "", None),
        ("POST", f"/{actions.get(module, 'none')}", {}),
        ("GET", "/related-people", None),
    ):
        one = await theirs.request(method, foreign + suffix, json=body)
        other = await theirs.request(method, unknown + suffix, json=body)
        assert (one.status_code, one.content) == (other.status_code, other.content), method
        assert one.status_code in (404, 405)
    refused = await theirs.get(f"/api/{module}?tenant_id=acme")
    assert (refused.status_code, refused.json()["message"]) == (
        403,
        "Access denied: You do not have permission to access this tenant's data.",
    )
    assert (await mine.get(f"/api/{module}/{record['id']}")).status_code == 200


async def test_a_reference_to_another_tenants_row_is_refused(crm: Crm) -> None:
    """Neither an account nor an employee of somebody else."""
    theirs = crm.account("globex", "Theirs")
    await crm.save(theirs)
    for field, value in (("account_id", theirs.id), ("assigned_to", crm.users["gus"].id)):
        answer = await crm.as_user("ann").post(
            "/api/contacts", json={**NEW["contacts"], field: str(value)}
        )
        assert (answer.status_code, answer.json()["field"]) == (422, field)
    lead = (await crm.as_user("ann").post("/api/leads", json=NEW["leads"])).json()["data"]["lead"]
    answer = await crm.as_user("ann").post(
        f"/api/leads/{lead['id']}/convert", json={"selected_account_id": str(theirs.id)}
    )
    assert (answer.status_code, answer.json()["message"]) == (404, "Account not found")


async def test_same_visibility_shares_and_different_never(crm: Crm) -> None:
    """Two of one team share an entry; another team, their manager and the admin have others."""
    for name in ("nora", "nils", "suzy", "max", None):
        owner = crm.users[name].id if name else None
        await crm.save(crm.account("globex", name or "nobody's", assigned_to=owner))
    expected = {
        "nora": ["nils", "nobody's", "nora"],
        "nils": ["nils", "nobody's", "nora"],
        "suzy": ["nobody's", "suzy"],
        "max": ["max", "nils", "nobody's", "nora", "suzy"],
        "gus": ["max", "nils", "nobody's", "nora", "suzy"],
    }
    for _ in range(2):
        for user, visible in expected.items():
            assert await names(crm, user) == visible, user
    assert hit(await crm.as_user("nils").get("/api/accounts?sort=name"))
    await crm.as_user("gus").get("/api/accounts?limit=7")
    assert not hit(await crm.as_user("max").get("/api/accounts?limit=7"))
    assert not hit(await crm.as_user("nora").get("/api/accounts?limit=7"))
    assert hit(await crm.as_user("nils").get("/api/accounts?limit=7"))


async def test_an_invisible_row_looks_unknown_and_cannot_be_changed(crm: Crm) -> None:
    """Visibility holds for details and writes as for lists."""
    hidden = crm.account("globex", "suzy's", assigned_to=crm.users["suzy"].id)
    await crm.save(hidden)
    http, path = crm.as_user("nora"), f"/api/accounts/{hidden.id}"
    assert {
        (await http.request(method, path, json={})).status_code
        for method in ("GET", "PUT", "DELETE")
    } == {404}
    assert (await crm.as_user("suzy").get(path)).status_code == 200


@pytest.mark.parametrize("change", ["team", "mode", "role", "new member"])
async def test_a_change_of_visibility_takes_effect_at_once(crm: Crm, change: str) -> None:
    """Team, mode of the tenant, role, membership: the next request sees it, memo and cache
    notwithstanding."""
    await crm.save(
        *(crm.account("globex", name, assigned_to=crm.users[name].id) for name in ("nora", "suzy"))
    )
    for _ in range(2):
        assert await names(crm, "nora") == ["nora"]
    async with crm.session() as session, session.begin():
        nora = await session.get_one(Employee, crm.users["nora"].id)
        if change == "team":
            nora.team_id = crm.teams["south"].id
        elif change == "role":
            nora.role = "admin"
        elif change == "mode":
            (await session.get_one(Tenant, crm.tenants["globex"].id)).settings = {
                "visibility_mode": "shared"
            }
        else:
            (await session.get_one(Employee, crm.users["suzy"].id)).team_id = crm.teams["north"].id
    await crm.cache.settled()
    assert await names(crm, "nora") == ["nora", "suzy"]
    assert await names(crm, "nora") == ["nora", "suzy"]


async def test_visibility_never_lags_while_the_team_changes_under_load(crm: Crm) -> None:
    """Readers hammer while the user moves between teams; after each confirmed move only the new
    view is served."""
    await crm.save(
        *(crm.account("globex", name, assigned_to=crm.users[name].id) for name in ("nils", "suzy"))
    )
    views = {"north": ["nils"], "south": ["suzy"]}
    now, epoch, done = "north", 0, asyncio.Event()
    wrong: list[Any] = []
    reads = 0

    async def reader() -> None:
        nonlocal reads
        while not done.is_set():
            began, team = epoch, now
            seen = await names(crm, "nora")
            reads += 1
            if epoch == began and began % 2 == 0 and seen != views[team]:
                wrong.append((team, seen))

    readers = [asyncio.create_task(reader()) for _ in range(6)]
    for move in range(20):
        epoch += 1  # odd: under way
        now = "south" if move % 2 == 0 else "north"
        async with crm.session() as session, session.begin():
            (await session.get_one(Employee, crm.users["nora"].id)).team_id = crm.teams[now].id
        await crm.cache.settled()
        epoch += 1
        target = reads + 30
        while reads < target:
            await asyncio.sleep(0)
    done.set()
    await asyncio.gather(*readers)
    assert wrong == []
    assert crm.cache.counters.of(str(crm.tenants["globex"].id), "accounts").hits > 100


async def test_a_user_who_is_gone_is_refused_at_once(crm: Crm) -> None:
    """Deactivated or deleted, however warm the cache is."""
    for name, away in (("ann", "status"), ("abe", "delete")):
        http = crm.as_user(name)
        await http.get("/api/accounts")
        assert hit(await http.get("/api/accounts"))
        async with crm.session() as session, session.begin():
            where = (
                Employee.tenant_id == crm.tenants["acme"].id,
                Employee.id == crm.users[name].id,
            )
            await session.execute(
                delete(Employee).where(*where)
                if away == "delete"
                else update(Employee).where(*where).values(status="left")
            )
        await crm.cache.settled()
        assert (await http.get("/api/accounts")).status_code == 401


async def test_a_superadmin_reads_any_tenant_or_all_and_writes_to_one(crm: Crm) -> None:
    """Without a tenant nothing is cached; with one the tenant's entries are shared."""
    await crm.save(crm.account("acme", "A"), crm.account("globex", "G"))
    root = crm.as_user("root")
    everything = await root.get("/api/accounts?sort=name")
    assert [row["name"] for row in everything.json()["data"]["accounts"]] == ["A", "G"]
    assert status(everything) == "respcache; fwd=bypass; detail=no-tenant"
    assert await names(crm, "root", "&tenant_id=acme") == ["A"]
    assert hit(await root.get(f"/api/accounts?sort=name&tenant_id={crm.tenants['acme'].id}"))
    assert hit(await crm.as_user("ann").get("/api/accounts?sort=name"))
    refused = await root.post("/api/accounts", json={"name": "X"})
    assert (refused.status_code, refused.json()["message"]) == (
        400,
        "Superadmin write operations require a tenant_id to be specified",
    )
    assert (
        await root.post("/api/accounts", json={"name": "B", "tenant_id": "acme"})
    ).status_code == 201
    assert await names(crm, "ann") == ["A", "B"]
    assert (await root.get("/api/accounts?tenant_id=nowhere")).status_code == 404


async def test_a_renamed_slug_is_followed_by_superadmins(crm: Crm) -> None:
    """The slug is data: it is resolved under a certificate too."""
    await crm.save(crm.account("acme", "A"), crm.account("globex", "G"))
    assert await names(crm, "root", "&tenant_id=acme") == ["A"]
    async with crm.session() as session, session.begin():
        (await session.get_one(Tenant, crm.tenants["acme"].id)).slug = "old-acme"
        await session.flush()
        (await session.get_one(Tenant, crm.tenants["globex"].id)).slug = "acme"
    await crm.cache.settled()
    assert await names(crm, "root", "&tenant_id=acme") == ["G"]


async def test_a_user_without_a_tenant_is_told_so(crm: Crm) -> None:
    """403 with the words that the front end knows."""
    async with crm.session() as session, session.begin():
        (await session.get_one(Employee, crm.users["root"].id)).role = "manager"
    await crm.cache.settled()
    answer = await crm.as_user("root").get("/api/accounts")
    assert (answer.status_code, answer.json()["message"]) == (
        403,
        "User not assigned to any tenant. Contact administrator.",
    )
