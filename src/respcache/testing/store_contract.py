"""The contract of ``respcache.stores.base.Store`` as a test suite, for stores of your own.

Subclass ``StoreContract`` in a test file, give it a fixture ``subject``, and pytest runs every test
on your store (docs/testing.md)::

    import pytest

    pytest.register_assert_rewrite("respcache.testing.store_contract")

    from respcache.testing.store_contract import StoreContract


    class TestMyStore(StoreContract):
        @pytest.fixture
        async def subject(self):
            subject = MySubject()
            await subject.store.connect()
            yield subject
            await subject.store.close()

The tests are coroutines for the pytest plugin of anyio, on asyncio. Requires the extra
``testing``.
"""

import random
from collections.abc import Sequence
from typing import Protocol

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

GEN, OTHER_GEN = "tenant:a:~gen", "tenant:b:~gen"
ENTRY, FILL = "tenant:a:accounts:list:00", "tenant:a:~fill:accounts:list:00"
N1, N2 = b"0123456789abcdef", b"fedcba9876543210"
HOUR_MS = 3_600_000
TAGS = ("M:accounts", "T:accounts", "T:leads", FLOOR)


async def _view(store: Store, tags: Sequence[str] = TAGS, generation: str = GEN) -> GenerationView:
    return (await store.read(None, [(generation, tags)])).generations[0]


async def _opened(store: Store, nonce: bytes = N1, generation: str = GEN) -> Certificate:
    certificate = (await store.open(generation, nonce=nonce, ttl_ms=HOUR_MS)).certificate()
    assert certificate is not None
    return certificate


async def _bump(store: Store, *tags: str, generation: str = GEN) -> None:
    await store.bump(generation, tags=tags, ttl_ms=HOUR_MS)


def _put(
    store: Store, envelope: bytes, *, ttl_ms: int = HOUR_MS, generation_ttl_ms: int = 2 * HOUR_MS
) -> None:
    store.put(ENTRY, envelope, ttl_ms=ttl_ms, generation=GEN, generation_ttl_ms=generation_ttl_ms)


async def _entry(store: Store) -> bytes | None:
    return (await store.read(ENTRY, [])).entry


E1, E2 = "1" * 16, "2" * 16


async def _proposed(store: Store, token: str, *, replacing: str = "") -> Epoch | None:
    """Propose an epoch for the server to which the store is connected."""
    _, identity = await store.epoch()
    mine = Epoch(token, identity, "incarnation", Cursor("750:760:751,755", 1234.5))
    found, named = await store.epoch(mine, replacing=replacing, ttl_ms=HOUR_MS)
    assert named == identity
    return found


class StoreSubject(Protocol):
    """A connected store, and access to its server that bypasses the store."""

    store: Store

    def keys(self) -> set[str]:
        """Return all stored keys."""
        ...

    def ttl_ms(self, key: str) -> float:
        """Return the remaining time to live of a key; infinity if it does not expire."""
        ...

    def delete(self, key: str) -> None:
        """Delete a key, as eviction does."""
        ...

    def delete_field(self, key: str, field: str) -> None:
        """Delete a field of a generation."""
        ...

    def overwrite_field(self, key: str, field: str) -> None:
        """Set a field of a generation to the text ``x``."""
        ...

    def clear(self) -> None:
        """Delete all keys."""
        ...

    async def expire(self, key: str) -> None:
        """Return when the time to live of a key has ended."""
        ...

    async def restart(self, *, keep_data: bool) -> None:
        """Make the server another server life, and return when the store is connected to it."""
        ...


