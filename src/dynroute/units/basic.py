"""Basic blocks (two 3x3 convolutions), cut into channel groups or into sub-blocks.

B images, G parts, C channels, H W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Form, InputError
from dynroute.cost import CostTerms, conv_macs
from dynroute.units.base import (
    Place,
    Residual,
    Unit,
    Weights,
    WidthNorm,
    channel_mask,
    common_width,
    masked,
    sliced_conv,
    sliced_norm,
    tensors,
)
from dynroute.units.choice import ChoiceBasic
from dynroute.units.dealing import dealt, shared_out
from dynroute.units.paths import gated_sum, opened_channels, summed_conv
from dynroute.units.ranking import best_first


class BasicUnit(Unit):
    """A shared frame of the two basic-block units: 3x3 conv, BatchNorm, ReLU, 3x3 conv, BatchNorm, plus shortcut, ReLU.

    sizes: hidden channels of each part.
    """

    form: Form

    def __init__(self, place: Place, sizes: list[int]) -> None:
        super().__init__()
        hidden = sum(sizes)
        self.place, self.sizes = place, sizes
        self.shortcut = place.shortcut()
        self.conv1 = nn.Conv2d(place.in_channels, hidden, 3, place.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        shares = tuple(size / hidden for size in sizes)
        skippable = self.form != "nested"
        self.spec = place.spec(self.form, shares, skippable)

    def cost_terms(self) -> CostTerms:
        """Both convolutions shrink with the hidden channels; a projection shortcut always runs."""
        first = conv_macs(self.place.out_size, 3, self.place.in_channels, 1)
        second = conv_macs(self.place.out_size, 3, 1, self.place.out_channels)
        always = self.place.shortcut_macs()
        return CostTerms(always, tuple(float(size * (first + second)) for size in self.sizes))

    @torch.no_grad()
    def load_dense(self, weights: Weights) -> None:
        """Import conv1, bn1, conv2, bn2 and a projection shortcut; hidden channels are ranked by backbone.rank."""
        hidden = sum(self.sizes)
        if hidden > self.place.out_channels:
            raise InputError(
                f"backbone.weights: {self.spec.name} has {hidden} hidden channels, the plain block {self.place.out_channels}: "
                "sub-blocks widened by backbone.path_least or path_width cannot start from it"
            )
        first = weights.take("conv1.weight", *self.conv1.weight.shape)
        last = weights.take("conv2.weight", self.place.out_channels, hidden, 3, 3)
        norm = weights.statistics("bn1", hidden)
        order = best_first(weights.rank, first, last, norm)
        if weights.rank != "none":
            order = self.dealt(order)
        self.conv1.weight.copy_(first[order])
        for key, value in norm.items():
            getattr(self.bn1, key).copy_(value[order])
        if isinstance(self.shortcut, nn.Sequential):
            weights.copy(self.shortcut[0], "shortcut.0")
            weights.copy(self.shortcut[1], "shortcut.1")
        self.load_last(last[:, order], weights.statistics("bn2", self.place.out_channels))

    def dealt(self, order: Tensor) -> Tensor:
        """The order in which the parts take the channels, best first: the first part the best ones."""
        return order

    def load_last(self, conv2: Tensor, bn2: dict[str, Tensor]) -> None:
        """Take over the second convolution, its inputs already in order, and its BatchNorm."""
        raise NotImplementedError("a basic unit must write load_last()")


class GroupedBasic(BasicUnit):
    """Basic block whose hidden channels form G nested groups; keeping a groups computes the first a (RNP; RNR incremental).

    The mask goes behind BatchNorm, which would turn zeros into non-zeros.
    """

    form: Form = "nested"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.conv2 = nn.Conv2d(sum(self.sizes), self.place.out_channels, 3, 1, 1, bias=False)
        self.bn2 = WidthNorm(self.place.out_channels, len(self.sizes))

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run; keep_BG must be a prefix of ones. Where all images keep as much, the rest is not computed."""
        kept = None if keep_BG is None or keep_BG.requires_grad else common_width(keep_BG[:, : len(self.sizes)])
        if kept:
            return self._uniform(x_BCHW, kept)
        u = self.bn1(self.conv1(x_BCHW))
        if keep_BG is None:
            return F.relu_(self.shortcut(x_BCHW) + self.bn2(self.conv2(F.relu_(u)), None))
        keep_BG = keep_BG[:, : len(self.sizes)]
        u = masked(u, channel_mask(keep_BG, self.sizes).to(u.dtype))
        y = self.bn2(self.conv2(u), keep_BG.detach().sum(1).long())
        anything_B111 = keep_BG[:, :1, None, None].to(y.dtype)  # a prefix that is not empty holds its first part
        return F.relu_(self.shortcut(x_BCHW) + y * anything_B111)

    def _uniform(self, x_BCHW: Tensor, kept: int) -> Tensor:
        """All images at one width: a static net trains at its own cost. BatchNorms of absent channels learn nothing."""
        hidden = sum(self.sizes[:kept])
        y = F.conv2d(x_BCHW, self.conv1.weight[:hidden], None, self.conv1.stride, self.conv1.padding)
        norm = self.bn1
        assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
        running = (norm.running_mean[:hidden], norm.running_var[:hidden])  # views: updated in place
        affine = (norm.weight[:hidden], norm.bias[:hidden])
        u = F.relu_(F.batch_norm(y, *running, *affine, self.training, norm.momentum, norm.eps))
        y = F.conv2d(u, self.conv2.weight[:, :hidden], None, self.conv2.stride, self.conv2.padding)
        return F.relu_(self.shortcut(x_BCHW) + self.bn2.run(y, kept))

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The block with only its first kept groups of hidden channels."""
        kept = sum(keep)
        if kept == 0:
            return Residual(self.shortcut, None)
        hidden = slice(0, sum(self.sizes[:kept]))
        return Residual(
            self.shortcut,
            nn.Sequential(
                sliced_conv(self.conv1, hidden, slice(None)),
                sliced_norm(self.bn1, hidden),
                nn.ReLU(),
                sliced_conv(self.conv2, slice(None), hidden),
                self.bn2.at(kept),
            ),
        ).eval()

    def load_last(self, conv2: Tensor, bn2: dict[str, Tensor]) -> None:
        """The same BatchNorm for all widths to start with."""
        self.conv2.weight.copy_(conv2)
        for key, value in bn2.items():
            getattr(self.bn2, key).copy_(value)

    def dense_state(self) -> dict[str, Tensor]:
        """The plain block at full width."""
        layers = {"conv1": self.conv1, "bn1": self.bn1, "conv2": self.conv2, "bn2": self.bn2.at(len(self.sizes))}
        if isinstance(self.shortcut, nn.Sequential):
            layers |= {"shortcut.0": self.shortcut[0], "shortcut.1": self.shortcut[1]}
        return {f"{name}.{key}": v.detach() for name, layer in layers.items() for key, v in tensors(layer).items()}


class PathBasic(BasicUnit):
    """Basic block split into N sub-blocks with a switch each, summed with the shared shortcut (DMNN, equation 4).

    Every convolution of every sub-block has its BatchNorm. The first convolutions run as one (their BatchNorms on the
    concatenated channels are the separate ones); the last ones run apart.
    """

    form: Form = "free"
    additive = True

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.conv2 = nn.ModuleList(nn.Conv2d(s, self.place.out_channels, 3, 1, 1, bias=False) for s in self.sizes)
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(self.place.out_channels) for _ in self.sizes)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run: shortcut + sum of gate times sub-block."""
        u = F.relu_(self.bn1(self.conv1(x_BCHW)))
        return F.relu_(gated_sum(self.shortcut(x_BCHW), u.split(self.sizes, 1), self.conv2, self.bn2, keep_BG))

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The open sub-blocks as one block: concatenated, with each last BatchNorm folded into its convolution."""
        opened = [g for g, on in enumerate(keep) if on]
        if not opened:
            return Residual(self.shortcut, None)
        rows = opened_channels(self.sizes, opened).to(self.conv1.weight.device)
        return Residual(
            self.shortcut,
            nn.Sequential(
                sliced_conv(self.conv1, rows, slice(None)),
                sliced_norm(self.bn1, rows),
                nn.ReLU(),
                summed_conv(self.conv2, self.bn2, opened),
            ),
        ).eval()

    def cost_terms(self) -> CostTerms:
        """As for other basic blocks; the dense net is that of the plain block, which sub-blocks may exceed together."""
        terms = super().cost_terms()
        one = sum(terms.by_part_G) / sum(self.sizes)
        return terms._replace(plain=terms.always + self.place.out_channels * one)

    def dealt(self, order: Tensor) -> Tensor:
        """Sub-blocks get every N-th rank, so that they start equally good."""
        return dealt(order, len(self.sizes))

    def load_last(self, conv2: Tensor, bn2: dict[str, Tensor]) -> None:
        """Each sub-block gets its part; mean and bias of the BatchNorm are shared out evenly.

        With all sub-blocks open, the eval-mode net computes the dense net exactly.
        """
        shared_out(conv2, bn2, self.sizes, self.conv2, self.bn2)


BASIC: dict[str, type[BasicUnit] | type[ChoiceBasic]] = {
    "channels": GroupedBasic,
    "paths": PathBasic,
    "choice": ChoiceBasic,
}
