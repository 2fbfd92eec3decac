"""The difference in accuracy of two rows, with a 95 % interval: paired over the same test images where they are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynroute.contracts import InputError
from dynroute.records import SETTING, read_rows, right_of

if TYPE_CHECKING:
    import numpy as np

Z95 = 1.959964  # of the normal distribution, two-sided


class Answers(NamedTuple):
    """Which test images were answered rightly. images: a digest of which they are; right_N: 0 or 1, or means of it."""

    images: str
    right_N: np.ndarray[Any, Any]


class Difference(NamedTuple):
    """Top-1 of one row less that of another, in points of a percent, and the ends of its interval."""

    points: float
    low: float
    high: float


def paired(own: Answers | None, others: Sequence[Answers | None], weights: Sequence[float]) -> Difference | None:
    """McNemar-type normal interval of a row against the weighted mean of others on the same N images; else None.

    d_i = right_i - sum_k weight_k other_ki; 100 (mean(d) +- z sqrt(mean(d^2) - mean(d)^2) / sqrt(N)), z = 1.96. For one other
    that is the Wald interval of paired proportions (Agresti, Categorical Data Analysis, section 10.1):
    (b - c) / N +- z sqrt(b + c - (b - c)^2 / N) / N, b and c counting the images right in one alone.
    The spread over seeds is no part of it.
    """
    if own is None or not len(own.right_N):
        return None
    d_N = own.right_N.copy()
    for weight, other in zip(weights, others, strict=True):
        if other is None or other.images != own.images:
            return None
        d_N -= weight * other.right_N
    return _around(float(d_N.mean()), float(d_N.std()) / math.sqrt(len(d_N)))


def unpaired(top1: float, n: float, others: Sequence[tuple[float, float, float]]) -> Difference:
    """Rows whose images are not known: independent proportions, sqrt(p (1 - p) / n + sum w^2 q (1 - q) / m).

    others: (q, m, w) each, w a weight on the straight line. Wider than paired.
    """
    variance = top1 * (1 - top1) / n + sum(w * w * q * (1 - q) / m for q, m, w in others)
    return _around(top1 - sum(w * q for q, _, w in others), math.sqrt(variance))


def over_seeds(seeds: Sequence[Answers | None]) -> Answers | None:
    """For each image the share of seeds that answered it rightly; None where a seed is not known or saw other images."""
    import numpy as np

    known = [each for each in seeds if each is not None]
    if not known or len(known) < len(seeds) or len({each.images for each in known}) > 1:
        return None
    return Answers(known[0].images, np.mean([each.right_N for each in known], axis=0))


def answers(file: Path) -> dict[tuple[str, ...], Answers]:
    """What a right.csv holds, by setting (see `records.SETTING`) and control.

    Raises InputError on a missing, torn or foreign file.
    """
    import numpy as np

    found = {}
    for row in read_rows(file):
        try:
            right_N = np.array(right_of(row["right"], int(row["n"])), dtype=float)
            found[(*(row[name] for name in SETTING), row["control"])] = Answers(row["images"], right_N)
        except (KeyError, ValueError) as error:
            raise InputError(f"{file} is not a table of right answers ({type(error).__name__}: {error})") from None
    return found


def _around(mean: float, error: float) -> Difference:
    return Difference(100 * mean, 100 * (mean - Z95 * error), 100 * (mean + Z95 * error))
