"""Each routed row beside its controls: what another net of the same multiply-adds, or of the same time, reaches.

A static control is a kind of nets (narrower, pruned, slimmable, ResNeXt, a cascade) of which some cost less than the row and
some more; it is read off the straight line between its two neighbours. Controls made from the row's own routes (shuffled,
random, most common) stand as they are. All ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynroute.contracts import InputError
from dynroute.report.images import setting_of
from dynroute.report.paired import Answers, Difference, answers, over_seeds, paired, unpaired
from dynroute.report.read import LeftOut, Row, reason_of

if TYPE_CHECKING:
    import pandas as pd

STATIC = "static"
SAME_TOP1 = 1e-9  # accuracies that are one and the same, as written
TOLERANCE = 0.02  # a target is reached when the share lies this near; so is a cost, of multiply-adds
SAME = ("method", "backbone", "dataset", "identity", "flops_target")  # what a row and its own controls share
FLOPS = "FLOPs"
EQUAL, CHEAPER, DEARER = "equal", "cheaper", "dearer"
NARROWER = "static, narrower"
OTHERS = {"slimmable": "slimmable", "cascade": "cascade", "random": "random router"}  # methods that are controls
OWN = ("method", "label", "backbone", "dataset", "flops_target", "macs_share", "top1", "top1_std", "n_seeds")
COLUMNS = (
    *OWN,
    *("control", "basis", "cost", "control_cost", "relation", "control_top1", "control_runs"),
    *("difference", "low", "high", "interval", "beaten"),
)


class Point(NamedTuple):
    """A net on the line of its kind: cost (a share of the row's dense net, or milliseconds) and top-1."""

    cost: float
    top1: float
    row: Row


class Neighbours(NamedTuple):
    """What stands at a cost. weights: of the points by their place, summing to 1; relation: EQUAL, or where none costs as
    much, that of the nearest: CHEAPER or DEARER."""

    weights: dict[int, float]
    relation: str


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points, cheapest first, that no cheaper one matches in top-1: the harder control, and the one a user would pick."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.top1)):
        if not best or point.top1 > best[-1].top1:
            best.append(point)
    return best


def neighbours(cost: float, costs: Sequence[float], tolerance: float = 0.0, dearest: float = 0.0) -> Neighbours:
    """Weights on the straight line at a cost among rising costs; beyond their ends, and the tolerance, the nearest alone.

    dearest: a cost up to which the last of costs still stands as equal, since what costs more is no better.
    """
    after = next((k for k, x in enumerate(costs) if x >= cost), None)
    if after is None:
        last = len(costs) - 1
        return Neighbours({last: 1.0}, EQUAL if cost <= max(costs[last], dearest) + tolerance else CHEAPER)
    if after == 0:
        return Neighbours({0: 1.0}, EQUAL if costs[0] - cost <= tolerance else DEARER)
    part = (cost - costs[after - 1]) / (costs[after] - costs[after - 1])
    return Neighbours({after - 1: 1 - part, after: part}, EQUAL)


def build(rows: Sequence[Row], left_out: list[LeftOut]) -> pd.DataFrame:
    """A line for each routed row, control and basis. rows: of `tables.pool`, whose places are the index of the lines.

    basis: FLOPs, or milliseconds by a clock. cost: the row's own, as a share or in ms; relation: the control's cost beside
    it. difference: top-1 of the row less the control's, in points; low, high: 95 %; interval: paired (over the same test
    images) or independent. beaten: the interval, or where there is none the difference, lies above zero. A right.csv
    that cannot be read, or is of other rows, is added to left_out.
    """
    import pandas as pd

    files = Files(left_out)
    lines: list[tuple[int, Row]] = []
    for _, group in groupby(enumerate(rows), key=lambda numbered: numbered[1]["dataset"]):
        members = list(group)
        others = [row for _, row in members]
        for place, row in members:
            if row["method"] != STATIC and not row["control"]:
                lines += [(place, line) for line in _of_row(row, others, files)]
    return pd.DataFrame([line for _, line in lines], columns=list(COLUMNS), index=[place for place, _ in lines])


class Files:
    """The answers in the runs' right.csv, each read once; what cannot be read is added to left_out."""

    def __init__(self, left_out: list[LeftOut]) -> None:
        self.left_out, self.known = left_out, dict[str, dict[tuple[str, ...], Answers]]()

    def of(self, row: Row) -> Answers | None:
        """The answers of a row, as a mean over its seeds; None where they are not known."""
        setting, files = (*setting_of(row), row["control"]), row["right_files"]
        seeds = [self._read(name).get(setting) for name in files]
        if len({each.images for each in seeds if each}) > 1:
            file = next(name for name in files if name)
            self._say(
                file, f"the seeds of {row['label']} were tested on different images: theirs is no mean of one data set"
            )
        found = over_seeds(seeds)
        if found and abs(float(found.right_N.mean()) - row["top1"]) > SAME_TOP1:
            self._say(files[0], "not of these rows, whose top-1 is another (no paired interval)")
            return None
        return found

    def _say(self, file: str, reason: str) -> None:
        said = LeftOut(Path(file), reason)
        self.left_out += [] if said in self.left_out else [said]

    def _read(self, name: str) -> dict[tuple[str, ...], Answers]:
        if name not in self.known:
            try:
                self.known[name] = answers(Path(name)) if name else {}
            except InputError as error:
                self.known[name] = {}
                self.left_out.append(LeftOut(Path(name), f"{reason_of(error, Path(name))} (no paired interval)"))
        return self.known[name]


def _of_row(row: Row, members: Sequence[Row], files: Files) -> Iterator[Row]:
    kinds: dict[str, list[Row]] = {}
    for other in members:
        kind = _kind(row, other)
        if kind:
            kinds.setdefault(kind, []).append(other)
    for kind, others in sorted(kinds.items()):
        dense = row["macs_mean"] / row["macs_share"]
        points = [Point(o["macs_mean"] / dense, o["top1"], o) for o in others]
        yield from _against(row, kind, FLOPS, row["macs_share"], points, TOLERANCE + 1e-9, files)
        for clock, taken in row["times"].items():
            points = [Point(o["times"][clock].ms, o["top1"], o) for o in others if clock in o["times"]]
            yield from _against(row, kind, str(clock), taken.ms, points, 0.0, files)
    for other in members:
        if other["control"] and all(_same(row[name], other[name]) for name in SAME):
            if other["seeds"] != row["seeds"]:
                reason = f"its {other['control']} control is of seeds {other['seeds']}, the row of {row['seeds']}"
                files.left_out.append(LeftOut(Path(row["label"]), f"{reason}: not compared"))
                continue
            less = row["macs_share"] - other["macs_share"]
            relation = EQUAL if abs(less) <= TOLERANCE + 1e-9 else CHEAPER if less > 0 else DEARER
            alone = [(1.0, Point(other["macs_share"], other["top1"], other))]
            yield _line(row, other["control"], FLOPS, row["macs_share"], alone, relation, files)


def _against(
    row: Row, kind: str, basis: str, cost: float, points: list[Point], tolerance: float, files: Files
) -> Iterator[Row]:
    """At most one line. Where no net of the kind costs as much, only what is certain: a cheaper one that is not beaten, a
    dearer one that is."""
    if points:
        best = frontier(points)
        near = neighbours(cost, [p.cost for p in best], tolerance, max(p.cost for p in points))
        others = [(weight, best[k]) for k, weight in near.weights.items() if weight > 0]
        line = _line(row, kind, basis, cost, others, near.relation, files)
        if near.relation == EQUAL or line["beaten"] == (near.relation == DEARER):
            yield line


def _line(
    row: Row, control: str, basis: str, cost: float, others: Sequence[tuple[float, Point]], relation: str, files: Files
) -> Row:
    """others: points with their weights, which sum to 1."""
    top1 = sum(weight * p.top1 for weight, p in others)
    made, kind = _interval(row, others, files)
    return {
        **{name: row[name] for name in OWN},
        **{"control": control, "basis": basis, "cost": cost, "relation": relation, "control_top1": top1},
        "control_cost": sum(weight * p.cost for weight, p in others),
        "control_runs": " ".join(p.row["label"] for _, p in others),
        **{"difference": made.points, "low": made.low, "high": made.high, "interval": kind},
        "beaten": (made.points if math.isnan(made.low) else made.low) > 0,
    }


def _interval(row: Row, others: Sequence[tuple[float, Point]], files: Files) -> tuple[Difference, str]:
    """The difference, and what its interval is: paired, independent, or empty where no number of images is known."""
    rows, weights = [p.row for _, p in others], [weight for weight, _ in others]
    made = paired(files.of(row), [files.of(other) for other in rows], weights)
    if made:
        return made, "paired"
    if all(each["n"] > 0 for each in (row, *rows)):  # nan is not
        return unpaired(row["top1"], row["n"], [(p.top1, p.row["n"], weight) for weight, p in others]), "independent"
    points = 100 * (row["top1"] - sum(weight * p.top1 for weight, p in others))
    return Difference(points, math.nan, math.nan), ""


def _kind(row: Row, other: Row) -> str | None:
    """Which control of a row another row is; None for none."""
    method, own = other["method"], row["method"]
    if other["control"] or method == own:
        return None
    if other["backbone"] != row["backbone"]:
        resnext = method == STATIC and _is_resnext_of(other["backbone"], row["backbone"])
        return "ResNeXt" if resnext and other["as_trained"] else None
    if method == STATIC:
        return NARROWER if other["as_trained"] else None
    if is_static(own):
        return None  # static nets stand beside narrower ones alone
    return method.replace("prune_", "pruned, ") if method.startswith("prune") else OTHERS.get(method)


def as_trained(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a table are static nets as they were trained: not at a target, nor under a limit, asked for later."""
    return (table["method"] == STATIC) & table["flops_target"].isna() & table["flops_max"].isna()


def is_static(method: str) -> bool:
    """All images of the net run the same: no routing."""
    return method in (STATIC, "slimmable") or method.startswith("prune")


def _is_resnext_of(backbone: str, own: str) -> bool:
    return backbone.startswith("resnext") and backbone.split("_")[0].replace("resnext", "resnet") == own.split("_")[0]


def _same(one: Any, other: Any) -> bool:
    return bool(one == other or (one != one and other != other))  # nan: no target


def at_equal_cost(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines against narrower static nets of equal multiply-adds, which the main table shows too."""
    return lines[(lines["control"] == NARROWER) & (lines["basis"] == FLOPS) & (lines["relation"] == EQUAL)]
