"""Multiply-adds: what is told is what torch executes, image by image, and sums done by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynroute.cost import CostTerms, NetCost, conv_macs
from dynroute.skipping import FastNet
from dynroute.testing import count_macs, random_routes
from tiny import PAIRS, make_backbone, make_net, pictures


@settings(deadline=None, max_examples=25)
@given(
    pair=st.sampled_from(PAIRS),
    parts=st.integers(1, 5),
    shortcut=st.sampled_from("AB"),
    depth=st.sampled_from(["resnet8", "resnet14"]),
    seed=st.integers(0, 10**6),
)
def test_the_cost_of_any_route_is_what_the_narrowed_net_executes(
    pair: tuple[str, str], parts: int, shortcut: str, depth: str, seed: int
) -> None:
    assume(pair[0] != "slimmable" or parts == 4)  # whose widths are quarters
    net = make_net(*pair, seed=seed, parts=parts, shortcut=shortcut, name=depth)
    x = pictures(2, seed)
    own = net(x).macs_B
    keep = random_routes(net.backbone.specs, 2)
    given_macs = net.cost(keep) - net.cost.router  # where routes are given, the router does not run
    for i in range(2):
        assert count_macs(FastNet(net, packed=False), x[i : i + 1]) == float(own[i])
        assert count_macs(FastNet(net, packed=False), x[i : i + 1], keep[i : i + 1]) == float(given_macs[i])


@pytest.mark.parametrize("name", sorted({name for name, _ in PAIRS}))
def test_the_router_is_part_of_the_bill(name: str) -> None:
    net = make_net(name, dict(PAIRS)[name])
    learned = name not in ("static", "random", "cascade", "slimmable")
    assert (net.cost.router > 0) == learned
    if name != "cascade":  # all of whose parts are two nets
        assert float(net.cost(net.dense_routes(1))) == net.cost.dense + net.router.macs()


# --- pairs: a convolution that shrinks on both sides -----------------------------------------------------------

CHAIN = [CostTerms(5, (10.0, 20.0)), CostTerms(0, (0.0, 0.0), ((1.0, 2.0), (3.0, 4.0)))]


def chain() -> NetCost:
    return NetCost(CHAIN, [None, 0], fixed=100, router=7, dense=1000)


def test_a_pair_costs_the_product_of_two_choices_by_hand() -> None:
    keep_BUG = torch.tensor([[[1.0, 0], [1, 0]], [[1, 1], [1, 1]], [[1, 1], [1, 0]], [[0, 1], [0, 1]]])
    #        fixed + router + always   parts    pairs
    by_hand = [112 + 10 + 1, 112 + 30 + 10, 112 + 30 + 4, 112 + 20 + 4]
    assert chain()(keep_BUG).tolist() == by_hand
    assert CHAIN[1].total == 10


def test_the_mean_of_products_is_not_the_product_of_means() -> None:
    keep_BUG = torch.tensor([[[1.0, 0], [1, 0]], [[1, 1], [1, 1]]])
    mean_of_costs = float(chain()(keep_BUG).mean())
    cost_of_means = float(chain()(keep_BUG.mean(0, keepdim=True)))
    assert mean_of_costs == 112 + 20 + 5.5
    assert cost_of_means == 112 + 20 + 4.5


def test_the_gradient_of_a_gate_is_the_cost_of_its_part() -> None:
    keep = torch.tensor([[[1.0, 0], [1, 0]]], requires_grad=True)
    chain()(keep).sum().backward()
    assert keep.grad is not None
    # part costs, and of each pair what the other side keeps
    assert keep.grad[0].tolist() == [[10 + 1, 20 + 3], [1, 2]]


def test_the_gradient_in_a_net_is_by_part() -> None:
    net = make_net("dmnn", "paths")
    keep = net.dense_routes(2).clone().requires_grad_()
    net.cost(keep).sum().backward()
    assert keep.grad is not None
    expected = torch.tensor([term.by_part_G for term in net.backbone.terms()])
    assert torch.equal(keep.grad, expected.expand(2, -1, -1))


def test_padding_of_units_with_fewer_parts_costs_nothing() -> None:
    cost = NetCost([CostTerms(0, (1.0, 2.0)), CostTerms(0, (10.0, 20.0, 30.0))], [None, None], 0, 0, 63)
    assert cost(torch.ones(1, 2, 3)).tolist() == [63]
    assert cost(torch.tensor([[[0.0, 1, 1], [0, 0, 1]]])).tolist() == [32]


def test_padding_of_a_unit_that_is_read() -> None:
    terms = [CostTerms(0, (1.0,)), CostTerms(0, (0.0, 0.0), ((5.0, 7.0),))]
    cost = NetCost(terms, [None, 0], 0, 0, 13)
    assert cost(torch.tensor([[[1.0, 0], [0, 1]], [[1, 1], [1, 1]]])).tolist() == [8, 13]


def test_large_sums_do_not_round() -> None:
    cost = NetCost([CostTerms(0, (1e9, 1.0))], [None], 1e9, 0, 2e9)
    assert cost(torch.ones(1, 1, 2)).tolist() == [2_000_000_001]


# --- dense nets by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "macs"), [(20, 40_551_040), (32, 68_862_592), (56, 125_485_696)])
@pytest.mark.parametrize("unit", ["channels", "paths"])
def test_dense_macs_of_cifar_resnets(depth: int, macs: int, unit: str) -> None:
    backbone = make_backbone(f"resnet{depth}", unit, width=16, size=32)
    n = (depth - 2) // 6
    conv = 32 * 32 * 9 * 16 * 16  # every convolution of a block, but half of it for the first of stages 2 and 3
    by_hand = 32 * 32 * 9 * 3 * 16 + 3 * 2 * n * conv - 2 * (conv // 2) + 64 * 10
    assert backbone.dense_macs == by_hand == macs


def test_projection_shortcuts_always_run() -> None:
    plain, projected = (make_backbone("resnet20", "paths", 0, kind, 16, 32) for kind in "AB")
    assert projected.dense_macs - plain.dense_macs == 16 * 16 * 16 * 32 + 8 * 8 * 32 * 64
    assert [t.always for t in projected.terms() if t.always] == [16 * 16 * 16 * 32, 8 * 8 * 32 * 64]


def test_conv_macs_count_groups() -> None:
    conv = torch.nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False)
    assert conv_macs(6, 3, 8, 12, groups=4) == count_macs(conv, torch.randn(1, 8, 6, 6))


def test_costs_are_no_part_of_a_checkpoint() -> None:
    for name, unit in PAIRS:
        assert not [key for key in make_net(name, unit).state_dict() if key.startswith("cost.")]
