"""What the agent's training costs: its step against a forward pass of the masked net, and the memory of a joint step.

    python benchmarks/agent_step.py [--backbone resnet20] [--batch 128] [--rounds 12]

Both sides run in turn in one process, so that drift hits both; the figures are ratios of medians. Memory is the peak
resident size of one process per side, less what importing torch takes (Linux, glibc): once with every tensor given back
to the system when it is freed, which is what the step needs, and once as malloc does by default, where pieces that it
cannot use again come on top, more or less by chance. Writes benchmarks/results/agent_step.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from dynroute.assembly import build
from dynroute.config import load_config
from dynroute.contracts import Batch
from dynroute.data import Dataset, Split, known_spec
from dynroute.fit import _Part, set_modes
from dynroute.provenance import commit, machine
from dynroute.records import write_rows
from dynroute.routers import Phase, cross_entropy
from dynroute.routers.qlearn import random_widths

RESULTS = Path(__file__).parent / "results" / "agent_step.csv"


def made(backbone: str, batch: int, phase: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """(one training step of that phase, one masked forward pass without gradient), random weights and images."""
    words = ["router.name=rnr", "data.name=cifar10", f"backbone.name={backbone}"]
    config = load_config(overrides=[*words, "optim.amp=none"])  # in fp32, as the forward pass
    spec = known_spec(config.data)
    assert spec is not None
    torch.manual_seed(0)
    net = build(config, spec)
    images = torch.randn(batch, 3, spec.image_size, spec.image_size).contiguous(memory_format=torch.channels_last)
    rows = torch.arange(batch)
    data = Batch(images, rows % spec.classes, None, rows)
    phases = {p.name: p for p in config.method.phases(net, config.router)}
    phases["dense"] = Phase("dense", 1, ("backbone",), cross_entropy, routes=net.dense_routes)
    empty = Split(torch.zeros(0, 1, 1, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    part = _Part(net, Dataset(spec, empty, empty, empty), phases[phase], config.optim, 0, 0, None)

    routes = random_widths(net.router.specs)(batch)

    def step() -> None:
        set_modes(net, phases[phase])
        part._step(data, 0.5)

    @torch.no_grad()
    def forward() -> None:
        net.eval()
        net(images, routes)

    return step, forward


def times(backbone: str, batch: int, rounds: int) -> tuple[float, float]:
    """Median seconds of an agent step and of a masked forward pass, taken in turn."""
    sides = made(backbone, batch, "agent1")
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 2):
        for side, run in enumerate(sides):
            start = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
            run()
            end = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
            if turn >= 2:
                taken[side].append(end - start)
    return statistics.median(taken[0]), statistics.median(taken[1])


def peak(backbone: str, batch: int, phase: str, returned: bool) -> float:
    """Peak MiB of a few steps of a phase in a process of its own; returned: freed tensors go back to the system at once."""
    malloc = {"MALLOC_MMAP_THRESHOLD_": "262144"} if returned else {}
    with patch.dict(os.environ, malloc), multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_peak, (backbone, batch, phase)))


def _peak(backbone: str, batch: int, phase: str) -> float:
    torch.set_num_threads(1)
    step, _ = made(backbone, batch, phase)
    before = _resident()
    for _ in range(3):
        step()
    return (_resident() - before) / 1024


def _resident() -> int:
    """Peak KiB of this process; getrusage would count what the process that started it held by then."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    step, forward = times(asked.backbone, asked.batch, asked.rounds)
    joint, dense, joint_kept, dense_kept = (
        peak(asked.backbone, asked.batch, phase, returned) for returned in (True, False) for phase in ("joint", "dense")
    )
    row = {
        "backbone": asked.backbone,
        "batch": asked.batch,
        "threads": asked.threads,
        "agent_step_over_masked_forward": step / forward,
        "joint_memory_over_dense": joint / dense,
        "joint_memory_over_dense_default_malloc": joint_kept / dense_kept,
        "agent_step_ms": step * 1e3,
        "masked_forward_ms": forward * 1e3,
        "joint_peak_mib": joint,
        "dense_peak_mib": dense,
        "joint_peak_mib_default_malloc": joint_kept,
        "dense_peak_mib_default_malloc": dense_kept,
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
    }
    for name, value in row.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    RESULTS.parent.mkdir(exist_ok=True)
    write_rows(RESULTS, [row])


if __name__ == "__main__":
    main()
