"""A range of budgets in one training: its table by hand, gates that are told their target, and both routers that use it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dynroute.contracts import Batch, InputError
from dynroute.net import RoutedNet
from dynroute.routers import ROUTERS
from dynroute.routers.budget import KNOTS, Range, check_budget
from dynroute.routers.gates import SLACK, DmnnOptions, GateRouter, Memory, phases
from dynroute.testing import check_router
from tiny import make_backbone, pictures

BUDGET = [0.3, 0.9]


def gated(**options: Any) -> RoutedNet:
    torch.manual_seed(0)
    backbone = make_backbone(unit="paths")
    return RoutedNet(backbone, GateRouter(backbone.specs, DmnnOptions(budget=BUDGET, **options)))


@contextmanager
def monkeypatched_draw(asked_B: Tensor) -> Iterator[None]:
    """Every image is asked for what stands here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Range, "draw", lambda *_: asked_B)
        yield


def batch(images: int) -> Batch:
    return Batch(pictures(images), torch.arange(images) % 10, None, torch.arange(images))


# --- the range --------------------------------------------------------------------------------------------------


def test_the_table_is_read_between_its_knots() -> None:
    table = torch.arange(KNOTS).float() ** 2
    asked = torch.tensor([0.2, 0.8, 0.2 + 0.6 * 2.5 / (KNOTS - 1)])
    assert Range(0.2, 0.8).read(table, asked).tolist() == pytest.approx([0.0, (KNOTS - 1) ** 2, 6.5])


def test_what_is_overspent_is_counted_at_the_nearest_knots() -> None:
    asked = torch.tensor([0.2, 0.8, 0.8, 0.8])
    spent = torch.tensor([0.3, 0.7, 0.9, 1.0])
    missed = Range(0.2, 0.8).overspent(asked, spent, (0.1, 1.0))
    assert missed.tolist() == pytest.approx([0.1, *[0.0] * (KNOTS - 2), 0.2 / 3])


def test_an_image_at_an_end_stop_says_nothing() -> None:
    asked, spent = torch.tensor([0.2, 0.8]), torch.tensor([0.3, 0.7])
    assert not Range(0.2, 0.8).overspent(asked, spent, (0.3, 0.7)).any()
    assert Range(0.2, 0.8).overspent(spent, asked, (0.2, 0.8)).any()  # on the way back they do


@pytest.mark.parametrize(
    ("price", "budget", "charge"),
    [(0.0, (0.6, 0.0), (0.6, 0.0)), (0.1, (0.5, 0.0), (0.7, 0.0)), (0.5, (0.3, 0.2), (0.9, 0.2)), (-9, (0.9, -8.7), (0.3, -8.7))],
)  # fmt: skip
def test_the_dial_moves_within_the_range_and_charges_beyond(price: float, budget: Any, charge: Any) -> None:
    assert Range(0.3, 0.9).dial(price) == pytest.approx(budget)
    assert Range(0.3, 0.9).dial(price, falls=False) == pytest.approx(charge)


@pytest.mark.parametrize("budget", [[], [0.5], [0.5, 0.5], [0.0, 0.5], [0.5, 1.1], [0.2, 0.4, 0.6]])
def test_a_budget_is_two_shares(budget: list[float]) -> None:
    for options in (DmnnOptions, ROUTERS["rnp"].options, ROUTERS["rnr"].options):
        with pytest.raises(InputError, match="budget must be"):
            options(budget=budget)
    check_budget(None)


def test_an_image_that_runs_several_times_is_asked_once_in_each_stretch_of_the_range() -> None:
    torch.manual_seed(0)
    asked_PB = Range(0.3, 0.9).draw(40, torch.device("cpu"), 4).view(4, 10)
    assert ((asked_PB - 0.3) / 0.6 * 4).floor().sort(0).values.tolist() == [[float(p)] * 10 for p in range(4)]
    assert len({tuple(order) for order in asked_PB.argsort(0).T.tolist()}) > 3, "in an order of each image's own"
    assert len(Range(0.3, 0.9).draw(7, torch.device("cpu"), 4)) == 7


