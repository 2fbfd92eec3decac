"""Controls made from a run's own routes: their routes, their rows, and where they stand in a comparison."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynroute.cli import main
from dynroute.contracts import Batch
from dynroute.controls import CONTROLS, most_common, random, shuffled
from dynroute.evaluation import Evaluator
from dynroute.measure import evaluate
from dynroute.records import EVAL_COLUMNS, EvalRow, as_dict, merge_eval, read_eval, read_rows, write_rows
from dynroute.report import compare, read
from dynroute.report.cells import cells
from dynroute.report.paired import answers
from dynroute.skipping import FastNet
from test_report import row, save
from tiny import make_net, pictures

Capture = pytest.CaptureFixture[str]


def routes(images: int, units: int = 3, parts: int = 2, seed: int = 0) -> Tensor:
    """Routes in which one is much more common than the others."""
    draws = torch.rand(images, units, parts, generator=torch.Generator().manual_seed(seed))
    return (draws < torch.linspace(0.2, 0.9, units)[:, None]).to(torch.uint8)


# --- the routes -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 50), st.integers(0, 5))
def test_shuffled_gives_every_route_to_another_image(images: int, seed: int) -> None:
    numbered = torch.arange(images).view(-1, 1, 1).expand(-1, 3, 2)
    given_to = shuffled(numbered, seed)[:, 0, 0]
    assert given_to.sort().values.tolist() == list(range(images))
    assert not bool((given_to == torch.arange(images)).any())
    assert torch.equal(shuffled(numbered, seed)[:, 0, 0], given_to)


def test_shuffled_differs_between_seeds() -> None:
    numbered = torch.arange(50).view(-1, 1, 1)
    assert not torch.equal(shuffled(numbered, 0), shuffled(numbered, 1))


def test_most_common_and_its_tie() -> None:
    a, b, c = ([[0, 1], [1, 1]], [[1, 0], [0, 0]], [[1, 1], [1, 1]])
    assert most_common(torch.tensor([c, b, b, a]), 0).tolist() == [b] * 4
    assert most_common(torch.tensor([c, b, a, c, b, a]), 0).tolist() == [a] * 6


def test_random_draws_each_unit_at_its_own_rate_and_apart_from_the_others() -> None:
    one, two = torch.tensor([[0, 0], [0, 0]]), torch.tensor([[1, 1], [1, 1]])
    keep = torch.stack([one] * 3000 + [two] * 1000)
    drawn = random(keep, 7)
    assert drawn.float().mean(0).flatten().tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert torch.equal(drawn[:, :, 0], drawn[:, :, 1]), "a keep that no image had"
    both = (drawn[:, 0, 0] * drawn[:, 1, 0]).float().mean()
    assert float(both) == pytest.approx(0.25**2, abs=0.02)


def test_random_depends_on_image_and_seed_alone() -> None:
    keep = routes(400)
    order = torch.randperm(400)
    assert torch.equal(random(keep, 3), random(keep[order], 3)), "the draw follows the place, not the image's own route"
    twice = torch.cat([keep, keep])
    assert torch.equal(random(twice, 3)[:400], random(keep, 3))
    assert not torch.equal(random(keep, 3), random(keep, 4))


@pytest.mark.parametrize("fast", [True, False])
def test_given_routes_go_to_the_image_of_their_index(fast: bool) -> None:
    net = make_net("dmnn", "paths")
    x, given_NUG = pictures(6), net(pictures(6)).trace.keep_BUG.flip(0)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    batches = [Batch(x[rows], rows % 10, None, rows) for rows in order.split(4)]
    scores = evaluate(net, batches, FastNet(net) if fast else None, given_NUG.to(torch.uint8))
    assert torch.equal(scores.keep_NUG.float(), given_NUG[order])
    assert torch.allclose(scores.macs_N, net.cost(given_NUG)[order])


# --- the rows of a run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluator]:
    """A run whose routes differ between images."""
    folder = shutil.copytree(runs["dmnn"], tmp_path_factory.mktemp("controls") / "run")
    return folder, Evaluator.of(folder)


def test_the_control_rows_of_a_run(routed: tuple[Path, Evaluator]) -> None:
    folder, evaluator = routed
    net = evaluator.net
    found = evaluator.measure(None)
    own = found.row
    rows = {r.row.control: r.row for r in evaluator.controls(found)}
    again = {r.row.control: r.row for r in evaluator.controls(found)}
    assert list(rows) == list(CONTROLS) and rows == again
    assert own.routes > 1 and own.control == ""
    assert rows["shuffled"].macs_mean == pytest.approx(own.macs_mean)
    assert rows["shuffled"].routes == own.routes
    assert (rows["shuffled"].top1, rows["shuffled"].loss) != (own.top1, own.loss)
    assert rows["random"].macs_mean == pytest.approx(own.macs_mean, rel=0.1)
    assert rows["shuffled"].router_share == rows["random"].router_share == own.router_share > 0
    one = rows["most_common"]
    route = most_common(found.scores.keep_NUG, 0)[:1]
    assert (one.routes, one.router_share) == (1, 0)
    assert one.macs_mean == pytest.approx(float(net.cost(route)) - net.cost.router)
    assert one.params == sum(p.numel() for p in net.backbone.parameters()) < own.params
    stored = {r["control"]: r["top1"] for r in read_eval(folder / "eval.csv") if r["flops_target"] is None}
    assert stored == pytest.approx({"": own.top1, **{name: r.top1 for name, r in rows.items()}})


def test_eval_controls_on_the_command_line(routed: tuple[Path, Evaluator], capsys: Capture) -> None:
    folder = routed[0]
    words = ["eval", str(folder), "--controls", "--flops-target", "0.9", "--flops-target", "0.6"]
    status = main([*words, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert status in (0, 3)
    assert [(r["flops_target"], r["control"]) for r in rows] == [(t, c) for t in (0.9, 0.6) for c in ("", *CONTROLS)]
    capsys.readouterr()
    main(words)
    out = capsys.readouterr().out
    assert all(out.count(f" {name} ") == 2 for name in CONTROLS)
    # which images each row has right, evaluated twice, stands once, and tells the same accuracy
    found = answers(folder / "right.csv")
    keys = [("test", f"{r['flops_target']:g}", "", "last", r["control"]) for r in rows]
    assert len(read_rows(folder / "right.csv")) == len(found) and len({found[key].images for key in keys}) == 1
    assert [found[key].right_N.mean() for key in keys] == pytest.approx([r["top1"] for r in rows], abs=1e-12)
    own = [r for r in read_rows(folder / "routes.csv") if r["flops_target"] == "0.6"]
    bits = [int(r["label"] == r["predicted"]) for r in sorted(own, key=lambda r: int(r["index"]))]
    assert found["test", "0.6", "", "last", ""].right_N.tolist() == bits


def test_a_static_run_has_nothing_to_shuffle(runs: dict[str, Path], capsys: Capture) -> None:
    assert main(["eval", str(runs["static"]), "--controls", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [r["control"] for r in json.loads(out)["rows"]] == [""]
    assert err == "no controls: every image takes the same route, there is nothing to shuffle\n"


# --- files ------------------------------------------------------------------------------------------------------


def test_older_files_have_no_controls(tmp_path: Path) -> None:
    file = tmp_path / "eval.csv"
    write_rows(file, [{k: v for k, v in as_dict(row(0.5, 0.9)).items() if k != "control"}])
    assert [r["control"] for r in read_eval(file)] == [""]
    merge_eval(file, row(0.5, 0.8, control="shuffled"))
    merge_eval(file, row(0.5, 0.8, control="shuffled"))
    assert [(r["control"], r["top1"]) for r in read_eval(file)] == [("", 0.9), ("shuffled", 0.8)]


def test_controls_of_a_net_that_changed_go_with_its_row(tmp_path: Path) -> None:
    file = tmp_path / "eval.csv"
    own, other = row(0.5, 0.9), row(0.4, 0.9, flops_target=0.4)
    for each in (own, other):
        merge_eval(file, each)
        merge_eval(file, replace(each, control="shuffled"))
    merge_eval(file, replace(own, latency_ms_p50=3.0))
    assert len(read_eval(file)) == 4
    merge_eval(file, replace(own, top1=0.91))
    assert [(r["flops_target"], r["control"]) for r in read_eval(file)] == [(0.4, ""), (0.4, "shuffled"), (None, "")]


# --- compare ----------------------------------------------------------------------------------------------------


def with_controls(own: EvalRow) -> list[EvalRow]:
    """A row and its controls; most_common is cheaper and better than anything, to be missed by no mistake."""
    cheap: dict[str, Any] = {"macs_share": 0.3, "macs_mean": 12e6, "top1": 0.99}
    controls = [replace(own, control=n, top1=own.top1 - 0.02) for n in ("shuffled", "random")]
    return [own, *controls, replace(own, control="most_common", **cheap)]


def test_controls_stand_under_their_row_and_nowhere_else(tmp_path: Path) -> None:
    statics = [row(s, t, run=f"s{s}", method="static", config_hash=f"s{s}") for s, t in ((0.25, 0.8), (0.75, 0.9))]
    seeds = [row(0.6, 0.9, run=f"d_s{i}", seed=i, flops_target=0.6) for i in (0, 1)]
    nets = [*seeds, row(0.4, 0.85, run="d_s0", flops_target=0.4)]
    paths = save(tmp_path / "runs", *statics, *(r for net in nets for r in with_controls(net)))
    comparison = compare(paths, tmp_path / "out", ["dmnn:tab1"])
    table = comparison.table
    names = ["", "most_common", "random", "shuffled"]
    assert list(table["control"]) == ["", "", *names, *names]
    assert [t for t in table["flops_target"] if t == t] == [0.4] * 4 + [0.6] * 4
    assert list(table["n_seeds"]) == [1] * 6 + [2] * 4
    assert list(table["reached"]) == [None, None, True, None, None, None, True, None, None, None]
    versus = table["vs_static"]
    assert versus[2] == pytest.approx(2.0) and versus[6] == pytest.approx(3.0)
    assert len(cells(table)) == 4
    lines = comparison.controls
    assert list(lines["control"]) == ["static, narrower", *names[1:]] * 2
    assert lines["difference"][2].tolist() == pytest.approx([2.0, -14.0, 2.0, 2.0])
    assert lines["relation"][2].tolist() == ["equal", "cheaper", "equal", "equal"]
    drawn = list(csv.DictReader((tmp_path / "out" / "accuracy_flops.csv").open()))
    assert [(x["series"], float(x["share"])) for x in drawn] == [
        ("static", 0.25), ("static", 0.75), ("dmnn", 0.4), ("dmnn", 0.6),
    ]  # fmt: skip
    assert "handed to other images" in (tmp_path / "out" / "table.md").read_text()
    assert "handed to other images" in (tmp_path / "out" / "index.html").read_text()


def test_a_control_does_not_stand_for_a_papers_row(tmp_path: Path) -> None:
    own = row(0.5, 0.9, backbone="resnet50", dataset="imagenet", flops_target=0.5)
    (paper,) = compare(save(tmp_path / "r", *with_controls(own)), tmp_path / "out", ["dmnn:tab3"]).papers
    found = [r["reproduced_top1_error_pct"] for r in paper.rows if r["run"]]
    assert all(error == pytest.approx(10.0) for error in found)


def test_controls_without_their_net_are_named(tmp_path: Path) -> None:
    own = row(0.5, 0.9)
    write_rows(
        tmp_path / "a.csv", map(as_dict, [own, replace(own, control="shuffled", flops_target=0.3)]), EVAL_COLUMNS
    )
    rows, (missing,) = read([tmp_path / "a.csv"])
    assert len(rows) == 1
    assert missing.reason == "1 controls without the row they were made from"


def test_a_control_of_nearly_the_cost_stands_under_its_row_as_of_equal_cost(tmp_path: Path) -> None:
    nets = [row(share, 0.9, run="d", flops_target=share) for share in (0.5, 0.51)]
    drawn = [replace(own, control="random", macs_share=s, top1=0.8) for own, s in zip(nets, (0.515, 0.5), strict=True)]
    made = compare(save(tmp_path / "runs", *nets, *drawn), tmp_path / "out")
    assert list(zip(made.table["flops_target"], made.table["control"], strict=True)) == [
        (0.5, ""), (0.5, "random"), (0.51, ""), (0.51, "random"),
    ]  # fmt: skip
    assert list(made.controls["relation"]) == ["equal", "equal"]
