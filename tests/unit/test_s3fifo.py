"""The near cache's replacement policy, held to a plain model of it and to what it is chosen for."""

import gc
import random
import sys
import weakref
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respcache.read import s3fifo
from respcache.read.s3fifo import TRIAL_USES, S3Fifo


class Model:
    """S3-FIFO written for reading: three lists, oldest first; everything is summed and searched
    anew. Keys are integers."""

    def __init__(self, max_bytes: int, *, max_spared: int) -> None:
        self.max_bytes = max_bytes
        self.max_spared = max_spared
        self.small_bytes = max_bytes // 10
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[tuple[int, int]] = []
        self.values: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.uses: dict[int, int] = {}
        self.admitted = self.evicted = self.rejected = 0

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())

    def get(self, key: int) -> int | None:
        if key not in self.values:
            return None
        self.uses[key] = min(3, self.uses[key] + 1)
        return self.values[key]

    def put(self, key: int, value: int, *, size_bytes: int) -> None:
        if size_bytes > self.max_bytes // 10:
            self.rejected += 1
            if key in self.values:
                self.discard(key)
        elif key in self.values:
            self.values[key] = value
            self.resize(key, size_bytes)
        else:
            came_back = key in [ghost for ghost, _ in self.ghosts]
            self.ghosts = [ghost for ghost in self.ghosts if ghost[0] != key]
            self.make_room(size_bytes)
            self.values[key], self.sizes[key], self.uses[key] = value, size_bytes, 0
            (self.main if came_back else self.small).append(key)
            self.admitted += 1

    def resize(self, key: int, size_bytes: int) -> None:
        if key not in self.values:
            return
        if size_bytes > self.max_bytes // 10:
            self.rejected += 1
            self.discard(key)
        else:
            self.sizes[key] = size_bytes
            self.make_room(0)

    def discard(self, key: int) -> None:
        if key in self.values:
            self.forget(key)
            (self.small if key in self.small else self.main).remove(key)
        else:
            self.ghosts = [ghost for ghost in self.ghosts if ghost[0] != key]

    def clear(self) -> None:
        for queue in (self.small, self.main, self.ghosts, self.values, self.sizes, self.uses):
            queue.clear()

    def make_room(self, size_bytes: int) -> None:
        spared = 0
        while self.size_bytes + size_bytes > self.max_bytes:
            if sum(self.sizes[key] for key in self.small) >= self.small_bytes or not self.main:
                key = self.small.pop(0)
                if self.uses[key] > 1 and spared < self.max_spared:
                    spared += 1
                    self.uses[key] = 0
                    self.main.append(key)
                else:
                    self.ghosts.append((key, self.sizes[key]))
                    while sum(size for _, size in self.ghosts) > self.max_bytes - self.small_bytes:
                        self.ghosts.pop(0)
                    self.forget(key)
                    self.evicted += 1
            else:
                key = self.main.pop(0)
                if self.uses[key] > 0 and spared < self.max_spared:
                    spared += 1
                    self.uses[key] -= 1
                    self.main.append(key)
                else:
                    self.forget(key)
                    self.evicted += 1

    def forget(self, key: int) -> None:
        del self.values[key], self.sizes[key], self.uses[key]


KEYS = st.integers(0, 24)
OPERATIONS = st.one_of(
    st.tuples(st.just("read"), KEYS, st.integers(1, 12)),
    st.tuples(st.just("read"), KEYS, st.integers(1, 4)),
    st.tuples(st.just("get"), KEYS, st.just(1)),
    st.tuples(st.just("put"), KEYS, st.integers(1, 12)),
    st.tuples(st.just("resize"), KEYS, st.integers(1, 12)),
    st.tuples(st.just("discard"), KEYS, st.just(1)),
    st.tuples(st.just("clear"), st.just(0), st.just(1)),
)


