"""Alternatives: each image runs one, and what is computed is what running each body on its own images computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import TINY
from dynroute.assembly import build, restore
from dynroute.backbones import BackboneOptions
from dynroute.cli import main
from dynroute.config import describe_fields, load_config
from dynroute.contracts import InputError, UnitSpec
from dynroute.cost import CostTerms
from dynroute.data import DataSpec
from dynroute.routers import legal
from dynroute.routers.base import Router
from dynroute.routers.gates import DmnnOptions, GateRouter
from dynroute.routers.static import RandomOptions, RandomRouter, StaticOptions, StaticRouter
from dynroute.testing import check_agreement, check_unit, close, count_macs, patterns, shake
from dynroute.units import FEW, ChoiceBasic, ChoiceBottleneck, ChoiceUnit, Place, Weights, choice_sizes
from tiny import make_backbone, make_net, pictures

KINDS = [ChoiceBasic, ChoiceBottleneck]


def make(kind: type[ChoiceUnit], stride: int = 1, shortcut: str = "B", sizes: tuple[int, ...] = (2, 3, 8)) -> Any:
    torch.manual_seed(0)
    channels = sizes[-1] * kind.expansion
    return kind(Place("unit", channels // stride, channels, stride, 5, shortcut), list(sizes))


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_contract(kind: type[ChoiceUnit], stride: int, shortcut: str) -> None:
    unit = make(kind, stride, shortcut)
    check_unit(unit, 5)
    assert list(patterns(unit.spec)) == [(True, False, False), (False, True, False), (False, False, True)]
    costs = torch.tensor(unit.cost_terms().by_part_G)
    assert torch.allclose(torch.tensor(unit.spec.part_shares), costs / costs[-1])


class Cheap(ChoiceBottleneck):
    """Counts the middle convolution as if it shrank on one side."""

    def cost_terms(self) -> CostTerms:
        terms = super().cost_terms()
        return terms._replace(by_part_G=tuple(terms.by_part_G[-1] * size / self.sizes[-1] for size in self.sizes))


class Widest(ChoiceBasic):
    """Runs the widest alternative, whichever is chosen."""

    def _chosen(self, x_BCHW: Tensor, choice_B: Tensor) -> Tensor:
        return self._run(self.widest, x_BCHW, False)


class Narrowest(ChoiceBasic):
    """Takes the first alternative for the dense net."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.widest = 0


