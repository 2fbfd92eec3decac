"""What every backbone offers: stem, units, head, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from dynroute.contracts import InputError, UnitSpec
from dynroute.cost import CostTerms
from dynroute.units import FORMS, RANKS, Unit, Weights, choice_sizes, even_split, path_share, tensors

Kind = TypeVar("Kind")
USUAL_PARTS = {"channels": 4, "paths": 2, "cascade": 16}
FOLDS = {"auto": None, "always": True, "never": False}
USUAL_WIDTHS = {"choice": [0.25, 0.5, 0.75, 1.0], "cascade": [0.25, 0.75]}


@dataclass
class BackboneOptions:
    """The `backbone` section of a configuration."""

    name: str = "resnet8"
    """Which net; `dynroute list backbones` names them."""
    weights: str | None = None
    """Start from these weights: a run folder, a checkpoint of dynroute, or a plain state dict of the dense net."""
    unit: str = "auto"
    """How a block is cut: channels (nested groups), paths (sub-blocks), choice (one of several); cascade: two whole nets;
    auto: what the router needs."""
    parts: int = 0
    """Parts a block is cut into; 0: 4 groups of channels (RNP), 2 sub-blocks (DMNN), an alternative for each of widths, or 16
    groups in a cascade."""
    widths: list[float] = field(default_factory=list)
    """Rising widths, of 1: hidden width of each alternative (unit=choice; empty: 0.25, 0.5, 0.75, 1), or of the two nets of a
    cascade, the first one first (empty: 0.25, 0.75). Ours."""
    nets: list[str] = field(default_factory=list)
    """Start a cascade from two runs of router.name=static, trained at its widths; with router.epochs=0 that is all."""
    path_width: float = 0.0
    """Hidden width of each sub-block (unit=paths) as a share of the block's; 0: equal parts, in bottlenecks widened so that the
    parameters stay (paper: 0.6 for 2 parts, 0.467 for 3, 0.375 for 4). MobileNets have equal parts of the expansion."""
    path_least: int = 0
    """Fewest hidden channels of a sub-block (unit=paths): narrower ones are widened to it. Ours; 16 pays on processors."""
    fold: str = "auto"
    """Training sub-blocks of bottlenecks: their last 1x1 convolutions and BatchNorms as one product by the covariance fold
    (always), one by one (never), or whichever form is likely faster for the minibatch (auto): they are the same function."""
    width: int = 0
    """Channels of the first stage, which later stages double; 0: the net's own (16 for CIFAR ResNets, 64 for ImageNet's)."""
    shortcut: str = "A"
    """Shortcut where shapes change: A (subsample and zero-pad, no cost) or B (1x1 projection); ImageNet ResNets have B."""

    rank: str = "auto"
    """Order of channels when weights are imported, best first: norm (of kernels; RNP's authors), contribution (ours, needs
    a BatchNorm), none (as given), auto (contribution where a BatchNorm follows, else norm)."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        if self.unit != "auto" and self.unit not in FORMS:
            raise InputError(f"backbone.unit must be auto, {' or '.join(FORMS)}, not {self.unit!r}")
        if self.shortcut not in ("A", "B"):
            raise InputError(f"backbone.shortcut must be A or B, not {self.shortcut!r}")
        if self.rank not in RANKS:
            raise InputError(f"backbone.rank must be one of {', '.join(RANKS)}, not {self.rank!r}")
        if self.fold not in FOLDS:
            raise InputError(f"backbone.fold must be one of {', '.join(FOLDS)}, not {self.fold!r}")
        if not 0 <= self.width <= 4096:
            raise InputError(f"backbone.width must lie between 0 and 4096, not {self.width}")
        if not 0 <= self.parts <= 4096:
            raise InputError(f"backbone.parts must lie between 0 and 4096, not {self.parts}")
        if not 0 <= self.path_width <= 1:
            raise InputError(f"backbone.path_width must lie between 0 and 1, not {self.path_width}")
        if not 0 <= self.path_least <= 4096:
            raise InputError(f"backbone.path_least must lie between 0 and 4096, not {self.path_least}")
        if not all(0 < width <= 1 for width in self.widths) or sorted(self.widths) != self.widths:
            raise InputError(f"backbone.widths must rise from above 0 to at most 1, not {self.widths}")

    def resolved(self, needed: str) -> BackboneOptions:
        """The same with nothing left to choose; needed: the unit form of the method, "any" where all will do."""
        unit = self.unit if self.unit != "auto" else {"any": "channels"}.get(needed, needed)
        self._check_widths(unit)
        if unit != "paths" and (self.path_width or self.path_least):
            raise InputError(f"backbone.path_width and path_least are for backbone.unit=paths, not {unit}")
        widths = list(self.widths or USUAL_WIDTHS.get(unit, []))
        if unit == "choice":
            if self.parts not in (0, len(widths)):
                raise InputError(f"backbone.parts must be 0 or {len(widths)}, as backbone.widths, not {self.parts}")
            return replace(self, unit=unit, parts=len(widths), widths=widths)
        return replace(self, unit=unit, parts=self.parts or min(USUAL_PARTS[unit], self.width or 4096), widths=widths)

    def _check_widths(self, unit: str) -> None:
        """Raise InputError where widths or nets do not suit the form."""
        if self.widths and unit not in USUAL_WIDTHS:
            raise InputError(f"backbone.widths is for backbone.unit={' or '.join(USUAL_WIDTHS)}, not {unit}")
        if self.nets and (unit != "cascade" or len(self.nets) != 2):
            raise InputError("backbone.nets names the two runs of a cascade (router.name=cascade)")
        if unit == "cascade" and self.widths and len(self.widths) != 2:
            raise InputError(f"backbone.widths of a cascade are two, not {self.widths}")

    def kind(self, kinds: Mapping[str, Kind]) -> Kind:
        """The units of the form asked for. Raises InputError where this net has no such units."""
        if self.unit not in kinds:
            raise InputError(
                f"backbone.unit={self.unit} is not there for {self.name} yet (choices: {', '.join(kinds)})"
            )
        return kinds[self.unit]

    def wide(self, own: int) -> int:
        """The width to build, `own` being the net's own. Raises InputError where the parts would not fit into it."""
        width = self.width or own
        if self.parts > width:
            raise InputError(f"backbone.parts must not exceed the width of {self.name}, {width}, not {self.parts}")
        return width

    def sizes(self, hidden: int, middle: bool = False) -> list[int]:
        """Hidden channels of each part of a block that has `hidden` of them.

        middle: a convolution leads from hidden channels to hidden channels (bottlenecks), so that equal parts would have
        fewer parameters than the block, and sub-blocks are widened. In basic blocks equal parts have as many.
        """
        if self.unit == "choice":
            return choice_sizes(hidden, self.widths)
        equal = even_split(hidden, self.parts)
        if self.unit != "paths":
            return equal
        share = self.path_width or (path_share(self.parts) if middle else 0.0)
        sizes = [int(share * hidden)] * self.parts if share else equal
        return [max(size, self.path_least, 1) for size in sizes]


