"""Multiply-adds per image from keep_BUG, router included. B images, U units, G and H parts of a unit and of the one it reads.

One convention everywhere: a multiply-add (MAC) of a convolution or linear layer counts once; BatchNorm, activations,
pooling and additions count nothing. This is torch's `FlopCounterMode` divided by two. The same function is the
resource loss and the CSV column, so what is optimised is what is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


def conv_macs(out_size: int, kernel: int, in_channels: int, out_channels: int, groups: int = 1) -> int:
    """MACs of a square convolution with an out_size x out_size output."""
    return out_size * out_size * kernel * kernel * in_channels * out_channels // groups


class CostTerms(NamedTuple):
    """A unit's MACs. always: run whatever is kept (a projection shortcut, say). by_part_G: added by each kept part.

    by_pair_HG: added by each pair of (kept part of the unit read, kept part of this one): a convolution that shrinks on
    both sides costs the product of two choices, image by image. plain: the plain block, where that is not all parts
    together (alternatives, of which one runs).
    """

    always: float
    by_part_G: tuple[float, ...]
    by_pair_HG: tuple[tuple[float, ...], ...] | None = None
    plain: float | None = None

    @property
    def total(self) -> float:
        """MACs of the plain block: with every part kept here and in the unit read, unless `plain` says otherwise."""
        if self.plain is not None:
            return self.plain
        return self.always + sum(self.by_part_G) + sum(map(sum, self.by_pair_HG or ()))


class NetCost(nn.Module):
    """Multiply-adds per image of a whole net: fixed parts (stem, head, router) plus units as kept.

    terms: one CostTerms a unit. reads[u]: the earlier unit whose kept parts are the only non-zero input of unit u, or None.
    fixed: MACs of stem and head. router: MACs of the router. dense: MACs of the plain static net, the reference of every share.
    """

    part_UG: Tensor
    pair_PHG: Tensor
    above_P: Tensor
    own_P: Tensor

    def __init__(
        self,
        terms: Sequence[CostTerms],
        reads: Sequence[int | None],
        fixed: float,
        router: float,
        dense: float,
    ) -> None:
        super().__init__()
        parts = max(len(t.by_part_G) for t in terms)
        rows = [(*t.by_part_G, *[0.0] * (parts - len(t.by_part_G))) for t in terms]
        # float64: sums of 1e9 MACs must not round, or the exactness tests would need a tolerance
        self.register_buffer("part_UG", torch.tensor(rows, dtype=torch.float64), persistent=False)
        self.pairs: dict[int, int] = {}  # of each unit with pair costs the one that it reads
        pair_PHG = torch.zeros(sum(t.by_pair_HG is not None for t in terms), parts, parts, dtype=torch.float64)
        for u, term in enumerate(terms):
            if term.by_pair_HG is None:
                continue
            source = reads[u]
            assert source is not None and source < u, "a unit with pair costs must read an earlier unit"
            pair_HG = torch.tensor(term.by_pair_HG, dtype=torch.float64)
            pair_PHG[len(self.pairs), : pair_HG.shape[0], : pair_HG.shape[1]] = pair_HG
            self.pairs[u] = source
        self.register_buffer("pair_PHG", pair_PHG, persistent=False)
        self.register_buffer("above_P", torch.tensor(list(self.pairs.values()), dtype=torch.long), persistent=False)
        self.register_buffer("own_P", torch.tensor(list(self.pairs), dtype=torch.long), persistent=False)
        self.fixed = fixed + sum(t.always for t in terms)
        self.router = router
        self.dense = dense

    def forward(self, keep_BUG: Tensor) -> Tensor:
        """macs_B (float64), differentiable in keep_BUG."""
        keep = keep_BUG.double()
        macs_B = (keep * self.part_UG).sum((1, 2)) + (self.fixed + self.router)
        if self.pairs:
            above_BPH, own_BPG = keep.index_select(1, self.above_P), keep.index_select(1, self.own_P)
            # not by einsum: FlopCounterMode would count its products as work of the net
            macs_B = macs_B + (above_BPH[..., None] * self.pair_PHG * own_BPG[:, :, None]).sum((1, 2, 3))
        return macs_B

    def pair(self, u: int) -> Tensor:
        """(G, G): MACs of each part of the unit that unit u reads with each part of unit u, zeros behind their last ones."""
        return self.pair_PHG[list(self.pairs).index(u)]
