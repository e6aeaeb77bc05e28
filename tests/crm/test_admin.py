"""Who may see and do what: ``Admin`` enforces every access itself. Two tenants, with answers,
writes, findings and switches."""

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from crm.settings import Settings, public_settings
from respcache import Cache, MemoryStore, SingleTenant
from respcache.core.errors import AccessRefused, InvalidOperation, NotFound
from respcache.core.keys import SHARED
from respcache.core.serving_lease import Outcome
from respcache.ops import admin as admins
from respcache.ops.access import Access, Role
from respcache.ops.admin import MAX_ROWS, Admin
from respcache.read.verifier import Mismatch

from .conftest import LONG_LEASE_S, MODULES, NEW, SECRET, Crm, hit

pytestmark = pytest.mark.anyio
ACTS = ("purge", "switch", "reveal")


@pytest.fixture
def lease_s() -> float:
    """Hits are what these tests look at."""
    return LONG_LEASE_S


class Ground:
    """The CRM after some traffic of both tenants, and everybody who may look."""

    def __init__(self, crm: Crm) -> None:
        self.crm = crm
        self.admin: Admin = crm.app.app.state.cache_admin
        self.acme, self.globex = (str(crm.tenants[name].id) for name in ("acme", "globex"))
        self.root = Access(name="root", role=Role.OPERATOR)
        self.viewer = Access(name="vic", role=Role.VIEWER)
        self.abe = Access(name="abe", role=Role.OPERATOR, tenant=self.acme)
        self.max = Access(name="max", role=Role.VIEWER, tenant=self.acme)
        self.key: dict[str, str] = {}

    @property
    def pending(self) -> Any:
        """The tenants with unconfirmed invalidations, to be changed."""
        return self.crm.cache.runtime.invalidator.blocked_tenants

    async def populate(self) -> None:
        """Have everything that could leak."""
        for name in ("abe", "gus"):
            for module in MODULES:
                for _ in range(2):
                    await self.crm.as_user(name).get(f"/api/{module}")
            await self.crm.as_user(name).post("/api/tasks", json=NEW["tasks"])
        await asyncio.sleep(0)
        await self.crm.cache.store.info()
        for tenant in (self.acme, self.globex):
            page = await self.admin.keys(self.root, tenant=tenant, module="leads")
            self.key[tenant] = page.keys[0].key
            await self.admin.purge(self.root, tenant=tenant, module="contacts")
            self.crm.cache.runtime.verifier.found.mismatches.append(finding(tenant))
            self.pending[tenant] = 1
        await self.admin.switch(self.root, off=True, tenant=self.globex)
        async with asyncio.timeout(60):
            while len((await self.admin.feed(self.root)).events) < 4:
                await asyncio.sleep(0.05)

    def request(self, name: str) -> dict[str, Any]:
        """Return a request of somebody, to be explained."""
        return {
            "path": "/api/leads",
            "headers": {"authorization": self.crm.as_user(name).headers["authorization"]},
        }


def finding(tenant: str) -> Mismatch:
    return Mismatch(
        at="now",
        kind="stale",
        tenant=tenant,
        module="leads",
        route="/api/leads",
        key="k",
        age_ms=1,
        certificate={},
        served={},
        confirmed={},
        held="a",
        found="b",
    )


@pytest.fixture
async def ground(crm: Crm) -> AsyncIterator[Ground]:
    made = Ground(crm)
    await made.populate()
    yield made
    made.pending.clear()  # nothing is to be waited for


def looks(
    ground: Ground, tenant: str | None, key: str, who: str
) -> dict[str, Callable[[Access], Any]]:
    """Return every method that only looks, as asked about a tenant (None: about nobody in
    particular)."""
    admin, about = ground.admin, {} if tenant is None else {"tenant": tenant}
    return {
        "overview": lambda access: admin.overview(access),
        "tenants": lambda access: admin.tenants(access),
        "tenant": lambda access: admin.tenant(access, tenant or ground.acme),
        "modules": lambda access: admin.modules(access, **about),
        "routes": lambda access: admin.routes(access, **about),
        "keys": lambda access: admin.keys(access, **about),
        "sample": lambda access: admin.sample(access, **about),
        "inspect": lambda access: admin.inspect(access, key),
        "explain": lambda access: admin.explain(access, **ground.request(who)),
        "feed": lambda access: admin.feed(access, **about),
        "audit_log": lambda access: admin.audit_log(access, **about),
        "switches": lambda access: admin.switches(access),
        "configuration": lambda access: admin.configuration(access),
        "dry run": lambda access: admin.purge(access, tenant=tenant or ground.acme, dry_run=True),
    }


