"""`dynroute bench`: the rounds under a clock of our own, the rows by hand, and the command on tiny runs. Nothing is timed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dynroute.bench.modes as modes
from conftest import tree
from dynroute import timing
from dynroute.assembly import fingerprint, restore
from dynroute.bench import (
    Benched,
    Case,
    DenseNet,
    Overruled,
    Plan,
    Point,
    Reading,
    Times,
    bench,
    choose_clock,
    ideal_share,
    interleaved,
    numbered,
    uniform_routes,
    warnings,
)
from dynroute.bench.others import Unavailable
from dynroute.cli import main
from dynroute.contracts import InputError, UnitSpec
from dynroute.net import RoutedNet
from dynroute.processors import affinity
from dynroute.provenance import environment
from dynroute.records import BENCH_COLUMNS, BenchRow, merge_bench, read_rows
from dynroute.report.read import read
from dynroute.routers import Router, legal
from dynroute.skipping import MEMORY, FastNet, load_forms
from dynroute.testing import close
from dynroute.units import FORMS
from tiny import make_backbone, make_net, pictures

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
LABELS = {"run": "r", "method": "dmnn", "backbone": "resnet8", "dataset": "tiny"}
# --- rounds -----------------------------------------------------------------------------------------------------


def told(work: Any) -> Reading:
    """A clock that believes what the work returns."""
    seconds = work()
    return Reading(seconds, 2 * seconds, seconds)


def test_rounds_run_every_case_in_turn_and_in_changing_order() -> None:
    ran: list[tuple[int, str]] = []

    def case(name: str) -> Case:
        def prepare(turn: int) -> Any:
            return lambda: ran.append((turn, name)) or 1.0

        return Case(prepare)

    found = interleaved({name: case(name) for name in "abc"}, told, 0.0, least=20, warm=2)
    assert [turn for turn, _ in ran] == [turn for turn in range(-2, 20) for _ in "abc"]
    rounds = [tuple(name for _, name in ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds) and len(set(rounds)) == 6
    assert all(len(times.seconds_R) == 20 for times in found.values()), "rounds before the first are not counted"


def test_rounds_go_on_until_the_time_is_spent() -> None:
    found = interleaved({"a": Case(lambda turn: lambda: 0.1), "b": Case(lambda turn: lambda: 0.2)}, told, 3.0, least=2)
    assert len(found["a"].seconds_R) == 10, "0.6 s of wall time a round, 3 s for each of two cases"


def test_statistics_by_hand() -> None:
    values = [0.004, 0.001, 0.003, 0.002, 0.010]
    found = interleaved({"a": Case(lambda turn: lambda: values[turn], lambda result: -result)}, told, 0.0, 5, warm=0)[
        "a"
    ]
    assert (found.at(0.5), found.mean) == pytest.approx((0.003, 0.004))
    assert found.at(0.95) == pytest.approx(0.004 + 0.8 * 0.006)
    assert found.wall_R == [2 * v for v in values] and found.figure_R == [-v for v in values]


def test_the_clock_is_the_threads_where_one_does_all_the_work() -> None:
    assert [choose_clock("auto", n, CPU)[0] for n in (1, 2)] == ["thread", "wall"]
    assert choose_clock("wall", 1, CPU)[0] == "wall"
    assert choose_clock("auto", 1, torch.device("cuda"))[0] == "cuda"
    for threads, device in ((2, "cpu"), (1, "cuda")):
        with pytest.raises(InputError, match="--clock thread"):
            choose_clock("thread", threads, torch.device(device))


@pytest.mark.parametrize("name", ["thread", "wall"])
def test_clocks_return_what_the_work_does(name: str) -> None:
    reading = choose_clock(name, 1, CPU)[1](lambda: sum(range(1000)))
    assert reading.result == 499500 and reading.seconds > 0 and reading.wall > 0


# --- rows -------------------------------------------------------------------------------------------------------


def times(seconds: list[float], macs: list[float] | None = None) -> Times:
    return Times(seconds, [2 * s for s in seconds], macs or [0.0] * len(seconds))


def test_ideal_share_is_of_the_same_images() -> None:
    whole = times([2.0, 2.0, 2.0], [100.0] * 3)
    assert ideal_share(whole, times([1.0, 0.5, 2.0], [50.0, 25.0, 100.0])) == 1.0
    assert ideal_share(whole, times([2.0, 1.0, 4.0], [50.0, 25.0, 100.0])) == 0.5
    assert ideal_share(whole, times([1.0, 0.5, 20.0], [50.0, 25.0, 100.0])) == 1.0, "the median round's"


def made_up(monkeypatch: pytest.MonkeyPatch, found: dict[str, Times], **plan: Any) -> list[BenchRow]:
    """Rows of a tiny net whose times are given."""
    net = make_net("dmnn", "paths")
    net.router.price = 0.5
    monkeypatch.setattr(modes, "interleaved", lambda cases, *_: {name: found[name] for name in cases})
    rows, remarks, _ = bench(net, make_backbone(parts=1), pictures(8), [Point()], Plan(**plan), LABELS)
    assert net.router.price == 0.5 and remarks == []
    return rows


def test_rows_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_net("dmnn", "paths").cost.dense
    found = {
        "dense": times([0.040, 0.044]),
        "executor": times([0.020, 0.024]),
        "all_on": times([0.020, 0.020], [dense, dense]),
        "masked0": times([0.060, 0.060], [dense / 4, dense / 2]),
        "skipping0": times([0.010, 0.020], [dense / 4, dense / 2]),
        "router0": times([0.002, 0.002]),
    }
    rows = {row.mode: row for row in made_up(monkeypatch, found, batch=2)}
    assert list(rows) == ["dense", "dense_best", "all_on", "masked", "skipping"]
    assert (rows["dense_best"].form, rows["dense"].speedup) == ("executor", pytest.approx(22 / 42))
    row = rows["skipping"]
    assert row.latency_ms_p50 == pytest.approx(7.5) and row.call_ms_p50 == pytest.approx(15)
    assert row.wall_ms_p50 == pytest.approx(15) and row.images_per_s == pytest.approx(2 / 0.015)
    assert row.speedup == pytest.approx(22 / 15) and row.macs_share == pytest.approx(3 / 8)
    assert row.ideal_share == pytest.approx((2 / 4 + 1 / 2) / 2) and row.router_ms == pytest.approx(1.0)
    assert (row.batch, row.rounds, row.clock, row.device, row.threads) == (2, 2, "thread", "cpu", 1)
    assert rows["all_on"].ideal_share == 1.0 and rows["masked"].ideal_share is rows["dense"].ideal_share is None


def test_the_best_dense_form_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"dense": times([0.01]), "executor": times([0.02]), "skipping0": times([0.01], [1.0])}
    rows = made_up(monkeypatch, found, modes=frozenset({"dense", "skipping"}))
    assert [(row.mode, row.form, row.speedup) for row in rows] == [
        ("dense", "eager", 1.0),
        ("dense_best", "eager", 1.0),
        ("skipping", "", 1.0),
    ]


@pytest.mark.parametrize(
    ("share", "speedup", "warned"), [(0.5, 0.9, True), (0.5, 1.0, True), (0.5, 1.1, False), (0.97, 0.9, False)]
)
def test_a_warning_where_flops_fall_and_time_does_not(share: float, speedup: float, warned: bool) -> None:
    row = BenchRow(**LABELS, mode="skipping", macs_share=share, speedup=speedup)
    assert len(warnings([row, replace(row, mode="masked")])) == warned
    if warned:
        assert f"FLOPs fall to 0.50 of dense, time does not: {speedup:.2f}x" in warnings([row])[0]


# --- what is run ------------------------------------------------------------------------------------------------


def test_the_dense_run_is_the_plain_net() -> None:
    backbone = make_backbone(parts=1).eval()
    net = RoutedNet(backbone, Router(backbone.specs)).eval()
    assert close(DenseNet(backbone)(pictures(3)), net(pictures(3), net.dense_routes(3)).logits_BK)


@pytest.mark.parametrize("unit", [u for u in FORMS if u != "cascade"])
def test_overruled_routes_are_found_by_any_part_of_a_batch(unit: str) -> None:
    net = make_net("rnr" if unit == "choice" else "static", unit)
    images = numbered(torch.randn(300, 3, 16, 16))
    routes = uniform_routes(net.backbone.specs, 300)
    other = RoutedNet(net.backbone, Overruled(net.router, routes)).eval()
    assert other.cost.router == net.cost.router
    for rows in (slice(0, 4), slice(255, 258), slice(299, 300)):
        with torch.no_grad():
            fast, masked = FastNet(other)(images[rows]), other(images[rows].to(torch.bfloat16).float())
        assert torch.equal(fast.trace.keep_BUG, routes[rows])
        assert torch.equal(masked.trace.keep_BUG, routes[rows])


@pytest.mark.parametrize("unit", FORMS)
def test_uniform_routes_are_legal_and_even(unit: str) -> None:
    specs = make_net("cascade" if unit == "cascade" else "static", unit).backbone.specs
    routes = uniform_routes(specs, 4000)
    for u, spec in enumerate(specs):
        keep = routes[:, u, : spec.parts]
        assert torch.equal(legal(keep, spec), keep)
        counts = keep.unique(dim=0, return_counts=True)[1]
        wanted = {"choice": spec.parts, "free": 2**spec.parts, "nested": spec.parts + spec.skippable}[spec.form]
        assert len(counts) == wanted and counts.min() > 0.8 * 4000 / wanted
    assert torch.equal(routes, uniform_routes(specs, 4000))


def test_uniform_routes_of_free_parts_hold_the_first_where_one_must_run() -> None:
    spec = UnitSpec("own", 4, 3, "free", False, (1 / 3,) * 3)
    keep = uniform_routes([spec], 4000)[:, 0]
    assert torch.equal(legal(keep, spec), keep)
    assert keep.unique(dim=0, return_counts=True)[1].min() > 800 and len(keep.unique(dim=0)) == 4


def test_random_routes_are_those_of_the_random_router() -> None:
    net = make_net("dmnn", "paths")
    images = numbered(pictures(200))
    other, point = timing.drawn(net, images, 0.25)
    assert point == Point(rate=0.25, routes="random")
    keep = other(images).trace.keep_BUG
    assert abs(float(keep.mean()) - 0.25) < 0.05
    assert torch.equal(other(images[50:60]).trace.keep_BUG, keep[50:60])


def test_a_router_that_learns_nothing_keeps_its_own_routes() -> None:
    net = make_net("static", "channels")
    assert timing.drawn(net, numbered(pictures(4)), None) == (net, Point())
    assert timing.drawn(net, numbered(pictures(4)), 0.5)[1].routes == "random"


def test_a_runtime_that_cannot_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(dense: Any, x: Any) -> None:
        raise Unavailable("torch.compile: no compiler")

    monkeypatch.setattr(modes, "compiled", broken)
    asked = Plan(seconds=0, least=1, modes=frozenset({"dense", "compiled"}))
    rows, remarks, _ = bench(make_net(), make_backbone(parts=1), pictures(2), [], asked, LABELS)
    assert remarks == ["torch.compile: no compiler"]
    assert [row.mode for row in rows] == ["dense", "dense_best"]


def test_another_runtime_has_a_row_and_may_be_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "compiled", lambda dense, x: dense)
    monkeypatch.setattr(modes, "onnxruntime", lambda net, x, outputs=(): net)
    took = {"dense": 3.0, "executor": 2.0, "compiled": 1.0, "onnxruntime": 0.5, "onnx_skipping0": 0.25}
    found = {name: times([seconds], [17.0]) for name, seconds in took.items()}
    rows = made_up(monkeypatch, found, modes=frozenset({"dense", "compiled", "onnxruntime", "onnx_skipping"}))
    assert [(row.mode, row.speedup) for row in rows] == [
        ("dense", pytest.approx(1 / 3)),
        ("dense_best", 1.0),
        ("compiled", 1.0),
        ("onnxruntime", 2.0),
        ("onnx_skipping", 4.0),
    ]
    assert (rows[-1].macs_mean, rows[-1].routes, rows[-1].ideal_share) == (17.0, "router", None)
    assert rows[1].form == "compiled"


def test_the_routed_net_runs_in_onnx_runtime_too() -> None:
    net = make_net()
    asked = Plan(seconds=0, least=2, modes=frozenset({"dense", "onnxruntime", "onnx_skipping", "skipping"}))
    rows, remarks, _ = bench(net, make_backbone(parts=1), pictures(4), [Point()], asked, LABELS)
    by_mode = {row.mode: row for row in rows}
    assert list(by_mode) == ["dense", "dense_best", "onnxruntime", "onnx_skipping", "skipping"] and not remarks
    assert by_mode["onnx_skipping"].macs_share == by_mode["skipping"].macs_share < 1.5


def test_time_that_does_not_fall_in_onnx_runtime_is_said() -> None:
    who: dict[str, Any] = {**LABELS, "macs_share": 0.5, "device": "cpu"}
    dense = [
        BenchRow(**{**who, "macs_share": 1.0}, mode="onnxruntime", images_per_s=n, batch=b) for n, b in ((90.0, 1),)
    ]
    assert warnings([*dense, BenchRow(**who, mode="onnx_skipping", images_per_s=100.0)]) == []
    (line,) = warnings([*dense, BenchRow(**who, mode="onnx_skipping", images_per_s=45.0, speedup=2.0)])
    assert "0.50x the speed of the dense run in ONNX Runtime" in line


@pytest.mark.parametrize(("name", "unit"), [("dmnn", "paths"), ("rnp", "channels")])
def test_bf16_runs_and_leaves_the_net_alone(name: str, unit: str) -> None:
    net, plain = make_net(name, unit), make_backbone(parts=1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    asked = Plan(batch=2, dtype="bf16", seconds=0, least=1)
    rows, _, _ = bench(net, plain, pictures(4), [Point()], asked, LABELS)
    assert {row.dtype for row in rows} == {"bf16"} and rows[0].macs_mean == net.cost.dense
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


# --- the command ------------------------------------------------------------------------------------------------

FAST = ["--seconds", "0"]
NAMES = {"mode", "batch", "threads", "latency_ms_p50", "images_per_s", "speedup", "macs_share", "ideal_share"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(
        "data: {name: cifar10, image_size: 16}\nbackbone: {name: resnet8, width: 8}\ndevice: cpu\nrouter: {name: dmnn}\n"
    )
    return tmp_path / "c.yaml"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images in the pool."""
    for module in ("evaluation", "timing"):
        monkeypatch.setattr(f"dynroute.{module}.POOL", 16)


