"""Pool rows over seeds, set each beside the static nets of equal cost, and print the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dynroute.records import EVAL_COLUMNS, NUMBERS
from dynroute.report import controls
from dynroute.report.controls import EQUAL, NARROWER, STATIC, TOLERANCE
from dynroute.report.read import BESIDE, LeftOut, Row, base_name, identity
from dynroute.report.timing import Clock, Taken

if TYPE_CHECKING:  # pandas and rich take a while to import, and most commands need neither
    import pandas as pd
    from rich.table import Table

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
    *("vs_static_low", "vs_static_high", "latency_ms", "latency_clock", "speedup", "epochs", "params"),
    *("parts", "variant", "trained_for", "runs", "seeds", "commits", "machine", "config_hash", "torch", "weights"),
)
MEANS = ("macs_mean", "macs_share", "macs_p5", "macs_p95", "router_share", "top1", "top5", "epochs")
FLOPS = "FLOPs (multiply-adds)"


class Tables(NamedTuple):
    """main: a line per method, setting and target, columns COLUMNS; lines: each beside its controls, see `controls.build`."""

    main: pd.DataFrame
    lines: pd.DataFrame


def build(rows: list[Row], left_out: list[LeftOut]) -> Tables:
    """The tables of rows that `read` found, pooled over seeds. A routes.csv that cannot be read is added to left_out.

    Rows of the controls made from a line's own routes (column control) stand under it.
    top1_std: sample standard deviation over seeds, empty for one. reached: share within 0.02 of the target.
    static_top1: top-1 of the narrower static nets of equal multiply-adds; vs_static: top1 less that, in points of a percent.
    latency_ms: per image in the mean, of the smallest batch and fewest threads that were timed, as latency_clock says.
    """
    table = pool(rows)
    lines = controls.build(table.to_dict("records"), left_out)  # type: ignore[arg-type]
    near = controls.at_equal_cost(lines)
    columns = ["static_top1", "vs_static", "vs_static_low", "vs_static_high"]
    table[columns] = near[["control_top1", "difference", "low", "high"]].set_axis(columns, axis=1)
    main = table.reindex(columns=list(COLUMNS)).astype({"n": "Int64", "params": "Int64"})
    return Tables(main, lines)


def pool(rows: list[Row]) -> pd.DataFrame:
    """Rows of one setting and several seeds as one, in the order in which they are shown."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=[*EVAL_COLUMNS, *BESIDE]).astype(dict.fromkeys(NUMBERS, "float64"))
    frame["identity"] = [identity(row) for row in rows]
    frame = frame.sort_values(["seed", "run"], kind="stable")  # sums of numbers depend on their order
    groups = frame.groupby(GROUP, dropna=False, sort=True)
    table = pd.DataFrame([{**dict(zip(GROUP, key, strict=True)), **_pool(part)} for key, part in groups])
    table["label"] = labels(table)
    table["other"] = table["method"] != STATIC  # sorts static first
    table["setting_share"] = table.groupby(SETTING, dropna=False)["macs_share"].transform("first")  # the net's own
    order = [*PLACE, "other", "method", "label", "setting_share", "flops_target", "identity", "control"]
    return table.sort_values(order, ignore_index=True)


def empty() -> Tables:
    """The tables of no runs."""
    import pandas as pd

    return Tables(pd.DataFrame(columns=list(COLUMNS)), pd.DataFrame(columns=list(controls.COLUMNS)))


def _pool(part: pd.DataFrame) -> dict[str, Any]:
    """One line of the table from the rows of its seeds."""
    target, share = part["flops_target"].iloc[0], part["macs_share"].mean()
    asked = target == target and not part["control"].iloc[0]  # nan: no target; controls are not asked to meet one
    first = part.iloc[0]
    return {
        **{name: part[name].mean() for name in MEANS},
        "run": min(part["run"]),
        "top1_std": part["top1"].std(ddof=1),
        "n_seeds": len(part),
        "n": part["n"].min(),
        "params": part["params"].max(),
        **{name: first[name] for name in ("parts", "variant", "trained_for", "flops_max", "checkpoint")},
        "routes_files": list(part["routes_file"]),
        "reached": bool(abs(share - target) <= TOLERANCE + 1e-9) if asked else None,
        **_times(part),
        "seeds": _join(f"{seed:.0f}" for seed in sorted(part["seed"])),
        "runs": _join(part["run"]),
        "commits": _join(part["commit"]),
        **{name: _join(part[name]) for name in ("machine", "config_hash", "torch", "weights")},
    }


