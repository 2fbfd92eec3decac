"""Small nets for the tests: 16-pixel images, eight channels, random but fixed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynroute import backbones
from dynroute.backbones import BACKBONES, Backbone, BackboneOptions
from dynroute.contracts import UnitSpec
from dynroute.data import DataSpec
from dynroute.net import RoutedNet
from dynroute.routers import ROUTERS, Router
from dynroute.routers.cascade import CascadeRouter, log_odds
from dynroute.routers.gates import GateRouter
from dynroute.routers.qlearn import QRouter
from dynroute.testing import shake
from dynroute.units import FORMS

SPEC = DataSpec("tiny", 16, 10, tuple("abcdefghij"), superclasses=2, superclass_of=(0, 1) * 5)
BLOCK_FORMS = [form for form in FORMS if form != "cascade"]  # a cascade is two whole nets
PAIRS = [
    (name, unit)
    for name, method in ROUTERS.items()
    for unit in BLOCK_FORMS
    if method.unit == "any" or unit in (method.unit, *method.also)
]
PAIRS += [("cascade", "cascade"), ("dmnn", "channels")]  # the latter: gates sorted into a prefix


def make_backbone(
    name: str = "resnet8",
    unit: str = "channels",
    parts: int = 0,
    shortcut: str = "A",
    width: int = 8,
    size: int = 16,
    classes: int = 10,
    path_least: int = 0,
) -> Backbone:
    """A backbone for 16-pixel images, not trained."""
    options = BackboneOptions(name, unit=unit, parts=parts, width=width, shortcut=shortcut, path_least=path_least)
    if unit == "choice" and parts:
        options.widths = [(g + 1) / parts for g in range(parts)]
    data = replace(SPEC, image_size=size, classes=classes)
    return backbones.make_backbone(BACKBONES[name], data, options.resolved(unit))


def make_router(name: str, specs: Sequence[UnitSpec], superclasses: int = 0, **options: Any) -> Router:
    """A router by its name in ROUTERS. Gates and Q-values get weights large enough for routes to differ between images."""
    method = ROUTERS[name]
    made = method.router(specs, method.options(**options), superclasses)
    if isinstance(made, GateRouter):
        with torch.no_grad():
            for gate in made.gates:
                gate.weight.mul_(500)  # type: ignore[operator, union-attr]
                gate.bias.zero_()  # type: ignore[operator, union-attr]
    if isinstance(made, QRouter):
        with torch.no_grad():
            for decoder in made.agent.decoders:
                decoder.weight.mul_(5)  # type: ignore[operator, union-attr]
    return made


def make_net(router: str = "dmnn", unit: str = "paths", seed: int = 0, **backbone: Any) -> RoutedNet:
    """A net in eval mode whose normalisations, biases and router weights are random."""
    torch.manual_seed(seed)
    body = make_backbone(unit=unit, **backbone)
    shake(body)
    net = RoutedNet(body, make_router(router, body.specs)).eval()
    centre(net.router, net, backbone.get("size", 16))
    return net.eval()


@torch.no_grad()
def centre(router: Router, net: RoutedNet, size: int = 16) -> None:
    """Bring a router's inputs or logits around zero, as training would: else all images get the same route."""
    if isinstance(router, QRouter):
        for norm in router.norms:
            norm.momentum = 1.0  # type: ignore[assignment]
        router.train()
        net(pictures(64, size=size))
    if isinstance(router, CascadeRouter):
        alone = torch.eye(2)[0].view(1, 2, 1).expand(64, -1, -1)
        router.threshold = float(log_odds(net(pictures(64, size=size), alone).logits_BK).median())
    if isinstance(router, GateRouter):
        logits_UG = net(pictures(64, size=size)).trace.notes["logits"].mean(0)
        for gate, logits_G in zip(router.gates, logits_UG, strict=True):
            gate.bias[1::2] -= logits_G  # type: ignore[index, operator, union-attr]


def pictures(images: int, seed: int = 1, size: int = 16) -> Tensor:
    """Random images (B, 3, H, W)."""
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))
