"""The contract of ``stores/base.py``, sentence by sentence, on every store."""

import random
from collections.abc import Sequence

import pytest

from respcache.core.epochs import Cursor, Epoch
from respcache.core.errors import StoreUnavailable
from respcache.core.generations import (
    FLOOR,
    MAX_FIELDS,
    RING_ROWS,
    Certificate,
    GenerationView,
    Verdict,
)
from respcache.core.keys import EPOCH_KEY, SWITCHES_KEY
from respcache.stores.base import Bumped, FillLock, Store

pytestmark = pytest.mark.anyio

GEN, OTHER_GEN = "tenant:a:~gen", "tenant:b:~gen"
ENTRY, FILL = "tenant:a:accounts:list:00", "tenant:a:~fill:accounts:list:00"
N1, N2 = b"0123456789abcdef", b"fedcba9876543210"
HOUR_MS = 3_600_000
TAGS = ("M:accounts", "T:accounts", "T:leads", FLOOR)


async def view(store: Store, tags: Sequence[str] = TAGS, generation: str = GEN) -> GenerationView:
    return (await store.read(None, [(generation, tags)])).generations[0]


async def opened(store: Store, nonce: bytes = N1, generation: str = GEN) -> Certificate:
    certificate = (await store.open(generation, nonce=nonce, ttl_ms=HOUR_MS)).certificate()
    assert certificate is not None
    return certificate


async def bump(store: Store, *tags: str, generation: str = GEN) -> None:
    await store.bump(generation, tags=tags, ttl_ms=HOUR_MS)


def put(
    store: Store, envelope: bytes, *, ttl_ms: int = HOUR_MS, generation_ttl_ms: int = 2 * HOUR_MS
) -> None:
    store.put(ENTRY, envelope, ttl_ms=ttl_ms, generation=GEN, generation_ttl_ms=generation_ttl_ms)


async def entry(store: Store) -> bytes | None:
    return (await store.read(ENTRY, [])).entry


# -- read ------------------------------------------------------------------------------------------


async def test_an_empty_store_has_neither_entries_nor_generations(store: Store) -> None:
    """Every view is told by the server that was asked, also the views of what is not there."""
    reading = await store.read(ENTRY, [(GEN, TAGS), (OTHER_GEN, ())])
    assert reading.entry is None
    assert [found.nonce for found in reading.generations] == [None, None]
    assert len({found.server for found in reading.generations}) == 1
    assert reading.generations[0].server


async def test_asking_for_nothing_gives_nothing(store: Store) -> None:
    """No entry, no generations: an empty reading."""
    reading = await store.read(None, [])
    assert (reading.entry, reading.generations) == (None, ())


async def test_views_come_in_the_order_asked_for_with_the_tags_asked_for(store: Store) -> None:
    """A tag that was not bumped in this life is absent."""
    await opened(store, N1, GEN)
    await opened(store, N2, OTHER_GEN)
    await bump(store, "T:accounts", generation=OTHER_GEN)
    reading = await store.read(None, [(OTHER_GEN, TAGS), (GEN, TAGS), (OTHER_GEN, ["T:leads"])])
    assert [found.nonce for found in reading.generations] == [N2, N1, N2]
    assert [found.bumps for found in reading.generations] == [{"T:accounts": 1}, {}, {}]
    assert [found.sequence for found in reading.generations] == [1, 0, 1]


# -- open ------------------------------------------------------------------------------------------


async def test_a_generation_begins_at_zero_with_the_given_nonce(store: Store) -> None:
    """The view that OPEN returns is the view that readers get."""
    made = await store.open(GEN, nonce=N1, ttl_ms=HOUR_MS)
    assert made.certificate() == Certificate(N1, 0)
    assert await view(store) == made


async def test_a_usable_generation_is_kept(store: Store) -> None:
    """Of two processes that find none, the second gets what the first made, as it is now."""
    await opened(store, N1)
    await bump(store, "T:accounts")
    assert await opened(store, N2) == Certificate(N1, 1)
    assert (await view(store)).bumps == {"T:accounts": 1}


@pytest.mark.parametrize("field", ["n", "r", "s"])
async def test_a_generation_without_its_whole_head_is_missing_and_made_anew(
    subject, field: str
) -> None:
    """A hash that a foreign hand has damaged does not keep its tenant out of the cache for ever."""
    await opened(subject.store, N1)
    await bump(subject.store, "T:accounts")
    subject.lose_field(GEN, field)
    assert (await view(subject.store)).nonce is None
    assert await opened(subject.store, N2) == Certificate(N2, 0)
    assert (await view(subject.store)).bumps == {}


