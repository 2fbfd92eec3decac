"""Pool rows over seeds, set each beside the static nets of equal cost, and print the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynroute.contracts import InputError
from dynroute.records import EVAL_COLUMNS, NUMBERS
from dynroute.report.paired import Images, answers, paired, unpaired
from dynroute.report.read import BESIDE, LeftOut, Row, base_name, identity, reason_of

if TYPE_CHECKING:  # pandas and rich take a while to import, and most commands need neither
    import pandas as pd
    from rich.table import Table

STATIC = "static"
TOLERANCE = 0.02  # a target is reached when the share lies this near
SETTING = ["method", "backbone", "dataset", "identity", "flops_target"]
GROUP = [*SETTING, "control"]
PLACE = ["dataset", "backbone"]  # rows are comparable within one
LATENCY_SETTING = ["latency_batch", "latency_threads", "latency_device", "machine"]
COLUMNS = (
    *(
        "method",
        "label",
        "control",
        "backbone",
        "dataset",
        "flops_target",
        "macs_mean",
        "macs_share",
        "macs_p5",
        "macs_p95",
    ),
    *("router_share", "top1", "top1_std", "top5", "n_seeds", "n", "reached", "static_top1", "vs_static"),
    *("latency_ms_p50", "speedup", "epochs", "params", "seeds", "commits", "machine", "parts", "variant"),
    *("vs_static_low", "vs_static_high", "vs_routed", "vs_routed_low", "vs_routed_high"),
)
MEANS = ("macs_mean", "macs_share", "macs_p5", "macs_p95", "router_share", "top1", "top5", "epochs")
FLOPS = "FLOPs (multiply-adds)"


def build(rows: list[Row], left_out: list[LeftOut] | None = None) -> pd.DataFrame:
    """The main table: one line per method, setting and target, pooled over seeds. Columns: see COLUMNS.

    The controls made from a line's own routes (column control) stand under it.

    top1_std: sample standard deviation over seeds, empty for one. reached: share within 0.02 of the target.
    static_top1: see `add_static`. vs_static: top1 - static_top1, in points of a percent.
    """
    import pandas as pd

    frame = pd.DataFrame(rows, columns=[*EVAL_COLUMNS, *BESIDE]).astype(dict.fromkeys(NUMBERS, "float64"))
    frame["identity"] = [identity(row) for row in rows]
    groups = frame.groupby(GROUP, dropna=False, sort=True)
    table = pd.DataFrame([{**dict(zip(GROUP, key, strict=True)), **_pool(part)} for key, part in groups])
    table["label"] = labels(table)
    add_static(table)
    left_out = [] if left_out is None else left_out
    add_intervals(table, left_out)
    add_controls(table)
    table["other"] = table["method"] != STATIC  # sorts static first
    table["setting_share"] = table.groupby(SETTING, dropna=False)["macs_share"].transform("first")  # the net's own
    order = [*PLACE, "other", "method", "label", "setting_share", "flops_target", "identity", "control"]
    return table.sort_values(order, ignore_index=True)[list(COLUMNS)].astype({"n": "Int64", "params": "Int64"})


def empty() -> pd.DataFrame:
    """The main table of no runs."""
    import pandas as pd

    return pd.DataFrame(columns=list(COLUMNS))


def _pool(part: pd.DataFrame) -> dict[str, Any]:
    """One line of the table from the rows of its seeds."""
    target, share = part["flops_target"].iloc[0], part["macs_share"].mean()
    asked = target == target and not part["control"].iloc[0]  # nan: no target; controls are not asked to meet one
    same_clock = len(part[LATENCY_SETTING].drop_duplicates()) == 1  # times of two machines have no mean
    return {
        **{name: part[name].mean() for name in MEANS},
        "run": min(part["run"]),
        "top1_std": part["top1"].std(ddof=1),
        "n_seeds": len(part),
        "n": part["n"].min(),
        "params": part["params"].max(),
        "parts": part["parts"].iloc[0],
        "variant": part["variant"].iloc[0],
        "routes_file": part["routes_file"].iloc[0] if len(part) == 1 else "",
        "reached": bool(abs(share - target) <= TOLERANCE + 1e-9) if asked else None,
        "latency_ms_p50": part["latency_ms_p50"].mean() if same_clock else float("nan"),
        "speedup": part["speedup"].mean() if same_clock else float("nan"),
        "seeds": _join(f"{seed:.0f}" for seed in sorted(part["seed"])),
        "commits": _join(part["commit"]),
        "machine": _join(part["machine"]),
    }


def _join(words: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(word for word in words if word))


def labels(table: pd.DataFrame) -> list[str]:
    """The method, or where it was run in several configurations, the run's name less its seed."""
    places = [*PLACE, "method"]
    several = table.groupby(places)["identity"].transform("nunique") > 1
    first_run = table.groupby([*places, "identity"])["run"].transform("min").map(base_name)
    labels = first_run.where(several, table["method"])
    owners = table.assign(label=labels).groupby([*places, "label"])["identity"].transform("nunique")
    named = zip(labels, table["identity"], owners, strict=True)
    return [f"{label} {owner[:6]}" if count > 1 else label for label, owner, count in named]


