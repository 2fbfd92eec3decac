"""RoutedNet: what it returns, where decisions may come from, and what reaches which gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynroute.backbones import Backbone
from dynroute.contracts import UnitSpec
from dynroute.cost import CostTerms
from dynroute.net import RoutedNet, stack
from dynroute.routers.static import StaticOptions, StaticRouter
from dynroute.testing import check_agreement, random_routes
from dynroute.units import Unit
from tiny import BLOCK_FORMS, PAIRS, make_backbone, make_net, make_router, pictures


def dense(backbone: Backbone, x: Tensor) -> Tensor:
    x = backbone.stem(x)
    for unit in backbone.units:
        x = unit(x)
    return backbone.head(x)


@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_an_output_says_what_was_decided_and_what_it_cost(name: str, unit: str) -> None:
    net = make_net(name, unit)
    out = net(pictures(5))
    units, parts = len(net.backbone.specs), net.backbone.specs[0].parts
    assert out.logits_BK.shape == (5, 10)
    assert out.trace.keep_BUG.shape == (5, units, parts)
    assert torch.equal(out.macs_B, net.cost(out.trace.keep_BUG))
    assert all(note.shape[:2] == (5, units) for note in out.trace.notes.values())


@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_given_routes_replay_decided_ones(name: str, unit: str) -> None:
    net, x = make_net(name, unit), pictures(5)
    decided = net(x)
    given = net(x, decided.trace.keep_BUG)
    assert torch.equal(given.logits_BK, decided.logits_BK)
    assert torch.equal(given.macs_B, decided.macs_B)


@pytest.mark.parametrize("unit", BLOCK_FORMS)
def test_everything_on_is_the_dense_net(unit: str) -> None:
    net, x = make_net("static", unit), pictures(5)
    out = net(x, net.dense_routes(5))
    assert torch.allclose(out.logits_BK, dense(net.backbone, x), atol=1e-5)
    assert out.macs_B.tolist() == [net.cost.dense] * 5
    assert torch.equal(net(x).trace.keep_BUG, net.dense_routes(5))


def test_everything_off_runs_stem_shortcuts_and_head_alone() -> None:
    net, x = make_net("static", "paths"), pictures(3)
    out = net(x, torch.zeros(3, 3, 2))
    assert out.macs_B.tolist() == [net.backbone.fixed_macs] * 3
    bare = net.backbone.stem(x)
    for unit in net.backbone.routable:
        bare = unit.shortcut(bare).relu()  # type: ignore[operator, union-attr]
    assert torch.allclose(out.logits_BK, net.backbone.head(bare), atol=1e-6)


def test_the_span_is_from_the_cheapest_to_the_dearest_route() -> None:
    for name, unit in (("dmnn", "channels"), ("dmnn", "paths"), ("rnr", "choice")):
        net = make_net(name, unit)
        macs = net.cost(random_routes(net.backbone.specs, 3000)) / net.cost.dense
        low, high = net.span()
        assert low == pytest.approx(float(macs.min()))
        assert high == pytest.approx(float(macs.max()))
        assert high == 1 + net.router.macs() / net.cost.dense


def test_nothing_is_stored_on_modules() -> None:
    net = make_net("rnr", "channels").train()
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    net(pictures(4))
    after = {name: dict(module.__dict__) for name, module in net.named_modules()}
    assert all(before[name].keys() == after[name].keys() for name in before)
    values = [v for state in after.values() for v in state.values()]
    assert not any(isinstance(value, Tensor) for value in values)


def test_routes_are_the_routers_only_word() -> None:
    torch.manual_seed(0)
    body = make_backbone(unit="paths").eval()
    x = pictures(4)
    one, two = (RoutedNet(body, make_router(name, body.specs)).eval() for name in ("static", "dmnn"))
    keep_BUG = two(x).trace.keep_BUG
    assert torch.equal(one(x, keep_BUG).logits_BK, two(x).logits_BK)


# --- a third party's net: units with different parts, one with alternatives ---------------------------------------


class Linears(Unit):
    """Alternatives or sums of 1x1 convolutions of different widths."""

    def __init__(self, spec: UnitSpec, hidden: list[int]) -> None:
        super().__init__()
        self.spec, self.hidden = spec, hidden
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, h, 1, bias=False), nn.Conv2d(h, 4, 1, bias=False)) for h in hidden
        )

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        weights = torch.ones(len(x_BCHW), len(self.paths)) if keep_BG is None else keep_BG
        return x_BCHW + sum(path(x_BCHW) * weights[:, g, None, None, None] for g, path in enumerate(self.paths))

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        return Sum([path for path, on in zip(self.paths, keep, strict=False) if on])

    def cost_terms(self) -> CostTerms:
        return CostTerms(0, tuple(2.0 * 16 * 16 * 4 * h for h in self.hidden))


class Sum(nn.Module):
    def __init__(self, paths: list[nn.Module]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(paths)

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(path(x) for path in self.paths)


class Mixed(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
        self.units.append(Linears(UnitSpec("a", 4, 3, "choice", False, (0.25, 0.5, 1.0)), [1, 2, 4]))
        self.units.append(Linears(UnitSpec("b", 4, 2, "choice", False, (0.5, 1.0)), [2, 4]))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        self.fixed_macs = 16 * 16 * 3 * 4 + 40.0
        self.dense_macs = self.fixed_macs + 2 * 2 * 16 * 16 * 4 * 4


@pytest.mark.parametrize("name", ["rnp", "rnr"])
def test_a_net_of_alternatives_with_different_numbers_of_parts(name: str) -> None:
    torch.manual_seed(0)
    body = Mixed()
    net, x = RoutedNet(body, make_router(name, body.specs)), pictures(6)
    check_agreement(net, x)
    check_agreement(net, x, random_routes(body.specs, 6))
    low, high = net.span()
    block = 2 * 16 * 16 * 4 / net.cost.dense
    rest = (net.cost.fixed + net.cost.router) / net.cost.dense
    assert (low, high) == pytest.approx((rest + 3 * block, rest + 8 * block))
    assert net.train()(x).trace.notes["q"].shape == (6, 2, 3)


def test_stack_pads_keeps_and_notes() -> None:
    notes: list[dict[str, Any]] = [
        {"q": torch.ones(2, 3), "r": torch.ones(2)},
        {"q": torch.ones(2, 1), "r": torch.zeros(2)},
    ]
    trace = stack([torch.ones(2, 1), torch.ones(2, 2)], notes)
    assert trace.keep_BUG[0].tolist() == [[1, 0], [1, 1]]
    assert trace.notes["q"][0].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert trace.notes["r"][0].tolist() == [1, 0]


def test_a_static_router_for_mixed_parts() -> None:
    specs = [UnitSpec("a", 4, 3, "free", True, (0.2, 0.3, 0.5)), UnitSpec("b", 4, 2, "free", True, (0.5, 0.5))]
    router = StaticRouter(specs, StaticOptions(width=1.0))
    assert [float(router.decide(u, pictures(1), None)[0].keep_BG.sum()) for u in (0, 1)] == [3, 2]
