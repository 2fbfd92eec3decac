"""The papers' reported rows, alone and beside rows made by hand."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynroute import report
from dynroute.contracts import InputError
from dynroute.records import merge_eval
from dynroute.report import Comparison, compare, papers
from test_report import row

CIFAR = {"dataset": "cifar100", "backbone": "resnet50_cifar"}


def compared(tmp_path: Path, *names: str, **runs: dict[str, Any]) -> Comparison:
    """The comparison of runs, each given by what it changes of a row, with papers."""
    for name, changes in runs.items():
        merge_eval(tmp_path / name / "eval.csv", row(**{"run": name, "config_hash": name, **changes}))
    return compare([tmp_path / name for name in runs], tmp_path / "out", names)


def reproduced(comparison: Comparison, method: str) -> list[float | None]:
    (paper,) = comparison.papers
    return [r["reproduced_top1_error_pct"] for r in paper.rows if r["method"] == method]


def test_every_row_of_the_file_is_there(tmp_path: Path) -> None:
    with papers.REPORTED.open(newline="") as file:
        counts = Counter(f"{r['paper']}:{r['table']}" for r in csv.DictReader(file))
    tables = report.paper_tables()
    assert list(tables) == sorted(counts)
    comparison = compared(tmp_path, "all")
    assert {p.name: len(p.rows) for p in comparison.papers} == counts
    assert all(tables[name].startswith(f"{count} rows, ") for name, count in counts.items())
    assert tables["dmnn:tab1"] == "22 rows, imagenet; reported by DMNN (Su et al., 2019), Table 1, ResNets"
    assert {r["certainty"] for p in comparison.papers for r in p.rows} == {
        "seen",
        "second-hand",
        "reconstructed",
        "digitised",
    }


def test_papers_need_no_runs(tmp_path: Path) -> None:
    comparison = compared(tmp_path, "dmnn:tab3", "dmnn:tab3")
    assert [p.name for p in comparison.files] == ["papers.csv", "papers.md", "index.html"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.html", "papers.csv", "papers.md"]
    assert len(comparison.table) == 0
    assert [p.name for p in comparison.papers] == ["dmnn:tab3"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "26.15" in page
    assert "<svg" not in page
    assert "| second-hand" in (tmp_path / "out" / "papers.md").read_text()


def test_a_match_is_filled(tmp_path: Path) -> None:
    runs = {
        "dmnn": {"share": 0.69, "top1": 0.7485, "flops_target": 0.7, **CIFAR},
        "st": {"share": 1.0, "top1": 0.72, "method": "static", **CIFAR},
        "narrow": {"share": 0.7, "top1": 0.70, "method": "static", **CIFAR},
    }
    comparison = compared(tmp_path, "dmnn:tab3", **runs)
    (paper,) = comparison.papers
    full, *_, last = paper.rows
    assert last["target"] == 0.7
    assert last["reported_top1_error_pct"] == 26.15
    assert last["reported_share_pct"] == pytest.approx(78.7)
    assert last["reproduced_top1_error_pct"] == pytest.approx(25.15)
    assert last["reproduced_share_pct"] == pytest.approx(69.0)
    assert last["difference_points"] == pytest.approx(-1.0)
    assert (last["run"], last["n_seeds"], last["reproduced_top1_error_std"]) == ("dmnn", 1, None)
    assert full["difference_points"] == pytest.approx(28.0 - 27.55)
    assert papers.cells(paper)[-1]["difference, points"] == "-1.00"
    assert "-1" in json.dumps(paper.rows)  # plain numbers throughout
    assert "-1.00" in (tmp_path / "out" / "index.html").read_text()
    with (tmp_path / "out" / "papers.csv").open(newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["difference_points"]) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"flops_target": 0.69},
        {"flops_target": None},
        {"dataset": "cifar10"},
        {"backbone": "resnet101"},
        {"method": "rnp"},
    ],
    ids=str,
)
def test_no_match_stays_empty(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = {"share": 0.7, "top1": 0.7485, "flops_target": 0.7, **CIFAR, **changes}
    comparison = compared(tmp_path, "dmnn:tab3", run=run)
    assert reproduced(comparison, "dmnn") == [None, None, None]
    assert reproduced(comparison, "resnet") == [None]
    assert papers.cells(comparison.papers[0])[-1]["reproduced top-1 error %"] == ""


def test_controls_of_others_are_never_filled(tmp_path: Path) -> None:
    run = {"share": 1.0, "top1": 0.9, "method": "static", "dataset": "imagenet", "backbone": "resnext50"}
    comparison = compared(tmp_path, "dmnn:tab1", run=run)
    assert not [r for r in comparison.papers[0].rows if r["run"]]


def test_a_figure_matches_by_the_nearest_share(tmp_path: Path) -> None:
    place = {"dataset": "cifar10", "backbone": "conv4"}
    runs = {
        "far": {"share": 0.19, "top1": 0.95, "method": "rnp", **place},  # the better, but 0.019 from 0.171
        "near": {"share": 0.18, "top1": 0.83, "method": "rnp", **place},
        "st": {"share": 0.6, "top1": 0.80, "method": "static", **place},
    }
    comparison = compared(tmp_path, "rnp:fig-cifar10", **runs)
    assert reproduced(comparison, "rnp") == [pytest.approx(17.0), None, None, None, None, None]
    assert reproduced(comparison, "vanilla") == [None, None, None, pytest.approx(20.0), None]


def test_top5_is_not_set_against_top1(tmp_path: Path) -> None:
    run = {"share": 0.34, "top1": 0.7, "method": "rnp", "dataset": "imagenet", "backbone": "vgg16"}
    (paper,) = compared(tmp_path, "rnp:tab2", run=run).papers
    filled = next(r for r in paper.rows if r["run"])
    assert filled["reported_top5_error_increase_points"] == 2.32  # 3x: a share of 1/3
    assert filled["reproduced_top1_error_pct"] == pytest.approx(30.0)
    assert filled["difference_points"] is None


def test_seeds_state_their_spread(tmp_path: Path) -> None:
    same = {"share": 0.7, "flops_target": 0.7, "config_hash": "x", **CIFAR}
    runs = {"d-s0": {"top1": 0.73, "seed": 0, **same}, "d-s1": {"top1": 0.75, "seed": 1, **same}}
    last = compared(tmp_path, "dmnn:tab3", **runs).papers[0].rows[-1]
    assert last["n_seeds"] == 2
    assert last["reproduced_top1_error_pct"] == pytest.approx(26.0)
    assert last["reproduced_top1_error_std"] == pytest.approx(2**0.5)


def test_an_unknown_name_has_a_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown table of a paper 'dmnn:tab33'; did you mean 'dmnn:tab3'\?"):
        compared(tmp_path, "dmnn:tab33")
    assert not (tmp_path / "out").exists()


def test_the_command_works_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dynroute import report; report.paper_tables(); assert 'pandas' not in sys.modules\n"
        "from dynroute.cli import main; bad = main(['compare'])\n"
        f"papers = ['--paper', 'rnp:tab2', '--paper', 'dmnn:tab4', '--out', {str(tmp_path)!r}]\n"
        "good = main(['compare', *papers, '--json'])\n"
        "assert 'torch' not in sys.modules; sys.exit(10 * bad + good)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        20,
        "dynroute: nothing to compare: name runs, or --paper TABLE\n",
    )
    answer = json.loads(done.stdout)
    assert [(p["name"], len(p["rows"])) for p in answer["papers"]] == [("rnp:tab2", 11), ("dmnn:tab4", 5)]
    assert answer["rows"] == []


def test_a_missing_row_says_what_makes_it(tmp_path: Path) -> None:
    """Every command of every row is one that `train` takes, names a file that exists, and trains as long as is counted."""
    from dynroute.config import load_config

    rows = [r for p in compared(tmp_path, "all").papers for r in p.rows]
    root = Path(__file__).parents[1]
    for r in rows:
        assert bool(r["to_make_command"]) == bool(r["to_make_data"]) == (r["to_make_hours"] is not None)
        assert bool(r["to_make_command"]) != bool(r["to_make_lacks"])
        epochs, made = 0, set()
        for step in filter(None, r["to_make_command"].split(" && ")):
            program, verb, *words = step.split()
            if program == "python":
                assert (root / verb).exists() and words[0] in made
                epochs += int(words[words.index("--epochs") + 1])
                continue
            assert (program, verb) in (("dynroute", "train"), ("dynroute", "eval"))
            if verb == "eval":
                assert words[0] in made
                continue
            file = root / words[words.index("-c") + 1] if "-c" in words else None
            config = load_config(file, [w for w in words if "=" in w])
            assert config.backbone.name == papers.recipes.backbone(r)
            assert config.data.name == r["dataset"]
            made.add(words[words.index("--out") + 1] if "--out" in words else f"runs/{config.name}")
            passes = len(config.router.widths) if config.router_name == "slimmable" else 1  # of each minibatch
            epochs += passes * trained_epochs(config.router)
            if r["target"] is not None:
                assert (config.router.target, config.backbone.parts) == (r["target"], r["sub_blocks"] or 1)
        macs = papers.recipes.DENSE_MACS[f"{r['backbone']}/{r['dataset']}"]
        assert r["to_make_hours"] in (None, papers.recipes.hours(r["dataset"], macs, epochs)), r
    lacking = {r["method"] for r in rows if r["to_make_lacks"]}
    assert lacking == {"jaderberg", "asymmetric"}


def trained_epochs(router: Any) -> int:
    """All epochs of a router's options."""
    once = {name: value for name, value in vars(router).items() if name.endswith("epochs")}
    rounds = once.pop("agent_epochs", 0) + once.pop("cnn_epochs", 0)
    return int(sum(once.values()) + getattr(router, "rounds", 0) * rounds)