def said(capsys: Capture, *words: object, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    return tuple(capsys.readouterr())  # type: ignore[return-value]


def test_bench_of_a_run_fills_bench_csv(tmp_path: Path, runs: dict[str, Path], capsys: Capture) -> None:
    run = shutil.copytree(runs["dmnn"], tmp_path / "run")
    words = ("bench", run, "--flops-target", 0.9, "--batch", 1, "--batch", 3, *FAST, "--json")
    rows = json.loads(said(capsys, *words)[0])["rows"]
    assert set(rows[0]) == set(BENCH_COLUMNS) >= NAMES
    per_batch = [("dense", None), ("dense_best", None), ("all_on", None)]
    per_batch += [(mode, target) for target in (None, 0.9) for mode in ("masked", "skipping")]
    assert [(row["mode"], row["flops_target"]) for row in rows] == per_batch * 2
    assert [row["batch"] for row in rows] == [1] * 7 + [3] * 7
    for row in rows:
        assert row["latency_ms_p50"] > 0 and row["images_per_s"] > 0 and row["speedup"] > 0
        assert row["call_ms_p50"] == pytest.approx(row["latency_ms_p50"] * row["batch"])
        assert (row["run"], row["method"], row["affinity"]) == ("run", "dmnn", affinity())
        assert (row["ideal_share"] is not None) == (row["mode"] in ("all_on", "skipping"))
        assert (row["router_ms"] is not None) == (row["mode"] == "skipping")
        assert row["macs_share"] == 1 if row["mode"].startswith("dense") else 0 < row["macs_share"] < 1.1
    first = read_rows(run / "bench.csv")
    assert len(first) == 14 and {row["config_hash"] for row in first} != {""}
    said(capsys, "bench", run, "--batch", 3, *FAST)
    assert len(read_rows(run / "bench.csv")) == 14, "the same settings take the place of the old rows"
    assert torch.get_num_threads() == 1
    units = len(restore(run / "last.pt")[0].backbone.specs)
    forms = load_forms(run / "forms.json", fingerprint(run / "last.pt"), environment(), units)
    assert sorted(forms) == [1, 3], "of both batch sizes"


def test_bench_of_a_configuration_draws_routes_and_writes_nothing(config: Path, capsys: Capture) -> None:
    before = tree(config.parent)
    for words, rate, routes in ((["--rate", "0.5"], 0.5, "random"), ([], None, "uniform")):
        rows = json.loads(said(capsys, "bench", config, *words, *FAST, "--json")[0])["rows"]
        assert [row["mode"] for row in rows] == ["dense", "dense_best", "all_on", "masked", "skipping"]
        assert {(row["rate"], row["routes"]) for row in rows[3:]} == {(rate, routes)}
        assert rows[4]["macs_share"] == rows[3]["macs_share"] < 1 < rows[2]["macs_share"] < 1.2, (
            "all on pays for its router"
        )
    assert tree(config.parent) == before


def test_bench_for_people_is_a_table(config: Path, capsys: Capture) -> None:
    out, _ = said(capsys, "bench", config, "--rate", 0.5, *FAST)
    assert "dense_best: e" in out and "random at 0.5" in out and "of ideal" in out


def test_a_missed_target_is_status_3(tmp_path: Path, runs: dict[str, Path], capsys: Capture) -> None:
    run = shutil.copytree(runs["dmnn"], tmp_path / "run")
    _, err = said(capsys, "bench", run, "--flops-target", 0.01, *FAST, status=3)
    assert "target 0.01 missed: " in err


def test_eval_latency_is_the_same_measurement(
    runs: dict[str, Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: Any, settings: Any, plan: Any, split: str) -> Any:
        assert plan.modes == {"dense", "skipping"} and plan.batch == 1
        row = BenchRow(
            **LABELS, mode="skipping", macs_share=0.6, speedup=0.9, latency_ms_p50=7.0, images_per_s=125.0, threads=1
        )
        return Benched([row], [], {})

    monkeypatch.setattr("dynroute.evaluation.Evaluator.bench", slow)
    out, err = said(capsys, "eval", runs["static"], "--latency", "--json")
    (row,) = json.loads(out)["rows"]
    assert (row["latency_ms_p50"], row["speedup"], row["latency_batch"], row["latency_device"]) == (7.0, 0.9, 1, "cpu")
    assert row["latency_ms_mean"] == 8.0
    assert "time does not: 0.90x" in err


def test_the_bound_of_the_cache_is_the_one_asked_for(
    config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[float] = []
    made = modes.fast_net
    monkeypatch.setattr(modes, "fast_net", lambda net, memory=MEMORY: (bounds.append(memory), made(net, memory))[1])
    said(capsys, "bench", config, "--memory", 0.5, *FAST)
    assert bounds == [MEMORY, 0.5, 0.5], "the dense net, all on, skipping"
    bounds.clear()
    said(capsys, "bench", config, *FAST)
    assert bounds == [MEMORY] * 3


WRONG = {
    "rate": (["--rate", "1.5"], "--rate must lie between 0 and 1"),
    "batch": (["--batch", "0"], "--batch must lie between 1"),
    "threads": (["--threads", "100000"], "--threads must lie between 1"),
    "seconds": (["--seconds", "-1"], "--seconds must lie between"),
    "nan": (["--seconds", "nan"], "--seconds must lie between"),
    "memory": (["--memory", "-1"], "--memory must lie between 0 and 1000"),
    "dtype": (["--dtype", "int8"], "--dtype must be fp32 or bf16, not 'int8'"),
    "clock": (["--clock", "sun"], "--clock must be auto or thread or wall"),
    "device": (["--device", "nonsense"], "device 'nonsense' is not usable here"),
    "target": (["--flops-target", "0.5"], "needs a trained run"),
    "target above 1": (["--flops-target", "1.5"], "0 < X <= 1, not 1.5"),
    "onnx": (["--onnx", "--dtype", "bf16"], "--onnx runs on the processor in fp32 alone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_status_2(case: str, config: Path, capfd: Capture) -> None:
    words, says = WRONG[case]
    out, err = said(capfd, "bench", config, *words, status=2)
    assert (out, err.count("\n")) == ("", 1) and err.startswith("dynroute: ") and says in err


def test_wrong_sources_are_one_line_and_status_2(tmp_path: Path, runs: dict[str, Path], capfd: Capture) -> None:
    _, err = said(capfd, "bench", runs["rnp"].parent / "rnpp", status=2)
    assert "is neither a configuration nor a run folder; did you mean" in err
    _, err = said(capfd, "bench", runs["rnp"], "--rate", 0.5, status=2)
    assert "is a run, which has a router of its own" in err
    _, err = said(capfd, "bench", runs["rnp"], "--batch", 200, status=2)
    assert "a batch of 200 needs as many images, there are 100" in err
    assert not (runs["rnp"] / "bench.csv").exists()


def test_affinity_is_written_as_runs_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 5, 8, 9})
    assert affinity() == "0-2,5,8-9"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert affinity() == "3"


def test_rows_replace_those_of_the_same_setting(tmp_path: Path) -> None:
    file = tmp_path / "bench.csv"
    row = BenchRow(**LABELS, mode="skipping", flops_target=0.5, speedup=1.5)
    merge_bench(file, [row, replace(row, batch=8), replace(row, mode="masked")])
    others = [replace(row, threads=2), replace(row, dtype="bf16"), replace(row, flops_max=0.6)]
    merge_bench(file, [replace(row, speedup=2.0), *others, replace(row, checkpoint="best")])
    found = [(r["mode"], r["batch"], r["threads"], r["dtype"], r["speedup"]) for r in read_rows(file)]
    assert found == [
        ("skipping", "8", "1", "fp32", "1.5"),
        ("masked", "1", "1", "fp32", "1.5"),
        ("skipping", "1", "1", "fp32", "2"),
        ("skipping", "1", "2", "fp32", "1.5"),
        ("skipping", "1", "1", "bf16", "1.5"),
        ("skipping", "1", "1", "fp32", "1.5"),
        ("skipping", "1", "1", "fp32", "1.5"),
    ]
    assert [(r["flops_max"], r["checkpoint"]) for r in read_rows(file)[-2:]] == [("0.6", "last"), ("", "best")]


def test_the_dense_twin_costs_what_shares_are_of() -> None:
    for unit in FORMS:
        net = make_net("cascade" if unit == "cascade" else "static", unit)
        assert make_backbone(parts=1).dense_macs == net.cost.dense


def test_compare_passes_over_bench_csv(tmp_path: Path, runs: dict[str, Path], capsys: Capture) -> None:
    said(capsys, "eval", runs["static"])
    shutil.copy(runs["static"] / "eval.csv", tmp_path / "static.csv")
    merge_bench(tmp_path / "bench.csv", [BenchRow(**LABELS, mode="dense")])
    rows, left_out = read([tmp_path])
    assert rows and left_out == []
