"""How dynamic is it? What the routes of a run tell at one setting. N images, R distinct routes, U units, G parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynroute.records import write_rows, write_text
from dynroute.report.cells import markdown_table
from dynroute.report.read import REPORT_FILE
from dynroute.report.routed import Routed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    Ints = npt.NDArray[np.int64]

SHUFFLES, SHUFFLE_SEED = 20, 0
NOTES = (
    "routes: one run for each configuration, the lowest seed; test images, last checkpoint unless its name ends in best. "
    "most common: the share of the images that take it, the accuracy on these images, and, where `eval --controls` has been "
    "run, its accuracy as a static net on all.",
    "entropy: of the choice that a unit makes, over the images, in bits, mean and highest over units. "
    "0: the same choice for every image.",
    "information on class (superclass): mutual information of the whole route and the label, in bits, plug-in estimate; "
    f"in brackets what chance gives on as many images, the mean over {SHUFFLES} shuffles of the labels.",
    "rank correlation (Spearman, equal values share their mean rank) of an image's multiply-adds with the net's loss on it, "
    "along its own route, and with its difficulty where the data tells it.",
)


@dataclass(frozen=True)
class RouteReport:
    """One line of the route report; see NOTES. None: not known.

    entropy_bits: by unit. common_*: of the most common route. common_static_top1: of the control most_common, that route for
    all images. always_on, never_on: how many of `parts` run for every image, for none. *_shuffled_bits: mean plug-in mutual
    information with shuffled labels, to be set against the one before.
    """

    run: str
    method: str
    backbone: str
    dataset: str
    flops_target: float | None
    share: float
    top1: float
    n: int
    routes: int
    units: int
    parts: int
    always_on: int
    never_on: int
    entropy_mean_bits: float
    entropy_max_bits: float
    entropy_bits: tuple[float, ...]
    common_share: float
    common_top1: float
    common_static_top1: float | None
    class_bits: float
    class_shuffled_bits: float
    superclass_bits: float | None
    superclass_shuffled_bits: float | None
    rank_cost_loss: float | None
    rank_cost_difficulty: float | None


def route_report(routed: Routed) -> RouteReport:
    """The report of one run at one setting."""
    import numpy as np

    images, row = routed.images, routed.row
    counts_R = np.bincount(images["code"], minlength=len(routed.keep_RUG))
    right_N = images["label"] == images["predicted"]
    common_N = images["code"] == counts_R.argmax()
    rates = [counts_R @ routed.keep_RUG[:, u, :parts] / len(images) for u, parts in enumerate(routed.parts)]
    rate = np.concatenate(rates)
    by_unit = [_entropy(_grouped(counts_R, routed.keep_RUG[:, u])) for u in range(len(routed.parts))]
    by_class = information(images["code"].to_numpy(), images["label"].to_numpy())
    grouped = "superclass" in images
    by_group = information(images["code"].to_numpy(), images["superclass"].to_numpy()) if grouped else (None, None)
    return RouteReport(
        **{k: row[k] for k in ("method", "backbone", "dataset", "flops_target")},
        run=routed.label,
        share=float(images["share"].mean()),
        top1=float(right_N.mean()),
        n=len(images),
        routes=len(counts_R),
        units=len(routed.parts),
        parts=len(rate),
        always_on=int((rate == 1).sum()),
        never_on=int((rate == 0).sum()),
        entropy_mean_bits=float(np.mean(by_unit)),
        entropy_max_bits=max(by_unit),
        entropy_bits=tuple(by_unit),
        common_share=float(common_N.mean()),
        common_top1=float(right_N[common_N].mean()),
        common_static_top1=routed.most_common_top1,
        class_bits=by_class[0],
        class_shuffled_bits=by_class[1],
        superclass_bits=by_group[0],
        superclass_shuffled_bits=by_group[1],
        rank_cost_loss=rank_correlation(images["macs"], images["loss"]),
        rank_cost_difficulty=rank_correlation(images["macs"], images["difficulty"]) if "difficulty" in images else None,
    )


def _grouped(counts_R: Ints, keep_RG: npt.NDArray[np.uint8]) -> Ints:
    """How many images take each of the patterns of one unit."""
    import numpy as np

    _, pattern_R = np.unique(keep_RG, axis=0, return_inverse=True)
    return np.bincount(pattern_R.ravel(), counts_R).astype(np.int64)


def _entropy(counts: Ints) -> float:
    """Bits, of the plug-in distribution."""
    import numpy as np

    part = counts[counts > 0] / counts.sum()
    return abs(float(-(part * np.log2(part)).sum()))


def information(a_N: Ints, b_N: Ints) -> tuple[float, float]:
    """Plug-in mutual information of two labellings in bits, and its mean where b is shuffled: what chance alone gives.

    I(a; b) = H(a) + H(b) - H(a, b). With many routes and few images the estimate is far above 0 for labels that have nothing to
    do with the routes, so that only its distance from the second number says anything. Ours: 20 shuffles of a fixed seed.
    """
    import numpy as np

    _, a_N = np.unique(a_N, return_inverse=True)
    _, b_N = np.unique(b_N, return_inverse=True)
    width = int(b_N.max()) + 1
    apart = _entropy(np.bincount(a_N)) + _entropy(np.bincount(b_N))

    def shared(labels_N: Ints) -> float:
        return max(apart - _entropy(np.unique(a_N * width + labels_N, return_counts=True)[1]), 0.0)

    random = np.random.default_rng(SHUFFLE_SEED)
    return shared(b_N), float(np.mean([shared(random.permutation(b_N)) for _ in range(SHUFFLES)]))


def rank_correlation(a: pd.Series[Any], b: pd.Series[Any]) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, ties at their mean rank. None where one of them never varies."""
    known = a.notna() & b.notna()
    a, b = a[known], b[known]
    if a.nunique() < 2 or b.nunique() < 2:
        return None
    return float(a.rank().corr(b.rank()))


