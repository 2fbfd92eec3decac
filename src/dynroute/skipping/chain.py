"""The fast run of a chain (VGG): feature maps between units hold the kept channels alone.

Images of one width stand in slabs. A layer splits a slab by what its images keep next, as views where maps are large, as
copies where they are small; slabs that have met at one width are joined where that pays.
B images, C channels, H W height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynroute.skipping.blocks import tiles
from dynroute.skipping.cache import Key, Program, Programs
from dynroute.skipping.kernels import CALL, COPY, READ
from dynroute.skipping.lowering import Narrowed, widened
from dynroute.skipping.unit import copying_pays, gathered, runs_of
from dynroute.units import ConvUnit

# A call on maps of at most SMALL pixels a side whose weights have more than CACHE bytes reads them anew for every AGAIN images
# (measured with oneDNN 3.13 on one processor; ours).
SMALL, CACHE, AGAIN = 4, 2**20, 2.5


class Slab(NamedTuple):
    """Images of the minibatch by number, and their maps (N, c, H, W) of the channels that the pattern `above` keeps, or more
    than an image keeps, zeros then. above None: the input of the first layer."""

    images: list[int]
    x_NCHW: Tensor
    above: tuple[bool, ...] | None


class FastLayer:
    """The programs of one layer of a chain."""

    def __init__(self, programs: Programs, unit: ConvUnit) -> None:
        self.programs, self.unit = programs, unit
        self.outputs, self.inputs = tiles(unit.sizes), tiles(unit.sizes_in)

    def __call__(
        self, slabs: Sequence[Slab], keys: Sequence[Key], programs: Sequence[Program] | None = None
    ) -> list[Slab]:
        """The layer's slabs. keys: the pattern of each image of the minibatch, by number; programs: of one that all have."""
        if len(keys) > 1 and self.programs.in_blocks[keys[0].unit] and self._blocks_pay(slabs, keys):
            return [self._in_blocks(slabs, keys)]
        if len(slabs) == 1 and len(set(keys)) == 1:  # one image, above all
            slab, key = slabs[0], keys[0]._replace(above=slabs[0].above)
            return [Slab(slab.images, self.run(slab.x_NCHW, programs or self.programs.of(key)), key.own)]
        out = []
        for slab in self._joined(slabs, keys):
            for images, x_NCHW in self._split(slab, keys):
                key = keys[images[0]]._replace(above=slab.above)
                out.append(Slab(images, self.run(x_NCHW, self.programs.of(key)), key.own))
        return out

    def run(self, x_NCHW: Tensor, programs: Sequence[Program]) -> Tensor:
        """A program of one pattern; of a chain there is never more than one."""
        (program,) = programs
        assert isinstance(program, Narrowed)
        return program.body(x_NCHW)

    def _blocks_pay(self, slabs: Sequence[Slab], keys: Sequence[Key]) -> bool:
        """Whether all images through the layer's blocks read so few weights that the copies are worth it.

        The multiply-adds are the same either way, and left out. Known of processors alone.
        """
        groups = Counter((keys[i].own, slab.above) for slab in slabs for i in slab.images)
        small = self.unit.in_size <= SMALL
        if not slabs[0].x_NCHW.is_cpu or (len(groups) == 1 and not small):
            return False
        images = [image for slab in slabs for image in slab.images]
        pixels = 4 * self.unit.in_size**2
        parts = [(sum(keys[i].own), sum(keys[i].above or ())) for i in images]
        read = [sum(self.unit.sizes_in[:above]) for _, above in parts]
        kept, widest = max(own for own, _ in parts), max(above for _, above in parts)
        rows = [tile.part for tile in self.outputs if tile.part < kept]
        calls = len(rows) * sum(tile.part < widest for tile in self.inputs)
        copied = sum(inputs for g in rows for inputs, (own, _) in zip(read, parts, strict=True) if own > g)
        written = sum(sum(self.unit.sizes[:own]) for own, _ in parts) * (self.unit.out_size / self.unit.in_size) ** 2
        blocks = calls * CALL + self._bytes(None, None) / READ + 2 * pixels * (copied + written) / COPY
        apart = 2 * pixels * sum(read) / COPY if len(groups) > 1 else 0.0
        for (own, above), count in groups.items():
            weights = self._bytes(own, above)
            apart += CALL + weights / READ * (max(count / AGAIN, 1) if small and weights > CACHE else 1)
        return blocks < apart

    def _in_blocks(self, slabs: Sequence[Slab], keys: Sequence[Key]) -> Slab:
        """All images in one slab of the widest of their widths."""
        images = [image for slab in slabs for image in slab.images]
        widest = max(slab.x_NCHW.shape[1] for slab in slabs)
        wide = [widened(slab.x_NCHW, widest - slab.x_NCHW.shape[1]) for slab in slabs]
        x_NCHW = wide[0] if len(wide) == 1 else torch.cat(wide)
        kept = [sum(keys[i].own) for i in images]
        out_NCHW = self.programs.blocks(keys[0].unit)(x_NCHW, kept, [sum(keys[i].above or ()) for i in images])
        return Slab(images, out_NCHW, max((keys[i].own for i in images), key=sum))

    def _joined(self, slabs: Sequence[Slab], keys: Sequence[Key]) -> list[Slab]:
        """Slabs of one width made one, where that saves enough calls."""
        by_width: dict[tuple[bool, ...] | None, list[Slab]] = {}
        for slab in slabs:
            by_width.setdefault(slab.above, []).append(slab)
        out: list[Slab] = []
        for above, same in by_width.items():
            images = [image for slab in same for image in slab.images]
            saved = sum(len(own_of(slab.images, keys)) for slab in same) - len(own_of(images, keys))
            moved = sum(slab.x_NCHW.nbytes for slab in same)
            pays = copying_pays(saved, self._bytes(None, above) / 2, moved) or not same[0].x_NCHW.is_cpu
            if saved and pays:
                out.append(Slab(images, torch.cat([slab.x_NCHW for slab in same]), above))
            else:
                out.extend(same)
        return out

    def _split(self, slab: Slab, keys: Sequence[Key]) -> list[tuple[list[int], Tensor]]:
        """The slab by what its images keep."""
        own = [keys[image].own for image in slab.images]
        runs, different = runs_of(own), list(dict.fromkeys(own))
        if len(different) == 1:
            return [(slab.images, slab.x_NCHW)]
        saved, weights = len(runs) - len(different), self._bytes(None, slab.above) / 2
        if copying_pays(saved, weights, slab.x_NCHW.nbytes) or (saved and not slab.x_NCHW.is_cpu):
            places = [[i for i, other in enumerate(own) if other == one] for one in different]
            return [([slab.images[i] for i in at], gathered(slab.x_NCHW, at)) for at in places]
        return [(slab.images[r.first : r.last], slab.x_NCHW[r.first : r.last]) for r in runs]

    def _bytes(self, own: tuple[bool, ...] | None, above: tuple[bool, ...] | None) -> int:
        """Weights of the convolution from and to these channels; None: all of them."""
        unit = self.unit
        outputs = sum(unit.sizes) if own is None else sum(unit.sizes[: sum(own)])
        inputs = unit.spec.in_channels if above is None else sum(unit.sizes_in[: sum(above)])
        return 4 * 9 * inputs * outputs


