"""Controls made from a routed net's own routes: what its row must beat before the routing is worth anything.

N images of a split in its order, U units, G parts. Each function takes keep_NUG as the router chose it and returns the
routes of the control, on the same images; the same seed gives the same routes at every call. All ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Control(NamedTuple):
    """A row of CONTROLS. routes: from keep_NUG and a seed to the control's keep_NUG.

    pays_router: the router's multiply-adds are in its cost, so that it stands at the cost of the routed row.
    """

    routes: Callable[[Tensor, int], Tensor]
    pays_router: bool


def shuffled(keep_NUG: Tensor, seed: int) -> Tensor:
    """The routes handed to other images, along one random cycle through the split: same mean cost, adaptivity removed."""
    order_N = torch.randperm(len(keep_NUG), generator=torch.Generator().manual_seed(seed))
    out = torch.empty_like(keep_NUG)
    out[order_N] = keep_NUG[order_N.roll(1)]
    return out


def most_common(keep_NUG: Tensor, seed: int) -> Tensor:
    """The one route that most images take, for all of them; of several, the first in lexicographic order of its bits."""
    routes, counts = keep_NUG.flatten(1).unique(dim=0, return_counts=True)  # in lexicographic order
    return routes[counts.argmax()].view(1, *keep_NUG.shape[1:]).expand_as(keep_NUG)


def random(keep_NUG: Tensor, seed: int) -> Tensor:
    """Each unit's keep drawn by itself from those the unit was given over the split; the draw depends on image and seed.

    The same mean cost in expectation, save where a unit's cost depends on the keep of the one it reads.
    """
    images, units = keep_NUG.shape[:2]
    draws_NU = torch.rand(images, units, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    picked = []
    for keep_NG, draws_N in zip(keep_NUG.unbind(1), draws_NU.unbind(1), strict=True):
        patterns, counts = keep_NG.unique(dim=0, return_counts=True)
        picked.append(patterns[torch.searchsorted(counts.cumsum(0), draws_N * images, right=True)])
    return torch.stack(picked, 1)


CONTROLS = {
    "shuffled": Control(shuffled, pays_router=True),
    "most_common": Control(most_common, pays_router=False),
    "random": Control(random, pays_router=True),
}
