"""Routed rows beside their controls at equal multiply-adds and at equal time, against arithmetic by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from dynroute.records import BenchRow, EvalRow, merge_bench, read_rows, write_rows
from dynroute.report import Comparison, compare
from dynroute.report.cells import cells, control_cells
from dynroute.report.controls import Point, frontier, neighbours
from test_report import STATIC, row, save


def net(method: str, share: float, top1: float, **changes: Any) -> EvalRow:
    name = f"{method}{share}"
    return row(share, top1, **{"run": name, "config_hash": name, "method": method, **changes})


def lines(made: Comparison, **wanted: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = made.controls.to_dict("records")  # type: ignore[assignment]
    return [line for line in found if all(line[k] == v for k, v in wanted.items())]


def test_only_what_no_cheaper_net_matches_is_a_control() -> None:
    points = [
        Point(cost, top1, {})
        for cost, top1 in ((0.6, 0.8), (0.2, 0.7), (0.2, 0.6), (0.4, 0.65), (0.5, 0.8), (0.9, 0.9))
    ]
    assert [(p.cost, p.top1) for p in frontier(points)] == [(0.2, 0.7), (0.5, 0.8), (0.9, 0.9)]


@pytest.mark.parametrize(
    ("cost", "weights", "relation"),
    [
        (0.1, {0: 1.0}, "dearer"),
        (0.19, {0: 1.0}, "equal"),
        (0.2, {0: 1.0}, "equal"),
        (0.3, {0: 0.75, 1: 0.25}, "equal"),
        (0.61, {1: 1.0}, "equal"),
        (0.7, {1: 1.0}, "equal"),  # dearer nets there are, but none is better
        (0.73, {1: 1.0}, "cheaper"),
    ],
)
def test_a_cost_stands_between_its_neighbours(cost: float, weights: dict[int, float], relation: str) -> None:
    near = neighbours(cost, [0.2, 0.6], tolerance=0.02, dearest=0.7)
    assert (near.weights, near.relation) == (pytest.approx(weights), relation)


def test_a_static_net_set_to_a_target_is_no_narrower_net(tmp_path: Path) -> None:
    """Its weights are those of the width it was trained at: at another one it is worth nothing."""
    dialled = [net("static", 0.5, 0.12, flops_target=0.5), net("static", 0.55, 0.11, flops_max=0.6)]
    made = compare(save(tmp_path / "r", *STATIC, net("dmnn", 0.5, 0.86), *dialled), tmp_path / "out")
    (line,) = lines(made, method="dmnn", control="static, narrower")
    assert line["control_top1"] == pytest.approx(0.85)
    with (tmp_path / "out" / "accuracy_flops.csv").open(newline="") as file:
        series = {float(r["share"]): r["series"] for r in csv.DictReader(file)}
    assert {share: series[share] for share in (0.25, 0.75)} == {0.25: "static", 0.75: "static"}
    assert "static" not in (series[0.5], series[0.55])


def test_the_static_line_of_a_picture_is_of_one_dense_net(tmp_path: Path) -> None:
    """Nets of another width are parts of another whole: the table compares by multiply-adds, the picture by shares."""
    wide = [
        net("static", s, t, run=f"w{s}", config_hash=f"w{s}", macs_mean=s * 160e6)
        for s, t in ((0.25, 0.92), (1.0, 0.95))
    ]
    compare(save(tmp_path / "r", *STATIC, *wide, net("dmnn", 0.5, 0.86)), tmp_path / "out")
    with (tmp_path / "out" / "accuracy_flops.csv").open(newline="") as file:
        places = {r["macs_dense"]: 0 for r in csv.DictReader(file)}
    assert list(places) == ["40000000.0", "160000000.0"]
    svg = (tmp_path / "out" / "accuracy_flops.svg").read_text()
    assert "of 40 M multiply-adds" in svg and "of 160 M multiply-adds" in svg


@pytest.mark.parametrize(("clock", "compared"), [("thread", True), ("wall", False)])
def test_times_of_two_clocks_are_not_compared(tmp_path: Path, clock: str, compared: bool) -> None:
    folders = save(tmp_path / "r", *STATIC, net("dmnn", 0.5, 0.86))
    for folder, ms in zip(folders, (3.0, 2.0, 5.0), strict=True):
        by = clock if folder.name.startswith("dmnn") else "thread"
        merge_bench(folder / "bench.csv", [bench_row(ms, by)])
    made = compare(folders, tmp_path / "out")
    assert bool([x for x in lines(made, method="dmnn") if x["basis"] != "FLOPs"]) is compared


def test_a_bench_by_another_clock_takes_no_rows_place(tmp_path: Path) -> None:
    for ms, clock in ((3.0, "thread"), (9.0, "wall"), (4.0, "thread")):
        merge_bench(tmp_path / "bench.csv", [bench_row(ms, clock)])
    assert [(r["clock"], float(r["latency_ms_p50"])) for r in read_rows(tmp_path / "bench.csv")] == [
        ("wall", 9),
        ("thread", 4),
    ]


def bench_row(ms: float, clock: str) -> BenchRow:
    return BenchRow(
        **{
            "run": "r",
            "method": "m",
            "backbone": "resnet20",
            "dataset": "cifar10",
            "mode": "skipping",
            "machine": "box",
        },
        **{"latency_ms_p50": ms, "images_per_s": 1e3 / ms, "clock": clock},  # type: ignore[arg-type]
    )


def test_each_kind_of_static_net_is_a_control_of_its_own(tmp_path: Path) -> None:
    kinds = [net(m, s, t) for m, t in (("prune_l1", 0.86), ("slimmable", 0.84), ("cascade", 0.95)) for s in (0.4, 0.6)]
    kinds.append(net("random", 0.51, 0.7))
    kinds.append(net("static", 1.0, 0.88, backbone="resnext20_2x8d", macs_mean=42e6))
    kinds.append(net("static", 1.0, 0.1, backbone="vgg16", run="vgg"))
    made = compare(save(tmp_path / "r", *STATIC, net("dmnn", 0.5, 0.9), *kinds), tmp_path / "out")
    found = {x["control"]: (x["control_top1"], x["relation"], x["beaten"]) for x in lines(made, method="dmnn")}
    assert found == {
        "static, narrower": (pytest.approx(0.85), "equal", True),
        "pruned, l1": (pytest.approx(0.86), "equal", True),
        "slimmable": (pytest.approx(0.84), "equal", True),
        "cascade": (pytest.approx(0.95), "equal", False),
        "random router": (pytest.approx(0.7), "equal", True),
        "ResNeXt": (pytest.approx(0.88), "dearer", True),  # 42 M against 20 M, and no better
    }
    assert {x["control"] for x in lines(made, method="prune_l1")} == {"static, narrower"}
    assert lines(made, method="static") == []
    assert {x["control"] for x in lines(made, method="cascade")} >= {"static, narrower", "pruned, l1", "slimmable"}


def test_beyond_the_ends_only_what_is_certain_is_said(tmp_path: Path) -> None:
    rows = [net("dmnn", 0.1, 0.79), net("rnr", 0.1, 0.85), net("rnp", 0.9, 0.89), net("aig", 0.9, 0.95)]
    made = compare(save(tmp_path / "r", *STATIC, *rows), tmp_path / "out")
    found = {x["method"]: (x["relation"], x["beaten"], x["control_cost"]) for x in lines(made)}
    assert found == {"rnr": ("dearer", True, 0.25), "rnp": ("cheaper", False, 0.75)}
    shown = {x["method"]: x["static, narrower"] for x in control_cells(made.controls)}
    assert shown == {"rnr": "+5.00 +- 1.05 (at 25.0 %)", "rnp": "-1.00 +- 0.85 (at 75.0 %) x"}
    assert made.table["vs_static"].isna().all()  # the main table has equal costs alone


CLOCK: dict[str, Any] = {"batch": 1, "threads": 1, "device": "cpu", "dtype": "fp32", "machine": "box"}


def time(folder: Path, *rows: dict[str, Any]) -> None:
    """A bench.csv of the columns that matter here."""
    empty = {"flops_target": "", "rate": "", "macs_share": 1.0, "images_per_s": "", "speedup": "", "ideal_share": ""}
    write_rows(folder / "bench.csv", [{**empty, **CLOCK, **each} for each in rows])


def timed(tmp_path: Path) -> list[Path]:
    """A routed run of 0.5 of the multiply-adds that takes as long as a static net of 0.75 of them."""
    paths = save(tmp_path / "r", *STATIC, net("dmnn", 0.5, 0.88, flops_target=0.5))
    time(
        tmp_path / "r" / "st0.25",
        {"mode": "skipping", "latency_ms_p50": 1.0},
        {"mode": "masked", "latency_ms_p50": 5.0},
    )
    dense = {"mode": "dense", "latency_ms_p50": 0.1}  # of the full net, which this run is not
    time(tmp_path / "r" / "st0.75", {"mode": "skipping", "latency_ms_p50": 3.0}, dense)
    own = {"mode": "skipping", "flops_target": 0.5}
    time(
        tmp_path / "r" / "dmnn0.5",
        {**own, "latency_ms_p50": 3.0, "speedup": 1.5},
        {**own, "batch": 64, "latency_ms_p50": 0.5},  # the static nets were not timed so
        {"mode": "skipping", "rate": 0.5, "latency_ms_p50": 0.01},  # routes that no router chose
        {"mode": "all_on", "latency_ms_p50": 0.01},
    )
    return paths


def test_a_row_stands_at_equal_milliseconds_too(tmp_path: Path) -> None:
    made = compare(timed(tmp_path), tmp_path / "out")
    flops, ms = lines(made)
    assert (flops["basis"], flops["difference"], flops["beaten"]) == ("FLOPs", pytest.approx(3), True)
    assert ms["basis"] == "ms, batch 1, 1 thread, cpu, fp32, box"
    assert (ms["cost"], ms["control_top1"], ms["relation"]) == (3.0, pytest.approx(0.9), "equal")
    assert (ms["difference"], ms["beaten"]) == (pytest.approx(-2), False)
    (shown,) = [x for x in control_cells(made.controls) if x["cost"] == "3 ms"]
    assert shown["static, narrower"].startswith("-2.00 +- ") and shown["static, narrower"].endswith(" x")
    (main,) = [x for x in cells(made.table) if x["method"] == "dmnn"]
    assert (main["latency ms"], main["speed-up"]) == ("3.00", "1.50x")
    assert "milliseconds per image" in (tmp_path / "out" / "index.html").read_text()


def test_the_mean_time_counts_where_it_is_known(tmp_path: Path) -> None:
    """The median of a cascade is the time of its cheap images."""
    paths = timed(tmp_path)
    own = {"mode": "skipping", "flops_target": 0.5, "latency_ms_p50": 1.0, "images_per_s": 500.0}
    time(tmp_path / "r" / "dmnn0.5", own)
    _, ms = lines(compare(paths, tmp_path / "out"))
    assert (ms["cost"], ms["control_top1"]) == (2.0, pytest.approx(0.85))
    rows = [net("dmnn", 0.5, 0.88, latency_ms_p50=1.0, latency_ms_mean=2.5)]
    (line,) = compare(save(tmp_path / "s", *rows), tmp_path / "two").table.to_dict("records")
    assert line["latency_ms"] == 2.5


@pytest.mark.parametrize("change", [{"machine": "other"}, {"threads": 2}, {"dtype": "bf16"}, {"batch": 8}], ids=str)
def test_times_of_other_clocks_are_not_compared(tmp_path: Path, change: dict[str, Any]) -> None:
    paths = timed(tmp_path)
    time(tmp_path / "r" / "dmnn0.5", {"mode": "skipping", "flops_target": 0.5, "latency_ms_p50": 3.0, **change})
    assert [x["basis"] for x in lines(compare(paths, tmp_path / "out"))] == ["FLOPs"]


def test_a_full_static_net_is_the_dense_net(tmp_path: Path) -> None:
    paths = save(tmp_path / "r", net("static", 1.0, 0.9), net("dmnn", 0.5, 0.88))
    time(
        tmp_path / "r" / "static1.0",
        *({"mode": m, "latency_ms_p50": t} for m, t in (("skipping", 4.0), ("dense_best", 2.0))),
    )
    time(
        tmp_path / "r" / "dmnn0.5",
        {"mode": "skipping", "latency_ms_p50": 3.0},
        {"mode": "dense_best", "latency_ms_p50": 1.0},
    )
    (line,) = lines(compare(paths, tmp_path / "out"))
    assert (line["cost"], line["control_cost"], line["relation"], line["beaten"]) == (3.0, 2.0, "cheaper", False)


def test_the_time_that_eval_left_counts(tmp_path: Path) -> None:
    clock = {"latency_batch": 1, "latency_threads": 1, "latency_device": "cpu", "machine": "box"}
    rows = [net("static", s, t, latency_ms_p50=ms, **clock) for s, t, ms in ((0.25, 0.8, 1.0), (0.75, 0.9, 2.0))]
    made = compare(save(tmp_path / "r", *rows, net("dmnn", 0.5, 0.88, latency_ms_p50=1.5, **clock)), tmp_path / "out")
    (ms,) = [x for x in lines(made) if x["basis"] != "FLOPs"]
    assert (ms["control_top1"], ms["beaten"]) == (pytest.approx(0.85), True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("mode,batch\nskip", "half-written"),
        ("a,b\n1,2\n", "lacks the columns mode"),
        ("", "half-written"),
    ],
)
def test_a_broken_bench_file_is_named_and_the_rest_is_shown(tmp_path: Path, content: str, said: str) -> None:
    paths = timed(tmp_path)
    (tmp_path / "r" / "dmnn0.5" / "bench.csv").write_text(content)
    made = compare(paths, tmp_path / "out")
    assert len(made.table) == 3 and [x["basis"] for x in lines(made)] == ["FLOPs"]
    (missing,) = made.left_out
    assert missing.path.name == "bench.csv" and said in missing.reason and missing.reason.endswith("(no times)")
    assert said in (tmp_path / "out" / "index.html").read_text()


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    paths = timed(tmp_path)
    for cell, said in (("soon", "could not convert"), ("", "without batch, threads or latency_ms_p50")):
        time(tmp_path / "r" / "dmnn0.5", {"mode": "skipping", "flops_target": 0.5, "latency_ms_p50": cell})
        (missing,) = compare(paths, tmp_path / "out").left_out
        assert said in missing.reason


def test_seeds_are_timed_together_or_not_at_all(tmp_path: Path) -> None:
    seeds = [row(0.5, 0.88, run=f"d-s{i}", seed=i, flops_target=0.5) for i in range(3)]
    paths = save(tmp_path / "r", *STATIC, *seeds)
    for name in ("st0.25", "st0.75"):
        time(tmp_path / "r" / name, {"mode": "skipping", "latency_ms_p50": 10 * float(name[2:])})
    for i in range(3):
        time(tmp_path / "r" / f"d-s{i}", {"mode": "skipping", "flops_target": 0.5, "latency_ms_p50": 4.0 + i})
    (ms,) = [x for x in lines(compare(paths, tmp_path / "out")) if x["basis"] != "FLOPs"]
    assert (ms["cost"], ms["control_top1"], ms["n_seeds"]) == (pytest.approx(5), pytest.approx(0.85), 3)
    (tmp_path / "r" / "d-s2" / "bench.csv").unlink()
    assert [x["basis"] for x in lines(compare(paths, tmp_path / "out"))] == ["FLOPs"]


def test_the_cost_of_a_net_of_another_backbone_is_in_parts_of_the_rows_own_dense_net(tmp_path: Path) -> None:
    other = net("static", 1.0, 0.88, backbone="resnext20_2x8d", macs_mean=42e6, macs_dense=42e6)
    made = compare(save(tmp_path / "r", net("dmnn", 0.5, 0.9), other), tmp_path / "out")
    (line,) = lines(made)
    assert (line["control"], line["control_cost"]) == ("ResNeXt", pytest.approx(42 / 40))


def test_equal_milliseconds_are_no_more_than_the_rows_own(tmp_path: Path) -> None:
    paths = save(tmp_path / "r", net("static", 0.75, 0.85), net("dmnn", 0.5, 0.88))
    for name, ms in (("static0.75", 3.01), ("dmnn0.5", 3.0)):
        time(tmp_path / "r" / name, {"mode": "skipping", "latency_ms_p50": ms})
    (found,) = [x for x in lines(compare(paths, tmp_path / "out")) if x["basis"] != "FLOPs"]
    assert (found["relation"], found["control_cost"]) == ("dearer", 3.01)


def test_at_the_very_cost_of_a_net_that_net_alone_is_the_control(tmp_path: Path) -> None:
    (line,) = lines(compare(save(tmp_path / "r", *STATIC, net("dmnn", 0.75, 0.91)), tmp_path / "out"))
    assert (line["control_runs"], line["control_cost"], line["control_top1"]) == ("st0.75", 0.75, 0.9)


def test_no_method_is_a_control_of_itself(tmp_path: Path) -> None:
    rows = [net(method, share, 0.8 + share / 10) for method in ("cascade", "random") for share in (0.4, 0.6)]
    found = {(x["method"], x["control"]) for x in lines(compare(save(tmp_path / "r", *rows), tmp_path / "out"))}
    assert found == {("cascade", "random router"), ("random", "cascade")}


def test_a_control_is_beaten_where_all_of_the_interval_lies_above_it(tmp_path: Path) -> None:
    rows = [net("dmnn", 0.5, 0.855), net("rnr", 0.5, 0.87), net("rnp", 0.5, 0.851, n=0), net("aig", 0.5, 0.849, n=0)]
    made = compare(save(tmp_path / "r", *STATIC, *rows), tmp_path / "out")
    found = {x["method"]: (x["interval"], x["beaten"]) for x in lines(made)}
    independent = "independent"  # of half a point, too little to tell
    assert found == {"dmnn": (independent, False), "rnr": (independent, True), "rnp": ("", True), "aig": ("", False)}


def test_without_a_number_of_images_on_either_side_there_is_no_interval(tmp_path: Path) -> None:
    statics = [net("static", 0.25, 0.8, n=0), net("static", 0.75, 0.9)]
    (line,) = lines(compare(save(tmp_path / "r", *statics, net("dmnn", 0.5, 0.86)), tmp_path / "out"))
    assert (line["interval"], line["difference"], line["beaten"]) == ("", pytest.approx(1.0), True)