def test_a_run_trained_for_the_papers_target_stands_at_its_trained_point(tmp_path: Path) -> None:
    place = {"dataset": "imagenet", "backbone": "resnet50"}
    for name, target in (("asked", 0.7), ("trained", None)):
        merge_eval(
            tmp_path / name / "eval.csv", row(0.78, 0.77, run=name, config_hash=name, flops_target=target, **place)
        )
        (tmp_path / name / "config.yaml").write_text("backbone: {parts: 2}\nrouter: {name: dmnn, target: 0.7}\n")
    for left, wanted in ((["asked", "trained"], "trained"), (["asked"], "dmnn")):
        (paper,) = compare([tmp_path / n for n in left], tmp_path / "out", ["dmnn:tab1"]).papers
        (found,) = [r for r in paper.rows if r["run"]]
        assert (found["run"], found["target"], found["sub_blocks"]) == (wanted, 0.7, 2)


def test_controls_of_the_papers_stand_for_their_rows(tmp_path: Path) -> None:
    """ResNeXt is a static net of another backbone; ConvNet-AIG is told by its resource loss; pruned nets by their method."""
    place = {"dataset": "imagenet", "flops_target": None}
    runs = {
        "x": row(1.0, 0.77, method="static", backbone="resnext50_2x40d", **place),
        "aig": row(0.77, 0.76, backbone="resnet50", **place),
        "taylor": row(0.7, 0.75, method="prune_taylor", backbone="resnet50", **place),
    }
    for name, each in runs.items():
        merge_eval(tmp_path / name / "eval.csv", replace(each, run=name, config_hash=name))
    told = "backbone: {parts: 1}\nrouter: {name: dmnn, target: 0.7, resource: aig, category: false, previous: false}\n"
    (tmp_path / "aig" / "config.yaml").write_text(told)
    first, ablation = compare([tmp_path / n for n in runs], tmp_path / "out", ["dmnn:tab1", "dmnn:tab4"]).papers
    assert {r["method"]: r["reproduced_top1_error_pct"] for r in first.rows if r["run"]} == pytest.approx(
        {"resnext-2x40d": 23, "convnet-aig": 24, "taylor-pruning": 25}
    )
    assert not [r for r in ablation.rows if r["run"]]