def _times(part: pd.DataFrame) -> dict[str, Any]:
    """times: the mean over seeds by clock, of clocks that all of them know; and the first of these for the main table.

    Rows of before clocks were written have their stored time, where it is of one machine: times of two have no mean.
    """
    seeds: list[dict[Clock, Taken]] = list(part["times"])
    clocks = [clock for clock in sorted(seeds[0]) if all(clock in times for times in seeds)]
    times = {
        clock: Taken(*(sum(x) / len(seeds) for x in zip(*(t[clock] for t in seeds), strict=True))) for clock in clocks
    }
    same = len(part[LATENCY_SETTING].drop_duplicates()) == 1
    ms = part["latency_ms_mean"].fillna(part["latency_ms_p50"])
    stored = Taken(*(values.mean() if same else float("nan") for values in (ms, part["speedup"])))
    taken = times[clocks[0]] if clocks else stored
    return {
        "times": times,
        "latency_ms": taken.ms,
        "speedup": taken.speedup,
        "latency_clock": str(clocks[0]) if clocks else "",
    }


def _join(words: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(word for word in words if word))


def labels(table: pd.DataFrame) -> list[str]:
    """The method, or where it was run in several configurations, the run's name less its seed."""
    places = [*PLACE, "method"]
    several = table.groupby(places)["identity"].transform("nunique") > 1
    first_run = table.groupby([*places, "identity"])["run"].transform("min").map(base_name)
    labels = first_run.where(several, table["method"])
    made, how = zip(*map(_told_apart, table["identity"]), strict=True) if len(table) else ((), ())
    owners = table.assign(label=labels, made=made).groupby([*places, "label"])["made"].transform("nunique")
    named = zip(labels, made, how, owners, strict=True)
    return [" ".join(filter(None, [label, own[:6] if count > 1 else "", rest])) for label, own, rest, count in named]


def _told_apart(identity: str) -> tuple[str, str]:
    """What made a row, and how it was evaluated where that is not as usual: "max 0.6", "best"."""
    made, limit, best = re.fullmatch(r"(.*?)(?:-max([\d.]+))?(?:-(best))?", identity, re.DOTALL).groups()  # type: ignore[union-attr]
    return made, " ".join(filter(None, [f"max {limit}" if limit else "", best or ""]))


def chord(part: pd.DataFrame) -> tuple[list[float], list[float]]:
    """Shares and accuracies of a place's static nets, between which a routed row's control is read off: their frontier."""
    static = part.loc[part["method"] == STATIC, ["macs_share", "top1"]]
    best = controls.frontier([controls.Point(share, top1, {}) for share, top1 in static.itertuples(index=False)])
    return [point.cost for point in best], [point.top1 for point in best]


CELLS: dict[str, Callable[[dict[Any, Any]], str]] = {
    "method": lambda r: r["method"],
    "run": lambda r: r["label"] if r["label"] != r["method"] else "",
    "backbone": lambda r: r["backbone"],
    "dataset": lambda r: r["dataset"],
    "target": lambda r: _number(r["flops_target"], ".2f"),
    FLOPS: lambda r: _millions(r["macs_mean"]),
    "5-95 % of images": lambda r: _span(r["macs_p5"], r["macs_p95"]),
    "share": lambda r: _number(100 * r["macs_share"], ".1f", " %") + (" missed" if r["reached"] is False else ""),
    "top-1 %": lambda r: _accuracy(r["top1"], r["top1_std"], r["n_seeds"]),
    "seeds": lambda r: f"n={r['n_seeds']}",
    "vs static": lambda r: _versus(r["vs_static"], r["vs_static_low"]),
    "95 % interval": lambda r: _interval(r["vs_static_low"], r["vs_static_high"]),
    "latency ms": lambda r: _number(r["latency_ms"], ".2f"),
    "speed-up": lambda r: _number(r["speedup"], ".2f", "x"),
    "epochs": lambda r: _number(r["epochs"], "g"),
}
NOT_BEATEN = "not beaten"
WORDS = frozenset(
    {"method", "run", "backbone", "dataset", "certainty", "note", "at equal", "images"}
)  # aligned left, numbers right
TITLE = ("dataset", "backbone", "epochs", "seeds", "at equal", "images")  # a terminal is narrow, and so is a telephone


