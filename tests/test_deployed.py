"""Routers as FastNet asks them: the plain ones' values and decisions, whatever the options, price and batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dynroute.contracts import Setting, UnitSpec
from dynroute.net import RoutedNet
from dynroute.routers.base import Router
from dynroute.routers.gates import DmnnOptions, GateRouter
from dynroute.routers.qlearn import QRouter, RnpOptions
from dynroute.skipping import FastNet
from dynroute.testing import close, shake
from tiny import make_net, pictures

NESTED = [UnitSpec(f"n{u}", channels, 4, "nested", False, (0.1, 0.2, 0.3, 0.4)) for u, channels in enumerate((3, 9, 6))]
MIXED = [*NESTED[:2], UnitSpec("c", 6, 3, "choice", False, (0.25, 0.5, 1.0))]
BUDGET, CHARGES, CHARGE = {"budget": [0.3, 0.9]}, {"charge": [0.01, 0.3]}, {"charge": [0.1]}
PRICES = (0.0, 0.2, -0.2, 3.0, -3.0)


def agent(specs: list[UnitSpec], seed: int = 0, **options: Any) -> QRouter:
    """A random agent, its statistics those of no one in particular."""
    torch.manual_seed(seed)
    router = QRouter(specs, RnpOptions(hidden=16, **options))
    shake(router)
    with torch.no_grad():
        router.charge_K += 0.3 * torch.rand_like(router.charge_K)
        router.charge_K[-3:] *= -1  # dear budgets are paid for
        for layer in (*router.agent.encoders, *router.agent.decoders):
            layer.weight.mul_(3)  # type: ignore[operator, union-attr]
    return router.eval()


def maps(specs: list[UnitSpec], images: int) -> list[Tensor]:
    """Feature maps of the units, of both memory formats and down to a single pixel."""
    sizes = [8, 4, 1]
    x = [
        torch.randn(images, s.in_channels, n, n) + 2 * torch.randn(images, s.in_channels, 1, 1)
        for s, n in zip(specs, sizes, strict=True)
    ]
    return [x[0].contiguous(memory_format=torch.channels_last), *x[1:]]


@torch.no_grad()
def decisions(router: Router, x: list[Tensor]) -> list[Tensor]:
    """keep_BG of every unit."""
    journey, keeps = router.start(x[0]), []
    for u, x_BCHW in enumerate(x):
        decision, journey = router.choose(u, x_BCHW, journey)
        keeps.append(decision.keep_BG)
    return keeps


@pytest.mark.parametrize("images", [1, 64])
@pytest.mark.parametrize("asked", [BUDGET, CHARGES, CHARGE])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("specs", [NESTED, MIXED])
def test_values_and_decisions_are_the_plain_agents(specs: list[UnitSpec], cell: str, asked: Any, images: int) -> None:
    for seed in range(3):
        plain = agent(specs, seed, cell=cell, action_cost="share", **asked)
        fast = plain.deployed()
        for price in PRICES:
            plain.price = fast.price = price
            x = maps(specs, images)
            slow, quick = plain.begin(x[0]), fast.begin(x[0])
            for u, x_BCHW in enumerate(x):
                with torch.no_grad():
                    q_BA = fast.values(u, x_BCHW, quick)[0]
                    one, slow = plain.decide(u, x_BCHW, slow)
                    two, quick = fast.decide(u, x_BCHW, quick)
                on_top_A = plain.asked()[1] * plain.get_buffer(f"share_{u}")
                wanted_BA = one.notes["q"][:, : specs[u].parts] - on_top_A
                assert torch.allclose(q_BA, wanted_BA, atol=1e-5)
                assert torch.equal(two.keep_BG, one.keep_BG)


def test_these_agents_tell_images_apart() -> None:
    keeps = decisions(agent(NESTED, **BUDGET), maps(NESTED, 64))
    assert all(len(keep.unique(dim=0)) > 1 for keep in keeps)


def test_two_prices_in_one_minibatch() -> None:
    plain = agent(NESTED, **BUDGET)
    fast = plain.deployed()
    plain.setting = fast.setting = Setting(-0.2, 0.2, 0.5)
    x = maps(NESTED, 64)
    for one, two in zip(decisions(plain, x), decisions(fast, x), strict=True):
        assert torch.equal(one, two)


FREE = [UnitSpec(f"f{u}", channels, 4, "free", u > 0, (0.25,) * 4) for u, channels in enumerate((3, 9, 6))]
TARGET: dict[str, Any] = {"target": 0.5}


def gates(seed: int = 0, **options: Any) -> GateRouter:
    """Random controllers, neither all open nor all closed."""
    torch.manual_seed(seed)
    router = GateRouter(FREE, DmnnOptions(hidden=16, **options))
    shake(router)
    with torch.no_grad():
        for layer in router.gates:
            layer.weight.normal_()  # type: ignore[operator, union-attr]
            layer.bias.mul_(0.1)  # type: ignore[operator, union-attr]
    return router.eval()


@pytest.mark.parametrize("images", [1, 64])
@pytest.mark.parametrize("asked", [TARGET, BUDGET])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("previous", [False, True])
def test_gates_and_their_log_odds_are_the_plain_controllers(
    previous: bool, norm: bool, asked: Any, images: int
) -> None:
    opened = []
    for seed in range(3):
        plain = gates(seed, norm=norm, previous=previous, **asked)
        fast = plain.deployed()
        for price in PRICES:
            plain.price = fast.price = price
            x = maps(FREE, images)
            slow, quick = plain.begin(x[0]), fast.begin(x[0])
            for u, x_BCHW in enumerate(x):
                with torch.no_grad():
                    both = fast.logits(u, x_BCHW, quick)[0]
                    one, slow = plain.decide(u, x_BCHW, slow)
                    two, quick = fast.decide(u, x_BCHW, quick)
                assert torch.allclose(both[:, 1::2] - both[:, ::2], one.notes["logits"], atol=1e-5)
                assert torch.equal(two.keep_BG, one.keep_BG)
                opened.append(one.keep_BG.mean())
    assert 0.05 < float(torch.stack(opened).mean()) < 0.95
    assert fast.macs() == plain.macs()


def test_prices_beyond_count_are_forgotten_and_right_again() -> None:
    plain = agent(NESTED, **BUDGET)
    fast, x = plain.deployed(), maps(NESTED, 8)
    for price in [n / 100 for n in range(-50, 50)] + [-0.5]:
        plain.price = fast.price = price
        for one, two in zip(decisions(plain, x), decisions(fast, x), strict=True):
            assert torch.equal(one, two)
    assert len(fast.biases) <= 64


def same(net: RoutedNet, fast: FastNet, x: Tensor) -> bool:
    with torch.no_grad():
        wanted, got = net.eval()(x), fast(x)
    return torch.equal(got.trace.keep_BUG, wanted.trace.keep_BUG) and close(got.logits_BK, wanted.logits_BK)


@pytest.mark.parametrize(("name", "unit"), [("rnr", "channels"), ("rnr", "choice"), ("dmnn", "paths")])
def test_a_fast_net_follows_weights_dial_and_limit(name: str, unit: str) -> None:
    """Whatever changes between two calls: a step of training, a checkpoint, a price, a limit."""
    net, x = make_net(name, unit), pictures(16)
    fast = FastNet(net)
    assert same(net, fast, x)
    before, stored = fast(x).logits_BK, {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    sgd = torch.optim.SGD(net.parameters(), 0.5)
    out = net(x)
    (out.logits_BK.square().mean() + sum(note.float().square().mean() for note in out.trace.notes.values())).backward()
    sgd.step()
    assert same(net, fast, x)
    assert not close(fast(x).logits_BK, before)
    net.load_state_dict(stored)
    assert same(net, fast, x)
    assert close(fast(x).logits_BK, before)
    for price in (-0.3, 0.3):
        net.router.price = price
        assert same(net, fast, x)
    net.set_limit(0.5 * sum(net.span()))
    assert same(net, fast, x)


def test_a_router_without_a_deployed_form_decides_itself() -> None:
    net = make_net("random", "paths")
    assert net.router.deployed() is net.router


def test_a_fast_net_of_one_route_follows_weights_and_limit() -> None:
    test_a_fast_net_follows_weights_dial_and_limit("static", "channels")
