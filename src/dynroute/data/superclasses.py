"""Superclasses of the classes: from a table, from nested folders, or ImageNet's 58 categories, which ship with the package.

The table of ImageNet, imagenet_categories.csv, is made by experiments/imagenet/categories.py, which says its rule.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

import torch

from dynroute.contracts import InputError
from dynroute.data.spec import DataOptions, Dataset, DataSpec

AUTO, NONE, FOLDERS = "auto", "none", "folders"


def with_superclasses(data: Dataset, options: DataOptions) -> Dataset:
    """The data set with the superclasses that data.superclasses asks for. Raises InputError where a table does not fit."""
    spec = described(data.spec, options)
    if spec is data.spec:
        return data
    for split in (data.train, data.calibration, data.test):
        split.superclasses = torch.tensor(spec.superclass_of)[split.labels] if spec.superclasses else None
    return replace(data, spec=spec)


def described(spec: DataSpec, options: DataOptions) -> DataSpec:
    """The description with superclasses by data.superclasses; the same object where nothing changes."""
    wanted = options.superclasses
    if wanted == NONE:
        return replace(spec, superclasses=0, superclass_names=(), superclass_of=())
    if wanted == FOLDERS:
        return grouped(spec, {name: name.split("/")[0] for name in spec.class_names}, "data.superclasses=folders")
    if wanted != AUTO:
        return grouped(spec, read_table(Path(wanted)), wanted)
    table = imagenet_categories() if options.name == "imagenet" else {}
    known = {table.get(name) for name in spec.class_names}
    return spec if None in known or len(known) < 2 else grouped(spec, table, "imagenet_categories.csv")


def grouped(spec: DataSpec, table: Mapping[str, str], source: str) -> DataSpec:
    """The description with the superclass of each class by its name. Raises InputError for a class that is not there."""
    for name in spec.class_names:
        if name not in table:
            raise InputError(f"{source}: no superclass for class {name!r}")
    names = tuple(sorted({table[name] for name in spec.class_names}))
    if len(names) < 2:
        raise InputError(
            f"{source}: all classes are in one superclass, {names[0]!r}; data.superclasses=none needs no table"
        )
    index = tuple(names.index(table[name]) for name in spec.class_names)
    return replace(spec, superclasses=len(names), superclass_names=names, superclass_of=index)


def read_table(path: Path) -> dict[str, str]:
    """Superclass by class name, from a CSV file of two columns, with or without a header class,superclass."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"data.superclasses: cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    table: dict[str, str] = {}
    for line, row in enumerate(rows, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (line == 1 and cells == ["class", "superclass"]):
            continue
        if len(cells) != 2 or not all(cells):
            raise InputError(f"{path} line {line}: two columns are needed, class and superclass")
        if table.setdefault(cells[0], cells[1]) != cells[1]:
            raise InputError(f"{path} line {line}: class {cells[0]!r} is in two superclasses")
    return table


@cache
def imagenet_categories() -> dict[str, str]:
    """ImageNet's 1000 WordNet ids, in the order of their labels, and the category of each, one of 58."""
    text = resources.files("dynroute.data").joinpath("imagenet_categories.csv").read_text(encoding="utf-8")
    return {row["wnid"]: row["category"] for row in csv.DictReader(text.splitlines())}
