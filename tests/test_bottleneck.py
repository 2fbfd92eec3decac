"""Bottlenecks and inverted residuals: masked run == narrowed run, and mutants that the check must catch."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.cost import CostTerms
from dynroute.testing import check_unit, close, shake
from dynroute.units import GroupedBottleneck, GroupedInverted, Place, Unit, channel_mask, even_split, sliced_conv

SIZE = 7


def bottleneck(
    kind: type[GroupedBottleneck] = GroupedBottleneck,
    parts: int = 3,
    stride: int = 1,
    channels: tuple[int, int] = (12, 12),
    shortcut: str = "B",
) -> Any:
    torch.manual_seed(0)
    return kind(Place("unit", *channels, stride, SIZE, shortcut), even_split(10, parts))


def inverted(
    kind: type[GroupedInverted] = GroupedInverted,
    parts: int = 3,
    stride: int = 1,
    channels: tuple[int, int] = (6, 6),
) -> Any:
    torch.manual_seed(0)
    return kind(Place("unit", *channels, stride, SIZE), even_split(20, parts))


def skippable(unit: Any) -> Any:
    unit.spec = replace(unit.spec, skippable=True)
    return unit


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("stride", "channels", "shortcut"), [(1, (12, 12), "B"), (1, (12, 20), "B"), (2, (12, 20), "B"), (2, (12, 20), "A")]
)
def test_bottlenecks_keep_their_contract(parts: int, stride: int, channels: tuple[int, int], shortcut: str) -> None:
    check_unit(bottleneck(parts=parts, stride=stride, channels=channels, shortcut=shortcut), SIZE)
    check_unit(skippable(bottleneck(parts=parts, stride=stride, channels=channels, shortcut=shortcut)), SIZE)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize(("stride", "channels"), [(1, (6, 6)), (1, (6, 9)), (2, (6, 6)), (2, (6, 9))])
def test_inverted_residuals_keep_their_contract(parts: int, stride: int, channels: tuple[int, int]) -> None:
    unit = inverted(parts=parts, stride=stride, channels=channels)
    check_unit(unit, SIZE)
    if unit.residual:
        check_unit(skippable(unit), SIZE)


class WrongBottleneck(GroupedBottleneck):
    """The masked run written out, with one flaw; without one it is right."""

    flaw = ""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        if keep_BG is None:
            return super().forward(x_BCHW)
        mask, width_B = channel_mask(keep_BG, self.sizes), keep_BG.sum(1).long()
        u = F.relu(self.bn1(self.conv1(x_BCHW)))
        y = self.conv2(u if self.flaw == "first mask left out" else u * mask)
        if self.flaw == "second mask before BatchNorm":
            y = y * mask
        u = F.relu(self.bn2(y, None if self.flaw == "one BatchNorm" else width_B))
        if self.flaw not in ("second mask left out", "second mask before BatchNorm"):
            u = u * mask
        y = self.bn3(self.conv3(u), width_B)
        if self.flaw != "bias left":
            y = y * keep_BG[:, :1, None, None]
        return F.relu(self.shortcut(x_BCHW) + y)

    def cost_terms(self) -> CostTerms:
        terms = super().cost_terms()
        if self.flaw != "linear cost":
            return terms
        whole = sum(terms.by_part_G)
        return terms._replace(by_part_G=tuple(whole * size / sum(self.sizes) for size in self.sizes))


class WrongInverted(GroupedInverted):
    """The same for an inverted residual."""

    flaw = ""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        if keep_BG is None:
            return super().forward(x_BCHW)
        mask, width_B = channel_mask(keep_BG, self.sizes), keep_BG.sum(1).long()
        u = F.relu6(self.bn1(self.expand(x_BCHW)))
        if self.flaw == "mask before the depthwise stage":
            u = u * mask
        u = F.relu6(self.bn2(self.depthwise(u)))
        if self.flaw != "mask before the depthwise stage":
            u = u * mask
        y = self.bn3(self.project(u), None if self.flaw == "one BatchNorm" else width_B)
        return x_BCHW + (y if self.flaw == "bias left" else y * keep_BG[:, :1, None, None])


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("first mask left out", "masked and narrowed run disagree"),
        ("second mask left out", "masked and narrowed run disagree"),
        ("second mask before BatchNorm", "masked and narrowed run disagree"),
        ("one BatchNorm", "masked and narrowed run disagree"),
        ("bias left", r"masked and narrowed run disagree for \(False, False, False\)"),
        ("linear cost", "cost says"),
    ],
)
def test_check_unit_catches_wrong_bottlenecks(flaw: str, message: str) -> None:
    unit = skippable(bottleneck(WrongBottleneck))
    check_unit(unit, SIZE)
    unit.flaw = flaw
    with pytest.raises(AssertionError, match=message):
        check_unit(unit, SIZE)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("mask before the depthwise stage", "masked and narrowed run disagree"),
        ("one BatchNorm", "masked and narrowed run disagree"),
        ("bias left", r"masked and narrowed run disagree for \(False, False, False\)"),
    ],
)
def test_check_unit_catches_wrong_inverted_residuals(flaw: str, message: str) -> None:
    unit = skippable(inverted(WrongInverted))
    check_unit(unit, SIZE)
    unit.flaw = flaw
    with pytest.raises(AssertionError, match=message):
        check_unit(unit, SIZE)


def test_the_cost_of_a_bottleneck_is_quadratic_in_the_kept_channels() -> None:
    unit = bottleneck(stride=2, channels=(12, 20))
    in_pixels, out_pixels = SIZE**2, ((SIZE + 1) // 2) ** 2
    told = list(accumulate(unit.cost_terms().by_part_G))
    kept = list(accumulate(unit.sizes))
    assert told == [in_pixels * 12 * h + out_pixels * (9 * h * h + 20 * h) for h in kept]
    assert unit.cost_terms().always == out_pixels * 12 * 20
    assert told[-1] == pytest.approx(sum(unit.spec.part_shares) * told[-1])


@pytest.mark.parametrize("unit", [bottleneck(stride=2, channels=(12, 20)), inverted()], ids=["bottleneck", "inverted"])
def test_shares_of_the_parts_sum_to_one_and_follow_their_cost(unit: Unit) -> None:
    shares, costs = torch.tensor(unit.spec.part_shares), torch.tensor(unit.cost_terms().by_part_G)
    assert float(shares.sum()) == pytest.approx(1.0)
    assert torch.allclose(shares, costs / costs.sum())


@pytest.mark.parametrize("unit", [bottleneck(), inverted()], ids=["bottleneck", "inverted"])
def test_columns_of_other_units_parts_are_passed_over(unit: Unit) -> None:
    shake(unit)
    x, keep = torch.randn(2, unit.spec.in_channels, SIZE, SIZE), torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    assert torch.equal(unit.eval()(x, F.pad(keep, (0, 2))), unit(x, keep))


def test_a_depthwise_convolution_is_sliced_by_channel() -> None:
    conv = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False)
    x, some = torch.randn(2, 6, 5, 5), slice(1, 4)
    small = sliced_conv(conv, some, some)
    assert small.groups == small.in_channels == small.out_channels == 3
    assert close(small(x[:, some]), conv(x)[:, some])
    with pytest.raises(AssertionError, match="the very channels"):
        sliced_conv(conv, some, slice(0, 3))
    with pytest.raises(AssertionError, match="groups of several"):
        sliced_conv(nn.Conv2d(6, 6, 3, groups=2), some, some)
