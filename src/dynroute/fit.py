"""The one training loop: phases, schedules, checkpoints, resume. It knows no method.

Every random number of an epoch comes from (seed, epoch), so a resumed run needs no generator state to end the same.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynroute.contracts import Advice, Batch, InputError, Output
from dynroute.data import Dataset, limited, loader
from dynroute.measure import evaluate
from dynroute.net import RoutedNet
from dynroute.records import TRAIN_FILE, write_file, write_rows
from dynroute.routers import NOTE, Phase, ranged

LAST, BEST = "last.pt", "best.pt"
WATCHED = (
    2500  # calibration images looked at after every epoch; their mean share transfers to test within 0.01 (measured)
)
FORMAT = 1  # of checkpoints
MISS = 0.05  # of the share of parts that a phase asks for, beyond which an epoch is remarked upon
KEPT = "the last good checkpoint is kept; lower optim.lr"


@dataclass
class OptimOptions:
    """The `optim` section of a configuration: SGD with momentum, a schedule, a teacher.

    The schedule starts anew in every phase, or goes on where phases share a curve (DMNN's open and joint epochs).
    """

    lr: float = 0.1
    """Learning rate of the backbone at the top of the schedule."""
    batch_size: int = 128
    """Images of a minibatch."""
    weight_decay: float = 5e-4
    """Weight decay of convolutions and linear layers of the backbone; BatchNorm and routers have none."""
    momentum: float = 0.9
    """Momentum of SGD."""
    warmup: float = 0.05
    """Share of a curve of the rate (of a phase, as a rule) in which it climbs linearly."""
    nesterov: bool = True
    """Nesterov momentum; false: classical."""
    schedule: str = "cosine"
    """Learning rate within a phase: cosine (to zero), or step (times step_factor every step_epochs)."""
    step_epochs: int = 25
    """Epochs of a phase between two steps of schedule=step (the authors of RNP: 25)."""
    step_at: list[float] = field(default_factory=list)
    """Parts of a phase (0..1) after which schedule=step multiplies the rate (DMNN on CIFAR: 0.5, 0.75); empty: step_epochs."""
    step_factor: float = 0.5
    """What each step multiplies the rate by (the authors of RNP: 0.5)."""
    teacher: str | None = None
    """A dense net to learn from: "start" (the net of backbone.weights), a run folder, a checkpoint or a state dict."""
    teacher_weight: float = 0.5
    """The teacher's part of the classification loss; the labels have the rest."""
    teacher_temperature: float = 2.0
    """Temperature of the distillation (Hinton et al., 2015)."""
    amp: str = "auto"
    """Training precision: bf16, none (fp32), or auto (bf16 where the processor computes it fast)."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        ranged("optim.lr", self.lr, 1e-8, 100.0)
        ranged("optim.batch_size", self.batch_size, 2, 65_536)
        ranged("optim.weight_decay", self.weight_decay, 0.0, 10.0)
        ranged("optim.momentum", self.momentum, 0.0, 0.9999)
        ranged("optim.warmup", self.warmup, 0.0, 0.9)
        ranged("optim.step_epochs", self.step_epochs, 1, 100_000)
        ranged("optim.step_factor", self.step_factor, 0.0, 1.0)
        ranged("optim.teacher_weight", self.teacher_weight, 0.0, 1.0)
        ranged("optim.teacher_temperature", self.teacher_temperature, 0.01, 1000.0)
        for part in self.step_at:
            ranged("optim.step_at", part, 0.0, 1.0)
        if self.step_at and self.schedule != "step":
            raise InputError("optim.step_at is for optim.schedule=step")
        if self.schedule not in ("cosine", "step"):
            raise InputError(f"optim.schedule must be cosine or step, not {self.schedule!r}")
        if self.amp not in ("auto", "bf16", "none"):
            raise InputError(f"optim.amp must be auto, bf16 or none, not {self.amp!r}")


class Diverged(RuntimeError):
    """The loss or a weight became NaN or infinite; the last good checkpoint stands."""


@dataclass
class Step:
    """What a listener hears after each minibatch; row: the finished epoch's line of train.csv, at its last minibatch.

    remarks: sentences for the user, at the start of training or about the finished epoch.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    row: dict[str, Any] | None = None
    remarks: tuple[str, ...] = ()


Listener = Callable[[Step], None]
Teacher = Callable[[Tensor], Tensor]  # images -> logits_BK, no gradient


def fit(
    net: RoutedNet,
    data: Dataset,
    phases: Sequence[Phase],
    options: OptimOptions,
    folder: Path,
    *,
    seed: int = 0,
    workers: int = 0,
    meta: dict[str, Any] | None = None,
    resume: bool = False,
    listener: Listener = lambda step: None,
    teacher: Teacher | None = None,
) -> list[dict[str, Any]]:
    """Train through all phases, writing train.csv, last.pt and best.pt; returns the rows of train.csv.

    meta: plain values kept in the checkpoints (configuration, data). resume: continue from last.pt, if there is one.
    teacher: what the classification loss listens to beside the labels.
    Raises Diverged on a loss that is not finite.
    """
    done = load_checkpoint(folder / LAST) if resume and (folder / LAST).exists() else None
    rows: list[dict[str, Any]] = list(done["rows"]) if done else []
    if done:
        load_weights(net, done["model"], folder / LAST)
        write_rows(folder / TRAIN_FILE, rows)  # a kill between the two files may have left it a row short
    else:
        _save(net, folder / LAST, rows, meta, {})
    phases = [phase for phase in phases if phase.epochs]
    total, before = sum(phase.epochs for phase in phases), 0
    if net.router.remarks and len(rows) < total:
        listener(Step(phases[0].name, 1, total, 0, 1, math.nan, remarks=net.router.remarks))
    for phase in phases:
        if len(rows) < before + phase.epochs:
            part = _Part(net, data, phase, options, seed, workers, teacher)
            if done and len(rows) > before:
                part.load(done["optimizers"])
            for epoch in range(len(rows), before + phase.epochs):
                rows.append(part.epoch(epoch, before, total, listener))
                if phase is phases[-1] and rows[-1]["calib_top1"] >= max(r["calib_top1"] for r in rows[before:]):
                    _save(net, folder / BEST, rows, meta, {})  # first: after a kill in between, the epoch is run again
                _save(net, folder / LAST, rows, meta, part.state())
                write_rows(folder / TRAIN_FILE, rows)
        before += phase.epochs
    return rows


class _Part:
    """One phase under way: its optimizers and its schedule."""

    def __init__(
        self,
        net: RoutedNet,
        data: Dataset,
        phase: Phase,
        options: OptimOptions,
        seed: int,
        workers: int,
        teacher: Teacher | None,
    ) -> None:
        self.net, self.data, self.phase, self.options = net, data, phase, options
        self.seed, self.workers, self.teacher = seed, workers, teacher
        self.device = next(net.parameters()).device
        self.optimizers, self.tops = make_optimizers(net, phase, options)
        self.amp = amp_dtype(options.amp, self.device)

    def state(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load(self, state: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])

    def epoch(self, epoch: int, before: int, total: int, listener: Listener) -> dict[str, Any]:
        """One epoch; returns its row of train.csv."""
        torch.manual_seed(self.seed * 1_000_003 + epoch)
        batches = loader(
            self.data.train,
            self.data.spec,
            self.options.batch_size,
            train=True,
            seed=self.seed,
            epoch=epoch,
            device=self.device,
            workers=self.workers,
        )
        sums: dict[str, Tensor] = {}
        started, steps = time.perf_counter(), len(batches)
        set_modes(self.net, self.phase)
        for step, batch in enumerate(batches, 1):
            done = (epoch - before + (step - 1) / steps) / self.phase.epochs
            for name, value in self._step(batch, done).items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
            if step < steps and step % 20 == 0:
                listener(Step(self.phase.name, epoch + 1, total, step, steps, self._finite(sums, step)))
        self._finite(sums, steps)
        if not all(bool(value.isfinite().all()) for value in self.net.state_dict().values()):
            raise Diverged(f"weights are no longer finite in phase {self.phase.name!r}: {KEPT}")
        row = self._row(epoch, {k: float(v) / steps for k, v in sums.items()}, time.perf_counter() - started)
        listener(Step(self.phase.name, epoch + 1, total, steps, steps, row["loss"], row, remarks(self.phase, row)))
        return row

    def _step(self, batch: Batch, done: float) -> dict[str, Tensor]:
        """One minibatch: forward, summed loss terms, one step of every optimizer."""
        phase = self.phase
        if phase.schedule:
            phase.schedule(done)
        for optimizer, tops in zip(self.optimizers, self.tops, strict=True):
            for group, top in zip(optimizer.param_groups, tops, strict=True):
                group["lr"] = top * phase_curve(done, phase, self.options)
        if self.teacher:
            said_BK = self.teacher(batch.images).clone()  # of an inference tensor, a plain one
            batch = batch._replace(
                advice=Advice(said_BK, self.options.teacher_weight, self.options.teacher_temperature)
            )
        if phase.passes > 1:
            batch = batch.repeated(phase.passes)
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            routes = phase.routes(len(batch.labels)) if phase.routes else None
            out: Output = self.net(batch.images, routes)
        terms = phase.loss(out, batch)
        loss = torch.stack([value for name, value in terms.items() if not name.startswith(NOTE)]).sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        right = (out.logits_BK.argmax(1) == batch.labels).float().mean()
        share = out.macs_B.detach().mean() / self.net.cost.dense
        return {
            "loss": loss.detach(),
            **{k: v.detach() for k, v in terms.items()},
            "top1": right,
            "share": share,
        }

    def _finite(self, sums: dict[str, Tensor], steps: int) -> float:
        loss = float(sums["loss"]) / steps
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} in phase {self.phase.name!r}: {KEPT}")
        return loss

    def _row(self, epoch: int, means: dict[str, float], seconds: float) -> dict[str, Any]:
        few = limited(self.data.calibration, WATCHED)
        batches = loader(few, self.data.spec, 256, train=False, device=self.device, workers=self.workers)
        scores = evaluate(self.net, batches)
        return {
            "epoch": epoch + 1,
            "phase": self.phase.name,
            **means,
            "calib_top1": float(scores.right_N.float().mean()),
            "calib_share": float(scores.macs_N.mean()) / self.net.cost.dense,
            "calib_routes": scores.routes(),
            **{f"calib_{name}": value for name, value in scores.watched(self.net.backbone.specs).items()},
            "images_per_s": len(self.data.train) / seconds,
        }


