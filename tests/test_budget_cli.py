"""--flops-max, --latency-target and --curve on the command line: what is written, printed and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import TINY
from dynroute.bench import Benched, Point
from dynroute.calibration import Fit
from dynroute.cli import main
from dynroute.contracts import InputError, Setting
from dynroute.controls import CONTROLS
from dynroute.evaluation import Evaluator
from dynroute.latency import dense_speed, latency_table
from dynroute.provenance import machine
from dynroute.records import BenchRow, read_eval, read_rows, write_rows

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a trained run, not evaluated."""
    left = shutil.ignore_patterns("eval.csv", "routes.csv", "budget.json")
    return shutil.copytree(runs["dmnn"], tmp_path / "run", ignore=left)


def evaluated(capsys: Capture, *words: str, status: tuple[int, ...] = (0, 3)) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *words, "--json"]) in status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_is_evaluated_where_its_data_lie_now(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 40), ("test", 12)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 4
    np.savez(tmp_path / "mine.npz", **arrays)
    words = [*TINY, "data.name=npz", f"data.path={tmp_path / 'mine.npz'}", "router.epochs=1"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "there").mkdir()
    (tmp_path / "mine.npz").rename(tmp_path / "there" / "yours.npz")
    assert main(["eval", str(tmp_path / "run")]) == 2
    moved = ["--data", str(tmp_path / "there" / "yours.npz"), "--device", "cpu"]
    (row,) = evaluated(capsys, str(tmp_path / "run"), *moved)["rows"]
    assert (row["dataset"], row["n"]) == ("npz-mine", 12)
    assert main(["eval", str(tmp_path / "run"), *moved]) == 0
    assert "npz-yours stands in the rows as npz-mine, which the run was trained on" in capsys.readouterr().err
    arrays["train_labels"] = arrays["train_labels"] // 2
    arrays["test_labels"] = arrays["test_labels"] // 2
    np.savez(tmp_path / "mine.npz", **arrays)
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "other classes" in capsys.readouterr().err
    assert main(["eval", str(runs["dmnn"]), "--device", "tpu"]) == 2
    capsys.readouterr()
    for command in (["eval", str(runs["dmnn"])], ["bench", str(runs["dmnn"] / "config.yaml")]):
        assert main([*command, "--data", str(tmp_path)]) == 2
        assert "shapes are drawn, not read" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), "--data", str(tmp_path / "nine.npz")]) == 2
    assert f"--data: there is no {tmp_path / 'nine.npz'}" in capsys.readouterr().err


def test_a_row_says_what_to_expect_of_new_images(run: Path, capsys: Capture) -> None:
    (row,) = evaluated(capsys, str(run), "--flops-target", "0.6", "--split", "calib")["rows"]
    assert row["share_low"] <= row["share_calib"] <= row["share_high"]
    assert abs(row["share_calib"] - 0.6) <= 0.002
    assert (row["price_other"] is None) == (row["price_part"] is None)
    assert read_eval(run / "eval.csv")[0]["share_low"] == pytest.approx(row["share_low"])


def test_no_test_image_exceeds_the_limit_and_its_rows_stand_beside_the_others(run: Path, capsys: Capture) -> None:
    for limit in ([], ["--flops-max", "0.5"]):
        evaluated(capsys, str(run), "--flops-target", "0.4", *limit)
    rows = read_eval(run / "eval.csv")
    assert [row["flops_max"] for row in rows] == [None, 0.5]
    macs = {
        limit: [float(r["macs"]) for r in read_rows(run / "routes.csv") if r["flops_max"] == limit]
        for limit in ("", "0.5")
    }
    assert len(macs[""]) == len(macs["0.5"]) == 100
    assert max(macs["0.5"]) <= 0.5 * rows[1]["macs_dense"] < max(macs[""])


def test_a_limit_that_no_route_keeps_is_status_3_with_the_range(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["eval", str(run), "--flops-max", "0.01"]) == 3
    out, err = capsys.readouterr()
    assert "routes of this net cost" in err and err.count("\n") == 1 and not out


