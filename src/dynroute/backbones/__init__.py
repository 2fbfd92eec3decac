"""Backbones: stem, units, head. One new file and one new row in BACKBONES add a net."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dynroute.backbones.base import Backbone, BackboneOptions
from dynroute.backbones.cascade import Cascade
from dynroute.backbones.mobilenet import MobileNetV2, mobilenet_v2_140
from dynroute.backbones.resnet import LAYOUTS, ResNet, resnet50_cifar, resnext
from dynroute.backbones.resnet_cifar import CifarResNet
from dynroute.backbones.vgg import Chain, conv4, vgg16, vgg16_cifar
from dynroute.contracts import InputError
from dynroute.data import DataSpec
from dynroute.units import PathBottleneck

MakeBackbone = Callable[[DataSpec, BackboneOptions], Backbone]  # options resolved

BACKBONES: dict[str, MakeBackbone] = {
    f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)
}
BACKBONES |= {f"resnet{depth}": partial(ResNet, depth) for depth in LAYOUTS}
BACKBONES |= {
    "resnext50_2x40d": partial(resnext, 50, 2, 40),
    "resnext50_4x24d": partial(resnext, 50, 4, 24),
    "resnext101_2x40d": partial(resnext, 101, 2, 40),
    "resnet50_cifar": resnet50_cifar,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_140": mobilenet_v2_140,
}
BACKBONES |= {
    "conv4": conv4,
    "conv4_bn": partial(conv4, norm=True),
    "vgg16_cifar": vgg16_cifar,
    "vgg16_bn_cifar": partial(vgg16_cifar, norm=True),
    "vgg16": vgg16,
    "vgg16_bn": partial(vgg16, norm=True),
}


def make_backbone(make: MakeBackbone, data: DataSpec, options: BackboneOptions) -> Backbone:
    """A backbone in the form its options (resolved) ask for; a cascade is made of two whole ones of any make.

    Raises InputError for an option that says nothing of this net.
    """
    backbone = Cascade(make, data, options) if options.unit == "cascade" else make(data, options)
    if options.fold != "auto" and not any(isinstance(unit, PathBottleneck) for unit in backbone.routable):
        raise InputError("backbone.fold: this net has no sub-blocks of bottlenecks, so leave it at auto")
    return backbone


__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneOptions",
    "Cascade",
    "Chain",
    "CifarResNet",
    "MakeBackbone",
    "MobileNetV2",
    "ResNet",
    "make_backbone",
]
