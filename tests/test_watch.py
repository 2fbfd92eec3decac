"""What is watched while a router trains: collapse to one route, parts that never change, a missed target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY
from dynroute.cli import main
from dynroute.contracts import UnitSpec
from dynroute.fit import remarks
from dynroute.measure import Scores
from dynroute.net import RoutedNet
from dynroute.records import read_rows
from dynroute.routers import Phase, cross_entropy
from dynroute.routers.gates import DmnnOptions, GateRouter, phases
from tiny import make_backbone

SPEC = UnitSpec("u", 4, 2, "free", True, (0.5, 0.5))


def test_executed_share_entropy_and_fixed_parts_by_hand() -> None:
    keep_NUG = torch.tensor(
        [[[1, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]], [[1, 0, 0], [1, 0, 0]]]
    )
    none = torch.zeros(4)
    scores = Scores(none, none, none, none, none, none, keep_NUG.to(torch.uint8), none)
    watched = scores.watched([SPEC, replace(SPEC, parts=3, part_shares=(0.5, 0.3, 0.2))])
    quarter = -(0.25 * torch.tensor(0.25).log2() + 0.75 * torch.tensor(0.75).log2())
    assert watched == {
        "executed": pytest.approx(((1 + 0.25) / 2 + 0.5 / 3) / 2),  # the third column of the first unit is padding
        "entropy": pytest.approx((float(quarter) + 1) / 5),
        "always_on": 1,
        "never_on": 2,
    }


def said(
    trains: tuple[str, ...] = ("backbone", "router"),
    target: float | None = 0.5,
    target_share: float | None = None,
    **row: Any,
) -> str:
    phase = Phase("p", 1, trains, cross_entropy, target=target, target_share=target_share)
    return "; ".join(remarks(phase, {"calib_routes": 7, "calib_executed": 0.5, "calib_share": 0.9, **row}))


def test_remarks_are_made_where_something_is_wrong_only() -> None:
    assert said() == said(calib_executed=0.549) == said(target=None, calib_executed=0.9) == ""
    assert said(calib_routes=1) == "all images of the calibration split take one route"
    assert said(("backbone",), calib_routes=1) == ""  # a static net has one route by its nature
    for executed in (0.44, 0.56):
        assert (
            said(calib_executed=executed)
            == f"{executed:.3f} of the parts run on the calibration split, 0.500 are asked for"
        )


def test_a_share_of_the_multiply_adds_may_be_what_is_asked_for() -> None:
    assert said(target=None, target_share=0.94) == ""
    assert said(target=None, target_share=0.5) == (
        "0.900 of the dense net's FLOPs run on the calibration split, 0.500 are asked for"
    )


@pytest.mark.parametrize(
    ("words", "parts", "share"),
    [
        ({}, 0.5, None),
        ({"resource": "flops"}, None, 0.5),
        ({"resource": "flops", "budget": [0.2, 0.8]}, None, 0.5),
        ({"resource": "aig", "targets": [0.2, 0.4, 0.9]}, 0.5, None),
    ],
)
def test_gates_are_watched_by_what_their_loss_asks_for(
    words: dict[str, Any], parts: float | None, share: float | None
) -> None:
    backbone = make_backbone(unit="paths")
    options = DmnnOptions(**({"target": 0.5} | words if "budget" not in words else words))
    (phase,) = phases(RoutedNet(backbone, GateRouter(backbone.specs, options)), options)
    assert phase.target == (pytest.approx(parts) if parts else None)
    assert phase.target_share == (pytest.approx(share) if share else None)


def test_remarks_reach_screen_log_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["data.train_images=60", "data.test_images=20", "data.superclasses=none", "optim.lr=1e-6"]
    words = [*TINY, *small, "router.target=0.3", "router.epochs=1"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    printed, log = capsys.readouterr().out, (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    for text in (printed, log):
        assert "note: no category loss: the data have no superclasses" in text
        assert "note: all images of the calibration split take one route" in text
        assert "note: 1.000 of the parts run on the calibration split, 0.300 are asked for" in text
    (row,) = read_rows(tmp_path / "run" / "train.csv")
    watched = {key: float(row[f"calib_{key}"]) for key in ("executed", "entropy", "always_on", "never_on")}
    assert watched == {"executed": 1, "entropy": 0, "always_on": 6, "never_on": 0}
    assert "1.000 of the parts run, 1 routes, entropy 0.00, 6 parts always on, 0 never" in printed


def test_a_share_is_missed_from_a_twentieth_on_either_side() -> None:
    for target in (0.84, 0.96):
        assert f"{target:.3f} are asked for" in said(target=None, target_share=target)
    assert said(target=None, target_share=0.86) == ""
