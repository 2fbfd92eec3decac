"""Routable units: the blocks of a net, each cut into parts that an image may run or not.

One file a kind of block. FORMS names the ways a block can be cut; each kind has a dict from form to unit.
"""

from __future__ import annotations

from dynroute.units.base import (
    FEW,
    STATISTICS,
    Reorder,
    Residual,
    Subsample,
    Unit,
    Weights,
    WidthNorm,
    contribution,
    even_split,
    folded_conv,
    make_shortcut,
    sliced_conv,
    sliced_norm,
    tensors,
)
from dynroute.units.basic import BASIC, BasicUnit, GroupedBasic, PathBasic
from dynroute.units.choice import ChoiceBasic, ChoiceBottleneck, ChoiceUnit, choice_sizes

FORMS = ("channels", "paths", "choice")

__all__ = [
    "BASIC",
    "FEW",
    "FORMS",
    "STATISTICS",
    "BasicUnit",
    "ChoiceBasic",
    "ChoiceBottleneck",
    "ChoiceUnit",
    "GroupedBasic",
    "PathBasic",
    "Reorder",
    "Residual",
    "Subsample",
    "Unit",
    "Weights",
    "WidthNorm",
    "choice_sizes",
    "contribution",
    "even_split",
    "folded_conv",
    "make_shortcut",
    "sliced_conv",
    "sliced_norm",
    "tensors",
]
