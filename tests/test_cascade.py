"""The two-pass cascade: its units and backbone keep their contracts, each phase trains one net, the dial meets its target."""

from __future__ import annotations

import copy
import csv
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import TINY
from dynroute.backbones import BACKBONES, BackboneOptions, Cascade, CifarResNet, make_backbone
from dynroute.calibration import EXACT
from dynroute.cli import main
from dynroute.contracts import Batch, InputError, spread
from dynroute.data import DataSpec
from dynroute.evaluation import Evaluator
from dynroute.fit import set_modes
from dynroute.measure import evaluate, make_dial
from dynroute.net import RoutedNet
from dynroute.optim import OptimOptions, make_optimizers
from dynroute.records import read_rows
from dynroute.routers import ROUTERS, Phase, cross_entropy
from dynroute.routers.cascade import log_odds
from dynroute.testing import check_agreement, check_backbone, check_router, check_unit, close, count_macs, shake
from dynroute.units import WholeNet, answer
from tiny import SPEC, make_net, make_router, pictures

Capture = pytest.CaptureFixture[str]
METHOD = ROUTERS["cascade"]


def cascade(*widths: float, parts: int = 8, **changes: Any) -> Cascade:
    torch.manual_seed(0)
    options = BackboneOptions("resnet8", parts=parts, width=8, widths=list(widths)).resolved("cascade")
    made = make_backbone(partial(CifarResNet, 8), replace(SPEC, **changes), options)
    assert isinstance(made, Cascade)
    return made


def net_of(body: Cascade, **options: Any) -> RoutedNet:
    return RoutedNet(body, METHOD.router(body.specs, METHOD.options(**options), 0))


# --- contracts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "parts"), [((0.25, 0.75), 8), ((0.3, 1.0), 4), ((0.01, 0.01), 2)])
def test_a_cascade_keeps_the_contracts(widths: tuple[float, float], parts: int) -> None:
    body = cascade(*widths, parts=parts)
    check_backbone(body, 16)
    check_agreement(net_of(body), pictures(6))


@pytest.mark.parametrize("name", ["conv4", "conv4_bn", "vgg16_bn_cifar"])
def test_a_cascade_of_chains_keeps_the_contracts(name: str) -> None:
    """Their layers read one another: with a BatchNorm, by the width of the layer before."""
    torch.manual_seed(0)
    options = BackboneOptions(name, parts=4, widths=[0.5, 0.75]).resolved("cascade")
    body = make_backbone(BACKBONES[name], replace(SPEC, image_size=32), options)
    assert isinstance(body, Cascade)
    shake(body)
    check_backbone(body, 32)
    check_agreement(net_of(body), torch.randn(4, 3, 32, 32))


def test_the_router_keeps_its_contract() -> None:
    check_router(make_router("cascade", cascade(0.25, 0.75).specs))


class Unread(WholeNet):
    """The second net reads the first one's answer as if it were a channel of the image."""

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        return super()._logits(image_BCHW) + 0.01


class Cheap(WholeNet):
    """Does not count its head."""

    def cost_terms(self) -> Any:
        terms = super().cost_terms()
        return terms._replace(by_part_G=(terms.by_part_G[0] - self.net.fixed_macs,))


@pytest.mark.parametrize(("mutant", "message"), [(Unread, "masked and narrowed run disagree"), (Cheap, "cost says")])
def test_the_checks_catch(mutant: type[WholeNet], message: str) -> None:
    unit = cascade(0.25, 0.75).routable[1]
    unit.__class__ = mutant
    with pytest.raises(AssertionError, match=message):
        check_unit(unit, 16)


def static_twin(net: nn.Module, width: float) -> RoutedNet:
    """One net of a cascade as router.name=static runs it."""
    body: Any = copy.deepcopy(net)
    return RoutedNet(body, make_router("static", body.specs, width=width)).eval()


@pytest.mark.parametrize("width", [0.25, 0.6, 1.0])
def test_each_net_is_the_static_net_of_its_width(width: float) -> None:
    body, x = cascade(width, width), pictures(4)
    shake(body)
    body.eval()
    twins = [static_twin(net, width)(x) for net in body.nets]
    for u, twin in enumerate(twins):
        alone = torch.eye(2)[u].view(1, 2, 1).expand(4, -1, -1)
        out = net_of(body).eval()(x, alone)
        assert close(out.logits_BK, twin.logits_BK)
        assert out.macs_B.tolist() == twin.macs_B.tolist()
    assert body.dense_macs == count_macs(static_twin(body.nets[1], 1.0), x[:1])


def test_an_image_ends_with_the_answer_of_the_last_net_that_ran_for_it() -> None:
    body, x = cascade(0.25, 0.75), pictures(5)
    shake(body)
    body.eval()
    net = net_of(body).eval()
    first, second = (static_twin(n, w)(x).logits_BK for n, w in zip(body.nets, (0.25, 0.75), strict=True))
    goes_on = torch.tensor([0.0, 1, 1, 0, 1])
    mixed = net(x, torch.stack([torch.ones(5), goes_on], 1)[:, :, None])
    assert close(mixed.logits_BK, torch.where(goes_on[:, None] > 0, second, first))