class Backbone(nn.Module):
    """stem -> units -> head. Subclasses build these three and set the two costs.

    fixed_macs: stem and head. dense_macs: the plain static net, reference of every share (not always the sum of all
    parts: enlarged sub-blocks cost more than the block they came from).
    """

    stem: nn.Module
    head: nn.Module
    fixed_macs: float
    dense_macs: float

    def __init__(self) -> None:
        super().__init__()
        self.units: nn.ModuleList = nn.ModuleList()

    @property
    def specs(self) -> list[UnitSpec]:
        """What routers may know of the units."""
        return [unit.spec for unit in self.routable]

    @property
    def routable(self) -> list[Unit]:
        """The units, typed. Raises InputError where something else stands among them, or nothing at all."""
        units = list(self.units)
        odd = next((unit for unit in units if not isinstance(unit, Unit)), None)
        if odd is not None or not units:
            held = (
                f"a {type(odd).__name__}, which is no Unit: put it into one, the stem or the head"
                if units
                else "no unit"
            )
            raise InputError(f"{type(self).__name__}.units holds {held}")
        return units  # type: ignore[return-value]

    def terms(self) -> list[CostTerms]:
        """The cost of each unit."""
        return [unit.cost_terms() for unit in self.routable]

    def plain(self) -> dict[str, nn.Module]:
        """The layers of stem and head that hold weights, under their names in the plain dense net."""
        raise InputError(f"{type(self).__name__} cannot import weights of a plain net")

    def renamed(self, name: str) -> str:
        """The name, in this project, of a tensor of a plain net's file."""
        return name

    @torch.no_grad()
    def load_dense(self, state: dict[str, Tensor], rank: str = "auto") -> None:
        """Take over the weights of the plain dense net, channels in the order of rank (one of RANKS).

        Raises InputError where names or shapes do not fit.
        """
        layers = self.plain()
        known = {k.removeprefix("module."): v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        weights = Weights({self.renamed(k): v for k, v in known.items()}, rank=rank)
        for name, layer in layers.items():
            weights.copy(layer, name)
        for unit in self.routable:
            unit.load_dense(weights.under(unit.spec.name))
        weights.finish()

    def dense_state(self) -> dict[str, Tensor]:
        """The plain dense net's state dict, to be taken over by another form of it. Raises InputError where there is none."""
        out = {f"{name}.{k}": v.detach() for name, layer in self.plain().items() for k, v in tensors(layer).items()}
        for unit in self.routable:
            out |= {f"{unit.spec.name}.{k}": v for k, v in unit.dense_state().items()}
        return out


def initialise(module: nn.Module) -> None:
    """He initialisation of a convolution, by its outputs; for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
