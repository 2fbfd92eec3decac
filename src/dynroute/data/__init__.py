"""Data sets: `load` reads one by its name in `DATASETS`, `loader` makes minibatches of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dynroute.contracts import InputError, unknown
from dynroute.data.arrays import npz
from dynroute.data.batches import Loader, loader, normalise
from dynroute.data.cifar import CIFAR10, CIFAR100, cifar10, cifar100
from dynroute.data.drawing import shapes
from dynroute.data.folders import folder, imagenet, pictures
from dynroute.data.spec import DataOptions, Dataset, DataSpec, FileSplit, Split, limited, split_fingerprint
from dynroute.data.superclasses import FOLDERS, described, imagenet_categories, with_superclasses

__all__ = [
    "DATASETS",
    "DataOptions",
    "DataSpec",
    "Dataset",
    "FileSplit",
    "Loader",
    "Split",
    "known_spec",
    "limited",
    "load",
    "loader",
    "normalise",
    "pictures",
    "split_fingerprint",
]

# A data set is a function of its options and of the data's own seed (not the training's). One row adds one.
MakeDataset = Callable[[DataOptions, int], Dataset]
DATASETS: dict[str, MakeDataset] = {
    "shapes": shapes,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "folder": folder,
    "npz": npz,
}


MOST = {"image_size": 4096, "train_images": 100_000_000, "test_images": 100_000_000, "workers": 1024}


def load(options: DataOptions, seed: int = 0, make: MakeDataset | None = None) -> Dataset:
    """The data set that the options name; make: another package's function for it, instead of the row of DATASETS.

    Raises InputError for options out of range, unusable files.
    """
    if make is None and options.name not in DATASETS:
        raise unknown("data set", options.name, DATASETS)
    check(options)
    dataset = with_superclasses((make or DATASETS[options.name])(options, seed), options)
    dataset.spec = replace(dataset.spec, augment=options.augment, flip=dataset.spec.flip and options.flip)
    return dataset


def known_spec(options: DataOptions) -> DataSpec | None:
    """The description of a data set that its name alone tells, so that a net can be sized without the images; else None."""
    imagenet_spec = DataSpec("imagenet", 224, 1000, tuple(imagenet_categories()))
    spec = {"cifar10": CIFAR10, "cifar100": CIFAR100, "imagenet": imagenet_spec}.get(options.name)
    if spec is None or options.superclasses == FOLDERS:
        return None
    return described(replace(spec, image_size=options.image_size or spec.image_size), options)


def check(options: DataOptions) -> None:
    """Raises InputError for the first option out of its range."""
    if not 0 < options.calibration < 1:
        raise InputError(f"data.calibration must lie between 0 and 1, not {options.calibration}")
    for name, most in MOST.items():
        if not 0 <= getattr(options, name) <= most:
            raise InputError(f"data.{name} must lie between 0 and {most}, not {getattr(options, name)}")
    if options.path is not None and options.name == "shapes":
        raise InputError("data.path is for data that are read; data.name=shapes are drawn")
    if options.superclasses == FOLDERS and options.name not in ("folder", "imagenet"):
        raise InputError(f"data.superclasses=folders is for data.name=folder or imagenet, not {options.name}")
    if options.image_size != 0 and options.image_size < 8:
        raise InputError(f"data.image_size must be 0 (the data's own) or at least 8, not {options.image_size}")