def add_static(table: pd.DataFrame) -> None:
    """Add static_top1 and vs_static: what the static nets of the place reach at a routed row's cost."""
    table["static_top1"] = float("nan")
    for _, part in table.groupby(PLACE):
        shares, top1s = chord(part)
        routed = part[part["method"] != STATIC]
        table.loc[routed.index, "static_top1"] = [_on_chord(x, shares, top1s) for x in routed["macs_share"]]
    table["vs_static"] = 100 * (table["top1"] - table["static_top1"])


def add_intervals(table: pd.DataFrame, left_out: list[LeftOut]) -> None:
    """Add vs_static_low, vs_static_high: `paired` against the same static nets; single runs with routes.csv alone.

    A routes.csv that cannot be read gives no interval and is added to left_out.
    """
    table[["vs_static_low", "vs_static_high"]] = float("nan")
    files: dict[tuple[str, float], Images] = {}
    for _, part in table.groupby(PLACE):
        static = part[(part["method"] == STATIC) & (part["control"] == "")]
        best = static.sort_values("top1").drop_duplicates("macs_share", keep="last").sort_values("macs_share")
        routed = part[(part["control"] == "") & part["static_top1"].notna() & (part["routes_file"] != "")]
        for place, row in routed.iterrows():
            near = _neighbours(row["macs_share"], list(best["macs_share"]))
            others = [best.iloc[k] for k in near]
            images = [_images(each, files, left_out) for each in (row, *others)]
            difference = paired(images[0], images[1:], list(near.values()))
            if difference:
                table.loc[[place], ["vs_static_low", "vs_static_high"]] = [difference[1:]]


def _neighbours(share: float, shares: list[float]) -> dict[int, float]:
    """Places of the static nets on both sides of a share, with their weights on the straight line; beyond the ends one."""
    after = next((k for k, x in enumerate(shares) if x >= share), None)
    if after in (None, 0):
        return {0 if after == 0 else len(shares) - 1: 1.0}
    part = (share - shares[after - 1]) / (shares[after] - shares[after - 1])
    return {after - 1: 1 - part, after: part}


def _images(row: pd.Series[Any], files: dict[tuple[str, float], Images], left_out: list[LeftOut]) -> Images:
    """The answers of a row's routes.csv; none where it has none, or where it cannot be read, which is said in left_out."""
    target = row["flops_target"]
    key = (row["routes_file"], -1.0 if target != target else target)
    if key not in files:
        try:
            files[key] = answers(Path(key[0]), None if key[1] < 0 else target) if key[0] else {}
        except InputError as error:
            files[key] = {}
            said = LeftOut(Path(key[0]), f"{reason_of(error, Path(key[0]))} (no interval)")
            left_out += [said] if said not in left_out else []
    return files[key]


def add_controls(table: pd.DataFrame) -> None:
    """Add vs_routed to control rows: top1 of the routed row less theirs, in points, with `unpaired` ends (single runs).

    The answers of controls are not stored, so that the interval is wider than one paired over the images.
    """
    names = ["vs_routed", "vs_routed_low", "vs_routed_high"]
    table[names] = float("nan")
    for _, part in table.groupby(SETTING, dropna=False):
        own = part[part["control"] == ""].iloc[0]
        for place, row in part[part["control"] != ""].iterrows():
            known = own["n_seeds"] == row["n_seeds"] == 1 and own["n"] > 0 and row["n"] > 0
            made = unpaired(own["top1"], own["n"], row["top1"], row["n"]) if known else None
            table.loc[[place], names] = [made or (100 * (own["top1"] - row["top1"]), float("nan"), float("nan"))]


def chord(part: pd.DataFrame) -> tuple[list[float], list[float]]:
    """Shares and accuracies of a place's static nets; of two at one share the better, the harder control."""
    best: dict[float, float] = {}
    for share, top1 in part.loc[part["method"] == STATIC, ["macs_share", "top1"]].itertuples(index=False):
        best[share] = max(top1, best.get(share, top1))
    return sorted(best), [best[share] for share in sorted(best)]


def _on_chord(share: float, shares: list[float], top1s: list[float]) -> float:
    """Linear between the neighbouring static nets; a static net as near as a target must be met stands in beyond their ends.

    Farther out nan: an extrapolation is no measurement.
    """
    import numpy as np

    if not shares or not shares[0] - TOLERANCE <= share <= shares[-1] + TOLERANCE:
        return float("nan")
    return float(np.interp(share, shares, top1s))


