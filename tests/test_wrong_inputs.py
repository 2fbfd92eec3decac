"""Wrong inputs through the real command line: status 2, one line that helps, no traceback, nothing written."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SHORT_RNP, TINY, tree
from dynroute.backbones import BACKBONES, BackboneOptions
from dynroute.cli import main
from dynroute.data import DataSpec

USUAL = [DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning]  # never shown to users
SHORT_DMNN = ["router.name=dmnn", "router.epochs=1"]


class Attack:
    """Runs a shell command when a careless program unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module")
def place(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds one of everything that can be broken, and one good run."""
    root = tmp_path_factory.mktemp("wrong")
    shutil.copytree(runs["dmnn"], root / "good", ignore=shutil.ignore_patterns("eval.csv", "routes.csv"))
    checkpoint = (root / "good" / "last.pt").read_bytes()
    for name in ("torn", "attack", "raw_attack", "foreign", "nameless", "misfit", "stale"):
        (root / name).mkdir()
    (root / "torn" / "last.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    torch.save({"format": 1, "model": Attack()}, root / "attack" / "last.pt")
    (root / "raw_attack" / "last.pt").write_bytes(pickle.dumps(Attack()))
    torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, root / "foreign" / "last.pt")
    torch.save({"format": 1, "model": {}, "rows": []}, root / "nameless" / "last.pt")
    content = torch.load(root / "good" / "last.pt", weights_only=True)
    content["model"] = {k: v[:1] for k, v in content["model"].items() if v.dim()}
    torch.save(content, root / "misfit" / "last.pt")
    (root / "stale" / "notes.txt").write_text("not a run")
    net = BACKBONES["resnet20"](
        DataSpec("shapes", 16, 20, ("",) * 20), BackboneOptions("resnet20").resolved("channels")
    )
    torch.save(net.dense_state(), root / "resnet20.pt")
    torch.save([1, 2], root / "list.pt")
    (root / "byte.pt").write_bytes(b"x")
    (root / "words.pt").write_bytes(b"Please find the weights attached.")
    (root / "old_attack.pt").write_bytes(pickle.dumps(Attack(), protocol=0))
    (root / "broken.yaml").write_text("optim: {lr: 0.1\nseed: 3\n")
    (root / "twice.yaml").write_text("optim: {lr: 0.1}\nseed: 3\noptim: {momentum: 0.5}\n")
    (root / "list.yaml").write_text("- seed\n- 3\n")
    (root / "key.yaml").write_text("optim:\n  learning_rate: 0.1\n")
    (root / "flat.yaml").write_text("optim: 3\n")
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    arrays = {f"{part}_images": np.zeros((20, 8, 8, 3), np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(20) % 2 for part in ("train", "test")}
    np.savez(root / "whole.npz", **arrays)
    whole = (root / "whole.npz").read_bytes()
    (root / "torn.npz").write_bytes(whole[: len(whole) // 2])
    for part in ("train", "test"):
        for label in ("a", "b"):
            (root / "images" / part / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8)).save(root / "images" / part / label / f"{i}.png")
    (root / "images" / "train" / "a" / "1.png").write_text("no image")
    (root / "a_file").write_text("")
    return root


def train(*words: str) -> list[str]:
    return ["train", *TINY, *SHORT_DMNN, *words]


# what is typed, and what the one line must say
CASES: dict[str, tuple[list[str], str]] = {
    # keys and values
    "unknown key": (train("optim.lrr=1"), "did you mean 'optim.lr'?"),
    "unknown top key": (train("sed=1"), "did you mean 'seed'?"),
    "unknown section": (train("optimizer.lr=1"), "did you mean 'optim'?"),
    "key of another method": (train("router.charge=[0.1]"), "unknown key 'router.charge'"),
    "wrong type": (train("optim.lr=fast"), "optim.lr must be a number, not 'fast'"),
    "fraction of an image": (train("optim.batch_size=1.5"), "optim.batch_size must be a whole number"),
    "list of words": (["train", *SHORT_RNP, "router.charge=[a]"], "router.charge must be a list of numbers"),
    "negative rate": (train("optim.lr=-1"), "optim.lr must lie between"),
    "no images in a batch": (train("optim.batch_size=0"), "optim.batch_size must lie between"),
    "target above 1": (train("router.target=2"), "router.target must lie between"),
    "nan": (train("optim.lr=nan"), "optim.lr must lie between"),
    "inf": (train("optim.weight_decay=inf"), "optim.weight_decay must lie between"),
    "nan in data": (train("data.calibration=nan"), "data.calibration must lie between"),
    "nan in a list": (["train", *SHORT_RNP, "router.charge=[.nan]"], "router.charge must be"),
    "missing value": (train("optim.lr=???"), "optim.lr must be a number, not '???'"),
    "interpolation": (train("optim.lr=${foo}"), "optim.lr must be a number, not '${foo}'"),
    "negative seed": (train("seed=-1"), "seed must lie between"),
    "seed too large": (train("seed=99999999999999999999"), "seed must lie between"),
    "too many threads": (train("threads=99999999999"), "threads must lie between"),
    "no equals sign": (train("foo"), "'foo' is not of the form key=value"),
    "no key": (train("=3"), "'=3' is not of the form key=value"),
    "unfinished list": (train("router.hidden=[1"), "the value cannot be parsed"),
    "a value for a section": (train("optim=3"), "optim has the wrong kind of value"),
    "too many parts": (train("backbone.parts=99"), "backbone.parts must not exceed the width"),
    "unit of another method": (
        ["train", "router.name=rnp", "backbone.unit=paths"],
        "needs backbone.unit=channels (or auto), not 'paths'",
    ),
    "unknown unit": (train("backbone.unit=layers"), "backbone.unit must be"),
    "name that leads elsewhere": (train("name=../evil"), "name must be a plain folder name"),
    "no such GPU": (train("device=cuda:99"), "device 'cuda:99' is not usable here"),
    "no such device": (train("device=nonsense"), "device 'nonsense' is not usable here"),
    "device without values": (train("device=meta"), "device 'meta' is not usable here"),
    # names
    "unknown router": (train("router.name=dnn"), "unknown router 'dnn'; did you mean 'dmnn'?"),
    "unknown backbone": (train("backbone.name=resnet9"), "unknown backbone 'resnet9'; did you mean 'resnet8'?"),
    "unknown data set": (train("data.name=cifar"), "unknown dataset 'cifar'; did you mean 'cifar10'?"),
    "unknown split": (["eval", "good", "--split", "tset"], "'tset' is not one of 'test', 'calib'"),
    "unknown option": (["eval", "good", "--flops-targt", "1"], "No such option: --flops-targt"),
    "unknown command": (["trian"], "No such command 'trian'"),
    "unknown kind": (["list", "optimizers"], "'optimizers' is not one of"),
    "missing argument": (["eval"], "Missing argument"),
    # configuration files
    "a key given twice": (["train", "-c", "twice.yaml"], "twice.yaml line 3: not YAML: optim is given twice"),
    "a path of data that are drawn": (train("data.path=cifar10.npz"), "data.path is for data that are read"),
    "bad YAML": (["train", "-c", "broken.yaml"], "broken.yaml line 2: not YAML"),
    "YAML of a list": (["train", "-c", "list.yaml"], "list.yaml must hold keys and values, not a list"),
    "YAML with an unknown key": (["train", "-c", "key.yaml"], "key.yaml: unknown key 'optim.learning_rate'"),
    "YAML with a flat section": (["train", "-c", "flat.yaml"], "flat.yaml: optim has the wrong kind of value"),
    "YAML that is no text": (["train", "-c", "binary.yaml"], "cannot read binary.yaml"),
    "missing YAML": (["train", "-c", "nowhere.yaml"], "cannot read nowhere.yaml: No such file"),
    # targets
    "target 0": (["eval", "good", "--flops-target", "0"], "0 < X <= 1, not 0.0"),
    "target 1.5": (["eval", "good", "--flops-target", "1.5"], "0 < X <= 1, not 1.5"),
    "target -1": (["eval", "good", "--flops-target", "-1"], "0 < X <= 1, not -1.0"),
    "target nan": (["eval", "good", "--flops-target", "nan"], "0 < X <= 1, not nan"),
    "target abc": (["eval", "good", "--flops-target", "abc"], "Invalid value for '--flops-target'"),
    "second target wrong": (["eval", "good", "--flops-target", "0.5", "--flops-target", "2"], "not 2.0"),
    # run folders and checkpoints
    "missing run": (["eval", "god"], "god is not a run folder; did you mean good?"),
    "missing source": (["inspect", "god"], "did you mean good?"),
    "run without a checkpoint": (["eval", "stale"], "cannot read stale/last.pt: No such file"),
    "truncated checkpoint": (["eval", "torn"], "torn/last.pt was not loaded: broken or truncated"),
    "checkpoint that runs code": (["eval", "attack"], "could run code"),
    "pickle that runs code": (["inspect", "raw_attack"], "could run code"),
    "another program's checkpoint": (["eval", "foreign"], "foreign/last.pt is not a checkpoint of dynroute"),
    "checkpoint without a configuration": (["eval", "nameless"], "does not say what it was trained as"),
    "checkpoint that does not fit itself": (["eval", "misfit"], "misfit/last.pt does not fit this architecture"),
    "resume over a foreign checkpoint": (train("--resume", "--out", "nameless"), "does not say what it was trained as"),
    "resume over a torn checkpoint": (train("--resume", "--out", "torn"), "broken or truncated"),
    "folder that holds a run": (train("--out", "good"), "good already holds a run: add --resume"),
    "folder that holds something": (train("--out", "stale"), "stale is not empty and holds no run"),
    "folder that is a file": (train("--out", "a_file"), "cannot use a_file: Not a directory"),
    "folder below a file": (train("--out", "a_file/run"), "cannot use a_file/run: Not a directory"),
    "resume with another rate": (
        train("--resume", "--out", "good", "optim.lr=0.01"),
        "good was trained with another configuration",
    ),
    "resume with another seed": (train("--resume", "--out", "good", "seed=5"), "another configuration"),
    # weights
    "weights of another depth": (
        ["train", *TINY, *SHORT_RNP, "backbone.width=16", "backbone.weights=resnet20.pt"],
        "has no place in this backbone: another depth",
    ),
    "weights of another width": (
        ["train", *TINY, *SHORT_RNP, "backbone.weights=resnet20.pt"],
        "conv1.weight has shape (16, 3, 3, 3), this backbone needs (8, 3, 3, 3)",
    ),
    "a teacher that is nowhere": (train("optim.teacher=nowhere.pt"), "cannot read nowhere.pt"),
    "a teacher to start from without weights": (train("optim.teacher=start"), "needs backbone.weights"),
    "a teacher of other classes": (
        train("optim.teacher=good", "data.name=npz", "data.path=whole.npz"),
        "knows 20 classes",
    ),
    "a teacher's weight": (train("optim.teacher_weight=1.5"), "optim.teacher_weight must lie between"),
    "a schedule": (train("optim.schedule=linear"), "optim.schedule must be cosine or step"),
    "a budget upside down": (["train", *SHORT_RNP, "router.budget=[0.8,0.2]"], "router.budget must be [low, high]"),
    "missing weights": (train("backbone.weights=nowhere.pt"), "cannot read nowhere.pt: No such file"),
    "weights that are a list": (train("backbone.weights=list.pt"), "list.pt holds no state dict of tensors"),
    "weights of one byte": (train("backbone.weights=byte.pt"), "byte.pt was not loaded: broken or truncated"),
    "weights in words": (train("backbone.weights=words.pt"), "words.pt was not loaded: broken or truncated"),
    "old weights that run code": (train("backbone.weights=old_attack.pt"), "could run code"),
    "weights that run code": (train("backbone.weights=raw_attack/last.pt"), "could run code"),
    # data
    "missing npz": (train("data.name=npz", "data.path=nowhere.npz"), "nowhere.npz: no such file"),
    "truncated npz": (train("data.name=npz", "data.path=torn.npz"), "torn.npz: not an .npz archive"),
    "npz without a path": (train("data.name=npz"), "needs data.path"),
    "unreadable image": (train("data.name=folder", "data.path=images"), "images/train/a/1.png: not a readable image"),
    "two training images": (train("data.train_images=2"), "1 training image of 2"),
    # comparisons
    "nothing to compare": (["compare"], "nothing to compare: name runs"),
    "nothing readable": (["compare", "torn", "--out", "cmp"], "nothing to compare: torn"),
    "no such run to compare": (["compare", "god"], "no such run or file: god; did you mean good?"),
    "comparison into a file": (["compare", "--paper", "all", "--out", "a_file"], "cannot write to a_file"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_line_and_status_2(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    words, says = CASES[case]
    before = tree(place)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        status = main(words)
    out, err = capfd.readouterr()
    shown = [w for w in heard if not issubclass(w.category, tuple(USUAL))]
    assert (status, err.count("\n"), shown) == (2, 1, []), err
    assert err.startswith("dynroute: ")
    assert says in err
    assert "Traceback" not in err
    assert out == ""
    assert tree(place) == before
    assert not (place / "pwned").exists()


@pytest.mark.parametrize("case", ["target 1.5", "checkpoint that runs code"])
def test_the_same_as_a_program_of_its_own(case: str, place: Path) -> None:
    words, says = CASES[case]
    before = tree(place)
    run = subprocess.run([sys.executable, "-m", "dynroute", *words], cwd=place, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
    assert says in run.stderr
    assert tree(place) == before


def test_the_attack_is_real(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads((place / "raw_attack" / "last.pt").read_bytes())
    assert (tmp_path / "pwned").exists()
