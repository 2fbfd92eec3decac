"""The units: masked run == narrowed run for every row of BASIC, and mutants that the check must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynroute.cost import CostTerms
from dynroute.testing import check_unit, close, shake
from dynroute.units import (
    BASIC,
    FEW,
    STATISTICS,
    BasicUnit,
    ConvUnit,
    GroupedBasic,
    GroupedBottleneck,
    GroupedInverted,
    PathBasic,
    Place,
    Reorder,
    Subsample,
    WidthNorm,
    even_split,
)
from dynroute.units.base import masked


def make(kind: type[BasicUnit], parts: int = 3, stride: int = 1, shortcut: str = "A") -> Any:
    torch.manual_seed(0)
    return kind(Place("unit", 8, 8 * stride, stride, 6, shortcut), even_split(8 * stride, parts))


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", BASIC)
def test_every_unit_keeps_its_contract(kind: str, parts: int, stride: int, shortcut: str) -> None:
    check_unit(make(BASIC[kind], parts, stride, shortcut), 6)


def test_a_skippable_nested_unit_keeps_its_contract() -> None:
    unit = make(GroupedBasic)
    unit.spec = replace(unit.spec, skippable=True)
    check_unit(unit, 6)


class MaskTooEarly(GroupedBasic):
    """The mask before BatchNorm: zeros become its bias, and the hidden channels are not zero."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        if keep_BG is None:
            return super().forward(x_BCHW)
        mask_BC = keep_BG.repeat_interleave(torch.tensor(self.sizes), dim=1)
        u = F.relu(self.bn1(self.conv1(x_BCHW) * mask_BC[:, :, None, None]))
        return F.relu(self.shortcut(x_BCHW) + self.bn2(self.conv2(u), keep_BG.sum(1).long()))


class BiasLeft(PathBasic):
    """The switch before the last BatchNorm: a closed sub-block still adds that BatchNorm's bias."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        u, out = F.relu(self.bn1(self.conv1(x_BCHW))), self.shortcut(x_BCHW)
        for g, part in enumerate(u.split(self.sizes, 1)):
            on = 1.0 if keep_BG is None else keep_BG[:, g, None, None, None]
            out = out + self.bn2[g](self.conv2[g](part) * on)
        return F.relu(out)


class NestedBiasLeft(GroupedBasic):
    """The same for a nested unit: without the last mask, nothing kept is shortcut + bias."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        if keep_BG is None:
            return super().forward(x_BCHW)
        mask_BC = keep_BG.repeat_interleave(torch.tensor(self.sizes), dim=1)
        u = F.relu(self.bn1(self.conv1(x_BCHW))) * mask_BC[:, :, None, None]
        return F.relu(self.shortcut(x_BCHW) + self.bn2(self.conv2(u), keep_BG.sum(1).long()))


class Cheap(PathBasic):
    """Tells one MAC less than it does."""

    def cost_terms(self) -> CostTerms:
        terms = super().cost_terms()
        return terms._replace(by_part_G=(terms.by_part_G[0] - 1, *terms.by_part_G[1:]))


