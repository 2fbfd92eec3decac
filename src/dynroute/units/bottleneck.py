"""Bottleneck blocks (1x1, 3x3, 1x1; He et al., 2016), cut into channel groups, or whole as in ResNeXt.

B images, G parts, C channels, H W height and width.
"""

from __future__ import annotations

import copy
from itertools import accumulate, pairwise

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
from dynroute.units.choice import ChoiceBottleneck
from dynroute.units.paths import PathBottleneck
from dynroute.units.ranking import best_first


class GroupedBottleneck(Unit):
    """Bottleneck whose hidden channels form G nested groups: keeping a groups computes the first a of both 1x1 and 3x3.

    RNR incremental on ResNet-50; the paper gives no details, so the cut is ours: one choice of a narrows the outputs of
    conv1, both sides of conv2 (which carries the stride, as torchvision's v1.5 does) and the inputs of conv3. Masks go
    behind BatchNorm. bn1 sees the same at every width; bn2 and bn3 have statistics of their own for each.
    sizes: channels of each group, before and after conv2.
    """

    def __init__(self, place: Place, sizes: list[int]) -> None:
        super().__init__()
        hidden, widths = sum(sizes), len(sizes)
        self.place, self.sizes = place, sizes
        self.shortcut = place.shortcut()
        self.conv1 = nn.Conv2d(place.in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, place.stride, 1, bias=False)
        self.bn2 = WidthNorm(hidden, widths)
        self.conv3 = nn.Conv2d(hidden, place.out_channels, 1, bias=False)
        self.bn3 = WidthNorm(place.out_channels, widths)
        by_part = self.cost_terms().by_part_G
        shares = tuple(macs / sum(by_part) for macs in by_part)
        self.spec = place.spec("nested", shares, False)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run; keep_BG must be a prefix of ones."""
        u = self.bn1(self.conv1(x_BCHW))
        if keep_BG is None:
            u = F.relu_(self.bn2(self.conv2(F.relu_(u)), None))
            return F.relu_(self.shortcut(x_BCHW) + self.bn3(self.conv3(u), None))
        keep_BG = keep_BG[:, : len(self.sizes)]
        mask_BC11 = channel_mask(keep_BG, self.sizes).to(u.dtype)
        width_B = keep_BG.detach().sum(1).long()
        u = masked(self.bn2(self.conv2(masked(u, mask_BC11)), width_B), mask_BC11)
        y = self.bn3(self.conv3(u), width_B)
        anything_B111 = keep_BG[:, :1, None, None].to(y.dtype)  # a prefix that is not empty holds its first part
        return F.relu_(self.shortcut(x_BCHW) + y * anything_B111)

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The block with only its first kept groups of both sets of hidden channels."""
        kept = sum(keep)
        if kept == 0:
            return Residual(self.shortcut, None)
        hidden, every = slice(0, sum(self.sizes[:kept])), slice(None)
        return Residual(
            self.shortcut,
            nn.Sequential(
                sliced_conv(self.conv1, hidden, every),
                sliced_norm(self.bn1, hidden),
                nn.ReLU(),
                sliced_conv(self.conv2, hidden, hidden),
                sliced_norm(self.bn2.at(kept), hidden),
                nn.ReLU(),
                sliced_conv(self.conv3, every, hidden),
                self.bn3.at(kept),
            ),
        ).eval()

    def cost_terms(self) -> CostTerms:
        """What part g adds is cost(g + 1 parts) - cost(g parts); a projection shortcut always runs.

        conv2 shrinks on both sides, so its cost is quadratic in the kept channels; the sums are exact nevertheless,
        because keeps of nested parts are prefixes.
        """
        by_width = [self._macs(hidden) for hidden in accumulate(self.sizes, initial=0)]
        always = self.place.shortcut_macs()
        return CostTerms(always, tuple(float(more - less) for less, more in pairwise(by_width)))

    @torch.no_grad()
    def load_dense(self, weights: Weights) -> None:
        """Import the three convolutions, their BatchNorms and a projection shortcut. Both sets of hidden channels are ranked.

        Each set by its own use to what reads it: conv1's outputs to conv2, conv2's to conv3. All widths start
        with the same BatchNorms.
        """
        first, middle, last = (
            weights.take(f"{name}.weight", *getattr(self, name).weight.shape) for name in ("conv1", "conv2", "conv3")
        )
        norm1, norm2 = (weights.statistics(name, sum(self.sizes)) for name in ("bn1", "bn2"))
        order1 = best_first(weights.rank, first, middle, norm1)
        order2 = best_first(weights.rank, middle, last, norm2)
        self.conv1.weight.copy_(first[order1])
        self.conv2.weight.copy_(middle[order2][:, order1])
        self.conv3.weight.copy_(last[:, order2])
        for key in norm1:
            getattr(self.bn1, key).copy_(norm1[key][order1])
            getattr(self.bn2, key).copy_(norm2[key][order2])
        for key, value in weights.statistics("bn3", self.place.out_channels).items():
            getattr(self.bn3, key).copy_(value)
        if isinstance(self.shortcut, nn.Sequential):
            weights.copy(self.shortcut[0], "shortcut.0")
            weights.copy(self.shortcut[1], "shortcut.1")

    def dense_state(self) -> dict[str, Tensor]:
        """The plain block at full width."""
        widths = len(self.sizes)
        layers = {"conv1": self.conv1, "bn1": self.bn1, "conv2": self.conv2, "bn2": self.bn2.at(widths)}
        layers |= {"conv3": self.conv3, "bn3": self.bn3.at(widths)}
        if isinstance(self.shortcut, nn.Sequential):
            layers |= {"shortcut.0": self.shortcut[0], "shortcut.1": self.shortcut[1]}
        return {f"{name}.{key}": v.detach() for name, layer in layers.items() for key, v in tensors(layer).items()}

    def _macs(self, hidden: int) -> int:
        """MACs of the three convolutions with so many hidden channels in each set."""
        first = conv_macs(self.place.in_size, 1, self.place.in_channels, hidden)
        last = conv_macs(self.place.out_size, 1, hidden, self.place.out_channels)
        return first + conv_macs(self.place.out_size, 3, hidden, hidden) + last


