"""The Q-agent: targets by hand, each image's own loss, and a small world in which the right action is learned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynroute.assembly import inference_parameters
from dynroute.contracts import Advice, Batch, InputError, Output, Trace, UnitSpec
from dynroute.net import RoutedNet
from dynroute.routers import charges
from dynroute.routers.base import classification_loss, stacked
from dynroute.routers.charges import LIMITS
from dynroute.routers.qlearn import QRouter, RnpOptions, RnrOptions, action_costs, action_keeps, phases, random_widths
from dynroute.routers.td import next_values, rewards, td_loss, td_targets
from dynroute.testing import check_router
from tiny import make_backbone, make_net, pictures


def q_loss(out: Output, batch: Batch, options: RnpOptions, alpha: float = 1.0) -> Tensor:
    """The TD loss with a given alpha."""
    loss_B = classification_loss(out.logits_BK.detach(), batch)
    return td_loss(out, rewards(out, batch, alpha, loss_B, options.baseline), options)


NESTED = UnitSpec("n", 4, 4, "nested", False, (0.1, 0.2, 0.3, 0.4))
CHOICE = UnitSpec("c", 4, 3, "choice", False, (0.25, 0.5, 1.0))


# --- the loss, by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "first"),
    [
        (0.0, -0.1 + 0.5 * 5.0),
        (0.7, -0.1 + 0.5 * (0.3 * 5.0 + 0.7 * -1.0)),
        (1.0, -0.1 + 0.5 * -1.0),
    ],
)
def test_targets_of_two_units(trace: float, first: float) -> None:
    q_BUA = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]], requires_grad=True)
    reward_BU = torch.tensor([[-0.1, -1.0]])
    targets = td_targets(next_values({"q": q_BUA}, double=False), reward_BU, gamma=0.5, trace=trace)
    assert not targets.requires_grad
    assert targets[0].tolist() == pytest.approx([first, -1.0])


def test_targets_of_three_units_reach_back() -> None:
    q_BUA = torch.tensor([[[9.0, 9.0], [1.0, 4.0], [2.0, 0.0]]])
    targets = td_targets(q_BUA.max(2).values, torch.tensor([[1.0, 10.0, 100.0]]), gamma=0.5, trace=0.5)
    second = 10 + 0.5 * (0.5 * 2 + 0.5 * 100)
    assert targets[0].tolist() == [1 + 0.5 * (0.5 * 4 + 0.5 * second), second, 100]


def made_up(images: int = 5, units: int = 2) -> tuple[Output, Batch]:
    """An Output as if an agent had decided, and its batch."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(images, units, 3, generator=generator, requires_grad=True)
    action = torch.randint(3, (images, units), generator=generator)
    notes = {"q": q, "action": action, "reward": -0.1 * action.float()}
    logits = torch.randn(images, 4, generator=generator, requires_grad=True)
    out = Output(logits, Trace(torch.ones(images, units, 3), notes), torch.zeros(images))
    labels = torch.arange(images) % 4
    return out, Batch(torch.empty(images, 0), labels, None, torch.arange(images))


def one(out: Output, batch: Batch, i: int) -> tuple[Output, Batch]:
    notes = {name: value[i : i + 1] for name, value in out.trace.notes.items()}
    part = Output(out.logits_BK[i : i + 1], Trace(out.trace.keep_BUG[i : i + 1], notes), out.macs_B[i : i + 1])
    rows = (None if t is None else t[i : i + 1] for t in batch[:4])
    return part, Batch(*rows)  # type: ignore[arg-type, call-arg]


def test_the_loss_by_hand() -> None:
    out, batch = made_up(images=1)
    options = RnpOptions(gamma=0.5, trace=0.0)
    q, action, reward = (out.trace.notes[name][0].detach() for name in ("q", "action", "reward"))
    own = -F.log_softmax(out.logits_BK[0].detach(), 0)[0]
    targets = [reward[0] + 0.5 * q[1].max(), reward[1] - 2.0 * own]
    by_hand = sum((q[u, action[u]] - targets[u]) ** 2 for u in range(2)) / 2
    assert q_loss(out, batch, options, alpha=2.0).item() == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("td", ["mse", "huber"])
