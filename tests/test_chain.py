"""Chains: layers that shrink on both sides, VGG and RNP's nets made of them, and the order of their channels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from dynroute import assembly
from dynroute.backbones import BACKBONES, Backbone, BackboneOptions
from dynroute.cli import main
from dynroute.config import load_config
from dynroute.contracts import InputError
from dynroute.cost import CostTerms
from dynroute.data import DataSpec
from dynroute.net import RoutedNet
from dynroute.testing import check_agreement, check_backbone, check_unit, close, count_macs, patterns, shake
from dynroute.units import ConvUnit, WidthNorm, contribution, kernel_norm
from tiny import centre, make_backbone, make_router, pictures

READ = [3, 2, 2]  # channels of the parts of the unit that is read

# --- one layer --------------------------------------------------------------------------------------------------


def make(kind: type[ConvUnit] = ConvUnit, norm: bool = True, pool: bool = False, reads: bool = True) -> ConvUnit:
    torch.manual_seed(0)
    above: dict[str, Any] = {"reads": 0, "sizes_in": READ} if reads else {}
    return kind("unit", sum(READ), [2, 2, 1, 1], 6, norm=norm, pool=pool, **above)


def arriving() -> dict[tuple[bool, ...], Tensor]:
    """Feature maps with zeros where the unit that is read kept nothing."""
    out = {}
    for kept in range(1, len(READ) + 1):
        x = torch.randn(3, sum(READ), 6, 6)
        x[:, sum(READ[:kept]) :] = 0
        out[tuple(g < kept for g in range(len(READ)))] = x
    return out


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_a_layer_keeps_its_contract(norm: bool, pool: bool, reads: bool) -> None:
    check_unit(make(norm=norm, pool=pool, reads=reads), 6, arriving() if reads else None)


def test_channels_not_kept_are_exact_zeros_in_both_runs() -> None:
    unit = make(pool=True).eval()
    shake(unit)
    for above, x in arriving().items():
        for keep in patterns(unit.spec):
            kept = sum(unit.sizes[: sum(keep)])
            keeps = [torch.tensor([bits] * 3).float() for bits in (keep, above)]
            for y in (unit(x, *keeps), unit.narrow(keep, above)(x)):
                assert y.shape == (3, 6, 3, 3)
                assert not y[:, kept:].any() and bool(y[:, :kept].any())


def test_without_batch_norm_the_mask_may_stand_before_the_relu() -> None:
    unit, x = make(norm=False), torch.randn(3, 7, 6, 6)
    keep = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    mask_BC = torch.cat([keep[:, [0, 0, 1, 1]], keep[:, 2:]], 1)
    assert torch.equal(unit(x, keep), F.relu(unit.conv(x) * mask_BC[:, :, None, None]))


class OwnWidth(ConvUnit):
    """Statistics by the layer's own width instead of that of the layer it reads."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None, above_BG: Tensor | None = None) -> Tensor:
        return super().forward(x_BCHW, keep_BG, None if keep_BG is None else keep_BG[:, :3])


class OneWidth(ConvUnit):
    """The statistics of the full width, whatever came in."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None, above_BG: Tensor | None = None) -> Tensor:
        return super().forward(x_BCHW, keep_BG)


class MaskTooEarly(ConvUnit):
    """The mask on the convolution's output: BatchNorm makes something of the zeros."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None, above_BG: Tensor | None = None) -> Tensor:
        if keep_BG is None or self.norm is None:
            return super().forward(x_BCHW)
        mask_BC = keep_BG.repeat_interleave(torch.tensor(self.sizes), dim=1)
        width_B = None if above_BG is None else above_BG.sum(1).long()
        return F.relu(self.norm(self.conv(x_BCHW) * mask_BC[:, :, None, None], width_B))


