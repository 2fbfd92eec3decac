"""The one training loop: phases, resume. It knows no method.

Every random number of an epoch comes from (seed, epoch), so a resumed run needs no generator state to end the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynroute.checkpoints import BEST, LAST, load_checkpoint, load_weights, save_checkpoint
from dynroute.contracts import Advice, Batch, Output
from dynroute.data import Dataset, limited, loader
from dynroute.measure import evaluate
from dynroute.net import RoutedNet
from dynroute.optim import OptimOptions, amp_dtype, make_optimizers, phase_curve, precision_name
from dynroute.records import TRAIN_FILE, write_rows
from dynroute.routers import NOTE, Phase

WATCHED = (
    2500  # calibration images looked at after every epoch; their mean share transfers to test within 0.01 (measured)
)
MISS = 0.05  # of the share of parts that a phase asks for, beyond which an epoch is remarked upon
KEPT = "the last good checkpoint is kept; train anew into another folder, with a lower optim.lr"


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
        save_checkpoint(net, folder / LAST, rows, meta, {})
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
                    save_checkpoint(
                        net, folder / BEST, rows, meta, {}
                    )  # first: after a kill in between, the epoch is run again
                save_checkpoint(net, folder / LAST, rows, meta, part.state())
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
            "precision": precision_name(self.amp),
        }


def remarks(phase: Phase, row: dict[str, Any]) -> tuple[str, ...]:
    """What a finished epoch's row says against the routing: one route for all images, a target missed by more than MISS."""
    said: list[str] = []
    if "router" in phase.trains and row["calib_routes"] == 1:
        said.append("all images of the calibration split take one route")
    executed = row["calib_executed"]
    if phase.target is not None and abs(executed - phase.target) > MISS:
        said.append(f"{executed:.3f} of the parts run on the calibration split, {phase.target:.3f} are asked for")
    share = row["calib_share"]
    if phase.target_share is not None and abs(share - phase.target_share) > MISS:
        said.append(
            f"{share:.3f} of the dense net's FLOPs run on the calibration split, {phase.target_share:.3f} are asked for"
        )
    return tuple(said)


def set_modes(net: RoutedNet, phase: Phase) -> None:
    """What is trained stands in train(), with gradients; what is frozen in eval(), without."""
    for name, module in (("backbone", net.backbone), ("router", net.router)):
        module.train(name in phase.trains)
        module.requires_grad_(name in phase.trains)
