"""Do easy images cost less? Cost of the images that the dense net gets wrong against those it gets right, by class too.

    python experiments/easy_is_cheap.py RUN DENSE_RUN [--hard 3,5 --easy 1,8] [--out FILE.csv]

Both folders must have been evaluated on the same test images (`dynroute eval`). A row a target: the two mean shares, their
difference with its 95 % interval (normal, two independent samples), the rank correlation of cost with the dense net's loss
(Spearman), the cheapest and the dearest class, and how many times what the classes named easy cost those named hard cost
(CIFAR-10's 3 and 5 are cat and dog, 1 and 8 automobile and ship). On `shapes`, also the rank correlation of cost with the
difficulty that each image was drawn with, and the mean share of each fifth of the images, easiest first.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pandas as pd

from dynroute.report.images import read_images

COLUMNS = {**dict.fromkeys(("index", "label", "predicted"), "int64"), "loss": "float64", "macs": "float64"}


def routes(folder: Path) -> pd.DataFrame:
    """Test images of a run's routes.csv, of its last checkpoint and without a limit."""
    read = read_images(folder / "routes.csv", COLUMNS, {"difficulty": "float64"})
    own = read[(read["split"] == "test") & (read["flops_max"] == "") & (read["checkpoint"] == "last")]
    return own.assign(flops_target=pd.to_numeric(own["flops_target"]))


def rows(run: Path, dense: Path, hard_classes: list[int], easy_classes: list[int]) -> list[dict[str, object]]:
    """The table, a row for each target of the run. Raises SystemExit for a class that has no image."""
    reference = routes(dense).drop_duplicates("index").set_index("index")
    size = reference["macs"].max()
    table: list[dict[str, object]] = []
    for target, part in routes(run).groupby("flops_target", dropna=False):
        part = part.set_index("index")
        share = part["macs"] / size
        wrong = (reference["label"] != reference["predicted"]).reindex(part.index)
        hard, easy = share[wrong], share[~wrong]
        error = math.sqrt(hard.var() / len(hard) + easy.var() / len(easy))
        by_class = share.groupby(part["label"]).mean()
        if missing := sorted({*hard_classes, *easy_classes} - set(by_class.index)):
            raise SystemExit(f"easy_is_cheap: no image of class {missing[0]}")
        ratio = by_class[hard_classes].mean() / by_class[easy_classes].mean() if hard_classes and easy_classes else None
        table.append(
            {
                "run": run.name,
                "flops_target": target,
                "share_dense_wrong": hard.mean(),
                "share_dense_right": easy.mean(),
                "difference": hard.mean() - easy.mean(),
                "low_95": hard.mean() - easy.mean() - 1.96 * error,
                "high_95": hard.mean() - easy.mean() + 1.96 * error,
                "rank_correlation_with_dense_loss": share.rank().corr(reference["loss"].reindex(part.index).rank()),
                "cheapest_class": by_class.idxmin(),
                "cheapest_class_share": by_class.min(),
                "dearest_class": by_class.idxmax(),
                "dearest_class_share": by_class.max(),
                **({} if ratio is None else {"hard_classes_over_easy": ratio}),
                "n": len(part),
                "n_dense_wrong": len(hard),
                **(by_difficulty(share, part["difficulty"]) if "difficulty" in part else {}),
            }
        )
    return table


def by_difficulty(share: pd.Series, difficulty: pd.Series) -> dict[str, object]:
    """Spearman's correlation with its 95 % interval (Fisher's transformation, Fieller's variance), and shares by fifths."""
    found = share.rank().corr(difficulty.rank())
    reach = 1.96 * math.sqrt(1.06 / (len(share) - 3))
    fifths = share.groupby(pd.qcut(difficulty, 5, labels=False)).mean()
    return {
        "rank_correlation_with_difficulty": found,
        "difficulty_low_95": math.tanh(math.atanh(found) - reach),
        "difficulty_high_95": math.tanh(math.atanh(found) + reach),
        **{f"share_fifth_{k + 1}": value for k, value in enumerate(fifths)},
    }


def numbers(text: str) -> list[int]:
    """1,8 as [1, 8]."""
    return [int(word) for word in text.split(",")]


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("dense", type=Path)
    for side in ("hard", "easy"):
        parser.add_argument(f"--{side}", type=numbers, default=[], metavar="CLASS,...", help=f"classes thought {side}")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    table = pd.DataFrame(rows(asked.run, asked.dense, asked.hard, asked.easy))
    print(table.to_string(index=False, float_format="%.4g"))
    if asked.out:
        table.to_csv(asked.out, index=False, float_format="%.6g", lineterminator="\n")


if __name__ == "__main__":
    main()