class BiasLeft(ConvUnit):
    """The mask on the kernels alone: the bias of channels not kept goes on to the next layer."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None, above_BG: Tensor | None = None) -> Tensor:
        if keep_BG is None:
            return super().forward(x_BCHW)
        mask_BC = keep_BG.repeat_interleave(torch.tensor(self.sizes), dim=1)
        y = F.conv2d(x_BCHW, self.conv.weight, padding=1) * mask_BC[:, :, None, None]
        assert self.conv.bias is not None
        return F.relu(y + self.conv.bias[:, None, None])


class WholeInput(ConvUnit):
    """Tells the cost of a layer that reads everything."""

    def cost_terms(self) -> CostTerms:
        terms = super().cost_terms()
        return CostTerms(0, tuple(map(sum, zip(*(terms.by_pair_HG or ()), strict=True))))


@pytest.mark.parametrize(
    ("mutant", "norm", "message"),
    [
        (OwnWidth, True, "masked and narrowed run disagree"),
        (OneWidth, True, "masked and narrowed run disagree for .* reading"),
        (MaskTooEarly, True, "masked and narrowed run disagree"),
        (BiasLeft, False, "masked and narrowed run disagree"),
        (WholeInput, False, "cost says"),
    ],
)
def test_check_unit_catches(mutant: type[ConvUnit], norm: bool, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_unit(make(mutant, norm), 6, arriving())


@pytest.mark.parametrize("mutant", [OwnWidth, WholeInput])
def test_check_backbone_checks_the_layers_under_what_they_read(mutant: type[ConvUnit]) -> None:
    backbone = make_backbone("conv4_bn", parts=3)
    backbone.units[2].__class__ = mutant
    with pytest.raises(AssertionError, match=r"features\.10: .* reading"):
        check_backbone(backbone, 16)


# --- nets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts", "size"),
    [("conv4", 4, 16), ("conv4_bn", 3, 12), ("vgg16_bn_cifar", 2, 36), ("vgg16", 1, 32)],
)
def test_chains_keep_their_contract(name: str, parts: int, size: int) -> None:
    torch.manual_seed(0)
    backbone = make_backbone(name, parts=parts, width=4, size=size)
    assert [unit.reads for unit in backbone.routable] == [None, *range(len(backbone.units) - 1)]
    check_backbone(backbone, size)


@pytest.mark.parametrize("router", ["rnp", "rnr", "random"])
@pytest.mark.parametrize("name", ["conv4", "conv4_bn"])
def test_a_routers_own_decisions_run_masked_and_fast(name: str, router: str) -> None:
    torch.manual_seed(0)
    body = make_backbone(name)
    shake(body)
    net, x = RoutedNet(body, make_router(router, body.specs)).eval(), pictures(6)
    centre(net.router, net)
    check_agreement(net.eval(), x)
    out = net(x)
    assert torch.equal(net(x, out.trace.keep_BUG).logits_BK, out.logits_BK)
    assert len(out.macs_B.unique()) > 1, "routes must differ for this to say anything"


def test_a_given_gradient_reaches_keeps_and_both_sides_of_the_cost() -> None:
    body = make_backbone("conv4_bn", parts=2)
    net = RoutedNet(body, make_router("static", body.specs)).train()
    keep = net.dense_routes(4).clone().requires_grad_()
    out = net(pictures(4), keep)
    (out.logits_BK.sum() + out.macs_B.sum()).backward()
    assert keep.grad is not None and bool((keep.grad != 0).all())


def built(name: str, size: int, classes: int) -> Backbone:
    """A net of full size without memory for its weights."""
    spec = DataSpec("any", size, classes, ("",) * classes)
    with torch.device("meta"):
        return BACKBONES[name](spec, BackboneOptions(name).resolved("channels"))


@pytest.mark.parametrize(
    ("name", "size", "classes", "macs"),
    [
        ("conv4", 32, 10, 24.5e6),  # million multiplications, as RNP reports them
        ("conv4_bn", 32, 10, 24.5e6),
        ("vgg16_cifar", 32, 100, 313.3e6),
        ("vgg16_bn_cifar", 32, 100, 313.3e6),
        ("vgg16", 224, 1000, torchvision.models.VGG16_Weights.DEFAULT.meta["_ops"] * 1e9),
        ("vgg16_bn", 224, 1000, torchvision.models.VGG16_BN_Weights.DEFAULT.meta["_ops"] * 1e9),
    ],
)
def test_dense_macs_are_those_that_others_count(name: str, size: int, classes: int, macs: float) -> None:
    backbone = built(name, size, classes)
    assert backbone.dense_macs == pytest.approx(macs, rel=1e-3)
    assert {spec.parts for spec in backbone.specs} == {4}


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_the_plain_net_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
    wanted = {key: value.shape for key, value in theirs.items() if not key.endswith("num_batches_tracked")}
    assert {key: value.shape for key, value in built(name, 224, 1000).dense_state().items()} == wanted


def test_the_dense_masked_run_executes_dense_macs() -> None:
    backbone = make_backbone("vgg16_bn", width=4, size=32).eval()
    dense = nn.Sequential(backbone.stem, *backbone.units, backbone.head)
    assert count_macs(dense, pictures(1, size=32)) == backbone.dense_macs


# --- weights of a plain net -------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The chain that everyone writes; the layers are torchvision's."""

    def __init__(self, layers: Sequence[int | str], linear: Sequence[int], pixels: int, norm: bool) -> None:
        super().__init__()
        self.features = make_layers(list(layers), batch_norm=norm)  # type: ignore[arg-type]
        self.pool = nn.AdaptiveAvgPool2d(pixels)
        steps = [layer for a, b in pairwise(linear) for layer in (nn.Linear(a, b), nn.ReLU(), nn.Dropout())]
        self.classifier = nn.Sequential(*steps[:-2])

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


