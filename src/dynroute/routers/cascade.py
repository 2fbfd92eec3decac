"""The two-pass cascade: a narrow static net, then a wider one for the images of which the first is unsure. A control.

Nothing is learned to decide, and both passes are counted: the strongest simple rival of a routed net. Ours.
B images, L places of logits (those of no class are far below the others).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynroute.contracts import Decision, UnitSpec
from dynroute.routers.base import Net, Phase, Router, State, cross_entropy, ranged
from dynroute.units import answer


@dataclass
class CascadeOptions:
    """The `router` section for router.name=cascade. Its two widths are backbone.widths."""

    epochs: int = 10
    """Epochs of training of each of the two nets, by the recipe of router.name=static."""
    confidence: float = 0.9
    """The second net runs where the first one's largest probability is below this; --flops-target fits it."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        ranged("router.epochs", self.epochs, 0, 100_000)
        ranged("router.confidence", self.confidence, 0.001, 0.999999)


class CascadeRouter(Router):
    """Runs the first net; runs the second where the log odds of the first one's best class lie below a threshold - price.

    Log odds, log(p / (1 - p)), tell apart the many images whose probability is nearly one. No multiply-adds.
    """

    def __init__(self, specs: Sequence[UnitSpec], options: CascadeOptions, superclasses: int = 0) -> None:
        super().__init__(specs)
        self.threshold = math.log(options.confidence / (1 - options.confidence))

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """Always for the first net; for the second from the logits that the first has left."""
        odds_B = log_odds(answer(x_BCHW)) if u else torch.full((len(x_BCHW),), -math.inf, device=x_BCHW.device)
        return Decision((odds_B < self.threshold - self.price).float()[:, None], {}), state


def log_odds(logits_BL: Tensor) -> Tensor:
    """log(p / (1 - p)) of the largest softmax probability p of each image, exact where p rounds to one."""
    best_B, place_B = logits_BL.float().max(1)
    others_BL = logits_BL.float().scatter(1, place_B[:, None], -math.inf)
    return best_B - others_BL.logsumexp(1)


def phases(net: Net, options: CascadeOptions) -> Iterator[Phase]:
    """One phase for each net, which runs alone: the other one is not even computed, so no gradient can reach it."""
    units = len(net.router.specs)
    for u, spec in enumerate(net.router.specs):
        yield Phase(spec.name, options.epochs, ("backbone",), cross_entropy, routes=_only(u, units))


def _only(u: int, units: int) -> Callable[[int], Tensor]:
    """Routes on which unit u alone runs."""
    return lambda images: torch.eye(units)[u].view(1, units, 1).expand(images, -1, -1)
