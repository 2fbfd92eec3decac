"""A range of budgets that one training covers: every image is asked for a share of its own, and feedback makes it come true.

A router is not told the share but what buys it by a table over the range (a charge, a target): read between its knots,
and corrected after every minibatch by what the router's best decisions spent. Images, not minibatches, are asked for
different shares, so that BatchNorm sees in training the mixture of routes of which it keeps the statistics.
A share is a part of the dense net's multiply-adds. B images, K knots of the table. All ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynroute.contracts import InputError

KNOTS = 9
NARROW = 0.2  # of shares
MOST = 64  # budgets of an image in one step


class Range(NamedTuple):
    """What may be asked for, low < high; low = high where one thing is asked of all images."""

    low: float
    high: float

    def draw(self, images: int, device: torch.device, passes: int = 1) -> Tensor:
        """asked_B of a minibatch in training, uniform over the range.

        passes: how many copies of the same images stand one after another; each image is then asked for one share in each of
        as many equal stretches of the range, in an order of its own.
        """
        at_B = torch.rand(images, device=device)
        if passes > 1:
            stretch_PB = torch.rand(passes, -(-images // passes), device=device).argsort(0)
            at_B = (stretch_PB.flatten()[:images] + at_B) / passes
        return self.low + (self.high - self.low) * at_B

    def dial(self, price: float, falls: bool = True) -> tuple[float, float]:
        """(asked, price on top): the price moves what is asked within the range, and is charged outside beyond it.

        At price 0 the middle of the range is asked for. falls: what is asked falls as the price rises (a budget, not a charge).
        """
        sign = -1 if falls else 1
        wanted = (self.low + self.high) / 2 + sign * price
        inside = min(max(wanted, self.low), self.high)
        return inside, sign * (wanted - inside)

    def place(self, asked_B: Tensor) -> Tensor:
        """Where in the range: 0 at low, 1 at high."""
        return (asked_B - self.low) / (self.high - self.low)

    def heard(self, told_B: Tensor) -> Tensor:
        """A target as an input of a net: -1 at low, 1 at high. A narrower range than NARROW is measured by that: what feedback
        moves beyond its ends would else be many times the range."""
        return (told_B - (self.low + self.high) / 2) * (2 / max(self.high - self.low, NARROW))

    def read(self, table_K: Tensor, asked_B: Tensor) -> Tensor:
        """The table's value for what each image is asked, linear between knots."""
        at_B = self.place(asked_B) * (KNOTS - 1)
        left_B = at_B.floor().clamp(0, KNOTS - 2).long()
        return torch.lerp(table_K[left_B], table_K[left_B + 1], at_B - left_B)

    def overspent(self, asked_B: Tensor, share_B: Tensor, span: tuple[float, float]) -> Tensor:
        """(K,): by how much the images near each knot miss the share that they are asked for, upwards positive.

        share_B: of the router's best actions. span: shares of the cheapest and the dearest route; an image that stands there
        already says nothing (else a budget out of reach would drive its table without end).
        """
        at_B = self.place(asked_B) * (KNOTS - 1)
        near_BK = (1 - (at_B[:, None] - torch.arange(KNOTS, device=at_B.device)).abs()).clamp(min=0)
        missed_B = share_B - asked_B
        stuck_B = ((missed_B > 0) & (share_B <= span[0] + 1e-4)) | ((missed_B < 0) & (share_B >= span[1] - 1e-4))
        return (near_BK * missed_B.masked_fill(stuck_B, 0.0)[:, None]).sum(0) / near_BK.sum(0).clamp(min=1)


def check_budget(budget: list[float] | None, budgets: int = 1) -> None:
    """Raise InputError unless router.budget is empty or [low, high], and router.budgets_per_image above 1 only with one."""
    if budget is not None and (len(budget) != 2 or not 0 < budget[0] < budget[1] <= 1):
        raise InputError(f"router.budget must be [low, high] with 0 < low < high <= 1, not {budget}")
    if not 1 <= budgets <= MOST:
        raise InputError(f"router.budgets_per_image must lie between 1 and {MOST}, not {budgets}")
    if budgets > 1 and budget is None:
        raise InputError("router.budgets_per_image draws from router.budget, which is empty")
