"""Charts without JavaScript: lines and histograms as the paths and rectangles of an SVG. Pure
geometry.

With JavaScript, uPlot redraws the lines; histograms stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 600.0, 100.0
"""Range of the coordinates of lines; the style sheet sets their size."""

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its CSS class (a colour), and the ``d`` attributes of its path and of the area
    below it."""

    style: str
    path: str
    area: str


@dataclass(frozen=True, slots=True)
class Chart:
    """The lines of one chart. ``top`` is the label of its upper edge."""

    lines: Sequence[Line] = ()
    top: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram, in per cent of the chart's width and height."""

    x: float
    width: float
    height: float
    label: str
    count: int


def chart(
    series: Sequence[tuple[str, Values]],
    label: Callable[[float], str],
    *,
    top: float | None = None,
    stacked: bool = False,
    area: bool = True,
) -> Chart:
    """Draw series of equal length into one chart.

    ``top`` is the value at its upper edge, by default the largest; ``label`` formats it. Stacked
    series are drawn from the top down, so that each covers the area of those below it.
    """
    stack = _stacked(series) if stacked else [(style, list(values)) for style, values in series]
    highest = (
        top
        or max((value for _, values in stack for value in values if value is not None), default=0.0)
        or 1.0
    )
    drawn = [Line(style, *_line(values, highest)) for style, values in stack]
    if not area:
        drawn = [Line(line.style, line.path, "") for line in drawn]
    return Chart(drawn[::-1] if stacked else drawn, label(highest))


def spark(values: Values, *, top: float | None = None) -> tuple[str, str]:
    """Draw one small line; return its path and area."""
    highest = top or max((value for value in values if value is not None), default=0.0) or 1.0
    return _line(values, highest)


def histogram(counts: Sequence[int], labels: Sequence[str]) -> list[Bar]:
    """Draw bars of equal width; the highest takes the whole height."""
    highest = max(counts, default=0) or 1
    width = 100 / (len(counts) or 1)
    return [
        Bar(position * width, width, 100 * count / highest, label, count)
        for position, (count, label) in enumerate(zip(counts, labels, strict=True))
    ]


def _stacked(series: Sequence[tuple[str, Values]]) -> list[tuple[str, list[float | None]]]:
    below = [0.0] * len(series[0][1]) if series else []
    found: list[tuple[str, list[float | None]]] = []
    for style, values in series:
        below = [one + (value or 0.0) for one, value in zip(below, values, strict=True)]
        found.append((style, list(below)))
    return found


def _line(values: Values, highest: float) -> tuple[str, str]:
    """Return the path and the area of a line, with gaps where values are missing."""
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
