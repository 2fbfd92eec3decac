"""DMNN sub-blocks of bottlenecks and inverted residuals (Su et al., arXiv 1902.10949, equations 1-4; basic blocks: `basic`).

N sub-blocks with a switch each are summed with one shared shortcut. Every convolution of every sub-block has its
BatchNorm. What may be joined is joined: first convolutions run as one, and a BatchNorm on concatenated channels is the
same as one for each sub-block; the last ones run apart.
B images, G = N sub-blocks, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dynroute.cost import CostTerms, conv_macs
from dynroute.units.base import (
    STATISTICS,
    Place,
    Residual,
    Unit,
    Weights,
    folded_conv,
    sliced_conv,
    sliced_norm,
    tensors,
)
from dynroute.units.dealing import copies, dealt, shared_out, taken, thinned
from dynroute.units.fold import fold_pays, folded_sum, forked_pointwise
from dynroute.units.ranking import best_first

FITTED = {2: 0.6, 3: 0.467, 4: 0.375}  # of a bottleneck's hidden channels: give the parameters of the paper's table 1


def path_share(parts: int) -> float:
    """Hidden channels of a bottleneck's sub-block as a share of the plain block's, so that parameters stay about the same.

    For 2, 3, 4 parts the values fitted to the paper's parameter column; otherwise solved for: with c hidden channels and 4c
    outside, 17 c^2 = N (8 c c' + 9 c'^2), equations (1)-(2). One part is the plain block.
    """
    return FITTED.get(parts, (math.sqrt(64 + 36 * 17 / parts) - 8) / 18)


class PathBottleneck(Unit):
    """Bottleneck split into N sub-blocks (1x1, 3x3, 1x1 each) with a switch each: ReLU(shortcut + sum of open ones).

    The stride is in the 3x3 convolutions. sizes: hidden channels of each sub-block, all equal.
    """

    expansion = 4
    fold: bool | None = None  # the last BatchNorms by `folded_sum` in training, the same function; None: where it pays
    additive = True

    def __init__(self, place: Place, sizes: list[int]) -> None:
        super().__init__()
        assert len(set(sizes)) == 1, "the open sub-blocks run as one grouped convolution, so they are equally wide"
        hidden = sum(sizes)
        self.place, self.sizes = place, sizes
        self.shortcut = place.shortcut()
        self.conv1 = nn.Conv2d(place.in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.ModuleList(nn.Conv2d(s, s, 3, place.stride, 1, bias=False) for s in sizes)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.ModuleList(nn.Conv2d(s, place.out_channels, 1, bias=False) for s in sizes)
        self.bn3 = nn.ModuleList(nn.BatchNorm2d(place.out_channels) for _ in sizes)
        shares = (1 / len(sizes),) * len(sizes)
        self.spec = place.spec("free", shares, True)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run: shortcut + sum of gate times sub-block."""
        u, x_BCHW = forked_pointwise(x_BCHW, self.conv1)
        u = F.relu_(self.bn1(u))
        parts = zip(u.split(self.sizes, 1), self.conv2, strict=True)
        u = F.relu_(self.bn2(torch.cat([conv(part) for part, conv in parts], 1)))
        channels = u.shape[1]
        if self.training and (fold_pays(u.numel() // channels, channels) if self.fold is None else self.fold):
            return F.relu_(folded_sum(self.shortcut(x_BCHW), u, self.conv3, self.bn3, keep_BG))
        return F.relu_(gated_sum(self.shortcut(x_BCHW), u.split(self.sizes, 1), self.conv3, self.bn3, keep_BG))

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The open sub-blocks as one block with a grouped 3x3 convolution; each last BatchNorm folded, biases summed."""
        opened = [g for g, on in enumerate(keep) if on]
        if not opened:
            return Residual(self.shortcut, None)
        rows, every = opened_channels(self.sizes, opened).to(self.conv1.weight.device), slice(None)
        convs = [cast(nn.Conv2d, self.conv2[g]) for g in opened]
        form: dict[str, Any] = {"stride": convs[0].stride, "padding": 1, "groups": len(opened), "bias": False}
        middle = skip_init(nn.Conv2d, len(rows), len(rows), 3, **form)
        middle.weight.data = torch.cat([conv.weight.detach() for conv in convs])
        return Residual(
            self.shortcut,
            nn.Sequential(
                sliced_conv(self.conv1, rows, every),
                sliced_norm(self.bn1, rows),
                nn.ReLU(),
                middle,
                sliced_norm(self.bn2, rows),
                nn.ReLU(),
                summed_conv(self.conv3, self.bn3, opened),
            ),
        ).eval()

    def cost_terms(self) -> CostTerms:
        """Each sub-block by itself; a projection shortcut always runs. The dense net is that of the plain block."""
        always = self.place.shortcut_macs()
        by_part = tuple(float(self._macs(size)) for size in self.sizes)
        return CostTerms(always, by_part, plain=always + self._macs(self.hidden))

    @torch.no_grad()
    def load_dense(self, weights: Weights) -> None:
        """Start near the plain bottleneck, whose 3x3 convolution has connections that sub-blocks lack. The rule is ours.

        - Outputs of the 3x3 are dealt to the sub-blocks by rank; what room is left takes copies of the best of the others, and
          the last convolution's weights are divided among copies (as in Net2Net, Chen et al., 2016).
        - Its inputs are those of most use to a sub-block's own outputs; sub-blocks may share them. The second BatchNorm's
          statistics lose what the inputs left out added to them.
        - Mean and bias of the last BatchNorm are shared out evenly, as in basic blocks.
        With all open, the eval-mode net computes the dense net exactly where each sub-block is as wide as the block (one
        part, or backbone.path_width=1). Raises InputError where names or shapes do not fit.
        """
        hidden, rank = self.hidden, weights.rank
        first = weights.take("conv1.weight", hidden, self.place.in_channels, 1, 1)
        middle = weights.take("conv2.weight", hidden, hidden, 3, 3)
        last = weights.take("conv3.weight", self.place.out_channels, hidden, 1, 1)
        norm1, norm2 = (weights.statistics(name, hidden) for name in ("bn1", "bn2"))
        hands = taken(best_first(rank, middle, last, norm2), self.sizes, rank)
        cuts = [
            thinned(middle[hand], norm1, {key: v[hand] for key, v in norm2.items()}, len(hand), rank, hand)
            for hand in hands
        ]
        inputs, outputs = torch.cat([cut[0] for cut in cuts]), torch.cat(hands)
        self.conv1.weight.copy_(first[inputs])
        for conv, (_, kernel, _) in zip(self.conv2, cuts, strict=True):
            cast(nn.Conv2d, conv).weight.copy_(kernel)
        for key in STATISTICS:
            getattr(self.bn1, key).copy_(norm1[key][inputs])
            getattr(self.bn2, key).copy_(torch.cat([norm[key] for _, _, norm in cuts]))
        shares = copies(outputs, hidden)[:, None, None]
        norm3 = weights.statistics("bn3", self.place.out_channels)
        shared_out(last[:, outputs] / shares, norm3, self.sizes, self.conv3, self.bn3)
        if isinstance(self.shortcut, nn.Sequential):
            weights.copy(self.shortcut[0], "shortcut.0")
            weights.copy(self.shortcut[1], "shortcut.1")

    @property
    def hidden(self) -> int:
        """Hidden channels of the plain block."""
        return self.place.out_channels // self.expansion

    def _macs(self, hidden: int) -> int:
        """MACs of three convolutions with so many hidden channels."""
        first = conv_macs(self.place.in_size, 1, self.place.in_channels, hidden)
        last = conv_macs(self.place.out_size, 1, hidden, self.place.out_channels)
        return first + conv_macs(self.place.out_size, 3, hidden, hidden) + last


class PathInverted(Unit):
    """Inverted residual split into N sub-blocks of expansion t/N with a switch each: shortcut + sum of open ones, no ReLU.

    Blocks whose shape changes have a 1x1 projection with BatchNorm as their shortcut, which the plain net lacks: equation
    (4) needs one, and the paper's parameters show it. sizes: expanded channels of each sub-block. The last
    BatchNorms are not folded by covariance in training: sub-blocks are wider than their output here, so that covariances
    cost more than outputs (`benchmarks/dmnn_step.py`).
    """

    additive = True

    def __init__(self, place: Place, sizes: list[int]) -> None:
        super().__init__()
        hidden = sum(sizes)
        self.place, self.sizes = place, sizes
        self.shortcut = place.shortcut()
        self.expand = nn.Conv2d(place.in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, place.stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.project = nn.ModuleList(nn.Conv2d(s, place.out_channels, 1, bias=False) for s in sizes)
        self.bn3 = nn.ModuleList(nn.BatchNorm2d(place.out_channels) for _ in sizes)
        shares = tuple(size / hidden for size in sizes)
        self.spec = place.spec("free", shares, True)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run: shortcut + sum of gate times sub-block."""
        u = F.relu6(self.bn1(self.expand(x_BCHW)), inplace=True)
        u = F.relu6(self.bn2(self.depthwise(u)), inplace=True)
        return gated_sum(self.shortcut(x_BCHW), u.split(self.sizes, 1), self.project, self.bn3, keep_BG)

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The open sub-blocks as one block, with each last BatchNorm folded and the biases summed."""
        opened = [g for g, on in enumerate(keep) if on]
        if not opened:
            return Residual(self.shortcut, None, relu=False)
        rows, every = opened_channels(self.sizes, opened).to(self.expand.weight.device), slice(None)
        body = nn.Sequential(
            sliced_conv(self.expand, rows, every),
            sliced_norm(self.bn1, rows),
            nn.ReLU6(),
            sliced_conv(self.depthwise, rows, rows),
            sliced_norm(self.bn2, rows),
            nn.ReLU6(),
            summed_conv(self.project, self.bn3, opened),
        )
        return Residual(self.shortcut, body, relu=False).eval()

    def cost_terms(self) -> CostTerms:
        """All convolutions shrink with the expanded channels; a projection always runs, but the plain net has none."""
        inputs = self.place.in_channels
        one = (
            conv_macs(self.place.in_size, 1, inputs, 1)
            + conv_macs(self.place.out_size, 3, 1, 1)
            + conv_macs(self.place.out_size, 1, 1, self.place.out_channels)
        )
        always = self.place.shortcut_macs()
        return CostTerms(always, tuple(float(size * one) for size in self.sizes), plain=float(sum(self.sizes) * one))

    @torch.no_grad()
    def load_dense(self, weights: Weights) -> None:
        """Import the plain block under torchvision's names; sub-blocks take every N-th channel in rank order.

        A projection shortcut starts at zero: with all sub-blocks open, the eval-mode net computes the dense net exactly.
        """
        hidden = sum(self.sizes)
        last = weights.take("conv.2.weight", self.place.out_channels, hidden, 1, 1)
        norm = weights.statistics("conv.1.1", hidden)
        order = best_first(weights.rank, weights.take("conv.0.0.weight", *self.expand.weight.shape), last, norm)
        if weights.rank != "none":
            order = dealt(order, len(self.sizes))
        layers = {"conv.0.0": self.expand, "conv.0.1": self.bn1, "conv.1.0": self.depthwise, "conv.1.1": self.bn2}
        for name, layer in layers.items():
            for key, target in tensors(layer).items():
                target.copy_(weights.take(f"{name}.{key}", *target.shape)[order])
        shared_out(
            last[:, order], weights.statistics("conv.3", self.place.out_channels), self.sizes, self.project, self.bn3
        )
        if isinstance(self.shortcut, nn.Sequential):
            for value in (self.shortcut[1].weight, self.shortcut[1].bias):
                nn.init.zeros_(cast(Tensor, value))


def gated_sum(
    out_BCHW: Tensor, parts: Sequence[Tensor], convs: nn.ModuleList, norms: nn.ModuleList, keep_BG: Tensor | None
) -> Tensor:
    """out + sum over sub-blocks of gate * BatchNorm(conv(part)), equation (4). keep_BG None: all gates open.

    Convolutions run apart: of the exact forms for a last 3x3 it is the fastest or ties (`docs/dmnn_training.md`).
    """
    for g, (part, conv, norm) in enumerate(zip(parts, convs, norms, strict=True)):
        y = norm(conv(part))
        gate = None if keep_BG is None else keep_BG[:, g, None, None, None].to(y.dtype)
        out_BCHW = out_BCHW + y if gate is None else torch.addcmul(out_BCHW, y, gate)
    return out_BCHW


def opened_channels(sizes: Sequence[int], opened: Sequence[int]) -> Tensor:
    """Indices of the hidden channels of the open sub-blocks. sizes: channels of each sub-block."""
    starts = [sum(sizes[:g]) for g in opened]
    return torch.cat([torch.arange(s, s + sizes[g]) for s, g in zip(starts, opened, strict=True)])


def summed_conv(convs: nn.ModuleList, norms: nn.ModuleList, opened: Sequence[int]) -> nn.Conv2d:
    """One convolution (eval) over the concatenated open sub-blocks that equals the sum of conv, then BatchNorm of each."""
    first = cast(nn.Conv2d, convs[opened[0]])
    folded = [folded_conv(cast(nn.Conv2d, convs[g]), cast(nn.BatchNorm2d, norms[g])) for g in opened]
    weight, bias = torch.cat([w for w, _ in folded], 1), torch.stack([b for _, b in folded]).sum(0)
    last = skip_init(nn.Conv2d, weight.shape[1], weight.shape[0], first.kernel_size, padding=first.padding)
    assert last.bias is not None
    last.weight.data, last.bias.data = weight, bias
    return last