def test_the_number_of_sub_blocks_and_the_ablation_tell_runs_apart(tmp_path: Path) -> None:
    place = {"share": 0.8, "top1": 0.77, "flops_target": 0.7, "dataset": "imagenet", "backbone": "resnet50"}
    for parts, off in ((3, ""), (2, ", category: false")):
        folder = tmp_path / f"n{parts}"
        merge_eval(folder / "eval.csv", row(**{"run": folder.name, "config_hash": folder.name, **place}))
        (folder / "config.yaml").write_text(f"backbone: {{parts: {parts}}}\nrouter: {{name: dmnn{off}}}\n")
    first, ablation = compare([tmp_path / "n2", tmp_path / "n3"], tmp_path / "out", ["dmnn:tab1", "dmnn:tab4"]).papers
    filled = [(r["method"], r["sub_blocks"]) for r in first.rows if r["run"]]
    assert filled == [("dmnn", 3)]
    assert [r["method"] for r in ablation.rows if r["run"]] == ["dmnn-prev"]


def test_hours_follow_the_work() -> None:
    assert papers.recipes.hours("imagenet", 3.96e9, 120) == pytest.approx(120 * 1_281_167 * 6 * 3.96e9 / 3e13 / 3600)
    assert papers.recipes.hours("cifar10", 1e6, 10) == pytest.approx(500_000 / 5000 / 3600)


