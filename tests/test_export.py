"""`export`: graphs that take the routes and give the logits of the net, as ONNX files that say what they are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from conftest import TINY, tree
from dynroute import deployment
from dynroute.assembly import fingerprint, restore
from dynroute.bench import Overruled, numbered
from dynroute.cli import main
from dynroute.config import load_config
from dynroute.contracts import Setting
from dynroute.data import load
from dynroute.export import INPUT, OUTPUTS, SkippingGraph, StaticGraph, Unavailable, graphs, onnx_bytes, session
from dynroute.net import RoutedNet
from dynroute.records import read_rows, write_rows
from dynroute.testing import close, random_routes
from tiny import PAIRS, make_net, pictures

SETTINGS = {"trained": Setting(), "priced": Setting(0.3), "mixed": Setting(0.0, 0.5, 0.5)}


def agrees(net: RoutedNet, images: int = 12) -> int:
    """Compare the graph with the masked net, image by image; how many routes there were."""
    graph, x = SkippingGraph(net, nn.Identity()).eval(), pictures(images)
    with torch.no_grad():
        wanted = net(x)
        for i in range(images):
            logits, keep, macs = graph(x[i : i + 1])
            assert close(logits, wanted.logits_BK[i : i + 1])
            assert torch.equal(keep, wanted.trace.keep_BUG[i : i + 1])
            assert torch.equal(macs, wanted.macs_B[i : i + 1])
    return len(torch.unique(wanted.trace.keep_BUG, dim=0))


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_the_graph_is_the_net(name: str, unit: str, setting: Setting) -> None:
    net = make_net(name, unit)
    net.router.setting = setting
    routes = agrees(net)
    assert routes > 1 or name in ("static", "slimmable") or setting.price


@pytest.mark.parametrize("name", ["conv4", "conv4_bn", "resnet8", "mobilenet_v2", "resnet18"])
def test_the_graph_of_other_backbones_and_of_a_limit(name: str) -> None:
    net = make_net("rnp", "channels", name=name, width=0 if name == "mobilenet_v2" else 8)
    assert agrees(net) > 1 or name == "mobilenet_v2"
    net.set_limit(sum(net.span()) / 2)
    agrees(net)


@pytest.mark.parametrize("name", ["conv4", "resnet8"])
def test_a_router_that_treats_all_images_alike_has_the_branches_that_it_takes(name: str) -> None:
    net = make_net("static", "channels", name=name, parts=8)
    net.router.price = 0.5
    graph = SkippingGraph(net, nn.Identity())
    assert [len(unit.bodies) for unit in graph.units] == [1] * len(graph.units)  # type: ignore[arg-type, union-attr]
    agrees(net, 3)
    net.router.setting = Setting(0.0, 0.5, 0.5)
    net.set_limit(0.6)
    graph = SkippingGraph(net, nn.Identity())
    assert all(len(unit.bodies) == 2 for unit in graph.units)  # type: ignore[arg-type, union-attr]
    assert agrees(net) == 2


def test_more_branches_than_a_file_should_have(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net("rnp", "channels", name="conv4", parts=4)  # 4 branches, 16 and 16
    monkeypatch.setattr(graphs, "MOST", 36)
    SkippingGraph(net, nn.Identity())
    monkeypatch.setattr(graphs, "MOST", 35)
    with pytest.raises(Unavailable, match="would have 36 branches, 35 at most"):
        SkippingGraph(net, nn.Identity())


@pytest.mark.parametrize(("unit", "images"), [("channels", 3), ("paths", 1), ("choice", 5), ("cascade", 2)])
def test_a_static_graph_is_the_net_on_one_route(unit: str, images: int) -> None:
    net = make_net("cascade" if unit == "cascade" else "static", unit)
    keep_BUG, x = random_routes(net.backbone.specs, 1), pictures(images)
    with torch.no_grad():
        wanted = net(x, keep_BUG.expand(images, -1, -1)).logits_BK
        assert close(StaticGraph(net, nn.Identity(), keep_BUG[0]).eval()(x), wanted)


@pytest.mark.parametrize(
    ("name", "unit", "backbone"),
    [
        ("dmnn", "paths", "resnet8"),
        ("rnp", "channels", "conv4_bn"),
        ("rnr", "choice", "resnet8"),
        ("cascade", "cascade", "resnet8"),
    ],
)
def test_the_file_runs_elsewhere(name: str, unit: str, backbone: str) -> None:
    net, x = make_net(name, unit, name=backbone, parts=2), pictures(10)
    net.router.setting = Setting(0.0, -0.02 if unit == "choice" else 0.1, 0.5)
    if unit != "cascade":
        net.set_limit(0.3 * net.span()[0] + 0.7 * net.span()[1])
    file = onnx_bytes(SkippingGraph(net, nn.Identity()), x[:1], OUTPUTS, says={"run": "tiny"})
    runtime = session(file)
    with torch.no_grad():
        wanted = net(x)
    assert len(wanted.trace.keep_BUG.unique(dim=0)) > 1
    for i in range(len(x)):
        logits, keep, macs = runtime.run(None, {INPUT: x[i : i + 1].numpy()})
        assert close(torch.from_numpy(logits), wanted.logits_BK[i : i + 1])
        assert np.array_equal(keep[0], wanted.trace.keep_BUG[i].numpy())
        assert macs[0] == float(wanted.macs_B[i])
    model = onnx.load_from_string(file)
    onnx.checker.check_model(model, full_check=True)
    assert str(Path(__file__).parent.parent).encode() not in file
    assert {p.key: p.value for p in model.metadata_props} == {"run": "tiny"}
    branches = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    weights = {tensor.name for branch in branches for tensor in branch.initializer}
    assert weights and not weights & {tensor.name for tensor in model.graph.initializer}


def test_what_a_router_says_is_computed_even_where_its_routes_are_overruled() -> None:
    """Else the time of a net with drawn routes would be told without its router's."""
    net = make_net("dmnn", "paths")
    x = numbered(pictures(4))
    router = Overruled(net.router, random_routes(net.backbone.specs, 4))
    file = onnx_bytes(SkippingGraph(RoutedNet(net.backbone, router).eval(), nn.Identity()), x[:1], OUTPUTS)
    operations = [node.op_type for node in onnx.load_from_string(file).graph.node]
    assert operations.count("Gemm") + operations.count("MatMul") > 3


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a trained run, evaluated on both splits at a target."""
    folder = tmp_path / "run"
    shutil.copytree(runs["dmnn"], folder, ignore=shutil.ignore_patterns("eval.csv", "routes.csv", "budget.json"))
    for split in ("calib", "test"):
        assert main(["eval", str(folder), "--flops-target", "0.7", "--split", split]) in (0, 3)
    return folder


def test_a_run_becomes_a_file_that_says_what_eval_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "net.onnx"
    capsys.readouterr()
    assert main(["export", str(run), "--flops-target", "0.7", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["form"], said["bytes"], said["flops_target"]) == ("skipping", out.stat().st_size, 0.7)
    assert said["share"] == pytest.approx(0.7, abs=0.01) and 0 <= said["apart"] < 1e-3
    images = load(load_config(overrides=TINY).data).test.images[:12].numpy()  # type: ignore[union-attr]
    runtime = session(out.read_bytes())
    rows = [row for row in read_rows(run / "routes.csv") if row["split"] == "test"][:12]
    assert said["checked"] == 32 and said["routes"] > 1 and len({row["route"] for row in rows}) > 1
    for image, row in zip(images, rows, strict=True):
        x_1CHW = image.transpose(2, 0, 1)[None].astype(np.float32) / 255
        logits, keep, macs = runtime.run(None, {INPUT: x_1CHW})
        assert "/".join("".join(str(int(bit)) for bit in unit) for unit in keep[0]) == row["route"]
        assert (int(logits.argmax()), float(macs[0])) == (int(row["predicted"]), float(row["macs"]))
    told = {p.key: p.value for p in onnx.load(str(out)).metadata_props}
    assert (told["method"], told["flops_target"], told["form"]) == ("dmnn", "0.7", "skipping")
    assert (told["flops_max"], told["checkpoint"]) == ("", fingerprint(run / "last.pt"))
    assert len(json.loads(told["classes"])) == 20


def test_one_route_for_all_is_the_most_common_of_the_calibration_split(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.onnx"
    words = ["export", str(run), "--form", "static", "--out", str(out), "--json"]
    rows = [dict(row) for row in read_rows(run / "routes.csv")]
    usual, rare = (max({row["route"] for row in rows}, key=lambda route: side * route.count("1")) for side in (-1, 1))
    assert usual != rare
    calib = [row for row in rows if row["split"] == "calib"]
    for row in rows:
        row["route"] = rare
    for place, row in enumerate(calib):
        row["route"] = rare if place % 3 == 0 else usual
    write_rows(run / "routes.csv", rows)
    capsys.readouterr()
    assert main([*words, "--flops-target", "0.7"]) == 0
    said = json.loads(capsys.readouterr().out)
    net = restore(run / "last.pt")[0]
    macs = float(net.cost(deployment.read_route(usual, net)[None])[0]) - net.cost.router
    told = {p.key: p.value for p in onnx.load(str(out)).metadata_props}
    assert (said["route"], said["share"]) == (usual, pytest.approx(macs / net.cost.dense))
    assert (told["route"], told["macs"]) == (usual, f"{macs:.0f}") and net.cost.router > 0
    logits = session(out.read_bytes()).run(None, {INPUT: np.zeros((3, 3, 16, 16), np.float32)})[0]
    assert logits.shape == (3, 20)
    out.unlink()
    assert main(words) == 2  # nothing was evaluated at the trained point
    assert f"dynroute eval {run} --split calib\n" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "net.pt"], "--out must be a file name that ends in .onnx"),
        (["--out", "net.onnx", "--form", "statik"], "did you mean 'static'?"),
        (["--out", "net.onnx", "--route", "1/1"], "--route is for --form static"),
        (
            ["--out", "net.onnx", "--form", "static", "--route", "1/1"],
            "'1/1' is no route of this net: one looks like 1",
        ),
        (["--out", "net.onnx", "--form", "static", "--route", ""], "'' is no route of this net"),
        (["--out", "net.onnx", "--form", "static", "--route", "1/1", "--flops-max", "0.9"], "--route excludes"),
        (["--out", "net.onnx", "--flops-target", "1.5"], "is a share of the dense net's"),
        (["--out", "net.onnx", "--flops-max", "0.51", "--flops-target", "0.41"], "has no calibrated setting"),
        (["--out", "folder.onnx"], "--out folder.onnx is a folder"),
        (["--out", "folder.onnx/file/net.onnx"], "would lie in a file"),
    ],
)
def test_wrong_words(
    words: list[str], says: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "folder.onnx" / "file").write_text("")
    before = tree(tmp_path)
    assert main(["export", str(runs["dmnn"]), *words]) == 2
    assert says in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_static_run_has_its_own_route(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capsys.readouterr()
    words = ["--form", "static", "--out", str(tmp_path / "a.onnx"), "--json"]
    assert main(["export", str(runs["static"]), *words]) == 0
    said = json.loads(capsys.readouterr().out)
    net = restore(runs["static"] / "last.pt")[0]
    assert said["share"] == pytest.approx(float(net(pictures(1)).macs_B[0]) / net.cost.dense)


@pytest.mark.parametrize(
    "content", ["index,split\n0,calib\n", "index,split,flops_target,checkpoint,route\n0,calib,,last,11\n"]
)
def test_routes_that_cannot_be_read(
    content: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "routes.csv").write_text(content)
    assert main(["export", str(run), "--form", "static", "--out", str(tmp_path / "a.onnx")]) == 2
    said = capsys.readouterr().err
    assert "lacks columns" in said or "'11' is no route of this net" in said


def test_an_illegal_route_is_named(runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    route = "/".join(["0111"] * 3)
    assert (
        main(["export", str(runs["rnp"]), "--form", "static", "--route", route, "--out", str(tmp_path / "a.onnx")]) == 2
    )
    assert "cannot keep 0111" in capsys.readouterr().err


def test_a_file_that_disagrees_is_not_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.onnx"
    monkeypatch.setattr(deployment, "onnx_bytes", lambda graph, x, **words: onnx_bytes(graph.layers[1:], x, **words))
    route = "/".join("1" * spec.parts for spec in restore(runs["dmnn"] / "last.pt")[0].backbone.specs)
    assert main(["export", str(runs["dmnn"]), "--form", "static", "--route", route, "--out", str(out)]) == 2
    assert "cannot be exported: as ONNX logits differ by" in capsys.readouterr().err
    assert not out.exists()


def test_without_the_extra_it_says_what_to_install(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(runs["dmnn"]), "--out", str(tmp_path / "net.onnx")]) == 2
    assert "pip install 'dynroute[export]'" in capsys.readouterr().err


def test_what_cannot_be_exported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(Unavailable, match="export to ONNX: "):
        onnx_bytes(Odd(), torch.ones(1, 3, 4, 4))
    with pytest.raises(Unavailable, match="ONNX Runtime: "):
        session(b"nothing")
