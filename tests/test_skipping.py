"""The fast run: the same result from modules that are really smaller."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynroute.skipping import FastNet, Key, folded
from dynroute.testing import close, count_macs, random_routes, shake
from dynroute.units import FORMS
from tiny import BLOCK_FORMS, PAIRS, make_net, pictures


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_the_fast_run_is_the_masked_run(name: str, unit: str, images: int, shortcut: str) -> None:
    net, x = make_net(name, unit, shortcut=shortcut), pictures(images)
    with torch.no_grad():
        masked, fast = net(x), FastNet(net)(x)
        assert close(fast.logits_BK, masked.logits_BK)
        assert torch.equal(fast.trace.keep_BUG, masked.trace.keep_BUG)
        assert torch.equal(fast.macs_B, masked.macs_B)


def routes(unit: str, kind: str, images: int) -> Tensor:
    specs = make_net("static", unit).backbone.specs
    if kind == "random":
        return random_routes(specs, images)
    return torch.full((images, 3, specs[0].parts), 1.0 if kind == "on" else 0.0)


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize(
    ("unit", "kind"),
    [
        ("channels", "on"),
        ("channels", "random"),
        ("paths", "on"),
        ("paths", "off"),
        ("paths", "random"),
        ("choice", "random"),
    ],
)
def test_given_routes(unit: str, kind: str, images: int) -> None:
    torch.manual_seed(0)
    net, x, keep = make_net("static", unit), pictures(images), routes(unit, kind, images)
    with torch.no_grad():
        masked, fast = net(x, keep), FastNet(net)(x, keep)
    assert close(fast.logits_BK, masked.logits_BK)
    assert torch.equal(fast.trace.keep_BUG, keep)


def test_routes_differ_in_these_tests() -> None:
    for name, unit in PAIRS:
        if name != "static":
            found = make_net(name, unit)(pictures(8)).trace.keep_BUG.flatten(1).unique(dim=0)
            assert len(found) > 1, (name, unit)


@pytest.mark.parametrize("unit", FORMS)
def test_a_grouped_minibatch_costs_what_its_images_cost_alone(unit: str) -> None:
    net, x = make_net("static", unit), pictures(8)
    keep = routes(unit, "random", 8)
    together = count_macs(FastNet(net), x, keep)
    assert together == float(net.cost(keep).sum())
    assert together < 8 * net.cost.dense


@pytest.mark.parametrize("unit", FORMS)
def test_the_order_of_images_does_not_matter(unit: str) -> None:
    net, x, keep = make_net("static", unit), pictures(8), routes(unit, "random", 8)
    order = torch.randperm(8)
    fast = FastNet(net)
    one, two = fast(x, keep), fast(x[order], keep[order])
    assert close(two.logits_BK, one.logits_BK[order])
    assert torch.equal(two.macs_B, one.macs_B[order])


@pytest.mark.parametrize("cache", [1, 3])
def test_the_cache_stays_within_its_bound(cache: int) -> None:
    net, x = make_net("static", "paths", parts=4), pictures(8)
    keep = random_routes(net.backbone.specs, 8)
    small, large = FastNet(net, cache), FastNet(net)
    for _ in range(2):
        assert close(small(x, keep).logits_BK, large(x, keep).logits_BK)
        assert len(small.modules) <= cache
    assert len(large.modules) == sum(len(keep[:, u].unique(dim=0)) for u in range(3))


def test_modules_are_made_once_and_the_oldest_goes_first() -> None:
    net, x = make_net("static", "paths"), pictures(1)
    fast = FastNet(net, cache=4)  # three units: one route fits, two do not
    on, off = routes("paths", "on", 1), routes("paths", "off", 1)
    fast(x, on)
    made = dict(fast.modules)
    fast(x, on)
    assert all(fast.modules[key] is module for key, module in made.items())
    fast(x, off)
    assert list(fast.modules)[-3:] == [(u, (False, False), None) for u in range(3)]
    assert len(fast.modules) == 4


@pytest.mark.parametrize("unit", BLOCK_FORMS)
@pytest.mark.parametrize("images", [2, 8])
def test_channels_last_is_kept(unit: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net("static", unit).to(memory_format=torch.channels_last)
    x = pictures(images).contiguous(memory_format=torch.channels_last)
    seen = []
    original = FastNet._narrow

    def watched(self: FastNet, key: Key) -> Callable[[Tensor], Tensor]:
        module = original(self, key)

        def run(x: Tensor) -> Tensor:
            out = module(x)
            seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in (x, out)])
            return out

        return run

    monkeypatch.setattr(FastNet, "_narrow", watched)
    FastNet(net)(x, routes(unit, "random", images))
    assert len(seen) >= 3
    assert all(all(pair) for pair in seen)


def test_a_fast_net_is_a_snapshot_and_leaves_the_net_alone() -> None:
    net, x = make_net("static", "paths", shortcut="B"), pictures(4)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    fast = FastNet(net)
    before = fast(x).logits_BK
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    shake(net.backbone)
    assert not close(FastNet(net)(x).logits_BK, before)


def test_folding_leaves_no_batch_norm_after_a_convolution() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    shake(layers)
    x = torch.randn(2, 3, 4, 4)
    small = folded(layers)
    assert [type(layer) for layer in small.children()] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]
    assert torch.allclose(small(x), layers(x), atol=1e-5)