@pytest.mark.parametrize(
    ("mutant", "message"), [(Cheap, "cost says"), (Widest, "disagree"), (Narrowest, "not the dense run")]
)
def test_check_unit_catches(mutant: type[ChoiceUnit], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_unit(make(mutant), 5)


# --- the training run -------------------------------------------------------------------------------------------


def learn(norm: nn.BatchNorm2d, given: tuple[Tensor]) -> None:
    """What running statistics learn from fewer images than are enough, in proportion to their number."""
    (y,) = given
    pace = 0.1 * len(y) / FEW
    assert norm.running_mean is not None and norm.running_var is not None
    mean = y.detach().mean((0, 2, 3))
    var = (y.detach() - norm.running_mean[:, None, None]).square().mean((0, 2, 3))
    norm.learned = ((1 - pace) * norm.running_mean + pace * mean, (1 - pace) * norm.running_var + pace * var)  # type: ignore[assignment]


def by_hand(unit: ChoiceUnit, x: Tensor, keep: Tensor) -> Tensor:
    """ReLU(shortcut + sum_g keep_g body_g), each body a plain module run on the images that chose it."""
    out = unit.shortcut(x)
    for g, body in enumerate(unit.bodies):
        rows = keep[:, g].nonzero()[:, 0]
        if len(rows):
            enough = len(rows) >= FEW or len(rows) == len(x)
            body.train(unit.training and enough)
            seen = (
                {} if enough else {n: n.register_forward_pre_hook(learn) for n in body if isinstance(n, nn.BatchNorm2d)}
            )
            added = body(x[rows]) * keep[rows, g, None, None, None]
            for norm, hook in seen.items():
                hook.remove()
                norm.running_mean, norm.running_var = norm.learned  # type: ignore[assignment]
            out = out.index_add(0, rows, added)
    return F.relu(out)


def compare_with_by_hand(unit: ChoiceUnit, choices: list[int]) -> None:
    """Outputs, gradients of images, keeps and parameters, and running statistics, in float64 and train mode."""
    shake(unit)
    unit.double().train()
    theirs = copy.deepcopy(unit)
    torch.manual_seed(1)
    x = torch.randn(len(choices), unit.spec.in_channels, 5, 5, dtype=torch.float64)
    keep = F.one_hot(torch.tensor(choices), len(unit.sizes)).double()
    results = []
    for module, run in ((unit, unit), (theirs, lambda x, keep: by_hand(theirs, x, keep))):
        x_own, keep_own = x.clone().requires_grad_(), keep.clone().requires_grad_()
        out = run(x_own, keep_own)
        (out * torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        results.append((out, x_own.grad, keep_own.grad, module))
    (out, x_grad, keep_grad, _), (out_2, x_grad_2, keep_grad_2, _) = results
    assert torch.allclose(out, out_2), "outputs differ"
    assert torch.allclose(x_grad, x_grad_2), "gradients of the images differ"
    assert torch.allclose(keep_grad, keep_grad_2), "gradients of the keeps differ"
    for (name, one), two in zip(unit.named_parameters(), theirs.parameters(), strict=True):
        same = one.grad is two.grad or torch.allclose(one.grad, two.grad)  # type: ignore[arg-type]
        assert same, f"gradients of {name} differ"
    for (name, one), two in zip(unit.named_buffers(), theirs.buffers(), strict=True):
        assert "num_batches" in name or torch.allclose(one, two), f"{name} differ"


MIXED = [2, 0, 2, 2, 0, 0, 0, 1, 2, 0, 2, 0, 0, 2, 2, 0, 2, 1, 0, 2]  # the middle one chosen by fewer than FEW


@pytest.mark.parametrize("choices", [MIXED, [1] * 12, [1] * (FEW - 1), [2, 0, 2]], ids=["mixed", "one", "few", "three"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_running_each_body_on_its_own_images(
    kind: type[ChoiceUnit], stride: int, choices: list[int]
) -> None:
    compare_with_by_hand(make(kind, stride), choices)


class NotPutBack(ChoiceBasic):
    """Leaves the images sorted."""

    def _chosen(self, x_BCHW: Tensor, choice_B: Tensor) -> Tensor:
        return super()._chosen(x_BCHW, choice_B)[choice_B.argsort(stable=True)]


class SharedStatistics(ChoiceBasic):
    """Every body sees all images, as a masked run of everything would."""

    def _chosen(self, x_BCHW: Tensor, choice_B: Tensor) -> Tensor:
        every = torch.stack([self._run(g, x_BCHW, self.training) for g in range(len(self.sizes))], 1)
        return every[torch.arange(len(x_BCHW)), choice_B]


class TrustsFew(ChoiceBasic):
    """Batch statistics even from two images."""

    def _run(self, g: int, x_BCHW: Tensor, batch_statistics: bool) -> Tensor:
        return super()._run(g, x_BCHW, self.training)


class DeafKeep(ChoiceBasic):
    """The gradient does not reach the keep."""

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        assert keep_BG is not None
        return super().forward(x_BCHW, keep_BG.detach()) + 0 * keep_BG.sum()


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (NotPutBack, "outputs differ"),
        (SharedStatistics, "outputs differ"),
        (TrustsFew, "outputs differ"),
        (DeafKeep, "gradients of the keeps"),
    ],
)
def test_the_comparison_catches(mutant: type[ChoiceUnit], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        compare_with_by_hand(make(mutant), MIXED)


def test_an_image_costs_its_own_alternative_alone() -> None:
    unit = make(ChoiceBasic).train()
    terms, x = unit.cost_terms(), torch.randn(20, 8, 5, 5)
    told = sum(terms.by_part_G[g] for g in MIXED)
    assert count_macs(unit, x, F.one_hot(torch.tensor(MIXED), 3).float()) == told < 20 * terms.total


@pytest.mark.parametrize("kind", KINDS)
def test_an_illegal_row_is_the_pure_shortcut_and_the_others_are_as_ever(kind: type[ChoiceUnit]) -> None:
    unit = make(kind, stride=2).eval()
    shake(unit)
    x, keep = torch.randn(6, unit.spec.in_channels, 5, 5), torch.eye(3).repeat(2, 1)
    whole = unit(x, keep)
    keep[[1, 5]] = 0
    out = unit(x, keep)
    assert torch.equal(out[[1, 5]], F.relu(unit.shortcut(x))[[1, 5]])
    assert close(out[[0, 2, 3, 4]], whole[[0, 2, 3, 4]])
    assert close(unit.narrow((False,) * 3)(x), F.relu(unit.shortcut(x)))


def test_channels_last_is_kept() -> None:
    unit = make(ChoiceBasic, stride=2).to(memory_format=torch.channels_last)
    x = torch.randn(20, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    assert unit(x, F.one_hot(torch.tensor(MIXED), 3).float()).is_contiguous(memory_format=torch.channels_last)


def test_narrow_leaves_the_unit_as_it_is() -> None:
    unit = make(ChoiceBasic).train()
    small = unit.narrow((False, True, False))
    assert all(module.training for module in unit.bodies.modules())
    small.body[0].weight.data.zero_()
    assert bool(unit.bodies[1][0].weight.any())


# --- weights of the plain block ---------------------------------------------------------------------------------


def plain(unit: ChoiceUnit, useful: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A plain block with random weights, all but so many of its hidden channels adding nothing, and its state."""
    torch.manual_seed(4)
    named: dict[str, nn.Module] = {}
    for i, layer in enumerate(unit.layers(unit.hidden), 1):
        size = {"kernel_size": layer.kernel, "stride": layer.stride, "padding": layer.kernel // 2}
        named[f"conv{i}"] = nn.Conv2d(layer.in_channels, layer.out_channels, bias=False, **size)  # type: ignore[arg-type]
        named[f"bn{i}"] = nn.BatchNorm2d(layer.out_channels)
        if i > 1:
            idle = torch.randperm(unit.hidden)[useful:]
            named[f"conv{i}"].weight.data[:, idle] = 0  # type: ignore[operator, union-attr]
    if isinstance(unit.shortcut, nn.Sequential):
        named |= {"shortcut.0": copy.deepcopy(unit.shortcut[0]), "shortcut.1": copy.deepcopy(unit.shortcut[1])}
    for module in named.values():
        shake(module)
    body: list[nn.Module] = []
    for i in range(1, len(unit.layers(1)) + 1):
        body += [named[f"conv{i}"], named[f"bn{i}"], nn.ReLU()]
    shortcut = nn.Sequential(named["shortcut.0"], named["shortcut.1"]) if "shortcut.0" in named else unit.shortcut
    state = {f"{name}.{k}": v for name, m in named.items() for k, v in m.state_dict().items() if "num_b" not in k}

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(shortcut(x) + nn.Sequential(*body[:-1]).eval()(x))

    shortcut.eval()
    return Block(), state


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_alternatives_start_from_the_best_channels_of_the_plain_block(kind: type[ChoiceUnit], stride: int) -> None:
    unit = make(kind, stride).eval()
    block, state = plain(unit, useful=3)
    weights = Weights(state)
    unit.load_dense(weights)
    weights.finish()
    x = torch.randn(4, unit.spec.in_channels, 5, 5)
    outputs = [unit(x, torch.eye(3)[[g] * 4]) for g in range(3)]
    assert close(unit(x), block(x))
    assert close(outputs[2], block(x))
    assert close(outputs[1], block(x)), "three channels do all the work, so an alternative of three is enough"
    assert not close(outputs[0], block(x))
    back = Weights(unit.dense_state())
    again = make(kind, stride).eval()
    again.load_dense(back)
    back.finish()
    assert close(again(x), block(x))


def test_without_a_full_width_alternative_there_is_no_plain_net() -> None:
    options = BackboneOptions(unit="choice", widths=[0.25, 0.5])
    net = make_net("static", "choice")
    unit = ChoiceBasic(Place("u", 8, 8, 1, 5), options.sizes(8))
    assert unit.spec.part_shares == (0.5, 1.0)
    assert unit.cost_terms().total == net.backbone.routable[0].cost_terms().total * 25 / 256  # 5 x 5 pixels of 16 x 16
    with pytest.raises(InputError, match=r"backbone\.widths must hold 1\.0"):
        unit.dense_state()


def test_the_dense_net_is_the_same_as_that_of_channels() -> None:
    nets = [make_net("rnr", unit) for unit in ("channels", "choice")]
    assert nets[0].cost.dense == nets[1].cost.dense
    assert nets[1].span() == pytest.approx(nets[0].span())  # quarters of the hidden channels in both


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [[0.5, 0.25], [0.0, 1.0], [0.5, 1.5], [float("nan"), 1.0]])
def test_widths_out_of_range(widths: list[float]) -> None:
    with pytest.raises(InputError, match=r"backbone\.widths must rise"):
        BackboneOptions(widths=widths)


def test_widths_that_come_to_the_same_are_refused() -> None:
    assert choice_sizes(16, [0.01, 0.25, 0.97]) == [1, 4, 16]
    with pytest.raises(InputError, match=r"not all different in a block of 8 channels: \[7, 8, 8\]"):
        choice_sizes(8, [0.9, 0.95, 1.0])


RNR = ["router.name=rnr", "backbone.unit=choice"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["router.name=dmnn", "backbone.unit=choice"], r"'dmnn' needs backbone.unit=paths \(or auto\), not 'choice'"),
        (["router.name=rnp", "backbone.unit=choice"], "'rnp' needs backbone.unit=channels"),
        (["router.name=rnr", "backbone.unit=paths"], "'rnr' needs backbone.unit=channels or choice"),
        ([*RNR, "backbone.parts=3"], "backbone.parts must be 0 or 4, as backbone.widths, not 3"),
        ([*RNR, "backbone.widths=[a]"], "backbone.widths must be a list of numbers"),
        ([*RNR, "backbone.widths=0.5"], "backbone.widths must be a list of numbers"),
    ],
)
def test_what_does_not_fit_together_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(overrides=words)


def test_options_of_alternatives() -> None:
    config = load_config(overrides=[*RNR, "backbone.widths=[0.5,1]"])
    assert (config.backbone.widths, config.backbone.parts) == ([0.5, 1.0], 2)
    assert load_config(overrides=RNR).backbone.parts == 4
    assert load_config(overrides=["router.name=rnr"]).backbone.unit == "channels"
    assert config.hash() != load_config(overrides=RNR).hash()
    with pytest.raises(InputError, match=r"backbone\.widths is for"):
        load_config(overrides=["router.name=rnr", "backbone.widths=[1.0]"])
    assert "backbone.widths = []" in describe_fields()


def test_gates_refuse_alternatives() -> None:
    with pytest.raises(InputError, match=r"backbone\.unit=paths"):
        GateRouter(make_backbone(unit="choice").specs, DmnnOptions())


# --- controls ---------------------------------------------------------------------------------------------------

UNEVEN = (0.1, 0.15, 0.4, 1.0)


def choice(shares: tuple[float, ...] = UNEVEN) -> UnitSpec:
    return UnitSpec("u", 4, len(shares), "choice", False, shares)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6), st.permutations(UNEVEN))
def test_a_legal_choice_is_the_dearest_that_is_kept(rows: list[list[bool]], shares: list[float]) -> None:
    keep = torch.tensor(rows).float().requires_grad_()
    one = legal(keep, choice(tuple(shares)))
    for row, got in zip(rows, one.tolist(), strict=True):
        kept = [share for share, on in zip(shares, row, strict=True) if on]
        assert sorted(got) == [0, 0, 0, 1]
        assert shares[got.index(1)] == (max(kept) if kept else min(shares))
    assert torch.equal(legal(one, choice(tuple(shares))), one)
    one.sum().backward()
    assert keep.grad is not None and torch.equal(keep.grad, torch.ones_like(keep))


def share_U(router: Router, images: int = 1) -> Tensor:
    """Mean share of each unit."""
    x = pictures(images, size=4)
    state, shares = router.begin(x), []
    for u, spec in enumerate(router.specs):
        keep_BG = router.decide(u, torch.zeros(images, 4, 2, 2), state)[0].keep_BG
        assert torch.equal(legal(keep_BG, spec), keep_BG)
        shares.append((keep_BG @ torch.tensor(spec.part_shares)).mean())
    return torch.stack(shares)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1), st.integers(1, 20))
def test_a_static_width_is_met_by_alternatives_to_half_a_step_of_one_unit(width: float, units: int) -> None:
    got = share_U(StaticRouter([choice()] * units, StaticOptions(width=width)))
    assert abs(float(got.sum()) - max(width, 0.1) * units) < 0.3 + 1e-4  # half of the widest step, 0.4 to 1


def test_a_static_width_passes_over_units_of_another_form() -> None:
    nested = UnitSpec("n", 4, 4, "nested", False, (0.25,) * 4)
    router = StaticRouter([choice(), nested, choice(), nested], StaticOptions(width=0.7))
    assert share_U(router).tolist() == pytest.approx([0.4, 0.75, 1.0, 0.75])  # 0.3 missed, then 1.0 wanted


def test_random_alternatives_follow_their_rate() -> None:
    steps = []
    for rate in (0.0, 0.2, 0.5, 0.8, 1.0):
        router = RandomRouter([choice(tuple(reversed(UNEVEN)))] * 2, RandomOptions(rate=rate)).eval()
        steps.append(float(share_U(router, 400).mean()))
        assert torch.equal(share_U(router, 50), share_U(router, 50))
    assert steps == sorted(steps) and steps[0] == pytest.approx(0.1) and steps[-1] == 1.0
    assert len(set(steps)) == 5
    expected = (5 * 0.1 + 6 * 0.15 + 4 * 0.4 + 1.0) / 16  # of four draws at rate 0.5, how many succeed
    assert steps[2] == pytest.approx(expected, abs=0.04)


# --- the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RNR on alternatives, an epoch of each of its phases."""
    folder = tmp_path_factory.mktemp("multipath") / "run"
    epochs = [f"router.{phase}_epochs=1" for phase in ("pretrain", "widths", "agent", "joint")]
    words = [*TINY, *RNR, *epochs, "router.hidden=8", "backbone.widths=[0.25,0.5,1]", "data.train_images=200"]
    assert main(["train", *words, "--out", str(folder)]) == 0
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> Any:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_rnr_on_alternatives_from_training_to_a_target(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = said(capsys, "inspect", run)
    assert {(unit["form"], unit["parts"]) for unit in info["units"]} == {("choice", 3)}
    assert info["macs_fixed"] + sum(unit["macs"] for unit in info["units"]) == info["macs_dense"]
    assert all(unit["macs"] == unit["macs_by_part"][-1] for unit in info["units"])
    for target in (info["share_cheapest"], info["share_dearest"]):
        (row,) = said(capsys, "eval", run, "--flops-target", min(target, 1.0))["rows"]
        assert row["macs_share"] == pytest.approx(target, abs=0.02)
    routes = (run / "routes.csv").read_text()
    assert "001/001/001" in routes and "100/100/100" in routes
    net, _, _ = restore(run / "last.pt")
    check_agreement(net, pictures(8))


def test_a_trained_run_of_alternatives_starts_other_forms(run: Path) -> None:
    net, _, _ = restore(run / "last.pt")
    x, spec = pictures(8), DataSpec("shapes", 16, 20, ("",) * 20)
    for words in (["backbone.unit=channels"], ["backbone.unit=choice", "backbone.widths=[0.5,1]"]):
        other = load_config(overrides=[*TINY, "router.name=static", f"backbone.weights={run}", *words])
        built = build(other, spec).eval()
        assert close(built(x).logits_BK, net.eval()(x, net.dense_routes(8)).logits_BK)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_run_in_training_is_that_of_the_widest_for_all(kind: type[ChoiceUnit]) -> None:
    unit = make(kind, stride=2).train()
    shake(unit)
    x = torch.randn(12, unit.spec.in_channels, 5, 5)
    twin = copy.deepcopy(unit)
    assert close(unit(x), twin(x, torch.eye(3)[[2] * 12]))
    assert all(torch.equal(one, two) for one, two in zip(unit.buffers(), twin.buffers(), strict=True))


def test_the_dense_net_of_alternatives_has_its_projections_too() -> None:
    alike = [make_backbone(unit=unit, shortcut="B").dense_macs for unit in ("channels", "choice")]
    assert alike[0] == alike[1]


def test_a_narrowed_alternative_of_a_unit_in_training_is_in_eval() -> None:
    small = make(ChoiceBasic, stride=2).train().narrow((False, True, False))
    assert not any(module.training for module in small.modules())
