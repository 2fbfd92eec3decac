"""One HTML page that holds everything: no scripts, nothing loaded from elsewhere, so it can be mailed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynroute.report import papers, recipes
from dynroute.report.papers import PaperTable
from dynroute.report.read import LeftOut
from dynroute.report.tables import WORDS, cells, to_markdown

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = Path(__file__).with_name("page.html.j2")
NOTES = (
    "FLOPs (multiply-adds): a multiply-add of a convolution or linear layer counts once, as in the papers. "
    "An image is charged for the parts that it runs, router included; the table gives the mean over images.",
    "share: that mean as a part of the dense net's multiply-adds. missed: over 0.02 away from the target.",
    "top-1: mean +- sample standard deviation (number of seeds). n=1: a single run, its spread unknown.",
    "vs static: top-1 less that of the static nets at the same share, in points, on the straight line "
    "between the two neighbouring static nets, or those of a single one within 0.02 of that share. Empty elsewhere.",
)
CONTROL_NOTES = (
    "control: made from the routes of the row above, on the same images. shuffled: handed to other images; random: drawn "
    "unit by unit at the same rates; both charged for the router. most_common: one route for all, a static net.",
    "routed less control: top-1 of the row above less the control's, in points, and a 95 % interval for independent images "
    "(single runs). not beaten: the interval reaches zero or below.",
)
INTERVAL_NOTE = (
    "95 % interval: of vs static, paired over the same test images (McNemar-type, normal), where routes.csv of the run and of "
    "its static neighbours lie beside their rows. It knows nothing of the spread over seeds."
)
PAPER_NOTES = (
    "certainty. seen: in the authors' own text, poster or code. second-hand: quoted by others. "
    "reconstructed: derived from the rest, the printed symbols being lost. "
    "digitised: read off a figure, +-0.1 point.",
    "reported share: of the dense net's multiply-adds; where only a speed-up of k is reported, 1/k.",
    "reproduced: rows of this comparison of the same dataset, backbone and method, at the same target or, "
    "where none is reported, at the nearest share within 0.02. Empty: not yet run. "
    "N of a run is known where its config.yaml lies beside its rows; elsewhere reported rows that differ in N alone show "
    "the same run.",
    "difference: reproduced less reported top-1 error, in points; above zero is worse than the paper.",
    recipes.HOURS_NOTE,
)


def render(table: pd.DataFrame, left_out: Sequence[LeftOut], svg: str, reported: Sequence[PaperTable] = ()) -> str:
    """The page as text; without svg, the papers' tables alone. Everything but our own SVG is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    picture = Markup(svg[svg.index("<svg") :]) if svg else ""  # matplotlib escapes the names in it
    shown = [(paper.name, paper.caption, papers.cells(paper), papers.missing(paper)) for paper in reported]
    notes = (*(run_notes(table) if svg else ()), *(PAPER_NOTES if reported else ()))
    names = {"words": WORDS, "left_out": left_out, "picture": picture, "papers": shown, "notes": notes}
    return template.render(rows=cells(table) if svg else [], **names) + "\n"


def run_notes(table: pd.DataFrame) -> tuple[str, ...]:
    """How to read the main table."""
    interval = (INTERVAL_NOTE,) if table["vs_static_low"].notna().any() else ()
    return (*NOTES, *interval, *(CONTROL_NOTES if (table["control"] != "").any() else ()))


def markdown(table: pd.DataFrame, left_out: Sequence[LeftOut]) -> str:
    """The Markdown table with the same notes under it."""
    missing = [f"- left out: {path}: {reason}".replace("<", "&lt;") for path, reason in left_out]
    return "\n".join([to_markdown(table), "", *(f"- {note}" for note in run_notes(table)), *missing]) + "\n"


def papers_markdown(reported: Sequence[PaperTable]) -> str:
    """The papers' tables with their notes."""
    parts = [*map(papers.to_markdown, reported), "\n".join(f"- {note}" for note in PAPER_NOTES)]
    return "\n".join(parts) + "\n"