def own_of(images: Sequence[int], keys: Sequence[Key]) -> set[tuple[bool, ...]]:
    """What these images keep, each pattern once."""
    return {keys[image].own for image in images}


def pixel_means(x_BCHW: Tensor) -> Tensor:
    """(B, C), in fp32 at least: what a router sees must not depend on where its image stands."""
    return x_BCHW.mean((2, 3), dtype=torch.promote_types(x_BCHW.dtype, torch.float32))


def pooled(slabs: Sequence[Slab], images: int, channels: int) -> Tensor:
    """Means over pixels of maps of full width, (B, C, 1, 1): all that a router with `pooled` looks at."""
    means = []
    for slab in slabs:
        mean_NC = pixel_means(slab.x_NCHW)
        means.append(F.pad(mean_NC, (0, channels - mean_NC.shape[1])) if mean_NC.shape[1] < channels else mean_NC)
    stand = [image for slab in slabs for image in slab.images]
    mean_BC = means[0] if len(slabs) == 1 else torch.cat(means)
    if stand != list(range(images)):  # one slab too may hold them in another order than they came in
        mean_BC = mean_BC[torch.tensor(stand).argsort()]
    return mean_BC[:, :, None, None]


def entire(slabs: Sequence[Slab], images: int, channels: int) -> Tensor:
    """Maps of full width, (B, C, H, W), zeros where channels were not kept."""
    height, width = slabs[0].x_NCHW.shape[2:]
    out_BHWC = slabs[0].x_NCHW.new_zeros(images, height, width, channels)
    for slab in slabs:
        kept = slab.x_NCHW.shape[1]
        out_BHWC[torch.tensor(slab.images), :, :, :kept] = slab.x_NCHW.permute(0, 2, 3, 1)
    return out_BHWC.permute(0, 3, 1, 2)
