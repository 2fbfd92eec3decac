"""Compare runs: tables, pictures, route reports and a page, made from the runs' CSV files alone. Never imports torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynroute.contracts import InputError
from dynroute.records import write_rows, write_text
from dynroute.report import page, pictures, routed, routes, tables
from dynroute.report.cells import control_cells, fitting, rich_table, to_latex, to_markdown, to_rich, without_common
from dynroute.report.papers import PaperTable, expand, paper_table, paper_tables
from dynroute.report.pictures import Picture
from dynroute.report.read import CONTROLS_FILE, PAPERS_FILE, TABLE_FILE, LeftOut, Row, read
from dynroute.report.routes import RouteReport
from dynroute.report.tables import Tables

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Comparison",
    "LeftOut",
    "PaperTable",
    "compare",
    "control_cells",
    "fitting",
    "paper_tables",
    "read",
    "rich_table",
    "to_markdown",
    "to_rich",
    "without_common",
]


@dataclass(frozen=True)
class Comparison:
    """What was compared. table, controls: see `tables.build`; left_out: what they lack, and why; files: as written.

    papers: reported rows beside ours, where asked for. routes: how dynamic the routed runs are, where routes.csv is there.
    """

    table: pd.DataFrame
    controls: pd.DataFrame
    left_out: list[LeftOut]
    files: list[Path]
    papers: list[PaperTable] = field(default_factory=list)
    routes: list[RouteReport] = field(default_factory=list)


def compare(paths: Sequence[Path], out: Path, papers: Sequence[str] = ()) -> Comparison:
    """Read the runs; write table.csv, .md, .tex, controls.csv, the pictures, routes_report.csv and index.html into `out`.

    paths: run folders, folders of runs or of CSVs, eval CSVs. papers: names out of `paper_tables`, or "all";
    adds papers.csv and papers.md, and needs no paths. All files are made before the first takes its place, so that a full disk
    leaves what was there. Raises InputError where nothing can be shown.
    """
    names = expand(papers)
    rows, left_out = read(paths) if paths or not names else ([], [])
    with _made_in(out) as fresh:
        made = _compare(rows, left_out, names, fresh)
        places = [out / file.relative_to(fresh) for file in made.files]
        for file, place in zip(made.files, places, strict=True):
            file.replace(place)
    return replace(made, files=places)


def _compare(rows: list[Row], left_out: list[LeftOut], names: Sequence[str], out: Path) -> Comparison:
    made = tables.build(rows, left_out) if rows else tables.empty()
    images = routed.load(rows, left_out) if rows else []
    reports = [routes.route_report(each) for each in images]
    drawn = pictures.write_all(made.main, rows, images, left_out, out) if rows else []
    files = _write_runs(made, left_out, drawn, out) if rows else []
    files += routes.write_reports(reports, out) if reports else []
    reported = paper_table(names, made.main)
    files += _write_papers(reported, out) if reported else []
    told = routes.cells(reports)
    html = page.render(made, left_out, reported, pictures=drawn, route_table=told, route_notes=routes.NOTES)
    write_text(out / "index.html", html)
    return Comparison(made.main, made.lines, left_out, [*files, out / "index.html"], reported, reports)


def _write_runs(made: Tables, left_out: list[LeftOut], drawn: list[Picture], out: Path) -> list[Path]:
    """Write the tables; returns the files, the pictures' among them."""
    texts = {
        TABLE_FILE: made.main.to_csv(index=False, lineterminator="\n"),
        CONTROLS_FILE: made.lines.to_csv(index=False, lineterminator="\n"),
        "table.md": page.markdown(made, left_out),
        "table.tex": to_latex(made.main),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return [*(out / name for name in texts), *(file for each in drawn for file in each.files)]


def _write_papers(reported: list[PaperTable], out: Path) -> list[Path]:
    write_rows(out / PAPERS_FILE, ({"table": paper.name, **row} for paper in reported for row in paper.rows))
    write_text(out / "papers.md", page.papers_markdown(reported))
    return [out / PAPERS_FILE, out / "papers.md"]


@contextmanager
def _made_in(out: Path) -> Iterator[Path]:
    """A folder in `out` for files on their way there; `out` goes again if it was made for them and nothing came of them."""
    there = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(dir=out, prefix=".")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    try:
        with holder as fresh:
            yield Path(fresh)
    except BaseException as error:
        if not there and not any(out.iterdir()):
            out.rmdir()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(out)) from None
        raise
