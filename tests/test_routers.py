"""Every router keeps the contract, alone and in a net; mutants that break one promise each are caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynroute.contracts import Decision, InputError, UnitSpec
from dynroute.routers import ROUTERS, Router, State, legal, ranged
from dynroute.routers.qlearn import RnpOptions, random_widths
from dynroute.routers.static import RandomOptions, RandomRouter, StaticOptions, StaticRouter, phases
from dynroute.testing import check_agreement, check_router, patterns, random_routes
from tiny import PAIRS, make_backbone, make_net, make_router, pictures

FREE = [UnitSpec(f"u{i}", 4, 4, "free", True, (0.25,) * 4) for i in range(3)]
NESTED = [UnitSpec(f"u{i}", 4, 4, "nested", False, (0.25,) * 4) for i in range(3)]


def decisions(router: Router, features: list[Tensor]) -> Tensor:
    """keep_BUG for given feature maps."""
    state, keeps = router.begin(features[0]), []
    for u, x in enumerate(features):
        decision, state = router.decide(u, x, state)
        keeps.append(decision.keep_BG)
    return torch.stack(keeps, 1)


def maps(specs: list[UnitSpec], images: int = 64) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(images, s.in_channels, 3, 3) for s in specs]


@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_every_router_keeps_its_contract(name: str, unit: str) -> None:
    torch.manual_seed(0)
    specs = make_backbone(unit=unit).specs
    check_router(make_router(name, specs))


@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_every_router_agrees_with_the_fast_run(name: str, unit: str) -> None:
    check_agreement(make_net(name, unit), pictures(4))


@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_routes_and_logits_do_not_depend_on_the_batch(name: str, unit: str) -> None:
    net, x = make_net(name, unit), pictures(8)
    with torch.no_grad():
        together, alone = net(x), [net(x[i : i + 1]) for i in range(8)]
    assert torch.equal(together.trace.keep_BUG, torch.cat([out.trace.keep_BUG for out in alone]))
    assert torch.allclose(together.logits_BK, torch.cat([out.logits_BK for out in alone]), atol=1e-5)


@pytest.mark.parametrize(("name", "unit"), [pair for pair in PAIRS if pair[0] != "rnr"])  # rnr: see test_qlearn
def test_a_higher_price_is_never_dearer(name: str, unit: str) -> None:
    torch.manual_seed(1)
    specs = make_backbone(unit=unit).specs
    router, features = make_router(name, specs).eval(), maps(specs)
    low, high = router.price_limits
    share_UG = torch.tensor([spec.part_shares for spec in specs])
    kept = []
    for price in [low, -3, -1, -0.5, -0.1, -0.01, 0.0, 0.01, 0.1, 0.5, 1, 3, high]:
        router.price = price
        kept.append((decisions(router, features) * share_UG).sum((1, 2)))
    steps = torch.stack(kept)
    assert bool((steps[1:] <= steps[:-1] + 1e-6).all()), "an image got more at a higher price"
    assert float(steps[0].mean()) > float(steps[-1].mean())


def test_the_end_stops_of_the_dial_are_the_ends_of_the_net() -> None:
    for name, unit in PAIRS:
        net, x = make_net(name, unit), pictures(4)
        shares = []
        for end in net.router.price_limits:
            net.router.price = end
            shares.append(float(net(x).macs_B.mean()) / net.cost.dense)
        assert shares == pytest.approx(list(net.span())[::-1]), (name, unit)


# --- controls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.0, 0.1, 0.3, 0.5, 0.55, 0.75, 0.9, 1.0])
def test_a_static_width_between_whole_parts_is_spread_over_the_units(width: float) -> None:
    specs = FREE * 4
    router = StaticRouter(specs, StaticOptions(width=width)).eval()
    per_unit = decisions(router, maps(specs, 2)).sum(2)[0]
    assert abs(float(per_unit.sum()) - 4 * width * len(specs)) < 1  # to within one part of one unit
    assert float(per_unit.max() - per_unit.min()) <= 1


def test_a_static_router_is_the_same_for_every_image() -> None:
    keep = decisions(StaticRouter(NESTED, StaticOptions(width=0.5)), maps(NESTED))
    assert torch.equal(keep, torch.tensor([1.0, 1, 0, 0]).expand(64, 3, 4))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_random_parts_run_at_their_rate(rate: float, mode: bool) -> None:
    router = RandomRouter(FREE, RandomOptions(rate=rate)).train(mode)
    keep_BUG = decisions(router, maps(FREE, 2000))
    assert torch.allclose(keep_BUG.mean(0), torch.full((3, 4), rate), atol=0.05)
    covariance = torch.cov(keep_BUG.flatten(1).T)
    assert float((covariance - covariance.diag().diag()).abs().max()) < 0.04, "draws of parts or units are linked"


def test_random_routes_are_redrawn_in_training_only() -> None:
    router, features = RandomRouter(FREE, RandomOptions()), maps(FREE)
    assert not torch.equal(decisions(router, features), decisions(router, features))
    router.eval()
    assert torch.equal(decisions(router, features), decisions(router, features))


@pytest.mark.parametrize("name", ["static", "random"])
def test_controls_train_the_backbone_alone(name: str) -> None:
    net = make_net(name, "paths")
    (phase,) = phases(net, ROUTERS[name].options())
    assert phase.trains == ("backbone",)
    assert (phase.routes is None) == (name == "static")
    if phase.routes:
        torch.manual_seed(0)
        keep_BUG = phase.routes(2000)
        assert keep_BUG.shape == (2000, 3, 2)
        assert float(keep_BUG.mean()) == pytest.approx(0.5, abs=0.03)
        assert not torch.equal(keep_BUG, phase.routes(2000))


# --- legal keeps ------------------------------------------------------------------------------------------------


def test_legal_sorts_and_fills() -> None:
    keep = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0]])
    assert legal(keep, NESTED[0]).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert legal(keep, FREE[0]).tolist() == keep.tolist()
    needed = FREE[0].__class__("u", 4, 4, "free", False, (0.25,) * 4)
    assert legal(keep, needed).tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("form", "skippable", "count"), [("nested", False, 3), ("nested", True, 4), ("choice", True, 3), ("free", True, 8)]
)
def test_patterns_are_all_legal_keeps(form: Any, skippable: bool, count: int) -> None:
    spec = UnitSpec("u", 4, 3, form, skippable, (0.2, 0.3, 0.5))
    assert len(set(patterns(spec))) == count


def test_ranged_refuses_nan() -> None:
    ranged("x", 1.0, 0.0, 1.0)
    with pytest.raises(InputError, match="x must lie between 0 and 1, not nan"):
        ranged("x", float("nan"), 0.0, 1.0)


# --- mutants ----------------------------------------------------------------------------------------------------


class Changed(StaticRouter):
    """A static router with its keeps changed by a function of (keep, features)."""

    change: Callable[[Tensor, Tensor], Tensor]

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        decision, state = super().decide(u, x_BCHW, state)
        return decision._replace(keep_BG=type(self).change(decision.keep_BG, x_BCHW)), state


class Noisy(Changed):
    change = staticmethod(lambda keep, x: (torch.rand_like(keep) < 0.5).float())


class BatchWise(Changed):
    change = staticmethod(lambda keep, x: (x.mean((2, 3)) > x.mean()).float())


class Half(Changed):
    change = staticmethod(lambda keep, x: keep * 0.5)


class TooMany(Changed):
    change = staticmethod(lambda keep, x: torch.cat([keep, keep], 1))


class Reversed(Changed):
    change = staticmethod(lambda keep, x: 1 - keep)


class Suffix(Changed):
    change = staticmethod(lambda keep, x: torch.cat([torch.zeros_like(keep[:, :1]), torch.ones_like(keep[:, 1:])], 1))


class ExploresAlways(RandomRouter):
    """Forgets that eval() is deterministic."""

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        self.training = True
        return super().decide(u, x_BCHW, state)


class Miscounted(StaticRouter):
    def macs(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("mutant", "specs", "message"),
    [
        (Noisy, FREE, "different routes for the same images"),
        (ExploresAlways, FREE, "different routes for the same images"),
        (BatchWise, FREE, "depends on the other images"),
        (Half, FREE, "must be 0 or 1"),
        (TooMany, FREE, "keep has 8 parts"),
        (Suffix, NESTED, "not legal for form 'nested'"),
        (Reversed, FREE, "higher price"),
        (Miscounted, FREE, "macs\\(\\) says 1"),
    ],
)
def test_check_router_catches(mutant: Callable[..., Router], specs: list[UnitSpec], message: str) -> None:
    torch.manual_seed(0)
    options = RandomOptions() if mutant is ExploresAlways else StaticOptions()
    with pytest.raises(AssertionError, match=message):
        check_router(mutant(specs, options))


@pytest.mark.parametrize("pair", [("dmnn", "paths"), ("rnp", "channels"), ("rnr", "channels")])
@pytest.mark.parametrize("error", [-1.0, 1.0])
def test_check_router_catches_a_miscounted_learned_router(pair: tuple[str, str], error: float) -> None:
    router = make_router(pair[0], make_backbone(unit=pair[1]).specs)
    told = router.macs() + error
    router.macs = lambda: told  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="macs\\(\\) says"):
        check_router(router)


# --- units of different numbers of parts --------------------------------------------------------------------------


def test_training_routes_of_units_with_different_parts() -> None:
    specs = [UnitSpec("a", 4, 2, "nested", False, (0.5, 0.5)), UnitSpec("b", 4, 3, "nested", False, (0.2, 0.3, 0.5))]
    keep_BUG = random_widths(specs)(100)
    assert keep_BUG.shape == (100, 2, 3)
    assert float(keep_BUG[:, 0, 2].max()) == 0
    assert random_routes(specs, 5).shape == (5, 2, 3)


@pytest.mark.parametrize(
    "options", [{"cell": "mlp"}, {"action_cost": "macs"}, {"charge": [0.3, 0.1]}, {"charge": [-1.0]}]
)
def test_q_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"router.{next(iter(options))}"):
        RnpOptions(**options)
