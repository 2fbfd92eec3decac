"""The commands on tiny runs: what they print, where, and with which exit status."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import METHODS, TINY, tree
from dynroute import cli, plugins
from dynroute.assembly import build, dataset, restore
from dynroute.cli import main
from dynroute.config import load_config
from dynroute.contracts import InputError
from dynroute.records import EVAL_COLUMNS, read_eval, read_rows

ROW = {
    "top1", "macs_mean", "macs_dense", "macs_share", "flops_target", "params", "latency_ms_p50", "speedup", "n",
}  # fmt: skip  # names that scripts rely on
Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, *words: object, status: int = 0) -> tuple[str, str]:
    """What a command prints on stdout and stderr."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    return tuple(capsys.readouterr())  # type: ignore[return-value]


def program(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)


# --- train --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_train_fills_a_run_folder(method: str, runs: dict[str, Path]) -> None:
    names = {path.name for path in runs[method].iterdir()}
    assert names >= {"config.yaml", "train.csv", "last.pt", "best.pt", "log.txt"}
    assert not [name for name in names if name.startswith(".")], "a temporary file was left"
    rows = read_rows(runs[method] / "train.csv")
    assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    assert load_config(runs[method] / "config.yaml").router_name == method
    assert "calib_top1" in (runs[method] / "log.txt").read_text()


def test_train_says_each_epoch_and_what_comes_next(tmp_path: Path, capsys: Capture) -> None:
    out, err = said(capsys, "train", *TINY, *METHODS["static"], "--out", tmp_path / "run")
    assert err == ""
    assert "train 1/1: loss" in out
    assert out.splitlines()[-1] == f"done: dynroute eval {tmp_path / 'run'} --flops-target 0.5"


def test_train_without_out_goes_to_runs_and_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    said(capsys, "train", *TINY, "router.name=static", "router.epochs=0", "name=mine")
    assert (tmp_path / "runs" / "mine" / "last.pt").exists()


@pytest.mark.parametrize("method", METHODS)
def test_print_config_can_be_loaded_again(method: str, tmp_path: Path, capsys: Capture) -> None:
    words = [*TINY, *METHODS[method], "seed=4"]
    out, err = said(capsys, "train", *words, "--print-config")
    (tmp_path / "c.yaml").write_text(out)
    assert err == ""
    assert load_config(tmp_path / "c.yaml") == load_config(overrides=words)
    assert said(capsys, "train", "-c", tmp_path / "c.yaml", "--print-config")[0] == out


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = said(capsys, "train", *TINY, "--dry-run", "--out", "run")
    assert "parameters" in out
    assert tree(tmp_path) == {}


def test_interrupted_is_status_130_and_one_line_and_resume_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    words = ["train", *TINY, "router.name=static", "router.epochs=2", "--out"]
    heard = cli.Progress.hear

    def ctrl_c(self: cli.Progress, step: Any) -> None:
        heard(self, step)
        if step.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli.Progress, "hear", ctrl_c)
        _, err = said(capfd, *words, tmp_path / "run", status=130)
    assert err == f"dynroute: {cli.STOPPED}{cli.RESUME}\n"
    assert len(read_rows(tmp_path / "run" / "train.csv")) == 1
    said(capfd, *words, tmp_path / "run", "--resume")
    assert len(read_rows(tmp_path / "run" / "train.csv")) == 2


