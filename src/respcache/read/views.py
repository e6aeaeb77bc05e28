"""What this process knows of each tenant's generation, and how old that knowledge is.

*Batched views.* A strict hit from memory needs a view of the generation that was read after its
request began. Requests of one tenant share such reads: those that arrive in one tick of the event
loop share one. Those that arrive while a read is in progress wait for the next one, never for that
one, because the server may have answered it before they began. So a tenant costs its server at most
one small read per round trip and process, whatever its request rate.

*Time-limited views.* A route of level ``bounded`` may use the last view until it is ``bound_s``
old, counted from the moment before it was requested. The view is dropped earlier when this process
bumps the tenant itself, when the server pushes the news of another process's bump, and when the
connection ends. A push may be late or lost, so the bound does not rest on it. A read in progress at
such a moment may have been answered before it: it serves those that wait for it and is not kept.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from respcache.core.errors import StoreError, StoreUnavailable
from respcache.core.generations import GenerationView
from respcache.stores.base import Store

Tags = frozenset[str]
OnView = Callable[[GenerationView | StoreError], None]
"""Receives a view or the reason why there is none. Must not raise."""

MAX_BATCHES = 10_000
"""Generations whose last view is kept. The oldest is dropped first."""


class ViewReader:
    """Reads the views of one process. Bound to one event loop."""

    def __init__(self, store: Store, *, clock: Callable[[], float]) -> None:
        self.reads = 0
        self._store = store
        self._clock = clock
        self._batches: dict[str, ViewBatch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, generation: str, tags: Tags) -> "asyncio.Future[GenerationView]":
        """Return a view that is requested after this call, with at least these tags.

        Takes at most one round trip longer than the store's own read. Raises ``StoreUnavailable``;
        the future may raise ``StoreError``.
        """
        future: asyncio.Future[GenerationView] = asyncio.get_running_loop().create_future()
        self.wait(generation, tags, partial(_settle, future))
        return future

    def wait(self, generation: str, tags: Tags, on_view: OnView) -> None:
        """Call ``on_view`` with the result of such a ``read``, without a future."""
        batch = self._batches.get(generation) or self.batch(generation)
        if tags not in batch.tag_sets:
            batch.add_tags(tags)
        batch.join(on_view)

    def recent(self, generation: str, tags: Tags, *, since: float) -> GenerationView | None:
        """Return the last view if it has these tags and was requested at ``since`` or later."""
        batch = self._batches.get(generation)
        if batch is None or batch.requested_at < since or tags not in batch.tag_sets:
            return None
        return batch.view

    def expire(self, generation: str) -> None:
        """Drop the view of a generation, which was bumped or may have been."""
        batch = self.batch(generation)
        batch.bumped = True
        batch.expire()

    def bumped(self, generation: str) -> bool:
        """Whether a bump was reported since the last view of the generation was read."""
        batch = self._batches.get(generation)
        return batch is not None and batch.bumped

    def expire_all(self) -> None:
        """Drop all views: the connection ended, so pushes may have been lost."""
        for batch in self._batches.values():
            batch.expire()

    def batch(self, generation: str) -> "ViewBatch":
        """Return the batch of a generation. Its ``view`` is None once it may no longer be used."""
        batch = self._batches.get(generation)
        if batch is None:
            if len(self._batches) >= MAX_BATCHES:
                self._make_room()
            batch = self._batches[generation] = ViewBatch(self, generation)
        return batch

    def _make_room(self) -> None:
        """Drop an eighth of the batches, the oldest idle ones."""
        idle = [name for name, batch in self._batches.items() if not batch.busy]
        for name in idle[: MAX_BATCHES // 8]:
            # proofs may still refer to the batch, which no push reaches any more
            self._batches.pop(name).expire()


class ViewBatch:
    """The requests that wait for a view of one generation, and its last view.

    ``busy`` says that a read is in progress or about to be sent.
    """

    __slots__ = (
        "_dirty",
        "_generation",
        "_names",
        "_reader",
        "_sent_at",
        "_waiting",
        "bumped",
        "busy",
        "requested_at",
        "tag_sets",
        "view",
    )

    def __init__(self, reader: ViewReader, generation: str) -> None:
        self._reader = reader
        self._generation = generation
        self._waiting: list[OnView] = []
        self._names: tuple[str, ...] = ()
        self._sent_at = 0.0
        self._dirty = False
        self.tag_sets: set[Tags] = set()
        self.bumped = False
        self.busy = False
        self.view: GenerationView | None = None
        self.requested_at = float("-inf")

    def add_tags(self, tags: Tags) -> None:
        """Read these tags too, from the next read on."""
        self.tag_sets.add(tags)
        self._names = tuple(sorted(tags.union(self._names)))
        self.expire()

    def expire(self) -> None:
        """Drop the view, and do not keep the result of a read in progress."""
        self.view, self.requested_at, self._dirty = None, float("-inf"), True

    def join(self, on_view: OnView) -> None:
        """Wait for a read that has not been sent yet."""
        if not self.busy:
            self._reader._store.soon(self._send)
            self.busy = True
        self._waiting.append(on_view)

    def _send(self) -> None:
        reader = self._reader
        waiting, self._waiting = self._waiting, []
        self._sent_at, self._dirty = reader._clock(), False
        reader.reads += 1
        try:
            reader._store.view(
                self._generation, self._names, lambda result: self._receive(waiting, result)
            )
        except Exception as error:  # whatever it is, no request may wait forever
            failure = error if isinstance(error, StoreError) else StoreUnavailable(repr(error))
            self._receive(waiting, failure)

    def _receive(self, waiting: Iterable[OnView], result: GenerationView | StoreError) -> None:
        if not self._dirty and isinstance(result, GenerationView):
            self.view, self.requested_at, self.bumped = result, self._sent_at, False
        for on_view in waiting:
            on_view(result)
        if self._waiting:
            self._send()
        else:
            self.busy = False


def _settle(future: "asyncio.Future[GenerationView]", result: GenerationView | StoreError) -> None:
    if future.done():
        return
    if isinstance(result, StoreError):
        # a copy for each waiter, because a raised exception collects tracebacks
        future.set_exception(type(result)(*result.args))
    else:
        future.set_result(result)
