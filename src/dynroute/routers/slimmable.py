"""Slimmable nets (Yu et al., Slimmable Neural Networks, ICLR 2019): one net, several widths, a BatchNorm for each. A control.

All images run at one width, which the dial picks; one checkpoint stands for as many static nets as there are widths.
Training adds up the loss at every width over the same images. US-Nets (Yu and Huang, 2019) replaced that by the sandwich
rule and let narrower widths learn from the widest. What is narrowed are the parts of the routable units, so that where
the paper slims every channel, a residual net keeps its trunk, and only a BatchNorm that follows a narrowed convolution
is kept by width. Ours.
B images of a minibatch, P passes over them, U units, G parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynroute.contracts import Batch, Decision, InputError, Output, UnitSpec, spread
from dynroute.routers.base import Net, Phase, Router, State, classification_loss, ranged, stacked

TRAINING = ("all", "sandwich", "dealt")
BETWEEN = 2  # widths that the sandwich rule draws beside the ends (US-Nets: n = 4 with both ends)


@dataclass
class SlimmableOptions:
    """The `router` section for router.name=slimmable."""

    widths: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    """Shares of the parts of every unit, each a whole number of parts, rising (the paper's four)."""
    training: str = "all"
    """What a minibatch trains: all widths (the paper); sandwich, the narrowest, the widest and two drawn in between
    (US-Nets); or dealt, each image at one width, at the work of one pass instead of one for each width (ours)."""
    distil: bool = False
    """Narrower widths learn what the widest says of the same images, and not the labels (US-Nets); not with dealt."""
    epochs: int = 10
    """Epochs of training."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        w = self.widths
        if len(w) < 2 or not all(0 < x <= 1 for x in w) or sorted(set(w)) != w:
            raise InputError(f"router.widths must be two or more rising shares, each above 0 and at most 1, not {w}")
        if self.training not in TRAINING:
            raise InputError(f"router.training must be one of {', '.join(TRAINING)}, not {self.training!r}")
        if self.training == "sandwich" and len(w) < 3:
            raise InputError(f"router.training=sandwich needs a width between the ends of router.widths, not {w}")
        if self.training == "dealt" and self.distil:
            raise InputError("router.distil needs every image at the widest, too: not with router.training=dealt")
        ranged("router.epochs", self.epochs, 0, 100_000)


class SlimmableRouter(Router):
    """One width for all images. The dial picks it: at price p the one nearest to the widest less p. No multiply-adds."""

    alike = True
    price_limits = (-1.0, 1.0)

    def __init__(self, specs: Sequence[UnitSpec], options: SlimmableOptions, superclasses: int = 0) -> None:
        super().__init__(specs)
        self.widths = options.widths
        for spec in specs:
            if spec.form != "nested":
                raise InputError("a slimmable net needs nested parts: set backbone.unit=channels (or auto)")
            for width in self.widths:
                parts = width * spec.parts
                if abs(parts - round(parts)) > 1e-6 or round(parts) < 1:
                    raise InputError(
                        f"router.widths: {width:g} is no whole number of the {spec.parts} parts of {spec.name}: "
                        "set backbone.parts to the number of steps"
                    )

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """The first parts of unit u, as many for all images."""
        wanted = self.widths[-1] - self.price
        width = min(self.widths, key=lambda w: abs(w - wanted))
        keep_G = prefix(self.specs[u], width).to(x_BCHW.device)
        return Decision(keep_G.expand(len(x_BCHW), -1), {}), state


def prefix(spec: UnitSpec, width: float) -> Tensor:
    """keep_G of a unit at a width that is a whole number of its parts."""
    return (torch.arange(spec.parts) < spread(width, spec.parts, 0)).float()


def passes(options: SlimmableOptions) -> int:
    """How often each image of a minibatch is run."""
    return {"all": len(options.widths), "sandwich": 2 + BETWEEN, "dealt": 1}[options.training]


def drawn_widths(specs: Sequence[UnitSpec], options: SlimmableOptions) -> Callable[[int], Tensor]:
    """Routes (P x B, U, G) of a minibatch, pass after pass; the first pass is the widest, unless images are dealt."""
    keep_WUG = torch.stack([stacked([prefix(s, w) for s in specs]) for w in reversed(options.widths)])
    count = len(keep_WUG)

    def draw(rows: int) -> Tensor:
        if options.training == "dealt":
            return keep_WUG[torch.randperm(rows) % count]
        places = torch.arange(count)
        if options.training == "sandwich":
            places = torch.cat([torch.tensor([0, count - 1]), torch.randint(1, count - 1, (BETWEEN,))])
        return keep_WUG[places].repeat_interleave(rows // len(places), 0)

    return draw


def summed_loss(out: Output, batch: Batch, options: SlimmableOptions) -> dict[str, Tensor]:
    """The mean loss of each pass, summed over the passes (Algorithm 1 of the paper adds up their gradients).

    With distil the passes after the first learn from the first one's probabilities, which get no gradient.
    """
    times = passes(options)
    loss_PB = classification_loss(out.logits_BK, batch).view(times, -1)
    if options.distil:
        widest, narrower = out.logits_BK.view(times, -1, out.logits_BK.shape[1]).split([1, times - 1])
        said = widest.detach().softmax(2).expand_as(narrower)
        loss_PB = torch.cat([loss_PB[:1], -(said * narrower.log_softmax(2)).sum(2)])
    return {"loss_cls": loss_PB.mean(1).sum()}


def phases(net: Net, options: SlimmableOptions) -> Iterator[Phase]:
    """One phase, in which the widths of a minibatch are one forward pass: a shared BatchNorm sees all of them together."""
    yield Phase(
        "train",
        options.epochs,
        ("backbone",),
        lambda out, batch: summed_loss(out, batch, options),
        routes=drawn_widths(net.router.specs, options),
        passes=passes(options),
    )