def test_resume_needs_no_configuration(tmp_path: Path, runs: dict[str, Path], capsys: Capture) -> None:
    shutil.copytree(runs["rnp"], tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    out, _ = said(capsys, "train", "--resume", "--out", tmp_path / "run")
    assert out.startswith("training rnp on shapes")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before, "a finished run is left as it is"


def test_a_run_goes_on_without_the_weights_that_it_started_from(
    tmp_path: Path, runs: dict[str, Path], capsys: Capture
) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(runs["static"], start)
    words = [*TINY, "router.name=static", "router.epochs=1", f"backbone.weights={start}"]
    said(capsys, "train", *words, "--out", run)
    shutil.rmtree(start)
    said(capsys, "train", "--resume", "--out", run)


def test_resume_refuses_data_of_other_classes(tmp_path: Path, capsys: Capture) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (40, 16, 16, 3), np.uint8),
        "train_labels": np.arange(40) % 2,
        "test_images": random.integers(0, 256, (8, 16, 16, 3), np.uint8),
        "test_labels": np.arange(8) % 2,
    }
    for folder, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "pets.npz", **arrays, class_names=np.array(names))
    words = ["data.name=npz", "backbone.width=8", "router.name=static", "router.epochs=1", "optim.batch_size=16"]
    run = tmp_path / "run"
    said(capsys, "train", *words, f"data.path={tmp_path}/a/pets.npz", "--out", run)
    before = tree(run)
    _, err = said(capsys, "train", *words, f"data.path={tmp_path}/b/pets.npz", "--out", run, "--resume", status=2)
    assert "other classes or another image size now than" in err and tree(run) == before


def test_a_folder_whose_name_holds_brackets_is_named_as_it_is_on_a_terminal() -> None:
    progress, heard = cli.Progress("training rnp on shapes, into runs/[a]/[/b]"), io.StringIO()
    progress.bar = SimpleNamespace(console=Console(file=heard, force_terminal=True, color_system=None, width=20))
    progress.begin()
    assert heard.getvalue() == progress.title + "\n"


def test_weights_of_a_run_are_taken_as_they_are_whatever_ranking_is_asked_for(
    tmp_path: Path, runs: dict[str, Path]
) -> None:
    trained = load_config(runs["dmnn"] / "config.yaml")
    spec = dataset(trained).spec
    want = restore(runs["dmnn"] / "last.pt")[0].backbone.state_dict()
    for key in ("rank=norm", "rank=none"):
        words = [f"backbone.{key}", f"backbone.weights={runs['dmnn']}"]
        found = build(load_config(runs["dmnn"] / "config.yaml", words), spec).backbone.state_dict()
        assert all(torch.equal(found[name], value) for name, value in want.items())


def test_a_loss_that_explodes_is_status_1_and_one_line(tmp_path: Path, capfd: Capture) -> None:
    wild = ["optim.lr=100", "router.gate_lr=1000", "router.resource_weight=1e6", "router.epochs=4"]
    _, err = said(capfd, "train", *TINY, *wild, "--out", tmp_path / "run", status=1)
    assert err.count("\n") == 1
    assert "the last good checkpoint is kept; train anew into another folder, with a lower optim.lr" in err
    said(capfd, "inspect", tmp_path / "run")


# --- eval ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_eval_json_is_one_document_with_the_documented_names(
    method: str, runs: dict[str, Path], capsys: Capture
) -> None:
    out, err = said(capsys, "eval", runs[method], "--json")
    (row,) = json.loads(out)["rows"]
    assert err == ""
    assert set(row) >= ROW
    assert row["method"] == method
    assert row["flops_target"] is None and row["latency_ms_p50"] is None and row["speedup"] is None
    assert 0 <= row["top1"] <= row["top5"] <= 1
    assert row["n"] == 100
    assert row["macs_share"] == pytest.approx(row["macs_mean"] / row["macs_dense"])
    assert row["macs_p5"] <= row["macs_mean"] * (1 + 1e-6) and row["macs_mean"] <= row["macs_p95"] * (1 + 1e-6)
    routes = read_rows(runs[method] / "routes.csv")
    trained = [r for r in routes if (r["split"], r["flops_target"]) == ("test", "")]
    assert sum(r["label"] == r["predicted"] for r in trained) == round(100 * row["top1"])
    assert sum(float(r["macs"]) for r in trained) / 100 == pytest.approx(row["macs_mean"])


def test_eval_of_several_targets_is_a_row_each(runs: dict[str, Path], capsys: Capture) -> None:
    targets = [1.0, 0.3, 0.55]
    flags = [word for target in targets for word in ("--flops-target", target)]
    out, err = said(capsys, "eval", runs["static"], *flags, "--json")
    rows = json.loads(out)["rows"]
    assert err == ""
    assert [row["flops_target"] for row in rows] == targets
    assert [row["macs_share"] for row in rows] == pytest.approx(targets, abs=0.02)
    stored = {row["flops_target"]: row["top1"] for row in read_eval(runs["static"] / "eval.csv")}
    assert all(stored[row["flops_target"]] == pytest.approx(row["top1"]) for row in rows)