@pytest.mark.parametrize("name", ["dmnn", "rnp", "rnr"])
def test_the_budgets_of_an_image_are_so_many_passes_whose_losses_add_up(name: str) -> None:
    method, told = ROUTERS[name], batch(24).repeated(3)

    def steps_of(budgets: int) -> dict[str, dict[str, Tensor]]:
        """The terms of each learned phase for the same images, routes and budgets."""
        torch.manual_seed(0)
        backbone = make_backbone(unit="paths" if name == "dmnn" else "channels")
        learning: dict[str, Any] = {"resource": "flops"} if name == "dmnn" else {"cnn_epochs": 0, "joint_epochs": 1}
        options = method.options(budget=BUDGET, budgets_per_image=budgets, **learning)
        net = RoutedNet(backbone, method.router(backbone.specs, options, 0))
        made = [phase for phase in method.phases(net, options) if "router" in phase.trains]
        assert {phase.passes for phase in made} == {budgets}
        drawn = Range(0.3, 0.9).draw(72, torch.device("cpu"), 3)
        with monkeypatched_draw(drawn):
            out = net(told.images)
        if budgets == 3:
            place_PB = (net(told.images).trace.notes["asked"][:, 0].view(3, 24) - 0.3) / 0.6
            assert (place_PB * 3).floor().sort(0).values.tolist() == [[float(p)] * 24 for p in range(3)]
        return {phase.name: phase.loss(out, told) for phase in made}

    once, thrice = steps_of(1), steps_of(3)
    for phase, terms in once.items():
        for term, value in terms.items():
            if term != "loss_resource":  # the groups of DMNN's are others: of its own test
                times = 1 if term.startswith("note_") else 3
                assert thrice[phase][term].item() == pytest.approx(times * value.item(), rel=1e-4), (phase, term)


def test_the_resource_loss_has_as_many_groups_for_every_pass() -> None:
    net = gated(resource="flops", resource_weight=3.0, budgets_per_image=3)
    told = batch(32).repeated(3)
    out = net(told.images)
    loss = next(phases(net, net.router.options)).loss(out, told)["loss_resource"]  # type: ignore[arg-type]
    told_B = out.trace.notes["told"][:, 0]
    by_hand = 0.0
    for group in told_B.argsort().chunk(12):
        share = float(out.macs_B[group].detach().mean()) / net.cost.dense
        by_hand += 3 * 3 * (share - float(told_B[group].mean())) ** 2 / 12
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_what_is_heard_of_a_narrow_range_stays_small() -> None:
    ends = torch.tensor([0.3, 0.9])
    assert Range(0.3, 0.9).heard(ends).tolist() == pytest.approx([-1.0, 1.0])
    assert Range(0.59, 0.61).heard(torch.tensor([0.4, 0.6, 0.8])).tolist() == pytest.approx([-2.0, 0.0, 2.0], abs=1e-5)


def test_several_budgets_an_image_need_a_range() -> None:
    for name in ("dmnn", "rnp"):
        with pytest.raises(InputError, match=r"budgets_per_image draws from router\.budget"):
            ROUTERS[name].options(budgets_per_image=2)
        for wrong in (0, 65):
            with pytest.raises(InputError, match="budgets_per_image must lie"):
                ROUTERS[name].options(budget=BUDGET, budgets_per_image=wrong)


# --- gates ------------------------------------------------------------------------------------------------------


def test_a_budget_excludes_targets() -> None:
    for other in ({"target": 0.4}, {"targets": [0.5] * 3}, {"open_at_start": 0.5}):
        with pytest.raises(InputError, match="excludes"):
            DmnnOptions(budget=BUDGET, **other)  # type: ignore[arg-type]


def test_told_gates_keep_the_contract() -> None:
    router = gated().router
    with torch.no_grad():
        for gate in router.gates:  # type: ignore[union-attr]
            gate.weight.normal_()  # type: ignore[union-attr, operator]
    check_router(router)
    plain = GateRouter(router.specs, DmnnOptions())
    assert router.macs() == plain.macs(), "what is told stands in biases of the deployed form"


def test_training_asks_every_image_for_its_own_share_and_eval_for_the_dials() -> None:
    net = gated()
    notes = net(pictures(64)).trace.notes
    asked_B = notes["asked"][:, 0]
    assert float(asked_B.min()) >= 0.3 and float(asked_B.max()) <= 0.9 and len(asked_B.unique()) == 64
    assert torch.equal(notes["asked"], asked_B[:, None].expand(-1, 3))
    router = net.eval().router
    for price, asked in ((0.0, 0.6), (0.2, 0.4), (5.0, 0.3), (-5.0, 0.9)):
        router.price = price
        memory = router.begin(pictures(2))
        assert memory.asked_B.tolist() == pytest.approx([asked] * 2)
        assert memory.told_B.tolist() == pytest.approx([asked] * 2)


