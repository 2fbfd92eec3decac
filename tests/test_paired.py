"""Intervals of differences, against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynroute.contracts import InputError
from dynroute.records import write_rows
from dynroute.report import compare
from dynroute.report.paired import Images, answers, paired, unpaired
from dynroute.report.tables import cells
from test_report import row, save


def images(bits: str) -> Images:
    return {(str(i), "0"): bit == "1" for i, bit in enumerate(bits)}


def test_the_paired_interval_is_that_of_mcnemar() -> None:
    one, other = images("1111100000" * 10), images("1110000001" * 10)
    b, c, n = 20, 10, 100
    found = paired(one, [other], [1.0])
    half = 100 * 1.959964 * (b + c - (b - c) ** 2 / n) ** 0.5 / n
    assert found == pytest.approx((10.0, 10 - half, 10 + half))
    assert found[2] - found[1] < unpaired(0.5, n, 0.4, n)[2] - unpaired(0.5, n, 0.4, n)[1]
    assert paired(one, [one], [1.0]) == pytest.approx((0, 0, 0))


def test_other_images_have_no_paired_interval() -> None:
    assert paired(images("10"), [images("101")], [1.0]) is None
    assert paired({}, [{}], [1.0]) is None


def routes(folder: Path, target: str, bits: str) -> None:
    """A routes.csv whose images are right where the bit is 1."""
    setting = {"split": "test", "flops_target": target, "checkpoint": "last"}
    rows = [{**setting, "index": i, "label": 0, "predicted": 1 - int(b)} for i, b in enumerate(bits)]
    write_rows(folder / "routes.csv", rows)


def test_a_routed_row_stands_between_its_static_neighbours(tmp_path: Path) -> None:
    static = [row(s, t, run=f"st{s}", method="static", config_hash=f"st{s}") for s, t in ((0.4, 0.5), (0.6, 0.75))]
    paths = save(tmp_path, *static, row(0.5, 0.75, run="d", flops_target=0.5))
    for name, target, bits in (("st0.4", "", "1100"), ("st0.6", "", "1110"), ("d", "0.5", "1101")):
        routes(tmp_path / name, target, bits)
    table = compare(paths, tmp_path / "out").table
    (line,) = [r for r in table.to_dict("records") if r["method"] == "dmnn"]
    terms = [0.0, 0.0, -0.5, 1.0]  # right less the mean of both neighbours
    half = 196 * (sum(d * d for d in terms) / 4 - 0.125**2) ** 0.5 / 2
    assert line["vs_static"] == pytest.approx(12.5)
    assert (line["vs_static_low"], line["vs_static_high"]) == pytest.approx((12.5 - half, 12.5 + half), abs=1e-2)
    (tmp_path / "d" / "routes.csv").write_text("x,y\n1,2\n")
    again = compare(paths, tmp_path / "out")
    assert again.table["vs_static_low"].isna().all()
    (said,) = again.left_out
    assert said.path == tmp_path / "d" / "routes.csv" and "lacks the columns" in said.reason
    assert "routes.csv" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(InputError, match="lacks the columns split"):
        answers(tmp_path / "d" / "routes.csv", None)


def test_a_control_that_is_not_beaten_is_marked(tmp_path: Path) -> None:
    routed = [row(0.5, 0.9, flops_target=0.5), row(0.5, 0.89, flops_target=0.5, control="shuffled")]
    routed += [row(0.5, 0.895, flops_target=0.5, control="random")]
    shown = {
        r["control"]: r["routed less control"] for r in cells(compare(save(tmp_path, *routed), tmp_path / "o").table)
    }
    assert shown[""] == ""
    assert shown["shuffled"] == "+1.00 (+0.15 to +1.85)"
    assert shown["random"] == "+0.50 (-0.34 to +1.34) not beaten"
    assert "not beaten" in (tmp_path / "o" / "index.html").read_text()