def test_errors_are_in_parts_of_the_size_of_an_images_returns(td: str) -> None:
    out, batch = made_up(images=2)
    options = RnpOptions(td=td)
    plain = [q_loss(*one(out, batch, i), options, alpha=0.1).item() for i in (0, 1)]
    size_BU = torch.tensor([1.0, 5.0])[:, None].expand(2, 2)
    sized = Output(out.logits_BK, Trace(out.trace.keep_BUG, out.trace.notes | {"size": size_BU}), out.macs_B)
    alone = [q_loss(*one(sized, batch, i), options, alpha=0.1).item() for i in (0, 1)]
    assert alone[0] == pytest.approx(plain[0]) and alone[1] < plain[1] / 5
    if td == "mse":
        assert alone[1] == pytest.approx(plain[1] / 25)
    assert q_loss(sized, batch, options, alpha=0.1).item() == pytest.approx(sum(alone) / 2)


def test_the_size_of_returns_grows_with_the_charge_and_is_known_only_where_charges_vary() -> None:
    router = QRouter([NESTED], RnpOptions(charge=[0.0, 0.4])).train()
    x = torch.randn(6, 4, 2, 2)
    memory = router.begin(x)
    notes = router.decide(0, x, memory)[0].notes
    assert notes["size"].tolist() == pytest.approx((1 + memory.charge_B).tolist())
    fixed = QRouter([NESTED], RnpOptions()).train()
    assert "size" not in fixed.decide(0, x, fixed.begin(x))[0].notes


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_the_agent_judges_in_fp32_where_the_net_trains_in_bf16(cell: str) -> None:
    router = QRouter([NESTED, NESTED], RnpOptions(cell=cell)).eval()
    x = torch.randn(8, 4, 2, 2)
    judged = []
    for amp in (False, True):
        memory = router.begin(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            first, memory = router.decide(0, x, memory)
            second, _ = router.decide(1, x, memory)
        judged.append(torch.stack([first.notes["q"], second.notes["q"]]))
    assert judged[1].dtype == torch.float32 and torch.equal(*judged)


def test_a_range_of_charges_is_not_trained_with_the_agent_frozen() -> None:
    options = RnpOptions(charge=[0.0, 0.3])
    backbone = make_backbone(unit="channels")
    net = RoutedNet(backbone, QRouter(backbone.specs, options))
    with pytest.raises(InputError, match=r"router\.cnn_epochs=0"):
        list(phases(net, options))


def test_the_terminal_reward_is_each_images_own_loss() -> None:
    out, batch = made_up()
    options = RnpOptions(trace=0.7)
    each = [q_loss(*one(out, batch, i), options).item() for i in range(5)]
    assert q_loss(out, batch, options).item() == pytest.approx(sum(each) / 5, rel=1e-5)
    labels = batch.labels.clone()
    labels[2] = (labels[2] + 1) % 4
    changed = batch._replace(labels=labels)
    after = [q_loss(*one(out, changed, i), options).item() for i in range(5)]
    assert [i for i in range(5) if after[i] != each[i]] == [2]
    assert q_loss(out, changed, options).item() == pytest.approx(sum(after) / 5, rel=1e-5)


def test_the_loss_leaves_its_notes_and_reaches_only_the_action_taken() -> None:
    out, batch = made_up()
    before = out.trace.notes["reward"].clone()
    q_loss(out, batch, RnpOptions()).backward()
    assert torch.equal(out.trace.notes["reward"], before)
    assert out.logits_BK.grad is None
    q, action = out.trace.notes["q"], out.trace.notes["action"]
    assert q.grad is not None
    taken = F.one_hot(action, 3).bool()
    assert bool((q.grad[~taken] == 0).all()) and bool((q.grad[taken] != 0).all())


@pytest.mark.parametrize("name", ["rnp", "rnr"])
def test_the_loss_teaches_the_agent_and_not_the_net(name: str) -> None:
    net = make_net(name, "channels").train()
    out = net(pictures(8))
    batch = Batch(pictures(8), torch.arange(8), None, torch.arange(8))
    q_loss(out, batch, RnpOptions()).backward()
    assert all(p.grad is None for p in net.backbone.parameters())
    assert all(p.grad is not None for p in net.router.parameters())


# --- actions ----------------------------------------------------------------------------------------------------


def test_actions_of_nested_and_of_alternative_parts() -> None:
    assert action_keeps(NESTED).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert action_keeps(CHOICE).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_costs_of_actions() -> None:
    assert action_costs(NESTED, "index").tolist() == [0, 1, 2, 3]  # (i - 1) for i = 1..4
    assert action_costs(NESTED, "share").tolist() == pytest.approx([0.1, 0.3, 0.6, 1.0])
    assert action_costs(CHOICE, "share").tolist() == [0.25, 0.5, 1.0]


def test_the_reward_charges_the_action_taken() -> None:
    router = QRouter([NESTED, NESTED], RnpOptions(charge=[0.2]))
    (decision, _) = router.decide(0, torch.randn(20, 4, 2, 2), router.begin(torch.randn(20, 3, 4, 4)))
    assert torch.allclose(decision.notes["reward"], -0.2 * (decision.keep_BG.sum(1) - 1))


def test_random_widths_are_legal_and_reach_every_width_and_both_ends() -> None:
    torch.manual_seed(0)
    keep_BUG = random_widths([NESTED] * 6)(4000)
    widths_BU = keep_BUG.sum(2)
    assert torch.equal(keep_BUG, keep_BUG.sort(dim=2, descending=True).values)
    assert float(widths_BU.min()) == 1
    shares = torch.stack([(widths_BU == w).float().mean() for w in (1, 2, 3, 4)])
    assert float(shares.min()) > 0.15
    all_narrow, all_wide = ((widths_BU == w).all(1).float().mean() for w in (1, 4))
    assert float(all_narrow) > 0.05 and float(all_wide) > 0.05  # independent draws: 0.0002


def test_free_parts_are_refused() -> None:
    free = UnitSpec("f", 4, 2, "free", True, (0.5, 0.5))
    with pytest.raises(InputError, match=r"backbone\.unit=channels"):
        QRouter([free], RnpOptions())


def test_units_of_different_numbers_of_actions() -> None:
    two = UnitSpec("two", 4, 2, "nested", False, (0.5, 0.5))
    router = QRouter([CHOICE, two], RnpOptions(hidden=8)).train()
    with torch.no_grad():
        for decoder in router.agent.decoders:
            decoder.bias.fill_(-10.0)  # type: ignore[operator, union-attr]
    state, decisions = router.begin(pictures(6)), []
    for u in range(2):
        decision, state = router.decide(u, torch.randn(6, 4, 2, 2), state)
        decisions.append(decision)
    q_BUA = stacked([d.notes["q"] for d in decisions])
    targets = td_targets(q_BUA.max(2).values, torch.zeros(6, 2), gamma=1.0, trace=0.0)
    assert float(targets[:, 0].max()) < -5, "an action that unit 2 does not have was its best"


# --- exploration ------------------------------------------------------------------------------------------------


def chosen(router: QRouter, x: Tensor) -> tuple[Tensor, Tensor]:
    decision, _ = router.decide(0, x, router.begin(x))
    return decision.notes["action"], decision.notes["q"]


def test_epsilon_one_is_uniform_and_zero_is_greedy() -> None:
    torch.manual_seed(0)
    router, x = QRouter([NESTED], RnpOptions()), torch.randn(4000, 4, 2, 2)
    router.epsilon = 1.0
    counts = torch.bincount(chosen(router, x)[0], minlength=4) / 4000
    assert torch.allclose(counts, torch.full((4,), 0.25), atol=0.03)
    router.epsilon = 0.0
    action, q = chosen(router, x)
    assert torch.equal(action, q.argmax(1))


def test_epsilon_half_leaves_half_and_a_quarter_of_the_rest() -> None:
    torch.manual_seed(0)
    router, x = QRouter([NESTED], RnpOptions()), torch.randn(4000, 4, 2, 2)
    router.epsilon = 0.5
    action, q = chosen(router, x)
    assert float((action == q.argmax(1)).float().mean()) == pytest.approx(0.5 + 0.5 / 4, abs=0.03)


def test_eval_never_explores() -> None:
    router, x = QRouter([NESTED], RnpOptions()).eval(), torch.randn(500, 4, 2, 2)
    router.epsilon = 1.0
    action, q = chosen(router, x)
    assert torch.equal(action, q.argmax(1))


@pytest.mark.parametrize("options", [RnpOptions(rounds=2), RnrOptions(rounds=2)])
def test_epsilon_falls_in_the_first_round_and_stays_low(options: RnpOptions) -> None:
    net = make_net("rnp", "channels")
    assert isinstance(net.router, QRouter)
    seen = {}
    for phase in phases(net, options):
        for done in (0.0, 0.5, 1.0):
            if phase.schedule:
                phase.schedule(done)
                seen[phase.name, done] = net.router.epsilon
    assert [seen["agent1", d] for d in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])
    assert [seen["agent2", d] for d in (0.0, 1.0)] == pytest.approx([0.1, 0.1])
    assert [seen["joint", d] for d in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.1, 0.1])


