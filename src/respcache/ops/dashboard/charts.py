"""Pictures without a script: lines and histograms as the paths and rectangles of an SVG. Pure
geometry.

With JavaScript, lines are drawn anew by uPlot; histograms stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 600.0, 100.0
"""Of the coordinates of lines; the style sheet says how large they are."""

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its class (a colour of the style sheet), and what goes into ``d`` of its path and
    of the area below it."""

    style: str
    path: str
    area: str


@dataclass(frozen=True, slots=True)
class Picture:
    """Lines in one picture. ``top``: what lies at its upper edge, in words."""

    lines: Sequence[Line] = ()
    top: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a histogram, in per cent of the picture's width and height, and what it
    says."""

    x: float
    width: float
    height: float
    label: str
    count: int


def picture(
    series: Sequence[tuple[str, Values]],
    said: Callable[[float], str],
    *,
    top: float | None = None,
    stacked: bool = False,
    area: bool = True,
) -> Picture:
    """Draw series of one length into one picture; ``top``: what lies at its upper edge, if not the
    largest value.

    ``said`` writes a value. Stacked ones are drawn from the top of the pile down, so that each
    covers what is below it.
    """
    piled = _piled(series) if stacked else [(style, list(values)) for style, values in series]
    highest = (
        top
        or max((value for _, values in piled for value in values if value is not None), default=0.0)
        or 1.0
    )
    drawn = [Line(style, *_line(values, highest)) for style, values in piled]
    if not area:
        drawn = [Line(line.style, line.path, "") for line in drawn]
    return Picture(drawn[::-1] if stacked else drawn, said(highest))


def spark(values: Values, *, top: float | None = None) -> tuple[str, str]:
    """Draw one small line: path and area."""
    highest = top or max((value for value in values if value is not None), default=0.0) or 1.0
    return _line(values, highest)


def histogram(counts: Sequence[int], labels: Sequence[str]) -> list[Column]:
    """Draw columns of equal width; the highest takes the whole height."""
    highest = max(counts, default=0) or 1
    width = 100 / (len(counts) or 1)
    return [
        Column(position * width, width, 100 * count / highest, label, count)
        for position, (count, label) in enumerate(zip(counts, labels, strict=True))
    ]


def _piled(series: Sequence[tuple[str, Values]]) -> list[tuple[str, list[float | None]]]:
    below = [0.0] * len(series[0][1]) if series else []
    found: list[tuple[str, list[float | None]]] = []
    for style, values in series:
        below = [one + (value or 0.0) for one, value in zip(below, values, strict=True)]
        found.append((style, list(below)))
    return found


def _line(values: Values, highest: float) -> tuple[str, str]:
    """Return the path and the area of a line; it is broken where there is no value."""
    step = WIDTH / max(1, len(values) - 1)
    runs: list[list[str]] = [[]]
    for position, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            height = HEIGHT * (1 - min(1.0, max(0.0, value / highest)))
            runs[-1].append(f"{position * step:.1f} {height:.1f}")
    drawn = [run for run in runs if run]
    path = "".join("M" + "L".join(run) for run in drawn)
    area = "".join(
        f"M{run[0].split()[0]} {HEIGHT:.0f}L{'L'.join(run)}L{run[-1].split()[0]} {HEIGHT:.0f}Z"
        for run in drawn
    )
    return path, area
