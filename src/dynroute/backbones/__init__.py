"""Backbones: stem, units, head. One new file and one new row in BACKBONES add a net."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dynroute.backbones.base import Backbone, BackboneOptions
from dynroute.backbones.mobilenet import MobileNetV2
from dynroute.backbones.resnet import LAYOUTS, ResNet
from dynroute.backbones.resnet_cifar import CifarResNet
from dynroute.data import DataSpec

MakeBackbone = Callable[[DataSpec, BackboneOptions], Backbone]  # options resolved

BACKBONES: dict[str, MakeBackbone] = {
    f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)
}
BACKBONES |= {f"resnet{depth}": partial(ResNet, depth) for depth in LAYOUTS}
BACKBONES["mobilenet_v2"] = MobileNetV2

__all__ = ["BACKBONES", "Backbone", "BackboneOptions", "CifarResNet", "MakeBackbone", "MobileNetV2", "ResNet"]
