"""How a read is decided, and that a remembered proof never says more than the decision."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respcache import Cache, Level, MemoryStore, Policy, Route, SingleTenant
from respcache.core.decision import (
    HIT,
    Bypass,
    Caller,
    Candidate,
    Miss,
    Need,
    admit,
    decide,
)
from respcache.core.entry import Entry
from respcache.core.generations import Certificate, GenerationView
from respcache.core.keys import CacheKey
from respcache.core.serving_lease import ServingLease
from respcache.read.plans import ScopedPlan
from respcache.stores.memory import MemoryServer
from respcache.writes.relay import OutboxRelay

KEY = CacheKey("entry", "lock", b"digest", ("*", "T:things"), "generation", "/things")
CERTIFICATE = Certificate(b"nonce", 5)
ENTRY = Entry(CERTIFICATE, b"digest", 0, 100, 1, 200, (), b"body")
VIEW = GenerationView("server", b"nonce", "server", 7, {"T:others": 7})
LEASE = ServingLease("server", until=10.0)
CALLER = Caller("acme", certificate=CERTIFICATE, tags=("T:users",))


def decided(
    candidate: Candidate | None = None,
    caller: Caller = CALLER,
    lease: ServingLease | None = LEASE,
    **changes: Any,
) -> Any:
    """Decide a read that is a hit but for these changes."""
    given: dict[str, Any] = {"view": VIEW, "owner_view": VIEW, "now": 9.0} | changes
    return decide(candidate or Candidate(KEY, ENTRY, expires_at=20.0), caller, lease, **given)


def test_a_hit() -> None:
    """Everything is as it must be; without an outbox no lease is needed."""
    assert decided() is HIT
    assert decided(lease=None) is HIT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"covered": False}, "no-trigger"),
        ({"tenant": None}, "no-tenant"),
        ({"permitted": False}, "denied"),
        ({"is_off": True}, "off"),
        ({"blocked": True}, "pending-invalidation"),
    ],
)
def test_a_caller_who_may_not_be_served_bypasses(change: dict[str, Any], reason: str) -> None:
    """Before a view or an entry counts."""
    caller = replace(CALLER, **change)
    expected = Bypass(reason, caller.tenant)
    assert admit(caller) == expected
    assert decided(caller=caller) == expected
    assert decided(Candidate(KEY, None), caller, view=None, owner_view=None) == expected


@pytest.mark.parametrize("change", [{"now": 10.0}, {"view": replace(VIEW, server="other")}])
def test_a_lease_that_has_ended_or_names_another_server_bypasses(change: dict[str, Any]) -> None:
    """At its end it has ended."""
    assert decided(**change) == Bypass("no-lease")


def test_a_view_is_needed_unless_the_entry_may_do_without() -> None:
    """At level ``ttl`` an entry may be served without a view, but not without a lifetime."""
    without = {"view": None, "owner_view": None}
    assert decided(**without) is Need.VIEW
    assert decided(**without, needs_view=False) is HIT
    assert decided(**without, needs_view=False, now=20.0, lease=None) == Miss("expired")


def test_an_outdated_scope_is_read_again_before_the_entry_counts() -> None:
    """Whatever is stored under the key of the old scope."""
    bumped = replace(VIEW, bumps={"T:users": 6})
    assert decided(owner_view=bumped) is Need.SCOPE
    assert decided(Candidate(KEY, None, present=False), owner_view=bumped) is Need.SCOPE
    assert decided(caller=replace(CALLER, certificate=None), owner_view=bumped) is HIT


def test_without_a_usable_generation_one_is_needed() -> None:
    """There is none, or it is of another server life."""
    value = replace(CALLER, certificate=None)
    for view in (GenerationView("server"), replace(VIEW, recorded="former")):
        assert decided(caller=value, view=view, owner_view=view) is Need.GENERATION


@pytest.mark.parametrize(
    ("candidate", "change", "reason"),
    [
        (Candidate(KEY, None, present=False), {}, "absent"),
        (Candidate(KEY, None), {}, "unreadable"),
        (Candidate(KEY, ENTRY, expires_at=9.0), {}, "expired"),
        (Candidate(KEY, replace(ENTRY, digest=b"other")), {}, "digest"),
        (Candidate(KEY, ENTRY), {"view": replace(VIEW, bumps={"T:things": 6})}, "invalidated"),
        (Candidate(KEY, ENTRY), {"view": replace(VIEW, nonce=b"new")}, "other-generation"),
    ],
)
def test_a_miss_says_why(candidate: Candidate, change: dict[str, Any], reason: str) -> None:
    """Only an absent entry is not outdated."""
    decision = decided(candidate, **change)
    assert decision == Miss(reason)
    assert decision.outdated == (reason != "absent")


# -- proofs ----------------------------------------------------------------------------------------


class NoOutbox:
    """The outbox of a relay that does not run: the test sets what it would have found."""

    lease_s = 2.0
    own_rows = ""


class World:
    """One process with one cached route of each level, whose relay the test plays."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.server = MemoryServer()
        self.store, self.other = MemoryStore(self.server), MemoryStore(self.server)
        self.deaf = False
        self.cache = Cache(
            self.store,
            secret=b"k" * 32,
            resolver=SingleTenant("acme"),
            verify_share=0,
            clock=lambda: self.now,
        )
        routes = [
            Route.of(f"/{level}", Policy("things", "list", 50, ("things",), level=level, bound_s=5))
            for level in Level
        ]
        self.wrapped = self.cache.wrap(respond, routes)
        assert self.cache.runtime is not None
        self.runtime = self.cache.runtime
        outbox: Any = NoOutbox()
        self.relay = OutboxRelay(self.store, outbox, generation_ttl_ms=10**6, clock=self.clock)
        self.runtime.guards.relay = self.relay
        self.renew_lease()
        self.relay.coverage.tables = frozenset({"things"})

    def clock(self) -> float:
        """Return the test's time."""
        return self.now

    def renew_lease(self) -> None:
        """Grant a lease for the server that the store is connected to."""
        self.relay.lease = ServingLease(self.server.identity, until=self.now + 2)

    def scoped_plans(self) -> list[ScopedPlan]:
        """Return the plans that may hold a proof."""
        plan_cache = self.wrapped.plan_cache
        plans = [] if plan_cache is None else plan_cache.plans()
        return [plan.scoped for plan in plans if plan.scoped is not None]

    async def request(self, level: Level) -> None:
        """Send a request, so that a hit is proven."""

        async def receive() -> Any:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            """Receive the response."""

        scope = {
            "type": "http",
            "method": "GET",
            "path": f"/{level}",
            "query_string": b"",
            "headers": [],
        }
        await self.wrapped(scope, receive, send)
        await asyncio.sleep(0)


