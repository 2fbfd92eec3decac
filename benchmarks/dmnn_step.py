"""What training DMNN costs: forward and backward of sub-blocks against the plain block or net of as many parameters.

    python benchmarks/dmnn_step.py [--rounds 15] [--only basic|bottleneck|inverted|net] [--batch 128] [--precision bf16]

A block: the sub-blocks with random gates against the plain block (basic blocks: with all hidden channels together). A net:
a whole training step (forward, backward, SGD) with the controllers against the static net's. The sides of a row run in
turn in one process on one thread, so that drift hits all; figures are ratios of medians of thread CPU time. other_over_plain:
the form not taken, of basic blocks the last convolutions as one grouped convolution, of bottlenecks without the covariance
fold, or with it where the minibatch has too few pixels. bar: what over_plain is wanted to stay below. Rows go into
benchmarks/results/dmnn_step.csv as they are measured, each in the place of an earlier one of its case and machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynroute.assembly import build
from dynroute.backbones import BackboneOptions
from dynroute.config import load_config
from dynroute.contracts import Batch
from dynroute.data import Dataset, Split, known_spec
from dynroute.fit import _Part, set_modes
from dynroute.provenance import commit, machine
from dynroute.records import read_rows, write_rows
from dynroute.units import (
    GroupedBasic,
    GroupedBottleneck,
    GroupedInverted,
    PathBasic,
    PathBottleneck,
    PathInverted,
    Place,
    Unit,
)
from dynroute.units.fold import fold_pays

RESULTS = Path(__file__).parent / "results" / "dmnn_step.csv"
BARS = {"basic": 1.6, "bottleneck": 1.0, "inverted": 1.6}


class Case(NamedTuple):
    """A row: kind of block (or the net made of them), N, channels outside, pixels, images of a minibatch, arithmetic."""

    kind: str
    what: str
    parts: int
    channels: int
    pixels: int
    batch: int
    precision: str


def cases(batch: int, precision: str) -> Iterator[Case]:
    """Blocks of CIFAR nets (width 16 and 32; ResNet-50 of 0.33 G), of ImageNet's ResNet-50 and MobileNetV2, and whole nets."""
    for parts in (2, 4):
        for channels, pixels in ((16, 32), (32, 32), (32, 16), (64, 16), (64, 8), (128, 8)):
            yield Case("basic", "block", parts, channels, pixels, batch, precision)
    for channels, pixels in ((256, 16), (512, 8), (1024, 4), (2048, 2)):
        yield Case("bottleneck", "block", 4, channels, pixels, batch, precision)
    for channels, pixels in ((256, 56), (1024, 14)):
        yield Case("bottleneck", "block", 4, channels, pixels, batch // (16 if pixels > 20 else 4), precision)
    yield Case("inverted", "block", 2, 32, 28, batch // 8, precision)
    yield Case("basic", "resnet20", 2, 32, 32, batch, precision)
    yield Case("bottleneck", "resnet50_cifar", 4, 256, 32, batch, precision)


def blocks(case: Case) -> tuple[Unit, Unit]:
    """(sub-blocks, the plain block)."""
    options = BackboneOptions(unit="paths", parts=case.parts, path_least=16)
    place = Place("unit", case.channels, case.channels, 1, case.pixels)
    if case.kind == "basic":
        sizes = options.sizes(case.channels)
        return PathBasic(place, sizes), GroupedBasic(place, [sum(sizes)])
    if case.kind == "bottleneck":
        hidden = case.channels // 4
        sizes = options.sizes(hidden, middle=True)
        return PathBottleneck(place, sizes), GroupedBottleneck(place, [hidden])
    sizes = options.sizes(6 * case.channels)
    return PathInverted(place, sizes), GroupedInverted(place, [sum(sizes)])


class GroupedLast(PathBasic):
    """Last convolutions as one grouped convolution, BatchNorms on its N * C channels: exact too."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run in training."""
        assert keep_BG is not None
        u = F.relu(self.bn1(self.conv1(x_BCHW)))
        weight = torch.cat([conv.weight for conv in self.conv2])  # type: ignore[arg-type]
        y = F.conv2d(u, weight, padding=1, groups=len(self.sizes))
        gamma, beta = (torch.cat([getattr(norm, name) for norm in self.bn2]) for name in ("weight", "bias"))
        y = F.batch_norm(y, None, None, gamma, beta, True)
        gated_BHWGO = y.permute(0, 2, 3, 1).unflatten(3, (len(self.sizes), -1)) * keep_BG[:, None, None, :, None]
        return F.relu(self.shortcut(x_BCHW) + gated_BHWGO.sum(3).permute(0, 3, 1, 2))


def other(case: Case) -> Unit | None:
    """The sub-blocks in the form not taken."""
    paths, _ = blocks(case)
    if isinstance(paths, PathBasic):
        return GroupedLast(paths.place, paths.sizes)
    if isinstance(paths, PathBottleneck):
        paths.fold = not fold_pays(case.batch * case.pixels**2, sum(paths.sizes))
        return paths
    return None


def block_steps(case: Case) -> list[Callable[[], None]]:
    """Forward and backward of each side, as in training: channels_last, gradients to input and gates too."""
    torch.manual_seed(0)
    shape = (case.batch, case.channels, case.pixels, case.pixels)
    low = case.precision == "bf16"  # the input too: it comes from another block
    x_BCHW = torch.randn(shape, dtype=torch.bfloat16 if low else torch.float32)
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad_BCHW = torch.randn_like(x_BCHW)
    keep_BG = (torch.rand(case.batch, case.parts) < 0.7).float().requires_grad_()

    def step_of(unit: Unit, keep: Tensor | None) -> Callable[[], None]:
        unit = unit.to(memory_format=torch.channels_last).train()

        def step() -> None:
            unit.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                y_BCHW = unit(x_BCHW, keep)
            y_BCHW.backward(grad_BCHW)

        return step

    paths, plain = blocks(case)
    third = other(case)
    return [step_of(paths, keep_BG), step_of(plain, None), *([step_of(third, keep_BG)] if third else [])]


def net_steps(case: Case) -> list[Callable[[], None]]:
    """One training step of the routed net, controllers and losses included, and of the static net."""
    words = [
        "data.name=cifar100",
        f"backbone.name={case.what}",
        f"optim.amp={'bf16' if case.precision == 'bf16' else 'none'}",
        f"optim.batch_size={case.batch}",
    ]
    words += [f"backbone.width={case.channels}"] if case.kind == "basic" else []
    methods = (["router.name=dmnn", f"backbone.parts={case.parts}"], ["router.name=static"])
    return [net_step(case, [*words, *method]) for method in methods]


def net_step(case: Case, words: list[str]) -> Callable[[], None]:
    """One training step of a configuration on random images."""
    config = load_config(overrides=words)
    spec = known_spec(config.data)
    assert spec is not None
    torch.manual_seed(0)
    net = build(config, spec)
    images = torch.randn(case.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    rows = torch.arange(case.batch)
    batch = Batch(images, rows % spec.classes, rows % spec.superclasses, rows)
    (phase,) = config.method.phases(net, config.router)
    empty = Split(torch.zeros(0, 1, 1, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    part = _Part(net, Dataset(spec, empty, empty, empty), phase, config.optim, 0, 0, None)
    set_modes(net, phase)
    return lambda: void(part._step(batch, 0.5))


def void(_: object) -> None:
    """Forget what a step returns."""


def times(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median milliseconds of thread CPU time of each step, taken in turn."""
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 2):
        for mine, step in zip(taken, steps, strict=True):
            start = time.thread_time()
            step()
            if turn >= 2:
                mine.append(time.thread_time() - start)
    return [1e3 * statistics.median(mine) for mine in taken]


def keep(row: dict[str, Any]) -> None:
    """Put a row into the CSV, in the place of an earlier one of the same case and machine."""
    rows: dict[Any, Any] = {_name(old): old for old in read_rows(RESULTS)} if RESULTS.exists() else {}
    rows[_name(row)] = row
    RESULTS.parent.mkdir(exist_ok=True)
    write_rows(RESULTS, rows.values())


def _name(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[field]) for field in (*Case._fields, "machine"))


def main() -> None:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", choices=[*BARS, "net"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for case in cases(asked.batch, asked.precision):
        if asked.only not in (None, case.kind if case.what == "block" else "net"):
            continue
        made = block_steps(case) if case.what == "block" else net_steps(case)
        paths, plain, *rest = times(made, asked.rounds)
        row = {
            **case._asdict(),
            "over_plain": round(paths / plain, 3),
            "other_over_plain": round(rest[0] / plain, 3) if rest else None,
            "bar": BARS[case.kind],
            "paths_ms": round(paths, 1),
            "plain_ms": round(plain, 1),
            "clock": "thread",
            "rounds": asked.rounds,
            "commit": commit(),
            "machine": machine(torch.device("cpu")),
            "torch": torch.__version__,
        }
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        keep(row)


if __name__ == "__main__":
    main()
