"""How near skipping comes to the ideal, that time falls with the multiply-adds: the tables of docs/performance.md.

    python benchmarks/skipping.py [NAME ...] [--seconds 10] [--device cuda]

Random weights and images; routes drawn at a rate or evenly; every router really runs. All figures are ratios of times that
were taken in turn in one process, by the thread's processor time with one thread, by the wall's with two (which wants a
quiet machine). Writes benchmarks/results/skipping.csv; with --device cuda skipping_cuda.csv, where no bars are set. NAMEs
measure some of the cases anew; the others keep their rows, and so do other machines. The case onnxruntime needs dynroute[export].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dynroute.assembly import untrained
from dynroute.bench import POOL, Case, Plan, choose_clock, interleaved, numbered
from dynroute.net import RoutedNet
from dynroute.processors import affinity
from dynroute.provenance import commit, machine
from dynroute.records import BenchRow, read_rows, write_rows
from dynroute.skipping import fast_net
from dynroute.timing import Request, bench_untrained, drawn

HOME = Path(__file__).parent
CONFIGS = HOME.parent / "experiments"
DMNN, VGG = CONFIGS / "imagenet" / "dmnn50_n4_t0.7.yaml", CONFIGS / "imagenet" / "rnp_vgg16_4x.yaml"
MULTIPATH, SMALL_VGG = CONFIGS / "bench" / "multipath50.yaml", CONFIGS / "bench" / "vgg16_32.yaml"
SMALL_DMNN = CONFIGS / "bench" / "dmnn20_wide.yaml"
COLUMNS = (
    "case",
    "title",
    "measure",
    "bar",
    "reached",
    "speedup",
    "flops_ratio",
    "clock",
    "rounds",
    "commit",
    "torch",
    "machine",
    "affinity",
)
MODES = Plan.modes - {"masked"}  # which nothing here is compared with
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One line of the table. bar: what `reached` is to be, at least (at most, for memory)."""

    title: str
    measure: str
    bar: float
    run: Callable[[float], Figures]


def timed(
    config: Path, batch: int, rate: float | None = None, classifier: bool = True, **asked: Any
) -> Callable[[float], dict[str, BenchRow]]:
    """Rows of a configuration by their mode, taken when called with the seconds for each mode. classifier: whether it has one."""

    @cache
    def run(seconds: float) -> dict[str, BenchRow]:
        words = ["device=cpu"] if "device" not in asked else []
        request = Request(rate=rate, batches=[batch], seconds=seconds, **{"modes": MODES, **asked})
        made, net, spec = untrained(config, words)
        if not classifier:
            net = headless(net)
        return {row.mode: row for row in bench_untrained(made, net, spec, request).rows}

    return run


def headless(net: RoutedNet) -> RoutedNet:
    """The net with means of its last feature maps in place of a classifier, which no route makes smaller."""
    backbone = net.backbone
    linear = sum(m.weight.numel() for m in backbone.head.modules() if isinstance(m, torch.nn.Linear))
    backbone.head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    backbone.fixed_macs, backbone.dense_macs = backbone.fixed_macs - linear, backbone.dense_macs - linear
    return RoutedNet(backbone, net.router)


def figures(row: BenchRow, reached: float) -> Figures:
    """The figures of a line that rests on one skipping row."""
    flops = 1 / row.macs_share
    taken = {"clock": row.clock, "rounds": row.rounds, "machine": row.machine}
    return {"reached": reached, "speedup": row.speedup, "flops_ratio": flops, **taken}


def ideal(rows: Callable[[float], dict[str, BenchRow]], beside_dense: bool = True) -> Callable[[float], Figures]:
    """Share of the ideal: speed-up over the same net with all parts on / ratio of their multiply-adds.

    beside_dense: whether the dense net that was timed is the same net otherwise; it always has its classifier.
    """

    def run(seconds: float) -> Figures:
        row = rows(seconds)["skipping"]
        found = figures(row, row.ideal_share or 0.0)
        return found if beside_dense else found | {"speedup": None}

    return run


def over(mode: str, routed: str, rows: Callable[[float], dict[str, BenchRow]]) -> Callable[[float], Figures]:
    """How many times as many images a second one mode does as another."""

    def run(seconds: float) -> Figures:
        found = rows(seconds)
        if mode not in found:
            raise SystemExit(f"no row of {mode}: it could not run here")
        return figures(found[routed], found[routed].images_per_s / found[mode].images_per_s)

    return run


def two_cores(seconds: float) -> Figures:
    """Images a second of two threads over those of one, batch 8, in turn."""
    net, images = routed_net()
    kept = torch.get_num_threads()
    cases = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fast = fast_net(net)
        for start in range(0, len(images), 8):
            fast(images[start : start + 8])
        cases[str(threads)] = Case(spread(fast, images, threads))
    cpu = torch.device("cpu")
    times = interleaved(cases, choose_clock("wall", 2, cpu)[1], seconds)
    torch.set_num_threads(2)
    taken = {"clock": "wall", "rounds": len(times["1"].seconds_R), "machine": machine(cpu)}
    torch.set_num_threads(kept)
    return {"reached": times["1"].at(0.5) / times["2"].at(0.5), **taken}


def spread(
    fast: Callable[[torch.Tensor], Any], images: torch.Tensor, threads: int
) -> Callable[[int], Callable[[], Any]]:
    """The case of two_cores for a number of threads."""

    def prepare(turn: int) -> Callable[[], Any]:
        torch.set_num_threads(threads)
        start = turn * 8 % len(images)
        return lambda: fast(images[start : start + 8])

    return prepare


