"""`dynroute bench`: from a run folder or a configuration to timed rows.

A run is timed on images of its test split, under its own router. A configuration alone has random weights: it is timed on
random images, under routes that are drawn while its router is asked for nothing but its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dynroute.assembly import dense_twin, fingerprint, on_device, prepare, untrained
from dynroute.bench import (
    DTYPES,
    ONNX_SKIPPING,
    POOL,
    Benched,
    Overruled,
    Plan,
    Point,
    bench,
    numbered,
    random_routes,
    uniform_routes,
)
from dynroute.calibration import TOLERANCE
from dynroute.checkpoints import LAST
from dynroute.config import Config
from dynroute.contracts import InputError
from dynroute.data import DataSpec
from dynroute.evaluation import Evaluator
from dynroute.net import RoutedNet
from dynroute.processors import processors
from dynroute.provenance import bench_labels, environment
from dynroute.records import BENCH_FILE, FORMS_FILE, BenchRow, merge_bench, nearest
from dynroute.routers import ranged
from dynroute.skipping import Forms, save_forms

CLOCKS = ("auto", "thread", "wall")


@dataclass
class Request:
    """What `dynroute bench` is asked for; modes: without the optional ones. Raises InputError on the first value out of range."""

    targets: list[float] = field(default_factory=list)
    rate: float | None = None
    batches: list[int] = field(default_factory=lambda: [1])
    threads: list[int] = field(default_factory=lambda: [1])
    device: str | None = None
    dtype: str = "fp32"
    clock: str = "auto"
    seconds: float = Plan.seconds
    compiled: bool = False
    onnx: bool = False
    modes: frozenset[str] = Plan.modes
    data: Path | None = None
    memory: float = Plan.memory

    def __post_init__(self) -> None:
        """Check every value by itself."""
        cores = len(processors())
        if self.rate is not None:
            ranged("--rate", self.rate, 0, 1)
        for batch in self.batches:
            ranged("--batch", batch, 1, 65_536)
        for threads in self.threads:
            if not 1 <= threads <= cores:
                raise InputError(
                    f"--threads must lie between 1 and the {cores} that this process may use, not {threads}"
                )
        ranged("--seconds", self.seconds, 0, 86_400)
        ranged("--memory", self.memory, 0, 1000)
        for name, value, known in (("--dtype", self.dtype, DTYPES), ("--clock", self.clock, CLOCKS)):
            if value not in known:
                raise InputError(f"{name} must be {' or '.join(known)}, not {value!r}")

    def plans(self) -> Iterator[tuple[int, Plan]]:
        """Thread count and plan of every interleaved run."""
        optional = {"compiled": self.compiled, "onnxruntime": self.onnx, ONNX_SKIPPING: self.onnx}
        modes = self.modes | {mode for mode, asked in optional.items() if asked}
        for threads in self.threads:
            for batch in self.batches:
                yield threads, Plan(batch, self.dtype, self.clock, self.seconds, modes=modes, memory=self.memory)


@dataclass
class Timed:
    """rows: of all batch sizes and thread counts; remarks: what could not be timed; missed: targets that were not reached.

    forms: that the units of the first point run fastest in.
    """

    rows: list[BenchRow]
    remarks: list[str]
    missed: list[str]
    forms: Forms


Said = Callable[[str], None]


def bench_path(source: Path, request: Request, say: Said = lambda text: None) -> Timed:
    """Time a run folder, whose rows go into its bench.csv, or a YAML file. Raises InputError."""
    if source.is_dir():
        return _of_run(source, request, say)
    if not source.exists():
        raise InputError(f"{source} is neither a configuration nor a run folder{nearest(source)}")
    if request.targets:
        raise InputError(f"--flops-target needs a trained run, {source} is a configuration: --rate draws its routes")
    config, net, spec = untrained(source, data_path=request.data)
    return bench_untrained(config, net, spec, request, say)


def _of_run(folder: Path, request: Request, say: Said) -> Timed:
    if request.rate is not None:
        raise InputError(f"--rate draws routes for a configuration; {folder} is a run, which has a router of its own")
    evaluator = Evaluator.of(folder, device=request.device, data_path=request.data)
    points, missed = [Point()], []
    for target in request.targets:
        say(f"fitting the setting for {target:g}")
        fit = evaluator.fitted(target)
        points.append(Point(target, fit.setting))
        if abs(fit.share - target) > TOLERANCE:
            low, high = evaluator.dial.calibration.span()
            missed.append(
                f"target {target:g} missed: {fit.share:.3f} on calibration, this net reaches {low:.3f} to {high:.3f}"
            )
    timed = _timed(lambda plan: evaluator.bench(points, plan), request, say)
    merge_bench(folder / BENCH_FILE, timed.rows)
    if timed.forms and evaluator.device.type == "cpu" and request.dtype == "fp32":
        save_forms(folder / FORMS_FILE, fingerprint(folder / LAST), environment(), timed.forms)
    return replace(timed, missed=missed)


def bench_untrained(
    config: Config, net: RoutedNet, spec: DataSpec, request: Request, say: Said = lambda text: None
) -> Timed:
    """Time a net with random weights on random images, under drawn routes unless its router is one that learns nothing."""
    device = prepare(on_device(config, request.device))
    net, dense = net.to(device), dense_twin(config, spec).backbone.to(device)
    images = max(POOL, 2 * max(request.batches))
    drawing = torch.Generator().manual_seed(config.top.seed)
    images_NCHW = torch.randn(images, spec.channels, spec.image_size, spec.image_size, generator=drawing)
    images_NCHW = numbered(images_NCHW.to(device, memory_format=torch.channels_last))
    net, point = drawn(net, images_NCHW, request.rate)

    def run(plan: Plan) -> Benched:
        return bench(net, dense, images_NCHW, [point], plan, bench_labels(config, device))

    return _timed(run, request, say)


def drawn(net: RoutedNet, images_NCHW: torch.Tensor, rate: float | None) -> tuple[RoutedNet, Point]:
    """The net under routes drawn for the numbered images: at a rate as router.name=random, None: evenly from the legal ones.

    A router without weights has no need of draws, and keeps its own where no rate is asked for.
    """
    if rate is None and not list(net.router.parameters()):
        return net, Point()
    if rate is None:
        routes_NUG = uniform_routes(net.backbone.specs, len(images_NCHW))
    else:
        routes_NUG = random_routes(net.backbone.specs, images_NCHW, rate)
    made = RoutedNet(net.backbone, Overruled(net.router, routes_NUG)).to(images_NCHW.device)
    return made, Point(rate=rate, routes="uniform" if rate is None else "random")


def _timed(run: Callable[[Plan], Benched], request: Request, say: Said) -> Timed:
    """All interleaved runs, one after the other."""
    rows: list[BenchRow] = []
    remarks: list[str] = []
    forms: Forms = {}
    for threads, plan in request.plans():
        say(f"timing batch {plan.batch}, threads {threads}")
        with _threads(threads):
            found = run(plan)
        rows += found.rows
        remarks += found.remarks
        forms |= found.forms
    return Timed(rows, list(dict.fromkeys(remarks)), [], forms)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
