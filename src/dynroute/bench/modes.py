"""The forms in which a net and its dense twin are timed, and the rows that come of it.

B images of a call, N images in all, R rounds, U units, G parts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynroute.backbones import Backbone
from dynroute.bench.others import Run, compiled, onnxruntime
from dynroute.bench.rounds import LEAST, Case, Times, at, choose_clock, interleaved
from dynroute.bench.routes import Opened
from dynroute.contracts import InputError, Output, Setting
from dynroute.export import OUTPUTS, SkippingGraph, Unavailable
from dynroute.net import RoutedNet
from dynroute.records import BenchRow
from dynroute.routers import Router
from dynroute.routers.static import StaticOptions, StaticRouter
from dynroute.skipping import MEMORY, FastNet, Forms, fast_net

POOL = 256  # images at least through which the rounds rotate, where the data have so many
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMS = {
    "dense": "eager",
    "executor": "executor",
    "compiled": "compiled",
}  # of the dense net; the fastest is dense_best
ONNX_SKIPPING = "onnx_skipping"  # the routed net in ONNX Runtime: one image a call
FALLEN = 0.95  # share of the dense net's multiply-adds below which time should have fallen too


class Benched(NamedTuple):
    """rows; remarks: what could not be timed, and units that run masked; forms: of the skipping run at the first point."""

    rows: list[BenchRow]
    remarks: list[str]
    forms: Forms


class Point(NamedTuple):
    """A point at which the routed net is timed: the setting for a FLOPs target (None: the trained point), or a rate.

    routes: who chooses, `router`, or `random` or `uniform` draws in its stead.
    """

    target: float | None = None
    setting: Setting = Setting()
    rate: float | None = None
    routes: str = "router"


@dataclass(frozen=True)
class Plan:
    """What is timed, and how long. modes: all that are asked for; seconds: wall time for each case; least: rounds.

    memory: bound of the routed nets' programs, in weights of the net.
    """

    batch: int = 1
    dtype: str = "fp32"
    clock: str = "auto"
    seconds: float = 5.0
    least: int = LEAST
    modes: frozenset[str] = frozenset({"dense", "all_on", "masked", "skipping", "router"})
    memory: float = MEMORY


class DenseNet(nn.Module):
    """A backbone without routing, as PyTorch runs it: no masks, no router, BatchNorms by themselves."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.eval()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """logits_BK."""
        x_BCHW = self.backbone.stem(x_BCHW)
        for unit in self.backbone.routable:
            x_BCHW = unit(x_BCHW)
        logits_BK: Tensor = self.backbone.head(x_BCHW)
        return logits_BK


def bench(
    net: RoutedNet,
    dense: Backbone,
    images_NCHW: Tensor,
    points: Sequence[Point],
    plan: Plan,
    labels: Mapping[str, Any],
) -> Benched:
    """Time all modes at all points in one interleaved run, with as many threads as torch is set to.

    dense: the plain static backbone. Each round takes the next images of the pool, all cases the same ones, so that routes
    vary as in use; before the clock starts the skipping runs have met every image of the pool once. labels: the columns of
    a row that are not measured. Raises InputError for a batch larger than the pool, and a clock or device that a mode
    cannot do with.
    """
    device, threads = images_NCHW.device, torch.get_num_threads()
    clock_name, clock = choose_clock(plan.clock, threads, device)
    if plan.batch > len(images_NCHW):
        raise InputError(f"a batch of {plan.batch} needs as many images, there are {len(images_NCHW)}")
    if plan.modes & {"onnxruntime", ONNX_SKIPPING} and (device.type != "cpu" or plan.dtype != "fp32"):
        raise InputError("--onnx runs on the processor in fp32 alone")
    with torch.inference_mode(), _kept_setting(net.router):
        made = _Cases(cast(net, plan.dtype), dense, images_NCHW, plan)
        cases = dict(made.all(points))
        times = interleaved(cases, clock, plan.seconds, plan.least)
    rows = _rows(times, points, plan, net, labels)
    for row in rows:
        row.device, row.threads, row.clock = str(device), threads, clock_name
    return Benched(rows, made.remarks, made.forms)


def cast(net: RoutedNet, dtype: str) -> RoutedNet:
    """The net with its backbone in another floating type; router and costs stay exact. fp32: the net itself."""
    if dtype == "fp32":
        return net
    other = copy.deepcopy(net)
    other.backbone.to(DTYPES[dtype])
    return other


class _Cases:
    """Makes the cases of one batch size and thread count, warmed up."""

    def __init__(self, net: RoutedNet, dense: Backbone, images_NCHW: Tensor, plan: Plan) -> None:
        self.net, self.plan, self.remarks = net.eval(), plan, list[str]()
        self.forms: Forms = {}
        dtype = DTYPES[plan.dtype]
        self.images_NCHW = images_NCHW.to(dtype, memory_format=torch.channels_last)
        body = dense if dtype is torch.float32 else copy.deepcopy(dense)
        self.dense = DenseNet(body).to(images_NCHW.device, dtype).to(memory_format=torch.channels_last)
        self.last: tuple[int, Tensor] | None = None

    def all(self, points: Sequence[Point]) -> Iterator[tuple[str, Case]]:
        """Cases by name; those of a point end in its place."""
        x, modes = self.picked(0), self.plan.modes
        if "dense" in modes:
            yield "dense", self.plain(self.dense)
            body = self.dense.backbone
            plain = RoutedNet(body, StaticRouter(body.specs, StaticOptions())).to(x.device)
            yield "executor", self.plain(fast_net(plain))
        for mode, make in (("compiled", compiled), ("onnxruntime", onnxruntime)):
            if mode in modes:
                try:
                    yield mode, self.plain(make(self.dense, x))
                except Unavailable as reason:
                    self.remarks.append(str(reason))
        if "all_on" in modes:
            dense_UG = self.net.dense_routes(1)[0].to(self.net.cost.part_UG.device).float()
            whole = fast_net(RoutedNet(self.net.backbone, Opened(self.net.router, dense_UG)), self.plan.memory)
            yield "all_on", Case(lambda turn: _call(whole, self.picked(turn)), _macs)
        for place, point in enumerate(points):
            for mode, run, read in self.routed(point):
                yield f"{mode}{place}", self.priced(point, run, read)

    def routed(self, point: Point) -> Iterator[tuple[str, Run, Callable[[Any], float]]]:
        """The routed net's modes at a point: name, work, and what is read of its result."""
        if "masked" in self.plan.modes:
            yield "masked", self.net, _macs
        if "skipping" in self.plan.modes:
            yield "skipping", self.filled(fast_net(self.net, self.plan.memory), point), _macs
        if "router" in self.plan.modes:
            yield "router", self.decisions(), lambda result: 0.0
        if ONNX_SKIPPING in self.plan.modes and self.plan.batch == 1:
            self.net.router.setting = point.setting
            try:
                graph = SkippingGraph(self.net, nn.Identity())
                yield ONNX_SKIPPING, onnxruntime(graph, self.picked(0), OUTPUTS), lambda result: float(result[-1][0])
            except Unavailable as reason:
                self.remarks.append(str(reason))

    def filled(self, fast: FastNet, point: Point) -> FastNet:
        """An executor that has measured its forms and met every image of the pool."""
        self.net.router.setting = point.setting
        hopeless = fast.warm_up(self.picked(0))
        self.forms = self.forms or fast.forms
        if hopeless:
            batch = f"at batch {self.plan.batch}, {plural(fast.threads, 'thread')}"
            self.remarks.append(f"masked, because skipping gains nothing there {batch}: {', '.join(hopeless)}")
        for turn in range(math.ceil(len(self.images_NCHW) / self.plan.batch)):
            fast(self.picked(turn))
        crowded = fast.programs.crowded()
        if crowded:
            self.remarks.append(f"some patterns run with everything computed, for want of memory: {', '.join(crowded)}")
        return fast

    def decisions(self) -> Run:
        """All decisions of a batch, on the feature maps of one batch (one for each shape, which saves memory)."""
        seen: dict[torch.Size, Tensor] = {}
        shapes: list[torch.Size] = []
        x = self.picked(0)
        router = self.net.router.deployed()
        router.setting, router.limit = self.net.router.setting, self.net.router.limit
        journey = router.start(x)
        x = self.net.backbone.stem(x)
        for u, unit in enumerate(self.net.backbone.routable):
            shapes.append(x.shape)
            seen.setdefault(x.shape, x)
            _, journey = router.choose(u, x, journey)
            x = unit(x)

        def run(x_BCHW: Tensor) -> None:
            journey = router.start(x_BCHW)
            for u, shape in enumerate(shapes):
                _, journey = router.choose(u, seen[shape], journey)

        return run

    def plain(self, run: Run) -> Case:
        """A case of the dense net."""
        return Case(lambda turn: _call(run, self.picked(turn)))

    def priced(self, point: Point, run: Run, read: Callable[[Any], float]) -> Case:
        """A case of the routed net, which finds its dial set."""

        def prepare(turn: int) -> Callable[[], Any]:
            self.net.router.setting = point.setting
            return _call(run, self.picked(turn))

        return Case(prepare, read)

    def picked(self, turn: int) -> Tensor:
        """The images of a round: the next of the pool, from its start again where it ends."""
        if self.last is None or self.last[0] != turn:
            rows_B = torch.arange(turn * self.plan.batch, (turn + 1) * self.plan.batch) % len(self.images_NCHW)
            x_BHWC = self.images_NCHW.permute(0, 2, 3, 1).index_select(0, rows_B.to(self.images_NCHW.device))
            self.last = turn, x_BHWC.permute(0, 3, 1, 2)
        return self.last[1]


