"""Which items the near cache keeps: S3-FIFO, bounded by bytes. Pure: no clock, no I/O; it does not
know what it keeps.

Three queues, first in, first out:

* *small*, a tenth of the bytes: every new item begins here. One that was not used twice by the time
  it is the oldest goes. So a scan (an export, a crawler, a client that pages through a list) passes
  through a tenth of the cache and leaves the rest alone.
* *main*: items that were used at least twice in small [1, algorithm 1: ``freq > 1``], or came back
  while they were ghosts. The oldest goes if it was not used since it was last looked at; else it
  starts again at the end, with one use less.
* *ghosts*: what was lately evicted from small, without values. An item that comes back while it is
  a ghost was evicted too soon and goes to main. Ghosts are hashes of keys, so neither a long key
  nor a token in it outlives its item; two keys with one hash cost at most a wrong choice of queue.
  There are as many as main could hold of them: their former sizes sum up to its share.

Why not LRU: a hit in LRU moves the item in a list. Here it raises a counter until that is at its
top, then changes nothing; all ordering is done when something has to go. And LRU gives each item of
a scan the whole cache to pass through.

Three departures from the paper. Sizes are bytes: an item larger than small is never kept, since it
would drive out everything on trial at once. The queues are looked at anew after every step, not
after every eviction. And one call spares at most ``MAX_SPARED`` items: when everything is in use at
its top, the paper's loop goes three times round the whole of main.

What goes is taken out of its queue at once (``OrderedDict`` unlinks in constant time): nothing dead
waits in a queue.

[1] Yang, Zhang, Qiu, Yue, Vigfusson: FIFO queues are all you need for cache eviction. SOSP 2023.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from copy import copy
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

SMALL_SHARE = 10
"""Small gets one part in so many; also the largest item that is kept."""
MAX_FREQUENCY = 3
TRIAL_USES = 2
"""Uses in small that bring an item into main."""
MAX_SPARED = 1_000
"""Used items that one call may spare before the oldest goes all the same: under a millisecond of
the event loop."""


class S3Fifo(Generic[K, V]):
    """Items by key, in ``max_bytes`` at most after every call. For one event loop: not thread safe.

    Sizes are what the caller says, at least 1; they should count the key, and some 400 bytes that
    an item and its ghost take here. Keeps nothing if ``max_bytes`` is below 10. ``admitted``,
    ``evicted`` and ``rejected`` count items: new and kept, gone to make room, too large. A ``put``
    costs constant time for each item that goes and for at most ``MAX_SPARED`` that stay.
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
        """Say whether an item is kept, without using it."""
        return key in self._slots

    @property
    def size_bytes(self) -> int:
        """The sum of the sizes of what is kept."""
        return self._small.size_bytes + self._main.size_bytes

    def get(self, key: K) -> V | None:
        """Return a value, or None, and count the use."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        if slot.frequency < MAX_FREQUENCY:
            slot.frequency += 1
        return slot.value

    def peek(self, key: K) -> V | None:
        """Return a value, or None, without counting a use: for who only looks."""
        slot = self._slots.get(key)
        return None if slot is None else slot.value

    def values(self) -> list[V]:
        """Return all values, without counting uses."""
        return [slot.value for slot in self._slots.values() if slot.value is not None]

    def slot(self, key: K) -> "Slot[V] | None":
        """Return where an item is kept, without using it. Whoever holds on to that counts uses by
        himself, and looks whether the item is still there: its value is None from the moment that
        it goes."""
        return self._slots.get(key)

    def renew(self, key: K) -> None:
        """Move an item, if it is kept, to a slot of its own: for whoever holds on to the former
        one, it is gone."""
        slot = self._slots.get(key)
        if slot is not None:
            self._slots[key] = self._queue_of(key).slots[key] = slot.moved()

    def put(self, key: K, value: V, *, size_bytes: int) -> None:
        """Keep a value, unless it is too large. One that replaces another takes over its place and
        its uses.

        Whatever becomes of the new value, the old one is gone. Raises ``ValueError`` for a size
        below 1.
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
        """Count an item, if it is still kept, with another size. The item itself may be what goes
        to make room.

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
        """Forget a key, if it is known: its value, its uses, and that it was ever here."""
        if key in self._slots:
            self._queue_of(key).remove(key)
            self._slots.pop(key).value = None
        else:
            self._ghosts.discard(hash(key))

    def clear(self) -> None:
        """Forget everything but the counters."""
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
        """Evict until so many bytes are free; spare what was used. Each step evicts, promotes or
        takes one use away."""
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
    """A value and what is known of it. ``frequency``: uses, up to ``MAX_FREQUENCY``, since it began
    or was last looked at."""

    __slots__ = ("frequency", "size_bytes", "value")

    def __init__(self, value: V, size_bytes: int) -> None:
        self.value: V | None = value
        self.size_bytes = size_bytes
        self.frequency = 0

    def moved(self) -> "Slot[V]":
        """Return another slot with all that this one has, which is empty from now on."""
        other = copy(self)
        self.value = None
        return other


class _Queue(Generic[K, V]):
    """Slots in the order in which they came, and the sum of their sizes. ``max_bytes`` is its
    share, which others enforce."""

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
