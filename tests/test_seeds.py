"""train --seeds: a run for each seed, side by side, pooled again by compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynroute import runs
from dynroute.cli import main, parse_seeds
from dynroute.config import load_config
from dynroute.contracts import InputError
from dynroute.records import base_name


def test_seeds_get_folders_of_their_own() -> None:
    config = load_config(None, ["name=mine"])
    made = runs.seeded(config, [0, 3])
    assert [(c.top.seed, c.name, str(f)) for c, f in made] == [
        (0, "mine-s0", "runs/mine-s0"),
        (3, "mine-s3", "runs/mine-s3"),
    ]
    assert len({c.hash() for c, _ in made}) == 1
    assert {base_name(f.name) for _, f in made} == {"mine"}
    assert runs.seeded(made[0][0], [1])[0][0].name == "mine-s1"
    unnamed, folder = runs.seeded(load_config(), [2], Path("there/x"))[0]
    assert (unnamed.name.endswith("-s2"), str(folder)) == (True, "there/x-s2")


@pytest.mark.parametrize("text", ["", "a", "0,,1", "-1", "1.5", "0;1", "²"])
def test_wrong_seeds_are_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="--seeds takes whole numbers"):
        parse_seeds(text)
    assert parse_seeds("2, 0,2") == [2, 0]


def test_the_command_trains_each_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[int, str, bool]] = []

    def train(config, folder, *, resume, begun, listener):  # type: ignore[no-untyped-def]
        begun()
        trained.append((config.top.seed, folder.name, resume))

    monkeypatch.setattr(runs, "train", train)
    assert main(["train", "--seeds", "1,4", "--out", str(tmp_path / "x"), "--resume", "router.epochs=1"]) == 0
    assert trained == [(1, "x-s1", True), (4, "x-s4", True)]


def test_seeds_of_several_stages_have_one_hash() -> None:
    """Each stage starts from, or learns from, that of its own seed; the names of these runs hold the seed."""
    for words in (
        ["backbone.weights=runs/gpu/dense-s{}", "router.name=rnr"],
        ["backbone.weights=runs/widths_seed{}", "optim.teacher=runs/dense-s{}", "router.name=rnr"],
        ["router.name=cascade", "backbone.nets=[runs/narrow-s{0},runs/dense-s{0}]", "backbone.widths=[0.5,1.0]"],
    ):
        hashes = {
            load_config(None, ["data.name=cifar10", f"seed={n}", *(word.format(n) for word in words)]).hash()
            for n in range(3)
        }
        assert len(hashes) == 1, words
    one, other = (load_config(None, [f"backbone.weights=runs/{name}"]).hash() for name in ("dense-s0", "wide-s0"))
    assert one != other
