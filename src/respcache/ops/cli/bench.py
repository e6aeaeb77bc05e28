"""``respcache bench``: what the cache brings to an application, measured side by side in one
run."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    Request,
    Tell,
    beside,
    check_pids,
    parse_connections,
    ratios,
)
from respcache.ops.bench.load import WrongAnswer
from respcache.ops.bench.processes import Cores, Failed
from respcache.ops.cli.headers import read_headers
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output

BUSY = 0.93
"""From here on whoever asks was the slower side."""

LABELS = {"with": "with the cache", "without": "without it", "bare": "bare ASGI"}


def run(
    out: Output,
    *,
    urls: Sequence[str],
    app: str | None,
    headers: Sequence[str],
    without: str | None,
    pids: Sequence[int],
    without_pids: Sequence[int],
    rounds: int,
    seconds: float,
    connections: str,
) -> Status:
    """Measure and print figures. FAILED where an answer is wrong or a process does not start."""
    if sys.platform != "linux":
        raise Failure(Status.USAGE, "bench needs Linux: epoll, and CPU times from /proc")
    if not urls:
        raise Failure(
            Status.USAGE,
            "name what to ask: http://localhost:4001/api/leads, or with --app: /api/leads",
        )
    given = tuple(read_headers(headers))
    effort = Effort(rounds, seconds, parse_connections(connections))
    cores = Cores.found()
    with (
        Bench([Request(_target(url), given) for url in urls], cores=cores) as bench,
        _progress(out) as tell,
    ):
        try:
            if app is not None:
                _own(bench, app, urls, without, [*pids, *without_pids])
                with beside(cores):
                    lanes = bench.run(effort, tell)
            else:
                _running(bench, urls, without, pids, without_pids)
                lanes = bench.run(effort, tell)
        except (WrongAnswer, Failed) as error:
            raise Failure(Status.FAILED, str(error)) from None
        except OSError as error:
            raise Failure(Status.UNREACHABLE, f"no answer: {error}") from None
        notes = [*bench.notes, *_notes(lanes)]
    document = {
        "requests": list(urls),
        "machine": bench.machine(),
        "lanes": lanes,
        "with_against_without": ratios(lanes),
        "notes": notes,
    }
    out.emit(document, lambda: _render(out, document))
    return Status.OK


def _own(
    bench: Bench, app: str, urls: Sequence[str], without: str | None, pids: Sequence[int]
) -> None:
    if without is not None or pids:
        raise Failure(
            Status.USAGE,
            "--app starts the processes itself: leave --without, --pid and --without-pid out",
        )
    for url in urls:
        if not url.startswith("/"):
            raise Failure(
                Status.USAGE,
                f"{url!r} must be a path, such as /api/leads: --app starts the servers itself",
            )
    load(app, Path.cwd())  # a clear message now, not one of a child
    bench.add_application(app)


def _running(
    bench: Bench,
    urls: Sequence[str],
    without: str | None,
    pids: Sequence[int],
    without_pids: Sequence[int],
) -> None:
    places = {_place(url) for url in urls}
    if len(places) > 1:
        raise Failure(
            Status.USAGE,
            f"name one server: {' and '.join(sorted(f'{host}:{port}' for host, port in places))} "
            f"are two",
        )
    bench.add_running("with", Address(*places.pop(), check_pids(pids)))
    if without is not None:
        bench.add_running("without", Address(*_place(without), check_pids(without_pids)))
    elif without_pids:
        raise Failure(Status.USAGE, "--without-pid is of the server that --without names")


def _place(url: str) -> tuple[str, int]:
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
def _progress(out: Output) -> Iterator[Tell]:
    """Show how far it is, on standard error, where somebody looks at it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("starting")

        def tell(what: str, over: int, total: int) -> None:
            progress.update(task, description=what, completed=over, total=total)

        yield tell


def _notes(lanes: Mapping[str, Any]) -> Iterator[str]:
    for way, counters in lanes.items():
        if any(cell["generator_busy"] >= BUSY for cell in counters.values()):
            yield f"{LABELS[way]}: the load generator was the slower side at times, so its requests/s are a lower bound"
    if any(cell["hit_share"] < 1 for cell in lanes["with"].values()):
        share = min(cell["hit_share"] for cell in lanes["with"].values())
        yield f"not every answer with the cache was a hit ({share:.1%} at least): respcache explain PATH says why"
    if "without" not in lanes:
        yield "without the cache was not measured: start the application once more with its cache off and give --without URL"


def _render(out: Output, document: Mapping[str, Any]) -> None:
    out.say(document["machine"], "dim")
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
        (
            LABELS[way], int(count[1:]), f"{cell['rps']:,.0f}", f"{cell['p50_ms']:.2f} ms", f"{cell['p99_ms']:.2f} ms",
            None if cell["cpu_us"] is None else f"{cell['cpu_us']:,.0f} us",
            f"{cell['hit_share']:.1%}" if way == "with" else None, cell["cpu_ratio"],
        )
        for way, counters in document["lanes"].items() for count, cell in counters.items()
    ]  # fmt: skip
    out.table(columns, sorted(rows, key=lambda row: row[1]))
    for count, ratio in document["with_against_without"].items():
        cpu = "" if ratio["cpu"] is None else f", {ratio['cpu']:g} times less CPU a request"
        out.say(
            Text.assemble(
                (f"{ratio['rps']:g} times", "bold green"),
                f" the requests/s{cpu} at {count[1:]} connections",
            )
        )
    for note in document["notes"]:
        out.say(f"note: {note}", "yellow")
