"""Configuration: precedence, the hash, the sentences that become help, and what `auto` becomes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from dynroute import plugins
from dynroute.backbones import BackboneOptions
from dynroute.config import LATER, TopOptions, describe_fields, field_sentences, from_text, load_config
from dynroute.contracts import InputError
from dynroute.data import DataOptions
from dynroute.optim import OptimOptions

OPTIONS = [TopOptions, DataOptions, BackboneOptions, OptimOptions]
OPTIONS += [plugins.find("router", name).options for name in plugins.names("router")]


def test_command_line_beats_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\noptim: {lr: 0.2, momentum: 0.5}\nrouter: {name: rnp, hidden: 7}\n")
    config = load_config(file, ["optim.lr=0.3", "router.alpha=2"])
    assert (config.optim.lr, config.optim.momentum, config.optim.batch_size) == (0.3, 0.5, 128)
    assert (config.top.seed, config.router_name, config.router.hidden, config.router.alpha) == (3, "rnp", 7, 2.0)


def test_the_last_override_of_a_key_wins() -> None:
    assert load_config(overrides=["seed=1", "seed=2"]).top.seed == 2


def test_with_nothing_else_it_is_dmnn_on_shapes() -> None:
    config = load_config()
    assert (config.router_name, config.data.name, config.name) == ("dmnn", "shapes", "dmnn-resnet8-shapes-s0")
    assert load_config(overrides=["name=mine"]).name == "mine"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1e-3}\n")  # YAML 1.1 takes 1e-3 for text
    assert load_config(file).optim.lr == 1e-3
    assert load_config(overrides=["optim.lr=1e-3"]).optim.lr == 1e-3
    assert load_config(overrides=["name=12"]).name == "12"
    assert load_config(overrides=["router.name=rnr", "router.charge=[0,0.2]"]).router.charge == [0.0, 0.2]


@pytest.mark.parametrize("key", ["name=other", "seed=7", "device=cpu", "threads=1", "data.path=x", "data.workers=3"])
def test_the_hash_ignores_what_is_not_the_experiment(key: str) -> None:
    assert load_config(overrides=[key]).hash() == load_config().hash()


@pytest.mark.parametrize(
    "key", ["optim.lr=0.2", "router.target=0.4", "data.augment=false", "backbone.width=8", "router.name=static"]
)
def test_the_hash_tells_experiments_apart(key: str) -> None:
    assert load_config(overrides=[key]).hash() != load_config().hash()


def test_a_users_own_files_are_experiments_of_their_own() -> None:
    one, other, moved = (
        load_config(overrides=["data.name=npz", f"data.path={p}"]) for p in ("a/x.npz", "y.npz", "b/x.npz")
    )
    assert one.hash() == moved.hash() != other.hash()
    assert (one.data.label, one.name) == ("npz-x", "dmnn-resnet8-npz-x-s0")
    assert load_config(overrides=["data.name=folder", "data.path=my data/flowers.v2"]).data.label == "folder-flowers.v2"
    places = [DataOptions("scans", path) for path in ("/a/old", "/b/new", None)]  # of another package
    assert [options.label for options in places] == ["scans-old", "scans-new", "scans"]
    assert DataOptions("imagenet", "/a/ILSVRC").label == "imagenet"


def test_later_options_leave_hashes_as_they_were() -> None:
    config = load_config()
    for section, unused in LATER.items():
        for key, value in unused.items():
            assert vars(getattr(config, section))[key] == value, "what is left out must be the default"
    changed = load_config(overrides=["router.open_epochs=1"]), load_config(overrides=["data.flip=false"])
    assert len({each.hash() for each in (config, *changed)}) == 3


def test_a_fault_is_laid_to_where_it_was_typed(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("router: {name: rnp}\n")
    with pytest.raises(InputError, match=r"^the command line: unknown key 'router\.foo'"):
        load_config(file, ["router.foo=1"])
    file.write_text("router: {name: rnp, foo: 1}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: unknown key 'router\.foo'"):
        load_config(file, ["router.lr=1"])


def test_the_hash_takes_weights_by_file_name() -> None:
    here, there, other = (load_config(overrides=[f"backbone.weights={p}"]) for p in ("a/w.pt", "b/w.pt", "a/v.pt"))
    assert here.hash() == there.hash() != other.hash()


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_every_key_has_its_sentence_and_stands_in_the_help(cls: type) -> None:
    sentences, help_text = field_sentences(cls), describe_fields()
    for f in dataclasses.fields(cls):
        assert len(sentences.get(f.name, "").split()) >= 2, f"{cls.__name__}.{f.name} has no sentence"
        assert sentences[f.name] in help_text
        assert f"{f.name} = " in help_text


def test_an_inherited_option_keeps_its_sentence_and_a_new_one_replaces_it() -> None:
    rnp, rnr = (field_sentences(plugins.find("router", name).options) for name in ("rnp", "rnr"))
    assert rnr["alpha"] == rnp["alpha"]
    assert rnr["lr"] != rnp["lr"]


@pytest.mark.parametrize(
    ("keys", "unit", "parts"),
    [
        (["router.name=dmnn"], "paths", 2),
        (["router.name=rnp"], "channels", 4),
        (["router.name=static"], "channels", 4),
        (["router.name=static", "backbone.unit=paths"], "paths", 2),
        (["router.name=rnp", "backbone.parts=8"], "channels", 8),
        (["router.name=rnp", "backbone.width=3"], "channels", 3),
    ],
)
def test_auto_becomes_what_the_router_needs(keys: list[str], unit: str, parts: int) -> None:
    backbone = load_config(overrides=keys).backbone
    assert (backbone.unit, backbone.parts) == (unit, parts)


@pytest.mark.parametrize("name", plugins.names("router"))
@pytest.mark.parametrize("comments", [True, False])
def test_yaml_gives_the_same_configuration_back(name: str, comments: bool) -> None:
    path = "name: " * 40 + "# x"  # long enough to be folded into lines that look like keys
    config = load_config(overrides=[f"router.name={name}", "optim.lr=1e-5", f"data.path='{path}'"])
    text = config.yaml(comments)
    again = from_text(text, "text")
    assert again == config
    assert again.hash() == config.hash()
    assert ("# Learning rate of the backbone" in text) == comments
    assert yaml.safe_load(text) == config.as_dict()


def test_a_configuration_file_of_ours_is_read_whole() -> None:
    for file in sorted((Path(__file__).parent.parent / "experiments").glob("*/*.yaml")):
        assert load_config(file).name


@pytest.mark.parametrize("text", ["a", "1: 2", "[]"])
def test_what_is_no_mapping_of_keys_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="must hold keys and values"):
        from_text(text, "text")
