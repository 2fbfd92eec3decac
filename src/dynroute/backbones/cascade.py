"""Two static nets of one backbone, the second run where the first is unsure: the form `cascade` of every backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dynroute.backbones.base import Backbone, BackboneOptions
from dynroute.contracts import InputError
from dynroute.data import DataSpec
from dynroute.units import Blank, ReadAnswer, WholeNet


class Cascade(Backbone):
    """Two units, each a whole net of the given make: `first` always runs, `second` may be skipped.

    options.widths: the width of each net, options.parts: what it is measured in (as for router.name=static).
    dense_macs: the plain dense net's. Raises InputError where the classes outnumber the pixels (see `units.whole`).
    """

    def __init__(
        self, make: Callable[[DataSpec, BackboneOptions], Backbone], data: DataSpec, options: BackboneOptions
    ) -> None:
        super().__init__()
        if data.classes > data.image_size**2:
            raise InputError(
                f"a cascade needs as many pixels as classes: {data.image_size} x {data.image_size} are few"
            )
        inner = replace(options, unit="channels", widths=[], nets=[])
        self.nets = [make(data, inner) for _ in options.widths]
        self.stem, self.head = Blank(), ReadAnswer(data.classes)
        for name, net, width in zip(("first", "second"), self.nets, options.widths, strict=True):
            self.units.append(WholeNet(name, net, width, data.channels + 1, skippable=name == "second"))
        self.fixed_macs = 0.0
        self.dense_macs = self.nets[0].dense_macs

    @torch.no_grad()
    def load_dense(self, state: dict[str, Tensor], rank: str = "auto") -> None:
        """Both nets start from the plain dense net. Raises InputError where names or shapes do not fit."""
        for net in self.nets:
            net.load_dense(state, rank)

    def dense_state(self) -> dict[str, Tensor]:
        """None: raises InputError."""
        raise InputError("a cascade is two narrow nets: it has no plain dense net to start from")
