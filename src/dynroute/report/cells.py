"""Tables as people read them: numbers as texts, then Markdown, LaTeX and the terminal. A row is a dict from header to text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dynroute.report.controls import EQUAL, FLOPS, NARROWER

if TYPE_CHECKING:  # pandas and rich take a while to import, and most commands need neither
    import pandas as pd
    from rich.table import Table

MACS = "FLOPs (multiply-adds)"
CELLS: dict[str, Callable[[dict[Any, Any]], str]] = {
    "method": lambda r: r["method"],
    "run": lambda r: r["label"] if r["label"] != r["method"] else "",
    "backbone": lambda r: r["backbone"],
    "dataset": lambda r: r["dataset"],
    "target": lambda r: _number(r["flops_target"], ".2f"),
    MACS: lambda r: _millions(r["macs_mean"]),
    "5-95 % of images": lambda r: _span(r["macs_p5"], r["macs_p95"]),
    "share": lambda r: _number(100 * r["macs_share"], ".1f", " %") + (" missed" if r["reached"] is False else ""),
    "top-1 %": lambda r: _accuracy(r["top1"], r["top1_std"], r["n_seeds"]),
    "seeds": lambda r: f"n={r['n_seeds']}",
    "vs static": lambda r: _versus(r["vs_static"], r["vs_static_low"]),
    "95 % interval": lambda r: _interval(r["vs_static_low"], r["vs_static_high"], r["vs_static_interval"]),
    "latency ms": lambda r: _number(r["latency_ms"], ".2f"),
    "speed-up": lambda r: _number(r["speedup"], ".2f", "x"),
    "epochs": lambda r: _number(r["epochs"], "g"),
}
NOT_BEATEN = "not beaten"
LOST = " x"  # ends a cell of a control that is not beaten: there are too many of them for words
# aligned left, numbers right
WORDS = frozenset({"method", "run", "backbone", "dataset", "certainty", "note", "at equal", "interval"})
# said once where all rows share them: a terminal is narrow, and so is a telephone
TITLE = ("dataset", "backbone", "epochs", "seeds", "at equal", "interval")
CONTROL_CELLS: dict[str, Callable[[dict[Any, Any]], str]] = {
    **{name: CELLS[name] for name in ("method", "run", "backbone", "dataset", "target", "top-1 %")},
    "at equal": lambda r: r["basis"],
    "cost": lambda r: _cost(r["cost"], r["basis"]),
}
GAP = 3  # spaces between columns on a terminal
PAIRED = ", p: "  # between the kinds of intervals in a row; the second is "paired"
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
    columns = [NARROWER, *sorted(set(lines["control"]) - {NARROWER, *OWN_LAST}), *OWN_LAST]
    rows = []
    for _, part in lines.groupby([lines.index, lines["basis"]], sort=False):
        beside = part.to_dict("records")
        kinds = sorted({line["interval"] for line in beside if line["interval"]})
        known = {name: cell(beside[0]) for name, cell in CONTROL_CELLS.items()}
        known["interval"] = PAIRED.join(kinds)
        told = {line["control"]: _against(line, len(kinds) > 1) for line in beside}
        rows.append(known | {_heading(name): told.get(name, "") for name in columns})
    return _filled(rows)


def _heading(control: str) -> str:
    """The column of a control: its name, which a file may have as it likes."""
    name = _one_line(control)
    return f"{name} (control)" if name in (*CONTROL_CELLS, "interval") else name


def fitting(rows: list[dict[str, str]], width: int) -> Iterator[list[dict[str, str]]]:
    """The table of controls in as many tables as a terminal of that width needs, each with all that says what its rows are."""
    fixed = [name for name in rows[0] if name in (*CONTROL_CELLS, "interval")]
    sizes = {name: GAP + max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    taken, room = list[str](), width - sum(sizes[name] for name in fixed)
    for name in [name for name in rows[0] if name not in fixed]:
        if taken and sizes[name] > room - sum(sizes[other] for other in taken):
            yield _with(rows, fixed, taken)
            taken = []
        taken.append(name)
    yield _with(rows, fixed, taken)


def _with(rows: list[dict[str, str]], fixed: list[str], taken: list[str]) -> list[dict[str, str]]:
    """These columns, of the rows that have something in them."""
    return [{name: row[name] for name in (*fixed, *taken)} for row in rows if any(row[name] for name in taken)]


def _filled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each cell on one line; columns that are empty in all rows are left out."""
    filled = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    return [{name: _one_line(row[name]) for name in filled} for row in rows]


def to_markdown(table: pd.DataFrame) -> str:
    """The main table in GitHub's Markdown."""
    return rows_to_markdown(*without_common(cells(table)))


def rows_to_markdown(common: str, rows: list[dict[str, str]]) -> str:
    """Cells in GitHub's Markdown, and above them what they have in common."""
    return (f"All rows: {_escaped(common)}.\n\n" if common else "") + markdown_table(rows)


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Cells in GitHub's Markdown."""
    from tabulate import tabulate

    body = [[_escaped(text) for text in row.values()] for row in rows]
    align = ["left" if name in WORDS else "right" for name in rows[0]]
    return tabulate(
        body, [_escaped(name) for name in rows[0]], tablefmt="github", disable_numparse=True, colalign=align
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def to_latex(table: pd.DataFrame) -> str:
    """The table in LaTeX, for the package booktabs; a comment, for the caption, says what all rows have in common."""
    from tabulate import tabulate

    common, rows = without_common(cells(table))
    align = ["left" if name in WORDS else "right" for name in rows[0]]
    body = [list(row.values()) for row in rows]
    text = tabulate(body, list(rows[0]), tablefmt="latex_booktabs", disable_numparse=True, colalign=align)
    return "% needs \\usepackage{booktabs}\n" + (f"% All rows: {common}.\n" if common else "") + f"{text}\n"


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


def _interval(low: float, high: float, kind: str) -> str:
    return f"{low:+.2f} to {high:+.2f}" + (" p" if kind == "paired" else "") if low == low else ""


def _versus(points: float, low: float) -> str:
    """Marked where the routed row does not beat its control, be it for sure (the interval where there is one) or at all."""
    return _number(points, "+.2f", f" {NOT_BEATEN}" if (low if low == low else points) <= 0 else "")


def _against(line: Mapping[Any, Any], mixed: bool) -> str:
    """A row beside one control: +1.11 +- 0.93, with what else must be known. mixed: not all of the row's intervals are alike."""
    half = _number((line["high"] - line["low"]) / 2, ".2f")
    elsewhere = "" if line["relation"] == EQUAL else f" (at {_cost(line['control_cost'], line['basis'])})"
    paired = " p" if mixed and line["interval"] == "paired" else ""
    return (
        f"{line['difference']:+.2f}{f' +- {half}' if half else ''}{paired}{elsewhere}{'' if line['beaten'] else LOST}"
    )


def _cost(cost: float, basis: str) -> str:
    return f"{100 * cost:.1f} %" if basis == FLOPS else f"{cost:.3g} ms"