@pytest.mark.parametrize("field", ["n", "r", "s"])
async def test_a_bump_of_a_generation_without_its_whole_head_deletes_it(
    subject, field: str
) -> None:
    """A sequence that began again under the same nonce would make entries from before the bump
    valid."""
    before = await opened(subject.store, N1)
    for _ in range(3):
        await bump(subject.store, "T:accounts")
        before = await opened(subject.store, N2)
    subject.lose_field(GEN, field)
    await bump(subject.store, "T:accounts")
    assert subject.keys() == set()
    assert (await view(subject.store)).judge(before, ["T:accounts"]) is Verdict.NO_GENERATION


async def test_a_head_with_something_that_is_no_sequence_is_missing_and_made_anew(subject) -> None:
    """Neither a reading nor a bump fails because of it."""
    for repair in (
        subject.store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS),
        opened(subject.store, N2),
    ):
        await opened(subject.store, N1)
        subject.spoil(GEN, "s")
        assert (await view(subject.store)).nonce is None
        await repair
        assert (await view(subject.store)).nonce in (None, N2)
    assert (await view(subject.store)).certificate() == Certificate(N2, 0)


async def test_opening_and_bumping_renew_the_time_to_live(subject) -> None:
    """A generation that is used does not expire."""
    store = subject.store
    await store.open(GEN, nonce=N1, ttl_ms=50_000)
    assert 0 < subject.ttl_ms(GEN) <= 50_000
    await store.open(GEN, nonce=N2, ttl_ms=90_000)
    assert 50_000 < subject.ttl_ms(GEN) <= 90_000
    await store.bump(GEN, tags=["T:accounts"], ttl_ms=150_000)
    assert 90_000 < subject.ttl_ms(GEN) <= 150_000


# -- bump ------------------------------------------------------------------------------------------


async def test_a_bump_advances_the_sequence_and_stamps_it_on_every_tag(store: Store) -> None:
    """Other tags keep the sequence of their own last bump."""
    await opened(store)
    await bump(store, "T:accounts", "T:leads")
    await bump(store, "T:leads")
    found = await view(store)
    assert (found.sequence, found.bumps) == (2, {"T:accounts": 1, "T:leads": 2})


async def test_a_bump_of_a_missing_generation_is_confirmed_and_creates_nothing(subject) -> None:
    """Nothing depends on it; a generation made by a bump would have no nonce."""
    await bump(subject.store, "T:accounts")
    assert subject.keys() == set()


async def test_bumping_the_floor_invalidates_whatever_was_captured_before(store: Store) -> None:
    """Everything depends on the floor, as all its readers ask for it."""
    before = await opened(store)
    await bump(store, FLOOR)
    found = await view(store)
    assert found.judge(before, ["T:accounts", FLOOR]) is Verdict.INVALIDATED
    assert found.judge(Certificate(N1, found.sequence), ["T:accounts", FLOOR]) is Verdict.VALID


async def test_too_many_tags_are_forgotten_by_raising_the_floor(subject) -> None:
    """A generation stays small, and forgetting invalidates: no certificate from before is valid for
    any tag."""
    store = subject.store
    await opened(store)
    tags = [f"T:t{number}" for number in range(2100)]
    for start in range(0, 2100, 60):
        before = (await view(store, [FLOOR])).certificate()
        await bump(store, *tags[start : start + 60])
        found = await view(store, [FLOOR, *tags])
        if FLOOR in found.bumps:
            break
    assert before is not None
    assert found.bumps == {FLOOR: found.sequence}
    assert found.nonce == N1
    assert found.judge(before, [FLOOR]) is Verdict.INVALIDATED
    assert subject.ttl_ms(GEN) <= HOUR_MS
    await bump(store, "T:accounts")
    assert (await view(store)).bumps == {FLOOR: found.sequence, "T:accounts": found.sequence + 1}


