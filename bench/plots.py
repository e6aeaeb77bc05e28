"""The pictures of RESULTS.md: CPU and throughput by lane, cost of an invalidation by keys."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import matplotlib.ticker
from lanes import BY_NAME
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measures import hits
from report import COUNTS, lanes

OURS = ("#9bd3c4", "#2f9e86", "#0b5c4c")
OTHERS = ("#d5d9de", "#9aa3ad", "#5d6772")
LINES = {
    "respcache": OURS[2],
    "SCAN + DEL": "#c0392b",
    "tag set (SMEMBERS, UNLINK)": "#d98a1f",
    "cashews delete_tags": "#6c5aa8",
}
INK = "#1f2933"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c3c9d0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the results into a folder; return the files."""
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with mpl.rc_context(STYLE):
        if lanes(result):
            title = (
                "CPU per hit: bare ASGI / lane (1: as cheap as sending prepared bytes; right is "
                "better; logarithmic)"
            )
            drawn.append(_save(_bars(result, "cpu_ratio", title), folder / "bench-cpu.png"))
            title = "Requests per second: lane / bare ASGI (right is better; logarithmic)"
            drawn.append(_save(_bars(result, "rps_ratio", title), folder / "bench-throughput.png"))
        if "invalidation" in result:
            drawn.append(_save(_lines(result["invalidation"]), folder / "bench-invalidation.png"))
    return drawn


def _bars(result: Mapping[str, Any], ratio: str, title: str) -> Figure:
    """Draw a group of bars per lane and a bar per number of connections, on a logarithmic axis."""
    names = [name for name in lanes(result) if name != "bare"]
    names.sort(key=lambda name: result[name]["c16"][ratio])
    drawing, axes = plt.subplots(figsize=(9, 0.95 + 0.62 * len(names)), layout="constrained")
    height = 0.27
    for row, name in enumerate(names):
        colours = OURS if name in BY_NAME and BY_NAME[name].ours else OTHERS
        for place, count in enumerate(COUNTS):
            one = result[name][count]
            at = row + (1 - place) * height
            axes.barh(at, one[ratio], height * 0.92, color=colours[place])
            low, high = one[f"{ratio}_iqr"]
            axes.plot([low, high], [at, at], color=INK, linewidth=0.9, solid_capstyle="butt")
            axes.text(
                max(one[ratio], high) * 1.06,
                at,
                _short(one[ratio]),
                va="center",
                fontsize=8,
                zorder=4,
                bbox=PAPER,
            )
    axes.set_xscale("log")
    low, high = (
        pick(result[name][count][ratio] for name in names for count in COUNTS)
        for pick in (min, max)
    )
    axes.set_xlim(min(low * 0.7, 0.5), max(high * 1.6, 2))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(1.0, len(names) - 0.42, " bare ASGI", fontsize=9, va="bottom", ha="center")
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.set_yticks(range(len(names)), names)
    for label in axes.get_yticklabels():
        if label.get_text() in BY_NAME and BY_NAME[label.get_text()].ours:
            label.set_fontweight("bold")
            label.set_color(OURS[2])
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left", fontsize=11, pad=18)
    _legend(axes)
    return drawing


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _legend(axes: Axes) -> None:
    words = [f"{n} connection{'s' if n > 1 else ''}" for n in hits.CONNECTIONS]
    patches = [mpl.patches.Patch(color=colour) for colour in (*OURS, *OTHERS)]
    labels = [f"respcache, {word}" for word in words] + [f"others, {word}" for word in words]
    axes.legend(
        patches,
        labels,
        loc="lower right",
        fontsize=8,
        ncols=1,
        frameon=True,
        framealpha=0.95,
        edgecolor="#c3c9d0",
    )


def _lines(found: Mapping[str, Any]) -> Figure:
    """Draw milliseconds by number of keys, one panel per case, with logarithmic axes."""
    drawing, panels = plt.subplots(
        1, len(found), figsize=(9, 4.2), sharey=True, layout="constrained"
    )
    panels = list(panels) if len(found) > 1 else [panels]
    for axes, (case, sizes) in zip(panels, found.items(), strict=True):
        numbers = [int(size) for size in sizes]
        ways: Sequence[str] = list(next(iter(sizes.values())))
        for way in ways:
            taken = [sizes[str(number)][way]["ms"] for number in numbers]
            axes.plot(
                numbers,
                taken,
                marker="o",
                markersize=4,
                color=LINES[way],
                linewidth=2.4 if way == "respcache" else 1.5,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(numbers[0] / 1.5, numbers[-1] * 1.5)
        axes.set_title(
            f"{case.capitalize()} of the keys belong to the tenant", loc="left", fontsize=10
        )
        axes.set_xlabel("keys in Valkey")
        axes.grid(visible=True, axis="y", color="#e6e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("milliseconds, median")
    for axis in (panels[0].yaxis, *(axes.xaxis for axes in panels)):
        axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,.7g}"))
        axis.set_minor_formatter(mpl.ticker.NullFormatter())
    handles = [
        mpl.lines.Line2D([], [], color=LINES[way], marker="o", markersize=4, linewidth=2)
        for way in LINES
    ]
    panels[0].legend(
        handles, list(LINES), loc="upper left", fontsize=8, frameon=True, edgecolor="#c3c9d0"
    )
    drawing.suptitle("Invalidating a tenant's list", x=0.01, ha="left", fontsize=12)
    return drawing


def _save(drawing: Figure, path: Path) -> Path:
    drawing.savefig(path, metadata={"Software": None})
    plt.close(drawing)
    return path
