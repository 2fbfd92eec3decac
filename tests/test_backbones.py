"""The backbones: every row keeps its contract, and weights of a plain ResNet come in and go out unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.backbones import Backbone, BackboneOptions
from dynroute.backbones.mobilenet import MobileNetV2
from dynroute.contracts import InputError
from dynroute.cost import NetCost
from dynroute.routers import legal, stacked
from dynroute.testing import check_backbone, close, count_macs, shake
from dynroute.units import BASIC, contribution
from tiny import SPEC, make_backbone, pictures

State = dict[str, Tensor]


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("unit", BASIC)
@pytest.mark.parametrize("name", ["resnet8", "resnet14"])
def test_backbones_keep_their_contract(name: str, unit: str, shortcut: str) -> None:
    torch.manual_seed(0)
    check_backbone(make_backbone(name, unit, shortcut=shortcut), 16)


@pytest.mark.parametrize("unit", BASIC)
@pytest.mark.parametrize("name", [f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)])
def test_every_row_is_built_and_counted(name: str, unit: str) -> None:
    backbone = make_backbone(name, unit)
    blocks = (int(name.removeprefix("resnet")) - 2) // 2
    assert len(backbone.routable) == len(backbone.units) == blocks
    assert [s.stage for s in backbone.specs] == sorted([1, 2, 3] * (blocks // 3))
    terms, reads = backbone.terms(), [None] * blocks
    cost = NetCost(terms, reads, backbone.fixed_macs, 0, backbone.dense_macs)
    everything = stacked([legal(torch.ones(1, spec.parts), spec) for spec in backbone.specs])
    assert float(cost(everything)) == backbone.dense_macs


def test_what_is_no_unit_is_refused_among_the_units() -> None:
    backbone = make_backbone("resnet8", "channels")
    backbone.units.insert(1, nn.MaxPool2d(2))
    with pytest.raises(InputError, match=r"units holds a MaxPool2d, which is no Unit"):
        backbone.routable  # noqa: B018
    backbone.units = nn.ModuleList()
    with pytest.raises(InputError, match="units holds no unit"):
        backbone.specs  # noqa: B018


def test_the_dense_masked_run_executes_dense_macs() -> None:
    backbone = make_backbone("resnet8", "channels", shortcut="B").eval()

    def dense(x: Tensor) -> Tensor:
        x = backbone.stem(x)
        for unit in backbone.units:
            x = unit(x)
        return backbone.head(x)

    assert count_macs(dense, pictures(1)) == backbone.dense_macs


class Wrong:
    """Ways to break a backbone that check_backbone must see."""

    @staticmethod
    def cost(backbone: Backbone) -> None:
        backbone.fixed_macs -= 1

    @staticmethod
    def head(backbone: Backbone) -> None:
        backbone.head = nn.Identity()


@pytest.mark.parametrize(("broken", "message"), [(Wrong.cost, "MACs reported"), (Wrong.head, "logits_BK")])
def test_check_backbone_catches(broken: Callable[[Backbone], None], message: str) -> None:
    backbone = make_backbone()
    broken(backbone)
    with pytest.raises(AssertionError, match=message):
        check_backbone(backbone, 16)


# --- weights of a plain net -------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.new = channels - in_channels
        if self.new and shortcut == "B":
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "shortcut"):
            x = self.shortcut(x)
        elif self.new:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return F.relu(out + x)


class PlainResNet(nn.Module):
    """The CIFAR ResNet that everyone writes."""

    def __init__(self, depth: int = 14, width: int = 8, shortcut: str = "A", last: str = "linear") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        inner = width
        for stage in (1, 2, 3):
            out, blocks = width * 2 ** (stage - 1), []
            for i in range((depth - 2) // 6):
                blocks.append(PlainBlock(inner, out, 2 if stage > 1 and not i else 1, shortcut))
                inner = out
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.last = last
        setattr(self, last, nn.Linear(inner, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.last)(x.mean((2, 3)))


def plain(**kwargs: Any) -> PlainResNet:
    torch.manual_seed(3)
    net = PlainResNet(**kwargs)
    shake(net)
    return net.eval()


@torch.no_grad()
def logits(backbone: Backbone, x: Tensor, kept: float | None = None) -> Tensor:
    """Logits of a backbone: dense, or with every keep set to a number and made legal."""
    x = backbone.eval().stem(x)
    for unit in backbone.routable:
        x = unit(x, None if kept is None else legal(torch.full((len(x), unit.spec.parts), kept), unit.spec))
    return backbone.head(x)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("unit", BASIC)
def test_an_imported_plain_net_computes_the_same(unit: str, parts: int, shortcut: str) -> None:
    source, x = plain(shortcut=shortcut), pictures(4)
    backbone = make_backbone("resnet14", unit, parts, shortcut)
    backbone.load_dense(source.state_dict())
    wanted = source(x)
    assert close(logits(backbone, x), wanted)
    assert close(logits(backbone, x, 1.0), wanted)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_the_dense_state_goes_from_one_form_to_the_other(shortcut: str) -> None:
    channels, x = make_backbone("resnet8", "channels", shortcut=shortcut), pictures(4)
    shake(channels)
    wanted = logits(channels, x)
    for unit in BASIC:
        other = make_backbone("resnet8", unit, 4, shortcut)
        other.load_dense(channels.dense_state())
        assert close(logits(other, x), wanted)


def test_paths_have_no_plain_net() -> None:
    with pytest.raises(InputError, match="no plain dense net"):
        make_backbone("resnet8", "paths").dense_state()


@pytest.mark.parametrize("last", ["linear", "fc"])
def test_prefixes_of_wrappers_and_counters_are_accepted(last: str) -> None:
    source, x = plain(depth=8, last=last), pictures(4)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    assert any(key.endswith("num_batches_tracked") for key in state)
    backbone = make_backbone("resnet8")
    backbone.load_dense(state)
    assert close(logits(backbone, x), source(x))


def test_a_prefix_holds_the_channels_of_largest_contribution() -> None:
    source = plain(depth=8)
    block = source.layer1[0]
    with torch.no_grad():
        block.conv2.weight[:, 5] *= 100  # the most useful hidden channel
        block.conv2.weight[:, 2] = 0  # and one that adds nothing
    backbone = make_backbone("resnet8", "channels", 4)
    backbone.load_dense(source.state_dict())
    for unit in backbone.routable:
        useful = contribution(unit.conv2.weight, unit.bn1.weight, unit.bn1.bias)  # type: ignore[arg-type, union-attr]
        assert torch.equal(useful, useful.sort(descending=True).values)
    first = backbone.routable[0]
    assert torch.equal(first.conv1.weight[0], block.conv1.weight[5])  # type: ignore[index, union-attr]
    assert torch.equal(first.conv1.weight[-1], block.conv1.weight[2])  # type: ignore[index, union-attr]


def test_sub_blocks_start_about_equally_useful() -> None:
    source = plain(depth=8)
    backbone = make_backbone("resnet8", "paths", 2)
    backbone.load_dense(source.state_dict())
    unit = backbone.routable[0]
    conv2 = torch.cat([conv.weight for conv in unit.conv2], 1)  # type: ignore[union-attr]
    useful = contribution(conv2, unit.bn1.weight, unit.bn1.bias)  # type: ignore[arg-type, union-attr]
    one, two = useful.view(2, 4)
    assert bool((one >= two).all()) and bool((two[:-1] >= one[1:]).all())  # ranks dealt in turn


def test_the_contribution_is_the_second_moment_after_relu() -> None:
    gamma, beta = torch.tensor([1.0, 0.5, -2.0]), torch.tensor([0.3, -1.0, 0.7])
    conv2 = torch.randn(4, 3, 3, 3)
    z = torch.randn(400_000, 3) * gamma.abs() + beta
    sampled = F.relu(z).square().mean(0) * conv2.square().sum((0, 2, 3))
    assert torch.allclose(contribution(conv2, gamma, beta), sampled, rtol=0.05)


def without(key: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k != key}


def cut(key: str, dim: int = 0) -> Callable[[State], State]:
    return lambda state: state | {key: state[key].narrow(dim, 0, state[key].shape[dim] - 1)}


@pytest.mark.parametrize("unit", BASIC)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("conv1.weight"), "'conv1.weight'"),
        (without("bn1.running_var"), "'bn1.running_var'"),
        (without("layer2.0.bn1.weight"), "'layer2.0.bn1.weight'"),
        (without("layer3.0.conv2.weight"), "'layer3.0.conv2.weight'"),
        (without("linear.bias"), "'linear.bias'"),
        (lambda state: state | {"layer1.1.conv1.weight": torch.zeros(8, 8, 3, 3)}, "'layer1.1.conv1.weight'"),
        (cut("linear.weight"), "linear.weight has shape"),
        (cut("layer1.0.conv1.weight"), "layer1.0.conv1.weight has shape"),
        (cut("layer1.0.conv1.weight", 1), "layer1.0.conv1.weight has shape"),
        (cut("layer1.0.conv2.weight"), "layer1.0.conv2.weight has shape"),
        (cut("layer1.0.conv2.weight", 1), "layer1.0.conv2.weight has shape"),
        (cut("layer1.0.conv2.weight", 3), "layer1.0.conv2.weight has shape"),
        (cut("layer1.0.bn1.weight"), "layer1.0.bn1.weight has shape"),
        (cut("layer1.0.bn1.running_mean"), "layer1.0.bn1.running_mean has shape"),
        (cut("layer1.0.bn2.bias"), "layer1.0.bn2.bias has shape"),
        (lambda state: state | {"layer1.0.conv2.weight": torch.zeros(())}, "layer1.0.conv2.weight has shape"),
    ],
)
def test_a_misfit_is_named(unit: str, change: Callable[[State], State], named: str) -> None:
    state = change(plain(depth=8).state_dict())
    with pytest.raises(InputError, match=named):
        make_backbone("resnet8", unit).load_dense(state)


@pytest.mark.parametrize("kwargs", [{"depth": 14}, {"width": 16}, {"shortcut": "B"}])
@pytest.mark.parametrize("unit", BASIC)
def test_weights_of_another_net_are_refused(kwargs: dict[str, Any], unit: str) -> None:
    with pytest.raises(InputError, match=r"^backbone\.weights: .*"):
        make_backbone("resnet8", unit).load_dense(plain(**({"depth": 8} | kwargs)).state_dict())


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"unit": "chanels"}, "backbone.unit"),
        ({"shortcut": "C"}, "backbone.shortcut"),
        ({"width": -1}, "backbone.width"),
        ({"parts": 4097}, "backbone.parts"),
        ({"parts": -1}, "backbone.parts"),
    ],
)
def test_options_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BackboneOptions(**wrong)


@pytest.mark.parametrize("asked", [{"path_width": 0.5}, {"path_least": 8}])
def test_widths_of_sub_blocks_are_refused_where_there_are_none(asked: dict[str, Any]) -> None:
    for unit in ("channels", "choice"):
        with pytest.raises(InputError, match=r"path_width and path_least are for backbone\.unit=paths"):
            BackboneOptions(**asked).resolved(unit)
    with pytest.raises(InputError, match="equal parts of the expansion"):
        MobileNetV2(SPEC, BackboneOptions("mobilenet_v2", **asked).resolved("paths"))


def test_options_resolve_to_what_the_router_needs() -> None:
    assert BackboneOptions().resolved("any").unit == "channels"
    assert BackboneOptions().resolved("channels").parts == 4
    assert BackboneOptions().resolved("paths").parts == 2
    assert BackboneOptions(unit="channels", parts=3).resolved("paths").parts == 3
    assert BackboneOptions(width=2).resolved("channels").parts == 2