def test_phases_alternate() -> None:
    net = make_net("rnp", "channels")
    order = [(p.name, p.trains) for p in phases(net, RnpOptions(rounds=2))]
    backbone, router = ("backbone",), ("router",)
    assert order == [
        ("pretrain", backbone),
        ("widths", backbone),
        ("agent1", router),
        ("cnn1", backbone),
        ("agent2", router),
        ("cnn2", backbone),
        ("joint", ("backbone", "router")),
    ]


# --- a small world ----------------------------------------------------------------------------------------------


def play(router: QRouter, hard_B: Tensor, loss: float) -> tuple[Output, Batch]:
    """Two units; a hard image loses half of `loss` for each that does not run in full, an easy one nothing.

    Channel 0 shows whether the image is hard, channel 1 how much the unit before has run.
    """
    pixels_BCHW = torch.randn(len(hard_B), 4, 2, 2)
    pixels_BCHW[:, 0] += 2.0 * (2 * hard_B[:, None, None] - 1)
    state, decisions = router.begin(pixels_BCHW), []
    for u in range(2):
        decision, state = router.decide(u, pixels_BCHW, state)
        pixels_BCHW[:, 1] += 3 * decision.keep_BG.mean(1)[:, None, None]
        decisions.append(decision)
    keep_BUG = torch.stack([d.keep_BG for d in decisions], 1)
    notes = {name: torch.stack([d.notes[name] for d in decisions], 1) for name in decisions[0].notes}
    loss_B = loss / 2 * (keep_BUG.mean(2) < 1).sum(1) * hard_B
    logits_B2 = torch.stack(
        [-loss_B.clamp(min=1e-6).expm1().log(), torch.zeros(len(hard_B))], 1
    )  # cross entropy loss_B
    labels = torch.zeros(len(hard_B), dtype=torch.long)
    return Output(logits_B2, Trace(keep_BUG, notes), keep_BUG.sum((1, 2))), Batch(pixels_BCHW, labels, None, labels)