FOUR = [8, 8, "M", 16, 16, "M"]
SIXTEEN = [4, 4, "M", 8, 8, "M", 16, 16, 16, "M", 32, 32, 32, "M", 32, 32, 32, "M"]
KINDS: dict[str, tuple[list[int | str], list[int], int, int]] = {  # layers, linear, pixels, width
    "conv4": (FOUR, [16 * 16, 10], 4, 8),
    "vgg16_cifar": (SIXTEEN, [32, 32, 10], 1, 4),
    "vgg16": (SIXTEEN, [32 * 49, 256, 256, 10], 7, 4),
}


def pair(kind: str, norm: bool, parts: int = 3) -> tuple[Plain, Backbone, Tensor]:
    """A plain net with random weights, a chain of the same shape, and images."""
    torch.manual_seed(1)
    layers, linear, pixels, width = KINDS[kind]
    source = Plain(layers, linear, pixels, norm)
    shake(source)
    name = kind.replace("16", "16_bn") if norm and kind != "conv4" else kind + "_bn" * norm
    size = 16 if kind == "conv4" else 32
    return source.eval(), make_backbone(name, parts=parts, width=width, size=size).eval(), pictures(3, size=size)


@torch.no_grad()
def logits(backbone: Backbone, x: Tensor) -> Tensor:
    return nn.Sequential(backbone.stem, *backbone.units, backbone.head)(x)


CASES = [(False, "auto"), (False, "none"), (True, "auto"), (True, "norm"), (True, "none")]


@pytest.mark.parametrize(("norm", "rank"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_net_comes_in_and_goes_out_the_same(kind: str, norm: bool, rank: str) -> None:
    source, backbone, x = pair(kind, norm)
    wanted = source(x)
    backbone.load_dense({f"module.{key}": value for key, value in source.state_dict().items()}, rank)
    assert close(logits(backbone, x), wanted)
    everything = RoutedNet(backbone, make_router("static", backbone.specs)).eval()
    assert close(everything(x).logits_BK, wanted)
    moved = [not torch.equal(v, backbone.dense_state()[k]) for k, v in source.state_dict().items() if "weight" in k]
    assert any(moved) == (rank != "none")
    again, _, _ = pair(kind, norm)
    shake(again)
    again.load_state_dict(backbone.dense_state(), strict=False)  # but for BatchNorm's counters
    assert close(again(x), wanted)


def test_prefixes_hold_the_best_channels() -> None:
    for norm, rank in CASES:
        source, backbone, _ = pair("vgg16", norm)
        backbone.load_dense(source.state_dict(), rank)
        first, second = backbone.routable[0], backbone.routable[1]
        assert isinstance(first, ConvUnit) and isinstance(second, ConvUnit)
        score_C = kernel_norm(first.conv.weight)
        if norm and rank == "auto":
            assert isinstance(first.norm, WidthNorm)
            score_C = contribution(second.conv.weight, first.norm.weight[-1], first.norm.bias[-1])
        falling = torch.equal(score_C, score_C.sort(descending=True).values)
        assert falling == (rank != "none")


def test_the_kernel_norm_by_hand() -> None:
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0, 0, 0], weight[0, 0, 1, 1], weight[1, 1, 2, 2] = 3.0, 4.0, -20.0
    assert kernel_norm(weight).tolist() == [2.5, 10.0]


@pytest.mark.parametrize("kind", ["channels", "paths"])
def test_basic_blocks_obey_the_rank(kind: str) -> None:
    source = make_backbone("resnet8", "channels")
    shake(source)
    given = source.dense_state()
    orders = {}
    for rank in ("auto", "contribution", "norm", "none"):
        backbone = make_backbone("resnet8", kind, parts=2)
        backbone.load_dense(given, rank)
        orders[rank] = backbone.routable[0].conv1.weight  # type: ignore[union-attr]
        assert close(logits(backbone.eval(), pictures(2)), logits(source.eval(), pictures(2)))
    assert torch.equal(orders["auto"], orders["contribution"])
    assert torch.equal(orders["none"], given["layer1.0.conv1.weight"])
    best = kernel_norm(given["layer1.0.conv1.weight"]).sort(descending=True).values
    dealt = best if kind == "channels" else torch.cat([best[::2], best[1::2]])
    assert torch.allclose(kernel_norm(orders["norm"]), dealt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"features.2.bias": None}, "no 'features.2.bias'"),
        ({"features.5.weight": torch.zeros(16, 8, 3, 5)}, "features.5.weight has shape"),
        ({"features.9.weight": torch.zeros(1)}, "'features.9.weight' has no place"),
        ({"classifier.0.weight": torch.zeros(10, 255)}, "classifier.0.weight has shape"),
        ({"odd": torch.zeros(1)}, "'odd' has no place"),
    ],
)
def test_a_misfit_is_named(change: dict[str, Tensor | None], named: str) -> None:
    source, backbone, _ = pair("conv4", norm=False)
    state = {key: value for key, value in (source.state_dict() | change).items() if value is not None}
    with pytest.raises(InputError, match=named):
        backbone.load_dense(state)


