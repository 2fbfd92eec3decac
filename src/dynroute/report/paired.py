"""The difference in accuracy of two rows, with a 95 % interval: paired over the same test images where they are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dynroute.contracts import InputError
from dynroute.records import read_rows

Z95 = 1.959964  # of the normal distribution, two-sided
COLUMNS = ("split", "flops_target", "checkpoint", "index", "label", "predicted")
Images = dict[tuple[str, str], bool]  # (index, label) -> answered rightly


class Difference(NamedTuple):
    """Top-1 of one row less that of another, in points of a percent, and the ends of its interval."""

    points: float
    low: float
    high: float


def paired(right: Images, others: Sequence[Images], weights: Sequence[float]) -> Difference | None:
    """McNemar-type normal interval of a row against the weighted mean of others on the same N images; else None.

    d_i = right_i - sum_k weight_k other_ki; 100 (mean(d) +- z sqrt(mean(d^2) - mean(d)^2) / sqrt(N)), z = 1.96. For one other
    that is the Wald interval of paired proportions (Agresti, Categorical Data Analysis, section 10.1):
    (b - c) / N +- z sqrt(b + c - (b - c)^2 / N) / N, b and c counting the images right in one alone.
    The spread over seeds is no part of it.
    """
    if not right or not others or any(other.keys() != right.keys() for other in others):
        return None
    terms = [hit - sum(w * o[i] for w, o in zip(weights, others, strict=True)) for i, hit in right.items()]
    mean = math.fsum(terms) / len(terms)
    variance = max(math.fsum(d * d for d in terms) / len(terms) - mean**2, 0)
    return _around(mean, math.sqrt(variance / len(terms)))


def unpaired(top1: float, n: float, other: float, other_n: float) -> Difference:
    """Rows whose images are not known: independent proportions, sqrt(p (1 - p) / n + q (1 - q) / m); wider than paired."""
    return _around(top1 - other, math.sqrt(top1 * (1 - top1) / n + other * (1 - other) / other_n))


def answers(file: Path, target: float | None) -> Images:
    """The test images of a routes.csv at a target (None: the trained point), last checkpoint.

    Raises InputError on a missing, torn or foreign file.
    """
    rows = read_rows(file)
    missing = [name for name in COLUMNS if rows and name not in rows[0]]
    if missing:
        raise InputError(f"{file} lacks the columns {', '.join(missing)}: written by another version or program")
    wanted = ("test", "last", "" if target is None else f"{target:.12g}")
    free = (r for r in rows if not r.get("flops_max"))  # of rows without a limit on every image
    mine = (r for r in free if (r["split"], r["checkpoint"], r["flops_target"]) == wanted)
    return {(r["index"], r["label"]): r["label"] == r["predicted"] for r in mine}


def _around(mean: float, error: float) -> Difference:
    return Difference(100 * mean, 100 * (mean - Z95 * error), 100 * (mean + Z95 * error))
