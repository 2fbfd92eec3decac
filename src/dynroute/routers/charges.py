"""What buys a budget from the Q-agent: a charge for each share, in a table that feedback corrects while it learns. All ours.

The table is on a scale of its own: nearly the logarithm of a charge where charges are large, even around zero, and of both
signs, since the best routes by the agent's own judgement may cost less than a dear budget, which has then to be paid for.
B images, K knots of the table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynroute.routers.budget import KNOTS

FEEDBACK = 0.1  # step of a charge on the table's scale, per minibatch and per share missed
FIRST = (0.3, 0.01)  # where the table starts, at its cheapest and its dearest budget
LIMITS = (-10.0, 10.0)  # what it never leaves; below zero, what runs is paid for
EVEN = 2e-3  # about the size of charges up to which the scale is even and beyond which it is logarithmic
MIDDLE, SPREAD = 4.0, 3.0  # of usual places on that scale, for `told`


def scaled(charge: float) -> float:
    """The place of a charge on the table's scale."""
    return math.asinh(charge / EVEN)


def unscaled(place: Tensor) -> Tensor:
    """The charges at places on the table's scale."""
    return torch.sinh(place) * EVEN


def first_table() -> Tensor:
    """charge_K before any feedback."""
    return torch.linspace(scaled(FIRST[0]), scaled(FIRST[1]), KNOTS)


def correct(charge_K: Tensor, overspent_K: Tensor, strength: float) -> None:
    """Raise in place the charge of budgets that were overspent, lower that of the others. strength: 0 to 1."""
    charge_K += FEEDBACK * strength * overspent_K
    charge_K.clamp_(scaled(LIMITS[0]), scaled(LIMITS[1]))


def told(charge_B: Tensor) -> Tensor:
    """What the agent is told of its charge: a number of size one or so."""
    return (torch.asinh(charge_B / EVEN) - MIDDLE) / SPREAD
