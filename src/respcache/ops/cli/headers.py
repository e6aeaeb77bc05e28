"""Request headers as curl takes them: ``-H 'Name: value'``, or ``-H @file`` with one header per
line, which keeps secrets out of process lists."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from respcache.ops.cli.outcome import Failure, Status


def read_headers(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield names in lower case and values. Raises ``Failure``, without the value, which may be a
    secret."""
    for header in given:
        if not header.startswith("@"):
            yield _read(header)
            continue
        try:
            lines = Path(header[1:]).read_text().splitlines()
        except OSError as error:
            raise Failure(Status.USAGE, f"-H {header}: {error.strerror}") from None
        yield from (_read(line) for line in lines if line.strip())


def _read(header: str) -> tuple[str, str]:
    name, separator, value = header.partition(":")
    name, value = name.strip(), value.strip()
    if (
        not separator
        or not name
        or not (name + value).isprintable()
        or not (name + value).isascii()
    ):
        raise Failure(
            Status.USAGE, "-H must be 'Name: value', or @FILE with one such header per line"
        )
    return name.lower(), value
