"""ResNets and MobileNetV2 for ImageNet: contract, multiply-adds and torchvision's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision.models
from torch import nn

from dynroute.backbones import Backbone
from dynroute.contracts import InputError
from dynroute.net import RoutedNet
from dynroute.skipping import FastNet
from dynroute.testing import check_backbone, close, shake
from dynroute.units import GroupedBottleneck, GroupedInverted, contribution
from tiny import make_backbone, make_router, pictures

NETS = {
    "resnet18": torchvision.models.ResNet18_Weights,
    "resnet34": torchvision.models.ResNet34_Weights,
    "resnet50": torchvision.models.ResNet50_Weights,
    "resnet101": torchvision.models.ResNet101_Weights,
    "mobilenet_v2": torchvision.models.MobileNet_V2_Weights,
}
IMPORTED = ["resnet18", "resnet50", "mobilenet_v2"]


@pytest.mark.parametrize(
    ("name", "unit", "width", "parts", "size"),
    [
        ("resnet18", "channels", 8, 4, 32),
        ("resnet18", "paths", 8, 2, 37),
        ("resnet50", "channels", 8, 3, 37),
        ("resnet50", "paths", 8, 3, 37),
        ("resnet50_cifar", "paths", 8, 2, 16),
        ("resnext50_2x40d", "channels", 8, 1, 37),
        ("mobilenet_v2", "channels", 0, 4, 37),
        ("mobilenet_v2", "paths", 0, 2, 37),
    ],
)
def test_the_nets_keep_their_contract(name: str, unit: str, width: int, parts: int, size: int) -> None:
    torch.manual_seed(0)
    check_backbone(make_backbone(name, unit, parts, width=width, size=size), size)


@pytest.mark.parametrize("name", NETS)
def test_multiply_adds_are_torchvisions(name: str) -> None:
    """torchvision counts convolutions and the classifier, as we do, and rounds to three digits: nothing else differs."""
    with torch.device("meta"):
        backbone = make_backbone(name, width=0, size=224, classes=1000)
    assert round(backbone.dense_macs / 1e9, 3) == NETS[name].IMAGENET1K_V1.meta["_ops"]


def plain(name: str) -> nn.Module:
    """torchvision's net with ten classes and random normalisations."""
    torch.manual_seed(3)
    net = torchvision.models.get_model(name, weights=None, num_classes=10)
    shake(net)
    return net.eval()


@torch.no_grad()
def logits(backbone: Backbone, x: torch.Tensor, kept: float | None = None) -> torch.Tensor:
    """Logits of a backbone: dense, or with every keep set to a number."""
    x = backbone.eval().stem(x)
    for unit in backbone.routable:
        x = unit(x, None if kept is None else torch.full((len(x), unit.spec.parts), kept))
    return backbone.head(x)


@pytest.mark.parametrize("name", IMPORTED)
def test_torchvisions_weights_compute_the_same_and_come_out_again(name: str) -> None:
    source, x = plain(name), pictures(2, size=64)
    backbone, other = (make_backbone(name, parts=parts, width=0, size=64) for parts in (4, 3))
    backbone.load_dense(source.state_dict())
    with torch.no_grad():
        wanted = source(x)
    assert close(logits(backbone, x), wanted)
    assert close(logits(backbone, x, 1.0), wanted)
    other.load_dense(backbone.dense_state())
    assert close(logits(other, x), wanted)


def test_mobilenet_goes_back_to_torchvision() -> None:
    backbone, source, x = make_backbone("mobilenet_v2", width=0, size=64), plain("mobilenet_v2"), pictures(2, size=64)
    shake(backbone)
    source.load_state_dict(backbone.dense_state())
    with torch.no_grad():
        assert close(source(x), logits(backbone, x))


def test_sub_blocks_of_a_basic_imagenet_net_start_as_the_dense_net() -> None:
    source, x = plain("resnet18"), pictures(2, size=64)
    backbone = make_backbone("resnet18", "paths", 2, width=0, size=64)
    backbone.load_dense(source.state_dict())
    with torch.no_grad():
        assert close(logits(backbone, x, 1.0), source(x))


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_both_sides_of_the_middle_convolution_are_ranked(name: str) -> None:
    backbone = make_backbone(name, width=0, size=64)
    backbone.load_dense(plain(name).state_dict())
    for unit in backbone.routable:
        if isinstance(unit, GroupedBottleneck):
            full = unit.bn2.at(unit.spec.parts)
            useful = [contribution(unit.conv2.weight, unit.bn1.weight, unit.bn1.bias)]
            useful += [contribution(unit.conv3.weight, full.weight, full.bias)]
        else:
            assert isinstance(unit, GroupedInverted)
            useful = [contribution(unit.project.weight, unit.bn2.weight, unit.bn2.bias)]
        for score in useful:
            assert torch.equal(score, score.sort(descending=True).values)


@pytest.mark.parametrize("rank", ["none", "norm"])
def test_channels_come_in_the_order_asked_for(rank: str) -> None:
    source = plain("mobilenet_v2")
    backbone = make_backbone("mobilenet_v2", width=0, size=64)
    backbone.load_dense(source.state_dict(), rank)
    unit, given = backbone.routable[3], source.features[5].conv[0][0].weight  # type: ignore[index, union-attr]
    assert isinstance(unit, GroupedInverted)
    norms = unit.expand.weight.flatten(1).abs().sum(1)
    assert (
        torch.equal(unit.expand.weight, given) if rank == "none" else torch.equal(norms, norms.sort(descending=True)[0])
    )
    x = pictures(2, size=64)
    with torch.no_grad():
        assert close(logits(backbone, x), source(x))


def test_the_fast_run_folds_the_head_too() -> None:
    backbone = make_backbone("mobilenet_v2", width=0, size=32)
    net = RoutedNet(backbone, make_router("static", backbone.specs))
    assert not any(isinstance(step, nn.BatchNorm2d) for step in FastNet(net).head.steps)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnext50_2x40d",
            {"unit": "paths"},
            r"^backbone\.unit=paths is not there for resnext50_2x40d yet \(choices: channels\)",
        ),
        ("mobilenet_v2", {"unit": "choice"}, r"^backbone\.unit=choice is not there for mobilenet_v2"),
        ("mobilenet_v2", {"width": 32}, r"^backbone\.width: mobilenet_v2 comes in one width"),
        ("mobilenet_v2", {"parts": 97}, r"^backbone\.parts must not exceed 96"),
        ("resnet50", {"parts": 65}, r"^backbone\.parts must not exceed the width of resnet50, 64"),
    ],
)
def test_what_these_nets_do_not_have_is_said(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_backbone(name, **({"width": 0} | options))