CONTROL_CELLS: dict[str, Callable[[dict[Any, Any]], str]] = {
    **{name: CELLS[name] for name in ("method", "run", "backbone", "dataset", "target", "top-1 %")},
    "at equal": lambda r: r["basis"],
    "cost": lambda r: _cost(r["cost"], r["basis"]),
}
OWN_LAST = ("shuffled", "random", "most_common")  # the columns of controls made from a row's own routes


def cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """The main table as people read it, without rows of controls: for each row a dict from header to text.

    Empty columns are left out.
    """
    own = table[table["control"] == ""].to_dict("records")
    return _filled([{name: cell(row) for name, cell in CELLS.items()} for row in own])


def control_cells(lines: pd.DataFrame) -> list[dict[str, str]]:
    """The table of controls as people read it: a row for each row of the main table and basis, a column for each control.

    A cell holds the difference to the control in points and half its interval; all else of a line stands in controls.csv.
    """
    found = list(dict.fromkeys(lines["control"]))
    order = [NARROWER, *sorted(set(found) - {NARROWER, *OWN_LAST}), *OWN_LAST]
    rows: dict[tuple[Any, str], dict[str, str]] = {}
    kinds: dict[tuple[Any, str], list[str]] = {}
    for place, line in zip(lines.index, lines.to_dict("records"), strict=True):
        at = (place, line["basis"])
        if at not in rows:
            rows[at] = {name: cell(line) for name, cell in CONTROL_CELLS.items()} | dict.fromkeys(order, "")
        rows[at][line["control"]] = _against(line)
        kinds.setdefault(at, []).append(line["interval"])
    return _filled([row | {"images": " and ".join(sorted(set(filter(None, kinds[at]))))} for at, row in rows.items()])


def _filled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each cell on one line; columns that are empty in all rows are left out."""
    filled = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    return [{name: _one_line(row[name]) for name in filled} for row in rows]


def to_markdown(rows: list[dict[str, str]]) -> str:
    """Cells in GitHub's Markdown; what is the same in all rows is said once, above them."""
    common, rows = without_common(rows)
    return (f"All rows: {_escaped(common)}.\n\n" if common else "") + markdown_table(rows)


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Cells in GitHub's Markdown."""
    from tabulate import tabulate

    body = [[_escaped(text) for text in row.values()] for row in rows]
    align = ["left" if name in WORDS else "right" for name in rows[0]]
    return tabulate(body, list(rows[0]), tablefmt="github", disable_numparse=True, colalign=align)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


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
    title, rows = without_common(rows)
    screen = rich_table(rows, title)
    for screen_row, place, following in zip(screen.rows, places, [*places[1:], places[-1]], strict=True):
        screen_row.end_section = place != following
    return screen


def without_common(rows: list[dict[str, str]]) -> tuple[str, list[dict[str, str]]]:
    """What all rows have in common, as a title, and the rows without it."""
    common = [name for name in TITLE if rows and name in rows[0] and len({row[name] for row in rows}) == 1]
    title = ", ".join(f"{name} {rows[0][name]}" for name in common)
    return title, [{k: v for k, v in row.items() if k not in common} for row in rows]


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


def _versus(points: float, low: float) -> str:
    """Marked where the routed row does not beat its control, be it for sure (the interval where there is one) or at all."""
    return _number(points, "+.2f", f" {NOT_BEATEN}" if (low if low == low else points) <= 0 else "")


def _against(line: Mapping[Any, Any]) -> str:
    """A row beside one control: +1.11 +- 0.93, with what else must be known."""
    half = _number((line["high"] - line["low"]) / 2, ".2f")
    words = f"{line['difference']:+.2f}" + (f" +- {half}" if half else "")
    words += "" if line["relation"] == EQUAL else f", {line['relation']}"
    return words if line["beaten"] else f"{words} {NOT_BEATEN}"


def _cost(cost: float, basis: str) -> str:
    return f"{100 * cost:.1f} %" if basis == controls.FLOPS else f"{cost:.3g} ms"