def learned(options: RnpOptions, loss: float, steps: int = 600) -> QRouter:
    torch.manual_seed(0)
    router = QRouter([NESTED, NESTED], options)
    adam = torch.optim.Adam(router.parameters(), lr=5e-3)
    for step in range(steps):
        router.epsilon = max(1 - 2 * step / steps, 0.1)
        value = q_loss(*play(router, torch.arange(128) % 2, loss), options)
        adam.zero_grad()
        value.backward()
        adam.step()
    return router.eval()


def shares(router: QRouter) -> tuple[float, float]:
    """Mean share of the parts run for easy and for hard images."""
    out, _ = play(router, torch.arange(400) % 2, 1.0)
    share_B = out.trace.keep_BUG.mean((1, 2))
    return float(share_B[::2].mean()), float(share_B[1::2].mean())


@pytest.mark.parametrize(
    ("cell", "kind", "trace"), [("rnn", "share", 0.0), ("gru", "index", 0.7), ("lstm", "share", 1.0)]
)
def test_the_agent_learns_which_images_are_hard(cell: str, kind: str, trace: float) -> None:
    charge = 0.2 if kind == "index" else 0.8
    options = RnpOptions(hidden=24, cell=cell, action_cost=kind, charge=[charge], trace=trace)
    easy, hard = shares(learned(options, loss=4.0))
    assert easy < 0.27  # one part of four
    assert hard > 0.95


