"""All pictures of a comparison, each as PNG, SVG and the CSV of its numbers. No torch."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynroute.processors import processors
from dynroute.report.pictures.style import MOST_PANELS, STYLE, Picture
from dynroute.report.read import LeftOut, Row
from dynroute.report.routed import Routed, one_run_each

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NAMES", "Picture", "write_all"]

NAMES = (
    "accuracy_flops",
    "accuracy_latency",
    "flops_histogram",
    "cost_by_class",
    "execution_rates",
    "image_grid",
    "route_diagrams",
    "training_curves",
)
Drawing = Callable[[], "Picture | None"]
MIDDLE = 0.5  # pictures of one target show the one whose share is nearest to this


def write_all(
    table: pd.DataFrame, rows: Sequence[Row], routed: Sequence[Routed], left_out: list[LeftOut], out: Path
) -> list[Picture]:
    """Draw what there is data for. Accuracy of all runs; the rest of the first six with routes, or with a train.csv.

    table: the main table; rows: as read; routed: as `routed.load` gives them. Files that cannot be read go to left_out.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = _at_once(_all(table, rows, routed, left_out, out))
    return [picture for picture in drawn if picture]


def _at_once(drawings: Sequence[Drawing]) -> list[Picture | None]:
    """What each gives, in their order: side by side in processes, where the system can copy this one; no torch runs in them."""
    cores = len(processors())
    if cores == 1 or "fork" not in multiprocessing.get_all_start_methods():
        return [draw() for draw in drawings]
    quiet = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's to tell
    with ProcessPoolExecutor(min(cores, len(drawings)), multiprocessing.get_context("fork"), quiet) as pool:
        return [waiting.result() for waiting in [pool.submit(draw) for draw in drawings]]


def _all(
    table: pd.DataFrame, rows: Sequence[Row], routed: Sequence[Routed], left_out: list[LeftOut], out: Path
) -> list[Drawing]:
    """Every picture, yet to be drawn: files have been read, so left_out is complete."""
    from dynroute.report.pictures import accuracy, costs, images, routes, training

    runs = [list(part) for _, part in itertools.groupby(routed, key=_run)]
    varied = [run for run in runs if any(each.varied for each in run)]
    one = [_middle(run) for run in varied]
    heat = [each for each in one if routes.drawable_rates(each)]
    stored = [(each, found) for each in one if len(found := images.listed(each, left_out))]
    curves = [found for name, folder in _folders(rows) if len(found := training.read_curves(name, folder, left_out))]
    return [
        partial(accuracy.accuracy_flops, table, out),
        partial(accuracy.accuracy_latency, rows, out),
        partial(_limited, costs.flops_histogram, runs, out),
        partial(_limited, costs.cost_by_class, one, out),
        partial(_limited, routes.execution_rates, heat, out),
        partial(_limited, images.image_grid, stored, out),
        partial(_limited, routes.route_diagrams, one, out),
        partial(_limited, training.training_curves, curves, out),
    ]


def _run(routed: Routed) -> tuple[str, str]:
    """What the settings of one panel share; a limit on every image, or another checkpoint, is in the label."""
    return routed.row["routes_file"], routed.label


def _middle(run: list[Routed]) -> Routed:
    """The setting whose share is nearest to the middle, of those whose images do not all take one route."""
    return min((each for each in run if each.varied), key=lambda each: abs(each.row["macs_share"] - MIDDLE))


def _folders(rows: Sequence[Row]) -> list[tuple[str, Path]]:
    """Name and folder of each configuration's first run."""
    frame = one_run_each(rows)
    frame = frame[frame["folder"] != ""].drop_duplicates("folder")
    named = frame["label"] + ": " + frame["dataset"] + ", " + frame["backbone"]
    return [(str(name), Path(folder)) for name, folder in zip(named, frame["folder"], strict=True)]


def _limited(draw: Callable[[Any, Path], Picture], runs: Sequence[Any], out: Path) -> Picture | None:
    """The picture of the first few runs; its caption says how many it leaves out. None of no runs."""
    if not runs:
        return None
    picture = draw(runs[:MOST_PANELS], out)
    rest = len(runs) - MOST_PANELS
    more = f" {rest} more {'runs are' if rest > 1 else 'run is'} not drawn." if rest > 0 else ""
    return picture._replace(caption=picture.caption + more)
