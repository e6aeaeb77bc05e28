"""An event loop without a clock and without sockets: time is a number that jumps to the next timer.

Callbacks run in the order in which they became ready. What runs on behalf of a simulated machine
(``Host``) is marked by a context variable: a host's timers go by its own clock, and while it is
frozen nothing of it runs.

Timers stand in a heap of plain tuples, and what happens in the world (``VirtualLoop.happen``) needs
no handle and no context:
that is twice as fast as asyncio's own, and speed is schedules.
"""

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import Callable, Coroutine
from typing import Any


class Host:
    """A machine that runs one process. ``rate`` is how fast its clock goes, ``offset`` what it
    showed in the beginning."""

    def __init__(self, name: str, *, rate: float = 1.0, offset: float = 0.0) -> None:
        self.name = name
        self.rate = rate
        self.offset = offset
        self.frozen = False
        self.held: list[asyncio.Handle | Happening] = []
        self.context = contextvars.Context()
        self.context.run(HOST.set, self)

    def clock(self) -> float:
        """Return what the host's clock shows."""
        return asyncio.get_running_loop().time() * self.rate + self.offset

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Have the host do something of its own."""
        return self.context.copy().run(asyncio.create_task, work)


HOST: contextvars.ContextVar[Host | None] = contextvars.ContextVar("host", default=None)


class Happening:
    """A callback of the world, or of a host that need not know where it runs."""

    __slots__ = ("_args", "_callback", "host")

    def __init__(
        self, host: Host | None, callback: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        self.host = host
        self._callback = callback
        self._args = args

    def cancelled(self) -> bool:
        """What happens in the world is never cancelled."""
        return False

    def run(self) -> None:
        """Let it happen."""
        self._callback(*self._args)


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in a reproducible order; waiting costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.Handle | Happening]] = []
        self._numbers = itertools.count()
        self._frozen = 0

    def time(self) -> float:
        """Return virtual seconds since the beginning."""
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Set a timer; a host's goes by the host's clock."""
        host = HOST.get() if context is None else context.get(HOST)
        if host is not None:
            when = self._now + (when - self._now) / host.rate
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def happen(
        self, delay_s: float, callback: Callable[..., object], *args: Any, host: Host | None = None
    ) -> None:
        """Have something happen later; with a host, not while that is frozen, but whatever else
        becomes of it."""
        heapq.heappush(
            self._timers,
            (self._now + delay_s, next(self._numbers), Happening(host, callback, args)),
        )

    def freeze(self, host: Host) -> None:
        """Stop a host: what becomes ready waits."""
        if not host.frozen:
            host.frozen = True
            self._frozen += 1

    def thaw(self, host: Host) -> None:
        """Let a host go on where it was stopped."""
        if host.frozen:
            host.frozen = False
            self._frozen -= 1
            held, host.held = host.held, []
            self._ready.extend(held)  # type: ignore[attr-defined]

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers:
                raise RuntimeError("nothing will ever happen again")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            if self._frozen:
                host = _host_of(handle)
                if host is not None and host.frozen:
                    host.held.append(handle)
                    continue
            if isinstance(handle, Happening):
                handle.run()
            else:
                handle._run()  # private: asyncio offers no other way to run a handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer stays in the heap until its time has come."""

    def _write_to_self(self) -> None:
        """Nobody waits in a selector."""


def _host_of(handle: asyncio.Handle | Happening) -> Host | None:
    """Return the host on whose behalf a callback runs."""
    if isinstance(handle, Happening):
        return handle.host
    return handle._context.get(HOST)  # private: Handle.get_context() exists from Python 3.12 on