def test_an_unreachable_target_is_status_3_and_says_the_reachable_range(runs: dict[str, Path], capsys: Capture) -> None:
    low = json.loads(said(capsys, "inspect", runs["dmnn"], "--json")[0])["share_cheapest"]
    out, err = said(capsys, "eval", runs["dmnn"], "--flops-target", 0.01, "--json", status=3)
    (row,) = json.loads(out)["rows"]
    assert row["macs_share"] == pytest.approx(low, abs=1e-3)
    assert err.startswith(f"target 0.01 missed: reached {low:.3f} on test; this net reaches {low:.3f} to ")
    assert err.count("\n") == 1


def test_eval_twice_gives_the_same_files(tmp_path: Path, runs: dict[str, Path], capsys: Capture) -> None:
    run = shutil.copytree(runs["rnp"], tmp_path / "run", ignore=shutil.ignore_patterns("eval.csv", "routes.csv"))
    first, _ = said(capsys, "eval", run, "--json")
    before = tree(run)
    second, _ = said(capsys, "eval", run, "--json")
    assert first == second
    assert tree(run) == before
    said(capsys, "eval", run, "--split", "calib")
    assert [row["split"] for row in read_eval(run / "eval.csv")] == ["test", "calib"]
    assert {row["n"] for row in read_eval(run / "eval.csv")} == {100.0, 40.0}


def test_eval_latency_times_the_run(runs: dict[str, Path], capsys: Capture) -> None:
    out, _ = said(capsys, "eval", runs["static"], "--latency", "--json")
    (row,) = json.loads(out)["rows"]
    assert row["latency_ms_p50"] > 0 and row["speedup"] > 0
    assert (row["latency_batch"], row["latency_threads"], row["latency_device"]) == (1, 1, "cpu")
    timed = {line["mode"]: line for line in read_rows(runs["static"] / "bench.csv")}
    assert float(timed["skipping"]["latency_ms_p50"]) == pytest.approx(row["latency_ms_p50"])
    assert timed["dense_best"]["clock"] == "thread"


def test_eval_for_people_is_a_table(runs: dict[str, Path], capsys: Capture) -> None:
    out, _ = said(capsys, "eval", runs["static"])
    assert "FLOPs (multiply-adds)" in out and "top-1 %" in out and "trained" in out


def test_eval_of_the_best_checkpoint(runs: dict[str, Path], capsys: Capture) -> None:
    last, best = (
        json.loads(said(capsys, "eval", runs["static"], "--checkpoint", c, "--json")[0]) for c in cli.Checkpoint
    )
    assert last["rows"][0]["loss"] == best["rows"][0]["loss"], "one epoch: best is last"
    (tmp := runs["static"] / "best.pt").rename(tmp.with_suffix(".hidden"))
    try:
        assert "cannot read" in said(capsys, "eval", runs["static"], "--checkpoint", "best", status=2)[1]
    finally:
        tmp.with_suffix(".hidden").rename(tmp)


# --- compare, inspect, list ---------------------------------------------------------------------------------


