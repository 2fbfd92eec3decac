"""Accuracy against FLOPs of one checkpoint at many targets: its numbers, its area and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dynroute.report.pictures.style import COLOURS, SHARE_AXIS, STYLE, finish

NAME = "curve"
COLUMNS = (
    *("run", "split", "checkpoint", "flops_max", "flops_target", "macs_share", "share_low", "share_high", "macs_mean"),
    *("macs_p5", "macs_p95", "top1", "top5", "loss", "n"),
)


def area(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean top-1 over the range of shares reached, by the trapezoid rule: the integral of top-1 over share, divided by

    the range's width. None where all rows stand at one share.
    """
    points = sorted((row["macs_share"], row["top1"]) for row in rows)
    width = points[-1][0] - points[0][0]
    if width <= 0:
        return None
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points)) / float(width)


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write curve.csv, curve.png and curve.svg of evaluated rows into a run folder."""
    import matplotlib
    import pandas as pd

    ordered = sorted(rows, key=lambda row: row["macs_share"])
    table = pd.DataFrame([{name: row[name] for name in COLUMNS} for row in ordered])
    with matplotlib.rc_context(STYLE):
        return finish(_draw(ordered), table, NAME, ("accuracy against FLOPs", ""), folder).files


def _draw(rows: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    ax = figure.subplots()
    mean = area(rows)
    title = f"{rows[0]['run']} ({rows[0]['split']}, n = {rows[0]['n']})"
    ax.set_title(title + ("" if mean is None else f"\nmean top-1 over the range {100 * mean:.2f} %"), loc="left")
    ax.set_xlabel(SHARE_AXIS)
    ax.set_ylabel("top-1, %")
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    x, y = ([100 * row[name] for row in rows] for name in ("macs_share", "top1"))
    ax.plot(x, y, color=COLOURS[0], marker="o", linewidth=1.4, markersize=6, markeredgecolor="white")
    dense = [row["macs_mean"] / row["macs_share"] / 100 for row in rows]
    cheap, dear = ([row[name] / d for row, d in zip(rows, dense, strict=True)] for name in ("macs_p5", "macs_p95"))
    ax.hlines(y, cheap, dear, color=COLOURS[0], linewidth=0.7, alpha=0.55, zorder=1)
    return figure