class AggregatedBottleneck(Unit):
    """ResNeXt block (Xie et al., 2017): a bottleneck with a grouped 3x3 convolution, always whole; for static nets.

    DMNN with all gates open computes such a net. sizes: one number, hidden channels. groups: of the 3x3 convolution.
    """

    def __init__(self, place: Place, sizes: list[int], groups: int) -> None:
        super().__init__()
        (hidden,) = sizes
        self.place = place
        self.shortcut = place.shortcut()
        self.conv1 = nn.Conv2d(place.in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, place.stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, place.out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(place.out_channels)
        self.spec = place.spec("nested", (1.0,), False)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The whole block, whatever is kept: nothing kept is not legal."""
        u = F.relu_(self.bn1(self.conv1(x_BCHW)))
        u = F.relu_(self.bn2(self.conv2(u)))
        return F.relu_(self.shortcut(x_BCHW) + self.bn3(self.conv3(u)))

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The whole block as a plain one."""
        layers = (self.conv1, self.bn1, nn.ReLU(), self.conv2, self.bn2, nn.ReLU(), self.conv3, self.bn3)
        return Residual(self.shortcut, nn.Sequential(*map(copy.deepcopy, layers))).eval()

    def cost_terms(self) -> CostTerms:
        """One part; a projection shortcut is counted apart."""
        hidden = self.conv2.out_channels
        first = conv_macs(self.place.in_size, 1, self.place.in_channels, hidden)
        middle = conv_macs(self.place.out_size, 3, hidden, hidden, self.conv2.groups)
        last = conv_macs(self.place.out_size, 1, hidden, self.place.out_channels)
        always = self.place.shortcut_macs()
        return CostTerms(always, (float(first + middle + last),))

    @torch.no_grad()
    def load_dense(self, weights: Weights) -> None:
        """Import the block as it is."""
        for name, layer in self._layers().items():
            weights.copy(layer, name)

    def dense_state(self) -> dict[str, Tensor]:
        """The block as it is."""
        return {
            f"{name}.{key}": v.detach() for name, layer in self._layers().items() for key, v in tensors(layer).items()
        }

    def _layers(self) -> dict[str, nn.Module]:
        names = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"]
        names += ["shortcut.0", "shortcut.1"] if isinstance(self.shortcut, nn.Sequential) else []
        return {name: self.get_submodule(name) for name in names}


AGGREGATED = {"channels": AggregatedBottleneck}
BOTTLENECK: dict[str, type[GroupedBottleneck] | type[ChoiceBottleneck] | type[PathBottleneck]] = {
    "channels": GroupedBottleneck,
    "paths": PathBottleneck,
    "choice": ChoiceBottleneck,
}
