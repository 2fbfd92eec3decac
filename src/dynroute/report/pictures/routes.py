"""Which parts run: a heat map over classes, and the routes of single images. Each run at one target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynroute.report.pictures.style import COLOURS, RATES, Picture, finish, headings, panels, shortened
from dynroute.report.routed import Routed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MOST_CLASSES = 20  # rows of a heat map where there are no superclasses
MOST_PARTS = 64  # columns of a heat map; above it a unit's parts are one column
RATE_WORDS = (
    "Which parts run for which classes",
    "How many of the test images of each superclass (of each class where there are none) run each part of each unit (in nets of "
    f"more than {MOST_PARTS} parts: the mean of a unit's); 1: all of them. Units from input to output.",
)
ROUTE_WORDS = (
    "The routes of three images",
    "The cheapest, the median and the dearest test image of each run (the first of equals). Units from input to output; "
    "a filled box is a part that runs, a hollow one is skipped.",
)
EXAMPLES = (("cheapest", 0.0), ("median", 0.5), ("dearest", 1.0))


def drawable_rates(routed: Routed) -> bool:
    """Whether the run has classes few enough, or superclasses, for the heat map."""
    return "superclass" in routed.images or routed.images["label"].nunique() <= MOST_CLASSES


def rates(routed: Routed) -> pd.DataFrame:
    """Long table of the heat map: group, unit, part (empty where a unit's parts are one column), rate."""
    column, names = ("superclass", routed.superclasses) if "superclass" in routed.images else ("label", routed.classes)
    wide = routed.rate_by(column)
    setting = {"run": routed.label, "flops_target": routed.row["flops_target"], "by": column.replace("label", "class")}
    table = wide.rename_axis(index="number").melt(ignore_index=False, value_name="rate").reset_index()
    if sum(routed.parts) > MOST_PARTS:
        table = table.groupby(["unit", "number"], as_index=False)["rate"].mean().assign(part=None)
    table = table.sort_values(["number", "unit", "part"], ignore_index=True).assign(**setting)
    table["group"] = [names.get(number, f"{setting['by']} {number}") for number in table["number"]]
    table["unit_name"] = [routed.units[unit] for unit in table["unit"]]
    return table[["run", "flops_target", "by", "number", "group", "unit", "unit_name", "part", "rate"]]


def execution_rates(runs: Sequence[Routed], out: Path) -> Picture:
    """Fig. 7 of DMNN: execution rate of each sub-block for each superclass, as a heat map."""
    import pandas as pd

    tables = [rates(routed) for routed in runs]
    heights = [0.17 * max(table["number"].nunique(), 4) for table in tables]
    figure, axes = panels(heights, 4.4, labels=1.5, extra=0.6)
    for ax, table, routed, title in zip(axes, tables, runs, headings(runs), strict=True):
        ax.set_title(title)
        _heat(ax, table, routed)
    colours = axes[0].collections[0]
    figure.colorbar(colours, ax=axes, label="share of the images that run it", fraction=0.04, aspect=30)
    return finish(figure, pd.concat(tables, ignore_index=True), "execution_rates", RATE_WORDS, out)


def _heat(ax: Axes, table: pd.DataFrame, routed: Routed) -> None:
    wide = table.assign(part=table["part"].fillna(0)).pivot(index="number", columns=["unit", "part"], values="rate")
    names = table.drop_duplicates("number").sort_values("number")["group"]
    widths = wide.columns.get_level_values("unit").value_counts().sort_index()
    # a unit is as wide as any other, its parts share that
    edges = [u + g / width for u, width in enumerate(widths) for g in range(width)] + [len(widths)]
    ax.pcolormesh(edges, range(len(wide) + 1), wide.to_numpy(), cmap=RATES, vmin=0, vmax=1)
    if len(routed.units) <= MOST_CLASSES:
        ax.vlines(range(len(widths) + 1), 0, len(wide), color="white", linewidth=1.5)
        ax.hlines(range(len(wide)), 0, len(widths), color="white", linewidth=0.4)
    ax.set_yticks([y + 0.5 for y in range(len(wide))], shortened(list(names), 22), fontsize=8 if len(wide) < 30 else 6)
    ax.invert_yaxis()
    _unit_axis(ax, routed)


def _unit_axis(ax: Axes, routed: Routed) -> None:
    """Names upright where they fit, else every so many units their number."""
    count = len(routed.units)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if count <= MOST_CLASSES:
        ax.set_xticks([u + 0.5 for u in range(count)], shortened(list(routed.units), 16), rotation=90, fontsize=8)
    else:
        step = -(-count // MOST_CLASSES)
        ax.set_xticks([u + 0.5 for u in range(0, count, step)], [str(u + 1) for u in range(0, count, step)], fontsize=8)
        ax.set_xlabel("unit")


def examples(routed: Routed) -> pd.DataFrame:
    """The cheapest, the median and the dearest image; of equals the first of the split, for the median the one in the middle."""
    images = routed.images
    ordered = images.sort_values(["macs", "index"])
    last = images.sort_values(["macs", "index"], ascending=[False, True])
    rows = [ordered.iloc[0], ordered.iloc[(len(ordered) - 1) // 2], last.iloc[0]]
    table = type(images)(rows).reset_index(drop=True)
    setting = {"run": routed.label, "flops_target": routed.row["flops_target"], "image": [name for name, _ in EXAMPLES]}
    names = {f"{k}_name": [routed.classes.get(v, f"class {v}") for v in table[k]] for k in ("label", "predicted")}
    return table.assign(**setting, **names)


def route_diagrams(runs: Sequence[Routed], out: Path) -> Picture:
    """The way of one image through the net: units as columns, parts as boxes."""
    import pandas as pd

    tables = [examples(routed) for routed in runs]
    heights = [0.14 * max(max(routed.parts), 2) for routed in runs for _ in EXAMPLES]
    figure, axes = panels(heights, 3.0, labels=1.25, columns=3)
    titles = [title.replace("\n", ": ") for title in headings(runs)]
    for line, (table, routed, title) in enumerate(zip(tables, runs, titles, strict=True)):
        for ax, (_, image) in zip(axes[3 * line :], table.iterrows(), strict=False):
            _diagram(ax, routed, image)
        axes[3 * line].annotate(
            title, (0, 1), (0, 30), xycoords="axes fraction", textcoords="offset points", fontweight="bold"
        )
    columns = ["run", "flops_target", "image", "index", "label", "label_name", "predicted", "predicted_name"]
    data = pd.concat(tables, ignore_index=True)[[*columns, "loss", "macs", "share", "route"]]
    return finish(figure, data, "route_diagrams", ROUTE_WORDS, out)


def _diagram(ax: Axes, routed: Routed, image: pd.Series[Any]) -> None:
    from matplotlib.collections import PolyCollection

    keep_UG = routed.keep_RUG[image["code"]]
    boxes = [(u, g, keep_UG[u, g]) for u, parts in enumerate(routed.parts) for g in range(parts)]
    corners = [[(u + 0.1, g + 0.1), (u + 0.9, g + 0.1), (u + 0.9, g + 0.9), (u + 0.1, g + 0.9)] for u, g, _ in boxes]
    faces = [COLOURS[0] if kept else "white" for _, _, kept in boxes]
    thin = 0.8 if len(routed.parts) <= MOST_CLASSES else 0.4
    ax.add_collection(PolyCollection(corners, facecolors=faces, edgecolors="0.25", linewidths=thin))
    ax.set_xlim(0, len(routed.parts))
    ax.set_ylim(0, max(routed.parts))
    ax.set_yticks([])
    _unit_axis(ax, routed)
    label, predicted = shortened([image["label_name"], image["predicted_name"]], 17)
    answer = "right" if image["label"] == image["predicted"] else f"taken for {predicted}"
    told = f"{image['image']}: {100 * image['share']:.1f} % of FLOPs\n{label}, {answer}"
    ax.set_title(told, fontweight="normal", fontsize=8)
