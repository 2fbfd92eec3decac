"""experiments/easy_is_cheap.py: shares, their difference and the ratio of classes by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "experiments" / "easy_is_cheap.py"
HEAD = "flops_target,flops_max,checkpoint,split,index,label,predicted,loss,macs\n"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("easy_is_cheap", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder(path: Path, target: str, rows: list[str]) -> Path:
    path.mkdir()
    (path / "routes.csv").write_text(HEAD + "".join(f"{target},,last,test,{row}\n" for row in rows))
    return path


def test_shares_and_ratio_by_hand(script: ModuleType, tmp_path: Path) -> None:
    dense = folder(tmp_path / "dense", "", ["0,3,3,0.1,100", "1,3,5,2.0,100", "2,8,8,0.2,100", "3,8,8,0.3,100"])
    run = folder(tmp_path / "run", "0.5", ["0,3,3,0.1,60", "1,3,3,0.1,90", "2,8,8,0.1,20", "3,8,8,0.1,30"])
    (row,) = script.rows(run, dense, [3], [8])
    assert row["share_dense_wrong"] == pytest.approx(0.9)
    assert row["share_dense_right"] == pytest.approx((0.6 + 0.2 + 0.3) / 3)
    assert row["hard_classes_over_easy"] == pytest.approx(0.75 / 0.25)
    assert (row["cheapest_class"], row["dearest_class"], row["n_dense_wrong"]) == (8, 3, 1)
    assert "hard_classes_over_easy" not in script.rows(run, dense, [], [])[0]
    with pytest.raises(SystemExit, match="no image of class 7"):
        script.rows(run, dense, [7], [8])