def plural(count: int, word: str) -> str:
    """1 thread, 2 threads."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def _call(run: Run, *given: Tensor) -> Callable[[], Any]:
    return lambda: run(*given)


def _macs(out: Output) -> float:
    """Mean multiply-adds of the images of a run."""
    return float(out.macs_B.mean())


@contextmanager
def _kept_setting(router: Router) -> Iterator[None]:
    setting = router.setting
    try:
        yield
    finally:
        router.setting = setting


def _rows(
    times: Mapping[str, Times], points: Sequence[Point], plan: Plan, net: RoutedNet, labels: Mapping[str, Any]
) -> list[BenchRow]:
    """Rows of one interleaved run, those of the dense net first."""
    best = min((name for name in FORMS if name in times), key=lambda name: times[name].mean, default=None)
    reference = times[best] if best else None
    whole = times.get("all_on")

    def row(mode: str, taken: Times, macs: float, form: str = "", point: Point | None = None) -> BenchRow:
        own = point or Point()
        return BenchRow(
            **labels,
            mode=mode,
            form=form,
            routes=own.routes if point else "",
            flops_target=own.target,
            rate=own.rate,
            batch=plan.batch,
            dtype=plan.dtype,
            latency_ms_p50=taken.at(0.5) * 1e3 / plan.batch,
            latency_ms_p95=taken.at(0.95) * 1e3 / plan.batch,
            call_ms_p50=taken.at(0.5) * 1e3,
            wall_ms_p50=at(taken.wall_R, 0.5) * 1e3 / plan.batch,
            images_per_s=plan.batch / taken.mean,
            speedup=reference.mean / taken.mean if reference else None,
            macs_mean=macs,
            macs_share=macs / net.cost.dense,
            rounds=len(taken.seconds_R),
        )

    made = [row("dense", times["dense"], net.cost.dense, "eager")] if "dense" in times else []
    if best and reference:
        made.append(row("dense_best", reference, net.cost.dense, FORMS[best]))
    made += [row(mode, times[mode], net.cost.dense) for mode in ("compiled", "onnxruntime") if mode in times]
    if whole:
        made.append(row("all_on", whole, whole.figure_R[0]))
        made[-1].ideal_share = 1.0
    for place, point in enumerate(points):
        for mode in (ONNX_SKIPPING, "masked", "skipping"):
            taken = times.get(f"{mode}{place}")
            if taken:
                macs = sum(taken.figure_R) / len(taken.figure_R)
                made.append(row(mode, taken, macs, point=point))
        if f"skipping{place}" in times:
            made[-1].ideal_share = ideal_share(whole, times[f"skipping{place}"]) if whole else None
            decided = times.get(f"router{place}")
            made[-1].router_ms = decided.at(0.5) * 1e3 / plan.batch if decided else None
    return made


def ideal_share(whole: Times, routed: Times) -> float:
    """Speed-up over the same net with all parts on, as a share of the ratio of their multiply-adds; the median round's.

    Round by round, since dear images also take longer: both ratios are of the same images.
    """
    rounds = zip(whole.seconds_R, whole.figure_R, routed.seconds_R, routed.figure_R, strict=True)
    return at([(t / own) / (macs / run) for t, macs, own, run in rounds], 0.5)


def warnings(rows: Sequence[BenchRow]) -> list[str]:
    """A line for each point at which multiply-adds fall and time does not, in PyTorch or in ONNX Runtime."""
    dense = {(row.batch, row.threads): row.images_per_s for row in rows if row.mode == "onnxruntime"}
    found = []
    for row in rows:
        speedup, whose = row.speedup, "the best dense run"
        if row.mode == ONNX_SKIPPING:
            known = dense.get((row.batch, row.threads))
            speedup, whose = row.images_per_s / known if known else None, "the dense run in ONNX Runtime"
        if row.mode in ("skipping", ONNX_SKIPPING) and speedup is not None and row.macs_share < FALLEN and speedup <= 1:
            found.append(
                f"FLOPs fall to {row.macs_share:.2f} of dense, time does not: {speedup:.2f}x the speed of {whose} "
                f"at batch {row.batch}, {row.threads} thread{'s' * (row.threads > 1)} on {row.device}"
            )
    return found
