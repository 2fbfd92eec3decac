"""The route report, against arithmetic by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dynroute.records import write_rows
from dynroute.report import Comparison, compare, read
from dynroute.report.read import LeftOut
from dynroute.report.routed import Routed, load
from dynroute.report.routes import RouteReport, information, rank_correlation, route_report
from test_report import DENSE, row, save

IMAGES: list[dict[str, Any]] = [  # three units: always on; on for half; of two parts of which the second never runs
    {"label": 0, "predicted": 0, "loss": 0.1, "share": 0.3, "route": "1/0/00"},
    {"label": 0, "predicted": 0, "loss": 0.2, "share": 0.3, "route": "1/0/00"},
    {"label": 0, "predicted": 1, "loss": 2.0, "share": 0.3, "route": "1/0/00"},
    {"label": 0, "predicted": 0, "loss": 0.3, "share": 0.3, "route": "1/0/00"},
    {"label": 1, "predicted": 1, "loss": 0.4, "share": 0.5, "route": "1/1/00"},
    {"label": 1, "predicted": 1, "loss": 0.5, "share": 0.5, "route": "1/1/00"},
    {"label": 1, "predicted": 1, "loss": 0.6, "share": 0.7, "route": "1/1/10"},
    {"label": 1, "predicted": 0, "loss": 3.0, "share": 0.7, "route": "1/1/10"},
]


def make_run(
    root: Path, name: str = "d", target: float = 0.5, extra: dict[str, list[Any]] | None = None, **row_: Any
) -> Path:
    """A run folder of IMAGES, with names of classes and units. extra: more columns of routes.csv."""
    (folder,) = save(root, row(0.45, 0.75, run=name, flops_target=target, **{"config_hash": name, **row_}))
    setting = {"split": "test", "flops_target": f"{target:.12g}", "checkpoint": "last"}
    columns = {k: [{k: v} for v in values] for k, values in (extra or {}).items()}
    rows = []
    for i, image in enumerate(IMAGES):
        own = {k: v for k, v in image.items() if k != "share"} | {"macs": image["share"] * DENSE, "index": i}
        rows.append({**setting, **own, **{k: v for column in columns.values() for k, v in column[i].items()}})
    write_rows(folder / "routes.csv", rows)
    write_rows(folder / "classes.csv", [{"label": 0, "class": "cat"}, {"label": 1, "class": "dog"}])
    units = [("stem", 1), ("a", 1), ("b", 2)]
    write_rows(folder / "units.csv", [{"unit": u, "name": n, "parts": p} for u, (n, p) in enumerate(units)])
    return folder


def routed(folder: Path) -> Routed:
    (found,) = load(read([folder])[0], [])
    return found


def test_the_report_of_eight_images(tmp_path: Path) -> None:
    report = route_report(routed(make_run(tmp_path)))
    assert (report.n, report.routes, report.units, report.parts) == (8, 3, 3, 4)
    assert (report.always_on, report.never_on) == (1, 1)
    rare = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert report.entropy_bits == pytest.approx((0.0, 1.0, rare))
    assert report.entropy_mean_bits == pytest.approx((1 + rare) / 3)
    assert report.entropy_max_bits == 1.0
    assert (report.common_share, report.common_top1, report.top1) == (0.5, 0.75, 0.75)
    assert report.share == pytest.approx(0.45)
    assert report.class_bits == pytest.approx(1.0), "the route tells the class"
    assert 0 < report.class_shuffled_bits < 0.7
    assert report.superclass_bits is report.rank_cost_difficulty is report.common_static_top1 is None
    assert report.rank_cost_loss == pytest.approx(
        float(np.corrcoef([2.5] * 4 + [5.5] * 2 + [7.5] * 2, [1, 2, 7, 3, 4, 5, 6, 8])[0, 1])
    )


def test_difficulty_superclass_and_the_static_twin(tmp_path: Path) -> None:
    folder = make_run(tmp_path, extra={"difficulty": [0, 0, 0, 0, 1, 1, 2, 2], "superclass": [5] * 8})
    save(tmp_path, row(0.3, 0.7, run="d", flops_target=0.5, config_hash="d", control="most_common"))
    report = route_report(routed(folder))
    assert report.rank_cost_difficulty == pytest.approx(1.0)
    assert (report.superclass_bits, report.superclass_shuffled_bits) == (0.0, 0.0)
    assert report.common_static_top1 == 0.7


def test_labels_that_have_nothing_to_do_with_routes_stand_at_chance() -> None:
    random = np.random.default_rng(1)
    routes, labels = random.integers(0, 400, 1000), random.integers(0, 10, 1000)
    bits, chance = information(routes, labels)
    assert bits > 1, "the plug-in estimate is far from zero on few images"
    assert bits == pytest.approx(chance, abs=0.06)
    bits, chance = information(labels, labels)
    assert bits == pytest.approx(math.log2(10), abs=0.02) and chance < 0.1


def test_rank_correlation_knows_ties_and_constants() -> None:
    a, b = pd.Series([1.0, 1, 2, 3]), pd.Series([10.0, 20, 20, 90])
    assert rank_correlation(a, b) == pytest.approx(float(np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1]))
    assert rank_correlation(a, -(b**3)) == pytest.approx(-rank_correlation(a, b))
    assert rank_correlation(a, pd.Series([1.0] * 4)) is None
    assert rank_correlation(a, pd.Series([1.0, 2, float("nan"), 3])) == pytest.approx(3**0.5 / 2)


def compared(tmp_path: Path, *folders: Path) -> Comparison:
    return compare(list(folders), tmp_path / "out")


def test_the_report_is_written_as_table_and_text(tmp_path: Path) -> None:
    static = make_run(tmp_path, "s", method="static")
    comparison = compared(tmp_path, make_run(tmp_path), static)
    assert [(r.run, r.method) for r in comparison.routes] == [("dmnn", "dmnn")], "a static net has no routes to tell of"
    (line,) = csv.DictReader((tmp_path / "out" / "routes_report.csv").open())
    assert list(line) == list(RouteReport.__dataclass_fields__)
    assert line["entropy_bits"].split()[:2] == ["0", "1"]
    assert (line["routes"], line["common_share"], line["superclass_bits"]) == ("3", "0.5", "")
    text = (tmp_path / "out" / "routes_report.md").read_text()
    assert "| dmnn" in text and "1.00 (" in text and "superclass, bits" not in text.split("\n\n")[0]


def test_of_several_seeds_the_lowest_is_reported(tmp_path: Path) -> None:
    folders = [make_run(tmp_path, f"d_s{seed}", seed=seed, config_hash="one") for seed in (2, 1)]
    (found,) = load(read(folders)[0], [])
    assert found.folder.name == "d_s1"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("1/1/10\n", "1/1/10", "half-written"),
        ("route", "path", "lacks the columns route"),
        ("1/1/10", "1/2/10", "that are no bits"),
        ("1/1/10", "1/1", "of different nets"),
        (",0.1,", ",much,", "is not a table of images"),
        ("0.5,last", "0.6,last", "no routes at target 0.5"),
    ],
)
def test_routes_that_cannot_be_read_are_named(tmp_path: Path, old: str, new: str, reason: str) -> None:
    folder = make_run(tmp_path)
    text = (folder / "routes.csv").read_text()
    (folder / "routes.csv").write_text(text[: -len(old)] + new if old.endswith("\n") else text.replace(old, new))
    comparison = compared(tmp_path, folder)
    assert comparison.routes == [] and len(comparison.table) == 1
    (said,) = (item for item in comparison.left_out if "routes" in str(item.path))
    assert reason in said.reason
    assert not (tmp_path / "out" / "routes_report.csv").exists()


def test_units_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    write_rows(folder / "units.csv", [{"unit": 0, "name": "only", "parts": 1}])
    left_out: list[LeftOut] = []
    assert load(read([folder])[0], left_out) == []
    assert "do not fit units.csv" in left_out[0].reason


def test_older_runs_without_names_are_reported_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for name in ("units.csv", "classes.csv"):
        (folder / name).unlink()
    found = routed(folder)
    assert found.units == ("unit 1", "unit 2", "unit 3") and found.parts == (1, 1, 2) and found.classes == {}
