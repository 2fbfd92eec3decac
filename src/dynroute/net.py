"""RoutedNet: a backbone and a router, run with masks. B images, U units, G parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynroute.backbones import Backbone
from dynroute.contracts import OutOfReach, Output, Trace, UnitSpec
from dynroute.cost import NetCost
from dynroute.routers import Limit, Router, legal, stacked
from dynroute.units import Unit


class RoutedNet(nn.Module):
    """Runs the backbone's units under the router's decisions, everything computed and masked; for training and reference.

    Decisions are returned in the Output, never stored on modules.
    """

    def __init__(self, backbone: Backbone, router: Router) -> None:
        super().__init__()
        self.backbone, self.router = backbone, router
        reads = [unit.reads for unit in backbone.routable]
        self.cost = NetCost(backbone.terms(), reads, backbone.fixed_macs, router.macs(), backbone.dense_macs)

    def forward(self, x_BCHW: Tensor, keep_BUG: Tensor | None = None) -> Output:
        """Logits, decisions and cost of each image. keep_BUG: these routes instead of the router's."""
        if keep_BUG is not None:
            return self._given(x_BCHW, keep_BUG)
        journey = self.router.start(x_BCHW)
        x_BCHW = self.backbone.stem(x_BCHW)
        decisions = []
        for u, unit in enumerate(self.backbone.routable):
            decision, journey = self.router.choose(u, x_BCHW, journey)
            decisions.append(decision)
            x_BCHW = masked(unit, x_BCHW, decision.keep_BG, [d.keep_BG for d in decisions])
        trace = stack([d.keep_BG for d in decisions], [d.notes for d in decisions])
        return Output(self.backbone.head(x_BCHW).float(), trace, self.cost(trace.keep_BUG))

    def dense_routes(self, images: int) -> Tensor:
        """keep_BUG of the dense net: all parts of every unit, or the dearest of alternatives."""
        return stacked([_extremes(spec)[1] for spec in self.backbone.specs]).expand(images, -1, -1)

    def span(self) -> tuple[float, float]:
        """Shares of the dense net's MACs of the cheapest and the dearest legal route, router included."""
        lowest_highest = zip(*map(_extremes, self.backbone.specs), strict=True)
        ends = self.cost(torch.stack([stacked(keeps) for keeps in lowest_highest]).to(self.cost.part_UG.device))
        return float(ends[0]) / self.cost.dense, float(ends[1]) / self.cost.dense

    def set_limit(self, share: float | None) -> None:
        """Let no image exceed a share of the dense net's MACs, router included (None: no limit). Raises OutOfReach."""
        low, high = self.span()
        if share is not None and share < low:
            raise OutOfReach(
                f"limit {share:g} is out of reach: routes of this net cost {math.ceil(1e3 * low) / 1e3:.3f} to {high:.3f}"
            )
        self.router.limit = None if share is None else Limit(self.cost, self.backbone.specs, share)

    def _given(self, x_BCHW: Tensor, keep_BUG: Tensor) -> Output:
        keep_BUG = keep_BUG.to(x_BCHW.device)
        x_BCHW = self.backbone.stem(x_BCHW)
        for u, unit in enumerate(self.backbone.routable):
            x_BCHW = masked(unit, x_BCHW, keep_BUG[:, u], keep_BUG.unbind(1))
        return Output(self.backbone.head(x_BCHW).float(), Trace(keep_BUG, {}), self.cost(keep_BUG))


def masked(unit: Unit, x_BCHW: Tensor, keep_BG: Tensor, keeps: Sequence[Tensor]) -> Tensor:
    """One unit's masked run. keeps: the keep_BG of each unit so far, of which a unit that reads another gets that one's."""
    out_BCHW: Tensor = unit(x_BCHW, keep_BG) if unit.reads is None else unit(x_BCHW, keep_BG, keeps[unit.reads])
    return out_BCHW


def stack(keeps: list[Tensor], notes: list[dict[str, Tensor]]) -> Trace:
    """Decisions of all units as one Trace; keeps and notes of units with fewer parts are padded with zeros."""
    columns = {name: [note[name] for note in notes] for name in notes[0]}
    together = {n: stacked(v) if v[0].dim() > 1 else torch.stack(v, 1) for n, v in columns.items()}
    return Trace(stacked(keeps), together)


def _extremes(spec: UnitSpec) -> tuple[Tensor, Tensor]:
    """Cheapest and dearest legal keep (G,) of one unit."""
    nothing, everything = legal(torch.stack([torch.zeros(spec.parts), torch.ones(spec.parts)]), spec)
    return nothing, everything