def deeds(ground: Ground, tenant: str, key: str) -> dict[str, Callable[[Access], Any]]:
    """Return every act on a tenant."""
    admin = ground.admin
    return {
        "purge": lambda access: admin.purge(access, tenant=tenant),
        "purge of a module": lambda access: admin.purge(access, tenant=tenant, module="leads"),
        "purge of a key": lambda access: admin.purge(access, key=key),
        "switch": lambda access: admin.switch(access, off=True, tenant=tenant),
        "switch on": lambda access: admin.switch(access, off=False, tenant=tenant),
        "reveal": lambda access: admin.reveal(access, key),
    }


def global_deeds(ground: Ground) -> dict[str, Callable[[Access], Any]]:
    """Return every act on all tenants."""
    admin = ground.admin
    return {
        "switch of everything": lambda access: admin.switch(access, off=True),
        "switch of a module": lambda access: admin.switch(access, off=True, module="leads"),
        "switch everything on": lambda access: admin.switch(access, off=False),
    }


async def test_every_method_is_tried_here(ground: Ground) -> None:
    """A new one has to be added to the lists above."""
    methods = {
        name
        for name, _ in inspect.getmembers(Admin, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    tried = {name.split()[0] for name in looks(ground, None, "", "abe")} | {
        name.split()[0] for name in deeds(ground, "", "")
    }
    assert methods == tried - {"dry"}
    assert all("access" in inspect.signature(getattr(Admin, name)).parameters for name in methods)


async def test_an_operator_of_everything_sees_and_does_everything(ground: Ground) -> None:
    """Of each tenant and of all."""
    for tenant, who in ((ground.acme, "abe"), (ground.globex, "gus"), (None, "abe")):
        for name, look in looks(ground, tenant, ground.key[tenant or ground.acme], who).items():
            assert await look(ground.root) is not None, name
    overview = await ground.admin.overview(ground.root)
    assert (overview.source, overview.problem, overview.tenant) == ("all processes", "", None)
    assert overview.totals.hits > 0
    assert len(overview.processes) == 1
    assert overview.server is not None
    assert (
        {found.tenant for found in overview.findings}
        == set(overview.pending_tenants)
        == {ground.acme, ground.globex}
    )
    assert overview.hit_times is not None
    assert len(overview.series) == 360
    assert len((await ground.admin.overview(ground.root, minutes=1)).series) == 6
    assert {row.name for row in await ground.admin.modules(ground.root)} >= set(MODULES)
    (row,) = [row for row in await ground.admin.routes(ground.root) if row.name == "/api/leads"]
    assert (row.module, row.kind, row.level, row.ttl_s) == ("leads", "list", "strict", 180)
    assert row.fill_mean_s is not None
    ground.pending.clear()
    for name, deed in (
        deeds(ground, ground.acme, ground.key[ground.acme]) | global_deeds(ground)
    ).items():
        if name == "reveal":
            await ground.crm.as_user("abe").get("/api/leads")
            await asyncio.sleep(0)
        assert await deed(ground.root) is not None


async def test_a_viewer_sees_everything_and_does_nothing(ground: Ground) -> None:
    """Neither is it trailed."""
    audit_log = await ground.admin.audit_log(ground.root)
    for tenant in (ground.acme, None):
        for name, look in looks(ground, tenant, ground.key[ground.acme], "abe").items():
            assert await look(ground.viewer) is not None, name
    for access in (ground.viewer, ground.max):
        for deed in (
            deeds(ground, ground.acme, ground.key[ground.acme]) | global_deeds(ground)
        ).values():
            with pytest.raises(AccessRefused, match="operator"):
                await deed(access)
    assert await ground.admin.audit_log(ground.root) == audit_log


async def test_an_operator_of_a_tenant_does_what_concerns_the_own_tenant(ground: Ground) -> None:
    """Trailed under that name; the others notice nothing."""
    ground.pending.clear()
    await ground.admin.switch(ground.root, off=False, tenant=ground.globex)
    for name, deed in deeds(ground, ground.acme, ground.key[ground.acme]).items():
        if name == "reveal":
            await ground.crm.as_user("abe").get("/api/leads")
            await asyncio.sleep(0)
        assert await deed(ground.abe) is not None, name
    acts = await ground.admin.audit_log(ground.abe)
    assert [act.action for act in acts if act.name == "abe"] == [
        "reveal",
        "switch",
        "switch",
        "purge",
        "purge",
        "purge",
    ]
    assert hit(await ground.crm.as_user("gus").get("/api/leads"))
    assert (await ground.admin.switch(ground.abe, off=True, tenant=ground.acme)).tenants == [
        ground.acme
    ]


async def test_an_operator_of_a_tenant_does_nothing_that_concerns_others(ground: Ground) -> None:
    """Another tenant is not found, whether it exists or not; what is for all is refused."""
    audit_log = await ground.admin.audit_log(ground.root)
    assert ground.crm.cache.runtime.switches is not None
    off = ground.crm.cache.runtime.switches.off
    for tenant, key in (
        (ground.globex, ground.key[ground.globex]),
        ("nobody", ground.key[ground.globex].replace(ground.globex, "nobody")),
        (SHARED, ground.key[ground.globex].replace(ground.globex, SHARED)),
    ):
        for deed in deeds(ground, tenant, key).values():
            with pytest.raises(NotFound):
                await deed(ground.abe)
    for deed in global_deeds(ground).values():
        with pytest.raises(AccessRefused, match="all tenants"):
            await deed(ground.abe)
    assert await ground.admin.audit_log(ground.root) == audit_log
    assert ground.crm.cache.runtime.switches.off == off


@pytest.mark.parametrize("role", ["abe", "max"])
async def test_nothing_of_another_tenant_ever_appears(ground: Ground, role: str) -> None:
    """In no answer, whatever is asked: not its id, nor what it did, nor its figures."""
    access: Access = getattr(ground, role)
    for tenant in (None, ground.acme):
        for name, look in looks(ground, tenant, ground.key[ground.acme], "abe").items():
            if name == "configuration":
                with pytest.raises(AccessRefused):
                    await look(access)
                continue
            said = msgspec.json.encode(await look(access)).decode()
            assert ground.globex not in said, name
            assert "gus@" not in said, name
    for name, look in looks(ground, ground.globex, ground.key[ground.globex], "gus").items():
        if name in ("overview", "tenants", "switches", "configuration"):
            continue
        with pytest.raises(NotFound):
            await look(access)


async def test_the_figures_of_a_tenant_are_its_own(ground: Ground) -> None:
    """What is kept of all tenants together is not shown: times, processes, the server, the
    series."""
    for _ in range(10):
        await ground.crm.as_user("gus").get("/api/accounts")
    overview = await ground.admin.overview(ground.abe)
    own = ground.crm.cache.stats(ground.acme)
    assert (overview.tenant, overview.totals.hits, overview.totals.misses) == (
        ground.acme,
        own["hits"],
        own["misses"],
    )
    assert (overview.processes, overview.series, overview.server) == ([], [], None)
    assert (overview.hit_times, overview.miss_times) == (None, None)
    assert (
        [found.tenant for found in overview.findings] == overview.pending_tenants == [ground.acme]
    )
    assert overview.switches.tenants == []
    (row,) = await ground.admin.tenants(ground.abe)
    assert (row.name, row.requests) == (ground.acme, overview.totals.requests)
    for rows in (await ground.admin.modules(ground.abe), await ground.admin.routes(ground.abe)):
        assert sum(row.hits for row in rows) == own["hits"]
        assert all(
            row.hit_p50_s is None and row.saved_s is None and row.fill_mean_s is None
            for row in rows
        )
    assert await ground.crm.cache.publisher.publish()
    all_of_them = await ground.admin.tenants(ground.root)
    assert {row.name for row in all_of_them} == {ground.acme, ground.globex, SHARED}
    ordered = [row.name for row in await ground.admin.tenants(ground.root, order="tenant")]
    assert ordered == sorted([ground.acme, ground.globex, SHARED])
    assert len(await ground.admin.tenants(ground.root, limit=1)) == 1


@pytest.mark.parametrize("module", [None, "leads"])
async def test_a_switch_says_what_is_off_and_is_followed(
    ground: Ground, module: str | None
) -> None:
    """And who did it is trailed."""
    ground.pending.clear()
    said = await ground.admin.switch(ground.root, off=True, module=module)
    assert said.propagated
    assert (said.everything, said.modules, said.enabled) == (
        module is None,
        ["leads"] if module else [],
        module is not None,
    )
    answer = await ground.crm.as_user("abe").get("/api/leads")
    assert answer.headers["cache-status"].endswith("detail=off")
    assert (await ground.admin.switches(ground.abe)).modules == said.modules
    await ground.admin.switch(ground.root, off=False, module=module)
    assert hit(await ground.crm.as_user("abe").get("/api/leads"))
    last, first = (await ground.admin.audit_log(ground.root))[:2]
    module_given = {"module": module} if module else {}
    assert [(act.action, act.tenant, act.details) for act in (first, last)] == [
        ("switch", None, {"off": True, **module_given}),
        ("switch", None, {"off": False, **module_given}),
    ]


async def test_what_cannot_be_is_refused_by_name(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trailed."""
    audit_log = await ground.admin.audit_log(ground.root)
    with pytest.raises(NotFound, match=r"no module 'nothing'; known are accounts"):
        await ground.admin.switch(ground.root, off=True, module="nothing")
    with pytest.raises(InvalidOperation, match="not both"):
        await ground.admin.switch(ground.root, off=True, module="leads", tenant=ground.acme)
    with pytest.raises(NotFound):
        await ground.admin.switch(ground.root, off=True, tenant="a b")
    for minutes in (0, 61):
        with pytest.raises(InvalidOperation, match=str(minutes)):
            await ground.admin.overview(ground.root, minutes=minutes)
    for limit in (0, MAX_ROWS + 1):
        for question in (
            ground.admin.tenants,
            ground.admin.keys,
            ground.admin.feed,
            ground.admin.audit_log,
        ):
            with pytest.raises(InvalidOperation, match=str(limit)):
                await question(ground.root, limit=limit)
    with pytest.raises(InvalidOperation, match="order"):
        await ground.admin.tenants(ground.root, order="size")  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        await ground.admin.tenant(ground.root, "nobody")
    monkeypatch.setattr(admins, "MAX_SWITCHES", 1)
    with pytest.raises(InvalidOperation, match="1 tenants and modules"):
        await ground.admin.switch(ground.root, off=True, tenant=ground.acme)
    assert await ground.admin.audit_log(ground.root) == audit_log
    assert (await ground.admin.switch(ground.root, off=True)).everything  # however many are off


@pytest.mark.parametrize(
    "wrong",
    [
        {"role": "admin"},
        {"role": "viewer", "tenant": ""},
        {"role": "viewer", "tenant": SHARED},
        {"role": "viewer", "tenant": "*"},
    ],
)
def test_an_access_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    """An empty tenant must not become an access to all."""
    with pytest.raises(InvalidOperation):
        Access(name="x", **wrong)


# -- configuration ---------------------------------------------------------------------------------


async def test_the_configuration_says_where_each_value_comes_from(ground: Ground) -> None:
    """And nothing secret."""
    found = {setting.name: setting for setting in await ground.admin.configuration(ground.viewer)}
    said = repr(found)
    assert SECRET not in said
    password = re.search(
        r":([^:@/]+)@", ground.crm.app.app.state.settings.redis_cache_url.get_secret_value()
    )
    assert password is not None
    assert password[1] not in said
    assert "only-for-tests" not in said
    assert (
        found["Cache.secret"].value,
        found["JWT_SECRET"].value,
        found["METRICS_TOKEN"].value,
    ) == ("set", "set", "not set")
    assert (found["Cache.near_bytes"].value, found["Cache.near_bytes"].source) == (
        str(64 * 1024 * 1024),
        "default",
    )
    assert (found["Cache.strict_reads"].value, found["Cache.strict_reads"].source) == (
        "True",
        "argument",
    )
    assert (found["Cache.outbox"].value, found["Cache.outbox"].source) == (
        "PostgresOutbox, lease 10.0 s",
        "argument",
    )
    options = set(inspect.signature(Cache).parameters) - {"clock"}
    assert options == {name.removeprefix("Cache.") for name in found if name.startswith("Cache.")}


def test_settings_of_the_environment_are_named_after_their_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was given by the program is an argument, everything else a default."""
    monkeypatch.setenv("RESPCACHE_NEAR_BYTES", "1000")
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:hidden@db.example:5432/crm?ssl=1")
    found = {setting.name: setting for setting in public_settings(Settings(port=4002))}
    assert (found["RESPCACHE_NEAR_BYTES"].value, found["RESPCACHE_NEAR_BYTES"].source) == (
        "1000",
        "RESPCACHE_NEAR_BYTES",
    )
    assert (found["PORT"].value, found["PORT"].source) == ("4002", "argument")
    assert (found["LOG_LEVEL"].value, found["LOG_LEVEL"].source) == ("info", "default")
    assert found["DATABASE_URL"].value == "postgresql+asyncpg://db.example:5432/crm"
    assert set(found) == {name.upper() for name in Settings.model_fields}


async def test_without_a_server_the_figures_are_of_this_process() -> None:
    """And that is said."""
    cache = Cache(MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("t"), verify_share=0)
    admin = Admin(cache)
    root = Access(name="root", role=Role.OPERATOR)
    await cache.connect()
    cache.counters.at("t", "things", "/things").hits += 3
    overview = await admin.overview(root)
    assert (overview.source, overview.totals.hits) == ("this process", 3)
    assert overview.problem
    assert [row.name for row in await admin.tenants(root)] == ["t"]
    assert (await admin.feed(root)).processes == "this"
    cache.feed.note([("t", "T:x", "")], Outcome.CONFIRMED, 0.0)
    assert len((await admin.feed(root)).events) == 1
    await cache.close()
