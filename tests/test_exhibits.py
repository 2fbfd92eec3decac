"""What an evaluation leaves for pictures: names of classes and units, and images as PNG."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tree
from dynroute.cli import main
from dynroute.data import Split
from dynroute.data.spec import DataSpec
from dynroute.exhibits import CLASSES, SIDE, ends, write_images
from dynroute.measure import Scores
from dynroute.records import read_rows
from dynroute.report import compare

SETTING = {"split": "test", "flops_target": "0.5", "checkpoint": "last"}


def scores(labels: list[int], macs: list[float]) -> Scores:
    n = len(labels)
    label_N, zero_N = torch.tensor(labels), torch.zeros(n)
    return Scores(label_N, label_N, zero_N, zero_N, zero_N, torch.tensor(macs), torch.zeros(n, 1, 1), torch.arange(n))


def test_the_ends_of_each_class_in_order() -> None:
    macs = torch.tensor([5.0, 1, 3, 9, 2, 2, 7, 4])
    found = ends(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), macs)
    assert found[:4] == [(0, "cheapest", 0, 1), (0, "cheapest", 1, 2), (0, "dearest", 0, 3), (0, "dearest", 1, 0)]
    assert found[4:6] == [(1, "cheapest", 0, 4), (1, "cheapest", 1, 5)], "of equals the first"
    assert len({place for *_, place in found}) == 8, "no image stands at both ends"
    assert [place for *_, place in ends(torch.zeros(8), torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 2]))] == [
        0,
        1,
        2,
        3,
        7,
        6,
        5,
        4,
    ]


def test_a_class_whose_images_all_cost_the_same_is_passed_over() -> None:
    found = ends(torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1, 1, 2]))
    assert {label for label, *_ in found} == {1}


def test_nothing_is_kept_where_all_cost_the_same_and_ten_classes_of_many() -> None:
    assert ends(torch.arange(4), torch.ones(4)) == []
    labels = torch.arange(100).repeat(2)
    found = ends(labels, torch.arange(200).float())
    kept = sorted({label for label, *_ in found})
    assert len(kept) == CLASSES and kept[0] == 0 and kept[-1] == 99


def test_pixels_are_those_of_the_data_and_large_ones_made_smaller(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for side in (16, 2 * SIDE):
        folder = tmp_path / str(side)
        folder.mkdir()
        pixels = torch.from_numpy(random.integers(0, 256, (4, side, side, 3), dtype=np.uint8))
        split = Split(pixels, torch.zeros(4, dtype=torch.int64))
        write_images(folder, SETTING, scores([0] * 4, [1.0, 2, 3, 4]), split, DataSpec("x", side, 1, ("a",)))
        listed = read_rows(folder / "images.csv")
        assert [(r["end"], r["index"]) for r in listed] == [
            ("cheapest", "0"),
            ("cheapest", "1"),
            ("dearest", "3"),
            ("dearest", "2"),
        ]
        stored = np.asarray(Image.open(folder / "images" / listed[2]["file"]))
        assert stored.shape == (min(side, SIDE), min(side, SIDE), 3)
        if side == 16:
            assert (stored == pixels[3].numpy()).all()


def test_another_setting_is_added_and_unnamed_files_go(tmp_path: Path) -> None:
    split = Split(torch.zeros(30, 8, 8, 3, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64))
    spec = DataSpec("x", 8, 1, ("a",))

    def kept(target: str, macs: list[float]) -> list[int]:
        write_images(tmp_path, SETTING | {"flops_target": target}, scores([0] * 30, macs), split, spec)
        rows = read_rows(tmp_path / "images.csv")
        assert {p.name for p in (tmp_path / "images").iterdir()} == {r["file"] for r in rows}
        return sorted(int(r["index"]) for r in rows)

    rising, middle = [float(i) for i in range(30)], [abs(14.5 - i) for i in range(30)]
    edges = [*range(5), *range(25, 30)]
    assert kept("0.5", rising) == edges
    assert kept("0.7", rising) == sorted(2 * edges)
    both = kept("0.5", middle)
    assert len(both) == 20 and {12, 16} <= set(both)
    assert len(set(kept("0.7", middle))) == 10


@pytest.mark.parametrize("method", ["dmnn", "static"])
def test_eval_leaves_names_and_images(tmp_path: Path, runs: dict[str, Path], method: str) -> None:
    run = shutil.copytree(runs[method], tmp_path / "run", ignore=shutil.ignore_patterns("*.csv"))
    assert main(["eval", str(run)]) == 0
    classes = read_rows(run / "classes.csv")
    assert len(classes) == 20 and classes[0]["superclass_name"] and classes[0]["class"]
    units = read_rows(run / "units.csv")
    (route,) = {tuple(map(len, r["route"].split("/"))) for r in read_rows(run / "routes.csv")}
    assert len(units) == len(route) and [int(u["parts"]) for u in units] == list(route)
    assert (run / "images.csv").exists() == (method == "dmnn"), "a static net has no dear images"
    before = tree(run)
    assert main(["eval", str(run)]) == 0
    assert tree(run) == before
    drawn = {path.stem for path in compare([run], tmp_path / "out").files if path.suffix == ".png"}
    assert ("image_grid" in drawn) == (method == "dmnn")