def test_contribution_needs_a_batch_norm() -> None:
    source, backbone, _ = pair("conv4", norm=False)
    with pytest.raises(InputError, match=r"backbone\.rank=contribution needs a BatchNorm"):
        backbone.load_dense(source.state_dict(), "contribution")


# --- options and the command line -------------------------------------------------------------------------------


def test_wrong_options() -> None:
    with pytest.raises(InputError, match=r"backbone\.rank must be one of auto, norm, .*, not 'size'"):
        BackboneOptions(rank="size")
    with pytest.raises(InputError, match=r"conv4 is a chain .* backbone\.unit=paths"):
        make_backbone("conv4", "paths")
    with pytest.raises(InputError, match="vgg16_cifar needs images of at least 32 pixels, not 16"):
        make_backbone("vgg16_cifar", size=16)
    with pytest.raises(InputError, match="must not exceed the width of conv4, 8"):
        make_backbone("conv4", parts=9)


def test_the_rank_of_a_configuration_reaches_the_layers(tmp_path: Path) -> None:
    source, _, _ = pair("conv4", norm=False)
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    spec = DataSpec("any", 16, 10, ("",) * 10)
    words = ["backbone.name=conv4", "backbone.width=8", "router.name=rnp", f"backbone.weights={tmp_path}/plain.pt"]
    for rank in ("none", "norm"):
        net = assembly.build(load_config(overrides=[*words, f"backbone.rank={rank}"]), spec)
        weight = source.state_dict()["features.2.weight"]
        assert torch.equal(net.backbone.dense_state()["features.2.weight"], weight) == (rank == "none")


def test_a_chain_goes_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["data.name=shapes", "data.train_images=200", "data.test_images=60", "data.image_size=16"]
    tiny += ["backbone.name=conv4_bn", "backbone.width=8", "optim.batch_size=32", "device=cpu", "threads=1"]
    short = [f"router.{key}=1" for key in ("pretrain_epochs", "widths_epochs", "agent_epochs", "cnn_epochs", "rounds")]
    assert main(["train", *tiny, "router.name=rnp", *short, "--out", str(tmp_path / "rnp")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "rnp"), "--flops-target", "1", "--flops-target", "0.5", "--json"]) in (0, 3)
    dense, half = json.loads(capsys.readouterr().out)["rows"]
    assert dense["macs_share"] == pytest.approx(1, abs=0.1) and half["macs_share"] < dense["macs_share"]
    net, _, _ = assembly.restore(tmp_path / "rnp" / "last.pt")
    check_agreement(net, pictures(8))
    assert main(["train", *tiny, "router.name=dmnn", "--out", str(tmp_path / "dmnn")]) == 2
    assert "can be cut into channels only" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["conv4", "conv4_bn"])
def test_a_gradient_reaches_keeps_that_are_the_same_for_all(name: str) -> None:
    body = make_backbone(name, parts=2)
    keep = RoutedNet(body, make_router("static", body.specs)).dense_routes(4).clone().requires_grad_()
    RoutedNet(body, make_router("static", body.specs)).train()(pictures(4), keep).logits_BK.sum().backward()
    assert keep.grad is not None and bool((keep.grad != 0).all())


def test_a_trained_chain_goes_out_at_its_full_width() -> None:
    """Its BatchNorms then differ between widths."""
    source, backbone, x = pair("conv4", norm=True)
    shake(backbone)
    source.load_state_dict(backbone.dense_state(), strict=False)
    assert close(source(x), logits(backbone, x))


def test_a_layer_takes_keeps_padded_for_layers_of_more_parts() -> None:
    unit, x = make(norm=True), torch.randn(3, sum(READ), 6, 6)
    keep, above = torch.tensor([[1.0, 1, 0, 0]] * 3), torch.tensor([[1.0, 0, 0]] * 3)
    assert torch.equal(
        unit(x, torch.cat([keep, 0 * keep[:, :1]], 1), torch.cat([above, 0 * above], 1)), unit(x, keep, above)
    )