CELLS: dict[str, Callable[[dict[Any, Any]], str]] = {
    "method": lambda r: r["method"],
    "run": lambda r: r["label"] if r["label"] != r["method"] else "",
    "control": lambda r: r["control"],
    "backbone": lambda r: r["backbone"],
    "dataset": lambda r: r["dataset"],
    "target": lambda r: _number(r["flops_target"], ".2f"),
    FLOPS: lambda r: _millions(r["macs_mean"]),
    "5-95 % of images": lambda r: _span(r["macs_p5"], r["macs_p95"]),
    "share": lambda r: _number(100 * r["macs_share"], ".1f", " %") + (" missed" if r["reached"] is False else ""),
    "top-1 %": lambda r: _accuracy(r["top1"], r["top1_std"], r["n_seeds"]),
    "seeds": lambda r: f"n={r['n_seeds']}",
    "vs static": lambda r: _versus(r["vs_static"]),
    "95 % interval": lambda r: _interval(r["vs_static_low"], r["vs_static_high"]),
    "routed less control": lambda r: _gain(r["vs_routed"], r["vs_routed_low"], r["vs_routed_high"]),
    "latency ms": lambda r: _number(r["latency_ms_p50"], ".2f"),
    "speed-up": lambda r: _number(r["speedup"], ".2f", "x"),
    "epochs": lambda r: _number(r["epochs"], "g"),
}
WORDS = frozenset({"method", "run", "control", "backbone", "dataset", "certainty"})  # aligned left, numbers right
TITLE = ("dataset", "backbone", "epochs")  # a terminal is narrow


def cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """The table as people read it: for each row a dict from header to text. Empty columns are left out."""
    rows = table.to_dict("records")
    shown = [{name: _one_line(cell(row)) for name, cell in CELLS.items()} for row in rows]
    filled = [name for name in CELLS if any(row[name] for row in shown)]
    return [{name: row[name] for name in filled} for row in shown]


def to_markdown(table: pd.DataFrame) -> str:
    """The table in GitHub's Markdown."""
    return markdown_table(cells(table))


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Cells in GitHub's Markdown."""
    from tabulate import tabulate

    body = [[text.replace("|", "\\|").replace("<", "&lt;") for text in row.values()] for row in rows]
    align = ["left" if name in WORDS else "right" for name in rows[0]]
    return tabulate(body, list(rows[0]), tablefmt="github", disable_numparse=True, colalign=align)


def to_latex(table: pd.DataFrame) -> str:
    """The table in LaTeX, for the package booktabs."""
    from tabulate import tabulate

    rows = cells(table)
    align = ["left" if name in WORDS else "right" for name in rows[0]]
    body = [list(row.values()) for row in rows]
    text = tabulate(body, list(rows[0]), tablefmt="latex_booktabs", disable_numparse=True, colalign=align)
    return f"% needs \\usepackage{{booktabs}}\n{text}\n"


def to_rich(table: pd.DataFrame) -> Table:
    """The table for the terminal: a rule between places; what is the same in all rows goes to the title."""
    rows = cells(table)
    places = [(row["dataset"], row["backbone"]) for row in rows]
    common = [name for name in TITLE if name in rows[0] and len({row[name] for row in rows}) == 1]
    title = ", ".join(f"{name} {rows[0][name]}" for name in common)
    screen = rich_table([{k: v for k, v in row.items() if k not in common} for row in rows], title)
    for screen_row, place, following in zip(screen.rows, places, [*places[1:], places[-1]], strict=True):
        screen_row.end_section = place != following
    return screen


def rich_table(rows: list[dict[str, str]], title: str) -> Table:
    """Cells for the terminal; names are only text, never markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    head = Text(title) if title else None
    screen = Table(title=head, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        screen.add_column(Text(name), justify="left" if name in WORDS else "right")
    for row in rows:
        screen.add_row(*(Text(text) for text in row.values()))
    return screen


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if value == value else ""


def _millions(macs: float) -> str:
    digits = ".0f" if macs >= 1e9 else ".2f" if macs >= 1e6 else "#.3g"  # tiny nets cost thousands, large ones billions
    return _number(macs / 1e6, digits, " M")


def _span(low: float, high: float) -> str:
    return f"{_millions(low).removesuffix(' M')} - {_millions(high)}" if low < high else ""


def _accuracy(mean: float, std: float, seeds: int) -> str:
    return f"{100 * mean:.2f}" + (f" +- {100 * std:.2f} ({seeds})" if seeds > 1 else "")


def _interval(low: float, high: float) -> str:
    return f"{low:+.2f} to {high:+.2f}" if low == low else ""


def _gain(points: float, low: float, high: float) -> str:
    """Marked where the routed row does not beat its control, be it for sure (the interval where there is one) or at all."""
    span = f" ({_interval(low, high)})" if low == low else ""
    return _number(points, "+.2f", span + (" not beaten" if (low if low == low else points) <= 0 else ""))


def _versus(points: float) -> str:
    note = " below static" if points < 0 else " level with static" if points == 0 else ""
    return _number(points, "+.2f", note)