def test_the_agent_saves_where_the_charge_exceeds_the_loss() -> None:
    easy, hard = shares(learned(RnpOptions(hidden=24, action_cost="share", charge=[2.0]), loss=1.0))
    assert easy < 0.3 and hard < 0.3


def test_a_conditioned_agent_gets_cheaper_with_the_price_inside_and_outside_its_range() -> None:
    options = RnrOptions(hidden=24, charge=[0.1, 2.0])
    router = learned(options, loss=1.5)  # the full unit pays below 0.75 / 0.9
    seen = []
    for price in (-1e4, -0.95, -0.6, 0.6, 0.95, 1e4):
        router.price = price
        seen.append(shares(router)[1])
    assert seen[0] == 1.0 and seen[-1] == 0.25
    assert seen[1] > 0.9 and seen[4] < 0.35, seen
    assert sorted(seen, reverse=True) == pytest.approx(seen, abs=0.02)


def test_charges_are_drawn_from_the_range_in_training_and_set_by_the_dial_in_eval() -> None:
    router = QRouter([NESTED], RnrOptions(charge=[0.1, 0.5]))
    drawn = router.begin(torch.randn(2000, 3, 2, 2)).charge_B
    assert 0.1 <= float(drawn.min()) < 0.11 and 0.49 < float(drawn.max()) <= 0.5
    router.eval()
    for price, asked in ((0.0, 0.3), (0.1, 0.4), (-0.05, 0.25), (9.0, 0.5), (-9.0, 0.1)):
        router.price = price
        assert router.begin(torch.randn(3, 3, 2, 2)).charge_B.tolist() == pytest.approx([asked] * 3)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("charge", [[0.1], [0.0, 0.3]])
def test_every_cell_keeps_the_contract(cell: str, charge: list[float]) -> None:
    torch.manual_seed(0)
    options: Any = RnpOptions(cell=cell, hidden=8, charge=charge)
    check_router(QRouter([NESTED, CHOICE], options))


# --- budgets, alpha, teacher, slow copy ---------------------------------------------------------------------------


def test_alpha_makes_the_mean_loss_one_and_then_stays() -> None:
    router = QRouter([NESTED], RnpOptions(hidden=4)).train()
    torch.manual_seed(0)
    for _ in range(40):
        alpha = router.alpha(0.25 + 0.02 * torch.randn(64))
    assert float(alpha) == pytest.approx(4.0, rel=0.02)
    assert router.alpha(torch.full((8,), 9.0)) == alpha
    assert QRouter([NESTED], RnpOptions(alpha=3.0)).alpha(torch.ones(4)) == 3.0


def test_alpha_survives_a_checkpoint() -> None:
    router = QRouter([NESTED], RnpOptions(hidden=4)).train()
    for _ in range(30):
        alpha = router.alpha(torch.full((4,), 0.5))
    again = QRouter([NESTED], RnpOptions(hidden=4)).train()
    again.load_state_dict(router.state_dict())
    assert again.alpha(torch.full((4,), 7.0)) == alpha


def test_the_teacher_is_a_baseline_of_each_image() -> None:
    out, batch = made_up()
    teacher = torch.randn(5, 4)
    advised = batch._replace(advice=Advice(teacher, 0.0, 2.0))  # no distillation: the losses stay cross entropies
    loss_B = classification_loss(out.logits_BK, advised)
    plain = rewards(out, advised, 2.0, loss_B, baseline=False)
    against = rewards(out, advised, 2.0, loss_B, baseline=True)
    own_B = F.cross_entropy(teacher, batch.labels, reduction="none")
    assert torch.allclose(against[:, -1], plain[:, -1] + 2 * own_B, atol=1e-6)  # near zero, rounding alone
    assert torch.equal(against[:, :-1], plain[:, :-1])
    assert torch.equal(rewards(out, batch, 2.0, loss_B, baseline=True), plain)  # no teacher, no baseline


def test_distillation_by_hand() -> None:
    logits, teacher = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.5]])
    batch = Batch(torch.empty(1, 0), torch.tensor([1]), None, torch.tensor([0]), Advice(teacher, 0.3, 2.0))
    soft = torch.softmax(logits / 2, 1)
    apart = float((0.5 * (0.5 / soft).log()).sum()) * 4
    own = float(F.cross_entropy(logits, torch.tensor([1])))
    assert classification_loss(logits, batch).item() == pytest.approx(0.7 * own + 0.3 * apart, rel=1e-5)


