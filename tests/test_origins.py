"""What a run is started from and trained on: told apart, kept to on resume, and said where it has changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import TINY
from dynroute import catalogue, plugins, runs
from dynroute.assembly import restore
from dynroute.cli import main
from dynroute.config import describe_fields, load_config
from dynroute.contracts import InputError, UnitSpec
from dynroute.routers.draws import draws
from dynroute.routers.limit import MOST, options
from dynroute.skipping import FastNet
from dynroute.skipping.lowering import straight
from dynroute.units import FEW, WidthNorm
from tiny import make_backbone, make_net, pictures

DATA = ["data.name=npz", "backbone.name=resnet8", "backbone.width=8", "optim.batch_size=16", "optim.amp=none"]
DATA += ["device=cpu", "threads=1", "router.name=static", "router.epochs=1"]


def npz(path: Path, images: int, size: int = 16, classes: int = 4) -> Path:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for name, count in (("train", images), ("test", 12)):
        made[f"{name}_images"] = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        made[f"{name}_labels"] = np.arange(count) % classes
    np.savez(path, **made)
    return path


def test_checkpoints_go_by_the_folder_of_their_run() -> None:
    """All of them are called last.pt."""
    of = {
        name: load_config(None, [f"backbone.weights={name}"])
        for name in ("a/last.pt", "b/last.pt", "a", "c/a", "a.pt", "a/best.pt")
    }
    assert of["a/last.pt"].hash() == of["a"].hash() == of["c/a"].hash()
    assert len({each.hash() for each in of.values()}) == 4
    assert of["a/last.pt"].origins() == of["a"].origins() == of["c/a"].origins() != of["b/last.pt"].origins()
    pooled = ["w/x-s1.pt", "x-s2.pt"], ["a-s0/best.pt", "a-s1/best.pt"], ["-s1"], ["a-s0", "a-s1/last.pt"]
    hashes = [{load_config(None, [f"backbone.weights={name}"]).hash() for name in names} for names in pooled]
    assert [len(one) for one in hashes] == [1] * 4 and len(set.union(*hashes)) == 4


def test_a_run_is_not_resumed_with_another_teacher(runs: dict[str, Path], tmp_path: Path) -> None:
    """Seeds of one experiment have one hash: the names that differ by it are compared as well."""
    for name in ("t-s0", "t-s1"):
        shutil.copytree(runs["static"], tmp_path / name)
    words = ["train", *TINY, "router.name=static", "router.epochs=1", "--out", str(tmp_path / "run")]
    assert main([*words, f"optim.teacher={tmp_path / 't-s0'}"]) == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert main([*words, f"optim.teacher={tmp_path / 't-s1'}", "--resume"]) == 2
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert main([*words, f"optim.teacher={tmp_path / 't-s0'}", "--resume"]) == 0


def test_images_added_later_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which images are held back for calibration depends on all of them: after five more the split holds trained ones."""
    data, run = npz(tmp_path / "mine.npz", 100), tmp_path / "run"
    words = ["train", *DATA, f"data.path={data}", "--out", str(run)]
    assert main(words) == 0
    assert main(["eval", str(run)]) == 0
    assert "trained on" not in capsys.readouterr().err
    npz(data, 105)
    assert main([*words, "--resume"]) == 2
    assert "other training images than" in capsys.readouterr().err
    assert main(["eval", str(run)]) == 0
    assert "are not those" in capsys.readouterr().err


