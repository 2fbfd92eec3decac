"""Routable units: the blocks of a net, each cut into parts that an image may run or not.

One file a kind of block. FORMS names the ways a block can be cut; each kind has a dict from form to unit.
"""

from __future__ import annotations

from dynroute.units.base import (
    FEW,
    STATISTICS,
    Place,
    Reorder,
    Residual,
    Subsample,
    Unit,
    Weights,
    WidthNorm,
    channel_mask,
    even_split,
    folded_conv,
    sliced_conv,
    sliced_norm,
    tensors,
)
from dynroute.units.basic import BASIC, BasicUnit, GroupedBasic, PathBasic
from dynroute.units.bottleneck import AGGREGATED, BOTTLENECK, AggregatedBottleneck, GroupedBottleneck
from dynroute.units.chain import ConvUnit, NarrowConv
from dynroute.units.choice import ChoiceBasic, ChoiceBottleneck, ChoiceUnit, choice_sizes
from dynroute.units.inverted import INVERTED, GroupedInverted
from dynroute.units.paths import PathBottleneck, PathInverted, path_share
from dynroute.units.ranking import RANKS, best_first, contribution, kernel_norm
from dynroute.units.whole import Answered, Blank, ReadAnswer, WholeNet, answer, answered

FORMS = ("channels", "paths", "choice", "cascade")

__all__ = [
    "AGGREGATED",
    "BASIC",
    "BOTTLENECK",
    "FEW",
    "FORMS",
    "INVERTED",
    "RANKS",
    "STATISTICS",
    "AggregatedBottleneck",
    "Answered",
    "BasicUnit",
    "Blank",
    "ChoiceBasic",
    "ChoiceBottleneck",
    "ChoiceUnit",
    "ConvUnit",
    "GroupedBasic",
    "GroupedBottleneck",
    "GroupedInverted",
    "NarrowConv",
    "PathBasic",
    "PathBottleneck",
    "PathInverted",
    "Place",
    "ReadAnswer",
    "Reorder",
    "Residual",
    "Subsample",
    "Unit",
    "Weights",
    "WholeNet",
    "WidthNorm",
    "answer",
    "answered",
    "best_first",
    "channel_mask",
    "choice_sizes",
    "contribution",
    "even_split",
    "folded_conv",
    "kernel_norm",
    "path_share",
    "sliced_conv",
    "sliced_norm",
    "tensors",
]