async def test_rows_that_were_all_applied_before_bump_once(store: Store) -> None:
    """Every process sees every row of the outbox; one of them bumps for all. A row that is new
    bumps all tags of the call."""
    await opened(store)
    first, second = "a" * 16, "b" * 16
    await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[first])
    await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[first])
    assert (await view(store)).bumps == {"T:accounts": 1}
    await store.bump(GEN, tags=["T:accounts", "T:leads"], ttl_ms=HOUR_MS, rows=[first, second])
    assert (await view(store)).bumps == {"T:accounts": 2, "T:leads": 2}
    await store.bump(GEN, tags=["T:accounts", "T:leads"], ttl_ms=HOUR_MS, rows=[second, first])
    assert (await view(store)).sequence == 2
    await bump(store, "T:leads")
    assert (await view(store)).sequence == 3


async def test_rows_are_remembered_in_a_ring_and_forgotten_by_the_oldest_first(
    store: Store,
) -> None:
    """A row that was forgotten is bumped once more, which is harmless; a row of another generation
    is not remembered."""
    await opened(store)
    rows = [f"{number:016x}" for number in range(RING_ROWS + 1)]
    for row in rows:
        await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[row])
    for row in rows[1:]:
        await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[row])
    assert (await view(store)).sequence == len(rows)
    await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=rows[:1])
    assert (await view(store)).sequence == len(rows) + 1
    await opened(store, N2, generation=OTHER_GEN)
    await store.bump(OTHER_GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=rows[-1:])
    assert (await view(store, generation=OTHER_GEN)).sequence == 1


async def test_a_bump_tells_what_the_generation_has_reached(subject) -> None:
    """The sequence of this bump under this nonce; with rows that were applied before, one that is
    no lower than theirs."""
    store, row = subject.store, "a" * 16
    await opened(store, N1)
    server = (await view(store)).server
    assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS) == Bumped(
        server, Certificate(N1, 1)
    )
    assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[row]) == Bumped(
        server, Certificate(N1, 2)
    )
    await bump(store, "T:leads")
    assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[row]) == Bumped(
        server, Certificate(N1, 3)
    )
    many = [f"T:t{number}" for number in range(MAX_FIELDS)]
    assert await store.bump(GEN, tags=many, ttl_ms=HOUR_MS) == Bumped(server, Certificate(N1, 4))
    assert (await view(store)).certificate() == Certificate(N1, 4)


async def test_a_bump_of_no_generation_has_reached_nothing(subject) -> None:
    """There is none, or it was deleted: its life is over, and views of it know nothing of the
    bump."""
    store = subject.store
    server = (await view(store)).server
    assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS) == Bumped(server)
    await opened(store)
    subject.lose_field(GEN, "s")
    assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS) == Bumped(server)


# -- epochs ----------------------------------------------------------------------------------------

E1, E2 = "1" * 16, "2" * 16


async def proposed(store: Store, token: str, *, replacing: str = "") -> Epoch | None:
    """Propose an epoch for the server that the store is connected to."""
    _, identity = await store.epoch()
    mine = Epoch(token, identity, "incarnation", Cursor("750:760:751,755", 1234.5))
    found, named = await store.epoch(mine, replacing=replacing, ttl_ms=HOUR_MS)
    assert named == identity
    return found


async def test_an_epoch_is_kept_until_it_is_replaced_by_name(subject) -> None:
    """Whoever finds none proposes one; of several, the first holds for all."""
    store = subject.store
    assert (await store.epoch())[0] is None
    first = await proposed(store, E1)
    assert first is not None
    assert (first.token, first.incarnation, first.cursor) == (
        E1,
        "incarnation",
        Cursor("750:760:751,755", 1234.5),
    )
    assert (await store.epoch())[0] == first
    assert await proposed(store, E2) == first
    assert await proposed(store, E2, replacing="other") == first
    found = await proposed(store, E2, replacing=E1)
    assert found is not None
    assert found.token == E2
    assert (await store.epoch())[0] == found
    assert subject.ttl_ms(EPOCH_KEY) <= HOUR_MS


async def test_an_epoch_of_another_server_life_is_replaced_by_the_first_who_proposes(
    mortal,
) -> None:
    """It says so itself: the identity in it is not the server's."""
    store = mortal.store
    old = await proposed(store, E1)
    await mortal.restart(keep_data=True)
    found, identity = await store.epoch()
    assert found == old
    assert old is not None
    assert found is not None
    assert found.identity != identity
    new = await proposed(store, E2)
    assert new is not None
    assert (new.token, new.identity) == (E2, identity)


