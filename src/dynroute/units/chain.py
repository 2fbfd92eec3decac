"""Single convolutions of a plain chain (VGG; RNP's own nets), whose output channels form nested groups.

Without a shortcut, channels not kept are missing in the next layer's input too: a convolution shrinks on both sides, and
its cost is the product of two choices, image by image. Feature maps between units keep their full number of channels;
those not kept are exact zeros. B images, G parts, H parts of the unit read, C channels (in BCHW: H height, W width).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import UnitSpec
from dynroute.cost import CostTerms, conv_macs
from dynroute.units.base import (
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
from dynroute.units.ranking import best_first


class ConvUnit(Unit):
    """3x3 convolution with bias, BatchNorm if asked for, ReLU, and 2x2 max-pooling if asked for (RNP; Lin et al., 2017).

    The mask is the authors', on the convolution's output before ReLU; with a BatchNorm it comes behind that, which would
    turn zeros into non-zeros. The statistics behind a convolution depend on how
    much of its input was kept, so the BatchNorm is one of its own for each width of the unit read (ours; RNP has none).

    sizes: output channels of each part. in_size: height (= width) of the input. reads: index of the unit whose output this
    is fed with, sizes_in: that unit's sizes; without them the input is never pruned, as behind the stem.
    """

    def __init__(
        self,
        name: str,
        in_channels: int,
        sizes: Sequence[int],
        in_size: int,
        *,
        reads: int | None = None,
        sizes_in: Sequence[int] = (),
        norm: bool = False,
        pool: bool = False,
        stage: int = 1,
        stages: int = 1,
    ) -> None:
        super().__init__()
        out = sum(sizes)
        self.sizes, self.sizes_in, self.in_size, self.reads = list(sizes), list(sizes_in), in_size, reads
        self.out_size = in_size // 2 if pool else in_size
        self.conv = nn.Conv2d(in_channels, out, 3, 1, 1)
        self.norm = WidthNorm(out, max(len(sizes_in), 1)) if norm else None
        self.pool = nn.MaxPool2d(2) if pool else None
        shares = tuple(size / out for size in sizes)
        self.spec = UnitSpec(name, in_channels, len(sizes), "nested", False, shares, stage, stages)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None, above_BG: Tensor | None = None) -> Tensor:
        """The masked run; both keeps must be prefixes of ones. above_BG: the keep of the unit read; None: all of it."""
        kept = None if keep_BG is None or keep_BG.requires_grad else common_width(keep_BG[:, : len(self.sizes)])
        read = len(self.sizes_in) if above_BG is None else common_width(above_BG[:, : len(self.sizes_in)])
        if self.norm is None and kept and read is not None:
            return self._uniform(x_BCHW, kept, read)
        y = self.conv(x_BCHW)
        if self.norm is not None:
            y = self.norm(y, None if above_BG is None else above_BG.detach().sum(1).long())
        if self.pool is not None:
            y = self.pool(y)  # before ReLU: the same, on a quarter of the values
        if keep_BG is None:
            return F.relu(y)  # not in place: a WidthNorm returns a view of sorted images
        return masked(y, channel_mask(keep_BG[:, : len(self.sizes)], self.sizes).to(y.dtype))

    def _uniform(self, x_BCHW: Tensor, kept: int, read: int) -> Tensor:
        """All images at one width, behind one width: a static chain trains at its own cost."""
        outputs, inputs = sum(self.sizes[:kept]), sum(self.sizes_in[:read]) or self.spec.in_channels
        weight, bias = self.conv.weight[:outputs, :inputs], self.conv.bias
        assert bias is not None
        y = F.relu_(F.conv2d(x_BCHW[:, :inputs], weight, bias[:outputs], padding=1))
        if self.pool is not None:
            y = self.pool(y)
        return F.pad(y, (0, 0, 0, 0, 0, sum(self.sizes) - outputs))

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The first kept output channels from the first kept input channels; zeros stand for the other outputs."""
        kept = sum(self.sizes[: sum(keep)])
        inputs = self.spec.in_channels if keep_in is None else sum(self.sizes_in[: sum(keep_in)])
        layers: list[nn.Module] = [sliced_conv(self.conv, slice(0, kept), slice(0, inputs))]
        if self.norm is not None:
            widths = len(self.norm.weight)
            layers.append(sliced_norm(self.norm.at(widths if keep_in is None else sum(keep_in)), slice(0, kept)))
        layers += [nn.ReLU()] if self.pool is None else [nn.ReLU(), self.pool]
        return NarrowConv(nn.Sequential(*layers), inputs, sum(self.sizes) - kept).eval()

    def cost_terms(self) -> CostTerms:
        """By part where the whole input is always there, else by pairs of a part read and a part kept."""
        one = conv_macs(self.in_size, 3, 1, 1)
        if self.reads is None:
            return CostTerms(0, tuple(float(one * self.spec.in_channels * size) for size in self.sizes))
        pair_HG = tuple(tuple(float(one * read * size) for size in self.sizes) for read in self.sizes_in)
        return CostTerms(0, (0.0,) * len(self.sizes), pair_HG)

    def block(self, outputs: slice, inputs: slice) -> nn.Conv2d:
        """What some inputs add to some outputs, before ReLU; the bias goes with the first inputs.

        Only without a BatchNorm, whose statistics depend on how many parts are read.
        """
        assert self.norm is None, "with a BatchNorm by width a layer is not a sum over its inputs"
        conv = sliced_conv(self.conv, outputs, inputs)
        if inputs.start and conv.bias is not None:
            conv.bias.data.zero_()
        return conv

    @torch.no_grad()
    def load_dense(self, weights: Weights) -> None:
        """Import the convolution and, for all widths the same to start with, the BatchNorm; the order stays as it is."""
        for key, target in tensors(self.conv).items():
            target.copy_(weights.take(key, *target.shape))
        if self.norm is not None:
            for key, value in weights.statistics("norm", sum(self.sizes)).items():
                getattr(self.norm, key).copy_(value)

    @torch.no_grad()
    def reorder(self, rank: str, reader: nn.Conv2d | nn.Linear) -> None:
        """Put the output channels into the order of rank (one of RANKS), and the inputs of the next layer with them.

        reader: that layer; a linear one has a block of columns, one a pixel, for each channel. The function of the dense
        net stays the same.
        """
        blocks_OCK = reader.weight.reshape(len(reader.weight), sum(self.sizes), -1)
        norm = None if self.norm is None else tensors(self.norm.at(len(self.norm.weight)))
        order = best_first(rank, self.conv.weight, blocks_OCK[..., None], norm)
        for value in tensors(self.conv).values():
            value.copy_(value[order])
        if self.norm is not None:
            for value in tensors(self.norm).values():
                value.copy_(value[:, order])
        reader.weight.copy_(blocks_OCK[:, order].reshape_as(reader.weight))

    def dense_state(self) -> dict[str, Tensor]:
        """The plain layer: weight, bias, and the BatchNorm of the full width under `norm`."""
        state = tensors(self.conv)
        if self.norm is not None:
            state |= {f"norm.{key}": value for key, value in tensors(self.norm.at(len(self.norm.weight))).items()}
        return {key: value.detach() for key, value in state.items()}


class NarrowConv(nn.Module):
    """A narrowed layer between feature maps of full width: reads the first channels, adds channels of zeros behind."""

    def __init__(self, layers: nn.Sequential, inputs: int, behind: int) -> None:
        super().__init__()
        self.layers, self.inputs, self.behind = layers, inputs, behind

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The unit's output for images of one pattern."""
        y = self.layers(x_BCHW[:, : self.inputs])
        return F.pad(y, (0, 0, 0, 0, 0, self.behind)) if self.behind else y
