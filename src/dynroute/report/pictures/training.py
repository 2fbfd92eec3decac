"""Training curves, out of train.csv: a line of panels for each run."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynroute.contracts import InputError
from dynroute.records import TRAIN_FILE, read_rows
from dynroute.report.pictures.style import COLOURS, Picture, finish, panels, shortened
from dynroute.report.read import LeftOut, reason_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

CURVES = ("loss", "calib_top1", "calib_share")
WORDS = (
    "Training curves",
    "A point an epoch. Left: the loss that was minimised, whose terms differ between phases. Right: accuracy and share of the "
    "dense net's FLOPs on the calibration split. Bands: phases, in their order",
)


def read_curves(run: str, folder: Path, left_out: list[LeftOut]) -> pd.DataFrame:
    """epoch, phase and CURVES of a run; empty where it has no train.csv (a cascade is not trained) or a broken one."""
    import pandas as pd

    file = folder / TRAIN_FILE
    columns = ["run", "epoch", "phase", *CURVES]
    if not file.exists():
        return pd.DataFrame(columns=columns)
    try:
        rows = read_rows(file)
        missing = [name for name in columns[1:] if rows and name not in rows[0]]
        if missing:
            raise InputError(f"lacks the columns {', '.join(missing)}: written by another version or program")
        table = pd.DataFrame(rows, columns=columns[1:]).replace("", None)
        return table.astype({"epoch": "int64", **dict.fromkeys(CURVES, "float64")}).assign(run=run)[columns]
    except (InputError, ValueError, TypeError) as error:
        reason = reason_of(error, file) if isinstance(error, InputError) else "has cells that are no numbers"
        left_out.append(LeftOut(file, f"{reason} (no training curve)"))
        return pd.DataFrame(columns=columns)


def training_curves(tables: Sequence[pd.DataFrame], out: Path) -> Picture:
    """Loss, accuracy and share by epoch, the phases marked; a run a table of `read_curves`."""
    import pandas as pd
    from matplotlib.ticker import MaxNLocator

    figure, axes = panels([1.6] * 2 * len(tables), 4.2, labels=0.7)
    titles = shortened([str(table["run"].iloc[0]) for table in tables], 50)
    told = []
    for line, (table, title) in enumerate(zip(tables, titles, strict=True)):
        left, right = axes[2 * line : 2 * line + 2]
        left.set_title(title)
        left.set_ylabel("loss")
        _curve(left, table, "loss", COLOURS[0], "o", "-")
        _curve(right, table, "calib_top1", COLOURS[1], "^", "-")
        _curve(right, table, "calib_share", COLOURS[2], "D", "--")
        right.set_ylim(0, 118)  # room for the names of phases
        right.set_yticks(range(0, 101, 20))
        left.margins(y=0.15)
        right.set_ylabel("%")
        for ax in (left, right):
            ax.set_xlabel("epoch")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            _phases(ax, table)
        told.append(
            f"{title}: {textwrap.shorten(', '.join(name for name, _, _ in phases(table)), 80, placeholder=' ...')}"
        )
    axes[1].legend(["top-1", "share of FLOPs"], frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1.0))
    words = (WORDS[0], f"{WORDS[1]} ({'; '.join(told)}).")
    return finish(figure, pd.concat(tables, ignore_index=True), "training_curves", words, out)


def phases(table: pd.DataFrame) -> list[tuple[str, int, int]]:
    """(name, first epoch, last epoch) of each phase, in order."""
    found: list[tuple[str, int, int]] = []
    pairs = zip(map(str, table["phase"]), map(int, table["epoch"]), strict=True)
    for name, epochs in itertools.groupby(pairs, key=lambda pair: pair[0]):
        numbers = [epoch for _, epoch in epochs]
        found.append((name, numbers[0], numbers[-1]))
    return found


def _curve(ax: Axes, table: pd.DataFrame, column: str, colour: str, marker: str, line: str) -> None:
    """Points are marked where they are few enough to be told apart; a loss is not joined over phases, whose losses differ."""
    look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1.3}
    look["markersize"] = 4 if len(table) <= 40 else 0
    spans = [(first, last) for _, first, last in phases(table)] if column == "loss" else [(0, len(table) + 1)]
    for first, last in spans:
        part = table[table["epoch"].between(first, last)]
        ax.plot(part["epoch"], part[column] if column == "loss" else 100 * part[column], **look)


def _phases(ax: Axes, table: pd.DataFrame) -> None:
    """Every second phase on a grey band; its name at the top where it fits."""
    first, last = int(table["epoch"].min()), int(table["epoch"].max())
    width = 3.4 / (last - first + 1)  # inches an epoch, roughly
    ax.set_xlim(first - 0.5, last + 0.5)
    for number, (name, start, end) in enumerate(phases(table)):
        if number % 2:
            ax.axvspan(start - 0.5, end + 0.5, color="0.93", linewidth=0, zorder=0)
        if (end - start + 1) * width > 0.075 * len(name) + 0.1:
            ax.annotate(
                name, (start - 0.5, 1), (2, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                va="top", fontsize=7, color="0.3",
            )  # fmt: skip