def test_a_target_outside_the_range_is_status_3_with_the_range(run: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["eval", str(run), "--flops-target", "0.001"]) == 3
    assert "this net reaches" in capsys.readouterr().err


def test_the_curve_has_ten_targets_from_end_to_end(run: Path, capsys: Capture) -> None:
    found = evaluated(capsys, str(run), "--curve")
    targets = [row["flops_target"] for row in found["rows"]]
    assert len(targets) == 10 and targets == sorted(targets)
    evaluator = Evaluator.of(run)
    low, high = evaluator.dial.span()
    assert (targets[0], targets[-1]) == pytest.approx((low, high), abs=1e-4)
    assert evaluator.dial.calibration.searched.keys() == set(targets)
    tops = [row["top1"] for row in found["rows"]]
    assert min(tops) <= found["area"] <= max(tops)
    assert [Path(f).name for f in found["files"]] == ["curve.csv", "curve.png", "curve.svg"]
    assert all(Path(f).stat().st_size for f in found["files"])
    assert len(read_rows(run / "curve.csv")) == 10


def test_milliseconds_become_a_target_by_the_table_of_this_machine(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["eval", str(run), "--latency-target", "3"]) == 2
    assert f"dynroute bench {run}" in capsys.readouterr().err
    own = {
        "mode": "skipping",
        "batch": 1,
        "threads": torch.get_num_threads(),
        "machine": machine(torch.device("cpu")),
    }
    timed = [
        {**own, "flops_target": t, "images_per_s": 1e3 / ms, "macs_share": t} for t, ms in ((0.4, 2.0), (0.8, 4.0))
    ]
    others = [
        {**timed[0], **other, "images_per_s": 100} for other in ({"mode": "masked"}, {"batch": 8}, {"machine": "x"})
    ]
    slower, wavers, tried = 1.0, [1.0], list[float]()

    def bench(self: Any, points: list[Point], plan: Any, split: str) -> Benched:
        """The net takes as long as the table says, or so many times as long; the machine is good or bad at each try."""
        hour = wavers[len(tried) % len(wavers)]
        tried.append(points[0].target or 0.0)
        assert split == "calib" and plan.modes == {"dense", "skipping"}
        times = {"dense_best": 5.0 * hour, "skipping": hour * slower * (2.0 + 5 * (tried[-1] - 0.4))}
        return Benched([BenchRow("", "", "", "", mode, images_per_s=1e3 / ms) for mode, ms in times.items()], [], {})

    monkeypatch.setattr(Evaluator, "bench", bench)
    write_rows(run / "bench.csv", [*others, *timed])
    (row,) = evaluated(capsys, str(run), "--latency-target", "3")["rows"]
    assert row["flops_target"] == pytest.approx(0.6) and len(tried) == 2
    slower = 1.25
    (row,) = evaluated(capsys, str(run), "--latency-target", "3")["rows"]
    assert row["flops_target"] == pytest.approx(0.48) and tried[2:] == pytest.approx([0.6, 0.48])
    tried.clear()
    slower, wavers = 1.0, [0.8, 1.2]  # in the mean as the table says
    (row,) = evaluated(capsys, str(run), "--latency-target", "3")["rows"]
    assert row["flops_target"] == pytest.approx(0.6) and tried == pytest.approx([0.6, 0.75, 0.6, 0.642857])
    tried.clear()
    wavers = [1.0]
    slower = 2.0  # even the cheapest takes longer now: the nearest is what it gets
    (row,) = evaluated(capsys, str(run), "--latency-target", "3")["rows"]
    assert row["flops_target"] == pytest.approx(0.4) and len(tried) == 4
    assert main(["eval", str(run), "--latency-target", "3"]) in (0, 3)
    assert "3 ms an image were asked for; nearest comes share 0.400, at 4 ms" in capsys.readouterr().err
    # noise has the dearer net faster: a try that took a little longer than asked for is no reason to give up
    write_rows(run / "bench.csv", [{**timed[0], "images_per_s": 1e3 / 3.95}, timed[1]])
    slower = 1.025
    (row,) = evaluated(capsys, str(run), "--latency-target", "4")["rows"]
    assert row["flops_target"] == pytest.approx(0.8)
    # rows of two hours, the second half as fast, each beside the dense net of its own: 5 ms, then 10
    compared = [{**timed[0], "speedup": 2.5}, {**timed[1], "speedup": 1.25, "images_per_s": 125}]
    write_rows(run / "bench.csv", compared)
    with monkeypatch.context() as patch:
        patch.setattr("dynroute.latency.dense_speed", lambda *_: 100.0)  # now as slow as in the second
        slower = 2.0
        (row,) = evaluated(capsys, str(run), "--latency-target", "6")["rows"]
        assert row["flops_target"] == pytest.approx(0.6)
    for broken in ("fast", "nan", 0, "-3"):
        for column, table in (("images_per_s", timed), ("speedup", compared)):
            write_rows(run / "bench.csv", [*table, {**table[0], column: broken}])
            assert main(["eval", str(run), "--latency-target", "3"]) == 2
            assert f"{column} must be a number above 0, not '{broken}'" in capsys.readouterr().err
    write_rows(run / "bench.csv", timed)
    assert main(["eval", str(run), "--latency-target", "1"]) == 3
    assert "out of reach" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--flops-max", "0"], "--flops-max is a share"), (["--flops-max", "1.5"], "--flops-max is a share"),
     (["--latency-target", "0"], "--latency-target is a time"), (["--latency-target", "nan"], "--latency-target is a time")],
)  # fmt: skip
def test_shares_and_times_that_are_none(words: list[str], says: str, capsys: Capture) -> None:
    for command in (["eval", "nowhere"], ["predict", "nowhere", "nothing.png"]):
        assert main([*command, *words]) == 2
        assert says in capsys.readouterr().err