async def respond(scope: Any, receive: Any, send: Any) -> None:
    """The application."""
    headers = [(b"content-length", b"4")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"rows"})


async def _request(world: World, level: Level) -> None:
    await world.request(level)


async def _wait(world: World, level: Level) -> None:
    world.now += 0.7


async def _renew_lease(world: World, level: Level) -> None:
    world.renew_lease()


async def _lease_for_another_server(world: World, level: Level) -> None:
    world.relay.lease = ServingLease("other", until=world.now + 2)


async def _unwatch(world: World, level: Level) -> None:
    world.relay.coverage.tables = frozenset()


async def _watch(world: World, level: Level) -> None:
    world.relay.coverage.tables = frozenset({"things"})


async def _bump(world: World, level: Level) -> None:
    await world.cache.writes.bump_now({"acme": ["T:things"]})


async def _bump_by_another(world: World, level: Level) -> None:
    await world.other.bump("tenant:acme:~gen", tags=["T:things"], ttl_ms=10**6)


async def _evict(world: World, level: Level) -> None:
    world.runtime.near.clear()


async def _lose_the_generation(world: World, level: Level) -> None:
    world.server.delete("tenant:acme:~gen")


async def _switch_off(world: World, level: Level) -> None:
    await world.cache.disable(tenant_id="acme")


