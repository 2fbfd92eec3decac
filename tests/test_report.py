"""Tables, pictures and page from rows made by hand."""

from __future__ import annotations

import csv
import errno
import io
import itertools
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import tree
from dynroute.contracts import InputError
from dynroute.records import EVAL_COLUMNS, EvalRow, as_dict, merge_eval, right_text, write_rows
from dynroute.report import Comparison, compare, read, to_rich
from dynroute.report.cells import (
    MACS,
    cells,
    control_cells,
    fitting,
    markdown_table,
    rich_table,
    to_markdown,
    without_common,
)
from dynroute.report.tables import COLUMNS

DENSE = 40e6
FILES = [
    "accuracy_flops.csv",
    "accuracy_flops.png",
    "accuracy_flops.svg",
    "controls.csv",
    "index.html",
    "table.csv",
    "table.md",
    "table.tex",
]


def row(share: float, top1: float, **changes: Any) -> EvalRow:
    """A row at a share of 40 million multiply-adds."""
    values: dict[str, Any] = {
        **{
            "run": "r",
            "method": "dmnn",
            "backbone": "resnet20",
            "dataset": "cifar10",
            "seed": 0,
            "split": "test",
        },
        **{"flops_target": None, "price": 0.0, "share_calib": None, "macs_mean": share * DENSE},
        **{"macs_p5": 0.9 * share * DENSE, "macs_p95": 1.1 * share * DENSE, "macs_dense": DENSE},
        **{"macs_share": share, "router_share": 0.01, "top1": top1, "top5": 0.99, "loss": 0.3, "n": 10000},
        **{"routes": 7, "params": 270000, "epochs": 100.0, "config_hash": changes.get("method", "dmnn")},
    }
    return EvalRow(**{**values, **changes})


def save(root: Path, *rows: EvalRow) -> list[Path]:
    """A run folder for each run name."""
    for each in rows:
        merge_eval(root / each.run / "eval.csv", each)
    return sorted({root / each.run for each in rows})


def table_of(tmp_path: Path, *rows: EvalRow) -> tuple[Comparison, list[dict[str, str]]]:
    """The comparison of rows, and table.csv as it lies on disk."""
    comparison = compare(save(tmp_path / "runs", *rows), tmp_path / "out")
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        return comparison, list(csv.DictReader(file))


STATIC = [row(s, t, run=f"st{s}", method="static", config_hash=f"st{s}") for s, t in ((0.25, 0.80), (0.75, 0.90))]


def test_numbers_are_those_of_the_input(tmp_path: Path) -> None:
    given = row(1 / 3, 0.91737, flops_target=0.33, latency_ms_p50=3.25, speedup=1.5, commit="abc", machine="box")
    comparison, (line,) = table_of(tmp_path, given)
    assert tuple(line) == COLUMNS
    wanted = as_dict(given)
    for name in ("macs_mean", "macs_share", "macs_p5", "macs_p95", "router_share", "top1", "top5", "epochs"):
        assert float(line[name]) == pytest.approx(wanted[name], rel=1e-7), name  # eval.csv holds eight digits
    for name in ("flops_target", "speedup"):
        assert float(line[name]) == wanted[name]
    assert float(line["latency_ms"]) == 3.25, "the median, no mean being stored"
    assert (line["n"], line["params"], line["n_seeds"], line["seeds"]) == ("10000", "270000", "1", "0")
    assert (line["commits"], line["machine"], line["reached"], line["top1_std"]) == ("abc", "box", "True", "")
    assert sorted(p.name for p in comparison.files) == FILES
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES


def test_a_target_is_reached_by_every_seed_or_not_at_all(tmp_path: Path) -> None:
    rows = [row(s, 0.9, run=f"d-seed{i}", seed=i, flops_target=0.6) for i, s in enumerate((0.55, 0.65))]
    _, (line,) = table_of(tmp_path, *rows)
    assert (float(line["macs_share"]), line["reached"]) == (pytest.approx(0.6), "False")


