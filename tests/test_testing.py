"""The shipped checks themselves: each must pass what is right and fail what is wrong. See also the mutants of other tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynroute.contracts import UnitSpec
from dynroute.data import DataOptions, Dataset, batches, load
from dynroute.testing import check_agreement, check_dataset, close, count_macs, patterns, random_routes, shake
from dynroute.units import PathBasic, WidthNorm
from tiny import make_net, pictures


def test_count_macs_by_hand() -> None:
    assert count_macs(nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 4, 4)) == 2 * 16 * 9 * 3 * 5
    assert count_macs(nn.Linear(7, 11), torch.randn(3, 7)) == 3 * 7 * 11
    assert count_macs(nn.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4)) == 0


def test_patterns() -> None:
    spec = UnitSpec("u", 4, 3, "nested", False, (1 / 3,) * 3)
    nested = {(True, False, False), (True, True, False), (True, True, True)}
    assert set(patterns(spec)) == nested
    assert set(patterns(replace(spec, skippable=True))) == nested | {(False, False, False)}
    assert set(patterns(replace(spec, form="choice"))) == {tuple(g == i for i in range(3)) for g in range(3)}
    assert len(set(patterns(replace(spec, form="free", skippable=True)))) == 8


def test_random_routes_are_legal_and_of_every_kind() -> None:
    specs = [UnitSpec("a", 4, 3, "nested", False, (1 / 3,) * 3), UnitSpec("b", 4, 2, "free", True, (0.5, 0.5))]
    keep_BUG = random_routes(specs, 500)
    for u, spec in enumerate(specs):
        found = {tuple(row) for row in keep_BUG[:, u, : spec.parts].bool().tolist()}
        assert found == set(patterns(spec))
    assert float(keep_BUG[:, 1, 2].max()) == 0


def test_close_is_relative_to_the_largest_value() -> None:
    one = torch.tensor([1000.0, 1.0])
    assert close(one, one + torch.tensor([0.0, 0.005]))
    assert not close(one, one + 0.02)
    assert not close(torch.zeros(1), torch.tensor([float("nan")]))


def test_shake_leaves_no_initial_value() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), WidthNorm(3, 2))
    shake(module)
    for norm in module[1:]:
        assert not bool((norm.running_mean == 0).any() | (norm.running_var == 1).any())  # type: ignore[union-attr]
        assert not bool((norm.weight == 1).any() | (norm.bias == 0).any())  # type: ignore[union-attr]
        assert float(norm.running_var.min()) >= 0.5  # type: ignore[union-attr, operator]


# --- check_agreement --------------------------------------------------------------------------------------------


class Rounded(PathBasic):
    """A narrow module that is not the masked run."""

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        return nn.Sequential(super().narrow(keep, keep_in), Shifted())


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01


@pytest.mark.parametrize("given", [True, False])
def test_check_agreement_catches_a_wrong_bill_and_a_wrong_result(given: bool) -> None:
    net, x = make_net("dmnn", "paths"), pictures(3)
    keep = random_routes(net.backbone.specs, 3) if given else None
    check_agreement(net, x, keep)
    net.cost.fixed += 1
    with pytest.raises(AssertionError, match="MACs reported"):
        check_agreement(net, x, keep)
    net.backbone.units[1].__class__ = Rounded
    with pytest.raises(AssertionError, match="masked and fast run disagree"):
        check_agreement(net, x, keep)


def test_check_agreement_catches_a_router_that_is_not_in_the_bill() -> None:
    net = make_net("dmnn", "paths")
    net.cost.router = 0
    with pytest.raises(AssertionError, match="MACs reported"):
        check_agreement(net, pictures(2))


# --- check_dataset ----------------------------------------------------------------------------------------------


@pytest.fixture
def shapes() -> Dataset:
    return load(DataOptions(train_images=40, test_images=10))


def test_check_dataset_passes_the_shapes(shapes: Dataset) -> None:
    check_dataset(shapes)


def broken(data: Dataset, how: str) -> Dataset:
    train: Any = data.train
    changes: dict[str, Any] = {
        "empty": {"test": data.test.take(torch.arange(0))},
        "label": {"train": replace(train, labels=train.labels + data.spec.classes)},
        "negative": {"train": replace(train, labels=train.labels - 100)},
        "size": {"spec": replace(data.spec, image_size=7)},
        "superclasses": {"spec": replace(data.spec, superclasses=0)},
    }
    return replace(data, **changes[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "test split is empty"),
        ("label", "beyond the"),
        ("negative", "label is negative"),
        ("size", "train images are"),
        ("superclasses", "superclasses and their number disagree"),
    ],
)
def test_check_dataset_catches(shapes: Dataset, how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_dataset(broken(shapes, how))


def test_check_dataset_catches_batches_that_are_not_repeatable(
    shapes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "mixed_seed", lambda *parts: int(torch.randint(10**9, ())))
    with pytest.raises(AssertionError, match="of one seed and epoch differ"):
        check_dataset(shapes)