def test_a_teacher_of_other_images_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, made in (("small", {"size": 16}), ("few", {"size": 24, "classes": 3}), ("other", {"size": 24})):
        data = npz(tmp_path / f"{name}.npz", 60, **made)
        if name == "other":
            np.savez(data, **dict(np.load(data)), class_names=np.array(list("wxyz")))
        assert main(["train", *DATA, f"data.path={data}", "--out", str(tmp_path / name)]) == 0
    data = npz(tmp_path / "mine.npz", 60, size=24)
    words = ["train", *DATA, f"data.path={data}", "--out", str(tmp_path / "run")]
    for teacher, says in (
        ("small", "was trained on 16 pixels, the data have 24"),
        ("few", "knows 3 classes"),
        ("other", "was trained on other classes"),
    ):
        for more in ([], ["--dry-run"]):
            assert main([*words, f"optim.teacher={tmp_path / teacher}", *more]) == 2
            assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_seed_is_checked_before_the_first_is_trained(tmp_path: Path) -> None:
    (tmp_path / "r-s1").mkdir()
    (tmp_path / "r-s1" / "notes.txt").write_text("not a run")
    assert main(["train", *TINY, "router.epochs=1", "--seeds", "0,1", "--out", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r-s0").exists()


def test_one_image_beside_a_validation_split_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = dict(np.load(npz(tmp_path / "mine.npz", 40)))
    np.savez(tmp_path / "mine.npz", **arrays, val_images=arrays["test_images"], val_labels=arrays["test_labels"])
    words = [f"data.path={tmp_path / 'mine.npz'}", "data.train_images=1", "--out", str(tmp_path / "run")]
    assert main(["train", *DATA, *words]) == 2
    assert "1 training image" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


WANT = ["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "CUDA error: out of memory", "", "CUDA"]
WANT += ["DefaultCPUAllocator: not enough memory: you tried", "CUBLAS_STATUS_ALLOC_FAILED"]


@pytest.mark.parametrize("says", WANT)
def test_want_of_memory_is_one_line(
    says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*words: Any, **more: Any) -> None:
        raise (torch.OutOfMemoryError if says in ("", "CUDA") else RuntimeError)(says and f"{says}\nframe 0\nframe 1")

    monkeypatch.setattr(runs, "inspect_path", full)
    assert main(["inspect", "anything"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", ["no_such_module:METHOD", "os:path"])
def test_a_plug_in_that_does_not_load_hides_no_other(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    points = {f"dynroute.{kind}s": [EntryPoint("broken", value, f"dynroute.{kind}s")] for kind in plugins.BUILT_IN}
    monkeypatch.setattr(plugins, "entry_points", lambda group: points[group])
    for kind, found in catalogue.listing().items():
        assert ("broken" in found) == (kind in catalogue.KINDS)
    assert "router.name=broken" in describe_fields() and "router.name=rnr" in describe_fields()
    for kind in plugins.BUILT_IN:
        with pytest.raises(InputError, match=r"does not load|is not a"):
            plugins.find(kind, "broken")


class Scaled(nn.Conv2d):
    """A convolution whose weights are standardised."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight = self.weight / self.weight.std()
        return nn.functional.conv2d(x_BCHW, weight, self.bias, self.stride, self.padding)


class Gated(nn.Sequential):
    """A squeeze of its own input."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * super().forward(x_BCHW)


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_of_another_forward_is_run_as_it_is(packed: bool) -> None:
    torch.manual_seed(0)
    hooked = nn.Conv2d(8, 8, 3, 1, 1)
    hooked.register_forward_hook(lambda module, given, out: 2 * out)
    net = nn.Sequential(
        Scaled(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), Gated(nn.Conv2d(8, 8, 1), nn.Sigmoid()), hooked
    )
    net = net.eval().to(memory_format=torch.channels_last)
    x = pictures(2)
    with torch.inference_mode():
        assert torch.allclose(straight(net, packed)(x), net(x), atol=1e-5)


def test_a_net_of_another_type_is_taken_anew() -> None:
    net, x = make_net("static", "channels"), pictures(3)
    fast = FastNet(net)
    fast(x)
    net.double()
    for _ in range(2):  # then changed in place: the tensors of before are no longer those of the net
        assert torch.allclose(fast(x.double()).logits_BK.float(), net(x.double()).logits_BK.float(), atol=1e-4)
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d | WidthNorm)):
            norm.running_mean.add_(0.5)  # type: ignore[union-attr]


def test_tables_of_a_limit_stay_small() -> None:
    assert len(options(UnitSpec("u", 4, MOST, "free", True, (1 / MOST,) * MOST))) == 2**MOST
    with pytest.raises(InputError, match=f"at most {MOST} free parts"):
        options(UnitSpec("u", 4, MOST + 1, "free", True, (1 / (MOST + 1),) * (MOST + 1)))


def test_draws_of_units_of_many_parts_do_not_overlap() -> None:
    made = torch.cat([draws(torch.tensor([12345]), u, 96) for u in range(4)], 1)
    assert made.unique().numel() == 4 * 96


@pytest.mark.parametrize("size", [1, 4])
def test_a_batchnorm_of_few_images_learns_too(size: int) -> None:
    """Small minibatches never hold FEW images of a width: statistics must not stay as they were made."""
    torch.manual_seed(0)
    norm, mean, var = WidthNorm(4, 3).train(), torch.zeros(3, 4), torch.zeros(3, 4)
    width = torch.tensor([1, 2, 2, 3, 3, 3])
    assert len(width) < FEW
    for step in range(3000):
        y = 5 + 3 * torch.randn(6, 4, 1, 1) + 0.1 * torch.randn(6, 4, size, size)
        norm(y, width)
        if step >= 1000:
            mean += norm.running_mean / 2000
            var += norm.running_var / 2000
    assert torch.allclose(mean, torch.full((3, 4), 5.0), atol=0.5)
    assert torch.allclose(var, torch.full((3, 4), 9.0), rtol=0.25), "what differs between images, not within one alone"
    before = norm.running_mean.clone()
    norm.eval()(y, width)
    assert torch.equal(norm.running_mean, before)


def test_a_static_width_that_no_block_can_take_is_refused() -> None:
    words = ["router.name=static", "router.width=0.5", "backbone.name=resnext50_4x24d", "data.image_size=32"]
    with pytest.raises(InputError, match=r"router\.width=0\.5 does nothing here"):
        runs.check(load_config(None, words))


def test_the_calibration_split_of_a_checkpoint_is_known(runs: dict[str, Path]) -> None:
    content = restore(runs["dmnn"] / "last.pt")[2]
    train, calibration = content["meta"]["images"].split("-")
    assert (train.split(".")[0], calibration.split(".")[0]) == ("360", "40")


def test_widened_sub_blocks_cannot_start_from_a_plain_net() -> None:
    plain = make_backbone("resnet8", "channels").dense_state()
    with pytest.raises(InputError, match=r"widened by backbone\.path_least"):
        make_backbone("resnet8", "paths", parts=4, path_least=16).load_dense(plain)