async def test_another_epoch_is_another_server_life(store: Store) -> None:
    """Its token is part of what generations record: what was captured before is worth nothing, and
    no bump keeps it."""
    before = await opened(store)
    store.adopt(E1)
    found = await view(store)
    assert found.server.startswith(f"{E1}:")
    assert found.judge(before, []) is Verdict.OTHER_SERVER
    within = await opened(store, N2)
    assert (await view(store)).judge(within, []) is Verdict.VALID
    assert (await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS)).server == found.server
    store.adopt(E2)
    assert (await view(store)).judge(within, []) is Verdict.OTHER_SERVER
    await bump(store, "T:accounts")
    assert (await view(store)).nonce is None


# -- put -------------------------------------------------------------------------------------------


async def test_what_was_put_is_read_byte_by_byte(store: Store) -> None:
    """Any bytes; a later put replaces an earlier one."""
    put(store, b"old")
    put(store, bytes(range(256)) * 400)
    assert await entry(store) == bytes(range(256)) * 400


async def test_putting_renews_the_generations_time_to_live_but_makes_none(subject) -> None:
    """A generation outlives every entry that it certifies."""
    store = subject.store
    put(store, b"x")
    assert await entry(store) == b"x"
    assert subject.keys() == {ENTRY}
    await store.open(GEN, nonce=N1, ttl_ms=50_000)
    put(store, b"y", ttl_ms=60_000, generation_ttl_ms=90_000)
    assert await entry(store) == b"y"
    assert 50_000 < subject.ttl_ms(GEN) <= 90_000
    assert 0 < subject.ttl_ms(ENTRY) <= 60_000


async def test_entries_generations_and_leases_end_with_their_time_to_live(subject) -> None:
    """Each by itself."""
    store = subject.store
    put(store, b"x", ttl_ms=30)
    await store.lock(FILL, FillLock("mine", Certificate(N1, 0)), ttl_ms=40)
    await store.open(GEN, nonce=N1, ttl_ms=50)
    for key in (ENTRY, FILL, GEN):
        await subject.expire(key)
    reading = await store.read(ENTRY, [(GEN, TAGS)])
    assert (reading.entry, reading.generations[0].nonce) == (None, None)
    yours = FillLock("yours", Certificate(N2, 0))
    assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == yours


async def test_every_key_has_a_time_to_live(subject) -> None:
    """Whatever the store writes, except the switch, goes away by itself."""
    store = subject.store
    await opened(store)
    await bump(store, "T:accounts")
    await bump(store, "T:leads", generation=OTHER_GEN)
    put(store, b"x")
    await store.lock(FILL, FillLock("mine", Certificate(N1, 0)), ttl_ms=HOUR_MS)
    await store.lock(FILL, FillLock("yours", Certificate(N1, 0)), ttl_ms=HOUR_MS, replacing="mine")
    await entry(store)
    assert subject.keys() == {GEN, ENTRY, FILL}
    assert all(0 < subject.ttl_ms(key) <= 2 * HOUR_MS for key in subject.keys())  # noqa: SIM118 - not a dict


# -- leases ----------------------------------------------------------------------------------------


async def test_a_free_lease_is_taken_and_a_held_one_is_shown(store: Store) -> None:
    """Who comes second learns who fills, and under which certificate."""
    mine, yours = FillLock("mine", Certificate(N1, 41)), FillLock("yours", Certificate(N2, 42))
    assert await store.lock(FILL, mine, ttl_ms=HOUR_MS) == mine
    assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == mine
    assert await store.lock(FILL, mine, ttl_ms=HOUR_MS) == mine


async def test_a_lease_is_taken_over_only_from_the_holder_that_is_named(store: Store) -> None:
    """Two who both want to replace the same dead holder: one wins, and the other learns it."""
    dead, first, second = (
        FillLock(name, Certificate(N1, 0)) for name in ("dead", "first", "second")
    )
    await store.lock(FILL, dead, ttl_ms=HOUR_MS)
    assert await store.lock(FILL, first, ttl_ms=HOUR_MS, replacing="nobody") == dead
    assert await store.lock(FILL, first, ttl_ms=HOUR_MS, replacing="dea") == dead
    assert await store.lock(FILL, first, ttl_ms=HOUR_MS, replacing="dead") == first
    assert await store.lock(FILL, second, ttl_ms=HOUR_MS, replacing="dead") == first


