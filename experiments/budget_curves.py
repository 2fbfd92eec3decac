"""One net for any budget, a net for each budget, and the dial alone on a net of one budget, beside the static nets.

    python experiments/budget_curves.py [experiments/results/budget] [--out FOLDER]

Reads METHOD_any.csv, METHOD_any4.csv (each image at four budgets in a step), METHOD_40.csv, METHOD_60.csv, METHOD_80.csv,
METHOD_60x4.csv (as many passes at one budget) and static_*.csv as `make budget` leaves them, and writes budget.csv (a row a
point; any_vs_each: top-1 of METHOD_any or METHOD_any4 less that of the net of the same target, in points of a percent;
any_vs_each4: less that of the net of as many passes), budget.png and budget.svg.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dynroute.contracts import InputError
from dynroute.records import read_eval
from dynroute.report.pictures.style import COLOURS, MARKERS, SHARE_AXIS, STYLE, finish

METHODS = {"dmnn": "DMNN", "rnp": "RNP"}
TARGETS = (0.4, 0.6, 0.8)
MIDDLE = 0.6  # of the net whose dial alone is turned
SERIES = {
    "any": "one net for any budget",
    "each": "a net for each budget",
    "dial": f"the dial of the net for {MIDDLE}",
    "any4": "one net, four budgets an image",
    "each4": f"a net for {MIDDLE}, four passes",
}
ANY = ("any", "any4")
COLUMNS = ("method", "series", "run", "flops_target", "macs_share", "top1", "n", "any_vs_each", "any_vs_each4")
Point = dict[str, Any]


def rows_of(folder: Path, name: str) -> list[Point]:
    """A run's own test rows, last checkpoint, without a limit on every image; none where it has not been evaluated."""
    path = folder / f"{name}.csv"
    rows = read_eval(path) if path.exists() else []
    own = [r for r in rows if r["split"] == "test" and not r["control"] and r["flops_max"] is None]
    return [r for r in own if r["checkpoint"] in ("", "last")]


def points(folder: Path) -> list[Point]:
    """Every point of the picture, series by series."""
    made: list[Point] = []

    def add(method: str, series: str, rows: list[Point]) -> None:
        made.extend({**row, "method": method, "series": series} for row in rows)

    for path in sorted(folder.glob("static_*.csv")):
        add("static", "static", rows_of(folder, path.stem))
    for method in METHODS:
        for series in ANY:
            add(method, series, [r for r in rows_of(folder, f"{method}_{series}") if r["flops_target"] is not None])
        for target in TARGETS:
            own = rows_of(folder, f"{method}_{100 * target:.0f}")
            add(method, "each", [r for r in own if r["flops_target"] == target])
        fourfold = rows_of(folder, f"{method}_{100 * MIDDLE:.0f}x4")
        add(method, "each4", [r for r in fourfold if r["flops_target"] == MIDDLE])
        own = rows_of(folder, f"{method}_{100 * MIDDLE:.0f}")
        add(method, "dial", [r for r in own if r["flops_target"] is not None])
    for name, single, several in (("any_vs_each", "each", ANY), ("any_vs_each4", "each4", ANY[1:])):
        alone = {(p["method"], p["flops_target"]): p["top1"] for p in made if p["series"] == single}
        for point in made:
            other = alone.get((point["method"], point["flops_target"])) if point["series"] in several else None
            point[name] = None if other is None else round(100 * (point["top1"] - other), 4)
    return sorted(made, key=lambda p: (p["method"], p["series"], p["macs_share"]))


def draw(made: list[Point], out: Path) -> list[Path]:
    """A panel for each method, the static nets in both."""
    import matplotlib
    import pandas as pd
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(METHODS), 3.8), layout="constrained")
        axes = figure.subplots(1, len(METHODS), sharey=True, squeeze=False)[0]
        for ax, (method, title) in zip(axes, METHODS.items(), strict=True):
            ax.set_title(title, loc="left", fontweight="bold")
            ax.set_xlabel(SHARE_AXIS)
            ax.grid(color="0.9", linewidth=0.6)
            static = [p for p in made if p["series"] == "static"]
            if static:
                ax.plot(*_xy(static), color="black", marker="s", linestyle="--", label="a static net of each width")
            for place, (series, label) in enumerate(SERIES.items()):
                own = [p for p in made if (p["method"], p["series"]) == (method, series)]
                if not own:
                    continue
                line = "none" if series.startswith("each") else "-"
                ax.plot(*_xy(own), color=COLOURS[place], marker=MARKERS[place], linestyle=line, label=label)
            ax.legend(frameon=False, fontsize=8, loc="lower right")
        axes[0].set_ylabel("top-1, %")
        table = pd.DataFrame([{name: point[name] for name in COLUMNS} for point in made])
        return finish(figure, table, "budget", ("one net for any budget", ""), out).files


def _xy(own: list[Point]) -> tuple[list[float], list[float]]:
    return [100 * p["macs_share"] for p in own], [100 * p["top1"] for p in own]


def main(words: list[str] | None = None) -> int:
    """Write the table and the pictures; prints how far the one net is from the net of each budget."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("experiments/results/budget"))
    parser.add_argument("--out", type=Path, help="[FOLDER_comparison]")
    given = parser.parse_args(words)
    out = given.out or given.folder.with_name(f"{given.folder.name}_comparison")
    try:
        made = points(given.folder)
        if not made:
            raise InputError(f"{given.folder} holds no rows of `make budget`")
        out.mkdir(parents=True, exist_ok=True)
    except InputError as error:
        print(f"budget_curves.py: {error}", file=sys.stderr)
        return 2
    for point in made:
        told = [f"{name} {point[name]:+.2f} points" for name in COLUMNS[-2:] if point[name] is not None]
        if told:
            print(f"{point['run']} at {point['flops_target']:g}: {', '.join(told)}")
    for path in draw(made, out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