def test_the_target_reaches_the_gates() -> None:
    router = gated().eval().router
    x = torch.randn(2, router.specs[0].in_channels, 4, 4)
    with torch.no_grad():
        for gate in router.gates:  # type: ignore[union-attr]
            gate.weight.normal_()  # type: ignore[union-attr, operator]
    seen: list[Tensor] = []
    for price in (-0.3, 0.3):
        router.price = price
        seen.append(router.decide(0, x, router.begin(x))[0].notes["logits"])
    assert not torch.allclose(*seen)


def test_untrained_gates_open_one_after_another_as_the_budget_grows() -> None:
    net = gated().eval()
    with torch.no_grad():
        for gate in net.router.gates:  # type: ignore[union-attr]
            gate.weight.zero_()  # type: ignore[union-attr, operator]
    parts = sum(spec.parts for spec in net.router.specs)
    opened = []
    for place in range(parts + 1):
        asked_B = torch.full((1,), place / parts)
        told = [
            net.router.decide(u, torch.zeros(1, spec.in_channels, 2, 2), Memory(None, asked_B, asked_B))
            for u, spec in enumerate(net.router.specs)
        ]
        opened.append(torch.stack([decision.notes["logits"][0] > 0 for decision, _ in told]))
    assert [int(keep_UG.sum()) for keep_UG in opened] == list(range(parts + 1))
    assert all(bool((more_UG >= less_UG).all()) for less_UG, more_UG in itertools.pairwise(opened))
    first_of_all_UG = opened[len(net.router.specs)]
    assert bool(first_of_all_UG[:, 0].all())


def test_the_flops_term_alone_leaves_open_which_units_spend_it() -> None:
    net = gated(resource="flops", resource_weight=3.0)
    out = net(pictures(64))
    loss = next(phases(net, net.router.options)).loss(out, batch(64))["loss_resource"]  # type: ignore[arg-type]
    told_B = out.trace.notes["told"][:, 0]
    by_hand = 0.0
    for group in told_B.argsort().chunk(4):
        share = float(out.macs_B[group].detach().mean()) / net.cost.dense
        by_hand += 3 * (share - float(told_B[group].mean())) ** 2 / 4
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_a_last_minibatch_of_few_images_has_fewer_groups(images: int) -> None:
    net = gated(resource="flops")
    out = net(pictures(images))
    loss = next(phases(net, net.router.options)).loss(out, batch(images))["loss_resource"]  # type: ignore[arg-type]
    assert bool(loss.isfinite())


def test_the_resource_loss_holds_each_group_to_its_own_mean_target() -> None:
    net = gated(resource_weight=1.0)
    loss = next(phases(net, net.router.options)).loss  # type: ignore[arg-type]
    out = net(pictures(64))
    told_B, keep_BUG = out.trace.notes["told"][:, 0], out.trace.keep_BUG.detach()
    by_hand = 0.0
    for group in told_B.argsort().chunk(4):
        target = float(told_B[group].mean())
        by_hand += float((keep_BUG[group].mean((0, 2)) - target).square().sum()) / 4
        by_hand += (float(out.macs_B[group].detach().mean()) / net.cost.dense - target) ** 2 / 4
    assert loss(out, batch(64))["loss_resource"].item() == pytest.approx(by_hand, rel=1e-5)


def test_targets_fall_where_the_gates_overspend_and_never_run_away() -> None:
    net = gated()
    for gate in net.router.gates:  # type: ignore[union-attr]
        gate.bias.data.view(-1, 2)[:, 1] = 9.0  # type: ignore[union-attr, operator]  # open: every budget is overspent
    phase, start = next(phases(net, net.router.options)), net.router.told_K.clone()  # type: ignore[arg-type, operator]
    assert phase.target == pytest.approx(0.6)
    out = net(pictures(64))
    terms = phase.loss(out, batch(64))
    assert bool((net.router.told_K < start).all())  # type: ignore[operator]
    assert float(terms["note_target_low"]) == float(net.router.told_K[0])  # type: ignore[index]
    for _ in range(400):
        phase.loss(out, batch(64))
    assert torch.allclose(net.router.told_K, start - SLACK)  # type: ignore[arg-type]


def test_a_knot_far_from_an_image_hears_less_of_it() -> None:
    asked = torch.tensor([0.2 + 0.6 * 2.25 / (KNOTS - 1)])
    missed = Range(0.2, 0.8).overspent(asked, asked + 0.2, (0.1, 1.0))
    assert missed.tolist() == pytest.approx([0.0, 0.0, 0.15, 0.05, *[0.0] * (KNOTS - 4)])


def test_the_dense_net_and_64_budgets_may_be_asked_for() -> None:
    check_budget([0.2, 1.0], 64)
