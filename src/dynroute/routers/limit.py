"""A hard limit on the multiply-adds of every single image, kept by construction whatever the router wants.

While unit u is decided, what the image has spent and the cheapest possible rest must fit; a decision that does not fit is
lowered to the dearest one that does. Costs of a chain are products of two choices, so the cheapest rest depends on this one.
B images, U units, G parts, N legal keeps ("options") of a unit, M of the unit that it reads. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynroute.contracts import InputError, UnitSpec
from dynroute.cost import NetCost

MOST = 12  # free parts of a unit: its table has a place for every two of their subsets


class Spent(NamedTuple):
    """Of a minibatch. least_B: the cheapest whole route that is still open to each image; picked: the options so far."""

    least_B: Tensor
    picked: tuple[Tensor, ...]


class _Table(NamedTuple):
    """One unit's options keep_NG. lower_NN[i, j]: whether j is a lowering of i. cost_MN: of each option after each one of the
    unit read (M = 1 where none is), the cheapest rest of whatever reads this unit included."""

    keep_NG: Tensor
    lower_NN: Tensor
    cost_MN: Tensor


class Limit:
    """share: of the dense net's multiply-adds, router included, that no image may exceed."""

    def __init__(self, cost: NetCost, specs: Sequence[UnitSpec], share: float) -> None:
        self.share = share
        self.most = share * cost.dense * (1 + 1e-12)
        self.reads: dict[int, int] = cost.pairs
        self.tables = self._tables(cost, specs)
        roots = [table.cost_MN.min() for u, table in enumerate(self.tables) if u not in self.reads]
        self.least = cost.fixed + cost.router + float(torch.stack(roots).sum())

    def start(self, images: int, device: torch.device) -> Spent:
        """Nothing is decided yet: the cheapest route is open to every image."""
        return Spent(torch.full((images,), self.least, dtype=torch.float64, device=device), ())

    def lowered(self, u: int, keep_BG: Tensor, spent: Spent) -> tuple[Tensor, Spent]:
        """The decision of unit u, lowered where it does not fit, and what then is spent."""
        table = _Table(*(tensor.to(keep_BG.device) for tensor in self.tables[u]))
        above_B = spent.picked[self.reads[u]] if u in self.reads else torch.zeros_like(spent.least_B).long()
        after_BN = table.cost_MN[above_B]
        least_BN = spent.least_B[:, None] - after_BN.min(1, keepdim=True).values + after_BN
        wanted_B = (keep_BG[:, None].bool() == table.keep_NG.bool()).all(2).long().argmax(1)
        allowed_BN = table.lower_NN[wanted_B] & (least_BN <= self.most)
        dearest_B = least_BN.masked_fill(~allowed_BN, -torch.inf).argmax(1)
        fits_B = least_BN.gather(1, wanted_B[:, None])[:, 0] <= self.most
        picked_B = torch.where(fits_B, wanted_B, dearest_B)
        least_B = least_BN.gather(1, picked_B[:, None])[:, 0]
        return table.keep_NG[picked_B].to(keep_BG.dtype), Spent(least_B, (*spent.picked, picked_B))

    def _tables(self, cost: NetCost, specs: Sequence[UnitSpec]) -> list[_Table]:
        """Backwards through the units, so that the cheapest rest below each option is known."""
        keeps = [options(spec) for spec in specs]
        below = [torch.zeros(len(keep), dtype=torch.float64) for keep in keeps]
        tables: list[_Table] = []
        for u in reversed(range(len(specs))):
            keep_NG = keeps[u].double()
            cost_MN = (keep_NG @ cost.part_UG[u, : specs[u].parts].cpu() + below[u])[None]
            if u in self.reads:
                source = self.reads[u]
                pair_HG = cost.pair(u)[: specs[source].parts, : specs[u].parts].cpu()
                cost_MN = cost_MN + keeps[source].double() @ pair_HG @ keep_NG.T
                below[source] += cost_MN.min(1).values
            within_NN = (keep_NG[:, None] >= keep_NG).all(2)
            any_NN = torch.ones_like(within_NN)  # of alternatives every other one may stand in
            tables.append(_Table(keeps[u], any_NN if specs[u].form == "choice" else within_NN, cost_MN))
        return tables[::-1]


def options(spec: UnitSpec) -> Tensor:
    """(N, G): every legal keep of a unit, the fullest first. Raises InputError where they are too many to list."""
    if spec.form == "choice":
        return torch.eye(spec.parts)
    if spec.form == "nested":
        return torch.ones(spec.parts + 1, spec.parts).tril(-1)[0 if spec.skippable else 1 :].flip(0)
    if spec.parts > MOST:
        raise InputError(
            f"a limit for every image needs at most {MOST} free parts a block, {spec.name} has {spec.parts}"
        )
    numbers_N = torch.arange(2**spec.parts - 1, -1, -1)
    keep_NG = ((numbers_N[:, None] >> torch.arange(spec.parts - 1, -1, -1)) & 1).float()
    return keep_NG if spec.skippable else keep_NG[keep_NG[:, 0] == 1]
