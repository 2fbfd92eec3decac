"""A layer of a chain in blocks: some of its inputs and some of its outputs are a convolution of their own.

Images of all patterns go through together, every block running for those that read and keep its channels. So a minibatch reads
each weight once, where narrow layers for every pattern read 6.25 times the weights (four parts a side), and a block's weights
stay in the cache from one image to the next. On small maps that is most of the time. And any pattern is a sum of blocks, so that
memory of one times the weights is enough for all of them. Without a BatchNorm: that is another for every width. Ours.
N images, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dynroute.skipping.kernels import Conv
from dynroute.units import ConvUnit

WIDE = 128  # channels of a block at most: 0.6 MB of weights (ours, measured)


class Tile(NamedTuple):
    """Channels that are kept or not together, and the part to which they belong."""

    part: int
    channels: slice


class Blocks:
    """The blocks of one unit without a BatchNorm, which would be another for every width that is read."""

    def __init__(self, unit: ConvUnit, packed: bool) -> None:
        self.outputs, self.inputs = tiles(unit.sizes), tiles(unit.sizes_in)
        self.rows = [[Conv(unit.block(o.channels, i.channels), packed) for i in self.inputs] for o in self.outputs]
        self.pool = unit.pool

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(conv.bytes for row in self.rows for conv in row)

    def __call__(self, x_NCHW: Tensor, kept: Sequence[int], read: Sequence[int]) -> Tensor:
        """Maps of as many channels as the widest image keeps, zeros where another keeps less.

        x: as many channels as are read of the widest image at least. kept, read: numbers of parts of each image.
        """
        x_NHWC = x_NCHW.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        wanted = [tile for tile in self.outputs if tile.part < max(kept)]
        alike, out_NHWC = min(kept) == max(kept), None
        shared: dict[int, Tensor] = {}  # copies of what all images read, by tile
        for tile, row in zip(wanted, self.rows, strict=False):
            images = sorted((n for n, count in enumerate(kept) if count > tile.part), key=lambda n: -read[n])
            index = None if images == list(range(len(kept))) else torch.tensor(images, device=x_NCHW.device)
            y_NHWC = self._row(row, x_NHWC, [read[n] for n in images], index, shared)
            if out_NHWC is None:
                make = y_NHWC.new_empty if alike else y_NHWC.new_zeros
                out_NHWC = make((len(kept), *y_NHWC.shape[1:3], wanted[-1].channels.stop))
            target = out_NHWC[..., tile.channels]
            if index is None:
                target.copy_(y_NHWC)
            else:
                target.index_copy_(0, index, y_NHWC)
        assert out_NHWC is not None
        return out_NHWC.permute(0, 3, 1, 2)

    def alike(self, x_NCHW: Tensor, kept: int, read: int) -> Tensor:
        """The same for images of one pattern."""
        return self(x_NCHW, [kept] * len(x_NCHW), [read] * len(x_NCHW))

    def _row(
        self, row: Sequence[Conv], x_NHWC: Tensor, read: Sequence[int], index: Tensor | None, shared: dict[int, Tensor]
    ) -> Tensor:
        """Output channels of one tile, of the images at `index` (None: of all), of which the first reads most parts."""
        out_NCHW: Tensor | None = None
        for i, (conv, tile) in enumerate(zip(row, self.inputs, strict=True)):
            count = sum(parts > tile.part for parts in read)
            if not count:
                break
            part_NHWC = shared.get(i) if index is None else None
            if part_NHWC is None:
                own_NHWC = x_NHWC[..., tile.channels]
                part_NHWC = own_NHWC[:count].contiguous() if index is None else own_NHWC.index_select(0, index[:count])
            if index is None:
                shared[i] = part_NHWC
            if out_NCHW is None:
                out_NCHW = conv(part_NHWC.permute(0, 3, 1, 2))
            else:
                conv.add_to(out_NCHW[:count], part_NHWC.permute(0, 3, 1, 2), relu=False)
        assert out_NCHW is not None
        out_NCHW = out_NCHW.relu_()
        if self.pool is not None:
            out_NCHW = self.pool(out_NCHW)
        return out_NCHW.permute(0, 2, 3, 1)


def tiles(sizes: Sequence[int]) -> list[Tile]:
    """The channels of all parts in tiles of at most WIDE, those of one part as even as may be."""
    found, first = [], 0
    for part, size in enumerate(sizes):
        count = -(-size // WIDE)
        edges = [first + size * k // count for k in range(count + 1)]
        found += [Tile(part, slice(a, b)) for a, b in pairwise(edges)]
        first += size
    return found