def test_a_row_has_the_numbers_of_its_images_and_the_dial_those_of_calibration(run: Path) -> None:
    evaluator = Evaluator.of(run)
    cost, dense = evaluator.net.cost, evaluator.net.cost.dense
    calibrated = evaluator.measure(None, "calib")
    assert evaluator.dial.share_at(0.0)[0] == pytest.approx(calibrated.row.macs_share)
    assert calibrated.row.n == evaluator.dial.calibration.images == len(evaluator.data.calibration)
    found = evaluator.measure(None)
    row, macs_N = found.row, found.scores.macs_N
    assert row.n == len(evaluator.data.test) and row.macs_share != calibrated.row.macs_share
    assert (row.macs_p5, row.macs_p95) == pytest.approx([float(macs_N.quantile(q)) for q in (0.05, 0.95)])
    assert row.macs_p5 < row.macs_mean < row.macs_p95 and row.router_share == cost.router / dense
    assert row.top5 == pytest.approx(float(found.scores.top5_N.double().mean())) and row.top5 > row.top1


def test_settings_of_another_limit_or_checkpoint_are_not_taken_and_not_lost(run: Path) -> None:
    opened = {name: Evaluator.of(run, name) for name in ("best", "last")}
    for evaluator in opened.values():
        evaluator.fitted(0.6)
    for name, evaluator in opened.items():
        assert Evaluator.of(run, name).dial.calibration == evaluator.dial.calibration
    assert not Evaluator.of(run, flops_max=0.8).dial.calibration.points


