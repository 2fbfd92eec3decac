"""benchmarks/skipping.py: every line of its table can be made and is computed as it says; the table reaches the document."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dynroute.assembly import untrained
from dynroute.config import load_config
from dynroute.data import known_spec
from dynroute.records import BenchRow, read_rows
from dynroute.report.page import CONTROLS_HEADING

ROOT = Path(__file__).parent.parent
SMALL = ["data.image_size=32", "backbone.width=8", "threads=1"]


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script on small nets and few images, its results elsewhere."""
    module = loaded(ROOT / "benchmarks" / "skipping.py")
    monkeypatch.setattr(module, "untrained", lambda path, words=(): untrained(path, [*words, *SMALL]))
    monkeypatch.setattr(module, "POOL", 8)
    monkeypatch.setattr("dynroute.timing.POOL", 8)
    monkeypatch.setattr(module, "HOME", tmp_path)
    (tmp_path / "results").mkdir()
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, dict[str, str]]:
    monkeypatch.setattr("sys.argv", ["skipping.py", *words])
    module.main()
    return {row["case"]: row for row in read_rows(module.HOME / "results" / "skipping.csv")}


@pytest.mark.parametrize("name", ["dmnn50_b1", "vgg16_b1", "vgg16_32_b1", "multipath50", "dense", "cache"])
def test_a_line_is_measured(name: str, skipping: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(skipping, monkeypatch, name, "--seconds", "0")
    assert float(rows[name]["reached"]) > 0 and float(rows[name]["bar"]) == skipping.BARS[name].bar
    if name != "cache":
        assert float(rows[name]["flops_ratio"]) > 0.5 and rows[name]["clock"] == "thread"
    assert torch.get_num_threads() == 1


def test_lines_are_computed_as_they_say(skipping: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"dense": 10.0, "dense_best": 17.0, "onnxruntime": 20.0, "skipping": 50.0}
    who: dict[str, Any] = {"run": "", "method": "", "backbone": "", "dataset": ""}
    rows = [
        BenchRow(**who, mode=mode, images_per_s=n, speedup=n / 17, macs_share=0.25, ideal_share=0.8)
        for mode, n in speeds.items()
    ]
    asked: list[Any] = []

    def made(config: Any, net: Any, spec: Any, request: Any) -> Any:
        asked.append((config.name, request.batches, request.rate, "onnxruntime" in request.modes))
        return type("Timed", (), {"rows": rows})

    monkeypatch.setattr(skipping, "bench_untrained", made)
    run(skipping, monkeypatch, "dmnn50_b1", "onnxruntime", "dense", "vgg16_32_b32")
    again = run(skipping, monkeypatch, "dmnn50_b1")
    assert {name: row["reached"] for name, row in again.items()} == {
        "dmnn50_b1": "0.8",
        "onnxruntime": "2.5",
        "vgg16_32_b32": "0.8",
        "dense": "1.7",
    }
    assert again["onnxruntime"]["flops_ratio"] == "4"
    assert asked == [
        ("dmnn50_n4_t0.7", [1], 0.5, False),
        ("dmnn50_n4_t0.7", [1], 0.5, True),
        ("vgg16_32", [32], None, False),
    ], "the lines of one run share it"


def test_another_machines_row_of_a_case_stays_beside_a_new_one(skipping: ModuleType, tmp_path: Path) -> None:
    file, order = tmp_path / "rows.csv", ["a", "b"]
    for case, machine, reached in (("b", "one", 1.0), ("b", "two", 2.0), ("a", "two", 3.0), ("b", "one", 4.0)):
        skipping.store(file, {"case": case, "machine": machine, "reached": reached}, order)
    rows = [(row["case"], row["machine"], row["reached"]) for row in read_rows(file)]
    assert rows == [("a", "two", "3"), ("b", "one", "4"), ("b", "two", "2")]


def test_two_cores_are_compared_with_one(skipping: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def rounds(cases: Any, clock: Any, seconds: float) -> Any:
        taken = {"1": 2.0, "2": 1.25}
        for name in cases:
            cases[name].prepare(0)()
            used.append(torch.get_num_threads())
        return {name: type("T", (), {"at": lambda self, q, s=s: s, "seconds_R": [s]})() for name, s in taken.items()}

    monkeypatch.setattr(skipping, "interleaved", rounds)
    assert run(skipping, monkeypatch, "two_cores")["two_cores"]["reached"] == "1.6"
    assert used == [1, 2] and torch.get_num_threads() == 1


def test_every_line_has_its_configuration_and_an_unknown_name_is_said(
    skipping: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (skipping.DMNN, skipping.VGG, skipping.MULTIPATH, skipping.SMALL_VGG, skipping.SMALL_DMNN):
        assert known_spec(load_config(path).data) is not None, "needs no data"
    monkeypatch.setattr("sys.argv", ["skipping.py", "fast"])
    with pytest.raises(SystemExit, match="2"):
        skipping.main()
    assert "no case 'fast' (choices: dmnn50_b1" in capsys.readouterr().err


def test_sub_blocks_of_the_wide_net_have_sixteen_channels(skipping: ModuleType) -> None:
    _, net, _ = untrained(skipping.SMALL_DMNN)
    assert {size for unit in net.backbone.routable for size in unit.sizes} == {16, 32, 64}  # type: ignore[attr-defined]


def test_a_csv_becomes_a_table_that_is_longer_than_wide(tmp_path: Path) -> None:
    table = loaded(ROOT / "experiments" / "readme_table.py")
    (tmp_path / "long.csv").write_text("a_b,c\n1,2\n3,4\n")
    (tmp_path / "wide.csv").write_text("a,b_c\n1,2\n")
    (tmp_path / "doc.md").write_text("x\n<!-- m: begin -->\nold\n<!-- m: end -->\ny\n")
    assert table.from_csv(tmp_path / "wide.csv") == "| a | 1 |\n|---|---|\n| b c | 2 |"
    table.main(tmp_path / "doc.md", tmp_path / "long.csv", "m")
    wanted = "x\n<!-- m: begin -->\n| a b | c |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n<!-- m: end -->\ny\n"
    assert (tmp_path / "doc.md").read_text() == wanted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *(("0.662389105939", "0.6624"), ("10000.0", "10000"), ("-1.01", "-1.01"), ("12", "12"), ("2.15.0", "2.15.0")),
        *(("9999.7", "10000"), ("0.000012344", "0.00001234"), ("0.0", "0"), ("0.40", "0.4")),
    ],
)
def test_numbers_of_a_csv_are_shown_at_four_digits(text: str, shown: str) -> None:
    assert loaded(ROOT / "experiments" / "readme_table.py").short(text) == shown


def test_the_two_tables_of_a_comparison_may_stand_apart(tmp_path: Path) -> None:
    table = loaded(ROOT / "experiments" / "readme_table.py")
    (tmp_path / "table.md").write_text(f"| rows |\n\n- note\n\n{CONTROLS_HEADING}\n\n| controls |\n")
    for part, wanted in (("rows", "| rows |\n\n- note"), ("controls", "| controls |")):
        (tmp_path / "doc.md").write_text("<!-- m: begin -->\n<!-- m: end -->\n")
        table.main(tmp_path / "doc.md", tmp_path / "table.md", "m", part)
        assert (tmp_path / "doc.md").read_text() == f"<!-- m: begin -->\n{wanted}\n<!-- m: end -->\n"


def test_the_document_has_a_place_for_the_table() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count("<!-- skipping: begin -->") == text.count("<!-- skipping: end -->") == 1


def test_trained_runs_are_compared_and_timed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out = loaded(ROOT / "benchmarks" / "trained.py"), tmp_path / "trained.csv"
    for name in ("dmnn", "rnp", "rnp"):
        words = [str(runs[name]), "--flops-target", "0.7", "--seconds", "0", "--out", str(out)]
        monkeypatch.setattr("sys.argv", ["trained.py", *words])
        module.main()
    rows = read_rows(out)
    assert [(row["method"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("dmnn", "rnp") for batch in ("1", "64")
    ], "a run measured again takes the place of its old rows"
    for row in rows:
        assert tuple(row) == module.COLUMNS and all(row.values())
        assert row["other_routes"] == row["other_classes"] == "0" and row["top1_masked"] == row["top1_skipping"]
        assert float(row["flops_ratio"]) > 1 and float(row["over_best"]) > 0
    monkeypatch.setattr(module, "FastNet", lambda net, threads: Wrong(net) if threads == 2 else net)
    assert module.agreement(module.Evaluator.of(runs["dmnn"]))["other_classes"] == int(rows[0]["images"])


class Wrong:
    """A fast run that is not right."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, x_BCHW: torch.Tensor) -> Any:
        out = self.net(x_BCHW)
        return out._replace(logits_BK=-out.logits_BK)


def test_times_asked_for_are_compared_with_those_reached(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, out = loaded(ROOT / "benchmarks" / "latency_target.py"), tmp_path / "latency.csv"
    who: dict[str, Any] = {"run": "", "method": "", "backbone": "", "dataset": ""}
    table = [BenchRow(**who, mode="dense_best", images_per_s=100.0)]
    table += [
        BenchRow(**who, mode="skipping", flops_target=t, images_per_s=s) for t, s in ((0.4, 500), (None, 1), (0.8, 250))
    ]
    asked: list[float] = []
    taken = iter([(6.3, "thread"), (6.4, "thread"), (5.0, "thread"), (6.0, "thread")])
    monkeypatch.setattr(module, "FILE", out)
    monkeypatch.setattr(module, "bench_path", lambda folder, request: type("Timed", (), {"rows": table}))
    monkeypatch.setattr(module, "dense_speed", lambda *_: 50.0)  # half as fast as in the table
    monkeypatch.setattr(module.Evaluator, "share_at", lambda self, ms: (asked.append(ms), 0.6)[1])
    monkeypatch.setattr(module, "timed", lambda *_: next(taken))
    monkeypatch.setattr("sys.argv", ["latency_target.py", str(runs["dmnn"]), "--times", "2"])
    module.main()
    assert asked == [5.0, 7.0]
    rows = read_rows(out)
    assert [float(row["error"]) for row in rows] == pytest.approx([0.26, 5 / 7 - 1])
    assert [float(row["again_error"]) for row in rows] == pytest.approx([6.4 / 6.3 - 1, 0.2])
    printed = capsys.readouterr().out
    assert "error: 0 of 2 within 10 %" in printed and "again_error: 1 of 2 within 10 %" in printed