CELLS: dict[str, Callable[[RouteReport], str]] = {
    "run": lambda r: r.run,
    "backbone": lambda r: r.backbone,
    "dataset": lambda r: r.dataset,
    "target": lambda r: "" if r.flops_target is None else f"{r.flops_target:.2f}",
    "share": lambda r: f"{100 * r.share:.1f} %",
    "test images": lambda r: str(r.n),
    "top-1 %": lambda r: f"{100 * r.top1:.2f}",
    "distinct routes": lambda r: f"{r.routes}",
    "most common taken by": lambda r: f"{100 * r.common_share:.1f} %",
    "top-1 on its images": lambda r: f"{100 * r.common_top1:.2f}",
    "as a static net": lambda r: "" if r.common_static_top1 is None else f"{100 * r.common_static_top1:.2f}",
    "parts always on": lambda r: f"{r.always_on} of {r.parts}",
    "never on": lambda r: str(r.never_on),
    "entropy, bits": lambda r: f"{r.entropy_mean_bits:.2f} (up to {r.entropy_max_bits:.2f})",
    "on class, bits": lambda r: _against_chance(r.class_bits, r.class_shuffled_bits),
    "on superclass, bits": lambda r: _against_chance(r.superclass_bits, r.superclass_shuffled_bits),
    "cost and loss": lambda r: _signed(r.rank_cost_loss),
    "cost and difficulty": lambda r: _signed(r.rank_cost_difficulty),
}


def cells(reports: Sequence[RouteReport]) -> list[dict[str, str]]:
    """The reports as people read them: for each a dict from header to text. Empty columns are left out."""
    shown = [{name: cell(report) for name, cell in CELLS.items()} for report in reports]
    filled = [name for name in CELLS if any(row[name] for row in shown)]
    return [{name: row[name] for name in filled} for row in shown]


def _against_chance(bits: float | None, shuffled: float | None) -> str:
    return "" if bits is None or shuffled is None else f"{bits:.2f} ({shuffled:.2f})"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def write_reports(reports: Sequence[RouteReport], out: Path) -> list[Path]:
    """Write routes_report.csv, a column for each field (entropy_bits: by unit, spaces between), and .md; returns both."""
    table, text = out / REPORT_FILE, (out / REPORT_FILE).with_suffix(".md")
    rows = [{**asdict(r), "entropy_bits": " ".join(f"{bits:.6g}" for bits in r.entropy_bits)} for r in reports]
    write_rows(table, rows, [f.name for f in fields(RouteReport)])
    notes = "\n".join(f"- {note}" for note in NOTES)
    write_text(text, f"{markdown_table(cells(reports))}\n\n{notes}\n")
    return [table, text]
