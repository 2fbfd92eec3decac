"""The papers' reported rows (reported.csv) and, beside them, what the compared runs reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynroute.contracts import unknown
from dynroute.records import read_rows
from dynroute.report import recipes
from dynroute.report.cells import markdown_table, rich_table
from dynroute.report.read import Row
from dynroute.report.tables import STATIC, TOLERANCE

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

REPORTED = Path(__file__).with_name("reported.csv")
CITATIONS = {"dmnn": "DMNN (Su et al., 2019)", "rnp": "RNP (Lin et al., 2017)"}
PLACES = {
    "dmnn:tab1": "Table 1, ResNets",
    "dmnn:tab2": "Table 2, MobileNetV2",
    "dmnn:tab3": "Table 3, ResNet-50",
    "dmnn:tab4": "Table 4, ablation of previous state and category loss",
    "rnp:tab2": "Table 2, VGG-16 by speed-up",
    "rnp:fig-cifar10": "curve of four conv layers",
    "rnp:fig-cifar100": "curve of VGG-16",
}
OURS = {  # reported method -> ours
    **dict.fromkeys(recipes.VARIANTS, "dmnn"),
    **{theirs: f"prune_{by}" for theirs, by in recipes.PRUNED.items()},
    "rnp": "rnp",
    "vanilla": STATIC,
    "slimmable-0.75": "slimmable",
}
BUDGET = "budget"  # variant of a net for all budgets
WORDS = ("paper", "table", "dataset", "method", "backbone", "certainty", "note")  # the rest are numbers


class PaperTable(NamedTuple):
    """One table or figure of a paper. rows: shares and errors in percent, None where there is no number."""

    name: str
    caption: str
    rows: list[Row]


def paper_tables() -> dict[str, str]:
    """The names that `compare --paper` takes, each with a sentence."""
    return {name: _caption(name, rows) for name, rows in _reported().items()}


def paper_table(names: Sequence[str], table: pd.DataFrame) -> list[PaperTable]:
    """The named tables beside the rows of a comparison. Raises InputError on unknown names."""
    runs: list[Row] = table.to_dict("records")  # type: ignore[assignment]
    found = {name: _reported()[name] for name in expand(names)}
    return [PaperTable(n, _caption(n, rows), [_row(r, runs) for r in rows]) for n, rows in found.items()]


def expand(names: Sequence[str]) -> list[str]:
    """The names, each once, "all" spelt out. Raises InputError on an unknown one."""
    known = list(_reported())
    for name in names:
        if name not in ("all", *known):
            raise unknown("table of a paper", name, ["all", *known])
    return known if "all" in names else list(dict.fromkeys(names))


def _reported() -> dict[str, list[Row]]:
    tables: dict[str, list[Row]] = {}
    for row in read_rows(REPORTED):
        typed = {k: v if k in WORDS else float(v) if v else None for k, v in row.items()}
        tables.setdefault(f"{row['paper']}:{row['table']}", []).append(typed)
    return dict(sorted(tables.items()))


def _caption(name: str, rows: list[Row]) -> str:
    by = CITATIONS[name.split(":")[0]]
    return f"{len(rows)} rows, {rows[0]['dataset']}; reported by {by}, {PLACES[name]}"


def _row(paper: Row, runs: list[Row]) -> Row:
    share, error = _share(paper), paper["top1_error_pct"]
    run = _reproduced(paper, share, runs)
    ours = 100 * (1 - run["top1"]) if run else None
    needed = recipes.Need("", "", None, "") if run else recipes.need(paper)
    return {
        **{name: paper[name] for name in ("dataset", "method", "backbone", "sub_blocks", "target")},
        "reported_top1_error_pct": error,
        "reported_top5_error_increase_points": paper["top5_error_increase_points"],
        "reported_macs_g": paper["macs_g"],
        "reported_share_pct": None if share is None else 100 * share,
        **{name: paper[name] for name in ("certainty", "note")},
        "run": run["label"] if run else "",
        "n_seeds": run["n_seeds"] if run else None,
        "reproduced_top1_error_pct": ours,
        "reproduced_top1_error_std": 100 * run["top1_std"] if run and run["n_seeds"] > 1 else None,
        "reproduced_share_pct": 100 * run["macs_share"] if run else None,
        "difference_points": None if ours is None or error is None else ours - error,
        **{f"to_make_{name}": value for name, value in needed._asdict().items()},
    }


def _share(paper: Row) -> float | None:
    ratio, speedup = paper["macs_ratio_pct"], paper["speedup_macs"]
    return ratio / 100 if ratio else 1 / speedup if speedup else None


def _reproduced(paper: Row, share: float | None, runs: list[Row]) -> Row | None:
    """The run that stands for a reported row; of several one trained for its target, or by the paper's one charge rather than
    for all budgets, then the nearest in share. Never the most accurate.
    """
    found = [run for run in runs if _matches(paper, share, run)]
    trained = [run for run in found if _as_trained(paper, run)]
    single = [run for run in found if run["variant"] != BUDGET]
    return min(
        trained or single or found, key=lambda r: (abs(r["macs_share"] - (share or 1)), r["label"]), default=None
    )


def _matches(paper: Row, share: float | None, run: Row) -> bool:
    if run["control"]:
        return False
    whole = paper["method"] in recipes.STATIC_FULL or paper["method"].startswith(recipes.RESNEXT)
    method, target = STATIC if whole else OURS.get(paper["method"]), run["flops_target"]
    wanted = {"dataset": paper["dataset"], "backbone": recipes.backbone(paper), "method": method}
    if any(run[name] != value for name, value in wanted.items()):
        return False
    told = "" if paper["method"] == "rnp" and run["variant"] == BUDGET else run["variant"]  # as our recipe trains it
    if told != recipes.VARIANTS.get(paper["method"], "") or not _same_parts(paper, run):
        return False
    if whole:
        return target != target and run["macs_share"] > 0.99  # full width; nan: no target
    if paper["target"] is not None:
        return _as_trained(paper, run) or abs(target - paper["target"]) < 1e-6
    return share is not None and abs(run["macs_share"] - share) <= TOLERANCE + 1e-9


def _as_trained(paper: Row, run: Row) -> bool:
    """A row of the trained point (target nan) of a run that was trained for the paper's target, as its config.yaml tells."""
    asked, target = paper["target"], run["flops_target"]
    return asked is not None and target != target and run["trained_for"] == f"{asked:g}"