def test_controls_go_with_the_row_that_they_were_made_from(tmp_path: Path) -> None:
    """Trained anew without controls, or stopped: the other run's controls say nothing of the row that is shown."""
    same = {"flops_target": 0.5, "config_hash": "one"}
    old = [row(0.5, 0.80, run="old", **same), row(0.5, 0.78, run="old", control="shuffled", **same)]
    new = [row(0.5, 0.90, run="new", **same)]
    for first, second in ((old, new), (new, old)):
        folders = [save(tmp_path / f"{first[0].run}{i}", *rows)[0] for i, rows in enumerate((first, second))]
        found, left_out = read(folders)
        assert [(r["run"], r["control"]) for r in found] == [(r.run, r.control) for r in second]
        assert len(left_out) == 1
    stopped = [row(0.5, 0.60, run="stopped", epochs=3.0, **same)]
    stopped.append(row(0.5, 0.58, run="stopped", epochs=3.0, control="shuffled", **same))
    found, _ = read([*save(tmp_path / "whole", *new), *save(tmp_path / "part", *stopped)])
    assert [(r["run"], r["control"]) for r in found] == [("new", "")]


def test_controls_of_a_copy_count_for_the_run_itself(tmp_path: Path) -> None:
    own = row(0.5, 0.80, run="a", flops_target=0.5)
    without = save(tmp_path / "run", own)[0]
    with_controls = save(tmp_path / "copy", own, row(0.5, 0.78, run="a", flops_target=0.5, control="shuffled"))[0]
    found, left_out = read([with_controls, without])
    assert ([r["control"] for r in found], left_out) == (["", "shuffled"], [])


def test_seeds_are_pooled(tmp_path: Path) -> None:
    rows = [row(0.5, t, run=f"d-seed{i}", seed=i, flops_target=0.5) for i, t in enumerate((0.90, 0.91, 0.95))]
    comparison, (line,) = table_of(tmp_path, *rows)
    assert float(line["top1"]) == pytest.approx(0.92)
    assert float(line["top1_std"]) == pytest.approx((0.0014 / 2) ** 0.5)  # squares 0.0004 + 0.0001 + 0.0009
    assert (line["n_seeds"], line["seeds"], line["label"]) == ("3", "0 1 2", "dmnn")
    assert cells(comparison.table)[0]["top-1 %"] == "92.00 +- 2.65 (3)"
    assert cells(comparison.table)[0]["seeds"] == "n=3"


def test_targets_and_configurations_are_not_pooled(tmp_path: Path) -> None:
    rows = [
        row(0.5, 0.9, run="wide-seed0", config_hash="w"),
        row(0.5, 0.9, run="wide-seed0", config_hash="w", flops_target=0.5),
        row(0.5, 0.9, run="thin_s0", config_hash="t"),
        row(0.5, 0.9, run="thin_s1", config_hash="t", seed=1),
    ]
    _, lines = table_of(tmp_path, *rows)
    assert [(x["label"], x["flops_target"], x["n_seeds"]) for x in lines] == [
        ("thin", "", "2"),
        ("wide", "0.5", "1"),
        ("wide", "", "1"),
    ]


def test_one_name_for_two_configurations_stays_apart(tmp_path: Path) -> None:
    first = save(tmp_path / "a", row(0.5, 0.9, config_hash="1111111111"))
    second = save(tmp_path / "b", row(0.5, 0.8, config_hash="2222222222"))
    table = compare([*first, *second], tmp_path / "out").table
    assert list(table["label"]) == ["r 111111", "r 222222"]


