"""From a net to a run folder, from a run folder to result rows."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynroute import __version__, plugins
from dynroute.assembly import build, dense_twin, fingerprint, inference_parameters, make_teacher, restore, trained_as
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
from dynroute.config import CONFIG_FILE, Config, load_config
from dynroute.contracts import Batch, InputError, Setting
from dynroute.controls import CONTROLS
from dynroute.data import Dataset, DataSpec, known_spec, limited, load, loader
from dynroute.exhibits import write_images, write_names
from dynroute.fit import BEST, LAST, Listener, Step, fit, load_checkpoint
from dynroute.measure import Dial, Scores, evaluate, make_dial
from dynroute.net import RoutedNet
from dynroute.records import (
    BENCH_FILE,
    EVAL_FILE,
    ROUTES_FILE,
    BenchRow,
    EvalRow,
    merge_eval,
    read_rows,
    route_text,
    write_rows,
    write_text,
)

CALIBRATED_ON = 2500  # images of the calibration split over which a price is searched; shares transfer within 0.01
LOG_FILE = "log.txt"
LATENCY_SECONDS, LATENCY_TRIES = 2.0, 4  # of each try of a time asked for
LATENCY_CLOSE, LATENCY_MET = 0.03, 0.1  # how near needs no other try, and how near is near enough


def prepare(config: Config) -> torch.device:
    """Set threads and pick the device. Raises InputError for a device that is not there."""
    torch.set_num_threads(config.top.threads or len(os.sched_getaffinity(0)))
    name = config.top.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the meta device cannot do
    except (RuntimeError, AssertionError):
        raise InputError(f"device {name!r} is not usable here; device=cpu always is") from None
    return device


def on_device(config: Config, device: str | None) -> Config:
    """The configuration with another device; None: as it is."""
    return config if device is None else dataclasses.replace(config, top=dataclasses.replace(config.top, device=device))


def train(config: Config, folder: Path, *, resume: bool = False, listener: Listener = lambda step: None) -> RoutedNet:
    """Train a configuration into a run folder. Raises InputError if the folder holds a run and resume is not asked for."""
    if (folder / LAST).exists():
        _check_resumable(config, folder, resume)
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run: choose another name or --out")
    device = prepare(config)
    data = _data(config)
    net = build(config, data.spec).to(device)
    teacher = make_teacher(config, data.spec, device)
    write_text(folder / CONFIG_FILE, config.yaml(comments=True))
    log = _log(folder)
    log.info("dynroute %s torch %s %s commit %s", __version__, torch.__version__, machine(device), commit())
    log.info("%s: %s on %s, config %s", config.name, config.router_name, config.data.name, config.hash())

    def heard(step: Step) -> None:
        if step.row:
            log.info(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in step.row.items()))
        for remark in step.remarks:
            log.info("note: %s", remark)
        listener(step)

    meta = {"config": config.yaml(), "data": dataclasses.asdict(data.spec)}
    phases = list(config.method.phases(net, config.router))
    workers = config.data.workers
    try:
        fit(
            net, data, phases, config.optim, folder,
            seed=config.top.seed, workers=workers, meta=meta, resume=resume, listener=heard, teacher=teacher,
        )  # fmt: skip
    except Exception as error:
        log.info("stopped: %s", error)
        raise
    finally:
        for handler in log.handlers:
            handler.close()
        log.handlers.clear()
    return net


def seeded(config: Config, seeds: list[int], out: Path | None = None) -> list[tuple[Config, Path]]:
    """The configuration once for each seed, and sibling run folders that end in -s0, -s1, ...: of `out`, or of runs/NAME."""
    made = []
    for seed in seeds:
        name = re.sub(r"-s\d+$", "", config.top.name)
        top = dataclasses.replace(config.top, seed=seed, name=f"{name}-s{seed}" if name else "")
        own = dataclasses.replace(config, top=top)
        made.append((own, out.with_name(f"{out.name}-s{seed}") if out else Path("runs") / own.name))
    return made


def _check_resumable(config: Config, folder: Path, resume: bool) -> None:
    if not resume:
        raise InputError(
            f"{folder} already holds a run: add --resume to go on with it, or choose another name or --out"
        )
    stored = trained_as(load_checkpoint(folder / LAST), folder / LAST)
    if (stored.hash(), stored.top.seed) != (config.hash(), config.top.seed):
        raise InputError(
            f"{folder} was trained with another configuration: --resume needs the same one (see {CONFIG_FILE})"
        )


def _log(folder: Path) -> logging.Logger:
    log = logging.getLogger(f"dynroute.{folder.resolve()}")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = [handler]
    return log


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
    dial: Dial
    flops_max: float | None = None
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, folder: Path, checkpoint: str = "last", flops_max: float | None = None, device: str | None = None
    ) -> Evaluator:
        """Open a run folder. checkpoint: last (the end of the schedule) or best (by accuracy on the calibration split).

        device: instead of the configuration's. Raises OutOfReach where flops_max lies below the cheapest route.
        """
        if not folder.is_dir():
            raise InputError(f"{folder} is not a run folder{nearest(folder)}")
        path = folder / (BEST if checkpoint == "best" else LAST)
        net, config, content = restore(path)
        place = prepare(on_device(config, device))
        data = _data(config)
        stored = content["meta"]["data"]
        if (data.spec.classes, data.spec.image_size) != (stored["classes"], stored["image_size"]):
            raise InputError(
                f"{config.data.name} has other classes or another image size now than {folder} was trained on"
            )
        net = net.to(place).eval()
        net.set_limit(flops_max)
        few = limited(data.calibration, CALIBRATED_ON)

        def batches() -> Iterable[Batch]:
            return loader(few, data.spec, 256, train=False, device=place, workers=config.data.workers)

        dial = make_dial(net, len(few), batches, read_budget(folder, fingerprint(path), flops_max))
        remarks = ("budget.json is of an older version: settings are fitted anew",) if outdated(folder) else ()
        return cls(folder, net, config, data, place, checkpoint, len(content["rows"]), dial, flops_max, remarks)

    def measure(self, target: float | None, split: str = "test", timed: bool = False) -> Result:
        """Set the dial for a target by the calibration split (None: the trained point), then measure the split.

        Writes the row into eval.csv, the per-image routes into routes.csv, and what `exhibits` leaves beside them.
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
        return bench(self.net, dense, batch.images, points, plan, labels)

    def targets(self, count: int = 10) -> list[float]:
        """So many targets across the range that the dial reaches, its ends included."""
        low, high = self.dial.span()
        return [round(low + (high - low) * i / (count - 1), 4) for i in range(count)]

    def share_at(self, ms: float) -> float:
        """The share at which an image alone takes so many milliseconds in the mean. Raises as `latency_table` does.

        The table's share is tried on images of the calibration split, and the table corrected by the time it took; what
        comes nearest in a few tries is returned, and a remark is left where that is not near.
        """
        table = latency_table(self.folder, self.net, self.config, self.data.spec, self.device)
        plan = Plan(seconds=LATENCY_SECONDS, modes=frozenset({"dense", "skipping"}))
        share, tried = share_for_latency(table, ms), list[tuple[float, float, float]]()
        while True:
            took = 1e3 / self.bench([Point(share, self.fitted(share).setting)], plan, "calib").rows[-1].images_per_s
            tried.append((abs(took / ms - 1), share, took))
            if tried[-1][0] <= LATENCY_CLOSE or len(tried) == LATENCY_TRIES:
                break
            slower = took / latency_for_share(table, share)
            now = [(known, slower * time) for known, time in table]
            share = share_for_latency(now, max(ms, min(time for _, time in now)))
        off, share, took = min(tried)
        if off > LATENCY_MET:
            remark = f"{ms:g} ms an image were asked for; nearest came share {share:.3f}, which took {took:.3g} ms"
            self.remarks = (*self.remarks, remark)
        return share

    def controls(self, result: Result) -> list[Result]:
        """The rows of CONTROLS made from an evaluation's own routes on the same images; none where all took one route.

        shuffled and random keep the router's multiply-adds and so stand at the routed row's cost; most_common is a static
        net, which needs no router and is not charged for one. Writes the rows into eval.csv.
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
        return made

    def fitted(self, target: float) -> Fit:
        """Setting and expected share for a target; what was measured on the way is stored in budget.json."""
        known = self.dial.calibration
        before, fit = len(known.searched), self.dial.find(target)
        if len(known.searched) > before:
            path = self.folder / (BEST if self.checkpoint == "best" else LAST)
            write_budget(self.folder, fingerprint(path), known, self.flops_max)
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
            dataset=config.data.name,
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
            weights="+".join(Path(p).name for p in (config.backbone.weights, *config.backbone.nets) if p),
            machine=machine(self.device),
            commit=commit(),
            config_hash=config.hash(),
            torch=torch.__version__,
        )

    def _write_routes(self, scores: Scores, part: Any, split: str, target: float | None) -> None:
        """One line an image: what it is, what was predicted, what it cost, which parts ran (units between slashes)."""
        path = self.folder / ROUTES_FILE
        asked, most = ("" if share is None else f"{share:.12g}" for share in (target, self.flops_max))
        old = read_rows(path) if path.exists() else []
        setting = {"split": split, "flops_target": asked, "flops_max": most, "checkpoint": self.checkpoint}
        kept: list[dict[str, Any]] = [r for r in old if any(r.get(k, "") != v for k, v in setting.items())]
        parts = [spec.parts for spec in self.net.backbone.specs]
        routes = [route_text(keep_UG, parts) for keep_UG in scores.keep_NUG.tolist()]
        columns: dict[str, list[Any]] = {
            "index": scores.index_N.tolist(),
            "label": scores.label_N.tolist(),
            "predicted": scores.predicted_N.tolist(),
            "loss": scores.loss_N.tolist(),
            "macs": scores.macs_N.tolist(),
            "route": routes,
        }
        for name in ("superclasses", "difficulty"):
            if getattr(part, name) is not None:
                columns[name.removesuffix("es")] = getattr(part, name)[scores.index_N].tolist()
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        write_rows(path, [*kept, *(setting | row for row in rows)])
        write_names(self.folder, self.data.spec, self.net.backbone.specs)
        write_images(self.folder, setting, scores, part, self.data.spec)


def latency_table(
    folder: Path, net: RoutedNet, config: Config, spec: DataSpec, device: torch.device
) -> list[tuple[float, float]]:
    """Shares of the dense net's multiply-adds, and the milliseconds that an image alone takes at each in the mean.

    The rows of the run's bench.csv that this machine measured at batch 1 with as many threads as now, their times
    corrected by how fast the dense net is now: machines have good and bad hours. Raises InputError where there are none.
    """
    path, threads = folder / BENCH_FILE, torch.get_num_threads()
    wanted = {
        "mode": "skipping",
        "batch": "1",
        "threads": str(threads),
        "device": str(device),
        "dtype": "fp32",
        "machine": machine(device),
    }
    rows = read_rows(path) if path.exists() else []
    if rows and not {"mode", "macs_share", "images_per_s"} <= rows[0].keys():
        raise InputError(f"{path} is not a latency table: columns mode, macs_share and images_per_s are missing")
    own = _matching(rows, wanted | {"routes": "router"})
    if len(own) < 2:
        command = f"dynroute bench {folder} --flops-target 0.4 --flops-target 0.8 --batch 1 --threads {threads}"
        raise InputError(f"{path} has no two skipping rows of this machine at batch 1, threads {threads}: {command}")
    dense = _matching(rows, wanted | {"mode": "dense_best"})
    points = [(_above_0(row, "macs_share", path), 1e3 / _above_0(row, "images_per_s", path)) for row in own]
    then = _above_0(dense[0], "images_per_s", path) if dense else None
    slower = then / dense_speed(net, config, spec, device) if then else 1.0
    return [(share, slower * time) for share, time in points]


def _matching(rows: Sequence[dict[str, str]], wanted: dict[str, str]) -> list[dict[str, str]]:
    """The rows with these values, or with none, in these columns."""
    return [row for row in rows if all(row.get(key) in (value, "", None) for key, value in wanted.items())]


def _above_0(row: dict[str, str], column: str, path: Path) -> float:
    """A measured number. Raises InputError for anything but a finite one above 0."""
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{path}: {column} must be a number above 0, not {row[column]!r}")
    return value


def dense_speed(net: RoutedNet, config: Config, spec: DataSpec, device: torch.device) -> float:
    """Images a second of the plain dense net in its fastest form, one at a time, now, with as many threads as torch is set to."""
    drawing = torch.Generator().manual_seed(0)
    images_NCHW = torch.randn(8, spec.channels, spec.image_size, spec.image_size, generator=drawing).to(device)
    dense = dense_twin(config, spec).backbone.to(device)
    plan = Plan(seconds=1.0, modes=frozenset({"dense"}))
    return bench(net, dense, images_NCHW, [], plan, bench_labels(config, device)).rows[-1].images_per_s


def nearest(folder: Path) -> str:
    """What follows "there is no such folder": the most similar name beside it, if there is one."""
    import difflib

    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.parent / near[0]}?" if near else ""


def check(config: Config) -> RoutedNet:
    """Build everything that training would, data included, and return the net."""
    prepare(config)
    return build(config, _data(config).spec)


def inspect_path(source: Path) -> dict[str, Any]:
    """`inspect` of a run folder, or of a YAML file; the weights that it starts from are not read: they change no cost."""
    if source.is_dir():
        net, config, _ = restore(source / LAST)
        return inspect(config, net)
    if not source.exists():
        raise InputError(f"{source} is neither a configuration nor a run folder{nearest(source)}")
    config, net, _ = untrained(source)
    return inspect(config, net)


def untrained(source: Path, overrides: list[str] | None = None) -> tuple[Config, RoutedNet, DataSpec]:
    """The net of a YAML file with random weights; its data is read only where its name does not tell enough."""
    config = load_config(source, overrides)
    sized = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None, nets=[]))
    spec = known_spec(config.data) or _data(config).spec
    return config, build(sized, spec), spec


def _data(config: Config) -> Dataset:
    return load(config.data, make=plugins.find("dataset", config.data.name))


def inspect(config: Config, net: RoutedNet) -> dict[str, Any]:
    """Parameters, multiply-adds per unit, cheapest and dearest route, as plain values."""
    low, high = net.span()
    units = [
        {
            "name": unit.spec.name,
            "form": unit.spec.form,
            "parts": unit.spec.parts,
            "macs": unit.cost_terms().total,
            "macs_always": unit.cost_terms().always,
            "macs_by_part": list(unit.cost_terms().by_part_G),
            "macs_by_pair": unit.cost_terms().by_pair_HG,
            "params": sum(p.numel() for p in unit.parameters()),
        }
        for unit in net.backbone.routable
    ]
    return {
        "name": config.name,
        "method": config.router_name,
        "backbone": config.backbone.name,
        "dataset": config.data.name,
        "params": inference_parameters(net),
        "params_router": inference_parameters(net) - sum(p.numel() for p in net.backbone.parameters()),
        "macs_dense": net.cost.dense,
        "macs_fixed": net.backbone.fixed_macs,
        "macs_router": net.cost.router,
        "share_cheapest": low,
        "share_dearest": high,
        "units": units,
    }


def bench_labels(config: Config, device: torch.device) -> dict[str, str]:
    """The columns of a BenchRow that say what was timed where."""
    return {
        "run": config.name,
        "method": config.router_name,
        "backbone": config.backbone.name,
        "dataset": config.data.name,
        "affinity": affinity(),
        "machine": machine(device),
        "commit": commit(),
        "config_hash": config.hash(),
        "torch": torch.__version__,
    }


def affinity() -> str:
    """The processors that this process may use, as 0-3,8."""
    runs: list[list[int]] = []
    for cpu in sorted(os.sched_getaffinity(0)):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def commit() -> str:
    """The commit of the source tree this package runs from, with + where it has local changes; empty if not a checkout."""
    here = Path(__file__)
    tracked = _git("ls-files", "--error-unmatch", here.name)  # not a checkout of some other project around us
    revision = _git("rev-parse", "--short=10", "HEAD")
    if tracked is None or revision is None:
        return ""
    return revision + ("+" if _git("status", "--porcelain", "--", str(here.parent)) else "")


def _git(*words: str) -> str | None:
    """What git prints, or None where it fails or is not installed."""
    try:
        run = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def machine(device: torch.device) -> str:
    """Processor, threads and system, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def environment() -> str:
    """Processor and PyTorch: what is fastest on one is not on another."""
    return f"{processor()}, torch {torch.__version__}"


def processor() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
