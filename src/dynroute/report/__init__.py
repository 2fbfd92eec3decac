"""Compare runs: tables, pictures, route reports and a page, made from the runs' CSV files alone. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dynroute.contracts import InputError
from dynroute.records import write_rows, write_text
from dynroute.report import page, pictures, routed, routes, tables
from dynroute.report.papers import PaperTable, expand, paper_table, paper_tables
from dynroute.report.pictures import Picture
from dynroute.report.read import PAPERS_FILE, TABLE_FILE, LeftOut, read
from dynroute.report.routes import RouteReport
from dynroute.report.tables import to_markdown, to_rich

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Comparison",
    "LeftOut",
    "PaperTable",
    "compare",
    "paper_tables",
    "read",
    "to_markdown",
    "to_rich",
]


@dataclass(frozen=True)
class Comparison:
    """What was compared. table: see `tables.build`; left_out: what it lacks, and why; files: as written.

    papers: reported rows beside ours, where asked for. reports: how dynamic the routed runs are, where routes.csv is there.
    """

    table: pd.DataFrame
    left_out: list[LeftOut]
    files: list[Path]
    papers: list[PaperTable] = field(default_factory=list)
    reports: list[RouteReport] = field(default_factory=list)


def compare(paths: Sequence[Path], out: Path, papers: Sequence[str] = ()) -> Comparison:
    """Read the runs; write table.csv, .md, .tex, the pictures (`pictures.NAMES`), the route report and index.html into `out`.

    paths: run folders, folders of runs or of CSVs, eval CSVs. papers: names out of `paper_tables`, or "all";
    adds papers.csv and papers.md, and needs no paths. Raises InputError where nothing can be shown.
    """
    names = expand(papers)
    rows, left_out = read(paths) if paths or not names else ([], [])
    _make_folder(out)
    table = tables.build(rows, left_out) if rows else tables.empty()
    images = routed.load(rows, left_out) if rows else []
    reports = [routes.route_report(each) for each in images]
    drawn = pictures.write_all(table, rows, images, left_out, out) if rows else []
    files = _write_runs(table, left_out, drawn, out) if rows else []
    files += routes.write_reports(reports, out) if reports else []
    reported = paper_table(names, table)
    files += _write_papers(reported, out) if reported else []
    svg = drawn[0].svg_text if drawn else ""
    write_text(out / "index.html", page.render(table, left_out, svg, reported))
    return Comparison(table, left_out, [*files, out / "index.html"], reported, reports)


def _write_runs(table: pd.DataFrame, left_out: list[LeftOut], drawn: list[Picture], out: Path) -> list[Path]:
    """Write the main table; returns the files, the pictures' among them."""
    write_text(out / TABLE_FILE, table.to_csv(index=False, lineterminator="\n"))
    write_text(out / "table.md", page.markdown(table, left_out))
    write_text(out / "table.tex", tables.to_latex(table))
    return [out / TABLE_FILE, out / "table.md", out / "table.tex", *(file for each in drawn for file in each.files)]


def _write_papers(reported: list[PaperTable], out: Path) -> list[Path]:
    write_rows(out / PAPERS_FILE, ({"table": paper.name, **row} for paper in reported for row in paper.rows))
    write_text(out / "papers.md", page.papers_markdown(reported))
    return [out / PAPERS_FILE, out / "papers.md"]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
