"""One HTML page that holds everything: nothing is loaded from elsewhere, so it can be mailed, and all is read without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynroute.report import papers, recipes
from dynroute.report.cells import NOT_BEATEN, WORDS, cells, control_cells, rows_to_markdown, to_markdown, without_common
from dynroute.report.papers import PaperTable
from dynroute.report.pictures import Picture
from dynroute.report.read import LeftOut
from dynroute.report.tables import Tables

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent
TEMPLATE, STYLE, SCRIPT = (FOLDER / name for name in ("page.html.j2", "page.css", "page.js"))
MARKED = ("missed", NOT_BEATEN)  # words of a cell that call for attention
NOTES = (
    "FLOPs (multiply-adds): a multiply-add of a convolution or linear layer counts once, as in the papers. "
    "An image is charged for the parts that it runs, router included; the table gives the mean over images.",
    "share: that mean as a part of the dense net's multiply-adds. missed: over 0.02 away from the target, in any seed.",
    "top-1: mean +- sample standard deviation (number of seeds). n=1: a single run, its spread unknown.",
    "vs static: top-1 less that of narrower static nets of equal multiply-adds, in points, on the straight line between the two "
    "neighbouring ones that no cheaper one matches, or that of a single one within 0.02 of that share. Empty elsewhere. "
    "not beaten: its 95 % interval reaches zero or below. p: of an interval over the same test images (paired), narrower; "
    "the others are independent.",
)
TIME_NOTE = "latency: milliseconds per image at the smallest batch and fewest threads that were timed, in the net's fastest form."
CONTROLS_HEADING = "Routed rows beside their controls:"
CONTROL_NOTES = (
    "A routed row is worth something only above a net of the same cost that does not route. A column for each control: top-1 of "
    "the row less the control's, in points, +- half the 95 % interval; the control's own numbers stand in controls.csv. "
    "at equal FLOPs: the straight line between the control's nets on both sides of the row's multiply-adds; at equal ms: of its "
    "time, each in its fastest form, timed with the same batch, threads and machine.",
    "x: not beaten, the interval reaches zero or below. (at ...): the control's cost, where it is another. Of the row's own "
    "routes that proves nothing if a cheaper control is beaten or a dearer one is not; of another net it stands only where it "
    "settles the matter: a cheaper one that is not beaten, or a dearer one that is.",
    "shuffled: the row's own routes handed to other images; random: drawn unit by unit at the same rates; both charged for the "
    "router. most_common: one route for all images, a static net.",
    "interval, 95 %. paired: over the same test images (McNemar-type, normal), where right.csv of all rows concerned is at hand; "
    "independent: from the numbers of images alone, which is wider. It knows nothing of the spread over seeds.",
)
PAPER_NOTES = (
    "certainty. seen: in the authors' own text, poster or code. second-hand: quoted by others. "
    "reconstructed: derived from the rest, the printed symbols being lost. "
    "digitised: read off a figure, +-0.1 point.",
    "reported share: of the dense net's multiply-adds; where only a speed-up of k is reported, 1/k.",
    "reproduced: rows of this comparison of the same dataset, backbone and method, trained for or evaluated at the same target "
    "or, where none is reported, at the nearest share within 0.02. Empty: not yet run. "
    "N and the training target of a run are known where its config.yaml lies beside its rows; elsewhere reported rows that "
    "differ in N alone show the same run.",
    "difference: reproduced less reported top-1 error, in points; above zero is worse than the paper.",
    recipes.HOURS_NOTE,
)


def render(
    made: Tables,
    left_out: Sequence[LeftOut],
    reported: Sequence[PaperTable] = (),
    *,
    pictures: Sequence[Picture] = (),
    route_table: Sequence[Mapping[str, str]] = (),
    route_notes: Sequence[str] = (),
) -> str:
    """The page as text; of tables without rows, the papers' tables alone. Everything but our own SVG is escaped.

    route_table: the route report as texts by header, with its notes.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_text(TEMPLATE))
    return (
        template.render(
            results=without_common(cells(made.main)),
            origins=origins(made.main),
            controls=without_common(control_cells(made.lines)),
            notes=run_notes(made) if len(made.main) else (),
            control_notes=CONTROL_NOTES,
            figures=[
                (picture, Markup(picture.svg_text)) for picture in pictures
            ],  # those who draw escape the names in it
            routes=[dict(row) for row in route_table],
            route_notes=route_notes,
            papers=[_Paper(p.name, p.caption, papers.cells(p), papers.missing(p)) for p in reported],
            paper_notes=PAPER_NOTES,
            left_out=left_out,
            words=WORDS,
            marked=MARKED,
            style=Markup(_text(STYLE)),
            script=Markup(_text(SCRIPT)),
        )
        + "\n"
    )


class _Paper(NamedTuple):
    name: str
    caption: str
    rows: list[dict[str, str]]
    missing: list[papers.Missing]


ORIGIN = {  # what a row was made by: label -> column
    "runs": "runs",
    "seeds": "seeds",
    "test images": "n",
    "parameters": "params",
    "started from": "weights",
    "trained in": "precision",
    "configuration": "config_hash",
    "commit": "commits",
    "torch": "torch",
    "machine": "machine",
    "timed": "latency_clock",
}


def origins(table: pd.DataFrame) -> list[dict[str, str]]:
    """What each row of the main table was made by; what is not known is left out."""
    own: list[dict[str, Any]] = table[table["control"] == ""].to_dict("records")  # type: ignore[assignment]
    return [{name: str(row[c]) for name, c in ORIGIN.items() if str(row[c]) not in ("", "<NA>", "nan")} for row in own]


def run_notes(made: Tables) -> tuple[str, ...]:
    """How to read the main table."""
    return (*NOTES, TIME_NOTE) if made.main["latency_ms"].notna().any() else NOTES


def markdown(made: Tables, left_out: Sequence[LeftOut]) -> str:
    """The tables in Markdown, each with its notes under it."""
    parts = [to_markdown(made.main), "", *(f"- {note}" for note in run_notes(made))]
    if len(made.lines):
        lines = rows_to_markdown(*without_common(control_cells(made.lines)))
        parts += ["", CONTROLS_HEADING, "", lines, "", *(f"- {note}" for note in CONTROL_NOTES)]
    parts += [f"- left out: {path}: {reason}".replace("<", "&lt;") for path, reason in left_out]
    return "\n".join(parts) + "\n"


def papers_markdown(reported: Sequence[PaperTable]) -> str:
    """The papers' tables with their notes."""
    parts = [*map(papers.to_markdown, reported), "\n".join(f"- {note}" for note in PAPER_NOTES)]
    return "\n".join(parts) + "\n"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