def test_the_slow_copy_gives_the_targets_and_follows() -> None:
    q = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    slow = torch.tensor([[[0.0, 9.0], [7.0, 1.0]]])
    assert next_values({"q": q, "slow": slow}, double=False).tolist() == [[9.0, 7.0]]
    assert next_values({"q": q, "slow": slow}, double=True).tolist() == [[9.0, 1.0]]
    router = QRouter([NESTED], RnpOptions(hidden=4, slow_target=0.9)).train()
    assert router.slow is not None
    start = router.slow.cell.weight_hh.clone()
    with torch.no_grad():
        router.agent.cell.weight_hh += 1.0  # type: ignore[operator]
    router.follow()
    assert torch.allclose(router.slow.cell.weight_hh, start + 0.1, atol=1e-6)  # type: ignore[operator]


def test_the_slow_copy_costs_nothing_at_test_time() -> None:
    body = make_backbone(unit="channels")
    plain, slow = (RoutedNet(body, QRouter(body.specs, RnpOptions(slow_target=value))) for value in (0.0, 0.9))
    assert inference_parameters(plain) == inference_parameters(slow)
    assert plain.router.macs() == slow.router.macs()
    assert all(not p.requires_grad for p in slow.router.slow.parameters())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(("double", "td"), [(False, "huber"), (True, "mse")])
def test_the_agent_also_learns_with_a_slow_copy(double: bool, td: str) -> None:
    options = RnpOptions(
        hidden=24, action_cost="share", charge=[0.8], trace=0.7, slow_target=0.95, double_q=double, td=td
    )
    easy, hard = shares(learned(options, loss=4.0))
    assert easy < 0.3 and hard > 0.9


def test_the_charges_of_budgets_are_corrected_by_what_was_spent() -> None:
    router = QRouter([NESTED], RnrOptions(hidden=4, budget=[0.2, 1.0])).train()
    router.epsilon = 0.0
    before = router.charge_K.clone()
    asked = torch.linspace(0.2, 1.0, 9)
    spent = asked.clone()
    spent[0], spent[-1] = 0.9, 0.4  # the cheapest budget was overspent, the dearest not used
    router.correct_charges(asked, spent, (0.1, 1.0))
    moved = router.charge_K - before
    assert float(moved[0]) > 0 > float(moved[-1])
    assert moved[1:-1].abs().max() == 0
    assert bool((router._charge(asked)[:-1] > router._charge(asked)[1:]).all())


def test_checkpoints_of_before_charges_had_a_sign_open_where_there_is_no_budget() -> None:
    for options, opens in ((RnpOptions(hidden=4), True), (RnrOptions(hidden=4), False)):
        router = QRouter([NESTED], options)
        state = router.state_dict()
        state["log_charge_K"] = state.pop("charge_K")
        if opens:
            router.load_state_dict(state)
        else:
            with pytest.raises(InputError, match="train it anew"):
                router.load_state_dict(state)


def test_a_budget_that_no_charge_makes_true_is_paid_for() -> None:
    router = QRouter([NESTED], RnrOptions(hidden=4, budget=[0.2, 0.9])).train()
    router.epsilon = 0.0
    asked = torch.full((8,), 0.9)
    charges = []
    for _ in range(4000):
        router.correct_charges(asked, torch.full((8,), 0.6), (0.1, 1.0))
        charges.append(float(router._charge(asked[:1])))
    assert charges == sorted(charges, reverse=True)
    assert charges[0] > 0 and charges[-1] == pytest.approx(-LIMITS[1], rel=1e-4)
    memory = router.begin(torch.randn(3, 3, 4, 4))._replace(charge_B=torch.tensor([-1.0, 0.0, 1.0]))
    far = math.asinh(1 / 2e-3)
    assert router.told_of(memory)[:, 0].tolist() == pytest.approx(
        [(place - 4) / 3 for place in (-far, 0.0, far)], rel=1e-4
    )


