"""Accuracy against FLOPs and against latency, one panel per dataset, backbone and dense net."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynroute.report import papers, recipes
from dynroute.report.controls import as_trained
from dynroute.report.pictures.style import SHARE_AXIS, Look, Picture, finish, looks, panels, series_name, shortened
from dynroute.report.read import Row
from dynroute.report.tables import PLACE, STATIC, chord, pool
from dynroute.report.timing import CLOCKS, Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

DENSE = [*PLACE, "macs_dense"]  # shares are of these multiply-adds: nets of two widths share no axis
FLOPS_COLUMNS = [*DENSE, "series", "flops_target", "share", "share_p5", "share_p95", "top1", "top1_std", "n_seeds"]
CLOCK = list(Clock._fields)
TIME_COLUMNS = [*PLACE, *CLOCK, "series", "flops_target", "latency_ms", "speedup", "top1", "n_seeds"]
LINE = 0.2  # inches of a line of the legend
MOST_CLOCKS = 8  # panels of accuracy against latency
REPORTED = ", reported"
FLOPS_WORDS = (
    "Accuracy against FLOPs (multiply-adds)",
    "Upright bars: standard deviation over seeds. Thin level bars: what the images from the 5th to the 95th percentile of cost "
    "take. Dashed: straight lines between the static nets that no cheaper one matches.",
)
PAPER_WORDS = " Hollow: as reported in the papers for the same backbone and dataset, not run here."
TIME_WORDS = (
    "Accuracy against latency",
    "Mean milliseconds an image, each net in its fastest form, on the machine, batch size and threads over each panel. "
    "Dashed: straight lines between static nets that no faster one matches.",
)


def flops_points(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind accuracy against FLOPs. share_p5, share_p95: the cost of the images at those percentiles.

    Controls are left out: they are no points of their method's curve. Reported points stand after ours, their n_seeds is 0.
    """
    import pandas as pd

    table = table[table["control"] == ""]
    dense = table["macs_mean"] / table["macs_share"]
    drawn = table.assign(
        macs_dense=[float(f"{macs:.4g}") for macs in dense],
        series=_series(table),
        share=table["macs_share"],
        share_p5=table["macs_p5"] / dense,
        share_p95=table["macs_p95"] / dense,
    )
    places = drawn[DENSE].drop_duplicates().to_dict("records")
    reported = []
    for row in _reported(table):
        there = [place for place in places if all(row[name] == place[name] for name in PLACE)]
        # of several dense nets beside that which is most like theirs
        there.sort(key=lambda place, macs=row["macs_dense"]: abs(float(place["macs_dense"]) - macs))  # type: ignore[misc]
        reported += [row | place for place in there[:1]]
    ours = drawn[[*FLOPS_COLUMNS, "method"]]
    return pd.concat([ours, pd.DataFrame(reported, columns=ours.columns)], ignore_index=True) if reported else ours


def _series(table: pd.DataFrame) -> list[str]:
    """What each row belongs to. A static net under a target of after its training is no point of the static nets' line."""
    named = zip(table["method"], table["label"], as_trained(table), strict=True)
    return [
        f"{label}, set after training" if method == STATIC and not trained else series_name(method, label)
        for method, label, trained in named
    ]


def _reported(table: pd.DataFrame) -> list[Row]:
    """Rows of the papers with both an error and a share, each once, under our names of backbones."""
    found: dict[tuple[Any, ...], Row] = {}
    for paper in papers.paper_table(["all"], table.iloc[:0]):
        for row in paper.rows:
            error, share = row["reported_top1_error_pct"], row["reported_share_pct"]
            if error is None or share is None:
                continue
            parts = f" N={row['sub_blocks']:g}" if row["sub_blocks"] else ""
            values = {
                "dataset": row["dataset"],
                "backbone": recipes.backbone(row),
                "series": f"{row['method']}{parts}{REPORTED}",
                "flops_target": row["target"],
                "share": share / 100,
                "top1": 1 - error / 100,
                "n_seeds": 0,
                "method": papers.OURS.get(row["method"], row["method"]),
                "macs_dense": recipes.DENSE_MACS.get(f"{row['backbone']}/{row['dataset']}", 0.0),
            }
            found.setdefault(tuple(values.values()), values)
    return list(found.values())


