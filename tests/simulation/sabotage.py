"""The rules of the protocol, each broken once: the simulator must notice, or it is not worth its
time.

A sabotage puts something else in the place of a function of the library, or of the simulated world
where the rule is one for the database, for a connection or for the hooks. A ``Mix`` says what
happens, where the case is rare.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import respcache.core.serving_lease
import respcache.read.lookup
import respcache.read.proofs
import respcache.writes.relay
from respcache.context import Exchange, current
from respcache.core import entry as entries
from respcache.core.decision import HIT, Bypass, Caller, Candidate, Decision, check_lease, decide
from respcache.core.entry import Entry
from respcache.core.epochs import Cursor, Epoch
from respcache.core.errors import StoreError
from respcache.core.generations import FLOOR, GenerationView, Verdict
from respcache.core.keys import EVERYBODY, CacheKey
from respcache.core.serving_lease import (
    Ack,
    DueBump,
    OutboxPage,
    Outcome,
    RelayStep,
    ServingLease,
    by_tenant,
    next_step,
)
from respcache.core.tokens import ConsistencyToken
from respcache.read.fill_locks import FillLocks
from respcache.read.fills import Fill, Filler
from respcache.read.flights import Flight, Flights
from respcache.read.lookup import Lookup, LookupResult, StoreRead
from respcache.read.memory import MemoryEntry
from respcache.read.plans import HitProof, ScopedPlan
from respcache.read.proofs import InMemory, Proofs
from respcache.read.values import Values, _ValueFill
from respcache.read.views import ViewBatch, ViewReader
from respcache.stores.base import Bumped
from respcache.stores.memory import MemoryServer
from respcache.writes.invalidator import Invalidator
from respcache.writes.relay import OutboxRelay, Rows
from tests.simulation.database import (
    Database,
    DatabaseGone,
    FenceRow,
    Row,
    SimulatedOutbox,
    Snapshot,
)
from tests.simulation.schedule import Commit, Mix, Process, Schedule, replaced
from tests.simulation.world import Client, Connection, Server

Replacement = tuple[Any, str, Any]
"""Where, which name, and what is put there."""


@dataclass(frozen=True, slots=True)
class Sabotage:
    """A rule that is broken, and what happens while it is."""

    replacements: Sequence[Replacement]
    mix: Mix = field(default_factory=Mix)

    @contextmanager
    def done(self) -> Iterator[None]:
        """Break the rule for a while."""
        with ExitStack() as stack:
            for owner, name, value in self.replacements:
                stack.enter_context(replaced(owner, name, value))
            yield


def _mix(*faults: str, writers: Mapping[str, int] | None = None, **others: Any) -> Mix:
    """Choose the faults, as often as they are named."""
    mix = Mix(**others) if writers is None else Mix(writers=writers, **others)
    return replace(mix, faults=Counter(faults)) if faults else mix


# -- what is captured, and when --------------------------------------------------------------------


_READ_STORE: ContextVar[Any] = ContextVar("read_store")


async def _remember_the_store(
    values: Values, result: LookupResult, *others: Any, original: Any = Values._fill
) -> Any:
    _READ_STORE.set(values._lookup._store.read)
    return await original(values, result, *others)


async def _make_then_capture(
    value_fill: _ValueFill[Any], make: Any, outer: Any, original: Any = _ValueFill.run
) -> Any:
    fill, cache_key = value_fill._fill, value_fill._scoped.cache_key

    async def made() -> Any:
        value = await make()
        try:
            reading = await _READ_STORE.get()(None, [(cache_key.generation_key, cache_key.tags)])
        except StoreError:
            return value
        fill.certificate = reading.generations[0].certificate() or fill.certificate
        return value

    return await original(value_fill, made, outer)


async def _open_with_the_same_nonce(lookup: Lookup, tenant: str) -> None:
    await lookup._store.open(
        f"tenant:{tenant}:~gen", nonce=b"0" * 16, ttl_ms=lookup._generation_ttl_ms
    )


def _compact_without_floor(
    memory: MemoryServer,
    generation: str,
    *,
    tags: Any,
    ttl_ms: int,
    rows: Any,
    prefix: str,
    original: Any = MemoryServer.bump,
) -> Bumped:
    bumped: Bumped = original(
        memory, generation, tags=tags, ttl_ms=ttl_ms, rows=rows, prefix=prefix
    )
    value, expires = memory.values.get(generation, (None, 0.0))
    if value is not None and set(value) == {"n", "r", "s", FLOOR}:
        memory.values[generation] = ({name: value[name] for name in ("n", "r", "s")}, expires)
    return bumped


def _decide_without_digest(candidate: Candidate, *others: Any, **named: Any) -> Decision:
    entry = candidate.entry
    if entry is not None:
        candidate = replace(candidate, entry=replace(entry, digest=candidate.key.digest))
    return decide(candidate, *others, **named)


# -- who is asked ----------------------------------------------------------------------------------


def _restart_as_the_same(memory: MemoryServer, *, keep_data: bool) -> None:
    if not keep_data:
        memory.values.clear()


def _know_from_rounds_only(
    client: Client, server: Server, original: Any = Client.shake_hands
) -> Connection:
    """Keep the identity that a round has learnt from this server."""
    connection: Connection = original(client, server)
    known = client.__dict__.setdefault("known", {})
    connection.identity = known.setdefault(server.name, connection.identity)
    return connection


async def _learn_in_rounds(
    client: Client, proposed: Epoch | None = None, *, original: Any = Client.epoch, **others: Any
) -> tuple[Epoch | None, str]:
    found: tuple[Epoch | None, str] = await original(client, proposed, **others)
    if client._connection is not None:
        client.__dict__.setdefault("known", {})[client._connection.server.name] = found[1]
        client._connection.identity = found[1]
    return found


# -- joining ---------------------------------------------------------------------------------------


def _join_any(
    flights: Flights[Any], key: Any, *, view: GenerationView, tags: Sequence[str]
) -> Flight[Any] | None:
    return flights._flying.get(key)


async def _enter_any(
    filler: Filler,
    cache_key: CacheKey,
    *,
    view: GenerationView,
    certificate: Any,
    original: Any = Filler.begin_or_join,
) -> Entry | Fill | None:
    flight = filler._flights._flying.get(cache_key.entry_key)
    found: Entry | Fill | None
    found = (
        await flight.wait()
        if flight is not None
        else await original(filler, cache_key, view=view, certificate=certificate)
    )
    return found


async def _wait_for_any_lease(
    leases: FillLocks,
    cache_key: CacheKey,
    mine: Any,
    view: GenerationView,
    original: Any = FillLocks._acquire,
) -> Any:
    return await original(leases, cache_key, mine, _Content(view))


async def _find_any(leases: FillLocks, cache_key: CacheKey, view: GenerationView) -> Entry | None:
    data = (await leases._store.read(cache_key.entry_key, ())).entry
    entry = None if data is None else entries.decode(data)
    return entry if entry is not None and entry.digest == cache_key.digest else None


class _Content:
    """A view that finds everything valid."""

    def __init__(self, view: GenerationView) -> None:
        self._view = view

    def judge(self, certificate: Any, tags: Iterable[str]) -> Verdict:
        """Be content."""
        return Verdict.VALID


# -- committing and acknowledging ------------------------------------------------------------------


async def _tell_before_commit(
    schedule: Schedule, process: Process, commit: Commit, rows: Rows
) -> Exchange | None:
    record = Exchange()
    current.set(record)
    schedule.tell(process, rows)
    try:
        await commit()
    except DatabaseGone:
        return None
    await record.settle()
    return record


async def _bump_and_do_not_look_at_the_fence(
    invalidator: Invalidator,
    relay: OutboxRelay,
    rows: Rows | None,
    since: float,
    original: Any = Invalidator._apply,
) -> Ack:
    known = rows is not None and not any(tenant == EVERYBODY for tenant, _, _ in rows)
    if known and None not in (await invalidator._bump_all(by_tenant(rows or ()))).values():
        return Ack(Outcome.CONFIRMED)
    ack: Ack = await original(invalidator, relay, rows, since)
    return ack


async def _wait_for_nothing(relay: OutboxRelay, since: float) -> Outcome:
    return Outcome.SAFE


def _catch_up_in_any_epoch(
    relay: OutboxRelay, m0: float, original: Any = OutboxRelay._grant
) -> None:
    relay._adopted_at = float("-inf")
    original(relay, m0)


def _rows_before_commit(schedule: Schedule, rows: Rows) -> Rows | None:
    return rows


def _id_of_transaction(database: Database, xid: int) -> str:
    return f"{xid:016x}"


# -- what lies in memory ---------------------------------------------------------------------------


def _send_with_the_door_open(batch: ViewBatch) -> None:
    """Let those who come while the reading is under way have its answer."""
    waiting, reader = batch._waiting, batch._reader
    batch._sent_at, batch._dirty = reader._clock(), False

    def receive(result: GenerationView | StoreError) -> None:
        batch._waiting = []
        batch._receive(waiting, result)

    try:
        reader._store.view(batch._generation, batch._names, receive)
    except StoreError as error:
        receive(error)


def _hear_nothing(views: ViewReader, generation: str) -> None:
    """Leave the view as it is."""


def _drop_the_view_only(batch: ViewBatch) -> None:
    batch.view, batch.requested_at = None, float("-inf")


def _look_at_no_bound(
    views: ViewReader,
    generation: str,
    tags: Any,
    *,
    since: float,
    original: Any = ViewReader.recent,
) -> Any:
    return original(views, generation, tags, since=0.0)


def _require_no_token(
    proofs: Proofs, scoped: ScopedPlan, token: ConsistencyToken | None, now: float
) -> ScopedPlan:
    return scoped


def _decide_by_the_lease_alone(
    candidate: Candidate, caller: Caller, lease: ServingLease | None, **named: Any
) -> Decision:
    view, now = named["view"], named["now"]
    return check_lease(lease, view, now) or HIT


def _take_any_proof(proofs: Proofs, scoped: ScopedPlan, now: float) -> HitProof | None:
    """Take the last proof, whatever became of its view."""
    proof = scoped.proof
    return None if proof is None or now >= proof.until else proof


def _take_a_proof_forever(proofs: Proofs, scoped: ScopedPlan, now: float) -> HitProof | None:
    """Take the last proof while its view is the last one, whatever the time and the lease."""
    proof = scoped.proof
    if proof is None or (scoped.max_view_age_s and proof.batch.view is not proof.view):
        return None
    return proof


async def _hit_without_its_view(
    proofs: Proofs, scoped: ScopedPlan, now: float, original: Any = Proofs.hit
) -> HitProof | None:
    """Read no view if there is a proof."""
    return proofs.still_proven(scoped, now) or await original(proofs, scoped, now)


# -- the fence -------------------------------------------------------------------------------------


def _grant_from_the_end(relay: OutboxRelay, m0: float, original: Any = OutboxRelay._grant) -> None:
    original(relay, relay.clock())


async def _read_then_take_the_lease(
    lookup: Lookup, entry_key: str | None, generations: Any
) -> StoreRead | Bypass:
    reading = await lookup._store.read(entry_key, generations)
    return StoreRead(reading, lookup._guards.lease)


def _decide_by_the_present_lease(
    proofs: Proofs, scoped: ScopedPlan, found: InMemory, original: Any = Proofs.decide, **named: Any
) -> Decision:
    decision: Decision = original(
        proofs, scoped, found._replace(lease=proofs._guards.lease), **named
    )
    return decision


def _examine_without_lease(
    proofs: Proofs,
    scoped: ScopedPlan,
    memory_entry: MemoryEntry,
    now: float,
    original: Any = Proofs.examine,
) -> InMemory | None:
    relay, proofs._guards.relay = proofs._guards.relay, None
    try:
        found: InMemory | None = original(proofs, scoped, memory_entry, now)
    finally:
        proofs._guards.relay = relay
    return found


async def _read_without_lease(
    lookup: Lookup, entry_key: str | None, generations: Any
) -> StoreRead | Bypass:
    return StoreRead(await lookup._store.read(entry_key, generations), None)


def _allow_any_server(lease: ServingLease, server: str, now: float) -> bool:
    return now < lease.until


def _never_record(page: OutboxPage, identity: str) -> RelayStep:
    step = next_step(page, identity)
    return RelayStep.GRANT if step is RelayStep.RECORD else step


async def _record_nothing(outbox: SimulatedOutbox, identity: str) -> None:
    """Leave the row as it is."""


def _heed_no_authority(page: OutboxPage, identity: str) -> RelayStep:
    return RelayStep.GRANT


def _do_not_wait_for_the_former(page: OutboxPage, identity: str) -> RelayStep:
    return next_step(replace(page, effective=True), identity)


def _effective_at_once(outbox: SimulatedOutbox, lease: FenceRow) -> float:
    return outbox.database.now


# -- rounds ----------------------------------------------------------------------------------------


def _after_the_last_id(database: Database, after: Cursor) -> list[Row]:
    last = Snapshot.parse(after.snapshot).xmax
    return [row for row in database.outbox if row.xid >= last]


async def _store_the_epoch_first(
    relay: OutboxRelay,
    old: Epoch | None,
    identity: str,
    page: OutboxPage,
    reason: str,
    original: Any = OutboxRelay._renew,
) -> bool:
    renewed: bool = await original(relay, old, identity, page, reason=reason)
    if renewed:
        relay._cursor = (await relay.outbox.page(None)).cursor
    return renewed


def _keep_the_cursor(relay: OutboxRelay, epoch: Epoch, original: Any = OutboxRelay._adopt) -> None:
    cursor = relay._cursor
    original(relay, epoch)
    relay._cursor = cursor or relay._cursor


def _keep_what_was_applied(
    relay: OutboxRelay, epoch: Epoch, original: Any = OutboxRelay._adopt
) -> None:
    applied = dict(relay._applied)
    original(relay, epoch)
    relay._applied.update(applied)


async def _go_on_when_a_bump_fails(
    relay: OutboxRelay, due: Mapping[str, DueBump], original: Any = OutboxRelay._bump
) -> None:
    for tenant, one in due.items():
        try:
            await original(relay, {tenant: one})
        except StoreError:
            continue


def _ignore(**ignored: Any) -> Any:
    """Judge epochs as if something on the page were not there."""

    def outdated(
        epoch: Epoch,
        cursor: Cursor,
        page: OutboxPage,
        original: Any = respcache.core.serving_lease.outdated,
    ) -> str | None:
        changes = {
            name: value(epoch) if callable(value) else value for name, value in ignored.items()
        }
        found: str | None = original(epoch, cursor, replace(page, **changes))
        return found

    return outdated


def _ignore_everybody(
    epoch: Epoch,
    cursor: Cursor,
    page: OutboxPage,
    original: Any = respcache.core.serving_lease.outdated,
) -> str | None:
    found: str | None = original(
        epoch, cursor, replace(page, rows=[row for row in page.rows if row[0] != EVERYBODY])
    )
    return found


ROUNDS = respcache.writes.relay
OUTSIDERS = {"outsider": 3, "dies": 2, "acknowledged": 1}
SPLIT = ("promotion", "another address", "another address", "cut from the store")

IN_MEMORY = _mix(near_bytes=(1 << 20,), bounded=0.0, calm=(0.3,))
BOUNDED = _mix(near_bytes=(1 << 20,), bounded=1.0, tokens=0.0, calm=(0.3,), trouble=(0.0, 0.1))
TOKENS = replace(BOUNDED, tokens=1.0)
BACK_AND_FORTH = _mix(
    "promotion",
    "another address",
    "another address",
    "another address after a write",
    processes=(1,),
    leases=(8, 14),
    least_faults=7,
    most_faults=12,
    small_limits=1.0,
    retention=(0.4,),
)
"""One process that comes back to a server on which nobody has bumped meanwhile."""

SABOTAGES: Mapping[str, Sabotage] = {
    "capture after the read": Sabotage(
        [(Values, "_fill", _remember_the_store), (_ValueFill, "run", _make_then_capture)]
    ),
    "the same nonce for every generation": Sabotage(
        [(Lookup, "_create_generation", _open_with_the_same_nonce)], _mix("evict", "flush")
    ),
    "compaction without raising the floor": Sabotage(
        [(MemoryServer, "bump", _compact_without_floor)], _mix(small_limits=1.0)
    ),
    "the digest is not compared": Sabotage(
        [
            (respcache.read.lookup, "decide", _decide_without_digest),
            (respcache.read.proofs, "decide", _decide_without_digest),
        ],
        _mix("copy an entry"),
    ),
    "no identity of the server": Sabotage(
        [(MemoryServer, "restart", _restart_as_the_same)], _mix("restart with old data")
    ),
    "the identity is read in relay cycles, not per connection": Sabotage(
        [
            (Client, "shake_hands", _know_from_rounds_only),
            (Client, "epoch", _learn_in_rounds),
            (Client, "_compare", lambda client, identity, connection: None),
        ],
        _mix("restart with old data"),
    ),
    "join any flight in the process": Sabotage(
        [(Flights, "join", _join_any), (Filler, "begin_or_join", _enter_any)]
    ),
    "wait for any fill lock of another process": Sabotage(
        [(FillLocks, "_acquire", _wait_for_any_lease), (FillLocks, "_filled", _find_any)]
    ),
    "bump before COMMIT": Sabotage([(Schedule, "commit_and_tell", _tell_before_commit)]),
    "acknowledge without checking the serving lease": Sabotage(
        [(Invalidator, "_apply", _bump_and_do_not_look_at_the_fence)], _mix(*SPLIT)
    ),
    "acknowledge without waiting": Sabotage([(OutboxRelay, "safe", _wait_for_nothing)]),
    "acknowledge by a cycle in a new epoch": Sabotage(
        [(OutboxRelay, "_grant", _catch_up_in_any_epoch)]
    ),
    "row ids are used although COMMIT raised": Sabotage(
        [(Schedule, "rows_of_unknown_outcome", _rows_before_commit)],
        _mix(writers={"unknown": 2, "acknowledged": 1}),
    ),
    "writes of deferred triggers are not waited for": Sabotage(
        [(Schedule, "whole", lambda schedule, process, rows: rows)]
    ),
    "rows are identified by their transaction": Sabotage(
        [(Database, "new_id", _id_of_transaction)],
        _mix(
            "freeze",
            processes=(2,),
            trouble=(0.02,),
            writers={"acknowledged": 1},
            least_faults=4,
            deferred=0.0,
        ),
    ),
    "the serving lease begins at the end of the cycle": Sabotage(
        [(OutboxRelay, "_grant", _grant_from_the_end)],
        _mix("slow pages", "freeze", processes=(1,), writers=OUTSIDERS, most_faults=10),
    ),
    "the serving lease is checked after the reply": Sabotage(
        [
            (Lookup, "read", _read_then_take_the_lease),
            (Proofs, "decide", _decide_by_the_present_lease),
        ],
        _mix(
            "database out of reach",
            processes=(1,),
            writers={"outsider": 1},
            trouble=(0.1,),
            least_faults=1,
            most_faults=2,
            leases=(8, 14),
            looks=60,
            small_limits=0.0,
            deferred=0.0,
            near_bytes=(0,),
            bounded=0.0,
        ),
    ),
    "a request joins a read that was already sent": Sabotage(
        [(ViewBatch, "_send", _send_with_the_door_open)], IN_MEMORY
    ),
    "entries in memory are not judged": Sabotage(
        [(respcache.read.proofs, "decide", _decide_by_the_lease_alone)], IN_MEMORY
    ),
    "the age of a view is not checked": Sabotage(
        [(ViewReader, "recent", _look_at_no_bound)],
        replace(
            BOUNDED,
            processes=(2,),
            writers={"acknowledged": 1},
            trouble=(0.1,),
            most_faults=0,
            leases=(8, 14),
            calm=(1.0,),
        ),
    ),
    "a view outlives the bumps of its own process": Sabotage(
        [(ViewReader, "expire", _hear_nothing)], BOUNDED
    ),
    "a read in progress outlives them": Sabotage(
        [(ViewBatch, "expire", _drop_the_view_only)],
        replace(
            BOUNDED,
            faults={"slow store": 1},
            processes=(1,),
            writers={"acknowledged": 1},
            trouble=(0.0,),
            least_faults=8,
            most_faults=12,
        ),
    ),
    "a proof outlives its view": Sabotage([(Proofs, "still_proven", _take_any_proof)], BOUNDED),
    "a proof outlives its time": Sabotage(
        [(Proofs, "still_proven", _take_a_proof_forever)], BOUNDED
    ),
    "a proof needs no view of the request's own": Sabotage(
        [(Proofs, "hit", _hit_without_its_view)], IN_MEMORY
    ),
    "a consistency token is ignored": Sabotage(
        [(Proofs, "require_token", _require_no_token)], TOKENS
    ),
    "no serving lease": Sabotage(
        [(Lookup, "read", _read_without_lease), (Proofs, "examine", _examine_without_lease)]
    ),
    "the serving lease names no server": Sabotage(
        [(ServingLease, "allows", _allow_any_server)], _mix("evict", *SPLIT)
    ),
    "until is never recorded": Sabotage(
        [(ROUNDS, "next_step", _never_record), (SimulatedOutbox, "record", _record_nothing)],
        _mix("cut from the store", "slow pages", "cut from the database"),
    ),
    "a new authority is effective at once": Sabotage(
        [(SimulatedOutbox, "effective_at", _effective_at_once)], _mix(*SPLIT)
    ),
    "a new authority does not wait": Sabotage(
        [(ROUNDS, "next_step", _do_not_wait_for_the_former)], _mix(*SPLIT)
    ),
    "no authority": Sabotage([(ROUNDS, "next_step", _heed_no_authority)], _mix(*SPLIT)),
    "the cursor is a row id": Sabotage(
        [(Database, "unseen", _after_the_last_id)], _mix(writers=OUTSIDERS)
    ),
    "the epoch is stored before its snapshot": Sabotage(
        [(OutboxRelay, "_renew", _store_the_epoch_first)],
        _mix("freeze who makes an epoch", processes=(2,), writers=OUTSIDERS),
    ),
    "the cursor outlives the epoch": Sabotage(
        [(OutboxRelay, "_adopt", _keep_the_cursor)], BACK_AND_FORTH
    ),
    "the applied rows outlive the epoch": Sabotage(
        [(OutboxRelay, "_adopt", _keep_what_was_applied)],
        replace(
            BACK_AND_FORTH,
            faults={"promotion": 1, "another address": 1, "another address after a write": 3},
            least_faults=10,
            most_faults=14,
            retention=(300.0,),
            writers={"acknowledged": 1},
            calm=(10.0,),
        ),
    ),
    "a cycle continues after a failed bump": Sabotage(
        [(OutboxRelay, "_bump", _go_on_when_a_bump_fails)],
        _mix("cut from the store", "slow store", trouble=(0.02, 0.05)),
    ),
    "another life of the database is not detected": Sabotage(
        [(ROUNDS, "outdated", _ignore(incarnation=lambda epoch: epoch.incarnation))],
        _mix("database restart"),
    ),
    "pruned rows are not detected": Sabotage(
        [(ROUNDS, "outdated", _ignore(pruned=0))], BACK_AND_FORTH
    ),
    "TRUNCATE is bumped like a write": Sabotage([(ROUNDS, "outdated", _ignore_everybody)]),
}
