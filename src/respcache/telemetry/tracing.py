"""What a tracer receives: fills, invalidations, and outages of the store. Never a hit. Pure.

``integrations/otel.py`` is a tracer.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Trace = Callable[[str], None]
"""Receives the outcome: a word of ``Cache-Status``, or a ``core.serving_lease.Outcome``."""


class Tracing:
    """Traces nothing. Misses and writes call its methods, which must not wait and not raise."""

    def fill(self, *, tenant: str, module: str, route: str) -> AbstractContextManager[Trace]:
        """Surround the fill of a response, or of a value (its route begins with ``value:``)."""
        return _UNTRACED

    def invalidation(self, *, tenants: int | None, cause: str) -> AbstractContextManager[Trace]:
        """Surround an invalidation of this many tenants (None: not known yet).

        ``cause`` is ``write`` for writes of this process, ``outbox`` for those of others.
        """
        return _UNTRACED

    def store(self, cause: Exception | None) -> None:
        """Report that the store became unavailable, and why, or (None) available again."""


def _ignore(outcome: str, /) -> None:
    """Do nothing."""


_UNTRACED: AbstractContextManager[Trace] = nullcontext(_ignore)
