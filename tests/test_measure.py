"""The dial on made-up nets, and scores by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynroute.calibration import EXACT, Fit
from dynroute.contracts import Batch, Output, Setting, Trace
from dynroute.measure import Dial, Scores, evaluate, make_dial
from dynroute.skipping import FastNet
from dynroute.testing import random_routes
from tiny import PAIRS, make_net, pictures


def dial(share: Callable[[float], float], limits: tuple[float, float] = (-1e4, 1e4)) -> tuple[Dial, list[float]]:
    """A dial and the prices it measures."""
    asked: list[float] = []

    def measured(price: float) -> tuple[float, float]:
        asked.append(price)
        return share(price), 0.1

    return Dial(measured, limits), asked


def smooth(price: float) -> float:
    return 0.2 + 0.8 / (1 + math.exp(min(5 * price, 700)))


def expected(share: Callable[[float], float], fit: Fit) -> float:
    """What a setting costs in the mean."""
    setting = fit.setting
    return (1 - setting.part) * share(setting.price) + setting.part * (share(setting.other) if setting.part else 0.0)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.6, 0.9, 0.99])
def test_a_smooth_dial_meets_its_target(target: float) -> None:
    finder, asked = dial(smooth)
    fit = finder.find(target)
    assert fit.share == pytest.approx(expected(smooth, fit)) == pytest.approx(target, abs=EXACT)
    assert len(asked) == len(set(asked)) <= 27
    setting = fit.setting  # the two prices of a mix are close where the dial is smooth
    assert not setting.part or smooth(setting.other) - smooth(setting.price) <= 0.01


def test_a_share_that_falls_where_it_should_rise_hides_none_between() -> None:
    """As of a limited net: at the lowest price the limit lowers more than at the next."""

    def limited(price: float) -> float:
        return 0.28 if price > 0.5 else 0.52 if price > 0.2 else 0.65 if price > 0.05 else 0.64

    finder, asked = dial(limited, (0.0, 1.0))
    fit = finder.find(0.55)
    assert sorted((limited(fit.setting.price), limited(fit.setting.other))) == [0.52, 0.65]
    assert fit.share == pytest.approx(0.55) and len(asked) == len(set(asked))


@settings(deadline=None)
@given(
    st.floats(0.1, 1),
    st.floats(1e-3, 1e3),
    st.floats(-100, 100),
)
def test_a_dial_of_any_scale_meets_its_target(target: float, steepness: float, centre: float) -> None:
    share = lambda p: 0.5 - 0.5 * math.tanh(steepness * (p - centre))  # noqa: E731
    finder, asked = dial(share)
    fit = finder.find(target, tries=60)
    assert fit.share == pytest.approx(expected(share, fit)) == pytest.approx(target, abs=EXACT)
    assert len(asked) == len(set(asked))


def test_a_lumpy_dial_is_met_by_a_mix_of_the_two_nearest_steps() -> None:
    steps = lambda p: 0.2 if p > 0.3 else 0.45 if p > -0.1 else 1.0  # noqa: E731
    finder, asked = dial(steps)
    for target, ends in ((0.3, (0.2, 0.45)), (0.4, (0.2, 0.45)), (0.7, (0.45, 1.0)), (0.8, (0.45, 1.0))):
        fit = finder.find(target)
        assert (steps(fit.setting.price), steps(fit.setting.other)) == ends
        assert fit.share == pytest.approx(expected(steps, fit)) == pytest.approx(target)
    assert len(asked) == len(set(asked))
    assert finder.find(0.451).setting == Setting(0.0)  # a step meets it


def test_a_step_narrow_beside_its_neighbours_is_found() -> None:
    """Bisection goes on from the end of a plateau, not from its price nearest zero."""
    steps = lambda p: 1.0 if p < 0.3 else 0.7 if p < 0.35 else 0.4  # noqa: E731
    finder, _ = dial(steps, (-1.0, 1.0))
    fit = finder.find(0.7)
    assert fit.setting.part == 0.0 and fit.share == 0.7


def test_a_dial_that_is_not_monotone_still_meets_its_targets() -> None:
    wavy = lambda p: smooth(p) + 0.1 * math.sin(8 * p) * math.exp(-(p**2))  # noqa: E731
    finder, asked = dial(wavy)
    for target in (0.3, 0.5, 0.6, 0.8):
        fit = finder.find(target)
        assert fit.share == pytest.approx(expected(wavy, fit)) == pytest.approx(target, abs=EXACT)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(("target", "end"), [(0.01, 0.2), (1.0, 0.9)])
def test_out_of_reach_the_best_end_is_returned(target: float, end: float) -> None:
    finder, asked = dial(lambda p: min(max(0.55 - p, 0.2), 0.9))
    assert finder.find(target).share == end
    assert len(asked) == 3  # both ends and the trained point: nothing else can help


def test_a_target_met_by_the_trained_point_leaves_the_price_alone() -> None:
    assert dial(smooth)[0].find(0.601).setting == Setting(0.0)


def test_where_the_dial_is_flat_the_price_nearest_zero_wins() -> None:
    finder, _ = dial(lambda p: 0.5)
    for target in (0.5, 0.9):
        assert finder.find(target).setting == Setting(0.0) and finder.find(target).share == 0.5


def test_several_targets_share_what_was_measured() -> None:
    finder, asked = dial(smooth)
    finder.find(0.5)
    before = len(asked)
    finder.find(0.5)
    assert len(asked) == before
    assert finder.span() == (pytest.approx(0.2), 1.0)
    assert len(asked) == before


@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_the_dial_of_a_net_expects_the_mean_share(name: str, unit: str) -> None:
    net = make_net(name, unit)
    batches = [batch_of(pictures(40, seed), start=40 * seed) for seed in (0, 1)]
    finder = make_dial(net, 80, lambda: batches)
    low, high = finder.span()
    assert (low, high) == pytest.approx(net.span())
    fit = finder.find((low + high) / 2)
    shares = []
    for price in (fit.setting.price, fit.setting.other):
        net.router.price = price
        shares.append(float(evaluate(net, batches).macs_N.mean()) / net.cost.dense)
    part = fit.setting.part
    assert fit.share == pytest.approx((1 - part) * shares[0] + part * shares[1])
    net.router.setting = fit.setting
    share_N = evaluate(net, batches).macs_N / net.cost.dense
    assert float(share_N.mean()) == pytest.approx(fit.share, abs=4 * float(share_N.std()) / 80**0.5 + 1e-9)


# --- evaluate ---------------------------------------------------------------------------------------------------


def batch_of(images: Tensor, labels: Tensor | None = None, start: int = 0) -> Batch:
    labels = torch.arange(len(images)) % 10 if labels is None else labels
    return Batch(images, labels, None, torch.arange(start, start + len(images)))


class Fake(nn.Module):
    """Logits are the image; the first pixel is the cost and says which part runs."""

    def forward(self, x: Tensor) -> Output:
        assert not self.training
        keep = F.one_hot(x[:, 0].long() % 2, 2)[:, None].float()
        return Output(x, Trace(keep, {}), x[:, 0].double() * 10)


def test_scores_by_hand() -> None:
    x = torch.tensor([[3.0, 1, 2, 0, 0, 0, 0], [0, 9, 8, 7, 6, 5, 4], [2, 1, 0, 0, 0, 3, 0]])
    labels = torch.tensor([0, 6, 1])
    net: Any = Fake()
    scores = evaluate(net, [batch_of(x[:2], labels[:2]), batch_of(x[2:], labels[2:], start=2)])
    assert net.training
    assert scores.predicted_N.tolist() == [0, 1, 5]
    assert scores.right_N.tolist() == [True, False, False]
    assert scores.top5_N.tolist() == [True, False, True]
    by_hand = [float(row.logsumexp(0) - row[k]) for row, k in zip(x, labels, strict=True)]
    assert scores.loss_N.tolist() == pytest.approx(by_hand)
    assert scores.macs_N.tolist() == [30, 0, 20]
    assert scores.keep_NUG.tolist() == [[[0, 1]], [[1, 0]], [[1, 0]]] and scores.keep_NUG.dtype == torch.uint8
    assert scores.index_N.tolist() == [0, 1, 2]
    assert scores.routes() == 2


def test_macs_quantiles() -> None:
    macs = torch.arange(101, dtype=torch.float64) * 2
    empty = torch.zeros(0)
    scores = Scores(empty, empty, empty, empty, empty, macs[torch.randperm(101)], empty, empty)
    assert [scores.macs_at(q) for q in (0.0, 0.05, 0.5, 0.95, 1.0)] == pytest.approx([0, 10, 100, 190, 200])


@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_evaluating_twice_or_with_the_fast_run_gives_the_same(name: str, unit: str) -> None:
    net = make_net(name, unit).train()
    batches = [batch_of(pictures(4, s), start=4 * s) for s in range(2)]
    one, two, fast = evaluate(net, batches), evaluate(net, batches), evaluate(net, batches, FastNet(net))
    assert torch.equal(one.macs_N, two.macs_N) and torch.equal(one.loss_N, two.loss_N)
    assert torch.equal(fast.keep_NUG, one.keep_NUG)
    assert torch.allclose(fast.loss_N, one.loss_N, atol=1e-4)


def test_random_routes_are_legal_for_the_span() -> None:
    net = make_net("dmnn", "channels")
    shares = net.cost(random_routes(net.backbone.specs, 100)) / net.cost.dense
    low, high = net.span()
    assert low - 1e-12 <= float(shares.min()) and float(shares.max()) <= high + 1e-12


@pytest.mark.parametrize("name", ["dmnn", "rnr"])
def test_the_dial_measures_in_eval_mode_how_much_images_differ(name: str) -> None:
    net = make_net(name, dict(PAIRS)[name])
    images = pictures(40)
    share_N = net(images).macs_B / net.cost.dense
    finder = make_dial(net.train(), 40, lambda: [batch_of(images)])
    finder.find(0.5)
    assert finder.calibration.images == 40
    point = finder.calibration.points[0.0]
    mean = share_N.mean()
    assert point.share == pytest.approx(float(mean))
    assert point.spread == pytest.approx(float((share_N - mean).square().mean().sqrt())) and point.spread > 0


def test_the_dial_of_one_image_has_no_spread() -> None:
    finder = make_dial(make_net(), 1, lambda: [batch_of(pictures(1))])
    finder.span()
    assert [point.spread for point in finder.calibration.points.values()] == [0.0, 0.0]


def test_another_executor_is_what_runs() -> None:
    net: Any = Fake()
    x = torch.tensor([[3.0, 1, 2, 0, 0, 0, 0]])
    scores = evaluate(net, [batch_of(x)], lambda images: net(images)._replace(macs_B=torch.tensor([7.0])))
    assert scores.macs_N.tolist() == [7.0]


def test_routes_that_differ_in_an_early_unit_are_two() -> None:
    none = torch.zeros(0)
    keep_NUG = torch.tensor([[[1, 0], [1, 1]], [[0, 1], [1, 1]], [[1, 0], [1, 1]]], dtype=torch.uint8)
    assert Scores(none, none, none, none, none, none, keep_NUG, none).routes() == 2
