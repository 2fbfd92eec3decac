"""Inverted residual blocks (1x1 up, depthwise 3x3, 1x1 down; Sandler et al., MobileNetV2, 2018), cut into channel groups.

B images, G parts, C channels, H W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.cost import CostTerms, conv_macs
from dynroute.units.base import (
    Place,
    Residual,
    Unit,
    Weights,
    WidthNorm,
    channel_mask,
    masked,
    sliced_conv,
    sliced_norm,
    tensors,
)
from dynroute.units.paths import PathInverted
from dynroute.units.ranking import best_first


class GroupedInverted(Unit):
    """Inverted residual whose expanded channels form G nested groups; keeping a groups computes the first a. Ours.

    expand, BatchNorm, ReLU6, depthwise, BatchNorm, ReLU6, mask, project, BatchNorm by width; plus x where shapes agree.
    The mask goes after the depthwise stage: its BatchNorm would turn zeros into non-zeros, and as it works channel by
    channel it needs none before. For the same reason the first two BatchNorms see the same at every width.
    sizes: expanded channels of each group.
    """

    def __init__(self, place: Place, sizes: list[int]) -> None:
        super().__init__()
        hidden = sum(sizes)
        self.place, self.sizes = place, sizes
        self.residual = place.keeps_shape
        self.expand = nn.Conv2d(place.in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, place.stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, place.out_channels, 1, bias=False)
        self.bn3 = WidthNorm(place.out_channels, len(sizes))
        shares = tuple(size / hidden for size in sizes)
        self.spec = place.spec("nested", shares, False)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run; keep_BG must be a prefix of ones, and without a residual sum not empty."""
        u = F.relu6(self.bn1(self.expand(x_BCHW)), inplace=True)
        u = self.bn2(self.depthwise(u))
        if keep_BG is None:
            y = self.bn3(self.project(F.relu6(u, inplace=True)), None)
            return x_BCHW + y if self.residual else y
        keep_BG = keep_BG[:, : len(self.sizes)]
        u = masked(u, channel_mask(keep_BG, self.sizes).to(u.dtype), F.relu6)
        y = self.bn3(self.project(u), keep_BG.detach().sum(1).long())
        if not self.residual:
            return y
        anything_B111 = keep_BG[:, :1, None, None].to(y.dtype)  # a prefix that is not empty holds its first part
        return x_BCHW + y * anything_B111

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The block with only its first kept groups of expanded channels."""
        kept = sum(keep)
        if kept == 0:
            assert self.residual, "without a shortcut something must run"
            return Residual(nn.Identity(), None, relu=False)
        hidden, every = slice(0, sum(self.sizes[:kept])), slice(None)
        body = nn.Sequential(
            sliced_conv(self.expand, hidden, every),
            sliced_norm(self.bn1, hidden),
            nn.ReLU6(),
            sliced_conv(self.depthwise, hidden, hidden),
            sliced_norm(self.bn2, hidden),
            nn.ReLU6(),
            sliced_conv(self.project, every, hidden),
            self.bn3.at(kept),
        )
        return (Residual(nn.Identity(), body, relu=False) if self.residual else body).eval()

    def cost_terms(self) -> CostTerms:
        """All three convolutions shrink with the expanded channels."""
        one = (
            conv_macs(self.place.in_size, 1, self.place.in_channels, 1)
            + conv_macs(self.place.out_size, 3, 1, 1)
            + conv_macs(self.place.out_size, 1, 1, self.place.out_channels)
        )
        return CostTerms(0, tuple(float(size * one) for size in self.sizes))

    @torch.no_grad()
    def load_dense(self, weights: Weights) -> None:
        """Import the block under torchvision's names; expanded channels are ranked by their use to the projection."""
        last = weights.take("conv.2.weight", *self.project.weight.shape)
        norm = weights.statistics("conv.1.1", sum(self.sizes))
        order = best_first(weights.rank, weights.take("conv.0.0.weight", *self.expand.weight.shape), last, norm)
        self.project.weight.copy_(last[:, order])
        layers = {"conv.0.0": self.expand, "conv.0.1": self.bn1, "conv.1.0": self.depthwise, "conv.1.1": self.bn2}
        for name, layer in layers.items():
            for key, target in tensors(layer).items():
                target.copy_(weights.take(f"{name}.{key}", *target.shape)[order])
        for key, value in weights.statistics("conv.3", self.place.out_channels).items():
            getattr(self.bn3, key).copy_(value)

    def dense_state(self) -> dict[str, Tensor]:
        """The plain block at full width, under torchvision's names."""
        layers = {"conv.0.0": self.expand, "conv.0.1": self.bn1, "conv.1.0": self.depthwise, "conv.1.1": self.bn2}
        layers |= {"conv.2": self.project, "conv.3": self.bn3.at(len(self.sizes))}
        return {f"{name}.{key}": v.detach() for name, layer in layers.items() for key, v in tensors(layer).items()}


INVERTED: dict[str, type[GroupedInverted] | type[PathInverted]] = {"channels": GroupedInverted, "paths": PathInverted}