def long_run(seed: int, length: int, sizes: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """Return operations whose popular keys change now and then; most of what hypothesis draws by
    itself is short."""
    rng, popular, operations = random.Random(seed), 0, []
    for name in rng.choices(
        ("read", "get", "put", "resize", "discard", "clear"), (80, 20, 3, 3, 2, 0.1), k=length
    ):
        if rng.random() < 0.05:
            popular = rng.randrange(40)
        operations.append((name, (popular + int(rng.paretovariate(1))) % 40, rng.choice(sizes)))
    return operations


LONG_RUNS = st.builds(
    long_run,
    st.integers(0, 2**32),
    st.integers(100, 400),
    st.sampled_from(((1, 1, 1, 2, 3), (1, 1, 2, 3, 5, 10, 11))),
)


@settings(deadline=None)
@given(
    max_bytes=st.sampled_from((9, 10, 15, 20, 37, 100)),
    max_spared=st.sampled_from((1, 3, 1_000)),
    operations=st.one_of(st.lists(OPERATIONS, max_size=60), LONG_RUNS),
)
def test_it_decides_as_the_plain_model_does(
    max_bytes: int, max_spared: int, operations: list[tuple[str, int, int]]
) -> None:
    """After every call: the same keys, bytes and counters, and never more bytes than allowed."""
    model, numbers = Model(max_bytes, max_spared=max_spared), count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fifo, "MAX_SPARED", max_spared)
        cache: S3Fifo[int, int] = S3Fifo(max_bytes)
        for name, key, size_bytes in operations:
            step(model, cache, name, key, size_bytes, next(numbers))
            assert cache.size_bytes <= max_bytes
            assert {key for key in range(40) if key in cache} == set(model.values)
            assert (len(cache), cache.size_bytes) == (len(model.values), model.size_bytes)
            assert (cache.admitted, cache.evicted, cache.rejected) == (
                model.admitted,
                model.evicted,
                model.rejected,
            )
        assert [cache.get(key) for key in range(40)] == [model.get(key) for key in range(40)]


def step(
    model: Model, cache: S3Fifo[int, int], name: str, key: int, size_bytes: int, value: int
) -> None:
    """Do the same to both. ``read`` is what a cache is for: look, and keep what was not there."""
    for each in (model, cache):
        match name:
            case "read":
                if each.get(key) is None:
                    each.put(key, value, size_bytes=size_bytes)
            case "get":
                each.get(key)
            case "put":
                each.put(key, value, size_bytes=size_bytes)
            case "resize":
                each.resize(key, size_bytes)
            case "discard":
                each.discard(key)
            case "clear":
                each.clear()


def cache_with(keys: range, *, max_bytes: int = 100, uses: int = 0) -> S3Fifo[int, int]:
    """Return a cache with one-byte items that were used so often."""
    cache: S3Fifo[int, int] = S3Fifo(max_bytes)
    for key in keys:
        cache.put(key, key, size_bytes=1)
    use(cache, keys, uses)
    return cache


def use(cache: S3Fifo[int, Any], keys: range, times: int = 1) -> None:
    for _ in range(times):
        for key in keys:
            cache.get(key)


def scan(cache: S3Fifo[int, int], keys: range) -> None:
    """Put each of them once, in this order, and use none."""
    for key in keys:
        cache.put(key, key, size_bytes=1)


def kept(cache: S3Fifo[int, int], keys: range) -> int:
    return sum(key in cache for key in keys)


def test_the_bound_holds_after_every_call_whatever_the_sizes() -> None:
    """3,000 calls of all kinds, sizes from one byte to more than everything."""
    rng = random.Random(11)
    cache: S3Fifo[int, int] = S3Fifo(10_000)
    sizes = dict[int, int]()
    for number in range(3_000):
        key, size_bytes = rng.randrange(100), rng.randrange(1, rng.choice((10, 300, 1_100, 12_000)))
        call = rng.choice((cache.put, cache.put, cache.resize, cache.discard))
        if call == cache.put:
            cache.put(key, number, size_bytes=size_bytes)
            sizes[key] = size_bytes
        elif call == cache.resize:
            cache.resize(key, size_bytes)
            sizes[key] = size_bytes
        else:
            cache.discard(key)
        assert (
            cache.size_bytes
            == sum(size for key, size in sizes.items() if key in cache)
            <= cache.max_bytes
        )
    assert cache.evicted > 100