def accuracy_flops(table: pd.DataFrame, out: Path) -> Picture:
    """Fig. 4 of DMNN: any number of methods, the static nets as a line, the papers' points hollow."""
    data = flops_points(table)
    words = (FLOPS_WORDS[0], FLOPS_WORDS[1] + (PAPER_WORDS if (data["n_seeds"] == 0).any() else ""))
    return _picture(data, FLOPS_COLUMNS, DENSE, _flops_panel, "accuracy_flops", words, out)


def time_points(rows: Sequence[Row]) -> pd.DataFrame:
    """The numbers behind accuracy against latency: a row for each setting and clock, means over seeds. No controls."""
    import pandas as pd

    timed: list[Row] = []
    pooled = pool(list(rows)) if any(row["times"] for row in rows) else pd.DataFrame()
    named = zip(pooled.to_dict("records"), _series(pooled), strict=True) if len(pooled) else ()
    for row, series in named:
        if row["control"] == "":
            own = {str(k): row[k] for k in (*PLACE, "method", "flops_target", "top1", "n_seeds")}
            own["series"] = series
            times = row["times"].items()
            timed += [
                {**own, **clock._asdict(), "latency_ms": took.ms, "speedup": took.speedup} for clock, took in times
            ]
    table = pd.DataFrame(timed, columns=[*TIME_COLUMNS, "method"])
    return table.sort_values([*PLACE, *CLOCK], kind="stable", ignore_index=True)


def accuracy_latency(rows: Sequence[Row], out: Path) -> Picture | None:
    """As Fig. 4, over milliseconds; a panel for each way of timing, the first eight. None where nothing was timed."""
    data = time_points(rows)
    clocks = data[[*PLACE, *CLOCK]].drop_duplicates()
    if len(data) == 0:
        return None
    shown = data.merge(clocks.iloc[:MOST_CLOCKS])
    rest = len(clocks) - MOST_CLOCKS
    words = (TIME_WORDS[0], TIME_WORDS[1] + (f" {rest} more ways of timing are not drawn." if rest > 0 else ""))
    return _picture(shown, TIME_COLUMNS, [*PLACE, *CLOCK], _time_panel, "accuracy_latency", words, out)


def _picture(
    data: pd.DataFrame,
    columns: list[str],
    by: list[str],
    draw: Callable[[Axes, pd.DataFrame, dict[str, Look]], None],
    name: str,
    words: tuple[str, str],
    out: Path,
) -> Picture:
    """A panel for each value of `by`, one legend at the side."""
    places = list(data.groupby(by, dropna=False))
    several = data.groupby(by, dropna=False).ngroups > data.groupby(PLACE, dropna=False).ngroups
    styles = _styles(data)
    short = shortened(list(styles))
    figure, axes = panels([2.5] * len(places), 4.6, extra=0.7 + 0.075 * max(map(len, short)))
    for ax, (place, part) in zip(axes, places, strict=True):
        ax.set_title(_title(by, place, several))
        ax.set_ylabel("top-1, %")
        ax.grid()
        ax.margins(0.06, 0.08)
        draw(ax, part, styles)
    room = int(figure.get_figheight() / LINE) - 1
    named = list(zip(styles.items(), short, strict=True))[: room if len(styles) > room else None]
    handles = [_handle(look, series) for (series, look), _ in named]
    names = [name for _, name in named]
    if len(styles) > len(named):
        handles, names = (
            [*handles, _handle(Look("none", "", "none"), "")],
            [*names, f"and {len(styles) - len(named)} more"],
        )
    figure.legend(handles, names, loc="outside right upper", frameon=False, handlelength=3)
    return finish(figure, data[columns], name, words, out)


