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
from dynroute.units.basic import BASIC, BasicUnit, GroupedBasic, PathBasic, contribution
from dynroute.units.whole import Blank, ReadAnswer, WholeNet, answer

FORMS = ("channels", "paths", "cascade")

__all__ = [
    "BASIC",
    "FEW",
    "FORMS",
    "STATISTICS",
    "BasicUnit",
    "Blank",
    "GroupedBasic",
    "PathBasic",
    "ReadAnswer",
    "Reorder",
    "Residual",
    "Subsample",
    "Unit",
    "Weights",
    "WholeNet",
    "WidthNorm",
    "answer",
    "contribution",
    "even_split",
    "folded_conv",
    "make_shortcut",
    "sliced_conv",
    "sliced_norm",
    "tensors",
]
