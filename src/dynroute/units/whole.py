"""A whole static net as one unit, and what flows between two of them: the images, and the answer so far.

A cascade has no features to hand on, so its units see (B, C + 1, H, W): the image, then one plane that holds the logits
row by row. B images, G parts, K classes, C channels, H W height and width, U units of the inner net.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dynroute.contracts import UnitSpec, spread
from dynroute.cost import CostTerms, NetCost
from dynroute.units.base import Unit

BELOW = 30.0  # places of no class stand so far below the least logit: nothing after a softmax


class Net(Protocol):
    """What a unit needs of the net that it holds (`backbones.Backbone` is one, its blocks cut into channels)."""

    stem: nn.Module
    head: nn.Module
    fixed_macs: float
    dense_macs: float

    @property
    def routable(self) -> list[Unit]:
        """The units, in their order."""

    def terms(self) -> list[CostTerms]:
        """The cost of each unit."""


class WholeNet(Unit):
    """One net at a fixed width, kept or not; kept, its logits take the place of those before (a cascade of static nets).

    width: share of the parts that every image runs, spread over the inner units as by router.name=static.
    Images that do not keep it are not computed, so a straight-through gradient does not reach the decision.
    """

    def __init__(self, name: str, net: Net, width: float, in_channels: int, skippable: bool) -> None:
        super().__init__()
        self.net = net
        specs = [unit.spec for unit in net.routable]
        kept = [max(spread(width, spec.parts, u), not spec.skippable) for u, spec in enumerate(specs)]
        self.keeps = [tuple(g < k for g in range(s.parts)) for k, s in zip(kept, specs, strict=True)]
        self.spec = UnitSpec(name, in_channels, 1, "nested", skippable, (1.0,))

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The images with this net's logits where it is kept, with those before where it is not."""
        kept_B = None if keep_BG is None else keep_BG[:, 0] > 0
        if kept_B is None or bool(kept_B.all()):
            return answered(x_BCHW, self._logits(x_BCHW[:, :-1]))
        if not bool(kept_B.any()):
            return x_BCHW
        index = kept_B.nonzero().squeeze(1)
        run_BCHW = x_BCHW[index]
        return x_BCHW.index_copy(0, index, answered(run_BCHW, self._logits(run_BCHW[:, :-1])))

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The net of that width with its convolutions really narrowed; not kept: nothing is done."""
        if not keep[0]:
            return nn.Identity()
        units = self.net.routable
        above = [None if unit.reads is None else self.keeps[unit.reads] for unit in units]
        blocks = [unit.narrow(own, read) for unit, own, read in zip(units, self.keeps, above, strict=True)]
        return Answered(nn.Sequential(self.net.stem, *blocks, self.net.head)).eval()

    def cost_terms(self) -> CostTerms:
        """The net's MACs at that width, stem and head included."""
        reads = [unit.reads for unit in self.net.routable]
        cost = NetCost(self.net.terms(), reads, self.net.fixed_macs, 0.0, self.net.dense_macs)
        keep_UG = nn.utils.rnn.pad_sequence([torch.tensor(keep) for keep in self.keeps], batch_first=True)
        return CostTerms(0.0, (float(cost(keep_UG[None])),))

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        """The masked run at the fixed width."""
        x_BCHW = self.net.stem(image_BCHW)
        keeps = [torch.tensor(keep, dtype=torch.float32, device=x_BCHW.device) for keep in self.keeps]
        keeps = [keep_G.expand(len(x_BCHW), -1) for keep_G in keeps]
        for unit, keep_BG in zip(self.net.routable, keeps, strict=True):
            x_BCHW = unit(x_BCHW, keep_BG) if unit.reads is None else unit(x_BCHW, keep_BG, keeps[unit.reads])
        logits_BK: Tensor = self.net.head(x_BCHW)
        return logits_BK


class Answered(nn.Module):
    """What a narrowed WholeNet is made of: the net on the image planes, its logits in the last one."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The images with the body's logits."""
        return answered(x_BCHW, self.body(x_BCHW[:, :-1]))


class Blank(nn.Module):
    """The stem of a cascade: adds the plane, in which there is no answer yet. No MACs."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + 1, H, W)."""
        return torch.cat([image_BCHW, torch.zeros_like(image_BCHW[:, :1])], 1)


class ReadAnswer(nn.Module):
    """The head of a cascade: takes the logits of the K classes out of the plane. No MACs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """logits_BK."""
        return answer(x_BCHW)[:, : self.classes]


def answer(x_BCHW: Tensor) -> Tensor:
    """The logits so far, (B, H * W): those of the classes first, after them what is nothing to a softmax."""
    return x_BCHW[:, -1].flatten(1)


def answered(x_BCHW: Tensor, logits_BK: Tensor) -> Tensor:
    """The same images with these logits."""
    height, width = x_BCHW.shape[2:]
    logits_BK = logits_BK.to(x_BCHW.dtype)
    nothing_B1 = logits_BK.detach().amin(1, keepdim=True) - BELOW
    plane = torch.cat([logits_BK, nothing_B1.expand(-1, height * width - logits_BK.shape[1])], 1)
    return torch.cat([x_BCHW[:, :-1], plane.view(-1, 1, height, width)], 1)
