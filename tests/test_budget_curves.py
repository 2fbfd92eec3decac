"""experiments/budget_curves.py and `eval --curve`: area and series by hand."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from dynroute.records import EVAL_COLUMNS, EvalRow, read_rows, write_rows
from dynroute.report import curve

SCRIPT = Path(__file__).parent.parent / "experiments" / "budget_curves.py"


@pytest.fixture
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("budget_curves", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(run: str, target: float | None, share: float, top1: float, **other: object) -> dict[str, object]:
    numbers = {"macs_mean": 100 * share, "macs_p5": 90 * share, "macs_p95": 110 * share, "macs_dense": 100.0}
    made = EvalRow(
        run, "dmnn", "resnet8", "cifar10", 0, "test", target, 0.0, share, **numbers, macs_share=share, router_share=0.0,
        top1=top1, top5=1.0, loss=1.0, n=100, routes=2, params=10, epochs=6.0,
    )  # fmt: skip
    return {**asdict(made), **other}


def test_the_area_is_the_mean_top1_over_the_range() -> None:
    rows = [row("a", 0.8, 0.8, 0.9), row("a", 0.2, 0.2, 0.6), row("a", 0.4, 0.4, 0.8)]
    assert curve.area(rows) == pytest.approx((0.2 * 0.7 + 0.4 * 0.85) / 0.6)
    assert curve.area(rows[:1]) is None


def test_the_curve_is_written_in_order_of_cost_and_twice_alike(tmp_path: Path) -> None:
    rows = [row("a", 0.8, 0.8, 0.9), row("a", 0.2, 0.2, 0.6)]
    files = curve.write(rows, tmp_path)
    assert [path.name for path in files] == ["curve.csv", "curve.png", "curve.svg"]
    assert [r["flops_target"] for r in read_rows(files[0])] == ["0.2", "0.8"]
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in curve.write(rows, tmp_path)] == before


def test_the_three_curves_of_a_method(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "budget"
    tables = {
        "static_40": [row("static_40", None, 0.4, 0.6)],
        "dmnn_any": [row("dmnn_any", t, t + 0.001, t) for t in (0.4, 0.5, 0.6)],
        "dmnn_any4": [row("dmnn_any4", 0.6, 0.6, 0.66)],
        "dmnn_60x4": [row("dmnn_60x4", 0.5, 0.5, 0.6), row("dmnn_60x4", 0.6, 0.6, 0.67)],
        "dmnn_40": [row("dmnn_40", 0.4, 0.4, 0.38), row("dmnn_40", 0.6, 0.6, 0.39)],
        "dmnn_60": [
            row("dmnn_60", 0.4, 0.4, 0.2),
            row("dmnn_60", 0.6, 0.6, 0.65),
            row("dmnn_60", 0.6, 0.6, 0.1, control="shuffled"),
            row("dmnn_60", 0.6, 0.5, 0.2, flops_max=0.5),
            row("dmnn_60", 0.6, 0.6, 0.3, checkpoint="best"),
        ],
    }
    for name, rows in tables.items():
        write_rows(folder / f"{name}.csv", rows, EVAL_COLUMNS)
    assert script.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert (
        "dmnn_any at 0.4: any_vs_each +2.00 points\n" in said and "dmnn_any at 0.6: any_vs_each -5.00 points\n" in said
    )
    assert "dmnn_any4 at 0.6: any_vs_each +1.00 points, any_vs_each4 -1.00 points\n" in said
    table = read_rows(tmp_path / "budget_comparison" / "budget.csv")
    count = {s: sum(r["series"] == s for r in table) for s in ("static", "any", "any4", "each", "each4", "dial")}
    assert count == {"static": 1, "any": 3, "any4": 1, "each": 2, "each4": 1, "dial": 2}
    assert script.main([str(tmp_path / "nowhere")]) == 2
