"""What a tracer is told: fills, invalidations, and that the store goes and comes. Never a hit.
Pure; ``ops/otel.py`` traces."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Trace = Callable[[str], None]
"""Says what became of it, in the words of ``Cache-Status`` or ``core.fence.Outcome``."""


class Tracing:
    """Traces nothing. Its methods are on the way of misses and writes: they must not wait and not
    raise."""

    def fill(self, *, tenant: str, module: str, route: str) -> AbstractContextManager[Trace]:
        """Surround a fill: the handler that makes an answer, or what makes a value (``route``
        begins with ``value:``)."""
        return _UNTRACED

    def invalidation(self, *, tenants: int | None, cause: str) -> AbstractContextManager[Trace]:
        """Surround an invalidation of so many tenants (None: not known yet). ``cause``: ``write``
        here, ``outbox`` by others."""
        return _UNTRACED

    def store(self, cause: Exception | None) -> None:
        """Hear that the store is away, and why, or (None) that it is back."""


def _unheard(outcome: str, /) -> None:
    """Say nothing."""


_UNTRACED: AbstractContextManager[Trace] = nullcontext(_unheard)
