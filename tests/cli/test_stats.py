"""``respcache status`` and ``stats``: every field that they read is one that ``Admin`` says, and
what is wrong is said."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from respcache import Cache, MemoryStore, SingleTenant
from respcache.ops.access import Access, Role
from respcache.ops.admin import Admin

# private: no test can cause such a state of a process
from respcache.ops.cli.stats import _process, _row, problems_of
from respcache.ops.stats.rows import Overview
from respcache.ops.stats.shapes import LeaseStats, Process
from respcache.read.verifier import Mismatch

pytestmark = pytest.mark.anyio
ROOT = Access(name="root", role=Role.OPERATOR)
OWN = Access(name="ann", role=Role.OPERATOR, tenant="acme")
FENCE = LeaseStats(
    alive=False,
    age_s=None,
    lease_s=2.0,
    cycles=0,
    cycles_failed=1,
    epochs_begun=0,
    pending_rows=3,
    pending_s=4.5,
    problem="the database is away",
    unsound_tables=["leads"],
)
FINDING = Mismatch(
    at="2026-01-02T03:04:05+00:00",
    kind="stale",
    tenant="acme",
    module="leads",
    route="/api/leads",
    key="k",
    age_ms=1,
    certificate={},
    served={},
    confirmed={},
    held="",
    found="",
)


def problems(overview: dict[str, Any]) -> list[str]:
    """Return the problems of an overview."""
    return list(problems_of(overview))


class Running:
    """A cache in this process, as its operators see it."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.cache = Cache(
            MemoryStore(),
            secret=b"k" * 32,
            resolver=SingleTenant("acme"),
            verify_share=0,
            enabled=enabled,
        )
        self.admin = Admin(self.cache)

    async def overview(self, access: Access, **changed: Any) -> dict[str, Any]:
        """Return what the API says, with what happened to it."""
        said: Overview = await self.admin.overview(access)
        return dict(msgspec.to_builtins(msgspec.structs.replace(said, **changed)))

    async def process(self, **changed: Any) -> Process:
        """Return what a process says of itself, with what happened to it."""
        return msgspec.structs.replace((await self.admin.overview(ROOT)).processes[0], **changed)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    made = Running()
    await made.cache.connect()
    yield made
    await made.cache.close()


async def test_nothing_is_wrong(running: Running) -> None:
    """To nobody."""
    assert [problems(await running.overview(access)) for access in (ROOT, OWN)] == [[], []]


async def test_a_tenants_admin_hears_what_is_switched_off(running: Running) -> None:
    """Everything, or the own tenant; of another one nothing."""
    await running.cache.disable(tenant_id="globex")
    assert problems(await running.overview(OWN)) == []
    await running.cache.disable(tenant_id="acme")
    assert problems(await running.overview(OWN)) == ["tenant acme is switched off"]
    assert problems(await running.overview(ROOT)) == []
    await running.cache.disable()
    assert len(problems(await running.overview(OWN))) == 2
    assert "switched off for all" in problems(await running.overview(ROOT))[0]


@pytest.mark.parametrize(
    ("access", "who"),
    [(ROOT, "{name} "), (OWN, "the process that responded ")],
    ids=["root", "admin"],
)
async def test_a_process_that_was_started_without_its_cache_is_named(
    access: Access, who: str
) -> None:
    """Once; to the admin of a tenant, who sees no processes, the one that answered."""
    running = Running(enabled=False)
    await running.cache.connect()
    process = await running.process()
    (problem,) = problems(await running.overview(access))
    assert problem.startswith(
        who.format(name=f"{process.host}:{process.pid}")
        + "serves nothing from the cache: it was started"
    )
    (problem,) = problems(await running.overview(OWN, available=False))
    assert "server is unavailable" in problem
    await running.cache.close()


async def test_a_store_that_is_away_is_one_problem(running: Running) -> None:
    """And not one more for what follows from it."""
    process = await running.process(
        available=False, lease=msgspec.structs.replace(FENCE, unsound_tables=[])
    )
    for access in (ROOT, OWN):
        (problem,) = problems(await running.overview(access, available=False, processes=[process]))
        assert "server is unavailable" in problem
    (other,) = problems(await running.overview(ROOT, processes=[process]))
    assert other.endswith("is not connected to the cache server")


async def test_a_process_without_a_fence_says_why(running: Running) -> None:
    """And which tables are not cached."""
    process = await running.process(lease=FENCE)
    fenced, tables = problems(await running.overview(ROOT, processes=[process]))
    assert (
        "has no serving lease, so it serves nothing from the cache: the database is away" in fenced
    )
    assert "leads" in tables


async def test_the_last_wrong_answer_is_named(running: Running) -> None:
    """With its kind, route, tenant and time."""
    (problem,) = problems(await running.overview(ROOT, findings=[FINDING] * 2))
    assert (
        "(2 are kept), the last one stale: /api/leads of tenant acme, at 2026-01-02T03:04:05"
        in problem
    )


async def test_rows_are_made_of_what_the_api_says(running: Running) -> None:
    """Of a process with a fence and without, and of modules."""
    await running.cache.get_or_set("acme", "leads", {}, _make)
    for process in (await running.process(), await running.process(lease=FENCE, pending_tenants=7)):
        cells = [str(cell) for cell in _process(msgspec.to_builtins(process))]
        assert ("3, for 4.5 s" in cells) == (process.lease is not None)
        assert ("7" in cells) == (process.lease is not None)
    (row,) = msgspec.to_builtins(await running.admin.modules(ROOT))
    assert _row(row)[0] == "leads"


async def _make() -> int:
    return 1
