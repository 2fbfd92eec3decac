"""Accuracy against FLOPs of one checkpoint at many targets: its numbers, its area and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dynroute.records import write_rows
from dynroute.report.pictures.style import SHARE_AXIS, STYLE, looks, panels, save

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

    ordered = sorted(rows, key=lambda row: row["macs_share"])
    write_rows(folder / f"{NAME}.csv", [{name: row[name] for name in COLUMNS} for row in ordered], COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = _draw(ordered)
        return [folder / f"{NAME}.csv", *save(figure, folder, NAME)]


def _draw(rows: Sequence[Mapping[str, Any]]) -> Any:
    figure, (ax,) = panels([2.5], 4.6)
    mean = area(rows)
    title = f"{rows[0]['run']} ({rows[0]['split']}, n = {rows[0]['n']})"
    ax.set_title(title + ("" if mean is None else f"\nmean top-1 over the range {100 * mean:.2f} %"))
    ax.set_xlabel(SHARE_AXIS)
    ax.set_ylabel("top-1, %")
    ax.grid()
    x, y = ([100 * row[name] for row in rows] for name in ("macs_share", "top1"))
    look = looks(["own"])["own"]
    ax.plot(x, y, markeredgecolor="white", **look.options())
    dense = [row["macs_mean"] / row["macs_share"] / 100 for row in rows]
    cheap, dear = ([row[name] / d for row, d in zip(rows, dense, strict=True)] for name in ("macs_p5", "macs_p95"))
    ax.hlines(y, cheap, dear, color=look.colour, linewidth=0.7, alpha=0.55, zorder=1)
    return figure