def test_a_scan_of_items_used_once_leaves_the_hot_ones() -> None:
    """What LRU cannot do: ten times the cache passes through, and all that was in use is still
    there."""
    hot = range(80)
    cache = cache_with(hot, uses=2)
    scan(cache, range(1_000, 2_000))
    assert kept(cache, hot) == 80
    assert kept(cache, range(1_000, 2_000)) == 20


def test_one_use_in_small_is_not_enough_for_main_and_two_are() -> None:
    """Two reads of one page load do not make an item hot."""
    cache = cache_with(range(10), uses=1)
    use(cache, range(5))
    scan(cache, range(1_000, 2_000))
    assert kept(cache, range(5)) == 5
    assert kept(cache, range(5, 10)) == 0


def test_uses_in_small_do_not_count_again_in_main() -> None:
    """An item begins in main without uses, however many brought it there."""
    assert (
        life_in_main(uses=0, before=2)
        == life_in_main(uses=0, before=3)
        < life_in_main(uses=1, before=2)
    )


def test_uses_count_up_to_three() -> None:
    """What was hot yesterday, however hot, goes today."""
    lives = [life_in_main(uses=uses) for uses in (0, 1, 2, 3, 4, 1_000)]
    assert lives[0] < lives[1] < lives[2] < lives[3] == lives[4] == lives[5]


def life_in_main(*, uses: int, before: int = TRIAL_USES) -> int:
    """Return how many others earn a place in main before items with so many uses, there and before,
    are gone from it."""
    cache = cache_with(range(90), uses=before)
    scan(cache, range(1_000, 1_100))  # the 90 move to main
    use(cache, range(90), uses)
    for key in range(2_000, 4_000):
        if not kept(cache, range(90)):
            return key - 2_000
        cache.put(key, key, size_bytes=1)
        use(cache, range(key, key + 1), TRIAL_USES)
    raise AssertionError("they stay for ever")


def test_what_comes_back_as_a_ghost_goes_to_main() -> None:
    """It was evicted too soon: now it outlives a scan without a single use."""
    cache = cache_with(range(100))
    scan(cache, range(100, 105))
    assert kept(cache, range(5)) == 0
    scan(cache, range(5))
    scan(cache, range(1_000, 1_500))
    assert kept(cache, range(5)) == 5


def test_ghosts_are_as_many_as_main_could_hold() -> None:
    """90 of one byte each in a cache of 100; the 91st oldest is forgotten and begins in small
    again."""
    cache = cache_with(range(191))
    scan(cache, range(1, -1, -1))  # 1 was the oldest ghost, 0 was forgotten
    scan(cache, range(1_000, 1_200))
    assert [key in cache for key in range(2)] == [False, True]


def test_a_ghost_keeps_neither_its_key_nor_its_value_alive() -> None:
    """Keys may hold tokens and long query strings."""

    class Thing:
        pass

    cache: S3Fifo[Thing, Thing] = S3Fifo(10)
    key, value = Thing(), Thing()
    gone = weakref.ref(key), weakref.ref(value)
    cache.put(key, value, size_bytes=1)
    del key, value
    others = [Thing() for _ in range(10)]
    for other in others:
        cache.put(other, other, size_bytes=1)
    assert cache.evicted == 1
    assert [each() for each in gone] == [None, None]


