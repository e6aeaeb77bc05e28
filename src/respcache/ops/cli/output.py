"""The output of a command: tables for people, one JSON document for programs (``tail``: one per
line).

Colours are used on terminals only, and not with NO_COLOR (https://no-color.org). In a pipe nothing
is cut off and no line is broken. Stored data comes from other people's requests, so its control
characters are replaced by symbols and never reach the terminal.
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
"""Width of an output that is not a terminal: more than any line has."""

CONTROL_PICTURES = {
    **{code: 0x2400 + code for code in range(32)},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}
"""The symbol that replaces each control character."""

ESCAPES = {code: f"\\u{code:04x}" for code in range(127, 160)}
"""Escapes for control characters that JSON permits in strings (RFC 8259, section 7); U+009B starts
a terminal command, as ESC [ does."""


class Output:
    """The standard output of one command: JSON or text."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._console = _console(sys.stdout)

    @property
    def terminal(self) -> bool:
        """Whether standard output is a terminal."""
        return self._console.is_terminal

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a command in this context; exit with the status of the exception that it raises."""
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
        """Print a document as JSON, or call ``render``."""
        if self.as_json:
            print(_json(document, indent=2), flush=True)
        else:
            render()

    def line(self, document: Any, text: Text | str) -> None:
        """Print one document of several as a line."""
        if self.as_json:
            print(_json(document), flush=True)
        else:
            self.print(text)

    def print(self, text: Text | str = "", style: str = "") -> None:
        """Print a line of text without wrapping it."""
        self._console.print(
            without_controls(Text(text, style) if isinstance(text, str) else text), soft_wrap=True
        )
        self._console.file.flush()

    def note(self, message: str) -> None:
        """Print a note for the reader on standard error."""
        self._print_error(message, "yellow")

    def body(self, text: str) -> None:
        """Print a text of several lines; unchanged unless standard output is a terminal."""
        print(
            "\n".join(line.translate(CONTROL_PICTURES) for line in text.split("\n"))
            if self.terminal
            else text,
            flush=True,
        )

    def pairs(self, rows: Iterable[tuple[str, Any]]) -> None:
        """Print names and values."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, value in rows:
            grid.add_row(without_controls(Text(name, "bold")), without_controls(to_text(value)))
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
            made.add_row(*(without_controls(to_text(value)) for value in row))
        if made.row_count:
            self._print(made)
        else:
            self.print(empty, "dim")

    def _print(self, table: Table) -> None:
        """Print a table; in a pipe, without blanks at the ends of lines."""
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
        self._print_error(message, "bold red")
        raise typer.Exit(status)

    def _print_error(self, message: str, style: str) -> None:
        _console(sys.stderr).print(
            without_controls(Text.assemble(("respcache: ", style), message)), soft_wrap=True
        )


def without_controls(text: Text) -> Text:
    """Replace control characters by symbols."""
    made = text.copy()
    made.plain = text.plain.translate(CONTROL_PICTURES)
    return made


def to_text(value: Any) -> Text:
    """Format a value for people: numbers with separators, None as a dash."""
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
    """Format a ratio in percent."""
    return Text(f"{part / whole:.1%}") if whole else Text("-", "dim")


def size(count: float | None) -> Text:
    """Format a number of bytes."""
    if count is None:
        return Text("-", "dim")
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return Text(f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}")
        count /= 1024
    raise AssertionError


def duration(seconds: float | None) -> Text:
    """Format a duration in a suitable unit."""
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
