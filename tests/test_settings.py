"""Mixed settings and the limit on every image: the same on any batch and thread count, masked and skipping, all methods."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dynroute.contracts import Decision, InputError, OutOfReach, Setting, UnitSpec
from dynroute.cost import CostTerms, NetCost
from dynroute.net import RoutedNet
from dynroute.routers import Limit, Router, State, options
from dynroute.routers.draws import draws, image_hash
from dynroute.routers.limit import MOST
from dynroute.skipping import FastNet
from dynroute.testing import random_routes
from tiny import PAIRS, make_backbone, make_net, pictures

MIX = Setting(0.1, -0.3, 0.4)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """More than one, as in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class RandomRoutes(Router):
    """Wants a legal route drawn anew at every call."""

    def begin(self, x_BCHW: Tensor) -> State:
        """The routes."""
        return random_routes(self.specs, len(x_BCHW))

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """As drawn."""
        return Decision(state[:, u, : self.specs[u].parts], {}), state


# --- mixed settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_each_image_runs_as_if_its_own_price_held_for_all(name: str, unit: str) -> None:
    net, x = make_net(name, unit), pictures(32)
    by_price = []
    for price in (MIX.price, MIX.other):
        net.router.price = price
        by_price.append(net(x))
    net.router.setting = MIX
    mixed = net(x)
    other_B = draws(image_hash(x), 1 << 20, 1)[:, 0] < MIX.part
    assert 0 < int(other_B.sum()) < 32
    wanted = torch.where(other_B[:, None, None], by_price[1].trace.keep_BUG, by_price[0].trace.keep_BUG)
    assert torch.equal(mixed.trace.keep_BUG, wanted)
    assert net.router.setting == MIX
    for key, value in mixed.trace.notes.items():
        own = [out.trace.notes[key] for out in by_price]
        picked = torch.where(other_B.view(-1, *[1] * (value.dim() - 1)), own[1], own[0])
        assert torch.allclose(value.float(), picked.float(), atol=1e-5), key


@pytest.mark.parametrize("setting", [Setting(), MIX], ids=["trained", "mixed"])
@pytest.mark.parametrize(("name", "unit"), PAIRS)
@pytest.mark.usefixtures("two_threads")
def test_the_same_image_and_setting_give_the_same_route(name: str, unit: str, setting: Setting) -> None:
    net, x = make_net(name, unit), pictures(64)
    net.router.setting = setting
    first = net(x).trace.keep_BUG
    fast = FastNet(net)
    few = (0, 20, 63)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for run in (net, fast):
            assert torch.equal(run(x).trace.keep_BUG, first)
            assert all(torch.equal(run(x[i : i + 1]).trace.keep_BUG[0], first[i]) for i in few)


def test_about_the_asked_part_of_the_images_gets_the_other_price() -> None:
    parts = draws(image_hash(pictures(4000, size=4)), 1 << 20, 1)[:, 0]
    for part in (0.1, 0.5, 0.9):
        assert float((parts < part).double().mean()) == pytest.approx(part, abs=0.03)


def test_a_price_replaces_a_mix() -> None:
    router = make_net().router
    router.setting = MIX
    assert router.price == MIX.price
    router.price = 0.5
    assert router.setting == Setting(0.5)


# --- the limit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.4])
@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_no_image_of_any_router_exceeds_the_limit(name: str, unit: str, part: float) -> None:
    net, x = make_net(name, unit), pictures(24)
    low, high = net.span()
    share = low + part * (high - low)
    net.set_limit(share)
    for setting in (Setting(-1e4), MIX):
        net.router.setting = setting
        masked = net(x)
        assert float(masked.macs_B.max()) <= share * net.cost.dense * (1 + 1e-9)
        assert torch.equal(FastNet(net)(x).trace.keep_BUG.bool(), masked.trace.keep_BUG.bool())


CHAIN = UnitSpec("c", 4, 3, "nested", False, (1 / 3,) * 3)


@pytest.mark.parametrize(
    "spec",
    [CHAIN, replace(CHAIN, form="choice"), replace(CHAIN, form="free"), replace(CHAIN, form="free", skippable=True)],
    ids=["nested", "choice", "free", "skippable"],
)
@pytest.mark.parametrize("chained", [True, False])
def test_the_limit_is_kept_and_no_tighter_than_it_must_be(spec: UnitSpec, chained: bool) -> None:
    """Three units of random costs, each reading the one before or none, against every route there is."""
    torch.manual_seed(3)
    pairs = [None, *(tuple(map(tuple, (10 * torch.rand(3, 3)).tolist())) if chained else None for _ in range(2))]
    terms = [CostTerms(1.0, tuple((5 * torch.rand(3)).tolist()), pair) for pair in pairs]
    cost = NetCost(terms, [None, 0 if chained else None, 1 if chained else None], 2.0, 0.5, 50.0)
    specs = [spec] * 3
    every = torch.stack([torch.stack(route) for route in itertools.product(options(spec), repeat=3)])
    macs = cost(every)
    for most in (float(macs.min()), float(macs.median()), float(macs.quantile(0.9)), float(macs.max())):
        limit = Limit(cost, specs, most / 50)
        spent, keeps = limit.start(len(every), every.device), []
        for u in range(3):
            keep, spent = limit.lowered(u, every[:, u], spent)
            keeps.append(keep)
        found = torch.stack(keeps, 1)
        assert float(cost(found).max()) <= most * (1 + 1e-9)
        assert torch.allclose(spent.least_B, cost(found))
        fits = macs <= most
        assert torch.equal(found[fits], every[fits]), "a route that fits was changed"
        if spec.form != "choice":
            assert bool((found <= every).all()), "a part was added"


