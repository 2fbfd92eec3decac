"""Accuracy against FLOPs, one panel per dataset and backbone. Two calls write the same bytes."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynroute.records import write_text
from dynroute.report.tables import PLACE, STATIC, chord

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "accuracy_flops"
# Okabe and Ito's colours, told apart by colour-blind readers; no yellow, faint on white. Black is static.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")  # grey prints tell series apart by these
LINES = ("-", "-.", ":")
COLUMNS = [
    "dataset",
    "backbone",
    "series",
    "flops_target",
    "share",
    "share_p5",
    "share_p95",
    "top1",
    "top1_std",
    "n_seeds",
]
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "dynroute",  # otherwise the ids in the SVG are random
    "text.parse_math": False,  # a run may be called $x
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Look(NamedTuple):
    """How one series is drawn, alike in all panels."""

    colour: str
    marker: str
    line: str


def points(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind the picture. share_p5, share_p95: the cost of the images at those percentiles.

    Controls are left out: they are no points of their method's curve.
    """
    table = table[table["control"] == ""]
    dense = table["macs_mean"] / table["macs_share"]
    drawn = table.assign(
        series=[_series(method, label) for method, label in zip(table["method"], table["label"], strict=True)],
        share=table["macs_share"],
        share_p5=table["macs_p5"] / dense,
        share_p95=table["macs_p95"] / dense,
    )
    return drawn[[*COLUMNS, "macs_share", "method"]]


def write(table: pd.DataFrame, out: Path) -> list[Path]:
    """Write the picture as PNG and SVG, and its numbers as CSV."""
    import matplotlib

    data = points(table)
    write_text(out / f"{NAME}.csv", data[COLUMNS].to_csv(index=False, lineterminator="\n"))
    with matplotlib.rc_context(STYLE):
        figure = draw(data)
        save(figure, out / f"{NAME}.png", {"Software": None})
        save(figure, out / f"{NAME}.svg", {"Date": None, "Creator": None})
    return [out / f"{NAME}{suffix}" for suffix in (".csv", ".png", ".svg")]


def draw(data: pd.DataFrame) -> Figure:
    """One figure from `points`; without pyplot, so that no window system and no global state take part."""
    from matplotlib.figure import Figure

    panels = list(data.groupby(PLACE))
    looks = _looks(data)
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    legend_inches = 0.7 + 0.075 * max(len(name) for name in looks)
    figure = Figure(figsize=(4.6 * columns + legend_inches, 3.6 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, (place, part) in zip(axes, panels, strict=False):
        _panel(ax, ", ".join(map(str, place)), part, looks)
    for ax in axes[len(panels) :]:
        ax.remove()
    _legend(figure, looks)
    return figure


def _panel(ax: Axes, title: str, part: pd.DataFrame, looks: dict[str, Look]) -> None:
    ax.set_title(title, loc="left", fontweight="bold")
    ax.set_xlabel("share of the dense net's FLOPs (multiply-adds), %")
    ax.set_ylabel("top-1, %")
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(0.06, 0.08)
    shares, top1s = chord(part)
    ax.plot(_percent(shares), _percent(top1s), color="black", linestyle="--", linewidth=1.2, zorder=2)
    for name, rows in part.groupby("series"):
        _draw_series(ax, rows.sort_values("share"), looks[str(name)])


def _draw_series(ax: Axes, rows: pd.DataFrame, look: Look) -> None:
    """Joined markers; upright bars: std over seeds; thin level bars: 5th to 95th percentile of image cost."""
    x, y = 100 * rows["share"], 100 * rows["top1"]
    ax.errorbar(
        x,
        y,
        yerr=100 * rows["top1_std"].fillna(0) if (rows["n_seeds"] > 1).any() else None,
        capsize=4,
        elinewidth=1,
        markeredgecolor="white",
        markeredgewidth=0.4,
        **_line_options(look),
    )
    spread = rows[rows["share_p5"] < rows["share_p95"]]
    ends = 100 * spread["share_p5"], 100 * spread["share_p95"]
    ax.hlines(100 * spread["top1"], *ends, color=look.colour, linewidth=0.7, alpha=0.55, zorder=1)


def _line_options(look: Look) -> dict[str, Any]:
    return {
        "color": look.colour,
        "marker": look.marker,
        "linestyle": look.line,
        "linewidth": 1.4,
        "markersize": 7,
        "zorder": 3,
    }


def _looks(data: pd.DataFrame) -> dict[str, Look]:
    """A look for each series, static first."""
    routed = sorted(set(data["series"]) - {STATIC})
    wheel = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    styles = (Look(*pair, LINES[i // len(COLOURS) % len(LINES)]) for i, pair in enumerate(wheel))
    static = {STATIC: Look("black", "s", "none")} if (data["series"] == STATIC).any() else {}
    return {**static, **dict(zip(routed, styles, strict=False))}


def _legend(figure: Figure, looks: dict[str, Look]) -> None:
    from matplotlib.lines import Line2D

    lines = [look._replace(line="--") if name == STATIC else look for name, look in looks.items()]
    handles = [Line2D([], [], markeredgecolor="white", markeredgewidth=0.4, **_line_options(look)) for look in lines]
    names = [f" {name}" if name.startswith("_") else name for name in looks]  # matplotlib hides names in _
    figure.legend(handles, names, loc="outside right upper", frameon=False, handlelength=3)


def _series(method: str, label: str) -> str:
    """Static nets are one series whatever their runs are called; a run's name need not say its method."""
    if method == STATIC:
        return STATIC
    return label if method in label else f"{label} ({method})"


def _percent(values: list[float]) -> list[float]:
    return [100 * value for value in values]


def save(figure: Figure, path: Path, metadata: dict[str, None]) -> None:
    """Write a picture in one step, as `records.write_text` does for text."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        figure.savefig(name, format=path.suffix[1:], dpi=160, metadata=metadata)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
