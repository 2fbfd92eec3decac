"""Gates of DMNN: hard forward with a soft gradient, the losses by hand, and what the options switch off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynroute.contracts import Batch, InputError, Output, Trace, UnitSpec
from dynroute.net import RoutedNet
from dynroute.optim import OptimOptions, learning_curve, phase_curve
from dynroute.routers import Phase, cross_entropy
from dynroute.routers.gates import (
    DmnnOptions,
    GateRouter,
    Memory,
    category_loss,
    category_weight,
    phases,
    resource_loss,
)
from dynroute.testing import count_macs
from tiny import make_net, pictures

SPEC = UnitSpec("u", 4, 2, "free", True, (0.5, 0.5), 1, 3)
SPECS = [
    SPEC,
    replace(SPEC, in_channels=8, stage=2),
    replace(SPEC, in_channels=16, parts=3, part_shares=(0.5, 0.3, 0.2), stage=3),
]


def run(router: GateRouter, images: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state, keeps = router.begin(torch.empty(images, 0)), []
    for u, spec in enumerate(router.specs):
        decision, state = router.decide(u, torch.randn(images, spec.in_channels, 3, 3, generator=generator), state)
        keeps.append(decision.keep_BG)
    return keeps


# --- straight-through -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(0.05, 5), st.integers(0, 1000))
def test_gates_are_exactly_zero_or_one_with_the_gradient_of_the_soft_ones(
    values: list[float], temperature: float, seed: int
) -> None:
    router = GateRouter([SPEC], DmnnOptions(temperature=temperature))
    logits = torch.tensor([values], requires_grad=True)
    torch.manual_seed(seed)
    keep = router._sample(logits)
    assert bool(((keep == 0) | (keep == 1)).all())
    weight = torch.arange(1.0, len(values) + 1)
    (keep * weight).sum().backward()
    soft_logits = torch.tensor([values], requires_grad=True)
    torch.manual_seed(seed)
    noise = torch.rand_like(soft_logits).clamp(1e-6, 1 - 1e-6).logit()
    soft = torch.sigmoid((soft_logits + noise) / temperature)
    (soft * weight).sum().backward()
    assert logits.grad is not None and soft_logits.grad is not None
    assert torch.allclose(logits.grad, soft_logits.grad)
    assert torch.equal(keep.detach(), (soft > 0.5).float())


def test_a_gate_learns_from_the_loss_of_the_net() -> None:
    net = make_net("dmnn", "paths").train()
    net(pictures(8)).logits_BK.square().sum().backward()
    assert all(gate.weight.grad is not None and float(gate.weight.grad.abs().sum()) > 0 for gate in net.router.gates)  # type: ignore[union-attr]


def test_eval_has_no_noise_and_train_has() -> None:
    torch.manual_seed(0)
    router = GateRouter(SPECS, DmnnOptions(open_at_start=0.5))
    assert not all(torch.equal(a, b) for a, b in zip(run(router), run(router), strict=True))
    router.eval()
    assert all(torch.equal(a, b) for a, b in zip(run(router), run(router), strict=True))


@pytest.mark.parametrize("probability", [0.3, 0.87])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_gates_start_open_with_the_probability_asked_for(probability: float, temperature: float) -> None:
    torch.manual_seed(0)
    router = GateRouter(SPECS, DmnnOptions(open_at_start=probability, temperature=temperature))
    rates = torch.cat([keep.mean(0) for keep in run(router, images=4000)])
    assert torch.allclose(rates, torch.full_like(rates, probability), atol=0.03)


def test_a_gate_opens_in_eval_where_its_open_logit_wins_by_the_price() -> None:
    router = GateRouter([replace(SPEC, part_shares=(0.8, 0.2))], DmnnOptions()).eval()
    with torch.no_grad():
        router.gates[0].weight.zero_()  # type: ignore[operator, union-attr]
        router.gates[0].bias.copy_(torch.tensor([0.0, 0.4, 1.0, 1.4]))  # type: ignore[operator, union-attr]
    seen = []
    for price in (0.0, 0.49, 0.51, 1.99, 2.01):
        router.price = price
        seen.append(run(router, 1)[0][0].tolist())
    assert seen == [[1, 1], [1, 1], [0, 1], [0, 1], [0, 0]]


# --- losses -----------------------------------------------------------------------------------------------------


def output(keep_BUG: Tensor, macs: list[float], notes: dict[str, Tensor] | None = None) -> Output:
    return Output(torch.zeros(len(keep_BUG), 3), Trace(keep_BUG, notes or {}), torch.tensor(macs, dtype=torch.float64))


def test_the_resource_loss_by_hand() -> None:
    keep_BUG = torch.tensor([[[1.0, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # unit 1 has two parts, unit 2 three
    loss = resource_loss(output(keep_BUG, [30.0, 50.0]), torch.tensor([2, 3]), 0.5, 100.0)
    by_hand = (3 / 4 - 0.5) ** 2 + (4 / 6 - 0.5) ** 2 + (0.4 - 0.5) ** 2
    assert float(loss) == pytest.approx(by_hand)


def test_the_resource_loss_is_zero_at_the_target_and_pulls_towards_it() -> None:
    half = torch.tensor([[[1.0, 0]], [[0, 1]]])
    assert float(resource_loss(output(half, [50.0, 50.0]), torch.tensor([2]), 0.5, 100.0)) == 0
    for rate, sign in ((1.0, 1.0), (0.0, -1.0)):
        keep = torch.full((2, 1, 2), rate, requires_grad=True)
        macs = keep.sum((1, 2)).double() * 50
        resource_loss(Output(torch.zeros(2, 3), Trace(keep, {}), macs), torch.tensor([2]), 0.5, 100.0).backward()
        assert keep.grad is not None
        assert bool((keep.grad.sign() == sign).all())


def test_category_weights_by_stage() -> None:
    four, three = ([category_weight(replace(SPEC, stage=s, stages=n)) for s in range(1, n + 1)] for n in (4, 3))
    assert four == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert three == pytest.approx([1e-3, 1e-2, 1e-1])


def test_the_category_loss_by_hand() -> None:
    logits_BUS = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [3.0, 0.0]]])
    superclasses = torch.tensor([0, 1])

    def ce(logits: list[float], label: int) -> float:
        return float(torch.tensor(logits).logsumexp(0) - logits[label])

    out = output(torch.ones(2, 2, 2), [0.0, 0.0], {"category": logits_BUS})
    by_hand = 0.01 * (ce([2, 0], 0) + ce([0, 0], 1)) / 2 + 0.1 * (ce([0, 1], 0) + ce([3, 0], 1)) / 2
    assert float(category_loss(out, superclasses, torch.tensor([0.01, 0.1]))) == pytest.approx(by_hand)


def joint_terms(superclasses: int, options: DmnnOptions, labels: bool = True) -> tuple[dict[str, Tensor], RoutedNet]:
    net = make_net("dmnn", "paths")
    net = RoutedNet(net.backbone, GateRouter(net.backbone.specs, options, superclasses)).train()
    (phase,) = phases(net, options)
    assert phase.trains == ("backbone", "router")
    x = pictures(4)
    batch = Batch(x, torch.arange(4), torch.arange(4) % 2 if labels else None, torch.arange(4))
    return phase.loss(net(x), batch), net


def test_the_joint_loss_has_three_terms() -> None:
    terms, net = joint_terms(2, DmnnOptions(resource_weight=2.0))
    assert set(terms) == {"loss_cls", "loss_resource", "loss_category"}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in net.parameters())


def test_the_resource_weight_scales_its_term() -> None:
    one, three = (joint_terms(2, DmnnOptions(resource_weight=w))[0]["loss_resource"] for w in (1.0, 3.0))
    assert (
        float(three.detach()) == pytest.approx(3 * float(one.detach()), rel=0.2) and float(one.detach()) > 0
    )  # routes are noisy


@pytest.mark.parametrize(
    ("superclasses", "options", "labels"),
    [(0, DmnnOptions(), True), (2, DmnnOptions(category=False), True), (2, DmnnOptions(), False)],
)
def test_no_category_loss_without_superclasses(superclasses: int, options: DmnnOptions, labels: bool) -> None:
    assert "loss_category" not in joint_terms(superclasses, options, labels)[0]


def test_category_classifiers_run_in_training_only() -> None:
    router = GateRouter(SPECS, DmnnOptions(), superclasses=5)
    x = torch.randn(2, 4, 3, 3)
    assert router.decide(0, x, router.begin(x))[0].notes["category"].shape == (2, 5)
    assert "category" not in router.eval().decide(0, x, router.begin(x))[0].notes
    assert router.macs() == GateRouter(SPECS, DmnnOptions()).macs()


# --- controller -------------------------------------------------------------------------------------------------


def test_the_controller_by_hand() -> None:
    torch.manual_seed(0)
    router = GateRouter(SPECS, DmnnOptions()).eval()
    nn.init.normal_(router.gates[1].weight)  # type: ignore[arg-type, union-attr]
    x, h = torch.randn(3, 8, 2, 2), torch.randn(3, 32).relu()
    decision, after = router.decide(1, x, Memory(h))
    w1, w2, w3 = (m.weight for m in (router.features[1], router.previous["1"], router.gates[1]))
    state = F.relu(x.mean((2, 3)) @ w1.T) + F.relu(h @ w2.T)  # type: ignore[operator, union-attr]
    logits = (state @ w3.T + router.gates[1].bias).view(3, 2, 2)  # type: ignore[operator, union-attr]
    assert after.h_BD is not None and torch.allclose(after.h_BD, state, atol=1e-6)
    assert torch.allclose(decision.notes["logits"], logits[..., 1] - logits[..., 0], atol=1e-5)
    assert torch.equal(decision.keep_BG, logits.argmax(2).float())


def test_what_a_controller_tells_its_block_has_the_blocks_memory_format() -> None:
    torch.manual_seed(0)
    router = GateRouter(SPECS, DmnnOptions()).eval()
    x = torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    decision, _ = router.decide(1, x, Memory(torch.zeros(3, 32)))
    (gradient,) = torch.autograd.grad(decision.notes["logits"].sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last) and not gradient.is_contiguous()
    assert float(gradient.abs().sum()) > 0 and torch.equal(gradient, gradient[:, :, :1, :1].expand_as(gradient))


def test_rate_and_decay_of_the_gates_are_the_phases() -> None:
    options = DmnnOptions(gate_lr=0.3, gate_decay=0.02)
    (phase,) = phases(make_net("dmnn", "paths"), options)
    assert (phase.router_lr, phase.router_scale, phase.router_decay) == (None, 0.3, 0.02)
    (usual,) = phases(make_net("dmnn", "paths"), DmnnOptions())
    assert (usual.router_scale, usual.router_decay) == (1.0, 0.0)


def test_open_epochs_train_the_backbone_with_all_parts_on_one_curve_with_the_joint_ones() -> None:
    net = make_net("dmnn", "paths")
    opened, joint = phases(net, DmnnOptions(open_epochs=2, epochs=6))
    assert (opened.name, opened.epochs, opened.trains, opened.target) == ("open", 2, ("backbone",), None)
    assert opened.routes is not None and bool((opened.routes(5) == 1).all())
    assert (opened.curve, joint.curve) == ((0.0, 0.25), (0.25, 1.0))
    options = OptimOptions()
    stretches = ((opened, 4), (joint, 12))
    rates = [phase_curve(i / steps, phase, options) for phase, steps in stretches for i in range(steps)]
    assert rates == pytest.approx([learning_curve(i / 16, 8, options) for i in range(16)])
    (alone,) = phases(net, DmnnOptions())
    assert alone.curve == (0.0, 1.0)


def test_parts_and_flops_that_cannot_both_be_had_are_remarked_upon() -> None:
    net = make_net("dmnn", "paths", path_least=24)
    low, high = net.span()
    assert high > 1.3
    usual = make_net("dmnn", "paths")
    (phase,) = phases(net, DmnnOptions(target=0.5))
    assert phase.target == 0.5
    before = usual.router.remarks
    assert net.router.remarks[:-1] == before
    said = net.router.remarks[-1]
    fit = (0.5 - low) / (high - low)
    assert f"0.50 of the parts cost {low + 0.5 * (high - low):.2f} of the dense net" in said
    assert f"router.targets=[{fit:.2f}, ...]" in said
    for options in (DmnnOptions(resource="flops"), DmnnOptions(resource="aig"), DmnnOptions(targets=[fit] * 3)):
        agreeing = make_net("dmnn", "paths", path_least=24)
        (phase,) = phases(agreeing, options)
        assert agreeing.router.remarks == before
        assert phase.target == (None if options.resource == "flops" else pytest.approx(fit if options.targets else 0.5))
    list(phases(usual, DmnnOptions(target=0.5)))
    assert usual.router.remarks == before


def test_steps_of_the_rate_count_epochs_of_the_whole_curve() -> None:
    phase = Phase("joint", 6, ("backbone",), cross_entropy, curve=(0.25, 1.0))
    options = OptimOptions(schedule="step", step_epochs=4, step_factor=0.5)
    assert [phase_curve(epoch / 6, phase, options) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.5, 0.5]


def test_the_noise_falls_over_the_last_part_of_the_joint_training() -> None:
    net = make_net("dmnn", "paths")
    assert isinstance(net.router, GateRouter)
    (joint,) = phases(net, DmnnOptions(cooling=0.5))
    (steady,) = phases(net, DmnnOptions())
    assert joint.schedule is not None and steady.schedule is not None
    seen = []
    for done in (0.0, 0.5, 0.75, 1.0):
        joint.schedule(done)
        seen.append(net.router.noise)
    assert seen == [1.0, 1.0, 0.5, 0.0]
    torch.manual_seed(0)
    trained = run(net.router.train())
    assert all(torch.equal(a, b) for a, b in zip(trained, run(net.router.eval()), strict=True))
    steady.schedule(1.0)
    assert net.router.noise == 1.0


def test_without_the_previous_state_there_is_no_w2() -> None:
    router = GateRouter(SPECS, DmnnOptions(previous=False)).eval()
    assert len(router.previous) == 0
    x = torch.randn(3, 8, 2, 2)
    one, two = (router.decide(1, x, Memory(state))[1].h_BD for state in (None, torch.randn(3, 32)))
    assert torch.equal(one, two)


@pytest.mark.parametrize("previous", [True, False])
def test_macs_by_hand_and_by_count(previous: bool) -> None:
    router = GateRouter(SPECS, DmnnOptions(previous=previous)).eval()
    by_hand = (4 + 8 + 16) * 32 + 32 * 2 * (2 + 2 + 3) + (2 * 32 * 32 if previous else 0)
    assert router.macs() == by_hand == count_macs(lambda: run(router, 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", 0.0),
        ("target", 1.5),
        ("hidden", 0),
        ("temperature", 0.0),
        ("open_at_start", 1.0),
        ("open_epochs", -1),
        ("cooling", 1.5),
    ],
)
def test_options_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"router.{name}"):
        DmnnOptions(**{name: value})  # type: ignore[arg-type]


def test_parts_of_blocks_are_refused_where_only_flops_are_asked_for() -> None:
    with pytest.raises(InputError, match=r"router\.targets are parts of blocks"):
        DmnnOptions(targets=[0.5], resource="flops")


def test_controllers_compute_in_fp32_under_autocast() -> None:
    """Log odds near 0 decide: rounded to bf16 in training, an image would take another route in eval."""
    router = GateRouter(SPECS, DmnnOptions()).eval()
    x_BCHW = torch.randn(2, SPECS[0].in_channels, 4, 4)
    seen = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            seen.append(router.decide(0, x_BCHW, Memory())[0].notes["logits"])
    assert seen[1].dtype is torch.float32 and torch.equal(*seen)


# --- ConvNet-AIG ------------------------------------------------------------------------------------------------

AIG = {"hidden": 16, "norm": True, "previous": False, "category": False, "resource": "aig"}


def test_the_gate_of_convnet_aig_by_hand() -> None:
    torch.manual_seed(0)
    router = GateRouter([replace(SPEC, parts=1, part_shares=(1.0,))], DmnnOptions(**AIG)).eval()  # type: ignore[arg-type]
    assert router.norms is not None
    nn.init.normal_(router.gates[0].weight)  # type: ignore[arg-type, union-attr]
    norm = router.norms[0]
    norm.running_mean.copy_(torch.randn(16))  # type: ignore[operator, union-attr]
    norm.bias.data.copy_(torch.randn(16))  # type: ignore[operator, union-attr]
    x = torch.randn(5, 4, 3, 3)
    hidden = (x.mean((2, 3)) @ router.features[0].weight.T - norm.running_mean) / (1 + norm.eps) ** 0.5 + norm.bias  # type: ignore[operator, union-attr]
    logits = F.relu(hidden) @ router.gates[0].weight.T + router.gates[0].bias  # type: ignore[operator, union-attr]
    decision, _ = router.decide(0, x, router.begin(x))
    assert torch.allclose(decision.notes["logits"][:, 0], logits[:, 1] - logits[:, 0], atol=1e-5)
    assert router.macs() == 4 * 16 + 16 * 2 == count_macs(lambda: router.decide(0, x[:1], router.begin(x)))


def test_the_resource_loss_of_convnet_aig_is_the_mean_miss_of_each_blocks_target() -> None:
    net, targets = make_net("dmnn", "paths"), [1.0, 0.5, 0.2]
    options = DmnnOptions(**AIG, targets=targets, resource_weight=3.0)  # type: ignore[arg-type]
    net = RoutedNet(net.backbone, GateRouter(net.backbone.specs, options)).train()
    out = net(pictures(8))
    (phase,) = phases(net, options)
    batch = Batch(pictures(8), torch.arange(8), None, torch.arange(8))
    rates = out.trace.keep_BUG.detach().mean((0, 2)).tolist()
    by_hand = 3 * sum((rate - target) ** 2 for rate, target in zip(rates, targets, strict=True)) / 3
    assert float(phase.loss(out, batch)["loss_resource"].detach()) == pytest.approx(by_hand, rel=1e-5)


def test_every_block_may_have_its_target_in_dmnn_too() -> None:
    keep_BUG = torch.tensor([[[1.0, 0], [1, 1]]])
    loss = resource_loss(output(keep_BUG, [50.0]), torch.tensor([2, 2]), 0.5, 100.0, torch.tensor([0.5, 0.7]))
    assert float(loss) == pytest.approx(0.3**2)


def test_targets_must_fit_the_net() -> None:
    with pytest.raises(InputError, match=r"router\.targets must be as many as the net has blocks, 3, not 2"):
        GateRouter(SPECS, DmnnOptions(targets=[0.5, 0.5]))
    with pytest.raises(InputError, match=r"router\.targets"):
        DmnnOptions(targets=[1.5])
    with pytest.raises(InputError, match=r"router\.resource must be dmnn, flops or aig"):
        DmnnOptions(resource="mean")
