"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), downloaded by torchvision or read from an .npz file."""

from __future__ import annotations

import contextlib
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dynroute.contracts import InputError
from dynroute.data.arrays import fitted, read_arrays, read_splits, within
from dynroute.data.files import one_line
from dynroute.data.spec import DataOptions, Dataset, DataSpec, Split

# Names in the order of their labels, which is alphabetical.
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_CIFAR100_COARSE = """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2
"""
CIFAR10_CLASSES = tuple(_CIFAR10.split())
CIFAR100_CLASSES = tuple(_CIFAR100.split())
CIFAR100_SUPERCLASSES = tuple(_CIFAR100_COARSE.split())

# The superclass of each fine class: torchvision drops the coarse labels, but they follow from the fine ones.
# fmt: off
CIFAR100_SUPERCLASS_OF = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7,
    6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
    16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
    12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)
# fmt: on

CIFAR10 = DataSpec("cifar10", 32, 10, CIFAR10_CLASSES)
CIFAR100 = DataSpec(
    "cifar100",
    32,
    100,
    CIFAR100_CLASSES,
    superclasses=20,
    superclass_names=CIFAR100_SUPERCLASSES,
    superclass_of=CIFAR100_SUPERCLASS_OF,
)


def cifar10(options: DataOptions, seed: int = 0) -> Dataset:
    """50,000 training and 10,000 test images of 10 classes. seed is not used."""
    return read(CIFAR10, "CIFAR10", options)


def cifar100(options: DataOptions, seed: int = 0) -> Dataset:
    """50,000 training and 10,000 test images of 100 classes in 20 superclasses. seed is not used."""
    return read(CIFAR100, "CIFAR100", options)


def read(spec: DataSpec, torchvision_name: str, options: DataOptions) -> Dataset:
    """The data set from an .npz file or from torchvision's folder, under CIFAR's own names and statistics."""
    path = Path(options.path or "data")
    splits = from_npz(path, spec) if path.suffix == ".npz" else from_torchvision(path, torchvision_name, spec)
    if spec.superclass_of:
        for split in splits.values():
            split.superclasses = torch.tensor(spec.superclass_of)[split.labels]
    return fitted(replace(spec, image_size=options.image_size or spec.image_size), options, splits)


def from_npz(path: Path, spec: DataSpec) -> dict[str, Split]:
    """The splits of a .npz file with CIFAR's classes."""
    splits = read_splits(path, read_arrays(path))
    for part, split in splits.items():
        within(path, f"{part}_labels", split.labels, spec.classes)
    return splits


def from_torchvision(root: Path, torchvision_name: str, spec: DataSpec) -> dict[str, Split]:
    """train and test as torchvision reads them, downloaded into the folder if they are not there."""
    from torchvision import datasets

    splits = {}
    for part in ("train", "test"):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command's own result
                data = getattr(datasets, torchvision_name)(root=root, train=part == "train", download=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{spec.name} could not be read from or downloaded into {root}/ ({one_line(error)}); "
                f"put its archive into that folder or use data.name=npz data.path=FILE.npz"
            ) from error
        splits[part] = Split(torch.from_numpy(data.data), torch.tensor(data.targets))
    return splits
