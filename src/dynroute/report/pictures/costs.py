"""What images cost: histograms over all of them, means by class. A panel for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynroute.report.paired import Z95
from dynroute.report.pictures.style import COLOURS, SHARE_AXIS, SHORT_AXIS, Picture, finish, headings, panels, shortened
from dynroute.report.routed import Routed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BIN = 0.025  # of the dense net's multiply-adds
STEPS = (0.005, 0.05)  # spacing of costs that bins follow
MOST_TARGETS = 8  # histograms above each other
MOST_CLASSES = 24  # rows of bars
HISTOGRAM_WORDS = (
    "How many images cost how much",
    "Test images by their FLOPs, router included, a row for each target, each row scaled to its highest bar; "
    "bins of 2.5 % of the dense net, or the next multiple of the step between costs where they are evenly "
    "spaced. Upright line: the mean.",
)
CLASS_WORDS = (
    "Mean cost of each class",
    "Test images, classes sorted; black: 95 % interval of the mean (normal, independent images); dashed: mean over all images.",
)


def flops_histogram(runs: Sequence[Sequence[Routed]], out: Path) -> Picture:
    """Fig. 5 of DMNN: histogram of the FLOPs of single images, for each run and target. runs: the targets of each."""
    import pandas as pd

    shown = [list(run[:MOST_TARGETS]) for run in runs]
    data = pd.concat([_histogram(routed) for run in shown for routed in run], ignore_index=True)
    figure, axes = panels([0.42 * max(len(run), 2) for run in shown], 4.2)
    titles = headings([run[0] for run in shown], target=False)
    for ax, run, title in zip(axes, shown, titles, strict=True):
        ax.set_title(title)
        _ridges(ax, run)
    return finish(figure, data, "flops_histogram", HISTOGRAM_WORDS, out)


def _histogram(routed: Routed) -> pd.DataFrame:
    """Images in bins of equal width over all their costs. Where these are evenly spaced, as those of equal parts are, bins of
    any width would hold now more and now fewer steps: there a bin is a whole number of steps."""
    import numpy as np
    import pandas as pd

    share = routed.images["share"].round(6)  # as the edges, so that a cost on an edge falls into the bin above it
    levels = np.unique(share.round(4))
    step = float(np.median(np.diff(levels))) if len(levels) > 1 else 0.0
    even = STEPS[0] <= step <= STEPS[1]
    width = step * math.ceil(BIN / step - 1e-6) if even else BIN
    start = levels[0] - step / 2 if even else math.floor(share.min() / BIN + 1e-6) * BIN
    edges = np.round(start + width * np.arange(math.floor((levels[-1] - start) / width + 1e-6) + 2), 6)
    counts, _ = np.histogram(share, edges)
    setting = {"run": routed.label, "flops_target": routed.row["flops_target"]}
    return pd.DataFrame({**setting, "share_from": edges[:-1], "share_to": edges[1:], "images": counts})


def _ridges(ax: Axes, run: Sequence[Routed]) -> None:
    """One histogram above another, cheapest below."""
    widest = 100.0
    for row, routed in enumerate(run):
        data = _histogram(routed)
        edges = [*(100 * data["share_from"]), 100 * data["share_to"].iloc[-1]]
        widest = max(widest, edges[-1])
        heights = 0.82 * data["images"] / data["images"].max()
        ax.stairs(row + heights, edges, baseline=row, fill=True, color=COLOURS[0], alpha=0.75, linewidth=0)
        ax.axhline(row, color="0.6", linewidth=0.6)
        mean = 100 * routed.images["share"].mean()
        ax.vlines(mean, row, row + 0.9, color="black", linewidth=1.2)
    ax.set_yticks([row + 0.4 for row in range(len(run))], [routed.target for routed in run])
    ax.set_ylim(0, len(run))
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, widest)
    ax.tick_params(axis="y", length=0)
    ax.set_ylabel("target")
    ax.set_xlabel(SHARE_AXIS)
    ax.grid(axis="x")


def cost_by_class(runs: Sequence[Routed], out: Path) -> Picture:
    """RNP's figure of LFW: the mean cost of each class as sorted bars, with intervals; each run at one target."""
    import pandas as pd

    tables = [class_costs(routed) for routed in runs]
    figure, axes = panels([0.17 * min(len(table), MOST_CLASSES + 1) for table in tables], 4.2)
    for ax, table, routed, title in zip(axes, tables, runs, headings(runs), strict=True):
        _bars(ax, table, float(routed.images["share"].mean()))
        ax.set_title(title)
    words = (CLASS_WORDS[0], CLASS_WORDS[1] + _cut(max(map(len, tables))))
    return finish(figure, pd.concat(tables, ignore_index=True), "cost_by_class", words, out)


def _cut(classes: int) -> str:
    if classes <= MOST_CLASSES:
        return ""
    return f" Of {classes} classes the {MOST_CLASSES // 2} cheapest and the {MOST_CLASSES // 2} dearest; all are in the CSV."


def class_costs(routed: Routed) -> pd.DataFrame:
    """Mean share of each class with the ends of its 95 % interval, cheapest first. low, high: empty for a single image."""
    groups = routed.images.groupby("label")["share"]
    table = groups.agg(["mean", "std", "count"]).reset_index().sort_values(["mean", "label"], ignore_index=True)
    half = Z95 * table["std"] / table["count"] ** 0.5
    table = table.assign(
        run=routed.label,
        flops_target=routed.row["flops_target"],
        name=[routed.classes.get(label, f"class {label}") for label in table["label"]],
        low=table["mean"] - half,
        high=table["mean"] + half,
    )
    renamed = table.rename(columns={"mean": "share", "count": "images", "name": "class"})
    return renamed[["run", "flops_target", "label", "class", "images", "share", "low", "high"]]


def _bars(ax: Axes, table: pd.DataFrame, mean: float) -> None:
    """Level bars, the dearest on top; of very many classes both ends, with a gap between."""
    places = list(range(len(table)))
    if len(table) > MOST_CLASSES:
        half = MOST_CLASSES // 2
        table, places = table.iloc[[*range(half), *range(-half, 0)]], [*range(half), *range(half + 1, 2 * half + 1)]
    shares = 100 * table["share"]
    errors = [(shares - 100 * table["low"]).fillna(0), (100 * table["high"] - shares).fillna(0)]
    ax.barh(places, shares, height=0.75, color=COLOURS[5], xerr=errors, error_kw={"elinewidth": 1.2, "capsize": 2})
    ax.axvline(100 * mean, color="black", linestyle="--", linewidth=1)
    ax.set_yticks(places, shortened(list(table["class"]), 20), fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(places[0] - 0.6, places[-1] + 0.6)
    ax.set_xlim(left=0)
    ax.set_xlabel(SHORT_AXIS)