class OneNorm(GroupedBasic):
    """Every width with the statistics of the full one, in the masked run alone."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        if keep_BG is None:
            return super().forward(x_BCHW)
        mask_BC = keep_BG.repeat_interleave(torch.tensor(self.sizes), dim=1)
        u = F.relu(self.bn1(self.conv1(x_BCHW))) * mask_BC[:, :, None, None]
        return F.relu(self.shortcut(x_BCHW) + self.bn2(self.conv2(u), None))


@pytest.mark.parametrize(
    ("mutant", "skippable", "message"),
    [
        (MaskTooEarly, False, "masked and narrowed run disagree"),
        (BiasLeft, True, "masked and narrowed run disagree"),
        (NestedBiasLeft, True, r"masked and narrowed run disagree for \(False, False, False\)"),
        (OneNorm, False, "masked and narrowed run disagree"),
        (Cheap, True, "cost says"),
    ],
)
def test_check_unit_catches(mutant: type[BasicUnit], skippable: bool, message: str) -> None:
    unit = make(mutant)
    unit.spec = replace(unit.spec, skippable=skippable)
    with pytest.raises(AssertionError, match=message):
        check_unit(unit, 6)


@pytest.mark.parametrize("kind", BASIC)
def test_nothing_kept_is_the_pure_shortcut(kind: str) -> None:
    unit = make(BASIC[kind], stride=2, shortcut="B")
    shake(unit)
    unit.eval()
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(unit(x, torch.zeros(2, 3)), F.relu(unit.shortcut(x)))


def test_one_image_does_not_see_the_routes_of_others() -> None:
    unit = make(PathBasic).eval()
    x, keep = torch.randn(4, 8, 6, 6), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    alone = torch.cat([unit(x[i : i + 1], keep[i : i + 1]) for i in range(4)])
    assert close(unit(x, keep), alone)


def test_gates_get_the_gradient_of_what_their_part_adds() -> None:
    unit = make(PathBasic, parts=2).eval()
    keep = torch.ones(1, 2, requires_grad=True)
    x = torch.rand(1, 8, 6, 6) + 10  # the shortcut keeps every ReLU of the sum open
    unit(x, keep).sum().backward()
    hidden = F.relu(unit.bn1(unit.conv1(x))).split(unit.sizes, 1)
    added = [unit.bn2[g](unit.conv2[g](hidden[g])).sum() for g in range(2)]
    assert keep.grad is not None
    assert torch.allclose(keep.grad[0], torch.stack(added), rtol=1e-4)


# --- WidthNorm ----------------------------------------------------------------------------------------------


def pair(widths: int = 3, channels: int = 5) -> tuple[WidthNorm, list[nn.BatchNorm2d]]:
    """A WidthNorm and plain BatchNorms with the values of its widths, all in float64 and training."""
    torch.manual_seed(0)
    norm = WidthNorm(channels, widths).double()
    shake(norm)
    plain = [nn.BatchNorm2d(channels, momentum=norm.momentum).double() for _ in range(widths)]
    for w, one in enumerate(plain):
        for name in STATISTICS:
            getattr(one, name).data.copy_(getattr(norm, name)[w])
    return norm, plain


def test_width_norm_equals_a_batch_norm_on_the_images_of_each_width() -> None:
    norm, plain = pair()
    width_B = torch.tensor([1] * 9 + [3] * 12 + [2] * 8)[torch.randperm(29)]
    y = torch.randn(29, 5, 4, 4, dtype=torch.float64) * 3 + 1
    weight = torch.randn_like(y)
    mine, theirs = y.clone().requires_grad_(), y.clone().requires_grad_()
    out = norm(mine, width_B)
    expected = torch.empty_like(y)
    for w, one in enumerate(plain, 1):
        expected[width_B == w] = one(theirs[width_B == w])
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(out, expected)
    assert mine.grad is not None and theirs.grad is not None
    assert torch.allclose(mine.grad, theirs.grad)
    for w, one in enumerate(plain):
        assert torch.allclose(norm.running_mean[w], one.running_mean)  # type: ignore[arg-type]
        assert torch.allclose(norm.running_var[w], one.running_var)  # type: ignore[arg-type]
        assert torch.allclose(norm.weight.grad[w], one.weight.grad)  # type: ignore[index, arg-type]
        assert torch.allclose(norm.bias.grad[w], one.bias.grad)  # type: ignore[index, arg-type]


def test_a_width_of_few_images_uses_its_running_statistics_which_learn_a_little() -> None:
    norm, plain = pair()
    few = FEW - 1
    width_B = torch.tensor([2] * few + [1] * 20)
    y = torch.randn(few + 20, 5, 4, 4, dtype=torch.float64)
    before = norm.running_mean.clone()
    out = norm(y, width_B)
    assert torch.allclose(out[:few], plain[1].eval()(y[:few]))
    assert torch.allclose(out[few:], plain[0](y[few:]))
    pace = norm.momentum * few / FEW
    assert torch.allclose(norm.running_mean[1], before[1] + pace * (y[:few].mean((0, 2, 3)) - before[1]))
    assert torch.equal(norm.running_mean[2], before[2])
    assert not torch.equal(norm.running_mean[0], before[0])


@pytest.mark.parametrize("images", [2, 30])
def test_a_minibatch_of_one_width_is_a_plain_batch_norm(images: int) -> None:
    norm, plain = pair()
    y = torch.randn(images, 5, 4, 4, dtype=torch.float64)
    assert torch.allclose(norm(y, torch.full((images,), 2)), plain[1](y))
    assert torch.allclose(norm.running_var[1], plain[1].running_var)  # type: ignore[arg-type]


def test_width_norm_in_eval_takes_each_image_by_its_width() -> None:
    norm, plain = pair()
    norm.eval()
    width_B = torch.tensor([3, 1, 2, 1])
    y = torch.randn(4, 5, 4, 4, dtype=torch.float64)
    expected = torch.cat([plain[w - 1].eval()(y[i : i + 1]) for i, w in enumerate(width_B.tolist())])
    assert torch.allclose(norm(y, width_B), expected)
    assert torch.allclose(norm(y, None), plain[2].eval()(y))


# --- what a masked step keeps -------------------------------------------------------------------------------


def test_a_mask_that_learns_nothing_is_the_same_as_behind_the_relu() -> None:
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    mask_BC11 = torch.tensor([[1.0, 1, 1, 0, 0, 0]] * 4)[:, :, None, None]
    for relu in (F.relu, F.relu6):
        behind, before = relu(3 * x) * mask_BC11, masked(3 * x, mask_BC11, relu)
        assert torch.equal(before, behind)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (before, behind)]
        assert torch.equal(*grads)


def test_a_mask_that_learns_hears_of_what_it_closes() -> None:
    mask_BC11 = torch.zeros(4, 6, 1, 1, requires_grad=True)
    masked(torch.ones(4, 6, 5, 5), mask_BC11).sum().backward()
    assert mask_BC11.grad is not None and bool((mask_BC11.grad == 25).all())


def kept_bytes(unit: Any, x: Tensor, keep_BG: Tensor | None) -> int:
    """Bytes of the tensors that a training step of the unit keeps for its backward pass."""
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        out = unit.train()(x, keep_BG)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("unit", ["basic", "bottleneck", "inverted", "conv"])
def test_a_masked_step_keeps_no_more_than_a_dense_one(unit: str) -> None:
    sizes = even_split(32, 4)
    units: dict[str, Callable[[], Any]] = {
        "basic": lambda: GroupedBasic(Place("unit", 32, 32, 1, 16), sizes),
        "bottleneck": lambda: GroupedBottleneck(Place("unit", 32, 32, 1, 16), sizes),
        "inverted": lambda: GroupedInverted(Place("unit", 32, 32, 1, 16), sizes),
        "conv": lambda: ConvUnit("unit", 32, sizes, 16, norm=True, pool=True),
    }
    x = torch.randn(64, 32, 16, 16, requires_grad=True)
    keep_BG = (torch.arange(4)[None] <= torch.arange(64)[:, None] % 4).float()
    assert kept_bytes(units[unit](), x, keep_BG) < 1.03 * kept_bytes(units[unit](), x, None)


# --- small pieces -------------------------------------------------------------------------------------------


def test_reorder_and_its_gradients() -> None:
    order = torch.tensor([2, 0, 3, 1])
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(Reorder.apply(x, order, order.argsort()), x[order])
    run = lambda value: Reorder.apply(value, order, order.argsort())  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_reorder_keeps_channels_last() -> None:
    x = torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    order = torch.tensor([2, 0, 3, 1])
    assert Reorder.apply(x, order, order.argsort()).is_contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 12))
def test_an_even_split_is_whole_and_even(channels: int, parts: int) -> None:
    sizes = even_split(channels, parts)
    assert sum(sizes) == channels and len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("kind", ["channels", "paths"])
def test_shares_of_the_parts_sum_to_one_and_follow_their_cost(kind: str) -> None:
    unit = make(BASIC[kind], parts=3, stride=2, shortcut="B")
    shares, costs = torch.tensor(unit.spec.part_shares), torch.tensor(unit.cost_terms().by_part_G)
    assert float(shares.sum()) == pytest.approx(1.0)
    assert torch.allclose(shares, costs / costs.sum())


def test_the_shortcut_without_parameters_takes_every_second_pixel_and_keeps_channels_last_both_ways() -> None:
    x = torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = Subsample(2, 1, 2)(x)
    assert torch.equal(out[:, 1:5], x[:, :, ::2, ::2]) and not out[:, 0].any() and not out[:, 5:].any()
    (gradient,) = torch.autograd.grad(out, x, torch.randn_like(out))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last) and not gradient[:, :, 1::2].any()