def test_a_discarded_item_is_gone_at_once_from_either_queue() -> None:
    """Its bytes are free, its value is freed, and no eviction meets it again."""
    cache = cache_with(range(100), uses=2)
    scan(cache, range(1_000, 1_010))  # main is in use now, small holds the scan
    for key in (50, 1_009):
        assert key in cache
        cache.discard(key)
        assert key not in cache
        assert cache.get(key) is None
    assert (len(cache), cache.size_bytes) == (98, 98)
    evicted = cache.evicted
    scan(cache, range(2_000, 2_002))
    assert (len(cache), cache.evicted) == (100, evicted)


def test_a_discarded_key_has_no_past() -> None:
    """Neither as an item nor as a ghost: it begins in small."""
    cache = cache_with(range(90), uses=2)
    scan(cache, range(1_000, 1_020))
    # in main, a ghost, in small
    assert [key in cache for key in (0, 1_000, 1_019)] == [True, False, True]
    for key in (0, 1_000, 1_019):
        cache.discard(key)
        cache.put(key, key, size_bytes=1)
    scan(cache, range(2_000, 2_100))
    assert [key in cache for key in (0, 1_000, 1_019)] == [False, False, False]


def test_an_item_larger_than_small_is_not_kept() -> None:
    """It would drive out everything on trial at once."""
    cache = cache_with(range(50))
    cache.put(50, 50, size_bytes=11)
    cache.put(51, 51, size_bytes=10)
    assert (cache.get(50), cache.get(51)) == (None, 51)
    assert (cache.rejected, cache.evicted, cache.admitted) == (1, 0, 51)


def test_a_value_that_is_too_large_leaves_no_old_value_behind() -> None:
    """A stale answer is worse than none."""
    cache = cache_with(range(2))
    cache.put(0, 100, size_bytes=11)
    cache.resize(1, 11)
    assert (cache.get(0), cache.get(1), len(cache), cache.size_bytes, cache.rejected) == (
        None,
        None,
        0,
        0,
        2,
    )


def test_replacing_keeps_the_place_and_the_uses_and_counts_the_new_size() -> None:
    """An answer that was filled again is as hot as it was."""
    cache = cache_with(range(80), uses=2)
    for key in range(80):
        cache.put(key, -key, size_bytes=1)
    cache.put(0, -1, size_bytes=5)
    assert (cache.size_bytes, len(cache), cache.admitted) == (84, 80, 80)
    scan(cache, range(1_000, 2_000))
    assert [cache.get(key) for key in range(80)] == [-1, *range(-1, -80, -1)]


def test_an_item_that_grows_makes_room_and_one_that_shrinks_gives_it_back() -> None:
    """``resize`` is how a further encoding of an answer is counted."""
    cache = cache_with(range(100))
    cache.resize(99, 6)
    assert (cache.size_bytes, len(cache), cache.evicted) == (100, 95, 5)
    assert 99 in cache
    cache.resize(99, 2)
    assert (cache.size_bytes, cache.evicted) == (96, 5)
    cache.resize(12345, 2)
    assert (cache.size_bytes, len(cache)) == (96, 95)


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_an_item_without_a_size_is_a_mistake(size_bytes: int) -> None:
    """Any number of them would fit; nothing is changed."""
    cache = cache_with(range(1))
    for key in range(2):
        with pytest.raises(ValueError, match="at least 1"):
            cache.put(key, 7, size_bytes=size_bytes)
    with pytest.raises(ValueError, match="at least 1"):
        cache.resize(0, size_bytes)
    with pytest.raises(ValueError, match="negative"):
        S3Fifo(-1)
    assert (len(cache), cache.size_bytes, cache.get(0)) == (1, 1, 0)


def test_clear_forgets_everything_but_the_counters() -> None:
    """Ghosts too."""
    cache = cache_with(range(150), uses=2)
    evicted = cache.evicted
    cache.clear()
    assert (len(cache), cache.size_bytes, cache.admitted, cache.evicted) == (0, 0, 150, evicted)
    scan(cache, range(5))
    scan(cache, range(1_000, 1_200))
    assert kept(cache, range(5)) == 0


