"""What trained runs gain by skipping, and that they lose nothing by it: a table of README.md.

    python benchmarks/trained.py RUN ... --flops-target 0.6 [--seconds 10]

For each run: does the skipping net take the routes and give the classes of the masked one on the whole test set, on one
thread and on two; how long does it take beside the dense net, in turn in one process, on one thread by its processor time.
Writes benchmarks/results/trained.csv, a row for each run, target and size of the minibatch; others that stand there stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dynroute.bench import Plan, Point
from dynroute.data import loader
from dynroute.evaluation import Evaluator
from dynroute.measure import evaluate
from dynroute.processors import affinity
from dynroute.provenance import commit, machine
from dynroute.records import read_rows, write_rows
from dynroute.skipping import FastNet

FILE = Path(__file__).parent / "results" / "trained.csv"
BATCHES = (1, 64)
THREADS = (1, 2)  # of the comparison with the masked run
COLUMNS = (
    "run",
    "method",
    "backbone",
    "dataset",
    "target",
    "images",
    "other_routes",
    "other_classes",
    "top1_masked",
    "top1_skipping",
    "batch",
    "flops_ratio",
    "over_eager",
    "over_best",
    "ideal_share",
    "router_share",
    "rounds",
    "clock",
    "commit",
    "torch",
    "machine",
    "affinity",
)
KEY = ("run", "backbone", "dataset", "target", "batch")


def agreement(evaluator: Evaluator) -> dict[str, Any]:
    """Masked against skipping, image by image of the test split; of the numbers of threads the one that differs more."""
    net, data = evaluator.net, evaluator.data

    def batches() -> Any:
        return loader(data.test, data.spec, 64, train=False, device=evaluator.device)

    masked = evaluate(net, batches())
    made = [evaluate(net, batches(), FastNet(net, threads=threads)) for threads in THREADS]
    return {
        "images": len(masked.index_N),
        "other_routes": max(int((masked.keep_NUG != fast.keep_NUG).flatten(1).any(1).sum()) for fast in made),
        "other_classes": max(int((masked.predicted_N != fast.predicted_N).sum()) for fast in made),
        "top1_masked": f"{float(masked.right_N.double().mean()):.4f}",
        "top1_skipping": f"{min(float(fast.right_N.double().mean()) for fast in made):.4f}",
    }


def speed(evaluator: Evaluator, target: float, batch: int, seconds: float) -> dict[str, Any]:
    """The skipping row of a bench at one target. over_eager, over_best: how many times as fast as the dense net."""
    plan = Plan(batch=batch, seconds=seconds, modes=Plan.modes - {"masked"})
    point = Point(target, evaluator.net.router.setting)
    rows = {row.mode: row for row in evaluator.bench([point], plan).rows}
    row = rows["skipping"]
    assert row.speedup is not None and row.ideal_share is not None and row.router_ms is not None
    short = {
        "flops_ratio": 1 / row.macs_share,
        "over_eager": row.images_per_s / rows["dense"].images_per_s,
        "over_best": row.speedup,
        "ideal_share": row.ideal_share,
        "router_share": row.router_ms / row.latency_ms_p50,
    }
    taken = {"batch": batch, "rounds": row.rounds, "clock": row.clock}
    return taken | {name: f"{value:.3g}" for name, value in short.items()}


def main() -> None:
    """Compare, time, print, write the CSV after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--flops-target", type=float, required=True)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each mode")
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args()
    source = commit()  # of the code that is loaded now
    for run in asked.runs:
        evaluator = Evaluator.of(run, device="cpu")
        evaluator.net.router.setting = evaluator.fitted(asked.flops_target).setting
        config, target = evaluator.config, f"{asked.flops_target:g}"
        named = {"run": run.name, "method": config.router_name, "backbone": config.backbone.name}
        named |= {"dataset": config.data.label, "target": target, **agreement(evaluator)}
        torch.set_num_threads(1)
        named |= {
            "commit": source,
            "torch": torch.__version__,
            "machine": machine(evaluator.device),
            "affinity": affinity(),
        }
        for batch in BATCHES:
            timed = named | speed(evaluator, asked.flops_target, batch, asked.seconds)
            row = {name: str(value) for name, value in timed.items()}
            print(", ".join(f"{name} {row[name]}" for name in COLUMNS[: COLUMNS.index("commit")]), flush=True)
            old = list(read_rows(asked.out)) if asked.out.exists() else []
            write_rows(asked.out, [*(r for r in old if any(r[key] != row[key] for key in KEY)), row], COLUMNS)


if __name__ == "__main__":
    main()
