"""A dense teacher, and runs that start from other runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import SHORT_RNP, TINY
from dynroute.assembly import build, make_teacher, restore
from dynroute.cli import main
from dynroute.config import load_config
from dynroute.data import load
from dynroute.records import read_rows


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of one epoch."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    assert main(["train", *TINY, "router.name=static", "router.epochs=1", "--out", str(folder)]) == 0
    return folder


def images(count: int = 6) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, 16, 16)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "state dict", "start"])
def test_the_teacher_is_the_dense_net(kind: str, dense: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.pt"
    torch.save(restore(dense / "last.pt")[0].backbone.dense_state(), plain)
    keys = {
        "run": [f"optim.teacher={dense}"],
        "checkpoint": [f"optim.teacher={dense / 'last.pt'}"],
        "state dict": [f"optim.teacher={plain}"],
        "start": [f"backbone.weights={plain}", "optim.teacher=start"],
    }[kind]
    wanted = restore(dense / "last.pt")[0].eval()(images()).logits_BK.detach()
    for amp, precision in (("none", 1e-4), ("bf16", 0.03 * float(wanted.abs().max()))):
        config = load_config(overrides=[*TINY, *SHORT_RNP, *keys, f"optim.amp={amp}"])
        teacher = make_teacher(config, load(config.data).spec, torch.device("cpu"))
        assert teacher is not None
        said = teacher(images())
        assert said.dtype is torch.float32
        assert torch.allclose(said, wanted, atol=precision)
        assert torch.allclose(said, wanted, atol=1e-4) == (amp == "none"), (
            "it computes in the precision of the training"
        )


def test_an_older_agent_with_a_budget_still_teaches_and_says_why_it_does_not_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    keys = [
        "router.name=rnr",
        "router.hidden=8",
        "router.pretrain_epochs=0",
        "router.widths_epochs=1",
        "router.rounds=0",
    ]
    assert main(["train", *TINY, *keys, "router.joint_epochs=0", "--out", str(run)]) == 0
    wanted = restore(run / "last.pt")[0].eval()
    content = torch.load(run / "last.pt", weights_only=True)
    content["model"]["router.log_charge_K"] = content["model"].pop("router.charge_K")
    torch.save(content, run / "last.pt")
    config = load_config(overrides=[*TINY, *SHORT_RNP, f"optim.teacher={run}", "optim.amp=none"])
    teacher = make_teacher(config, load(config.data).spec, torch.device("cpu"))
    assert teacher is not None
    dense = wanted(images(), wanted.dense_routes(6)).logits_BK
    assert torch.allclose(teacher(images()), dense, atol=1e-4)
    capsys.readouterr()
    assert main(["eval", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "last.pt" in said and "train it anew" in said


def test_a_net_that_listens_to_the_teacher_alone_becomes_like_it(dense: Path, tmp_path: Path) -> None:
    start = [
        f"backbone.weights={dense}",
        "optim.lr=1e-8",
        "router.name=static",
        "router.epochs=1",
        "data.augment=false",
    ]
    for weight in (0.0, 1.0):
        keys = [f"optim.teacher={dense}", f"optim.teacher_weight={weight}"]
        assert main(["train", *TINY, *start, *keys, "--out", str(tmp_path / str(weight))]) == 0
    own, taught = (float(read_rows(tmp_path / w / "train.csv")[0]["loss_cls"]) for w in ("0.0", "1.0"))
    assert own > 1.0  # cross entropy of a net of one epoch
    assert taught < 0.25 * own  # the divergence from itself is what BatchNorm's train mode makes of it


def test_a_run_starts_from_a_widths_run_as_it_is_and_from_a_dense_run_ranked(dense: Path, tmp_path: Path) -> None:
    widths = tmp_path / "widths"
    stage = ["router.rounds=0", "router.widths_epochs=1"]
    assert main(["train", *TINY, *SHORT_RNP, *stage, f"backbone.weights={dense}", "--out", str(widths)]) == 0
    spec = load(load_config(overrides=TINY).data).spec
    for source, same in ((widths, True), (dense, False)):
        trained = restore(source / "last.pt")[0].backbone.state_dict()
        made = build(
            load_config(overrides=[*TINY, *SHORT_RNP, f"backbone.weights={source}"]), spec
        ).backbone.state_dict()
        assert trained.keys() == made.keys()
        assert all(torch.equal(trained[k], made[k]) for k in trained) == same
    wanted = restore(dense / "last.pt")[0].eval()
    made_net = build(load_config(overrides=[*TINY, "router.name=static", f"backbone.weights={dense}"]), spec).eval()
    assert torch.allclose(made_net(images()).logits_BK, wanted(images()).logits_BK, atol=1e-4)


def test_the_agent_learns_against_the_teacher_and_records_alpha(dense: Path, tmp_path: Path) -> None:
    keys = ["router.name=rnr", "router.pretrain_epochs=0", "router.widths_epochs=0", "router.agent_epochs=1"]
    keys += ["router.joint_epochs=1", "router.hidden=8", f"backbone.weights={dense}", "optim.teacher=start"]
    assert main(["train", *TINY, *keys, "--out", str(tmp_path / "run")]) == 0
    rows = read_rows(tmp_path / "run" / "train.csv")
    assert [row["phase"] for row in rows] == ["agent1", "joint"]
    assert all(float(row["note_alpha"]) > 0 and float(row["note_charge_low"]) > 0 for row in rows)
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[0]["loss_td"]))  # what is noted is not minimised
    assert main(["eval", str(tmp_path / "run"), "--flops-target", "0.6"]) in (0, 3)