@pytest.mark.parametrize(("name", "unit"), [("resnet8", "paths"), ("resnet8", "choice"), ("conv4_bn", "channels")])
def test_random_routes_never_exceed_a_limit(name: str, unit: str) -> None:
    torch.manual_seed(0)
    backbone = make_backbone(name, unit)
    net = RoutedNet(backbone, RandomRoutes(backbone.specs)).eval()
    low, high = net.span()
    for part in (0.0, 0.3, 0.6):
        share = low + part * (high - low)
        net.set_limit(share)
        macs_B = torch.cat([net(pictures(50, seed)).macs_B for seed in range(4)])
        assert float(macs_B.max()) <= share * net.cost.dense * (1 + 1e-9)
        assert part == 0.0 or float(macs_B.max()) > (low + 0.8 * part * (high - low)) * net.cost.dense


def test_a_limit_below_the_cheapest_route_says_the_range() -> None:
    net = make_net()
    low, _ = net.span()
    with pytest.raises(OutOfReach, match="routes of this net cost"):
        net.set_limit(low * 0.99)
    net.set_limit(low)
    assert float(net(pictures(4)).macs_B.max()) == pytest.approx(low * net.cost.dense)
    net.set_limit(None)
    assert net.router.limit is None


@pytest.mark.parametrize("form", ["nested", "choice", "free"])
@pytest.mark.parametrize("skippable", [True, False])
def test_options_are_the_legal_keeps(form: Any, skippable: bool) -> None:
    from dynroute.routers import legal

    spec = replace(CHAIN, form=form, skippable=skippable)
    found = {tuple(row) for row in options(spec).tolist()}
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    assert found == {tuple(row) for row in every[(legal(every, spec) == every).all(1)].tolist()}


def test_too_many_free_parts_are_said() -> None:
    with pytest.raises(InputError, match=f"at most {MOST} free parts"):
        options(replace(CHAIN, form="free", parts=MOST + 1))


def test_a_limit_at_the_cost_of_a_route_leaves_that_route_open_however_it_is_rounded() -> None:
    cost = NetCost([CostTerms(0.0, (1.0, 48.0))], [None], 0.0, 0.0, 49.0)
    assert 1 / 49 * 49 < 1
    limit = Limit(cost, [replace(CHAIN, parts=2, part_shares=(1 / 49, 48 / 49))], 1 / 49)
    keep, spent = limit.lowered(0, torch.ones(1, 2), limit.start(1, torch.device("cpu")))
    assert keep.tolist() == [[1.0, 0.0]] and spent.least_B.tolist() == [1.0]


def test_a_decision_is_lowered_to_the_dearest_that_fits() -> None:
    cost = NetCost([CostTerms(0.0, (1.0, 2.0, 4.0))], [None], 0.0, 0.0, 7.0)
    limit = Limit(cost, [CHAIN], 4 / 7)
    keep, spent = limit.lowered(0, torch.tensor([[1.0, 1, 1], [1, 0, 0]]), limit.start(2, torch.device("cpu")))
    assert keep.tolist() == [[1, 1, 0], [1, 0, 0]] and spent.least_B.tolist() == [3, 1]


def test_the_limit_is_kept_where_two_units_read_the_same_one() -> None:
    torch.manual_seed(3)
    pairs = [None, *(tuple(map(tuple, (10 * torch.rand(3, 3)).tolist())) for _ in range(2))]
    terms = [CostTerms(1.0, tuple((5 * torch.rand(3)).tolist()), pair) for pair in pairs]
    cost, specs = NetCost(terms, [None, 0, 0], 2.0, 0.5, 50.0), [CHAIN] * 3
    every = torch.stack([torch.stack(route) for route in itertools.product(options(CHAIN), repeat=3)])
    macs = cost(every)
    for most in (float(macs.min()), float(macs.median()), float(macs.max())):
        limit = Limit(cost, specs, most / 50)
        spent, keeps = limit.start(len(every), every.device), []
        for u in range(3):
            keep, spent = limit.lowered(u, every[:, u], spent)
            keeps.append(keep)
        found = torch.stack(keeps, 1)
        assert float(cost(found).max()) <= most * (1 + 1e-9) and torch.allclose(spent.least_B, cost(found))
        assert torch.equal(found[macs <= most], every[macs <= most]), "a route that fits was changed"


def test_as_many_free_parts_as_are_promised_have_tables() -> None:
    wide = replace(CHAIN, form="free", parts=MOST, part_shares=(1 / MOST,) * MOST)
    assert len(options(wide)) == 2 ** (MOST - 1), "the first part always runs"
    limit = Limit(NetCost([CostTerms(0.0, (1.0,) * MOST)], [None], 0.0, 0.0, float(MOST)), [wide], 0.5)
    keep, _ = limit.lowered(0, torch.ones(1, MOST), limit.start(1, torch.device("cpu")))
    assert keep.sum() == MOST // 2


def test_the_numbers_of_an_image_are_those_of_earlier_versions_and_hear_every_value() -> None:
    """A stored mix would else fall on other images."""
    wanted = [[0.390954290, 0.250392133], [0.202860342, 0.235889732]]
    assert draws(torch.tensor([1, 12345]), 3, 2).tolist() == [pytest.approx(row, abs=1e-9) for row in wanted]
    x = pictures(1).repeat(4, 1, 1, 1)
    x[1, 2, 5, 5], x[2, 0, 0, 0], x[3] = 0.75, 0.75, x[0].flip(2)
    assert len(image_hash(x).unique()) == 4