def test_static_control_is_the_chord(tmp_path: Path) -> None:
    rows = [
        row(0.5, 0.86, run="a"),
        row(0.65, 0.87, run="b"),
        row(0.75, 0.9, run="c"),
        row(0.8, 0.99, run="d"),
    ]
    rows = [row(r.macs_share, r.top1, run=r.run, config_hash=r.run) for r in rows]
    comparison, lines = table_of(tmp_path, *STATIC, *rows)
    assert [x["method"] for x in lines] == ["static", "static", "dmnn", "dmnn", "dmnn", "dmnn"]
    assert [x["static_top1"] for x in lines[:2]] == ["", ""]
    assert [float(x["static_top1"]) for x in lines[2:5]] == pytest.approx([0.85, 0.88, 0.90])
    assert [float(x["vs_static"]) for x in lines[2:5]] == pytest.approx([1.0, -1.0, 0.0])
    assert lines[5]["static_top1"] == lines[5]["vs_static"] == ""  # no static net costs as much
    shown = [x["vs static"] for x in cells(comparison.table)]
    assert shown == ["", "", "+1.00", "-1.00 not beaten", "+0.00 not beaten", ""]


def test_one_static_net_close_by_is_a_control(tmp_path: Path) -> None:
    near, far = row(0.481, 0.86, run="a", config_hash="a"), row(0.479, 0.86, run="b", config_hash="b")
    _, lines = table_of(tmp_path, row(0.5, 0.85, method="static", run="s"), near, far)
    assert {x["label"]: x["static_top1"] for x in lines if x["method"] == "dmnn"} == {"a": "0.85", "b": ""}


def test_no_static_control_from_another_backbone(tmp_path: Path) -> None:
    _, lines = table_of(tmp_path, *STATIC, row(0.5, 0.9, backbone="vgg16"))
    assert [x["static_top1"] for x in lines] == ["", "", ""]


def test_missed_targets_are_marked(tmp_path: Path) -> None:
    rows = [row(s, 0.9, run=f"r{s}", config_hash=f"r{s}", flops_target=0.5) for s in (0.47, 0.48, 0.52, 0.53)]
    comparison, lines = table_of(tmp_path, *rows)
    assert [x["reached"] for x in lines] == ["False", "True", "True", "False"]
    assert [x["share"] for x in cells(comparison.table)] == [
        "47.0 % missed",
        "48.0 %",
        "52.0 %",
        "53.0 % missed",
    ]
    assert cells(comparison.table)[0][MACS] == "18.80 M"
    assert cells(comparison.table)[0]["target"] == "0.50"


def test_latency_of_two_machines_has_no_mean(tmp_path: Path) -> None:
    clock = {"latency_ms_p50": 4.0, "speedup": 2.0, "config_hash": "x"}
    rows = [row(0.5, 0.9, run=f"d_s{i}", seed=i, machine=m, **clock) for i, m in enumerate("ab")]
    _, (line,) = table_of(tmp_path, *rows)
    assert (line["latency_ms"], line["speedup"], line["machine"]) == ("", "", "a b")


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    good, other = save(tmp_path, row(0.5, 0.9, run="good"), row(0.5, 0.9, run="only_calib", split="calib"))
    text = (good / "eval.csv").read_text()
    for name, content in (
        ("half", text[:-20]),
        ("foreign", "x,y\n1,2\n"),
        ("header", text.splitlines()[0] + "\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.csv").write_text(content)
    older = {k: v for k, v in as_dict(row(0.5, 0.9)).items() if k != "router_share"}
    write_rows(tmp_path / "older" / "eval.csv", [older])
    write_rows(tmp_path / "fresh" / "train.csv", [{"epoch": 1}])
    paths = [good, other, *(tmp_path / n for n in ("half", "foreign", "header", "older", "fresh"))]
    rows, left_out = read(paths)
    assert len(rows) == 1
    reasons = {item.path.name: item.reason for item in left_out}
    assert reasons["only_calib"] == "only calibration rows, none of split test"
    assert "half-written" in reasons["half"]
    assert reasons["foreign"].startswith("lacks the columns run, method")
    assert reasons["header"] == "no rows"
    assert reasons["older"] == "lacks the columns router_share: written by another version or program"
    assert reasons["fresh"] == f"no eval.csv yet: run `dynroute eval {tmp_path / 'fresh'}`"
    page = compare(paths, tmp_path / "out")
    assert page.left_out == left_out
    for file in ("index.html", "table.md"):
        assert "half-written" in (tmp_path / "out" / file).read_text()


def test_nothing_readable_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"nothing to compare: .*empty: no eval.csv yet") as error:
        compare([tmp_path / "empty"], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="give one or more run folders"):
        compare([], tmp_path / "out")


