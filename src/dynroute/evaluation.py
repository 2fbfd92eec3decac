"""From a run folder to result rows: the dial set for a target, the split measured, controls beside it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dynroute.assembly import (
    check_data,
    dataset,
    dense_twin,
    fingerprint,
    inference_parameters,
    moved,
    on_device,
    prepare,
    restore,
    same_images,
)
from dynroute.bench import POOL, Benched, Plan, Point, bench
from dynroute.calibration import (
    TOLERANCE,
    Fit,
    latency_for_share,
    outdated,
    read_budget,
    share_for_latency,
    write_budget,
)
from dynroute.checkpoints import BEST, LAST
from dynroute.config import Config, origin
from dynroute.contracts import Batch, InputError, Setting
from dynroute.controls import CONTROLS
from dynroute.data import Dataset, limited, loader
from dynroute.exhibits import write_images, write_names
from dynroute.latency import latency_table
from dynroute.measure import Dial, Scores, evaluate, make_dial
from dynroute.net import RoutedNet
from dynroute.provenance import bench_labels, commit, machine
from dynroute.records import (
    BENCH_FILE,
    EVAL_FILE,
    RIGHT_FILE,
    ROUTES_FILE,
    BenchRow,
    EvalRow,
    check_writable,
    image_setting,
    locked,
    merge_bench,
    merge_eval,
    nearest,
    read_rows,
    right_text,
    route_text,
    write_rows,
)

CALIBRATED_ON = 2500  # images of the calibration split over which a price is searched; shares transfer within 0.01
LATENCY_SECONDS, LATENCY_TRIES = 2.0, 4  # of each try of a time asked for
LATENCY_CLOSE, LATENCY_MET = 0.03, 0.1  # how near ends the tries, from the second on, and how near is near enough


@dataclass
class Result:
    """One evaluated setting: its row, the range of shares the dial reaches, whether the target was missed, and each image.

    timed: rows of the time that was measured with it, if it was.
    """

    row: EvalRow
    reachable: tuple[float, float] | None
    missed: bool
    scores: Scores
    timed: list[BenchRow] = dataclasses.field(default_factory=list)


@dataclass
class Evaluator:
    """A trained run made ready to be measured: net, data, dial; each target reuses what earlier ones measured.

    flops_max: share of the dense net's multiply-adds that no image may exceed. remarks: what the user should be told.
    """

    folder: Path
    net: RoutedNet
    config: Config
    data: Dataset
    device: torch.device
    checkpoint: str
    epochs: float
    precision: str
    dial: Dial
    flops_max: float | None = None
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        folder: Path,
        checkpoint: str = "last",
        flops_max: float | None = None,
        device: str | None = None,
        data_path: Path | None = None,
    ) -> Evaluator:
        """Open a run folder. checkpoint: last (the end of the schedule) or best (by accuracy on the calibration split).

        device, data_path: instead of the configuration's. Raises OutOfReach where flops_max lies below the cheapest route.
        """
        if not folder.is_dir():
            raise InputError(f"{folder} is not a run folder{nearest(folder)}")
        check_writable(folder)
        path = folder / (BEST if checkpoint == "best" else LAST)
        net, config, content = restore(path)
        place = prepare(on_device(config, device))
        elsewhere = moved(config, data_path)
        data = dataset(elsewhere)  # the rows stay those of the data that the run was trained on
        check_data(content, data.spec, config, folder)
        net = net.to(place).eval()
        net.set_limit(flops_max)
        few = limited(data.calibration, CALIBRATED_ON)

        def batches() -> Iterable[Batch]:
            return loader(few, data.spec, 256, train=False, device=place, workers=config.data.workers)

        remarks: tuple[str, ...] = ()
        if elsewhere.data.label != config.data.label:
            remarks = (
                f"{elsewhere.data.label} stands in the rows as {config.data.label}, which the run was trained on",
            )
        if outdated(folder):
            remarks += ("budget.json is of an older version: settings are fitted anew",)
        if not same_images(content, data):
            remarks += (
                f"the training images of {elsewhere.data.label} are not those of {folder}: some that this was trained on may "
                "now be in the calibration split, on which settings are fitted",
            )
        rows = content["rows"]
        planned = content["meta"].get("epochs", 0)  # which older checkpoints do not say
        if checkpoint == "last" and len(rows) < planned:
            remarks += (f"{folder} has {len(rows)} of its {planned} epochs: `dynroute train --resume` finishes it",)
        dial = make_dial(net, len(few), batches, read_budget(folder, fingerprint(path), flops_max))
        return cls(folder, net, config, data, place, checkpoint, len(rows), trained_in(rows), dial, flops_max, remarks)

    def measure(self, target: float | None, split: str = "test", timed: bool = False) -> Result:
        """Set the dial for a target by the calibration split (None: the trained point), then measure the split.

        Writes the row into eval.csv, the per-image routes into routes.csv, what was timed into bench.csv, and what `exhibits`
        leaves beside them.
        """
        fit = None if target is None else self.fitted(target)
        setting = self.net.router.setting = fit.setting if fit else Setting()
        part, batches = self._split(split)
        scores = evaluate(self.net, batches)
        row = self._row(scores, split, target, fit)
        rows: list[BenchRow] = []
        if timed:
            plan = Plan(seconds=1.0, modes=frozenset({"dense", "skipping"}))
            rows = self.bench([Point(target, setting)], plan, split).rows
            merge_bench(self.folder / BENCH_FILE, rows)
            row.latency_ms_p50, row.speedup = rows[-1].latency_ms_p50, rows[-1].speedup
            row.latency_ms_mean = 1e3 / rows[-1].images_per_s
            row.latency_batch, row.latency_threads, row.latency_device = (
                rows[-1].batch,
                rows[-1].threads,
                rows[-1].device,
            )
        merge_eval(self.folder / EVAL_FILE, row)
        self._write_routes(scores, part, split, target)
        missed = target is not None and abs(row.macs_share - target) > TOLERANCE
        reachable = self.dial.calibration.span() if target is not None else None
        return Result(row, reachable, missed, scores, rows)

    def bench(self, points: Sequence[Point], plan: Plan, split: str = "test") -> Benched:
        """What `bench.bench` finds at points of this run, on images of a split."""
        part, _ = self._split(split)
        images = max(POOL, 2 * plan.batch)
        few = limited(part, images)
        workers = self.config.data.workers
        batch = next(iter(loader(few, self.data.spec, images, train=False, device=self.device, workers=workers)))
        dense = dense_twin(self.config, self.data.spec).backbone.to(self.device)
        labels = bench_labels(self.config, self.device) | {"run": self.folder.name}
        benched = bench(self.net, dense, batch.images, points, plan, labels)
        for row in benched.rows:
            row.flops_max, row.checkpoint = self.flops_max, self.checkpoint
        return benched

    def targets(self, count: int = 10) -> list[float]:
        """So many targets across the range that the dial reaches, its ends included."""
        low, high = self.dial.span()
        return [round(low + (high - low) * i / (count - 1), 4) for i in range(count)]

    def share_at(self, ms: float) -> float:
        """The share at which an image alone takes so many milliseconds in the mean.

        The table's share is tried on images of the calibration split, and the table corrected by what came of it, a few
        times; the share is returned that comes nearest, with a remark where that is not near. A try tells how the net
        compares with the dense one in the same rounds; how fast that is, all tries tell together, since machines waver.
        Raises as `latency_table` does, and OutOfReach where even the cheapest share of the table is slower.
        """
        table = latency_table(self.folder, self.net, self.config, self.data.spec, self.device)
        plan = Plan(seconds=LATENCY_SECONDS, modes=frozenset({"dense", "skipping"}))
        share = share_for_latency(table, ms)
        dense: list[float] = []  # milliseconds of the dense net at each try
        over_dense: dict[float, list[float]] = {}  # by share: times of the net over those of the dense one
        while True:
            rows = self.bench([Point(share, self.fitted(share).setting)], plan, "calib").rows
            dense.append(next(1e3 / row.images_per_s for row in rows if row.mode == "dense_best"))
            over_dense.setdefault(share, []).append(1e3 / rows[-1].images_per_s / dense[-1])
            takes = {tried: fmean(dense) * fmean(ratios) for tried, ratios in over_dense.items()}
            if len(dense) == LATENCY_TRIES or (abs(takes[share] / ms - 1) <= LATENCY_CLOSE and len(dense) > 1):
                break
            over_table = takes[share] / latency_for_share(table, share)
            now = [(known, over_table * time) for known, time in table]
            share = share_for_latency(now, max(ms, min(now)[1]))
        share = min(takes, key=lambda tried: abs(takes[tried] / ms - 1))
        if abs(takes[share] / ms - 1) > LATENCY_MET:
            remark = f"{ms:g} ms an image were asked for; nearest comes share {share:.3f}, at {takes[share]:.3g} ms"
            self.remarks = (*self.remarks, remark)
        return share

    def controls(self, result: Result) -> list[Result]:
        """The rows of CONTROLS made from an evaluation's own routes on the same images; none where all took one route.

        shuffled and random keep the router's multiply-adds and so stand at the routed row's cost; most_common is a static
        net, which needs no router and is not charged for one. Writes the rows into eval.csv, and which images they have
        right into right.csv.
        """
        routes_NUG, routed = result.scores.keep_NUG, result.row
        made: list[Result] = []
        for name, control in CONTROLS.items() if routed.routes > 1 else ():
            given = control.routes(routes_NUG, self.config.top.seed)
            scores = evaluate(self.net, self._split(routed.split)[1], routes_NUG=given)
            unpaid = 0.0 if control.pays_router else self.net.cost.router
            scores.macs_N = scores.macs_N - unpaid
            row = self._row(scores, routed.split, routed.flops_target, None)
            row.control, row.price, row.router_share = name, routed.price, row.router_share - unpaid / row.macs_dense
            if not control.pays_router:
                row.params = sum(p.numel() for p in self.net.backbone.parameters())
            merge_eval(self.folder / EVAL_FILE, row)
            made.append(Result(row, None, False, scores))
            self._write_right(scores, routed.split, routed.flops_target, name)
        return made

    def fitted(self, target: float) -> Fit:
        """Setting and expected share for a target; what was measured on the way is stored in budget.json."""
        known = self.dial.calibration
        before, fit = len(known.searched), self.dial.find(target)
        if len(known.searched) > before:
            prints = {name: fingerprint(self.folder / name) for name in (BEST, LAST) if (self.folder / name).exists()}
            own = prints[BEST if self.checkpoint == "best" else LAST]
            write_budget(self.folder, own, known, self.flops_max, prints.values())
        return fit

    def _split(self, split: str) -> tuple[Any, Any]:
        """A split and its batches."""
        part = self.data.test if split == "test" else self.data.calibration
        workers = self.config.data.workers
        return part, loader(part, self.data.spec, 256, train=False, device=self.device, workers=workers)

    def _row(self, scores: Scores, split: str, target: float | None, fit: Fit | None) -> EvalRow:
        config, cost = self.config, self.net.cost
        setting = fit.setting if fit else Setting()
        return EvalRow(
            run=self.folder.name,
            method=config.router_name,
            backbone=config.backbone.name,
            dataset=config.data.label,
            seed=config.top.seed,
            split=split,
            flops_target=target,
            price=setting.price,
            price_other=setting.other if setting.part else None,
            price_part=setting.part if setting.part else None,
            share_calib=fit.share if fit else None,
            share_low=fit.low if fit else None,
            share_high=fit.high if fit else None,
            flops_max=self.flops_max,
            macs_mean=float(scores.macs_N.mean()),
            macs_p5=scores.macs_at(0.05),
            macs_p95=scores.macs_at(0.95),
            macs_dense=cost.dense,
            macs_share=float(scores.macs_N.mean()) / cost.dense,
            router_share=cost.router / cost.dense,
            top1=float(scores.right_N.double().mean()),
            top5=float(scores.top5_N.double().mean()),
            loss=float(scores.loss_N.double().mean()),
            n=len(scores.right_N),
            routes=scores.routes(),
            params=inference_parameters(self.net),
            epochs=self.epochs,
            checkpoint=self.checkpoint,
            weights="+".join(origin(p) for p in (config.backbone.weights, *config.backbone.nets) if p),
            precision=self.precision,
            machine=machine(self.device),
            commit=commit(),
            config_hash=config.hash(),
            torch=torch.__version__,
        )

    def _write_routes(self, scores: Scores, part: Any, split: str, target: float | None) -> None:
        """One line an image: what it is, what was predicted, what it cost, which parts ran (units between slashes)."""
        setting = self._setting(split, target)
        parts = [spec.parts for spec in self.net.backbone.specs]
        columns: dict[str, list[Any]] = {
            "index": scores.index_N.tolist(),
            "label": scores.label_N.tolist(),
            "predicted": scores.predicted_N.tolist(),
            "loss": scores.loss_N.tolist(),
            "macs": scores.macs_N.tolist(),
            "route": [route_text(keep_UG, parts) for keep_UG in scores.keep_NUG.tolist()],
        }
        for name in ("superclasses", "difficulty"):
            if getattr(part, name) is not None:
                columns[name.removesuffix("es")] = getattr(part, name)[scores.index_N].tolist()
        self._replace(ROUTES_FILE, setting, _lines(columns))
        self._write_right(scores, split, target)
        write_names(self.folder, self.data.spec, self.net.backbone.specs)
        write_images(self.folder, setting, scores, part, self.data.spec)

    def _write_right(self, scores: Scores, split: str, target: float | None, control: str = "") -> None:
        """One line a setting and control: which of its images the row has right, so that rows can be compared image by image."""
        order_N = scores.index_N.argsort(stable=True)
        seen_N2 = torch.stack([scores.index_N[order_N], scores.label_N[order_N]], 1)
        line = {
            "n": len(order_N),
            "images": hashlib.sha256(seen_N2.numpy().astype("<i8").tobytes()).hexdigest()[:16],
            "right": right_text(scores.right_N[order_N].tolist()),
        }
        self._replace(RIGHT_FILE, self._setting(split, target) | {"control": control}, [line])

    def _setting(self, split: str, target: float | None) -> dict[str, str]:
        return image_setting(split, target, self.flops_max, self.checkpoint)

    def _replace(self, file: str, setting: dict[str, str], rows: list[dict[str, Any]]) -> None:
        """Put rows of a setting into a table of images, in the place of those that it had."""
        path = self.folder / file
        with locked(self.folder):
            old = read_rows(path) if path.exists() else []
            kept: list[dict[str, Any]] = [r for r in old if any(r.get(k, "") != v for k, v in setting.items())]
            write_rows(path, [*kept, *(setting | row for row in rows)])


def trained_in(rows: Sequence[Mapping[str, Any]]) -> str:
    """The precision that the rows of a train.csv name, both where a run went on in another; empty where they name none."""
    return "+".join(sorted({str(row["precision"]) for row in rows if row.get("precision")}))


def _lines(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
