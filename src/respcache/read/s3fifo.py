"""S3-FIFO, bounded by bytes: the eviction policy of the near cache. Pure: no clock, no I/O.

It has three queues, each first in, first out:

* *small*, a tenth of the bytes. Every new item starts here. An item that was used less than twice
  when it is the oldest is evicted. So a scan (an export, a crawler, a client that pages through a
  list) passes through a tenth of the cache and leaves the rest unchanged.
* *main*: items that were used at least twice in small [1, algorithm 1: ``freq > 1``], or returned
  while they were ghosts. The oldest item is evicted if it was not used since the last check.
  Otherwise it moves to the end, with one use less.
* *ghosts*: items recently evicted from small, without their values. An item that returns while it
  is a ghost was evicted too early and goes to main. Ghosts are hashes of keys, so neither a long
  key nor a token in it outlives its item. Two keys with one hash cost at most a wrong choice of
  queue. Their number is bounded: their former sizes add up to main's share.

Why not LRU: a hit in LRU moves the item in a list. Here a hit raises a counter up to its maximum,
then changes nothing; all ordering is done at eviction. And with LRU each item of a scan passes
through the whole cache.

There are three differences from the paper. Sizes are in bytes: an item larger than small is never
kept, because it would evict all new items at once. The queues are checked again after every step,
not after every eviction. And one call spares at most ``MAX_SPARED`` items: if all items are used
at the maximum, the paper's loop passes three times through the whole of main.

An evicted item leaves its queue at once (``OrderedDict`` unlinks in constant time).

[1] Yang, Zhang, Qiu, Yue, Vigfusson: FIFO queues are all you need for cache eviction. SOSP 2023.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from copy import copy
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

SMALL_SHARE = 10
"""Small gets one part in this many. This is also the size of the largest item that is kept."""
MAX_FREQUENCY = 3
TRIAL_USES = 2
"""Uses in small after which an item moves to main."""
MAX_SPARED = 1_000
"""Used items that one call may spare before it evicts the oldest anyway: below a millisecond."""


class S3Fifo(Generic[K, V]):
    """Items by key, at most ``max_bytes`` after every call. For one event loop: not thread safe.

    The caller gives the sizes, at least 1. They should include the key and about 400 bytes for the
    item and its ghost. Nothing is kept if ``max_bytes`` is below 10. ``admitted``, ``evicted`` and
    ``rejected`` count the items that were kept, evicted, or too large. ``put`` costs constant time
    for each evicted item and for at most ``MAX_SPARED`` spared ones.
    """

    __slots__ = (
        "_ghosts",
        "_main",
        "_max_item_bytes",
        "_slots",
        "_small",
        "admitted",
        "evicted",
        "max_bytes",
        "rejected",
    )

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError("max_bytes must not be negative")
        self.max_bytes = max_bytes
        self.admitted = 0
        self.evicted = 0
        self.rejected = 0
        self._max_item_bytes = max_bytes // SMALL_SHARE
        self.clear()

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[K]:
        return iter(self._slots)

    def __contains__(self, key: K) -> bool:
        """Whether an item is kept. Does not count a use."""
        return key in self._slots

    @property
    def size_bytes(self) -> int:
        """The sum of the sizes of all items."""
        return self._small.size_bytes + self._main.size_bytes

    def get(self, key: K) -> V | None:
        """Return a value, or None, and count a use."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        if slot.frequency < MAX_FREQUENCY:
            slot.frequency += 1
        return slot.value

    def peek(self, key: K) -> V | None:
        """Return a value, or None, without counting a use."""
        slot = self._slots.get(key)
        return None if slot is None else slot.value

    def values(self) -> list[V]:
        """Return all values, without counting uses."""
        return [slot.value for slot in self._slots.values() if slot.value is not None]

    def slot(self, key: K) -> "Slot[V] | None":
        """Return the slot of an item, without counting a use.

        Callers that keep the slot must count uses themselves and check that ``value`` is not None.
        """
        return self._slots.get(key)

    def renew(self, key: K) -> None:
        """Move an item to a new slot, if it is kept. Its former slot becomes empty."""
        slot = self._slots.get(key)
        if slot is not None:
            self._slots[key] = self._queue_of(key).slots[key] = slot.moved()

    def put(self, key: K, value: V, *, size_bytes: int) -> None:
        """Keep a value unless it is too large. It takes the place and the uses of an old value.

        The old value is dropped in any case. Raises ``ValueError`` for a size below 1.
        """
        slot = self._slots.get(key)
        if slot is not None:
            self.resize(key, size_bytes)
            if key in self._slots:
                slot.value = value
        elif self._fits(size_bytes):
            missed = self._ghosts.discard(hash(key))
            self._make_room(size_bytes)
            slot = self._slots[key] = Slot(value, size_bytes)
            (self._main if missed else self._small).append(key, slot)
            self.admitted += 1

    def resize(self, key: K, size_bytes: int) -> None:
        """Change the size of an item, if it is kept. The item itself may be evicted.

        Raises ``ValueError`` for a size below 1.
        """
        slot = self._slots.get(key)
        if slot is None:
            return
        if not self._fits(size_bytes):
            self.discard(key)
            return
        self._queue_of(key).size_bytes += size_bytes - slot.size_bytes
        slot.size_bytes = size_bytes
        self._make_room(0)

    def discard(self, key: K) -> None:
        """Drop a key with its value, its uses and its ghost."""
        if key in self._slots:
            self._queue_of(key).remove(key)
            self._slots.pop(key).value = None
        else:
            self._ghosts.discard(hash(key))

    def clear(self) -> None:
        """Drop everything except the counters."""
        for slot in getattr(self, "_slots", {}).values():
            slot.value = None
        self._slots: dict[K, Slot[V]] = {}
        self._small: _Queue[K, V] = _Queue(self.max_bytes // SMALL_SHARE)
        self._main: _Queue[K, V] = _Queue(self.max_bytes - self._small.max_bytes)
        self._ghosts = _Ghosts(self._main.max_bytes)

    def _fits(self, size_bytes: int) -> bool:
        if size_bytes < 1:
            raise ValueError(
                "size_bytes must be at least 1: items without a size would have no bound"
            )
        if size_bytes <= self._max_item_bytes:
            return True
        self.rejected += 1
        return False

    def _queue_of(self, key: K) -> "_Queue[K, V]":
        return self._main if key in self._main.slots else self._small

    def _make_room(self, size_bytes: int) -> None:
        """Evict until this many bytes are free, and spare used items.

        Each step evicts an item, promotes one, or takes one use away.
        """
        small, main = self._small, self._main
        most_bytes = self.max_bytes - size_bytes
        spared = 0
        while small.size_bytes + main.size_bytes > most_bytes:
            # Else main has something: small below its share and an item, a share at most, leave
            # most of the bytes to it.
            on_trial = small.size_bytes >= small.max_bytes
            key, slot = (small if on_trial else main).pop_oldest()
            if slot.frequency >= (TRIAL_USES if on_trial else 1) and spared < MAX_SPARED:
                spared += 1
                slot.frequency = 0 if on_trial else slot.frequency - 1
                main.append(key, slot)
                continue
            del self._slots[key]
            slot.value = None
            self.evicted += 1
            if on_trial:
                self._ghosts.append(hash(key), slot.size_bytes)


class Slot(Generic[V]):
    """A value, its size, and its uses since the last check, up to ``MAX_FREQUENCY``."""

    __slots__ = ("frequency", "size_bytes", "value")

    def __init__(self, value: V, size_bytes: int) -> None:
        self.value: V | None = value
        self.size_bytes = size_bytes
        self.frequency = 0

    def moved(self) -> "Slot[V]":
        """Return a new slot with the content of this one, which becomes empty."""
        other = copy(self)
        self.value = None
        return other


class _Queue(Generic[K, V]):
    """Slots in order of arrival, and the sum of their sizes. The caller enforces ``max_bytes``."""

    __slots__ = ("max_bytes", "size_bytes", "slots")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.slots: OrderedDict[K, Slot[V]] = OrderedDict()

    def append(self, key: K, slot: Slot[V]) -> None:
        self.slots[key] = slot
        self.size_bytes += slot.size_bytes

    def pop_oldest(self) -> tuple[K, Slot[V]]:
        key, slot = self.slots.popitem(last=False)
        self.size_bytes -= slot.size_bytes
        return key, slot

    def remove(self, key: K) -> None:
        self.size_bytes -= self.slots.pop(key).size_bytes


class _Ghosts:
    """Hashes of keys with the sizes that their items had, the latest of them up to
    ``max_bytes``."""

    __slots__ = ("_max_bytes", "_size_bytes", "_sizes")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._sizes: OrderedDict[int, int] = OrderedDict()

    def append(self, hashed: int, size_bytes: int) -> None:
        self.discard(hashed)
        self._sizes[hashed] = size_bytes
        self._size_bytes += size_bytes
        while self._size_bytes > self._max_bytes:
            self._size_bytes -= self._sizes.popitem(last=False)[1]

    def discard(self, hashed: int) -> bool:
        """Forget one, and say whether it was there."""
        size_bytes = self._sizes.pop(hashed, None)
        self._size_bytes -= size_bytes or 0
        return size_bytes is not None
