"""The pictures: their numbers against arithmetic by hand, their files, and names of all kinds."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dynroute.records import write_rows
from dynroute.report import compare, read
from dynroute.report.pictures import NAMES, accuracy, costs, images, routes, style, training
from test_report import STATIC, row, save
from test_routes import make_run, routed

EPOCHS = [("agent1", 1.0, 0.5, 0.9), ("agent1", 0.9, 0.6, 0.8), ("joint", 3.0, 0.7, 0.5)]


def full_run(root: Path, name: str = "d", **row_: Any) -> Path:
    """A run folder with all that pictures are made of."""
    folder = make_run(
        root, name, **{"latency_ms_p50": 2.0, "speedup": 1.5, "latency_batch": 1, "latency_threads": 2, **row_}
    )
    names = ("epoch", "phase", "loss", "calib_top1", "calib_share")
    write_rows(folder / "train.csv", [dict(zip(names, (i + 1, *e), strict=True)) for i, e in enumerate(EPOCHS)])
    (folder / "images").mkdir()
    setting = {"split": "test", "flops_target": "0.5", "checkpoint": "last"}
    places = [("cheapest", 0, 0, 0), ("dearest", 0, 1, 0), ("cheapest", 1, 4, 0), ("dearest", 1, 6, 0)]
    for _, _, index, _ in places:
        Image.fromarray(np.full((8, 8, 3), 20 * index, np.uint8)).save(folder / "images" / f"test_{index}.png")
    stored = [{"end": e, "label": k, "index": i, "rank": r, "file": f"test_{i}.png"} for e, k, i, r in places]
    write_rows(folder / "images.csv", [setting | one for one in stored])
    return folder


def lines_of(out: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((out / f"{name}.csv").open()))


def test_a_run_with_everything_has_every_picture(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "runs")
    files = {path.name for path in compare([folder], tmp_path / "out").files}
    assert {f"{name}.{kind}" for name in NAMES for kind in ("csv", "png", "svg")} <= files
    for name in NAMES:
        assert Image.open(tmp_path / "out" / f"{name}.png").width > 400
        assert lines_of(tmp_path / "out", name), name
    again = compare([folder], tmp_path / "again")
    for path in again.files:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_one_core_draws_the_same_bytes_as_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = full_run(tmp_path)
    for cores in (1, 2):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        compare([run], tmp_path / f"{cores}")
    drawn = sorted((tmp_path / "1").glob("*.*g"))
    assert len(drawn) == 2 * len(NAMES)
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


def test_pictures_written_into_a_results_folder_are_not_read_back(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "results")
    compare([tmp_path / "results"], tmp_path / "results")
    rows, left_out = read([tmp_path / "results"])
    assert [r["run"] for r in rows] == [folder.name] and left_out == []


def test_ids_of_two_pictures_never_meet(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "runs")
    compare([folder], tmp_path / "out")
    svgs = {n: style._own_ids((tmp_path / "out" / f"{n}.svg").read_text(), n) for n in NAMES}
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in svgs.values()]
    assert sum(map(len, ids)) == len(set.union(*ids)) > 100
    for svg, own in zip(svgs.values(), ids, strict=True):
        used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
        assert used <= own


def test_the_histogram_counts_every_image_once(tmp_path: Path) -> None:
    data = costs._histogram(routed(make_run(tmp_path)))
    assert data["images"].sum() == 8
    for _, line in data[data["images"] > 0].iterrows():
        assert any(line["share_from"] <= share < line["share_to"] for share in (0.3, 0.5, 0.7))


def test_evenly_spaced_costs_fall_evenly_into_bins(tmp_path: Path) -> None:
    found = routed(make_run(tmp_path))
    even = pd.DataFrame({"share": np.repeat(np.arange(1, 27) / 26, 10)})  # as of 26 equal parts
    data = costs._histogram(replace(found, images=even))
    assert set(data["images"]) == {10} and len(data) == 26


@pytest.mark.parametrize("cheapest", [0.249996, 0.27496, 0.3, 0.30004])
def test_the_first_bin_begins_below_the_cheapest_image(tmp_path: Path, cheapest: float) -> None:
    shares = np.r_[[cheapest] * 50, np.linspace(0.31, 0.6, 950) ** 1.01]
    data = costs._histogram(replace(routed(make_run(tmp_path)), images=pd.DataFrame({"share": shares})))
    assert data["images"].sum() == 1000 and data["images"].iloc[0] >= 50


def test_a_limit_and_the_best_checkpoint_have_panels_of_their_own(tmp_path: Path) -> None:
    """A row of a histogram says its target alone."""
    folder = make_run(tmp_path / "runs")
    own = list(csv.DictReader((folder / "eval.csv").open()))
    routes_ = list(csv.DictReader((folder / "routes.csv").open()))
    changes: list[dict[str, str]] = [{"flops_max": "0.9"}, {"checkpoint": "best"}]
    write_rows(folder / "eval.csv", [one | change for change in ({}, *changes) for one in own])
    write_rows(
        folder / "routes.csv", [{**one, "flops_max": "", **change} for change in ({}, *changes) for one in routes_]
    )
    compare([folder], tmp_path / "out")
    assert len({line["run"] for line in lines_of(tmp_path / "out", "flops_histogram")}) == 3
    svg = (tmp_path / "out" / "flops_histogram.svg").read_text()
    assert "best" in svg and "max 0.9" in svg


def test_mean_cost_by_class_and_its_interval(tmp_path: Path) -> None:
    table = costs.class_costs(routed(make_run(tmp_path)))
    assert list(table["class"]) == ["cat", "dog"] and list(table["images"]) == [4, 4]
    assert list(table["share"]) == pytest.approx([0.3, 0.6])
    half = 1.959964 * np.std([0.5, 0.5, 0.7, 0.7], ddof=1) / 2
    assert (table["low"][1], table["high"][1]) == pytest.approx((0.6 - half, 0.6 + half))


def test_execution_rates_by_class_and_by_superclass(tmp_path: Path) -> None:
    by_class = routes.rates(routed(make_run(tmp_path / "a")))
    found = {(g, u, p): r for g, u, p, r in by_class[["group", "unit_name", "part", "rate"]].itertuples(index=False)}
    assert found[("cat", "a", 0)] == 0 and found[("dog", "a", 0)] == 1 and found[("dog", "stem", 0)] == 1
    assert (found[("dog", "b", 0)], found[("dog", "b", 1)]) == (0.5, 0), "half of the images run the first of two parts"
    grouped = routes.rates(routed(make_run(tmp_path / "b", extra={"superclass": [0, 1] * 4})))
    assert set(grouped["by"]) == {"superclass"} and set(grouped["group"]) == {"superclass 0", "superclass 1"}


def test_a_net_of_many_parts_has_a_column_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MOST_PARTS", 3)
    table = routes.rates(routed(make_run(tmp_path)))
    found = {(g, u): r for g, u, r in table[["group", "unit_name", "rate"]].itertuples(index=False)}
    assert found[("dog", "b")] == 0.25 and table["part"].isna().all(), "half of the images run one part of two"
    assert len(found) == len(table)


def test_many_classes_without_superclasses_have_no_heat_map(tmp_path: Path) -> None:
    found = routed(make_run(tmp_path))
    assert routes.drawable_rates(found)
    many = np.arange(30) % (routes.MOST_CLASSES + 1)
    images_ = found.images.sample(30, replace=True, random_state=0).assign(label=many)
    assert not routes.drawable_rates(replace(found, images=images_))


def test_examples_are_the_first_of_equals(tmp_path: Path) -> None:
    table = routes.examples(routed(make_run(tmp_path)))
    assert list(table["index"]) == [0, 3, 6]
    assert list(table["image"]) == ["cheapest", "median", "dearest"]
    assert list(table["label_name"]) == ["cat", "cat", "dog"]


def test_images_are_listed_with_their_cost(tmp_path: Path) -> None:
    folder = full_run(tmp_path)
    table = images.listed(routed(folder), [])
    assert dict(zip(table["file"], table["share"], strict=True))["test_6.png"] == pytest.approx(0.7)
    (folder / "images" / "test_6.png").write_text("no picture")
    assert images._read(folder / "images" / "test_6.png") is None
    assert "image_grid" in [p.stem for p in compare([folder], tmp_path / "out").files]


@pytest.mark.parametrize(
    ("file", "reason"),
    [("images.csv", "no images"), ("train.csv", "no training curve"), ("bench.csv", "no times")],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, file: str, reason: str) -> None:
    folder = full_run(tmp_path / "runs")
    (folder / file).write_text("x,y\n1,2\n")
    comparison = compare([folder], tmp_path / "out")
    (said,) = comparison.left_out
    assert said.path == folder / file and reason in said.reason
    assert len(comparison.table) == 1


def test_training_curves_know_their_phases(tmp_path: Path) -> None:
    table = training.read_curves("d", full_run(tmp_path), [])
    assert training.phases(table) == [("agent1", 1, 2), ("joint", 3, 3)]
    assert list(table["calib_share"]) == [0.9, 0.8, 0.5]
    assert len(training.read_curves("none", tmp_path, [])) == 0


def test_times_stand_by_their_clock(tmp_path: Path) -> None:
    folder = full_run(tmp_path, machine="box")
    (own,) = accuracy.time_points(read([folder])[0]).to_dict("records")
    assert (own["latency_ms"], own["batch"], own["threads"], own["machine"]) == (2.0, 1, 2, "box")
    bench = {"mode": "skipping", "flops_target": "0.5", "batch": 8, "threads": 1, "device": "cpu", "machine": "box"}
    write_rows(folder / "bench.csv", [{**bench, "latency_ms_p50": 1.5, "speedup": 2, "macs_share": 0.45}])
    times = accuracy.time_points(read([folder])[0])
    assert list(times["batch"]) == [1, 8] and list(times["latency_ms"]) == [2.0, 1.5]
    assert list(times["top1"]) == [0.75, 0.75] and set(times["series"]) == {"dmnn"}
    compare([folder], tmp_path / "out")
    assert [x["latency_ms"] for x in lines_of(tmp_path / "out", "accuracy_latency")] == ["2.0", "1.5"]


def test_reported_points_stand_by_the_same_backbone_and_dataset(tmp_path: Path) -> None:
    near = row(0.3, 0.82, run="r", method="rnp", backbone="conv4")
    comparison = compare(save(tmp_path / "runs", near, *STATIC), tmp_path / "out")
    reported = [x for x in lines_of(tmp_path / "out", "accuracy_flops") if x["n_seeds"] == "0"]
    assert {(x["dataset"], x["backbone"]) for x in reported} == {("cifar10", "conv4")}
    assert {x["series"] for x in reported} == {"rnp, reported", "vanilla, reported"}
    one = next(x for x in reported if x["series"].startswith("rnp") and float(x["share"]) == pytest.approx(0.171))
    assert float(one["top1"]) == pytest.approx(0.821)
    assert set(comparison.table["method"]) == {"static", "rnp"}, "they are no rows of the table"
    data = accuracy.flops_points(comparison.table)
    styles = accuracy._styles(data)
    assert styles["rnp, reported"][:2] == styles["rnp"][:2], "the same colour and marker, hollow"
    assert accuracy._edges(styles["rnp, reported"], "rnp, reported")["markerfacecolor"] == "white"


def test_all_reported_series_of_a_place_differ_by_marker(tmp_path: Path) -> None:
    rows = [row(0.5, 0.76, run="d", backbone="resnet50", dataset="imagenet")]
    data = accuracy.flops_points(compare(save(tmp_path / "runs", *rows), tmp_path / "out").table)
    styles = accuracy._styles(data)
    assert len(styles) > 5
    pairs = [(look.marker, name.endswith(accuracy.REPORTED)) for name, look in styles.items()]
    assert len(set(pairs)) == len(pairs)


def test_the_caption_says_how_many_runs_are_not_drawn(tmp_path: Path) -> None:
    folders = [full_run(tmp_path / "runs", f"d{i}") for i in range(style.MOST_PANELS + 2)]
    from dynroute.report import pictures, tables
    from dynroute.report.routed import load

    rows, left_out = read(folders)
    (tmp_path / "out").mkdir()
    drawn = pictures.write_all(
        tables.build(rows, left_out).main, rows, load(rows, left_out), left_out, tmp_path / "out"
    )
    captions = {picture.name: picture.caption for picture in drawn}
    assert "2 more runs are not drawn." in captions["cost_by_class"]
    assert "not drawn" not in captions["accuracy_flops"]
    assert all(picture.svg_text.startswith("<svg") for picture in drawn)


def test_long_names_are_cut_in_the_middle_and_stay_apart() -> None:
    long = [
        "resnet20_rnr_with_many_words_and_lr_0.1_seed_0",
        "resnet20_rnr_with_fewer_words_and_lr_0.1_seed_0",
        "short",
        "_hidden",
    ]
    shown = style.shortened(long)
    assert all(len(name) <= style.LONGEST + 4 for name in shown)
    assert shown[0].startswith("resnet20_rnr") and shown[0].endswith("_seed_0") and shown[1].endswith("[2]")
    assert shown[2] == "short" and not shown[3].startswith("_")
    assert len(set(shown)) == 4


@pytest.mark.parametrize("name", ["<b>&x", "$x_{$", "%s", "ein Name mit Umlauten: äöü", "]]>--><script>"])
def test_strange_names_are_only_text(tmp_path: Path, name: str) -> None:
    folder = full_run(tmp_path / "runs", "d")
    write_rows(folder / "classes.csv", [{"label": 0, "class": name}, {"label": 1, "class": "dog"}])
    compare([folder], tmp_path / "out")
    for kind in NAMES:
        svg = (tmp_path / "out" / f"{kind}.svg").read_text()
        assert "<script" not in svg and "<b>" not in svg
    assert lines_of(tmp_path / "out", "cost_by_class")[0]["class"] == name


def test_a_collapsed_run_is_told_of_but_not_mapped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs")
    text = (folder / "routes.csv").read_text()
    (folder / "routes.csv").write_text(re.sub(r"1/[01]/[01]0", "1/0/00", text))
    comparison = compare([folder], tmp_path / "out")
    assert comparison.routes[0].routes == 1 and comparison.routes[0].entropy_max_bits == 0
    drawn = {path.stem for path in comparison.files if path.suffix == ".svg"}
    assert drawn == {"accuracy_flops", "flops_histogram"}


def test_no_data_no_picture(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, row(0.5, 0.9))
    assert len(accuracy.time_points(read([folder])[0])) == 0
    files = compare([folder], tmp_path / "out").files
    assert {path.stem for path in files if path.suffix == ".png"} == {"accuracy_flops"}