async def test_a_free_lease_is_taken_also_by_who_wanted_to_replace(store: Store) -> None:
    """The one to be replaced may have released meanwhile."""
    mine = FillLock("mine", Certificate(N1, 0))
    assert await store.lock(FILL, mine, ttl_ms=HOUR_MS, replacing="gone") == mine


async def test_only_the_holder_releases(store: Store) -> None:
    """Who lost the lease to somebody else does not end theirs."""
    mine, yours = FillLock("mine", Certificate(N1, 0)), FillLock("yours", Certificate(N1, 0))
    await store.lock(FILL, mine, ttl_ms=HOUR_MS)
    store.release(FILL, "yours")
    store.release(FILL, "min")
    assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == mine
    store.release(FILL, "mine")
    assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == yours
    store.release("tenant:a:~fill:accounts:list:ff", "mine")


async def test_who_finds_the_lease_released_finds_the_entry_put_before(store: Store) -> None:
    """Release is sent after earlier puts, and nothing overtakes."""
    mine, yours = FillLock("mine", Certificate(N1, 0)), FillLock("yours", Certificate(N1, 0))
    for number in range(50):
        await store.lock(FILL, mine, ttl_ms=HOUR_MS)
        put(store, b"%d" % number)
        store.release(FILL, "mine")
        assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == yours
        assert await entry(store) == b"%d" % number
        store.release(FILL, "yours")


# -- switch, info, close ---------------------------------------------------------------------------


async def test_switches_are_on_until_they_are_turned_off(store: Store) -> None:
    """Turning returns what is off then; looking changes nothing; both ways can be repeated, and
    each switch is by itself."""
    assert await store.switch() == frozenset()
    assert await store.switch({"*": True, "tenant:a": True}) == {"*", "tenant:a"}
    assert await store.switch({"*": True}) == {"*", "tenant:a"}
    assert await store.switch() == {"*", "tenant:a"}
    assert await store.switch({"*": False, "module:m": True}) == {"tenant:a", "module:m"}
    assert await store.switch({"*": False}) == {"tenant:a", "module:m"}
    assert await store.switch({"tenant:a": False, "module:m": False}) == frozenset()
    assert await store.switch() == frozenset()


async def test_switches_leave_no_key_when_all_are_on(subject) -> None:
    """And what they leave while some are off has no end: it is the one key that must stay."""
    await subject.store.switch({"tenant:a": True})
    assert subject.keys() == {SWITCHES_KEY}
    assert subject.ttl_ms(SWITCHES_KEY) == float("inf")
    await subject.store.switch({"tenant:a": False})
    assert subject.keys() == set()


async def test_info_tells_the_servers_figures(store: Store) -> None:
    """As the text that the server gives."""
    assert "evicted_keys:0" in (await store.info()).stats
    assert ":" in (await store.info()).memory


async def test_a_closed_store_is_unavailable_and_can_be_connected_again(store: Store) -> None:
    """Awaited operations raise, the others do nothing; closing twice is closing."""
    assert store.available
    await store.close()
    await store.close()
    assert not store.available
    for operation in (
        store.read(ENTRY, []),
        store.open(GEN, nonce=N1, ttl_ms=HOUR_MS),
        store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS),
        store.lock(FILL, FillLock("mine", Certificate(N1, 0)), ttl_ms=HOUR_MS),
        store.switch(),
        store.switch({"*": True}),
        store.info(),
    ):
        with pytest.raises(StoreUnavailable):
            await operation
    put(store, b"x")
    store.release(FILL, "mine")
    await store.connect()
    assert store.available
    assert await entry(store) is None


# -- what the argument in core/generations.py rests on ---------------------------------------------


async def test_a_generation_that_was_evicted_comes_back_under_another_nonce(subject) -> None:
    """Its sequence begins at 0 again, and nothing certified before is valid again."""
    before = await opened(subject.store, N1)
    await bump(subject.store, "T:accounts")
    subject.lose(GEN)
    assert (await view(subject.store)).judge(before, []) is Verdict.NO_GENERATION
    await opened(subject.store, N2)
    assert (await view(subject.store)).judge(before, []) is Verdict.OTHER_GENERATION


