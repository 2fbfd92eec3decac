"""Rows go through their CSV unharmed, and no failure costs a file."""

from __future__ import annotations

import errno
import math
from dataclasses import replace
from multiprocessing import Process
from pathlib import Path
from typing import Any

import pytest

from dynroute.contracts import InputError
from dynroute.records import (
    EVAL_COLUMNS,
    BenchRow,
    EvalRow,
    as_dict,
    check_writable,
    merge_bench,
    merge_eval,
    read_eval,
    read_rows,
    route_text,
    write_file,
    write_rows,
    write_text,
)

ROW = EvalRow(
    **{
        "run": "a, b",
        "method": "dmnn",
        "backbone": "resnet20",
        "dataset": "cifar10",
        "seed": 3,
        "split": "test",
    },
    **{"flops_target": 0.5, "price": 0.25, "share_calib": None, "macs_mean": 20.4e6, "macs_p5": 18e6},
    **{"macs_p95": 22e6, "macs_dense": 40.8e6, "macs_share": 0.5, "router_share": 0.01, "top1": 0.9173},
    **{"top5": 0.99, "loss": 0.3, "n": 10000, "routes": 7, "params": 270000, "epochs": 2.5},
)


def test_round_trip(tmp_path: Path) -> None:
    write_rows(tmp_path / "eval.csv", [as_dict(ROW)], EVAL_COLUMNS)
    assert read_eval(tmp_path / "eval.csv") == [as_dict(ROW)]


def test_empty_and_nan_cells(tmp_path: Path) -> None:
    merge_eval(tmp_path / "eval.csv", replace(ROW, loss=float("nan"), flops_target=None))
    (row,) = read_eval(tmp_path / "eval.csv")
    assert math.isnan(row["loss"])
    assert row["flops_target"] is None
    assert row["latency_device"] == ""


