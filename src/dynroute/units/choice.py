"""Alternative blocks of different width at one position, of which each image runs exactly one (RNR, multi-path).

B images, G alternatives, C channels, H W height and width. No public text of RNR gives the alternatives: those here, the
original block at several hidden widths, are ours. They share the shortcut; everything else is their own.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import InputError
from dynroute.cost import CostTerms, conv_macs
from dynroute.units.base import Place, Residual, Unit, Weights, by_group, normalised, tensors
from dynroute.units.ranking import best_first


class Layer(NamedTuple):
    """One convolution of a body, a BatchNorm after it, a ReLU between it and the next."""

    kernel: int
    stride: int
    in_channels: int
    out_channels: int


class ChoiceUnit(Unit):
    """ReLU(shortcut + the chosen alternative). Subclasses say which convolutions a block of some hidden width has.

    sizes: hidden channels of each alternative. expansion: output channels of the plain block over its hidden ones. The dense
    run is that of the widest alternative.
    """

    expansion = 1

    def __init__(self, place: Place, sizes: list[int]) -> None:
        super().__init__()
        self.place, self.sizes = place, sizes
        self.widest = sizes.index(max(sizes))
        self.shortcut = place.shortcut()
        self.bodies: nn.ModuleList = nn.ModuleList(_body(self.layers(size)) for size in sizes)
        dearest = self._macs(max(sizes))
        shares = tuple(self._macs(size) / dearest for size in sizes)
        self.spec = place.spec("choice", shares, False)

    def layers(self, hidden: int) -> list[Layer]:
        """The convolutions of a block with so many hidden channels."""
        raise NotImplementedError("a choice unit must write layers()")

    @property
    def hidden(self) -> int:
        """Hidden channels of the plain block."""
        return self.place.out_channels // self.expansion

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """Each image through its own alternative alone; a row without any is the pure shortcut.

        In training, BatchNorm statistics of an alternative come from the images that chose it; see `normalised`. The gradient
        of keep_BG reaches the chosen entry.
        """
        out = self.shortcut(x_BCHW)
        if keep_BG is None:
            return F.relu_(out + self._run(self.widest, x_BCHW, True))
        keep_BG = keep_BG[:, : len(self.sizes)]
        choice_B = keep_BG.detach().argmax(1)
        y = self._chosen(x_BCHW, choice_B)
        kept_B1 = keep_BG.gather(1, choice_B[:, None])
        return F.relu_(out + y * kept_B1[:, :, None, None].to(y.dtype))

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The shortcut and the chosen alternative, as a plain block."""
        body = copy.deepcopy(self.bodies[keep.index(True)]) if any(keep) else None
        return Residual(self.shortcut, body).eval()

    def cost_terms(self) -> CostTerms:
        """Each alternative by itself; a projection shortcut always runs. The dense net is that of the plain block."""
        always = self.place.shortcut_macs()
        by_part = tuple(float(self._macs(size)) for size in self.sizes)
        return CostTerms(always, by_part, plain=always + self._macs(self.hidden))

    @torch.no_grad()
    def load_dense(self, weights: Weights) -> None:
        """Every alternative starts from the one plain block: its most useful hidden channels, as many as fit."""
        layers = self.layers(self.hidden)
        convs = [
            weights.take(f"conv{i}.weight", layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
            for i, layer in enumerate(layers, 1)
        ]
        norms = [weights.statistics(f"bn{i}", layer.out_channels) for i, layer in enumerate(layers, 1)]
        if isinstance(self.shortcut, nn.Sequential):
            weights.copy(self.shortcut[0], "shortcut.0")
            weights.copy(self.shortcut[1], "shortcut.1")
        orders = [
            best_first(weights.rank, conv, after, norm)
            for conv, after, norm in zip(convs, convs[1:], norms, strict=False)
        ]
        for body, size in zip(self.bodies, self.sizes, strict=True):
            kept = [order[:size] for order in orders]
            every = [torch.arange(n, device=convs[0].device) for n in (self.place.in_channels, self.place.out_channels)]
            for i, (inputs, outputs) in enumerate(zip([every[0], *kept], [*kept, every[1]], strict=True)):
                conv, norm = _pair(body, i)
                conv.weight.copy_(convs[i][outputs][:, inputs])
                for key, value in norms[i].items():
                    getattr(norm, key).copy_(value[outputs])

    def dense_state(self) -> dict[str, Tensor]:
        """The widest alternative, if it is as wide as the plain block."""
        if max(self.sizes) != self.hidden:
            raise InputError("no alternative is as wide as the plain block: backbone.widths must hold 1.0 for that")
        body = self.bodies[self.widest]
        named: dict[str, nn.Module] = {}
        for i in range(len(self.layers(self.hidden))):
            named[f"conv{i + 1}"], named[f"bn{i + 1}"] = _pair(body, i)
        if isinstance(self.shortcut, nn.Sequential):
            named |= {"shortcut.0": self.shortcut[0], "shortcut.1": self.shortcut[1]}
        return {f"{name}.{key}": v.detach() for name, layer in named.items() for key, v in tensors(layer).items()}

    def _macs(self, hidden: int) -> int:
        """MACs of a body with so many hidden channels."""
        size, total = self.place.in_size, 0
        for layer in self.layers(hidden):
            size = (size + layer.stride - 1) // layer.stride
            total += conv_macs(size, layer.kernel, layer.in_channels, layer.out_channels)
        return total

    def _chosen(self, x_BCHW: Tensor, choice_B: Tensor) -> Tensor:
        """Each image through its own body."""
        return by_group(x_BCHW, choice_B, self._run)

    def _run(self, g: int, x_BCHW: Tensor, enough: bool) -> Tensor:
        """One body. enough: images for batch statistics."""
        for layer in self.bodies[g].children():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                running, affine = (layer.running_mean, layer.running_var), (layer.weight, layer.bias)
                pace = layer.momentum or 0.0
                x_BCHW = normalised(x_BCHW, running, affine, self.training, enough, pace, layer.eps)
            else:
                x_BCHW = layer(x_BCHW)
        return x_BCHW


class ChoiceBasic(ChoiceUnit):
    """Alternatives of a basic block: 3x3 convolution, 3x3 convolution."""

    def layers(self, hidden: int) -> list[Layer]:
        """Both convolutions shrink with the hidden channels."""
        return [
            Layer(3, self.place.stride, self.place.in_channels, hidden),
            Layer(3, 1, hidden, self.place.out_channels),
        ]


class ChoiceBottleneck(ChoiceUnit):
    """Alternatives of a bottleneck: 1x1, 3x3 (which holds the stride, as torchvision has it), 1x1 convolution."""

    expansion = 4

    def layers(self, hidden: int) -> list[Layer]:
        """The middle convolution shrinks on both sides."""
        return [
            Layer(1, 1, self.place.in_channels, hidden),
            Layer(3, self.place.stride, hidden, hidden),
            Layer(1, 1, hidden, self.place.out_channels),
        ]


def choice_sizes(hidden: int, widths: list[float]) -> list[int]:
    """Hidden channels of each alternative of a block with `hidden` of them. Raises InputError where two would be the same."""
    sizes = [max(int(width * hidden + 0.5), 1) for width in widths]
    if len(set(sizes)) < len(sizes):
        raise InputError(f"backbone.widths {widths} are not all different in a block of {hidden} channels: {sizes}")
    return sizes


def _body(layers: list[Layer]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for kernel, stride, inside, outside in layers:
        conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        modules += [conv, nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _pair(body: nn.Module, i: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """The i-th convolution of a body and its BatchNorm."""
    layers = list(body.children())
    conv, norm = layers[3 * i], layers[3 * i + 1]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    return conv, norm
