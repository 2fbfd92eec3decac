"""Shared by the tests: one thread a worker, and one tiny trained run of each kind, made through the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from dynroute.cli import main

TINY = [
    "data.name=shapes",
    "data.train_images=400",
    "data.test_images=100",
    "data.image_size=16",
    "backbone.name=resnet8",
    "backbone.width=8",
    "optim.batch_size=32",
    "optim.amp=none",
    "device=cpu",
    "threads=1",
]
SHORT_RNP = [f"router.{key}_epochs={n}" for key, n in {"pretrain": 0, "widths": 1, "agent": 1, "cnn": 1}.items()]
SHORT_RNP += ["router.name=rnp", "router.rounds=1", "router.hidden=8"]
METHODS = {
    "dmnn": ["router.name=dmnn", "router.epochs=1"],
    "rnp": SHORT_RNP,
    "static": ["router.name=static", "router.epochs=1", "router.width=0.5"],
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The workers of pytest-xdist share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of one epoch, by method; eval.csv and routes.csv may be added by any test."""
    root = tmp_path_factory.mktemp("runs")
    for name, keys in METHODS.items():
        assert main(["train", *TINY, *keys, "--out", str(root / name)]) == 0
    return {name: root / name for name in METHODS}


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
