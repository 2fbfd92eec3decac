"""The slimmable net: which widths a minibatch trains, that their gradients add up, and what the dial picks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY
from dynroute.assembly import restore
from dynroute.cli import main
from dynroute.contracts import Advice, Batch, InputError, Output, Trace
from dynroute.net import RoutedNet
from dynroute.records import read_eval
from dynroute.routers import classification_loss
from dynroute.routers.slimmable import SlimmableOptions, SlimmableRouter, drawn_widths, passes, phases, summed_loss
from tiny import make_backbone, make_net, pictures

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def kept(keep_BUG: torch.Tensor) -> list[int]:
    """Parts that each image keeps, the same in every unit."""
    counts_BU = keep_BUG.sum(2)
    assert bool((counts_BU == counts_BU[:, :1]).all())
    return [int(count) for count in counts_BU[:, 0]]


def batch_of(images: int) -> Batch:
    return Batch(pictures(images), torch.arange(images) % 10, torch.arange(images) % 2, torch.arange(images))


def output(logits_BK: torch.Tensor) -> Output:
    return Output(logits_BK, Trace(torch.ones(len(logits_BK), 1, 1), {}), torch.ones(len(logits_BK)))


@pytest.mark.parametrize("training", ["all", "sandwich", "dealt"])
def test_the_widths_of_a_minibatch(training: str) -> None:
    torch.manual_seed(0)
    specs = make_backbone().specs
    options = SlimmableOptions(training=training)
    draw, times = drawn_widths(specs, options), passes(options)
    if training == "dealt":
        assert times == 1
        one, two = kept(draw(8)), kept(draw(8))
        assert sorted(one) == sorted(two) == [1, 1, 2, 2, 3, 3, 4, 4] and one != two
        return
    rows = [kept(draw(times * 3))[::3] for _ in range(40)]
    assert kept(draw(times * 3))[:6] == ([4, 4, 4, 3, 3, 3] if training == "all" else [4, 4, 4, 1, 1, 1])
    if training == "all":
        assert rows == [[4, 3, 2, 1]] * 40
    else:
        assert all(row[:2] == [4, 1] for row in rows)
        assert {count for row in rows for count in row[2:]} == {2, 3}


def test_one_forward_pass_adds_up_the_gradients_of_all_widths() -> None:
    """As the paper's Algorithm 1, a loss.backward() for each width; normalisations fixed, as they see other images."""
    net, batch, options = make_net("slimmable", "channels"), batch_of(6), SlimmableOptions()
    (phase,) = phases(net, options)
    assert phase.routes is not None and phase.passes == 4
    out = net(batch.images.repeat(4, 1, 1, 1), phase.routes(24))
    phase.loss(out, batch.repeated(4))["loss_cls"].backward()
    together = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for width in WIDTHS:
        net.router.price = 1 - width
        classification_loss(net(batch.images).logits_BK, batch).mean().backward()
    apart = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert together.keys() == apart.keys()
    assert all(torch.allclose(together[name], apart[name], atol=1e-5) for name in apart)


def test_every_width_has_a_batchnorm_of_its_own() -> None:
    net, batch = make_net("slimmable", "channels"), batch_of(16)
    norm = net.backbone.routable[0].bn2  # type: ignore[union-attr]
    before = norm.running_mean.clone()
    net.train()
    net(batch.images, drawn_widths(net.router.specs, SlimmableOptions())(64)[16:32])
    assert (norm.running_mean != before).any(1).tolist() == [False, False, True, False]  # three of four parts ran