def test_a_budget_is_learned_and_asked_by_the_dial() -> None:
    """Half of the images are hard: a share of 0.25 buys nothing, 0.62 the hard ones, 1 everything."""
    options = RnrOptions(hidden=24, budget=[0.3, 0.9])
    torch.manual_seed(0)
    router = QRouter([NESTED, NESTED], options)
    adam = torch.optim.Adam(router.parameters(), lr=5e-3)
    for step in range(900):
        router.epsilon = max(1 - 2 * step / 900, 0.1)
        out, batch = play(router, torch.arange(128) % 2, 3.0)
        adam.zero_grad()
        q_loss(out, batch, options).backward()
        adam.step()
        spent_B = router.keeps(out.trace.notes["greedy"]).mean((1, 2))
        router.correct_charges(out.trace.notes["asked"][:, 0], spent_B, (0.25, 1.0))
    router.eval()
    reached = []
    for price in (-1e4, -0.25, 0.0, 0.25, 1e4):
        router.price = price
        reached.append(sum(shares(router)) / 2)
    assert sorted(reached, reverse=True) == pytest.approx(reached, abs=0.02)
    assert reached[0] == 1.0 and reached[-1] == 0.25
    router.price = 0.0
    easy, hard = shares(router)
    assert hard > easy + 0.3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"budget": [0.2, 0.8], "charge": [0.1]}, "exclude each other"),
        ({"budget": [0.8, 0.2]}, r"router\.budget"),
        ({"budget": [0.5]}, r"router\.budget"),
        ({"double_q": True}, r"router\.slow_target"),
        ({"td": "l1"}, r"router\.td"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        RnpOptions(**wrong)


def test_independent_widths_have_no_common_level() -> None:
    torch.manual_seed(0)
    widths_BU = random_widths([NESTED] * 6, "independent")(4000).sum(2)
    assert torch.allclose(
        torch.stack([(widths_BU == w).float().mean() for w in (1, 2, 3, 4)]), torch.tensor(0.25), atol=0.02
    )
    assert abs(float(torch.corrcoef(widths_BU[:, :2].T)[0, 1])) < 0.05


@pytest.mark.parametrize("double", [True, False])
def test_the_loss_with_a_slow_copy_by_hand(double: bool) -> None:
    out, batch = made_up(images=1)
    slow = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]])
    best = out.trace.notes["q"].detach()[0, 1].argmin()
    slow[0, 1, best] = 9.0  # the slow copy's best is the agent's worst
    out = out._replace(trace=out.trace._replace(notes=out.trace.notes | {"slow": slow}))
    options = RnpOptions(gamma=0.5, trace=0.0, slow_target=0.9, double_q=double)
    q, action, reward = (out.trace.notes[name][0].detach() for name in ("q", "action", "reward"))
    worth = slow[0, 1, q[1].argmax()] if double else slow[0, 1].max()
    own = -F.log_softmax(out.logits_BK[0].detach(), 0)[0]
    targets = [reward[0] + 0.5 * worth, reward[1] - own]
    by_hand = sum((q[u, action[u]] - targets[u]) ** 2 for u in range(2)) / 2
    assert q_loss(out, batch, options).item() == pytest.approx(float(by_hand), rel=1e-5)


def test_a_charge_moves_by_a_tenth_of_what_was_missed_less_while_exploring_and_within_limits() -> None:
    start = charges.first_table()
    assert charges.unscaled(start[[0, -1]]).tolist() == pytest.approx([0.3, 0.01])
    for strength in (1.0, 0.5, 0.0):
        moved = start.clone()
        charges.correct(moved, torch.full_like(start, 0.2), strength)
        assert torch.allclose(moved - start, torch.tensor(0.1 * 0.2 * strength), atol=1e-6)
    charges.correct(moved, torch.full_like(start, 1e4), 1.0)
    assert charges.unscaled(moved).tolist() == pytest.approx([LIMITS[1]] * len(start))


def test_charges_move_less_while_the_agent_explores() -> None:
    router = QRouter([NESTED], RnrOptions(hidden=4, budget=[0.2, 1.0])).train()
    router.epsilon = 1.0
    before = router.charge_K.clone()
    router.correct_charges(torch.full((8,), 0.2), torch.full((8,), 0.9), (0.1, 1.0))
    assert torch.equal(router.charge_K, before)