async def _switch_on(world: World, level: Level) -> None:
    await world.cache.enable(tenant_id="acme")


async def _block(world: World, level: Level) -> None:
    blocked: Any = world.runtime.invalidator.blocked_tenants
    blocked["acme"] = 1


async def _unblock(world: World, level: Level) -> None:
    blocked: Any = world.runtime.invalidator.blocked_tenants
    blocked.clear()


async def _lose_the_connection(world: World, level: Level) -> None:
    world.runtime.views.expire_all()


STEPS: list[Callable[[World, Level], Awaitable[None]]] = [
    _request,
    _wait,
    _wait,
    _renew_lease,
    _lease_for_another_server,
    _unwatch,
    _watch,
    _bump,
    _bump_by_another,
    _evict,
    _lose_the_generation,
    _switch_off,
    _switch_on,
    _block,
    _unblock,
    _lose_the_connection,
]
steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.sampled_from(list(Level))), min_size=1, max_size=8
)


@settings(max_examples=600, deadline=None)
@given(steps)
def test_a_proof_that_stands_implies_a_hit(
    history: list[tuple[Callable[[World, Level], Awaitable[None]], Level]],
) -> None:
    """After every step, for every plan: if the proof stands (at level ``strict``, in a view that is
    read now), the decision on the same facts is a hit."""
    asyncio.run(_check(history))


def test_proofs_do_stand_between_two_requests() -> None:
    """The property above is not empty: the proofs of all levels stand after two requests."""
    assert asyncio.run(_check([(_request, level) for level in Level])) >= len(Level)


async def _check(
    history: list[tuple[Callable[[World, Level], Awaitable[None]], Level]],
) -> int:
    """Replay a history. Return how many standing proofs were compared with a decision."""
    world, compared = World(), 0
    await world.cache.connect()
    for level in Level:
        for _ in range(2):
            await world.request(level)
    for step, level in history:
        await step(world, level)
        for scoped in world.scoped_plans():
            compared += await _compare(world, scoped)
    blocked: Any = world.runtime.invalidator.blocked_tenants
    blocked.clear()
    await world.cache.close()
    return compared


async def _compare(world: World, scoped: ScopedPlan) -> int:
    proofs, near, now = world.runtime.proofs, world.runtime.near, world.now
    proof = proofs.still_proven(scoped, now)
    if proof is None:
        return 0
    assert near.peek(scoped.cache_key.entry_key) is proof.memory_entry
    found = proofs.examine(scoped, proof.memory_entry, now)
    assert found is not None
    view = found.view
    if view is None:
        view = await world.runtime.views.read(scoped.cache_key.generation_key, scoped.tags)
        if not scoped.max_view_age_s and view is not proof.view:
            return 0  # level strict: the proof stands only in the view of the request
    assert proofs.decide(scoped, found, view=view, now=now) is HIT
    return 1


@pytest.mark.anyio
@pytest.mark.parametrize("level", list(Level))
async def test_a_value_of_tables_that_are_not_watched_is_computed_each_time(level: Level) -> None:
    """At every level: a level concerns hits from memory, and nothing may be stored."""
    world, computed = World(), 0
    await world.cache.connect()
    world.relay.coverage.tables = frozenset()

    async def compute() -> int:
        nonlocal computed
        computed += 1
        return computed

    for _ in range(2):
        await world.cache.get_or_set(
            "acme", "things", {"id": 1}, compute, tables=["things"], level=level
        )
    assert computed == 2
    assert world.cache.counters.of("acme", "things").bypasses == {"no-trigger": 2}
    await world.cache.close()