def _title(by: list[str], place: Any, several: bool) -> str:
    """Dataset and backbone, and below how it was timed, or of which dense net shares are, where there are several."""
    told = dict(zip(by, place, strict=True))
    title = ", ".join(str(told[k]) for k in PLACE)
    if "batch" not in told:
        return f"{title}\nof {told['macs_dense'] / 1e6:.4g} M multiply-adds" if several else title
    threads = f"{told['threads']} thread" + ("s" if told["threads"] > 1 else "")
    kind = "" if told["dtype"] == "fp32" else f", {told['dtype']}"
    machine = re.sub(r", \d+ threads$", "", told["machine"]) or told["device"]
    clock = CLOCKS.get(told["clock"], "")
    return f"{title}\nbatch {told['batch']}, {threads}{kind}, {clock}".rstrip(", ") + f"\n{shortened([machine], 44)[0]}"


def _styles(data: pd.DataFrame) -> dict[str, Look]:
    """Ours first; a reported series takes the colour and marker of ours of the same method, if there is one."""
    ours = data[data["n_seeds"] > 0]
    styles = looks(ours["series"])
    reported = data[data["n_seeds"] == 0].drop_duplicates("series").sort_values("series")
    free = iter(looks(str(i) for i in range(len(styles), len(styles) + len(reported) + 40)).values())
    taken = {look.marker for look in styles.values()}
    used: set[str] = set()
    for series, method in reported[["series", "method"]].itertuples(index=False):
        same = next(
            (styles[name] for name, m in ours[["series", "method"]].itertuples(index=False) if m == method), None
        )
        if same is None or same.marker in used:
            marker = next((look.marker for look in free if look.marker not in taken | used), "o")
            same = Look(same.colour if same else "0.35", marker, "none")
        used.add(same.marker)
        styles[series] = same._replace(line="none")
    return styles


def _handle(look: Look, name: str) -> Any:
    from matplotlib.lines import Line2D

    line = look._replace(line="--") if name == STATIC else look
    return Line2D([], [], **_edges(look, name), **line.options())


def _edges(look: Look, name: str) -> dict[str, Any]:
    """Hollow where reported; else a white rim sets markers apart."""
    if name.endswith(REPORTED):
        return {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.2}
    return {"markeredgecolor": "white", "markeredgewidth": 0.4}


def _flops_panel(ax: Axes, part: pd.DataFrame, styles: dict[str, Look]) -> None:
    """Joined markers; upright bars: std over seeds; thin level bars: 5th to 95th percentile of image cost."""
    ax.set_xlabel(SHARE_AXIS)
    ours = part[part["n_seeds"] > 0]
    static = ours[ours["series"] == STATIC]
    _chord(ax, *chord(static["share"], static["top1"]))
    for series, rows in part.groupby("series"):
        name, rows = str(series), rows.sort_values("share")
        look, x, y = styles[name], 100 * rows["share"], 100 * rows["top1"]
        std = 100 * rows["top1_std"].fillna(0) if (rows["n_seeds"] > 1).any() else None
        ax.errorbar(x, y, yerr=std, capsize=4, elinewidth=1, **_edges(look, name), **look.options())
        spread = rows[rows["share_p5"] < rows["share_p95"]]
        ends = 100 * spread["share_p5"], 100 * spread["share_p95"]
        ax.hlines(100 * spread["top1"], *ends, color=look.colour, linewidth=0.7, alpha=0.55, zorder=1)


def _time_panel(ax: Axes, part: pd.DataFrame, styles: dict[str, Look]) -> None:
    ax.set_xlabel("latency, ms an image (mean)")
    static = part[part["series"] == STATIC]
    _chord(ax, *chord(static["latency_ms"] / 100, static["top1"]))
    for series, rows in part.groupby("series"):
        name, rows = str(series), rows.sort_values("latency_ms")
        ax.plot(rows["latency_ms"], 100 * rows["top1"], **_edges(styles[name], name), **styles[name].options())


def _chord(ax: Axes, x: list[float], y: list[float]) -> None:
    """The line between static nets; both given as parts of one."""
    ax.plot([100 * v for v in x], [100 * v for v in y], color="black", linestyle="--", linewidth=1.2, zorder=2)
