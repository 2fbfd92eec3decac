"""DMNN sub-blocks of bottlenecks and inverted residuals: contract, parameters of the paper, the plain net they equal."""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from dynroute import backbones
from dynroute.assembly import inference_parameters
from dynroute.backbones import BACKBONES, BackboneOptions
from dynroute.contracts import InputError
from dynroute.data import DataSpec
from dynroute.net import RoutedNet
from dynroute.testing import check_unit, close, shake
from dynroute.units import (
    AggregatedBottleneck,
    GroupedBottleneck,
    PathBasic,
    PathBottleneck,
    PathInverted,
    Place,
    Unit,
    Weights,
    even_split,
    folded_conv,
    path_share,
)
from dynroute.units.base import sliced_conv, sliced_norm
from dynroute.units.fold import forked_pointwise
from tiny import make_backbone, make_router, pictures

SIZE = 5
IMAGENET = DataSpec("imagenet", 224, 1000, tuple(map(str, range(1000))))
CIFAR = DataSpec("cifar100", 32, 100, tuple(map(str, range(100))))


def bottleneck(
    parts: int = 3, stride: int = 1, channels: tuple[int, int] = (12, 12), kind: Any = PathBottleneck
) -> Any:
    torch.manual_seed(0)
    return kind(Place("unit", *channels, stride, SIZE), [4] * parts)


def inverted(parts: int = 3, stride: int = 1, channels: tuple[int, int] = (6, 6)) -> Any:
    torch.manual_seed(0)
    return PathInverted(Place("unit", *channels, stride, SIZE), even_split(20, parts))


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("stride", "channels"), [(1, (12, 12)), (1, (12, 20)), (2, (12, 20))])
@pytest.mark.parametrize("make", [bottleneck, inverted])
def test_sub_blocks_keep_their_contract(make: Any, parts: int, stride: int, channels: tuple[int, int]) -> None:
    check_unit(make(parts, stride, channels), SIZE)


@pytest.mark.parametrize("stride", [1, 2])
def test_aggregated_blocks_keep_their_contract(stride: int) -> None:
    check_unit(AggregatedBottleneck(Place("unit", 12, 20, stride, SIZE), [6], groups=2), SIZE)