def _same_parts(paper: Row, run: Row) -> bool:
    """N is only known of runs with their config.yaml beside them; where it is not, any will do."""
    return paper["sub_blocks"] is None or run["parts"] in ("", f"{paper['sub_blocks']:g}")


CELLS = {  # header -> column and format
    **{name: (name, "") for name in ("method", "backbone")},
    "N": ("sub_blocks", "g"),
    "target": ("target", "g"),
    "reported top-1 error %": ("reported_top1_error_pct", ".2f"),
    "reported top-5 error increase, points": ("reported_top5_error_increase_points", ".2f"),
    "reported FLOPs (G multiply-adds)": ("reported_macs_g", "g"),
    "reported share %": ("reported_share_pct", ".1f"),
    **{name: (name, "") for name in ("certainty", "run")},
    "seeds": ("n_seeds", "d"),
    "reproduced top-1 error %": ("reproduced_top1_error_pct", ".2f"),
    "+-": ("reproduced_top1_error_std", ".2f"),
    "reproduced share %": ("reproduced_share_pct", ".1f"),
    "difference, points": ("difference_points", "+.2f"),
    "note": ("note", ""),
}


def cells(paper: PaperTable) -> list[dict[str, str]]:
    """The rows as people read them. Empty columns are left out, save those that wait for a run."""
    shown = [{h: "" if r[c] is None else f"{r[c]:{f}}" for h, (c, f) in CELLS.items()} for r in paper.rows]
    kept = [h for h in CELLS if h.startswith(("reproduced", "difference")) or any(row[h] for row in shown)]
    return [{h: row[h] for h in kept} for row in shown]


class Missing(NamedTuple):
    """A reported row without a run. needs: data and hours, or what dynroute lacks, where there is no command."""

    name: str
    needs: str
    command: str

    def __str__(self) -> str:
        return f"{self.name}: {self.command} | {self.needs}" if self.command else f"{self.name}: {self.needs}"


def missing(paper: PaperTable) -> list[Missing]:
    """What each row without a run needs."""
    return [_missing(row) for row in paper.rows if not row["run"]]


def _missing(row: Row) -> Missing:
    told = {"N": row["sub_blocks"], "target": row["target"], "share %": row["reported_share_pct"]}
    where = ", ".join(f"{k} {v:.4g}" for k, v in told.items() if v is not None)
    name = f"{row['method']}, {row['backbone']}" + (f" ({where})" if where else "")
    if not row["to_make_command"]:
        return Missing(name, row["to_make_lacks"], "")
    needs = f"{row['to_make_data']}, about {row['to_make_hours']:.2g} h on one H200"
    return Missing(name, needs, row["to_make_command"])


def to_rich(paper: PaperTable) -> Table:
    """The table for the terminal."""
    return rich_table(cells(paper), f"{paper.name}: {paper.caption}")


def to_markdown(paper: PaperTable) -> str:
    """The table in GitHub's Markdown, under a heading."""
    return f"## {paper.name}\n\n{paper.caption}\n\n{markdown_table(cells(paper))}\n{_missing_markdown(paper)}"


def _missing_markdown(paper: PaperTable) -> str:
    lines = missing(paper)
    body = "\n".join(f"- {line}" for line in lines).replace("<", "&lt;")
    return f"\nNot yet reproduced, and what each row needs:\n\n{body}\n" if lines else ""
