"""``respcache bench``: compares an application with and without its cache in one run."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from respcache.ops.application import load
from respcache.ops.bench.compare import (
    Address,
    Bench,
    Effort,
    OnProgress,
    Request,
    check_pids,
    on_generator_core,
    parse_connections,
    ratios,
)
from respcache.ops.bench.load import WrongResponse
from respcache.ops.bench.processes import Cores, Failed
from respcache.ops.cli.headers import read_headers
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output

BUSY = 0.93
"""From this share of its time on, the load generator is the bottleneck."""

LABELS = {"with": "with the cache", "without": "without it", "bare": "bare ASGI"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What to measure: the options of the command."""

    urls: Sequence[str]
    app: str | None
    headers: Sequence[str]
    without: str | None
    pids: Sequence[int]
    without_pids: Sequence[int]


def run(
    out: Output, measured: Measured, *, rounds: int, seconds: float, connections: str
) -> Status:
    """Measure and print. Raises ``Failure`` for a wrong response or a server that does not
    start."""
    if sys.platform != "linux":
        raise Failure(Status.USAGE, "bench needs Linux: epoll, and CPU times from /proc")
    if not measured.urls:
        raise Failure(
            Status.USAGE,
            "name a request: http://localhost:4001/api/leads, or with --app: /api/leads",
        )
    headers = tuple(read_headers(measured.headers))
    effort = Effort(rounds, seconds, parse_connections(connections))
    cores = Cores.found()
    with (
        Bench([Request(_target(url), headers) for url in measured.urls], cores=cores) as bench,
        _progress() as on_progress,
    ):
        try:
            if measured.app is not None:
                _add_application(bench, measured, measured.app)
                with on_generator_core(cores):
                    lanes = bench.run(effort, on_progress)
            else:
                _add_running(bench, measured)
                lanes = bench.run(effort, on_progress)
        except (WrongResponse, Failed) as error:
            raise Failure(Status.FAILED, str(error)) from None
        except OSError as error:
            raise Failure(Status.UNREACHABLE, f"no response: {error}") from None
        notes = [*bench.notes, *_notes(lanes)]
    document = {
        "requests": list(measured.urls),
        "machine": bench.machine(),
        "lanes": lanes,
        "with_against_without": ratios(lanes),
        "notes": notes,
    }
    out.emit(document, lambda: _render(out, document))
    return Status.OK


def _add_application(bench: Bench, measured: Measured, app: str) -> None:
    if measured.without is not None or measured.pids or measured.without_pids:
        raise Failure(
            Status.USAGE,
            "--app starts the servers itself: leave out --without, --pid and --without-pid",
        )
    for url in measured.urls:
        if not url.startswith("/"):
            raise Failure(
                Status.USAGE,
                f"{url!r} must be a path, such as /api/leads: --app starts the servers itself",
            )
    load(app, Path.cwd())  # fails here with a clearer message than in a child process
    bench.add_application(app)


def _add_running(bench: Bench, measured: Measured) -> None:
    addresses = {_address(url) for url in measured.urls}
    if len(addresses) > 1:
        names = " and ".join(sorted(f"{host}:{port}" for host, port in addresses))
        raise Failure(Status.USAGE, f"name one server, not {names}")
    bench.add_running("with", Address(*addresses.pop(), check_pids(measured.pids)))
    if measured.without is not None:
        pids = check_pids(measured.without_pids)
        bench.add_running("without", Address(*_address(measured.without), pids))
    elif measured.without_pids:
        raise Failure(Status.USAGE, "--without-pid needs --without, which names its server")


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname:
        raise Failure(
            Status.USAGE,
            f"{url!r} must be like http://localhost:4001/api/leads; a path alone needs --app "
            f"MODULE:APP",
        )
    return parts.hostname, port


def _target(url: str) -> str:
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not target.isascii() or not target.isprintable() or " " in target:
        raise Failure(Status.USAGE, f"{url!r} must be percent-encoded")
    return target


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Show the progress on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("starting")

        def on_progress(step: str, finished: int, total: int) -> None:
            progress.update(task, description=step, completed=finished, total=total)

        yield on_progress


def _notes(lanes: Mapping[str, Any]) -> Iterator[str]:
    for lane, cells in lanes.items():
        if any(cell["generator_busy"] >= BUSY for cell in cells.values()):
            yield (
                f"{LABELS[lane]}: the load generator was the bottleneck at times, so its "
                f"requests/s are a lower bound"
            )
    hit_share = min(cell["hit_share"] for cell in lanes["with"].values())
    if hit_share < 1:
        yield (
            f"not every response with the cache was a hit ({hit_share:.1%} at least): respcache "
            f"explain PATH says why"
        )
    if "without" not in lanes:
        yield (
            "without the cache was not measured: start the application once more with its cache "
            "off and give --without URL"
        )


def _render(out: Output, document: Mapping[str, Any]) -> None:
    out.print(document["machine"], "dim")
    columns = (
        "lane",
        "connections>",
        "requests/s>",
        "p50>",
        "p99>",
        "CPU/request>",
        "hits>",
        "CPU of bare / its own>",
    )
    rows = [
        _row(lane, int(count[1:]), cell)
        for lane, cells in document["lanes"].items()
        for count, cell in cells.items()
    ]
    out.table(columns, sorted(rows, key=lambda row: row[1]))
    for count, ratio in document["with_against_without"].items():
        cpu = "" if ratio["cpu"] is None else f", {ratio['cpu']:g} times less CPU per request"
        out.print(
            Text.assemble(
                (f"{ratio['rps']:g} times", "bold green"),
                f" the requests/s{cpu} at {count[1:]} connections",
            )
        )
    for note in document["notes"]:
        out.print(f"note: {note}", "yellow")


def _row(lane: str, connections: int, cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        LABELS[lane],
        connections,
        f"{cell['rps']:,.0f}",
        f"{cell['p50_ms']:.2f} ms",
        f"{cell['p99_ms']:.2f} ms",
        None if cell["cpu_us"] is None else f"{cell['cpu_us']:,.0f} us",
        f"{cell['hit_share']:.1%}" if lane == "with" else None,
        cell["cpu_ratio"],
    )