def test_the_plane_holds_more_classes_than_one_row_and_no_more_than_pixels() -> None:
    body = cascade(0.25, 0.75, classes=40)
    done = body.units[0](body.stem(pictures(2)))
    logits = body.head(done)
    assert logits.shape == (2, 40)
    assert torch.allclose(answer(done).softmax(1), F.pad(logits.softmax(1), (0, 16 * 16 - 40)), atol=1e-9)
    with pytest.raises(InputError, match="as many pixels as classes"):
        cascade(0.25, 0.75, classes=16 * 16 + 1)


# --- the decision -----------------------------------------------------------------------------------------------


def test_log_odds_of_the_best_class() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.4, 0.4]])
    assert log_odds(p.log()).tolist() == pytest.approx([math.log(0.7 / 0.3), math.log(0.4 / 0.6)])
    sure = log_odds(torch.tensor([[60.0, 0.0, 0.0], [61.0, 0.0, 0.0]]))
    assert float(sure[1] - sure[0]) == pytest.approx(1.0, abs=1e-4)  # softmax alone would say 1.0 twice


def test_the_threshold_is_a_probability_at_the_trained_point() -> None:
    body, x = cascade(0.25, 0.75), pictures(60)
    shake(body)
    best_B = static_twin(body.nets[0], 0.25)(x).logits_BK.softmax(1).amax(1)
    threshold = float(best_B.detach().sort().values[19:21].mean())
    unsure_B = best_B < threshold
    assert int(unsure_B.sum()) == 20
    net = net_of(body, confidence=threshold).eval()
    assert torch.equal(net(x).trace.keep_BUG[:, :, 0], torch.stack([torch.ones(60), unsure_B.float()], 1))


def test_the_dial_is_monotone_and_its_ends_are_both_nets_and_the_first_alone() -> None:
    net = make_net("cascade", "cascade")
    x = pictures(50)
    dial = make_dial(net, 50, lambda: [Batch(x, torch.zeros(50).long(), None, torch.arange(50))])
    low, high = (share / net.cost.dense for share in (net.cost.part_UG[0].sum(), net.cost.part_UG.sum()))
    assert dial.span() == pytest.approx((float(low), float(high)))
    for share in (0.2, 0.5, 0.8):
        wanted = float(low + share * (high - low))
        assert dial.find(wanted).share == pytest.approx(wanted, abs=EXACT)
    shares = [point.share for point in sorted(dial.calibration.points.values())]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) > 4


# --- training ---------------------------------------------------------------------------------------------------


def steps(net: RoutedNet, phase: Phase) -> None:
    """Three steps of a phase, weight decay included."""
    (optimizer,), _ = make_optimizers(net, phase, OptimOptions(lr=0.05, weight_decay=0.1))
    set_modes(net, phase)
    for seed in range(3):
        assert phase.routes is not None
        out = net(pictures(16, seed), phase.routes(16))
        optimizer.zero_grad(set_to_none=True)
        sum(
            phase.loss(out, Batch(pictures(16, seed), torch.arange(16) % 10, None, torch.arange(16))).values()
        ).backward()
        optimizer.step()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_each_phase_trains_one_net_and_leaves_the_other_bit_for_bit() -> None:
    body = cascade(0.25, 0.75)
    net = net_of(body)
    phases = list(METHOD.phases(net, METHOD.options(epochs=1)))
    assert [phase.name for phase in phases] == ["first", "second"]
    for u, phase in enumerate(phases):
        before = [state(n) for n in body.nets]
        steps(net, phase)
        assert not unchanged(body.nets[u], before[u])
        assert unchanged(body.nets[1 - u], before[1 - u])


def test_a_mutant_that_runs_both_nets_would_be_seen() -> None:
    body = cascade(0.25, 0.75)
    net, before = net_of(body), state(body.nets[0])
    steps(net, Phase("second", 1, ("backbone",), cross_entropy, routes=lambda images: torch.ones(images, 2, 1)))
    assert not unchanged(body.nets[0], before)


def test_a_phase_is_the_training_of_the_static_net() -> None:
    body = cascade(0.25, 0.75)
    twin = static_twin(body.nets[0], 0.25)
    net = net_of(body)
    (static,) = ROUTERS["static"].phases(twin, ROUTERS["static"].options(epochs=1))
    steps(net, next(METHOD.phases(net, METHOD.options(epochs=1))))
    keep = twin(pictures(16)).trace.keep_BUG
    steps(twin, replace(static, routes=lambda _: keep))
    assert unchanged(body.nets[0], state(twin.backbone))


