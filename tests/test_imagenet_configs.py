"""The ImageNet configurations: each starts on a folder of a few small JPEGs and can reach its target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dynroute.backbones import BACKBONES
from dynroute.cli import main
from dynroute.config import load_config
from dynroute.net import RoutedNet
from dynroute.records import read_rows
from dynroute.routers import stacked
from dynroute.routers.slimmable import prefix
from tiny import make_backbone, make_router

EXPERIMENTS = Path(__file__).parent.parent / "experiments" / "imagenet"
SHORT = [f"router.{key}=1" for key in ("widths_epochs", "rounds", "agent_epochs")]
SMALL = ["data.image_size=64", "optim.batch_size=2", "optim.amp=none", "device=cpu", "threads=1"]


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as ImageNet's: six training images, one of which goes to calibration, and four others."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 3), ("val", 2)):
        for wnid in ("n01440764", "n01443537"):
            (root / split / wnid).mkdir(parents=True)
            for i in range(count):
                image = Image.effect_noise((90 + i, 80), 60).convert("RGB")
                image.save(root / split / wnid / f"{wnid}_{i}.JPEG", format="JPEG")
    return root


def start(name: str, jpegs: Path, out: Path, *words: str) -> list[str]:
    """Train a configuration in its phases, an epoch of two steps each; the phases of train.csv."""
    words = (*SHORT, *SMALL, f"data.path={jpegs}", *words)
    assert main(["train", "-c", str(EXPERIMENTS / f"{name}.yaml"), *words, "--out", str(out)]) == 0
    return [row["phase"] for row in read_rows(out / "train.csv")]


@pytest.mark.parametrize("name", ["rnr_resnet50", "rnr_multipath50"])
def test_rnr_starts_on_resnet50(name: str, jpegs: Path, tmp_path: Path) -> None:
    weights = tmp_path / "dense.pt"
    torch.save(make_backbone("resnet50", width=8, classes=2).dense_state(), weights)
    words = ("backbone.width=8", f"backbone.weights={weights}", "router.joint_epochs=1")
    assert start(name, jpegs, tmp_path / "run", *words) == ["widths", "agent1", "joint"]


RNP = sorted(path.stem for path in EXPERIMENTS.glob("rnp_vgg16_*.yaml"))


@pytest.mark.parametrize(("name", "backbone"), [*((name, "vgg16") for name in RNP), (RNP[0], "resnet18")])
def test_rnp_starts(name: str, backbone: str, jpegs: Path, tmp_path: Path) -> None:
    weights = tmp_path / "dense.pt"
    torch.save(make_backbone(backbone, width=8, classes=2, size=32).dense_state(), weights)
    words = (f"backbone.name={backbone}", "backbone.width=8", f"backbone.weights={weights}", "router.cnn_epochs=1")
    assert start(name, jpegs, tmp_path / "run", *words) == ["widths", "agent1", "cnn1"]


@pytest.mark.parametrize("name", RNP)
def test_rnp_configurations_differ_in_penalty_and_groups_and_reach_their_target(name: str) -> None:
    config, first = load_config(EXPERIMENTS / f"{name}.yaml"), load_config(EXPERIMENTS / f"{RNP[0]}.yaml")
    same = replace(config.router, charge=first.router.charge)
    assert (same, config.optim, config.data) == (first.router, first.optim, first.data)
    with torch.device("meta"):
        backbone = make_backbone("vgg16", parts=config.backbone.parts, width=0, size=224, classes=1000)
    cheapest, _ = RoutedNet(backbone, make_router("static", backbone.specs)).span()
    speed_up = int(name.removeprefix("rnp_vgg16_").removesuffix("x"))
    assert cheapest < 0.95 / speed_up


GATED = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.stem.startswith(("dmnn", "convnet_aig")))
STATIC = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.stem.startswith(("res", "mobilenet")))


@pytest.mark.parametrize("name", [*GATED, *STATIC])
def test_rows_of_dmnns_tables_say_what_their_name_says(name: str) -> None:
    config = load_config(EXPERIMENTS / f"{name}.yaml")
    assert config.name == name
    assert config.backbone.name in BACKBONES
    if name in STATIC:
        assert config.router_name == "static" and config.router.width == 1.0
        return
    assert config.router.target == float(name.split("_t")[1].split("_")[0])
    parts = int(name.split("_n")[1][0]) if "_n" in name and not name.startswith("convnet") else 1
    assert (config.backbone.unit, config.backbone.parts) == ("paths", parts)
    assert config.router.previous == ("noprev" not in name and parts > 1)
    assert config.router.category == ("nocat" not in name and parts > 1)


@pytest.mark.parametrize(("name", "share"), [("slimmable_resnet50", 0.58), ("slimmable_mobilenetv2", 0.767)])
def test_a_width_of_the_slimmable_rows_costs_about_what_the_paper_reports(name: str, share: float) -> None:
    config = load_config(EXPERIMENTS / f"{name}.yaml")
    assert (config.name, config.router_name) == (name, "slimmable")
    with torch.device("meta"):
        backbone = make_backbone(config.backbone.name, parts=config.backbone.parts, width=0, size=224, classes=1000)
    net = RoutedNet(backbone, make_router("slimmable", backbone.specs, widths=config.router.widths))
    widths = [stacked([prefix(spec, width) for spec in backbone.specs]) for width in config.router.widths]
    shares = net.cost(torch.stack(widths)) / net.cost.dense
    assert float((shares - share).abs().min()) < 0.05


@pytest.mark.parametrize(
    "name",
    ["slimmable_resnet50", "dmnn50_n4_t0.7", "dmnn_mobilenetv2_1.4_n2_t0.9", "convnet_aig50_t0.7", "resnext50_2x40d"],
)
def test_rows_of_dmnns_tables_train(name: str, jpegs: Path, tmp_path: Path) -> None:
    words = [*SMALL, "optim.lr=0.001", "router.epochs=1", f"data.path={jpegs}"]  # two images would diverge at 0.1
    words += [] if "mobilenet" in name else ["backbone.width=8"]
    assert main(["train", "-c", str(EXPERIMENTS / f"{name}.yaml"), *words, "--out", str(tmp_path / "run")]) == 0
    (row,) = read_rows(tmp_path / "run" / "train.csv")
    assert row["phase"] == ("joint" if name in GATED else "train") and 0 < float(row["calib_share"]) < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GATED, *STATIC])
def test_every_row_of_dmnns_tables_takes_two_steps_at_full_width(name: str, jpegs: Path, tmp_path: Path) -> None:
    words = [*SMALL, "optim.lr=0.001", "router.epochs=1", f"data.path={jpegs}"]
    assert main(["train", "-c", str(EXPERIMENTS / f"{name}.yaml"), *words, "--out", str(tmp_path / "run")]) == 0
    (row,) = read_rows(tmp_path / "run" / "train.csv")
    assert row["phase"] == ("joint" if name in GATED else "train")
