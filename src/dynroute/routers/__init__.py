"""Routers: how a method decides, and what loss teaches it. One new file and one new row in ROUTERS add a method."""

from __future__ import annotations

from dynroute.routers import cascade, gates, qlearn, slimmable, static
from dynroute.routers.base import (
    NOTE,
    Method,
    Phase,
    Router,
    State,
    classification_loss,
    cross_entropy,
    legal,
    ranged,
    stacked,
    takes_other,
)
from dynroute.routers.limit import Limit, options

ROUTERS: dict[str, Method] = {
    "static": Method(
        static.StaticRouter, static.StaticOptions, static.phases, about="control: dense, or uniformly narrower"
    ),
    "random": Method(
        static.RandomRouter, static.RandomOptions, static.phases, about="control: parts drawn at random at a rate"
    ),
    "slimmable": Method(
        slimmable.SlimmableRouter,
        slimmable.SlimmableOptions,
        slimmable.phases,
        "channels",
        "control: slimmable net (ICLR 2019): one net, several static widths, picked by the dial",
    ),
    "cascade": Method(
        cascade.CascadeRouter,
        cascade.CascadeOptions,
        cascade.phases,
        "cascade",
        "control: a narrow static net, then a wider one where the first is unsure",
    ),
    "rnp": Method(
        qlearn.QRouter,
        qlearn.RnpOptions,
        qlearn.phases,
        "channels",
        "Runtime Neural Pruning (NIPS 2017): Q-agent, channel groups",
    ),
    "rnr": Method(
        qlearn.QRouter,
        qlearn.RnrOptions,
        qlearn.phases,
        "channels",
        "Runtime Network Routing (TPAMI 2019), incremental; multi-path with backbone.unit=choice",
        also=("choice",),
    ),
    "dmnn": Method(
        gates.GateRouter,
        gates.DmnnOptions,
        gates.phases,
        "paths",
        "Dynamic Multi-path Neural Network (2019): gated sub-blocks",
    ),
}

__all__ = [
    "NOTE",
    "ROUTERS",
    "Limit",
    "Method",
    "Phase",
    "Router",
    "State",
    "classification_loss",
    "cross_entropy",
    "legal",
    "options",
    "ranged",
    "stacked",
    "takes_other",
]
