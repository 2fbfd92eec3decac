"""The CIFAR configurations: the three stages of RNP's recipe follow one another, and every row starts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dynroute.assembly import build, restore
from dynroute.cli import main
from dynroute.config import load_config
from dynroute.data import known_spec
from dynroute.records import read_rows
from dynroute.routers.gates import DmnnOptions

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SMALL = ["optim.batch_size=32", "optim.amp=none", "device=cpu", "threads=1"]
STAGES = {"baseline": ["router.epochs=1"], "widths": ["router.widths_epochs=1"], "rnp": ["router.joint_epochs=1"]}


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seventy training images (64 after calibration: two steps) and ten test images under CIFAR's names."""
    root, draw = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    paths = {}
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        sizes = {"train": 70, "test": 10}
        content = {f"{s}_images": draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for s, n in sizes.items()}
        content |= {f"{s}_labels": draw.integers(0, classes, n) for s, n in sizes.items()}
        paths[name] = root / f"{name}.npz"
        np.savez(paths[name], **content)
    return paths


def start(path: Path, data: Path, out: Path, *words: str) -> list[str]:
    """Train a configuration for an epoch of two steps in each of its phases; the phases of train.csv."""
    assert main(["train", "-c", str(path), f"data.path={data}", *SMALL, *words, "--out", str(out)]) == 0
    return [row["phase"] for row in read_rows(out / "train.csv")]


def test_the_stages_of_the_authors_recipe_follow_one_another(arrays: dict[str, Path], tmp_path: Path) -> None:
    seen, before = {}, ["backbone.width=8"]
    for name, epochs in STAGES.items():
        words = [*before, *epochs, "router.hidden=8"] if name == "rnp" else [*before, *epochs]
        seen[name] = start(EXPERIMENTS / "cifar100" / f"{name}.yaml", arrays["cifar100"], tmp_path / name, *words)
        before = ["backbone.width=8", f"backbone.weights={tmp_path / name}"]
    assert seen == {"baseline": ["train"], "widths": ["widths"], "rnp": ["joint"]}
    config = restore(tmp_path / "rnp" / "last.pt")[1]
    assert config.router.charge == [0.1] and config.router.alpha == 1.0 and config.router.action_cost == "index"
    assert main(["eval", str(tmp_path / "rnp"), "--flops-target", "0.5"]) in (0, 3)
    assert float(read_rows(tmp_path / "rnp" / "train.csv")[0]["note_alpha"]) == 1.0
    # stage 2 ranked the filters of stage 1: the first routed layer holds the same filters in another order
    dense, ranked = (
        restore(tmp_path / n / "last.pt")[0].backbone.routable[0].conv.weight for n in ("baseline", "widths")
    )
    assert not torch.allclose(dense, ranked, atol=1e-2)  # type: ignore[arg-type]
    norms = [w.flatten(2).norm(dim=2).mean(1).sort().values for w in (dense, ranked)]  # type: ignore[operator]
    assert torch.allclose(*norms, atol=1e-2)


VANILLA = [path for name in ("cifar100", "conv4") for path in sorted((EXPERIMENTS / name).glob("vanilla_*.yaml"))]


VANILLA += sorted((EXPERIMENTS / "cifar100" / "small").glob("static_[0-9]*.yaml"))


@pytest.mark.parametrize("path", VANILLA, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_vanilla_nets_cost_what_their_names_say(path: Path) -> None:
    config = load_config(path)
    spec = known_spec(config.data)
    assert spec is not None
    net = build(config, spec).eval()
    with torch.no_grad():
        share = float(net(torch.zeros(1, 3, 32, 32)).macs_B) / net.cost.dense
    assert share == pytest.approx(int(path.stem.split("_")[1]) / 100, abs=0.012)


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "cifar100").glob("vanilla_*.yaml")), ids=lambda path: path.stem)
def test_the_vanilla_rows_start(path: Path, arrays: dict[str, Path], tmp_path: Path) -> None:
    words = ["backbone.width=16", "router.epochs=1", "optim.lr=0.01"]
    assert start(path, arrays["cifar100"], tmp_path / "run", *words) == ["train"]


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "cifar10_gpu").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_rows_for_a_gpu_start(path: Path, arrays: dict[str, Path], tmp_path: Path) -> None:
    if path.stem == "cascade":  # of two static rows
        parts = ["backbone.width=16", "backbone.weights=null", "router.epochs=1", "optim.teacher=null"]
        for name in ("static_25", "dense16"):
            start(path.with_stem(name), arrays["cifar10"], tmp_path / name, *parts)
        nets = f"backbone.nets=[{tmp_path}/static_25,{tmp_path}/dense16]"
        words = [f"data.path={arrays['cifar10']}", "backbone.width=16", nets]
        assert main(["train", "-c", str(path), *words, "--out", str(tmp_path / "run")]) == 0
        assert main(["eval", str(tmp_path / "run"), "--flops-target", "0.6"]) in (0, 3)
        return
    rnr = ["router.widths_epochs=1"] if path.stem == "widths" else ["router.agent_epochs=1", "router.joint_epochs=1"]
    words = rnr if path.stem in ("widths", "rnr") else ["router.epochs=1"]
    apart = [
        "backbone.weights=null",
        "optim.teacher=null",
        f"backbone.width={16 if path.stem in ('static_25', 'dense16') else 8}",
    ]
    phases = start(path, arrays["cifar10"], tmp_path / "run", *words, *apart)
    assert phases == {"widths": ["widths"], "rnr": ["agent1", "joint"]}.get(path.stem, ["train"])


