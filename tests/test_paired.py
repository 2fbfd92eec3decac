"""Intervals of differences, against arithmetic by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dynroute.contracts import InputError
from dynroute.records import read_rows, right_of, right_text, write_rows
from dynroute.report import compare
from dynroute.report.cells import control_cells
from dynroute.report.paired import Answers, answers, over_seeds, paired, unpaired
from test_report import row, save


def images(bits: str) -> Answers:
    return Answers(f"first {len(bits)}", np.array([float(bit) for bit in bits]))


def test_the_paired_interval_is_that_of_mcnemar() -> None:
    one, other = images("1111100000" * 10), images("1110000001" * 10)
    b, c, n = 20, 10, 100
    found = paired(one, [other], [1.0])
    assert found
    half = 100 * 1.959964 * (b + c - (b - c) ** 2 / n) ** 0.5 / n
    assert found == pytest.approx((10.0, 10 - half, 10 + half))
    apart = unpaired(0.5, n, [(0.4, n, 1.0)])
    assert apart.points == pytest.approx(10) and found.high - found.low < apart.high - apart.low
    assert paired(one, [one], [1.0]) == pytest.approx((0, 0, 0))


def test_other_images_have_no_paired_interval() -> None:
    assert paired(images("10"), [images("101")], [1.0]) is None
    assert paired(images("10"), [None], [1.0]) is None
    assert paired(None, [images("10")], [1.0]) is None
    assert paired(images(""), [images("")], [1.0]) is None


def test_seeds_are_meaned_image_by_image() -> None:
    both = over_seeds([images("1100"), images("1010")])
    assert both and both.right_N.tolist() == [1, 0.5, 0.5, 0]
    assert over_seeds([images("11"), None]) is None
    assert over_seeds([images("11"), images("111")]) is None


def right(folder: Path, target: str, bits: str, most: str = "", checkpoint: str = "last", control: str = "") -> None:
    """Add a row to a right.csv: which images are right."""
    file = folder / "right.csv"
    setting = {"split": "test", "flops_target": target, "flops_max": most, "checkpoint": checkpoint, "control": control}
    told = {"n": len(bits), "images": f"first {len(bits)}", "right": right_text(bit == "1" for bit in bits)}
    old = read_rows(file) if file.exists() else []
    write_rows(file, [*(r for r in old if any(r[k] != v for k, v in setting.items())), {**setting, **told}])


@pytest.mark.parametrize("bits", ["1", "0", "0000", "1101", "00001", "110100111"])
def test_right_answers_come_back_as_they_were_written(bits: str) -> None:
    text = right_text(bit == "1" for bit in bits)
    assert "".join(map(str, right_of(text, len(bits)))) == bits and len(text) == -(-len(bits) // 4)
    assert right_text(bit == "1" for bit in "00011000") == "18"
    with pytest.raises(ValueError, match="digits for"):
        right_of(text, len(bits) + 4)


def test_answers_are_read_by_setting_and_control(tmp_path: Path) -> None:
    right(tmp_path, "0.5", "1101")
    right(tmp_path, "", "110", checkpoint="best")
    right(tmp_path, "0.5", "1000", control="shuffled")
    found = answers(tmp_path / "right.csv")
    assert found["test", "0.5", "", "last", ""].right_N.tolist() == [1, 1, 0, 1]
    assert found["test", "", "", "best", ""].right_N.tolist() == [1, 1, 0]
    assert found["test", "0.5", "", "last", "shuffled"].right_N.tolist() == [1, 0, 0, 0]


def test_limited_and_best_rows_are_paired_with_images_of_their_own(tmp_path: Path) -> None:
    static = row(0.5, 0.5, run="st", method="static", config_hash="st")
    own = [row(0.5, 0.75, run="d"), row(0.5, 0.5, run="d", flops_max=0.7), row(0.5, 0.25, run="d", checkpoint="best")]
    paths = save(tmp_path, static, *own)
    right(tmp_path / "st", "", "1100")
    setting = {"split": "test", "flops_target": "", "flops_max": "", "checkpoint": "last"}
    lines = []
    for most, checkpoint, bits in (("", "last", "1101"), ("0.7", "last", "1001"), ("", "best", "1000")):
        right(tmp_path / "d", "", bits, most, checkpoint)
        of = {
            **setting,
            "flops_max": most,
            "checkpoint": checkpoint,
            "label": 0,
            "loss": 0.5,
            "macs": 9,
            "route": "1/0",
        }
        lines += [{**of, "index": i, "predicted": 1 - int(bit)} for i, bit in enumerate(bits)]
    write_rows(tmp_path / "d" / "routes.csv", lines)
    made = compare(paths, tmp_path / "out")
    found = made.controls[made.controls["control"] == "static, narrower"]
    assert sorted(found["difference"]) == pytest.approx([-25, 0, 25])
    assert set(found["interval"]) == {"paired"} and made.left_out == []
    report = read_rows(tmp_path / "out" / "routes_report.csv")
    assert [int(float(line["n"])) for line in report] == [4, 4, 4]


def test_a_control_is_paired_with_its_row_by_its_own_answers(tmp_path: Path) -> None:
    paths = save(tmp_path, row(0.5, 0.75, run="d"), row(0.5, 0.5, run="d", control="shuffled"))
    right(tmp_path / "d", "", "1101")
    right(tmp_path / "d", "", "1100", control="shuffled")
    (line,) = compare(paths, tmp_path / "out").controls.to_dict("records")
    half = 195.9964 * (1 / 4 - 1 / 16) ** 0.5 / 2
    assert (line["interval"], line["difference"]) == ("paired", pytest.approx(25))
    assert line["low"] == pytest.approx(25 - half)


def test_copied_rows_are_paired_by_what_lies_beside_them(tmp_path: Path) -> None:
    for made in (row(0.5, 0.5, run="st", method="static", config_hash="st"), row(0.5, 0.75, run="d")):
        (run,) = save(tmp_path / "runs", made)
        right(run, "", "1100" if made.run == "st" else "1101")
        for file, copy in (("eval.csv", tmp_path / "csv"), ("right.csv", tmp_path / "csv" / "right")):
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / file, copy / f"{made.run}.csv")
    found = compare([tmp_path / "csv"], tmp_path / "out")
    assert list(found.controls["interval"]) == ["paired"] and found.left_out == []
    shutil.copy(tmp_path / "csv" / "right" / "st.csv", tmp_path / "csv" / "right" / "d.csv")
    again = compare([tmp_path / "csv"], tmp_path / "out")
    assert list(again.controls["interval"]) == ["independent"]
    (said,) = again.left_out
    assert said.path == tmp_path / "csv" / "right" / "d.csv" and "whose top-1 is another" in said.reason


def test_a_control_of_other_seeds_than_its_row_is_named_and_not_compared(tmp_path: Path) -> None:
    own = [row(0.5, 0.8, run=f"d-s{seed}", seed=seed, flops_target=0.5) for seed in (0, 1)]
    control = row(0.5, 0.7, run="d-s1", seed=1, flops_target=0.5, control="shuffled")
    made = compare(save(tmp_path, *own, control), tmp_path / "out")
    assert made.controls.empty
    (said,) = made.left_out
    assert "shuffled control is of seeds 1, the row of 0 1" in said.reason


HEAD = "split,flops_target,flops_max,checkpoint,control,n,images,right\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x,y\n1,2\n", "not a table of right answers .KeyError"),
        ("", "half-written"),
        (f"{HEAD}test,0.5,,last,,4,first 4,", "half-written"),
        (f"{HEAD}test,0.5,,last,,4\n", "do not fit its header"),
        (f"{HEAD}test,0.5,,last,,4,first 4,x\n", "not a table of right answers"),
        (f"{HEAD}test,0.5,,last,,4,first 4,ff\n", "2 digits for 4 images"),
        (f"{HEAD}test,0.5,,last,,four,first 4,f\n", "not a table of right answers"),
    ],
)
def test_a_broken_table_of_answers_is_an_input_error(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "right.csv").write_text(content)
    with pytest.raises(InputError, match=said):
        answers(tmp_path / "right.csv")


def test_a_routed_row_stands_between_its_static_neighbours(tmp_path: Path) -> None:
    static = [row(s, t, run=f"st{s}", method="static", config_hash=f"st{s}") for s, t in ((0.4, 0.5), (0.6, 0.75))]
    paths = save(tmp_path, *static, row(0.5, 0.75, run="d", flops_target=0.5))
    for name, target, bits in (("st0.4", "", "1100"), ("st0.6", "", "1110"), ("d", "0.5", "1101")):
        right(tmp_path / name, target, bits)
    made = compare(paths, tmp_path / "out")
    (line,) = [r for r in made.table.to_dict("records") if r["method"] == "dmnn"]
    terms = [0.0, 0.0, -0.5, 1.0]  # right less the mean of both neighbours
    half = 196 * (sum(d * d for d in terms) / 4 - 0.125**2) ** 0.5 / 2
    assert line["vs_static"] == pytest.approx(12.5)
    assert (line["vs_static_low"], line["vs_static_high"]) == pytest.approx((12.5 - half, 12.5 + half), abs=1e-2)
    assert list(made.controls["interval"]) == ["paired"] and made.left_out == []
    right(tmp_path / "d", "0.5", "11011101")
    assert list(compare(paths, tmp_path / "out").controls["interval"]) == ["independent"]  # other images
    (tmp_path / "d" / "right.csv").write_text("x,y\n1,2\n")
    again = compare(paths, tmp_path / "out")
    assert list(again.controls["interval"]) == ["independent"]
    (said,) = again.left_out
    assert said.path == tmp_path / "d" / "right.csv" and "not a table of right answers" in said.reason
    assert str(said.path) in (tmp_path / "out" / "index.html").read_text()


def test_three_seeds_are_paired_by_their_mean(tmp_path: Path) -> None:
    own = [row(0.5, t, run=f"d-s{i}", seed=i, flops_target=0.5) for i, t in enumerate((0.5, 0.75, 1.0))]
    paths = save(tmp_path, row(0.5, 0.5, run="st", method="static", config_hash="st"), *own)
    for name, target, bits in (
        ("st", "", "1100"), ("d-s0", "0.5", "1100"), ("d-s1", "0.5", "1110"), ("d-s2", "0.5", "1111"),
    ):  # fmt: skip
        right(tmp_path / name, target, bits)
    made = compare(paths, tmp_path / "out")
    (line,) = made.controls.to_dict("records")
    assert (line["difference"], line["interval"], line["n_seeds"]) == (pytest.approx(25), "paired", 3)
    terms = [0, 0, 2 / 3, 1 / 3]
    half = 195.9964 * (sum(d * d for d in terms) / 4 - 0.25**2) ** 0.5 / 2
    assert line["low"] == pytest.approx(25 - half)
    assert control_cells(made.controls)[0]["top-1 %"] == "75.00 +- 25.00 (3)"


def test_seeds_of_different_images_are_named(tmp_path: Path) -> None:
    own = [row(0.5, 0.75, run=f"d-s{i}", seed=i, flops_target=0.5) for i in (0, 1)]
    paths = save(tmp_path, row(0.5, 0.5, run="st", method="static", config_hash="st"), *own)
    for name, target, bits in (("st", "", "1100"), ("d-s0", "0.5", "1110"), ("d-s1", "0.5", "11111100")):
        right(tmp_path / name, target, bits)
    (said,) = compare(paths, tmp_path / "out").left_out
    assert "the seeds of dmnn were tested on different images" in said.reason


def test_a_control_that_is_not_beaten_is_marked(tmp_path: Path) -> None:
    routed = [row(0.5, 0.9, flops_target=0.5), row(0.5, 0.89, flops_target=0.5, control="shuffled")]
    routed += [row(0.5, 0.895, flops_target=0.5, control="random")]
    routed += [row(0.7, 0.95, flops_target=0.7), row(0.7, 0.94, flops_target=0.7, control="random")]
    made = compare(save(tmp_path, *routed), tmp_path / "o")
    first, second = control_cells(made.controls)
    assert [name for name in first if name in set(made.controls["control"])] == ["shuffled", "random"]
    assert (first["shuffled"], first["random"]) == ("+1.00 +- 0.85", "+0.50 +- 0.84 x")
    assert (second["shuffled"], second["random"][:5], second["interval"]) == ("", "+1.00", "independent")
    assert '<td class="number warn">+0.50 +- 0.84 x</td>' in (tmp_path / "o" / "index.html").read_text()
