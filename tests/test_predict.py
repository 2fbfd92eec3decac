"""`predict`, and the table of prices (budget.json) that lets it meet a target without data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import TINY
from dynroute.assembly import fingerprint, restore
from dynroute.calibration import Calibration, read_budget, write_budget
from dynroute.cli import main
from dynroute.config import load_config
from dynroute.data import load
from dynroute.provenance import environment
from dynroute.skipping import FastNet, save_forms
from dynroute.skipping.unit import MASKED


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a trained run, evaluated at one target."""
    folder = tmp_path / "run"
    shutil.copytree(runs["dmnn"], folder, ignore=shutil.ignore_patterns("eval.csv", "routes.csv", "budget.json"))
    assert main(["eval", str(folder), "--flops-target", "0.7"]) in (0, 3)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The first test images as PNG files."""
    data = load(load_config(overrides=TINY).data)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(data.test.images[i].numpy()).save(path)  # type: ignore[union-attr]
    return paths


def predicted(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["predict", *words, "--json"]) == 0
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)["rows"]
    return rows


@pytest.mark.parametrize("target", [[], ["--flops-target", "0.7"]])
def test_it_says_what_eval_found_for_the_same_images(
    target: list[str], run: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), *target]) in (0, 3)
    wanted = [line.split(",") for line in (run / "routes.csv").read_text().splitlines()]
    header, lines = wanted[0], [dict(zip(wanted[0], line, strict=True)) for line in wanted[1:]]
    asked = target[1] if target else ""
    lines = [line for line in lines if line["flops_target"] == asked][:5]
    found = predicted(capsys, str(run), *map(str, files), *target)
    assert header and [p["route"] for p in found] == [line["route"] for line in lines]
    names = restore(run / "last.pt")[2]["meta"]["data"]["class_names"]
    assert [p["label"] for p in found] == [names[int(line["predicted"])] for line in lines]
    assert [p["macs"] for p in found] == [float(line["macs"]) for line in lines]
    alone = predicted(capsys, str(run), str(files[3]), *target)
    assert alone[0]["route"] == found[3]["route"]


def test_forms_that_bench_has_measured_change_no_answer(
    run: Path, files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = predicted(capsys, str(run), *map(str, files))
    units = len(restore(run / "last.pt")[0].backbone.specs)
    asked: list[object] = []
    known = FastNet._unit
    monkeypatch.setattr(FastNet, "_unit", lambda self, *given: (asked.append(given[4]), known(self, *given))[1])
    save_forms(run / "forms.json", fingerprint(run / "last.pt"), environment(), {5: [MASKED] * units})
    after = predicted(capsys, str(run), *map(str, files))
    assert asked == [MASKED] * units
    for key in ("file", "label", "route", "macs"):
        assert [row[key] for row in before] == [row[key] for row in after]
    (run / "forms.json").write_text("{")
    assert main(["predict", str(run), *map(str, files)]) == 2
    assert "not a table of forms" in capsys.readouterr().err


def test_a_stored_setting_is_used_again_and_not_for_another_checkpoint(run: Path) -> None:
    mark = fingerprint(run / "last.pt")
    stored = read_budget(run, mark)
    assert stored is not None and len(stored.points) >= 3 and list(stored.searched) == [0.7]
    assert read_budget(run, "0" * 16) is None
    assert main(["eval", str(run), "--flops-target", "0.7"]) in (0, 3)
    assert read_budget(run, mark) == stored  # nothing had to be searched again


def test_a_target_between_those_asked_for_is_mixed_from_what_is_known(
    run: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "budget.json").read_text()
    found = predicted(capsys, str(run), *map(str, files), "--flops-target", "0.43")
    assert len(found) == 5
    assert (run / "budget.json").read_text() == before


def test_a_run_that_was_not_calibrated_is_said(
    run: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_budget(run, "0" * 16, Calibration(100), None)
    capsys.readouterr()
    assert main(["predict", str(run), str(files[0]), "--flops-target", "0.5"]) == 2
    assert "no calibrated setting for 0.5" in capsys.readouterr().err


def test_what_is_out_of_reach_says_the_range(run: Path, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--flops-target", "0.001"], ["--flops-max", "0.001"]):
        capsys.readouterr()
        assert main(["predict", str(run), str(files[0]), *words]) == 3
        out, err = capsys.readouterr()
        assert "0.001 is out of reach" in err and " to " in err and err.count("\n") == 1 and not out


def test_no_image_costs_more_than_the_limit(run: Path, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    free = predicted(capsys, str(run), *map(str, files))
    capped = predicted(capsys, str(run), *map(str, files), "--flops-max", "0.4")
    assert max(float(p["share"]) for p in free) > 0.4 >= max(float(p["share"]) for p in capped)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 3, "dials": [{"checkpoint": "MARK"}]}'])
def test_a_broken_table_is_said(content: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "budget.json").write_text(content.replace("MARK", fingerprint(run / "last.pt")))
    capsys.readouterr()
    assert main(["eval", str(run), "--flops-target", "0.6"]) == 2
    assert "budget.json is not a table" in capsys.readouterr().err


def test_a_table_of_the_first_format_is_fitted_anew_with_a_remark(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "budget.json").write_text('{"checkpoint": "x", "images": 9, "settings": [[0.0, 0.5]]}')
    capsys.readouterr()
    assert main(["eval", str(run), "--flops-target", "0.6"]) in (0, 3)
    assert "of an older version" in capsys.readouterr().err
    assert read_budget(run, fingerprint(run / "last.pt")) is not None


def test_wrong_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    for path, says in ((broken, "not a readable image"), (tmp_path / "nowhere.png", "nowhere.png")):
        capsys.readouterr()
        assert main(["predict", str(run), str(path)]) == 2
        out, err = capsys.readouterr()
        assert says in err and err.count("\n") == 1 and not out
    assert main(["predict", str(tmp_path), str(broken)]) == 2


def test_bigger_pictures_are_cut_to_size(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    Image.effect_noise((90, 40), 50).save(tmp_path / "gray.png")
    (found,) = predicted(capsys, str(run), str(tmp_path / "gray.png"))
    assert 0 < float(found["confidence"]) <= 1 and 0 < float(found["share"]) < 1.2  # type: ignore[arg-type]