def test_a_wrong_path_names_the_nearest(tmp_path: Path) -> None:
    save(tmp_path, row(0.5, 0.9, run="dmnn-seed0"))
    with pytest.raises(InputError, match=r"no such run or file: .*dmn-seed0; did you mean .*dmnn-seed0\?"):
        compare([tmp_path / "dmn-seed0"], tmp_path / "out")


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="cannot write to"):
        compare(save(tmp_path, row(0.5, 0.9)), tmp_path / "out")


def test_folders_of_tables_of_runs_and_single_files(tmp_path: Path) -> None:
    results = tmp_path / "results"
    rows = [row(0.5, 0.9, run="a"), row(0.6, 0.9, run="b", config_hash="b")]
    write_rows(results / "both.csv", map(as_dict, rows), EVAL_COLUMNS)
    (results / "notes.csv").write_text("x\n1\n")
    save(tmp_path / "runs", *rows)
    for path in (results, results / "both.csv", tmp_path / "runs", tmp_path / "runs" / "a" / "eval.csv"):
        found, left_out = read([path])
        assert {r["run"] for r in found} == ({"a"} if path.name == "eval.csv" else {"a", "b"})
        assert [item.path.name for item in left_out] == (["notes.csv"] if path == results else [])
    assert len(compare([results, tmp_path / "runs"], results).table) == 2  # a row given twice is one row
    assert len(read([results])[1]) == 1  # the tables written there are not read back


def test_a_seed_is_counted_once(tmp_path: Path) -> None:
    paths = save(tmp_path, row(0.5, 0.9, run="a", loss=float("nan")), row(0.5, 0.8, run="again"))
    rows, left_out = read([*paths, paths[1], tmp_path / "a" / ".." / "again"])
    assert [r["run"] for r in rows] == ["again"]
    assert [item.path.name for item in left_out] == ["a"]
    assert left_out[0].reason.startswith("same configuration, seed and target as")
    assert read([paths[0], tmp_path / "again" / ".." / "a"])[1] == []  # nan is no difference


def test_a_run_that_was_stopped_does_not_displace_the_finished_one(tmp_path: Path) -> None:
    full, stopped = save(tmp_path, row(0.5, 0.9, run="full", epochs=4), row(0.5, 0.1, run="stopped", epochs=1))
    for paths in ([full, stopped], [stopped, full]):
        rows, left_out = read(paths)
        assert [r["run"] for r in rows] == ["full"]
        assert [item.path.name for item in left_out] == ["stopped"]


def test_a_failed_comparison_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = save(tmp_path, row(0.5, 0.9, run="a"))
    compare(paths, tmp_path / "old")
    before = tree(tmp_path / "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dynroute.report.write_text", full)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left") as error:
            compare(paths, tmp_path / name)
        assert error.value.filename == str(tmp_path / name)
    assert tree(tmp_path / "old") == before and not (tmp_path / "new").exists()


def test_rows_in_percent_and_negative_ones_are_left_out(tmp_path: Path) -> None:
    paths = save(tmp_path, row(0.5, 0.9), row(0.5, 45.5, run="percent"), row(-0.5, 0.9, run="less"))
    made = compare(paths, tmp_path / "out")
    assert list(made.table["top1"]) == [0.9]
    assert sorted(said.path.name for said in made.left_out) == ["less", "percent"]


