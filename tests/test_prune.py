"""experiments/prune.py: what is cut, what it costs, and that its rows are read like those of any run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from conftest import TINY
from dynroute.cli import main
from dynroute.contracts import InputError
from dynroute.records import read_eval, read_rows
from dynroute.report import compare
from dynroute.testing import close, count_macs, shake
from tiny import make_backbone, pictures

pytest.importorskip("torch_pruning")
SCRIPT = Path(__file__).parent.parent / "experiments" / "prune.py"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def prune() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prune", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["A", "B"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / request.param
    words = [*TINY, "router.name=static", "router.epochs=1", f"backbone.shortcut={request.param}"]
    assert main(["train", *words, "--out", str(folder)]) == 0
    assert main(["eval", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_the_plain_net_is_the_dense_net_and_a_copy(prune: ModuleType, shortcut: str) -> None:
    torch.manual_seed(0)
    body, x = make_backbone(shortcut=shortcut).eval(), pictures(3)
    shake(body)
    net = prune.plain_net(body)
    wanted = stem = body.stem(x)
    for unit in body.routable:
        wanted = unit(wanted)
    wanted = body.head(wanted)
    assert close(net(x), wanted)
    assert count_macs(net, x[:1]) == body.dense_macs
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(body.stem(x), stem) and bool(stem.any()), "the backbone's own weights were changed"


def test_rows_are_those_of_a_run(prune: ModuleType, dense: Path, tmp_path: Path, capsys: Capture) -> None:
    words = [str(dense), "--share", "0.6", "--by", "l1", "--by", "taylor", "--by", "group", "--epochs", "1"]
    assert prune.main([*words, "--out", str(tmp_path)]) == 0
    runs = sorted(tmp_path.iterdir())
    assert [run.name for run in runs] == ["prune_group_60", "prune_l1_60", "prune_taylor_60"]
    (full,) = read_eval(dense / "eval.csv")
    params = set()
    for run in runs:
        (row,) = read_eval(run / "eval.csv")
        assert row["method"] == run.name.removesuffix("_60")
        assert row["macs_dense"] == full["macs_dense"] and 0.5 < row["macs_share"] <= 0.6
        assert row["params"] < full["params"] and row["n"] == 100 and row["epochs"] == 1
        assert [line["phase"] for line in read_rows(run / "train.csv")] == ["tune"]
        net = {k: v for k, v in torch.load(run / "last.pt")["model"].items() if k.endswith("weight")}
        assert sum(v.numel() for v in net.values()) <= row["params"]
        params.add(row["params"])
    assert len(params) > 1
    table = compare([dense, *runs], tmp_path / "comparison").table
    assert list(table["method"]) == ["static", "prune_group", "prune_l1", "prune_taylor"]
    assert capsys.readouterr().out.count("share 0.5") == 3


def test_a_stopped_row_goes_on_and_ends_as_if_never_stopped(
    prune: ModuleType, dense: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(dense), "--share", "0.6", "--by", "taylor", "--epochs", "2"]
    assert prune.main([*words, "--out", str(tmp_path / "whole")]) == 0
    kept = prune.fit

    def stopped(*given: Any, listener: Any = None, **named: Any) -> Any:
        def heard(step: Any) -> None:
            if step.epoch == 2:
                raise KeyboardInterrupt

        return kept(*given, listener=heard, **named)

    monkeypatch.setattr(prune, "fit", stopped)
    again = [*words, "--out", str(tmp_path / "stopped")]
    with pytest.raises(KeyboardInterrupt):
        prune.main(again)
    monkeypatch.setattr(prune, "fit", kept)
    assert len(read_rows(tmp_path / "stopped" / "prune_taylor_60" / "train.csv")) == 1
    assert prune.main(again) == 2 and "add --resume" in capsys.readouterr().err
    assert prune.main([*again, "--epochs", "3", "--resume"]) == 2
    assert "pruned with other settings" in capsys.readouterr().err
    assert prune.main([*again, "--resume"]) == 0
    ends = [torch.load(tmp_path / f / "prune_taylor_60" / "last.pt")["model"] for f in ("whole", "stopped")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert prune.main([*again, "--resume"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert prune.main([*again, "--epochs", "3", "--resume"]) == 2
    assert "pruned with other settings" in capsys.readouterr().err


def test_beside_zero_padding_only_hidden_channels_go(prune: ModuleType, dense: Path) -> None:
    evaluator = prune.Evaluator.of(dense)
    net = prune.plain_net(evaluator.net.backbone)
    prune.prune(net, "group", 0.5, evaluator.data, 32, 0)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    sums = [convs[0].out_channels, *(c.out_channels for c in convs[2::2])]
    hidden = [c.out_channels for c in convs[1::2]]
    assert sum(hidden) < 8 + 16 + 32
    assert (sums == [8, 8, 16, 32]) == (dense.name == "A")
    if dense.name == "A":
        with pytest.raises(InputError, match=r"group cannot prune this net to 0\.01 of its multiply-adds"):
            prune.prune(net, "group", 0.01, evaluator.data, 32, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "1.5"], "--share must lie between"),
        (["--share", "0.5", "--epochs", "-1"], "--epochs must lie between"),
    ],
)
def test_wrong_input_is_one_line(
    prune: ModuleType, dense: Path, tmp_path: Path, capsys: Capture, words: list[Any], message: str
) -> None:
    assert prune.main([str(dense), "--by", "l1", *words, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_only_dense_runs_are_pruned(prune: ModuleType, runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    for name in ("static", "dmnn"):
        words = [str(runs[name]), "--by", "l1", "--share", "0.5", "--out", str(tmp_path / "out")]
        assert prune.main(words) == 2
        assert "is no dense run" in capsys.readouterr().err
