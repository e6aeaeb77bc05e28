"""Histories: who read and wrote which versions, and when. One event a line; many processes may
share a file.

Registers are named by strings (``tenant/row``). Their versions are integers that grow by one in the
order of commits (``UPDATE ... SET version = version + 1 RETURNING version``); a register that
nobody has written has version 0. Times are seconds of ``now``: CLOCK_MONOTONIC, which all processes
of a host have in common.

The file: each event is a JSON array with a newline *before* it, appended by one write(2) on an
O_APPEND descriptor. A process that is killed tears at most its own last line, and the newline of
whoever appends next keeps the fragment apart.

Events are msgspec structs because they are the lines themselves: no second form, no conversion for
each of ten million.
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
    """One write to one register; what changed several registers is one event for each.

    ``started`` is a moment before the write began, ``committed`` one by which its COMMIT had
    happened (None: not known), ``acked`` the one from which its acknowledgement was free to leave,
    or later: when it had arrived (None: never acknowledged; so are writes of outsiders).

    Not all need be known at once. Events of the same version are one write: the process that
    commits and the client that is answered may each record what they know. An attempt whose version
    nobody was told has the version None: it may have made any one version from ``started`` on, or
    none. It may be recorded before it begins, and again with its version: the same register,
    process and ``started`` are the same attempt, the event without version first.
    """

    register: str
    version: int | None
    started: float
    committed: float | None
    acked: float | None
    process: str
    session: str | None = None


class Read(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """One read: the version that it returned of each register that it covers (0 for a row that was
    not there).

    ``asked`` names what was asked for, tenant and query; ``told`` is what the body itself says that
    it is. ``session`` is whoever was promised to read what they wrote and saw. ``how`` is a short
    word on where the answer came from. ``slack_s`` is by how many seconds the answer may be older
    than a fresh one: what was promised for this query, not what was found.
    """

    start: float
    end: float
    values: Mapping[str, int]
    process: str
    asked: str
    told: str
    session: str | None = None
    how: str = ""
    slack_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0


Event = Write | Read


class Recorder:
    """Appends events to a file, one write(2) each. Safe in many threads and processes. ``close``
    it, or use it with ``with``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._encode = msgspec.json.Encoder().encode

    def append(self, event: Event) -> None:
        """Add an event. Raises ``OSError`` when not all of it could be written (a full disk)."""
        line = b"\n" + self._encode(event)
        if os.write(self._file, line) != len(line):
            raise OSError("the event was not written as a whole")

    def close(self) -> None:
        """Close the file; nothing is buffered."""
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
    """The events in files, read anew by each iteration and never held: as many as the disk holds.
    Made by ``load``.

    What is appended to a file after ``load`` is not seen, so all iterations see the same. ``torn``
    is the number of lines that the last whole iteration left out because a writer did not finish
    them.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._files = [(Path(path), Path(path).stat().st_size) for path in paths]
        self.torn = 0

    def __iter__(self) -> Iterator[Event]:
        """Yield the events, file after file. Raises ``ValueError`` for a whole line that is no
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
    """Return what was recorded in these files until now."""
    return History(paths)


def _lines(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with something on them in the first ``size`` bytes, with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if size <= 0:
                return
            kept = line[:size]
            size -= len(line)
            if kept != b"\n":
                yield number, kept