def test_a_file_that_a_spreadsheet_has_saved_is_read(tmp_path: Path) -> None:
    (path,) = save(tmp_path, row(0.5, 0.9))
    file = path / "eval.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    rows, left_out = read([path])
    assert (len(rows), left_out) == (1, [])


def test_rows_without_a_number_are_named(tmp_path: Path) -> None:
    paths = save(tmp_path, row(0.5, 0.9), row(0.5, float("nan"), flops_target=0.5))
    rows, (missing,) = read(paths)
    assert len(rows) == 1
    assert missing.reason == "1 of 2 test rows have no top1 or macs_share that can be"


def test_nan_elsewhere_is_an_empty_cell(tmp_path: Path) -> None:
    nan = float("nan")
    bare = row(0.5, 0.9, top5=nan, loss=nan, macs_p5=nan, macs_p95=nan, router_share=nan, epochs=nan, speedup=nan)
    file = save(tmp_path / "runs", bare)[0] / "eval.csv"
    text = file.read_text().replace(",10000,7,270000,", ",,,,")
    file.write_text(text)
    comparison = compare([file], tmp_path / "out")
    line = next(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [line[k] for k in ("top5", "macs_p5", "epochs", "speedup", "n", "params")] == [""] * 6
    shown = to_markdown(comparison.table)
    assert "nan" not in shown
    assert "5-95 %" not in shown
    assert "<NA>" not in (tmp_path / "out" / "index.html").read_text()


def test_two_calls_write_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(0.5, 0.86 + i / 100, run=f"a_s{i}", seed=i) for i in range(2)]
    paths = save(tmp_path, *STATIC, *rows, row(0.4, 0.7, run="v", backbone="vgg16"))
    first = compare(paths, tmp_path / "one").files
    second = compare(paths[::-1], tmp_path / "two").files
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


@pytest.mark.parametrize("name", ["<b>x", "_hidden", "a|b", "$x_{$", "[red]x", "--> <script>"])
def test_strange_names_are_only_text(tmp_path: Path, name: str) -> None:
    rows = [row(0.5, 0.9, run=name, config_hash="1"), row(0.6, 0.9, run="plain", config_hash="2")]
    for i, each in enumerate(rows):
        merge_eval(tmp_path / str(i) / "eval.csv", each)
    table = compare([tmp_path / "0", tmp_path / "1"], tmp_path / "out").table
    html = (tmp_path / "out" / "index.html").read_text()
    assert "<b>x" not in html
    assert html.count("<script") == 1  # our own
    assert ("&lt;b&gt;x" in html) == (name == "<b>x")
    head, _, *lines = to_markdown(table).splitlines()
    assert head == "All rows: dataset cifar10, backbone resnet20, epochs 100, seeds n=1."
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    shown = "".join(str(cell) for cell in to_rich(table).columns[1].cells)
    assert name in shown


def test_strange_names_of_controls_and_data_are_only_text(tmp_path: Path) -> None:
    rows = [row(0.5, 0.9, dataset="a|<b>")]
    rows += [row(0.5, 0.8, dataset="a|<b>", control=name) for name in ("cost", "x|<y>")]
    made = compare(save(tmp_path / "runs", *rows), tmp_path / "out")
    head, _, *lines = to_markdown(made.table).splitlines()
    assert "dataset a\\|&lt;b>" in head
    (line,) = control_cells(made.controls)
    assert line["cost"] == "50.0 %" and line["cost (control)"].startswith("+10.00") and "x|<y>" in line
    text = markdown_table([line])
    assert "<b>" not in "".join([*lines, head, text]) and " x\\|&lt;y> |" in text


