"""Is a time that is asked for met? `--latency-target`, again and again in one process: a table of docs/performance.md.

    python benchmarks/latency_target.py RUN ... [--times 5] [--seconds 5]

For each run: `bench` at four shares across its range; then times spread over what it found, or what that would be as fast as
the dense net is now. Each is asked for as `eval --latency-target` does, and the net timed at the share that came of it; last,
the very same net once more, which tells how far this machine lets any time be met. One image a call, one thread, its processor
time. Writes benchmarks/results/latency_target.csv, a row for each time asked; other runs that stand there stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dynroute.bench import Plan, Point
from dynroute.contracts import OutOfReach
from dynroute.evaluation import Evaluator
from dynroute.latency import dense_speed
from dynroute.provenance import commit, machine
from dynroute.records import read_rows, write_rows
from dynroute.timing import Request, bench_path

FILE = Path(__file__).parent / "results" / "latency_target.csv"
SHARES = 4
COLUMNS = (
    "run",
    "method",
    "backbone",
    "asked_ms",
    "reached_ms",
    "error",
    "again_ms",
    "again_error",
    "share",
    "seconds",
)
COLUMNS += ("clock", "commit", "torch", "machine")


def timed(evaluator: Evaluator, point: Point, seconds: float) -> tuple[float, str]:
    """Milliseconds of an image alone in the mean, skipping, and the clock."""
    plan = Plan(seconds=seconds, modes=frozenset({"dense", "skipping"}))
    row = evaluator.bench([point], plan).rows[-1]
    return 1e3 / row.images_per_s, row.clock


def met(folder: Path, times: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each of so many times, evenly spread between those of the cheapest and the dearest share."""
    evaluator = Evaluator.of(folder, device="cpu")
    table = bench_path(folder, Request(targets=evaluator.targets(SHARES), seconds=seconds)).rows
    known = sorted(1e3 / row.images_per_s for row in table if row.mode == "skipping" and row.flops_target is not None)
    then = next(row.images_per_s for row in table if row.mode == "dense_best")
    torch.set_num_threads(1)
    rows = []
    for place in range(times):
        now = dense_speed(evaluator.net, evaluator.config, evaluator.data.spec, evaluator.device)
        asked = (known[0] + (known[-1] - known[0]) * (place + 0.5) / times) * then / now
        try:
            share = evaluator.share_at(asked)
        except OutOfReach as error:  # the ends of the range waver as everything does
            print(f"{folder.name}: {error}", flush=True)
            continue
        point = Point(share, evaluator.fitted(share).setting)
        (reached, clock), (again, _) = (timed(evaluator, point, seconds) for _ in range(2))
        rows.append(
            {
                "run": folder.name,
                "method": evaluator.config.router_name,
                "backbone": evaluator.config.backbone.name,
                "asked_ms": asked,
                "reached_ms": reached,
                "error": reached / asked - 1,
                "again_ms": again,
                "again_error": again / reached - 1,
                "share": share,
                "seconds": seconds,
                "clock": clock,
                "commit": commit(),
                "torch": torch.__version__,
                "machine": machine(torch.device("cpu")),
            }
        )
        print(f"{folder.name}: {asked:.2f} ms asked, {reached:.2f} reached, {again:.2f} the second time", flush=True)
    return rows


def main() -> None:
    """Time what is asked for, and say how often it is met."""
    parser = argparse.ArgumentParser(description="Whether the times that --latency-target asks for are met.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--times", type=int, default=5, help="times asked of each run")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each timing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    made = [row for run in asked.runs for row in met(run, asked.times, asked.seconds)]
    names = {row["run"] for row in made}
    kept: list[dict[str, Any]] = [row for row in read_rows(FILE) if row["run"] not in names] if FILE.exists() else []
    write_rows(FILE, [*kept, *made], COLUMNS)
    for column in ("error", "again_error"):
        within = sum(abs(row[column]) <= 0.1 for row in made)
        print(f"{column}: {within} of {len(made)} within 10 %")


if __name__ == "__main__":
    main()