def test_compare_imports_no_torch_and_prints_one_document(
    tmp_path: Path, runs: dict[str, Path], capsys: Capture
) -> None:
    for method in ("static", "rnp"):
        said(capsys, "eval", runs[method])
    code = (
        "import sys; from dynroute.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    run = program(code, "compare", runs["static"], runs["rnp"], "--out", tmp_path / "out", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {row["method"] for row in found["rows"]} == {"static", "rnp"}
    assert {Path(file).name for file in found["files"]} >= {"table.csv", "table.md", "index.html"}
    assert all(Path(file).exists() for file in found["files"])


def test_compare_names_what_it_leaves_out(tmp_path: Path, runs: dict[str, Path], capsys: Capture) -> None:
    said(capsys, "eval", runs["static"])
    (tmp_path / "empty").mkdir()
    out, err = said(capsys, "compare", runs["static"], tmp_path / "empty", "--out", tmp_path / "out")
    assert "static" in out and "index.html" in out
    assert f"left out: {tmp_path / 'empty'}" in err


@pytest.mark.parametrize("method", METHODS)
def test_inspect_says_the_same_of_configuration_and_run(method: str, runs: dict[str, Path], capsys: Capture) -> None:
    of_run = json.loads(said(capsys, "inspect", runs[method], "--json")[0])
    of_file = json.loads(said(capsys, "inspect", runs[method] / "config.yaml", "--json")[0])
    row = json.loads(said(capsys, "eval", runs[method], "--json")[0])["rows"][0]
    assert of_run == of_file
    assert (of_run["params"], of_run["macs_dense"]) == (row["params"], row["macs_dense"])
    assert of_run["share_cheapest"] <= row["macs_share"] <= of_run["share_dearest"] + 1e-6
    assert of_run["macs_fixed"] + sum(u["macs"] for u in of_run["units"]) == pytest.approx(of_run["macs_dense"])
    assert "layer3.0" in said(capsys, "inspect", runs[method])[0]


@pytest.mark.parametrize(
    ("kind", "plural"), [("router", "routers"), ("backbone", "backbones"), ("dataset", "datasets")]
)
def test_list_names_every_entry_with_a_sentence(kind: str, plural: str, capsys: Capture) -> None:
    found = json.loads(said(capsys, "list", plural, "--json")[0])
    assert list(found) == [plural]
    assert set(found[plural]) == set(plugins.names(kind))
    assert all(found[plural].values())
    everything = said(capsys, "list")[0]
    assert all(f"\n  {name} " in everything for name in plugins.names(kind))


# --- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["eval", "--help"], ["--version"], []])
def test_help_is_quick(words: list[str]) -> None:
    code = (
        "import sys; from dynroute.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    run = program(code, *words)
    assert (run.returncode, run.stderr) == (0, "")
    assert "dynroute" in run.stdout or "Usage" in run.stdout


def test_train_help_explains_every_key(capsys: Capture) -> None:
    out, _ = said(capsys, "train", "--help")
    config = load_config()
    for section in ("data", "backbone", "optim"):
        for f in dataclasses.fields(getattr(config, section)):
            assert f"  {section}.{f.name} = " in out
    for name in plugins.names("router"):
        part = out.split(f"(router.name={name})")[1].split("\n[")[0]
        for f in dataclasses.fields(plugins.find("router", name).options):
            assert f"  router.{f.name} = " in part
    assert all(f"  {f.name} = " in out for f in dataclasses.fields(config.top))


# --- main ---------------------------------------------------------------------------------------------------


def test_an_input_error_of_many_lines_is_shown_as_one(monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    def broken(*_: object) -> None:
        raise InputError("first\n  second")

    monkeypatch.setattr("dynroute.catalogue.listing", broken)
    assert said(capfd, "list", status=2) == ("", "dynroute: first second\n")


def test_want_of_memory_is_status_2_and_one_line(monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("Unable to allocate 37.3 GiB")

    monkeypatch.setattr("dynroute.catalogue.listing", fail)
    assert main(["list"]) == 2
    assert capfd.readouterr().err == "dynroute: not enough memory: Unable to allocate 37.3 GiB\n"


def test_a_closed_output_costs_nothing(tmp_path: Path, runs: dict[str, Path]) -> None:
    shutil.copytree(runs["static"], tmp_path / "run", ignore=shutil.ignore_patterns("eval.csv"))
    run = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m dynroute eval run >&-"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert len(read_eval(tmp_path / "run" / "eval.csv")) == 1


def test_eval_says_that_training_was_stopped(tmp_path: Path, runs: dict[str, Path], capsys: Capture) -> None:
    shutil.copytree(runs["dmnn"], tmp_path / "run", ignore=shutil.ignore_patterns("eval.csv"))
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert content["meta"]["epochs"] == len(content["rows"]) == 1
    content["rows"] = []
    torch.save(content, tmp_path / "run" / "last.pt")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "has 0 of its 1 epochs" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("dynroute.catalogue.listing", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list"])


def test_eval_columns_hold_the_documented_names() -> None:
    assert set(EVAL_COLUMNS) >= ROW
