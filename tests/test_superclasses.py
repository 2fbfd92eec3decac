"""Superclasses: tables, nested folders, none, and ImageNet's 58 categories with the rule that makes them."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dynroute.contracts import InputError
from dynroute.data import DataOptions, Dataset, imagenet_categories, known_spec, load

SCRIPT = Path(__file__).parent.parent / "experiments" / "imagenet" / "categories.py"
CATEGORIES = runpy.run_path(str(SCRIPT))["categories"]


def folders(root: Path, *classes: str) -> Path:
    """Two images of each class in train/ and in val/."""
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)).save(root / part / name / f"{i}.png")
    return root


def opened(root: Path, superclasses: str = "auto", **options: Any) -> Dataset:
    return load(
        DataOptions(**{"name": "folder", "path": str(root), "image_size": 8, "superclasses": superclasses, **options})
    )


@pytest.mark.parametrize("header", ["", "class,superclass\n"])
def test_a_table_names_the_superclass_of_every_class(header: str, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"{header}cat,animal\noak, plant\ndog,animal\nunused,other\n", encoding="utf-8")
    data = opened(folders(tmp_path, "cat", "dog", "oak"), str(table))
    spec = data.spec
    assert (spec.superclasses, spec.superclass_names, spec.superclass_of) == (2, ("animal", "plant"), (0, 0, 1))
    for split in (data.train, data.calibration, data.test):
        assert split.superclasses is not None
        assert torch.equal(split.superclasses, torch.tensor([0, 0, 1])[split.labels])


def test_nested_folders_are_superclasses(tmp_path: Path) -> None:
    data = opened(folders(tmp_path, "animal/cat", "animal/dog", "plant/oak"), "folders")
    assert data.spec.class_names == ("animal/cat", "animal/dog", "plant/oak")
    assert (data.spec.superclass_names, data.spec.superclass_of) == (("animal", "plant"), (0, 0, 1))
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_an_image_beside_nested_class_folders_is_refused(tmp_path: Path) -> None:
    root = folders(tmp_path, "animal/cat", "animal/dog", "plant/oak")
    own = next((root / "train" / "animal" / "cat").iterdir())
    own.rename(root / "train" / "animal" / own.name)
    with pytest.raises(InputError, match="outside the class folders"):
        opened(root, "folders")


def test_without_being_told_folders_have_none(tmp_path: Path) -> None:
    data = opened(folders(tmp_path, "a", "b"))
    assert data.spec.superclasses == 0 and data.train.superclasses is None


def test_none_drops_those_of_the_data() -> None:
    data = load(DataOptions(name="shapes", train_images=60, test_images=20, image_size=8, superclasses="none"))
    assert data.spec.superclasses == 0 and data.spec.superclass_of == () and data.train.superclasses is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,x\n", r"no superclass for class 'b'"),
        ("a,x\nb,x\n", r"all classes are in one superclass, 'x'"),
        ("a,x\nb\n", r"line 2: two columns are needed"),
        ("a,x\nb,y\na,y\n", r"line 3: class 'a' is in two superclasses"),
        (None, r"cannot read .*table\.csv: No such file"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "table.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        opened(folders(tmp_path, "a", "b"), str(tmp_path / "table.csv"))


def test_nested_folders_are_for_folders_only() -> None:
    with pytest.raises(InputError, match=r"data\.superclasses=folders is for"):
        load(DataOptions(name="shapes", superclasses="folders"))


# --- ImageNet ---------------------------------------------------------------------------------------------------


def test_imagenet_has_58_categories_of_moderate_size() -> None:
    table = imagenet_categories()
    sizes = Counter(table.values())
    assert len(table) == 1000 and list(table) == sorted(table)
    assert len(sizes) == 58 and max(sizes.values()) < 30
    assert table["n02085620"] != table["n03417042"] and table["n01440764"] == table["n01443537"]  # dog, truck; two fish
    spec = known_spec(DataOptions(name="imagenet"))
    assert spec is not None and (spec.classes, spec.superclasses, len(spec.superclass_of)) == (1000, 58, 1000)


def test_an_imagenet_folder_gets_them_by_its_names(tmp_path: Path) -> None:
    root = folders(tmp_path, "n01440764", "n01443537", "n03417042")
    spec = opened(root, name="imagenet").spec
    assert spec.superclass_of == (1, 1, 0) or spec.superclass_of == (0, 0, 1)
    assert opened(root, "none", name="imagenet").spec.superclasses == 0


def test_the_rule_by_hand() -> None:
    edges = [("root", "a"), ("root", "b"), ("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("b", "a3")]
    classes = ["a1", "a2", "a3", "b1"]
    assert CATEGORIES(classes, edges, 1) == dict.fromkeys(classes, ("root", False))
    assert CATEGORIES(classes, edges, 2) == {
        "a1": ("a", False),
        "a2": ("a", False),
        "a3": ("a", False),  # of two parents the one with more classes
        "b1": ("root", True),
    }
    assert CATEGORIES(classes, edges, 3) == {
        "a1": ("a1", False),
        "a2": ("a", True),
        "a3": ("a", True),
        "b1": ("root", True),
    }


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 1000), min_size=3, max_size=40), st.data())
def test_the_rule_gives_the_number_asked_for_whatever_the_order(draws: list[int], data: st.DataObject) -> None:
    edges = [(f"n{draw % i:02}", f"n{i:02}") for i, draw in enumerate(draws, 1)]
    inner = {parent for parent, _ in edges}
    classes = [child for _, child in edges if child not in inner]
    count = data.draw(st.integers(1, len(classes)))
    found = CATEGORIES(classes, edges, count)
    assert found.keys() == set(classes) and len(set(found.values())) == count
    assert CATEGORIES(classes[::-1], data.draw(st.permutations(edges)), count) == found