def test_one_call_spares_a_bounded_number_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """When all of main is at its top, somebody goes all the same: the oldest that is met after the
    bound."""
    monkeypatch.setattr(s3fifo, "MAX_SPARED", 7)
    cache = cache_with(range(100), uses=3)
    cache.put(100, 100, size_bytes=1)
    assert [key for key in range(100) if key not in cache] == [7]


@pytest.mark.long
def test_a_hundred_thousand_operations_leave_no_garbage() -> None:
    """Put and discard, put and evict, replace and resize: what is held does not grow, neither items
    nor ghosts nor queues."""
    cache: S3Fifo[int, list[int]] = S3Fifo(100_000)
    blocks = []
    for first in range(0, 100_000, 20_000):
        for key in range(first, first + 20_000):
            cache.put(key, [key], size_bytes=500)
            if key % 4:
                cache.discard(key)
            elif key % 3:
                use(cache, range(key, key + 1), 2)
                cache.resize(key, 1 + key % 900)
                cache.put(key, [key], size_bytes=600)
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    assert len(cache) <= 1_000
    assert abs(blocks[-1] - blocks[1]) < 2_000, blocks


def test_a_slot_that_somebody_holds_on_to_says_when_its_item_goes() -> None:
    """Evicted from either queue, discarded, too large, all forgotten: without a value; replaced:
    with the new one."""
    cache = cache_with(range(100), uses=2)
    cache.put(7, -7, size_bytes=1)
    slots = {key: slot for key in range(100) if (slot := cache.slot(key)) is not None}
    assert (len(slots), slots[7].value, cache.slot(100)) == (100, -7, None)
    scan(cache, range(1_000, 1_010))
    on_trial = {key: slot for key in range(1_000, 1_010) if (slot := cache.slot(key)) is not None}
    cache.discard(50)
    cache.resize(51, 11)
    cache.put(52, 52, size_bytes=11)
    assert [slots[key].value for key in (50, 51, 52)] == [None, None, None]
    for key in range(2_000, 3_000):
        cache.put(key, key, size_bytes=1)
        use(cache, range(key, key + 1), TRIAL_USES)
    assert kept(cache, range(100)) == 0
    assert [
        slot.value for slot in (*slots.values(), *on_trial.values()) if slot.value is not None
    ] == []
    last = cache.slot(2_999)
    assert last is not None
    assert last.value == 2_999
    cache.clear()
    assert last.value is None


@pytest.mark.parametrize("uses", [0, TRIAL_USES])
def test_a_renewed_item_keeps_its_place_and_its_uses_in_a_slot_of_its_own(uses: int) -> None:
    """In small and in main; the former slot is empty; what is not kept is not renewed."""
    cache, plain = cache_with(range(90), uses=uses), cache_with(range(90), uses=uses)
    for one in (cache, plain):
        scan(one, range(500, 511))
    assert kept(cache, range(90)) == (90 if uses else 89)
    former = [slot for key in range(90) if (slot := cache.slot(key)) is not None]
    for key in range(600):
        cache.renew(key)
    assert {slot.value for slot in former} == {None}
    assert cache.size_bytes == plain.size_bytes
    for one in (cache, plain):
        scan(one, range(1_000, 1_950))
    assert [key in cache for key in range(2_000)] == [key in plain for key in range(2_000)]
    assert kept(cache, range(90)) == (90 if uses else 0)


def test_looking_at_a_slot_is_no_use() -> None:
    """Whoever holds on to it counts by himself, and that counts."""
    cache = cache_with(range(10))
    for key in range(5):
        slot = cache.slot(key)
        assert slot is not None
        slot.frequency = TRIAL_USES
    for key in range(10):
        cache.slot(key)
    scan(cache, range(1_000, 1_200))
    assert (kept(cache, range(5)), kept(cache, range(5, 10))) == (5, 0)