async def test_losing_everything_makes_everything_invalid_and_hits_come_back(subject) -> None:
    """FLUSHALL is safe, and not the end of caching."""
    store = subject.store
    before = await opened(store, N1)
    put(store, b"x")
    assert await entry(store) == b"x"
    subject.lose_all()
    reading = await store.read(ENTRY, [(GEN, TAGS)])
    assert (reading.entry, reading.generations[0].judge(before, [])) == (
        None,
        Verdict.NO_GENERATION,
    )
    after = await opened(store, N2)
    assert (await view(store)).judge(after, TAGS) is Verdict.VALID


async def test_losing_any_single_key_leaves_no_wrong_answer(subject) -> None:
    """Entry, generation or lease: the next caller makes it anew."""
    store = subject.store
    for key in (ENTRY, GEN, FILL):
        certificate = await opened(store, N1)
        put(store, b"x")
        mine, yours = FillLock("mine", certificate), FillLock("yours", certificate)
        await store.lock(FILL, mine, ttl_ms=HOUR_MS)
        subject.lose(key)
        reading = await store.read(ENTRY, [(GEN, TAGS)])
        assert reading.entry == (None if key == ENTRY else b"x")
        verdict = reading.generations[0].judge(certificate, TAGS)
        assert verdict is (Verdict.NO_GENERATION if key == GEN else Verdict.VALID)
        assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == (yours if key == FILL else mine)
        subject.lose_all()


async def test_another_server_life_with_the_old_data_makes_everything_invalid(mortal) -> None:
    """Old generation and old entries agree with each other; the identity does not. OPEN replaces
    what it finds."""
    store = mortal.store
    before = await opened(store, N1)
    put(store, b"x")
    assert await entry(store) == b"x"
    await mortal.restart(keep_data=True)
    reading = await store.read(ENTRY, [(GEN, TAGS)])
    assert reading.entry == b"x"
    assert reading.generations[0].nonce == N1
    assert reading.generations[0].judge(before, TAGS) is Verdict.OTHER_SERVER
    assert reading.generations[0].certificate() is None
    assert await opened(store, N2) == Certificate(N2, 0)
    assert (await view(store)).judge(before, TAGS) is Verdict.OTHER_GENERATION


async def test_a_bump_of_another_server_life_deletes_the_generation(mortal) -> None:
    """That is confirmed: nothing certified by it can become valid on any connection."""
    await opened(mortal.store, N1)
    await mortal.restart(keep_data=True)
    assert mortal.keys() == {GEN}
    await bump(mortal.store, "T:accounts")
    assert mortal.keys() == set()


async def test_an_empty_server_life_is_just_cold(mortal) -> None:
    """Nothing is there, and everything works."""
    before = await opened(mortal.store, N1)
    await mortal.restart(keep_data=False)
    assert (await view(mortal.store)).judge(before, []) is Verdict.NO_GENERATION
    assert await opened(mortal.store, N2) == Certificate(N2, 0)


@pytest.mark.parametrize("seed", range(5))
async def test_nothing_valid_is_older_than_the_last_confirmed_bump(subject, seed: int) -> None:
    """Random captures, late and reordered puts, writes, evictions: what is judged valid is the
    present truth."""
    store, rng = subject.store, random.Random(seed)
    truth = dict.fromkeys(("T:accounts", "T:leads"), 0)
    late: list[tuple[Certificate, str, int]] = []
    stored: tuple[Certificate, str, int] | None = None
    hits = 0
    for step in range(400):
        action = rng.choices(
            ("fill", "land", "write", "read", "evict", "flush", "all"), (6, 6, 3, 12, 1, 0.2, 0.3)
        )[0]
        tag = rng.choice(list(truth))
        if action == "fill":
            certificate = (await view(store)).certificate() or await opened(store, b"%016x" % step)
            late.append((certificate, tag, truth[tag]))
        elif action == "land" and late:
            stored = late.pop(rng.randrange(len(late)))
        elif action in ("write", "all"):
            truth = {
                name: value + (action == "all" or name == tag) for name, value in truth.items()
            }
            await bump(store, *([FLOOR] if action == "all" else [tag]))
        elif action == "evict":
            subject.lose(GEN)
        elif action == "flush":
            subject.lose_all()
        elif action == "read" and stored is not None:
            certificate, of, value = stored
            if (await view(store)).judge(certificate, [of, FLOOR]) is Verdict.VALID:
                hits += 1
                assert value == truth[of], f"seed {seed}, step {step}"
    assert hits > 20  # else "safe" may mean "never caches"