def test_parameters_are_those_of_inference(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynroute.evaluation.inference_parameters", lambda net: 7)
    assert Evaluator.of(run).measure(None).row.params == 7


def test_the_latency_table_has_the_rows_of_this_machine_and_setting_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, threads = Evaluator.of(run), torch.get_num_threads()
    own: dict[str, Any] = {"mode": "skipping", "batch": 1, "threads": threads, "device": "cpu", "dtype": "fp32"}
    own |= {
        "machine": machine(torch.device("cpu")),
        "checkpoint": "last",
        "routes": "router",
        "flops_max": "",
        "form": "",
    }
    timed = [{**own, "images_per_s": 1e3 / ms, "macs_share": s, "speedup": ""} for s, ms in ((0.4, 2.0), (0.8, 4.0))]
    changes: dict[str, Any] = {"flops_max": 0.5, "threads": threads + 1, "routes": "random", "checkpoint": "best"}
    changes |= {"dtype": "bf16", "device": "cuda", "batch": 8, "mode": "masked", "machine": "x"}
    others = [{**timed[0], name: value, "macs_share": 0.1} for name, value in changes.items()]

    def table(*rows: dict[str, Any]) -> list[float]:
        write_rows(run / "bench.csv", rows)
        found = latency_table(run, opened.net, opened.config, opened.data.spec, opened.device)
        return [number for point in found for number in point]

    wanted = pytest.approx([0.4, 2.0, 0.8, 4.0])
    assert table(*others, *timed) == wanted
    assert table({**timed[0], "speedup": 2.5}, timed[1]) == wanted, "not all of them beside a dense net"
    with pytest.raises(InputError, match="has no two skipping rows"):
        table(*others, timed[0])
    asked: list[Any] = []
    monkeypatch.setattr("dynroute.latency.dense_speed", lambda *args: asked.append(args[-1]) or 100.0)
    compared = [{**timed[0], "speedup": 5.0}, {**timed[1], "speedup": 2.5}]
    for dense in ("as it is", "compiled"):
        assert table(*compared, {**own, "mode": "dense_best", "form": dense}) == wanted
    assert asked == [set(), {"compiled"}]


def test_the_speed_of_the_dense_net_is_that_of_its_fastest_form(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Evaluator.of(run)
    rows = [
        BenchRow("", "", "", "", mode, images_per_s=speed) for mode, speed in (("dense", 10.0), ("dense_best", 20.0))
    ]
    monkeypatch.setattr("dynroute.latency.bench", lambda *_: Benched(rows, [], {}))
    assert dense_speed(opened.net, opened.config, opened.data.spec, opened.device) == 20.0


def test_a_row_and_its_controls_stand_at_the_setting_that_was_stored(run: Path) -> None:
    evaluator = Evaluator.of(run)
    share, far = evaluator.measure(None).row.macs_share, 0.3
    evaluator.dial.span()
    evaluator.dial.calibration.searched |= {
        far: Fit(Setting(0.0), far, far, far),  # what calibration promised, and test images do not keep
        round(share, 2): Fit(Setting(0.01), share, share - 0.1, share + 0.1),
    }
    assert evaluator.measure(far).missed and abs(share - far) > 0.02
    found = evaluator.measure(round(share, 2))
    assert (found.row.price, found.row.price_other, found.row.price_part) == (0.01, None, None)
    assert (found.row.share_low, found.row.share_high) == (share - 0.1, share + 0.1)
    assert evaluator.net.router.setting == Setting(0.01)
    evaluator.config.top.seed = 5
    made = {result.row.control: result for result in evaluator.controls(found)}
    assert {result.row.price for result in made.values()} == {0.01}
    for name, result in made.items():
        assert torch.equal(result.scores.keep_NUG, CONTROLS[name].routes(found.scores.keep_NUG, 5)), name


def test_the_time_in_a_row_is_that_of_the_skipping_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        BenchRow("", "", "", "", mode, latency_ms_p50=ms, images_per_s=1e3 / ms, speedup=10 / ms, batch=2, threads=3)
        for mode, ms in (("dense_best", 10.0), ("skipping", 4.0))
    ]
    monkeypatch.setattr(Evaluator, "bench", lambda *_: Benched(rows, [], {}))
    row = Evaluator.of(run).measure(None, timed=True).row
    assert (row.latency_ms_p50, row.latency_ms_mean, row.speedup) == pytest.approx((4.0, 4.0, 2.5))
    assert (row.latency_batch, row.latency_threads, row.latency_device) == (2, 3, "cpu")
