"""Histories: which versions were read and written, by which process, and when. One event per line;
several processes may share a file.

Registers are named by strings (``tenant/row``). Their versions are integers that grow by one in the
order of commits (``UPDATE ... SET version = version + 1 RETURNING version``). A register without
writes has version 0. Times are seconds of ``now``: CLOCK_MONOTONIC, which all processes of a host
share.

The file: each event is a JSON array with a newline *before* it, appended by one write(2) on an
O_APPEND descriptor. A killed process tears at most its own last line, and the newline before the
next event keeps the fragment apart.

Events are msgspec structs because they are the lines themselves: no second form, and no conversion
for each of ten million.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated

import msgspec

now = time.monotonic


class Write(msgspec.Struct, frozen=True, array_like=True, tag="w"):
    """A write to one register. A write that changes several registers is one event for each.

    ``started`` is a moment before the write began. ``committed`` is a moment by which its COMMIT
    had happened (None: unknown). ``acked`` is the moment from which its acknowledgement could be
    sent, or later, when it had arrived (None: never acknowledged, as for writes outside the
    application).

    Events of the same version are one write: the committing process and the client may each record
    what they know. An attempt of unknown outcome has the version None: it may have made any one
    version from ``started`` on, or none. It may be recorded before it begins, and again with its
    version: the same register, process and ``started`` are the same attempt, with the event without
    version first.
    """

    register: str
    version: int | None
    started: float
    committed: float | None
    acked: float | None
    process: str
    session: str | None = None


class Read(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """A read: the version that it returned of each register that it covers (0 for a missing row).

    ``asked`` names what was requested (tenant and query), ``received`` what the body itself says it
    is. ``session`` is a client that is promised to see what it wrote and saw. ``how`` is a short
    word on the source of the response. ``slack_s`` is by how many seconds the response may be older
    than a fresh one: the promise for this query, not a measurement.
    """

    start: float
    end: float
    values: Mapping[str, int]
    process: str
    asked: str
    received: str
    session: str | None = None
    how: str = ""
    slack_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0


Event = Write | Read


class Recorder:
    """Appends events to a file, one write(2) each. Safe for threads and processes. Use it as a
    context manager, or call ``close``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._encode = msgspec.json.Encoder().encode

    def append(self, event: Event) -> None:
        """Append an event. Raises ``OSError`` if it was not written completely (a full disk)."""
        line = b"\n" + self._encode(event)
        if os.write(self._file, line) != len(line):
            raise OSError("the event was not written as a whole")

    def close(self) -> None:
        """Close the file. Nothing is buffered."""
        os.close(self._file)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class History:
    """The events in files, read again by each iteration and not kept in memory. Made by ``load``.

    Events appended after ``load`` are ignored, so all iterations yield the same events. ``torn`` is
    the number of incomplete lines that the last complete iteration skipped.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._files = [(Path(path), Path(path).stat().st_size) for path in paths]
        self.torn = 0

    def __iter__(self) -> Iterator[Event]:
        """Yield the events, file after file. Raises ``ValueError`` for a complete line that is no
        event."""
        torn = 0
        decode = msgspec.json.Decoder(Write | Read).decode
        for path, size in self._files:
            for number, line in _lines(path, size):
                try:
                    event = decode(line)
                except msgspec.ValidationError as error:
                    raise ValueError(f"{path}:{number}: no event: {error}") from error
                except (msgspec.DecodeError, UnicodeDecodeError):
                    torn += 1
                else:
                    yield event
        self.torn = torn


def load(paths: Iterable[str | os.PathLike[str]]) -> History:
    """Return the events recorded in these files until now."""
    return History(paths)


def _lines(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the non-empty lines in the first ``size`` bytes, with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if size <= 0:
                return
            kept = line[:size]
            size -= len(line)
            if kept != b"\n":
                yield number, kept