@pytest.mark.parametrize("width", [80, 120, 200])
def test_controls_fit_a_terminal_without_a_number_cut_in_two(tmp_path: Path, width: int) -> None:
    names = ("shuffled", "random", "most_common", *(f"a control of number {i}" for i in range(6)))
    rows = [row(0.5, 0.9, run="one", config_hash="1"), row(0.6, 0.9, run="two", config_hash="2")]
    rows += [row(0.5, 0.8 + i / 100, run="one", config_hash="1", control=name) for i, name in enumerate(names)]
    rows.append(row(0.6, 0.85, run="two", config_hash="2", control="shuffled"))
    _, lines = without_common(control_cells(compare(save(tmp_path / "runs", *rows), tmp_path / "out").controls))
    parts = list(fitting(lines, width))
    shown = [
        (r["run"], name, text) for part in parts for r in part for name, text in r.items() if name in names and text
    ]
    assert len(shown) == len(names) + 1 and len(set(shown)) == len(shown)
    assert all(any(r[name] for name in names if name in r) for part in parts for r in part), "no row without a control"
    console = Console(width=width, file=io.StringIO())
    for part in parts:
        console.print(rich_table(part, ""))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    assert all(cell in text for _, _, cell in shown)


def test_the_picture_has_its_numbers_beside_it(tmp_path: Path) -> None:
    table_of(tmp_path, *STATIC, row(0.5, 0.86))
    lines = list(csv.DictReader((tmp_path / "out" / "accuracy_flops.csv").open()))
    assert [(x["series"], float(x["share"]), float(x["top1"])) for x in lines] == [
        ("static", 0.25, 0.80),
        ("static", 0.75, 0.90),
        ("dmnn", 0.5, 0.86),
    ]
    assert [float(lines[2][k]) for k in ("share_p5", "share_p95")] == pytest.approx([0.45, 0.55])


def test_latex_escapes_names(tmp_path: Path) -> None:
    table_of(tmp_path, row(0.5, 0.86, run="a_b&c%", config_hash="1"), row(0.6, 0.9, run="other", config_hash="2"))
    text = (tmp_path / "out" / "table.tex").read_text()
    assert "a\\_b\\&c\\%" in text
    assert text.count("\\midrule") == 1
    assert "46.0" not in text and "50.0 \\%" in text
    assert text.splitlines()[1].startswith("% All rows: dataset ") and text.count("resnet") == 1, "said once"


def test_the_page_stands_alone(tmp_path: Path) -> None:
    table_of(tmp_path, *STATIC, row(0.5, 0.86))
    html = (tmp_path / "out" / "index.html").read_text()
    assert html.count("<svg") == 1
    for tag in ("<img", "@import", "src=", "http-equiv", "url("):
        assert tag not in html.replace("url(#", "")  # clip paths of the picture
    assert html.count("<link") == html.count('<link rel="icon" href="data:,">') == 1
    assert not re.findall(r'href="(?!#|data:,|[\w%.-]+\.csv")', re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL))
    assert MACS in html


