"""What a command prints: tables for people, one JSON document for programs (one a line where it
does not end).

Colours only on a terminal, and not with NO_COLOR (https://no-color.org); in a pipe nothing is cut
off and no line is broken. What was stored came from requests of others: control characters of it
are shown as pictures, and never reach the terminal.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from respcache.core.errors import ConfigurationError
from respcache.ops.cli.outcome import Failure, Status

UNBROKEN = 10_000
"""Columns of an output that is no terminal: more than any line has."""

PICTURES = {
    **{code: 0x2400 + code for code in range(32)},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}
"""What stands for a control character."""

ESCAPES = {code: f"\\u{code:04x}" for code in range(127, 160)}
"""Of control characters that JSON leaves as they are (RFC 8259, section 7); U+009B begins a command
as ESC [ does."""


class Output:
    """Standard output of one command, in one of both forms."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._console = _console(sys.stdout)

    @property
    def terminal(self) -> bool:
        """Whether somebody looks."""
        return self._console.is_terminal

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a command within; end the process with the status of what it raises."""
        try:
            yield
        except Failure as failure:
            self._fail(failure.status, failure.message)
        except ConfigurationError as error:
            self._fail(Status.USAGE, str(error))
        except BrokenPipeError:  # ``respcache tail | head``
            sys.stderr.close()
            raise typer.Exit(Status.OK) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    def emit(self, document: Any, render: Callable[[], None]) -> None:
        """Print a document as JSON, or have it rendered."""
        if self.as_json:
            print(_json(document, indent=2), flush=True)
        else:
            render()

    def line(self, document: Any, text: Text | str) -> None:
        """Print one of many as a line."""
        if self.as_json:
            print(_json(document), flush=True)
        else:
            self.say(text)

    def say(self, text: Text | str = "", style: str = "") -> None:
        """Print a line of text as it stands."""
        self._console.print(
            harmless(Text(text, style) if isinstance(text, str) else text), soft_wrap=True
        )
        self._console.file.flush()

    def note(self, message: str) -> None:
        """Say on standard error what whoever reads the output should know."""
        self._complain(message, "yellow")

    def body(self, text: str) -> None:
        """Print a text of many lines: to a program exactly as it is."""
        print(
            "\n".join(line.translate(PICTURES) for line in text.split("\n"))
            if self.terminal
            else text,
            flush=True,
        )

    def pairs(self, rows: Iterable[tuple[str, Any]]) -> None:
        """Print names and values."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, value in rows:
            grid.add_row(harmless(Text(name, "bold")), harmless(shown(value)))
        self._print(grid)

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "nothing"
    ) -> None:
        """Print a table; columns whose name ends with ``>`` are aligned to the right."""
        made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in columns:
            right = column.endswith(">")
            made.add_column(
                column.rstrip(">"), justify="right" if right else "left", overflow="fold"
            )
        for row in rows:
            made.add_row(*(harmless(shown(value)) for value in row))
        if made.row_count:
            self._print(made)
        else:
            self.say(empty, "dim")

    def _print(self, table: Table) -> None:
        """Print a table; what fills its last column up to the right is of no use in a pipe."""
        with self._console.capture() as capture:
            self._console.print(table)
        lines = capture.get().splitlines()
        print("\n".join(lines if self.terminal else map(str.rstrip, lines)), flush=True)

    def _fail(self, status: Status, message: str) -> None:
        if self.as_json:
            print(
                _json({"error": {"status": status.name.lower(), "message": message}}, indent=2),
                flush=True,
            )
        self._complain(message, "bold red")
        raise typer.Exit(status)

    def _complain(self, message: str, style: str) -> None:
        _console(sys.stderr).print(
            harmless(Text.assemble(("respcache: ", style), message)), soft_wrap=True
        )


def harmless(text: Text) -> Text:
    """Put pictures in place of control characters."""
    made = text.copy()
    made.plain = text.plain.translate(PICTURES)
    return made


def shown(value: Any) -> Text:
    """Write a value for people: numbers with separators, nothing as a dash."""
    match value:
        case Text():
            return value
        case None | "":
            return Text("-", "dim")
        case bool():
            return Text("yes" if value else "no")
        case int():
            return Text(f"{value:,}")
        case float():
            return Text(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")
        case list() | tuple() | set() | frozenset():
            return Text(", ".join(map(str, value)) or "-")
        case _:
            return Text(str(value))


def share(part: float, whole: float) -> Text:
    """Write a ratio in percent."""
    return Text(f"{part / whole:.1%}") if whole else Text("-", "dim")


def size(count: float | None) -> Text:
    """Write a number of bytes."""
    if count is None:
        return Text("-", "dim")
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return Text(f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}")
        count /= 1024
    raise AssertionError


def span(seconds: float | None) -> Text:
    """Write a duration in the unit that suits it."""
    if seconds is None:
        return Text("-", "dim")
    for least, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if abs(seconds) >= least:
            return Text(f"{seconds / least:.3g} {unit}")
    return Text(f"{seconds * 1e6:.3g} us" if seconds else "0 s")


def _console(file: Any) -> Console:
    made = Console(file=file, highlight=False, emoji=False, markup=False)
    if not made.is_terminal:
        made.width = UNBROKEN
        made.no_color = True
    return made


def _json(document: Any, *, indent: int | None = None) -> str:
    return json.dumps(msgspec.to_builtins(document), ensure_ascii=False, indent=indent).translate(
        ESCAPES
    )
