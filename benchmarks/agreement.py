"""Do masked and skipping runs agree on a whole test set? Routes and classes, image by image, of a trained run.

python benchmarks/agreement.py RUN --flops-target 0.5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dynroute.data import loader
from dynroute.measure import evaluate
from dynroute.records import read_rows, write_rows
from dynroute.runs import Evaluator, commit, machine
from dynroute.skipping import FastNet

FILE = Path(__file__).parent / "results" / "agreement.csv"


def main() -> None:
    """Compare, print, and write a row for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--flops-target", type=float, required=True)
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args()
    evaluator = Evaluator.of(asked.run)
    net, data, device = evaluator.net, evaluator.data, evaluator.device
    net.router.setting = evaluator.fitted(asked.flops_target).setting

    def batches():  # type: ignore[no-untyped-def]
        return loader(data.test, data.spec, 64, train=False, device=device)

    masked, rows = evaluate(net, batches()), list(read_rows(asked.out)) if asked.out.exists() else []
    for threads in (1, 2):
        fast = evaluate(net, batches(), FastNet(net, threads=threads))
        row = {
            "run": asked.run.name,
            "method": evaluator.config.router_name,
            "flops target": f"{asked.flops_target:g}",
            "threads": str(threads),
            "n": str(len(masked.index_N)),
            "other routes": str(int((masked.keep_NUG != fast.keep_NUG).flatten(1).any(1).sum())),
            "other classes": str(int((masked.predicted_N != fast.predicted_N).sum())),
            "top-1 masked": f"{float(masked.right_N.double().mean()):.4f}",
            "top-1 skipping": f"{float(fast.right_N.double().mean()):.4f}",
            "largest difference of a loss": f"{float((masked.loss_N - fast.loss_N).abs().max()):.2g}",
            "commit": commit(),
            "torch": torch.__version__,
            "machine": machine(device),
        }
        print(", ".join(f"{name} {value}" for name, value in row.items()))
        key = ("run", "flops target", "threads")
        rows = [*(old for old in rows if any(old[name] != row[name] for name in key)), row]
    write_rows(asked.out, rows)


if __name__ == "__main__":
    main()