class OneNorm(PathBottleneck):
    """The last BatchNorm once for the sum instead of once for each sub-block: wrong as soon as a gate is closed."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        u = F.relu(self.bn1(self.conv1(x_BCHW)))
        middle = [conv(part) for part, conv in zip(u.split(self.sizes, 1), self.conv2, strict=True)]
        u = F.relu(self.bn2(torch.cat(middle, 1)))
        y = sum(
            conv(part) * (1 if keep_BG is None else keep_BG[:, g, None, None, None])
            for g, (part, conv) in enumerate(zip(u.split(self.sizes, 1), self.conv3, strict=True))
        )
        return F.relu(self.shortcut(x_BCHW) + self.bn3[0](y))


def test_check_unit_catches_one_batch_norm_for_the_sum() -> None:
    with pytest.raises(AssertionError, match="disagree"):
        check_unit(bottleneck(kind=OneNorm), SIZE)


@pytest.mark.parametrize("unit", [bottleneck(2), inverted(2)], ids=["bottleneck", "inverted"])
def test_batch_statistics_are_each_sub_blocks_own_and_see_all_images(unit: Any) -> None:
    """Training equals sub-blocks written out one by one, closed ones included in their own statistics."""
    first, norm1, norm2, last = (
        (unit.conv1, unit.bn1, unit.bn2, unit.conv3)
        if isinstance(unit, PathBottleneck)
        else (unit.expand, unit.bn1, unit.bn2, unit.project)
    )
    clip = F.relu if isinstance(unit, PathBottleneck) else F.relu6
    shake(unit)
    x, keep = torch.randn(4, unit.spec.in_channels, SIZE, SIZE), torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
    expected, start = x, 0
    for g, size in enumerate(unit.sizes):
        rows = slice(start, start + size)
        u = F.conv2d(x, first.weight[rows])
        u = clip(F.batch_norm(u, None, None, norm1.weight[rows], norm1.bias[rows], True))
        if isinstance(unit, PathBottleneck):
            u = F.conv2d(u, unit.conv2[g].weight, padding=1)  # type: ignore[arg-type]
        else:
            u = F.conv2d(u, unit.depthwise.weight[rows], padding=1, groups=size)
        u = clip(F.batch_norm(u, None, None, norm2.weight[rows], norm2.bias[rows], True))
        norm = unit.bn3[g]
        y = F.batch_norm(F.conv2d(u, last[g].weight), None, None, norm.weight, norm.bias, True)
        expected, start = expected + y * keep[:, g, None, None, None], start + size
    if isinstance(unit, PathBottleneck):
        expected = F.relu(expected)
    assert close(unit.train()(x, keep), expected)


@torch.no_grad()
def as_torchvision(unit: PathBottleneck, stride: int) -> Bottleneck:
    """Torchvision's grouped block with the weights of all sub-blocks: last BatchNorms folded, their biases summed."""
    projection = unit.shortcut if isinstance(unit.shortcut, nn.Sequential) else None
    each = unit.sizes[0] * 64 / (unit.place.out_channels // 4)
    block = Bottleneck(
        unit.place.in_channels,
        unit.place.out_channels // 4,
        stride,
        projection,
        groups=len(unit.sizes),
        base_width=each,
    )
    block.conv1.weight.copy_(unit.conv1.weight)
    block.bn1.load_state_dict(unit.bn1.state_dict())
    block.conv2.weight.copy_(torch.cat([conv.weight for conv in unit.conv2]))  # type: ignore[arg-type]
    block.bn2.load_state_dict(unit.bn2.state_dict())
    folded = [folded_conv(c, n) for c, n in zip(unit.conv3, unit.bn3, strict=True)]  # type: ignore[arg-type]
    block.conv3.weight.copy_(torch.cat([weight for weight, _ in folded], 1))
    for name, value in (("weight", 1), ("running_mean", 0), ("running_var", 1 - block.bn3.eps)):
        getattr(block.bn3, name).fill_(value)
    block.bn3.bias.copy_(sum(bias for _, bias in folded))
    return block


@pytest.mark.parametrize("parts", [2, 4])
def test_all_gates_open_is_a_net_of_torchvisions_grouped_blocks(parts: int) -> None:
    torch.manual_seed(0)
    backbone = make_backbone("resnet50", "paths", parts, width=8, size=32)
    shake(backbone)
    units = [unit for unit in backbone.routable if isinstance(unit, PathBottleneck)]
    blocks = [as_torchvision(unit, unit.place.stride) for unit in units]
    theirs = nn.Sequential(backbone.stem, *blocks, backbone.head).eval()
    net = RoutedNet(backbone, make_router("static", backbone.specs)).eval()
    x = pictures(2, size=32)
    with torch.no_grad():
        assert close(net(x, net.dense_routes(2)).logits_BK, theirs(x))
    assert len(blocks) == 16


def test_mobilenet_sub_blocks_start_as_the_dense_net() -> None:
    torch.manual_seed(3)
    source = torchvision.models.mobilenet_v2(num_classes=10)
    shake(source)
    backbone, x = make_backbone("mobilenet_v2", "paths", 2, width=0, size=32), pictures(2, size=32)
    backbone.load_dense(source.state_dict())
    net = RoutedNet(backbone, make_router("static", backbone.specs)).eval()
    with torch.no_grad():
        assert close(net(x, net.dense_routes(2)).logits_BK, source.eval()(x))


# --- bottlenecks from a plain net -----------------------------------------------------------------------------------


def dense_bottleneck(
    stride: int = 1, inputs: int = 64, size: int = SIZE
) -> tuple[GroupedBottleneck, dict[str, Tensor]]:
    """A whole bottleneck whose running statistics are those of the images of `maps`, and its weights."""
    torch.manual_seed(2)
    block = GroupedBottleneck(Place("unit", inputs, 64, stride, size), [16])
    shake(block)
    for name in ("bn1", "bn2", "bn3"):
        getattr(block, name).momentum = 1.0
    block.train()(maps(inputs, size))
    return block.eval(), block.dense_state()


def maps(channels: int, size: int = SIZE) -> Tensor:
    return torch.randn(32, channels, size, size, generator=torch.Generator().manual_seed(5))


def imported(state: dict[str, Tensor], sizes: list[int], stride: int = 1, rank: str = "auto") -> PathBottleneck:
    first, last = state["conv1.weight"], state["conv3.weight"]
    unit = PathBottleneck(Place("unit", first.shape[1], last.shape[0], stride, SIZE), sizes)
    weights = Weights(state, rank=rank)
    unit.load_dense(weights)
    weights.finish()
    return unit.eval()


def distance(unit: Unit, block: Unit) -> float:
    """RMS of the difference of two bodies over the RMS of what the second one's output varies by."""
    x = maps(block.spec.in_channels)
    with torch.no_grad():
        mine, theirs = (u.narrow((True,) * u.spec.parts).body(x) for u in (unit, block))  # type: ignore[operator, union-attr]
    return float(
        (mine - theirs).square().mean().sqrt() / (theirs - theirs.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
    )


@pytest.mark.parametrize("rank", ["auto", "norm", "none"])
@pytest.mark.parametrize(("stride", "inputs"), [(1, 64), (2, 24)])
@pytest.mark.parametrize("sizes", [[16], [16] * 2, [16] * 3, [20] * 2], ids=str)
def test_sub_blocks_as_wide_as_the_bottleneck_start_as_it(
    sizes: list[int], stride: int, inputs: int, rank: str
) -> None:
    block, state = dense_bottleneck(stride=stride, inputs=inputs)
    unit, x = imported(state, sizes, stride, rank), maps(inputs)
    with torch.no_grad():
        assert close(unit(x), block(x))


def test_a_bottleneck_that_falls_into_sub_blocks_starts_as_itself() -> None:
    """rank none: the g-th run of channels is the g-th sub-block, so a 3x3 without other connections is kept whole."""
    block, _ = dense_bottleneck()
    with torch.no_grad():
        block.conv2.weight.mul_(torch.block_diag(*[torch.ones(4, 4)] * 4)[:, :, None, None])
    x = maps(64)
    with torch.no_grad():
        assert close(imported(block.dense_state(), [4] * 4, rank="none")(x), block(x))


@pytest.mark.parametrize("parts", [2, 4])
def test_the_wider_sub_blocks_are_the_nearer_they_start(parts: int) -> None:
    block, state = dense_bottleneck()
    usual = int(path_share(parts) * 16)
    distances = [distance(imported(state, [size] * parts), block) for size in (16 // parts, usual, 12, 16)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-5
    torch.manual_seed(0)
    chance = distance(PathBottleneck(Place("unit", 64, 64, 1, SIZE), [usual] * parts).eval(), block)
    assert distances[1] < 0.8 * chance


@pytest.mark.parametrize("size", [3, 4, 6, 12, 16])
def test_the_second_batch_norm_expects_what_a_sub_block_lacks(size: int) -> None:
    """Its statistics, made from the plain ones without data, are about those that sub-blocks have in training."""
    unit, x = imported(dense_bottleneck(size=15)[1], [size] * 4), maps(64, 15)
    with torch.no_grad():
        u = F.relu(unit.bn1(unit.conv1(x)))
        y = torch.cat([conv(part) for conv, part in zip(unit.conv2, u.split(unit.sizes, 1), strict=True)], 1)  # type: ignore[arg-type]
    mean, deviation = y.mean((0, 2, 3)), y.std((0, 2, 3))
    assert unit.bn2.running_mean is not None and unit.bn2.running_var is not None
    assert float(((unit.bn2.running_mean - mean) / deviation).abs().mean()) < 0.15
    assert float((unit.bn2.running_var.sqrt() / deviation - 1).abs().mean()) < 0.15


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_bottleneck_net_starts_from_a_plain_one(parts: int) -> None:
    """The option of basic blocks, at the paper's widths; and exactly at path_width=1."""
    torch.manual_seed(4)
    source = make_backbone("resnet50", "channels", 1, width=8, size=32)
    shake(source)
    state = source.dense_state()
    backbone = make_backbone("resnet50", "paths", parts, width=8, size=32)
    backbone.load_dense(state)
    options = BackboneOptions("resnet50", unit="paths", parts=parts, width=8, path_width=1.0)
    wide = BACKBONES["resnet50"](DataSpec("tiny", 32, 10, tuple("abcdefghij")), options)
    wide.load_dense(state)
    plain, same = (RoutedNet(body, make_router("static", body.specs)).eval() for body in (source, wide))
    x = pictures(2, size=32)
    with torch.no_grad():
        assert close(same(x, same.dense_routes(2)).logits_BK, plain(x, plain.dense_routes(2)).logits_BK)


def test_a_grouped_net_is_refused_as_the_start_of_sub_blocks() -> None:
    source = AggregatedBottleneck(Place("unit", 64, 64, 1, SIZE), [16], groups=4)
    with pytest.raises(
        InputError, match=r"conv2.weight has shape \(16, 4, 3, 3\), this backbone needs \(16, 16, 3, 3\)"
    ):
        imported(source.dense_state(), [4] * 4)


# --- sizes ------------------------------------------------------------------------------------------------------


def parameters(name: str, parts: int, spec: DataSpec = IMAGENET) -> tuple[float, RoutedNet]:
    """Millions of parameters, of the router's those that stay after training; parts 0: the static net."""
    unit = "paths" if parts else "channels"
    with torch.device("meta"):
        backbone = BACKBONES[name](spec, BackboneOptions(name, unit=unit, parts=parts or 1).resolved(unit))
        net = RoutedNet(backbone, make_router("dmnn" if parts else "static", backbone.specs))
    return inference_parameters(net) / 1e6, net


@pytest.mark.parametrize(
    ("name", "parts", "millions"),
    [
        ("resnet50", 2, 24.67),
        ("resnet50", 3, 25.81),
        ("resnet50", 4, 25.81),
        ("resnet101", 2, 43.12),
        ("mobilenet_v2", 2, 3.63),
        ("mobilenet_v2_140", 2, 6.29),
        ("resnet50", 0, 25.56),
        ("resnet101", 0, 44.55),
        ("mobilenet_v2", 0, 3.50),
        ("mobilenet_v2_140", 0, 6.09),
        ("resnext50_2x40d", 0, 25.4),
        ("resnext50_4x24d", 0, 25.3),
        ("resnext101_2x40d", 0, 44.46),
    ],
)
def test_parameters_of_the_papers_tables(name: str, parts: int, millions: float) -> None:
    assert parameters(name, parts)[0] == pytest.approx(millions, abs=0.06)


def test_controllers_cost_next_to_nothing() -> None:
    for parts in (2, 3, 4):
        cost = parameters("resnet50", parts)[1].cost
        assert cost.router <= 0.0005 * cost.dense == 0.0005 * 4_089_184_256


@pytest.mark.parametrize(("name", "parts"), [("resnet50", 4), ("resnet18", 2), ("mobilenet_v2", 2)])
def test_shares_are_of_the_plain_net(name: str, parts: int) -> None:
    routed, plain = (parameters(name, n)[1].cost.dense for n in (parts, 0))
    assert routed == plain


def test_the_cifar_bottleneck_net_costs_what_the_paper_says() -> None:
    assert parameters("resnet50_cifar", 0, CIFAR)[1].cost.dense / 1e9 == pytest.approx(0.33, abs=0.005)


@pytest.mark.parametrize(
    ("parts", "widths"), [(2, [38, 76, 153, 307]), (3, [29, 59, 119, 239]), (4, [24, 48, 96, 192])]
)
def test_sub_blocks_are_as_wide_as_the_parameter_column_says(parts: int, widths: list[int]) -> None:
    options = BackboneOptions(unit="paths", parts=parts)
    assert [options.sizes(w, middle=True) for w in (64, 128, 256, 512)] == [[w] * parts for w in widths]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 6, 8, 16])
def test_sub_blocks_of_a_bottleneck_have_about_its_parameters(parts: int) -> None:
    share = path_share(parts)
    assert parts * (8 * share + 9 * share**2) / 17 == pytest.approx(1, abs=0.06 if parts == 2 else 0.01)


def test_sub_blocks_of_basic_blocks_are_widened_where_asked_for() -> None:
    equal, wider = (BackboneOptions(unit="paths", parts=2, path_least=least) for least in (0, 16))
    assert [equal.sizes(w) for w in (16, 32, 64)] == [[8, 8], [16, 16], [32, 32]]
    assert [wider.sizes(w) for w in (16, 32, 64)] == [[16, 16], [16, 16], [32, 32]]
    assert BackboneOptions(unit="paths", parts=2, path_width=0.75).sizes(16) == [12, 12]
    backbone = BACKBONES["resnet20"](CIFAR, BackboneOptions("resnet20", unit="paths", parts=2, path_least=16))
    plain = BACKBONES["resnet20"](CIFAR, BackboneOptions("resnet20", unit="channels", parts=1))
    assert backbone.dense_macs == plain.dense_macs
    assert sum(backbone.terms()[0].by_part_G) == 2 * plain.terms()[0].total


class Apart(nn.Module):
    """Sub-blocks as modules of their own, each with its own BatchNorms, and the gates multiplied on: equation (4)."""

    def __init__(self, unit: Any) -> None:
        super().__init__()
        inverted = isinstance(unit, PathInverted)
        first, norm, last, norms = (
            (unit.expand, unit.bn1, unit.project, unit.bn3)
            if inverted
            else (unit.conv1, unit.bn1, unit.conv2, unit.bn2)
        )
        clip, start = nn.ReLU6 if inverted else nn.ReLU, 0
        self.shortcut, self.relu, bodies = unit.shortcut, not inverted, []
        for g, size in enumerate(unit.sizes):
            rows = slice(start, start + size)
            layers = [sliced_conv(first, rows, slice(None)), sliced_norm(norm, rows), clip()]
            if inverted:
                layers += [sliced_conv(unit.depthwise, rows, rows), sliced_norm(unit.bn2, rows), clip()]
            bodies.append(nn.Sequential(*layers, last[g], norms[g]))
            start += size
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor) -> Tensor:
        bodies = [keep_BG[:, g, None, None, None] * body(x_BCHW) for g, body in enumerate(self.bodies)]
        out_BCHW = self.shortcut(x_BCHW) + torch.stack(bodies).sum(0)
        return F.relu(out_BCHW) if self.relu else out_BCHW


@pytest.mark.parametrize(("stride", "outputs"), [(1, 6), (1, 10), (2, 10)])
@pytest.mark.parametrize("kind", [PathBasic, PathInverted])
def test_training_is_that_of_sub_blocks_apart(kind: Any, stride: int, outputs: int) -> None:
    """Outputs, gradients and running statistics in float64, where the unit runs its first convolutions as one."""
    torch.manual_seed(0)
    unit = kind(Place("unit", 6, outputs, stride, SIZE), [4, 3, 5]).double()
    shake(unit)
    results = []
    for net in (unit, copy.deepcopy(Apart(copy.deepcopy(unit)).double())):
        net.train()
        torch.manual_seed(1)
        x = torch.randn(5, 6, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
        keep = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).double().requires_grad_()
        y = net(x, keep)
        y.backward(torch.randn(y.shape, dtype=torch.float64))
        results.append((net, [y.detach(), x.grad, keep.grad]))
    (one, values), (apart, wanted) = results
    named = {"bn1": 1} if kind is PathBasic else {"bn1": 1, "bn2": 4}
    for name, place in named.items():
        for key in ("weight.grad", "bias.grad", "running_mean", "running_var"):
            values.append(attrgetter(key)(getattr(one, name)))
            wanted.append(torch.cat([attrgetter(key)(body[place]) for body in apart.bodies]))
    values.append((one.conv1 if kind is PathBasic else one.expand).weight.grad)
    wanted.append(torch.cat([body[0].weight.grad for body in apart.bodies]))
    lasts, norms = (one.conv2, one.bn2) if kind is PathBasic else (one.project, one.bn3)
    for g, body in enumerate(apart.bodies):
        values += [lasts[g].weight.grad, norms[g].weight.grad, norms[g].running_mean, norms[g].running_var]
        wanted += [body[-2].weight.grad, body[-1].weight.grad, body[-1].running_mean, body[-1].running_var]
    for value, other in zip(values, wanted, strict=True):
        assert torch.allclose(value, other, rtol=1e-9, atol=1e-9)


# --- the covariance fold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("stride", "outputs"), [(1, 6), (1, 10), (2, 10)])
@pytest.mark.parametrize("wide", [0, 128])
def test_the_covariance_fold_is_exact(
    wide: int, stride: int, outputs: int, gated: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, all gradients and running statistics as of one BatchNorm for each sub-block, in float64; a dead channel too.

    wide: so that the products are convolutions, or matrix products.
    """
    monkeypatch.setattr("dynroute.units.fold.WIDE", wide)
    monkeypatch.setattr("dynroute.units.fold.PIECE", 600)  # two images at a time where the stride is 1
    results = []
    for fold in (True, False):
        unit = bottleneck(3, stride, (6, outputs)).double().train()
        shake(unit)
        unit.fold = fold
        torch.manual_seed(1)
        with torch.no_grad():
            unit.bn2.weight[1], unit.bn2.bias[1] = 0, -1  # dead after the ReLU
        x = (torch.randn(5, 6, SIZE, SIZE, dtype=torch.float64) + 100).contiguous(memory_format=layout).requires_grad_()
        keep = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).double().requires_grad_()
        y = unit(x, keep if gated else None)
        y.backward(torch.randn(y.shape, dtype=torch.float64))  # by shape: the two may lie in memory in different orders
        grads = [x.grad, keep.grad if gated else x.grad, *(p.grad for p in unit.parameters())]
        results.append([y.detach(), *grads, *(b.double() for b in unit.buffers())])
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wide", [0, 128])
@pytest.mark.parametrize("size", [1, 5])
def test_a_convolution_and_the_shortcut_share_one_gradient(
    size: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynroute.units.fold.WIDE", wide)
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 1, bias=False).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    y, same = forked_pointwise(x, conv)
    assert torch.equal(y, conv(x)) and torch.equal(same, x)
    assert torch.autograd.gradcheck(lambda x, _: forked_pointwise(x, conv), (x, conv.weight))


def test_the_covariance_fold_under_autocast_is_the_plain_form_but_for_rounding() -> None:
    outputs = []
    for fold in (True, False):
        unit = bottleneck(2).train()
        unit.fold = fold
        torch.manual_seed(1)
        x, keep = torch.randn(8, unit.spec.in_channels, SIZE, SIZE), torch.tensor([[1.0, 0], [1, 1]]).repeat(4, 1)
        with torch.autocast("cpu", torch.bfloat16):
            y = unit(x, keep)
        y.float().square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in unit.parameters())
        outputs.append(y.detach().float())
    assert torch.allclose(*outputs, atol=0.1, rtol=0.05)


def test_the_fold_is_left_out_where_a_minibatch_has_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = []
    monkeypatch.setattr("dynroute.units.paths.folded_sum", lambda out, *rest: folded.append(len(out)) or 1 * out)
    unit = bottleneck(16).train()
    enough = -(-2 * sum(unit.sizes) // SIZE**2)
    for images in (enough, enough - 1):
        unit(torch.randn(images, unit.spec.in_channels, SIZE, SIZE))
    assert folded == [enough] and enough > 1


@pytest.mark.parametrize(
    ("asked", "folds"), [("always", [True, True]), ("never", [False, False]), ("auto", [None, None])]
)
def test_the_fold_can_be_asked_for_and_refused(asked: str, folds: list[bool | None]) -> None:
    backbone = BACKBONES["resnet50_cifar"](CIFAR, BackboneOptions("resnet50_cifar", unit="paths", parts=2, fold=asked))
    assert [backbone.routable[u].fold for u in (0, -1)] == folds
    with pytest.raises(InputError, match="must be one of auto, always, never"):
        BackboneOptions(fold="maybe")


@pytest.mark.parametrize(
    ("name", "unit"), [("resnet20", "paths"), ("mobilenet_v2", "paths"), ("resnet50_cifar", "channels")]
)
@pytest.mark.parametrize("asked", ["always", "never"])
def test_a_fold_is_not_promised_where_there_is_none(name: str, unit: str, asked: str) -> None:
    with pytest.raises(InputError, match=r"backbone\.fold: this net has no sub-blocks of bottlenecks"):
        backbones.make_backbone(BACKBONES[name], CIFAR, BackboneOptions(name, unit=unit, fold=asked).resolved(unit))


def test_the_covariance_fold_takes_a_keep_padded_for_units_of_more_parts() -> None:
    unit = bottleneck(2).train()
    unit.fold = True
    x, keep = torch.randn(4, unit.spec.in_channels, SIZE, SIZE), torch.tensor([[1.0, 0], [1, 1]]).repeat(2, 1)
    assert torch.equal(unit(x, torch.cat([keep, torch.zeros(4, 1)], 1)), unit(x, keep))
