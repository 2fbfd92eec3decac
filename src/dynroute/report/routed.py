"""The images of routed runs, one by one, out of their routes.csv. R distinct routes, U units, G parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynroute.contracts import InputError
from dynroute.records import CLASSES_FILE, SETTING, UNITS_FILE, read_rows
from dynroute.report.images import read_images, setting_of
from dynroute.report.read import LeftOut, Row, identity, reason_of
from dynroute.report.tables import PLACE, STATIC, labels

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

MOST_RUNS = 24  # of which routes.csv is read: a tenth of a second each
NEEDED = {
    **dict.fromkeys(("index", "label", "predicted"), "int64"),
    "loss": "float64",
    "macs": "float64",
    "route": "str",
}
KNOWN = {"superclass": "int64", "difficulty": "float64"}  # columns that some data have


@dataclass(frozen=True)
class Routed:
    """A run at one setting, image by image.

    label: the run's name in tables and legends; row: of eval.csv. images: a row an image, columns index, label, predicted,
    loss, macs, share, code (which route, 0..R-1) and, where known, superclass and difficulty. keep_RUG: the distinct routes
    in the order of first use, 0 where a unit has fewer parts. parts, units: number of parts and name of each unit.
    """

    label: str
    row: Row
    images: pd.DataFrame
    keep_RUG: npt.NDArray[np.uint8]
    parts: tuple[int, ...]
    units: tuple[str, ...]
    classes: dict[int, str]
    superclasses: dict[int, str]
    most_common_top1: float | None = None

    @property
    def aim(self) -> str:
        """The target, or that there was none, in words."""
        return "trained point" if self.target == "trained" else f"target {self.target}"

    @property
    def target(self) -> str:
        """As a tick label."""
        target = self.row["flops_target"]
        return "trained" if target is None else f"{target:.2f}"

    @property
    def place(self) -> str:
        """Dataset and backbone."""
        return f"{self.row['dataset']}, {self.row['backbone']}"

    @property
    def varied(self) -> bool:
        """Whether images take different routes."""
        return len(self.keep_RUG) > 1

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.row["routes_file"]).parent

    def rate_by(self, column: str) -> pd.DataFrame:
        """How many of the images of each value of a column run each part, 0..1: columns unit (0..U-1) and part (0..G-1)."""
        import pandas as pd

        places = [(u, g) for u, parts in enumerate(self.parts) for g in range(parts)]
        rate_RP = self.keep_RUG[:, [u for u, _ in places], [g for _, g in places]].astype(float)
        columns = pd.MultiIndex.from_tuples(places, names=["unit", "part"])
        table = pd.DataFrame(rate_RP[self.images["code"]], columns=columns)
        return table.groupby(self.images[column].to_numpy()).mean()


def one_run_each(rows: Sequence[Row]) -> pd.DataFrame:
    """The nets' own rows in the order of the main table, of each configuration the lowest seed; label: its name there.

    place: of the row in `rows`.
    """
    import pandas as pd

    frame = pd.DataFrame(rows)
    frame["identity"] = [identity(row) for row in rows]
    frame["label"] = labels(frame)
    frame["place"] = range(len(rows))
    own = frame[frame["control"] == ""]
    first = own[own["seed"] == own.groupby([*PLACE, "method", "identity"])["seed"].transform("min")]
    order = first.assign(other=first["method"] != STATIC)
    return order.sort_values([*PLACE, "other", "method", "label", "identity", "macs_share", "place"])


def load(rows: Sequence[Row], left_out: list[LeftOut]) -> list[Routed]:
    """The routed rows with their images, in the order of the main table; what cannot be read is added to left_out."""
    own = one_run_each(rows)
    own = own[(own["method"] != STATIC) & (own["routes_file"] != "")]
    found: list[Routed] = []
    for number, (file, part) in enumerate(own.groupby("routes_file", sort=False)):
        if number == MOST_RUNS:
            rest = own["routes_file"].nunique() - MOST_RUNS
            told = f"and {rest - 1} more runs: no route report" if rest > 1 else "no route report"
            left_out.append(LeftOut(Path(str(file)), f"{told}, which is made of {MOST_RUNS} runs at most"))
            break
        named = [(str(label), rows[place]) for label, place in zip(part["label"], part["place"], strict=True)]
        try:
            found += _of_file(Path(str(file)), named, rows, left_out)
        except InputError as error:
            if not any(said.path == Path(str(file)) for said in left_out):
                left_out.append(LeftOut(Path(str(file)), f"{reason_of(error, Path(str(file)))} (no route report)"))
    return found


def _of_file(
    file: Path, named: list[tuple[str, Row]], rows: Sequence[Row], left_out: list[LeftOut]
) -> Iterator[Routed]:
    images = read_images(file, NEEDED, KNOWN)
    at_setting = images.groupby(list(SETTING), sort=False).indices
    units = _units(file.with_name(UNITS_FILE))
    classes, superclasses = _classes(file.with_name(CLASSES_FILE))
    for label, row in named:
        target, wanted = row["flops_target"], setting_of(row)
        if wanted not in at_setting:
            told = "the trained point" if target is None else f"target {target:g}"
            left_out.append(LeftOut(file, f"no routes at {told} (no route report)"))
            continue
        part = images.iloc[at_setting[wanted]].reset_index(drop=True)
        codes, routes = part["route"].factorize()
        keep_RUG, parts = _bits(file, list(routes), [count for _, count in units])
        names = [name for name, _ in units] or [f"unit {u + 1}" for u in range(len(parts))]
        part = part.assign(code=codes, share=part["macs"] / row["macs_dense"])
        static = _most_common_top1(row, rows)
        yield Routed(label, row, part, keep_RUG, parts, tuple(names), classes, superclasses, static)


def _bits(file: Path, routes: list[str], parts: list[int]) -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
    """keep_RUG from routes as written, and the parts of each unit: as in units.csv, else as many as were written."""
    import numpy as np

    split = [route.split("/") for route in routes]
    lengths = {tuple(map(len, units)) for units in split}
    if len(lengths) > 1 or any(set(route) - set("01/") for route in routes):
        raise InputError(f"{file} has routes of different nets, or that are no bits")
    written = lengths.pop()
    known = tuple(parts) or written
    if len(known) != len(written) or any(most > there for most, there in zip(known, written, strict=True)):
        raise InputError(f"{file} has routes that do not fit {UNITS_FILE}")
    wide = [[unit.ljust(max(written), "0") for unit in units] for units in split]
    return np.array([[list(map(int, unit)) for unit in units] for units in wide], np.uint8), known


def _units(file: Path) -> list[tuple[str, int]]:
    """Name and number of parts of each unit; none where the run has no such file."""
    if not file.exists():
        return []
    try:
        return [(row["name"], int(row["parts"])) for row in read_rows(file)]
    except (KeyError, ValueError) as error:
        raise InputError(f"{file} is not a table of units ({type(error).__name__})") from None


def _classes(file: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Names of classes and of superclasses by number; none where the run has no such file."""
    rows = read_rows(file) if file.exists() else []
    try:
        classes = {int(row["label"]): row["class"] for row in rows}
        return classes, {int(row["superclass"]): row["superclass_name"] for row in rows if row.get("superclass")}
    except (KeyError, ValueError) as error:
        raise InputError(f"{file} is not a table of classes ({type(error).__name__})") from None


def _most_common_top1(row: Row, rows: Sequence[Row]) -> float | None:
    """Accuracy of the control that gives all images the most common route, where it has been measured."""
    same = ("routes_file", "flops_target", "flops_max", "checkpoint", "seed")
    found = (r for r in rows if r["control"] == "most_common" and all(r[k] == row[k] for k in same))
    return next((float(r["top1"]) for r in found), None)
