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
    even_split,
    folded_conv,
    make_shortcut,
    sliced_conv,
    sliced_norm,
    tensors,
)
from dynroute.units.basic import BASIC, BasicUnit, GroupedBasic, PathBasic
from dynroute.units.chain import ConvUnit
from dynroute.units.ranking import RANKS, contribution, kernel_norm, usefulness

FORMS = ("channels", "paths")

__all__ = [
    "BASIC",
    "FEW",
    "FORMS",
    "RANKS",
    "STATISTICS",
    "BasicUnit",
    "ConvUnit",
    "GroupedBasic",
    "PathBasic",
    "Reorder",
    "Residual",
    "Subsample",
    "Unit",
    "Weights",
    "WidthNorm",
    "contribution",
    "even_split",
    "folded_conv",
    "kernel_norm",
    "make_shortcut",
    "sliced_conv",
    "sliced_norm",
    "tensors",
    "usefulness",
]