class StoreContract:
    """The tests. It has more than 15 methods: one for each sentence of the contract."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def store(self, subject: StoreSubject) -> Store:
        """Return the store of the subject."""
        return subject.store

    @pytest.fixture
    def restartable(self, subject: StoreSubject) -> StoreSubject:
        """Return a subject whose server may be restarted; override it if it must not be shared."""
        return subject

    # -- read --------------------------------------------------------------------------------------

    async def test_an_empty_store_has_neither_entries_nor_generations(self, store: Store) -> None:
        """Views of missing generations also name the server."""
        reading = await store.read(ENTRY, [(GEN, TAGS), (OTHER_GEN, ())])
        assert reading.entry is None
        assert [found.nonce for found in reading.generations] == [None, None]
        assert len({found.server for found in reading.generations}) == 1
        assert reading.generations[0].server

    async def test_reading_nothing_returns_nothing(self, store: Store) -> None:
        """No entry, no generations: an empty reading."""
        reading = await store.read(None, [])
        assert (reading.entry, reading.generations) == (None, ())

    async def test_views_come_in_the_requested_order_with_the_requested_tags(
        self, store: Store
    ) -> None:
        """A tag that was not bumped in this life is absent."""
        await _opened(store, N1, GEN)
        await _opened(store, N2, OTHER_GEN)
        await _bump(store, "T:accounts", generation=OTHER_GEN)
        reading = await store.read(None, [(OTHER_GEN, TAGS), (GEN, TAGS), (OTHER_GEN, ["T:leads"])])
        assert [found.nonce for found in reading.generations] == [N2, N1, N2]
        assert [found.bumps for found in reading.generations] == [{"T:accounts": 1}, {}, {}]
        assert [found.sequence for found in reading.generations] == [1, 0, 1]

    # -- open --------------------------------------------------------------------------------------

    async def test_a_generation_begins_at_zero_with_the_given_nonce(self, store: Store) -> None:
        """``open`` returns the same view as ``read``."""
        made = await store.open(GEN, nonce=N1, ttl_ms=HOUR_MS)
        assert made.certificate() == Certificate(N1, 0)
        assert await _view(store) == made

    async def test_a_usable_generation_is_kept(self, store: Store) -> None:
        """If two processes open it, the second gets the first's generation."""
        await _opened(store, N1)
        await _bump(store, "T:accounts")
        assert await _opened(store, N2) == Certificate(N1, 1)
        assert (await _view(store)).bumps == {"T:accounts": 1}

    @pytest.mark.parametrize("field", ["n", "r", "s"])
    async def test_an_incomplete_generation_counts_as_missing_and_is_replaced(
        self, subject: StoreSubject, field: str
    ) -> None:
        """A damaged hash does not keep its tenant out of the cache."""
        await _opened(subject.store, N1)
        await _bump(subject.store, "T:accounts")
        subject.delete_field(GEN, field)
        assert (await _view(subject.store)).nonce is None
        assert await _opened(subject.store, N2) == Certificate(N2, 0)
        assert (await _view(subject.store)).bumps == {}

    @pytest.mark.parametrize("field", ["n", "r", "s"])
    async def test_a_bump_of_an_incomplete_generation_deletes_it(
        self, subject: StoreSubject, field: str
    ) -> None:
        """A sequence restarted under the same nonce would make old entries valid."""
        before = await _opened(subject.store, N1)
        for _ in range(3):
            await _bump(subject.store, "T:accounts")
            before = await _opened(subject.store, N2)
        subject.delete_field(GEN, field)
        await _bump(subject.store, "T:accounts")
        assert subject.keys() == set()
        assert (await _view(subject.store)).judge(before, ["T:accounts"]) is Verdict.NO_GENERATION

    async def test_a_generation_with_an_invalid_sequence_is_replaced(
        self, subject: StoreSubject
    ) -> None:
        """Neither a read nor a bump fails because of it."""
        for repair in (
            subject.store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS),
            _opened(subject.store, N2),
        ):
            await _opened(subject.store, N1)
            subject.overwrite_field(GEN, "s")
            assert (await _view(subject.store)).nonce is None
            await repair
            assert (await _view(subject.store)).nonce in (None, N2)
        assert (await _view(subject.store)).certificate() == Certificate(N2, 0)

    async def test_opening_and_bumping_renew_the_time_to_live(self, subject: StoreSubject) -> None:
        """A generation in use does not expire."""
        store = subject.store
        await store.open(GEN, nonce=N1, ttl_ms=50_000)
        assert 0 < subject.ttl_ms(GEN) <= 50_000
        await store.open(GEN, nonce=N2, ttl_ms=90_000)
        assert 50_000 < subject.ttl_ms(GEN) <= 90_000
        await store.bump(GEN, tags=["T:accounts"], ttl_ms=150_000)
        assert 90_000 < subject.ttl_ms(GEN) <= 150_000

    # -- bump --------------------------------------------------------------------------------------

    async def test_a_bump_advances_the_sequence_and_records_it_for_every_tag(
        self, store: Store
    ) -> None:
        """Other tags keep the sequence of their own last bump."""
        await _opened(store)
        await _bump(store, "T:accounts", "T:leads")
        await _bump(store, "T:leads")
        found = await _view(store)
        assert (found.sequence, found.bumps) == (2, {"T:accounts": 1, "T:leads": 2})

    async def test_a_bump_of_a_missing_generation_is_confirmed_and_creates_nothing(
        self, subject: StoreSubject
    ) -> None:
        """A generation created by a bump would have no nonce."""
        await _bump(subject.store, "T:accounts")
        assert subject.keys() == set()

    async def test_bumping_the_floor_invalidates_everything_captured_before(
        self, store: Store
    ) -> None:
        """Every entry depends on the floor."""
        before = await _opened(store)
        await _bump(store, FLOOR)
        found = await _view(store)
        assert found.judge(before, ["T:accounts", FLOOR]) is Verdict.INVALIDATED
        assert found.judge(Certificate(N1, found.sequence), ["T:accounts", FLOOR]) is Verdict.VALID

    async def test_too_many_tags_are_compacted_by_raising_the_floor(
        self, subject: StoreSubject
    ) -> None:
        """No certificate from before the compaction stays valid for any tag."""
        store = subject.store
        await _opened(store)
        tags = [f"T:t{number}" for number in range(2100)]
        for start in range(0, 2100, 60):
            before = (await _view(store, [FLOOR])).certificate()
            await _bump(store, *tags[start : start + 60])
            found = await _view(store, [FLOOR, *tags])
            if FLOOR in found.bumps:
                break
        assert before is not None
        assert found.bumps == {FLOOR: found.sequence}
        assert found.nonce == N1
        assert found.judge(before, [FLOOR]) is Verdict.INVALIDATED
        assert subject.ttl_ms(GEN) <= HOUR_MS
        await _bump(store, "T:accounts")
        assert (await _view(store)).bumps == {
            FLOOR: found.sequence,
            "T:accounts": found.sequence + 1,
        }

    async def test_rows_that_were_all_applied_before_do_not_bump_again(self, store: Store) -> None:
        """A new row bumps all tags of the call."""
        await _opened(store)
        first, second = "a" * 16, "b" * 16
        await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[first])
        await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[first])
        assert (await _view(store)).bumps == {"T:accounts": 1}
        await store.bump(GEN, tags=["T:accounts", "T:leads"], ttl_ms=HOUR_MS, rows=[first, second])
        assert (await _view(store)).bumps == {"T:accounts": 2, "T:leads": 2}
        await store.bump(GEN, tags=["T:accounts", "T:leads"], ttl_ms=HOUR_MS, rows=[second, first])
        assert (await _view(store)).sequence == 2
        await _bump(store, "T:leads")
        assert (await _view(store)).sequence == 3

    async def test_the_oldest_rows_are_forgotten_first(self, store: Store) -> None:
        """Forgetting a row costs one more bump. Each generation has its own ring."""
        await _opened(store)
        rows = [f"{number:016x}" for number in range(RING_ROWS + 1)]
        for row in rows:
            await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[row])
        for row in rows[1:]:
            await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[row])
        assert (await _view(store)).sequence == len(rows)
        await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=rows[:1])
        assert (await _view(store)).sequence == len(rows) + 1
        await _opened(store, N2, generation=OTHER_GEN)
        await store.bump(OTHER_GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=rows[-1:])
        assert (await _view(store, generation=OTHER_GEN)).sequence == 1

    async def test_a_bump_returns_what_the_generation_has_reached(
        self, subject: StoreSubject
    ) -> None:
        """For rows that were applied before, at least their sequence."""
        store, row = subject.store, "a" * 16
        await _opened(store, N1)
        server = (await _view(store)).server
        assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS) == Bumped(
            server, Certificate(N1, 1)
        )
        assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[row]) == Bumped(
            server, Certificate(N1, 2)
        )
        await _bump(store, "T:leads")
        assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS, rows=[row]) == Bumped(
            server, Certificate(N1, 3)
        )
        many = [f"T:t{number}" for number in range(MAX_FIELDS)]
        assert await store.bump(GEN, tags=many, ttl_ms=HOUR_MS) == Bumped(
            server, Certificate(N1, 4)
        )
        assert (await _view(store)).certificate() == Certificate(N1, 4)

    async def test_a_bump_without_a_generation_has_reached_nothing(
        self, subject: StoreSubject
    ) -> None:
        """Also if the bump deleted an incomplete generation."""
        store = subject.store
        server = (await _view(store)).server
        assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS) == Bumped(server)
        await _opened(store)
        subject.delete_field(GEN, "s")
        assert await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS) == Bumped(server)

    # -- epochs ------------------------------------------------------------------------------------

    async def test_an_epoch_is_kept_until_its_token_is_replaced(
        self, subject: StoreSubject
    ) -> None:
        """If several are proposed, the first is in force."""
        store = subject.store
        assert (await store.epoch())[0] is None
        first = await _proposed(store, E1)
        assert first is not None
        assert (first.token, first.incarnation, first.cursor) == (
            E1,
            "incarnation",
            Cursor("750:760:751,755", 1234.5),
        )
        assert (await store.epoch())[0] == first
        assert await _proposed(store, E2) == first
        assert await _proposed(store, E2, replacing="other") == first
        found = await _proposed(store, E2, replacing=E1)
        assert found is not None
        assert found.token == E2
        assert (await store.epoch())[0] == found
        assert subject.ttl_ms(EPOCH_KEY) <= HOUR_MS

    async def test_an_epoch_of_another_server_life_is_replaced_by_the_next_proposal(
        self, restartable: StoreSubject
    ) -> None:
        """The identity in the epoch is not the server's."""
        store = restartable.store
        old = await _proposed(store, E1)
        await restartable.restart(keep_data=True)
        found, identity = await store.epoch()
        assert found == old
        assert old is not None
        assert found is not None
        assert found.identity != identity
        new = await _proposed(store, E2)
        assert new is not None
        assert (new.token, new.identity) == (E2, identity)

    async def test_another_epoch_counts_as_another_server_life(self, store: Store) -> None:
        """Nothing captured before is valid, and a bump deletes the generation."""
        before = await _opened(store)
        store.adopt(E1)
        found = await _view(store)
        assert found.server.startswith(f"{E1}:")
        assert found.judge(before, []) is Verdict.OTHER_SERVER
        within = await _opened(store, N2)
        assert (await _view(store)).judge(within, []) is Verdict.VALID
        assert (await store.bump(GEN, tags=["T:accounts"], ttl_ms=HOUR_MS)).server == found.server
        store.adopt(E2)
        assert (await _view(store)).judge(within, []) is Verdict.OTHER_SERVER
        await _bump(store, "T:accounts")
        assert (await _view(store)).nonce is None

    # -- put ---------------------------------------------------------------------------------------

    async def test_an_entry_is_read_as_it_was_put(self, store: Store) -> None:
        """Any bytes. A later put replaces an earlier one."""
        _put(store, b"old")
        _put(store, bytes(range(256)) * 400)
        assert await _entry(store) == bytes(range(256)) * 400

    async def test_putting_renews_a_generation_but_creates_none(
        self, subject: StoreSubject
    ) -> None:
        """A generation outlives every entry that it certifies."""
        store = subject.store
        _put(store, b"x")
        assert await _entry(store) == b"x"
        assert subject.keys() == {ENTRY}
        await store.open(GEN, nonce=N1, ttl_ms=50_000)
        _put(store, b"y", ttl_ms=60_000, generation_ttl_ms=90_000)
        assert await _entry(store) == b"y"
        assert 50_000 < subject.ttl_ms(GEN) <= 90_000
        assert 0 < subject.ttl_ms(ENTRY) <= 60_000

    async def test_entries_generations_and_locks_expire(self, subject: StoreSubject) -> None:
        """Each has its own time to live."""
        store = subject.store
        _put(store, b"x", ttl_ms=30)
        await store.lock(FILL, FillLock("mine", Certificate(N1, 0)), ttl_ms=40)
        await store.open(GEN, nonce=N1, ttl_ms=50)
        for key in (ENTRY, FILL, GEN):
            await subject.expire(key)
        reading = await store.read(ENTRY, [(GEN, TAGS)])
        assert (reading.entry, reading.generations[0].nonce) == (None, None)
        yours = FillLock("yours", Certificate(N2, 0))
        assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == yours

    async def test_every_key_expires(self, subject: StoreSubject) -> None:
        """Everything except the switches."""
        store = subject.store
        await _opened(store)
        await _bump(store, "T:accounts")
        await _bump(store, "T:leads", generation=OTHER_GEN)
        _put(store, b"x")
        await store.lock(FILL, FillLock("mine", Certificate(N1, 0)), ttl_ms=HOUR_MS)
        await store.lock(
            FILL, FillLock("yours", Certificate(N1, 0)), ttl_ms=HOUR_MS, replacing="mine"
        )
        await _entry(store)
        assert subject.keys() == {GEN, ENTRY, FILL}
        stored = subject.keys()
        assert all(0 < subject.ttl_ms(key) <= 2 * HOUR_MS for key in stored)

    # -- locks -------------------------------------------------------------------------------------

    async def test_a_free_lock_is_taken_and_a_taken_one_is_returned(self, store: Store) -> None:
        """The second caller learns who fills, and under which certificate."""
        mine, yours = FillLock("mine", Certificate(N1, 41)), FillLock("yours", Certificate(N2, 42))
        assert await store.lock(FILL, mine, ttl_ms=HOUR_MS) == mine
        assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == mine
        assert await store.lock(FILL, mine, ttl_ms=HOUR_MS) == mine

    async def test_a_lock_is_taken_over_only_from_the_named_owner(self, store: Store) -> None:
        """If two callers replace the same owner, one wins and the other learns it."""
        dead, first, second = (
            FillLock(name, Certificate(N1, 0)) for name in ("dead", "first", "second")
        )
        await store.lock(FILL, dead, ttl_ms=HOUR_MS)
        assert await store.lock(FILL, first, ttl_ms=HOUR_MS, replacing="other") == dead
        assert await store.lock(FILL, first, ttl_ms=HOUR_MS, replacing="dea") == dead
        assert await store.lock(FILL, first, ttl_ms=HOUR_MS, replacing="dead") == first
        assert await store.lock(FILL, second, ttl_ms=HOUR_MS, replacing="dead") == first

    async def test_a_free_lock_is_taken_by_a_caller_that_wanted_to_replace(
        self, store: Store
    ) -> None:
        """The named owner may have released it meanwhile."""
        mine = FillLock("mine", Certificate(N1, 0))
        assert await store.lock(FILL, mine, ttl_ms=HOUR_MS, replacing="gone") == mine

    async def test_only_the_owner_releases_a_lock(self, store: Store) -> None:
        """A former owner does not release its successor's lock."""
        mine, yours = FillLock("mine", Certificate(N1, 0)), FillLock("yours", Certificate(N1, 0))
        await store.lock(FILL, mine, ttl_ms=HOUR_MS)
        store.release(FILL, "yours")
        store.release(FILL, "min")
        assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == mine
        store.release(FILL, "mine")
        assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == yours
        store.release("tenant:a:~fill:accounts:list:ff", "mine")

    async def test_a_released_lock_implies_that_the_entry_is_stored(self, store: Store) -> None:
        """``release`` is sent after earlier puts and does not overtake them."""
        mine, yours = FillLock("mine", Certificate(N1, 0)), FillLock("yours", Certificate(N1, 0))
        for number in range(50):
            await store.lock(FILL, mine, ttl_ms=HOUR_MS)
            _put(store, b"%d" % number)
            store.release(FILL, "mine")
            assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == yours
            assert await _entry(store) == b"%d" % number
            store.release(FILL, "yours")

    # -- switch, info, close -----------------------------------------------------------------------

    async def test_switches_are_on_until_they_are_turned_off(self, store: Store) -> None:
        """``switch`` is idempotent, and switches are independent."""
        assert await store.switch() == frozenset()
        assert await store.switch({"*": True, "tenant:a": True}) == {"*", "tenant:a"}
        assert await store.switch({"*": True}) == {"*", "tenant:a"}
        assert await store.switch() == {"*", "tenant:a"}
        assert await store.switch({"*": False, "module:m": True}) == {"tenant:a", "module:m"}
        assert await store.switch({"*": False}) == {"tenant:a", "module:m"}
        assert await store.switch({"tenant:a": False, "module:m": False}) == frozenset()
        assert await store.switch() == frozenset()

    async def test_switches_leave_no_key_when_all_are_on(self, subject: StoreSubject) -> None:
        """While one is off, their key does not expire."""
        await subject.store.switch({"tenant:a": True})
        assert subject.keys() == {SWITCHES_KEY}
        assert subject.ttl_ms(SWITCHES_KEY) == float("inf")
        await subject.store.switch({"tenant:a": False})
        assert subject.keys() == set()

    async def test_info_returns_the_servers_statistics(self, store: Store) -> None:
        """As the text that the server sends."""
        assert "evicted_keys:0" in (await store.info()).stats
        assert ":" in (await store.info()).memory

    async def test_a_closed_store_is_unavailable_and_can_be_connected_again(
        self, store: Store
    ) -> None:
        """Awaited operations raise, others do nothing. ``close`` is idempotent."""
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
        _put(store, b"x")
        store.release(FILL, "mine")
        await store.connect()
        assert store.available
        assert await _entry(store) is None

    # -- the premises of core/generations.py -------------------------------------------------------

    async def test_an_evicted_generation_gets_another_nonce(self, subject: StoreSubject) -> None:
        """Nothing certified before becomes valid again."""
        before = await _opened(subject.store, N1)
        await _bump(subject.store, "T:accounts")
        subject.delete(GEN)
        assert (await _view(subject.store)).judge(before, []) is Verdict.NO_GENERATION
        await _opened(subject.store, N2)
        assert (await _view(subject.store)).judge(before, []) is Verdict.OTHER_GENERATION

    async def test_losing_all_keys_invalidates_everything_and_caching_resumes(
        self, subject: StoreSubject
    ) -> None:
        """As after FLUSH ALL."""
        store = subject.store
        before = await _opened(store, N1)
        _put(store, b"x")
        assert await _entry(store) == b"x"
        subject.clear()
        reading = await store.read(ENTRY, [(GEN, TAGS)])
        assert (reading.entry, reading.generations[0].judge(before, [])) == (
            None,
            Verdict.NO_GENERATION,
        )
        after = await _opened(store, N2)
        assert (await _view(store)).judge(after, TAGS) is Verdict.VALID

    async def test_losing_any_single_key_is_safe(self, subject: StoreSubject) -> None:
        """Entry, generation or lock: the next caller creates it again."""
        store = subject.store
        for key in (ENTRY, GEN, FILL):
            certificate = await _opened(store, N1)
            _put(store, b"x")
            mine, yours = FillLock("mine", certificate), FillLock("yours", certificate)
            await store.lock(FILL, mine, ttl_ms=HOUR_MS)
            subject.delete(key)
            reading = await store.read(ENTRY, [(GEN, TAGS)])
            assert reading.entry == (None if key == ENTRY else b"x")
            verdict = reading.generations[0].judge(certificate, TAGS)
            assert verdict is (Verdict.NO_GENERATION if key == GEN else Verdict.VALID)
            assert await store.lock(FILL, yours, ttl_ms=HOUR_MS) == (yours if key == FILL else mine)
            subject.clear()

    async def test_another_server_life_with_the_old_data_is_invalid(
        self, restartable: StoreSubject
    ) -> None:
        """Old generation and entries agree with each other; the identity differs."""
        store = restartable.store
        before = await _opened(store, N1)
        _put(store, b"x")
        assert await _entry(store) == b"x"
        await restartable.restart(keep_data=True)
        reading = await store.read(ENTRY, [(GEN, TAGS)])
        assert reading.entry == b"x"
        assert reading.generations[0].nonce == N1
        assert reading.generations[0].judge(before, TAGS) is Verdict.OTHER_SERVER
        assert reading.generations[0].certificate() is None
        assert await _opened(store, N2) == Certificate(N2, 0)
        assert (await _view(store)).judge(before, TAGS) is Verdict.OTHER_GENERATION

    async def test_a_bump_of_another_server_life_deletes_the_generation(
        self, restartable: StoreSubject
    ) -> None:
        """That is a confirmation: no connection can serve what it certified."""
        await _opened(restartable.store, N1)
        await restartable.restart(keep_data=True)
        assert restartable.keys() == {GEN}
        await _bump(restartable.store, "T:accounts")
        assert restartable.keys() == set()

    async def test_an_empty_server_life_works(self, restartable: StoreSubject) -> None:
        """Nothing is stored, and every operation works."""
        before = await _opened(restartable.store, N1)
        await restartable.restart(keep_data=False)
        assert (await _view(restartable.store)).judge(before, []) is Verdict.NO_GENERATION
        assert await _opened(restartable.store, N2) == Certificate(N2, 0)

    @pytest.mark.parametrize("seed", range(5))
    async def test_nothing_valid_is_older_than_the_last_confirmed_bump(
        self, subject: StoreSubject, seed: int
    ) -> None:
        """Random captures, delayed puts, writes and evictions: a valid entry is true."""
        store, rng = subject.store, random.Random(seed)
        truth = dict.fromkeys(("T:accounts", "T:leads"), 0)
        late: list[tuple[Certificate, str, int]] = []
        stored: tuple[Certificate, str, int] | None = None
        hits = 0
        for step in range(400):
            action = rng.choices(
                ("fill", "land", "write", "read", "evict", "flush", "all"),
                (6, 6, 3, 12, 1, 0.2, 0.3),
            )[0]
            tag = rng.choice(list(truth))
            if action == "fill":
                certificate = (await _view(store)).certificate() or await _opened(
                    store, b"%016x" % step
                )
                late.append((certificate, tag, truth[tag]))
            elif action == "land" and late:
                stored = late.pop(rng.randrange(len(late)))
            elif action in ("write", "all"):
                truth = {
                    name: value + (action == "all" or name == tag) for name, value in truth.items()
                }
                await _bump(store, *([FLOOR] if action == "all" else [tag]))
            elif action == "evict":
                subject.delete(GEN)
            elif action == "flush":
                subject.clear()
            elif action == "read" and stored is not None:
                certificate, of, value = stored
                if (await _view(store)).judge(certificate, [of, FLOOR]) is Verdict.VALID:
                    hits += 1
                    assert value == truth[of], f"seed {seed}, step {step}"
        assert hits > 20  # a store that never returns valid entries would pass, too
