"""Compare runs: tables, a picture and a page, made from the runs' CSV files alone. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dynroute.contracts import InputError
from dynroute.records import write_rows, write_text
from dynroute.report import page, plots, tables
from dynroute.report.papers import PaperTable, expand, paper_table, paper_tables
from dynroute.report.read import CONTROLS_FILE, PAPERS_FILE, TABLE_FILE, LeftOut, read
from dynroute.report.tables import Tables, control_cells, rich_table, to_markdown, to_rich

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Comparison",
    "LeftOut",
    "PaperTable",
    "compare",
    "control_cells",
    "paper_tables",
    "read",
    "rich_table",
    "to_markdown",
    "to_rich",
]


@dataclass(frozen=True)
class Comparison:
    """What was compared. table, controls: see `tables.build`; left_out: what they lack, and why; files: as written.

    papers: reported rows beside ours, where asked for.
    """

    table: pd.DataFrame
    controls: pd.DataFrame
    left_out: list[LeftOut]
    files: list[Path]
    papers: list[PaperTable] = field(default_factory=list)


def compare(paths: Sequence[Path], out: Path, papers: Sequence[str] = ()) -> Comparison:
    """Read the runs; write table.csv, .md, .tex, controls.csv, accuracy_flops.{csv,png,svg} and index.html into `out`.

    paths: run folders, folders of runs or of CSVs, eval CSVs. papers: names out of `paper_tables`, or "all";
    adds papers.csv and papers.md, and needs no paths. Raises InputError where nothing can be shown.
    """
    names = expand(papers)
    rows, left_out = read(paths) if paths or not names else ([], [])
    _make_folder(out)
    made = tables.build(rows, left_out) if rows else tables.empty()
    files, svg = _write_runs(made, left_out, out) if rows else ([], "")
    reported = paper_table(names, made.main)
    files += _write_papers(reported, out) if reported else []
    write_text(out / "index.html", page.render(made, left_out, svg, reported))
    return Comparison(made.main, made.lines, left_out, [*files, out / "index.html"], reported)


def _write_runs(made: Tables, left_out: list[LeftOut], out: Path) -> tuple[list[Path], str]:
    """Write the tables and the main picture; returns the files, and the picture as SVG text."""
    texts = {
        TABLE_FILE: made.main.to_csv(index=False, lineterminator="\n"),
        CONTROLS_FILE: made.lines.to_csv(index=False, lineterminator="\n"),
        "table.md": page.markdown(made, left_out),
        "table.tex": tables.to_latex(made.main),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    pictures = plots.write(made.main, out)
    svg = (out / f"{plots.NAME}.svg").read_text(encoding="utf-8")
    return [*(out / name for name in texts), *pictures], svg


def _write_papers(reported: list[PaperTable], out: Path) -> list[Path]:
    write_rows(out / PAPERS_FILE, ({"table": paper.name, **row} for paper in reported for row in paper.rows))
    write_text(out / "papers.md", page.papers_markdown(reported))
    return [out / PAPERS_FILE, out / "papers.md"]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
