"""One look for all pictures, and how one is written: PNG, SVG and the CSV of its numbers. Two calls write the same bytes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynroute.records import write_file, write_text
from dynroute.report.routed import Routed
from dynroute.report.tables import STATIC

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; no yellow, faint on white. Black is static.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")  # grey prints tell series apart by these
LINES = ("-", "-.", ":")
RATES = "cividis_r"  # of heat maps: even in grey, alike to colour-blind readers, dark is high
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a run may be called $x
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
}
SHARE_AXIS = "share of the dense net's FLOPs (multiply-adds), %"
SHORT_AXIS = "share of dense FLOPs (multiply-adds), %"  # of narrow panels
LONGEST = 30  # characters of a name in a picture
DPI = 160  # of the PNG
MOST_PANELS = 6  # runs that a picture shows side by side


class Picture(NamedTuple):
    """A picture as written. title, caption: plain text; svg_text: one <svg> element; csv_path: its numbers."""

    name: str
    title: str
    caption: str
    svg_text: str
    csv_path: Path

    @property
    def files(self) -> list[Path]:
        """All of it: CSV, PNG, SVG."""
        return [self.csv_path.with_suffix(suffix) for suffix in (".csv", ".png", ".svg")]


class Look(NamedTuple):
    """How one series is drawn, alike in all panels."""

    colour: str
    marker: str
    line: str

    def options(self) -> dict[str, Any]:
        """For `plot`."""
        size = {"linewidth": 1.4, "markersize": 7, "zorder": 3}
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line, **size}


def looks(series: Iterable[str]) -> dict[str, Look]:
    """A look for each series, static first."""
    names = set(series)
    wheel = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    styles = (Look(*pair, LINES[i // len(COLOURS) % len(LINES)]) for i, pair in enumerate(wheel))
    static = {STATIC: Look("black", "s", "none")} if STATIC in names else {}
    return {**static, **dict(zip(sorted(names - {STATIC}), styles, strict=False))}


def series_name(method: str, label: str) -> str:
    """Static nets are one series whatever their runs are called; a run's name need not say its method."""
    if method == STATIC:
        return STATIC
    return label if method in label else f"{label} ({method})"


def shortened(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Names cut in their middle, where ends differ most; two that look alike then are numbered."""
    half = (longest - 1) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}…{name[-half:]}" for name in names]
    seen: dict[str, list[str]] = {}
    for short, name in zip(cut, names, strict=True):
        if name not in seen.setdefault(short, []):
            seen[short].append(name)
    numbered = (seen[short].index(name) for short, name in zip(cut, names, strict=True))
    shown = [f"{short} [{number + 1}]" if number else short for short, number in zip(cut, numbered, strict=True)]
    return [f" {name}" if name.startswith("_") else name for name in shown]  # matplotlib hides names in _


def panels(
    heights: Sequence[float], width: float, labels: float = 1.1, columns: int = 2, extra: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure with axes of these heights, `columns` side by side, in inches.

    width: of one, its labels included; labels: height that title and labels of one take; extra: width for a legend at the side.
    Without pyplot, so that no window system and no global state take part.
    """
    from matplotlib.figure import Figure

    across = min(len(heights), columns)
    lines = [max(heights[k : k + across]) for k in range(0, len(heights), across)]
    size = (width * across + extra, sum(lines) + labels * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(lines), across, squeeze=False, height_ratios=lines)
    axes = list(grid.flat)
    for unused in axes[len(heights) :]:
        unused.remove()
    return figure, axes[: len(heights)]


def headings(runs: Sequence[Routed], target: bool = True) -> list[str]:
    """Two lines over each run's panel: its name; data set, backbone and, if asked for, target."""
    names = shortened([run.label for run in runs])
    return [f"{name}\n{run.place}{f', {run.aim}' if target else ''}" for name, run in zip(names, runs, strict=True)]


def finish(figure: Figure, data: pd.DataFrame, name: str, words: tuple[str, str], out: Path) -> Picture:
    """Write NAME.csv, .png and .svg. words: title and caption."""
    table = out / f"{name}.csv"
    write_text(table, data.to_csv(index=False, lineterminator="\n"))
    _, drawn = save(figure, out, name)
    text = drawn.read_text(encoding="utf-8")
    return Picture(name, *words, _own_ids(text[text.index("<svg") :], name), table)


def save(figure: Figure, out: Path, name: str) -> tuple[Path, Path]:
    """Write NAME.png and NAME.svg. The canvases are called directly: `savefig` draws twice."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    png, svg = out / f"{name}.png", out / f"{name}.svg"
    figure.set_dpi(DPI)
    write_file(png, lambda file: FigureCanvasAgg(figure).print_png(file, metadata={"Software": None}))
    figure.set_layout_engine("none")  # places are found once, not again for the second file
    with matplotlib.rc_context({"svg.hashsalt": "dynroute"}):  # otherwise the ids in the SVG are random
        undated = {"Date": None, "Creator": None}
        write_file(svg, lambda file: FigureCanvasSVG(figure).print_svg(file, metadata=undated))
    return png, svg


def _own_ids(svg: str, name: str) -> str:
    """The SVG with ids that no other picture of the same page has."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
