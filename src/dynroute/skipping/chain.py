"""The fast run of a chain (VGG): feature maps between units hold the kept channels alone.

Images of one width stand in slabs. A layer splits a slab by what its images keep next, as views where maps are large, as
copies where they are small; slabs that have met at one width are joined where that pays.
B images, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynroute.skipping.cache import Key, Programs
from dynroute.skipping.lowering import Narrowed, widened
from dynroute.skipping.unit import CALL, COPY, READ, copying_pays, gathered, runs_of
from dynroute.units import ConvUnit

RATE = 4.5e10  # multiply-adds a second of a large convolution on one core (measured, 8 floats at a time; ours)


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

    def __call__(self, slabs: Sequence[Slab], keys: Sequence[Key]) -> list[Slab]:
        """The layer's slabs. keys: the pattern of each image of the minibatch, by number."""
        if len(slabs) == 1 and len(own_of(slabs[0].images, keys)) == 1:  # one image, above all
            slab, key = slabs[0], keys[slabs[0].images[0]]._replace(above=slabs[0].above)
            return [Slab(slab.images, self.run(slab.x_NCHW, self.programs.of(key)), key.own)]  # type: ignore[arg-type]
        slabs, out = self._joined(slabs, keys), []
        for slab in self._widest(slabs, keys):
            for images, x_NCHW in self._split(slab, keys):
                key = keys[images[0]]._replace(above=slab.above)
                out.append(Slab(images, self.run(x_NCHW, self.programs.of(key)), key.own))  # type: ignore[arg-type]
        return out

    def run(self, x_NCHW: Tensor, programs: Sequence[Narrowed]) -> Tensor:
        """One program, or several that read different channels, summed, then ReLU and pooling."""
        if not programs[0].partial:
            return programs[0].body(x_NCHW)
        out_NCHW, last = None, len(programs) - 1
        for i, program in enumerate(programs):
            read = x_NCHW[:, program.inputs].contiguous(memory_format=torch.channels_last)
            if out_NCHW is None:
                out_NCHW = program.body(read)
            else:
                program.body.steps[0].add_to(out_NCHW, read, relu=i == last)  # type: ignore[attr-defined]
        assert out_NCHW is not None
        if not last:
            out_NCHW = out_NCHW.relu_()
        return out_NCHW if self.unit.pool is None else self.unit.pool(out_NCHW)

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

    def _widest(self, slabs: list[Slab], keys: Sequence[Key]) -> list[Slab]:
        """All images in one slab of the widest of their widths, where reading fewer weights is worth the multiply-adds.

        So it is on small maps, whose convolutions take as long as their weights take to arrive.
        """
        if len(slabs) < 2 or slabs[0].above is None or self.unit.norm is not None:  # which is another for every width
            return slabs
        wide = max((slab.above for slab in slabs if slab.above is not None), key=sum)
        pixels = slabs[0].x_NCHW.shape[2] * slabs[0].x_NCHW.shape[3]

        def seconds(images: list[int], above: tuple[bool, ...] | None, moved: int) -> float:
            owns = [keys[image].own for image in images]
            work = sum(self._bytes(own, above) for own in owns) * pixels / 4 / RATE
            return work + sum(CALL + self._bytes(own, above) / READ for own in set(owns)) + 2 * moved / COPY

        images = [image for slab in slabs for image in slab.images]
        moved = sum(slab.x_NCHW.nbytes for slab in slabs)
        apart = sum(seconds(slab.images, slab.above, 0) for slab in slabs)
        if apart <= seconds(images, wide, 2 * moved):
            return slabs
        channels = sum(size for size, kept in zip(self.unit.sizes_in, wide, strict=True) if kept)
        padded = [widened(slab.x_NCHW, channels - slab.x_NCHW.shape[1]) for slab in slabs]
        return [Slab(images, torch.cat(padded), wide)]

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