@pytest.mark.parametrize("name", ["start", "vanilla_17", "rnp", "rnp_paper_05"])
def test_the_four_conv_rows_start(name: str, arrays: dict[str, Path], tmp_path: Path) -> None:
    rnp = [
        "backbone.width=8",
        "backbone.weights=null",
        "optim.teacher=null",
        "router.hidden=8",
        "router.widths_epochs=1",
        "router.joint_epochs=1",
    ]
    paper = [*rnp[:2], "router.hidden=8", "router.widths_epochs=1", "router.rounds=1"]
    words = {"rnp": rnp, "rnp_paper_05": paper}.get(name, ["router.epochs=1"])
    phases = start(EXPERIMENTS / "conv4" / f"{name}.yaml", arrays["cifar10"], tmp_path / "run", *words)
    wanted = {"rnp": ["widths", "agent1", "joint"], "rnp_paper_05": ["widths", "agent1", "cnn1"]}
    assert phases == wanted.get(name, ["train"])


@pytest.mark.parametrize("path", ["cifar10/rnr.yaml", "cifar10/cascade_25_100.yaml", "cifar100/rnp.yaml"])
def test_a_configuration_is_inspected_without_its_weights(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(EXPERIMENTS / path), "--json"]) == 0
    assert '"macs_dense"' in capsys.readouterr().out


# --- DMNN's tables ----------------------------------------------------------------------------------------------

GATED = [
    path
    for folder in ("ablation", "cifar100/small", "cifar100/resnet50", "cifar100/ablation")
    for path in sorted((EXPERIMENTS / folder).glob("*.yaml"))
    if path.stem.startswith(("dmnn", "aig"))
]


@pytest.mark.parametrize("path", GATED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_rows_of_dmnns_tables_say_what_their_names_say(path: Path) -> None:
    config = load_config(path)
    assert (config.name, config.backbone.unit) == (path.stem, "paths")
    kind, setting = path.stem.split("_")
    on = {"none": (False, False), "previous": (True, False), "category": (False, True)}.get(setting, (True, True))
    assert (config.router.previous, config.router.category) == ((False, False) if kind == "aig" else on)
    assert (config.backbone.parts == 1) == (config.router.resource == "aig") == (kind == "aig")
    share = float(setting.removeprefix("t")) if setting[-1].isdigit() else 0.7
    assert config.router.target == (share if share <= 1 else share / 100)


@pytest.mark.parametrize("folder", ["ablation", "cifar100/small", "cifar100/resnet50"])
def test_rows_of_a_table_share_one_recipe(folder: str) -> None:
    configs = [load_config(p) for p in (EXPERIMENTS / folder).glob("*.yaml") if p.stem != "cascade"]
    epochs = {c.router.epochs + getattr(c.router, "open_epochs", 0) for c in configs}
    assert len(epochs) == len({(c.backbone.name, str(c.optim), str(c.data)) for c in configs}) == 1
    gated = [c.router for c in configs if isinstance(c.router, DmnnOptions)]
    assert len({(r.open_epochs, r.cooling) for r in gated}) == 1


@pytest.mark.parametrize("path", ["small/dmnn_50", "small/aig_50", "small/dense", "resnet50/dmnn_t0.5"])
def test_rows_of_dmnns_tables_start(path: str, arrays: dict[str, Path], tmp_path: Path) -> None:
    words = ["router.epochs=1", "backbone.width=16", "optim.lr=0.01"]
    phases = start(EXPERIMENTS / "cifar100" / f"{path}.yaml", arrays["cifar100"], tmp_path / "run", *words)
    if "dense" in path:
        assert phases == ["train"]
    else:
        assert phases == [*["open"] * (2 if "small" in path else 0), "joint"]
    if "dmnn" in path:
        assert float(read_rows(tmp_path / "run" / "train.csv")[-1]["loss_category"]) > 0


RESULTS = EXPERIMENTS / "results"
OF_OTHER_OPTIONS = {  # made when the options were others; dmnn_70: before it set targets
    *(f"cifar10/{name}" for name in ("dense", "dmnn", "rnp", "static_40", "static_60", "static_80")),
    *("shapes/rnr", "cifar100/small/dmnn_70"),
}


def published() -> list[tuple[Path, Path]]:
    """CSVs of runs and the configurations that they are named after."""
    named = [
        (file, re.sub(r"-s\d$", "", str(file.relative_to(RESULTS).with_suffix("")))) for file in RESULTS.rglob("*.csv")
    ]
    made = [(file, EXPERIMENTS / f"{name}.yaml") for file, name in named if name not in OF_OTHER_OPTIONS]
    return sorted((file, config) for file, config in made if config.exists())


def test_published_rows_are_of_the_configurations_as_they_stand() -> None:
    assert len(published()) > 30
    wrong = [
        str(file.relative_to(RESULTS))
        for file, config in published()
        if {row["config_hash"] for row in read_rows(file)} != {load_config(config).hash()}
    ]
    assert wrong == []
