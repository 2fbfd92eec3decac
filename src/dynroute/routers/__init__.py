"""Routers: how a method decides, and what loss teaches it. One new file and one new row in ROUTERS add a method."""

from __future__ import annotations

from dynroute.routers import gates, qlearn, static
from dynroute.routers.base import Method, Phase, Router, State, cross_entropy, legal, ranged

ROUTERS: dict[str, Method] = {
    "static": Method(static.StaticRouter, static.StaticOptions, static.phases),
    "random": Method(static.RandomRouter, static.RandomOptions, static.phases),
    "rnp": Method(qlearn.QRouter, qlearn.RnpOptions, qlearn.phases, unit="channels"),
    "rnr": Method(qlearn.QRouter, qlearn.RnrOptions, qlearn.phases, unit="channels"),
    "dmnn": Method(gates.GateRouter, gates.DmnnOptions, gates.phases, unit="paths"),
}

__all__ = ["ROUTERS", "Method", "Phase", "Router", "State", "cross_entropy", "legal", "ranged"]
