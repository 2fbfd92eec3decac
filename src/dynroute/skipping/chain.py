"""The fast run of a chain (VGG): feature maps between units hold the kept channels alone.

Images of one width stand in slabs. A layer splits a slab by what its images keep next, as views where maps are large, as
copies where they are small; slabs that have met at one width are joined where that pays.
B images, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynroute.skipping.cache import Key, Programs
from dynroute.skipping.lowering import Narrowed
from dynroute.skipping.unit import copying_pays, gathered, runs_of


class Slab(NamedTuple):
    """Images of the minibatch by number, and their map of kept channels (N, c, H, W), all of one width."""

    images: list[int]
    x_NCHW: Tensor


class FastLayer:
    """The programs of one layer of a chain. weights: bytes of its convolution in the mean. pool: after its ReLU."""

    def __init__(self, programs: Programs, weights: float, pool: nn.Module | None) -> None:
        self.programs, self.weights, self.pool = programs, weights, pool

    def __call__(self, slabs: Sequence[Slab], keys: Sequence[Key]) -> list[Slab]:
        """The layer's slabs. keys: the pattern of each image of the minibatch, by number."""
        out = []
        for slab in self._joined(slabs, keys):
            for part, key in self._split(slab, keys):
                programs = self.programs.of(key)
                out.append(Slab(part.images, self._run(part.x_NCHW, programs)))  # type: ignore[arg-type]
        return out

    def _run(self, x_NCHW: Tensor, programs: Sequence[Narrowed]) -> Tensor:
        """One program, or several that read different channels, summed, then ReLU and pooling."""
        if not programs[0].partial:
            return programs[0].body(x_NCHW)
        out_NCHW = None
        for program in programs:
            read = x_NCHW[:, program.inputs].contiguous(memory_format=torch.channels_last)
            if out_NCHW is None:
                out_NCHW = program.body(read)
            else:
                program.body.steps[0].add_to(out_NCHW, read, relu=False)  # type: ignore[attr-defined]
        assert out_NCHW is not None
        out_NCHW = out_NCHW.relu_()
        return out_NCHW if self.pool is None else self.pool(out_NCHW)

    def _joined(self, slabs: Sequence[Slab], keys: Sequence[Key]) -> list[Slab]:
        """Slabs of one width made one, where that saves enough calls."""
        by_width: dict[tuple[bool, ...] | None, list[Slab]] = {}
        for slab in slabs:
            by_width.setdefault(keys[slab.images[0]].above, []).append(slab)
        out: list[Slab] = []
        for same in by_width.values():
            images = [image for slab in same for image in slab.images]
            saved = sum(len({keys[i] for i in slab.images}) for slab in same) - len({keys[i] for i in images})
            moved = sum(slab.x_NCHW.nbytes for slab in same)
            if saved and copying_pays(saved, self.weights, moved):
                out.append(Slab(images, torch.cat([slab.x_NCHW for slab in same])))
            else:
                out.extend(same)
        return out

    def _split(self, slab: Slab, keys: Sequence[Key]) -> list[tuple[Slab, Key]]:
        """The slab by what its images keep."""
        own = [keys[image] for image in slab.images]
        runs, different = runs_of(own), list(dict.fromkeys(own))
        if len(different) == 1:
            return [(slab, own[0])]
        if copying_pays(len(runs) - len(different), self.weights, slab.x_NCHW.nbytes):
            places = [(key, [i for i, other in enumerate(own) if other == key]) for key in different]
            return [(Slab([slab.images[i] for i in at], gathered(slab.x_NCHW, at)), key) for key, at in places]
        return [(Slab(slab.images[r.first : r.last], slab.x_NCHW[r.first : r.last]), r.key) for r in runs]


def pooled(slabs: Sequence[Slab], images: int, channels: int) -> Tensor:
    """Means over pixels of maps of full width, (B, C, 1, 1): all that a router with `pooled` looks at."""
    out_BC = slabs[0].x_NCHW.new_zeros(images, channels)
    for slab in slabs:
        mean_NC = slab.x_NCHW.mean((2, 3))
        out_BC[torch.tensor(slab.images), : mean_NC.shape[1]] = mean_NC
    return out_BC[:, :, None, None]


def entire(slabs: Sequence[Slab], images: int, channels: int) -> Tensor:
    """Maps of full width, (B, C, H, W), zeros where channels were not kept."""
    height, width = slabs[0].x_NCHW.shape[2:]
    out_BHWC = slabs[0].x_NCHW.new_zeros(images, height, width, channels)
    for slab in slabs:
        kept = slab.x_NCHW.shape[1]
        out_BHWC[torch.tensor(slab.images), :, :, :kept] = slab.x_NCHW.permute(0, 2, 3, 1)
    return out_BHWC.permute(0, 3, 1, 2)