def test_columns_in_the_order_first_seen(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.csv", [{"b": 1, "a": None}, {"c": 2.0}])
    assert (tmp_path / "t.csv").read_text() == "b,a,c\n1,,\n,,2\n"


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old\n")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "a.txt", "new\n")
    assert (tmp_path / "a.txt").read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    def fill(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        write_file(tmp_path / "last.pt", fill)
    assert error.value.filename == str(tmp_path / "last.pt") and not list(tmp_path.iterdir())


def test_a_folder_without_write_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("dynroute.records.tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=f"cannot write to {tmp_path}: Read-only file system"):
        check_writable(tmp_path)


def test_merge_replaces_the_same_split_and_target(tmp_path: Path) -> None:
    file = tmp_path / "eval.csv"
    for row in (
        ROW,
        replace(ROW, split="calib"),
        replace(ROW, flops_target=None),
        replace(ROW, top1=0.5),
        replace(ROW, flops_target=None, top1=0.6),
    ):
        merge_eval(file, row)
    found = [(r["split"], r["flops_target"], r["top1"]) for r in read_eval(file)]
    assert found == [("calib", 0.5, 0.9173), ("test", 0.5, 0.5), ("test", None, 0.6)]


def test_a_time_stays_with_a_row_whose_numbers_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "eval.csv"
    times = {
        "latency_ms_p50": 3.0,
        "latency_ms_mean": 3.5,
        "speedup": 1.25,
        "latency_batch": 1,
        "latency_device": "cpu",
    }
    merge_eval(file, replace(ROW, machine="a", **times))
    for row, kept in ((replace(ROW, machine="a"), 3.0), (replace(ROW, machine="b"), None)):
        merge_eval(file, row)
        (found,) = read_eval(file)
        assert (found["latency_ms_p50"], found["speedup"]) == (kept, 1.25 if kept else None)
    merge_eval(file, replace(ROW, machine="a", **times))
    merge_eval(file, replace(ROW, machine="a", top1=0.5))
    assert read_eval(file)[0]["latency_ms_mean"] is None, "another net's"


def added(file: Path, targets: list[float]) -> None:
    for target in targets:
        merge_eval(file, replace(ROW, flops_target=target))


def test_programs_that_write_rows_at_once_lose_none(tmp_path: Path) -> None:
    started = [Process(target=added, args=(tmp_path / "eval.csv", [k + i / 100 for i in range(15)])) for k in range(3)]
    for one in started:
        one.start()
    for one in started:
        one.join()
    assert len(read_eval(tmp_path / "eval.csv")) == 45
    assert [file.name for file in tmp_path.iterdir()] == ["eval.csv"]


def test_rows_of_before_a_users_data_had_a_name_take_it_over(tmp_path: Path) -> None:
    file = tmp_path / "eval.csv"
    before = replace(ROW, dataset="npz", config_hash="old", flops_target=0.4)
    merge_eval(file, before)
    merge_eval(file, replace(before, flops_target=0.5, dataset="npz-flowers", config_hash="new"))
    assert [(row["dataset"], row["config_hash"]) for row in read_eval(file)] == [("npz-flowers", "new")] * 2
    merge_eval(file, replace(before, flops_target=0.6, dataset="npz-flowers", config_hash="newer"))
    merge_eval(file, replace(before, flops_target=0.7, dataset="npz-flowers-2", config_hash="other"))
    assert [row["dataset"] for row in read_eval(file)] == [*["npz-flowers"] * 3, "npz-flowers-2"], "a name is no prefix"
    assert [row["config_hash"] for row in read_eval(file)] == ["new", "new", "newer", "other"], (
        "of other configurations they stay"
    )


def test_merge_into_a_file_with_a_column_too_many(tmp_path: Path) -> None:
    file = tmp_path / "eval.csv"
    write_rows(file, [{**as_dict(replace(ROW, split="calib")), "newer": 1}])
    merge_eval(file, ROW)
    assert [r["split"] for r in read_eval(file)] == ["calib", "test"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,", "half-written"),
        ("", "half-written"),
        ("a,b\n1\n", "do not fit its header"),
        ("a,b\n1,2,3\n", "do not fit its header"),
        ("a\n" + "x" * 200_000 + "\n", "not a CSV"),
    ],
)
def test_torn_and_foreign_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / "t.csv")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read"):
        read_rows(tmp_path / "b.csv")


def test_missing_column_and_no_number(tmp_path: Path) -> None:
    cells = as_dict(ROW)
    write_rows(tmp_path / "old.csv", [{k: v for k, v in cells.items() if k != "top1"}])
    with pytest.raises(InputError, match="lacks the columns top1"):
        read_eval(tmp_path / "old.csv")
    write_rows(tmp_path / "word.csv", [{**cells, "top1": "high"}])
    with pytest.raises(InputError, match="top1 is 'high', not a number"):
        read_eval(tmp_path / "word.csv")


def test_a_control_goes_with_a_changed_cost_and_stays_beside_the_same_row(tmp_path: Path) -> None:
    file = tmp_path / "eval.csv"
    merge_eval(file, ROW)
    merge_eval(file, replace(ROW, control="shuffled", top1=0.5))
    merge_eval(file, ROW)
    assert [row["control"] for row in read_eval(file)] == ["shuffled", ""]
    merge_eval(file, replace(ROW, macs_mean=20.5e6))
    assert [row["control"] for row in read_eval(file)] == [""]


def test_a_new_time_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for ms in (3.0, 4.0):
        merge_eval(tmp_path / "eval.csv", replace(ROW, machine="a", latency_ms_p50=ms))
    assert [row["latency_ms_p50"] for row in read_eval(tmp_path / "eval.csv")] == [4.0]


def test_evaluations_of_another_checkpoint_or_limit_stand_beside_each_other(tmp_path: Path) -> None:
    file = tmp_path / "eval.csv"
    write_rows(file, [{**as_dict(ROW), "checkpoint": ""}], EVAL_COLUMNS)  # of before rows named one
    others = [replace(ROW, checkpoint="best"), replace(ROW, flops_max=0.6)]
    for row in (ROW, *others, ROW, *others):
        merge_eval(file, row)
    assert [(r["checkpoint"], r["flops_max"]) for r in read_eval(file)] == [
        ("last", None),
        ("best", None),
        ("last", 0.6),
    ]


def test_times_of_another_setting_stand_beside_each_other(tmp_path: Path) -> None:
    file = tmp_path / "bench.csv"
    row = BenchRow("r", "dmnn", "resnet20", "cifar10", "skipping", flops_target=0.5)
    write_rows(file, [{**as_dict(row), "checkpoint": ""}])  # of before rows named one
    changes: dict[str, Any] = {"flops_target": 0.6, "flops_max": 0.7, "checkpoint": "best", "rate": 0.5, "batch": 8}
    changes |= {"mode": "masked", "threads": 2, "device": "cuda", "dtype": "bf16"}
    every = [row, *(replace(row, **{name: value}) for name, value in changes.items())]
    for one in (*every, *every):
        merge_bench(file, [one])
    assert len(read_rows(file)) == 1 + len(changes)


def test_a_route_has_the_parts_of_its_units_alone() -> None:
    assert route_text([[1, 0, 0], [0, 1, 0]], [3, 2]) == "100/01"


def test_files_are_for_others_to_read(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "x\n")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def test_a_time_stays_with_the_clock_that_took_it(tmp_path: Path) -> None:
    clock: dict[str, Any] = {"latency_batch": 8, "latency_threads": 2, "latency_device": "cpu", "machine": "a"}
    merge_eval(tmp_path / "eval.csv", replace(ROW, latency_ms_p50=3.0, **clock))
    merge_eval(tmp_path / "eval.csv", replace(ROW, machine="a"))
    (found,) = read_eval(tmp_path / "eval.csv")
    assert {name: found[name] for name in clock} == clock and found["latency_ms_p50"] == 3.0
