"""Proofs of violations: the few operations that cannot all have happened, found in the history and
put into words."""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from respcache.testing.history import Event, Read, Write
from respcache.testing.staleness import ViolationKind


@dataclass(frozen=True, slots=True)
class Violation:
    """A read that violates something, and the data for finding the proof.

    ``due`` is the version that it had to return at least; for an invention, the one that began too
    late. ``since`` is when that version was acknowledged (I1), committed (I3), seen by the session
    (I4) or begun (invention). ``operations`` and ``span`` (seconds) are the size of the proof.
    """

    kind: ViolationKind
    read: Read
    operations: int
    span: float
    register: str = ""
    due: int | None = None
    since: float = 0.0
    committed: float = 0.0

    @property
    def returned(self) -> int:
        """The version that the read returned of the register."""
        return self.read.values[self.register]


@dataclass(frozen=True, slots=True)
class Proof:
    """The operations that prove a violation, in the order in which they began, including the
    offending read.

    ``overtaken`` explains, but does not prove: a read of the same query that returned the same
    version and was in progress when the missed version was committed. If the cache stored the
    result of that read, the offending read got it from there.
    """

    violation: Violation
    operations: tuple[Event, ...]
    overtaken: Read | None = None

    def __str__(self) -> str:
        shown = [*self.operations, *([self.overtaken] if self.overtaken else [])]
        shown.sort(key=_begin)
        return "\n".join(
            [_headline(self.violation), *(self._line(event, _begin(shown[0])) for event in shown)]
        )

    def _line(self, event: Event, origin: float) -> str:
        times = f"{_ms(_begin(event) - origin):>10} .. {_ms(_end(event) - origin):>8} ms"
        what = _write_words(event, origin) if isinstance(event, Write) else self._read_words(event)
        return f"{times}  {event.process}: {what}"

    def _read_words(self, read: Read) -> str:
        found = self.violation
        words = f"read {read.asked}"
        if found.kind is ViolationKind.ISOLATION:
            words += f", received {read.received}"
        else:
            words += f": {found.register} = {read.values[found.register]}"
        words += f" ({read.how})" if read.how else ""
        if read is self.overtaken:
            return f"{words}, under way when {found.due} was committed"
        return f"{words}   <-- {found.kind}" if read == found.read else words


def find_proofs(
    history: Iterable[Event], violations: Iterable[Violation]
) -> dict[ViolationKind, Proof]:
    """Find the operations that prove violations (one per kind), in one pass over the history."""
    searches = [_Search(violation) for violation in violations]
    for event in history if searches else ():
        for search in searches:
            search.see(event)
    return {search.violation.kind: search.proof() for search in searches}


class _Search:
    """Collects the operations of one proof from the events of a history."""

    def __init__(self, violation: Violation) -> None:
        self.violation = violation
        self._writes: dict[int, Write] = {}
        self._earlier: Read | None = None
        self._overtaken: Read | None = None
        if violation.kind in (ViolationKind.FRESHNESS, ViolationKind.BOUND):
            self._wanted: tuple[int | None, ...] = (violation.due, violation.returned)
        else:
            self._wanted = (violation.due,)

    def see(self, event: Event) -> None:
        """Keep an event if it is part of the proof."""
        found = self.violation
        if isinstance(event, Write):
            if (
                event.register == found.register
                and event.version is not None
                and event.version in self._wanted
            ):
                known = self._writes.get(event.version)
                if found.kind is not ViolationKind.SESSION or (event.session, event.acked) == (
                    found.read.session,
                    found.since,
                ):
                    self._writes[event.version] = event if known is None else _merged(known, event)
        elif found.kind is ViolationKind.SESSION:
            if self._is_earlier(event):
                self._earlier = event
        elif found.kind in (ViolationKind.FRESHNESS, ViolationKind.BOUND) and self._was_overtaken(
            event
        ):
            self._overtaken = max(self._overtaken or event, event, key=_length)

    def proof(self) -> Proof:
        """Return the proof. I4 needs no write if the session had read the version before."""
        operations: list[Event] = [self.violation.read]
        operations += [self._earlier] if self._earlier else self._writes.values()
        return Proof(self.violation, tuple(sorted(operations, key=_begin)), self._overtaken)

    def _is_earlier(self, read: Read) -> bool:
        """Return whether this is the session's read that saw the due version. It does not bind
        reads with a slack."""
        found = self.violation
        same = (
            read.session == found.read.session
            and read.end == found.since
            and read.values.get(found.register) == found.due
        )
        return same and not found.read.slack_s

    def _was_overtaken(self, read: Read) -> bool:
        found = self.violation
        under_way = read.start < found.committed < read.end
        return (
            under_way
            and read.asked == found.read.asked
            and read.values.get(found.register) == found.returned
        )


def _merged(one: Write, other: Write) -> Write:
    """Merge two events of the same write: the earliest known time of each kind."""
    process = one.process if one.process == other.process else f"{one.process}, {other.process}"
    return msgspec.structs.replace(
        one,
        started=min(one.started, other.started),
        committed=_earliest(one.committed, other.committed),
        acked=_earliest(one.acked, other.acked),
        process=process,
    )


def _earliest(one: float | None, other: float | None) -> float | None:
    known = [time for time in (one, other) if time is not None]
    return min(known, default=None)


def _headline(found: Violation) -> str:
    read, due = found.read, found.due
    if found.kind is ViolationKind.ISOLATION:
        return f"{found.kind}: a read that asked for {read.asked} received {read.received}"
    returned = f"{found.kind}: {found.register}: a read returned {found.returned}, but"
    if found.kind is ViolationKind.INVENTION and due is None:
        return f"{returned} no write that can have made it was begun when it ended"
    if found.kind is ViolationKind.INVENTION:
        return f"{returned} {due} was begun {_ms(found.since - read.end)} ms after it ended"
    verb = {
        ViolationKind.FRESHNESS: "acknowledged",
        ViolationKind.BOUND: "committed",
        ViolationKind.SESSION: f"known to session {read.session}",
    }
    slack = (
        f" (its slack is {_ms(read.slack_s)} ms)"
        if read.slack_s and found.kind is not ViolationKind.SESSION
        else ""
    )
    return (
        f"{returned} {due} was {verb[found.kind]} {_ms(read.start - found.since)} ms before it "
        f"began{slack}"
    )


def _write_words(write: Write, origin: float) -> str:
    committed = (
        "commit unknown"
        if write.committed is None
        else f"committed by {_ms(write.committed - origin)}"
    )
    acked = (
        "never acknowledged"
        if write.acked is None
        else f"acknowledged at {_ms(write.acked - origin)}"
    )
    return f"write {write.register} = {write.version}, {committed}, {acked}"


def _begin(event: Event) -> float:
    return event.started if isinstance(event, Write) else event.start


def _end(event: Event) -> float:
    if isinstance(event, Read):
        return event.end
    return max(time for time in (event.started, event.committed, event.acked) if time is not None)


def _length(read: Read) -> float:
    return read.end - read.start


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"
