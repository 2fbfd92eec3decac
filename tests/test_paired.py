"""Intervals of differences, against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynroute.contracts import InputError
from dynroute.records import read_rows, write_rows
from dynroute.report import compare
from dynroute.report.cells import control_cells
from dynroute.report.paired import Answers, answers, over_seeds, paired, unpaired
from test_report import row, save


def images(bits: str) -> Answers:
    return Answers(f"first {len(bits)}".encode(), np.array([float(bit) for bit in bits]))


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


PLAIN = {"loss": 0.5, "macs": 1000, "route": "1/0"}  # of no matter here


def routes(folder: Path, target: str, bits: str, first: int = 0) -> None:
    """A routes.csv whose images are right where the bit is 1; written last image first."""
    setting = {"split": "test", "flops_target": target, "checkpoint": "last"}
    rows = [{**setting, "index": first + i, "label": 0, "predicted": 1 - int(b), **PLAIN} for i, b in enumerate(bits)]
    write_rows(folder / "routes.csv", rows[::-1])


def test_answers_are_read_by_target_in_the_order_of_the_images(tmp_path: Path) -> None:
    routes(tmp_path, "0.5", "1101")
    text = (tmp_path / "routes.csv").read_text()
    (tmp_path / "routes.csv").write_text(text + text.split("\n", 1)[1].replace("0.5", "").replace("last,3", "best,3"))
    found = answers(tmp_path / "routes.csv")
    assert found["test", "0.5", "", "last"].right_N.tolist() == [1, 1, 0, 1]
    assert found["test", "", "", "last"].right_N.tolist() == [1, 1, 0]  # image 3 is of another checkpoint
    assert found["test", "", "", "best"].right_N.tolist() == [1]


def test_limited_and_best_rows_are_paired_with_images_of_their_own(tmp_path: Path) -> None:
    static = row(0.5, 0.5, run="st", method="static", config_hash="st")
    own = [row(0.5, 0.75, run="d"), row(0.5, 0.5, run="d", flops_max=0.7), row(0.5, 0.25, run="d", checkpoint="best")]
    paths = save(tmp_path, static, *own)
    routes(tmp_path / "st", "", "1100")
    lines = []
    for most, checkpoint, bits in (("", "last", "1101"), ("0.7", "last", "1001"), ("", "best", "1000")):
        setting = {"split": "test", "flops_target": "", "flops_max": most, "checkpoint": checkpoint}
        lines += [{**setting, "index": i, "label": 0, "predicted": 1 - int(b), **PLAIN} for i, b in enumerate(bits)]
    write_rows(tmp_path / "d" / "routes.csv", lines)
    made = compare(paths, tmp_path / "out")
    found = made.controls[made.controls["control"] == "static, narrower"]
    assert sorted(found["difference"]) == pytest.approx([-25, 0, 25])
    assert set(found["interval"]) == {"paired"} and made.left_out == []
    report = read_rows(tmp_path / "out" / "routes_report.csv")
    assert [int(float(line["n"])) for line in report] == [4, 4, 4]


def test_a_control_is_paired_with_its_row_by_its_own_answers(tmp_path: Path) -> None:
    paths = save(tmp_path, row(0.5, 0.75, run="d"), row(0.5, 0.5, run="d", control="shuffled"))
    routes(tmp_path / "d", "", "1101")
    setting = {"split": "test", "flops_target": "", "flops_max": "", "checkpoint": "last", "control": "shuffled"}
    answered = [{**setting, "index": i, "label": 0, "predicted": 1 - int(b)} for i, b in enumerate("1100")]
    write_rows(tmp_path / "d" / "control_answers.csv", answered)
    (line,) = compare(paths, tmp_path / "out").controls.to_dict("records")
    half = 195.9964 * (1 / 4 - 1 / 16) ** 0.5 / 2
    assert (line["interval"], line["difference"]) == ("paired", pytest.approx(25))
    assert line["low"] == pytest.approx(25 - half)


def test_a_control_of_other_seeds_than_its_row_is_named_and_not_compared(tmp_path: Path) -> None:
    own = [row(0.5, 0.8, run=f"d-s{seed}", seed=seed, flops_target=0.5) for seed in (0, 1)]
    control = row(0.5, 0.7, run="d-s1", seed=1, flops_target=0.5, control="shuffled")
    made = compare(save(tmp_path, *own, control), tmp_path / "out")
    assert made.controls.empty
    (said,) = made.left_out
    assert "shuffled control is of seeds 1, the row of 0 1" in said.reason


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x,y\n1,2\n", "lacks the columns split"),
        ("", "half-written"),
        ("split,flops_target,checkpoint,index,label,predicted\ntest,0.5,last,0,1,", "half-written"),
        ("split,flops_target,checkpoint,index,label,predicted\ntest,0.5,last,0,1\n", "do not fit its header"),
        ("split,flops_target,checkpoint,index,label,predicted\ntest,0.5,last,0,1,cat\n", "not a table of images"),
        ("split,flops_target,checkpoint,index,label,predicted\ntest,0.5,last,0,1,1,7,8\n", "do not fit its header"),
    ],
)
def test_a_broken_routes_file_is_an_input_error(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "routes.csv").write_text(content)
    with pytest.raises(InputError, match=said):
        answers(tmp_path / "routes.csv")


def test_a_routed_row_stands_between_its_static_neighbours(tmp_path: Path) -> None:
    static = [row(s, t, run=f"st{s}", method="static", config_hash=f"st{s}") for s, t in ((0.4, 0.5), (0.6, 0.75))]
    paths = save(tmp_path, *static, row(0.5, 0.75, run="d", flops_target=0.5))
    for name, target, bits in (("st0.4", "", "1100"), ("st0.6", "", "1110"), ("d", "0.5", "1101")):
        routes(tmp_path / name, target, bits)
    made = compare(paths, tmp_path / "out")
    (line,) = [r for r in made.table.to_dict("records") if r["method"] == "dmnn"]
    terms = [0.0, 0.0, -0.5, 1.0]  # right less the mean of both neighbours
    half = 196 * (sum(d * d for d in terms) / 4 - 0.125**2) ** 0.5 / 2
    assert line["vs_static"] == pytest.approx(12.5)
    assert (line["vs_static_low"], line["vs_static_high"]) == pytest.approx((12.5 - half, 12.5 + half), abs=1e-2)
    assert list(made.controls["interval"]) == ["paired"] and made.left_out == []
    routes(tmp_path / "d", "0.5", "1101", first=7)
    assert list(compare(paths, tmp_path / "out").controls["interval"]) == ["independent"]  # other images
    (tmp_path / "d" / "routes.csv").write_text("x,y\n1,2\n")
    again = compare(paths, tmp_path / "out")
    assert list(again.controls["interval"]) == ["independent"]
    (said,) = again.left_out
    assert said.path == tmp_path / "d" / "routes.csv" and "lacks the columns" in said.reason
    assert "routes.csv" in (tmp_path / "out" / "index.html").read_text()


def test_three_seeds_are_paired_by_their_mean(tmp_path: Path) -> None:
    own = [row(0.5, t, run=f"d-s{i}", seed=i, flops_target=0.5) for i, t in enumerate((0.5, 0.75, 1.0))]
    paths = save(tmp_path, row(0.5, 0.5, run="st", method="static", config_hash="st"), *own)
    for name, target, bits in (
        ("st", "", "1100"), ("d-s0", "0.5", "1100"), ("d-s1", "0.5", "1110"), ("d-s2", "0.5", "1111"),
    ):  # fmt: skip
        routes(tmp_path / name, target, bits)
    made = compare(paths, tmp_path / "out")
    (line,) = made.controls.to_dict("records")
    assert (line["difference"], line["interval"], line["n_seeds"]) == (pytest.approx(25), "paired", 3)
    terms = [0, 0, 2 / 3, 1 / 3]
    half = 195.9964 * (sum(d * d for d in terms) / 4 - 0.25**2) ** 0.5 / 2
    assert line["low"] == pytest.approx(25 - half)
    assert control_cells(made.controls)[0]["top-1 %"] == "75.00 +- 25.00 (3)"


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