# --- configuration, weights, command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "changes", "message"),
    [
        ("cascade", {"widths": [0.5]}, "of a cascade are two"),
        ("cascade", {"widths": [0.8, 0.4]}, "must rise"),
        ("cascade", {"widths": [0.0, 0.4]}, "must rise"),
        ("cascade", {"widths": [0.5, 1.1]}, "must rise"),
        ("cascade", {"nets": ["runs/a"]}, "names the two runs"),
        ("channels", {"nets": ["runs/a", "runs/b"]}, "names the two runs"),
        ("paths", {"widths": [0.2, 0.4]}, "backbone.widths is for backbone.unit=choice or cascade, not paths"),
    ],
)
def test_widths_and_nets_that_do_not_suit(unit: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BackboneOptions(**changes).resolved(unit)


def test_widths_spread_over_the_units() -> None:
    assert [spread(0.6, 4, u) for u in range(9)] == [2, 2, 3, 2, 3, 2, 2, 3, 2]
    assert [spread(w, 16, 3) for w in (0.25, 0.75, 1.0)] == [4, 12, 16]


class Toy(CifarResNet):
    """Stands for a plug-in: a backbone that knows nothing of cascades."""

    def __init__(self, data: DataSpec, options: BackboneOptions) -> None:
        super().__init__(8, data, options)


def test_a_plug_in_backbone_makes_a_cascade() -> None:
    body = make_backbone(Toy, SPEC, BackboneOptions("toy", width=8).resolved("cascade"))
    check_backbone(body, 16)


def test_a_cascade_starts_from_dense_weights_and_has_none_itself() -> None:
    body, dense = cascade(0.5, 1.0), cascade(1.0, 1.0).nets[0]
    shake(dense)
    body.load_dense(dense.dense_state())
    x = pictures(3)
    wanted = static_twin(dense, 1.0)(x).logits_BK
    assert close(net_of(body).eval()(x, torch.ones(3, 2, 1)).logits_BK, wanted)
    with pytest.raises(InputError, match="no plain dense net"):
        body.dense_state()


STATIC = ["router.name=static", "router.epochs=1", "backbone.parts=8"]
CASCADE = ["router.name=cascade", "backbone.parts=8", "backbone.widths=[0.25,0.75]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cascade trained by one command, two static runs, and the cascade made of them without training."""
    root = tmp_path_factory.mktemp("cascade")
    words = {
        "cascade": [*CASCADE, "router.epochs=1"],
        "narrow": [*STATIC, "router.width=0.25"],
        "wide": [*STATIC, "router.width=0.75"],
        "joined": [*CASCADE, "router.epochs=0", f"backbone.nets=[{root / 'narrow'},{root / 'wide'}]"],
    }
    for name, keys in words.items():
        assert main(["train", *TINY, *keys, "--out", str(root / name)]) == 0
    return {name: root / name for name in words}


def test_one_command_trains_both_nets_and_meets_a_target(trained: dict[str, Path], capsys: Capture) -> None:
    run = trained["cascade"]
    assert [row["phase"] for row in read_rows(run / "train.csv")] == ["first", "second"]
    capsys.readouterr()
    assert main(["eval", str(run), "--flops-target", "0.6", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["method"] == "cascade" and row["router_share"] == 0
    assert abs(row["share_calib"] - 0.6) <= 0.02 and row["routes"] == 2
    with (run / "routes.csv").open(newline="") as file:
        assert {line["route"] for line in csv.DictReader(file)} == {"1/0", "1/1"}


def test_two_static_runs_become_a_cascade_without_training(trained: dict[str, Path]) -> None:
    joined = Evaluator.of(trained["joined"])
    row = joined.measure(None).row
    assert (row.epochs, row.weights) == (0, "narrow+wide")
    for name, price in (("narrow", 1e4), ("wide", -1e4)):
        alone = Evaluator.of(trained[name]).measure(None).scores
        joined.net.router.price = price
        assert torch.equal(evaluate(joined.net, joined._split("test")[1]).predicted_N, alone.predicted_N)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["backbone.widths=[0.25,0.5]"],
            "at width 0.75, this cascade needs resnet8 of 8 channels on shapes at width 0.5",
        ),
        (["backbone.parts=4"], "is resnet8 of 8 channels on shapes at width 0.25"),
        (["backbone.name=resnet14"], "this cascade needs resnet14"),
        (["backbone.width=16"], "does not fit this architecture"),
    ],
)
def test_runs_that_do_not_fit_are_refused(
    trained: dict[str, Path], tmp_path: Path, capfd: Capture, keys: list[str], message: str
) -> None:
    nets = f"backbone.nets=[{trained['narrow']},{trained['wide']}]"
    words = [*TINY, *CASCADE, "router.epochs=0", nets, *keys, "--out", str(tmp_path / "run")]
    capfd.readouterr()
    assert main(["train", *words]) == 2
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_cascade_is_not_made_of_routed_nets(
    trained: dict[str, Path], runs: dict[str, Path], tmp_path: Path, capfd: Capture
) -> None:
    nets = f"backbone.nets=[{trained['narrow']},{runs['dmnn']}]"
    assert main(["train", *TINY, *CASCADE, nets, "--out", str(tmp_path / "run")]) == 2
    assert "is a run of router.name=dmnn, not of static" in capfd.readouterr().err