def remarks(phase: Phase, row: dict[str, Any]) -> tuple[str, ...]:
    """What a finished epoch's row says against the routing: one route for all images, a target missed by more than MISS."""
    said: list[str] = []
    if "router" in phase.trains and row["calib_routes"] == 1:
        said.append("all images of the calibration split take one route")
    executed = row["calib_executed"]
    if phase.target is not None and abs(executed - phase.target) > MISS:
        said.append(f"{executed:.3f} of the parts run on the calibration split, {phase.target:.3f} are asked for")
    return tuple(said)


def make_optimizers(
    net: RoutedNet, phase: Phase, options: OptimOptions
) -> tuple[list[torch.optim.Optimizer], list[list[float]]]:
    """The optimizers of a phase and the top learning rate of each of their groups."""
    sgd: list[dict[str, Any]] = []
    if "backbone" in phase.trains:
        decayed, plain = split_decay(net.backbone)
        rate = options.lr * phase.lr_scale
        sgd += [
            {"params": decayed, "weight_decay": options.weight_decay, "lr": rate},
            {"params": plain, "weight_decay": 0.0, "lr": rate},
        ]
    router = list(net.router.parameters()) if "router" in phase.trains else []
    if router and phase.router_lr is None:
        decayed, plain = split_decay(net.router)
        rate = options.lr * phase.router_scale
        sgd += [
            {"params": decayed, "weight_decay": phase.router_decay, "lr": rate},
            {"params": plain, "weight_decay": 0.0, "lr": rate},
        ]
    made: list[torch.optim.Optimizer] = []
    if sgd:
        made.append(
            torch.optim.SGD(
                sgd, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov and options.momentum > 0
            )
        )
    if router and phase.router_lr is not None:
        made.append(torch.optim.Adam(router, lr=phase.router_lr, weight_decay=phase.router_decay))
    return made, [[group["lr"] for group in optimizer.param_groups] for optimizer in made]


