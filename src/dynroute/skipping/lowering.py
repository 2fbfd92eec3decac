"""From the plain layers of a narrowed unit to what the fast run executes: BatchNorms folded, activations and sums fused.

Three shapes of unit are known, by the modules that units narrow to: a sum (`Residual`), a layer of a chain
(`NarrowConv`), and anything else, which is run as it is. N images, C channels, H W height and width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.skipping.kernels import RELU, RELU6, Conv, packable
from dynroute.units import Answered, NarrowConv, Residual, answered

Step = Callable[[Tensor], Tensor]


class Straight:
    """Steps one after the other. bytes: memory of their convolutions."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Run the steps."""
        for step in self.steps:
            x_NCHW = step(x_NCHW)
        return x_NCHW

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(step.bytes for step in self.steps if isinstance(step, Conv))

    @property
    def fresh(self) -> bool:
        """Whether the output never shares memory with the input."""
        return any(isinstance(step, Conv) for step in self.steps)

    @functools.cached_property
    def head(self) -> Straight:
        """All steps but the last."""
        return Straight(self.steps[:-1])


class Summed(NamedTuple):
    """shortcut + body, then ReLU if relu. shortcut None: the input itself; body None: nothing."""

    shortcut: nn.Module | None
    body: Straight | None
    relu: bool


class Narrowed(NamedTuple):
    """A layer of a chain: from these input channels to the first that are kept; `behind` more would be zeros."""

    body: Straight
    inputs: slice
    behind: int


def lower(module: nn.Module, packed: bool) -> Straight | Summed | Narrowed:
    """What the fast run executes for a module in eval mode. packed: whether packed convolutions may be used."""
    if isinstance(module, Residual):
        shortcut = None if isinstance(module.shortcut, nn.Identity) else module.shortcut
        return Summed(shortcut, None if module.body is None else straight(module.body, packed), module.relu)
    if isinstance(module, NarrowConv):
        return Narrowed(straight(module.layers, packed), slice(0, module.inputs), module.behind)
    return straight(module, packed)


def straight(module: nn.Module, packed: bool) -> Straight:
    """The steps of a module, those of Sequentials inside Sequentials in one list."""
    steps: list[Step] = []
    for layer in _layers(module):
        last = steps[-1] if steps and isinstance(steps[-1], Conv) and steps[-1].act == "none" else None
        if plain(layer, nn.Conv2d) and packable(layer):
            steps.append(Conv(layer, packed))
        elif plain(layer, nn.BatchNorm2d) and isinstance(last, Conv):
            last.fold(layer)
        elif plain(layer, nn.ReLU) and isinstance(last, Conv):
            last.act = RELU
        elif plain(layer, nn.ReLU6) and isinstance(last, Conv):
            last.act = RELU6
        elif isinstance(layer, Residual | NarrowConv):
            steps.append(whole(lower(layer, packed)))
        elif isinstance(layer, Answered):
            steps.append(partial(_answered, straight(layer.body, packed)))
        elif not isinstance(layer, nn.Identity | nn.Dropout):
            steps.append(layer)
    return Straight(steps)


def plain(layer: nn.Module, kind: type[nn.Module]) -> TypeGuard[Any]:
    """Whether a layer computes what its kind does: a subclass of another forward, or one with hooks by now, is run as it is."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return isinstance(layer, kind) and type(layer).forward is kind.forward and not hooked


def whole(program: Straight | Summed | Narrowed) -> Step:
    """A program as one step by itself, which leaves its input as it was."""
    if isinstance(program, Straight):
        return program
    if isinstance(program, Narrowed):
        return lambda x_NCHW: widened(program.body(x_NCHW[:, program.inputs]), program.behind)

    def summed(x_NCHW: Tensor) -> Tensor:
        out = x_NCHW.clone() if program.shortcut is None else program.shortcut(x_NCHW)
        if program.body is not None:
            out = out + program.body(x_NCHW)
        return out.relu() if program.relu else out

    return summed


def widened(y_NCHW: Tensor, behind: int) -> Tensor:
    """With so many channels of zeros behind."""
    return F.pad(y_NCHW, (0, 0, 0, 0, 0, behind)) if behind else y_NCHW


def _answered(body: Straight, x_NCHW: Tensor) -> Tensor:
    """A whole net as a unit (`units.whole`): its logits into the last plane."""
    return answered(x_NCHW, body(x_NCHW[:, :-1].contiguous(memory_format=torch.channels_last)))


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    if plain(module, nn.Sequential):
        for child in module.children():
            yield from _layers(child)
    else:
        yield module
