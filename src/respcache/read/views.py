"""What this process knows of each tenant's generation: one read at a time for all requests that
need it, and how old it is.

*Group validation.* A strict hit from memory needs a view of the generation that was read after its
request began. Requests of one tenant share such readings: those that arrive in one tick of the
event loop leave together, those that arrive while a reading is under way wait for the next one,
never for that one, which may have been answered before they began. So a tenant costs its server at
most one small read per round trip and process, whatever the rate of its requests.

*Time-limited views.* A route of level ``bounded`` may use the last view until it is ``bound_s``
old, counted from the moment before it was asked for. The view is dropped earlier when this process
bumps the tenant itself, when the server says that somebody did (a push, which may be late or lost:
the bound does not rest on it), and when the connection ends. A reading that was under way at that
moment may have been answered before: it serves those who wait for it and is not kept.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from respcache.core.errors import StoreError, StoreUnavailable
from respcache.core.generations import GenerationView
from respcache.stores.base import Store

Tags = frozenset[str]

MAX_GROUPS = 10_000
"""Generations of which views are kept; the one that was made first goes first."""


class ViewReader:
    """The views of one process. Bound to the event loop that its methods are called in."""

    def __init__(self, store: Store, *, clock: Callable[[], float]) -> None:
        self.reads = 0
        self._store = store
        self._clock = clock
        self._groups: dict[str, ViewBatch] = {}

    def read(self, generation: str, tags: Tags) -> "asyncio.Future[GenerationView]":
        """Return a view that was asked for after this call, with at least these tags. Raises
        ``StoreUnavailable``.

        At most one round trip longer than the store's own reading; the future may raise
        ``StoreError``.
        """
        future: asyncio.Future[GenerationView] = asyncio.get_running_loop().create_future()
        self.wait(generation, tags, partial(_settle, future))
        return future

    def wait(
        self, generation: str, tags: Tags, done: Callable[[GenerationView | StoreError], None]
    ) -> None:
        """Have ``done`` called with what ``read`` returns or raises later, without a future. It
        must not raise."""
        group = self._groups.get(generation) or self.group(generation)
        if tags not in group.asked:
            group.ask(tags)
        group.join(done)

    def recent(self, generation: str, tags: Tags, *, since: float) -> GenerationView | None:
        """Return the last view if it was asked for at ``since`` or later, with these tags; costs
        nothing."""
        group = self._groups.get(generation)
        if group is None or group.asked_at < since or tags not in group.asked:
            return None
        return group.view

    def expire(self, generation: str) -> None:
        """Drop what is known of a generation: it was bumped, or may have been."""
        group = self.group(generation)
        group.bumped = True
        group.expire()

    def bumped(self, generation: str) -> bool:
        """Whether something was heard of a generation since the last view of it was read."""
        group = self._groups.get(generation)
        return group is not None and group.bumped

    def expire_all(self) -> None:
        """Drop everything: the connection is gone, and with it whatever it would have told."""
        for group in self._groups.values():
            group.expire()

    def group(self, generation: str) -> "ViewBatch":
        """Return what is known of a generation: its ``view`` is None from the moment that it is not
        to be used again."""
        group = self._groups.get(generation)
        if group is None:
            if len(self._groups) >= MAX_GROUPS:
                self._make_room()
            group = self._groups[generation] = ViewBatch(self, generation)
        return group

    def _make_room(self) -> None:
        """Forget an eighth of the groups that nobody waits for, the oldest first."""
        idle = [name for name, group in self._groups.items() if not group.busy]
        for name in idle[: MAX_GROUPS // 8]:
            self._groups.pop(name).expire()  # nobody tells it any more when it is bumped


class ViewBatch:
    """The requests that need one generation. ``busy``: a reading is under way or about to leave."""

    __slots__ = (
        "_dirty",
        "_generation",
        "_names",
        "_sent_at",
        "_views",
        "_waiting",
        "asked",
        "asked_at",
        "bumped",
        "busy",
        "view",
    )

    def __init__(self, views: ViewReader, generation: str) -> None:
        self._views = views
        self._generation = generation
        self._waiting: list[Callable[[GenerationView | StoreError], None]] = []
        self._names: tuple[str, ...] = ()
        self._sent_at = 0.0
        self._dirty = False
        self.asked: set[Tags] = set()
        self.bumped = False
        self.busy = False
        self.view: GenerationView | None = None
        self.asked_at = float("-inf")

    def ask(self, tags: Tags) -> None:
        """Ask for these tags too, from the next reading on."""
        self.asked.add(tags)
        self._names = tuple(sorted(tags.union(self._names)))
        self.expire()

    def expire(self) -> None:
        """Drop the view, and the one that is under way when it comes."""
        self.view, self.asked_at, self._dirty = None, float("-inf"), True

    def join(self, done: Callable[[GenerationView | StoreError], None]) -> None:
        """Wait for a reading that has not left yet."""
        if not self.busy:
            self._views._store.soon(self._leave)
            self.busy = True
        self._waiting.append(done)

    def _leave(self) -> None:
        views = self._views
        waiting, self._waiting = self._waiting, []
        self._sent_at, self._dirty = views._clock(), False
        views.reads += 1
        try:
            views._store.view(
                self._generation, self._names, lambda result: self._complete(waiting, result)
            )
        except Exception as error:  # nobody may wait for ever, whatever it is
            self._complete(
                waiting, error if isinstance(error, StoreError) else StoreUnavailable(repr(error))
            )

    def _complete(
        self,
        waiting: Iterable[Callable[[GenerationView | StoreError], None]],
        result: GenerationView | StoreError,
    ) -> None:
        if not self._dirty and isinstance(result, GenerationView):
            self.view, self.asked_at, self.bumped = result, self._sent_at, False
        for done in waiting:
            done(result)
        if self._waiting:
            self._leave()
        else:
            self.busy = False


def _settle(future: "asyncio.Future[GenerationView]", result: GenerationView | StoreError) -> None:
    if future.done():
        return
    if isinstance(result, StoreError):
        # a copy each: a raised exception collects tracebacks
        future.set_exception(type(result)(*result.args))
    else:
        future.set_result(result)