def test_distillation_in_place_by_hand() -> None:
    torch.manual_seed(0)
    batch, logits = batch_of(2), torch.randn(8, 10, requires_grad=True)
    loss = summed_loss(output(logits), batch.repeated(4), SlimmableOptions(distil=True))["loss_cls"]
    said = logits[:2].detach().softmax(1)
    by_hand = torch.nn.functional.cross_entropy(logits[:2], batch.labels)
    by_hand = by_hand + sum(torch.nn.functional.cross_entropy(logits[2 * i : 2 * i + 2], said) for i in (1, 2, 3))
    assert torch.allclose(loss, by_hand, atol=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    own = torch.autograd.grad(torch.nn.functional.cross_entropy(logits[:2], batch.labels), logits)[0]
    assert torch.allclose(grad[:2], own[:2]), "the widest must not learn from the narrower ones"


def test_a_repeated_batch_repeats_the_teacher_too() -> None:
    batch = batch_of(3)._replace(advice=Advice(torch.randn(3, 10), 0.5, 2.0))
    twice = batch.repeated(2)
    logits = torch.randn(3, 10)
    assert torch.equal(twice.images, torch.cat([batch.images] * 2))
    assert twice.superclasses is not None and twice.superclasses.tolist() == [0, 1, 0, 0, 1, 0]
    assert twice.index.tolist() == [0, 1, 2, 0, 1, 2]
    losses = classification_loss(logits.repeat(2, 1), twice)
    assert torch.allclose(losses, classification_loss(logits, batch).repeat(2))


@pytest.mark.parametrize(
    ("price", "parts"), [(-1.0, 4), (0.0, 4), (0.12, 4), (0.13, 3), (0.5, 2), (0.62, 2), (0.63, 1), (1.0, 1)]
)
def test_the_dial_picks_the_nearest_width(price: float, parts: int) -> None:
    net = make_net("slimmable", "channels")
    net.router.price = price
    assert kept(net(pictures(3)).trace.keep_BUG) == [parts] * 3
    assert net.router.macs() == 0.0


def test_a_net_may_have_fewer_widths_than_parts() -> None:
    specs = make_backbone(parts=8, width=16).specs
    router = SlimmableRouter(specs, SlimmableOptions(widths=[0.125, 0.5])).eval()
    net = RoutedNet(make_backbone(parts=8, width=16), router).eval()
    seen = set()
    for price in torch.linspace(-1, 1, 41).tolist():
        router.price = price
        seen |= set(kept(net(pictures(1)).trace.keep_BUG))
    assert seen == {1, 4}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"widths": [1.0]}, "router.widths must be two or more rising shares"),
        ({"widths": [0.5, 0.25]}, "router.widths must be two or more rising shares"),
        ({"widths": [0.0, 0.5]}, "router.widths must be two or more rising shares"),
        ({"widths": [0.5, 0.5]}, "router.widths must be two or more rising shares"),
        ({"widths": [0.5, float("nan")]}, "router.widths must be two or more rising shares"),
        ({"training": "some"}, "router.training must be one of all, sandwich, dealt"),
        ({"training": "sandwich", "widths": [0.5, 1.0]}, "sandwich needs a width between the ends"),
        ({"training": "dealt", "distil": True}, "router.distil needs every image at the widest"),
        ({"epochs": -1}, "router.epochs must lie between"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        SlimmableOptions(**wrong)


def test_widths_are_whole_parts_of_nested_units() -> None:
    with pytest.raises(InputError, match=r"0\.3 is no whole number of the 4 parts of .*set backbone\.parts"):
        SlimmableRouter(make_backbone().specs, SlimmableOptions(widths=[0.3, 1.0]))
    with pytest.raises(InputError, match=r"needs nested parts: set backbone\.unit=channels"):
        SlimmableRouter(make_backbone(unit="paths", parts=4).specs, SlimmableOptions())


@pytest.mark.parametrize("training", ["all", "sandwich", "dealt"])
def test_one_run_stands_for_every_width(training: str, tmp_path: Path) -> None:
    words = [*TINY, "router.name=slimmable", f"router.training={training}", "router.epochs=1"]
    words += [] if training == "dealt" else ["router.distil=true"]
    run = tmp_path / "run"
    assert main(["train", *words, "--out", str(run)]) == 0
    net, asked = restore(run / "last.pt")[0].eval(), []
    for width in (0.25, 0.5, 0.75, 1.0):
        net.router.price = 1 - width
        asked += ["--flops-target", f"{float(net(torch.zeros(1, 3, 16, 16)).macs_B) / net.cost.dense:.4f}"]
    assert main(["eval", str(run), *asked]) == 0
    rows = read_eval(run / "eval.csv")
    assert [row["routes"] for row in rows] == [1] * 4  # between two widths the images would be given to both
    shares = [row["macs_share"] for row in rows]
    assert shares == sorted(set(shares)) and shares[-1] == 1.0