@pytest.mark.parametrize("ours", [{"resource": "flops"}, {"budget": [0.35, 0.9]}])
def test_what_is_ours_is_not_the_papers(tmp_path: Path, ours: dict[str, Any]) -> None:
    """Trained by another loss, or for all budgets, a net stands for no row of the paper, however near its cost."""
    told = {"target": 0.7, "category": True, "previous": True}
    for name, share, router in (("paper", 0.73, {"resource": "dmnn"}), ("ours", 0.70, ours)):
        merge_eval(tmp_path / name / "eval.csv", row(share, 0.7, run=name, config_hash=name, flops_target=0.7, **CIFAR))
        values = {"backbone": {"parts": None}, "router": {**told, **router}}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(values))
    made = compare([tmp_path / "paper", tmp_path / "ours"], tmp_path / "out", ["dmnn:tab3"])
    (paper,) = made.papers
    assert {r["run"] for r in paper.rows} == {"", "paper"}


def test_a_net_of_one_charge_stands_before_one_of_all_budgets(tmp_path: Path) -> None:
    """RNP's papers train a net for each cost; our recipe's one net stands for a row only where there is no other."""
    place = {"dataset": "cifar10", "backbone": "conv4", "method": "rnp"}
    for name, share in (("one", 0.183), ("any", 0.171)):
        merge_eval(tmp_path / name / "eval.csv", row(share, 0.7, run=name, config_hash=name, **place))
        budget = [0.2, 0.9] if name == "any" else None
        values = {"backbone": {"parts": None}, "router": {"charge": [0.1], "budget": budget}}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(values))
    for given, wanted in ((["one", "any"], "one"), (["any"], "rnp")):
        (paper,) = compare([tmp_path / name for name in given], tmp_path / "out", ["rnp:fig-cifar10"]).papers
        assert wanted in {r["run"] for r in paper.rows if r["method"] == "rnp"}
        assert len({r["run"] for r in paper.rows} - {""}) == 1