def test_twenty_runs_quickly_and_without_torch(tmp_path: Path) -> None:
    methods = ("static", "rnp", "rnr", "dmnn", "aig")
    rows = [
        row(t, 0.8 + t / 10, run=f"{m}-seed{s}", method=m, seed=s, flops_target=t)
        for m in methods
        for s in range(4)
        for t in (0.25, 0.5, 0.75, 1.0)
    ]
    save(tmp_path / "runs", *rows)
    code = (
        "import sys; from pathlib import Path; import dynroute.report as r\n"
        "assert not {'pandas', 'matplotlib', 'rich'} & set(sys.modules), 'slow to start'\n"
        f"n = len(r.compare([Path({str(tmp_path / 'runs')!r})], Path({str(tmp_path / 'out')!r})).table)\n"
        "assert 'torch' not in sys.modules; print(n)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["20"]
    assert time.perf_counter() - start < 15  # about two seconds when the machine is idle


@pytest.mark.slow
def test_two_hundred_runs_of_three_seeds_in_twenty_seconds(tmp_path: Path) -> None:
    """Each with its routes of 1,000 images; processor time, since tests share the machine."""
    draw = random.Random(0)
    for i, seed in itertools.product(range(200), range(3)):
        method = ("static", "rnp", "rnr", "dmnn", "aig")[i % 5]
        rows, images, answers = [], [], []
        for target in (None,) if method == "static" else (0.3, 0.6):
            right = [draw.random() < 0.8 for _ in range(1000)]
            name, share = f"{method}{i}-s{seed}", target or (i + 5) / 210
            top1 = sum(right) / 1000
            rows.append(
                row(share, top1, run=name, method=method, seed=seed, flops_target=target, config_hash=str(i), n=1000)
            )
            setting = {"split": "test", "flops_target": target, "checkpoint": "last"}
            route = {"loss": 0.1, "macs": 1000, "route": "1000/1100/1110/1111/1000/1100/1110/1111/1000"}
            images += [
                {**setting, "index": k, "label": 1, "predicted": int(hit), **route} for k, hit in enumerate(right)
            ]
            told = {"flops_max": "", "control": "", "n": 1000, "images": "all", "right": right_text(right)}
            answers.append({**setting, **told})
        write_rows(tmp_path / "runs" / rows[0].run / "eval.csv", map(as_dict, rows), EVAL_COLUMNS)
        write_rows(tmp_path / "runs" / rows[0].run / "routes.csv", images)
        write_rows(tmp_path / "runs" / rows[0].run / "right.csv", answers)
    start = time.process_time()
    made = compare([tmp_path / "runs"], tmp_path / "out")
    assert time.process_time() - start < 20
    assert len(made.table) == 360 and set(made.table["n_seeds"]) == {3}
    assert set(made.controls["interval"]) == {"paired"}


def test_a_row_with_a_limit_on_every_image_is_told_apart_and_has_no_time_of_the_others(tmp_path: Path) -> None:
    for limit, top1 in ((None, 0.9), (0.6, 0.8)):
        merge_eval(tmp_path / "a" / "eval.csv", row(0.5, top1, run="a", flops_target=0.5, flops_max=limit))
    time = {"mode": "skipping", "flops_target": "0.5", "rate": "", "batch": "1", "threads": "1", "device": "cpu"}
    timed = {**time, "latency_ms_p50": "3.5", "macs_share": "0.5", "machine": "here"}
    write_rows(tmp_path / "a" / "bench.csv", [timed])
    table = compare([tmp_path / "a"], tmp_path / "out").table
    shown = dict(zip(table["label"], table["latency_ms"], strict=True))
    assert set(shown) == {"a", "a max 0.6"}
    assert shown["a"] == 3.5 and shown["a max 0.6"] != 3.5
    limited = {**timed, "latency_ms_p50": "2.5", "flops_max": "0.6"}
    write_rows(tmp_path / "a" / "bench.csv", [timed | {"flops_max": ""}, limited])
    table = compare([tmp_path / "a"], tmp_path / "out").table
    assert dict(zip(table["label"], table["latency_ms"], strict=True)) == {"a": 3.5, "a max 0.6": 2.5}


def test_seeds_of_unlike_numbers_are_pooled(tmp_path: Path) -> None:
    """Runs of one name in two folders; the fewest images, the most parameters, each share against the target."""
    seeds = [(0.47, 10000, 270000), (0.52, 9000, 260000)]
    rows = [row(s, 0.9, seed=i, flops_target=0.5, n=n, params=p) for i, (s, n, p) in enumerate(seeds)]
    paths = [path for i, each in enumerate(rows) for path in save(tmp_path / str(i), each)]
    (line,) = compare(paths, tmp_path / "out").table.to_dict("records")
    assert (line["n_seeds"], line["n"], line["params"], line["reached"]) == (2, 9000, 270000, False)
    assert line["macs_share"] == pytest.approx(0.495)