def split_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights of convolutions and linear layers, everything else)."""
    decayed: list[nn.Parameter] = [
        p
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
        for n, p in m.named_parameters()
        if n == "weight"
    ]
    known = {id(p) for p in decayed}
    return decayed, [p for p in module.parameters() if id(p) not in known]


def phase_curve(done: float, phase: Phase, options: OptimOptions) -> float:
    """Part of the top rate when `done` (0..1) of a phase is over, on its own stretch of the learning curve."""
    first, last = phase.curve
    return learning_curve(first + (last - first) * done, round(phase.epochs / (last - first)), options)


def learning_curve(done: float, epochs: int, options: OptimOptions) -> float:
    """Part of the top rate when `done` (0..1) of a phase is over.

    cosine: linear climb over the first `warmup`, then half a cosine to zero. step: a staircase, without a climb.
    """
    if options.step_at:
        return options.step_factor ** sum(done >= part - 1e-9 for part in options.step_at)
    if options.schedule == "step":
        return options.step_factor ** int(done * epochs / options.step_epochs + 1e-9)
    warmup = options.warmup
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def set_modes(net: RoutedNet, phase: Phase) -> None:
    """What is trained stands in train(), with gradients; what is frozen in eval(), without."""
    for name, module in (("backbone", net.backbone), ("router", net.router)):
        module.train(name in phase.trains)
        module.requires_grad_(name in phase.trains)


def amp_dtype(wanted: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bf16 if asked for, or if auto and the processor has bf16 arithmetic; None is fp32."""
    if wanted == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        wanted = "bf16" if fast else "none"
    return torch.bfloat16 if wanted == "bf16" else None


def _save(net: RoutedNet, path: Path, rows: list[dict[str, Any]], meta: Any, optimizers: dict[str, Any]) -> None:
    """Write a checkpoint in one step: a reader finds the old file or the new one."""
    content = {
        "format": FORMAT,
        "meta": meta or {},
        "model": net.state_dict(),
        "optimizers": optimizers,
        "rows": rows,
    }
    write_file(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program. Raises InputError for anything else."""
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise InputError(f"{path} is not a checkpoint of dynroute, or of another version")
    return content


def load_tensors(path: Path) -> Any:
    """torch.load with weights_only=True, never otherwise. Raises InputError for a missing, torn or code-carrying file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on foreign pickles; what matters becomes the error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # torch and pickle raise a dozen types for broken or unsafe files
        what = f"broken or truncated ({type(error).__name__})"
        if "unsupported" in str(error).lower():
            what = "it holds more than tensors and could run code"
        raise InputError(f"{path} was not loaded: {what}") from None


def load_weights(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict strictly. Raises InputError with the first misfit."""
    try:
        net.load_state_dict(state)
    except InputError as error:
        raise InputError(f"{path} was not loaded: {error}") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise InputError(f"{path} does not fit this architecture: {reason[0].strip()[:200]}") from None
