"""Routers that learn nothing: the controls over which every learned row must stand.

static: every image runs the same parts, all of them (dense) or a share of every unit (uniformly narrower).
random: every image runs parts drawn at random at a rate; the draw depends on the image alone, so that the same image
always gets the same route, alone or in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynroute.contracts import Decision, InputError, UnitSpec, spread
from dynroute.routers.base import Net, Phase, Router, State, cross_entropy, legal, ranged, stacked
from dynroute.routers.draws import draws, image_hash


@dataclass
class StaticOptions:
    """The `router` section for router.name=static."""

    width: float = 1.0
    """Share of the parts that every image runs: 1 is the dense net, 0.5 about half of every unit."""
    epochs: int = 10
    """Epochs of training at that width."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        ranged("router.width", self.width, 0.0, 1.0)
        ranged("router.epochs", self.epochs, 0, 100_000)


@dataclass
class RandomOptions:
    """The `router` section for router.name=random."""

    rate: float = 0.5
    """Probability with which each part runs."""
    epochs: int = 10
    """Epochs of training under random routes."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        ranged("router.rate", self.rate, 0.0, 1.0)
        ranged("router.epochs", self.epochs, 0, 100_000)


class StaticRouter(Router):
    """The same keep for every image. The dial narrows: at price p a share width - p of the parts runs (see `spread`)."""

    alike = True
    price_limits = (-1.0, 1.0)
    pooled = True

    def __init__(self, specs: Sequence[UnitSpec], options: StaticOptions, superclasses: int = 0) -> None:
        super().__init__(specs)
        self.width = options.width
        if self.width < 1 and all(spec.parts == 1 and not spec.skippable for spec in specs):
            raise InputError(f"router.width={self.width:g} does nothing here: every block of this net is one part")

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """The first so many parts of unit u, or one alternative, for all images."""
        spec, width = self.specs[u], min(max(self.width - self.price, 0.0), 1.0)
        places_G = torch.arange(spec.parts, device=x_BCHW.device)
        if spec.form == "choice":
            row_G = (places_G == self._nearest(u, width)).float()
        else:
            row_G = (places_G < spread(width, spec.parts, u)).float()
        return Decision(legal(row_G.expand(len(x_BCHW), -1), spec), {}), state

    def _nearest(self, u: int, width: float) -> int:
        """The alternative of unit u."""
        missed, place = 0.0, 0
        for spec in (s for s in self.specs[: u + 1] if s.form == "choice"):
            wanted = min(max(width, min(spec.part_shares)), max(spec.part_shares)) + missed
            place = min(range(spec.parts), key=lambda g: abs(spec.part_shares[g] - wanted))
            missed = wanted - spec.part_shares[place]
        return place


class RandomRouter(Router):
    """Each part runs with probability rate - price, by random numbers that belong to the image (see `draws`).

    Of alternatives one runs, the dearer the more of the draws succeed. Ours.
    """

    price_limits = (-1.0, 1.0)
    pooled = True

    def __init__(self, specs: Sequence[UnitSpec], options: RandomOptions, superclasses: int = 0) -> None:
        super().__init__(specs)
        self.rate = options.rate

    def begin(self, x_BCHW: Tensor) -> State:
        """A 31-bit number for each image; in training the draws are random instead."""
        return image_hash(x_BCHW)

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """Independent draws for the parts of unit u, made legal."""
        spec = self.specs[u]
        fresh = (len(x_BCHW), spec.parts)
        draws_BG = torch.rand(fresh, device=x_BCHW.device) if self.training else draws(state, u, spec.parts)
        return Decision(_drawn((draws_BG < self.rate - self.price).float(), spec), {}), state


def _drawn(keep_BG: Tensor, spec: UnitSpec) -> Tensor:
    """What independent draws keep, made legal: of alternatives the cheapest for one success or none, the next for two."""
    if spec.form != "choice":
        return legal(keep_BG, spec)
    order_G = torch.tensor(spec.part_shares, device=keep_BG.device).argsort()
    place_B = order_G[(keep_BG.sum(1).long() - 1).clamp(min=0)]
    return torch.nn.functional.one_hot(place_B, spec.parts).float()


def phases(net: Net, options: StaticOptions | RandomOptions) -> Iterator[Phase]:
    """One phase: the backbone learns under the router's own routes."""
    yield Phase("train", options.epochs, ("backbone",), cross_entropy, routes=_explored(net))


def _explored(net: Net):  # type: ignore[no-untyped-def]
    """Random routes must be redrawn in training, but a router that is not trained stands in eval(): draw them here."""
    router = net.router
    if not isinstance(router, RandomRouter):
        return None

    def draw(images: int) -> Tensor:
        return stacked([_drawn((torch.rand(images, s.parts) < router.rate).float(), s) for s in router.specs])

    return draw
