"""The `optim` section: optimizers of a phase, the schedule of their rates, training precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dynroute.contracts import InputError
from dynroute.net import RoutedNet
from dynroute.routers import Phase, ranged


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
    """Share of a curve of the rate (of a phase, as a rule) in which it climbs linearly; of schedule=cosine."""
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


def amp_dtype(wanted: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bf16 if asked for, or if auto and the processor has bf16 arithmetic; None is fp32."""
    if wanted == "auto":
        wanted = "bf16" if _computes_bf16(device) else "none"
    return torch.bfloat16 if wanted == "bf16" else None


def _computes_bf16(device: torch.device) -> bool:
    """Whether this processor has bf16 arithmetic: older GPUs emulate it, slowly."""
    if device.type != "cuda":
        return torch.cpu._is_avx512_bf16_supported()
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def precision_name(amp: torch.dtype | None) -> str:
    """What tables call the precision of training with this autocast type."""
    return "fp32" if amp is None else "bf16"
