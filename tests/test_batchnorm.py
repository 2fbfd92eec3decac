"""experiments/batchnorm.py: what is shared, what is measured anew, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchnorm import columns, main, recalibrate, share_widest
from conftest import TINY
from dynroute.cli import main as dynroute
from dynroute.data import DataOptions, load
from dynroute.records import read_rows
from dynroute.units import WidthNorm
from tiny import make_net


@pytest.fixture(scope="module")
def widths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "widths"
    words = ["router.name=rnr", "router.pretrain_epochs=0", "router.widths_epochs=2"]
    words += ["router.rounds=0", "router.joint_epochs=0"]
    assert dynroute(["train", *TINY, *words, "--out", str(run)]) == 0
    return run


def test_all_widths_get_the_widest_and_only_its_values() -> None:
    net = make_net("rnr", "channels")
    norms = [m for m in net.modules() if isinstance(m, WidthNorm)]
    widest = [norm.running_var[-1].clone() for norm in norms]
    share_widest(net)
    assert norms
    for norm, value in zip(norms, widest, strict=True):
        assert torch.equal(norm.running_var, value.expand_as(norm.running_var))
        assert bool((norm.weight == norm.weight[-1]).all())


def test_statistics_are_the_mean_over_minibatches_of_the_route_asked_for() -> None:
    net = make_net("rnr", "channels")
    data = load(DataOptions(train_images=300, test_images=20, image_size=16))
    draws = columns(net)
    assert list(draws) == [f"top1_width_{k}_of_4" for k in (1, 2, 3, 4)] + ["top1_mixed"]
    norm = net.backbone.routable[0].bn2  # type: ignore[union-attr]
    before = norm.running_mean.clone()
    stem = next(m for m in net.backbone.stem.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    stem.register_forward_pre_hook(lambda module, given: seen.append(given[0].mean((0, 2, 3))))
    recalibrate(net, data, 256, draws["top1_width_2_of_4"])
    assert not net.training
    assert (norm.running_mean != before).any(1).tolist() == [False, True, False, False]
    assert torch.allclose(stem.running_mean, torch.stack(seen).mean(0), atol=1e-5)  # type: ignore[arg-type]


def test_a_row_a_variant(widths: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert main([str(widths), "--recalibrate", "128", "--test", "60", "--out", str(out)]) == 0
    rows = {row["variant"]: row for row in read_rows(out)}
    assert list(rows) == ["own", "own_recalibrated", "shared_recalibrated", "shared"]
    assert rows["own"]["top1_width_4_of_4"] == rows["shared"]["top1_width_4_of_4"]  # the widest is as it was
    assert {row["n"] for row in rows.values()} == {"60"}
    assert [row["recalibrated_on"] for row in rows.values()] == ["0", "128", "128", "0"]


def test_only_nested_units(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs["dmnn"])]) == 2
    assert "backbone.unit=channels" in capsys.readouterr().err