def cache_memory(seconds: float) -> Figures:
    """Bytes in the cache after as many random routes as the pool has images, over those of the net's weights."""
    net, images = routed_net()
    torch.set_num_threads(1)
    fast = fast_net(net)
    for image in images.split(1):
        fast(image)
    weights = sum(p.nbytes for p in net.backbone.parameters())
    return {"reached": fast.programs.bytes / weights, "rounds": len(images), "machine": machine(torch.device("cpu"))}


def routed_net() -> tuple[RoutedNet, torch.Tensor]:
    """DMNN's ResNet-50 under routes drawn at a rate of one half, and the images they belong to."""
    _, net, spec = untrained(DMNN)
    images = torch.randn(POOL, 3, spec.image_size, spec.image_size).contiguous(memory_format=torch.channels_last)
    return drawn(net.eval(), numbered(images), 0.5)[0], images


IDEAL = "share of the ideal"
DMNN_ALONE = timed(DMNN, 1, 0.5)  # two lines of one run
BARS = {
    "dmnn50_b1": Bar("DMNN ResNet-50, N=4, rate .5, batch 1", IDEAL, 0.90, ideal(DMNN_ALONE)),
    "dmnn50_b8": Bar("DMNN ResNet-50, N=4, rate .5, batch 8", IDEAL, 0.90, ideal(timed(DMNN, 8, 0.5))),
    "dmnn50_b32": Bar("DMNN ResNet-50, N=4, rate .5, batch 32", IDEAL, 0.85, ideal(timed(DMNN, 32, 0.5))),
    "onnxruntime": Bar(
        "DMNN ResNet-50, N=4, rate .5, batch 1",
        "against ONNX Runtime's dense ResNet-50",
        2.2,
        over("onnxruntime", "skipping", timed(DMNN, 1, 0.5, modes=MODES | {"onnxruntime"})),
    ),
    "vgg16_b1": Bar("RNP VGG-16 at 224, uniform actions, batch 1", IDEAL, 0.93, ideal(timed(VGG, 1))),
    "vgg16_convs_b1": Bar(
        "the same without its classifier, batch 1",
        IDEAL,
        0.0,
        ideal(timed(VGG, 1, classifier=False), beside_dense=False),
    ),
    "vgg16_b8": Bar("RNP VGG-16 at 224, uniform actions, batch 8", IDEAL, 0.90, ideal(timed(VGG, 8))),
    "vgg16_32_b1": Bar("RNP VGG-16 at 32, uniform actions, batch 1", IDEAL, 0.80, ideal(timed(SMALL_VGG, 1))),
    "vgg16_32_b32": Bar("RNP VGG-16 at 32, uniform actions, batch 32", IDEAL, 0.75, ideal(timed(SMALL_VGG, 32))),
    "multipath50": Bar("RNR multi-path ResNet-50 at 224, batch 1", IDEAL, 0.92, ideal(timed(MULTIPATH, 1))),
    "dmnn20_wide": Bar(
        "DMNN ResNet-20, sub-blocks of 16 to 64 channels, batch 64", IDEAL, 0.88, ideal(timed(SMALL_DMNN, 64, 0.5))
    ),
    "two_cores": Bar("DMNN ResNet-50, N=4, rate .5, batch 8", "two cores against one", 1.9, two_cores),
    "dense": Bar(
        "dense ResNet-50, batch 1, one thread",
        "executor against eager channels_last",
        1.7,
        over("dense", "dense_best", DMNN_ALONE),
    ),
    "cache": Bar("DMNN ResNet-50, N=4, rate .5", "cache over weights, at most", 3.0, cache_memory),
}
CUDA = {
    f"{config.stem}_b{batch}_{dtype}": Bar(
        f"{config.stem}, batch {batch}, {dtype}",
        IDEAL,
        0.0,
        ideal(timed(config, batch, rate, dtype=dtype, device="cuda")),
    )
    for config, rate in ((DMNN, 0.5), (VGG, None), (MULTIPATH, None))
    for dtype in ("fp32", "bf16")
    for batch in (1, 64, 256)
}


def main() -> None:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BARS)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each mode of a case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()
    source = commit()  # of the code that is loaded now, whatever becomes of the files
    bars = CUDA if asked.device == "cuda" else BARS
    file = HOME / "results" / ("skipping_cuda.csv" if asked.device == "cuda" else "skipping.csv")
    for name in asked.names or bars:
        if name not in bars:
            parser.error(f"no case {name!r} (choices: {', '.join(bars)})")
        bar = bars[name]
        found = bar.run(asked.seconds)
        row = {"case": name, "title": bar.title, "measure": bar.measure, "bar": bar.bar or None, **found}
        row |= {"commit": source, "torch": torch.__version__, "affinity": affinity()}
        aim = f" (bar {bar.bar:g})" if bar.bar else ""
        print(f"{name:14} {bar.title}, {bar.measure}: {row['reached']:.3f}{aim}", flush=True)
        store(file, row, list(bars))


def store(file: Path, row: Figures, order: list[str]) -> None:
    """Put a row in the place of the one of its case and machine; three digits tell all that was measured."""
    short = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
    rows: dict[tuple[str, str], Any] = (
        {(old["case"], old["machine"]): old for old in read_rows(file)} if file.exists() else {}
    )
    rows[row["case"], row["machine"]] = short
    write_rows(file, sorted(rows.values(), key=lambda row: order.index(row["case"])), COLUMNS)


if __name__ == "__main__":
    main()
